"""The benchmarks' files: find and read the official ones, match an answers file to its questions, write json."""
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from benchmarks.scoring import LETTERS, Example
from lib.common import read_json, read_jsonl

# Two downloads that several benchmarks need.
EVAL_ZIP = "question files: LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"
COCO = "http://images.cocodataset.org/zips"

# ---------------------------------------------------------------------------------------------------
# Reading
#
# LLaVA's question file from eval.zip, if present, decides order and wording, so that answers can be compared line by
# line with published ones. Without it the same questions are rebuilt from the benchmark's official files.


def first_existing(folder: Path, *names: str) -> Path | None:
    for name in names:
        if (folder / name).exists():
            return folder / name
    return None


def required_file(folder: Path, *names: str) -> Path:
    """The first of these files that exists. FileNotFoundError lists all of them."""
    path = first_existing(folder, *names)
    if path is None:
        others = "".join(f" (nor is there {name})" for name in names[1:])
        raise FileNotFoundError(f"{folder / names[0]} is missing{others}")
    return path


def image_file(folder: Path, name: str) -> Path:
    """The path of an image that a data file names. ValueError if it would leave the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or set(name) & set("\0\\:"):
        raise ValueError(f"image name {name!r} is not a plain path inside {folder}")
    return folder / name


def read_official_json(path: Path) -> dict | list:
    """Read a question or annotation file: a list or an object, and up to 300 MB (VQAv2)."""
    return read_json(path, limit=1 << 32, kind=(dict, list))


def read_llava_questions(path: Path, images: Path) -> Iterator[Example]:
    """Read a question file of eval.zip; the truth is on a server."""
    for row in read_jsonl(path):
        yield Example(row["question_id"], image_file(images, row["image"]), row["text"])


def lettered(choices: Iterable[str]) -> str:
    """["red", "blue"] -> "A. red\nB. blue\""""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))

# ---------------------------------------------------------------------------------------------------
# Answers files, ours and LLaVA's


def question_line(prompt: str) -> str:
    return prompt.removeprefix("<image>\n").split("\n")[0].lower()


def rows_of_answers(answers: list[dict], examples: list[Example], repeated_ids: bool,
                    limit: int | None) -> list[int | None]:
    """The row of the question that each line of an answers file answers; None if unknown.

    Our lines contain it. LLaVA's are in the order of the questions, or else are joined by question_id, and where that
    names the image (repeated_ids) by the text of the question too.
    """
    if all("row" in line for line in answers):
        return [line["row"] for line in answers]
    ids = [str(example.question_id) for example in examples]
    answered_ids = [str(line["question_id"]) for line in answers]
    if limit:                           # the file may answer more questions than these
        answered_ids = answered_ids[:len(ids)]
    if answered_ids == ids:
        return list(range(len(answers)))

    def key(question_id: int | str, prompt: str) -> tuple[str, str]:
        return str(question_id), question_line(prompt) if repeated_ids else ""

    row_of = {key(example.question_id, example.prompt): row for row, example in enumerate(examples)}
    return [row_of.get(key(line["question_id"], line.get("prompt", ""))) for line in answers]


def read_answers(path: Path, examples: list[Example], repeated_ids: bool = False, limit: int | None = None,
                 allow_missing: bool = False) -> list[dict | None]:
    """The answer to each question; None where allow_missing lets one be missing.

    Raises ValueError on foreign, duplicate and missing answers. limit: the examples are only the first ones of the
    benchmark, so answers to later questions are ignored.
    """
    answers = read_jsonl(path)
    ids = [str(example.question_id) for example in examples]
    for number, line in enumerate(answers, 1):
        if not isinstance(line.get("text"), str) or "question_id" not in line:
            raise ValueError(f"{path}, line {number}: expected question_id, prompt and text, found {', '.join(line)}")
    rows = rows_of_answers(answers, examples, repeated_ids, limit)
    answer_of: list[dict | None] = [None] * len(ids)
    for number, (row, line) in enumerate(zip(rows, answers), 1):
        known = isinstance(row, int) and 0 <= row < len(ids) and str(line["question_id"]) == ids[row]
        if not known and limit:
            continue
        if not known or answer_of[row]:
            problem = "answered a second time" if known else "not in this task (another split or version?)"
            raise ValueError(f"{path}, line {number}: question {line['question_id']!r} is {problem}")
        answer_of[row] = line
    if None in answer_of and not allow_missing:
        first_missing = ids[answer_of.index(None)]
        raise ValueError(f"{path}: {answer_of.count(None):,} of {len(ids):,} answers are missing, the first to "
                         f"question {first_missing}; --allow-missing counts them as wrong")
    return answer_of

# ---------------------------------------------------------------------------------------------------
# Writing


def to_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def to_jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def short_sha256(data: bytes) -> str:
    """The first 16 hex digits, enough to tell versions of a file apart."""
    return hashlib.sha256(data).hexdigest()[:16]
