"""Scripts in processes that are forked from one which has imported torch already, so that a start costs no seconds.

Where the start itself is what a test is about (torchrun, the imports, a shell), helpers.start_script takes a real one.
"""
import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed.run
from helpers import ROOT, hear_signals
from torch.distributed import TCPStore

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "eval", "sample", "load_weights", "pytest", "torch.distributed.run"])


TORCHRUN = torch.distributed.run.__file__


class Fork:
    """`python ARGS` in the checkout, with those methods of subprocess.Popen that tests use. env: more variables.

    It leads a process group of its own.
    """

    def __init__(self, *args: object, **env: object):
        self.args = list(map(str, args))
        self.output = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):       # which a process that is killed at once would not make
            Path(self.output.name, name).touch()
        variables = dict(os.environ) | {name: str(value) for name, value in env.items()}
        self.process = SERVER.Process(target=run_as_main, args=(self.args, variables, self.output.name))
        self.process.start()
        self.pid, self.kill, self.poll = self.process.pid, self.process.kill, lambda: self.returncode
        atexit.register(self.kill)              # if a test fails, nobody else ends it

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        assert self.returncode is not None, f"{self.args} did not end within {timeout} seconds"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(Path(self.output.name, name).read_text() for name in ("stdout", "stderr"))


def run_as_main(args: list[str], env: dict[str, str], output: str) -> None:
    """In the forked process: what `python ARGS` does."""
    multiprocessing.set_start_method(None, force=True)      # for data workers as usual, rather than from this server
    os.setsid()
    hear_signals()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.stdout, sys.stderr = (open(Path(output, name), "w", buffering=1) for name in ("stdout", "stderr"))
    for number, file in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file.fileno(), number)
    sys.argv = args
    runpy.run_path(args[0], run_name="__main__")


def start_ranks(*args: object, processes: int) -> list[Fork]:
    """`python ARGS` in several processes, as torchrun would start them, but without it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    forks = [Fork(*args, **group, RANK=rank, LOCAL_RANK=rank) for rank in range(processes)]
    forks[0].store = store                      # which lives as long as they do
    return forks


def run_forked(*args: object, processes: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run `python ARGS` to its end. If one of several processes fails, the others are killed.

    The output is that of all processes, the exit code that of the first one that failed, or 0.
    """
    forks = start_ranks(*args, processes=processes) if processes > 1 else [Fork(*args)]
    wait_until, failed = time.monotonic() + timeout, []
    try:
        while not failed and (running := [fork.process.sentinel for fork in forks if fork.poll() is None]):
            assert time.monotonic() < wait_until, f"{args} did not end within {timeout} seconds"
            multiprocessing.connection.wait(running, timeout=1)
            failed = [fork.returncode for fork in forks if fork.poll()]
    finally:
        for fork in forks:
            fork.kill()
    stdout, stderr = map("".join, zip(*(fork.communicate() for fork in forks)))
    return subprocess.CompletedProcess(args, failed[0] if failed else 0, stdout, stderr)
