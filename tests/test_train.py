"""Training: the step's maths, one process against two, stopping and going on, what is frozen, what is refused."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT

GOLDEN = ROOT / "tests" / "golden"
IMAGES = ["wide.png", "tall.png", "photo.jpg", "square.png", "big.jpg", "odd.png"]
FLAGS = ["--dtype", "float32", "--dropout", "0", "--workers", "0", "--global-batch", "4", "--lr", "1e-3", "--micro-tokens", "300"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 conversations of one to three turns, every fourth without a picture."""
    path = tmp_path_factory.mktemp("data") / "chat.json"
    records = []
    for i in range(24):
        turns = []
        for t in range(1 + i % 3):
            turns += [{"from": "human", "value": ("<image>\n" if t == 0 and i % 4 else "") + f"Question {i} {t}?" + " why" * (i % 5)},
                      {"from": "gpt", "value": f"Answer {i * 7 % 11}" + " because" * (i * 5 % 7)}]
        records.append({"id": f"r{i}", "conversations": turns} | ({"image": IMAGES[i % 6]} if i % 4 else {}))
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(out: Path, data: Path, *more: str, stage: str = "finetune") -> list[str]:
    start = ["--model", GOLDEN / "tiny-llava-phi"] if stage == "finetune" else ["--llm", GOLDEN / "tiny-phi", "--vision", GOLDEN / "tiny-clip"]
    return [str(a) for a in ["--stage", stage, *start, "--data", data, "--images", GOLDEN / "images", "--out", out, *FLAGS, *more]]


def launch(args: list[str], processes: int = 1) -> subprocess.Popen:
    """As a user would, on the command line; torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, "train.py", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(args: list[str], processes: int = 1) -> str:
    process = launch(args, processes)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    return stdout


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "mfu", "memory_gb")} for line in lines]


def test_learning_rate_follows_hugging_faces_cosine_and_linear_schedules():
    got = [train.lr_at(step, 100, 3) for step in (0, 1, 3, 51, 99)]
    assert got == pytest.approx([0, 1 / 3, 1, 0.5080971, 0.0002622], abs=1e-6)
    assert [train.lr_at(s, 10, 2, "linear") for s in (0, 1, 2, 6, 9)] == pytest.approx([0, 0.5, 1, 0.5, 0.125])


def test_the_published_recipe_is_what_the_stages_say():
    cfg, _ = train.parse_args(["--stage", "pretrain"])
    assert (cfg.train, cfg.global_batch, cfg.lr, cfg.template, cfg.image_mode) == ("projector", 256, 1e-3, "plain", "crop")
    cfg, _ = train.parse_args(["--stage", "finetune"])
    assert (cfg.train, cfg.global_batch, cfg.lr, cfg.template, cfg.image_mode) == ("projector,llm,vision", 128, 2e-5, "v0", "pad")
    assert (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.grad_clip, cfg.warmup) == (0.9, 0.98, 1e-7, 0, 1, 0.03)


def test_two_processes_and_other_micro_batches_give_the_same_run(data, tmp_path):
    """Protects guarantee 3: loss, norm and final weights do not depend on processes or micro-batch size."""
    train.main(arguments(tmp_path / "one", data, "--epochs", "4", "--max-steps", "20"))
    run(arguments(tmp_path / "two", data, "--epochs", "4", "--max-steps", "20"), processes=2)
    train.main(arguments(tmp_path / "wide", data, "--epochs", "4", "--max-steps", "20", "--micro-tokens", "2000"))
    one, two, wide = (metrics(tmp_path / name) for name in ("one", "two", "wide"))
    assert len(one) == 20
    for a, b, c in zip(one, two, wide):
        for other in (b, c):
            assert {k: a[k] for k in ("step", "lr", "samples", "supervised_tokens", "tokens", "images")} == {k: other[k] for k in
                    ("step", "lr", "samples", "supervised_tokens", "tokens", "images")}
            assert a["loss"] == pytest.approx(other["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "wide")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[0][name], weights[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(stage, data, tmp_path):
    """Protects guarantee 4, with dropout on: nothing that a step needs lives outside the checkpoint and the seed."""
    if stage == "pretrain":
        records = [r for r in json.loads(data.read_text()) if "image" in r]
        data = tmp_path / "captions.json"
        data.write_text(json.dumps([r | {"conversations": r["conversations"][:2]} for r in records]))
    more = ["--epochs", "3", "--max-steps", "12", "--dropout", "0.1"]
    train.main(arguments(tmp_path / "whole", data, *more, stage=stage))
    train.main(arguments(tmp_path / "parts", data, *more, "--stop-after", "5", stage=stage))
    assert [p.name for p in (tmp_path / "parts").glob("step_*")] == ["step_000005"]
    train.main(arguments(tmp_path / "parts", data, *more, stage=stage))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_written_by_two_processes_continues_on_one(data, tmp_path):
    more = ["--epochs", "3", "--max-steps", "8"]
    train.main(arguments(tmp_path / "whole", data, *more))
    run(arguments(tmp_path / "parts", data, *more, "--stop-after", "4"), processes=2)
    train.main(arguments(tmp_path / "parts", data, *more))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_stage_one_changes_the_projector_and_nothing_else(data, tmp_path):
    records = [r for r in json.loads(data.read_text()) if "image" in r]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([r | {"conversations": r["conversations"][:2]} for r in records]))
    train.main(arguments(tmp_path / "out", captions, stage="pretrain"))
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[f"language_model.{name}"], tensor), name
    clip = torch.load(GOLDEN / "tiny-clip" / "pytorch_model.bin", weights_only=True)
    for name in (n for n in clip if n.startswith("vision_model.") and "position_ids" not in n):
        assert torch.equal(after[f"vision_tower.{name}"], clip[name]), name
    assert not torch.equal(after["multi_modal_projector.linear_1.bias"], torch.zeros(40))


def test_adapters_learn_while_the_language_model_keeps_its_weights_until_they_are_merged(data, tmp_path):
    train.main(arguments(tmp_path / "out", data, "--lora-r", "2", "--freeze", "vision", "--max-steps", "4"))
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    assert not any("lora" in name for name in after)
    assert not torch.equal(after["language_model.model.layers.0.mlp.fc1.weight"], before["model.layers.0.mlp.fc1.weight"])
    assert torch.equal(after["language_model.model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_ten_steps_of_adamw_equal_a_plain_loop():
    """Protects the optimizer's settings: fused AdamW with our groups against the textbook, one tensor at a time."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"projector": torch.nn.Linear(5, 3), "llm": torch.nn.Linear(3, 3), "vision": torch.nn.LayerNorm(5)})
    cfg = dataclasses.replace(train.parse_args([])[0], weight_decay=0.1, lr=0.01)
    optimizer = train.make_optimizer(model, cfg)
    mine = {n: p.detach().clone() for n, p in model.named_parameters()}
    m, v = ({n: torch.zeros_like(p) for n, p in mine.items()} for _ in range(2))
    for t in range(1, 11):
        grads = {n: torch.randn_like(p) for n, p in mine.items()}
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        optimizer.step()
        for n, p in mine.items():
            p *= 1 - 0.01 * (0.1 if p.dim() > 1 else 0)
            m[n], v[n] = 0.9 * m[n] + 0.1 * grads[n], 0.98 * v[n] + 0.02 * grads[n] ** 2
            p -= 0.01 * (m[n] / (1 - 0.9 ** t)) / ((v[n] / (1 - 0.98 ** t)).sqrt() + 1e-7)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), mine[n], rtol=1e-5, atol=1e-6)


def test_a_damaged_checkpoint_is_passed_over_and_named(data, tmp_path, capfd):
    more = ["--epochs", "2", "--save-every", "3", "--keep", "3"]
    train.main(arguments(tmp_path / "out", data, *more, "--stop-after", "9"))
    shards = sorted((tmp_path / "out" / "step_000009").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (tmp_path / "out" / "step_000006" / "checkpoint.json").write_text("{")
    capfd.readouterr()
    train.main(arguments(tmp_path / "out", data, *more, "--stop-after", "10"))
    said = capfd.readouterr().out
    assert shards[0].name in said and "step_000006" in said and "going on from" in said and "step_000003" in said
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(10))


def test_other_settings_are_refused_with_their_names(data, tmp_path):
    train.main(arguments(tmp_path / "out", data, "--stop-after", "2"))
    with pytest.raises(ValueError, match="lr: 0.001 in the checkpoint, 0.002 now"):
        train.main(arguments(tmp_path / "out", data, "--lr", "2e-3"))
    changed = tmp_path / "changed.json"
    changed.write_text(data.read_text().replace("Answer 7", "Answer 8"))
    with pytest.raises(ValueError, match="data checksum"):
        train.main(arguments(tmp_path / "out", changed))


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_alive(data, tmp_path, monkeypatch, capfd):
    real, calls = train.dcp.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)
    monkeypatch.setattr(train.dcp, "save", save)
    train.main(arguments(tmp_path / "out", data, "--epochs", "2", "--save-every", "2", "--keep", "1", "--stop-after", "5"))
    assert "No space left" in capfd.readouterr().out
    assert [p.name for p in (tmp_path / "out").glob("*step*")] == ["step_000005"]


def test_a_step_that_is_not_finite_changes_nothing_and_five_end_the_run(data, tmp_path, monkeypatch):
    real = train.LLaVAPhi.forward
    steps = []

    def forward(self, *batch):
        loss = real(self, *batch)
        return loss * float("nan") if steps and steps[-1] in poisoned else loss
    real_step = train.train_step

    def step(model, optimizer, step, *rest):
        steps.append(step.step)
        return real_step(model, optimizer, step, *rest)
    monkeypatch.setattr(train.LLaVAPhi, "forward", forward)
    monkeypatch.setattr(train, "train_step", step)
    poisoned = {2}
    train.main(arguments(tmp_path / "once", data, "--epochs", "2"))
    assert [m["step"] for m in metrics(tmp_path / "once") if m["skipped"]] == [2]
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "once" / "model.safetensors").values())
    assert len(json.loads((tmp_path / "once" / "skipped_steps.jsonl").read_text())["sample_ids"]) == 4
    steps.clear()
    poisoned = set(range(3, 8))
    with pytest.raises(ValueError, match="5 steps in a row"):
        train.main(arguments(tmp_path / "often", data, "--epochs", "2"))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_next_start_goes_on(processes, data, tmp_path):
    """Protects against losing work to a scheduler: with torchrun the signal reaches the data workers as well."""
    more = ["--epochs", "40", "--workers", "1"]
    process = launch(arguments(tmp_path / "out", data, *more), processes)
    path = tmp_path / "out" / "metrics.jsonl"
    wait_until = time.time() + 120
    while time.time() < wait_until and not (path.exists() and len(path.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert "stopped after step" in stdout, stderr[-3000:]
    [checkpoint] = (tmp_path / "out").glob("step_*")
    assert train.problem_with(checkpoint) == ""
    done = int(checkpoint.name[5:])
    train.main(arguments(tmp_path / "out", data, *more, "--stop-after", str(done + 2)))
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(done + 2))


def test_a_finished_run_says_so_and_never_starts_afresh_by_itself(data, tmp_path, capfd):
    train.main(arguments(tmp_path / "out", data, "--max-steps", "2"))
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    capfd.readouterr()
    train.main(arguments(tmp_path / "out", data, "--max-steps", "2"))
    assert "already finished" in capfd.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_steps: 2 then, 3 now"):
        train.main(arguments(tmp_path / "out", data, "--max-steps", "3"))


@pytest.mark.parametrize("args, words", [
    (["--stage", "pretrain"], ["checkpoints/phi-2", "hf download microsoft/phi-2"]),
    (["--stage", "pretrain", "--lerning-rate", "1"], ["unrecognized arguments", "--lerning-rate"]),
    (["--stage", "finetune", "--dtype", "float16"], ["overflow", "bfloat16"]),
    (["--stage", "finetune", "--model", "tests"], ["tests"]),
])
def test_a_users_mistake_ends_with_one_line_and_exit_code_2(args, words, tmp_path):
    process = launch([*args, "--out", str(tmp_path / "out")])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in stderr
    assert all(word in stderr for word in words), stderr
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_not_written_into(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are not a training run's"):
        train.main(arguments(tmp_path, data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]
