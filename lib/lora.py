"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021), and QLoRA on weights in 4 bits (Dettmers et al. 2023)."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.quant import Int4Linear, UnpackedProduct, pack_int4
from model import Phi


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A x with W and b frozen (Hu et al. 2021). B starts at 0: at first the plain layer.

    On a 4-bit base (QLoRA, Dettmers et al. 2023) W is what pack_int4 made of it, and `scales` its groups' scales.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.register_buffer("scales", base.scales if isinstance(base, Int4Linear) else None)
        self.scale = alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def quantize(self, weight: Tensor) -> None:
        pack_int4(weight, self.weight.data, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        if self.scales is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = UnpackedProduct.apply(x, self.weight, self.scales)[..., :self.out_features] + self.bias
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def apply_lora(llm: Phi, r: int, alpha: float, on: tuple[str, ...] = ("attn", "mlp"), bits: int = 16) -> int:
    """Give the Linears of every block's `on` a low-rank companion, in place -> how many.

    bits 4: the Linears that get companions are then held in 4 bits themselves.
    """
    count = 0
    for block in llm.h:
        for branch in on:
            module = getattr(block, branch)
            for name, base in list(module.named_children()):
                if bits == 4:
                    base = Int4Linear(base)
                setattr(module, name, LoRALinear(base, r, alpha))
                count += 1
    return count


def merge_lora(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State with `*.lora_a` and `*.lora_b` -> the plain model's state: W + (alpha / r) B A."""
    merged = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            stem = name.removesuffix("lora_a")
            b = tensors[stem + "lora_b"]
            weight = merged[stem + "weight"]
            update = alpha / a.size(0) * b.float() @ a.float()
            merged[stem + "weight"] = (weight.float() + update).to(weight.dtype)
    return merged
