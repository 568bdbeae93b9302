"""POPE: does the model see objects that are not there? 8,910 yes/no questions about 500 COCO images.

The three kinds of question differ in how the absent object is chosen: a random one, a popular one, or one that often
appears with what the picture shows (adversarial). Papers report the mean of the three F1 scores.
"""
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.files import (COCO, EVAL_ZIP, field, first_existing, found_in, image_file, number_of, parsed,
                              reading, required_files)
from benchmarks.scoring import SHORT, Example, Grade, Graded, Score, Task, bootstrapped, mean
from lib.common import jsonl_rows

# LLaVA's file makes question_id unique across the three kinds by these offsets.
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def read(folder: Path, options: Namespace) -> list[Example]:
    """LLaVA's rows are joined with the official ones by image and question.

    The official scorer joins by position, and silently misaligns the 3,000 random rows of POPE's HEAD.
    """
    examples = []
    official = {}
    *paths, images = required_files(folder, *(f"coco/coco_pope_{kind}.json" for kind in OFFSETS), "val2014/")
    for (kind, offset), path in zip(OFFSETS.items(), paths):
        for where, row in jsonl_rows(path):
            with reading(where):
                image = image_file(images, field(row, "image"))
                example = Example(field(row, "question_id", int) + offset, image, f"{field(row, 'text')}\n{SHORT}",
                                  field(row, "label", among=("yes", "no")), (kind,))
                examples.append(example)
                official[question_key(row, kind)] = example
    llava_file = first_existing(folder, "llava_pope_test.jsonl")
    if llava_file is None:
        return examples
    return parsed(llava_file, lambda row: found_in(official, question_key(row, row["category"]), folder / "coco")
                  ._replace(question_id=number_of(row), prompt=row["text"]))


def question_key(row: dict, kind: str) -> tuple[str, str, str]:
    """Identifies a question across files. Early versions misspell "image" as "imange"."""
    return kind, row["image"], field(row, "text").split("\n")[0].replace("imange", "image")


def grade_answer(example: Example, text: str) -> Grade:
    """The official rule: without a separate No, no or not before the first full stop, it is a yes.

    So "NO!" and an empty answer count as yes. The report says how many answers contain neither word.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    answer = "no" if {"No", "no", "not"} & set(words) else "yes"
    yes_or_no = {"yes", "no", "not"} & set(re.findall(r"[a-z]+", text.lower()))
    return Grade(float(answer == example.truth), answer, unparsed=not yes_or_no)


def f1(counts: np.ndarray) -> np.ndarray:
    """(..., kinds, 2, 2) -> (..., kinds). The counts: is yes the truth, is the answer right. F1 is 0 where there is
    neither a positive label nor a positive answer."""
    true_yes = counts[..., 1, 1]
    wrong = counts[..., 0].sum(-1)
    return 2 * true_yes / np.maximum(2 * true_yes + wrong, 1)


def mean_f1(counts: np.ndarray) -> np.ndarray:
    """(..., kinds, 2, 2) -> (...), the headline."""
    return 100 * f1(counts).mean(-1)


def summarize(graded: Graded) -> Score:
    kinds = sorted({example.categories[0] for example, _ in graded})
    # The bootstrap resamples images, because the questions about one image are not independent.
    counts_of_image = defaultdict(lambda: np.zeros((len(kinds), 2, 2)))
    for example, grade in graded:
        kind = kinds.index(example.categories[0])
        counts_of_image[example.image][kind, int(example.truth == "yes"), int(grade.score)] += 1
    totals = sum(counts_of_image.values())                              # (kinds, 2, 2)
    numbers = {"accuracy": 100 * mean([grade.score for _, grade in graded])}
    for kind, kind_f1, ((false_yes, true_no), (false_no, true_yes)) in zip(kinds, f1(totals), totals):
        n = true_yes + false_yes + false_no + true_no
        of_kind = {"F1": kind_f1,
                   "accuracy": (true_yes + true_no) / n,
                   "precision": true_yes / max(true_yes + false_yes, 1),
                   "recall": true_yes / max(true_yes + false_no, 1),
                   "yes ratio": (true_yes + false_yes) / n}
        for name, value in of_kind.items():
            numbers[f"{kind} {name}"] = float(100 * value)
    return bootstrapped(list(counts_of_image.values()), mean_f1, "images", numbers)


TASK = Task(
    metric="mean F1 of the three kinds",
    read=read,
    grade=grade_answer,
    summarize=summarize,
    splits={"all": 8_910},
    source=f"{COCO}/val2014.zip; coco/ from https://github.com/AoiDragon/POPE/tree/e3e39262/output (HEAD has 3,000 "
           f"random questions, the published scores are on 2,910); {EVAL_ZIP}",
    files={"llava_pope_test.jsonl": "1d3b41f0dced74b4", "coco/coco_pope_adversarial.json": "1d8f0906a9b50c05",
           "coco/coco_pope_popular.json": "5b16653023bf4f64", "coco/coco_pope_random.json": "c16b65d2df6d70bb"},
    published={"llava_phi": 85.0, "mipha": 86.7, "llava": 85.9, "tinyllava": 86.8},
)
