"""LoRA: low-rank adapters next to frozen weights (Hu et al. 2021); QLoRA: on 4-bit weights (Dettmers et al. 2023)."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.quant import group_size, nibbles, quantize_into_int4
from model import Phi


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A x with W and b frozen. B starts at zero, so the adapter starts without effect."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.lora_scale = alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int4LoRALinear(LoRALinear):
    """A LoRALinear with W in 4 bits, two weights to a byte, which are dequantized for every product."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__(base, r, alpha)
        n_out, n_in = base.weight.shape
        packed = torch.empty(n_out, n_in // 2, dtype=torch.uint8, device=base.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = torch.empty(n_in // group_size(n_in), n_out, 2, dtype=torch.bfloat16, device=base.weight.device)
        self.register_buffer("group_scales", scales)

    def quantize(self, weight: Tensor) -> None:
        """Quantize and store a weight (out, in) of any float dtype."""
        quantize_into_int4(self.weight, self.group_scales, weight, nibbles)

    def frozen(self, x: Tensor) -> Tensor:
        return Int4Product.apply(x, self.weight, self.group_scales) + self.bias


class Int4Product(torch.autograd.Function):
    """x (..., K) times nibbles (N, K / 2) -> (..., N), with a gradient for x.

    The backward pass dequantizes the weight again. Plain autograd would keep every layer's dequantized weight for it,
    and use up the memory that 4 bits save.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return F.linear(x, dequantize(packed, scales).type_as(x))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        packed, scales = ctx.saved_tensors
        return grad @ dequantize(packed, scales).type_as(grad), None, None


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """Nibbles (N, K / 2), their groups' scales and zeros (K / group, N, 2) -> weights (N, K) in fp32."""
    q = torch.stack([packed >> 4, packed & 15], dim=-1)                            # (N, K / 2, 2)
    q = q.view(len(packed), len(scales), -1).float()                               # (N, K / group, group)
    scale, zero = scales.float().transpose(0, 1).unsqueeze(2).unbind(-1)           # (N, K / group, 1)
    return q.sub_(8).mul_(scale).add_(zero).flatten(1)


def apply_lora(llm: Phi, r: int, alpha: float, on: tuple[str, ...] = ("attn", "mlp"), bits: int = 16) -> None:
    """Add adapters to the Linears of every block's `on`, in place; with bits = 4, on 4-bit weights (QLoRA)."""
    kind = Int4LoRALinear if bits == 4 else LoRALinear
    for block in llm.h:
        for branch in on:
            module = getattr(block, branch)
            for name, base in list(module.named_children()):
                setattr(module, name, kind(base, r, alpha))


def merge_lora(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict with `*.lora_a` and `*.lora_b` -> the plain model's state dict: W + (alpha / r) B A."""
    merged = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            stem = name.removesuffix("lora_a")
            b = tensors[stem + "lora_b"]
            weight = merged[stem + "weight"]
            update = alpha / a.size(0) * b.float() @ a.float()
            merged[stem + "weight"] = (weight.float() + update).to(weight.dtype)
    return merged
