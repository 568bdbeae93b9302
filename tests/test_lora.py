"""LoRA and QLoRA: one layer against the same one written plainly, and runs that train adapters and merge them."""
import pytest
import torch
from helpers import GOLDEN, ROOT, load_weights_command, metrics, train_flags
from safetensors.torch import load_file
from training import assert_same_run, run_train, some_of, train_here

from lib.lora import Int4LoRALinear, LoRALinear, dequantize

# ---------------------------------------------------------------------------------------------------
# One layer


def test_adapters_learn_on_weights_in_4_bits():
    """Values and gradients of x, A and B."""
    torch.manual_seed(0)
    base = torch.nn.Linear(160, 97)
    adapted = Int4LoRALinear(base, 4, 8.0)
    adapted.quantize(torch.randn(97, 160))
    torch.nn.init.normal_(adapted.lora_a)
    torch.nn.init.normal_(adapted.lora_b)
    plain = torch.nn.Linear(160, 97)
    plain.weight.data = dequantize(adapted.weight, adapted.group_scales)
    plain.bias.data = base.bias.data
    oracle = LoRALinear(plain, 4, 8.0)
    oracle.lora_a.data = adapted.lora_a.data
    oracle.lora_b.data = adapted.lora_b.data
    x = torch.randn(7, 160)
    results = []
    for layer in (adapted, oracle):
        x_ = x.clone().requires_grad_()
        y = layer(x_)
        y.square().sum().backward()
        results.append((y.detach(), x_.grad, layer.lora_a.grad, layer.lora_b.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)
    assert adapted.weight.grad is None


def test_4_bits_come_back_as_the_weights_that_were_rounded():
    """Half a step of 15 between the smallest and the largest weight of a group, and what bf16 rounds off the scale."""
    weight = torch.randn(97, 160, generator=torch.Generator().manual_seed(0))
    layer = Int4LoRALinear(torch.nn.Linear(160, 97), 4, 8.0)
    layer.quantize(weight)
    error = (dequantize(layer.weight, layer.group_scales) - weight).norm() / weight.norm()
    assert error < 0.09


def test_a_fresh_adapter_changes_nothing():
    base = torch.nn.Linear(160, 97)
    adapted = LoRALinear(base, 4, 8.0)
    torch.nn.init.normal_(adapted.lora_a)
    x = torch.randn(7, 160)
    assert torch.equal(adapted(x), base(x))

# ---------------------------------------------------------------------------------------------------
# A run


@pytest.mark.parametrize("on, moved", [("both", {"mlp.fc1", "self_attn.q_proj"}), ("attn", {"self_attn.q_proj"})])
def test_adapters_learn_and_are_merged_into_what_they_sit_on(on, moved, chat_json, tmp_path):
    more = ["--lora-r", "2", "--lora-on", on, "--freeze", "vision", "--max-steps", "4"]
    train_here(train_flags(tmp_path / "out", chat_json, *more))
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(GOLDEN / "tiny-phi-split" / "model.safetensors")
    assert not any("lora" in name for name in after)
    for name in ("layers.0.mlp.fc1", "layers.0.self_attn.q_proj", "embed_tokens"):
        changed = not torch.equal(after[f"language_model.model.{name}.weight"], before[f"model.{name}.weight"])
        assert changed == (name.removeprefix("layers.0.") in moved)


def test_a_short_run_says_what_its_parts_learn_at(chat_json, tmp_path, capfd):
    """Protects a user from rates and scales that changed with --lora-r without his noticing."""
    flags = train_flags(tmp_path / "out", chat_json, "--lora-r", "2", "--freeze", "vision", "--max-steps", "2")
    at = flags.index("--lr")
    train_here(flags[:at] + flags[at + 2:])
    said = capfd.readouterr().out
    assert "parameters, trained at 2e-05\n" in said and "of llm's, trained at 0.0002, scaled by 4 / 2\n" in said
    assert said.count("parameters, frozen\n") == 2
    assert [record["lr"] for record in metrics(tmp_path / "out")] == [0.0, 2e-4]


def test_a_run_with_a_4_bit_base(chat_json, tmp_path):
    """Resumed exactly, the same on two processes, close to adapters on the base itself, and merged into that."""
    chat_json = some_of(chat_json, tmp_path / "pictures.json", image=True)
    more = ["--llm", "demo/phi", "--vision", "demo/clip", "--template", "v0", "--image-mode", "pad", "--micro-tokens",
            "600", "--lora-r", "4", "--max-steps", "4"]
    packed = [*more, "--base-bits", "4"]
    train_here(train_flags(tmp_path / "whole", chat_json, *packed, stage="pretrain"))
    train_here(train_flags(tmp_path / "parts", chat_json, *packed, stage="pretrain"), stop_after=2)
    checkpoint = tmp_path / "parts" / "step_000002"
    load_weights_command(["export", "--model", str(checkpoint), "--out", str(tmp_path / "half")])
    train_here(train_flags(tmp_path / "parts", chat_json, *packed, stage="pretrain"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run_train(train_flags(tmp_path / "two", chat_json, *packed, stage="pretrain"), processes=2)
    train_here(train_flags(tmp_path / "plain", chat_json, *more, stage="pretrain"))
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


def test_4_bits_are_refused_where_they_cannot_be(chat_json, tmp_path):
    with pytest.raises(ValueError, match="40 wide, no multiple of a group of 32"):
        train_here(train_flags(tmp_path / "out", chat_json, "--base-bits", "4", "--lora-r", "4"))
