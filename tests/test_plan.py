"""The plan: memory, steps and time from shapes alone, against what torch's own trackers count."""
import pytest
import torch
from bench.plan import measure, planned
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import train_here

import train
from data import PICTURE_COST
from lib import plan
from lib.recipes import parse, replace
from model import MIPHA_CONFIG, Layout, LLaVAConfig, PhiConfig
from vision import VisionConfig


def test_mipha_is_planned_with_its_own_sizes(capsys):
    """729 positions a picture, two epochs; a picture costs more than CLIP's."""
    train_here(["--recipe", "mipha", "--stage", "finetune", "--plan"])
    assert "10,396 steps of 128 samples of 992 tokens" in capsys.readouterr().out
    parts = ["vision", "projector", "llm"]
    assert plan.picture_cost(LLaVAConfig(), parts) == pytest.approx(PICTURE_COST, rel=0.05)
    assert plan.picture_cost(MIPHA_CONFIG, parts) > 1.5 * PICTURE_COST


def test_the_plan_says_what_small_gpus_can_do(capsys):
    qlora = ["--lora-r", "64", "--base-bits", "4", "--freeze", "vision"]
    train_here(["--stage", "finetune", *qlora, "--plan", "--gpus", "1"])
    lines = capsys.readouterr().out.splitlines()
    small = lines[lines.index("one GPU with --base-bits 4 --recompute full:") + 1:][:4]
    assert [line.split(" GB  ")[0].strip() for line in small] == ["8", "12", "16", "24"]
    assert all("--micro-tokens" in line for line in small)


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
        model = train.build_on_meta(cfg, config)
        without = train.build_on_meta(replace(cfg, freeze="vision"), config)
        text = plan.memory_plan(cfg, without, 1)[1][mode] * 256
        pictures = plan.memory_plan(cfg, model, 1)[1][mode] * 256 - text
        model = model.to_empty(device="cpu").bfloat16().train()
        model.llm.recompute, model.vision.recompute = mode, mode != "none"
        x = torch.zeros(256, 128, dtype=torch.bfloat16, requires_grad=True)
        with Alive(model.llm) as decoder:
            h = model.llm(x, Layout(torch.tensor([256]), x.device))
        with Alive(model.vision) as tower:
            patches = model.vision(torch.zeros(16, 3, 56, 56, dtype=torch.uint8))    # 256 tokens are 16 pictures
        assert h.shape == (256, 128) and patches.shape == (16, 16, 128)
        return [(text, decoder.bytes()), (pictures, tower.bytes())]
    for (expected, found), (expected_more, found_more) in zip(plan_and_truth(2), plan_and_truth(4)):
        assert found_more - found == pytest.approx(expected_more - expected, rel=0.1, abs=1)


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
        model = train.build_on_meta(cfg, LLaVAConfig())
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
    model = train.build_on_meta(cfg, LLaVAConfig())
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
    train_here(["--stage", stage, "--plan", "--gpus", "8", "--gpu-memory", "80"])
    said = capsys.readouterr().out
    assert all(word in said for word in words) and "best: --recompute none" in said
    fits = [line for line in said.splitlines() if line.strip().startswith("512 ")]
    assert len(fits) == 1 and "have a sample" in fits[0]
