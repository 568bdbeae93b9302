"""VQAv2: short answers about COCO photographs, as ten people gave them.

The published score is on test-dev, whose answers are on the EvalAI server (challenge 830): this file writes the
upload. `--split val` is scored here, but LLaVA was trained on some of those images.
"""
import json
from argparse import Namespace
from pathlib import Path

from benchmarks.files import (COCO, EVAL_ZIP, field, found_in, number_of, parsed, read_llava_questions, required_files,
                              texts_of)
from benchmarks.scoring import SHORT, Answered, Example, Grade, Task, normalize_evalai, vqa_accuracy


def read(folder: Path, options: Namespace) -> list[Example]:
    if options.split == "val":
        return official_questions(*required_files(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "val2014/",
                                                  "v2_mscoco_val2014_annotations.json"))
    path, images = required_files(folder, "llava_vqav2_mscoco_test-dev2015.jsonl or "
                                  "v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015/")
    read_questions = read_llava_questions if path.suffix == ".jsonl" else official_questions
    return read_questions(path, images)


def official_questions(path: Path, images: Path, annotations: Path | None = None) -> list[Example]:
    """annotations: the file of what people answered, if it is public."""
    truths = {}
    if annotations:
        truths = dict(parsed(annotations, lambda row: (
            number_of(row), (texts_of(row, "answers", "answer"), field(row, "answer_type"))), "annotations"))

    def question(row: dict) -> Example:
        number = number_of(row)
        humans, *categories = found_in(truths, number, annotations) if annotations else (None,)
        image = images / f"COCO_{images.name}_{field(row, 'image_id', int):012d}.jpg"
        return Example(number, image, f"{field(row, 'question')}\n{SHORT}", humans, tuple(categories))

    return parsed(path, question, "questions")


def grade_answer(example: Example, text: str) -> Grade:
    """The server receives answers normalized by the EvalAI processor, so the official scorer gets the same here."""
    answer = normalize_evalai(text)
    return Grade(vqa_accuracy(answer, example.truth), answer)


def submission(answered: Answered, folder: Path) -> str:
    """The server expects every question of test2015, of which test-dev is a quarter.

    The others get an empty answer, which is why the server shows about 0 for test-standard.
    """
    [path] = required_files(folder, "llava_vqav2_mscoco_test2015.jsonl or v2_OpenEnded_mscoco_test2015_questions.json")
    answers = dict.fromkeys(parsed(path, number_of, "questions"), "")
    for example, text in answered:
        found_in(answers, example.question_id, path)
        answers[example.question_id] = normalize_evalai(text)
    return json.dumps([{"question_id": number, "answer": answer} for number, answer in answers.items()])


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    submission=submission,
    submission_name="vqav2_test-dev2015.json",
    splits={"test-dev": 107_394, "val": 214_354},
    source=f"{COCO}/test2015.zip (val: val2014.zip), https://visualqa.org/download.html; {EVAL_ZIP}",
    files={"llava_vqav2_mscoco_test-dev2015.jsonl": "6e6ab639404fa18c"},
    published={"llava_phi": 71.4, "mipha": 81.3, "llava": 78.5, "tinyllava": 76.8},
    split_notes={"val": "The published scores are on the test split; these images (COCO) overlap LLaVA's training "
                        "data."},
)
