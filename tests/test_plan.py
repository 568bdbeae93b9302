"""The plan: what it counts against what is really alive, what it chooses, and what it says."""
import numpy as np
import pytest
import torch
from helpers import train_flags
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import train_here

import train
from lib import plan
from lib.device import planned_card
from lib.flops import picture_cost
from lib.recipes import parse, replace
from model import MIPHA_CONFIG, LLaVAConfig, LLaVAPhi, Packed, PhiConfig
from vision import VisionConfig


def build(cfg) -> LLaVAPhi:
    return train.build_on_meta(cfg, LLaVAConfig())


def total(memory: dict[str, float]) -> float:
    """Without the guess for what no tracker sees."""
    return sum(memory.values()) - memory["workspace"]

# ---------------------------------------------------------------------------------------------------
# What is counted

# The allocator's peak in GB at full size, found by `python tests/fake_fsdp.py --ranks 0 --only "..."`, with --world for
# the number of GPUs. Its micro-batches are of 15 samples with a picture, 15,375 tokens, and of 16,128 tokens of text.
MEASURED = [
    (8, "--stage pretrain --gather off --recompute none", 40.70),
    (8, "--stage pretrain --gather off --recompute selective", 32.77),
    (8, "--stage pretrain --gather off --recompute full", 11.56),
    (8, "--stage pretrain --gather on --recompute none", 40.73),
    (8, "--stage pretrain --gather on --recompute selective", 32.80),
    (8, "--stage pretrain --gather on --recompute full", 11.60),
    (8, "--stage finetune --gather off --recompute none", 61.00),
    (8, "--stage finetune --gather off --recompute selective", 33.71),
    (8, "--stage finetune --gather off --recompute full", 12.87),
    (8, "--stage finetune --gather on --recompute none", 77.24),
    (8, "--stage finetune --gather on --recompute selective", 49.95),
    (8, "--stage finetune --gather on --recompute full", 29.11),
    (8, "--stage finetune --gather on --recompute none --lora-r 64", 62.57),
    (8, "--stage finetune --gather on --recompute full --lora-r 64 --base-bits 4", 10.57),
    (8, "--stage finetune --gather on --recompute none --freeze vision", 69.49),
    (8, "--stage finetune --gather off --recompute none --dtype fp32", 115.77),
    (8, "--stage sft --gather on --recompute none", 68.84),
    (1, "--stage finetune --gather off --recompute none", 103.96),
    (1, "--stage finetune --gather on --recompute full", 61.45),
    (1, "--stage finetune --gather off --recompute full --lora-r 64 --base-bits 4", 14.02),
]


@pytest.mark.parametrize("gpus, flags, gb", MEASURED)
def test_the_plan_is_within_5_percent_of_the_peak_at_full_size(gpus, flags, gb):
    cfg = parse(flags.split())
    model = build(cfg)
    planned = 0.0
    for tokens, pictures in [(15375, 15), (16128, 0)] if model.vision else [(16128, 0)]:
        micro = replace(cfg, micro_tokens=tokens)
        planned = max(planned, total(plan.memory_plan(micro, model, gpus, cfg.recompute, cfg.gather, pictures)))
    assert planned / 1e9 == pytest.approx(gb, rel=0.05)


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
def test_the_plan_counts_what_forward_really_keeps(mode, learn):
    """Of each further layer: in the decoder per token, in the tower per picture. Within 10 %, since attention's loop on
    a CPU copies its output. Protects the table above from changes of the model."""
    cfg = replace(parse(["--recompute", mode]), train=learn)

    def plan_and_truth(n_layer: int) -> list[tuple[float, float]]:
        config = LLaVAConfig(PhiConfig(512, 512, n_layer, 4, 128, 512, 16, dropout=0.0),
                             VisionConfig(56, 14, 1 + n_layer, 4, 128, 512))
        model = train.build_on_meta(cfg, config)
        text = plan.activation_bytes(model, mode, 2, 256, 0)
        pictures = plan.activation_bytes(model, mode, 2, 256, 16) - text
        model = model.to_empty(device="cpu").bfloat16().train()
        model.llm.recompute, model.vision.recompute = mode, mode != "none"
        x = torch.zeros(256, 128, dtype=torch.bfloat16, requires_grad=True)
        with Alive(model.llm) as decoder:
            h = model.llm(x, Packed([256], x.device))
        with Alive(model.vision) as tower:
            patches = model.vision(torch.zeros(16, 3, 56, 56, dtype=torch.uint8))
        assert h.shape == (256, 128) and patches.shape == (16, 16, 128)
        return [(text, decoder.bytes()), (pictures, tower.bytes())]
    for (planned, found), (planned_more, found_more) in zip(plan_and_truth(2), plan_and_truth(4)):
        assert found_more - found == pytest.approx(planned_more - planned, rel=0.1, abs=1)

# ---------------------------------------------------------------------------------------------------
# What is chosen


def test_recompute_and_gather_are_chosen_by_the_memory_there_is():
    cfg = parse(["--stage", "finetune"])
    model = build(cfg)
    chosen = []
    for gpus, gb in ((1, 130), (1, 110), (1, 90), (8, 24), (8, 80), (8, 100)):
        mode = plan.choose_recompute(cfg, model, gpus, gb * 1e9)
        chosen.append((mode, plan.choose_gather(cfg, model, gpus, gb * 1e9, mode)))
    assert chosen == [("none", "on"), ("selective", "on"), ("selective", "on"), ("full", "off"), ("none", "off"),
                      ("none", "on")]
    assert plan.choose_recompute(replace(cfg, compile=True), model, 1, 90e9) == "full"


@pytest.mark.parametrize("flags, gb, advice", [
    ("", 54, "--micro-tokens 2048 would fit"),
    ("", 40, "--lora-r 64 would fit"),
    ("", 16, "--lora-r 64 --freeze vision would fit"),
    ("--lora-r 16", 12, "--lora-r 16 --base-bits 4 --freeze vision would fit"),
    ("", 7.4, "--lora-r 64 --base-bits 4 --freeze vision --micro-tokens 2048 would fit"),
    ("", 3, "take larger GPUs or more of them"),
])
def test_a_card_that_is_too_small_is_named_with_the_flags_that_fit(flags, gb, advice):
    said = plan.too_small(parse(["--stage", "finetune", *flags.split()]), build, 1, gb * 1e9)
    assert said.endswith(f"even with --recompute full, and {gb:.0f} GB can be used: {advice}") and "\n" not in said
    assert said.startswith("planned 18 GB" if flags else "planned 58 GB")


def test_nothing_is_said_where_it_fits_and_no_adapters_are_proposed_to_stage_1():
    assert plan.too_small(parse(["--stage", "finetune"]), build, 1, 60e9) == ""
    assert plan.too_small(parse(["--stage", "pretrain"]), build, 1, 3e9).endswith("take larger GPUs or more of them")


def test_a_run_that_is_planned_above_its_memory_says_so_before_it_loads(chat_json, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "memory_of", lambda device: 1e6)
    monkeypatch.setattr(train, "read_weights", lambda *args: print("reading"))
    train_here(train_flags(tmp_path / "out", chat_json, "--max-steps", "1"))
    before, _ = capfd.readouterr().out.split("reading")
    assert "even with --recompute full, and 0 GB can be used: take larger GPUs or more of them\n" in before


@pytest.mark.parametrize("flags, gpus, memory", [
    ("--lora-r 64 --base-bits 4 --freeze vision", 1, 8e9), ("--lora-r 64 --base-bits 4", 1, 16e9), ("", 8, 80e9),
])
def test_the_most_tokens_are_the_most_that_fit(flags, gpus, memory):
    """Whatever --micro-tokens was given: the logits are those of the size that is asked about."""
    found = []
    for given in ("1024", "16384"):
        cfg = parse(["--stage", "finetune", "--micro-tokens", given, *flags.split()])
        model = build(cfg)
        for mode in plan.RECOMPUTE_MODES:
            most = plan.most_tokens(cfg, model, gpus, memory, mode, "on")
            for tokens in range(1024, 24577, 1024):
                sized = replace(cfg, micro_tokens=tokens)
                assert plan.fits(sized, model, gpus, memory, mode, "on") == (tokens <= most)
            found.append(most)
    assert found[:3] == found[3:] and found[2] >= 2048

# ---------------------------------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize("stage, words", [
    ("pretrain", ["9,180,160 parameters, trained", "2,181 steps of 256", "auto takes --recompute none --gather on"]),
    ("finetune", ["2,779,683,840 parameters, trained", "5,198 steps of 128", "auto takes --recompute none --gather off",
                  "a checkpoint takes 37.0 GB of disk, and writing it 8.6 GB of host memory on each node"]),
    ("sft", ["636 steps of 128", "a checkpoint takes 33.4 GB of disk"]),
])
def test_the_plan_is_printed_without_weights_and_with_the_published_counts(stage, words, capsys):
    train_here(["--stage", stage, "--plan", "--gpus", "8", "--gpu-memory", "80"])
    said = capsys.readouterr().out
    assert all(word in said for word in words), said
    lines = said.splitlines()
    modes, gathers, *_ = [line.split() for line in lines if line.startswith("--")]
    [most] = [line.split()[-6:] for line in lines if line.startswith("the most --micro-tokens")]
    assert modes[1:] == ["none", "none", "selective", "selective", "full", "full"] and gathers[1:] == ["on", "off"] * 3
    assert int(most[0]) <= int(most[1]) and most[-1] == "24576"


@pytest.mark.parametrize("gpus, per_node, shards", [(8, 8, 8), (4, 8, 4), (16, 8, 8), (8, 4, 4), (2, 1, 2), (1, 1, 1)])
def test_weights_are_sharded_within_a_node_or_over_all_nodes_of_one_gpu(gpus, per_node, shards, capsys):
    train_here(["--stage", "finetune", "--plan", "--gpus", str(gpus), "--gpus-per-node", str(per_node)])
    assert f"weights sharded over {shards}\n" in capsys.readouterr().out


@pytest.fixture
def planned(capsys, monkeypatch):
    """What --plan says of stage 2 on one GPU, without the search for the most tokens, which takes most of its time."""
    monkeypatch.setattr(plan, "most_tokens", lambda *args: 1024)

    def say(*flags: str) -> str:
        train_here(["--stage", "finetune", "--plan", "--gpus", "1", *flags])
        return capsys.readouterr().out
    return say


def hours(said: str) -> list[float]:
    [line] = [line for line in said.splitlines() if line.startswith("hours at half of")]
    return [float(cell) for cell in line.split("TFLOP/s")[1].split()]


def test_a_cards_name_gives_its_memory_and_the_hours_with_recomputation(planned):
    """Full recomputation repeats two thirds of a block's products."""
    said = planned("--gpu", "NVIDIA GeForce RTX 4090")
    assert "on 1 x 24 GB" in said and "hours at half of 165.2 TFLOP/s" in said
    none, _, selective, _, full, _ = hours(said)
    assert none == pytest.approx(5198 * 1.83e15 / 82.6e12 / 3600, rel=0.01)
    assert selective == pytest.approx(1.02 * none, rel=0.02) and full == pytest.approx(1.22 * none, rel=0.03)
    said = planned()
    assert "hours at half" not in said and said.endswith("; --tflops gives hours, and so does --gpu in bf16\n")


@pytest.mark.parametrize("name, gigabytes, tflops, dtype, expected", [
    ("", 0, 0, "bf16", (80e9, 0)), ("", 8, 0, "bf16", (8e9, 0)), ("", 0, 40, "bf16", (80e9, 40e12)),
    ("NVIDIA GeForce RTX 4090", 0, 0, "bf16", (24e9, 165.2e12)), ("rtx 4090", 12, 0, "bf16", (12e9, 165.2e12)),
    ("NVIDIA A100-SXM4-40GB", 0, 0, "bf16", (40e9, 312e12)), ("A100", 0, 100, "bf16", (80e9, 100e12)),
    ("rtx4090", 0, 0, "bf16", (24e9, 165.2e12)), ("H100", 0, 0, "bf16", (80e9, 989e12)),
    ("h100pcie", 0, 0, "bf16", (80e9, 756e12)), ("RTX 4090", 0, 0, "fp32", (24e9, 0)),
    ("RTX 4090", 0, 80, "fp32", (24e9, 80e12)),
])
def test_a_number_that_is_given_takes_precedence_over_the_cards(name, gigabytes, tflops, dtype, expected):
    """And bf16's speed is nobody's in fp32."""
    assert planned_card(name, gigabytes, tflops, dtype) == expected


@pytest.mark.parametrize("name", ["RTX 4090 Laptop", "H800", "Voodoo 2"])
def test_a_card_that_is_not_in_the_table_is_refused_with_those_that_are(name, planned):
    with pytest.raises(ValueError, match=f"--gpu {name}: not in the table; give --gpu-memory and --tflops, or one of "
                                         "H100 PCIe, .*RTX 5090$"):
        planned("--gpu", name)


def test_own_data_is_planned_with_its_own_lengths(chat_json, tmp_path, capsys):
    """And without a trace of the plan, unless the run's folder is there already: then its index is used or kept."""
    flags = train_flags(tmp_path / "out", chat_json, "--plan", "--tflops", "1")
    train_here(flags)
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    train_here(flags)
    assert capsys.readouterr().out == said
    [index] = (tmp_path / "out").iterdir()
    lengths = np.load(index)["length"]
    steps = -(-len(lengths) // 4)
    assert f"{steps} steps of 4 samples of {lengths.mean():.0f} tokens: " in said and f"lengths of {chat_json}" in said
    train_here([*flags, "--data", str(tmp_path / "none.json")])
    assert "lengths as published\n" in capsys.readouterr().out
    train_here([*flags, "--model", str(tmp_path / "not downloaded")])
    assert "lengths as published, since the model's folder is not here\n" in capsys.readouterr().out


@pytest.mark.parametrize("memory, flags, said_so", [
    ("8", (), True), ("8", ("--model", "checkpoints/llava-phi"), False), ("24", (), False),
])
def test_qlora_on_a_small_card_is_told_that_stage_1_does_not_fit_there(memory, flags, said_so, planned):
    said = planned(*"--lora-r 64 --base-bits 4 --freeze vision --micro-tokens 2048 --gpu-memory".split(), memory,
                   *flags)
    assert "auto takes --recompute" in said
    assert ("--model out/pretrain is what stage 1 writes, which does not fit here: planned 9 GB" in said) == said_so


def test_mipha_is_planned_with_its_own_sizes(capsys):
    """729 positions a picture, two epochs; a picture costs more than CLIP's."""
    train_here(["--recipe", "mipha", "--stage", "finetune", "--plan"])
    assert "10,396 steps of 128 samples of 992 tokens" in capsys.readouterr().out
    parts = ["vision", "projector", "llm"]
    clip = picture_cost(LLaVAConfig(), parts)
    assert clip == pytest.approx(73, rel=0.05)              # tokens: 1.1 TFLOP against 0.0151
    assert picture_cost(MIPHA_CONFIG, parts) > 1.5 * clip
