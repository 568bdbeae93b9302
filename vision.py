"""CLIP ViT vision tower, all of it in this file: uint8 pixels in, patch features out.

Shapes: N images, P patches, S = P + 1 positions (class token first), D width, nh heads, hs head size.
Follows https://github.com/openai/CLIP/blob/main/clip/model.py; LLaVA reads the hidden state before the last layer.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # of RGB in 0..1, over CLIP's training pictures
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:                 # defaults: openai/clip-vit-large-patch14-336
    image_size: int = 336           # pixels per side
    patch_size: int = 14
    n_layer: int = 24               # of the published tower; how many are built: n_used
    n_head: int = 16
    n_embd: int = 1024
    n_inner: int = 4096
    eps: float = 1e-5
    feature_layer: int = -2         # which hidden state is read, counted from the end as in LLaVA

    @property
    def n_patches(self) -> int:     # 576
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_used(self) -> int:        # 23: of n_layer + 1 hidden states; layers behind the one we read are not built
        return self.n_layer + 1 + self.feature_layer if self.feature_layer < 0 else self.feature_layer


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> fp32, bit-equal to CLIPImageProcessor: to 0..1, minus the mean, over the deviation."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std


class Attention(nn.Module):         # every position sees every position
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        N, S, D = x.shape
        qkv = self.qkv(x).view(N, S, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                       # (N, nh, S, hs) each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(N, S, D))                                        # (N, S, D)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.n_inner)
        self.proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.proj(x * torch.sigmoid(1.702 * x))      # "quick" GELU: what CLIP was trained with


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute = False      # True: keep only each block's input for the backward pass
        self.patch = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size, bias=False)
        self.cls = nn.Parameter(torch.zeros(config.n_embd))
        self.pos = nn.Parameter(torch.zeros(config.n_patches + 1, config.n_embd))
        self.ln_pre = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_used))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, P, D). Normalises here, so nobody else can forget to or do it twice. N may be 0."""
        assert images.dtype == torch.uint8, f"the tower normalises raw uint8 pixels itself, got {images.dtype}"
        x = self.patch(normalize(images).to(self.patch.weight.dtype))              # (N, D, H / 14, W / 14)
        x = x.flatten(2).transpose(1, 2)                                           # (N, P, D), patches row by row
        x = torch.cat([self.cls.expand(x.size(0), 1, -1), x], dim=1) + self.pos    # (N, S, D)
        x = self.ln_pre(x)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return x[:, 1:].clone()     # (N, P, D), without the class token; a copy, since FSDP hooks into what is returned
