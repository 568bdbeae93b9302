"""Speed of the data path, next to transformers' image processor and to the original's way of making labels.

    $ python -m tests.bench.data                            # pixels, tokens, schedule: about a minute on one core
    $ python -m tests.bench.data --records 665298           # and the check and the index on that many synthetic records
    $ python -m tests.bench.data --members 558128           # only the same pictures from a folder, a zip and a tar

The comparisons are made in the same process, alternating, in CPU seconds of one thread. What needs transformers, or
Phi-2's tokenizer, is left out where they are not there.
"""
import argparse
import io
import json
import os
import platform
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import Process
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from data import (EOT, IGNORE, IMAGE, IMAGE_ID, SYSTEM, Dataset, ImageConfig, Index, Loader, Sample, encode, load_image,
                  load_tokenizer)
from lib.archives import Pictures
from lib.device import peak_memory
from lib.schedule import epoch_order, modality_order, split_step, step_samples
from vision import CLIP_L_336

ROOT = Path(__file__).resolve().parent.parent.parent


def medians(functions: dict[str, Callable], repeats: int = 15) -> dict[str, float]:
    """CPU seconds a call, each function in turn, so that a busy machine hits all of them alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def jpeg(w: int, h: int) -> bytes:
    """As hard to decode as a photo: smooth shapes and some grain."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (h // 32, w // 32, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
    grain = rng.normal(0, 6, (h, w, 3))
    out = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def bench_pixels() -> None:
    try:
        from transformers import CLIPImageProcessor
    except ImportError:
        CLIPImageProcessor = None
    for w, h in ((640, 480), (1024, 768)):
        raw = jpeg(w, h)
        for mode in ("crop", "pad"):
            functions = {"data.py": lambda: load_image(io.BytesIO(raw), ImageConfig.of(CLIP_L_336, mode))}
            if CLIPImageProcessor:
                processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
                functions["transformers"] = partial(theirs, processor, raw, mode)
                mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
                ours = (functions["data.py"]() / 255 - mean) / std
                assert torch.equal(ours, functions["transformers"]()), "the pictures differ"
            seconds = medians(functions)
            line = ", ".join(f"{name} {1 / s:.0f}/s" for name, s in seconds.items())
            ratio = f", ratio {seconds['transformers'] / seconds['data.py']:.2f}" if CLIPImageProcessor else ""
            print(f"pictures, JPEG {w} x {h} ({len(raw) // 1024} kB), {mode}: {line}{ratio}")


def theirs(processor, raw: bytes, mode: str) -> torch.Tensor:
    """What LLaVA does with a picture: RGB, expand2square for "pad", CLIPImageProcessor."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    if mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return processor(image, return_tensors="pt")["pixel_values"][0]


def talk(rng: random.Random, i: int) -> dict:
    """About as long as a record of the 665K mix: 270 tokens of text, one to six rounds; 6 % without a picture."""
    words = ("the a man woman street holding red umbrella with two dogs near water, which suggests that it is raining. "
             "There are several people in background and 3 cars.").split()
    turns = []
    for _ in range(rng.randint(1, 6)):
        turns.append({"from": "human", "value": " ".join(rng.choices(words, k=rng.randint(5, 25))) + "?"})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(words, k=rng.choice((1, 3, 30, 90))))})
    record = {"id": f"{i:09}", "conversations": turns}
    if rng.random() > 0.06:
        record["image"] = f"coco/train2017/{i % 40:03}.jpg"
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return record


def encode_as_the_original(record: dict, tok: Tokenizer, slow=None) -> tuple[list[int], list[int]]:
    """The way of LLaVA's preprocess_v0, written anew: render, tokenise the whole, then tokenise every round and every
    question again to learn their lengths, and mask by those."""
    def ids_of(text: str) -> list[int]:
        pieces = [slow(piece).input_ids if slow else tok.encode(piece).ids for piece in text.split(IMAGE)]
        return [i for k, piece in enumerate(pieces) for i in ([IMAGE_ID] if k else []) + piece]

    text = SYSTEM + " "
    for human, gpt in zip(record["conversations"][::2], record["conversations"][1::2]):
        text += f"USER: {human['value']} ASSISTANT: {gpt['value']}{EOT}"
    ids = ids_of(text)
    labels, at = list(ids), 0
    for part in text.split(EOT):
        if not part:
            break
        length, question = len(ids_of(part)) + 1, len(ids_of(part.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 1
        labels[at:at + question] = [IGNORE] * question
        at += length
    return ids, labels


def bench_tokens(folder: Path) -> None:
    rng = random.Random(0)
    records = [talk(rng, i) for i in range(400)]
    ours, plain = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for record in records:
        assert encode(record, ours, "v0") == encode_as_the_original(record, plain), record
    functions = {"data.py": lambda: [encode(r, ours, "v0") for r in records],
                 "the original's way, same tokenizer": lambda: [encode_as_the_original(r, plain) for r in records]}
    try:
        from transformers import AutoTokenizer
        slow = AutoTokenizer.from_pretrained(folder)
        functions["the original's way, transformers' tokenizer"] = lambda: [encode_as_the_original(r, plain, slow)
                                                                            for r in records]
    except ImportError:
        pass
    seconds = medians(functions, repeats=7)
    mean = np.mean([len(encode(r, ours, "v0")[0]) for r in records])
    print(f"conversations ({mean:.0f} tokens each): "
          + ", ".join(f"{name} {len(records) / s:,.0f}/s" for name, s in seconds.items()))
    print("    ratios " + ", ".join(f"{s / seconds['data.py']:.2f}" for s in list(seconds.values())[1:]))


# Samples, mean text tokens, spread, has a picture: what is known of the parts of the 665K mix, as log-normal lengths.
MIX = [(157_712, 275, .45, 1), (40_688, 1200, .55, 0), (82_783, 150, .30, 1), (72_140, 310, .40, 1),
       (8_998, 75, .10, 1), (80_000, 180, .35, 1), (66_160, 105, .12, 1), (21_953, 130, .35, 1), (48_447, 300, .45, 1),
       (86_417, 480, .35, 1)]


def mix_index() -> Index:
    rng = np.random.default_rng(0)
    text = np.concatenate([rng.lognormal(np.log(mean) - s * s / 2, s, n).clip(40) for n, mean, s, _ in MIX])
    image = np.concatenate([np.full(n, has, dtype=np.int32) for n, _, _, has in MIX])
    length = np.minimum(text + 576 * image, 2048).astype(np.int32)
    nothing = np.zeros(len(length), np.int32)
    return Index(np.zeros((len(length), 2), np.int64), length, length // 4, image, nothing, nothing)


def training_cost(length: int, has_image: int) -> float:
    """In tokens through Phi-2's linear layers; a picture through CLIP-L-336 costs as much as 73 of them."""
    return length + 73 * has_image


def dealt_out(run: list[int], lengths: np.ndarray, world: int) -> list[int]:
    """The original's order of a run, the longest first: each to the process that has the least so far and room."""
    if len(run) % world:
        return [i for rank in range(world) for i in run[rank::world]]
    hands = [[] for _ in range(world)]
    for i in run:
        open_hands = [hand for hand in hands if len(hand) < len(run) // world]
        min(open_hands, key=lambda hand: sum(lengths[j] for j in hand)).append(i)
    return sum(hands, [])


def bench_schedule() -> None:
    """Packed micro-batches hold no padding, so what is left to waste is the waiting of processes for each other."""
    index = mix_index()
    order = lru_cache(maxsize=1)(partial(epoch_order, 0, index.length, index.image, 128, "none"))
    for world in (1, 2, 8):
        tokens = work = waited = micros = 0
        start = time.perf_counter()
        for step in range(200):
            ids = step_samples(step, len(index.length), 128, order)
            length, image = index.length[ids].tolist(), index.image[ids].tolist()
            of_sample = [training_cost(*sample) for sample in zip(length, image)]
            for together in zip(*split_step(length, of_sample, world, 16384)):
                costs = [sum(of_sample[i] for i in micro) for micro in together]
                work, waited, micros = work + sum(costs), waited + world * max(costs), micros + world
            tokens += sum(length)
        ms = (time.perf_counter() - start) / 200 * 1e3
        print(f"schedule, {world} processes, 16,384 tokens: padding 0 %, waiting {1 - work / waited:.1%}, "
              f"micro-batches {tokens / micros / 16384:.0%} full, "
              f"{micros / 200 / world:.1f} a step and process, {ms:.1f} ms a step")
    order_of_runs = modality_order(index.length, index.image, 128, torch.Generator().manual_seed(0))
    grouped = [i for at in range(0, len(order_of_runs), 128)
               for i in dealt_out(order_of_runs[at:at + 128], index.length, 8)]
    for name, ids in (("random", order(0)), ("modality_length", grouped)):
        rows = index.length[ids][:len(ids) // 16 * 16].reshape(-1, 16)
        waste = 1 - rows.sum() / (16 * rows.max(1).sum())
        print(f"    the original, {name} batches of 16 on 8 processes: padding {waste:.1%}")


def bench_resume() -> None:
    """What stands between the start of the program and the first read of step 5000 of 665,298 samples."""
    class NoReading(Dataset):
        def __init__(self, index: Index):
            self.index, self.checksum, self.cache_dir, self.on_bad_sample = index, "", None, "stop"
            self.image_dir, self.follow_links = [], False
            self.image_config = ImageConfig.of(CLIP_L_336, "pad")
            self.tok = load_tokenizer(ROOT / "tests/golden/tiny-llava-phi")

        def sample(self, i: int) -> Sample:
            return Sample(str(i), [1], [IGNORE], None)

    dataset = NoReading(mix_index())
    for group in ("none", "modality_length"):
        start = time.perf_counter()
        step = next(iter(Loader(dataset, global_batch=128, micro_tokens=16384, rank=0, world=8, seed=1, steps=5198,
                                start_step=5000, group=group)))
        print(f"start at step {step.step} of 665,298 samples, group {group}: {time.perf_counter() - start:.2f} s")


def bench_records(n: int, tokenizer: Path) -> None:
    """The check and the index on n records, with every process's own share of memory added up."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), random.Random(0)
        (root / "coco/train2017").mkdir(parents=True)
        for i in range(40):
            (root / f"coco/train2017/{i:03}.jpg").write_bytes(jpeg(640, 480))
        with open(root / "data.json", "w") as f:
            f.writelines(("[" if i == 0 else ",\n") + json.dumps(talk(rng, i)) for i in range(n))
            f.write("]")
        size = (root / "data.json").stat().st_size / 1e6
        command = [sys.executable, ROOT / "data.py", "check", "--data", root / "data.json", "--images", root,
                   "--decode", "header", "--tokenizer", tokenizer]
        start, peak = time.perf_counter(), 0.0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        print(process.stdout.read())
        print(f"check of {n:,} records ({size:.0f} MB), headers only, {os.cpu_count()} workers: {seconds:.0f} s, "
              f"{n / seconds:,.0f} records/s, all processes {peak / 1e3:.2f} GB, exit code {process.returncode}")
        for how in ("made", "read again"):
            start = time.perf_counter()
            dataset = Dataset(root / "data.json", root, load_tokenizer(tokenizer), "v0",
                              ImageConfig.of(CLIP_L_336, "pad"), 2048, cache_dir=root / "out")
            next(iter(Loader(dataset, global_batch=128, micro_tokens=16384, rank=0, world=8, seed=1, steps=10**6,
                             start_step=5000)))
            print(f"index {how}, and the first micro-batches of step 5000: {time.perf_counter() - start:.1f} s")


def bench_archives(n: int) -> None:
    """Pictures a second from a folder, a zip and a tar; time and memory of the index of archives of n members.

    Only the first 200 members are pictures, which all three hold; the others are empty, since the index reads no data.
    """
    photos = [f"00000/{i:09}.jpg" for i in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        writer = Process(target=write_archives, args=(root, photos, n))     # whose memory is not ours
        writer.start()
        writer.join()
        places = {}
        for name in ("x", "x.zip", "x.tar"):
            before, start = peak_memory("cpu"), time.process_time()
            places[name] = Pictures([root / name], cache_dir=root / "out")
            seconds = time.process_time() - start
            grown = (peak_memory("cpu") - before) / 1e6
            start = time.process_time()
            Pictures([root / name], cache_dir=root / "out")
            print(f"{name}, {n:,} members: ready after {seconds:.1f} CPU s, peak memory {grown:+.0f} MB; from the "
                  f"cache after {time.process_time() - start:.2f} s")
        config = ImageConfig.of(CLIP_L_336, "pad")
        opened = medians({name: partial(open_all, place, photos) for name, place in places.items()})
        loaded = medians({name: partial(open_all, place, photos[:20], config) for name, place in places.items()})
        for name in places:
            print(f"{name}: opened and read {opened[name] / len(photos) * 1e6:.0f} us a picture; to pixels "
                  f"{20 / loaded[name]:.0f}/s")


def write_archives(root: Path, photos: list[str], n: int) -> None:
    picture = jpeg(640, 480)
    with zipfile.ZipFile(root / "x.zip", "w") as archive, tarfile.open(root / "x.tar", "w") as tape:
        for i in range(n):
            name, content = f"{i // 1000:05}/{i:09}.jpg", picture if i < len(photos) else b""
            archive.writestr(name, content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tape.addfile(member, io.BytesIO(content))
            tape.members = []                               # tarfile would keep them all
    for name in photos:
        (root / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "x" / name).write_bytes(picture)


def open_all(place: Pictures, names: list[str], config: ImageConfig | None = None) -> None:
    """Read the pictures' bytes, or with a config, their pixels."""
    for name in names:
        file = place.open(name)
        if config:
            load_image(file, config)
        else:
            file.read_bytes() if isinstance(file, Path) else file.read()


def memory_of(pid: int) -> float:
    """MB of a process and its children, shared pages counted once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = next(line for line in rollup if line.startswith("Pss:"))
        return int(own.split()[1]) / 1e3 + sum(memory_of(int(child)) for child in children)
    except (OSError, StopIteration):        # it has just ended
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "checkpoints/phi-2", help="Phi-2's")
    parser.add_argument("--records", type=int, default=0, help="synthetic records to run the check on")
    parser.add_argument("--members", type=int, default=0, help="members of the archives to read, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("transformers", "tokenizers", "pillow", "torch")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version_of(name)}" for name in names)
          + f", {os.cpu_count()} cores, one used")
    if args.members:
        bench_archives(args.members)
        return
    bench_pixels()
    if args.tokenizer.exists():
        bench_tokens(args.tokenizer)
    bench_schedule()
    bench_resume()
    if args.records:
        bench_records(args.records, args.tokenizer)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
