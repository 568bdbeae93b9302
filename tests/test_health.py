"""What the program says about a run in the middle of it: that pictures, labels or rate are wrong, or nothing at all.

The runs are those of the demo, on its committed bases, a few steps long.
"""
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, contents, metrics, run_script, same, train_flags
from PIL import Image
from training import assert_same_run, train_here

import data
import train
from demo.shapes import SIZE, write_data
from lib.checkpoint import read_checkpoint
from lib.health import CORRUPTED, HeldOut, checksum_of_bits, error_of_difference, loss_of_counting, rise
from lib.plot import verdict
from lib.recipes import parse
from load_weights import load_model
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
    chats = ["--stage", "finetune", "--model", "", "--data", f"{shapes}/finetune.json", "--val-data", "",
             "--max-steps", "1"]
    train_here(demo_flags(shapes, tmp_path / "out", *chats))
    assert "stage 1 (--stage pretrain) comes first" in warnings_of(capsys.readouterr().out)[0]


def test_the_standard_error_is_that_of_a_ratio_over_micro_batches():
    """Against a simulation: how much the difference varies over many draws of the same kind."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[float, float]:
        tokens = torch.randint(5, 50, (40,), generator=generator).double()
        noise = torch.randn(2, 40, generator=generator, dtype=torch.float64)
        losses = torch.stack([tokens + noise[0], 1.3 * tokens + 3 * noise[1]], 1)
        worth = (losses[:, 1] - losses[:, 0]).sum() / tokens.sum()
        return float(worth), error_of_difference(losses, torch.stack([tokens, tokens], 1))
    worths, errors = zip(*(draw() for _ in range(400)))
    assert np.mean(errors) == pytest.approx(np.std(worths), rel=0.1)
    assert math.isnan(error_of_difference(torch.ones(3, 2), torch.tensor([[5, 5], [0, 0], [0, 0]])))


def test_counting_tokens_costs_what_coding_them_one_by_one_does():
    rng = random.Random(0)
    tokens = [rng.choice([1, 1, 1, 2, 5]) for _ in range(50)]
    seen, nats = [1] * 8, 0.0
    for token in tokens:
        nats -= math.log(seen[token] / sum(seen))
        seen[token] += 1
    assert loss_of_counting(torch.bincount(torch.tensor(tokens), minlength=8)) == pytest.approx(nats / 50)

# ---------------------------------------------------------------------------------------------------
# The best model so far


@pytest.fixture
def fake_losses(monkeypatch):
    """fake_losses([...]): what the validations of a run measure. -> the projector's weights at each."""
    def fake(losses: list[float]) -> list[torch.Tensor]:
        weights, left = [], iter(losses)

        def validate(model, *args):
            weights.append(model.projector.fc.weight.full_tensor().detach().clone())
            return HeldOut([next(left)], math.nan, math.inf)
        monkeypatch.setattr(train, "validate", validate)
        return weights
    return fake


BEST = ["--val-every", "1", "--max-steps", "5", "--save-every", "1", "--keep-best"]


def test_the_best_model_is_kept_whole_and_resuming_knows_it(chat_json, tmp_path, fake_losses, capsys):
    """The lowest of 3.0 (before training), 2.0, 2.5, nan, 2.2, 2.1 is the one after step 1; then 1.9 is lower."""
    more = [*BEST, "--val-data", str(chat_json)]
    weights = fake_losses([3.0, 2.0, 2.5, math.nan])
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=3)
    best = load_model(tmp_path / "out" / "best")
    assert torch.equal(best.projector.fc.weight, weights[1]) and not torch.equal(weights[1], weights[2])
    before = contents(tmp_path / "out" / "best")
    assert "tokenizer.json" in before and not any("exp_avg" in name or "step_" in name for name in before)
    weights = fake_losses([2.2, 1.9])
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    best = load_model(tmp_path / "out" / "best")
    assert torch.equal(best.projector.fc.weight, weights[1]) and same(best, load_model(tmp_path / "out"))
    assert "lowest validation loss is the first" not in capsys.readouterr().out
    fake_losses([3.0, 3.5, 4.0, 4.0, 4.0, 4.0])
    train_here(train_flags(tmp_path / "out", chat_json, *more, "--resume", "never"))
    assert not (tmp_path / "out" / "best").exists()             # the one of the run before is gone
    assert f"no {tmp_path / 'out' / 'best'}: the lowest validation loss is the first one" in capsys.readouterr().out
    fake_losses([1.0])
    train_here(train_flags(tmp_path / "new", chat_json, *more, "--resume", str(tmp_path / "out" / "step_000004")))
    assert "lowest validation loss is the first" not in capsys.readouterr().out and load_model(tmp_path / "new/best")


def test_a_run_ends_when_its_patience_does(chat_json, tmp_path, fake_losses, capsys):
    more = [*BEST, "--val-data", str(chat_json), "--max-steps", "9", "--patience", "2"]
    fake_losses([3.0, 2.0, 2.5])
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=2)
    fake_losses([2.1, 1.0])
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    assert [row["step"] for row in metrics(tmp_path / "out") if "val_loss" in row] == [0, 1, 2, 3]
    assert "lowest after step 1, 2.0000, and not in the 2 validations since" in capsys.readouterr().out
    assert not same(load_model(tmp_path / "out"), load_model(tmp_path / "out" / "best"))
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    assert "already finished" in capsys.readouterr().out


def test_a_full_disk_costs_the_best_model_and_not_the_run(chat_json, tmp_path, fake_losses, monkeypatch, capsys):
    fake_losses([3.0, 2.0, 1.0])
    real = train.save_model

    def full(out, *args):
        if "best" in out.name:
            raise OSError(28, "No space left on device")
        real(out, *args)
    monkeypatch.setattr(train, "save_model", full)
    train_here(train_flags(tmp_path / "out", chat_json, *BEST, "--val-data", str(chat_json), "--max-steps", "2"))
    assert "the best model so far was not written" in capsys.readouterr().out
    assert load_model(tmp_path / "out")


@pytest.mark.parametrize("flags", [["--keep-best"], ["--patience", "2", "--val-data", "x.json"], ["--patience", "1"]])
def test_the_best_is_refused_without_validations(flags):
    with pytest.raises(ValueError, match="go by the validation loss"):
        parse(["--stage", "finetune", *flags])

# ---------------------------------------------------------------------------------------------------
# Silent corruption

FAULTY = """
import sys, os
sys.path[:0] = ["tests"]
import torch, train
from lib.common import parse_or_exit, run_command
from lib.plot import verdict
from lib.recipes import parse
calls = []

def flip_a_bit(module, args, out):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == int(sys.argv[1]):
        out = out.clone()
        out.detach().view(torch.int32)[3, 5] ^= 1 << 9
    return out
real = train.build

def build(*args):
    model = real(*args)
    model.llm.h[0].mlp.fc.register_forward_hook(flip_a_bit)
    return model
train.build = build
code = run_command(train.main, parse(sys.argv[2:]))
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.parametrize("gather", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_flipped_bit_on_one_of_two_processes_ends_the_run_at_that_step(gather, chat_json, tmp_path):
    """One bit of one activation, in the third step, whose micro-batch is computed twice. The checkpoint is intact."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    flags = train_flags(tmp_path / "out", chat_json, "--recheck-every", "1", "--save-every", "1", "--max-steps", "5",
                        "--recompute", "none", "--gather", gather)
    done = run_script(tmp_path / "faulty.py", 6, *flags, processes=2, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and f"exitcode  : {CORRUPTED} " in done.stderr, done.stderr
    assert re.search(r"process 1 on \S+, cpu: the gradient of llm\.\S+ was not the same", done.stderr), done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("step_*")) == ["step_000001", "step_000002"]
    assert len(metrics(tmp_path / "out")) == 2
    for path in (tmp_path / "out").glob("step_*"):
        read_checkpoint(path)
    train_here([*flags, "--recheck-every", "2"])
    assert len(metrics(tmp_path / "out")) == 5


def test_computing_twice_changes_nothing(chat_json, tmp_path):
    more = ["--max-steps", "4", "--dropout", "0.1", "--global-batch", "12", "--gather", "on", "--dtype", "bf16"]
    train_here(train_flags(tmp_path / "calm", chat_json, *more))
    train_here(train_flags(tmp_path / "twice", chat_json, *more, "--recheck-every", "2"))
    assert_same_run(tmp_path / "calm", tmp_path / "twice")


def test_no_flipped_bit_escapes_the_checksum():
    generator = torch.Generator().manual_seed(0)
    for dtype, kind, bits in ((torch.float32, torch.int32, 32), (torch.bfloat16, torch.int16, 16)):
        x = torch.randn(7, 11, generator=generator).to(dtype)
        right = checksum_of_bits(x, chunk=20)
        assert right == checksum_of_bits(x) != checksum_of_bits(x.flip(0))
        for i in range(x.numel()):
            for bit in range(bits):
                wrong = x.clone()
                wrong.view(-1).view(kind)[i] ^= (1 << bit) if bit < bits - 1 else -(1 << bit)
                assert checksum_of_bits(wrong, chunk=20) != right

# ---------------------------------------------------------------------------------------------------
# Trackers


class Recorder:
    """A tracker with wandb's and trackio's interface, which may fail after some rows."""
    def __init__(self, fails_after: int = 99):
        self.rows, self.ended, self.fails_after = [], 0, fails_after

    def init(self, **options):
        self.options = options
        return self

    def log(self, row):
        if len(self.rows) >= self.fails_after:
            raise ConnectionError("no network")
        self.rows.append(row)

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_rows_of_the_metrics(name, chat_json, tmp_path, monkeypatch):
    tracker = Recorder()
    monkeypatch.setitem(sys.modules, name, tracker)
    more = ["--track", name, "--max-steps", "2", "--val-data", str(chat_json)]
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert tracker.rows == [{k: v for k, v in row.items() if v is not None} for row in rows] and tracker.ended == 1
    assert tracker.options["name"] == "out" and tracker.options["config"]["lr"] == 1e-3


def test_tensorboard_gets_them_too(chat_json, tmp_path, monkeypatch):
    seen = []
    writer = SimpleNamespace(add_scalar=lambda *row: seen.append(row), flush=lambda: None,
                             close=lambda: seen.append("end"))
    fake = SimpleNamespace(SummaryWriter=lambda folder: seen.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    other = tmp_path / "other.json"                     # of two files a row says more than numbers
    other.write_text(chat_json.read_text())
    more = ["--data", str(chat_json), str(other), "--track", "tensorboard", "--max-steps", "1"]
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    assert seen[0] == str(tmp_path / "out" / "tensorboard") and seen[-1] == "end"
    assert ("loss", metrics(tmp_path / "out")[0]["loss"], 0) in seen and "files" in metrics(tmp_path / "out")[0]


@pytest.mark.parametrize("tracker, words", [
    (None, "ModuleNotFoundError"), (Recorder(1), "ConnectionError: no network")])
def test_a_tracker_that_fails_or_is_missing_does_not_end_the_run(tracker, words, chat_json, tmp_path, monkeypatch,
                                                                 capfd):
    monkeypatch.setattr("lib.common.WARNED", set())
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    train_here(train_flags(tmp_path / "out", chat_json, "--track", "wandb", "--max-steps", "3"))
    assert f"nothing more is tracked ({words}" in capfd.readouterr().err and len(metrics(tmp_path / "out")) == 3

# ---------------------------------------------------------------------------------------------------
# Against the curve of a run that went well


def curve(losses) -> list[tuple[int, float]]:
    return [*enumerate(losses, 1)]


def test_a_run_is_held_against_another_in_words():
    rng = np.random.default_rng(0)
    falling = 1 + 2 * np.exp(-np.arange(400) / 60)
    reference, same_recipe = (curve(falling + 0.1 * rng.standard_normal(400)) for _ in range(2))
    assert verdict(same_recipe, reference) == "inside the reference's band at step 400"
    assert verdict(same_recipe[:100], reference) == "inside the reference's band at step 100"
    worse = curve(np.where(np.arange(400) < 150, falling, falling + 0.5) + 0.1 * rng.standard_normal(400))
    said = verdict(worse, reference)
    assert said.startswith("above the reference's band from step 15") and said.endswith(" on"), said
    assert verdict(curve(falling - 0.5), reference).startswith("below the reference's band from step")
    assert verdict([], reference) == verdict(same_recipe, []) == "it has no step in common with the reference"


def test_plot_draws_the_band_and_says_the_verdict(tmp_path, capsys):
    for name, first in (("good", 2.0), ("mine", 4.0)):
        (tmp_path / name).mkdir()
        rows = [{"step": i, "loss": first - i / 50, "grad_norm": 1.0, "lr": 1e-3} for i in range(60)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for against in (tmp_path / "good", tmp_path / "good" / "metrics.jsonl"):
        train.main(parse(["--plot", str(tmp_path / "mine"), "--against", str(against)]))
        assert f"{tmp_path / 'mine'}: above the reference's band from step 1 on" in capsys.readouterr().out
    page = (tmp_path / "mine" / "loss.html").read_text()
    assert page.count('<polygon class="band"') == 1 and "above the reference" in page
    with pytest.raises(ValueError, match="--against x needs --plot"):
        parse(["--against", "x"])
    with pytest.raises(FileNotFoundError, match="nothing/metrics.jsonl"):
        train.main(parse(["--plot", str(tmp_path / "mine"), "--against", str(tmp_path / "nothing")]))
