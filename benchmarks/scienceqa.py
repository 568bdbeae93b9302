"""ScienceQA: school questions with two to five choices, half of them with a picture; test split, 4,241 questions.

All are asked, those without a picture as text only, but papers report the accuracy on the 2,017 with a picture.
"""
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.files import (EVAL_ZIP, field, first_existing, image_file, lettered, parsed, read_official_json,
                              reading, required_files, texts_of)
from benchmarks.scoring import LETTER, LETTERS, Example, Grade, Task, accuracy

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    """problems.json has the truth; LLaVA's file, if present, says which questions are asked and how they are worded."""
    problems_file, splits, images = required_files(folder, "problems.json", "pid_splits.json", "images/test/ or test/")
    problems = read_official_json(problems_file, dict)
    with reading(splits):
        texts = dict.fromkeys(texts_of(read_official_json(splits, dict), "test"))
    llava_file = first_existing(folder, "llava_test_CQM-A.json")
    if llava_file:
        texts = dict(parsed(llava_file, lambda row: (
            field(row, "id"), field(row["conversations"][0], "value").replace("<image>", "").strip())))
    for pid, text in texts.items():
        with reading(f"{problems_file}, question {pid}"):
            problem = problems[pid]
            image = None
            if problem["image"]:
                image = image_file(images, f"{pid}/{field(problem, 'image')}")
            elif options.img_only:
                continue
            prompt = f"{text or rebuilt_text(problem)}\n{LETTER}"
            # The official scorer recognizes the questions that count by <image> in the saved prompt.
            info = {"saved": f"<image>\n{prompt}"} if image else {}
            answer = field(problem, "answer", int, among=range(len(texts_of(problem, "choices"))))
            yield Example(pid, image, prompt, LETTERS[answer], categories_of(problem), info)


def rebuilt_text(problem: dict) -> str:
    """The question as LLaVA's file words it."""
    hint = f"Context: {problem['hint']}\n" if field(problem, "hint", blank=True) else ""
    text = f"{hint}{field(problem, 'question')}\n{lettered(texts_of(problem, 'choices'))}"
    return text.replace("  ", " ").strip()


def categories_of(problem: dict) -> tuple[str, ...]:
    """Subject, kinds of context and school years: the columns of ScienceQA's own table."""
    context = []
    if problem["hint"]:
        context.append("TXT")
    if problem["image"]:
        context.append("IMG")
    year = int(field(problem, "grade").removeprefix("grade"))
    return (SUBJECTS[problem["subject"]], *(context or ["NO"]), "G1-6" if year <= 6 else "G7-12")


def scienceqa_letter(text: str) -> str | None:
    """LLaVA's rule: a bare letter, "B. ...", or exactly one "The answer is B" with a character after it."""
    if text[:1] in set("ABCDE") and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else None


def grade_answer(example: Example, text: str) -> Grade:
    letter = scienceqa_letter(text)
    return Grade(float(letter == example.truth), letter or "", unparsed=letter is None)


TASK = Task(
    metric="accuracy on questions with an image",
    read=read,
    grade=grade_answer,
    summarize=partial(accuracy, only="IMG"),
    splits={"test": 4_241},
    images_only=2_017,
    source=f"https://github.com/lupantech/ScienceQA: problems.json, pid_splits.json, images/test; {EVAL_ZIP}",
    files={"llava_test_CQM-A.json": "a2dc5ea9fba561b0", "pid_splits.json": "85c7820b9f136e57", "problems.json": ""},
    published={"llava_phi": 68.4, "mipha": 70.9, "llava": 66.8, "tinyllava": 71.2},
    max_new_tokens=1024,
    paper_mode="crop",
)
