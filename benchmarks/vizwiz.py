"""VizWiz: questions that blind people asked about their own photographs, often blurred, often unanswerable.

The published score is on test (8,000), for which the EvalAI server no longer accepts submissions; the upload is still
written. `--split val` (4,319) is scored here.
"""
import json
from argparse import Namespace
from pathlib import Path

from benchmarks.files import (EVAL_ZIP, field, image_file, read_llava_questions, reading, required_files, rows_of,
                              texts_of)
from benchmarks.scoring import (SHORT, Answered, Example, Grade, Graded, Score, Task, accuracy, evalai_accuracy, mean,
                                normalize_evalai, vqa_accuracy)

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(folder: Path, options: Namespace) -> list[Example]:
    split = options.split
    llava_file = "llava_test.jsonl or " if split == "test" else ""
    path, images = required_files(folder, f"{llava_file}{split}.json or Annotations/{split}.json", f"{split}/")
    if path.suffix == ".jsonl":
        return read_llava_questions(path, images)
    examples = []
    for where, row in rows_of(path):
        with reading(where):
            # capitalize() also lower-cases the rest, as in all 8,000 rows of LLaVA's file.
            prompt = f"{field(row, 'question').capitalize()}\n{UNANSWERABLE}\n{SHORT}"
            example = Example(len(examples), image_file(images, field(row, "image")), prompt)
            if "answers" in row:
                humans = texts_of(row, "answers", "answer")
                example = example._replace(truth=humans, categories=(field(row, "answer_type"),))
            examples.append(example)
    return examples


def grade_answer(example: Example, text: str) -> Grade:
    """Graded as by TextVQA's scorer, as is common for val; raw: by the official VQA scorer."""
    answer = normalize_evalai(text)
    return Grade(evalai_accuracy(text, example.truth), answer, raw=(vqa_accuracy(answer, example.truth),))


def summarize(graded: Graded) -> Score:
    """The two scorers differ by several points; both are shown, because papers use both."""
    official = 100 * mean([grade.raw[0] for _, grade in graded])
    return accuracy(graded, {"official VQA scorer": official})


def submission(answered: Answered, folder: Path) -> str:
    """Every row of the test set, in the order of the file."""
    return json.dumps([{"image": example.image.name, "answer": normalize_evalai(text)} for example, text in answered])


TASK = Task(
    metric="soft accuracy",
    read=read,
    grade=grade_answer,
    summarize=summarize,
    submission=submission,
    submission_name="vizwiz_test.json",
    splits={"test": 8_000, "val": 4_319},
    source=f"https://vizwiz.org/tasks-and-datasets/vqa: Annotations.zip, test.zip (val.zip); {EVAL_ZIP}",
    files={"llava_test.jsonl": "25b71577dafc1e40", "val.json": ""},
    published={"llava_phi": 35.9, "mipha": 45.7, "llava": 50.0},
    split_notes={"val": "The published scores are on the test split; this one has other images."},
)
