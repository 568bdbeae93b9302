"""MMBench: multiple choice, each question asked with its options in every rotation; English, and the same in Chinese.

A question counts if all of its rotations are answered right (circular accuracy), so that liking one letter earns
nothing. For answers that are letters this gives the server's number for dev.

mmbench/mmbench_dev_20230712.tsv and mmbench_cn/mmbench_dev_cn_20231003.tsv, images inside; also the newer
MMBench_DEV_EN_legacy.tsv and MMBench_DEV_CN_legacy.tsv, and each file's TEST.
"""
import base64
import csv
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.files import lettered, required_file, write_xlsx
from benchmarks.scoring import LETTER, Example, Mark, Score, Task, accuracy, mean

LETTER_CN = "请直接回答选项字母。"
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
}
SHEET = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")      # columns as submitted
ROTATION = 1_000_000                    # index = question + number of the rotation * this


def read_english(folder: Path, options: Namespace) -> Iterator[Example]:
    split = options.split
    path = required_file(folder, f"mmbench_{split}_20230712.tsv", f"MMBench_{split.upper()}_EN_legacy.tsv")
    return read_table(path, LETTER)


def read_chinese(folder: Path, options: Namespace) -> Iterator[Example]:
    split = options.split
    path = required_file(folder, f"mmbench_{split}_cn_20231003.tsv", f"MMBench_{split.upper()}_CN_legacy.tsv")
    return read_table(path, LETTER_CN)


def read_table(path: Path, instruction: str) -> Iterator[Example]:
    """The file holds the rotations as rows of their own. None are made here: where option D is "all of the above" it
    stays in its place, and only the file knows."""
    csv.field_size_limit(1 << 28)               # quoted cells may hold newlines and megabytes of base64
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    image_of = {row["index"]: row["image"] for row in rows}
    decoded = {}                                # rotations share one bytes object, and by it the tower's work
    for row in rows:
        image = row["image"]
        if len(image) < 64:                     # not a picture but the index of the row that has it
            image = image_of[image]
        if image not in decoded:
            decoded[image] = base64.b64decode(image)
        choices = choices_of(row)
        lines = [cell(row, "hint"), row["question"], lettered(choices.values()), instruction]
        prompt = "\n".join(line for line in lines if line)
        parent = cell(row, "l2-category")
        labels = [ABBREVIATIONS.get(parent, parent), cell(row, "category")]
        sheet = {}
        for name in SHEET:
            if name in row:
                sheet[name] = cell(row, name) if name in "ABCD" else row[name]
        yield Example(int(float(row["index"])), decoded[image], prompt, cell(row, "answer") or None,
                      tuple(label for label in labels if label), {"options": choices, "row": sheet})


def cell(row: dict[str, str], name: str) -> str:
    """A cell's text. The releases write a missing option in several ways."""
    text = row.get(name) or ""
    return "" if text.lower() in ("nan", "none") else text


def choices_of(row: dict[str, str]) -> dict[str, str]:
    """letter -> option, up to the first that is missing."""
    choices = {}
    for letter in "ABCD":
        option = cell(row, letter)
        if not option:
            break
        choices[letter] = option
    return choices


REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def mmbench_letter(text: str, options: dict[str, str]) -> str | None:
    """VLMEvalKit's extraction without a language model: a letter, "answer is X", or the text of exactly one option.

    Z stands for an answer that declines. None: nothing can be read.
    """
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    # A letter that is followed by a long sentence is more likely the article "A" than an option.
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    answer_is = re.search(rf"answer is \**([{''.join(options)}])\b", text, re.IGNORECASE)
    if answer_is:
        return answer_is[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def grade(example: Example, text: str) -> Mark:
    """raw: whether the answer is the bare letter, as a stricter rule would have it."""
    letter = mmbench_letter(text, example.info["options"])
    bare_letter = float(text.strip() == example.truth)
    return Mark(float(letter == example.truth), letter or "", unparsed=letter is None, raw=(bare_letter,))


def summarise(examples: list[Example], marks: list[Mark]) -> Score | None:
    rotations = defaultdict(list)               # question -> (example, mark) of each of its rotations
    for example, mark in zip(examples, marks):
        rotations[example.question_id % ROTATION].append((example, mark))
    questions = []
    circular = []
    circular_bare = []
    for pairs in rotations.values():
        questions.append(pairs[0][0])
        circular.append(Mark(float(all(mark.points for _, mark in pairs))))
        circular_bare.append(float(all(mark.raw[0] for _, mark in pairs)))
    single_pass = [mark.points for example, mark in zip(examples, marks) if example.question_id < ROTATION]
    beside = {"circular, bare letters only": 100 * mean(circular_bare), "single pass": 100 * mean(single_pass)}
    return accuracy(questions, circular, beside)


def write_submission(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """A sheet with the columns of the .tsv (answer only if it has one), index as a number, missing options empty."""
    columns = [name for name in SHEET if name in examples[0].info["row"] or name == "prediction"]
    table = [columns]
    for example, text in zip(examples, texts):
        row = {**example.info["row"], "index": example.question_id, "prediction": text}
        table.append([row[name] or "" for name in columns])
    return write_xlsx(out / "mmbench.xlsx", table)


TASK = Task(
    metric="circular accuracy",
    read=read_english,
    grade=grade,
    summarise=summarise,
    write_submission=write_submission,
    splits={"dev": 4_377, "test": 0},
    source="https://github.com/open-compass/MMBench (the legacy .tsv files)",
    files={"mmbench_dev_20230712.tsv": ""},
    published={"llava_phi": 59.8, "mipha": 69.7, "llava": 64.3},
    max_new_tokens=1024,
)

TASK_CN = replace(
    TASK,
    read=read_chinese,
    splits={"dev": 0, "test": 0},
    folders=("mmbench_cn", "mmbench"),
    files={"mmbench_dev_cn_20231003.tsv": ""},
    published={"llava": 58.3},
)
