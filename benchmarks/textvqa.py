"""TextVQA: questions about text in photographs; val, 5,000 questions about 3,166 images, ten answers each.

LLaVA puts the words that an OCR program read into the prompt. That line is worth about ten points, so results with and
without it (`--no-ocr`) are not comparable.

textvqa/TextVQA_0.5.1_val.json, images in textvqa/train_images/; llava_textvqa_val_v051_ocr.jsonl (eval.zip), or
TextVQA_Rosetta_OCR_v0.2_val.json for the words.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import EVAL_ZIP, first_existing, image_file, read_official_json, required_file
from benchmarks.scoring import SHORT, Example, Grade, Task, accuracy, evalai_accuracy, normalize_evalai
from lib.common import read_jsonl


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    official = read_official_json(required_file(folder, "TextVQA_0.5.1_val.json"))["data"]
    llava_file = first_existing(folder, "llava_textvqa_val_v051_ocr.jsonl")
    if llava_file:
        questions = [(row["question_id"], row["text"].split("\n")) for row in read_jsonl(llava_file)]
    else:
        questions = rebuilt_questions(folder, official, options.ocr)
    # A question that occurs twice for one picture is scored on the later answers both times, because LLaVA's
    # eval_textvqa.py keeps them in a dictionary like this one.
    humans_of = {(row["image_id"], row["question"].lower()): row["answers"] for row in official}
    for image_id, lines in questions:
        question = lines[0]
        humans = humans_of.get((image_id, question.lower()), [])
        if len(humans) != 10:
            raise ValueError(f"TextVQA_0.5.1_val.json lacks ten answers to the question {question!r} about {image_id}")
        prompt = "\n".join(lines if options.ocr else [question, lines[-1]])
        yield Example(image_id, image_file(folder / "train_images", f"{image_id}.jpg"), prompt, humans)


def rebuilt_questions(folder: Path, official: list[dict], ocr: bool) -> list[tuple[str, list[str]]]:
    """(image, lines of the prompt) as in LLaVA's file; the OCR line is empty with --no-ocr."""
    words_of = {}
    if ocr:
        for row in read_official_json(required_file(folder, "TextVQA_Rosetta_OCR_v0.2_val.json"))["data"]:
            words_of[row["image_id"]] = ", ".join(row["ocr_tokens"])
    questions = []
    for row in official:
        words = f"Reference OCR token: {words_of.get(row['image_id'], '')}"
        questions.append((row["image_id"], [row["question"].capitalize(), words, SHORT]))
    return questions


def grade_answer(example: Example, text: str) -> Grade:
    return Grade(evalai_accuracy(text, example.truth), normalize_evalai(text))


def prompt_note(settings: dict) -> str:
    return "OCR tokens were in the prompt." if settings["ocr"] else "No OCR tokens were in the prompt."


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    summarize=accuracy,
    splits={"val": 5_000},
    source=f"https://textvqa.org/dataset: TextVQA_0.5.1_val.json, train_val_images.zip; {EVAL_ZIP}",
    files={"llava_textvqa_val_v051_ocr.jsonl": "9f60db6fb89e3692", "TextVQA_0.5.1_val.json": ""},
    published={"llava_phi": 48.6, "mipha": 56.6, "llava": 58.2, "tinyllava": 53.4},
    repeated_ids=True,
    prompt_note=prompt_note,
)
