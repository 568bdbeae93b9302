"""LLaVA's json, or one question, to packed tensors: picture -> uint8, conversation -> ids and labels, samples -> batch.

Follows LLaVA's train.py (templates, where the image goes) and Hugging Face's CLIPImageProcessor (pixels, bit for bit).
Labels come from character offsets in one tokenisation per round, so they cannot drift from the tokens. The image slot
and the end of text are placed by id, so the same words typed in a text stay text. A training step is a set of samples,
a pure function of (seed, step). Imports none of our files: sizes arrive as arguments.

    $ python data.py check --data data/finetune/llava_v1_5_mix665k.json --images data/finetune
"""
import argparse
import atexit
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

IGNORE = -100                       # label of a position that is not supervised
IMAGE_ID = -200                     # the one image slot in ids; after `expand`, every patch's place
IMAGE = "<image>"                   # how LLaVA's json says "here": a tag in the first question, never a token
EOT = "<|endoftext|>"               # Phi-2: the end of an answer, and the only special token
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
PAD_COLOR = (122, 116, 104)         # int(CLIP's mean * 255)
MAX_PIXELS = 89_478_485             # refused before decoding, like Pillow's own limit: 268 MB as RGB
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")             # JPEG includes the MPO files of telephones


class Sample(NamedTuple):
    id: str
    ids: list[int]                  # image slot expanded to P times IMAGE_ID
    labels: list[int]               # same length, unshifted; IGNORE where not supervised
    image: Tensor | None            # (3, S, S) uint8


class Batch(NamedTuple):            # B samples in one row of T tokens; N images of P patches; M supervised tokens
    ids: Tensor                     # (T,) int64, 0 at image positions
    lengths: Tensor                 # (B,) int64, their sum is T
    images: Tensor                  # (N, 3, S, S) uint8, N may be 0
    slots: Tensor                   # (N * P,) int64, the image positions in ids
    rows: Tensor                    # (M,) int64, positions whose next token, in the same sample, is learnt
    targets: Tensor                 # (M,) int64, those next tokens

# ---------------------------------------------------------------------------------------------------
# Picture


def load_image(source: str | Path | BinaryIO | Image.Image, size: int, mode: str) -> Tensor:
    """A picture file, or an open one, as the vision tower wants it -> (3, size, size) uint8.

    mode "crop": shortest edge to `size`, then the centre; "pad": the whole picture on a square canvas. Equal to
    CLIPImageProcessor's result before its normalisation, except that EXIF orientation is obeyed.
    ValueError names the file and says what is wrong with it.
    """
    assert mode in ("crop", "pad"), f"image mode {mode!r} is neither crop nor pad"
    image = open_image(source, size, mode)
    w, h = image.size
    if mode == "crop":
        W, H = size * w // min(w, h), size * h // min(w, h)
        left, top = (W - size) // 2, (H - size) // 2
        image = image.resize((W, H), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:
        side = max(w, h)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - w) // 2, (side - h) // 2))
        image = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_image(source: str | Path | BinaryIO | Image.Image, size: int, mode: str, decode: bool = True) -> Image.Image:
    """Upright RGB, or undecoded with a good header. Alpha is dropped, the first frame taken, as the original does."""
    name = str(source) if isinstance(source, (str, Path)) else "the given picture"
    if "://" in name:
        raise ValueError(f"image is an address: {name}; download it and give the file")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        w, h = image.size
        # A thin strip is small in the file and huge on the way: as a square, or with its shortest edge at `size`.
        pixels = max(w * h, max(w, h) ** 2 if mode == "pad" else (size * w // min(w, h)) * (size * h // min(w, h)))
        if decode and pixels <= MAX_PIXELS:
            image = upright(image).convert("RGB")
    except FileNotFoundError as e:
        raise FileNotFoundError(f"image missing: {name}") from e
    except UnidentifiedImageError:
        raise ValueError(f"image unreadable: {name}: not a {', '.join(FORMATS)} file, or cut short") from None
    except Exception as e:          # Pillow's decoders raise a dozen kinds of exception on bad bytes
        raise ValueError(f"image unreadable: {name}: {e}") from e
    if pixels > MAX_PIXELS:
        raise ValueError(f"image too large: {name} is {w} x {h} and takes {pixels:,} pixels on the way to "
                         f"{size} x {size} (mode {mode}), more than {MAX_PIXELS:,}")
    return image


def upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:               # broken EXIF around a good picture
        return image
    return ImageOps.exif_transpose(image) if turned else image

# ---------------------------------------------------------------------------------------------------
# Text


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, else from vocab.json + merges.txt + added_tokens.json; both give the same ids."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        tok = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tok = build_tokenizer(folder)
    else:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt; "
                                "get Phi-2's by: hf download microsoft/phi-2 --local-dir checkpoints/phi-2")
    # Without this, whitespace tokens report empty character spans and labels go wrong in silence.
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.encode_special_tokens = True                        # "<|endoftext|>" in a text is text
    eot_id(tok)
    return tok


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        blob = json.loads(path.read_text(encoding="utf-8"))
        # Our export adds an <image> token for transformers' sake; here "<image>" in a text is text.
        blob["added_tokens"] = [t for t in blob["added_tokens"] if t["content"] != IMAGE]
        return Tokenizer.from_str(json.dumps(blob))
    except Exception as e:          # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {e}") from e


def build_tokenizer(folder: Path) -> Tokenizer:
    try:
        tok = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as e:
        raise ValueError(f"{folder}: vocab.json and merges.txt are not a tokenizer: {e}") from e
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([EOT])
    path = folder / "added_tokens.json"
    added = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for text, i in sorted(added.items(), key=lambda item: item[1]):
        if text not in (EOT, IMAGE):
            tok.add_tokens([AddedToken(text, normalized=True, special=False)])
            if tok.token_to_id(text) != i:
                raise ValueError(f"{path} gives {text!r} the id {i}, but it comes to {tok.token_to_id(text)}: "
                                 "vocab.json is of another tokenizer")
    return tok


def eot_id(tok: Tokenizer) -> int:
    """The id that ends an answer. config.json's eos_token_id is wrong in released checkpoints: never use that."""
    if tok.token_to_id(EOT) is None:
        raise ValueError(f"the tokenizer has no {EOT} token")
    return tok.token_to_id(EOT)


def to_turns(record: dict) -> tuple[list[str], bool]:
    """A record of LLaVA's json -> question, answer, question, ..., and whether there is a picture.

    A greeting by gpt before the first question is dropped. With a picture, the tag that the first question begins or
    ends with is taken out (its place is always in front); any other <image> is text. ValueError says what is wrong.
    """
    said = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(said, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in said):
        raise ValueError('not a conversation: expected {"id", "image" (if any), "conversations": [{"from": "human", '
                         '"value": ...}, {"from": "gpt", "value": ...}, ...]}, found ' + repr(record)[:80])
    said = said[1:] if said and said[0].get("from") == "gpt" else said
    for turn, who in zip(said, ["human", "gpt"] * len(said)):
        if turn.get("from") != who:
            raise ValueError(f"wrong speaker: expected human and gpt in turns, found {turn.get('from')!r} for {who!r}")
        if not turn["value"].isascii() and any("\ud800" <= c <= "\udfff" for c in turn["value"]):
            raise ValueError(f"broken unicode: a lone surrogate in {turn['value'][:40]!r}")
    if not said or len(said) % 2:
        raise ValueError("no answer: the conversation " + ("ends with a question" if said else "is empty"))
    turns = [turn["value"] for turn in said]
    image = record.get("image") is not None
    if image:
        if not isinstance(record["image"], str) or not record["image"]:
            raise ValueError(f"image name: expected one path, found {record['image']!r}")
        first = turns[0].strip()
        turns[0] = (first.removeprefix(IMAGE) if first.startswith(IMAGE) else first.removesuffix(IMAGE)).strip()
    return turns, image


@lru_cache(maxsize=4)
def encode_once(text: str, tok: Tokenizer) -> tuple[int, ...]:
    return tuple(tok.encode(text, add_special_tokens=False).ids)


def encode_turns(turns: list[str], tok: Tokenizer, image: bool) -> tuple[list[int], list[int]]:
    """LLaVA-Phi's chat template "v0". An odd number of turns leaves the last question open for the model to answer."""
    eot, ids, text = eot_id(tok), [], SYSTEM + " USER: "
    if image:
        ids, text = [*encode_once(text, tok), IMAGE_ID], "\n" if turns[0] else ""
    labels = [IGNORE] * len(ids)
    for i in range(0, len(turns), 2):
        text += turns[i] + " ASSISTANT:"
        answer = " " + turns[i + 1] if i + 1 < len(turns) and turns[i + 1] else ""
        # In one piece, because the space before the answer is part of the answer's first token.
        e = tok.encode(text + answer, add_special_tokens=False)
        n = e.char_to_token(len(text)) if answer else len(e.ids)
        ids += e.ids
        labels += [IGNORE] * n + e.ids[n:]
        if i + 1 < len(turns):
            ids.append(eot)
            labels.append(eot)
        text = "USER: "
    return ids, labels


def encode(record: dict, tok: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    """One record -> ids with at most one IMAGE_ID, and labels, uncut: the original's with its off-by-one corrected.

    template "v0": every answer token and the end of text after it is supervised. "plain": picture, caption, newline.
    """
    assert template in ("plain", "v0"), f"template {template!r} is neither plain nor v0"
    turns, image = to_turns(record)
    if template == "v0":
        return encode_turns(turns, tok, image)
    if not image or len(turns) != 2:
        raise ValueError("not a caption: pretraining wants an image, one question and its answer, found "
                         f"{len(turns)} turns {'with' if image else 'without'} an image")
    ids = tok.encode(turns[1] + "\n", add_special_tokens=False).ids
    return [IMAGE_ID] + ids, [IGNORE] + ids


def encode_prompt(turns: list[str], tok: Tokenizer, image: bool) -> list[int]:
    """Question, answer, ..., question -> the ids before the answer: exactly the beginning of what training sees."""
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt ends with a question: expected an odd number of turns, found {len(turns)}")
    return encode_turns(turns, tok, image)[0]


def expand(ids: list[int], labels: list[int] | None, n_patches: int,
           block_size: int) -> tuple[list[int], list[int] | None]:
    """The image slot becomes n_patches times IMAGE_ID; then what is above block_size is cut on the right.

    ValueError where that would cut an image, or a prompt (labels is None), which would lose its question.
    """
    if IMAGE_ID in ids:
        at = ids.index(IMAGE_ID)
        if at + n_patches > block_size:
            raise ValueError(f"image does not fit: it ends at position {at + n_patches} of {block_size}")
        ids = ids[:at] + [IMAGE_ID] * n_patches + ids[at + 1:]
        labels = labels and labels[:at] + [IGNORE] * n_patches + labels[at + 1:]
    if labels is None and len(ids) > block_size:
        raise ValueError(f"prompt too long: {len(ids)} positions, the model has {block_size}")
    return ids[:block_size], labels and labels[:block_size]


def collate(samples: list[Sample], image_size: int = 336) -> Batch:
    """One row, no padding. image_size only gives `images` its shape when there are none."""
    ids = np.array([i for s in samples for i in s.ids], dtype=np.int64)
    labels = np.array([label for s in samples for label in s.labels], dtype=np.int64)
    lengths = np.array([len(s.ids) for s in samples], dtype=np.int64)
    labels[np.cumsum(lengths) - lengths] = IGNORE           # nothing in the same sample comes before its first token
    slots, rows = np.flatnonzero(ids == IMAGE_ID), np.flatnonzero(labels[1:] != IGNORE)
    ids[slots] = 0
    images = [s.image for s in samples if s.image is not None]
    assert len(slots) % len(images) == 0 if images else len(slots) == 0, f"{len(slots)} slots for {len(images)} images"
    return Batch(torch.from_numpy(ids), torch.from_numpy(lengths),
                 torch.stack(images) if images else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8),
                 torch.from_numpy(slots), torch.from_numpy(rows), torch.from_numpy(labels[rows + 1]))

# ---------------------------------------------------------------------------------------------------
# Records on disk. The json is never held in memory: byte ranges are, and a record is read when it is needed.

BLOCK = 1 << 24                     # bytes looked at in one go
CHUNK = 256                         # records given to a worker process in one go


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value in json")


PARSER = json.JSONDecoder(parse_constant=refuse_constant)


def parse(record: bytes) -> dict:
    try:
        return PARSER.decode(record.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not json: {e}") from e


def find_records(path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of the records of a json list, or of the lines of a jsonl file."""
    with open(path, "rb") as f:
        head = f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"["):
            yield from find_in_list(path, f)
        elif head.startswith(b"{"):
            at = f.seek(0)
            for line in f:
                if not line.isspace():
                    yield at, at + len(line)
                at += len(line)
        else:
            raise ValueError(f"{path} is not LLaVA's json: expected a list of records, found {head[:20]!r}")


def find_in_list(path: Path, f: BinaryIO) -> Iterator[tuple[int, int]]:
    """latin-1 makes one character of every byte, so the parser's positions are byte positions; bytes above 127 only
    occur inside strings, where it looks for nothing but quotes and backslashes."""
    space = re.compile(r"[ \t\r\n]*")
    f.seek(0)
    at, width, first = f.read(BLOCK).index(b"[") + 1, BLOCK, True
    while True:
        f.seek(at)
        text, i = f.read(width).decode("latin-1"), 0
        try:
            while True:
                i = space.match(text, i).end()
                if first and text[i] == "]":
                    return
                end = PARSER.raw_decode(text, i)[1]
                after = space.match(text, end).end()
                if text[after] not in ",]":
                    raise ValueError("expected , or ] after this record")
                yield at + i, at + end
                if text[after] == "]":
                    return
                i, first = after + 1, False
        except (ValueError, IndexError, RecursionError) as e:
            if len(text) < width or width > 16 * BLOCK:     # else it may merely be the end of what was looked at
                raise ValueError(f"not json: {path}, line {lines_of(path, [at + i])[0]}: {e}; "
                                 "the record that begins there is broken, and what follows cannot be found") from e
            at, width = at + i, BLOCK if i else 2 * width


def lines_of(path: Path, positions: list[int]) -> list[int]:
    """Line numbers, from 1, of ascending byte positions."""
    lines, line, at = [], 1, 0
    with open(path, "rb") as f:
        for position in positions:
            while at < position and (block := f.read(min(BLOCK, position - at))):
                line, at = line + block.count(b"\n"), at + len(block)
            lines.append(line)
    return lines


def image_path(folder: Path, name: str, follow_links: bool) -> Path:
    """The file that a record names, which must lie inside the image folder."""
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"image is an address: {name[:80]}; download it and give the file")
    if "\0" in name or "\\" in name or re.match("[A-Za-z]:", name) or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"image outside the folder: {name!r}; expected a path relative to the image folder")
    path = folder / name
    if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image outside the folder: {name!r} is a link to {path.resolve()}; --follow-links allows it")
    return path


class Finding(NamedTuple):          # what a look at one record tells
    length: int = 1                 # positions: image expanded, cut to block_size
    supervised: int = 0             # tokens
    image: bool = False
    cut: int = 0                    # positions lost to block_size
    problem: str = ""               # "kind: detail"; such a record counts as one position that nobody learns
    notes: tuple[str, ...] = ()     # not wrong, but worth knowing
    id: int = 0                     # hashed, to find duplicates
    source: str = ""                # the folder its image is in


class Index(NamedTuple):            # of all records, as arrays
    ranges: np.ndarray              # (n, 2) int64, bytes of the file
    length: np.ndarray              # (n,) int32, and so on as in Finding
    supervised: np.ndarray
    image: np.ndarray
    cut: np.ndarray


class Dataset:
    """LLaVA's json or jsonl. `index` is made when first asked for: a minute or more for 665 thousand records, once.

    on_bad_sample: "stop" raises at the first; "skip" puts a sample in its place that supervises nothing.
    cache_dir: where the index and the list of bad samples are written; None: nowhere.
    """

    def __init__(self, json_path: Path, image_dir: Path, tok: Tokenizer, template: str, image_size: int,
                 image_mode: str, n_patches: int, block_size: int, on_bad_sample: str = "stop",
                 cache_dir: Path | None = None, follow_links: bool = False):
        assert on_bad_sample in ("stop", "skip"), f"on_bad_sample {on_bad_sample!r} is neither stop nor skip"
        self.path, self.image_dir, self.cache_dir = Path(json_path), Path(image_dir), cache_dir and Path(cache_dir)
        self.tok, self.template, self.n_patches, self.block_size = tok, template, n_patches, block_size
        self.image_size, self.image_mode, self.follow_links = image_size, image_mode, follow_links
        self.on_bad_sample = on_bad_sample
        if not self.path.is_file():
            raise FileNotFoundError(f"no data at {self.path}: expected LLaVA's json, a list of records")
        first = next(find_records(self.path), None)
        if first is None or b'"conversations"' not in self.read(first):
            found = f"found {self.read(first)[:80]!r}" if first else "it has no records"
            raise ValueError(f"{self.path} is not LLaVA's json: expected records with \"conversations\", {found}")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tok.encode_special_tokens = True               # which pickling a tokenizer forgets

    def __len__(self) -> int:
        return len(self.index.length)

    @cached_property
    def checksum(self) -> str:
        with open(self.path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    @cached_property
    def index(self) -> Index:
        """From cache_dir if it is there for this json, tokenizer and template; else made and kept there."""
        if self.cache_dir is None:
            return self.make_index()
        key = [self.checksum, self.tok.to_str(), self.template, self.n_patches, self.block_size, self.on_bad_sample]
        path = self.cache_dir / f"index_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with open(self.cache_dir / "index.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                # one process makes it, the others wait and read
            if not path.exists():
                part = path.with_suffix(".part.npz")
                np.savez(part, **self.make_index()._asdict())
                os.replace(part, path)
        with np.load(path) as arrays:
            return Index(**arrays)

    def find(self) -> np.ndarray:
        return np.fromiter(find_records(self.path), dtype=np.dtype((np.int64, 2)))

    def make_index(self) -> Index:
        ranges = self.find()
        numbers = np.zeros((4, len(ranges)), dtype=np.int32)
        for i, found in enumerate(self.look_at_all(ranges, "", os.cpu_count() if len(ranges) > 2000 else 0)):
            if found.problem and self.on_bad_sample == "stop":
                raise self.complaint(ranges[i].tolist(), found.problem)
            numbers[:, i] = found[:4]
        return Index(ranges, *numbers)

    def look_at_all(self, ranges: np.ndarray, decode: str, workers: int) -> Iterator[Finding]:
        chunks = [ranges[i:i + CHUNK] for i in range(0, len(ranges), CHUNK)]
        found = chain.from_iterable(parallel(partial(self.look_at, decode), chunks, workers))
        return iter(tqdm(found, self.path.name, len(ranges), unit=" records", disable=None, leave=False))

    def look_at(self, decode: str, ranges: np.ndarray) -> list[Finding]:
        return [self.look(span, decode) for span in ranges.tolist()]

    def look(self, span: tuple[int, int], decode: str) -> Finding:
        """What `sample` would meet. decode: "full" opens the picture, "header" asks for its size only, "" leaves it."""
        try:
            record = parse(self.read(span))
            ids, labels = encode(record, self.tok, self.template)
            image, full = IMAGE_ID in ids, len(ids) + (IMAGE_ID in ids) * (self.n_patches - 1)
            ids, labels = expand(ids, labels, self.n_patches, self.block_size)
            if image and decode:
                path = image_path(self.image_dir, record["image"], self.follow_links)
                open_image(path, self.image_size, self.image_mode, decode == "full")
            name = hashlib.blake2b(json.dumps(record.get("id", span)).encode(), digest_size=7)
            return Finding(len(ids), len(labels) - labels.count(IGNORE), image, full - len(ids), "", notes_on(record),
                           int.from_bytes(name.digest()), str(Path(record["image"]).parent) if image else "")
        except (ValueError, OSError) as e:
            return Finding(problem=str(e))

    def read(self, span: tuple[int, int]) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(span[0])
            return f.read(span[1] - span[0])

    def name(self, span: tuple[int, int]) -> str:
        """The record's id, also where the record cannot be parsed."""
        found = re.search(rb'"id"\s*:\s*("[^"]*"|-?\d+)', self.read(span))
        return found[1].decode("utf-8", "replace").strip('"') if found else "(none)"

    def complaint(self, span: tuple[int, int], problem: object) -> ValueError:
        line = lines_of(self.path, [span[0]])[0]
        return ValueError(f"sample {self.name(span)}, line {line} of {self.path}: {problem}; "
                          f"to see every bad sample: python data.py check --data {self.path} --images {self.image_dir}")

    def sample(self, i: int) -> Sample:
        """ValueError names the record's id and line, what is wrong, and the command that finds all like it."""
        span = self.index.ranges[i].tolist()
        try:
            record = parse(self.read(span))
            ids, labels = expand(*encode(record, self.tok, self.template), self.n_patches, self.block_size)
            path = image_path(self.image_dir, record["image"], self.follow_links) if IMAGE_ID in ids else None
            image = load_image(path, self.image_size, self.image_mode) if path else None
            return Sample(str(record.get("id", i)), ids, labels, image)
        except (ValueError, OSError) as e:
            raise self.complaint(span, e) from e

    def summary(self) -> str:
        """One line for the log; what is cut, and what then teaches nothing, is not passed over in silence."""
        _, length, supervised, image, cut = self.index
        return (f"{len(self):,} samples, {image.sum():,} with an image, {length.mean():.0f} positions each; "
                f"{(cut > 0).sum():,} cut at {self.block_size}, {(supervised == 0).sum():,} without anything to learn")

# ---------------------------------------------------------------------------------------------------
# The plan: which samples make a step, and who computes them


def steps_per_epoch(n: int, global_batch: int) -> int:
    return -(-n // global_batch)                            # the last step of an epoch may be smaller


def modality_order(lengths: np.ndarray, world: int, batch: int, shuffle: torch.Generator | None,
                   shuffle_steps: torch.Generator) -> list[int]:
    """LLaVA-Phi's group_by_modality_length: runs of world * batch samples that are all pictures or all text.

    lengths are negative for text-only samples. Each run is dealt to the processes by length, the longest first, to the
    one with the least so far. The last runs of each kind are mixed.
    """
    full, left, size = [], [], np.abs(lengths)
    for kind in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        mixed = kind[torch.randperm(len(kind), generator=shuffle).numpy()]
        runs = [deal(mixed[i:i + world * batch], size, world) for i in range(0, len(mixed), world * batch)]
        full += runs[:-1]
        left += runs[-1] if runs else []
    full = [full[i] for i in torch.randperm(len(full), generator=shuffle_steps).tolist()]
    if len(left) >= world * batch:
        full.insert(0, left[:world * batch])
        left = left[world * batch:]
    return [i for run in full for i in run] + left


def deal(run: np.ndarray, lengths: np.ndarray, world: int) -> list[int]:
    run = run[np.argsort(-lengths[run], kind="stable")].tolist()
    if world == 1 or len(run) % world:
        return [i for rank in range(world) for i in run[rank::world]]
    hands, sums = [[] for _ in range(world)], [0] * world
    for i in run:
        rank = min((r for r in range(world) if len(hands[r]) < len(run) // world), key=lambda r: sums[r])
        hands[rank].append(i)
        sums[rank] += int(lengths[i])
    return [i for hand in hands for i in hand]


def epoch_order(seed: int, index: Index, global_batch: int, group: str, epoch: int) -> np.ndarray:
    """Every sample once. group "modality_length": the samples of a step are all with a picture, or all without."""
    assert group in ("none", "modality_length"), f"group {group!r} is neither none nor modality_length"
    seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    if group == "none":
        return np.random.default_rng(seed).permutation(len(index.length))
    generator = torch.Generator().manual_seed(seed)
    lengths = np.where(index.image, index.length, -index.length)
    return np.array(modality_order(lengths, 1, global_batch, generator, generator))


def step_samples(step: int, n: int, global_batch: int, order: Callable[[int], np.ndarray]) -> list[int]:
    """The samples of a global step, whatever the processes and the micro-batches. order: epoch -> its ids."""
    epoch, k = divmod(step, steps_per_epoch(n, global_batch))
    return order(epoch)[k * global_batch:(k + 1) * global_batch].tolist()


def cost(length: int, image: int) -> float:
    """Of training on a sample, in TFLOP: Phi-2's linear layers, its attention, the vision tower."""
    return 0.0151 * length + 0.5e-6 * length ** 2 + 1.1 * image


def split(lengths: list[int], images: list[int], world: int, budget: int) -> list[list[list[int]]]:
    """Deal samples out -> [rank][micro-batch] -> positions in `lengths`, as many micro-batches on every rank.

    As few micro-batches as fit the budget of tokens, then the most expensive sample first, each to the cheapest
    micro-batch that has room. Which samples share a micro-batch depends on `world` only where their number has to be
    rounded up. A sample above the budget is alone. Only with fewer samples than ranks is a micro-batch empty.
    """
    costs = [cost(length, image) for length, image in zip(lengths, images)]
    order = sorted(range(len(lengths)), key=lambda i: -costs[i])
    n = world * max(1, math.ceil(sum(min(length, budget) for length in lengths) / budget / world))
    while (bins := fill(order, lengths, costs, n, budget)) is None:
        n += world
    bins.sort(key=lambda b: -sum(costs[i] for i in b))      # ranks wait for each other: equally dear ones together
    return [bins[rank::world] for rank in range(world)]


def fill(order: list[int], lengths: list[int], costs: list[float], n: int, budget: int) -> list[list[int]] | None:
    bins, tokens, sums = [[] for _ in range(n)], [0] * n, [0.0] * n
    for i in order:
        room = [b for b in range(n) if not bins[b] or tokens[b] + lengths[i] <= budget]
        if not room:
            return None
        b = min(room, key=lambda b: sums[b])
        bins[b].append(i)
        tokens[b] += lengths[i]
        sums[b] += costs[i]
    return [sorted(b) for b in bins]

# ---------------------------------------------------------------------------------------------------
# Loader


class Call:                         # the least that a DataLoader accepts
    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def ignore_signals(worker: int) -> None:
    """torchrun signals a whole process group; if workers died of it, the trainer could not save its last checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """After an error or Ctrl-C Python would end them with SIGTERM, which they ignore, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def parallel(function: Callable, items: Iterable, workers: int, pin: bool = False) -> Iterator:
    """function(item) for every item, in order, in worker processes of one thread, at most one per core; 0: here."""
    workers = min(workers, os.cpu_count())
    return iter(DataLoader(Call(function), batch_size=None, sampler=items, num_workers=workers, pin_memory=pin,
                           prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals, collate_fn=as_it_is,
                           generator=torch.Generator()))    # its own: the global one belongs to the training


def as_it_is(x):
    return x


class Step(NamedTuple):
    step: int
    sample_ids: list[int]           # of all ranks: record numbers, from 0
    batches: list[Batch]            # this rank's micro-batches


class Loader:
    """The steps start_step, ..., steps - 1 of one rank. Pure in (seed, step): to resume is to start later."""

    def __init__(self, dataset: Dataset, *, global_batch: int, micro_tokens: int, rank: int, world: int, seed: int,
                 steps: int, start_step: int = 0, workers: int = 0, group: str = "none", pin: bool = False):
        self.dataset, self.global_batch, self.micro_tokens, self.group = dataset, global_batch, micro_tokens, group
        self.rank, self.world, self.seed, self.steps, self.start_step = rank, world, seed, steps, start_step
        self.workers, self.pin = workers, pin
        self.bad: set[int] = set()

    def __iter__(self) -> Iterator[Step]:
        planned = deque()                                   # steps whose micro-batches are under way
        results = parallel(self.make, self.plan(planned), self.workers, self.pin)
        for first in results:
            step, ids, n = planned.popleft()
            made = [first, *islice(results, n - 1)]
            self.note([b for _, bad in made for b in bad])
            yield Step(step, ids, [batch for batch, _ in made])

    def plan(self, planned: deque) -> Iterator[list[int]]:
        """Sample ids of one micro-batch after another, a few steps ahead of the training."""
        index, n = self.dataset.index, len(self.dataset)
        order = lru_cache(maxsize=1)(partial(epoch_order, self.seed, index, self.global_batch, self.group))
        for step in range(self.start_step, self.steps):
            ids = step_samples(step, n, self.global_batch, order)
            ranks = split(index.length[ids].tolist(), index.image[ids].tolist(), self.world, self.micro_tokens)
            mine = ranks[self.rank]
            planned.append((step, ids, len(mine)))
            yield from ([ids[i] for i in micro] for micro in mine)

    def make(self, ids: list[int]) -> tuple[Batch | None, list[dict]]:
        """In a worker. Problems travel as values, so that they reach the main process with their sample's name."""
        nothing = Sample("", [eot_id(self.dataset.tok)], [IGNORE], None)        # in place of a bad sample
        samples, bad = [], []
        for i in ids:
            try:
                samples.append(self.dataset.sample(i))
            except ValueError as e:
                samples.append(nothing)
                bad.append({"sample": i, "data": str(self.dataset.path), "problem": str(e)})
                if self.dataset.on_bad_sample == "stop":
                    return None, bad
        return collate(samples or [nothing], self.dataset.image_size), bad

    def note(self, bad: list[dict]) -> None:
        """Stop, or list them in bad_samples.jsonl, which all ranks share, and give up when it has too many."""
        if not bad:
            return
        if self.dataset.on_bad_sample == "stop":
            raise ValueError(bad[0]["problem"])
        if self.dataset.cache_dir:
            path = self.dataset.cache_dir / "bad_samples.jsonl"
            with open(path, "ab", buffering=0) as f:        # one write: lines of several processes do not mix
                f.write("".join(json.dumps(b) + "\n" for b in bad).encode())
            bad = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.bad |= {b["sample"] for b in bad if b["data"] == str(self.dataset.path)}
        limit = max(10, len(self.dataset) // 1000)
        if len(self.bad) > limit:
            raise ValueError(f"{len(self.bad)} bad samples, more than {limit} (0.1 % of the data, but at least 10); "
                             f"the last: {bad[-1]['problem']}")

# ---------------------------------------------------------------------------------------------------
# python data.py check

STAGES = {"pretrain": ("plain", "crop", 256), "finetune": ("v0", "pad", 128)}       # template, image mode, global batch


def check(args: argparse.Namespace) -> int:
    """-> exit code: 0 all is well, 1 something is wrong."""
    template, mode, global_batch = STAGES[args.stage]
    if not args.images.is_dir():
        raise FileNotFoundError(f"no image folder at {args.images} (--images)")
    if args.write_clean and args.write_clean.resolve() == args.data.resolve():
        raise ValueError(f"--write-clean {args.write_clean} would overwrite the data it is made from")
    measured = args.tokenizer.exists()
    tok, block_size = (load_tokenizer(args.tokenizer), args.max_length) if measured else (bytes_as_tokens(), 1 << 30)
    try:
        dataset = Dataset(args.data, args.images, tok, template, args.image_size, mode, args.n_patches, block_size,
                          follow_links=args.follow_links)
        ranges = dataset.find()
    except ValueError as e:         # the file itself is what is wrong
        print(e)
        return 1
    numbers, ids = np.zeros((len(ranges), 4), dtype=np.int64), np.zeros(len(ranges), dtype=np.int64)
    problems, kinds, notes, sources = {}, defaultdict(list), defaultdict(list), Counter()
    for i, found in enumerate(dataset.look_at_all(ranges, args.decode, args.workers)):
        numbers[i], ids[i] = found[:4], found.id
        if found.problem or not found.supervised:
            problems[i] = found.problem or f"nothing to learn: no answer in the first {block_size} positions"
            kinds["bad: " + problems[i].split(":")[0]].append(i)
        else:
            sources[found.source] += found.image
        for note in found.notes + ("answer cut at the end",) * (found.cut > 0):
            notes["worth knowing: " + note].append(i)
    good = np.delete(numbers, list(problems), axis=0)
    print(f"{args.data}: {len(ranges):,} records: {good[:, 2].sum():,} with an image, "
          f"{(good[:, 2] == 0).sum():,} of text only, {len(problems):,} bad")
    for kind, where in sorted(kinds.items()) + sorted(notes.items()):
        print(f"\n{kind}: {len(where):,}")
        for i, line in zip(where[:args.show], lines_of(args.data, ranges[where[:args.show], 0].tolist())):
            print(f"    line {line}, id {dataset.name(ranges[i])}", problems.get(i, "")[:200])
    repeated = len(ids) - len(problems) - len(np.unique(np.delete(ids, list(problems))))
    print(f"\nids that were used before: {repeated:,}")
    print("image folders: " + ", ".join(f"{source} {n:,}" for source, n in sources.most_common(20) if n))
    if measured and len(good):
        print_lengths(good[:, 0], good[:, 1].sum())
        print(f"{args.stage}: {steps_per_epoch(len(good), global_batch):,} steps of {global_batch} samples an epoch")
    elif len(good):
        print(f"no lengths: there is no tokenizer at {args.tokenizer} (--tokenizer)")
    if args.write_clean:
        write_clean(args.write_clean, dataset, ranges, problems)
    return 1 if problems else 0


def notes_on(record: dict) -> tuple[str, ...]:
    said = [turn["value"] for turn in record["conversations"]]
    first = next(turn["value"] for turn in record["conversations"] if turn["from"] == "human").strip()
    turns, image = to_turns(record)
    placed = image and (first.startswith(IMAGE) or first.endswith(IMAGE))
    notes = {"empty answer, only the end of text is learnt": not all(turns[1::2]),
             "no <image> where the first question begins or ends, the image is put in front": image and not placed,
             "<image> that stays text": sum(text.count(IMAGE) for text in said) > placed,
             "more than 100,000 characters": sum(map(len, said)) > 100_000}
    return tuple(note for note, true in notes.items() if true)


def bytes_as_tokens() -> Tokenizer:
    """For want of a real one: everything but lengths can be checked."""
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), EOT]
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok


def print_lengths(length: np.ndarray, supervised: int) -> None:
    print(f"positions: {length.sum():,}, {length.mean():.0f} a sample; "
          + ", ".join(f"{q} % have up to {np.percentile(length, q):.0f}" for q in (50, 90, 99, 100)))
    counts, edges = np.histogram(length, bins=8 if length.min() < length.max() else 1)
    for count, low, high in zip(counts, edges, edges[1:]):
        print(f"    {low:6.0f} to {high:6.0f} {count:9,} {'#' * round(40 * count / counts.max())}")
    print(f"supervised: {supervised:,} tokens, {100 * supervised / length.sum():.1f} % of all positions")


def write_clean(path: Path, dataset: Dataset, ranges: np.ndarray, problems: dict[int, str]) -> None:
    """The good records, byte for byte, as a json list; beside it the bad ones with what is wrong with them."""
    rejects = path.with_suffix(".rejects.jsonl")
    part, first = path.with_name(path.name + ".part"), True
    with open(part, "wb") as clean, open(rejects, "w", encoding="utf-8") as bad:
        clean.write(b"[")
        for i, span in enumerate(ranges.tolist()):
            if i in problems:
                record = dataset.read(span).decode("utf-8", "replace")
                bad.write(json.dumps({"problem": problems[i], "record": record}) + "\n")
            else:
                clean.write((b"\n" if first else b",\n") + dataset.read(span).strip())
                first = False
        clean.write(b"\n]\n")
    os.replace(part, path)
    print(f"wrote {path} ({len(ranges) - len(problems):,} records) and {rejects} ({len(problems):,})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser(
        "check", help="find every bad sample before training", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = command.add_argument
    flag("--data", type=Path, required=True, help="LLaVA's json, or one record a line")
    flag("--images", type=Path, required=True, help="the folder that the records' image paths start from")
    flag("--stage", choices=list(STAGES), default="finetune", help="which stage the data is for")
    flag("--tokenizer", type=Path, default=Path("checkpoints/phi-2"), help="its folder; without it, no lengths")
    flag("--decode", choices=["header", "full"], default="full", help="full also finds truncated pictures")
    flag("--workers", type=int, default=os.cpu_count(), help="processes")
    flag("--max-length", type=int, default=2048, help="positions a sample may have, image expanded")
    flag("--n-patches", type=int, default=576, help="positions of an image")
    flag("--image-size", type=int, default=336, help="pixels of its side")
    flag("--follow-links", action=argparse.BooleanOptionalAction, default=False, help="allow links out of --images")
    flag("--show", type=int, default=20, help="how many samples to name of each kind")
    flag("--write-clean", type=Path, help="write the good records here, and the bad ones beside it")

    def fail(message: str) -> None:                         # without the usage
        raise ValueError(message)

    parser.error = command.error = fail
    return check(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
