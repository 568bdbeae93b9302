"""`python data.py check`: find every bad sample before a GPU is used."""
import hashlib
import json
from argparse import Namespace
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import EOT, IGNORE, Dataset, ImageConfig, load_tokenizer
from lib.common import plural, read_json, replacing, visible
from lib.folders import open_weights
from lib.pictures import open_rgb
from lib.recipes import RECIPES, recipe_note
from lib.records import NOTES, id_of, lines_of, notes_on
from lib.schedule import steps_per_epoch
from model import MIPHA_CONFIG, LLaVAConfig


def check_data(args: Namespace) -> int:
    """Check every record as training would read it -> exit code: 0 if all are good, 1 if something is wrong."""
    recipe = RECIPES[args.recipe][args.stage]
    if args.write_clean and args.write_clean.resolve() == args.data.resolve():
        raise ValueError(f"--write-clean {args.write_clean} would overwrite the data it is made from")
    image_config, block_size = sizes_to_check(args, args.image_mode or recipe["image_mode"])
    has_tokenizer = args.tokenizer.exists()
    if has_tokenizer:
        tok = load_tokenizer(args.tokenizer)
    else:
        tok = bytes_as_tokens()
        block_size = 1 << 30                                # more bytes than tokens: nothing may seem too long
    try:
        dataset = Dataset(args.data, args.images, tok, recipe["template"], image_config, block_size,
                          follow_links=args.follow_links)
        ranges = dataset.find_ranges()
    except ValueError as e:                                 # the file as a whole is unusable
        print(e)
        return 1
    dataset.pictures                                        # opened before the workers start, so that they share it

    survey = Survey(len(ranges))
    inspected = dataset.map_records(partial(inspect_record, dataset, args.decode), ranges, args.workers)
    for i, info in enumerate(inspected):
        survey.add(i, info, block_size)
    print_records(survey, dataset, ranges, args.show)
    if not has_tokenizer and survey.good.any():
        print(f"no lengths: there is no tokenizer at {args.tokenizer}; --model FOLDER takes that of the model to be "
              "trained, and its sizes")
    elif survey.good.any():
        print_lengths(survey.length[survey.good], survey.supervised[survey.good].sum())
        global_batch = recipe["global_batch"]
        steps = steps_per_epoch(survey.good.sum(), global_batch)
        print(f"{args.stage}: {plural(steps, 'step')} of {plural(global_batch, 'sample')} an epoch")
    if args.write_clean:
        write_clean(args.write_clean, dataset, ranges, survey.problems)
    return 1 if survey.problems else 0


def sizes_to_check(args: Namespace, mode: str) -> tuple[ImageConfig, int]:
    """Preprocessing and block size: from the flags, else those of the model to be trained, else LLaVA-Phi's.

    --tokenizer names a model, too, if there is a vision tower in its folder.
    """
    folders = args.model or []
    config_file = args.tokenizer / "config.json"
    if not folders and config_file.is_file() and "vision_config" in read_json(config_file):
        folders = [args.tokenizer]
    given = (args.image_size, args.n_patches, args.max_length)
    config = MIPHA_CONFIG if args.recipe == "mipha" else LLaVAConfig()
    if folders and None in given:
        config = open_weights(*folders).config
        note = recipe_note(not config.vision.class_token, args.recipe)
        if note:
            print(note)
    image = ImageConfig.of(config.vision, mode)
    block_size = min(2048, config.llm.block_size)
    if folders and None in given:
        print(f"{' and '.join(map(str, folders))}: pictures of {image.size} pixels are {image.n_patches} positions, "
              f"samples have up to {block_size}")
    image = image._replace(size=args.image_size or image.size, n_patches=args.n_patches or image.n_patches)
    return image, args.max_length or block_size


def bytes_as_tokens() -> Tokenizer:
    """A stand-in if no tokenizer was downloaded: with one token per byte, all but the lengths can be checked."""
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), EOT]
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok

# ---------------------------------------------------------------------------------------------------
# One record, in a worker


class RecordInfo(NamedTuple):
    """What the check learns from one record."""
    length: int = 1                 # positions: image expanded, truncated to block_size
    supervised: int = 0             # supervised tokens
    image: bool = False
    cut: int = 0                    # positions lost to truncation
    problem: str = ""               # "kind: detail", empty if there is none
    notes: int = 0                  # not wrong, but worth knowing: a bit for each of lib/records.py's NOTES
    id_hash: int = 0                # of the record's "id", to find duplicates
    folder: str = ""                # of its image


def inspect_record(dataset: Dataset, decode: str, span: tuple[int, int]) -> RecordInfo:
    """Find what `Dataset.sample` would. decode: "full" decodes the image, "header" only reads its size."""
    try:
        record, images, ids, labels, cut = dataset.prepare(span)
        size, mode, *_ = dataset.image_config
        for name in images:
            open_rgb(dataset.pictures.open(name), size, mode, decode == "full")
        id_hash = hashlib.blake2b(json.dumps(record.get("id", span)).encode(), digest_size=7)
    except (ValueError, OSError) as e:
        return RecordInfo(problem=str(e))
    return RecordInfo(
        length=len(ids),
        supervised=len(labels) - labels.count(IGNORE),
        image=bool(images),
        cut=cut,
        notes=notes_on(record, len(images)),
        id_hash=int.from_bytes(id_hash.digest()),
        folder=folder_of(images[0]) if images else "",
    )


def folder_of(image: str) -> str:
    return "in the records" if image.startswith("data:") else str(Path(image).parent)

# ---------------------------------------------------------------------------------------------------
# All records


class Survey:
    """The findings of a check on n records."""

    def __init__(self, n: int):
        self.length = np.zeros(n, dtype=np.int64)
        self.supervised = np.zeros(n, dtype=np.int64)
        self.image = np.zeros(n, dtype=bool)
        self.id_hash = np.zeros(n, dtype=np.int64)
        self.good = np.ones(n, dtype=bool)
        self.problems: dict[int, str] = {}                              # record number -> what is wrong
        self.headings: dict[str, list[int]] = defaultdict(list)         # "bad: kind" or "worth knowing: note"
        self.image_folders = Counter()

    def add(self, i: int, info: RecordInfo, block_size: int) -> None:
        self.length[i] = info.length
        self.supervised[i] = info.supervised
        self.image[i] = info.image
        self.id_hash[i] = info.id_hash
        problem = info.problem
        if not problem and info.supervised == 0:
            problem = f"nothing to learn: no answer in the first {block_size} positions"
        if problem:
            self.good[i] = False
            self.problems[i] = problem
            kind = problem.split(":")[0]
            self.headings[f"bad: {kind}"].append(i)
        elif info.image:
            self.image_folders[info.folder] += 1
        for bit, note in enumerate(NOTES):
            if info.notes >> bit & 1:
                self.headings[f"worth knowing: {note}"].append(i)
        if info.cut > 0:
            self.headings["worth knowing: answer cut at the end"].append(i)


def print_records(survey: Survey, dataset: Dataset, ranges: np.ndarray, show: int) -> None:
    """Print counts by kind, and line and id of the first `show` records of each bad or odd kind."""
    n_image = survey.image[survey.good].sum()
    n_text = survey.good.sum() - n_image
    print(f"{dataset.path}: {plural(len(ranges), 'record')}: {n_image:,} with an image, {n_text:,} of text only, "
          f"{len(survey.problems):,} bad")
    for heading, records in sorted(survey.headings.items()):
        print(f"\n{heading}: {len(records):,}")
        shown = records[:show]
        lines = lines_of(dataset.path, ranges[shown, 0].tolist())
        for i, line in zip(shown, lines):
            id = id_of(dataset.read(ranges[i]))
            print(visible(f"    line {line}, id {id} {survey.problems.get(i, '')[:200]}").rstrip())
    good_ids = survey.id_hash[survey.good]
    print(f"\nids that were used before: {len(good_ids) - len(np.unique(good_ids)):,}")
    folders = [f"{folder} {n:,}" for folder, n in survey.image_folders.most_common(20)]
    print(visible("image folders: " + ", ".join(folders)))


def print_lengths(length: np.ndarray, supervised: int) -> None:
    """Print length percentiles, a histogram, and the fraction of supervised positions."""
    percentiles = [f"{q} % have up to {np.percentile(length, q):.0f}" for q in (50, 90, 99, 100)]
    print(f"positions: {length.sum():,}, {length.mean():.0f} a sample; " + ", ".join(percentiles))
    spread = int(length.max() - length.min())
    if spread > 0:
        counts, edges = np.histogram(length, bins=min(8, spread))
        for count, low, high in zip(counts, edges, edges[1:]):
            bar = "#" * round(40 * count / counts.max())
            print(f"    {low:6.0f} to {high:6.0f} {count:9,} {bar}")
    print(f"supervised: {supervised:,} tokens, {100 * supervised / length.sum():.1f} % of all positions")


def write_clean(path: Path, dataset: Dataset, ranges: np.ndarray, problems: dict[int, str]) -> None:
    """Write the good records, byte for byte, as a json list; next to it the bad ones, with their problems."""
    rejects = path.with_suffix(".rejects.jsonl")
    separator = b"\n"
    with replacing(path) as part, open(part, "wb") as clean, open(rejects, "w", encoding="utf-8") as bad:
        clean.write(b"[")
        for i, span in enumerate(ranges.tolist()):
            record = dataset.read(span)
            if i in problems:
                line = {"problem": problems[i], "record": record.decode("utf-8", "replace")}
                bad.write(json.dumps(line) + "\n")
            else:
                clean.write(separator + record.removeprefix(b"\xef\xbb\xbf").strip())    # a file's byte order mark
                separator = b",\n"
        clean.write(b"\n]\n")
    print(f"wrote {path} ({plural(len(ranges) - len(problems), 'record')}) and {rejects} ({len(problems):,})")
