"""SEED-Bench: multiple choice in twelve dimensions; the image part (14,233 questions) unless `--split all` is given.

seed_bench/SEED-Bench.json, images in SEED-Bench-image/; middle frames of the videos in SEED-Bench-video-image/;
llava-seed-bench.jsonl (eval.zip) gives the order.
"""
from argparse import Namespace
from pathlib import Path

from benchmarks.files import first_existing, image_file, lettered, read_official_json, required_file, to_jsonl
from benchmarks.scoring import LETTER, Example, Grade, Score, Task, accuracy
from lib.common import read_jsonl, write_whole


def read(folder: Path, options: Namespace) -> list[Example]:
    """The wording is rebuilt from the official file, which is how LLaVA's was made too."""
    official = read_official_json(required_file(folder, "SEED-Bench.json"))
    name_of_type = {number: name for name, number in official["question_type"].items()}
    examples = {}
    for row in official["questions"]:
        number = row["question_id"]
        if row["data_type"] == "image":
            number = int(number)                # as in LLaVA's file; a video's is text, such as "v9"
            image = image_file(folder / "SEED-Bench-image", row["data_id"])
        elif options.split == "image":
            continue
        else:
            image = folder / "SEED-Bench-video-image" / f"{row['question_type_id']}_{number}.png"
        choices = lettered(row[f"choice_{letter}"] for letter in "abcd")
        categories = (row["data_type"], name_of_type[row["question_type_id"]])
        prompt = f"{row['question']}\n{choices}\n{LETTER}"
        examples[str(number)] = Example(number, image, prompt, row["answer"], categories)
    llava_file = first_existing(folder, "llava-seed-bench.jsonl")
    if llava_file is None:
        return list(examples.values())
    order = [str(row["question_id"]) for row in read_jsonl(llava_file)]
    return [examples[number] for number in order if number in examples]


def grade_answer(example: Example, text: str) -> Grade:
    """LLaVA's rule is plain equality: "B." is wrong."""
    return Grade(float(text == example.truth), text, unparsed=text not in ("A", "B", "C", "D"))


def summarize(examples: list[Example], grades: list[Grade]) -> Score | None:
    """The headline is the image part's, which papers call SEED-IMG, even if the videos were asked too."""
    return accuracy(examples, grades, only="image")


def write_submission(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """One line per answer, for the leaderboard."""
    rows = []
    for example, text in zip(examples, texts):
        rows.append({"question_id": str(example.question_id), "prediction": text})
    return write_whole(out / "seed_bench.jsonl", to_jsonl(rows))


TASK = Task(
    metric="accuracy on images",
    read=read,
    grade=grade_answer,
    summarize=summarize,
    write_submission=write_submission,
    splits={"image": 14_233, "all": 19_242},
    source="https://huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench.json, SEED-Bench-image.zip",
    folders=("seed_bench",),
    files={"SEED-Bench.json": ""},
    published={"llava": 66.1},
)
