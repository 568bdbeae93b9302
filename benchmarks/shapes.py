"""Shapes: the demo's held-out questions about drawn pictures of coloured shapes (`make demo` makes them).

Every question is asked twice, about its picture and about a blank one: what the model knows without looking, and the
chance of guessing right, stand beside the score.

shapes/questions.jsonl: question_id, image, text, answer, category, chance; shapes/images/.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import image_path, required_file
from benchmarks.scoring import BLANK, Example, Mark, Score, Task, accuracy, grade_plain, mean
from lib.common import read_jsonl


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    for row in read_jsonl(required_file(folder, "questions.jsonl")):
        image = image_path(folder / "images", row["image"])
        example = Example(row["question_id"], image, row["text"], row["answer"], (row["category"],),
                          {"chance": row["chance"]})
        yield example
        yield example._replace(question_id=f"{row['question_id']}/blank", image=BLANK)


def summarise(examples: list[Example], marks: list[Mark]) -> Score | None:
    sighted = []
    sighted_marks = []
    blind_points = []
    for example, mark in zip(examples, marks):
        if example.image == BLANK:
            blind_points.append(mark.points)
        else:
            sighted.append(example)
            sighted_marks.append(mark)
    chance = mean([example.info["chance"] for example in sighted])
    beside = {"chance": 100 * chance, "blank image": 100 * mean(blind_points)}
    return accuracy(sighted, sighted_marks, beside)


TASK = Task(
    metric="accuracy",
    read=read,
    grade=grade_plain,
    summarise=summarise,
    splits={"all": 0},
    source="make demo draws it; then say --root out/demo/data",
    files={"questions.jsonl": ""},
)
