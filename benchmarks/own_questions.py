"""Your own questions: `--task jsonl --questions my.jsonl --images my_images`.

Each line of the file is a question, of which only the text must be given:

{"question_id": 1, "text": "What is this?", "image": "cat.jpg", "answer": ["a cat", "cat"], "category": "animals"}

question_id is the line's number, counted from 0, unless given. image (or images) is a file in the --images folder or
archive, or a list of them, which go where the text has <image>, or in front of it. answer is a correct one, or a list
of them. Each category gets a score of its own. Questions without an answer are asked but not scored.
"""
from argparse import Namespace
from pathlib import Path

from benchmarks.files import checked, each, field, number_of, reading
from benchmarks.scoring import Example, Task, grade_plain
from lib.archives import Pictures
from lib.common import jsonl_rows, visible, warn_once

EXAMPLE = '{"text": "What is this?", "image": "cat.jpg", "answer": "a cat"}'
QUESTION_FIELDS = ("question_id", "text", "image", "images", "answer", "category")


def read(folder: Path, options: Namespace) -> list[Example]:
    if not options.questions:
        raise ValueError(f"needs --questions FILE with a line like {EXAMPLE} for each question, and --images DIR")
    places = Pictures(options.images or [])
    examples = []
    names = {}
    for where, row in jsonl_rows(Path(options.questions)):
        with reading(where):
            examples.append(own_question(row, len(examples), places))
        names |= row
    not_read = ", ".join(name for name in names if name not in QUESTION_FIELDS)
    if not_read:
        fields = ", ".join(QUESTION_FIELDS)
        warn_once(visible(f"{options.questions}: {not_read} is not read; the fields are {fields}"))
    return examples


def own_question(row: dict, number: int, places: Pictures) -> Example:
    # A table saved as json has null or NaN in the cells that were empty.
    given = {name: value for name, value in row.items() if value not in (None, "", []) and value == value}
    images = tuple(map(places.find, one_or_more(given, "image") + one_or_more(given, "images")))
    if len(images) < 2:
        images = images[0] if images else None
    one_or_more(given, "answer", str, int, float)
    categories = (str(given["category"]),) if "category" in given else ()
    return Example(number_of({"question_id": number} | given), images, field(given, "text"), given.get("answer"),
                   categories)


def one_or_more(row: dict, name: str, *kinds: type) -> list:
    """A value of one of these kinds, or a list of them; none if the field is not there."""
    value = row.get(name, [])
    return each(name, value, *kinds) if isinstance(value, list) else [checked(name, value, *kinds)]


TASK = Task(
    read=read,
    grade=grade_plain,
    splits={"all": 0},
    source="--questions FILE --images FOLDER OR ARCHIVE",
)
