"""Your own questions: `--task jsonl --questions my.jsonl --images my_images`.

Each line of the file is a question, of which only the text must be given:

{"question_id": 1, "text": "What is this?", "image": "cat.jpg", "answer": ["a cat", "cat"], "category": "animals"}

question_id is the line's number, counted from 0, unless given. image is a file in the --images folder or archive, or a
list of them, which go where the text has <image>, or in front of it. answer is a correct one, or a list of them. Each
category gets a score of its own. Questions without an answer are asked but not scored.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import field, number_of, reading, required_files
from benchmarks.scoring import Example, Task, accuracy, grade_plain
from lib.archives import Pictures
from lib.common import jsonl_rows

EXAMPLE = '{"text": "What is this?", "image": "cat.jpg", "answer": "a cat"}'


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    if not options.questions:
        raise ValueError(f"needs --questions FILE with a line like {EXAMPLE} for each question, and --images DIR")
    [path] = required_files(Path(), options.questions)
    places = Pictures(options.images or [])
    for i, (where, row) in enumerate(jsonl_rows(path)):
        with reading(where):
            # A table saved as json has null or NaN in the cells that were empty.
            given = {name: value for name, value in row.items() if value not in (None, "", []) and value == value}
            images = [places.find(name) for name in texts_or_text(given, "images" if "images" in given else "image")]
            answer = None
            if "answer" in given:
                answer = field(given, "answer", str, int, float, list)
                if isinstance(answer, list):
                    answer = [field(answer, k, str, int, float) for k in range(len(answer))]
            categories = (str(given["category"]),) if "category" in given else ()
            image = tuple(images) if len(images) > 1 else next(iter(images), None)
            yield Example(number_of({"question_id": i} | given), image, field(given, "text"), answer, categories)


def texts_or_text(row: dict, name: str) -> list[str]:
    """A text, or a list of texts; none if the field is not there."""
    if name not in row:
        return []
    value = field(row, name, str, list)
    return [value] if isinstance(value, str) else [field(value, k) for k in range(len(value))]


TASK = Task(
    metric="accuracy",
    read=read,
    grade=grade_plain,
    summarize=accuracy,
    splits={"all": 0},
    source="--questions FILE --images FOLDER OR ARCHIVE",
)
