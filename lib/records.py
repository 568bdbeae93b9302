"""Random access to the records of a large json file, and the list of those that a run has skipped.

LLaVA's stage 2 is a single list of one gigabyte, and every process of a run needs it. So only the byte ranges of its
records are kept in memory, and a record is read when it is needed.
"""
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lib.common import append_line, read_jsonl, replacing

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
            raise ValueError(f"{path} is not LLaVA's json: expected a list of records, or one record a line, found "
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
    check_end(path, file, start + after + 1)


def check_end(path: Path, file: BinaryIO, position: int) -> None:
    """Nothing may follow a list: of two in one file, the second would be lost."""
    file.seek(position)
    while block := file.read(BLOCK):
        if not block.isspace():
            [line] = lines_of(path, [position + len(block) - len(block.lstrip())])
            raise ValueError(f"not json: {path}, line {line}: {block.strip()[:20]!r} after the end of the list; two "
                             "lists in one file must become one, or two files")
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
# What has been measured of all records


def cached_arrays(folder: Path, kind: str, key: list, names: Sequence[str],
                  make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """The arrays that a folder holds for this key; made, and kept there, if there are none or they cannot be read."""
    path = folder / f"{kind}_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in names}
        except Exception as e:              # zipfile and numpy raise a dozen kinds of exception on bad bytes
            print(f"{path} cannot be read ({type(e).__name__}) and is made anew", flush=True)
    arrays = make()
    with replacing(path) as part:
        np.savez(part, **arrays)
    return arrays

# ---------------------------------------------------------------------------------------------------
# What is in a record
#
# LLaVA's {"image", "conversations": [{"from": "human", "value"}, ...]}, ShareGPT's with "images", OpenAI's {"messages":
# [{"role": "user", "content"}, ...]}: whatever its form, a record becomes who said what, and the pictures.

IMAGE = "<image>"                   # LLaVA's placeholder in a question; never a token
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "developer": "system"}
# Names of keys that hold media. A record with one that is not read would be trained as text, about something that the
# model cannot see.
MEDIA = re.compile(r"(media|image|img|picture|photo|video|audio|sound|speech)s?"
                   r"(_?(path|file|file_?name|name|url|list|bytes|base64|data)s?)?", re.IGNORECASE)


class Record(NamedTuple):
    """A conversation in one form. A text is a list of pieces: between any two of them there is a picture."""
    said: list[tuple[str, list[str]]]   # (user, assistant or system, text)
    images: list[str]                   # names or data: addresses, in the order of their places


def read_record(record: object) -> tuple[Record, str]:
    """A record of any of the forms above, and what is wrong with it; "" if nothing is."""
    nothing = Record([], [])
    turns = None
    if isinstance(record, dict):
        turns = record.get("conversations") if record.get("conversations") is not None else record.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        turns = [{}]
    said, places = [], []
    for turn in turns:
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        pieces, its_places, problem = pieces_of(content)
        if pieces is None:
            return nothing, problem or ('not a conversation: expected {"id", "image" (if any), "conversations": '
                                        '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]} or '
                                        f"OpenAI's \"messages\", found {repr(turn or record)[:80]}")
        name = turn.get("from") if turn.get("from") is not None else turn.get("role")
        role = ROLES.get(name, repr(name)) if isinstance(name, str) else repr(name)
        if its_places and role != "user":
            return nothing, f"image places: a picture in the words of {role}; expected it in a question"
        if said and said[-1][0] == role == "user" and "messages" in record:
            # OpenAI's own examples give the question and the picture as two messages in a row.
            before = said.pop()[1]
            pieces = [*before[:-1], f"{before[-1]}\n{pieces[0]}", *pieces[1:]]
        said.append((role, pieces))
        places += its_places
    if isinstance(record.get("system"), str) and record["system"]:
        said.insert(0, ("system", [record["system"]]))
    images, problem = images_of(record, turns, places)
    return Record(said, images), problem


def pieces_of(content: object) -> tuple[list[str] | None, list[str | None], str]:
    """A turn's content -> its text in pieces, the picture between each two (None: the record's next), the problem.

    OpenAI's parts are joined by line breaks, which is how LLaVA writes a picture and a question.
    """
    if isinstance(content, str):
        return [content], [], ""
    if not isinstance(content, list) or not content:
        return None, [], ""
    pieces, places = [""], []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        pieces[-1] += "\n" if i else ""
        if kind == "text" and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        elif kind in ("image", "image_url"):
            places.append(name_in(part))
            pieces.append("")
        elif isinstance(kind, str) and kind != "text":
            return None, [], f"media not read: a part of type {kind!r}; expected text, image or image_url"
        else:
            return None, [], ""
    return pieces, places, ""


def name_in(picture: object) -> str | None:
    """The name in a picture that is a name, a part of a content, or an object of a list; None if it has none."""
    if isinstance(picture, dict):
        names = [name_in(picture[key]) for key in ("image", "image_url", "url", "path") if picture.get(key)]
        return next((name for name in names if name), None)
    return picture if isinstance(picture, str) and picture else None


def images_of(record: dict, turns: list[dict], places: list[str | None]) -> tuple[list[str], str]:
    """The names of a record's pictures, those of the parts (`places`) among them, and what is wrong with them."""
    for part in (record, *turns):
        for key, value in part.items():
            if MEDIA.fullmatch(key) and value and not (part is record and key in ("image", "images")):
                return [], f'media not read: the record has {key!r}; expected pictures under "image" or "images"'
    given = [record[key] for key in ("image", "images") if record.get(key) not in (None, [], {})]
    lists = [[name_in(picture) for picture in (value if isinstance(value, list) else [value])] for value in given]
    names = lists[0] if lists else []
    if None in names or lists[1:] not in ([], [names]):
        return [], f"image name: expected a path or a list of paths, found {' and '.join(map(repr, given))[:200]}"
    if places and None not in places and names in ([], places):
        return places, ""
    if places and len(names) != places.count(None):
        return [], (f"image places: {places.count(None)} pictures in the messages have no name, and the record names "
                    f"{len(names)}")
    rest = iter(names)
    return [name or next(rest) for name in places] or names, ""


NOTES = ("empty answer, only the end of text is learned",
         f"no {IMAGE} where a question begins or ends, the image is put in front of the first",
         f"{IMAGE} that stays text",
         "more than 100,000 characters")


def notes_on(record: dict, n_images: int) -> int:
    """Oddities of a good record that its author may not have intended: a bit for each of NOTES."""
    (said, _), _ = read_record(record)
    texts = ["".join(pieces) for _, pieces in said]
    questions = [pieces for role, pieces in said if role == "user"]
    placed = sum(len(pieces) - 1 for pieces in questions)
    n_tags = sum(text.count(IMAGE) for text in texts)
    n_in_questions = sum(piece.count(IMAGE) for pieces in questions for piece in pieces)
    at_edge = any(text.startswith(IMAGE) or text.endswith(IMAGE) for text in (piece[0].strip() for piece in questions))
    if n_images == 1 and not placed:
        placed_by_tag = int(at_edge or n_in_questions == 1)
    else:
        placed_by_tag = n_images - placed
    found = (not all(any(pieces) for role, pieces in said if role == "assistant"),
             n_images == 1 and not placed and not placed_by_tag,
             n_tags > placed_by_tag,
             sum(map(len, texts)) > 100_000)
    return sum(1 << bit for bit, yes in enumerate(found) if yes)

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
                append_line(self.folder / BAD_SAMPLES, {"checksum": self.checksum, **problem})
        if len(self.found) > self.limit:
            raise ValueError(f"{len(self.found)} bad samples, more than {self.limit} (0.1 % of the data, but at least "
                             f"10); the last: {problem['problem']}")


def read_bad_samples(folder: Path) -> set[tuple[str, int]]:
    """A run's BAD_SAMPLES so far: the checksum of the data file, and the sample's number in it."""
    path = folder / BAD_SAMPLES
    lines = read_jsonl(path, torn=True) if path.exists() else []
    return {(line["checksum"], line["sample"]) for line in lines}
