"""VQAv2: short answers about COCO photographs, as ten people gave them.

The published score is on test-dev, whose answers are on the EvalAI server (challenge 830): this file writes the
upload. `--split val` is scored here, but LLaVA was trained on some of those images.
"""
import json
from argparse import Namespace
from pathlib import Path

from benchmarks.files import COCO, EVAL_ZIP, field, number_of, parsed, read_llava_questions, required_files, texts_of
from benchmarks.scoring import SHORT, Example, Grade, Task, accuracy, normalize_evalai, vqa_accuracy
from lib.common import write_whole


def read(folder: Path, options: Namespace) -> list[Example]:
    if options.split == "val":
        questions, annotations = required_files(folder, "v2_OpenEnded_mscoco_val2014_questions.json",
                                                "v2_mscoco_val2014_annotations.json", images="val2014")
        return official_questions(questions, folder, "val2014", annotations)
    [path] = required_files(folder, "llava_vqav2_mscoco_test-dev2015.jsonl or "
                            "v2_OpenEnded_mscoco_test-dev2015_questions.json", images="test2015")
    if path.suffix == ".jsonl":
        return read_llava_questions(path, folder / "test2015")
    return official_questions(path, folder, "test2015")


def official_questions(path: Path, folder: Path, year: str, annotations: Path | None = None) -> list[Example]:
    """annotations: the file of what people answered, if it is public."""
    truths = {}
    if annotations:
        truths = dict(parsed(annotations, lambda row: (
            number_of(row), (texts_of(row, "answers", "answer"), field(row, "answer_type"))), "annotations"))

    def question(row: dict) -> Example:
        number = number_of(row)
        humans, *categories = truths[number] if annotations else (None,)
        image = folder / year / f"COCO_{year}_{field(row, 'image_id', int):012d}.jpg"
        return Example(number, image, f"{field(row, 'question')}\n{SHORT}", humans, tuple(categories))

    return parsed(path, question, "questions")


def grade_answer(example: Example, text: str) -> Grade:
    """The server receives answers normalized by the EvalAI processor, so the official scorer gets the same here."""
    answer = normalize_evalai(text)
    return Grade(vqa_accuracy(answer, example.truth), answer)


def write_submission(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """The server expects every question of test2015, of which test-dev is a quarter.

    The others get an empty answer, which is why the server shows about 0 for test-standard.
    """
    [path] = required_files(folder, "llava_vqav2_mscoco_test2015.jsonl or v2_OpenEnded_mscoco_test2015_questions.json")
    answers = dict.fromkeys(parsed(path, number_of, "questions"), "")
    unknown = [example for example in examples if example.question_id not in answers]
    if unknown:
        raise ValueError(f"{path} lacks {len(unknown):,} of the answered questions: another version?")
    for example, text in zip(examples, texts):
        answers[example.question_id] = normalize_evalai(text)
    upload = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
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
