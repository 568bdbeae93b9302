"""Your own questions: `--task jsonl --questions my.jsonl --images my_images`.

Each line of the file is a json object with question_id and text, and optionally image (a file in the --images folder),
answer (one, or a list of right ones) and category (gets its own sub-score). Questions without an answer are asked and
not scored.
"""
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import image_file, required_file
from benchmarks.scoring import Example, Task, accuracy, grade_plain
from lib.common import read_jsonl


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    if not options.questions:
        raise ValueError("needs --questions FILE (jsonl: question_id, image, text, optionally answer) and --images DIR")
    for i, row in enumerate(read_jsonl(required_file(Path(), options.questions))):
        image = None
        if row.get("image"):
            if not options.images:
                raise ValueError(f"{options.questions} names images: add --images DIR")
            image = image_file(Path(options.images), row["image"])
        categories = (str(row["category"]),) if "category" in row else ()
        yield Example(row.get("question_id", i), image, row["text"], row.get("answer"), categories)


TASK = Task(
    metric="accuracy",
    read=read,
    grade=grade_plain,
    summarize=accuracy,
    splits={"all": 0},
    source="--questions FILE --images DIR",
)
