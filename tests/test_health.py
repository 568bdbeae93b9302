"""What the program says about a run in the middle of it: that pictures, labels or rate are wrong, or nothing at all.

The runs are those of the demo, on its committed bases, a few steps long.
"""
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, metrics
from PIL import Image
from training import train_here

import data
from demo.shapes import SIZE, write_data
from lib.health import error_of_difference, loss_of_counting, rise
from model import LLaVAPhi


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Captions of 200 pictures and of 64 held-out ones, and 200 conversations."""
    folder = tmp_path_factory.mktemp("shapes")
    write_data(folder, n_pretrain=200, n_finetune=200, n_heldout=32, seed=3)
    return folder


def demo_flags(shapes: Path, out: Path, *more: str) -> list[str]:
    """Stage 1 of the demo, 12 steps of 16 samples, measured at step 6, too."""
    return ["--stage", "pretrain", "--llm", f"{ROOT}/demo/phi", "--vision", f"{ROOT}/demo/clip",
            "--data", f"{shapes}/pretrain.json", "--images", f"{shapes}/images",
            "--val-data", f"{shapes}/heldout_captions.json", "--val-every", "6", "--out", str(out), "--dtype", "fp32",
            "--workers", "0", "--global-batch", "16", "--lr", "3e-3", "--max-steps", "12", *more]


def warnings_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("WARNING")]


def test_a_healthy_run_says_what_the_picture_is_worth_and_nothing_else(shapes, tmp_path, capsys):
    train_here(demo_flags(shapes, tmp_path / "out"))
    printed = capsys.readouterr().out
    assert not warnings_of(printed)
    rows = [row for row in metrics(tmp_path / "out") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert all(set(row) == {"step", "val_loss", "val_loss_blank"} for row in rows)
    worth = rows[-1]["val_loss_blank"] - rows[-1]["val_loss"]
    assert worth > 0.2 and f"the picture is worth {worth:.3f} nats a token" in printed


def test_pictures_of_noise_are_noticed(shapes, tmp_path, capsys):
    rng = np.random.default_rng(0)
    noise = shutil.copytree(shapes / "images", tmp_path / "images")
    for path in noise.iterdir():
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    train_here(demo_flags(shapes, tmp_path / "out", "--images", str(noise)))
    said = warnings_of(capsys.readouterr().out)
    assert said and all("blank pictures do as well as the right ones" in line for line in said)


@pytest.mark.parametrize("by", [-1, 1])
def test_labels_that_are_shifted_by_a_token_are_noticed(by, shapes, tmp_path, capsys, monkeypatch):
    real = data.collate

    def shifted(samples, *args):
        wrong = [sample._replace(labels=[data.IGNORE] + sample.labels[:-1] if by > 0 else
                                 sample.labels[1:] + [data.IGNORE]) for sample in samples if sample.labels]
        return real(wrong, *args)
    monkeypatch.setattr(data, "collate", shifted)
    train_here(demo_flags(shapes, tmp_path / "out", "--max-steps", "1"))
    assert "labels shifted by one token look like this" in warnings_of(capsys.readouterr().out)[0]


def test_a_rate_that_is_30_times_too_high_is_noticed(shapes, tmp_path, capsys):
    train_here(demo_flags(shapes, tmp_path / "one", "--lr", "9e-2", "--max-steps", "2"))
    assert "the rate 0.09 is too high for the projector" in warnings_of(capsys.readouterr().out)[0]


def test_a_rate_that_destroys_the_language_model_is_noticed(shapes, tmp_path, capsys):
    train_here(demo_flags(shapes, tmp_path / "one", "--val-data", "", "--global-batch", "32"))
    chats = ["--stage", "finetune", "--model", str(tmp_path / "one"), "--llm", "", "--vision", "", "--data",
             f"{shapes}/finetune.json", "--val-data", "", "--freeze", "vision", "--max-steps", "8"]
    capsys.readouterr()
    train_here(demo_flags(shapes, tmp_path / "two", *chats, "--lr", "1e-3"))
    assert not warnings_of(capsys.readouterr().out)
    train_here(demo_flags(shapes, tmp_path / "three", *chats, "--lr", "3e-2"))
    assert "the rate is too high; try a tenth of it" in warnings_of(capsys.readouterr().out)[-1]


@pytest.mark.parametrize("losses, told", [
    ([1.0, 1.1] + [5.0] * 20, True), ([1.0, 1.1] + [5.0] * 4 + [1.0] * 9, False), ([3.0] * 30, False),
    ([0.1, 0.1] + [0.5] * 20, False), ([5.0, 4.0] + [3.0] * 5 + [5.9] * 9, False), ([1.0], False), ([], False),
])
def test_a_loss_has_risen_if_five_steps_in_a_row_are_far_above_the_first(losses, told):
    assert bool(losses and rise(losses, 2)) == told


def test_patches_that_overwrite_the_caption_are_noticed_before_stage_one(shapes, tmp_path, capsys, monkeypatch):
    """With a new projector a caption costs about what it costs the language model alone, unless its words are gone."""
    real = LLaVAPhi.embed
    monkeypatch.setattr(LLaVAPhi, "embed", lambda self, ids, images, positions: real(self, ids, images, positions + 8))
    train_here(demo_flags(shapes, tmp_path / "out", "--max-steps", "1"))
    assert "by more than its small weights can" in warnings_of(capsys.readouterr().out)[1]


def test_stage_two_with_an_untrained_projector_is_warned_of(shapes, tmp_path, capsys):
    chats = ["--stage", "finetune", "--model", "", "--data", f"{shapes}/finetune.json", "--val-data", "", "--max-steps", "1"]
    train_here(demo_flags(shapes, tmp_path / "out", *chats))
    assert "stage 1 (--stage pretrain) comes first" in warnings_of(capsys.readouterr().out)[0]


def test_the_standard_error_is_that_of_a_ratio_over_micro_batches():
    """Against a simulation: how much the difference varies over many draws of the same kind."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[float, float]:
        tokens = torch.randint(5, 50, (40,), generator=generator).double()
        noise = torch.randn(2, 40, generator=generator, dtype=torch.float64)
        table = torch.stack([tokens + noise[0], 1.3 * tokens + 3 * noise[1], torch.ones(40), tokens, tokens], 1)
        sums = table.sum(0)
        return float((sums[1] - sums[0]) / sums[3]), error_of_difference(table.T @ table, sums, 2)
    worths, errors = zip(*(draw() for _ in range(400)))
    assert np.mean(errors) == pytest.approx(np.std(worths), rel=0.1)
    one = torch.ones(5, dtype=torch.float64)
    assert math.isnan(error_of_difference(torch.outer(one, one), one, 2))


def test_counting_tokens_costs_what_coding_them_one_by_one_does():
    rng = random.Random(0)
    tokens = [rng.choice([1, 1, 1, 2, 5]) for _ in range(50)]
    seen, nats = [1] * 8, 0.0
    for token in tokens:
        nats -= math.log(seen[token] / sum(seen))
        seen[token] += 1
    assert loss_of_counting(torch.bincount(torch.tensor(tokens), minlength=8)) == pytest.approx(nats / 50)
