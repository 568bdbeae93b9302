"""Random access to the records of a large json file, what is said in one, and the list of those that a run has skipped.

LLaVA's stage 2 is a single list of one gigabyte, and every process of a run needs it. So only the byte ranges of its
records are kept in memory, and a record is read when it is needed.
"""
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, takewhile
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
        position = file.seek(0)
        if head.startswith(b"["):
            yield from find_in_list(path, file)
        elif head.startswith(b"{"):
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
    start = file.read(BLOCK).index(b"[") + 1                # where `text` begins in the file
    file.seek(start)
    text, i = "", 0                                         # everything before text[i] has been yielded
    separator, problem = "[", ""
    while separator != "]" and not problem:
        try:
            begin = end = SPACE.match(text, i).end()
            place = start + begin
            if separator != "[" or text[begin] != "]":      # not an empty list
                _, end = STRICT_JSON.raw_decode(text, begin)
            after = SPACE.match(text, end).end()
            separator = text[after]
        except (ValueError, IndexError, RecursionError) as e:
            # The record continues in the next block, or it is broken: the file ends, or it takes more than 16 blocks.
            block = file.read(max(BLOCK, len(text) - i))
            if not block or len(text) - i > 16 * BLOCK:
                problem = json_problem(e, begin)
            text, start, i = text[i:] + block.decode("latin-1"), start + i, 0
        else:
            if separator not in ",]":
                problem = "expected , or ] after this record"
            if end > begin:
                yield place, start + end
            i = after + 1
    file.seek(start + i)
    if problem:
        problem += "; the record that begins there is broken, and what follows cannot be found"
    elif rest := file.read().lstrip():                      # of two lists in one file, the second would be lost
        place = file.tell() - len(rest)
        problem = f"{rest[:20]!r} after the end of the list; two lists in one file must become one, or two files"
    if problem:
        [line] = lines_of(path, [place])
        raise ValueError(f"not json: {path}, line {line}: {problem}")


def lines_of(path: Path, positions: list[int]) -> list[int]:
    """Line numbers, from 1, of ascending byte positions."""
    lines = []
    line = 1
    with open(path, "rb") as file:
        for position in positions:
            while block := file.read(min(BLOCK, position - file.tell())):
                line += block.count(b"\n")
            lines.append(line)
    return lines


def id_of(record: bytes) -> str:
    """A record's id, even if the record cannot be parsed."""
    match = re.search(rb'"id"\s*:\s*("[^"]*"|-?\d+)', record)
    return match[1].decode("utf-8", "replace").strip('"') if match else "(none)"

# ---------------------------------------------------------------------------------------------------
# What has been measured of all records


def cached_arrays(folder: Path | None, kind: str, key: list, names: Sequence[str],
                  make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """The arrays that a folder holds for this key; made, and kept there, if there are none or they cannot be read."""
    if folder is None:
        return make()
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


def read_record(record: object) -> tuple[list[tuple[str, list[str]]], list[str], str]:
    """A record of any of the forms above -> who said what, the pictures, and what is wrong with it, or "".

    Who: user, assistant or system. What: a list of pieces, between any two of which there is a picture. The pictures:
    names or data: addresses, in the order of their places.
    """
    turns = either(record, "conversations", "messages") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        turns = [{}]
    said, places = [], []
    for turn in turns:
        content = either(turn, "value", "content")
        pieces, its_places, problem = [content], [], ""
        if not isinstance(content, str):
            pieces, its_places, problem = pieces_of(content)
        if not pieces and not problem:
            problem = ('not a conversation: expected {"id", "image" (if any), "conversations": [{"from": "human", '
                       '"value": ...}, {"from": "gpt", "value": ...}, ...]} or OpenAI\'s "messages", found '
                       f"{repr(turn or record)[:80]}")
        name = either(turn, "from", "role")
        role = ROLES.get(str(name), repr(name))
        if its_places and role != "user":
            problem = f"image places: a picture in the words of {role}; expected it in a question"
        if problem:
            return [], [], problem
        if said and said[-1][0] == role == "user" and "messages" in record:
            # OpenAI's own examples give the question and the picture as two messages in a row.
            before = said.pop()[1]
            pieces = [*before[:-1], f"{before[-1]}\n{pieces[0]}", *pieces[1:]]
        said.append((role, pieces))
        places += its_places
    if isinstance(record.get("system"), str) and record["system"]:
        said.insert(0, ("system", [record["system"]]))
    return said, *images_of(record, turns, places)


def either(values: dict, name: str, other: str) -> object:
    return values[name] if values.get(name) is not None else values.get(other)


def pieces_of(parts: object) -> tuple[list[str], list[str | None], str]:
    """OpenAI's parts of a content -> text in pieces, the picture between each two (None: the record's next), problem.

    They are joined by line breaks, which is how LLaVA writes a picture and a question. No pieces: these are no parts.
    """
    pieces, places = [""], []
    for i, part in enumerate(parts if isinstance(parts, list) and parts else [None]):
        kind = part.get("type") if isinstance(part, dict) else None
        pieces[-1] += "\n" if i else ""
        if kind == "text" and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        elif kind in ("image", "image_url"):
            places.append(name_in(part))
            pieces.append("")
        elif isinstance(kind, str) and kind != "text":
            return [], [], f"media not read: a part of type {kind!r}; expected text, image or image_url"
        else:
            return [], [], ""
    return pieces, places, ""


def name_in(picture: object) -> str | None:
    """The name in a picture that is a name, a part of a content, or an object of a list; None if it has none."""
    if isinstance(picture, dict):
        names = [name_in(picture[key]) for key in ("image", "image_url", "url", "path") if picture.get(key)]
        return next((name for name in names if name), None)
    return picture if isinstance(picture, str) and picture else None


def images_of(record: dict, turns: list[dict], places: list[str | None]) -> tuple[list[str], str]:
    """The names of a record's pictures, those of the parts (`places`) among them, and what is wrong with them."""
    media = [key for part in (record, *turns) for key, value in part.items() if value and MEDIA.fullmatch(key)
             and not (part is record and key in ("image", "images"))]
    given = [record[key] for key in ("image", "images") if record.get(key) not in (None, [], {})]
    lists = [[name_in(picture) for picture in (value if isinstance(value, list) else [value])] for value in given]
    names = lists[0] if lists else []
    unnamed = places.count(None)
    problem = ""
    if media:
        problem = f'media not read: the record has {media[0]!r}; expected pictures under "image" or "images"'
    elif None in names or lists[1:] not in ([], [names]):
        problem = f"image name: expected a path or a list of paths, found {' and '.join(map(repr, given))[:200]}"
    elif places and not unnamed and names in ([], places):
        names = places
    elif places and len(names) != unnamed:
        problem = f"image places: {unnamed} pictures in the messages have no name, and the record names {len(names)}"
    elif places:
        rest = iter(names)
        names = [name or next(rest) for name in places]
    return names, problem


class Conversation(NamedTuple):
    """Question, answer, question, ..., each in pieces: between any two pieces of a question there is an image."""
    turns: list[list[str]]
    images: list[str]               # their names, in that order
    notes: int                      # oddities that its author may not have intended: a bit for each of NOTES


NOTES = ("empty answer, only the end of text is learned",
         f"no {IMAGE} where a question begins or ends, the image is put in front of the first",
         f"{IMAGE} that stays text",
         "more than 100,000 characters")


def conversation_of(record: dict) -> Conversation:
    """A record in any of the forms above. ValueError says what is wrong with it.

    A greeting by gpt before the first question is dropped, as in LLaVA. The model was trained with one fixed system
    prompt, so a record's own goes in front of its first question.
    """
    said, images, problem = read_record(record)
    system = [text[0] for _, text in takewhile(lambda turn: turn[0] == "system", said)]
    said = said[len(system):]
    if said and said[0][0] == "assistant":
        said = said[1:]
    turns = [text for _, text in said]
    have_places = any(len(text) > 1 for text in turns)
    n_tags = "\n".join(chain(system, *turns)).count(IMAGE)
    for (role, _), expected in zip(said, cycle(("user", "assistant"))):
        if role != expected and not problem:
            problem = f"wrong speaker: expected user (human) and assistant (gpt) in turns, found {role} for {expected}"
    if not problem and (not said or len(said) % 2):
        problem = "no answer: the conversation " + ("ends with a question" if said else "is empty")
    problem = problem or place_images(turns, len(images), "\n".join(system))
    if problem:
        raise ValueError(problem)
    text = "\n".join(chain(*turns))
    notes = (not all(answer[0] for answer in turns[1::2]),
             len(images) == 1 and text.count(IMAGE) == n_tags and not have_places,
             IMAGE in text,
             len(text) > 100_000)
    return Conversation(turns, images, sum(1 << bit for bit, holds in enumerate(notes) if holds))


def place_images(turns: list[list[str]], n: int, system: str = "") -> str:
    """Break the questions at the places of their n images -> what is wrong, or "". `system` goes in front of the first.

    One image: LLaVA moves it to the front of the question that has its tag; without a tag, to the front of the first.
    The tag is at the beginning or end of a question, or the only one. Any other <image> is text.
    Several: they stay where their tags are, and there must be a tag for each.
    Messages of OpenAI's form have places already, and no tags.
    """
    questions = turns[::2]
    if n > 1 and not any(len(pieces) > 1 for pieces in questions):
        for pieces in questions:
            pieces[:] = pieces[0].split(IMAGE)
    found = sum(len(pieces) - 1 for pieces in questions)
    if found != n and (n, found) != (1, 0):
        return f"image places: expected as many {IMAGE} in the questions as images, found {found} for {n}"
    if n == 1:
        own, text = question_of_image(questions)
        if own == 0:
            text, system = "\n".join(words for words in (system, text) if words), ""
        questions[own][:] = ["", f"\n{text}" if text else ""]
    if system:
        questions[0][0] = f"{system}\n{questions[0][0]}"
    return ""


def question_of_image(questions: list[list[str]]) -> tuple[int, str]:
    """Which question the only image is in front of, and that question's text without the image's tag."""
    texts = ["\n".join(piece.strip() for piece in pieces if piece.strip()) for pieces in questions]
    for i, pieces in enumerate(questions):
        if len(pieces) > 1:
            return i, texts[i]
    n_tags = sum(text.count(IMAGE) for text in texts)
    for i, text in enumerate(texts):
        if text.startswith(IMAGE) or (n_tags == 1 and IMAGE in text):
            return i, text.replace(IMAGE, "", 1).strip()
        if text.endswith(IMAGE):
            return i, text.removesuffix(IMAGE).strip()
    return 0, questions[0][0]

# ---------------------------------------------------------------------------------------------------
# Bad samples

BAD_SAMPLES = "bad_samples.jsonl"   # in the run's folder, appended to by all of its processes


@dataclass
class BadSamples:
    """Those of a file's n records that have been skipped, listed in `folder`'s BAD_SAMPLES if there is a folder."""
    folder: Path | None
    checksum: str                   # of the file, which may move while a run is interrupted
    n: int
    found: set[int] = field(default_factory=set)

    def add(self, problem: dict) -> None:
        """Add a problem, unless an earlier epoch has. ValueError when there are too many."""
        if self.folder:             # other ranks list theirs there, and so did this run before it was resumed
            listed = read_bad_samples(self.folder)
            self.found |= {sample for checksum, sample in listed if checksum == self.checksum}
            if problem["sample"] not in self.found:
                append_line(self.folder / BAD_SAMPLES, {"checksum": self.checksum, **problem})
        self.found.add(problem["sample"])
        limit = max(10, self.n // 1000)
        if len(self.found) > limit:
            raise ValueError(f"{len(self.found)} bad samples, more than {limit} (0.1 % of the data, but at least 10); "
                             f"the last: {problem['problem']}")


def read_bad_samples(folder: Path) -> set[tuple[str, int]]:
    """A run's BAD_SAMPLES so far: the checksum of the data file, and the sample's number in it."""
    path = folder / BAD_SAMPLES
    lines = read_jsonl(path, torn=True) if path.exists() else []
    return {(line["checksum"], line["sample"]) for line in lines}
