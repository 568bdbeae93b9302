"""What Windows and macOS lack is not missed: every script starts and works without it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN, GOLDEN_ANSWER, ROOT, TINY_MODEL, talk
from tiny_benchmarks import prepare

# As on Windows: no fcntl, resource or readline, no process groups, none of POSIX's signals, no sysconf, no /proc.
MASKED = """if True:
    import asyncio, os, runpy, signal, sys          # asyncio, which torch imports, asks for sysconf in Python 3.12
    from pathlib import Path
    for name in ("fcntl", "resource", "readline", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGALRM"):
        delattr(signal, name)
    for name in ("setsid", "sysconf", "getpgid", "killpg", "fork"):
        delattr(os, name)
    exists = Path.exists
    Path.exists = lambda path, **more: not str(path).startswith("/proc") and exists(path, **more)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_masked(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", MASKED, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval.py", "load_weights.py", "data.py"])
def test_every_script_says_what_it_does(script):
    done = run_masked(script, "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_an_answer(photo):
    done = run_masked("sample.py", "--model", TINY_MODEL, "--image", photo, "--prompt", "What is this?",
                      "--max-new-tokens", 24, "--verbose")
    assert (done.returncode, done.stdout) == (0, GOLDEN_ANSWER + "\n"), done.stderr


def test_a_check(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([talk("<image>\nq", "a", id=i, image="photo.jpg") for i in range(5)]))
    done = run_masked("data.py", "check", "--data", path, "--images", GOLDEN / "images", "--model", TINY_MODEL,
                      "--workers", 0)
    assert done.returncode == 0 and "5 with an image, 0 of text only, 0 bad" in done.stdout, done.stderr


def test_a_training(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([talk("<image>\nq", "a", id=i, image="photo.jpg") for i in range(4)]))
    done = run_masked("train.py", "--stage", "finetune", "--model", TINY_MODEL, "--data", path, "--images",
                      GOLDEN / "images", "--out", tmp_path / "out", "--global-batch", 2, "--max-steps", 2, "--dtype",
                      "fp32", "--device", "cpu", "--workers", 0)
    assert done.returncode == 0 and (tmp_path / "out" / "model.safetensors").is_file(), done.stderr


def test_an_eval(tmp_path: Path):
    flags, _ = prepare("pope", tmp_path / "eval")
    done = run_masked("eval.py", *flags, "--model", TINY_MODEL, "--device", "cpu", "--out", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out/report.html").is_file(), done.stderr
    assert done.stderr.count("cannot be locked (this system has no POSIX locks)") == 1
