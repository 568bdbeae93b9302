"""`train.py --data a.json b.json:0.1`: a mixture's steps, too, are a function of (seed, step, data)."""
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import metrics, talk, train_flags
from training import assert_same_run, run_train, some_of, train_here
from zoo import open_dataset, write_data

from data import Loader
from lib.recipes import parse, weighted
from lib.schedule import Mixture, Share, epoch_order, samples_of_share


@pytest.mark.parametrize("per_epoch", [1, 3, 10, 25])
def test_nothing_is_repeated_until_all_were_seen(per_epoch):
    share = Share("a.json", 100, 10, per_epoch)
    epochs = [samples_of_share(7, epoch, share) for epoch in range(20)]
    assert all(len(epoch) == per_epoch for epoch in epochs)
    seen = Counter()
    for epoch in epochs:
        seen.update(epoch.tolist())
        counts = [seen[100 + i] for i in range(10)]
        assert max(counts) - min(counts) <= 1
    assert set(seen) == set(range(100, 110))
    if per_epoch == 3:
        assert any(not np.array_equal(a, b) for a, b in zip(epochs, (samples_of_share(8, e, share) for e in range(20))))


def mixture(folder: Path, tok, weights=(1.0, 0.25)) -> Mixture:
    parts = []
    for name in "ab"[:len(weights)]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        parts.append(open_dataset(write_data(folder / name, n=8 if name == "a" else 12), tok))
    return Mixture(parts, weights)


def test_a_file_with_the_weight_1_is_the_file_itself(tmp_path, tiny_tokenizer):
    mixed = mixture(tmp_path, tiny_tokenizer, (1.0,))
    index = mixed.index
    for group in ("none", "modality_length"):
        plain, same = (epoch_order(3, index.length, index.image, 4, group, 2, shares) for shares in ((), mixed.shares))
        assert plain.tolist() == same.tolist()


def test_a_sample_comes_from_its_file(tmp_path, tiny_tokenizer):
    mixed = mixture(tmp_path, tiny_tokenizer)
    assert len(mixed) == 8 + 3 and [share.first for share in mixed.shares] == [0, 8]
    for i in (0, 7, 8, 19):
        part, its = (mixed.parts[0], i) if i < 8 else (mixed.parts[1], i - 8)
        assert mixed.sample(i).ids == part.sample(its).ids and mixed.index.length[i] == len(mixed.sample(i).ids)
    assert "8 of them (72.7%)" in mixed.summary() and "3 of them (27.3%)" in mixed.summary()


def test_tokens_are_split_by_file(tmp_path, tiny_tokenizer):
    """On any number of processes, in micro-batches of any size, also where a process has no sample."""
    mixed = mixture(tmp_path, tiny_tokenizer)
    for world, micro_tokens in ((1, 4000), (1, 100), (3, 200), (16, 200)):
        steps = [list(Loader(mixed, global_batch=6, micro_tokens=micro_tokens, rank=rank, world=world, seed=1, steps=3))
                 for rank in range(world)]
        for of_ranks in zip(*steps):
            ids = np.array(of_ranks[0].sample_ids)
            supervised = mixed.index.supervised[ids]
            splits = [batch.split for step in of_ranks for batch in step.batches]
            assert np.sum(splits, axis=0).tolist() == [supervised[ids < 8].sum(), supervised[ids >= 8].sum()]
            assert all(sum(batch.split) == len(batch.targets) for step in of_ranks for batch in step.batches)


@pytest.fixture
def two_files(chat_json, tmp_path) -> list[str]:
    """Six texts, and a third of 18 conversations about pictures in each epoch."""
    a, b = some_of(chat_json, tmp_path / "a.json", False), some_of(chat_json, tmp_path / "b.json", True)
    return [str(a), f"{b}:0.33"]


def flags_of(out: Path, files: list[str], *more: str) -> list[str]:
    flags = train_flags(out, Path("x"), "--epochs", "3", *more)
    i = flags.index("--data")
    return flags[:i + 1] + files + flags[i + 2:]


def test_an_interrupted_run_goes_on_with_the_samples_that_come_next(two_files, tmp_path):
    train_here(flags_of(tmp_path / "whole", two_files))
    train_here(flags_of(tmp_path / "stopped", two_files), stop_after=4)
    train_here(flags_of(tmp_path / "stopped", two_files))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    lines = metrics(tmp_path / "whole")
    assert len(lines) == 9                                              # 12 samples an epoch, 4 a step
    for line in lines:
        assert sum(file["share"] for file in line["files"].values()) == pytest.approx(1)
    names = [two_files[0], two_files[1].removesuffix(":0.33")]
    assert [sum(line["files"][name]["share"] for line in lines) for name in names] == pytest.approx([4.5, 4.5])


def test_losses_of_the_files_add_up(two_files, tmp_path, capsys):
    """To the loss of the step, weighted by their tokens; a step of one file alone has only its loss."""
    train_here(flags_of(tmp_path / "out", two_files, "--max-steps", "6"))
    for line in metrics(tmp_path / "out"):
        losses = [file["loss"] for file in line["files"].values()]
        known = [loss for loss in losses if loss is not None]
        assert min(known) - 1e-5 <= line["loss"] <= max(known) + 1e-5
        assert [loss is None for loss in losses] == [file["share"] == 0 for file in line["files"].values()]
    out = capsys.readouterr().out
    assert "12 samples an epoch" in out and "a.json: 6 of them (50.0%)" in out and "| b.json 100% loss " in out


def test_processes_change_nothing(two_files, tmp_path):
    train_here(flags_of(tmp_path / "one", two_files, "--max-steps", "3"))
    run_train(flags_of(tmp_path / "two", two_files, "--max-steps", "3", "--workers", "1"), processes=2)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        for name, file in one["files"].items():
            assert two["files"][name]["share"] == file["share"]
            assert two["files"][name]["loss"] == (file["loss"] and pytest.approx(file["loss"], rel=1e-4))


def test_weights():
    assert weighted("a.json") == ("a.json", 1.0) and weighted("a.json:0.1") == ("a.json", 0.1)
    assert weighted("C:/a.json") == ("C:/a.json", 1.0) and weighted("a.json:1e-2") == ("a.json", 0.01)
    for weight in ("0", "-1", "nan", "inf", "1.2.3", "1e9"):
        problem = f"--data: expected a number of at least 1e-06 and at most 1000, found {weight}"
        with pytest.raises(ValueError, match=problem):
            parse(["--data", f"a.json:{weight}"])


def test_other_weights_are_other_data(tmp_path, tiny_tokenizer):
    """A checkpoint is not resumed with another mixture."""
    checksums = {mixture(tmp_path, tiny_tokenizer, weights).checksum for weights in ((1.0, 0.25), (1.0, 0.5), (1.0,))}
    assert len(checksums) == 3


def test_a_bad_sample_of_any_file_is_named_with_its_file(tmp_path, tiny_tokenizer):
    """Or skipped, without another file getting its tokens."""
    (tmp_path / "b").mkdir()
    good = open_dataset(write_data(tmp_path, n=4), tiny_tokenizer)
    path = write_data(tmp_path / "b", n=4, t2=talk("q", "a", image="gone.png"))
    more = {"global_batch": 8, "micro_tokens": 4000, "rank": 0, "world": 1, "seed": 1, "steps": 1}
    with pytest.raises(ValueError, match=re.escape(f"of {path}: image missing")):
        list(Loader(Mixture([good, open_dataset(path, tiny_tokenizer)], (1.0, 1.0)), **more))
    parts = [open_dataset(file, tiny_tokenizer, on_bad_sample="skip") for file in (good.path, path)]
    [step] = Loader(Mixture(parts, (1.0, 1.0)), **more)
    lost = parts[1].index.supervised[2]
    assert step.batches[0].split == [parts[0].index.supervised.sum(), parts[1].index.supervised.sum() - lost]
    assert lost > 0
