"""GQA: questions composed from scene graphs, with one answer each; scored on testdev_balanced (12,578 questions).

Consistency, validity and plausibility need files that were never released for testdev; nobody can report them.
"""
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import field, image_file, read_official_json, reading, required_files
from benchmarks.scoring import SHORT, Answered, Example, Grade, Task


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    """LLaVA's question file has these questions in this order and nothing else, so it is not needed."""
    name = "testdev_balanced_questions.json"
    path, images = required_files(folder / "data", f"{name} or questions1.2/{name} or questions/{name}", "images/")
    for question_id, row in read_official_json(path, dict).items():
        with reading(f"{path}, question {question_id}"):
            # GQA's own breakdown: a query is open, every other structure is answered with yes, no or one of two words.
            structural = field(row["types"], "structural")
            kind = "open" if structural == "query" else "binary"
            categories = (kind, f"structural {structural}", f"semantic {field(row['types'], 'semantic')}")
            image = image_file(images, field(row, "imageId") + ".jpg")
            yield Example(question_id, image, f"{field(row, 'question')}\n{SHORT}", field(row, "answer"), categories)


def gqa_answer(text: str) -> str:
    """Normalize as LLaVA's converter does; the official scorer then compares strings."""
    return text.rstrip(".").lower()


def grade_answer(example: Example, text: str) -> Grade:
    answer = gqa_answer(text)
    return Grade(float(answer == example.truth), answer)


def submission(answered: Answered, folder: Path) -> str:
    """The file that GQA's own eval.py scores."""
    return json.dumps([{"questionId": example.question_id, "prediction": gqa_answer(text)}
                       for example, text in answered])


TASK = Task(
    read=read,
    grade=grade_answer,
    submission=submission,
    submission_name="testdev_balanced_predictions.json",
    splits={"testdev": 12_578},
    source="https://cs.stanford.edu/people/dorarad/gqa/download.html: images.zip and questions1.2.zip, both into "
           "gqa/data",
    files={"data/testdev_balanced_questions.json": "14039069c0b3c797",
           "data/questions1.2/testdev_balanced_questions.json": "14039069c0b3c797"},
    published={"mipha": 63.9, "llava": 62.0, "tinyllava": 59.4},
)
