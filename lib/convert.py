"""`python data.py convert`: parquet files with pictures in their rows -> a jsonl of records and a zip of pictures.

Files are read row group by row group, and after each one a small file says how far the output is complete. So memory
does not grow with the data, and after a crash the same command goes on.
"""
import io
import json
import os
import struct
import zlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from lib.common import hold_folder, read_json, write_whole
from lib.pictures import open_rgb
from lib.records import MEDIA, conversation_of, parse_record

parquet = None
with suppress(ImportError):             # the only command that needs it
    import pyarrow
    import pyarrow.parquet as parquet

RECORDS, PICTURES, BAD_ROWS = OUTPUTS = ("records.jsonl", "images.zip", "bad_rows.jsonl")
PROGRESS = "convert.json"
CONVERSATIONS = ("conversations", "messages", "texts")       # columns that a conversation may be in


def convert(args: Namespace) -> int:
    """Convert all files, or the rest of them -> exit code: 0, or 1 if there are bad rows."""
    problems = [columns_of(path)[1] for path in args.data]
    with hold_folder(args.out):
        done, problem = start_of(args.out, args.data)
        problem = next(filter(None, [*problems, problem]), "")
        if problem:
            raise ValueError(problem)
        if done["file"] < len(args.data):
            convert_rest(args.out, args.data, done)
    records, pictures, bad = (args.out / name for name in OUTPUTS)
    print(f"{done['rows']:,} rows: {done['rows'] - done['bad']:,} records in {records}, {done['pictures']:,} pictures "
          f"in {pictures}; {done['bad']:,} bad rows, listed in {bad}")
    print(f"next: python data.py check --data {records} --images {pictures}")
    return 1 if done["bad"] else 0


def columns_of(path: Path) -> tuple[list[str], str]:
    """The columns of a parquet file that are read, and what is wrong with it, or ""."""
    if parquet is None:
        return [], "pyarrow, which reads parquet, is not installed: pip install pyarrow"
    try:
        names = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as e:
        return [], f"{path} is not a parquet file, or is cut short: {str(e).splitlines()[0]}"
    # Next to embedded pictures many files give their former names, in image_path and the like.
    embedded = {"image", "images"} & set(names)
    columns = [name for name in names if name in CONVERSATIONS or name in ("id", "system", *embedded)
               or MEDIA.fullmatch(name) and not (embedded and name.startswith("image"))]
    if not set(CONVERSATIONS) & set(names):
        return [], (f"{path} has the columns {', '.join(names)[:200]}; expected one of {', '.join(CONVERSATIONS)}, and "
                    "the pictures' bytes in image or images")
    return columns, ""


def start_of(out: Path, files: list[Path]) -> tuple[dict, str]:
    """How far an earlier conversion into `out` came, and what is wrong with it: other files, or not all its output."""
    sources = [[str(file), file.stat().st_size] for file in files]
    done = {"sources": sources, "file": 0, "group": 0, "row": 0, "rows": 0, "bad": 0, "pictures": 0,
            "sizes": dict.fromkeys(OUTPUTS, 0)}
    sizes = {name: (out / name).stat().st_size if (out / name).exists() else 0 for name in OUTPUTS}
    fits = not any(sizes.values())
    if (out / PROGRESS).exists():
        done = read_json(out / PROGRESS, limit=1 << 30)
        fits = done["sources"] == sources and all(sizes[name] >= size for name, size in done["sizes"].items())
    problem = f"{out} holds something else, a conversion of other files or a part of one: choose another folder"
    return done, "" if fits else problem


def convert_rest(out: Path, files: list[Path], done: dict) -> None:
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(open(out / name, "ab")) for name in OUTPUTS}
        for name, size in done["sizes"].items():
            outputs[name].truncate(size)                    # what was written after the last note of progress
        save_progress(out, outputs, done)
        for path in files[done["file"]:]:
            columns, _ = columns_of(path)
            file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            groups = range(done["group"], file.num_row_groups)
            for done["group"] in tqdm(groups, path.name, unit=" row groups", disable=None, leave=False):
                for row in rows_in_group(file, done["group"], columns, path):
                    convert_row(row, path, outputs, done)
                done["group"] += 1
                save_progress(out, outputs, done)
            done.update(file=done["file"] + 1, group=0, row=0)
        write_directory(out / PICTURES, outputs[PICTURES])
        save_progress(out, outputs, done)


def rows_in_group(file: "parquet.ParquetFile", group: int, columns: list[str],
                  path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a row group, each by itself: a text that is not UTF-8 then spoils only its own."""
    try:
        for batch in file.iter_batches(16, row_groups=[group], columns=columns, use_threads=False):
            yield from (batch.slice(i, 1) for i in range(batch.num_rows))
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}, row group {group}: {str(e).splitlines()[0]}") from e


def save_progress(out: Path, outputs: dict[str, BinaryIO], done: dict) -> None:
    for name, file in outputs.items():
        file.flush()
        os.fsync(file.fileno())
        done["sizes"][name] = file.tell()
    write_whole(out / PROGRESS, json.dumps(done))

# ---------------------------------------------------------------------------------------------------
# One row


def convert_row(row: "pyarrow.RecordBatch", path: Path, outputs: dict[str, BinaryIO], done: dict) -> None:
    """Write a row's record and pictures, or what is wrong with it."""
    try:
        record, pictures = record_of(row.to_pylist()[0], done["rows"])
        line = json.dumps(record, ensure_ascii=False, default=repr).encode()
        conversation = conversation_of(parse_record(line))              # as training will
        missing = [name for name in conversation.images if name not in pictures and not name.startswith("data:")]
        problem = f"image without its bytes: {missing[0]!r}" if missing else ""
    except ValueError as e:
        problem = str(e)
    if problem:
        bad = {"file": str(path), "row": done["row"], "problem": problem}
        outputs[BAD_ROWS].write(json.dumps(bad).encode() + b"\n")
    else:
        outputs[RECORDS].write(line + b"\n")
        for name, data in pictures.items():
            write_member(outputs[PICTURES], name.encode(), data)
        done["pictures"] += len(pictures)
    done["bad"] += bool(problem)
    done["row"] += 1
    done["rows"] += 1


def record_of(row: dict, number: int) -> tuple[dict, dict[str, bytes]]:
    """A row as one of the records that lib/records.py reads, and its pictures by the names that they get.

    The `texts` of The Cauldron and FineVision have no places for pictures, which go in front of the first question.
    """
    pictures: dict[str, bytes] = {}

    def name_pictures(value: object) -> object:
        """Replace bytes by a name. What parquet fills up with None is left out."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            form = open_rgb(io.BytesIO(data), 1, "squash", decode=False).format
            name = f"{number:09d}_{len(pictures)}.{form.lower()}"
            pictures[name] = data
            return name
        if isinstance(value, dict):
            return {key: name_pictures(part) for key, part in value.items() if part is not None}
        return [name_pictures(part) for part in value] if isinstance(value, list) else value

    id = row.pop("id", None)
    record = {"id": str(number if id is None else id)} | name_pictures(row)
    texts = record.get("texts")
    if isinstance(texts, list) and texts and all(isinstance(turn, dict) for turn in texts):
        said = [{"role": role, "content": turn.get(role)} for turn in texts for role in ("user", "assistant")]
        given = [record.pop(key) for key in ("image", "images") if key in record]
        names = chain.from_iterable(value if isinstance(value, list) else [value] for value in given)
        parts = [{"type": "image", "image": name} for name in names]
        said[0]["content"] = [*parts, {"type": "text", "text": said[0]["content"]}]
        record["messages"] = said
        del record["texts"]
    return record, pictures

# ---------------------------------------------------------------------------------------------------
# A zip of stored members. Python's zipfile keeps its directory in memory, and loses it in a crash.


def write_member(file: BinaryIO, name: bytes, data: bytes) -> None:
    sizes = struct.pack("<3L2H", zlib.crc32(data), len(data), len(data), len(name), 0)
    file.write(struct.pack("<4s5H", b"PK\3\4", 20, 0x800, 0, 0, 0x21) + sizes + name + data)


def write_directory(path: Path, file: BinaryIO) -> None:
    """Append the directory of all members to `file`, which is open at the end of `path`. zip64: any number and size."""
    file.flush()
    start = file.tell()
    n = position = 0
    with open(path, "rb", buffering=256) as members:
        while position < start:
            members.seek(position)
            crc, size, _, n_name, _ = struct.unpack("<14x3L2H", members.read(30))
            name = members.read(n_name)
            extra = struct.pack("<HHQ", 1, 8, position)
            file.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0x800, 0, 0, 0x21, crc, size, size, n_name,
                                   len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + name + extra)
            position += 30 + n_name + size
            n += 1
    end = file.tell()
    file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, end - start, start))
    file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
    file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
