"""SEED-Bench: multiple choice in twelve dimensions; the image part (14,233 questions) unless `--split all` is given.
"""
from argparse import Namespace
from functools import partial
from pathlib import Path

from benchmarks.files import (field, first_existing, image_file, lettered, number_of, parsed, read_official_json,
                              reading, required_files, to_jsonl)
from benchmarks.scoring import LETTER, Answered, Example, Grade, Task, accuracy


def read(folder: Path, options: Namespace) -> list[Example]:
    """The wording is rebuilt from the official file, which is how LLaVA's was made too."""
    path, images = required_files(folder, "SEED-Bench.json", "SEED-Bench-image/")
    with reading(path):
        names = field(read_official_json(path, dict), "question_type", dict)
        name_of_type = {names[name]: name for name in names}
    examples = parsed(path, lambda row: question(row, images, name_of_type), "questions")
    examples = {str(example.question_id): example for example in examples
                if options.split == "all" or "image" in example.categories}
    llava_file = first_existing(folder, "llava-seed-bench.jsonl")
    if llava_file is None:
        return list(examples.values())
    order = parsed(llava_file, lambda row: str(number_of(row)))
    return [examples[number] for number in order if number in examples]


def question(row: dict, images: Path, name_of_type: dict[int, str]) -> Example:
    number = number_of(row)
    if field(row, "data_type") == "image":
        number = int(number)                # as in LLaVA's file; a video's is text, such as "v9"
        image = image_file(images, field(row, "data_id"))
    else:
        image = image_file(images.with_name("SEED-Bench-video-image"), f"{row['question_type_id']}_{number}.png")
    choices = lettered(field(row, f"choice_{letter}", str, int, float) for letter in "abcd")
    prompt = f"{field(row, 'question')}\n{choices}\n{LETTER}"
    categories = (row["data_type"], name_of_type[row["question_type_id"]])
    return Example(number, image, prompt, field(row, "answer", among=("A", "B", "C", "D")), categories)


def grade_answer(example: Example, text: str) -> Grade:
    """LLaVA's rule is plain equality: "B." is wrong."""
    return Grade(float(text == example.truth), text, unparsed=text not in ("A", "B", "C", "D"))


def submission(answered: Answered, folder: Path) -> str:
    """One line per answer, for the leaderboard."""
    return to_jsonl({"question_id": str(example.question_id), "prediction": text} for example, text in answered)


TASK = Task(
    metric="accuracy on images",
    read=read,
    grade=grade_answer,
    summarize=partial(accuracy, only="image"),          # papers call it SEED-IMG, even if the videos were asked too
    submission=submission,
    submission_name="seed_bench.jsonl",
    splits={"image": 14_233, "all": 19_242},
    source="https://huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench.json, SEED-Bench-image.zip",
    folders=("seed_bench",),
    files={"SEED-Bench.json": ""},
    published={"llava": 66.1},
)
