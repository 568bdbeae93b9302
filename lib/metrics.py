"""What a training run writes down about itself: metrics.jsonl, and a line on the screen for each step."""
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data import Dataset, Step
from lib.common import read_jsonl, write_whole
from lib.plan import PEAK_FLOPS, step_flops
from model import LLaVAConfig


class Metrics:
    """metrics.jsonl, one object per step, and skipped_steps.jsonl. Going on from step k keeps what was known at k."""

    def __init__(self, out: Path, done: int, parts: list[str], device: torch.device):
        self.path = out / "metrics.jsonl"
        self.skipped_path = out / "skipped_steps.jsonl"
        self.parts = parts
        self.device = device
        self.steps = 0                          # taken by this process since start_clock
        if dist.get_rank() == 0:
            forget_later_steps(self.path, done)
            forget_later_steps(self.skipped_path, done)

    def start_clock(self) -> None:
        self.began = self.step_began = time.perf_counter()

    def restart_step_clock(self) -> None:
        self.step_began = time.perf_counter()

    def seconds_a_step(self) -> float:
        return (time.perf_counter() - self.began) / self.steps

    def add(self, record: dict, path: Path | None = None) -> None:
        if dist.get_rank() == 0:
            with open(path or self.path, "a") as f:
                f.write(json.dumps(record) + "\n")

    def add_step(self, step: Step, data: Dataset, config: LLaVAConfig, n_supervised: int, loss: float, norm: float,
                 lr: float, skipped: bool) -> dict:
        """Write a step's line -> the line. Its numbers are of all processes together, but memory_gb is of process 0."""
        self.steps += 1
        seconds = time.perf_counter() - self.step_began
        lengths = data.index.length[step.sample_ids].astype(float)
        images = int(data.index.image[step.sample_ids].sum())
        flops = step_flops(config, self.parts, lengths.sum(), (lengths ** 2).sum(), images, n_supervised)
        record = {
            "step": step.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "samples": len(lengths),
            "supervised_tokens": n_supervised,
            "tokens": int(lengths.sum()),
            "images": images,
            "seconds": seconds,
            "tokens_per_second": lengths.sum() / seconds,
            "mfu": mfu(flops / seconds / dist.get_world_size(), self.device),
            "memory_gb": memory_gb(self.device),
            "skipped": skipped,
        }
        self.add(record)
        if skipped:
            self.add({"step": step.step, "sample_ids": step.sample_ids}, self.skipped_path)
        return record


def forget_later_steps(path: Path, done: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint from which this one goes on at step `done`.

    A validation loss measured after k steps carries step k, and the next training step, from 0, carries k as well.
    """
    if not path.exists():
        return
    kept = []
    for record in read_jsonl(path, torn=True):
        limit = done + 1 if "val_loss" in record else done
        if done and record["step"] < limit:
            kept.append(json.dumps(record) + "\n")
    write_whole(path, "".join(kept))


def progress_line(r: dict, steps: int, seconds_left: float) -> str:
    parts = [
        f"step {r['step'] + 1}/{steps}",
        f"loss {r['loss']:.4f}",
        f"norm {r['grad_norm']:.3f}",
        f"lr {r['lr']:.2e}",
        f"{1000 * r['seconds']:.0f} ms",
        f"{r['tokens_per_second']:,.0f} tok/s",
    ]
    if r["mfu"] is not None:
        parts.append(f"mfu {100 * r['mfu']:.1f} %")
    parts.append(f"{r['memory_gb']:.1f} GB")
    parts.append(f"{seconds_left / 60:.1f} min left")
    if r["skipped"]:
        parts.append("SKIPPED: not finite")
    return " | ".join(parts)


def memory_gb(device: torch.device) -> float:
    """Peak so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of one GPU's datasheet peak (dense bf16); None where no peak is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model, peak in PEAK_FLOPS.items():
        if model in name:
            return flops_per_second / peak
    return None


def free_memory(device: torch.device) -> int:
    """What can still be allocated: on the GPU, or without swapping; all of the memory where macOS does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text()).group(1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
