"""What a run has learned is not lost: errors near its end, errors in its middle, and file systems that lack a call."""
import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from forks import start_ranks
from helpers import GOLDEN, TINY_MODEL, load_weights_command, metrics, rewrite, start_script, train_flags
from safetensors import SafetensorError
from training import assert_same_run, train_here

import lib.checkpoint as checkpoint
import lib.common as common
import train
from data import Step
from load_weights import load_model

VOCABULARY = ("embed_tokens", "lm_head")
TOKENS = 444                    # of the tiny model's tokenizer


def with_rows(out: Path, rows: int) -> Path:
    """The tiny model with this many rows in its embedding and its head, as resize_token_embeddings leaves them."""
    def change(tensors: dict) -> dict:
        return {name: x[:rows] if any(word in name for word in VOCABULARY) else x for name, x in tensors.items()}

    def config(content: dict) -> dict:
        return content | {"vocab_size": rows}
    return rewrite(TINY_MODEL, out, change, config)


@pytest.fixture
def warned(monkeypatch):
    """Warnings that come once per process come again."""
    monkeypatch.setattr(common, "WARNED", set())

# ---------------------------------------------------------------------------------------------------
# What saving needs


def test_a_vocabulary_without_a_row_for_image_gets_one_when_it_is_saved(chat_json, tmp_path, capsys):
    """It trained to the last step, and then there was neither a model nor a checkpoint."""
    source = with_rows(tmp_path / "resized", TOKENS)
    train_here(train_flags(tmp_path / "out", chat_json, "--model", str(source), "--max-steps", "2"))
    assert load_weights_command(["export", "--model", str(source), "--out", str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert load_weights_command(["inspect", str(source)]) == 0
    assert "no row is left for <image>" in capsys.readouterr().out
    before = load_model(source)
    for out in ("out", "exported"):
        model = load_model(tmp_path / out)
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert config["image_token_index"] == TOKENS and config["text_config"]["vocab_size"] == TOKENS + 1
        for p in (model.llm.wte.weight, model.llm.lm_head.weight, model.llm.lm_head.bias):
            assert len(p) == TOKENS + 1
            torch.testing.assert_close(p[-1], p[:-1].mean(0))
    assert torch.equal(model.llm.wte.weight[:-1], before.llm.wte.weight)
    again = ["export", "--model", str(tmp_path / "exported"), "--out", str(tmp_path / "again")]
    assert load_weights_command(again) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "exported/model.safetensors").read_bytes()


def test_the_row_of_image_is_never_the_answer(tmp_path, tiny_model):
    """Its logit is the mean of the others', so another is always larger."""
    load_weights_command(["export", "--model", str(with_rows(tmp_path / "a", TOKENS)), "--out", str(tmp_path / "b")])
    head = load_model(tmp_path / "b").llm.lm_head
    logits = head(torch.randn(100, head.in_features))
    torch.testing.assert_close(logits[:, -1], logits[:, :-1].mean(1), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_full_vocabulary_can_be_exported(chat_json, tmp_path):
    source = with_rows(tmp_path / "resized", TOKENS)
    train_here(train_flags(tmp_path / "out", chat_json, "--model", str(source)), stop_after=2)
    export = ["export", "--model", str(tmp_path / "out/step_000002"), "--out", str(tmp_path / "x")]
    assert load_weights_command(export) == 0
    assert len(load_model(tmp_path / "x").llm.wte.weight) == TOKENS + 1


def without_post_layernorm(tensors: dict) -> dict:
    return {name: x for name, x in tensors.items() if "post_layernorm" not in name}


@pytest.mark.parametrize("fault, words", [
    ("fewer rows than tokens", "the tokenizer has 444 tokens and the embedding 443 rows"),
    ("no LayerNorm after the tower", "2 missing: vision_tower.vision_model.post_layernorm"),
    ("no tokenizer", "holds no usable tokenizer: expected tokenizer.json"),
])
def test_what_a_save_would_refuse_is_refused_before_the_first_step(fault, words, chat_json, tmp_path):
    if fault == "fewer rows than tokens":
        source = with_rows(tmp_path / "source", TOKENS - 1)
    elif fault == "no tokenizer":
        source = rewrite(TINY_MODEL, tmp_path / "source", keep=("config.json",))
    else:
        source = rewrite(TINY_MODEL, tmp_path / "source", without_post_layernorm)
    with pytest.raises((ValueError, OSError), match=words):
        train_here(train_flags(tmp_path / "out", chat_json, "--model", str(source), "--max-steps", "2"))
    assert not (tmp_path / "out").exists()


def test_inspect_names_a_vocabulary_of_another_model(tmp_path, capsys):
    assert load_weights_command(["inspect", str(with_rows(tmp_path / "source", TOKENS - 1))]) == 2
    assert "the tokenizer has 444 tokens and the embedding 443 rows" in capsys.readouterr().out

# ---------------------------------------------------------------------------------------------------
# The folder that the run started from


def train_and_change(source: Path, out: Path, data: Path, change, *more: str) -> None:
    """A run of three steps that meanwhile has its source folder changed, after the second."""
    real = train.train_step

    def step(model, optimizer, step, *rest):
        if step.step == 1:
            change()
        return real(model, optimizer, step, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        train_here(train_flags(out, data, "--model", str(source), "--max-steps", "3", *more))


@pytest.mark.parametrize("lora", [[], ["--lora-r", "4"]])
@pytest.mark.parametrize("change", ["renamed", "emptied", "replaced"])
def test_the_source_may_move_while_a_run_trains(change, lora, chat_json, tmp_path):
    """200 of 200 steps, then "no such folder" and nothing saved. Its files are open and its tokenizer is in memory."""
    source = shutil.copytree(TINY_MODEL, tmp_path / "source")

    def happen() -> None:
        if change == "renamed":
            source.rename(tmp_path / "elsewhere")
        elif change == "emptied":
            for path in source.iterdir():
                path.unlink()
        else:
            shutil.rmtree(source)
            rewrite(TINY_MODEL, source, lambda tensors: {name: x + 1 for name, x in tensors.items()})
    train_and_change(source, tmp_path / "out", chat_json, happen, *lora)
    train_here(train_flags(tmp_path / "calm", chat_json, "--max-steps", "3", *lora))
    assert_same_run(tmp_path / "out", tmp_path / "calm")


@pytest.mark.parametrize("change", ["cut", "written over"])
def test_a_source_that_is_written_into_leaves_a_checkpoint_that_export_can_use(change, chat_json, tmp_path):
    source = rewrite(TINY_MODEL, tmp_path / "source")
    file = source / "model.safetensors"
    good = file.read_bytes()

    def happen() -> None:
        file.write_bytes(good[:-1000] if change == "cut" else good[:-1000] + b"x" * 1000)
    with pytest.raises(ValueError, match="written to since it was opened.*step_000003 has it.*export --model ") as e:
        train_and_change(source, tmp_path / "out", chat_json, happen)
    assert "\n" not in str(e.value)
    file.write_bytes(good)
    export = ["export", "--model", str(tmp_path / "out/step_000003"), "--out", str(tmp_path / "exported")]
    assert load_weights_command(export) == 0
    train_here(train_flags(tmp_path / "out", chat_json, "--model", str(source), "--max-steps", "3"))
    train_here(train_flags(tmp_path / "calm", chat_json, "--max-steps", "3"))
    assert_same_run(tmp_path / "out", tmp_path / "calm")
    assert torch.equal(load_model(tmp_path / "exported").llm.wte.weight, load_model(tmp_path / "calm").llm.wte.weight)


def test_a_checkpoint_knows_its_source_from_any_folder(chat_json, tmp_path, monkeypatch):
    shutil.copytree(TINY_MODEL, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    train_here(train_flags(tmp_path / "out", chat_json, "--model", "source"), stop_after=1)
    monkeypatch.chdir("/")
    export = ["export", "--model", str(tmp_path / "out/step_000001"), "--out", str(tmp_path / "x")]
    assert load_weights_command(export) == 0


def raises(error: Exception):
    def fail(*args, **kwargs):
        raise error
    return fail


@pytest.mark.parametrize("where, error", [
    ("lib.save_weights.save_file", SafetensorError("Error while serializing: I/O error: No space left on device")),
    ("lib.save_weights.save_file", OSError(errno.ENOSPC, "No space left on device")),
    ("lib.save_weights.write_tokenizer", ValueError("what no test has thought of")),
    ("lib.save_weights.shutil.copyfile", FileNotFoundError("the checkout has moved")),
])
def test_what_is_raised_while_the_model_is_saved_leaves_a_checkpoint(where, error, chat_json, tmp_path, monkeypatch):
    """safetensors has an error type of its own for a full disk, which no handler knew."""
    more = ["--max-steps", "3", "--val-data", str(chat_json)]
    with monkeypatch.context() as patch:
        patch.setattr(where, raises(error))
        with pytest.raises((ValueError, OSError), match="step_000003 has it as trained up to that step"):
            train_here(train_flags(tmp_path / "out", chat_json, *more))
        with pytest.raises((ValueError, OSError), match="step_000003 has it as trained up to that step"):
            train_here(train_flags(tmp_path / "out", chat_json, *more))
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    train_here(train_flags(tmp_path / "calm", chat_json, *more))
    assert_same_run(tmp_path / "out", tmp_path / "calm")


def test_a_disk_without_room_even_for_a_checkpoint_names_the_one_before(chat_json, tmp_path, monkeypatch):
    flags = train_flags(tmp_path / "out", chat_json, "--max-steps", "3", "--save-every", "2")
    monkeypatch.setattr("lib.save_weights.save_file", raises(SafetensorError("No space left on device")))
    real = checkpoint.dcp.save

    def save(tensors, **options):
        if "step_000003" in str(options["storage_writer"].path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, **options)
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    with pytest.raises(ValueError, match="safetensors: No space.*step 3 not written: .*No space.*step_000002 has it"):
        train_here(flags)


def test_a_validation_that_fails_after_the_last_step_leaves_a_checkpoint(chat_json, tmp_path, monkeypatch):
    """With the fp32 weights: those that the validation had gathered in bf16 are given back."""
    pictures = shutil.copytree(GOLDEN / "images", tmp_path / "pictures")
    more = ["--max-steps", "3", "--val-data", str(chat_json), "--images", str(pictures), "--dtype", "bf16"]
    real, calls = train.validate, []

    def validate(*args):
        calls.append(1)
        if len(calls) == 2:
            (pictures / "odd.png").rename(tmp_path / "odd.png")
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", validate)
        with pytest.raises(ValueError, match="image missing.*step_000003 has it"):
            train_here(train_flags(tmp_path / "out", chat_json, *more))
    (tmp_path / "odd.png").rename(pictures / "odd.png")
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    train_here(train_flags(tmp_path / "calm", chat_json, *more))
    assert_same_run(tmp_path / "out", tmp_path / "calm")

# ---------------------------------------------------------------------------------------------------
# Errors in the middle


def stale(path, *args):
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("fault, words", [("a picture vanishes", "image missing"), ("a stale picture", "Stale file"),
                                          ("stale data", "Stale file handle; to see every"),
                                          ("no room to list it", "No space left")])
def test_an_error_of_the_data_saves_what_was_learned(fault, words, chat_json, tmp_path, monkeypatch):
    """49 to 109 steps were lost to one unreadable picture."""
    pictures = shutil.copytree(GOLDEN / "images", tmp_path / "pictures")
    data = shutil.copy(chat_json, tmp_path / "data.json")
    skip = ["--on-bad-sample", "skip"] if fault == "no room to list it" else []
    more = ["--epochs", "2", "--images", str(pictures), *skip]
    flags = train_flags(tmp_path / "out", data, *more)
    real = train.train_step

    def step(model, optimizer, step, *rest):
        if step.step == 4:
            if "vanishes" in fault or skip:
                shutil.rmtree(pictures)
            if skip:
                patch.setattr("lib.records.append_line", raises(OSError(errno.ENOSPC, "No space left on device")))
            if fault == "a stale picture":
                patch.setattr("data.load_image", stale)
            if fault == "stale data":
                patch.setattr("data.Dataset.read", stale)
        return real(model, optimizer, step, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        with pytest.raises(ValueError, match=f"{words}.*step_00000[5678] has it as trained up to that step") as e:
            train_here(flags)
    assert "\n" not in str(e.value)
    shutil.copytree(GOLDEN / "images", pictures, dirs_exist_ok=True)
    train_here(flags)
    train_here(train_flags(tmp_path / "calm", data, *more))
    assert_same_run(tmp_path / "out", tmp_path / "calm")


def test_two_processes_save_together_when_one_of_them_cannot_read(chat_json, tmp_path):
    """Only one of them sees the picture that has gone; gloo, and a real end of the run."""
    pictures, out = shutil.copytree(GOLDEN / "images", tmp_path / "pictures"), tmp_path / "out"
    flags = train_flags(out, chat_json, "--epochs", "400", "--images", str(pictures))
    first, last = start_ranks("train.py", *flags, processes=2)
    try:
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < 3:
            assert first.poll() is None, first.communicate()[1]
        (pictures / "odd.png").unlink()
        _, stderr = first.communicate(timeout=120)
    finally:
        last.kill()                                         # it leaves the message to the first process
    [newest] = out.glob("step_*")
    assert f"image missing: {pictures / 'odd.png'}" in stderr and f"{newest} has it" in stderr, stderr[-3000:]
    steps = json.loads((newest / "checkpoint.json").read_text())["step"]
    assert [m["step"] for m in metrics(out)] == list(range(steps))


def test_a_run_that_diverges_again_and_again_keeps_the_checkpoints_from_before(chat_json, tmp_path, monkeypatch):
    flags = train_flags(tmp_path / "out", chat_json, "--epochs", "9", "--keep", "1")
    real = train.train_step

    def step(model, optimizer, step, *rest):
        if step.step >= 3:
            return float("nan"), float("nan"), True
        return real(model, optimizer, step, *rest)
    monkeypatch.setattr(train, "train_step", step)
    for _ in range(2):
        with pytest.raises(ValueError, match="5 steps in a row.*step_000008 has it"):
            train_here(flags)
    assert [p.name for p in (tmp_path / "out").glob("step_*")] == ["step_000008"]


def test_a_full_disk_at_a_line_of_the_log_does_not_end_a_run(chat_json, tmp_path, monkeypatch, capfd, warned):
    """Nor does standard output that leads to a full disk or to a reader that has gone."""
    real = common.append_line
    calls = []

    def append_line(path, record):
        calls.append(path)
        if len(calls) in (3, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, record)
    monkeypatch.setattr("lib.metrics.append_line", append_line)
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "6"))
    assert [m["step"] for m in metrics(tmp_path / "out")] == [0, 1, 4, 5]
    assert capfd.readouterr().err.count("metrics.jsonl lacks lines ([Errno 28] No space left on device)") == 1
    monkeypatch.setattr("builtins.print", lambda *a, **k: None if k.get("file") else raises(BrokenPipeError())())
    train_here(train_flags(tmp_path / "quiet", chat_json, "--max-steps", "6"))
    assert (tmp_path / "quiet" / "model.safetensors").exists()


def test_a_reader_that_goes_does_not_end_a_training(chat_json, tmp_path):
    """`train.py | head -1` stopped it after 49 steps, with exit code 0. A process, for its exit."""
    process = start_script("train.py", *train_flags(tmp_path / "out", chat_json, "--max-steps", "3"))
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    said = process.stderr.read()
    assert said.count("\n") == 1 and "nothing can be printed (Broken pipe); the run goes on" in said
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_half_a_line_that_a_full_disk_took_is_taken_back(tmp_path):
    """A file size limit of the kernel cuts a write short, as a full disk does."""
    code = ("import resource, signal, sys; from pathlib import Path; from lib.common import append_line\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); path = Path(sys.argv[1])\n"
            "append_line(path, {'step': 0}); resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
            "try:\n    append_line(path, {'step': 1})\nexcept OSError as e:\n    print(e.errno)")
    done = subprocess.run([os.sys.executable, "-c", code, tmp_path / "log"], cwd=GOLDEN.parent.parent, text=True,
                          capture_output=True)
    assert done.stdout == f"{errno.EFBIG}\n", done.stderr
    assert (tmp_path / "log").read_text() == '{"step": 0}\n'

# ---------------------------------------------------------------------------------------------------
# The clock


def test_a_checkpoint_every_few_minutes_by_default(chat_json, tmp_path, monkeypatch, capfd):
    """The loss is bounded without a flag; kill -9 after 29 hours left nothing."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    real = train.train_step

    def step(*args):
        now[0] += 20 * 60               # a step takes twenty minutes; before each the processes compare their clocks
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    train_here(train_flags(tmp_path / "out", chat_json, "--epochs", "2", "--max-steps", "8", "--keep", "9"))
    said = capfd.readouterr().out
    assert "a checkpoint of" in said and "every 30 minutes; the newest 9 are kept" in said
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == ["step_000003", "step_000006"]
    train_here(train_flags(tmp_path / "none", chat_json, "--max-steps", "6", "--save-minutes", "0"))
    assert "kill -9 would lose all of it" in capfd.readouterr().out
    assert not list((tmp_path / "none").glob("step_*"))


@pytest.mark.parametrize("here, there", [(False, True), (True, False)])
def test_the_first_clock_decides_for_all(here, there, monkeypatch):
    """Clocks differ by more than a step takes: a process that saved alone would wait for the others for ever."""
    def reduce(sums: torch.Tensor) -> None:
        sums += torch.tensor([5, 0, there, 0])              # what another process has

    monkeypatch.setattr(train.dist, "all_reduce", reduce)
    assert [*train.synchronized_steps([Step(0, [], [])], [], lambda: here)] == [(Step(0, [], []), 5, False, True)]


def test_a_stop_that_cannot_be_saved_is_an_error(chat_json, tmp_path, monkeypatch):
    """It said that the same command goes on from there."""
    monkeypatch.setattr(checkpoint.dcp, "save", raises(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ValueError, match="step 2 not written: .*No space left"):
        train_here(train_flags(tmp_path / "out", chat_json), stop_after=2)


def test_room_for_a_checkpoint_is_needed_too(chat_json, tmp_path, monkeypatch):
    """The disk of a run that saves every 30 minutes must hold a checkpoint; without, the model alone."""
    free = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="the trained model and a checkpoint will take .*--save-minutes 0"):
        train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "1"))
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "1", "--save-minutes", "0"))

# ---------------------------------------------------------------------------------------------------
# File systems


def refusing(real, number: int, only):
    def call(what, *args, **kwargs):
        if only(what):
            raise OSError(number, os.strerror(number))
        return real(what, *args, **kwargs)
    return call


def is_folder(handle: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{handle}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
@pytest.mark.parametrize("only", [is_folder, lambda handle: True])
def test_a_disk_without_sync_gives_one_warning(number, only, chat_json, tmp_path, monkeypatch, capfd, warned):
    """SMB and FUSE refuse to sync a folder: three failed saves ended the run."""
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number, only))
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "4", "--save-every", "1"))
    said = capfd.readouterr()
    assert said.err.count("cannot sync a folder to disk") == 1 and "not written" not in said.out
    assert len(list((tmp_path / "out").glob("step_*"))) == 2


def test_a_disk_that_fails_to_sync_is_not_taken_for_one_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EIO, lambda handle: True))
    with pytest.raises(OSError, match="Input/output error"):
        common.write_whole(tmp_path / "note.txt", "text")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EPERM])
def test_a_file_system_without_locks_or_permissions(number, chat_json, tmp_path, monkeypatch, capfd, warned):
    """Lustre without flock, FUSE without chmod."""
    for name in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, name, refusing(None, number, lambda file: True))
    monkeypatch.setattr(os, "chmod", refusing(None, number, lambda path: True))
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "2"))
    said = capfd.readouterr().err
    assert said.count("cannot be locked") == 1 and said.count("keeps the permissions") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(chat_json, tmp_path, monkeypatch, capfd, warned):
    """NFS keeps a file that somebody has open under another name, and so the folder is not empty."""
    real = checkpoint.remove

    def remove(path):
        if path.name == "step_000001" and path.exists():
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path)
    monkeypatch.setattr(checkpoint, "remove", remove)
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "5", "--save-every", "1", "--keep", "1"))
    said = capfd.readouterr()
    assert "not written" not in said.out and said.err.count("step_000001 cannot be deleted") == 1
