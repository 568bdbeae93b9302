"""VQAv2: short answers about COCO photographs, as ten people gave them.

The published score is on test-dev, whose answers are on the EvalAI server (challenge 830): this file writes the
upload. `--split val` is scored here, but LLaVA was trained on some of those images.

vqav2/llava_vqav2_mscoco_test-dev2015.jsonl and ..._test2015.jsonl (eval.zip), or the official
v2_OpenEnded_mscoco_test-dev2015_questions.json and ..._test2015_questions.json; images in vqav2/test2015/.
For val: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; images in vqav2/val2014/.
"""
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import COCO, EVAL_ZIP, first_existing, read_llava_questions, read_official_json, required_file
from benchmarks.scoring import SHORT, Example, Grade, Task, accuracy, normalize_evalai, vqa_accuracy
from lib.common import read_jsonl, write_whole


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    if options.split == "val":
        yield from read_val(folder)
        return
    llava_file = first_existing(folder, "llava_vqav2_mscoco_test-dev2015.jsonl")
    if llava_file:
        yield from read_llava_questions(llava_file, folder / "test2015")
        return
    questions = read_official_json(required_file(folder, "v2_OpenEnded_mscoco_test-dev2015_questions.json"))
    for row in questions["questions"]:
        yield Example(row["question_id"], coco_image(folder, "test2015", row), f"{row['question']}\n{SHORT}")


def read_val(folder: Path) -> Iterator[Example]:
    questions = required_file(folder, "v2_OpenEnded_mscoco_val2014_questions.json")
    annotations = read_official_json(required_file(folder, "v2_mscoco_val2014_annotations.json"))["annotations"]
    annotation_of = {row["question_id"]: row for row in annotations}
    for row in read_official_json(questions)["questions"]:
        annotation = annotation_of[row["question_id"]]
        humans = [answer["answer"] for answer in annotation["answers"]]
        yield Example(row["question_id"], coco_image(folder, "val2014", row), f"{row['question']}\n{SHORT}", humans,
                      (annotation["answer_type"],))


def coco_image(folder: Path, year: str, row: dict) -> Path:
    return folder / year / f"COCO_{year}_{row['image_id']:012d}.jpg"


def grade_answer(example: Example, text: str) -> Grade:
    """The server receives answers normalized by the EvalAI processor, so the official scorer gets the same here."""
    answer = normalize_evalai(text)
    return Grade(vqa_accuracy(answer, example.truth), answer)


def write_submission(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """The server expects every question of test2015, of which test-dev is a quarter.

    The others get an empty answer, which is why the server shows about 0 for test-standard.
    """
    path = required_file(folder, "llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_official_json(path)["questions"]
    answers = {row["question_id"]: "" for row in rows}
    unknown = [example for example in examples if example.question_id not in answers]
    if unknown:
        raise ValueError(f"{path} lacks {len(unknown):,} of the answered questions: another version?")
    for example, text in zip(examples, texts):
        answers[example.question_id] = normalize_evalai(text)
    upload = [{"question_id": row["question_id"], "answer": answers[row["question_id"]]} for row in rows]
    return write_whole(out / "vqav2_test-dev2015.json", json.dumps(upload))


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    summarize=accuracy,
    write_submission=write_submission,
    splits={"test-dev": 107_394, "val": 214_354},
    source=f"{COCO}/test2015.zip (val: val2014.zip), https://visualqa.org/download.html; {EVAL_ZIP}",
    files={"llava_vqav2_mscoco_test-dev2015.jsonl": "6e6ab639404fa18c"},
    published={"llava_phi": 71.4, "mipha": 81.3, "llava": 78.5, "tinyllava": 76.8},
    split_notes={"val": "The published scores are on the test split; these images (COCO) overlap LLaVA's training "
                        "data."},
)
