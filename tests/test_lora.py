"""Adapters on weights in 4 bits, against the same adapters on the same weights dequantized."""
import torch

from lib.lora import Int4LoRALinear, LoRALinear, dequantize


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
