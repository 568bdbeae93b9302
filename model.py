"""Phi-2, the projector, and how images and text become one sequence. Together with vision.py, this is the whole model.

Read it from the top: packed sequences, the decoder (Phi), the loss, how an image's patches join the token embeddings
(LLaVAPhi.embed), and generation in its simplest form. The KV cache that makes generation fast is in lib/generate.py,
LoRA in lib/lora.py, quantized weights in lib/quant.py.

Follows Hugging Face's modeling_phi.py (parallel block, partial rotary embedding) and LLaVA's llava_arch.py (where the
patches go). Sequences are packed: the B samples of a micro-batch form one row of T tokens, without padding.

Shapes: B sequences, T tokens in all, C width, nh heads, hs head size, V vocabulary size;
        N images, P patches per image, D their width; M supervised positions.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from vision import SIGLIP_SO400M_384, VisionConfig, VisionTower

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:                 # before torch 2.10: Packed.attend falls back to its loop
    varlen_attn = None


@dataclass(frozen=True)
class PhiConfig:                    # defaults: microsoft/phi-2
    vocab_size: int = 51200         # rows of the embedding; the tokenizer only uses the first 50295
    block_size: int = 2048          # positions
    n_layer: int = 32
    n_head: int = 32
    n_embd: int = 2560
    n_inner: int = 10240
    rotary_dim: int = 32            # the first 32 of a head's 80 channels rotate, the rest pass through
    rope_base: float = 10000.0
    eps: float = 1e-5
    dropout: float = 0.1            # on both branches of a block, in training


@dataclass(frozen=True)
class LLaVAConfig:                  # defaults: LLaVA-Phi
    llm: PhiConfig = field(default_factory=PhiConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_mode: str = "pad"         # how images were made square in training: "pad", "crop" (the center) or "squash"


MIPHA_CONFIG = LLaVAConfig(vision=SIGLIP_SO400M_384)

# ---------------------------------------------------------------------------------------------------
# Packed sequences


class Packed:
    """B sequences packed into one row of T tokens: their positions, and causal attention within each of them.

    Built once per forward and shared by all layers. The decoder only uses `pos` and `attend`; lib/generate.py has
    three more classes with this interface, for tokens whose past is in a KV cache.

    For example, lengths [3, 2] give pos [0 1 2 0 1] and cu_seqlens [0 3 5].
    max_seqlen: an upper bound on the lengths. It is the model's block_size rather than this batch's longest sequence,
    because it only sizes a CUDA kernel's grid, and torch.compile would recompile whenever it changed.
    """

    def __init__(self, lengths: Sequence[int] | Tensor, device: torch.device, max_seqlen: int = PhiConfig.block_size):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)                      # (B,) on the CPU
        self.lengths = lengths.tolist()
        self.max_seqlen = max_seqlen
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))                              # (B + 1,)
        starts = cu_seqlens[:-1].repeat_interleave(lengths)                        # (T,)
        # Everything is computed on the CPU and copied once, so the host never waits for the device.
        self.pos = to_device_async(torch.arange(len(starts)) - starts, device)     # (T,) restarts with each sequence
        self.cu_seqlens = to_device_async(cu_seqlens.int(), device)
        # Looked up here rather than in `attend`, because torch.compile cannot trace the call.
        self.on_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q, k, v (T, nh, hs) -> (T, nh, hs). `layer` is unused here: it selects a layer of a KV cache."""
        if self.has_varlen(q):
            return varlen_attention(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen)
        # Adjacent sequences of equal length share a call: with many short ones, call overhead would dominate.
        runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        sizes = [length * count for length, count in runs]
        out = [q[:0]]               # so that zero sequences give zero rows, which still have a gradient
        for (length, _), q_run, k_run, v_run in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes)):
            # (b * length, nh, hs) -> (b, nh, length, hs)
            q_run, k_run, v_run = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_run, k_run, v_run))
            y = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True)
            out.append(y.transpose(1, 2).flatten(0, 1))                            # (b * length, nh, hs)
        return torch.cat(out)                                                      # (T, nh, hs)

    def has_varlen(self, q: Tensor) -> bool:
        """Can variable-length FlashAttention take q (T, nh, hs)? If not, a loop over the sequences computes the same.

        It needs 16-bit floats, a head size that is a multiple of 8, and Ampere or newer. It rejects an empty batch.
        """
        fits = q.dtype != torch.float32 and q.size(-1) % 8 == 0 and len(q) > 0
        return fits and self.on_ampere and varlen_attn is not None


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to the device without waiting for it.

    Only a copy from pinned memory is asynchronous; for other memory the driver may first wait for all queued work.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                     max_seqlen: int) -> Tensor:
    """FlashAttention over packed sequences. If a sequence has fewer queries than keys, they are its last positions."""
    causal = (-1, 0)                # a query's window, left and right: all of the past, none of the future
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen, window_size=causal)

# ---------------------------------------------------------------------------------------------------
# Phi-2


def rope(pos: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Positions (T,) -> cos, sin (T, 1, 1, dim / 2) in fp32.

    Computed in every forward: a buffer would be cast to bf16 with the model, or left behind on the meta device.
    """
    exponent = -torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim
    freq = base ** exponent                                                        # (dim / 2,)
    angle = pos[:, None, None, None].float() * freq                                # (T, 1, 1, dim / 2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """Rotate the first dim channels of q and k (T, 2, nh, hs) by their position.

    Phi pairs channel i with channel i + dim / 2 ("half-split"; GPT-J pairs neighbors).
    """
    a, b, rest = x.split([dim // 2, dim // 2, x.size(-1) - dim], dim=-1)
    a = a.float()                   # rotated in fp32: rounding to bf16 would blur distant positions
    b = b.float()
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat([rotated_a.type_as(x), rotated_b.type_as(x), rest], dim=-1)   # (T, 2, nh, hs)


class Attention(nn.Module):
    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.rotary_dim = config.rotary_dim     # not taken from cos.shape, which torch.compile treats as dynamic
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seqs: Packed) -> Tensor:
        T, C = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_head, C // self.n_head)                # (T, 3, nh, hs)
        qk, v = qkv.split([2, 1], dim=1)
        q, k = apply_rope(qk, cos, sin, self.rotary_dim).unbind(1)                 # (T, nh, hs) each
        y = seqs.attend(q, k, v.squeeze(1), self.layer)                            # (T, nh, hs)
        return self.proj(y.reshape(T, C))                                          # (T, C)


class MLP(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.n_inner)
        self.proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)                                                             # (T, n_inner)
        x = F.gelu(x, approximate="tanh")                                          # Hugging Face's "gelu_new"
        return self.proj(x)                                                        # (T, C)


class Block(nn.Module):
    """Phi's parallel block: attention and MLP read the same LayerNorm, and both are added to x at once."""

    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seqs: Packed) -> Tensor:
        h = self.ln(x)
        attn = F.dropout(self.attn(h, cos, sin, seqs), self.dropout, self.training)
        mlp = F.dropout(self.mlp(h), self.dropout, self.training)
        return x + attn + mlp                                                      # (T, C)


class Phi(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.recompute = "none"     # activation checkpointing: none, selective or full
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)                 # not tied to wte, and with a bias

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype. Linears and the embedding may be quantized, LayerNorms never are."""
        return self.ln_f.weight.dtype

    def forward(self, x: Tensor, seqs: Packed) -> Tensor:
        """Embeddings (T, C) -> hidden states (T, C), ready for lm_head.

        The head is not applied here: training needs it at supervised positions only, generation at the last ones.
        """
        cos, sin = rope(seqs.pos, self.config.rotary_dim, self.config.rope_base)
        context = noop_context_fn
        if self.recompute == "selective":
            context = partial(create_selective_checkpoint_contexts, keep_products)
        for block in self.h:
            if self.training and self.recompute != "none":
                x = checkpoint(block, x, cos, sin, seqs, use_reentrant=False, context_fn=context)
            else:
                x = block(x, cos, sin, seqs)                                       # (T, C)
        return self.ln_f(x)


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective activation checkpointing: keep attention and the wide matrix products (qkv, fc), recompute the rest.

    That halves the memory for a twelfth of a forward pass; full checkpointing costs two thirds of one.
    """
    is_wide_product = False
    if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
        n_in, n_out = args[-1].shape
        is_wide_product = n_out > n_in
    is_attention = "attention" in str(op) or "attn" in str(op)      # each attention kernel has an operator of its own
    if is_wide_product or is_attention:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def cross_entropy_sum(h: Tensor, head: nn.Module, targets: Tensor, chunk: int = 4096) -> Tensor:
    """Sum of the losses of M tokens, an fp32 scalar. h (M, C), targets (M,).

    Each token has 51,200 logits, so only those of `chunk` tokens exist at a time; the backward pass recomputes them.
    """
    def loss(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), targets, reduction="sum")
    if targets.numel() <= chunk:
        return loss(h, targets)
    chunks = zip(h.split(chunk), targets.split(chunk))
    return torch.stack([checkpoint(loss, *each, use_reentrant=False) for each in chunks]).sum()

# ---------------------------------------------------------------------------------------------------
# LLaVA


class Projector(nn.Module):         # LLaVA's mlp2x_gelu: from the tower's width to the language model's
    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.fc = nn.Linear(d_in, d_out)
        self.proj = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))                                       # (N, P, D) -> (N, P, C)


class LLaVAPhi(nn.Module):
    """The tower, the projector and the decoder; without the first two (tower=False), a language model."""

    def __init__(self, config: LLaVAConfig, tower: bool = True):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision) if tower else None
        self.projector = Projector(config.vision.n_embd, config.llm.n_embd) if tower else None
        self.llm = Phi(config.llm)

    @property
    def device(self) -> torch.device:
        return self.llm.wte.weight.device

    def embed(self, ids: Tensor, images: Tensor, image_positions: Tensor) -> Tensor:
        """The decoder's input: token embeddings, with projected patches at the image positions -> (T, C).

        ids (T,): any valid id at image positions; images (N, 3, H, W) uint8; image_positions (N * P,): where the
        patches go, in order. N = 0 still runs the tower on an empty batch: under FSDP every process must take part,
        and every parameter needs a gradient.
        """
        x = self.llm.wte(ids).to(self.llm.dtype)                                   # (T, C)
        if self.vision is None:
            return x
        n_patches = self.config.vision.n_patches
        assert image_positions.numel() == images.size(0) * n_patches, \
            f"{image_positions.numel()} image positions for {images.size(0)} images of {n_patches} patches"
        patches = self.projector(self.vision(images))                              # (N, P, C)
        patches = patches.flatten(0, 1).type_as(x)                                 # (N * P, C)
        return x.index_copy(0, image_positions, patches)                           # (T, C)

    def forward(self, ids: Tensor, lengths: Sequence[int] | Tensor, images: Tensor, image_positions: Tensor,
                loss_positions: Tensor, targets: Tensor, split: Sequence[int] | None = None) -> Tensor:
        """Sums of the losses over the M supervised tokens, fp32: one for each of the runs of tokens whose lengths
        `split` has, else a scalar for all of them. The caller divides by the global count.

        ids (T,) packed, 0 at image positions; lengths (B,) of the sequences, on the CPU; images (N, 3, H, W) uint8;
        image_positions (N * P,); loss_positions (M,) whose next token is supervised; targets (M,): those next tokens.
        """
        x = self.embed(ids, images, image_positions)                               # (T, C)
        h = self.llm(x, Packed(lengths, ids.device, self.config.llm.block_size))   # (T, C)
        if split is None:
            return cross_entropy_sum(h[loss_positions], self.llm.lm_head, targets)
        runs = zip(h[loss_positions].split(split), targets.split(split))
        return torch.stack([cross_entropy_sum(h_of_run, self.llm.lm_head, run) for h_of_run, run in runs])

    @torch.inference_mode()
    def generate(self, ids: Tensor, images: Tensor, image_positions: Tensor, max_new_tokens: int,
                 eos_id: int) -> list[int]:
        """Greedy decoding in its simplest form: without a KV cache, each new token runs the whole sequence again.

        This is the reference to read, and the oracle that the fast version in lib/generate.py is tested against.
        """
        answer = []
        while len(answer) < max_new_tokens and len(ids) < self.config.llm.block_size:
            x = self.embed(ids, images, image_positions)                           # (T, C)
            h = self.llm(x, Packed([len(ids)], self.device, self.config.llm.block_size))
            token = self.llm.lm_head(h[-1]).argmax()
            if token == eos_id:
                break
            answer.append(int(token))
            ids = torch.cat([ids, token[None]])                                    # (T + 1,)
        return answer

# ---------------------------------------------------------------------------------------------------
# Initialization, and which parts are trained


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """As Hugging Face initializes Phi, and LLaVA-Phi its projector: normal, std 0.02; biases 0; LayerNorms 1 and 0."""
    for name, parameter in module.named_parameters():
        is_layer_norm = ".ln" in f".{name}"
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif is_layer_norm and name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)


def trained_parts(model: LLaVAPhi) -> list[str]:
    """Names of the parts that are trained as a whole. One with LoRA adapters on frozen weights is not among them."""
    return [name for name, part in model.named_children() if next(part.parameters()).requires_grad]
