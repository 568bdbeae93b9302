"""Training speed side by side with transformers, in one process, on the same random weights. CPU.

$ python tests/bench/train.py                    # needs transformers 5 beside requirements.txt; about two minutes
$ python tests/bench/train.py --only C4 --threads 1

C1: one sample of 76 tokens, 16 of them a picture. C4: 16 samples of 60 to 200 tokens, one step. Both on the tiny model
(decoder 4 x 128, tower 4 x 64), a quarter of the tokens supervised, everything trained, fp32, AdamW included. On our
side train.py's own step. transformers gets its best: sdpa, right padding without a mask (causality hides the padding),
the optimizer fused, and the padded batch either whole or sorted by length and cut into four. First the losses must
agree, then all take turns. Memory is the growth of the process in a step, each side in a process of its own.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]      # train is train.py, not this file

import torch
import transformers
from generate import TINY, make_ours, make_theirs

import train
from data import IMAGE_ID, Sample, collate
from lib.recipes import parse
from vision import normalize

P = TINY.vision.n_patches


def samples_of(lengths: list[int]) -> list[Sample]:
    """20 tokens, a picture, words to the given length; the last quarter supervised."""
    g = torch.Generator().manual_seed(1)
    samples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(1, TINY.llm.vocab_size - 1, (n,), generator=g).tolist()
        ids[20:20 + P] = [IMAGE_ID] * P
        labels = [-100] * (n - n // 4) + ids[n - n // 4:]
        size = TINY.vision.image_size
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=g)
        samples.append(Sample(str(i), ids, labels, image))
    return samples


def our_step(samples: list[Sample]) -> Callable[[], float]:
    """-> a function that takes one step of train.py and gives its loss."""
    cfg = parse(["--stage", "finetune", "--dtype", "float32", "--lr", "1e-5"])
    mesh, device = train.setup()
    model = make_ours(TINY).requires_grad_(True).train()
    train.shard(model, mesh, torch.float32)
    optimizer, batch = train.make_optimizer(model, cfg), collate(samples, TINY.vision.image_size)
    step = train.Step(0, list(range(len(samples))), [batch])
    return lambda: train.train_step(model, optimizer, step, cfg, len(batch.targets), 1.0, device)[0]


def padded(model, samples: list[Sample]) -> dict[str, torch.Tensor]:
    longest = max(len(s.ids) for s in samples)
    ids, labels = torch.zeros(len(samples), longest, dtype=torch.int64), torch.full((len(samples), longest), -100)
    for i, s in enumerate(samples):
        ids[i, :len(s.ids)], labels[i, :len(s.ids)] = torch.tensor(s.ids), torch.tensor(s.labels)
    ids[ids == IMAGE_ID] = model.config.image_token_id
    return dict(input_ids=ids, labels=labels, pixel_values=normalize(torch.stack([s.image for s in samples])))


def their_step(samples: list[Sample], pieces: int) -> Callable[[], float]:
    model = make_theirs(make_ours(TINY)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, (0.9, 0.98), eps=1e-7, weight_decay=0.0, fused=True)
    ordered = sorted(samples, key=lambda s: len(s.ids)) if pieces > 1 else samples
    size = -(-len(samples) // pieces)
    batches = [padded(model, ordered[i:i + size]) for i in range(0, len(ordered), size)]
    supervised = sum(len(s.labels) - s.labels.count(-100) for s in samples)

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)
    return step


PROTOCOLS = {"C1": [76], "C4": torch.linspace(60, 200, 16).round().int().tolist()}
SIDES = {"ours": our_step, "transformers": partial(their_step, pieces=1),
         "transformers sorted": partial(their_step, pieces=4)}


def take_turns(sides: dict[str, Callable[[], object]], repeats: int, warmups: int) -> dict[str, list[float]]:
    """Seconds of every repetition; side after side, so that a busy moment of the machine hits all of them."""
    times = {name: [] for name in sides}
    for i in range(warmups + repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if i >= warmups:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n{title}, ms: median, minimum, quartiles; speed-up over transformers' best (medians, minima)")
    peers = [t for name, t in times.items() if name.startswith("transformers")]
    usual, best = min(map(statistics.median, peers)), min(map(min, peers))
    for name, t in times.items():
        low, middle, high = (1e3 * x for x in statistics.quantiles(t, n=4))
        print(f"  {name:20}{middle:10.2f}{1e3 * min(t):10.2f}   {low:.2f} .. {high:.2f}   "
              f"x{1e3 * usual / middle:.2f}  x{best / min(t):.2f}", flush=True)


def memory(side: str, name: str) -> None:
    """Print by how many MB a process grows in a few steps."""
    step = SIDES[side](samples_of(PROTOCOLS[name]))
    Path("/proc/self/clear_refs").write_text("5")           # the peak so far is forgotten
    before = peak_kb()
    for _ in range(5):
        step()
    print((peak_kb() - before) / 1024)


def peak_kb() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(PROTOCOLS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--memory", choices=tuple(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        return memory(args.memory, args.only)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, fp32, sdpa, "
          f"load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    for name in [args.only] if args.only else PROTOCOLS:
        samples = samples_of(PROTOCOLS[name])
        tokens = sum(len(s.ids) for s in samples)
        steps = {k: side(samples) for k, side in SIDES.items() if len(samples) > 1 or "sorted" not in k}
        losses = {k: step() for k, step in steps.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values()), f"they differ: {losses}"
        times = take_turns(steps, args.repeats, warmups=5)
        report(f"{name}, a step of {len(samples)} samples, {tokens} tokens without padding", times)
        for k in steps:
            command = [sys.executable, __file__, "--memory", k, "--only", name, "--threads", str(args.threads)]
            grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            seconds = statistics.median(times[k])
            rates = f"{len(samples) / seconds:10.1f} samples/s {tokens / seconds:10,.0f} tokens/s"
            print(f"  {k:20}{rates} {grown:6.0f} MB")
        train.dist.destroy_process_group()


if __name__ == "__main__":
    main()
