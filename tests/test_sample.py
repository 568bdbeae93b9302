"""sample.py as a person uses it: the golden answer, streaming, odd files, a chat, a pipe, errors of one line."""
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from data import load_tokenizer
from load_weights import load_model

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests/golden/tiny-llava-phi"
PHOTO = ROOT / "tests/golden/images/photo.jpg"
GOLDEN = "or!\ufffd ASS or!\ufffd squares- tab- tab- tab-\ufffd or!\ufffd squares"     # tok.decode(generate.one).strip()


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def run(*args, **kind) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "sample.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=60, **kind)


def main(capsys, *args) -> tuple[str, str]:
    """In this process: stdout, stderr."""
    sample.main(["--model", str(MODEL), *map(str, args)])
    return capsys.readouterr()


def chat(monkeypatch, capsys, lines: list[str], *args) -> tuple[list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, err = main(capsys, *args)
    return out.splitlines(), err


def test_the_golden_answer_on_the_command_line():
    done = run("--model", MODEL, "--image", PHOTO, "--prompt", "What is this?", "--temperature", 0, "--max-new-tokens", 24)
    assert (done.stdout, done.returncode) == (GOLDEN + "\n", 0)
    assert done.stderr.count("\n") == 1 and "cpu" in done.stderr and "fp32" in done.stderr


# ---------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_whole(tok, seed):
    """Random ids, specials and broken UTF-8 among them; and no piece ever ends within a character."""
    rng = random.Random(seed)
    ids = [rng.randrange(300 if seed % 2 else 500) for _ in range(40)]
    ids += tok.encode("a \u65e5\u672c\u8a9e \U0001f642\n\n x  ").ids + [0] * (seed % 3)
    text = sample.Text(tok)
    pieces = [text.add(i) for i in ids] + [text.add(None)]
    assert "".join(pieces) == tok.decode(ids, skip_special_tokens=True).strip()


def test_a_character_appears_when_it_is_complete(tok):
    text = sample.Text(tok)
    pieces = [text.add(i) for i in tok.encode("x\u65e5y").ids]
    assert [p for p in pieces if p] == ["x", "\u65e5", "y"]


def test_control_characters_do_not_reach_the_terminal():
    assert sample.CONTROL.sub("", "a\x1b[31mb\x07\r\x9b\u202e\tc\nd") == "a[31mb\tc\nd"
    assert sample.CONTROL.sub("", "\u65e5\U0001f468\u200d\U0001f469 caf\u00e9") == "\u65e5\U0001f468\u200d\U0001f469 caf\u00e9"
