"""Shapes: the demo's held-out questions about drawn pictures of colored shapes (`make demo` draws them).

Every question is asked twice, about its picture and about a blank one. The score on blank pictures, which is what the
model knows without looking, and the chance level are sub-scores.

shapes/questions.jsonl: question_id, image, text, answer, category, chance; shapes/images/.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import field, image_file, number_of, reading, required_files, rows_of
from benchmarks.scoring import BLANK, Example, Grade, Score, Task, accuracy, grade_plain, mean


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    [path] = required_files(folder, "questions.jsonl", images="images")
    for where, row in rows_of(path):
        with reading(where):
            image = image_file(folder / "images", field(row, "image"))
            example = Example(number_of(row), image, field(row, "text"), field(row, "answer"),
                              (field(row, "category"),), {"chance": field(row, "chance", int, float)})
        yield example
        yield example._replace(question_id=f"{example.question_id}/blank", image=BLANK)


def summarize(examples: list[Example], grades: list[Grade]) -> Score | None:
    blind = [grade.score for example, grade in zip(examples, grades) if example.image == BLANK]
    sighted = [(example, grade) for example, grade in zip(examples, grades) if example.image != BLANK]
    chance = mean([example.info["chance"] for example, _ in sighted])
    subscores = {"chance": 100 * chance, "blank image": 100 * mean(blind)}
    return accuracy([example for example, _ in sighted], [grade for _, grade in sighted], subscores)


TASK = Task(
    metric="accuracy",
    read=read,
    grade=grade_plain,
    summarize=summarize,
    splits={"all": 0},
    source="run `make demo`, then give --root out/demo/data",
    files={"questions.jsonl": ""},
)
