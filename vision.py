"""The whole vision tower: uint8 pixels in, patch features out.

One set of modules serves both supported towers, CLIP ViT-L/14-336 (LLaVA-Phi) and SigLIP-so400m/14-384 (Mipha). They
are the same transformer; the few differences are fields of VisionConfig.

To add a third tower, put its sizes here, its tensor names into lib/layouts.py, its config.json into lib/configs.py and
lib/save_weights.py, the way to recognize it into lib/folders.py, and its recipe into lib/recipes.py; `grep -i siglip`
finds the rest.

Shapes: N images, P patches, S positions (P, plus one for a class token), D width, nh heads, hs head size.
Follows https://github.com/openai/CLIP/blob/main/clip/model.py and transformers' modeling_siglip.py.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Disable TF32 in cuDNN, where it is on by default, so that fp32 convolutions keep full precision. For matmuls it is off
# by default, and bf16 is not affected.
torch.backends.cudnn.allow_tf32 = False

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # RGB in 0..1, over CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:                 # defaults: openai/clip-vit-large-patch14-336
    image_size: int = 336           # pixels per side
    patch_size: int = 14
    n_layer: int = 24               # blocks of the published tower, of which n_used are built
    n_head: int = 16
    n_embd: int = 1024
    n_inner: int = 4096
    eps: float = 1e-5
    feature_layer: int = -2         # the hidden state to read, counted from the end as in LLaVA
    # Where CLIP and SigLIP differ, besides the sizes above:
    class_token: bool = True        # a learned position in front of the patches; SigLIP has none
    pre_norm: bool = True           # a LayerNorm between the embeddings and the first block; SigLIP has none
    patch_bias: bool = False        # a bias in the patch convolution; SigLIP has one
    gelu: str = "quick"             # "quick": x * sigmoid(1.702 x), CLIP's; "tanh": the tanh approximation, SigLIP's
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def n_patches(self) -> int:
        """576 for CLIP-336; 729 for SigLIP-384, which ignores the last 6 rows and columns: they fill no patch."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_positions(self) -> int:
        """Sequence length in the blocks: the patches, plus the class token if there is one."""
        return self.n_patches + int(self.class_token)

    @property
    def n_used(self) -> int:
        """Number of blocks to build: 23 of CLIP's 24. Those after the hidden state that is read would be useless."""
        if self.feature_layer < 0:
            return self.n_layer + 1 + self.feature_layer
        return self.feature_layer


CLIP_L_336 = VisionConfig()
SIGLIP_SO400M_384 = VisionConfig(
    image_size=384, n_layer=27, n_embd=1152, n_inner=4304, eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, gelu="tanh", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def normalize(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """uint8 (N, 3, H, W) -> fp32: to 0..1, minus the mean, over the standard deviation.

    The operations are those of CLIPImageProcessor and SiglipImageProcessor in the same order, so the result matches
    theirs bit for bit.
    """
    # Filled on the device itself. As buffers, they would be cast to bf16 with the model. Copied from the CPU, they
    # would make the host wait for the GPU once per micro-batch, since the source is not pinned.
    mean = torch.stack([torch.full((1, 1), value, device=images.device) for value in mean])        # (3, 1, 1)
    std = torch.stack([torch.full((1, 1), value, device=images.device) for value in std])          # (3, 1, 1)
    return (images.float() / 255 - mean) / std                                     # (N, 3, H, W)


class Attention(nn.Module):         # bidirectional: no mask
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
        return self.proj(y.transpose(1, 2).reshape(N, S, D))                       # (N, S, D)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gelu = config.gelu
        self.fc = nn.Linear(config.n_embd, config.n_inner)
        self.proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)                                                             # (N, S, n_inner)
        # Each tower needs the approximation it was trained with; the other one shifts the features measurably.
        x = x * torch.sigmoid(1.702 * x) if self.gelu == "quick" else F.gelu(x, approximate="tanh")
        return self.proj(x)                                                        # (N, S, D)


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
        self.recompute = False      # activation checkpointing: keep only each block's input
        self.patch = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.zeros(config.n_embd)) if config.class_token else None
        self.pos = nn.Parameter(torch.zeros(config.n_positions, config.n_embd))
        self.ln_pre = nn.LayerNorm(config.n_embd, eps=config.eps) if config.pre_norm else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_used))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, P, D). N may be 0.

        Pixels are normalized here, because mean and standard deviation belong to the weights: no caller can forget to,
        or do it twice.
        """
        assert images.dtype == torch.uint8, f"the tower normalizes raw uint8 pixels itself, got {images.dtype}"
        pixels = normalize(images, self.config.mean, self.config.std)
        x = self.patch(pixels.to(self.patch.weight.dtype))                         # (N, D, H / 14, W / 14)
        x = x.flatten(2).transpose(1, 2)                                           # (N, P, D), patches row by row
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.size(0), 1, -1), x], dim=1)           # (N, S, D)
        x = x + self.pos
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        for block in self.h:
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        if self.cls is not None:
            x = x[:, 1:]                                                           # (N, P, D), without the class token
        return x.clone()            # not a view, because FSDP registers hooks on the output
