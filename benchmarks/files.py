"""The benchmarks' files: find and read the official ones, match an answers file to its questions, write json."""
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.scoring import LETTERS, Example, Task
from lib.archives import name_problem
from lib.common import jsonl_rows, read_json

# Two downloads that several benchmarks need.
EVAL_ZIP = "question files: LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"
COCO = "http://images.cocodataset.org/zips"

# ---------------------------------------------------------------------------------------------------
# Reading
#
# LLaVA's question file from eval.zip, if present, decides order and wording, so that answers can be compared line by
# line with published ones. Without it the same questions are rebuilt from the benchmark's official files.


def first_existing(folder: Path, names: str) -> Path | None:
    """The first that exists of "a or b"."""
    paths = [folder / name for name in names.split(" or ")]
    return next(filter(Path.exists, paths), None)


def required_files(folder: Path, *wanted: str) -> list[Path]:
    """The path of each file; for "a or b", of the first that exists. FileNotFoundError lists everything that is
    missing at once.

    A name that ends in / is the folder of the pictures. Scoring does without, so it may be missing alone.
    """
    found = [first_existing(folder, names) for names in wanted]
    missing = [names for names, path in zip(wanted, found) if path is None]
    if not all(names.endswith("/") for names in missing):
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return [path or folder / names.split(" or ")[0] for names, path in zip(wanted, found)]


def image_file(folder: Path, name: str) -> Path:
    """The path of an image that a data file names. ValueError if it would leave the folder."""
    problem = name_problem(name)
    if problem:
        raise ValueError(problem)
    return folder / name


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Whatever goes wrong while this place of a data file is read ends in one line that names the place, so that the
    readers need not check what they index and convert."""
    try:
        yield
        return
    except KeyError as e:
        problem = f"not in the expected format: {e} is missing"
    except ValueError as e:
        problem = str(e)
    except Exception as e:
        problem = f"not in the expected format ({type(e).__name__}: {e})"
    raise ValueError(f"{where}: {problem}".replace("\n", " "))


KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def checked(name: str, value: object, *kinds: type, blank: bool = False, among: Sequence = ()):
    """`value`, of one of these kinds, a text unless given. ValueError if it is of another kind, empty though not
    `blank`, or none of `among`. Neither True nor NaN is a number here."""
    kinds = kinds or (str,)
    right_kind = isinstance(value, kinds) and not isinstance(value, bool) and value == value
    empty = value in ("", [], {}) or isinstance(value, str) and not value.strip()
    if not right_kind or empty and not blank or among and value not in among:
        expected = f"one of {', '.join(map(str, among))}" if among else " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{name} is {repr(value)[:80]}, expected {expected}")
    return value


def field(row: dict, name: str, *kinds: type, **limits):
    """A field, checked."""
    return checked(name, row[name], *kinds, **limits)


def each(name: str, values: list, *kinds: type, **limits) -> list:
    """The items of a list, checked."""
    return [checked(f"{name}[{i}]", value, *kinds, **limits) for i, value in enumerate(values)]


def texts_of(row: dict, name: str, key: str = "", blank: bool = False) -> list[str]:
    """A list of texts, or the texts under `key` of its objects; people also answer with an empty one."""
    values = field(row, name, list, blank=blank)
    return each(name, [value[key] for value in values] if key else values, blank=True)


def number_of(row: dict) -> int | str:
    """The question_id."""
    return field(row, "question_id", int, str)


def found_in(table: dict, key: object, path: Path):
    """What another file, read into this table, says about a question. ValueError if it says nothing."""
    if key not in table:
        raise ValueError(f"{path} has no {key}: another version?")
    return table[key]


def read_official_json(path: Path, kind: type = list) -> dict | list:
    """Read a question or annotation file, which may have 300 MB (VQAv2)."""
    return read_json(path, limit=1 << 32, kind=kind)


def rows_of(path: Path, key: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the place and the content of each row: of a jsonl file, a json list, or the list under `key` in a json
    object."""
    if path.suffix == ".jsonl":
        yield from jsonl_rows(path)
        return
    rows = read_official_json(path, dict if key else list)
    if key:
        with reading(path):
            rows = field(rows, key, list)
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def parsed(path: Path, parse: Callable[[dict], object], key: str = "") -> list:
    """Every row of a file, parsed. ValueError names the first row that cannot be."""
    values = []
    for where, row in rows_of(path, key):
        with reading(where):
            values.append(parse(row))
    return values


def read_llava_questions(path: Path, images: Path) -> list[Example]:
    """Read a question file of eval.zip; the truth is on a server."""
    return parsed(path, lambda row: Example(number_of(row), image_file(images, row["image"]), field(row, "text")))


def lettered(choices: Iterable[str]) -> str:
    """["red", "blue"] -> "A. red\nB. blue\""""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))

# ---------------------------------------------------------------------------------------------------
# Answers files, ours and LLaVA's


def words_asked(prompt: str) -> list[str]:
    """The lines of a prompt, without the tag of the picture, which only some of LLaVA's files contain."""
    return prompt.replace("<image>", "").strip().split("\n")


def rows_of_answers(answers: list[dict], examples: list[Example], task: Task, limit: int | None) -> list[int | None]:
    """The row of the question that each line of an answers file answers; None if unknown.

    Our lines contain it. LLaVA's are in the order of the questions, or else are joined by question_id, and where that
    names the image (repeated_ids) by the text of the question too.
    """
    if all("row" in line for line in answers):
        return [line["row"] for line in answers]
    ids = [str(example.question_id) for example in examples]
    answered_ids = [str(line["question_id"]) for line in answers]
    if (answered_ids[:len(ids)] if limit else answered_ids) == ids:     # with a limit the file may answer more
        return list(range(len(answers)))

    def key(question_id: int | str, prompt: str) -> tuple[str, str]:
        return str(question_id), words_asked(prompt)[0].lower() if task.repeated_ids else ""

    row_of = {key(example.question_id, example.prompt): row for row, example in enumerate(examples)}
    return [row_of.get(key(line["question_id"], line.get("prompt", ""))) for line in answers]


def read_answers(path: Path, examples: list[Example], task: Task, limit: int | None = None, allow_missing: bool = False,
                 torn: bool = False) -> list[dict]:
    """The answer to each question; {} where allow_missing lets one be missing.

    Raises ValueError on foreign, duplicate and missing answers. limit: the examples are only the first ones of the
    benchmark, so answers to later questions are ignored. torn: see jsonl_rows.
    """
    lines = list(jsonl_rows(path, torn))
    for where, line in lines:
        with reading(where):
            number_of(line)
            for name in ("text", "prompt"):
                field({"prompt": ""} | line, name, blank=True)
    rows = rows_of_answers([line for _, line in lines], examples, task, limit)
    id_of = {row: str(example.question_id) for row, example in enumerate(examples)}
    answers = [{}] * len(examples)
    for (where, line), row in zip(lines, rows):
        with reading(where):
            known = id_of.get(row) == str(line["question_id"])
            if known and not answers[row]:
                answers[row] = line
            elif known or not limit:
                problem = "answered a second time" if known else "not in this task (another split or version?)"
                raise ValueError(f"question {line['question_id']!r} is {problem}")
    if {} in answers and not allow_missing:
        raise ValueError(f"{path}: {answers.count({}):,} of {len(examples):,} answers are missing, the first to "
                         f"question {id_of[answers.index({})]}; --allow-missing counts them as wrong")
    return answers

# ---------------------------------------------------------------------------------------------------
# Writing


def to_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def to_jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def short_sha256(data: bytes) -> str:
    """The first 16 hex digits, enough to tell versions of a file apart."""
    return hashlib.sha256(data).hexdigest()[:16]
