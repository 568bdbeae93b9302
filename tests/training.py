"""Shared by the tests of training: a small run in this process or in others, and the comparison of two runs.

As a program (`training.py STOP_AFTER FLAGS`) it trains like train.py, and stops after a step as if a signal had come.
"""
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from forks import TORCHRUN, Fork, run_forked
from helpers import metrics
from safetensors.torch import load_file

import train
from data import Step
from lib.recipes import parse


def train_here(flags: list[str], stop_after: int = 0) -> None:
    """Train in this process. train.py destroys its process group only on success, so it is destroyed here.

    stop_after: the step after which the run is stopped as if by a signal; 0: never.
    """
    real_steps = train.synchronized_steps

    def steps_until_the_signal(*args) -> Iterator[tuple[Step, int, bool, bool]]:
        for step, n_supervised, stop, save in real_steps(*args):
            yield step, n_supervised, stop or step.step + 1 == stop_after, save

    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)}
    try:
        with patch("train.synchronized_steps", steps_until_the_signal):
            train.main(parse(flags))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_train(flags: list[str], processes: int = 1) -> Fork:
    """Start train.py, with torchrun for several processes."""
    torchrun = [TORCHRUN, "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return Fork(*torchrun, "train.py", *flags)


def run_train(flags: list[str], processes: int = 1, stop_after: int = 0) -> None:
    """Train in other processes, to a successful end."""
    program = ["tests/training.py", stop_after] if stop_after else ["train.py"]
    done = run_forked(*program, *flags, processes=processes)
    assert done.returncode == 0, done.stderr[-9000:]


def some_of(data: Path, to: Path, image: bool, turns: int | None = None) -> Path:
    """The records with a picture, or those without; their first turns."""
    records = [record for record in json.loads(data.read_text()) if ("image" in record) == image]
    to.write_text(json.dumps([record | {"conversations": record["conversations"][:turns]} for record in records]))
    return to


def assert_same_run(a: Path, b: Path) -> None:
    """Every metric of every step, and every weight, bit for bit."""
    assert metrics(a) == metrics(b)
    x, y = (load_file(out / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


if __name__ == "__main__":
    train_here(sys.argv[2:], stop_after=int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)                 # as train.py does: gloo's threads may still be releasing tensors
