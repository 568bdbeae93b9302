"""From records of conversations, or one question, to packed tensors.

    image        -> uint8 pixels at the vision tower's size                         load_image
    record       -> conversation                                                    lib/records.py
    conversation -> token ids and labels                                            encode
    samples      -> one row of tokens without padding                               collate
    (seed, step) -> the samples of a training step, split over ranks                Loader, lib/schedule.py

The first three follow Hugging Face's CLIPImageProcessor and SiglipImageProcessor (the pixels, bit for bit) and LLaVA's
train.py (where the image goes, the chat template). Nothing here depends on the model: sizes are passed in.
`python data.py --help` says how to find bad samples before training, and how to see what is learned.
"""
from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from lib.common import parse_or_exit, plural, run_command, sha256
from lib.recipes import IMAGE_MODES, parse_data

if __name__ == "__main__":
    ARGS = parse_or_exit(parse_data)    # --help and mistakes are answered before the imports below take seconds

import os
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain, islice, tee
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Encoding, Tokenizer, processors
from torch import Tensor
from tqdm import tqdm

from lib.archives import Pictures
from lib.pictures import open_rgb
from lib.records import (IMAGE, NOTES, BadSamples, cached_arrays, conversation_of, find_records, id_of, lines_of,
                         parse_record, place_images)
from lib.schedule import Mixture, epoch_order, split_by_file, split_step, step_samples
from lib.tokenizer import EOT, PHI_RUNS, build_tokenizer, read_tokenizer
from lib.workers import map_in_workers

IGNORE = -100                       # label of an unsupervised position
IMAGE_ID = -200                     # the image slot in ids; after `expand`, every patch position
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


class Sample(NamedTuple):
    """One record, ready to be packed."""
    id: str
    ids: list[int]                  # with the image slot expanded to P times IMAGE_ID
    labels: list[int]               # as long as ids, unshifted: a position's own id, or IGNORE
    image: Tensor | None            # (3, S, S) uint8, or (N, 3, S, S) for N images


class Batch(NamedTuple):
    """B samples packed into a single row of T tokens; N images of P patches; M supervised tokens."""
    ids: Tensor                     # (T,) int64, 0 at image positions
    lengths: Tensor                 # (B,) int64, summing to T
    images: Tensor                  # (N, 3, S, S) uint8, N may be 0
    image_positions: Tensor         # (N * P,) int64, where in ids the patches go
    loss_positions: Tensor          # (M,) int64, whose next token, in the same sample, is supervised
    targets: Tensor                 # (M,) int64, those next tokens
    split: list[int] | None = None  # of a Mixture: how many of the M are from each file, in that order

# ---------------------------------------------------------------------------------------------------
# Images


class ImageConfig(NamedTuple):
    """How a model expects its images."""
    size: int                       # pixels per side
    mode: str                       # one of IMAGE_MODES, see load_image
    pad_color: tuple[int, int, int]
    n_patches: int                  # positions that an image takes up in a sample

    @classmethod
    def of(cls, vision, mode: str) -> ImageConfig:
        """For the tower of a VisionConfig.

        Images are padded with the tower's mean color, which normalization maps to almost zero. LLaVA truncates it
        instead of rounding: (122, 116, 104) for CLIP, (127, 127, 127) for SigLIP.
        """
        pad_color = tuple(int(255 * channel) for channel in vision.mean)
        return cls(vision.image_size, mode, pad_color, vision.n_patches)


def load_image(source: str | Path | BinaryIO | Image.Image, config: ImageConfig) -> Tensor:
    """A file, or an image already open -> uint8 (3, size, size).

    mode "crop": resize the shortest edge to `size`, then crop the center (CLIP's processor; LLaVA-Phi's stage 1).
    mode "pad": pad to a square with pad_color, then resize (LLaVA's stage 2 and inference).
    mode "squash": resize both edges to `size`, ignoring the aspect ratio (SigLIP's processor).

    The pixels equal those of Hugging Face's processors before normalization, which the tower does here, except that
    photos stored on their side are turned upright. ValueError names the file and says what is wrong with it.
    """
    size, mode, pad_color, _ = config
    assert mode in IMAGE_MODES, f"image mode {mode!r} is none of {', '.join(IMAGE_MODES)}"
    image = open_rgb(source, size, mode)
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

# ---------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, else from vocab.json, merges.txt and the added tokens; both give the same ids.

    Special tokens that occur in text are plain text: the image slot and the end of text are inserted by id, so an
    "<image>" or "<|endoftext|>" that somebody typed cannot move an image or end an answer.
    """
    folder = Path(folder)               # in a notebook it is a str
    has = {name: (folder / name).exists() for name in ("tokenizer.json", "vocab.json", "merges.txt")}
    problem = ""
    try:
        tok = read_tokenizer(folder) if has["tokenizer.json"] else build_tokenizer(folder)
        if eot_id(tok) is None:
            problem = f"it has no {EOT} token"
        elif eot_id(tok) == 50256 and None in map(tok.token_to_id, PHI_RUNS):
            problem = "GPT-2's, without Phi-2's tokens for runs of spaces and tabs; get its added_tokens.json"
    except Exception as e:          # tokenizers raises plain Exception, and untrusted json may have any shape
        problem = str(e)
        if not has["tokenizer.json"] and not (has["vocab.json"] and has["merges.txt"]):
            problem = ("expected tokenizer.json, or vocab.json and merges.txt; get Phi-2's by: hf download "
                       "microsoft/phi-2 --local-dir checkpoints/phi-2")
    if problem:
        raise ValueError(f"{folder} holds no usable tokenizer: {problem}")
    # With trimmed offsets, whitespace tokens would report empty spans, and encode_turns would give wrong labels.
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.encode_special_tokens = True                        # despite its name: treat them as plain text
    return tok


def eot_id(tok: Tokenizer) -> int:
    """The id that ends an answer. Never config.json's eos_token_id, which is wrong in released checkpoints."""
    return tok.token_to_id(EOT)


@lru_cache(maxsize=64)              # for the system prompt, which opens every conversation
def tokenize(text: str, tok: Tokenizer) -> Encoding:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        around = text[max(0, e.start - 20):e.start + 20]
        raise ValueError(f"broken unicode: a lone surrogate in {around!r}") from None
    return tok.encode(text, add_special_tokens=False)

# ---------------------------------------------------------------------------------------------------
# Conversation -> ids and labels


def encode_turns(turns: list[list[str]], tok: Tokenizer) -> tuple[list[int], list[int]]:
    """LLaVA-Phi's chat template "v0": question, answer, ... -> ids, and labels of the same length.

        SYSTEM USER: <image>\\nquestion ASSISTANT: answer<|endoftext|>USER: question ASSISTANT: answer<|endoftext|>
                                                  ~~~~~~~~~~~~~~~~~~~~                         ~~~~~~~~~~~~~~~~~~~~

    The underlined tokens are supervised: each one's label is its own id. The model should learn what to answer and
    where to stop, so the end of text counts; it should not learn to ask the user's questions or to repeat the template,
    so all other labels are IGNORE. "<image>" stands for one IMAGE_ID. `collate` makes the label of a position the
    target of the position before it.

    An odd number of turns leaves the last question for the model to answer. Inference builds its prompts this way, so
    they begin exactly as training conversations do.
    """
    eot = eot_id(tok)
    ids: list[int] = []
    labels: list[int] = []
    text = SYSTEM + " USER: "           # not tokenized yet: everything up to the next image or answer
    for i in range(0, len(turns), 2):
        *before_images, question = turns[i]
        for piece in before_images:
            ids += [*tokenize(text + piece, tok).ids, IMAGE_ID]
            text = ""
        labels += [IGNORE] * (len(ids) - len(labels))
        text += question + " ASSISTANT:"
        answered = i + 1 < len(turns)
        answer = " " + turns[i + 1][0] if answered and turns[i + 1][0] else ""
        # The space before an answer is part of its first token (" A" is one token), so question and answer must be
        # tokenized together. The tokenizer then says which token the answer's first character is in, and the labels
        # cannot drift from the ids. LLaVA tokenizes the question a second time to get its length, which is off by one
        # in places.
        encoded = tokenize(text + answer, tok)
        n_asked = encoded.char_to_token(len(text)) if answer else len(encoded.ids)
        ids += encoded.ids
        labels += [IGNORE] * n_asked + encoded.ids[n_asked:]
        if answered:
            ids.append(eot)
            labels.append(eot)
        text = "USER: "                 # no space in front: it follows the end of text directly
    return ids, labels


def encode(record: dict, tok: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    """A record -> ids with an IMAGE_ID for each image, and labels of the same length, not truncated.

    template "v0": a conversation, see encode_turns (stage 2).
    template "plain": image, caption, newline, no chat template; everything but the image is supervised. Stage 1 only
    teaches the projector to map patches to something the language model understands.
    ValueError says what is wrong with the record.
    """
    turns, images, _ = conversation_of(record)
    if template == "v0":
        return encode_turns(turns, tok)
    if len(images) != 1 or len(turns) != 2:
        raise ValueError("not a caption: pretraining wants an image, one question and its answer, found "
                         f"{len(turns)} turns and {len(images)} images")
    ids = tokenize(turns[1][0] + "\n", tok).ids
    return [IMAGE_ID] + ids, [IGNORE] + ids


def encode_prompt(turns: list[str | list[str]], tok: Tokenizer, image: int) -> list[int]:
    """[question, answer, ..., question] -> the ids that the answer follows, exactly as in training.

    image: the number of images. Their places are found as in training (place_images), or given by breaking a question
    into pieces. Several images that have none go in front of the first question, a line each.
    """
    turns = [list(turn) if isinstance(turn, list) else [turn] for turn in turns]
    if image > 1 and not any(len(turn) > 1 or IMAGE in turn[0] for turn in turns[::2]):
        turns[0] = [f"{IMAGE}\n" * image + turns[0][0]]
    if len(turns) % 2:
        problem = place_images(turns, image)
    else:
        problem = f"a prompt ends with a question: expected an odd number of turns, found {len(turns)}"
    if problem:
        raise ValueError(problem)
    ids, _ = encode_turns(turns, tok)
    return ids


def expand(ids: list[int], labels: list[int] | None, n_patches: int,
           block_size: int) -> tuple[list[int], list[int] | None]:
    """Expand every image slot to n_patches times IMAGE_ID, then truncate on the right to block_size.

    labels=None marks a prompt. ValueError where truncation would cut an image, or any prompt, which would lose its
    question.
    """
    slots = [i for i, token in enumerate(ids) if token == IMAGE_ID]
    added = len(slots) * (n_patches - 1)
    problem = ""
    if slots and slots[-1] + 1 + added > block_size:
        problem = f"image does not fit: the last one ends at position {slots[-1] + 1 + added} of {block_size}"
    elif labels is None and len(ids) + added > block_size:
        problem = f"prompt too long: {len(ids) + added} positions, the model has {block_size}"
    if problem:
        raise ValueError(problem)
    for slot in reversed(slots):
        ids = ids[:slot] + [IMAGE_ID] * n_patches + ids[slot + 1:]
        if labels is not None:
            labels = labels[:slot] + [IGNORE] * n_patches + labels[slot + 1:]
    return ids[:block_size], labels and labels[:block_size]


def collate(samples: list[Sample], image_size: int = 336) -> Batch:
    """Pack samples into a single row without padding; `lengths` separates them.

    image_size is only needed for the shape of `images` when there are none.
    """
    # In numpy: a long list becomes a tensor in a third of the time, and torch's nonzero takes five times as long.
    ids = np.array(list(chain(*(s.ids for s in samples))), dtype=np.int64)                     # (T,)
    labels = np.array(list(chain(*(s.labels for s in samples))), dtype=np.int64)               # (T,)
    lengths = np.array([len(s.ids) for s in samples], dtype=np.int64)                          # (B,)
    # A token is predicted at the position before it. For a sample's first token, that position belongs to another
    # sample, which must not learn to predict it.
    first = lengths.cumsum(0) - lengths
    labels[first] = IGNORE
    loss_positions = np.flatnonzero(labels[1:] != IGNORE)                                      # (M,)
    targets = labels[loss_positions + 1]                                                       # (M,)
    image_positions = np.flatnonzero(ids == IMAGE_ID)                                          # (N * P,)
    ids[image_positions] = 0            # any valid id: the embedding looks it up, then the patch takes its place
    images = [s.image if s.image.dim() == 4 else s.image[None] for s in samples if s.image is not None]
    pixels = torch.cat(images) if images else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    fits = len(image_positions) % len(pixels) == 0 if images else len(image_positions) == 0
    assert fits, f"{len(image_positions)} image positions for {len(pixels)} images"
    ids, lengths, *positions_and_targets = map(torch.from_numpy, (ids, lengths, image_positions, loss_positions,
                                                                  targets))
    return Batch(ids, lengths, pixels, *positions_and_targets)

# ---------------------------------------------------------------------------------------------------
# Dataset


class Index(NamedTuple):
    """What the schedule needs to know about all n records. A bad one counts as a single unsupervised position."""
    ranges: np.ndarray              # (n, 2) int64, byte ranges in the file
    length: np.ndarray              # (n,) int32 like the rest: positions, image expanded, truncated to block_size
    supervised: np.ndarray          # supervised tokens
    image: np.ndarray               # number of images
    cut: np.ndarray                 # positions lost to truncation
    notes: np.ndarray               # a bit for each of lib/records.py's NOTES


@dataclass(eq=False)
class Dataset:
    """A json list or jsonl of conversations. OSError or ValueError if the file is not there or not one.

    Each record goes through `prepare` once for the index, which needs its length, and again whenever it is sampled. The
    index does not keep the ids: for the 665K records of stage 2 they would add a second gigabyte to every run's folder,
    to save 0.3 ms per sample next to the 6 ms that its image takes.
    """
    path: Path
    image_dir: Path | list[Path]    # a folder or an archive, or several, see lib/archives.py
    tok: Tokenizer
    template: str                   # plain or v0, see encode
    image_config: ImageConfig
    block_size: int                 # most positions of a sample
    _: KW_ONLY
    on_bad_sample: str = "stop"     # raise at the first; "skip": replace it with an unsupervised sample
    cache_dir: Path | None = None   # where the index and the list of bad samples are written, if anywhere
    follow_links: bool = False      # allow links that lead out of image_dir
    shares = ()                     # of the files of a Mixture

    def __post_init__(self):
        if not self.path.is_file():
            raise FileNotFoundError(f"no data at {self.path} (--data): expected a json or jsonl file of records; "
                                    "docs/data.md says where the published ones are")
        first = next(find_records(self.path), None)
        begin = self.read(first) if first else b""
        if b'"conversations"' not in begin and b'"messages"' not in begin:
            found = f"found {begin[:80]!r}" if first else "it has no records"
            raise ValueError(f"{self.path} is not LLaVA's json: expected records with \"conversations\" or "
                             f"\"messages\", {found}")

    def __setstate__(self, state: dict) -> None:
        """Unpickle in a worker process. Pickling a tokenizer loses encode_special_tokens."""
        self.__dict__.update(state)
        self.tok.encode_special_tokens = True

    def __len__(self) -> int:
        return len(self.index.length)

    @cached_property
    def checksum(self) -> str:
        return sha256(self.path)

    @cached_property
    def pictures(self) -> Pictures:
        places = self.image_dir if isinstance(self.image_dir, list) else [self.image_dir]
        return Pictures(places, self.follow_links, self.cache_dir)

    @cached_property
    def index(self) -> Index:
        """Read from cache_dir if it was built for this json, tokenizer and template; otherwise built and cached there.

        No lock is needed: a run has locked its folder, and process 0 builds the index before the others read it.
        """
        key = [self.checksum, self.tok.to_str(), self.template, self.image_config.n_patches, self.block_size,
               self.on_bad_sample]
        return Index(**cached_arrays(self.cache_dir, "index", key, Index._fields, lambda: self.make_index()._asdict()))

    def make_index(self) -> Index:
        ranges = self.find_ranges()
        workers = os.cpu_count() if len(ranges) > 2000 else 0           # a small file is done before workers start
        numbers = np.zeros((5, len(ranges)), dtype=np.int32)
        for i, (problem, row) in enumerate(self.map_records(self.measure, ranges, workers)):
            if problem and self.on_bad_sample == "stop":
                raise self.sample_error(ranges[i].tolist(), problem)
            numbers[:, i] = row
        return Index(ranges, *numbers)

    def find_ranges(self) -> np.ndarray:
        return np.fromiter(find_records(self.path), dtype=np.dtype((np.int64, 2)))          # (n, 2)

    def map_records(self, function: Callable, ranges: np.ndarray, workers: int) -> Iterator:
        """function(byte range) of every record, in order, in worker processes, with a progress bar."""
        results = map_in_workers(function, ranges.tolist(), workers, chunk=256)
        return iter(tqdm(results, self.path.name, len(ranges), unit=" records", disable=None, leave=False))

    def measure(self, span: tuple[int, int]) -> tuple[str, tuple]:
        """What is wrong with a record, so that the caller can say which it is, and its row of the index."""
        try:
            *_, row = self.prepare(span)
            return "", row
        except ValueError as e:
            return str(e), (1, 0, 0, 0, 0)

    def prepare(self, span: tuple[int, int]) -> tuple[dict, list[str], list[int], list[int], tuple]:
        """Parse, apply the template, tokenize, expand -> the record, its images' names, ids, labels, row of the index.

        ValueError says what is wrong with the record.
        """
        record = parse_record(self.read(span))
        _, images, notes = conversation_of(record)
        ids, labels = encode(record, self.tok, self.template)
        n_patches = self.image_config.n_patches
        full_length = len(ids) + len(images) * (n_patches - 1)
        ids, labels = expand(ids, labels, n_patches, self.block_size)
        row = len(ids), len(labels) - labels.count(IGNORE), len(images), full_length - len(ids), notes
        return record, images, ids, labels, row

    def sample(self, i: int) -> Sample:
        """Record i. ValueError names its id and line, what is wrong, and the command that finds every bad sample."""
        span = self.index.ranges[i].tolist()
        try:
            record, names, ids, labels, _ = self.prepare(span)
            images = [load_image(self.pictures.open(name), self.image_config) for name in names]
        except (ValueError, OSError) as e:
            raise self.sample_error(span, e) from e
        return Sample(str(record.get("id", i)), ids, labels, torch.stack(images).squeeze(0) if images else None)

    def read(self, span: tuple[int, int]) -> bytes:
        start, end = span
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def sample_error(self, span: tuple[int, int], problem: object) -> ValueError:
        try:
            [line] = lines_of(self.path, [span[0]])
            where = f"sample {id_of(self.read(span))}, line {line} of {self.path}"
        except OSError:                                     # it is the file itself that has gone
            where = f"a sample of {self.path}"
        places = " ".join(map(str, self.pictures.places)) or "."
        return ValueError(f"{where}: {problem}; "
                          f"to see every bad sample: python data.py check --data {self.path} --images {places}")

    def summary(self) -> str:
        """A line for the log, with counts of truncated samples and of those without a supervised token, then notes."""
        index = self.index
        n_cut = (index.cut > 0).sum()
        n_useless = (index.supervised == 0).sum()
        n_with = (index.image > 0).sum()
        where = f" from {self.pictures}" if n_with else ""
        lines = [f"{plural(len(self), 'sample')}, {n_with:,} with an image{where}, {index.length.mean():.0f} positions "
                 f"each; {n_cut:,} cut at {self.block_size}, {n_useless:,} without anything to learn"]
        for bit, note in enumerate(NOTES):
            if n := (index.notes >> bit & 1).sum():
                lines.append(f"note: {plural(n, 'sample')}: {note}")
        return "\n".join(lines)

# ---------------------------------------------------------------------------------------------------
# Loader: worker processes prepare the scheduled micro-batches ahead of training


class Step(NamedTuple):
    """What one rank needs for one training step."""
    step: int
    sample_ids: list[int]           # of all ranks: record numbers, from 0
    batches: list[Batch]            # this rank's micro-batches


@dataclass(eq=False)
class Loader:
    """The steps start_step, ..., steps - 1 of one rank. They depend on (seed, step) only: to resume is to start later.

    Each worker keeps up to four micro-batches ready in shared memory (/dev/shm).
    Raises ValueError at a bad sample or, if the dataset skips those, when there are too many.
    """
    dataset: Dataset | Mixture
    _: KW_ONLY
    global_batch: int               # samples
    micro_tokens: int               # most tokens in a micro-batch, limited by the GPU's memory
    rank: int
    world: int
    seed: int
    steps: int
    start_step: int = 0
    workers: int = 0
    group: str = "none"
    pin: bool = False
    picture_cost: float = 0.0       # compute cost of an image, in tokens; to balance micro-batches

    def __iter__(self) -> Iterator[Step]:
        self.dataset.pictures                               # opened before the workers start, so that they share it
        bad_samples = BadSamples(self.dataset.cache_dir, self.dataset.checksum, len(self.dataset))
        steps, steps_ahead = tee(self.schedule())           # workers draw from it some steps ahead of training
        micro_batches = chain.from_iterable(micro_batches for _, _, micro_batches in steps_ahead)
        results = map_in_workers(self.make_batch, micro_batches, self.workers, self.pin)
        for step, sample_ids, micro_batches in steps:
            batches, problems = zip(*islice(results, len(micro_batches)))
            for problem in chain.from_iterable(problems):
                if self.dataset.on_bad_sample == "stop":
                    raise ValueError(problem["problem"])
                bad_samples.add(problem)
            yield Step(step, sample_ids, list(batches))

    def schedule(self) -> Iterator[tuple[int, list[int], list[list[int]]]]:
        """Yield each step, its samples, and those of each micro-batch of this rank."""
        index = self.dataset.index
        order = lru_cache(maxsize=1)(partial(               # computed once per epoch, not once per step
            epoch_order, self.seed, index.length, index.image, self.global_batch, self.group,
            shares=self.dataset.shares))
        for step in range(self.start_step, self.steps):
            sample_ids = step_samples(step, len(self.dataset), self.global_batch, order)
            lengths = index.length[sample_ids]
            costs = lengths + self.picture_cost * index.image[sample_ids]
            mine = split_step(lengths.tolist(), costs.tolist(), self.world, self.micro_tokens)[self.rank]
            micro_batches = [[sample_ids[i] for i in micro] for micro in mine]
            if self.dataset.shares:
                micro_batches = [sorted(micro) for micro in micro_batches]      # file by file, for Batch.split
            yield step, sample_ids, micro_batches

    def make_batch(self, sample_ids: list[int]) -> tuple[Batch, list[dict]]:
        """Build a micro-batch, in a worker. Problems with its samples are returned, for the main process to count."""
        nothing = Sample("", [eot_id(self.dataset.tok)], [IGNORE], None)        # a single unsupervised position
        samples = []
        problems = []
        for i in sample_ids:
            try:
                samples.append(self.dataset.sample(i))
            except ValueError as e:
                samples.append(nothing)
                problems.append({"sample": i, "data": str(self.dataset.path), "problem": str(e)})
                if self.dataset.on_bad_sample == "stop":
                    break
        batch = collate(samples or [nothing], self.dataset.image_config.size)
        if self.dataset.shares:
            batch = batch._replace(split=split_by_file(batch, sample_ids, self.dataset.shares))
        return batch, problems


def main(args: Namespace) -> int:
    from lib import check_data, convert, show           # imported here because they are built on this file
    return {"check": check_data.check_data, "convert": convert.convert, "show": show.show_data}[args.command](args)


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
