"""Checkpoints: going on from them bit for bit, damage, and what happens to the folder of a run."""
import json
import re

import pytest
import torch
import torch.distributed.checkpoint.filesystem as dcp_files
from helpers import GOLDEN, TINY_MODEL, load_weights_command, metrics, train_flags
from training import assert_same_run, run_train, some_of, train_here

import lib.checkpoint as checkpoint
import train
from lib.checkpoint import read_checkpoint
from load_weights import load_model

# ---------------------------------------------------------------------------------------------------
# Saving and resuming


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "lora"])
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(stage, chat_json, tmp_path):
    """Protects guarantee 4, with dropout on: nothing that a step needs lives outside the checkpoint and the seed."""
    more = ["--epochs", "3", "--max-steps", "12", "--dropout", "0.1"]
    if stage == "pretrain":
        chat_json = some_of(chat_json, tmp_path / "captions.json", image=True, turns=2)
    if stage == "lora":
        stage, more = "finetune", [*more, "--lora-r", "2", "--val-data", str(chat_json), "--val-every", "5"]
    train_here(train_flags(tmp_path / "whole", chat_json, *more, stage=stage))
    train_here(train_flags(tmp_path / "parts", chat_json, *more, stage=stage), stop_after=5)
    assert [p.name for p in (tmp_path / "parts").glob("step_*")] == ["step_000005"]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:      # as a run leaves it that was killed after the save
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train_here(train_flags(tmp_path / "parts", chat_json, *more, stage=stage))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_bf16_run_stopped_and_resumed_equals_an_uninterrupted_one(chat_json, tmp_path):
    """Its checkpoint holds the fp32 masters, not the bf16 weights that it computes with."""
    more = ["--dtype", "bf16", "--epochs", "3", "--max-steps", "6", "--dropout", "0.1"]
    train_here(train_flags(tmp_path / "whole", chat_json, *more))
    train_here(train_flags(tmp_path / "parts", chat_json, *more), stop_after=3)
    train_here(train_flags(tmp_path / "parts", chat_json, *more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_of_two_processes_continues_on_one_and_then_on_four(chat_json, tmp_path):
    more = ["--epochs", "3", "--max-steps", "8"]
    train_here(train_flags(tmp_path / "whole", chat_json, *more))
    run_train(train_flags(tmp_path / "parts", chat_json, *more), processes=2, stop_after=3)
    train_here(train_flags(tmp_path / "parts", chat_json, *more), stop_after=5)
    run_train(train_flags(tmp_path / "parts", chat_json, *more), processes=4)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_a_damaged_checkpoint_is_passed_over_and_named(chat_json, tmp_path, capfd):
    more = ["--epochs", "2", "--save-every", "3", "--keep", "3"]
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=9)
    shards = sorted((tmp_path / "out" / "step_000009").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (tmp_path / "out" / "step_000006" / "checkpoint.json").write_text("{")
    capfd.readouterr()
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=10)
    said = capfd.readouterr().out
    assert shards[0].name in said and "step_000006" in said and "going on from" in said and "step_000003" in said
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(10))
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is missing; --resume auto takes the newest one in"):
        train_here(train_flags(tmp_path / "out", chat_json, *more, "--resume", str(shards[0].parent)))
    for manifest in (tmp_path / "out").glob("step_*/checkpoint.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="no complete checkpoint: .*; --resume never"):
        train_here(train_flags(tmp_path / "out", chat_json, *more))
    assert len(list((tmp_path / "out").glob("step_*"))) == 3


def test_a_flipped_bit_is_found_and_the_checkpoint_passed_over(chat_json, tmp_path, capfd):
    """Protects against training on from broken weights: the size of the file is what it was."""
    more, out = ["--epochs", "2", "--save-every", "3", "--keep", "3"], tmp_path / "out"
    run_train(train_flags(out, chat_json, *more), processes=2, stop_after=6)
    assert len(json.loads((out / "step_000006" / "checkpoint.json").read_text())["crc32"]) == 2
    shard = sorted((out / "step_000006").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.parent}: {shard.name} is damaged"):
        load_weights_command(["export", "--model", str(shard.parent), "--out", str(tmp_path / "exported")])
    capfd.readouterr()
    train_here(train_flags(out, chat_json, *more), stop_after=7)
    said = capfd.readouterr().out
    assert f"passing over {shard.parent.name}: {shard.parent}: {shard.name} is damaged" in said
    assert "step_000003" in said
    assert [m["step"] for m in metrics(out)] == list(range(7))


def test_going_back_to_an_older_checkpoint_drops_the_later_ones_when_it_saves(chat_json, tmp_path):
    """--resume out/step_000002, then auto: it went on from step 6 of the abandoned run; --keep dropped the new ones."""
    more, out = ["--epochs", "2", "--save-every", "2", "--keep", "3"], tmp_path / "out"
    train_here(train_flags(out, chat_json, *more), stop_after=6)
    train_here(train_flags(out, chat_json, *more, "--resume", str(out / "step_000002")), stop_after=4)
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000002", "step_000004"]
    assert [m["step"] for m in metrics(out)] == list(range(4))


@pytest.mark.parametrize("moment", ["while the old one is deleted", "before the new one is renamed"])
def test_a_kill_while_a_step_is_saved_again_loses_neither_the_old_nor_the_new(moment, chat_json, tmp_path, monkeypatch,
                                                                              capsys):
    """After going back with --resume, the step is there already: it was deleted, and only then the new one renamed."""
    more, out = ["--epochs", "2", "--save-every", "2", "--keep", "3"], tmp_path / "out"
    train_here(train_flags(out, chat_json, *more), stop_after=4)
    real = checkpoint.remove

    def killed(path):
        if path.name == "step_000004":
            if moment.startswith("before"):
                real(path)
            else:
                (path / "checkpoint.json").unlink()
            raise KeyboardInterrupt
        real(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(train_flags(out, chat_json, *more, "--resume", str(out / "step_000002")))
    train_here(train_flags(out, chat_json, *more), stop_after=5)
    assert f"going on from {out / 'step_000004'}" in capsys.readouterr().out       # rather than again from step 2
    assert [m["step"] for m in metrics(out)] == list(range(5))
    assert sorted(p.name for p in out.glob("*step_*")) == ["step_000002", "step_000004", "step_000005"]


def test_other_settings_are_refused_with_their_names(chat_json, tmp_path):
    train_here(train_flags(tmp_path / "out", chat_json), stop_after=2)
    with pytest.raises(ValueError, match="lr: 0.001 then, 0.002 now"):
        train_here(train_flags(tmp_path / "out", chat_json, "--lr", "2e-3"))
    changed = tmp_path / "changed.json"
    changed.write_text(chat_json.read_text().replace("Answer 7", "Answer 8"))
    with pytest.raises(ValueError, match="data checksum"):
        train_here(train_flags(tmp_path / "out", changed))


@pytest.mark.parametrize("change", [{"crc32": None}, {"config": 0}, {"sources": {}}, {"step": "2"}])
def test_a_checkpoint_json_that_lacks_something_is_not_believed(tmp_path, change):
    settings = {"stage": "finetune", "dropout": 0.0, "image_mode": "pad", "lora_alpha": 16.0, "dtype": "fp32"}
    saved = {"step": 2, "updates": 2, "crc32": {}, "config": settings, "sources": []}
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
    assert read_checkpoint(tmp_path).manifest == saved
    [field] = change
    for changed in (saved | change, {name: value for name, value in saved.items() if name != field}):
        (tmp_path / "checkpoint.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"for {field!r}"):
            read_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_alive(chat_json, tmp_path, monkeypatch, capfd):
    real, calls = checkpoint.dcp.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    more = ["--epochs", "2", "--save-every", "2", "--keep", "1"]
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=5)
    assert "No space left" in capfd.readouterr().out
    assert [p.name for p in (tmp_path / "out").glob("*step*")] == ["step_000005"]


def test_a_disk_full_at_the_very_end_leaves_a_checkpoint(chat_json, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", full)
        with pytest.raises(ValueError, match="No space left.*step_000002 has it"):
            train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "2"))
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "2"))
    train_here(train_flags(tmp_path / "whole", chat_json, "--max-steps", "2"))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_run_without_a_model_says_how_to_make_one(chat_json, tmp_path):
    train_here(train_flags(tmp_path / "out", chat_json), stop_after=1)
    for folder in (tmp_path / "out", tmp_path / "out" / "step_000001"):
        with pytest.raises(ValueError, match="export --model .*step_000001"):
            load_model(folder)


def test_a_file_that_another_process_wrote_elsewhere_is_noticed(chat_json, tmp_path, monkeypatch, capfd):
    """Protects against a checkpoint that lacks a node's part and calls itself complete."""
    real = checkpoint.on_every_process

    def with_a_stranger(work):
        results = real(work)
        return [*results, {"shard-00002-model-00001-of-00001.safetensors": "0" * 8}] if results != [None] else results
    monkeypatch.setattr(checkpoint, "on_every_process", with_a_stranger)
    monkeypatch.setattr(checkpoint, "check_shared", lambda *args: None)
    train_here(train_flags(tmp_path / "out", chat_json, "--save-every", "1", "--max-steps", "2"))
    assert re.search("No such file .*shard-00002-model-00001-of-00001.safetensors", capfd.readouterr().out)
    assert not list((tmp_path / "out").glob("*step_*"))


def test_a_checkpoint_is_written_in_files_that_fit_into_memory(chat_json, tmp_path, monkeypatch):
    """dcp holds a whole file in host memory, twice: with one file, stage 2 took 74 GB."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20_000)
    more = ["--epochs", "2", "--max-steps", "4"]
    train_here(train_flags(tmp_path / "parts", chat_json, *more), stop_after=2)
    files = list((tmp_path / "parts" / "step_000002").glob("*.safetensors"))
    largest = max(p.nbytes for p in load_model(TINY_MODEL).parameters())
    assert len(files) > 10 and all(file.stat().st_size < max(20_000, largest) + 10_000 for file in files)
    step = str(tmp_path / "parts" / "step_000002")
    load_weights_command(["export", "--model", step, "--out", str(tmp_path / "exported")])
    train_here(train_flags(tmp_path / "parts", chat_json, *more))
    train_here(train_flags(tmp_path / "whole", chat_json, *more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_save_copies_from_gpus_into_ordinary_memory(chat_json, tmp_path, monkeypatch):
    """Page-locked memory, in which torch would copy ahead, is rounded up to a power of two and never given back."""
    save = checkpoint.dcp.save

    def save_where_there_is_a_gpu(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(dcp_files, "_OverlappingCpuLoader", lambda *args, **options: pytest.fail("copies ahead"))
            return save(*args, **options)
    monkeypatch.setattr(checkpoint.dcp, "save", save_where_there_is_a_gpu)
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "3"), stop_after=2)
    assert (tmp_path / "out" / "step_000002" / "checkpoint.json").exists()


def test_a_machine_without_memory_for_a_checkpoint_trains_on(chat_json, tmp_path, monkeypatch, capfd):
    """Protects a run from being killed for memory in the middle of a save."""
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1e6)
    train_here(train_flags(tmp_path / "out", chat_json, "--save-every", "1", "--max-steps", "3"))
    said = capfd.readouterr().out
    assert re.search("writing it will take 1.1 GB, and the memory of .* has 0.0 GB free", said)
    assert [m["step"] for m in metrics(tmp_path / "out")] == [0, 1, 2]

# ---------------------------------------------------------------------------------------------------
# The output folder


def test_a_finished_run_says_so_and_never_starts_afresh_by_itself(chat_json, tmp_path, capfd):
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "2"))
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    capfd.readouterr()
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "2"))
    assert "already finished" in capfd.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_steps: 2 then, 3 now"):
        train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "3"))
    with pytest.raises(FileNotFoundError, match="other.json"):
        train_here(train_flags(tmp_path / "out", tmp_path / "other.json", "--max-steps", "2"))


def test_a_finished_run_notices_other_data_and_other_pictures(chat_json, tmp_path, capfd):
    """One record, then twenty in the same file: that was "already finished", and the new ones were not learned."""
    out, data = tmp_path / "out", tmp_path / "mine.json"
    data.write_bytes(chat_json.read_bytes())
    more = ["--max-steps", "2"]
    train_here(train_flags(out, data, *more))
    data.rename(tmp_path / "moved.json")
    capfd.readouterr()
    train_here(train_flags(out, tmp_path / "moved.json", *more, "--images", f"{GOLDEN}/./images/"))
    assert "already finished" in capfd.readouterr().out
    data.write_text(chat_json.read_text().replace("Answer 7", "Answer 8"))
    with pytest.raises(ValueError, match="finished model made with other settings(.|\n)*data checksum: '.*' then, '"):
        train_here(train_flags(out, data, *more))
    with pytest.raises(ValueError, match="finished model made with other settings(.|\n)*images: "):
        train_here(train_flags(out, tmp_path / "moved.json", *more, "--images", str(tmp_path)))


def test_a_finished_run_on_two_files_notices_how_much_of_each(chat_json, tmp_path, capfd):
    out, more = tmp_path / "out", ["--max-steps", "2", "--data", str(chat_json)]
    for _ in range(2):
        train_here(train_flags(out, chat_json, *more, f"{chat_json}:2"))
    assert capfd.readouterr().out.count("already finished") == 1
    with pytest.raises(ValueError, match="finished model made with other settings(.|\n)*data checksum: '.*' then, '"):
        train_here(train_flags(out, chat_json, *more, f"{chat_json}:3"))


def test_folders_that_are_not_this_runs_stay_as_they_are(chat_json, tmp_path):
    """Protects other people's files, the model a run starts from, and a finished model whose run is asked for more."""
    def contents() -> dict:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"port": 80}')
    (tmp_path / "app" / "precious.safetensors").write_bytes(b"x")
    train_here(train_flags(tmp_path / "run", chat_json, "--max-steps", "3", "--save-every", "2"))
    before, checkpoint = contents(), str(tmp_path / "run" / "step_000002")
    for out, more, words in (("app", ["--resume", "never"], "not a training run's"),
                             ("run", ["--model", str(tmp_path / "run"), "--resume", "never"], "starts from"),
                             ("run", ["--max-steps", "3", "--resume", checkpoint, "--lr", "1"], "0.001 then, 1.0 now"),
                             ("new", ["--images", "nowhere"], "no image folder at nowhere")):
        with pytest.raises((ValueError, OSError), match=words):
            train_here(train_flags(tmp_path / out, chat_json, *more))
        assert contents() == before


def test_a_foreign_folder_is_not_written_into(chat_json, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are not a training run's"):
        train_here(train_flags(tmp_path, chat_json))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]
