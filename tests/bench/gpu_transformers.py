"""transformers on the shapes that tests/bench/gpu.py measures: decoding, and a step of stage 2. One GPU.

$ pip install transformers
$ python tests/bench/gpu_transformers.py         # some four minutes; writes out/gpu/transformers/gpu.json and gpu.md
$ python tests/bench/gpu_transformers.py --dry   # a tiny model on the CPU

It gets its best: sdpa, everything in bf16, AdamW's moments too (less memory traffic than our fp32 masters), no
attention mask (causality hides the padding on the right), and a batch either padded as a whole or as four of like
length.
"""
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]      # train and data are ours, not those of this folder
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lib.common import Parser, parse_or_exit, run_command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="stop beginning new things after this time")
    parser.add_argument("--out", type=Path, default=Path("out/gpu/transformers"), help="folder for the two files")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; the numbers mean nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)
    if ARGS.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from generate import make_theirs
from gpu import Bench, draw_samples, make_model, questions, seconds_of
from torch import Tensor, nn

from data import IGNORE, IMAGE_ID, Sample
from lib.device import peak_memory
from vision import normalize


def make_peer(bench: Bench) -> nn.Module:
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            return make_theirs(make_model(bench))
    finally:
        torch.set_default_dtype(torch.float32)


def decode(bench: Bench, model: nn.Module, batch: int) -> dict:
    """The time for n tokens minus that for one: its generate() hands out no token before the last."""
    prompts, pictures = questions(bench, batch)
    ids = torch.tensor(prompts, device=bench.device)
    ids[ids == IMAGE_ID] = model.config.image_token_id
    pixels = normalize(torch.cat(pictures)).to(bench.device, bench.dtype)

    @torch.inference_mode()
    def write(n: int) -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                       max_new_tokens=n, min_new_tokens=n)
    n = 4 if bench.dry else 48
    one, many = seconds_of(partial(write, 1), 1), seconds_of(partial(write, n), 1)
    token = (many - one) / (n - 1)
    return {"first_token_ms": 1e3 * one, "token_ms": 1e3 * token, "tokens_per_s": batch / token}


def padded(bench: Bench, model: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        ids[row, :len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, :len(sample.ids)] = torch.tensor(sample.labels)
    ids[ids == IMAGE_ID] = model.config.image_token_id
    batch = {"input_ids": ids.to(bench.device), "labels": labels.to(bench.device)}
    images = [sample.image for sample in samples if sample.image is not None]
    if images:                                  # normalized before the clock starts, as by its processor
        batch["pixel_values"] = normalize(torch.stack(images)).to(bench.device, bench.dtype)
    return batch


def train_step(bench: Bench, model: nn.Module, pieces: list[list[Sample]], recompute: bool) -> dict:
    """A step on all pieces, with its optimizer."""
    model.requires_grad_(True).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5, (0.9, 0.98), eps=1e-7, fused=True)
    batches = [padded(bench, model, piece) for piece in pieces]

    def step() -> None:
        for batch in batches:
            (model(**batch, use_cache=False).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    seconds = seconds_of(step)
    model.gradient_checkpointing_disable()
    tokens = sum(len(sample.ids) for piece in pieces for sample in piece)
    with_padding = sum(batch["input_ids"].numel() for batch in batches)
    return {"tokens": tokens, "padding_%": 100 * (1 - tokens / with_padding), "step_ms": 1e3 * seconds,
            "tokens_per_s": tokens / seconds, "peak_gb": peak_memory(bench.device) / 1e9}


def main(args: Namespace) -> int:
    if not args.dry and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; --dry walks through it on a CPU")
    bench = Bench(args)
    bench.machine |= {"transformers": transformers.__version__}
    bench.deadline += 60 * args.minutes
    model = make_peer(bench)
    for batch in (1, 16):
        bench.attempt("generate", {"batch": batch}, partial(decode, bench, model, batch))
    draws = draw_samples(bench.config, "finetune")
    samples = [next(draws) for _ in range(4 if bench.dry else 16)]
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    size = len(samples) // 4
    fours = [ordered[i:i + size] for i in range(0, len(ordered), size)]
    for name, pieces, recompute in (("LLaVA's recipe: padded as a whole, recomputed", [samples], True),
                                    ("four of like length, nothing recomputed", fours, False)):
        bench.attempt("train", {"what": name}, partial(train_step, bench, model, pieces, recompute))
    return int(any("failed" in row for rows in bench.rows.values() for row in rows))


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
