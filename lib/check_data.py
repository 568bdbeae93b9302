"""`python data.py check`: find every bad sample before a GPU is used."""
import hashlib
import json
from argparse import Namespace
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data import Dataset, ImageConfig, load_tokenizer
from lib.common import plural, read_json, replacing, visible
from lib.folders import open_weights
from lib.pictures import open_rgb
from lib.recipes import RECIPES, recipe_note
from lib.records import NOTES, id_of, lines_of
from lib.schedule import steps_per_epoch
from model import MIPHA_CONFIG, LLaVAConfig

DEMO_TOKENIZER = Path(__file__).parent.parent / "demo" / "phi"          # with which all but the lengths can be checked


def check_data(args: Namespace) -> int:
    """Check every record as training would read it -> exit code: 0 if all are good, 1 if something is wrong."""
    if args.write_clean and args.write_clean.resolve() == args.data.resolve():
        raise ValueError(f"--write-clean {args.write_clean} would overwrite the data it is made from")
    has_tokenizer = args.tokenizer.exists()
    tok = load_tokenizer(args.tokenizer if has_tokenizer else DEMO_TOKENIZER)
    image_config, block_size = sizes_to_check(args)
    if not has_tokenizer:
        block_size = 1 << 30                                # the demo's tokens are shorter: nothing may seem too long
    try:
        dataset = dataset_to_check(args, tok, image_config, block_size)
        ranges = dataset.find_ranges()
    except ValueError as e:                                 # the file as a whole is unusable
        print(e)
        return 1
    problems, folders, rows = inspect_records(dataset, ranges, args)
    length, supervised, image, cut, notes, id_hash = rows
    good = np.ones(len(ranges), dtype=bool)
    good[list(problems)] = False
    n_image = (image[good] > 0).sum()
    print(f"{args.data}: {plural(len(ranges), 'record')}: {n_image:,} with an image, {good.sum() - n_image:,} of text "
          f"only, {len(problems):,} bad")
    print_headings(dataset, ranges, problems, notes, cut, args.show)
    print(f"\nids that were used before: {good.sum() - len(np.unique(id_hash[good])):,}")
    print(visible("image folders: " + ", ".join(f"{folder} {n:,}" for folder, n in folders.most_common(20))))
    if not has_tokenizer and good.any():
        print(f"no lengths: there is no tokenizer at {args.tokenizer}; --model FOLDER takes that of the model to be "
              "trained, and its sizes")
    elif good.any():
        print_lengths(length[good], supervised[good].sum())
        global_batch = RECIPES[args.recipe][args.stage]["global_batch"]
        steps = steps_per_epoch(good.sum(), global_batch)
        print(f"{args.stage}: {plural(steps, 'step')} of {plural(global_batch, 'sample')} an epoch")
    if args.write_clean:
        write_clean(args.write_clean, dataset, ranges, problems)
    return 1 if problems else 0


def sizes_to_check(args: Namespace) -> tuple[ImageConfig, int]:
    """Preprocessing and block size: from the flags, else those of the model to be trained, else LLaVA-Phi's.

    --tokenizer names a model, too, if there is a vision tower in its folder.
    """
    folders = args.model or []
    config_file = args.tokenizer / "config.json"
    if not folders and config_file.is_file() and "vision_config" in read_json(config_file):
        folders = [args.tokenizer]
    from_model = folders and None in (args.image_size, args.n_patches, args.max_length)
    config = MIPHA_CONFIG if args.recipe == "mipha" else LLaVAConfig()
    if from_model:
        config = open_weights(*folders).config
        if note := recipe_note(not config.vision.class_token, args.recipe):
            print(note)
    image = ImageConfig.of(config.vision, args.image_mode or RECIPES[args.recipe][args.stage]["image_mode"])
    block_size = min(2048, config.llm.block_size)
    if from_model:
        print(f"{' and '.join(map(str, folders))}: pictures of {image.size} pixels are {image.n_patches} positions, "
              f"samples have up to {block_size}")
    image = image._replace(size=args.image_size or image.size, n_patches=args.n_patches or image.n_patches)
    return image, args.max_length or block_size


def dataset_to_check(args: Namespace, tok: Tokenizer, image_config: ImageConfig, block_size: int) -> Dataset:
    return Dataset(args.data, args.images, tok, RECIPES[args.recipe][args.stage]["template"], image_config, block_size,
                   follow_links=args.follow_links)

# ---------------------------------------------------------------------------------------------------
# The records, in worker processes


def inspect_records(dataset: Dataset, ranges: np.ndarray, args: Namespace) -> tuple[dict, Counter, np.ndarray]:
    """What is wrong (record number -> problem), how many images are in which folder, and a row for each record."""
    dataset.pictures                                        # opened before the workers start, so that they share it
    problems = {}
    folders = Counter()
    rows = np.zeros((6, len(ranges)), dtype=np.int64)
    inspected = dataset.map_records(partial(inspect_record, dataset, args.decode), ranges, args.workers)
    for i, (problem, folder, row) in enumerate(inspected):
        rows[:, i] = row
        if problem:
            problems[i] = problem
        elif folder:
            folders[folder] += 1
    return problems, folders, rows


def inspect_record(dataset: Dataset, decode: str, span: tuple[int, int]) -> tuple[str, str, tuple]:
    """What `Dataset.sample` would find wrong ("kind: detail", or ""), the image's folder, and a row of numbers.

    That is the record's row of the index, and a hash of its id, to find duplicates. decode: "full" decodes the image,
    "header" only reads its size.
    """
    size, mode, *_ = dataset.image_config
    try:
        record, images, _, _, row = dataset.prepare(span)
        for name in images:
            open_rgb(dataset.pictures.open(name), size, mode, decode == "full")
    except (ValueError, OSError) as e:
        return str(e), "", (1, 0, 0, 0, 0, 0)
    problem = folder = ""
    if row[1] == 0:
        problem = f"nothing to learn: no answer in the first {dataset.block_size} positions"
    if images:
        folder = "in the records" if images[0].startswith("data:") else str(Path(images[0]).parent)
    id_hash = hashlib.blake2b(json.dumps(record.get("id", span)).encode(), digest_size=7).digest()
    return problem, folder, (*row, int.from_bytes(id_hash))

# ---------------------------------------------------------------------------------------------------
# What is said about them


def print_headings(dataset: Dataset, ranges: np.ndarray, problems: dict[int, str], notes: np.ndarray, cut: np.ndarray,
                   show: int) -> None:
    """For each bad or odd kind of record: how many there are, and line and id of the first `show`."""
    found = defaultdict(list)                               # heading -> record numbers
    for i, problem in problems.items():
        found[f"bad: {problem.split(':')[0]}"].append(i)
    for bit, note in enumerate(NOTES):
        found[f"worth knowing: {note}"] = np.flatnonzero(notes >> bit & 1).tolist()
    found["worth knowing: answer cut at the end"] = np.flatnonzero(cut).tolist()
    for heading, records in sorted(found.items()):
        if records:
            print(f"\n{heading}: {len(records):,}")
        shown = records[:show]
        for i, line in zip(shown, lines_of(dataset.path, ranges[shown, 0].tolist())):
            id = id_of(dataset.read(ranges[i]))
            print(visible(f"    line {line}, id {id} {problems.get(i, '')[:200]}").rstrip())


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
