"""Phi-2, the projector, and the LLaVA glue between picture and text. All of the model is here and in vision.py.

Read it from the top: the decoder (Phi), then how a picture becomes rows of the embedding (LLaVAPhi.embed), the loss,
and generation. The key-value cache and what is done to a finished model (LoRA, packed weights, 8 and 4 bits) come last.

Follows Hugging Face's modeling_phi.py (parallel block, partial rotary embedding) and LLaVA's llava_arch.py (what is
spliced where). Sequences are packed: a micro-batch of B samples is one row of T tokens, without padding.

Shapes: B sequences, T tokens in all, C width, nh heads, hs head size, V vocabulary rows, S cache slots;
        N images, P patches per image, D their width; M supervised positions.
"""
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from vision import SIGLIP_SO400M_384, VisionConfig, VisionTower

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:                 # before torch 2.10: attention then takes the loop, see `attend`
    varlen_attn = None

# Where a patch goes in a list of token ids. No tokenizer produces it, and it is never looked up in the embedding.
# data.py, which knows nothing of models, has its own copy; a test holds the two together.
IMAGE_ID = -200


@dataclass(frozen=True)
class PhiConfig:                    # defaults: microsoft/phi-2
    vocab_size: int = 51200         # rows of the table; the tokenizer only uses the first 50295
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
    image_mode: str = "pad"         # how this model saw its pictures: "pad" to a square, "crop" the centre, or "squash"


MIPHA_CONFIG = LLaVAConfig(vision=SIGLIP_SO400M_384)

# ---------------------------------------------------------------------------------------------------
# Phi-2


def rope(pos: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Positions (T,) -> cos, sin (T, 1, 1, dim / 2) in fp32.

    Made anew in every forward: a buffer would be cast to bf16 with the model, or left behind on the meta device.
    """
    exponent = -torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim
    freq = base ** exponent                                                        # (dim / 2,)
    angle = pos[:, None].float() * freq                                            # (T, dim / 2)
    angle = angle[:, None, None]                                                   # (T, 1, 1, dim / 2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """Rotate the first dim channels of q and k (T, 2, nh, hs) by their position.

    Phi pairs channel i with channel i + dim / 2 of them ("half-split"; GPT-J pairs neighbours).
    """
    a, b, rest = x.split([dim // 2, dim // 2, x.size(-1) - dim], dim=-1)
    a = a.float()                   # in bf16 the sums below would lose the position of far tokens
    b = b.float()
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat([rotated_a.type_as(x), rotated_b.type_as(x), rest], dim=-1)   # (T, 2, nh, hs)


class Layout:
    """Where the sequences of a packed row lie: made once per forward, read by every layer.

    lengths (B,) on the CPU: new tokens per sequence. past: how many tokens of each are in the cache already.
    For example lengths [3, 2] and no past: pos [0 1 2 0 1], starts [0 3 5], last [2 4].
    max_length: no sequence is longer. It is the model's block_size and not the longest of this batch: it only sizes the
    grid of a CUDA kernel, and a number that changes would make torch.compile compile again.
    """

    def __init__(self, lengths: Tensor, device: torch.device, past: list[int] | None = None,
                 max_length: int = PhiConfig.block_size):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)       # also a list of ints, also of none
        self.lengths = lengths.tolist()
        self.past = past or [0] * len(self.lengths)
        self.max_length = max_length
        starts = F.pad(lengths.cumsum(0), (1, 0))                                  # (B + 1,)
        offset = torch.tensor(self.past, dtype=torch.int64) - starts[:-1]          # (B,)
        pos = torch.arange(int(starts[-1])) + offset.repeat_interleave(lengths)    # (T,) restarts with each sequence
        # Everything is computed on the CPU and sent once: the host never waits for the device.
        self.pos = send(pos, device)
        self.starts = send(starts.int(), device)                                   # (B + 1,)
        self.last = send(starts[1:] - 1, device)                                   # (B,) rows of the last tokens
        keys = lengths + torch.tensor(self.past, dtype=torch.int64)                # (B,) the past's and the new ones
        self.key_starts = send(F.pad(keys.cumsum(0), (1, 0)).int(), device)        # (B + 1,)
        self.sequence: Tensor | None = None         # (T,) which sequence a token belongs to; only a cache asks for it
        if past is not None:
            self.sequence = send(torch.arange(len(lengths)).repeat_interleave(lengths), device)
        # Asked here and not in `attend`, which torch.compile could not trace past the question.
        self.on_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to the device without waiting for it.

    Pinned memory is what makes a copy asynchronous: for other memory the driver may first wait for all queued work.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def has_varlen(q: Tensor, layout: Layout) -> bool:
    """Whether flash attention over ragged sequences can take q (T, nh, hs); if not, a loop over them does the same.

    The kernels are for 16-bit floats and for heads of a multiple of 8 channels, on GPUs since Ampere. They refuse to
    compute nothing at all, which is what a process without a sample asks for.
    """
    if varlen_attn is None or not layout.on_ampere:
        return False
    return q.dtype != torch.float32 and q.size(-1) % 8 == 0 and len(q) > 0


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each sequence of a packed row. q, k, v (T, nh, hs) -> (T, nh, hs)."""
    if has_varlen(q, layout):
        return ragged_attention(q, k, v, layout)
    # Neighbours of one length share a call: the cost of a call is felt when many short sequences are packed.
    runs = [(length, len(list(run))) for length, run in groupby(layout.lengths)]
    sizes = [length * count for length, count in runs]
    out = [q[:0]]                   # so that no sequence at all is a row of no tokens, with gradients
    for (length, _), q_run, k_run, v_run in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes)):
        y = F.scaled_dot_product_attention(as_batch(q_run, length), as_batch(k_run, length), as_batch(v_run, length),
                                           is_causal=True)                         # (b, nh, length, hs)
        out.append(y.transpose(1, 2).flatten(0, 1))                                # (b * length, nh, hs)
    return torch.cat(out)                                                          # (T, nh, hs)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Flash attention. k, v hold each sequence's past and new tokens, q only the new ones, which stand at the end."""
    longest = layout.max_length
    backwards = (-1, 0)             # how far a token looks: any distance back, and not ahead
    return varlen_attn(q, k, v, layout.starts, layout.key_starts, longest, longest, window_size=backwards)


def as_batch(x: Tensor, length: int) -> Tensor:
    """b packed sequences of one length (b * length, nh, hs) -> (b, nh, length, hs)."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.n_head = config.n_head
        self.rotary_dim = config.rotary_dim     # not read off cos's shape, where torch.compile takes it for a variable
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: "Layout | DecodeLayout",
                cache: "LayerCache | None") -> Tensor:
        T, C = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_head, C // self.n_head)                # (T, 3, nh, hs)
        qk, v = qkv.split([2, 1], dim=1)
        q, k = apply_rope(qk, cos, sin, self.rotary_dim).unbind(1)                 # (T, nh, hs) each
        v = v.squeeze(1)                                                           # (T, nh, hs)
        if cache is None:
            y = attend(q, k, v, layout)
        else:
            y = attend_with_cache(q, k, v, cache, layout)
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
    """Phi's parallel block: one LayerNorm feeds attention and MLP, and both are added to x at once."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.dropout = config.dropout
        self.ln = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: "Layout | DecodeLayout",
                cache: "LayerCache | None") -> Tensor:
        h = self.ln(x)
        attn = F.dropout(self.attn(h, cos, sin, layout, cache), self.dropout, self.training)
        mlp = F.dropout(self.mlp(h), self.dropout, self.training)
        return x + attn + mlp                                                      # (T, C)


class Phi(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.recompute = "none"     # what the backward pass computes again: none, selective or full
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)                 # not tied to wte, and with a bias

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in. Its Linears and its embedding may be quantised."""
        return self.ln_f.weight.dtype

    def forward(self, x: Tensor, layout: "Layout | DecodeLayout", cache: "KVCache | None" = None) -> Tensor:
        """Embeddings (T, C) -> hidden states (T, C), ready for lm_head.

        The head is not applied here: training needs it at supervised positions alone, generation at the last ones.
        """
        cos, sin = rope(layout.pos, self.config.rotary_dim, self.config.rope_base)
        context = noop_context_fn
        if self.recompute == "selective":
            context = partial(create_selective_checkpoint_contexts, keep_products)
        layers = cache.layers if cache else [None] * len(self.h)
        for block, layer_cache in zip(self.h, layers):
            if self.training and self.recompute != "none":
                x = checkpoint(block, x, cos, sin, layout, layer_cache, use_reentrant=False, context_fn=context)
            else:
                x = block(x, cos, sin, layout, layer_cache)                        # (T, C)
        return self.ln_f(x)


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective recomputation: keep the wide matrix products (qkv, fc) and attention, redo what is cheap or narrow.

    Half of the memory, for a twelfth of a forward pass more; full recomputation costs two thirds of one.
    """
    is_wide_product = False
    if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
        n_in, n_out = args[-1].shape
        is_wide_product = n_out > n_in
    is_attention = "attention" in str(op) or "attn" in str(op)      # each kernel's operator has a name of its own
    if is_wide_product or is_attention:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def cross_entropy_sum(h: Tensor, head: nn.Module, targets: Tensor, chunk: int = 4096) -> Tensor:
    """Sum of the losses of M tokens, an fp32 scalar. h (M, C), targets (M,).

    Logits take 51,200 numbers a token, so those of at most `chunk` rows exist at a time; the backward pass makes each
    chunk's again.
    """
    def loss(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), targets, reduction="sum")
    if targets.numel() <= chunk:
        return loss(h, targets)
    losses = []
    for h_chunk, targets_chunk in zip(h.split(chunk), targets.split(chunk)):
        losses.append(checkpoint(loss, h_chunk, targets_chunk, use_reentrant=False))
    return torch.stack(losses).sum()

# ---------------------------------------------------------------------------------------------------
# LLaVA


class Projector(nn.Module):         # LLaVA's mlp2x_gelu: patch features into the language model's width
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

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        """The decoder's input: token embeddings, with each picture's patches written over its positions -> (T, C).

        ids (T,): any valid id at image positions; images (N, 3, H, W) uint8; slots (N * P,): which rows the patches
        take, in order. N = 0 runs the tower on nothing: under FSDP every process must take part, and every gradient
        must exist.
        """
        n_patches = self.config.vision.n_patches
        assert slots.numel() == images.size(0) * n_patches, \
            f"{slots.numel()} image positions for {images.size(0)} images of {n_patches} patches"
        x = self.llm.wte(ids).to(self.llm.dtype)                                   # (T, C)
        if self.vision is None:
            return x
        patches = self.projector(self.vision(images))                              # (N, P, C)
        patches = patches.flatten(0, 1).type_as(x)                                 # (N * P, C)
        return x.index_copy(0, slots, patches)                                     # (T, C)

    def forward(self, ids: Tensor, lengths: Tensor, images: Tensor, slots: Tensor, rows: Tensor,
                targets: Tensor) -> Tensor:
        """Sum of the losses over the M supervised tokens, an fp32 scalar; the caller divides by its global count.

        ids (T,) packed, 0 at image positions; lengths (B,) on the CPU; images (N, 3, H, W) uint8; slots (N * P,);
        rows (M,): positions whose next token is supervised; targets (M,): those tokens.
        """
        x = self.embed(ids, images, slots)                                         # (T, C)
        layout = Layout(lengths, ids.device, max_length=self.config.llm.block_size)
        h = self.llm(x, layout)                                                    # (T, C)
        return cross_entropy_sum(h[rows], self.llm.lm_head, targets)

    # ---- generation: token ids in, token ids out. Prompts hold IMAGE_ID at every patch position.

    def new_cache(self, batch: int, slots: int) -> "KVCache":
        return KVCache(self.config.llm, batch, slots, self.device, self.llm.dtype)

    def prefill(self, prompts: list[list[int]], images: list[Tensor], cache: "KVCache") -> Tensor:
        """Run what the cache lacks of each prompt -> the next token's logits (B, V), fp32.

        images[i] (N_i, 3, H, W) uint8 belong to prompts[i]. A GPU takes all prompts at once. On a CPU one or two
        pictures at a time are faster: what lies between two layers then stays in the processor's cache.
        """
        most = CPU_PREFILL if self.device.type == "cpu" else None
        logits = []
        for rows in rows_together(prompts, cache.lengths, most):
            part = cache.part(rows)
            logits.append(self.prefill_together(prompts[rows], images[rows], part))
        cache.fill([len(prompt) for prompt in prompts])
        return torch.cat(logits)                                                   # (B, V)

    def prefill_together(self, prompts: list[list[int]], images: list[Tensor], cache: "KVCache") -> Tensor:
        """`prefill` of prompts that are packed into one row of tokens."""
        new_ids = []
        new_images = []
        for prompt, pictures, past in zip(prompts, images, cache.lengths):
            n_cached = prompt[:past].count(IMAGE_ID) // self.config.vision.n_patches
            new_ids += prompt[past:]
            new_images.append(pictures[n_cached:])
        ids = torch.tensor(new_ids)                                                # (T,)
        slots = (ids == IMAGE_ID).nonzero().flatten()                              # (N * P,)
        lengths = torch.tensor([len(prompt) for prompt in prompts])                # (B,)
        layout = Layout(lengths - torch.tensor(cache.lengths), self.device, cache.lengths, self.config.llm.block_size)
        pixels = torch.cat(new_images).to(self.device)                             # (N, 3, H, W)
        x = self.embed(ids.clamp_min(0).to(self.device), pixels, slots.to(self.device))
        h = self.llm(x, layout, cache)                                             # (T, C)
        return self.llm.lm_head(h[layout.last]).float()                            # (B, V)

    def step(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """One more token (B,) for every sequence -> next-token logits (B, V), fp32. The cache is not advanced."""
        x = self.llm.wte(ids).to(self.llm.dtype)                                   # (B, C)
        h = self.llm(x, DecodeLayout(cache), cache)                                # (B, C)
        return self.llm.lm_head(h).float()

    def decode(self, ids: Tensor, cache: "KVCache", capture: bool = False) -> Tensor:
        """A step after which the cache counts the new token. capture: record the step as a CUDA graph and replay it."""
        if capture:
            if cache.graph is None or cache.graph.used != cache.used:
                cache.graph = Graph(self, ids, cache)
            logits = cache.graph(ids)
        else:
            logits = self.step(ids, cache)
        cache.advance()
        return logits                                                              # (B, V)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], images: list[Tensor], *, max_new_tokens: int, eos_id: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
                 memory: "list[Prefix] | None" = None, remember_all: bool = False,
                 fast: bool = False) -> Iterator[list[int | None]]:
        """Yield one column per step: each prompt's next id, or None where that answer has ended (eos_id or block_size).

        memory: a list owned by the caller that carries the last prompt's keys and values from call to call, so the
        next question about the same picture (the same tensor), or the next turn, starts where this one ended.
        remember_all: keep every prompt's instead, for a batch of conversations that all go on.
        fast: for long answers on CUDA, steps are captured as a graph and queued before the host reads the last token.
        Raises ValueError when a prompt leaves no room for an answer.
        """
        limit = self.config.llm.block_size
        longest = max(len(prompt) for prompt in prompts)
        if longest >= limit:
            raise ValueError(f"the prompt takes {longest} of the model's {limit} positions, none is left for an answer")
        answers = [Answer(prompt, room=limit - len(prompt)) for prompt in prompts]
        cache = self.new_cache(len(prompts), min(longest + max_new_tokens, limit))
        cache.restore(known_prefixes(self, prompts, images, memory or []))
        logits = self.prefill(prompts, images, cache)
        try:
            for n in range(max_new_tokens):
                is_last = n + 1 == max_new_tokens
                ids = pick(logits, temperature, top_k, top_p, generator)           # (B,)
                wait_for_ids = read_later(ids)
                # fast: the next step is queued before this one's ids are read, so the GPU never idles. The price is
                # one step for nothing at the end.
                if fast and not is_last:
                    logits = self.decode(ids, cache, capture=ids.is_cuda)
                column = [answer.add(token, eos_id) for answer, token in zip(answers, wait_for_ids())]
                if any(token is not None for token in column):
                    yield column
                if is_last or all(answer.ended for answer in answers):
                    return
                if not fast:
                    logits = self.decode(ids, cache)
        finally:                    # also when the caller stops listening
            if memory is not None:
                memory.clear()
                for row in range(0 if remember_all else len(prompts) - 1, len(prompts)):
                    prefix = cache.prefix(row, answers[row].prompt + answers[row].ids, images[row])
                    if len(prompts) > 1:
                        prefix = prefix._replace(k=prefix.k.clone(), v=prefix.v.clone())   # keep one row, not all
                    memory.append(prefix)

# ---------------------------------------------------------------------------------------------------
# What generation needs: the state of an answer, the choice of a token, the cache


@dataclass
class Answer:
    """One prompt's answer while it is written."""
    prompt: list[int]
    room: int                       # how many tokens fit behind the prompt
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int, eos_id: int) -> int | None:
        """Take the next token -> the same, or None if the answer has ended, with this token or before."""
        if token == eos_id:
            self.ended = True
        if self.ended:
            return None
        self.ids.append(token)
        self.ended = len(self.ids) == self.room
        return token


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) fp32 -> ids (B,). Temperature 0: the best; else from the top_k best (0: all) within top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)      # (B, V)
    if top_k:
        logits = logits[:, :top_k]
    probs = logits.softmax(-1)                                                     # (B, top_k or V)
    better = probs.cumsum(-1) - probs                       # how much probability stands before each token
    probs = probs.masked_fill(better >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)                      # (B, 1)
    return order.gather(1, choice).squeeze(1)                                      # (B,)


def read_later(ids: Tensor) -> Callable[[], list[int]]:
    """Start copying ids to the host -> a function that waits for them, and not for what was queued in between."""
    if not ids.is_cuda:
        return ids.tolist
    host = torch.empty_like(ids, device="cpu", pin_memory=True)
    host.copy_(ids, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()
    return wait


def whole_slots(slots: int) -> int:
    """What a cache for so many tokens really has. With other widths, masks would be copied in every layer."""
    return -(-slots // 16) * 16


class KVCache:
    """Keys and values of every layer for B sequences of at most S tokens. Preallocated, an argument, knows no model."""

    def __init__(self, config: PhiConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype):
        slots = whole_slots(slots)
        shape = (config.n_layer, batch, config.n_head, slots, config.n_embd // config.n_head)
        key_dtype = torch.float32 if device.type == "cpu" else dtype               # see attend_from_one
        self.k = torch.zeros(shape, device=device, dtype=key_dtype)                # (n_layer, B, nh, S, hs)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch                          # tokens held per sequence, for the host
        self.pos = torch.zeros(batch, dtype=torch.int64, device=device)            # (B,) the same, where the model is
        self.bucket = 256 if self.k.is_cuda else 1          # attention reads multiples of it: graphs need fixed shapes
        self.graph: Graph | None = None

    @property
    def layers(self) -> "list[LayerCache]":
        return [LayerCache(k, v) for k, v in zip(self.k, self.v)]

    @property
    def used(self) -> int:
        """How many slots of each row the next step reads: the longest sequence and the new token, in whole buckets."""
        needed = max(self.lengths) + 1
        buckets = (needed + self.bucket - 1) // self.bucket
        return min(buckets * self.bucket, self.k.size(3))

    def fill(self, lengths: list[int]) -> None:
        """After a prefill: each sequence now holds so many tokens."""
        self.lengths = lengths
        self.pos = torch.tensor(lengths, device=self.pos.device)

    def part(self, rows: slice) -> "KVCache":
        """The cache of some of the sequences: the same memory, for a prefill that fills them alone."""
        part = copy(self)
        part.k = self.k[:, rows]
        part.v = self.v[:, rows]
        part.lengths = self.lengths[rows]
        part.pos = self.pos[rows]
        return part

    def advance(self) -> None:
        """After a step. The last slot is never needed: sequences that ended idle there while others go on."""
        last = self.k.size(3) - 1
        self.lengths = [min(n + 1, last) for n in self.lengths]
        self.pos.add_(1).clamp_(max=last)

    def prefix(self, row: int, ids: list[int], images: Tensor) -> "Prefix":
        """What the row holds of `ids`: a view, which keeps the whole cache in memory."""
        ids = ids[:self.lengths[row]]
        return Prefix(ids, images, self.k[:, row, :, :len(ids)], self.v[:, row, :, :len(ids)])

    def restore(self, prefixes: "list[Prefix | None]") -> None:
        """Begin each row with what is known of it."""
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                n = len(prefix.ids)
                self.lengths[row] = n
                self.k[:, row, :, :n] = prefix.k
                self.v[:, row, :, :n] = prefix.v


class LayerCache(NamedTuple):       # what one layer has of a KVCache: all that a block gets to see of it
    k: Tensor                       # (B, nh, S, hs)
    v: Tensor


def attend_with_cache(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, layout: "Layout | DecodeLayout") -> Tensor:
    """Store the new k, v (T, nh, hs), then let q (T, nh, hs) see each sequence's past and itself -> (T, nh, hs)."""
    cache.k[layout.sequence, :, layout.pos] = k.type_as(cache.k)
    cache.v[layout.sequence, :, layout.pos] = v
    if isinstance(layout, DecodeLayout):
        return attend_from_one(q, cache, layout)                                   # (T, nh, hs), T = B
    if not any(layout.past):
        return attend(q, k, v, layout)
    totals = [past + n for past, n in zip(layout.past, layout.lengths)]
    if has_varlen(q, layout):
        k = torch.cat([cache.k[row, :, :total] for row, total in enumerate(totals)], dim=1)        # (nh, all keys, hs)
        v = torch.cat([cache.v[row, :, :total] for row, total in enumerate(totals)], dim=1)
        return ragged_attention(q, k.transpose(0, 1), v.transpose(0, 1), layout)
    out = []
    for row, (q_row, total) in enumerate(zip(q.split(layout.lengths), totals)):
        n = len(q_row)
        # Query i stands at position past + i, so the triangle of the causal mask is aligned at its end.
        y = F.scaled_dot_product_attention(as_batch(q_row, n), cache.k[row:row + 1, :, :total].type_as(q),
                                           cache.v[row:row + 1, :, :total],
                                           attn_mask=causal_lower_right(n, total))                 # (1, nh, n, hs)
        out.append(y[0].transpose(0, 1))                                           # (n, nh, hs)
    return torch.cat(out)                                                          # (T, nh, hs)


def attend_from_one(q: Tensor, cache: LayerCache, layout: "DecodeLayout") -> Tensor:
    """Attention of one query for each sequence: q (B, nh, hs) -> (B, nh, hs).

    torch's fused attention for CPUs is made for many queries. For a single one, a plain product and a weighted sum of
    rows are faster: two and a half times in bf16, with 700 keys. embedding_bag is the kernel for such sums, and takes
    less than half the time of a product there. The scores stay in fp32, as in the fused kernels; hence the keys do, too.
    """
    q = q.unsqueeze(2)                                                             # (B, nh, 1, hs)
    k = cache.k[:, :, :layout.used]                                                # (B, nh, used, hs)
    if q.device.type != "cpu":
        v = cache.v[:, :, :layout.used]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask).squeeze(2)
    scores = q.float() @ k.transpose(2, 3) * q.size(-1) ** -0.5                    # (B, nh, 1, used)
    if layout.mask is not None:
        scores += layout.mask
    probs = scores.softmax(-1).type_as(cache.v).flatten(0, 2)                      # (B * nh, used)
    values = cache.v.flatten(0, 2)                                                 # (B * nh * S, hs)
    y = F.embedding_bag(layout.value_rows, values, per_sample_weights=probs, mode="sum")            # (B * nh, hs)
    return y.view_as(q).squeeze(2)


CPU_PREFILL = 1200                  # tokens, two LLaVA prompts: measured, 16 pictures at a time are a fifth slower


def rows_together(prompts: list[list[int]], cached: list[int], most: int | None) -> Iterator[slice]:
    """Cut the rows of a batch into runs that have `most` new tokens or a few more, as whole prompts; None: all rows."""
    first = 0
    new_tokens = 0
    for row, prompt in enumerate(prompts):
        new_tokens += len(prompt) - cached[row]
        is_full = most is not None and new_tokens >= most
        if is_full or row == len(prompts) - 1:
            yield slice(first, row + 1)
            first = row + 1
            new_tokens = 0


class DecodeLayout:
    """A Layout for one new token of each sequence in the cache, made without traffic between host and device."""

    def __init__(self, cache: KVCache):
        self.pos = cache.pos                                                       # (B,)
        self.used = cache.used
        self.sequence = torch.arange(len(cache.pos), device=self.pos.device)       # (B,)
        if cache.v.device.type == "cpu":
            # Where each head's values stand in a layer's part of the cache, taken as one table of rows.
            _, batch, n_head, slots, _ = cache.v.shape
            starts = torch.arange(0, batch * n_head * slots, slots, dtype=torch.int32)
            self.value_rows = starts[:, None] + torch.arange(self.used, dtype=torch.int32)         # (B * nh, used)
        self.mask = None            # where all sequences are equally long, everything that is read may be seen
        if cache.bucket > 1 or min(cache.lengths) < max(cache.lengths):
            unseen = torch.arange(self.used, device=self.pos.device) > self.pos[:, None]           # (B, used)
            # To be added to the scores. From a mask of booleans every layer would make this one again.
            mask = torch.zeros(unseen.shape, dtype=cache.k.dtype, device=self.pos.device)
            self.mask = mask.masked_fill(unseen, float("-inf"))[:, None, None]     # (B, 1, 1, used)


class Graph:
    """A decoding step recorded by CUDA: one launch for all kernels. Good until another 256 positions are read."""

    def __init__(self, model: LLaVAPhi, ids: Tensor, cache: KVCache):
        self.ids = ids.clone()      # the recording reads its input from here, and writes to self.logits
        self.used = cache.used
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                       # libraries set themselves up outside the recording
            model.step(self.ids, cache)
        torch.cuda.current_stream().wait_stream(side)
        # In other threads CUDA may be busy with something that must not be recorded (a server, a loader that pins).
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = model.step(self.ids, cache)                              # (B, V)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


class Prefix(NamedTuple):           # a beginning of a prompt that has been computed
    ids: list[int]                  # IMAGE_ID at patch positions
    images: Tensor                  # (N, 3, H, W) uint8, compared by identity
    k: Tensor                       # (n_layer, nh, len(ids), hs)
    v: Tensor


def longest_prefix(prompt: list[int], images: Tensor, memory: list[Prefix]) -> Prefix | None:
    """The longest beginning of `prompt` in memory, at least one token short of all of it (whose logits are wanted)."""
    best = None
    for prefix in memory:
        n = common_length(prompt, prefix.ids)
        if prefix.images is not images and IMAGE_ID in prefix.ids[:n]:
            n = prefix.ids.index(IMAGE_ID)                  # another picture: only the words before it are the same
        n = min(n, len(prompt) - 1)
        while n > 0 and prompt[n - 1] == prompt[n] == IMAGE_ID:
            n -= 1                                          # a picture is kept whole or not at all
        if n > (len(best.ids) if best else 0):
            best = Prefix(prefix.ids[:n], prefix.images, prefix.k[:, :, :n], prefix.v[:, :, :n])
    return best


def common_length(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def known_prefixes(model: LLaVAPhi, prompts: list[list[int]], images: list[Tensor],
                   memory: list[Prefix]) -> list[Prefix | None]:
    """For each prompt the longest beginning that is computed: from `memory`, or here for several prompts at once.

    Everything up to the end of a picture is the same for all questions about it: it runs once, and is copied to each.
    """
    prefixes = [longest_prefix(prompt, pictures, memory) for prompt, pictures in zip(prompts, images)]
    groups: dict[tuple, list[int]] = {}                     # the picture, and the ids up to its end -> rows
    for row, prompt in enumerate(prompts):
        end = len(prompt) - prompt[::-1].index(IMAGE_ID) if IMAGE_ID in prompt else 0
        known = len(prefixes[row].ids) if prefixes[row] else 0
        if known < end < len(prompt):
            groups.setdefault((id(images[row]), tuple(prompt[:end])), []).append(row)
    shared = [(list(head), rows) for (_, head), rows in groups.items() if len(rows) > 1]
    if shared:
        heads = [head for head, _ in shared]
        cache = model.new_cache(len(heads), max(len(head) for head in heads))
        model.prefill(heads, [images[rows[0]] for _, rows in shared], cache)
        for i, (head, rows) in enumerate(shared):
            prefix = cache.prefix(i, head, images[rows[0]])
            for row in rows:
                prefixes[row] = prefix
    return prefixes

# ---------------------------------------------------------------------------------------------------
# Surgery: what is done to a model after it has been built. A reader of the model can stop here.


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """As Hugging Face's Phi starts (and with it LLaVA-Phi's projector): normal 0.02, biases 0, LayerNorm 1 and 0."""
    for name, parameter in module.named_parameters():
        is_layer_norm = ".ln" in f".{name}"
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif is_layer_norm and name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)


# ---------------------------------------------------------------------------------------------------
# Weights in the order in which a CPU multiplies them


# ---------------------------------------------------------------------------------------------------
# Weights in 8 bits


# ---------------------------------------------------------------------------------------------------
# Weights in 4 bits
#
# Of each output channel, 64 neighbouring weights form a group with a scale and a zero point of its own, in bf16:
# w = (q - 8) * scale + zero, q in 0..15. Two q share a byte, in the order that torch's product for CPUs reads.


def trained_parts(model: LLaVAPhi) -> list[str]:
    """The parts of which every parameter is trained."""
    return [name for name, part in model.named_children() if next(part.parameters()).requires_grad]
