"""What the benchmarks share about files: finding and reading the official ones, reading answers, writing
submissions."""
import hashlib
import html
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from benchmarks.scoring import LETTERS, Example
from lib.common import read_json, read_jsonl, write_whole

# Two downloads that several benchmarks need.
EVAL_ZIP = "question files: LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"
COCO = "http://images.cocodataset.org/zips"

# ---------------------------------------------------------------------------------------------------
# Reading
#
# Where LLaVA's question file from eval.zip is there, it decides order and wording, so that the answers can be compared
# line by line with published ones. Without it the same questions are rebuilt from the benchmark's official files.


def first_existing(folder: Path, *names: str) -> Path | None:
    for name in names:
        if (folder / name).exists():
            return folder / name
    return None


def required_file(folder: Path, *names: str) -> Path:
    """The first of these names that exists; FileNotFoundError names all of them."""
    path = first_existing(folder, *names)
    if path is None:
        others = "".join(f" (nor is there {name})" for name in names[1:])
        raise FileNotFoundError(f"{folder / names[0]} is missing{others}")
    return path


def image_path(folder: Path, name: str) -> Path:
    """The path of an image that a data file names. ValueError if it would leave the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or set(name) & set("\0\\:"):
        raise ValueError(f"image name {name!r} is not a plain path inside {folder}")
    return folder / name


def read_official_json(path: Path) -> dict | list:
    """Question and annotation files are lists as well as objects, and VQAv2's have 300 MB."""
    return read_json(path, limit=1 << 32, kind=(dict, list))


def read_llava_questions(path: Path, images: Path) -> Iterator[Example]:
    """A question file of eval.zip whose truth is on a server."""
    for row in read_jsonl(path):
        yield Example(row["question_id"], image_path(images, row["image"]), row["text"])


def lettered(choices: Iterable[str]) -> str:
    """["red", "blue"] -> "A. red\nB. blue\""""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))

# ---------------------------------------------------------------------------------------------------
# Answers files, ours and LLaVA's


def first_line(prompt: str) -> str:
    return prompt.removeprefix("<image>\n").split("\n")[0].lower()


def rows_of_answers(answers: list[dict], examples: list[Example], repeated_ids: bool,
                    limit: int | None) -> list[int | None]:
    """The row that each line of an answers file belongs to; None: not known.

    Our lines say it themselves. LLaVA's are in the order of the questions, or are joined by question_id, and where
    that names the image (repeated_ids) by the question's words too.
    """
    if all("row" in line for line in answers):
        return [line["row"] for line in answers]
    ids = [str(example.question_id) for example in examples]
    answered_ids = [str(line["question_id"]) for line in answers]
    if limit:                           # the file may go on where the questions end
        answered_ids = answered_ids[:len(ids)]
    if answered_ids == ids:
        return list(range(len(answers)))

    def key(question_id: int | str, prompt: str) -> tuple[str, str]:
        return str(question_id), first_line(prompt) if repeated_ids else ""

    row_of = {key(example.question_id, example.prompt): row for row, example in enumerate(examples)}
    return [row_of.get(key(line["question_id"], line.get("prompt", ""))) for line in answers]


def read_answers(path: Path, examples: list[Example], repeated_ids: bool = False, limit: int | None = None,
                 allow_missing: bool = False) -> list[dict | None]:
    """The answer to each question; None where allow_missing lets one be missing.

    Raises ValueError on answers that do not belong, are double or missing. `limit` says that the examples are only
    the first ones of the benchmark, so that answers to further questions are passed over.
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


def checksum(data: bytes) -> str:
    """The first 16 digits of the sha256: enough to tell versions of a file apart, and short enough to read."""
    return hashlib.sha256(data).hexdigest()[:16]


SCHEMAS = "http://schemas.openxmlformats.org"
CONTENT_TYPES = f"{SCHEMAS}/package/2006/content-types"
PACKAGE_RELATIONS = f"{SCHEMAS}/package/2006/relationships"
DOCUMENT_RELATIONS = f"{SCHEMAS}/officeDocument/2006/relationships"
SPREADSHEET = f"{SCHEMAS}/spreadsheetml/2006/main"
MIME = "application/vnd.openxmlformats"
XML_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'

# The four parts of a workbook that are the same whatever its one sheet holds.
WORKBOOK_PARTS = {
    "[Content_Types].xml": f"""<Types xmlns="{CONTENT_TYPES}">
<Default Extension="rels" ContentType="{MIME}-package.relationships+xml"/>
<Override PartName="/xl/workbook.xml" ContentType="{MIME}-officedocument.spreadsheetml.sheet.main+xml"/>
<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{MIME}-officedocument.spreadsheetml.worksheet+xml"/>
</Types>""",
    "_rels/.rels": f"""<Relationships xmlns="{PACKAGE_RELATIONS}">
<Relationship Id="rId1" Type="{DOCUMENT_RELATIONS}/officeDocument" Target="xl/workbook.xml"/></Relationships>""",
    "xl/workbook.xml": f"""<workbook xmlns="{SPREADSHEET}" xmlns:r="{DOCUMENT_RELATIONS}">
<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>""",
    "xl/_rels/workbook.xml.rels": f"""<Relationships xmlns="{PACKAGE_RELATIONS}">
<Relationship Id="rId1" Type="{DOCUMENT_RELATIONS}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>""",
}


def _xlsx_cell(value: int | str, place: str) -> str:
    """The xml of one cell. place: such as "B7". An empty text is a cell that is not there."""
    if isinstance(value, int):
        return f'<c r="{place}"><v>{value}</v></c>'
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    # A cell can hold no control characters, and at most 32,767 of the others.
    value = re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value)[:32767]
    if not value:
        return ""
    text = html.escape(value, quote=False)
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def write_xlsx(path: Path, table: list[list[int | str]]) -> Path:
    """Write one sheet of numbers and texts, as the five parts that a workbook needs at least (ECMA-376).

    A spreadsheet package would be a dependency for one submission file; the format is a zip of small xml files.
    """
    sheet = []
    for r, row in enumerate(table, 1):
        cells = "".join(_xlsx_cell(value, f"{LETTERS[column]}{r}") for column, value in enumerate(row))
        sheet.append(f'<row r="{r}">{cells}</row>')
    parts = dict(WORKBOOK_PARTS)
    parts["xl/worksheets/sheet1.xml"] = (
        f'<worksheet xmlns="{SPREADSHEET}"><sheetData>{"".join(sheet)}</sheetData></worksheet>')
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, xml in parts.items():
            # A fixed date makes the same answers the same file.
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, XML_HEAD + xml, zipfile.ZIP_DEFLATED)
    return write_whole(path, packed.getvalue())
