"""MMBench: multiple choice, each question asked with its options in every rotation; English, and the same in Chinese.

A question counts if all of its rotations are answered right (circular accuracy), so that a bias for one letter earns
nothing. For answers that are letters this gives the server's number for dev.
"""
import base64
import csv
import html
import io
import re
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from PIL import Image

from benchmarks.files import field, lettered, reading, required_files
from benchmarks.scoring import LETTER, LETTERS, Answered, Example, Grade, Graded, Score, Task, accuracy, mean

LETTER_CN = "请直接回答选项字母。"
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
}
SHEET = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")      # columns as submitted
ROTATION = 1_000_000                    # index = question + number of the rotation * this


def read(names: str, instruction: str, folder: Path, options: Namespace) -> Iterator[Example]:
    """The file has a row for each rotation. They cannot be rebuilt here: an option such as "all of the above" keeps its
    place, which only the file records."""
    [path] = required_files(folder, names.format(options.split, options.split.upper()))
    rows = list(table_rows(path))
    image_of = {row.get("index"): row.get("image") for _, row in rows}
    decode = cache(picture_in)                  # rotations share one bytes object, so the tower runs once
    for where, row in rows:
        with reading(where):
            image = field(row, "image")
            if len(image) < 64:                 # not a picture but the index of the row that has it
                image = image_of[image]
            choices = {"A": field(row, "A")}
            for letter in "BCD":                # up to the first that is missing
                if not row.get(letter):
                    break
                choices[letter] = row[letter]
            lines = [row.get("hint"), field(row, "question"), lettered(choices.values()), instruction]
            parent = row.get("l2-category")
            categories = filter(None, (ABBREVIATIONS.get(parent, parent), row.get("category")))
            truth = field(row, "answer", among=tuple("ABCD")) if row.get("answer") else None
            sheet = {name: row[name] for name in SHEET if name in row}
            yield Example(int(float(row["index"])), decode(image), "\n".join(filter(None, lines)), truth,
                          tuple(categories), {"options": choices, "row": sheet})


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place of each row and its cells; "nan" and "None" are an option or a hint that is missing, so "". A
    row that is cut, as the last of a broken download, is refused."""
    csv.field_size_limit(1 << 28)               # quoted cells may hold newlines and megabytes of base64
    with reading(path):
        text = path.read_bytes().decode("utf-8-sig")
        heading, *rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    for number, cells in enumerate(rows, 1):
        if "".join(cells).strip():
            with reading(f"{path}, row {number}"):
                cells = ["" if text.lower() in ("nan", "none") else text for text in cells]
                yield f"{path}, row {number}", dict(zip(heading, cells, strict=True))


def picture_in(text: str) -> bytes:
    """The file in a cell. Its head is read at once, so that a broken one is found before anything is asked."""
    content = base64.b64decode(text, validate=True)
    Image.open(io.BytesIO(content)).close()
    return content


REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def mmbench_letter(text: str, options: dict[str, str]) -> str | None:
    """VLMEvalKit's extraction without a language model: a letter, "answer is X", or the text of exactly one option.

    "Z": the answer declines. None: no option can be read from it.
    """
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    # A letter followed by a long sentence is more likely the article "A" than an option.
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    answer_is = re.search(rf"answer is \**([{''.join(options)}])\b", text, re.IGNORECASE) if options else None
    if answer_is:
        return answer_is[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def grade_answer(example: Example, text: str) -> Grade:
    """raw: whether the answer is exactly the letter, a stricter rule."""
    letter = mmbench_letter(text, example.info.get("options", {}))
    bare_letter = float(text.strip() == example.truth)
    return Grade(float(letter == example.truth), letter or "", unparsed=letter is None, raw=(bare_letter,))


def summarize(graded: Graded) -> Score:
    rotations = defaultdict(list)               # question -> (example, grade) of each of its rotations
    for example, grade in graded:
        rotations[example.question_id % ROTATION].append((example, grade))
    circular = []
    circular_bare = []
    for pairs in rotations.values():
        circular.append((pairs[0][0], Grade(min(grade.score for _, grade in pairs))))
        circular_bare.append(min(grade.raw[0] for _, grade in pairs))
    single_pass = [grade.score for example, grade in graded if example.question_id < ROTATION]
    numbers = {"circular, bare letters only": 100 * mean(circular_bare), "single pass": 100 * mean(single_pass)}
    return accuracy(circular, numbers)


def submission(answered: Answered, folder: Path) -> bytes:
    """A sheet with the columns of the .tsv (answer only if it has one), index as a number, missing options empty."""
    rows = [{**example.info["row"], "index": example.question_id, "prediction": text} for example, text in answered]
    columns = [name for name in SHEET if name in rows[0]]
    table = [columns]
    for row in rows:
        table.append([row[name] for name in columns])
    return xlsx(table)

# ---------------------------------------------------------------------------------------------------
# The submission's format

SCHEMAS = "http://schemas.openxmlformats.org"
CONTENT_TYPES = f"{SCHEMAS}/package/2006/content-types"
PACKAGE_RELATIONS = f"{SCHEMAS}/package/2006/relationships"
DOCUMENT_RELATIONS = f"{SCHEMAS}/officeDocument/2006/relationships"
SPREADSHEET = f"{SCHEMAS}/spreadsheetml/2006/main"
MIME = "application/vnd.openxmlformats"
XML_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'

# The four parts of a workbook that do not depend on its sheet.
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
    """The xml of one cell; empty text is omitted. place: such as "B7"."""
    if isinstance(value, int):
        return f'<c r="{place}"><v>{value}</v></c>'
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    # A cell can hold no control characters, and at most 32,767 of the others.
    value = re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value)[:32767]
    if not value:
        return ""
    text = html.escape(value, quote=False)
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def xlsx(table: list[list[int | str]]) -> bytes:
    """One sheet of numbers and texts, as the five parts of a minimal workbook (ECMA-376).

    The format is a zip of small xml files, which saves a dependency that only this submission would need.
    """
    sheet = []
    for r, row in enumerate(table, 1):
        cells = "".join(_xlsx_cell(value, f"{LETTERS[column]}{r}") for column, value in enumerate(row))
        sheet.append(f'<row r="{r}">{cells}</row>')
    sheet = f'<worksheet xmlns="{SPREADSHEET}"><sheetData>{"".join(sheet)}</sheetData></worksheet>'
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, xml in {**WORKBOOK_PARTS, "xl/worksheets/sheet1.xml": sheet}.items():
            # An entry is of 1980 unless told otherwise, which makes the file reproducible.
            archive.writestr(zipfile.ZipInfo(name), XML_HEAD + xml, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


TASK = Task(
    metric="circular accuracy",
    read=partial(read, "mmbench_{0}_20230712.tsv or MMBench_{1}_EN_legacy.tsv", LETTER),
    grade=grade_answer,
    summarize=summarize,
    submission=submission,
    submission_name="mmbench.xlsx",
    splits={"dev": 4_377, "test": 0},
    source="https://github.com/open-compass/MMBench (the legacy .tsv files)",
    files={"mmbench_dev_20230712.tsv": ""},
    published={"llava_phi": 59.8, "mipha": 69.7, "llava": 64.3},
    max_new_tokens=1024,
)

TASK_CN = TASK._replace(
    read=partial(read, "mmbench_{0}_cn_20231003.tsv or MMBench_{1}_CN_legacy.tsv", LETTER_CN),
    splits={"dev": 0, "test": 0},
    folders=("mmbench", "mmbench_cn"),
    files=dict.fromkeys(["mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN_legacy.tsv"], ""),
    published={"llava": 58.3},
)
