"""VizWiz: questions that blind people asked about their own photographs, often blurred, often unanswerable.

The published score is on test (8,000), for which the EvalAI server no longer accepts submissions; the upload is still
written. `--split val` (4,319) is scored here.
"""
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import (EVAL_ZIP, field, first_existing, image_file, read_llava_questions, reading,
                              required_files, rows_of, texts_of)
from benchmarks.scoring import (SHORT, Example, Grade, Score, Task, accuracy, evalai_accuracy, mean, normalize_evalai,
                                vqa_accuracy)
from lib.common import write_whole

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    images = folder / options.split
    llava_file = first_existing(folder, "llava_test.jsonl")
    if options.split == "test" and llava_file:
        yield from read_llava_questions(llava_file, images)
        return
    [path] = required_files(folder, f"{options.split}.json or Annotations/{options.split}.json", images=options.split)
    for i, (where, row) in enumerate(rows_of(path)):
        with reading(where):
            # capitalize() also lower-cases the rest, as in all 8,000 rows of LLaVA's file.
            prompt = f"{field(row, 'question').capitalize()}\n{UNANSWERABLE}\n{SHORT}"
            humans = None
            categories = ()
            if "answers" in row:
                humans = texts_of(row, "answers", "answer")
                categories = (field(row, "answer_type"),)
            yield Example(i, image_file(images, field(row, "image")), prompt, humans, categories)


def grade_answer(example: Example, text: str) -> Grade:
    """Graded as by TextVQA's scorer, as is common for val; raw: by the official VQA scorer."""
    answer = normalize_evalai(text)
    return Grade(evalai_accuracy(text, example.truth), answer, raw=(vqa_accuracy(answer, example.truth),))


def summarize(examples: list[Example], grades: list[Grade]) -> Score | None:
    """The two scorers differ by several points; both are shown, because papers use both."""
    official = 100 * mean([grade.raw[0] for grade in grades])
    return accuracy(examples, grades, subscores={"official VQA scorer": official})


def write_submission(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """Every row of the test set, in the order of the file."""
    upload = [{"image": example.image.name, "answer": normalize_evalai(text)}
              for example, text in zip(examples, texts)]
    return write_whole(out / "vizwiz_test.json", json.dumps(upload))


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    summarize=summarize,
    write_submission=write_submission,
    splits={"test": 8_000, "val": 4_319},
    source=f"https://vizwiz.org/tasks-and-datasets/vqa: Annotations.zip, test.zip (val.zip); {EVAL_ZIP}",
    files={"llava_test.jsonl": "25b71577dafc1e40", "val.json": ""},
    published={"llava_phi": 35.9, "mipha": 45.7, "llava": 50.0},
    split_notes={"val": "The published scores are on the test split; this one has other images."},
)
