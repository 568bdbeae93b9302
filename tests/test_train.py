"""Training: the step's maths, one process against two, killing and going on, what is frozen, what is refused."""
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from bench.plan import measure, planned
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lib.checkpoint as checkpoint
from lib import plan
import lib.metrics
import train
from data import PICTURE_COST, Batch, Step
from lib.checkpoint import problem_with
from lib.common import LOCK
from lib.folders import read_folder
from lib.recipes import parse, replace
from load_weights import load_model
from load_weights import main as load_weights
from model import LLaVAConfig, MIPHA_CONFIG, Packed, PhiConfig
from vision import CLIP_MEAN, CLIP_STD, VisionConfig

GOLDEN = ROOT / "tests" / "golden"
IMAGES = ["wide.png", "tall.png", "photo.jpg", "square.png", "big.jpg", "odd.png"]
FLAGS = ["--dtype", "float32", "--dropout", "0", "--workers", "0", "--global-batch", "4", "--lr", "1e-3",
         "--micro-tokens", "300"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 conversations of one to three turns, every fourth without a picture."""
    path = tmp_path_factory.mktemp("data") / "chat.json"
    records = []
    for i in range(24):
        turns = []
        for t in range(1 + i % 3):
            question = ("<image>\n" if t == 0 and i % 4 else "") + f"Question {i} {t}?" + " why" * (i % 5)
            turns += [{"from": "human", "value": question},
                      {"from": "gpt", "value": f"Answer {i * 7 % 11}" + " because" * (i * 5 % 7)}]
        records.append({"id": f"r{i}", "conversations": turns} | ({"image": IMAGES[i % 6]} if i % 4 else {}))
    path.write_text(json.dumps(records))
    return path


def some_of(data: Path, to: Path, image: bool, turns: int | None = None) -> Path:
    """The records with a picture, or those without; their first turns."""
    records = [r for r in json.loads(data.read_text()) if ("image" in r) == image]
    to.write_text(json.dumps([r | {"conversations": r["conversations"][:turns]} for r in records]))
    return to


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(out: Path, data: Path, *more: str, stage: str = "finetune") -> list[str]:
    start = {"finetune": ["--model", GOLDEN / "tiny-llava-phi"], "sft": ["--llm", GOLDEN / "tiny-phi"],
             "pretrain": ["--llm", GOLDEN / "tiny-phi", "--vision", GOLDEN / "tiny-clip"]}[stage]
    where = ["--data", data, "--images", GOLDEN / "images", "--out", out]
    return [str(a) for a in ["--stage", stage, *start, *where, *FLAGS, *more]]


def launch(args: list[str], processes: int = 1) -> subprocess.Popen:
    """As a user would, on the command line; torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, "train.py", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def run(args: list[str], processes: int = 1) -> str:
    process = launch(args, processes)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-9000:]
    return stdout


def run_somehow(args: list[str], processes: int) -> None:
    run(args, processes) if processes > 1 else train.main(args)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "mfu", "memory_gb")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Every number of every step, and every weight, bit for bit."""
    assert metrics(a) == metrics(b)
    x, y = (load_file(out / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

# ---------------------------------------------------------------------------------------------------
# The step


def test_learning_rate_follows_hugging_faces_cosine_and_linear_schedules():
    got = [train.lr_at(step, 100, 3) for step in (0, 1, 3, 51, 99)]
    assert got == pytest.approx([0, 1 / 3, 1, 0.5080971, 0.0002622], abs=1e-6)
    assert [train.lr_at(s, 10, 2, "linear") for s in (0, 1, 2, 6, 9)] == pytest.approx([0, 0.5, 1, 0.5, 0.125])


def test_two_processes_and_other_micro_batches_give_the_same_run(data, tmp_path):
    """Protects guarantee 3: loss, norm and final weights do not depend on processes or micro-batch size.

    Of 24 samples, 23 to a step, the second step has one, which may be text alone: the process without a sample has to
    take part all the same, as it has where micro-batches of one sample do not come out even.
    """
    more = ["--epochs", "4", "--max-steps", "8", "--global-batch", "23"]
    train.main(arguments(tmp_path / "one", data, *more))
    train.main(arguments(tmp_path / "wide", data, *more, "--micro-tokens", "4000"))
    run(arguments(tmp_path / "two", data, *more, "--micro-tokens", "60"), processes=2)
    one = metrics(tmp_path / "one")
    assert [m["samples"] for m in one] == [23, 1] * 4
    for name in ("wide", "two"):
        for a, b in zip(one, metrics(tmp_path / name), strict=True):
            same = ("step", "lr", "samples", "supervised_tokens", "tokens", "images")
            assert [a[k] for k in same] == [b[k] for k in same]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        weights, others = (load_file(tmp_path / out / "model.safetensors") for out in ("one", name))
        for k in weights:
            torch.testing.assert_close(weights[k], others[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [["selective"], ["full"], pytest.param(["none", "--compile"], marks=pytest.mark.slow),
                                   pytest.param(["full", "--compile"], marks=pytest.mark.slow)])
def test_what_is_recomputed_or_compiled_changes_nothing(flags, data, tmp_path):
    """With dropout: what is computed again must be what was."""
    for name, mode in (("plain", ["none"]), ("other", flags)):
        train.main(arguments(tmp_path / name, data, "--max-steps", "5", "--dropout", "0.1", "--recompute", *mode))
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_loss_and_gradient_norm_of_a_step_equal_the_originals(tmp_path):
    golden, P = load_file(GOLDEN / "forward.safetensors"), 4
    ids, lengths, slots, rows, targets = [], [], [], [], []
    given = (golden[f"train.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    for i, (row, labels, mask) in enumerate(zip(*given)):
        row, labels, start = row[mask.bool()].tolist(), labels[mask.bool()].tolist(), len(ids)
        at = row.index(-200)
        row, labels = row[:at] + [0] * P + row[at + 1:], labels[:at] + [-100] * P + labels[at + 1:]
        slots += range(start + at, start + at + P)
        supervised = [t for t in range(1, len(row)) if labels[t] != -100]
        rows += [start + t - 1 for t in supervised]
        targets += [labels[t] for t in supervised]
        ids, lengths = ids + row, lengths + [len(row)]
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    images = ((golden["train.pixel_values"] * std + mean) * 255).round().to(torch.uint8)
    batch = Batch(torch.tensor(ids), torch.tensor(lengths), images, *map(torch.tensor, (slots, rows, targets)))
    cfg = parse(arguments(tmp_path, tmp_path))
    mesh, device = train.setup()
    try:
        model = train.build(cfg, train.read_config(cfg), mesh, device)
        optimizer = train.make_optimizer(model, cfg)
        step = Step(0, [0, 1], [batch])
        loss, norm, skipped = train.train_step(model, optimizer, step, cfg, len(targets), 1.0, device)
    finally:
        train.dist.destroy_process_group()
    assert not skipped
    assert loss == pytest.approx(golden["train.loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden["train.grad_norm"].item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "lora"])
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(stage, data, tmp_path):
    """Protects guarantee 4, with dropout on: nothing that a step needs lives outside the checkpoint and the seed."""
    more = ["--epochs", "3", "--max-steps", "12", "--dropout", "0.1"]
    if stage == "pretrain":
        data = some_of(data, tmp_path / "captions.json", image=True, turns=2)
    if stage == "lora":
        stage, more = "finetune", [*more, "--lora-r", "2", "--val-data", str(data), "--val-every", "2"]
    train.main(arguments(tmp_path / "whole", data, *more, stage=stage))
    train.main(arguments(tmp_path / "parts", data, *more, "--stop-after", "5", stage=stage))
    assert [p.name for p in (tmp_path / "parts").glob("step_*")] == ["step_000005"]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:      # as a run leaves it that was killed after the save
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train.main(arguments(tmp_path / "parts", data, *more, stage=stage))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_of_two_processes_continues_on_one_and_then_on_four(data, tmp_path):
    more = ["--epochs", "3", "--max-steps", "8"]
    train.main(arguments(tmp_path / "whole", data, *more))
    run(arguments(tmp_path / "parts", data, *more, "--stop-after", "3"), processes=2)
    train.main(arguments(tmp_path / "parts", data, *more, "--stop-after", "5"))
    run(arguments(tmp_path / "parts", data, *more), processes=4)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_stage_one_changes_the_projector_and_nothing_else(data, tmp_path):
    captions = some_of(data, tmp_path / "captions.json", image=True, turns=2)
    train.main(arguments(tmp_path / "out", captions, stage="pretrain"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[f"language_model.{name}"], tensor), name
    clip = torch.load(GOLDEN / "tiny-clip" / "pytorch_model.bin", weights_only=True)
    for name in (n for n in clip if n.startswith("vision_model.") and "position_ids" not in n):
        assert torch.equal(after[f"vision_tower.{name}"], clip[name]), name
    assert not torch.equal(after["multi_modal_projector.linear_1.bias"], torch.zeros(40))


def test_sft_makes_a_phi_folder_that_merge_and_pretrain_take(data, tmp_path):
    """The paper's first step: the language model alone, on text, by the same loop; stopped and resumed on the way."""
    text = some_of(data, tmp_path / "text.json", image=False)
    train.main(arguments(tmp_path / "phi", text, "--save-every", "1", "--stop-after", "2", stage="sft"))
    load_weights(["export", "--model", str(tmp_path / "phi" / "step_000002"), "--out", str(tmp_path / "early")])
    assert read_folder(tmp_path / "early").kind == train.PHI
    train.main(arguments(tmp_path / "phi", text, stage="sft"))
    steps = metrics(tmp_path / "phi")
    assert [m["lr"] for m in steps] == pytest.approx([0, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert not any(m["images"] for m in steps)
    parts = ["--llm", str(tmp_path / "phi"), "--vision", str(GOLDEN / "tiny-clip")]
    load_weights(["merge", *parts, "--out", str(tmp_path / "base")])
    after, before = load_model(tmp_path / "base").state_dict(), load_model(GOLDEN / "tiny-llava-phi").state_dict()
    assert not torch.equal(after["llm.h.0.mlp.fc.weight"], before["llm.h.0.mlp.fc.weight"])
    captions = some_of(data, tmp_path / "captions.json", image=True, turns=2)
    train.main(arguments(tmp_path / "out", captions, *parts, "--max-steps", "2", stage="pretrain"))
    with pytest.raises(ValueError, match="18 samples have a picture"):
        train.main(arguments(tmp_path / "no", data, stage="sft"))


def test_mipha_trains_from_phi_and_siglip_and_is_exported(data, tmp_path):
    """Both stages by Mipha's recipe: a SigLIP tower, squashed pictures, then padded ones; a checkpoint exported."""
    load_weights(["export", "--model", str(GOLDEN / "../golden-mipha/tiny-mipha"), "--out", str(tmp_path / "parts"),
                  "--to", "parts"])
    captions = some_of(data, tmp_path / "captions.json", image=True, turns=2)
    where = ["--recipe", "mipha", "--images", str(GOLDEN / "images"), *FLAGS, "--max-steps", "2"]
    train.main(["--stage", "pretrain", "--llm", str(tmp_path / "parts" / "phi-2"), "--vision",
                str(tmp_path / "parts" / "siglip"), "--data", str(captions), "--out", str(tmp_path / "one"), *where])
    train.main(["--stage", "finetune", "--model", str(tmp_path / "one"), "--data", str(data), "--out",
                str(tmp_path / "two"), *where, "--stop-after", "1"])
    settings = json.loads((tmp_path / "two" / "config.json").read_text())["training"]
    assert [settings[k] for k in ("epochs", "beta2", "eps", "image_mode")] == [2, 0.999, 1e-8, "pad"]
    load_weights(["export", "--model", str(tmp_path / "two" / "step_000001"), "--out", str(tmp_path / "early")])
    train.main(["--stage", "finetune", "--model", str(tmp_path / "one"), "--data", str(data), "--out",
                str(tmp_path / "two"), *where])
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in first + second] == [0, 1, 0, 1] and first[0]["images"] == 4
    before, early, after = (load_model(tmp_path / name) for name in ("one", "early", "two"))
    assert not after.config.vision.class_token and after.config.image_mode == "pad"
    assert before.config.image_mode == "squash"
    for name, p in after.named_parameters():                # the very first step has rate 0
        assert torch.equal(early.get_parameter(name), before.get_parameter(name)), name
    assert not torch.equal(after.vision.patch.bias, before.vision.patch.bias)
    assert torch.equal(before.vision.patch.bias, load_model(GOLDEN / "../golden-mipha/tiny-mipha").vision.patch.bias)


def test_mipha_is_planned_with_its_own_sizes(capsys):
    """729 positions a picture, two epochs; a picture costs more than CLIP's."""
    train.main(["--recipe", "mipha", "--stage", "finetune", "--plan"])
    assert "10,396 steps of 128 samples of 992 tokens" in capsys.readouterr().out
    parts = ["vision", "projector", "llm"]
    assert plan.picture_cost(LLaVAConfig(), parts) == pytest.approx(PICTURE_COST, rel=0.05)
    assert plan.picture_cost(MIPHA_CONFIG, parts) > 1.5 * PICTURE_COST


@pytest.mark.parametrize("on, moved", [("both", {"mlp.fc1", "self_attn.q_proj"}), ("attn", {"self_attn.q_proj"})])
def test_adapters_learn_and_are_merged_into_what_they_sit_on(on, moved, data, tmp_path):
    more = ["--lora-r", "2", "--lora-on", on, "--freeze", "vision", "--max-steps", "4"]
    train.main(arguments(tmp_path / "out", data, *more))
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    assert not any("lora" in name for name in after)
    for name in ("layers.0.mlp.fc1", "layers.0.self_attn.q_proj", "embed_tokens"):
        changed = not torch.equal(after[f"language_model.model.{name}.weight"], before[f"model.{name}.weight"])
        assert changed == (name.removeprefix("layers.0.") in moved)


def test_adapters_on_a_base_in_4_bits(data, tmp_path):
    """QLoRA: resumed exactly, the same on two processes, close to adapters on the base itself, and merged into that."""
    data = some_of(data, tmp_path / "pictures.json", image=True)
    more = ["--llm", "demo/phi", "--vision", "demo/clip", "--template", "v0", "--image-mode", "pad", "--micro-tokens",
            "600", "--lora-r", "4", "--max-steps", "4"]
    packed = [*more, "--base-bits", "4"]
    train.main(arguments(tmp_path / "whole", data, *packed, stage="pretrain"))
    train.main(arguments(tmp_path / "parts", data, *packed, "--stop-after", "2", stage="pretrain"))
    checkpoint = tmp_path / "parts" / "step_000002"
    load_weights(["export", "--model", str(checkpoint), "--out", str(tmp_path / "half")])
    train.main(arguments(tmp_path / "parts", data, *packed, stage="pretrain"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run(arguments(tmp_path / "two", data, *packed, stage="pretrain"), processes=2)
    train.main(arguments(tmp_path / "plain", data, *more, stage="pretrain"))
    whole, two, plain = (metrics(tmp_path / name) for name in ("whole", "two", "plain"))
    for a, b, c in zip(whole, two, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["loss"] == pytest.approx(c["loss"], rel=0.05) and a["loss"] != c["loss"]
    before = load_file(ROOT / "demo" / "phi" / "model.safetensors")
    for folder in ("whole", "half"):
        after = load_file(tmp_path / folder / "model.safetensors")
        for name in ("layers.0.mlp.fc1", "layers.3.self_attn.dense", "layers.1.self_attn.q_proj"):
            change = after[f"language_model.model.{name}.weight"] - before[f"model.{name}.weight"].float()
            # Not of full rank, as it would be if the 4-bit weights had been saved; q is a slice of a rank of 4, too.
            singular = torch.linalg.svdvals(change)
            assert singular[3] > 0 and singular[4] < 1e-3 * singular[0], name


def test_4_bits_are_refused_where_they_cannot_be(data, tmp_path):
    with pytest.raises(ValueError, match="40 wide, no multiple of a group of 32"):
        train.main(arguments(tmp_path / "out", data, "--base-bits", "4", "--lora-r", "4"))


def test_the_plan_says_what_small_gpus_can_do(capsys):
    qlora = ["--lora-r", "64", "--base-bits", "4", "--freeze", "vision"]
    train.main(["--stage", "finetune", *qlora, "--plan", "--gpus", "1"])
    lines = capsys.readouterr().out.splitlines()
    small = lines[lines.index("one GPU with --base-bits 4 --recompute full:") + 1:][:4]
    assert [line.split(" GB  ")[0].strip() for line in small] == ["8", "12", "16", "24"]
    assert all("--micro-tokens" in line for line in small)


def test_ten_steps_of_adamw_equal_a_plain_loop():
    """Protects the optimizer's settings: fused AdamW with our groups against the textbook, one tensor at a time."""
    torch.manual_seed(0)
    parts = {"projector": torch.nn.Linear(5, 3), "llm": torch.nn.Linear(3, 3), "vision": torch.nn.LayerNorm(5)}
    model = torch.nn.ModuleDict(parts)
    cfg = replace(parse([]), weight_decay=0.1, lr=0.01)
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

# ---------------------------------------------------------------------------------------------------
# Speed that changes no number


def a_step(cfg: Namespace) -> tuple[LLaVAConfig, Step]:
    """A step of several micro-batches from the module's data."""
    config = train.read_config(cfg)
    data = train.open_data(cfg, config, cfg.data)
    loader = train.make_loader(cfg, train.skeleton(cfg, config), data, 1, torch.device("cpu"))
    step = next(iter(loader))
    assert len(step.batches) > 1
    return config, step


def test_masters_on_one_process_equal_fsdp_bit_for_bit(data, tmp_path):
    """bf16 over fp32: our own masters against FSDP2's, over steps of several micro-batches, dropout on."""
    cfg = parse(arguments(tmp_path, data, "--dtype", "bf16", "--dropout", "0.1", "--global-batch", "6"))
    mesh, device = train.setup()
    try:
        config, step = a_step(cfg)
        supervised = sum(len(batch.targets) for batch in step.batches)
        ours = train.build(cfg, config, mesh, device)
        theirs = train.build(replace(cfg, dtype="fp32"), config, mesh, device)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in [*theirs.llm.h, theirs.vision]:
            fully_shard(unit, mesh=mesh, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
        fully_shard(theirs, mesh=mesh, mp_policy=policy)
        theirs.gather = "off"
        for model in (ours, theirs):
            optimizer = train.make_optimizer(model, cfg)
            model.results = [train.train_step(model, optimizer, step._replace(step=i), cfg, supervised, 1.0, device)
                             for i in range(3)]
        assert ours.results == theirs.results and not isinstance(ours, FSDPModule)
        for (name, a), b in zip(train.trained_weights(ours).items(), theirs.parameters(), strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b.full_tensor()), name
        assert all(torch.equal(p, p.master.bfloat16()) for p in ours.parameters())
    finally:
        train.dist.destroy_process_group()


def test_a_bf16_run_stopped_and_resumed_equals_an_uninterrupted_one(data, tmp_path):
    """Its checkpoint holds the fp32 masters, not the bf16 weights that it computes with."""
    more = ["--dtype", "bf16", "--epochs", "3", "--max-steps", "6", "--dropout", "0.1"]
    train.main(arguments(tmp_path / "whole", data, *more))
    train.main(arguments(tmp_path / "parts", data, *more, "--stop-after", "3"))
    train.main(arguments(tmp_path / "parts", data, *more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_gathering_once_a_step_changes_no_number(data, tmp_path):
    more = ["--max-steps", "4", "--global-batch", "12", "--micro-tokens", "120"]
    for gather in ("off", "on"):
        run(arguments(tmp_path / gather, data, *more, "--gather", gather), processes=2)
    for a, b in zip(metrics(tmp_path / "off"), metrics(tmp_path / "on"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    weights, others = (load_file(tmp_path / out / "model.safetensors") for out in ("off", "on"))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5)


class Sent(TorchDispatchMode):
    """How often each operation is called, collectives among them."""
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gather", ["off", "on"])
def test_what_a_step_of_several_micro_batches_sends(gather, data, tmp_path, monkeypatch):
    """Of 3 FSDP units (two blocks and the root): how often weights are gathered and gradients shared out.

    For every micro-batch: both blocks twice and the root once, and three reductions. Once a step: three and three.
    """
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=0, world_size=2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    more = ["--global-batch", "12", "--freeze", "vision", "--gather", gather]
    cfg = parse(arguments(tmp_path, data, *more))
    mesh, device = train.setup()
    try:
        config, step = a_step(cfg)
        model = train.build(cfg, config, mesh, device)
        optimizer = train.make_optimizer(model, cfg)
        with Sent() as sent:
            train.train_step(model, optimizer, step, cfg, 100, 1.0, device)
    finally:
        train.dist.destroy_process_group()
    n = len(step.batches)
    assert sent.counts["c10d::_allgather_base_"] == (5 * n if gather == "off" else 3)
    assert sent.counts["c10d::_reduce_scatter_base_"] == (3 if gather == "on" else 3 * n)


def test_a_frozen_decoder_computes_no_weight_gradients(data, tmp_path):
    """Stage 1's backward pass costs the decoder one forward pass, not two."""
    config = LLaVAConfig(PhiConfig(64, 64, 2, 2, 32, 128, 8, dropout=0.0), VisionConfig(28, 14, 2, 2, 32, 64))
    flops = {}
    for learn in ("projector", "projector,llm"):
        cfg = replace(parse([]), train=learn)
        model = train.skeleton(cfg, config).to_empty(device="cpu")
        ids = torch.zeros(60, dtype=torch.int64)
        batch = (ids, torch.tensor([60]), torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.arange(4),
                 torch.arange(10), ids[:10])
        with FlopCounterMode(display=False) as forward:
            loss = model(*batch)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        linear = [counter.get_flop_counts()["Global"].get(torch.ops.aten.mm, 0)
                  + counter.get_flop_counts()["Global"].get(torch.ops.aten.addmm, 0) for counter in (forward, backward)]
        flops[learn] = linear
    decoder = 60 * 2 * 2 * (4 * 32 * 32 + 2 * 32 * 128) + 10 * 2 * 32 * 64
    projector = 4 * 2 * (32 * 32 + 32 * 32)
    assert flops["projector,llm"][1] - flops["projector"][1] == decoder
    assert flops["projector"][1] == decoder + projector + 4 * 2 * 32 * 32       # no gradient for the tower's output


# ---------------------------------------------------------------------------------------------------
# The plan


class Alive(TorchDispatchMode):
    """Bytes of the results that are still held: what forward keeps for backward, whoever holds it."""
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.found, self.known = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.found.values() if not reference.expired())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("learn", ["projector,llm,vision", "projector"])
def test_the_memory_plan_counts_what_forward_really_keeps(mode, learn):
    """Of each further layer: in the decoder per token, in the tower per picture. Within 10 %."""
    cfg = replace(parse(["--recompute", mode]), train=learn)

    def plan_and_truth(n_layer: int) -> list[tuple[float, float]]:
        config = LLaVAConfig(PhiConfig(512, 512, n_layer, 4, 128, 512, 16, dropout=0.0),
                             VisionConfig(56, 14, 1 + n_layer, 4, 128, 512))
        model = train.skeleton(cfg, config)
        without = train.skeleton(replace(cfg, freeze="vision"), config)
        text = plan.memory_plan(cfg, without, 1)[1][mode] * 256
        pictures = plan.memory_plan(cfg, model, 1)[1][mode] * 256 - text
        model = model.to_empty(device="cpu").bfloat16().train()
        model.llm.recompute, model.vision.recompute = mode, mode != "none"
        x = torch.zeros(256, 128, dtype=torch.bfloat16, requires_grad=True)
        with Alive(model.llm) as decoder:
            h = model.llm(x, Packed(torch.tensor([256]), x.device))
        with Alive(model.vision) as tower:
            patches = model.vision(torch.zeros(16, 3, 56, 56, dtype=torch.uint8))    # 256 tokens are 16 pictures
        assert h.shape == (256, 128) and patches.shape == (16, 16, 128)
        return [(text, decoder.bytes()), (pictures, tower.bytes())]
    for (planned, found), (planned_more, found_more) in zip(plan_and_truth(2), plan_and_truth(4)):
        assert found_more - found == pytest.approx(planned_more - planned, rel=0.1, abs=1)


@pytest.mark.parametrize("flags, gb", [
    (["--lora-r", "64", "--base-bits", "4", "--freeze", "vision"], 8),
    (["--lora-r", "64", "--base-bits", "4"], 16),
    ([], 80),
])
def test_what_the_plan_proposes_fits_and_is_the_most_that_does(flags, gb):
    """Whatever --micro-tokens was given: the logits are those of the proposed size."""
    proposals = []
    for given in ("1024", "16384"):
        cfg = parse(["--stage", "finetune", "--micro-tokens", given, *flags])
        model = train.skeleton(cfg, LLaVAConfig())
        proposals.append(plan.plan_micro_batch(cfg, model, gpus=1 if flags else 8, memory=gb * 1e9, share=10 ** 6))
    assert proposals[0] == proposals[1] and proposals[0]
    for mode, tokens in proposals[0].items():
        def fits(n: int) -> bool:
            sized = replace(cfg, micro_tokens=n)
            return plan.fits_in(gb * 1e9, sized, model, 1 if flags else 8, mode, "off")
        assert fits(tokens) and (tokens == 24576 or not fits(tokens + 1024))


@pytest.mark.parametrize("gpus, learn, gather", [
    (1, "projector,llm,vision", "off"), (4, "projector,llm,vision", "off"), (4, "projector,llm,vision", "on"),
    (4, "projector", "off"),
])
def test_the_memory_plan_is_what_a_tracker_counts(gpus, learn, gather):
    """Weights, moments, gradients and activations of whole steps, on fake tensors. tests/bench/plan.py: full size.

    The plan adds up what each kind needs at most, and not all do at the same moment: it may be above, not below.
    """
    config = LLaVAConfig(PhiConfig(512, 512, 6, 8, 256, 1024, 16, dropout=0.0),
                         VisionConfig(224, 14, 7, 8, 256, 1024))
    cfg = parse(["--recompute", "none", "--gather", gather])
    cfg = replace(cfg, train=learn, micro_tokens=8 * 300)
    counted, _ = measure(cfg, config, gpus, samples=8, length=300, supervised=44)       # 256 of the 300 are a picture
    assert 0.92 * counted < planned(cfg, config, gpus, 8 * 300) < 1.25 * counted


def test_recompute_is_chosen_by_the_memory_there_is():
    cfg = parse(["--stage", "finetune", "--model", "x"])
    model = train.skeleton(cfg, LLaVAConfig())
    chosen = [plan.choose_recompute(cfg, model, gpus, gb * 1e9) for gpus, gb in ((1, 140), (1, 90), (8, 24), (8, 80))]
    assert chosen == ["none", "selective", "full", "none"]
    cfg = replace(cfg, compile=True)
    assert plan.choose_recompute(cfg, model, 1, 90e9) == "full"


@pytest.mark.parametrize("stage, most_on_one, words", [
    ("pretrain", 1e9, ["9,180,160 parameters, trained", "2,181 steps of 256"]),
    ("finetune", 50e9, ["2,779,683,840 parameters, trained", "5,198 steps of 128"]),
    ("sft", 45e9, ["636 steps of 128"]),
])
def test_the_plan_is_printed_without_weights_and_with_the_published_counts(stage, most_on_one, words, capsys):
    train.main(["--stage", stage, "--plan", "--gpus", "8", "--gpu-memory", "80"])
    said = capsys.readouterr().out
    assert all(word in said for word in words) and "best: --recompute none" in said
    fits = [line for line in said.splitlines() if line.strip().startswith("512 ")]
    assert len(fits) == 1 and "have a sample" in fits[0]


def test_64_processes_shard_within_a_node_and_replicate_across_nodes(monkeypatch, tmp_path):
    """The full-size model's wrapping, with a process group that only pretends."""
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=11, world_size=64))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    mesh, _ = train.setup()
    try:
        assert mesh.shape == (8, 8) and mesh.mesh_dim_names == ("replicate", "shard")
        for stage, units, trained in (("finetune", 34, 3_079_773_184), ("pretrain", 1, 9_180_160)):
            model = train.skeleton(parse(["--stage", stage]), LLaVAConfig())
            train.shard(model, mesh, torch.bfloat16)
            assert sum(isinstance(m, FSDPModule) for m in model.modules()) == units
            sharded = [p for p in model.parameters() if isinstance(p, train.DTensor)]
            assert sum(p.numel() for p in sharded) == trained
            assert sum(p.to_local().numel() for p in sharded) == pytest.approx(trained / 8, rel=1e-3)
            assert all(str(p.placements) == "(Replicate(), Shard(dim=0))" for p in sharded)
            whole = [p for p in model.parameters() if not isinstance(p, train.DTensor)]
            assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in whole)
    finally:
        train.dist.destroy_process_group()

# ---------------------------------------------------------------------------------------------------
# Checkpoints, and what ends a run


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
    for manifest in (tmp_path / "out").glob("step_*/checkpoint.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="nor is any before it. --resume never"):     # not: begin again and delete them
        train.main(arguments(tmp_path / "out", data, *more))
    assert len(list((tmp_path / "out").glob("step_*"))) == 3


def test_a_flipped_bit_is_found_and_the_checkpoint_passed_over(data, tmp_path, capfd):
    """Protects against training on from broken weights: the size of the file is what it was."""
    more, out = ["--epochs", "2", "--save-every", "3", "--keep", "3"], tmp_path / "out"
    run(arguments(out, data, *more, "--stop-after", "6"), processes=2)
    assert len(json.loads((out / "step_000006" / "checkpoint.json").read_text())["crc32"]) == 2
    shard = sorted((out / "step_000006").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        load_weights(["export", "--model", str(shard.parent), "--out", str(tmp_path / "exported")])
    capfd.readouterr()
    train.main(arguments(out, data, *more, "--stop-after", "7"))
    said = capfd.readouterr().out
    assert f"passing over {shard.parent}: {shard.name} is damaged" in said and "step_000003" in said
    assert [m["step"] for m in metrics(out)] == list(range(7))


def test_going_back_to_an_older_checkpoint_drops_the_later_ones_when_it_saves(data, tmp_path):
    """--resume out/step_000002, then auto: it went on from step 6 of the abandoned run; --keep dropped the new ones."""
    more, out = ["--epochs", "2", "--save-every", "2", "--keep", "3"], tmp_path / "out"
    train.main(arguments(out, data, *more, "--stop-after", "6"))
    train.main(arguments(out, data, *more, "--stop-after", "4", "--resume", str(out / "step_000002")))
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000002", "step_000004"]
    assert [m["step"] for m in metrics(out)] == list(range(4))


def test_other_settings_are_refused_with_their_names(data, tmp_path):
    train.main(arguments(tmp_path / "out", data, "--stop-after", "2"))
    with pytest.raises(ValueError, match="lr: 0.001 then, 0.002 now"):
        train.main(arguments(tmp_path / "out", data, "--lr", "2e-3"))
    changed = tmp_path / "changed.json"
    changed.write_text(data.read_text().replace("Answer 7", "Answer 8"))
    with pytest.raises(ValueError, match="data checksum"):
        train.main(arguments(tmp_path / "out", changed))


@pytest.mark.parametrize("change", [{"data": None}, {"config": 0}, {"sources": {}}, {"step": "2"}])
def test_a_checkpoint_json_that_lacks_something_is_not_believed(tmp_path, change):
    settings = {"stage": "finetune", "dropout": 0.0, "image_mode": "pad", "lora_alpha": 16.0, "dtype": "fp32"}
    saved = {"step": 2, "updates": 2, "data": "x", "files": {}, "config": settings, "sources": []}
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
    assert problem_with(tmp_path) == ""
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved | change))
    assert f"for {[*change][0]!r}" in problem_with(tmp_path)
    del saved[[*change][0]]
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
    assert f"lacks {[*change][0]!r}" in problem_with(tmp_path)


def test_a_checkpoint_that_spells_its_dtype_as_before_is_resumed(data, tmp_path):
    """Checkpoints of earlier versions say "float32" and "bfloat16" where we now say fp32 and bf16."""
    train.main(arguments(tmp_path / "out", data, "--stop-after", "2"))
    manifest = tmp_path / "out" / "step_000002" / "checkpoint.json"
    assert '"dtype": "fp32"' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace('"dtype": "fp32"', '"dtype": "float32"'))
    train.main(arguments(tmp_path / "out", data, "--stop-after", "3"))
    load_weights(["export", "--model", str(tmp_path / "out" / "step_000003"), "--out", str(tmp_path / "exported")])
    assert [m["step"] for m in metrics(tmp_path / "out")] == [0, 1, 2]


def test_help_and_wrong_flags_import_no_torch():
    """Protects the half second in which --help answers; torch alone takes three."""
    for flags, code in ((["--help"], 0), (["--lerning-rate", "1"], 2), (["--lr", "-1"], 2)):
        asked = subprocess.run([sys.executable, "-X", "importtime", "train.py", *flags], cwd=ROOT, text=True,
                               capture_output=True)
        assert asked.returncode == code
        assert not any(line.split("|")[-1].strip() == "torch" for line in asked.stderr.splitlines())


def test_a_second_run_in_the_same_folder_is_refused_and_kill_9_frees_it(data, tmp_path):
    """Protects two runs from sharing one metrics.jsonl and deleting each other's checkpoints.

    Data workers outlive a killed run by some seconds: they must not keep its folder locked.
    """
    out, more = tmp_path / "out", ["--epochs", "1000", "--workers", "1"]
    first = launch(arguments(out, data, *more))
    wait_until = time.time() + 120
    while time.time() < wait_until and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    second = launch(arguments(out, data, *more), processes=2)
    _, stderr = second.communicate(timeout=120)
    refusals = [line for line in stderr.splitlines() if line.startswith("error: ")]
    # Both processes say it, unless torchrun, which ends all when one has ended, was faster than the second.
    assert second.returncode != 0 and len(refusals) in (1, 2)
    assert f"{out} is in use by process {first.pid} on {socket.gethostname()} since 20" in refusals[0]
    first.kill()
    first.wait()
    train.main(arguments(out, data, *more[:-2], "--stop-after", "1", "--resume", "never"))
    assert [m["step"] for m in metrics(out)] == [0] and not (out / LOCK).exists()
    first.communicate(timeout=120)


def test_a_rank_that_dies_ends_all_within_a_minute_and_is_named(data, tmp_path):
    """Protects the hours that the others would wait for it."""
    out = tmp_path / "out"
    process = launch(arguments(out, data, "--epochs", "1000"), processes=2)
    wait_until = time.time() + 120
    while time.time() < wait_until and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    began = time.time()
    doomed = children(process.pid)[-1]
    os.kill(doomed, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - began < 60
    assert "on " + socket.gethostname() + " lost another one" in stderr
    assert re.search(rf"rank\s*:\s*\d.*\n.*\n?.*(exitcode|pid).*({doomed}|-9)", stderr), stderr[-3000:]


PARAGRAPH = ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 "
             "GiB is free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. See documentation.")


def test_out_of_memory_ends_with_one_line_and_the_flag_to_lower(data, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError(PARAGRAPH)
    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(ValueError) as refused:
        train.main(arguments(tmp_path / "out", data, "--recompute", "none"))
    said = str(refused.value)
    assert "\n" not in said and "--micro-tokens less than 300 or --recompute full" in said
    assert "Tried to allocate 2.50 GiB, total capacity of 79.10 GiB, 1.25 GiB is free" in said


def test_gpus_that_we_do_not_know_or_that_have_no_bf16(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    assert lib.metrics.mfu(1e14, cuda) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match="V100-SXM2-32GB has no bf16 arithmetic; give --dtype fp32"):
        train.check_arithmetic("bf16", cuda)
    train.check_arithmetic("fp32", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert lib.metrics.mfu(989e12 / 2, cuda) == pytest.approx(0.5)
    record = dict(step=0, loss=1.0, grad_norm=1.0, lr=1.0, seconds=1.0, tokens_per_second=9870.0, memory_gb=1.0,
                  skipped=False)
    assert "mfu" not in lib.metrics.progress_line(record | {"mfu": None}, 1, 0) and "9,870 tok/s" in lib.metrics.progress_line(
        record | {"mfu": None}, 1, 0)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_alive(data, tmp_path, monkeypatch, capfd):
    real, calls = checkpoint.dcp.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    more = ["--epochs", "2", "--save-every", "2", "--keep", "1"]
    train.main(arguments(tmp_path / "out", data, *more, "--stop-after", "5"))
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


def test_data_that_one_process_cannot_read_ends_all_with_its_name(data, tmp_path):
    records = json.loads(data.read_text())
    records[13]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    process = launch(arguments(tmp_path / "out", tmp_path / "bad.json"), processes=2)
    start = time.time()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - start < 30
    assert stderr.count("error: sample r13") == 2 and "missing.png" in stderr


def test_a_bad_sample_can_be_skipped_and_is_listed(data, tmp_path, capsys):
    records = json.loads(data.read_text())
    records[13]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    skip = ["--on-bad-sample", "skip", "--epochs", "2"]
    train.main(arguments(tmp_path / "out", tmp_path / "bad.json", *skip, "--stop-after", "7"))
    (tmp_path / "bad.json").rename(tmp_path / "moved.json")
    train.main(arguments(tmp_path / "out", tmp_path / "moved.json", *skip))
    assert len(metrics(tmp_path / "out")) == 12
    assert json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text())["sample"] == 13      # one line in two epochs
    assert capsys.readouterr().out.count("\nbad samples skipped: 1; ") == 2


def test_a_run_of_one_step_says_that_it_learns_nothing(data, tmp_path, capsys):
    """Its rate is 0, as in the first step of the original's warm-up."""
    train.main(arguments(tmp_path / "out", data, "--max-steps", "1"))
    assert "this run learns nothing" in capsys.readouterr().out and metrics(tmp_path / "out")[0]["lr"] == 0
    train.main(arguments(tmp_path / "out2", data, "--max-steps", "1", "--warmup", "0"))
    assert "learns nothing" not in capsys.readouterr().out and metrics(tmp_path / "out2")[0]["lr"] > 0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_and_resume(kills: int, processes: int, data: Path, tmp_path: Path, seed: int) -> None:
    """Kill a run `kills` times, every second time inside a save; in the end it is as if nothing had been.

    With torchrun either one process is killed, and torchrun ends the others, or all are at once.
    """
    rng, out = random.Random(seed), tmp_path / "killed"
    more = ["--epochs", "100", "--max-steps", str(30 + 8 * kills), "--save-every", "3", "--dropout", "0.1"]
    run_somehow(arguments(tmp_path / "whole", data, *more), processes)
    for i in range(kills):
        process, began, path = launch(arguments(out, data, *more), processes), time.time_ns(), out / "metrics.jsonl"
        wait = rng.randrange(1, 8)                          # steps
        last = b""
        while wait if i % 2 else not any(out.glob(".writing_*")):
            assert process.poll() is None and time.time_ns() < began + 120e9, process.communicate()[1][-9000:]
            if path.exists() and path.stat().st_mtime_ns > began and path.read_bytes() != last:
                last, wait = path.read_bytes(), wait - 1
        ranks = children(process.pid) if processes > 1 else []
        doomed = [rng.choice(ranks)] if ranks and rng.random() < 0.5 else [process.pid, *ranks]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert "model_type" not in json.loads((out / "config.json").read_text())        # it was killed before it was done
    run_somehow(arguments(out, data, *more), processes)
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob(".writing_*"))


def test_three_kills_leave_no_trace(data, tmp_path):
    """Protects guarantee 4 against power cuts and schedulers."""
    kill_and_resume(3, 1, data, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_leave_no_trace(processes, data, tmp_path):
    kill_and_resume(20, processes, data, tmp_path, seed=processes)


@pytest.mark.slow
def test_the_full_size_model_takes_a_step_of_stage_one_within_24_gb(data, tmp_path):
    """On a CPU, bf16. RANDOM_CHECKPOINTS: what tests/bench/make_checkpoints.py made; else it is made here (8 GB)."""
    made = Path(os.environ.get("RANDOM_CHECKPOINTS", tmp_path / "random"))
    if not made.exists():
        subprocess.run([sys.executable, "tests/bench/make_checkpoints.py", "--out", str(made), "--tokenizer",
                        str(GOLDEN / "tiny-phi")], cwd=ROOT, check=True)
    captions = some_of(data, tmp_path / "captions.json", image=True, turns=2)
    more = ["--llm", str(made / "phi-2"), "--vision", str(made / "clip"), "--dtype", "bfloat16",
            "--global-batch", "1", "--max-steps", "1", "--micro-tokens", "1024"]
    run(arguments(tmp_path / "out", captions, *more, stage="pretrain"))
    step, = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert step["images"] == 1 and step["tokens"] > 576 and not step["skipped"] and step["memory_gb"] < 24
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("processes, workers, to",
                         [(1, 1, "launcher"), (2, 0, "launcher"), (2, 1, "one"), (2, 1, "group")])
def test_sigterm_saves_and_the_next_start_goes_on(processes, workers, to, data, tmp_path):
    """Protects against losing work to a scheduler, whomever it signals: a group includes the data workers."""
    more, path = ["--epochs", "100", "--workers", str(workers)], tmp_path / "out" / "metrics.jsonl"
    process = launch(arguments(tmp_path / "out", data, *more), processes)
    wait_until = time.time() + 120
    while time.time() < wait_until and not (path.exists() and len(path.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    if to == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(children(process.pid)[-1] if to == "one" else process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert "stopped after step" in stdout, stderr[-3000:]
    [saved] = (tmp_path / "out").glob("step_*")
    assert problem_with(saved) == ""
    done = int(saved.name[5:])
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
    with pytest.raises(ValueError, match="finished model made with other settings(.|\n)*data: "):
        train.main(arguments(tmp_path / "out", tmp_path / "other.json", "--max-steps", "2"))


@pytest.mark.parametrize("args, words", [
    (["--stage", "pretrain"], ["checkpoints/phi-2", "hf download microsoft/phi-2"]),
    (["--stage", "pretrain", "--lerning-rate", "1"], ["unrecognized arguments", "--lerning-rate"]),
    (["--plot", "tests"], ["metrics.jsonl", "not there"]),
])
def test_a_users_mistake_ends_with_one_line_and_exit_code_2(args, words, tmp_path):
    process = launch([*args, "--out", str(tmp_path / "out")])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in stderr
    assert all(word in stderr for word in words), stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, words", [
    (["--stage", "finetune", "--model", "tests"], "tests"),
    (["--stage", "finetune", "--freeze", "head", "--plan"], "parts are vision, projector, llm"),
    (["--stage", "finetune", "--freeze", "llm,vision,projector", "--plan"], "nothing would be trained"),
    (["--stage", "sft", "--llm", str(GOLDEN / "tiny-llava-phi")], "looks like a LLaVA-Phi model"),
])
def test_flags_that_make_no_sense_are_refused(args, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train.main([*args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_this_runs_stay_as_they_are(data, tmp_path):
    """Protects other people's files, the model a run starts from, and a finished model whose run is asked for more."""
    def contents() -> dict:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"port": 80}')
    (tmp_path / "app" / "precious.safetensors").write_bytes(b"x")
    train.main(arguments(tmp_path / "run", data, "--max-steps", "3", "--save-every", "2"))
    before, checkpoint = contents(), str(tmp_path / "run" / "step_000002")
    for out, more, words in (("app", ["--resume", "never"], "not a training run's"),
                             ("run", ["--model", str(tmp_path / "run"), "--resume", "never"], "starts from"),
                             ("run", ["--max-steps", "3", "--resume", checkpoint, "--lr", "1"], "lr: 0.001 then, 1.0 now"),
                             ("new", ["--images", "nowhere"], "no image folder at nowhere")):
        with pytest.raises((ValueError, OSError), match=words):
            train.main(arguments(tmp_path / out, data, *more))
        assert contents() == before


def test_a_disk_full_at_the_very_end_leaves_a_checkpoint(data, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", full)
        with pytest.raises(OSError, match="No space left.*step_000002 has it"):
            train.main(arguments(tmp_path / "out", data, "--max-steps", "2"))
    train.main(arguments(tmp_path / "out", data, "--max-steps", "2"))
    train.main(arguments(tmp_path / "whole", data, "--max-steps", "2"))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_run_without_a_model_says_how_to_make_one(data, tmp_path):
    train.main(arguments(tmp_path / "out", data, "--stop-after", "1"))
    for folder in (tmp_path / "out", tmp_path / "out" / "step_000001"):
        with pytest.raises(ValueError, match="export --model .*step_000001"):
            load_model(folder)


def test_a_foreign_folder_is_not_written_into(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are not a training run's"):
        train.main(arguments(tmp_path, data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]
