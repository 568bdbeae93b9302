"""Adapters on weights in 4 bits, against the same adapters on the same weights unpacked."""
import torch

from lib.lora import LoRALinear
from lib.quant import Int4Linear, unpack_int4


def test_adapters_learn_through_a_base_in_4_bits():
    """Values and gradients of x, A and B, against the same adapters on the unpacked weights."""
    torch.manual_seed(0)
    quantized = Int4Linear(torch.nn.Linear(160, 97))
    adapted = LoRALinear(quantized, 4, 8.0)
    adapted.quantize(torch.randn(97, 160))
    torch.nn.init.normal_(adapted.lora_a)
    torch.nn.init.normal_(adapted.lora_b)
    plain = torch.nn.Linear(160, 97)
    plain.weight.data = unpack_int4(adapted.weight, adapted.scales)[:, :97].t().contiguous()
    plain.bias.data = adapted.bias.data
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
