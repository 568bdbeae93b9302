"""From LLaVA's json, or one question, to packed tensors.

    picture      -> uint8 pixels of the size that the vision tower wants            load_image
    conversation -> token ids, and for each the label that training is to learn     encode
    samples      -> one row of tokens without padding                               collate
    (seed, step) -> which samples a training step consists of, and who computes it  step_samples, split_step, Loader

The first two follow LLaVA's train.py (the chat template, where the image goes) and Hugging Face's CLIPImageProcessor
and SiglipImageProcessor (the pixels, bit for bit). This file knows nothing of models: sizes arrive as arguments.

    $ python data.py check --data data/finetune/llava_v1_5_mix665k.json --images data/finetune
    $ python data.py check --data my.json --images my_pictures --model checkpoints/mipha-3b
"""
from __future__ import annotations

import atexit
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
from argparse import BooleanOptionalAction, Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

from lib.common import Parser, read_jsonl, replacing, run_command
from lib.recipes import RECIPES

# torch takes seconds to import: the functions that need it do so, and `python data.py --help` answers at once.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100                       # label of a position that is not supervised
BAD_SAMPLES = "bad_samples.jsonl"   # in the folder of a training run: those that it went on without
IMAGE_ID = -200                     # the one image slot in ids; after `expand`, every patch's place
IMAGE = "<image>"                   # how LLaVA's json says "here": a tag in the first question, never a token
EOT = "<|endoftext|>"               # Phi-2: the end of an answer, and the only special token
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


class Sample(NamedTuple):
    """One record, ready to be packed."""
    id: str
    ids: list[int]                  # image slot expanded to P times IMAGE_ID
    labels: list[int]               # as long as ids, unshifted: the label of a position is its own id, or IGNORE
    image: Tensor | None            # (3, S, S) uint8


class Batch(NamedTuple):
    """B samples one behind the other in a single row of T tokens; N images of P patches; M supervised tokens."""
    ids: Tensor                     # (T,) int64, 0 at image positions
    lengths: Tensor                 # (B,) int64, their sum is T
    images: Tensor                  # (N, 3, S, S) uint8, N may be 0
    slots: Tensor                   # (N * P,) int64, the image positions in ids
    rows: Tensor                    # (M,) int64, positions whose next token, in the same sample, is learnt
    targets: Tensor                 # (M,) int64, those next tokens

# ---------------------------------------------------------------------------------------------------
# Picture

IMAGE_MODES = ("crop", "pad", "squash")
PAD_COLOR = (122, 116, 104)         # int(255 * CLIP's mean), what LLaVA pads with
MAX_PIXELS = 89_478_485             # refused before decoding, like Pillow's own limit: 268 MB as RGB
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")             # JPEG includes the MPO files of telephones
warnings.filterwarnings("ignore", module="PIL")             # odd EXIF data and the like: a picture opens or it does not


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The padding colour of a tower with this mean. Normalised, it is near zero: the tower sees no edge to speak of.

    LLaVA cuts the fraction off instead of rounding, so (122, 116, 104) for CLIP and (127, 127, 127) for SigLIP.
    """
    red, green, blue = mean
    return int(255 * red), int(255 * green), int(255 * blue)


def load_image(source: str | Path | BinaryIO | Image.Image, size: int, mode: str,
               pad_color: tuple[int, int, int] = PAD_COLOR) -> Tensor:
    """A picture, from a file or open already, as the vision tower wants it -> (3, size, size) uint8.

    mode "crop": the shortest edge becomes `size`, then the centre is cut out (CLIP's processor; LLaVA-Phi's stage 1).
    mode "pad": the whole picture in the middle of a square of pad_color (LLaVA's stage 2 and inference).
    mode "squash": both edges become `size`, whatever that does to the proportions (SigLIP's processor).

    The pixels equal those of Hugging Face's processors before they normalise, which here is the tower's work, except
    that a photo lying on its side is put upright. ValueError names the file and says what is wrong with it.
    """
    import torch

    assert mode in IMAGE_MODES, f"image mode {mode!r} is none of {', '.join(IMAGE_MODES)}"
    image = open_image(source, size, mode)
    w, h = image.size
    if mode == "crop":
        W = size * w // min(w, h)
        H = size * h // min(w, h)
        left = (W - size) // 2
        top = (H - size) // 2
        image = image.resize((W, H), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    else:
        if mode == "pad":
            side = max(w, h)
            square = Image.new("RGB", (side, side), pad_color)
            square.paste(image, ((side - w) // 2, (side - h) // 2))
            image = square
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))              # (S, S, 3)
    return pixels.permute(2, 0, 1).contiguous()             # (3, S, S)


def open_image(source: str | Path | BinaryIO | Image.Image, size: int, mode: str, decode: bool = True) -> Image.Image:
    """Upright RGB. Alpha is dropped and the first frame of several is taken, as the original does.

    Pictures come from strangers: nothing is decoded before its size is known to be bearable. With decode=False
    nothing is decoded at all, which tells quickly whether the header is good.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the given picture"
    if "://" in name:
        raise ValueError(f"image is an address: {name}; download it and give the file")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        w, h = image.size
        pixels = largest_pixels(w, h, size, mode)
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


def largest_pixels(w: int, h: int, size: int, mode: str) -> int:
    """Pixels of the largest picture on the way to size x size.

    A strip of a million pixels by one is small in the file, but padded to a square, or with its shortest edge at
    `size`, it would fill any memory.
    """
    if mode == "pad":
        return max(w, h) ** 2
    if mode == "squash":
        return w * h
    resized = (size * w // min(w, h)) * (size * h // min(w, h))
    return max(w * h, resized)


def upright(image: Image.Image) -> Image.Image:
    """Turn a photo as its EXIF data asks. Phones store most photos lying on their side; annotators saw them upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:               # broken EXIF data around a good picture
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)

# ---------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, else from vocab.json, merges.txt and added_tokens.json; both give the same ids.

    The image slot and the end of a text are placed by id, never by spelling: "<image>" or "<|endoftext|>" that
    somebody typed into a text stays text, and cannot move a picture or end an answer.
    Raises FileNotFoundError, or ValueError with the file that is no tokenizer.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        tok = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tok = build_tokenizer(folder)
    else:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt; "
                                "get Phi-2's by: hf download microsoft/phi-2 --local-dir checkpoints/phi-2")
    # encode_turns asks which token a character lies in. By default, tokens of white space report empty spans, and the
    # labels would be wrong without any error.
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.encode_special_tokens = True                        # special words in a text are text
    eot_id(tok)                                             # raises if there is none
    return tok


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, without the <image> token that our export adds for transformers' sake."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE]
        return Tokenizer.from_str(json.dumps(content))
    except Exception as e:          # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {e}") from e


def build_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's kind of tokenizer from its older files; the released LLaVA-Phi and Mipha have only these."""
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
        if text in (EOT, IMAGE):
            continue
        tok.add_tokens([AddedToken(text, normalized=True, special=False)])      # takes the next free id
        if tok.token_to_id(text) != i:
            raise ValueError(f"{path} gives {text!r} the id {i}, but it comes to {tok.token_to_id(text)}: "
                             "vocab.json is of another tokenizer")
    return tok


def eot_id(tok: Tokenizer) -> int:
    """The id that ends an answer. config.json's eos_token_id is wrong in released checkpoints: never use that."""
    i = tok.token_to_id(EOT)
    if i is None:
        raise ValueError(f"the tokenizer has no {EOT} token")
    return i

# ---------------------------------------------------------------------------------------------------
# Conversation -> ids and labels


def to_turns(record: dict) -> tuple[list[str], bool]:
    """A record of LLaVA's json -> question, answer, question, ..., and whether there is a picture.

    A greeting by gpt before the first question is dropped, as in the original. With a picture, the tag that the first
    question begins or ends with is taken out, for the picture's place is always in front; any other <image> is text.
    ValueError says what is wrong.
    """
    said = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(said, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in said):
        raise ValueError('not a conversation: expected {"id", "image" (if any), "conversations": [{"from": "human", '
                         '"value": ...}, {"from": "gpt", "value": ...}, ...]}, found ' + repr(record)[:80])
    if said and said[0].get("from") == "gpt":
        said = said[1:]
    for i, turn in enumerate(said):
        speaker = "gpt" if i % 2 else "human"
        if turn.get("from") != speaker:
            raise ValueError(f"wrong speaker: expected human and gpt in turns, found {turn.get('from')!r} "
                             f"for {speaker!r}")
        if not turn["value"].isascii() and any("\ud800" <= c <= "\udfff" for c in turn["value"]):
            raise ValueError(f"broken unicode: a lone surrogate in {turn['value'][:40]!r}")
    if not said or len(said) % 2:
        raise ValueError("no answer: the conversation " + ("ends with a question" if said else "is empty"))

    turns = [turn["value"] for turn in said]
    if record.get("image") is None:
        return turns, False
    if not isinstance(record["image"], str) or not record["image"]:
        raise ValueError(f"image name: expected one path, found {record['image']!r}")
    question = turns[0].strip()
    if question.startswith(IMAGE):
        question = question.removeprefix(IMAGE)
    else:
        question = question.removesuffix(IMAGE)
    turns[0] = question.strip()
    return turns, True


@lru_cache(maxsize=4)
def encode_once(text: str, tok: Tokenizer) -> tuple[int, ...]:
    """For the system text, which is the same in front of every conversation."""
    return tuple(tok.encode(text, add_special_tokens=False).ids)


def encode_turns(turns: list[str], tok: Tokenizer, image: bool) -> tuple[list[int], list[int]]:
    """LLaVA-Phi's chat template "v0": question, answer, ... -> ids, and labels of the same length.

        SYSTEM USER: <image>\\nquestion ASSISTANT: answer<|endoftext|>USER: question ASSISTANT: answer<|endoftext|>
                                                  ~~~~~~~~~~~~~~~~~~~~                         ~~~~~~~~~~~~~~~~~~~~

    What is underlined is supervised: its label is its own id. The model is to learn what to answer and where to stop,
    so the end of text counts; it is not to learn the user's questions or the fixed words between them, so everything
    else is IGNORE. "<image>" stands for the one IMAGE_ID. `collate` turns the label of a position into the target of
    the position before it.

    An odd number of turns leaves the last question open, for the model to answer: the same function makes the prompts
    of inference, which therefore are exactly how training conversations begin.
    """
    eot = eot_id(tok)
    ids: list[int] = []
    text = SYSTEM + " USER: "           # what is not tokenized yet, up to the next answer
    if image:
        ids = [*encode_once(text, tok), IMAGE_ID]
        text = "\n" if turns[0] else ""
    labels = [IGNORE] * len(ids)
    for i in range(0, len(turns), 2):
        text += turns[i] + " ASSISTANT:"
        answered = i + 1 < len(turns)
        answer = " " + turns[i + 1] if answered and turns[i + 1] else ""
        # The space before an answer is part of its first token (" A" is one token), so question and answer must be
        # tokenized in one piece. The tokenizer then says which token the answer's first character lies in, and the
        # labels cannot drift from the ids. LLaVA tokenizes the question again by itself to learn its length, which is
        # off by one in places.
        encoded = tok.encode(text + answer, add_special_tokens=False)
        n_asked = encoded.char_to_token(len(text)) if answer else len(encoded.ids)
        ids += encoded.ids
        labels += [IGNORE] * n_asked + encoded.ids[n_asked:]
        if answered:
            ids.append(eot)
            labels.append(eot)
        text = "USER: "                 # no space: the template puts it right behind the end of text
    return ids, labels


def encode(record: dict, tok: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    """A record of LLaVA's json -> ids with at most one IMAGE_ID, and labels of the same length, uncut.

    template "v0": a conversation, see encode_turns (stage 2).
    template "plain": picture, caption, newline, without any words of a chat; all but the picture is supervised. Stage
    1 only teaches the projector what patches look like to the language model.
    ValueError says what is wrong with the record.
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
    ids, _ = encode_turns(turns, tok, image)
    return ids


def expand(ids: list[int], labels: list[int] | None, n_patches: int,
           block_size: int) -> tuple[list[int], list[int] | None]:
    """The image slot becomes n_patches times IMAGE_ID; then what is above block_size is cut off on the right.

    labels=None says that this is a prompt. ValueError where the cut would go through an image, or through a prompt,
    which would lose its question.
    """
    if IMAGE_ID in ids:
        slot = ids.index(IMAGE_ID)
        if slot + n_patches > block_size:
            raise ValueError(f"image does not fit: it ends at position {slot + n_patches} of {block_size}")
        ids = ids[:slot] + [IMAGE_ID] * n_patches + ids[slot + 1:]
        if labels is not None:
            labels = labels[:slot] + [IGNORE] * n_patches + labels[slot + 1:]
    if labels is not None:
        return ids[:block_size], labels[:block_size]
    if len(ids) > block_size:
        raise ValueError(f"prompt too long: {len(ids)} positions, the model has {block_size}")
    return ids, None


def collate(samples: list[Sample], image_size: int = 336) -> Batch:
    """Pack samples one behind the other into a single row: no padding is computed, lengths keep them apart.

    image_size only gives `images` its shape when there are none.
    """
    import torch

    ids = np.array(list(chain.from_iterable(s.ids for s in samples)), dtype=np.int64)          # (T,)
    labels = np.array(list(chain.from_iterable(s.labels for s in samples)), dtype=np.int64)    # (T,)
    lengths = np.array([len(s.ids) for s in samples], dtype=np.int64)                          # (B,)
    # A token is predicted at the position before it. Before a sample's first token stands another sample, which must
    # not be taught what follows it.
    first = np.cumsum(lengths) - lengths
    labels[first] = IGNORE
    rows = np.flatnonzero(labels[1:] != IGNORE)                                                # (M,)
    targets = labels[rows + 1]                                                                 # (M,)
    slots = np.flatnonzero(ids == IMAGE_ID)                                                    # (N * P,)
    ids[slots] = 0                      # any valid id: the embedding looks it up, then the patch takes its place
    images = [s.image for s in samples if s.image is not None]
    if images:
        assert len(slots) % len(images) == 0, f"{len(slots)} image positions for {len(images)} images"
        pixels = torch.stack(images)                                                           # (N, 3, S, S)
    else:
        assert len(slots) == 0, f"{len(slots)} image positions, but no image"
        pixels = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return Batch(torch.from_numpy(ids), torch.from_numpy(lengths), pixels, torch.from_numpy(slots),
                 torch.from_numpy(rows), torch.from_numpy(targets))

# ---------------------------------------------------------------------------------------------------
# Records on disk. The json of stage 2 is a gigabyte, and every process of a training run needs it: instead of the
# records themselves, their byte ranges are held in memory, and a record is read when its turn comes.

BLOCK = 1 << 24                     # bytes looked at in one go
CHUNK = 256                         # records given to a worker process in one go


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value in json")


STRICT_JSON = json.JSONDecoder(parse_constant=refuse_constant)          # Python's own also reads NaN and Infinity


def parse_record(record: bytes) -> dict:
    try:
        return STRICT_JSON.decode(record.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not json: {json_problem(e)}") from e


def json_problem(e: Exception, start: int = 0) -> str:
    """What json's parser met, and how far behind `start`, where the record begins: its lines are not the file's."""
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
    """Byte ranges of the records of a json list, found by parsing one window of the file after another.

    The windows are decoded as latin-1, which makes one character of every byte, so that the parser's positions are
    byte positions. Bytes above 127 occur inside strings only, where the parser looks for nothing but quotes and
    backslashes.
    """
    space = re.compile(r"[ \t\r\n]*")
    file.seek(0)
    start = file.read(BLOCK).index(b"[") + 1                # where the window begins in the file
    width = BLOCK
    first = True
    while True:
        file.seek(start)
        text = file.read(width).decode("latin-1")
        i = 0                                               # in the window: everything before it is done
        try:
            while True:
                i = space.match(text, i).end()
                if first and text[i] == "]":
                    return                                  # an empty list
                _, end = STRICT_JSON.raw_decode(text, i)
                after = space.match(text, end).end()
                if text[after] not in ",]":
                    raise ValueError("expected , or ] after this record")
                yield start + i, start + end
                if text[after] == "]":
                    return
                i = after + 1
                first = False
        except (ValueError, IndexError, RecursionError) as e:
            # Either the window ends within this record, or the record is broken. A window that reached the end of
            # the file, or that has grown to 16 blocks for one record, settles which.
            if len(text) < width or width > 16 * BLOCK:
                [line] = lines_of(path, [start + i])
                raise ValueError(f"not json: {path}, line {line}: {json_problem(e, i)}; the record that begins there is "
                                 "broken, and what follows cannot be found") from e
            width = BLOCK if i else 2 * width
            start += i


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


def image_path(folder: Path, name: str, follow_links: bool) -> Path:
    """The file that a record names. The record is a stranger's: it must not reach outside of the image folder."""
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"image is an address: {name[:80]}; download it and give the file")
    absolute = name.startswith("/") or re.match("[A-Za-z]:", name)
    if absolute or "\0" in name or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"image outside the folder: {name!r}; expected a path relative to the image folder")
    path = folder / name
    if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image outside the folder: {name!r} is a link to {path.resolve()}; --follow-links allows it")
    return path


class RecordInfo(NamedTuple):
    """What one look at a record tells. A record with a problem counts as one position that teaches nothing."""
    length: int = 1                 # positions: image expanded, cut to block_size
    supervised: int = 0             # tokens
    image: bool = False
    cut: int = 0                    # positions lost to block_size
    problem: str = ""               # "kind: detail", empty if there is none
    notes: tuple[str, ...] = ()     # not wrong, but worth knowing
    id_hash: int = 0                # of the record's "id", to find duplicates
    folder: str = ""                # that its image is in


class Index(NamedTuple):
    """What the plan of a training run needs to know about all n records."""
    ranges: np.ndarray              # (n, 2) int64, bytes of the file
    length: np.ndarray              # (n,) int32, and so on as in RecordInfo
    supervised: np.ndarray
    image: np.ndarray
    cut: np.ndarray


class Dataset:
    """LLaVA's json or jsonl. `index` is made when first asked for: a minute or more for 665 thousand records, once.

    on_bad_sample: "stop" raises at the first; "skip" puts a sample in its place that supervises nothing.
    cache_dir: where the index and the list of bad samples are written; None: nowhere.
    pad_color: for image_mode "pad", see mean_color.
    Raises FileNotFoundError or ValueError if the file is not there or not LLaVA's json.
    """

    def __init__(self, json_path: Path, image_dir: Path, tok: Tokenizer, template: str, image_size: int,
                 image_mode: str, n_patches: int, block_size: int, on_bad_sample: str = "stop",
                 cache_dir: Path | None = None, follow_links: bool = False,
                 pad_color: tuple[int, int, int] = PAD_COLOR):
        assert on_bad_sample in ("stop", "skip"), f"on_bad_sample {on_bad_sample!r} is neither stop nor skip"
        self.path = Path(json_path)
        self.image_dir = Path(image_dir)
        self.tok = tok
        self.template = template
        self.image_size = image_size
        self.image_mode = image_mode
        self.pad_color = pad_color
        self.n_patches = n_patches
        self.block_size = block_size
        self.on_bad_sample = on_bad_sample
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.follow_links = follow_links
        if not self.path.is_file():
            raise FileNotFoundError(f"no data at {self.path}: expected LLaVA's json, a list of records")
        first = next(find_records(self.path), None)
        if first is None or b'"conversations"' not in self.read(first):
            found = f"found {self.read(first)[:80]!r}" if first else "it has no records"
            raise ValueError(f"{self.path} is not LLaVA's json: expected records with \"conversations\", {found}")

    def __setstate__(self, state: dict) -> None:
        """Arrive in a worker process. Pickling a tokenizer forgets that special words in a text are text."""
        self.__dict__.update(state)
        self.tok.encode_special_tokens = True

    def __len__(self) -> int:
        return len(self.index.length)

    # ---- all records at once

    @cached_property
    def checksum(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def index(self) -> Index:
        """Read from cache_dir if it was made for this very json, tokenizer and template; else made, and kept there.

        No lock guards it: a run holds its folder, and lets process 0 make the index before the others ask for it.
        """
        if self.cache_dir is None:
            return self.make_index()
        key = [self.checksum, self.tok.to_str(), self.template, self.n_patches, self.block_size, self.on_bad_sample]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = self.cache_dir / f"index_{name}.npz"
        if not path.exists():
            with replacing(path) as part:
                np.savez(part, **self.make_index()._asdict())
        with np.load(path) as arrays:
            return Index(**arrays)

    def find_ranges(self) -> np.ndarray:
        return np.fromiter(find_records(self.path), dtype=np.dtype((np.int64, 2)))          # (n, 2)

    def make_index(self) -> Index:
        ranges = self.find_ranges()
        workers = os.cpu_count() if len(ranges) > 2000 else 0           # a small file is done before workers start
        numbers = np.zeros((4, len(ranges)), dtype=np.int32)
        for i, info in enumerate(self.inspect_all(ranges, "no", workers)):
            if info.problem and self.on_bad_sample == "stop":
                raise self.sample_error(ranges[i].tolist(), info.problem)
            numbers[:, i] = (info.length, info.supervised, info.image, info.cut)
        return Index(ranges, *numbers)

    def inspect_all(self, ranges: np.ndarray, decode: str, workers: int) -> Iterator[RecordInfo]:
        """What `sample` would meet at each record, in order, with a progress bar. decode: see `inspect`."""
        chunks = [ranges[i:i + CHUNK] for i in range(0, len(ranges), CHUNK)]
        inspected = parallel(partial(self.inspect_chunk, decode), chunks, workers)
        infos = chain.from_iterable(inspected)
        return iter(tqdm(infos, self.path.name, len(ranges), unit=" records", disable=None, leave=False))

    def inspect_chunk(self, decode: str, ranges: np.ndarray) -> list[RecordInfo]:
        return [self.inspect(span, decode) for span in ranges.tolist()]

    def inspect(self, span: tuple[int, int], decode: str) -> RecordInfo:
        """What `sample` would meet. The picture: decode "full" opens it, "header" asks for its size, "no" leaves it."""
        try:
            record = parse_record(self.read(span))
            ids, labels = encode(record, self.tok, self.template)
            image = IMAGE_ID in ids
            full_length = len(ids) - 1 + self.n_patches if image else len(ids)
            ids, labels = expand(ids, labels, self.n_patches, self.block_size)
            if image and decode != "no":
                path = image_path(self.image_dir, record["image"], self.follow_links)
                open_image(path, self.image_size, self.image_mode, decode == "full")
            id_hash = hashlib.blake2b(json.dumps(record.get("id", span)).encode(), digest_size=7)
        except (ValueError, OSError) as e:
            return RecordInfo(problem=str(e))
        return RecordInfo(
            length=len(ids),
            supervised=len(labels) - labels.count(IGNORE),
            image=image,
            cut=full_length - len(ids),
            notes=notes_on(record),
            id_hash=int.from_bytes(id_hash.digest()),
            folder=str(Path(record["image"]).parent) if image else "",
        )

    # ---- one record

    def read(self, span: tuple[int, int]) -> bytes:
        start, end = span
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def name(self, span: tuple[int, int]) -> str:
        """The record's id, also where the record cannot be parsed."""
        match = re.search(rb'"id"\s*:\s*("[^"]*"|-?\d+)', self.read(span))
        return match[1].decode("utf-8", "replace").strip('"') if match else "(none)"

    def sample_error(self, span: tuple[int, int], problem: object) -> ValueError:
        [line] = lines_of(self.path, [span[0]])
        return ValueError(f"sample {self.name(span)}, line {line} of {self.path}: {problem}; "
                          f"to see every bad sample: python data.py check --data {self.path} --images {self.image_dir}")

    def sample(self, i: int) -> Sample:
        """Record i. ValueError names its id and line, what is wrong, and the command that finds all like it."""
        span = self.index.ranges[i].tolist()
        try:
            record = parse_record(self.read(span))
            ids, labels = encode(record, self.tok, self.template)
            ids, labels = expand(ids, labels, self.n_patches, self.block_size)
            image = None
            if IMAGE_ID in ids:
                path = image_path(self.image_dir, record["image"], self.follow_links)
                image = load_image(path, self.image_size, self.image_mode, self.pad_color)
        except (ValueError, OSError) as e:
            raise self.sample_error(span, e) from e
        return Sample(str(record.get("id", i)), ids, labels, image)

    def summary(self) -> str:
        """One line for the log. What is cut, and what then teaches nothing, is not passed over in silence."""
        index = self.index
        n_cut = (index.cut > 0).sum()
        n_useless = (index.supervised == 0).sum()
        return (f"{len(self):,} samples, {index.image.sum():,} with an image, {index.length.mean():.0f} positions "
                f"each; {n_cut:,} cut at {self.block_size}, {n_useless:,} without anything to learn")


def notes_on(record: dict) -> tuple[str, ...]:
    """What is not wrong with a good record, but may not be what its author meant."""
    said = [turn["value"] for turn in record["conversations"]]
    first = next(turn["value"] for turn in record["conversations"] if turn["from"] == "human").strip()
    turns, image = to_turns(record)
    has_tag = image and (first.startswith(IMAGE) or first.endswith(IMAGE))
    n_tags = sum(text.count(IMAGE) for text in said)
    notes = []
    if not all(turns[1::2]):
        notes.append("empty answer, only the end of text is learnt")
    if image and not has_tag:
        notes.append("no <image> where the first question begins or ends, the image is put in front")
    if n_tags > (1 if has_tag else 0):
        notes.append("<image> that stays text")
    if sum(map(len, said)) > 100_000:
        notes.append("more than 100,000 characters")
    return tuple(notes)

# ---------------------------------------------------------------------------------------------------
# The plan: which samples make a training step, and which process computes them. Every process computes the whole plan
# for itself, from the seed, the step and the index alone: they need not talk to each other, and a resumed run goes on
# with exactly the samples that are next.


def steps_per_epoch(n: int, global_batch: int) -> int:
    return math.ceil(n / global_batch)                      # the last step of an epoch may be smaller


def modality_order(lengths: np.ndarray, world: int, batch: int, shuffle: torch.Generator | None,
                   shuffle_steps: torch.Generator) -> list[int]:
    """LLaVA's group_by_modality_length: runs of world * batch samples that are all with a picture, or all without.

    lengths are negative for text-only samples. Each run is dealt to the processes by length, the longest first, to the
    one with the least so far. The last, incomplete runs of both kinds are mixed.
    """
    import torch

    run_length = world * batch
    runs = []
    rest = []
    for kind in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        mixed = kind[torch.randperm(len(kind), generator=shuffle).numpy()]
        of_kind = []
        for i in range(0, len(mixed), run_length):
            of_kind.append(deal(mixed[i:i + run_length], np.abs(lengths), world))
        runs += of_kind[:-1]                                # like the original, the last counts as incomplete
        rest += of_kind[-1] if of_kind else []
    runs = [runs[i] for i in torch.randperm(len(runs), generator=shuffle_steps).tolist()]
    if len(rest) >= run_length:
        runs.insert(0, rest[:run_length])
        rest = rest[run_length:]
    return [*chain.from_iterable(runs), *rest]


def deal(run: np.ndarray, lengths: np.ndarray, world: int) -> list[int]:
    """Order a run so that its parts for the processes, one behind the other, are about equally long."""
    by_length = run[np.argsort(-lengths[run], kind="stable")].tolist()
    hands = [[] for _ in range(world)]
    if world == 1 or len(by_length) % world:
        for position, i in enumerate(by_length):
            hands[position % world].append(i)
        return [*chain.from_iterable(hands)]
    sums = [0] * world
    for i in by_length:
        open_hands = [rank for rank in range(world) if len(hands[rank]) < len(by_length) // world]
        rank = min(open_hands, key=lambda rank: sums[rank])
        hands[rank].append(i)
        sums[rank] += int(lengths[i])
    return [*chain.from_iterable(hands)]


def epoch_order(seed: int, index: Index, global_batch: int, group: str, epoch: int) -> np.ndarray:
    """Every sample once. group "modality_length": the samples of a step are all with a picture, or all without."""
    assert group in ("none", "modality_length"), f"group {group!r} is neither none nor modality_length"
    epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    if group == "none":
        return np.random.default_rng(epoch_seed).permutation(len(index.length))

    import torch
    generator = torch.Generator().manual_seed(epoch_seed)
    lengths = np.where(index.image, index.length, -index.length)
    return np.array(modality_order(lengths, 1, global_batch, generator, generator))


def step_samples(step: int, n: int, global_batch: int, order: Callable[[int], np.ndarray]) -> list[int]:
    """The samples of a global step, whatever the processes and the micro-batches. order: epoch -> its samples."""
    epoch, k = divmod(step, steps_per_epoch(n, global_batch))
    return order(epoch)[k * global_batch:(k + 1) * global_batch].tolist()


TOKEN_COST = 0.0151                 # TFLOP to train Phi-2's linear layers on a token
PICTURE_COST = 1.1                  # TFLOP to train CLIP-L-336 on a picture


def training_cost(length: int, image: int, picture_cost: float = PICTURE_COST) -> float:
    """TFLOP to train on a sample of so many positions: Phi-2's linear layers, its attention, the vision tower."""
    return TOKEN_COST * length + 0.5e-6 * length ** 2 + picture_cost * image


def split_step(lengths: list[int], images: list[int], world: int, budget: int,
               picture_cost: float = PICTURE_COST) -> list[list[list[int]]]:
    """Split a step into micro-batches -> [rank][micro-batch] -> positions in `lengths`.

    Uses as few micro-batches as the budget of tokens allows, and the same number on every rank, because FSDP's
    processes wait for each other after each. Samples are placed most expensive first, each in the cheapest micro-batch
    that has room (greedy bin packing). A sample above the budget gets a micro-batch of its own, and with fewer samples
    than ranks some are empty. Which samples share one depends on `world` only where their number has to be rounded up.
    """
    costs = [training_cost(length, image, picture_cost) for length, image in zip(lengths, images)]
    order = sorted(range(len(lengths)), key=lambda i: -costs[i])
    tokens = sum(min(length, budget) for length in lengths)
    n = world * max(1, math.ceil(tokens / budget / world))
    micro_batches = pack_greedily(order, lengths, costs, n, budget)
    while micro_batches is None:                            # they did not fit into n: one more for every rank
        n += world
        micro_batches = pack_greedily(order, lengths, costs, n, budget)
    # Equally expensive ones side by side: what ranks compute at the same time should take the same time.
    micro_batches.sort(key=lambda micro: -sum(costs[i] for i in micro))
    return [micro_batches[rank::world] for rank in range(world)]


def pack_greedily(order: list[int], lengths: list[int], costs: list[float], n: int,
                  budget: int) -> list[list[int]] | None:
    """Distribute the samples, in this order, over n micro-batches; None if one fits into none of them."""
    micro_batches = [[] for _ in range(n)]
    tokens = [0] * n
    sums = [0.0] * n                                        # of costs
    for i in order:
        with_room = [b for b in range(n) if not micro_batches[b] or tokens[b] + lengths[i] <= budget]
        if not with_room:
            return None
        cheapest = min(with_room, key=lambda b: sums[b])
        micro_batches[cheapest].append(i)
        tokens[cheapest] += lengths[i]
        sums[cheapest] += costs[i]
    return [sorted(micro) for micro in micro_batches]

# ---------------------------------------------------------------------------------------------------
# Loader: the plan carried out, in worker processes ahead of the training


class FunctionDataset:
    """The least that torch's DataLoader accepts: looking up an item calls a function with it."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def as_it_is(item):
    """In place of DataLoader's own collating, which would turn lists into tensors."""
    return item


def ignore_signals(worker: int) -> None:
    """torchrun signals a whole process group; if workers died of it, the trainer could not save its last checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers() -> None:
    """At exit. Python would end workers with SIGTERM, which they ignore, and then wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # torch's own handler reports a dead worker as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def parallel(function: Callable, items: Iterable, workers: int, pin: bool = False) -> Iterator:
    """function(item) for every item, in order, in worker processes of one thread, at most one per core; 0: here.

    pin: results come in page-locked memory, from which a GPU copies while it computes.
    """
    import torch
    from torch.utils.data import DataLoader

    workers = min(workers, os.cpu_count())
    # Functions registered last run first, and this one has to run before multiprocessing's own, which torch's import
    # registers. Unregistering first keeps it a single one.
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    return iter(DataLoader(
        FunctionDataset(function),
        batch_size=None,                                    # an item is a whole micro-batch already
        sampler=items,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=ignore_signals,
        collate_fn=as_it_is,
        generator=torch.Generator(),                        # its own: the global one belongs to the training
    ))


class Step(NamedTuple):
    """What one rank needs for one training step."""
    step: int
    sample_ids: list[int]           # of all ranks: record numbers, from 0
    batches: list[Batch]            # this rank's micro-batches


class Loader:
    """The steps start_step, ..., steps - 1 of one rank. Pure in (seed, step): to resume is to start later.

    micro_tokens: the budget of a micro-batch, as large as the GPU's memory allows. Raises ValueError at a bad sample,
    or, if the dataset skips those, when there are too many.
    """

    def __init__(self, dataset: Dataset, *, global_batch: int, micro_tokens: int, rank: int, world: int, seed: int,
                 steps: int, start_step: int = 0, workers: int = 0, group: str = "none", pin: bool = False,
                 picture_cost: float = PICTURE_COST):
        self.dataset = dataset
        self.global_batch = global_batch
        self.micro_tokens = micro_tokens
        self.rank = rank
        self.world = world
        self.seed = seed
        self.steps = steps
        self.start_step = start_step
        self.workers = workers
        self.group = group
        self.pin = pin
        self.picture_cost = picture_cost
        self.bad_samples: set[int] = set()

    def __iter__(self) -> Iterator[Step]:
        # The workers ask `plan` for micro-batches some steps ahead of the training. It notes here which step they
        # belong to, and their results come back in the same order.
        planned: deque[tuple[int, list[int], int]] = deque()
        results = parallel(self.make_batch, self.plan(planned), self.workers, self.pin)
        for first in results:
            step, sample_ids, n_micro = planned.popleft()
            batches = []
            problems = []
            for batch, bad in [first, *islice(results, n_micro - 1)]:
                batches.append(batch)
                problems += bad
            self.report_bad(problems)
            yield Step(step, sample_ids, batches)

    def plan(self, planned: deque) -> Iterator[list[int]]:
        """The samples of one micro-batch of this rank after another; `planned` gets a line for each step."""
        index = self.dataset.index
        make_order = partial(epoch_order, self.seed, index, self.global_batch, self.group)
        order = lru_cache(maxsize=1)(make_order)            # once an epoch, not once a step
        for step in range(self.start_step, self.steps):
            sample_ids = step_samples(step, len(self.dataset), self.global_batch, order)
            lengths = index.length[sample_ids].tolist()
            images = index.image[sample_ids].tolist()
            ranks = split_step(lengths, images, self.world, self.micro_tokens, self.picture_cost)
            mine = ranks[self.rank]
            planned.append((step, sample_ids, len(mine)))
            for micro in mine:
                yield [sample_ids[i] for i in micro]

    def make_batch(self, sample_ids: list[int]) -> tuple[Batch | None, list[dict]]:
        """In a worker: a micro-batch, and what was wrong with its samples.

        Problems travel as values, not as exceptions, so that they reach the main process with their sample's name.
        """
        nothing = Sample("", [eot_id(self.dataset.tok)], [IGNORE], None)        # supervises nothing
        samples = []
        problems = []
        for i in sample_ids:
            try:
                samples.append(self.dataset.sample(i))
            except ValueError as e:
                samples.append(nothing)
                problems.append({"sample": i, "data": str(self.dataset.path), "problem": str(e)})
                if self.dataset.on_bad_sample == "stop":
                    return None, problems
        return collate(samples or [nothing], self.dataset.image_size), problems

    def report_bad(self, problems: list[dict]) -> None:
        """Stop, or list them in BAD_SAMPLES, which all ranks share, and give up when it has too many."""
        if not problems:
            return
        if self.dataset.on_bad_sample == "stop":
            raise ValueError(problems[0]["problem"])
        self.read_listed()
        new = [problem for problem in problems if problem["sample"] not in self.bad_samples]    # once, not in every epoch
        self.bad_samples.update(problem["sample"] for problem in new)
        if self.dataset.cache_dir and new:
            lines = "".join(json.dumps({"checksum": self.dataset.checksum, **problem}) + "\n" for problem in new)
            with open(self.dataset.cache_dir / BAD_SAMPLES, "ab", buffering=0) as file:
                file.write(lines.encode())                  # in one write: lines of several processes do not mix
        self.read_listed()
        limit = max(10, len(self.dataset) // 1000)
        if len(self.bad_samples) > limit:
            raise ValueError(f"{len(self.bad_samples)} bad samples, more than {limit} (0.1 % of the data, but at "
                             f"least 10); the last: {problems[-1]['problem']}")

    def read_listed(self) -> None:
        """Learn which samples of this json other ranks have listed, or this run before it was resumed."""
        if self.dataset.cache_dir:
            for checksum, sample in read_bad_samples(self.dataset.cache_dir):
                if checksum == self.dataset.checksum:
                    self.bad_samples.add(sample)


def read_bad_samples(folder: Path) -> set[tuple[str | None, int]]:
    """A run's BAD_SAMPLES so far: the checksum of the json, which may move, and the sample's number in it.

    Lines written before there were checksums have None.
    """
    path = folder / BAD_SAMPLES
    lines = read_jsonl(path, torn=True) if path.exists() else []
    return {(line.get("checksum"), line["sample"]) for line in lines}

# ---------------------------------------------------------------------------------------------------
# python data.py check


def parse(argv: list[str] | None) -> Namespace:
    """The command line. ValueError in one line for what cannot be."""
    parser = Parser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="check")
    check = commands.add_parser("check", help="find every bad sample before training")
    add = check.add_argument
    add("--data", type=Path, required=True, help="LLaVA's json, or one record a line")
    add("--images", type=Path, required=True, help="the folder that the records' image paths start from")
    add("--stage", choices=["pretrain", "finetune"], default="finetune", help="which stage the data is for")
    add("--recipe", choices=list(RECIPES), default="llava-phi", help="whose; see train.py --help")
    add("--model", type=Path, nargs="+", metavar="FOLDER",
        help="what is to be trained, for its sizes: a model's folder, or Phi-2's and the vision tower's")
    add("--tokenizer", type=Path, help="its folder; none: the model's, else checkpoints/phi-2; without it, no lengths")
    add("--decode", choices=["header", "full"], default="full", help="full also finds truncated pictures")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--max-length", type=int, help="positions a sample may have, image expanded; none: the model's, up to 2048")
    add("--n-patches", type=int, help="positions of an image; none: the model's, else 576 (CLIP at 336 pixels)")
    add("--image-size", type=int, help="pixels of its side; none: the model's, else 336")
    add("--image-mode", choices=IMAGE_MODES, help="how pictures are made square; none: as the stage's recipe says")
    add("--follow-links", action=BooleanOptionalAction, default=False, help="allow links out of --images")
    add("--show", type=int, default=20, help="how many samples to name of each kind")
    add("--write-clean", type=Path, help="write the good records here, and the bad ones beside it")
    args = parser.parse_args(argv)
    for name in ("max_length", "n_patches", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.model and len(args.model) > 2:
        parser.error(f"--model: expected one folder, or Phi-2's and the vision tower's, found {len(args.model)}")
    if args.tokenizer is None:
        args.tokenizer = args.model[0] if args.model else Path("checkpoints/phi-2")
    return args


def main(argv: list[str] | None = None) -> int:
    from lib.check_data import check_data  # a door: the check stands on this file and the loader
    return check_data(parse(argv))


if __name__ == "__main__":
    sys.exit(run_command(main))
