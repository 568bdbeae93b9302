"""Your own questions: `--task jsonl --questions my.jsonl --images my_images`.

Each line of the file is a json object with question_id and text, and optionally image (a file in the --images folder
or archive, or a list of them, which are where the text has <image>, or in front), answer (one, or a list of right ones)
and category (gets its own sub-score). Questions without an answer are asked and not scored.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import required_file
from benchmarks.scoring import Example, Task, accuracy, grade_plain
from lib.archives import Pictures
from lib.common import read_jsonl


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    if not options.questions:
        raise ValueError("needs --questions FILE (jsonl: question_id, image, text, optionally answer) and --images DIR")
    places = Pictures(options.images or [])
    for i, row in enumerate(read_jsonl(required_file(Path(), options.questions))):
        names = row.get("image") or row.get("images") or []
        images = tuple(places.find(name) for name in ([names] if isinstance(names, str) else names))
        categories = (str(row["category"]),) if "category" in row else ()
        image = images if len(images) > 1 else next(iter(images), None)
        yield Example(row.get("question_id", i), image, row["text"], row.get("answer"), categories)


TASK = Task(
    metric="accuracy",
    read=read,
    grade=grade_plain,
    summarize=accuracy,
    splits={"all": 0},
    source="--questions FILE --images FOLDER OR ARCHIVE",
)
