"""Training: the step's arithmetic, one process against two, the stages, adapters, and what is refused."""
import json
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from forks import run_forked
from helpers import (GOLDEN, TINY_MODEL, TRAIN_FLAGS, load_weights_command, metrics, run_script, same, to_uint8,
                     train_flags)
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training import run_train, some_of, train_here
from zoo import projector_file, without_tower

import train
from data import Batch, Step
from lib.folders import Kind, open_folder
from lib.recipes import parse, replace
from load_weights import load_model
from model import LLaVAConfig, PhiConfig
from vision import VisionConfig

# ---------------------------------------------------------------------------------------------------
# The step


def test_learning_rate_follows_hugging_faces_cosine_and_linear_schedules():
    got = [train.lr_at(step, 100, 3) for step in (0, 1, 3, 51, 99)]
    assert got == pytest.approx([0, 1 / 3, 1, 0.5080971, 0.0002622], abs=1e-6)
    assert [train.lr_at(s, 10, 2, "linear") for s in (0, 1, 2, 6, 9)] == pytest.approx([0, 0.5, 1, 0.5, 0.125])


def test_two_processes_and_other_micro_batches_give_the_same_run(chat_json, tmp_path):
    """Protects guarantee 3: loss, norm and final weights do not depend on processes or micro-batch size.

    Of 24 samples, 23 to a step, the second step has one, which may be text alone: the process without a sample has to
    take part all the same, as it has where micro-batches of one sample do not come out even.
    """
    more = ["--epochs", "4", "--max-steps", "8", "--global-batch", "23", "--val-data", str(chat_json)]
    train_here(train_flags(tmp_path / "one", chat_json, *more))
    train_here(train_flags(tmp_path / "wide", chat_json, *more, "--micro-tokens", "4000"))
    run_train(train_flags(tmp_path / "two", chat_json, *more, "--micro-tokens", "60"), processes=2)
    one = metrics(tmp_path / "one")
    assert [m["samples"] for m in one if "loss" in m] == [23, 1] * 4
    for name in ("wide", "two"):
        for a, b in zip(one, metrics(tmp_path / name), strict=True):
            if "loss" not in a:
                assert set(a) == {"step", "val_loss", "val_loss_blank"} and a == pytest.approx(b, rel=1e-6)
                continue
            same = ("step", "lr", "samples", "supervised_tokens", "tokens", "images")
            assert [a[k] for k in same] == [b[k] for k in same]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        weights, others = (load_file(tmp_path / out / "model.safetensors") for out in ("one", name))
        for k in weights:
            torch.testing.assert_close(weights[k], others[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [["selective"], ["full"], pytest.param(["none", "--compile"], marks=pytest.mark.slow),
                                   pytest.param(["full", "--compile"], marks=pytest.mark.slow)])
def test_what_is_recomputed_or_compiled_changes_nothing(flags, chat_json, tmp_path):
    """With dropout: what is computed again must be what was."""
    for name, mode in (("plain", ["none"]), ("other", flags)):
        more = ["--max-steps", "5", "--dropout", "0.1", "--recompute", *mode]
        train_here(train_flags(tmp_path / name, chat_json, *more))
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_loss_and_gradient_norm_of_a_step_equal_the_originals(golden, tmp_path):
    P = 4
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
    images = to_uint8(golden["train.pixel_values"])
    batch = Batch(torch.tensor(ids), torch.tensor(lengths), images, *map(torch.tensor, (slots, rows, targets)))
    cfg = parse(train_flags(tmp_path, tmp_path))
    mesh, device = train.setup()
    try:
        source, config = train.open_source(cfg)
        model = train.build(cfg, config, source, mesh, device)
        optimizer = train.make_optimizer(model, cfg)
        step = Step(0, [0, 1], [batch])
        loss, norm, skipped = train.train_step(model, optimizer, step, cfg, len(targets), 1.0, device)
    finally:
        train.dist.destroy_process_group()
    assert not skipped
    assert loss == pytest.approx(golden["train.loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden["train.grad_norm"].item(), rel=1e-5)


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


def a_step(cfg: Namespace, config: LLaVAConfig) -> Step:
    """A step of several micro-batches."""
    chat_json = train.open_data(cfg, config, cfg.data)
    loader = train.make_loader(cfg, train.build_on_meta(cfg, config), chat_json, 1, torch.device("cpu"))
    step = next(iter(loader))
    assert len(step.batches) > 1
    return step


def test_steps_in_bf16_equal_a_plain_loop_over_master_weights_bit_for_bit(chat_json, tmp_path):
    """Protects what FSDP is asked for: bf16 weights made of fp32 ones, gradients of micro-batches summed in fp32."""
    cfg = parse(train_flags(tmp_path, chat_json, "--dtype", "bf16", "--dropout", "0.1", "--global-batch", "6"))
    mesh, device = train.setup()
    try:
        source, config = train.open_source(cfg)
        step = a_step(cfg, config)
        supervised = sum(len(batch.targets) for batch in step.batches)
        ours = train.build(cfg, config, source, mesh, device)
        optimizer = train.make_optimizer(ours, cfg)
        plain = load_model(GOLDEN / "tiny-llava-phi").train().requires_grad_()
        for block in plain.llm.h:
            block.dropout = 0.1
        masters = [torch.nn.Parameter(p.detach().clone()) for p in plain.parameters()]
        adamw = torch.optim.AdamW(masters, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, weight_decay=0, fused=True)
        plain.bfloat16()
        for k in range(3):
            _, norm, _ = train.train_step(ours, optimizer, step._replace(step=k), cfg, supervised, 1.0, device)
            for i, batch in enumerate(step.batches):
                torch.manual_seed(train.dropout_seed(cfg.seed, k, 0, i))
                (plain(*train.to_device(batch, device)) / supervised).backward()
                for master, p in zip(masters, plain.parameters()):
                    master.grad = p.grad.float() if master.grad is None else master.grad + p.grad
                    p.grad = None
            for master in masters:
                master.grad *= min(1.0, 1.0 / (norm + 1e-6))
            adamw.step()
            adamw.zero_grad()
            with torch.no_grad():
                for master, p in zip(masters, plain.parameters()):
                    p.copy_(master)
        for (name, p), master in zip(ours.named_parameters(), masters, strict=True):
            assert p.dtype == torch.float32 and torch.equal(p.full_tensor(), master), name
    finally:
        train.dist.destroy_process_group()


def test_gathering_once_a_step_changes_no_number(chat_json, tmp_path):
    more = ["--max-steps", "4", "--global-batch", "12", "--micro-tokens", "120"]
    for gather in ("off", "on"):
        run_train(train_flags(tmp_path / gather, chat_json, *more, "--gather", gather), processes=2)
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
def test_what_a_step_of_several_micro_batches_sends(gather, chat_json, tmp_path, monkeypatch):
    """Of 3 FSDP units (two blocks and the root): how often weights are gathered and gradients shared out.

    For every micro-batch: both blocks twice and the root once, and three reductions. Once a step: three and three.
    """
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=0, world_size=2))
    monkeypatch.setattr(train, "on_every_process", lambda work: [work()] * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    more = ["--global-batch", "12", "--freeze", "vision", "--gather", gather]
    cfg = parse(train_flags(tmp_path, chat_json, *more))
    mesh, device = train.setup()
    try:
        source, config = train.open_source(cfg)
        step = a_step(cfg, config)
        model = train.build(cfg, config, source, mesh, device)
        optimizer = train.make_optimizer(model, cfg)
        with Sent() as sent:
            train.train_step(model, optimizer, step, cfg, 100, 1.0, device)
    finally:
        train.dist.destroy_process_group()
    n = len(step.batches)
    assert sent.counts["c10d::_allgather_base_"] == (5 * n if gather == "off" else 3)
    assert sent.counts["c10d::_reduce_scatter_base_"] == (3 if gather == "on" else 3 * n)
    # The gradients' norms are one operation for all of them, and then one more for the whole.
    assert sent.counts["aten::_foreach_norm.Scalar"] == 1 and sent.counts["aten::linalg_vector_norm"] == 1


def test_a_frozen_decoder_computes_no_weight_gradients(chat_json, tmp_path):
    """Stage 1's backward pass costs the decoder one forward pass, not two."""
    config = LLaVAConfig(PhiConfig(64, 64, 2, 2, 32, 128, 8, dropout=0.0), VisionConfig(28, 14, 2, 2, 32, 64))
    flops = {}
    for learn in ("projector", "projector,llm"):
        cfg = replace(parse([]), train=learn)
        model = train.build_on_meta(cfg, config).to_empty(device="cpu")
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


def test_a_step_that_is_not_finite_changes_nothing_and_five_end_the_run(chat_json, tmp_path, monkeypatch):
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
    train_here(train_flags(tmp_path / "once", chat_json, "--epochs", "2"))
    assert [m["step"] for m in metrics(tmp_path / "once") if m["skipped"]] == [2]
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "once" / "model.safetensors").values())
    assert len(json.loads((tmp_path / "once" / "skipped_steps.jsonl").read_text())["sample_ids"]) == 4
    steps.clear()
    poisoned = set(range(3, 8))
    with pytest.raises(ValueError, match="5 steps in a row"):
        train_here(train_flags(tmp_path / "often", chat_json, "--epochs", "2"))


def test_a_run_of_one_step_says_that_it_learns_nothing(chat_json, tmp_path, capsys):
    """Its rate is 0, as in the first step of the original's warm-up."""
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "1"))
    assert "this run learns nothing" in capsys.readouterr().out and metrics(tmp_path / "out")[0]["lr"] == 0
    train_here(train_flags(tmp_path / "out2", chat_json, "--max-steps", "1", "--warmup", "0"))
    assert "learns nothing" not in capsys.readouterr().out and metrics(tmp_path / "out2")[0]["lr"] > 0

# ---------------------------------------------------------------------------------------------------
# Stages and adapters


def test_stage_one_changes_the_projector_and_nothing_else(chat_json, tmp_path):
    captions = some_of(chat_json, tmp_path / "captions.json", image=True, turns=2)
    train_here(train_flags(tmp_path / "out", captions, stage="pretrain"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[f"language_model.{name}"], tensor), name
    clip = torch.load(GOLDEN / "tiny-clip" / "pytorch_model.bin", weights_only=True)
    for name in (n for n in clip if n.startswith("vision_model.") and "position_ids" not in n):
        assert torch.equal(after[f"vision_tower.{name}"], clip[name]), name
    assert not torch.equal(after["multi_modal_projector.linear_1.bias"], torch.zeros(40))


def test_sft_makes_a_phi_folder_that_merge_and_pretrain_take(chat_json, tmp_path):
    """The paper's first step: the language model alone, on text, by the same loop; stopped and resumed on the way."""
    text = some_of(chat_json, tmp_path / "text.json", image=False)
    train_here(train_flags(tmp_path / "phi", text, "--save-every", "1", stage="sft"), stop_after=2)
    load_weights_command(["export", "--model", str(tmp_path / "phi" / "step_000002"), "--out", str(tmp_path / "early")])
    assert open_folder(tmp_path / "early").kind == Kind.PHI
    train_here(train_flags(tmp_path / "phi", text, stage="sft"))
    steps = metrics(tmp_path / "phi")
    assert [m["lr"] for m in steps] == pytest.approx([0, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert not any(m["images"] for m in steps)
    parts = ["--llm", str(tmp_path / "phi"), "--vision", str(GOLDEN / "tiny-clip")]
    load_weights_command(["merge", *parts, "--out", str(tmp_path / "base")])
    after, before = load_model(tmp_path / "base").state_dict(), load_model(GOLDEN / "tiny-llava-phi").state_dict()
    assert not torch.equal(after["llm.h.0.mlp.fc.weight"], before["llm.h.0.mlp.fc.weight"])
    captions = some_of(chat_json, tmp_path / "captions.json", image=True, turns=2)
    train_here(train_flags(tmp_path / "out", captions, *parts, "--max-steps", "2", stage="pretrain"))
    with pytest.raises(ValueError, match="18 samples with an image"):
        train_here(train_flags(tmp_path / "no", chat_json, stage="sft"))
    with pytest.raises(ValueError, match=f"python data.py check --data {chat_json} --images .$"):      # can be typed
        train_here(train_flags(tmp_path / "no", chat_json, "--max-length", "8", stage="sft"))


def test_mipha_trains_from_phi_and_siglip_and_is_exported(chat_json, tmp_path):
    """Both stages by Mipha's recipe: a SigLIP tower, squashed pictures, then padded ones; a checkpoint exported."""
    mipha = str(GOLDEN / "../golden-mipha/tiny-mipha")
    load_weights_command(["export", "--model", mipha, "--out", str(tmp_path / "parts"), "--to", "parts"])
    captions = some_of(chat_json, tmp_path / "captions.json", image=True, turns=2)
    where = ["--recipe", "mipha", "--images", str(GOLDEN / "images"), *TRAIN_FLAGS, "--max-steps", "2"]
    train_here(["--stage", "pretrain", "--llm", str(tmp_path / "parts" / "phi-2"), "--vision",
                str(tmp_path / "parts" / "siglip"), "--data", str(captions), "--out", str(tmp_path / "one"), *where])
    train_here(["--stage", "finetune", "--model", str(tmp_path / "one"), "--data", str(chat_json), "--out",
                str(tmp_path / "two"), *where], stop_after=1)
    settings = json.loads((tmp_path / "two" / "config.json").read_text())["training"]
    assert [settings[k] for k in ("epochs", "beta2", "eps", "image_mode")] == [2, 0.999, 1e-8, "pad"]
    load_weights_command(["export", "--model", str(tmp_path / "two" / "step_000001"), "--out", str(tmp_path / "early"),
                          "--head-bias", "keep"])
    train_here(["--stage", "finetune", "--model", str(tmp_path / "one"), "--data", str(chat_json), "--out",
                str(tmp_path / "two"), *where])
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in first + second] == [0, 1, 0, 1] and first[0]["images"] == 4
    before, early, after = (load_model(tmp_path / name) for name in ("one", "early", "two"))
    assert not after.config.vision.class_token and after.config.image_mode == "pad"
    assert before.config.image_mode == "squash"
    for name, p in after.named_parameters():                # the very first step has rate 0
        assert torch.equal(early.get_parameter(name), before.get_parameter(name)), name
    assert not torch.equal(after.vision.patch.bias, before.vision.patch.bias)
    assert torch.equal(before.vision.patch.bias, load_model(Path(mipha)).vision.patch.bias)


@pytest.mark.slow
def test_the_full_size_model_takes_a_step_of_stage_one_within_24_gb(chat_json, tmp_path):
    """On a CPU, bf16. RANDOM_CHECKPOINTS: what tests/bench/make_checkpoints.py made; else it is made here (8 GB)."""
    made = Path(os.environ.get("RANDOM_CHECKPOINTS", tmp_path / "random"))
    if not made.exists():
        run_script("tests/bench/make_checkpoints.py", "--out", made, "--tokenizer", GOLDEN / "tiny-phi", timeout=1200)
    captions = some_of(chat_json, tmp_path / "captions.json", image=True, turns=2)
    more = ["--llm", str(made / "phi-2"), "--vision", str(made / "clip"), "--dtype", "bfloat16",
            "--global-batch", "1", "--max-steps", "1", "--micro-tokens", "1024"]
    run_train(train_flags(tmp_path / "out", captions, *more, stage="pretrain"))
    step, = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert step["images"] == 1 and step["tokens"] > 576 and not step["skipped"] and step["memory_gb"] < 24
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()

# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("form", ["a projector's file", "a model without its tower"])
def test_a_run_starts_from_the_projector_that_it_is_given(form, chat_json, tmp_path, capsys):
    """LLaVA's stage 1 goes on in our stage 2, in both of the forms that LLaVA writes. A rate of 0 shows what came in,
    and the export of a checkpoint finds all of the sources again."""
    llm, more = GOLDEN / "tiny-phi", ["--projector", str(projector_file(tmp_path / "stage 1"))]
    if form != "a projector's file":
        llm, more = without_tower(tmp_path / "llava"), []
    flags = ["--model", "", "--llm", str(llm), "--vision", str(GOLDEN / "tiny-clip"), *more, "--lr", "0"]
    train_here(train_flags(tmp_path / "out", chat_json, *flags, "--max-steps", "1"))
    train_here(train_flags(tmp_path / "stopped", chat_json, *flags, "--max-steps", "2"), stop_after=1)
    load_weights_command(["export", "--model", str(tmp_path / "stopped" / "step_000001"), "--out", str(tmp_path / "x")])
    for folder in (tmp_path / "out", tmp_path / "x"):
        assert same(load_model(folder), load_model(TINY_MODEL), "projector")


@pytest.mark.parametrize("args, words", [
    (["--stage", "pretrain"], ["checkpoints/phi-2", "hf download microsoft/phi-2"]),
    (["--stage", "pretrain", "--lerning-rate", "1"], ["unrecognized arguments", "--lerning-rate"]),
    (["--plot", "tests"], ["tests/metrics.jsonl: not there; --plot and --against take"]),
    (["--plot", "demo/reference/finetune.jsonl", "--against", "tests"], ["tests/metrics.jsonl: not there"]),
])
def test_a_users_mistake_ends_with_one_line_and_exit_code_2(args, words, tmp_path):
    done = run_forked("train.py", *args, "--out", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, words", [
    (["--stage", "finetune", "--model", "tests"], "tests"),
    (["--stage", "finetune", "--freeze", "head", "--plan"], "parts are vision, projector, llm"),
    (["--stage", "finetune", "--freeze", "llm,vision,projector", "--plan"], "nothing would be trained"),
    (["--stage", "sft", "--llm", str(GOLDEN / "tiny-llava-phi")], "looks like a LLaVA-Phi model"),
    (["--stage", "finetune", "--projector", "x.bin"], "--projector x.bin goes with --llm and --vision"),
    (["--stage", "sft", "--projector", "x.bin"], "--projector x.bin goes with --llm and --vision"),
])
def test_flags_that_make_no_sense_are_refused(args, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_here([*args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
