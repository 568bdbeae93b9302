"""Training metrics: metrics.jsonl, and a progress line for each step."""
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from data import Dataset, Step
from lib.common import append_line, warn_once, write_whole
from lib.device import peak_flops, peak_memory
from lib.flops import step_flops
from lib.health import rise
from lib.processes import on_process_0
from lib.schedule import Mixture, files_of
from model import LLaVAConfig


class Metrics:
    """metrics.jsonl, one object per step, and skipped_steps.jsonl. A run resumed at step k keeps the lines before k.

    again: drop the validation after step k, too, because it is about to be repeated.
    """

    def __init__(self, out: Path, done: int, parts: list[str], device: torch.device, again: bool = False):
        self.path = out / "metrics.jsonl"
        self.skipped_path = out / "skipped_steps.jsonl"
        self.parts = parts
        self.device = device
        self.steps = 0                          # taken by this process since start_clock
        self.tracker = None                     # see open_tracker
        rows = on_process_0(lambda: forget_later_steps(self.path, done, again))
        on_process_0(lambda: forget_later_steps(self.skipped_path, done))
        self.losses = [row["loss"] for row in rows if "loss" in row and not row.get("skipped")]
        self.has_risen = False                  # which is said once
        self.val_losses = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    def start_clock(self) -> None:
        self.began = self.step_began = time.perf_counter()

    def restart_step_clock(self) -> None:
        self.step_began = time.perf_counter()

    def seconds_a_step(self) -> float:
        return (time.perf_counter() - self.began) / self.steps

    def add(self, record: dict) -> None:
        """Write a row of metrics.jsonl; a tracker gets the numbers in it."""
        self.write(self.path, record)
        if self.tracker:
            numbers = {field: value for field, value in record.items() if isinstance(value, (int, float))}
            self.try_tracking(self.tracker.log, numbers)

    def write(self, path: Path, record: dict) -> None:
        if dist.get_rank() == 0:
            try:
                append_line(path, record)
            except OSError as e:
                warn_once(f"{path} lacks lines ({e}); training goes on")

    def start_tracker(self, name: str, settings: dict) -> None:
        """--track: process 0 sends every row to a tracker, too."""
        if name and dist.get_rank() == 0:
            self.tracker = self.try_tracking(open_tracker, name, self.path.parent, settings)

    def close_tracker(self) -> None:
        if self.tracker:
            self.try_tracking(self.tracker.finish)

    def try_tracking(self, work: Callable, *args):
        """Whatever fails in a tracker (a network, a disk, an account) ends the tracking and never the run."""
        try:
            return work(*args)
        except Exception as e:
            self.tracker = None
            warn_once(f"nothing more is tracked ({type(e).__name__}: {str(e)[:200]}); training goes on, and "
                      "metrics.jsonl has all of it")

    def add_step(self, step: Step, data: Dataset | Mixture, config: LLaVAConfig, n_supervised: int, loss: float,
                 norm: float, lr: float, skipped: bool, of_files: Sequence[tuple[float, float]] = ()) -> dict:
        """Write a step's record and return it. Its numbers cover all processes, except for memory_gb of process 0."""
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
            "memory_gb": peak_memory(self.device) / 1e9,
            "skipped": skipped,
        }
        if data.shares:                         # of each file: its part of the samples, and its loss, if it has any
            files = files_of(step.sample_ids, data.shares)
            record["files"] = {share.name: {"share": float((files == i).mean()), "loss": loss / n if n else None}
                               for i, (share, (loss, n)) in enumerate(zip(data.shares, of_files))}
        self.add(record)
        if skipped:
            self.write(self.skipped_path, {"step": step.step, "sample_ids": step.sample_ids})
        else:
            self.losses.append(loss)
        return record

    def add_validation(self, step: int, record: dict) -> bool:
        """Write a validation's record -> whether its loss is the lowest so far."""
        new = record["val_loss"]
        lowest = math.isfinite(new) and not any(loss <= new for _, loss in self.val_losses)
        self.val_losses.append((step, record["val_loss"]))
        self.add({"step": step, **record})
        return lowest

    def out_of_patience(self, patience: int) -> str:
        """A sentence if as many validations in a row were not better than one before them; else ""."""
        losses = [loss if math.isfinite(loss) else math.inf for _, loss in self.val_losses]
        best = losses.index(min(losses)) if losses else 0
        if not patience or len(losses) - 1 - best < patience:
            return ""
        return (f"the validation loss was lowest after step {self.val_losses[best][0]}, {losses[best]:.4f}, and not in "
                f"the {patience} validations since: the run ends")

    def rise(self, warmup: int) -> str:
        """What lib/health.py says about a loss that has risen, the first time that it does."""
        problem = rise(self.losses, warmup) if self.losses and not self.has_risen else ""
        self.has_risen = self.has_risen or bool(problem)
        return problem


def forget_later_steps(path: Path, done: int, again: bool = False) -> list[dict]:
    """Drop the lines that a killed run wrote after the checkpoint that this one resumes from, at step `done` -> others.

    A validation loss measured after k steps carries step k, and the next training step, from 0, carries k as well.
    Lines that a power failure or a full disk broke are dropped, too: a log must not keep a run from going on.
    """
    if not path.exists():
        return []
    kept = []
    *lines, _ = path.read_bytes().split(b"\n")             # a kill may have torn what follows the last line
    for line in lines:
        try:
            record = json.loads(line)
            limit = done + 1 if "val_loss" in record and not again else done
            if done and record["step"] < limit:
                kept.append(record)
        except (ValueError, TypeError, KeyError):
            warn_once(f"{path} has broken lines, which are dropped")
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class TensorBoard:
    """TensorBoard's writer with the interface that wandb and trackio share."""

    def __init__(self, out: Path):
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))

    def log(self, row: dict) -> None:
        for field in row.keys() - {"step"}:
            self.writer.add_scalar(field, row[field], row["step"])
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def open_tracker(name: str, out: Path, settings: dict):
    """What takes a row with `log`, and ends with `finish`. None of the trackers is a package of this project."""
    if name == "tensorboard":
        return TensorBoard(out)
    return import_module(name).init(project="llava-phi", name=out.name, config=settings)


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
    for name, of_file in r.get("files", {}).items():
        loss = "none" if of_file["loss"] is None else f"{of_file['loss']:.4f}"
        parts.append(f"{Path(name).name} {of_file['share']:.0%} loss {loss}")
    if r["skipped"]:
        parts.append("SKIPPED: not finite")
    return " | ".join(parts)

# ---------------------------------------------------------------------------------------------------
# Speed


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilization: the fraction of one GPU's peak; None where that is unknown."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return flops_per_second / peak if peak else None
