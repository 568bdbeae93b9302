"""Shapes: the demo's held-out questions about drawn pictures of colored shapes (`make demo` draws them).

Every question is asked twice, about its picture and about a blank one. The score on blank pictures, which is what the
model knows without looking, and the chance level are sub-scores.

shapes/questions.jsonl: question_id, image, text, answer, category, chance; shapes/images/.
"""
from argparse import Namespace
from pathlib import Path

from benchmarks.files import field, image_file, number_of, parsed, required_files
from benchmarks.scoring import Example, Graded, Score, Task, accuracy, grade_plain, mean


def read(folder: Path, options: Namespace) -> list[Example]:
    path, images = required_files(folder, "questions.jsonl", "images/")
    return parsed(path, lambda row: Example(
        number_of(row), image_file(images, field(row, "image")), field(row, "text"), field(row, "answer"),
        (field(row, "category"),), {"chance": field(row, "chance", int, float)}))


def summarize(graded: Graded) -> Score:
    return accuracy(graded, {"chance": 100 * mean([example.info["chance"] for example, _ in graded])})


TASK = Task(
    read=read,
    grade=grade_plain,
    summarize=summarize,
    splits={"all": 0},
    blank=True,
    source="run `make demo`, then give --root out/demo/data",
    files={"questions.jsonl": ""},
)
