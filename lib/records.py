"""Random access to the records of a large json file, and the list of those that a run has skipped.

LLaVA's stage 2 is a single list of one gigabyte, and every process of a run needs it. So only the byte ranges of its
records are kept in memory, and a record is read when it is needed.
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lib.common import read_jsonl

BLOCK = 1 << 24                     # bytes read at a time


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid json")


STRICT_JSON = json.JSONDecoder(parse_constant=refuse_constant)          # Python's own also reads NaN and Infinity
SPACE = re.compile(r"[ \t\r\n]*")


def parse_record(record: bytes) -> dict:
    try:
        return STRICT_JSON.decode(record.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not json: {json_problem(e)}") from e


def json_problem(e: Exception, start: int = 0) -> str:
    """The parser's message, and how far behind `start`, the record's beginning: its line is not the file's."""
    return f"{e.msg} after {e.pos - start} characters" if isinstance(e, json.JSONDecodeError) else str(e)


def find_records(path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of the records of a json list, or of the lines of a jsonl file."""
    with open(path, "rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()     # without a byte order mark
        if head.startswith(b"["):
            yield from find_in_list(path, file)
        elif head.startswith(b"{"):
            position = file.seek(0)
            for line in file:
                if not line.isspace():
                    yield position, position + len(line)
                position += len(line)
        else:
            raise ValueError(f"{path} is not LLaVA's json: expected a list of records, found "
                             f"{head[:20].decode('utf-8', 'replace')!r}")


def find_in_list(path: Path, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Byte ranges of the records of a json list, parsed block by block: json.load would take gigabytes of memory.

    Blocks are decoded as latin-1, where every byte is one character, so the parser's positions are byte positions.
    Bytes above 127 occur only inside strings, in which the parser looks for nothing but quotes and backslashes.
    """
    file.seek(0)
    start = file.read(BLOCK).index(b"[") + 1                # where `text` begins in the file
    file.seek(start)
    text = ""
    i = 0                                                   # everything before text[i] has been yielded
    separator = "["
    while separator != "]":
        try:
            begin = SPACE.match(text, i).end()
            if separator == "[" and text[begin] == "]":
                after = begin                               # an empty list
                break
            _, end = STRICT_JSON.raw_decode(text, begin)
            after = SPACE.match(text, end).end()
            if text[after] not in ",]":
                raise ValueError("expected , or ] after this record")
        except (ValueError, IndexError, RecursionError) as e:
            # Either the record continues in the next block, or it is broken. It is broken if the file ends, or if it
            # takes more than 16 blocks.
            block = file.read(max(BLOCK, len(text) - i))
            if not block or len(text) - i > 16 * BLOCK:
                [line] = lines_of(path, [start + begin])
                raise ValueError(f"not json: {path}, line {line}: {json_problem(e, begin)}; the record that begins "
                                 "there is broken, and what follows cannot be found") from e
            text = text[i:] + block.decode("latin-1")
            start += i
            i = 0
            continue
        yield start + begin, start + end
        separator = text[after]
        i = after + 1
    position = file.seek(start + after + 1)
    while block := file.read(BLOCK):
        if not block.isspace():
            [line] = lines_of(path, [position + len(block) - len(block.lstrip())])
            raise ValueError(f"not json: {path}, line {line}: {block.strip()[:20]!r} after the end of the list; two lists "
                             "in one file must become one, or two files")
        position += len(block)


def lines_of(path: Path, positions: list[int]) -> list[int]:
    """Line numbers, from 1, of ascending byte positions."""
    lines = []
    line = 1
    read = 0
    with open(path, "rb") as file:
        for position in positions:
            while read < position:
                block = file.read(min(BLOCK, position - read))
                if not block:
                    break
                line += block.count(b"\n")
                read += len(block)
            lines.append(line)
    return lines


def id_of(record: bytes) -> str:
    """A record's id, even if the record cannot be parsed."""
    match = re.search(rb'"id"\s*:\s*("[^"]*"|-?\d+)', record)
    return match[1].decode("utf-8", "replace").strip('"') if match else "(none)"

# ---------------------------------------------------------------------------------------------------
# What is in a record

MEDIA = re.compile(r"(media|image|img|picture|photo|video|audio|sound|speech)s?"
                   r"(_?(path|file|file_?name|name|url|list|bytes|base64|data)s?)?", re.IGNORECASE)


def media_problem(record: dict, said: list[dict]) -> str:
    """What is wrong with a record's picture, or the name of other media in it or in its turns; "" if there is nothing.

    Without this, such a sample would be trained as text, about something that the model cannot see.
    """
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        return f"image name: expected one path, found {image!r}"
    for part in (record, *said):
        for key, value in part.items():
            if MEDIA.fullmatch(key) and value and not (key == "image" and part is record):
                return f'media not read: the record has {key!r}; expected one picture under "image", or none'
    return ""

# ---------------------------------------------------------------------------------------------------
# Bad samples

BAD_SAMPLES = "bad_samples.jsonl"   # in the run's folder, appended to by all of its processes


class BadSamples:
    """Those of a file's n records that have been skipped, listed in `folder`'s BAD_SAMPLES if there is a folder."""

    def __init__(self, folder: Path | None, checksum: str, n: int):
        self.folder = folder
        self.checksum = checksum    # of the file, which may move while a run is interrupted
        self.limit = max(10, n // 1000)
        self.found: set[int] = set()

    def add(self, problem: dict) -> None:
        """Add a problem, unless an earlier epoch has. ValueError when there are too many."""
        if self.folder:             # other ranks list theirs there, and so did this run before it was resumed
            listed = read_bad_samples(self.folder)
            self.found |= {sample for checksum, sample in listed if checksum == self.checksum}
        if problem["sample"] not in self.found:
            self.found.add(problem["sample"])
            if self.folder:
                with open(self.folder / BAD_SAMPLES, "ab", buffering=0) as file:
                    line = json.dumps({"checksum": self.checksum, **problem}) + "\n"
                    file.write(line.encode())               # in one write, so that processes' lines do not mix
        if len(self.found) > self.limit:
            raise ValueError(f"{len(self.found)} bad samples, more than {self.limit} (0.1 % of the data, but at least "
                             f"10); the last: {problem['problem']}")


def read_bad_samples(folder: Path) -> set[tuple[str, int]]:
    """A run's BAD_SAMPLES so far: the checksum of the data file, and the sample's number in it."""
    path = folder / BAD_SAMPLES
    lines = read_jsonl(path, torn=True) if path.exists() else []
    return {(line["checksum"], line["sample"]) for line in lines}
