"""Dataset, schedule and Loader: the samples of a step are a pure function; bad samples stop the run or are skipped."""
import json
import os
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_forked
from helpers import ROOT, talk
from torch.utils.data._utils import signal_handling
from zoo import open_dataset, write_data, zoo

from data import EOT, IGNORE, IMAGE, Dataset, Index, Loader, Sample, collate, eot_id
from lib import records
from lib.schedule import epoch_order, modality_order, split_step, step_samples, steps_per_epoch


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return tiny_tokenizer

# ---------------------------------------------------------------------------------------------------
# Schedule


def fake_index(n: int, text_only: float = 0.1, seed: int = 0) -> Index:
    rng = np.random.default_rng(seed)
    image = (rng.random(n) >= text_only).astype(np.int32)
    length = (rng.lognormal(5.5, 0.6, n).astype(np.int32) + 40 + 576 * image).clip(max=2048)
    nothing = np.zeros(n, np.int32)
    return Index(np.zeros((n, 2), np.int64), length, length // 4, image, nothing, nothing)


def plan(index: Index, seed: int, group: str, global_batch: int):
    n = len(index.length)
    order = partial(epoch_order, seed, index.length, index.image, global_batch, group)
    return [step_samples(k, n, global_batch, order) for k in range(2 * steps_per_epoch(n, global_batch))]


@pytest.mark.parametrize("group", ["none", "modality_length"])
@pytest.mark.parametrize("n, text_only", [(1000, 0.1), (1000, 0.0), (1000, 1.0), (7, 0.5), (64, 0.5), (65, 0), (1, 0)])
def test_every_sample_once_per_epoch(group, n, text_only):
    """Also for data that is all pictures or all text, which made the original's grouping fail."""
    steps = plan(fake_index(n, text_only), 3, group, 32)
    half = len(steps) // 2
    assert all(sorted(sum(epoch, [])) == list(range(n)) for epoch in (steps[:half], steps[half:]))
    assert all(len(s) == 32 for s in steps[:half - 1])
    assert n < 64 or (steps[:half] != steps[half:] and steps != plan(fake_index(n, text_only), 4, group, 32))


def test_steps_of_the_two_stages():
    assert steps_per_epoch(558_128, 256) == 2181 and steps_per_epoch(665_298, 128) == 5198


def test_grouping_keeps_modalities_apart():
    index = fake_index(1000, 0.3)
    mixed = [len(set(index.image[ids].tolist())) == 2 for ids in plan(index, 0, "modality_length", 32)[:31]]
    assert sum(mixed) <= 2


def test_order_of_the_original(monkeypatch):
    """The runs of LLaVA-Phi's group_by_modality_length for one seed, as the original gave them (spec, 4.2).

    It drew the samples of a run from the global generator and their order from one of its own, and then dealt each run
    out to two processes. Here split_step does that.
    """
    torch.manual_seed(42)
    real, generators = torch.randperm, [None, None, torch.Generator()]
    monkeypatch.setattr(torch, "randperm", lambda n, generator: real(n, generator=generators.pop(0)))
    lengths = np.array([10, 5, 3, 8, 9, 2, 7, 6, 4, 12, 3, 1, 9, 11])
    has_image = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    order = modality_order(lengths, has_image, 4, torch.Generator())
    runs = [order[i:i + 4] for i in range(0, 14, 4)]
    assert [sorted(run) for run in runs] == [[0, 7, 10, 12], [3, 6, 9, 13], [2, 4, 5, 8], [1, 11]]
    assert all(run == sorted(run, key=lambda i: -lengths[i]) for run in runs)


def test_split_is_fair_and_within_the_budget():
    """Every sample once; as many micro-batches on every rank; none above the budget or empty; ranks equally loaded; the
    same micro-batches for 1, 2 and 4 ranks when their number allows it."""
    index, same = fake_index(128 * 20), 0
    for k in range(20):
        length, image = (x[k * 128:(k + 1) * 128].tolist() for x in (index.length, index.image))
        costs = [tokens + 73 * picture for tokens, picture in zip(length, image)]
        sets = {}
        for world in (1, 2, 4, 8):
            ranks = split_step(length, costs, world, 16384)
            assert len(ranks) == world and len({len(r) for r in ranks}) == 1
            micros = [m for r in ranks for m in r]
            assert sorted(sum(micros, [])) == list(range(128)) and all(micros)
            assert max(sum(length[i] for i in m) for m in micros) <= 16384
            loads = [sum(costs[i] for m in r for i in m) for r in ranks]
            assert max(loads) < 1.1 * sum(loads) / world
            sets[world] = sorted(micros)
        same += sets[1] == sets[2] == sets[4] == sets[8]
    assert same > 0                                         # 7 or 8 micro-batches: 8 on all counts of ranks


def test_split_at_the_edges():
    assert split_step([5000], [5000], 1, 1000) == [[[0]]]           # above the budget: alone
    assert sorted(sum(sum(split_step([5000, 10, 10], [5000, 10, 10], 1, 1000), []), [])) == [0, 1, 2]
    assert sorted(split_step([10], [10], 2, 1000)) == [[[]], [[0]]]
    assert split_step([], [], 2, 1000) == [[[]], [[]]]

# ---------------------------------------------------------------------------------------------------
# Dataset and loader


def loader(dataset: Dataset, **more) -> Loader:
    return Loader(dataset, **{**dict(global_batch=8, micro_tokens=300, rank=0, world=1, seed=1, steps=10), **more})


def same(a: list, b: list) -> bool:
    return all(x[:2] == y[:2] and len(x.batches) == len(y.batches)
               and all(torch.equal(t, u) for s, r in zip(x.batches, y.batches) for t, u in zip(s[:6], r[:6]))
               for x, y in zip(a, b, strict=True))


def test_workers_change_nothing_and_resuming_is_exact(tmp_path, tiny):
    """The same tensors with 0 and 2 workers, from a list and from lines; from step 6 on, those of a whole run."""
    path = write_data(tmp_path)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(r) for r in json.loads(path.read_text())))
    whole = list(loader(open_dataset(path, tiny)))
    assert same(whole, list(loader(open_dataset(path, tiny), workers=2)))
    assert same(whole, list(loader(open_dataset(lines, tiny))))
    assert same(whole[6:], list(loader(open_dataset(path, tiny), start_step=6)))


def test_steps_are_the_same_samples_for_any_number_of_ranks(tmp_path, tiny):
    dataset = open_dataset(write_data(tmp_path), tiny)
    one = list(loader(dataset))
    for world in (2, 4, 16):
        ranks = [list(loader(dataset, rank=r, world=world)) for r in range(world)]
        for k, step in enumerate(one):
            assert all(rank[k].sample_ids == step.sample_ids for rank in ranks)
            assert len({len(rank[k].batches) for rank in ranks}) == 1
            targets = sorted(t for rank in ranks for b in rank[k].batches for t in b.targets.tolist())
            assert targets == sorted(t for b in step.batches for t in b.targets.tolist())
            images = sum(len(b.images) for rank in ranks for b in rank[k].batches)
            assert images == sum(len(b.images) for b in step.batches)


def test_resuming_reads_nothing_before_the_step(tmp_path, tiny, monkeypatch):
    """Step 5000 of 665,298 records, none of which exists: only the samples of that step are asked for."""
    dataset, asked = open_dataset(write_data(tmp_path), tiny), []
    dataset.index = fake_index(665_298)
    monkeypatch.setattr(dataset, "sample", lambda i: asked.append(i) or Sample("x", [1], [1], None))
    step = next(iter(loader(dataset, global_batch=128, micro_tokens=10**9, steps=5198, start_step=5000)))
    assert step.step == 5000 and sorted(asked) == sorted(step.sample_ids) and len(asked) == 128


def test_the_index_is_made_once_and_tied_to_its_data(tmp_path, tiny, monkeypatch):
    path, out = write_data(tmp_path), tmp_path / "out"
    made = open_dataset(path, tiny, cache_dir=out).index
    monkeypatch.setattr(Dataset, "make_index", lambda self: pytest.fail("made again"))
    for a, b in zip(made, open_dataset(path, tiny, cache_dir=out).index):
        assert np.array_equal(a, b)
    for change in (dict(block_size=99), dict(path=path)):
        path.write_text(path.read_text() + (" " if "path" in change else ""))
        with pytest.raises(pytest.fail.Exception):
            open_dataset(path, tiny, cache_dir=out, block_size=change.get("block_size", 128)).index
    assert {p.suffix for p in out.iterdir()} == {".npz"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json", "out"]           # nothing beside the user's data


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another's", "an array", "text"])
def test_an_index_that_cannot_be_read_is_made_anew(damage, tmp_path, tiny, capsys):
    """After a power failure it ended every restart with a traceback."""
    path, out = write_data(tmp_path), tmp_path / "out"
    made = open_dataset(path, tiny, cache_dir=out).index
    [cache] = out.glob("index_*.npz")
    whole = cache.read_bytes()
    if damage == "another's":
        np.savez(cache, length=made.length)
    elif damage == "an array":
        cache.write_bytes(b"")
        with open(cache, "wb") as file:
            np.save(file, made.length)
    else:
        middle = len(whole) // 2
        cache.write_bytes({"empty": b"", "cut": whole[:middle], "text": b"x" * 99,
                           "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]}[damage])
    for a, b in zip(made, open_dataset(path, tiny, cache_dir=out).index, strict=True):
        assert np.array_equal(a, b)
    said = capsys.readouterr().out
    assert f"{cache} cannot be read" in said and "made anew" in said and said.count("\n") == 1
    assert cache.read_bytes() == whole


def test_the_index_is_made_where_files_cannot_be_locked(tmp_path, tiny, monkeypatch):
    """Lustre mounted without flock answers every lock with an error; a run there has to start all the same."""
    def refuse(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("fcntl.lockf", refuse)
    assert len(open_dataset(write_data(tmp_path), tiny, cache_dir=tmp_path / "out")) == 40


def test_lengths_are_those_of_the_samples(tmp_path, tiny):
    """The plan must budget what collate packs; and records larger than the window of the reader must be found."""
    path = write_data(tmp_path, t3=talk("é" * 3000, "x", id="long"))
    dataset = open_dataset(path, tiny)
    for i in range(len(dataset)):
        s = dataset.sample(i)
        assert len(s.ids) == len(s.labels) == dataset.index.length[i]
        assert (s.image is not None) == dataset.index.image[i]
        assert sum(label != IGNORE for label in s.labels) == dataset.index.supervised[i]
    assert dataset.index.cut[3] > 0 and dataset.index.supervised[3] == 0
    assert "1 cut at 128, 1 without anything to learn" in dataset.summary()


def test_the_reader_does_not_care_where_its_window_ends(tmp_path, tiny, monkeypatch):
    path = write_data(tmp_path)
    whole = open_dataset(path, tiny).index.ranges
    for width in (100, 377, 1000):
        monkeypatch.setattr(records, "BLOCK", width)
        assert np.array_equal(open_dataset(path, tiny).find_ranges(), whole)
        assert records.lines_of(path, whole[:, 0].tolist())[:3] == [2, 15, 29]
    assert [json.loads(path.read_bytes()[a:b])["id"] for a, b in whole] == [f"r{i}" for i in range(40)]


def kill_when_asked(dataset: Dataset, i: int):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_worker_ends_the_run(tmp_path, tiny, monkeypatch):
    """Killed by the system for memory, say: an error, never an endless wait."""
    dataset = open_dataset(write_data(tmp_path), tiny)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)     # a training in this process took it away
    monkeypatch.setattr(Dataset, "sample", kill_when_asked)
    with pytest.raises(RuntimeError, match="worker"):
        list(loader(dataset, workers=1))


def test_workers_outlive_the_signals_of_the_launcher(tmp_path, tiny):
    """torchrun sends SIGTERM to the whole group. Workers that died of it took the last checkpoint with them."""
    (tmp_path / "program.py").write_text("""if True:
        import os, signal, sys; from pathlib import Path; from data import load_tokenizer
        from helpers import TINY_MODEL; from test_loader import loader; from zoo import open_dataset
        signal.signal(signal.SIGTERM, lambda *a: print("asked", flush=True))
        dataset = open_dataset(Path(sys.argv[1]), load_tokenizer(TINY_MODEL))
        steps = iter(loader(dataset, workers=2, steps=40))
        next(steps); os.killpg(0, signal.SIGTERM); print(len(list(steps)), flush=True)""")
    done = run_forked(tmp_path / "program.py", write_data(tmp_path), timeout=60)
    assert done.stdout.split() == ["asked", "39"], done.stderr


# ---------------------------------------------------------------------------------------------------
# Bad data


@pytest.mark.parametrize("name", sorted(zoo(Path())))
def test_strict_training_stops_at_it_and_skipping_survives_it(name, tmp_path, zoo_images, tiny):
    """Stops with the id, the line and the command; skipping puts in its place a sample that supervises nothing, so that
    the other samples' tensors are what they were, and lists it."""
    record = zoo(zoo_images)[name][1]
    path = write_data(tmp_path, t7=record)
    if name == "endless question":
        return                                              # learns nothing, harms nothing: counted in the index
    with pytest.raises(ValueError) as e:
        list(loader(open_dataset(path, tiny, images=zoo_images), steps=5))
    for part in (json.dumps(record["id"])[1:-1], "line", str(path), "python data.py check"):
        assert part in str(e.value)
    skipping = open_dataset(path, tiny, images=zoo_images, on_bad_sample="skip", cache_dir=tmp_path / "out")
    steps = list(loader(skipping, steps=5, micro_tokens=10**9))
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [b["sample"] for b in listed] == [7]
    nothing = Sample("", [eot_id(tiny)], [IGNORE], None)
    for step in steps:
        want = collate([nothing if i == 7 else skipping.sample(i) for i in step.sample_ids], 28)
        assert all(torch.equal(a, b) for a, b in zip(step.batches[0][:6], want))


def test_skipping_gives_up_when_too_much_is_bad(tmp_path, tiny):
    path = write_data(tmp_path, **{f"t{i}": talk("q") for i in range(3, 15)})
    with pytest.raises(ValueError, match="1[12] bad samples, more than 10"):
        list(loader(open_dataset(path, tiny, on_bad_sample="skip", cache_dir=tmp_path / "out"), workers=1))


def test_a_bad_sample_in_a_worker_stops_the_run(tmp_path, tiny):
    path = write_data(tmp_path, t7=talk(f"{IMAGE}\nq", "a", id="the bad one", image="absent.jpg"))
    with pytest.raises(ValueError, match="the bad one.*image missing"):
        list(loader(open_dataset(path, tiny), workers=2))


def test_a_dataset_survives_the_way_to_a_spawned_worker(tmp_path, tiny):
    """Pickling a tokenizer forgets that special words in texts are text; systems that do not fork would train on it."""
    dataset = open_dataset(write_data(tmp_path, t1=talk(f"what is {EOT}?", f"{EOT} is text")), tiny)
    assert pickle.loads(pickle.dumps(dataset)).sample(1) == dataset.sample(1)
    assert dataset.sample(1).labels.count(eot_id(tiny)) == 1


def test_links_out_of_the_folder_can_be_allowed(tmp_path, zoo_images, tiny):
    path = write_data(tmp_path)
    link = {"image": "link.jpg"}
    assert open_dataset(path, tiny, images=zoo_images, follow_links=True).pictures.find(link["image"]).exists()
    with pytest.raises(ValueError, match="--follow-links"):
        open_dataset(path, tiny, images=zoo_images).pictures.find(link["image"])


def test_a_windows_path_is_called_one(tmp_path, tiny, zoo_images):
    """It is not outside the folder: what is wrong with it is the separator."""
    pictures = open_dataset(write_data(tmp_path), tiny, images=zoo_images).pictures
    with pytest.raises(ValueError, match="image path has backslashes: .*expected a path with /"):
        pictures.find("sub\\x.jpg")
    with pytest.raises(ValueError, match="image outside the folder"):
        pictures.find("C:\\x.jpg")


def test_an_error_outside_the_workers_ends_the_process():
    """Protects against a hang at exit: workers ignore the signal that Python sends them then."""
    code = ("from lib.workers import map_in_workers\nx = map_in_workers(abs, iter(int, 1), 2)\n"
            "next(x)\nraise KeyboardInterrupt")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and ended.stderr.strip().endswith("KeyboardInterrupt")
