"""What the tests of training share: a small run in this process or in others, and the comparison of two runs."""
import json
import signal
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import metrics, run_script, start_script
from safetensors.torch import load_file

import train


def train_here(flags: list[str]) -> None:
    """Train in this process. train.py leaves its process group only after a success, so it is left here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        train.main(flags)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_train(flags: list[str], processes: int = 1) -> subprocess.Popen:
    """Start train.py as a user would, in a process group of its own."""
    return start_script("train.py", *flags, processes=processes, start_new_session=True)


def run_train(flags: list[str], processes: int = 1) -> None:
    """Train with torchrun, to a successful end."""
    done = run_script("train.py", *flags, processes=processes)
    assert done.returncode == 0, done.stderr[-9000:]


def some_of(data: Path, to: Path, image: bool, turns: int | None = None) -> Path:
    """The records with a picture, or those without; their first turns."""
    records = [record for record in json.loads(data.read_text()) if ("image" in record) == image]
    to.write_text(json.dumps([record | {"conversations": record["conversations"][:turns]} for record in records]))
    return to


def assert_same_run(a: Path, b: Path) -> None:
    """Every number of every step, and every weight, bit for bit."""
    assert metrics(a) == metrics(b)
    x, y = (load_file(out / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
