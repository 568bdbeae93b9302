"""TextVQA: questions about text in photographs; val, 5,000 questions about 3,166 images, ten answers each.

LLaVA puts the words that an OCR program read into the prompt. That line is worth about ten points, so results with and
without it (`--no-ocr`) are not comparable.
"""
from argparse import Namespace
from pathlib import Path

from benchmarks.files import (EVAL_ZIP, field, first_existing, found_in, image_file, parsed, required_files, texts_of)
from benchmarks.scoring import SHORT, Example, Grade, Task, evalai_accuracy, normalize_evalai


def read(folder: Path, options: Namespace) -> list[Example]:
    llava_file = first_existing(folder, "llava_textvqa_val_v051_ocr.jsonl")
    words = [] if llava_file or not options.ocr else ["TextVQA_Rosetta_OCR_v0.2_val.json"]
    official, images, *words = required_files(folder, "TextVQA_0.5.1_val.json", "train_images/", *words)
    # A question that occurs twice for one picture is scored on the later answers both times, because LLaVA's
    # eval_textvqa.py keeps them in a dictionary like this one.
    humans_of = dict(parsed(official, lambda row: (
        (field(row, "image_id"), field(row, "question").lower()), texts_of(row, "answers")), "data"))
    words_of = {}
    for path in words:
        words_of |= parsed(path, lambda row: (
            field(row, "image_id"), ", ".join(texts_of(row, "ocr_tokens", blank=True))), "data")

    def question(row: dict) -> Example:
        image_id = field(row, "question_id" if llava_file else "image_id")
        ocr = f"Reference OCR token: {words_of.get(image_id, '')}"
        lines = field(row, "text").split("\n") if llava_file else [field(row, "question").capitalize(), ocr, SHORT]
        humans = found_in(humans_of, (image_id, lines[0].lower()), official)
        if len(humans) != 10:               # the official scorer's soft accuracy is defined for ten
            raise ValueError(f"{official.name} has {len(humans)} answers to the question {lines[0]!r}, expected ten")
        prompt = "\n".join(lines if options.ocr else [lines[0], lines[-1]])
        return Example(image_id, image_file(images, f"{image_id}.jpg"), prompt, humans)

    return parsed(llava_file or official, question, "data")


def grade_answer(example: Example, text: str) -> Grade:
    return Grade(evalai_accuracy(text, example.truth), normalize_evalai(text))


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    splits={"val": 5_000},
    source=f"https://textvqa.org/dataset: TextVQA_0.5.1_val.json, train_val_images.zip; {EVAL_ZIP}",
    files={"llava_textvqa_val_v051_ocr.jsonl": "9f60db6fb89e3692", "TextVQA_0.5.1_val.json": ""},
    published={"llava_phi": 48.6, "mipha": 56.6, "llava": 58.2, "tinyllava": 53.4},
    repeated_ids=True,
    ocr_notes={True: "OCR tokens were in the prompt.", False: "No OCR tokens were in the prompt."},
)
