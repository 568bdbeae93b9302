"""`python data.py check`: every bad sample, before a GPU is used."""
import json
import os
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import EOT, Dataset, RecordInfo, lines_of, load_tokenizer, steps_per_epoch
from lib.common import read_json
from lib.recipes import RECIPES


def bytes_as_tokens() -> Tokenizer:
    """A stand-in where no tokenizer was downloaded: with one token a byte, all but the lengths can be checked."""
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), EOT]
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok


class Survey:
    """All that a check finds out about n records."""

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
        for note in info.notes:
            self.headings[f"worth knowing: {note}"].append(i)
        if info.cut > 0:
            self.headings["worth knowing: answer cut at the end"].append(i)


def sizes_to_check(args: Namespace) -> tuple[int, int, int]:
    """Picture size in pixels, positions of a picture, positions of a sample: as the model has them that is trained.

    Flags come first, then the model's config, then the sizes of LLaVA-Phi. --tokenizer names a model too if there is
    a vision tower in that folder.
    """
    folders = args.model or []
    config_file = args.tokenizer / "config.json"
    if not folders and config_file.is_file() and "vision_config" in read_json(config_file):
        folders = [args.tokenizer]
    image_size, n_patches, block_size = 336, 576, 2048
    given = (args.image_size, args.n_patches, args.max_length)
    if folders and None in given:
        from lib.folders import open_weights  # imports torch and the model
        config = open_weights(*folders).config
        image_size = config.vision.image_size
        n_patches = config.vision.n_patches
        block_size = min(block_size, config.llm.block_size)
        print(f"{' and '.join(map(str, folders))}: pictures of {image_size} pixels are {n_patches} positions, "
              f"samples have up to {block_size}")
    return args.image_size or image_size, args.n_patches or n_patches, args.max_length or block_size


def check_data(args: Namespace) -> int:
    """Look at every record as training would -> exit code: 0 all is well, 1 something is wrong."""
    recipe = RECIPES[args.recipe][args.stage]
    if not args.images.is_dir():
        raise FileNotFoundError(f"no image folder at {args.images} (--images)")
    if args.write_clean and args.write_clean.resolve() == args.data.resolve():
        raise ValueError(f"--write-clean {args.write_clean} would overwrite the data it is made from")
    image_size, n_patches, block_size = sizes_to_check(args)
    has_tokenizer = args.tokenizer.exists()
    if has_tokenizer:
        tok = load_tokenizer(args.tokenizer)
    else:
        tok = bytes_as_tokens()
        block_size = 1 << 30                                # bytes are more than tokens: nothing must seem too long
    try:
        dataset = Dataset(args.data, args.images, tok, recipe["template"], image_size,
                          args.image_mode or recipe["image_mode"], n_patches, block_size,
                          follow_links=args.follow_links)
        ranges = dataset.find_ranges()
    except ValueError as e:                                 # the file as a whole is what is wrong
        print(e)
        return 1

    survey = Survey(len(ranges))
    for i, info in enumerate(dataset.inspect_all(ranges, args.decode, args.workers)):
        survey.add(i, info, block_size)
    print_records(survey, dataset, ranges, args.show)
    if not has_tokenizer and survey.good.any():
        print(f"no lengths: there is no tokenizer at {args.tokenizer} (--tokenizer)")
    elif survey.good.any():
        print_lengths(survey.length[survey.good], survey.supervised[survey.good].sum())
        global_batch = recipe["global_batch"]
        steps = steps_per_epoch(survey.good.sum(), global_batch)
        print(f"{args.stage}: {steps:,} steps of {global_batch} samples an epoch")
    if args.write_clean:
        write_clean(args.write_clean, dataset, ranges, survey.problems)
    return 1 if survey.problems else 0


def print_records(survey: Survey, dataset: Dataset, ranges: np.ndarray, show: int) -> None:
    """How many records there are of each kind, and the first `show` of every bad or odd kind by line and id."""
    n_image = survey.image[survey.good].sum()
    n_text = survey.good.sum() - n_image
    print(f"{dataset.path}: {len(ranges):,} records: {n_image:,} with an image, {n_text:,} of text only, "
          f"{len(survey.problems):,} bad")
    for heading, records in sorted(survey.headings.items()):
        print(f"\n{heading}: {len(records):,}")
        shown = records[:show]
        lines = lines_of(dataset.path, ranges[shown, 0].tolist())
        for i, line in zip(shown, lines):
            print(f"    line {line}, id {dataset.name(ranges[i])} {survey.problems.get(i, '')[:200]}".rstrip())
    good_ids = survey.id_hash[survey.good]
    print(f"\nids that were used before: {len(good_ids) - len(np.unique(good_ids)):,}")
    folders = [f"{folder} {n:,}" for folder, n in survey.image_folders.most_common(20)]
    print("image folders: " + ", ".join(folders))


def print_lengths(length: np.ndarray, supervised: int) -> None:
    """How long the samples are, as numbers and as a histogram, and how much of them teaches."""
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
    """The good records, byte for byte, as a json list; beside it the bad ones with what is wrong with them."""
    rejects = path.with_suffix(".rejects.jsonl")
    part = path.with_name(path.name + ".part")              # takes its name when it is complete
    separator = b"\n"
    with open(part, "wb") as clean, open(rejects, "w", encoding="utf-8") as bad:
        clean.write(b"[")
        for i, span in enumerate(ranges.tolist()):
            record = dataset.read(span)
            if i in problems:
                line = {"problem": problems[i], "record": record.decode("utf-8", "replace")}
                bad.write(json.dumps(line) + "\n")
            else:
                clean.write(separator + record.strip())
                separator = b",\n"
        clean.write(b"\n]\n")
    os.replace(part, path)
    print(f"wrote {path} ({len(ranges) - len(problems):,} records) and {rejects} ({len(problems):,})")
