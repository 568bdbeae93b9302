"""Phi-2, the projector, and the LLaVA glue between picture and text. All of the model is here and in vision.py.

Follows Hugging Face's modeling_phi.py (parallel block, partial rotary embedding) and LLaVA's llava_arch.py (what is
spliced where). Sequences are packed: a micro-batch of B samples is one row of T tokens, without padding.

Shapes: B sequences, T tokens in all, C width, nh heads, hs head size, V vocabulary rows, S cache slots;
        N images, P patches per image, D their width; M supervised positions.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from vision import VisionConfig, VisionTower

IMAGE_ID = -200                     # stands where a patch goes; never looked up in the embedding


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
class LLaVAConfig:
    llm: PhiConfig = field(default_factory=PhiConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_mode: str = "pad"         # how the model saw its pictures in training; the modes are those of data.load_image


CONFIGS: dict[str, LLaVAConfig] = {
    "llava-phi": LLaVAConfig(),
    "demo": LLaVAConfig(
        llm=PhiConfig(vocab_size=512, block_size=512, n_layer=4, n_head=4, n_embd=160, n_inner=640, rotary_dim=16,
                      dropout=0.0),
        vision=VisionConfig(image_size=56, n_layer=4, n_head=4, n_embd=128, n_inner=512),
        image_mode="crop",
    ),
}

# ---------------------------------------------------------------------------------------------------
# Phi-2


def rope(pos: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Positions (T,) -> cos, sin (T, 1, 1, dim / 2) in fp32. Made in every forward: no buffer to cast or lose."""
    freq = base ** (-torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim)
    angle = (pos[:, None].float() * freq)[:, None, None]                           # (T, 1, 1, dim / 2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k (T, 2, nh, hs): turn channel i with i + dim / 2 ("half-split" pairing), for the first dim channels."""
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    a, b = a.float(), b.float()
    return torch.cat([(a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x), rest], dim=-1)    # (T, 2, nh, hs)


class Layout:
    """Where the sequences of a packed row lie: made once per forward, read by every layer.

    lengths (B,) on the CPU: new tokens per sequence. `past`: how many tokens of each are in the cache already.
    """
    def __init__(self, lengths: Tensor, device: torch.device, past: list[int] | None = None):
        self.lengths = lengths.tolist()
        self.past = past or [0] * len(self.lengths)
        starts = F.pad(lengths.cumsum(0), (1, 0))                                  # (B + 1,)
        self.last = (starts[1:] - 1).to(device, non_blocking=True)                 # (B,) rows of the last tokens
        offset = torch.tensor(self.past, dtype=torch.int64) - starts[:-1]          # (B,)
        pos = torch.arange(int(starts[-1])) + offset.repeat_interleave(lengths)    # (T,) restarts with each sequence
        self.pos = pos.to(device, non_blocking=True)
        self.starts = starts.to(device, torch.int32, non_blocking=True)
        self.max_length = 2048      # constant: it only sizes the CUDA grid, and a changing int would recompile
        # Asked here and not in `attend`, which torch.compile could not trace past the question.
        self.on_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_varlen(q: Tensor, layout: Layout) -> bool:
    """Whether flash attention over ragged sequences can take q (T, nh, hs); if not, a loop over sequences does the same.

    The kernels are for 16-bit floats and for heads of a multiple of 8 channels. They refuse to compute nothing at all,
    which is what a process without a sample asks for.
    """
    return layout.on_ampere and q.dtype != torch.float32 and q.size(-1) % 8 == 0 and len(q) > 0


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each sequence of a packed row. q, k, v (T, nh, hs) -> (T, nh, hs)."""
    if has_varlen(q, layout):
        starts, longest = layout.starts, layout.max_length
        return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))          # look back only
    runs = [(length, len(list(run))) for length, run in groupby(layout.lengths)]   # neighbours of one length: one call
    out = [q[:0]]
    for (length, _), *parts in zip(runs, *(x.split([length * n for length, n in runs]) for x in (q, k, v))):
        q_, k_, v_ = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in parts)     # (b, nh, length, hs)
        out.append(F.scaled_dot_product_attention(q_, k_, v_, is_causal=True).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)                                                          # (T, nh, hs)


class Step:
    """A Layout for one new token of each sequence in the cache, made without traffic between host and device."""
    def __init__(self, cache: "KVCache"):
        self.pos, self.used = cache.pos, cache.used                                # (B,)
        self.rows = cache.pos + cache.first                                        # (B,) of the cache's B * S
        alike = cache.bucket == 1 and min(cache.lengths) == max(cache.lengths)
        seen = None if alike else torch.arange(self.used, device=self.pos.device) <= self.pos[:, None]     # (B, used)
        self.mask = None if alike else seen[:, None, None]                         # (B, 1, 1, used)


class Prefix(NamedTuple):           # a beginning of a prompt that has been computed
    ids: list[int]                  # IMAGE_ID at patch positions
    images: Tensor                  # (N, 3, H, W) uint8, compared by identity
    k: Tensor                       # (n_layer, len(ids), nh, hs)
    v: Tensor


def longest_prefix(prompt: list[int], images: Tensor, memory: list[Prefix]) -> Prefix | None:
    """The longest beginning of `prompt` in memory, at least one token short of all of it (whose logits are wanted)."""
    best = None
    for ids, pics, k, v in memory:
        same = next((n for n, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids)))
        if pics is not images and IMAGE_ID in ids[:same]:   # another picture: only the words before it are the same
            same = ids.index(IMAGE_ID)
        same = min(same, len(prompt) - 1)
        while same and prompt[same - 1] == prompt[same] == IMAGE_ID:               # pictures are kept whole
            same -= 1
        if same > (len(best.ids) if best else 0):
            best = Prefix(ids[:same], pics, k[:, :same], v[:, :same])
    return best


class KVCache:
    """Keys and values of every layer for B sequences of at most S tokens. Preallocated, an argument, knows no model."""
    def __init__(self, config: PhiConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch, slots, config.n_head, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = [0] * batch                          # tokens held per sequence
        self.pos = torch.zeros(batch, dtype=torch.int64, device=device)            # (B,) the same, where the model is
        self.first = torch.arange(batch, device=device) * slots                    # (B,) where each row of B * S begins
        self.bucket = 256 if self.k.is_cuda else 1          # attention reads multiples of it: graphs need fixed shapes
        self.graph: Graph | None = None

    @property
    def used(self) -> int:
        """How many slots of each row the next step reads."""
        return min(-(-(max(self.lengths) + 1) // self.bucket) * self.bucket, self.k.size(2))

    def fill(self, lengths: list[int]) -> None:
        """After a prefill: each sequence now holds so many tokens."""
        self.lengths = lengths
        self.pos = torch.tensor(lengths, device=self.pos.device)

    def advance(self) -> None:
        """After a step. The last slot is never needed: sequences that ended idle there while others go on."""
        last = self.k.size(2) - 1
        self.lengths = [min(n + 1, last) for n in self.lengths]
        self.pos.add_(1).clamp_(max=last)

    def prefix(self, row: int, ids: list[int], images: Tensor) -> Prefix:
        """What the row holds for `ids`: a view."""
        return Prefix(ids, images, self.k[:, row, :len(ids)], self.v[:, row, :len(ids)])

    def restore(self, prefixes: list[Prefix | None]) -> None:
        """Begin each row with what is known of it."""
        for row, prefix in enumerate(prefixes):
            if prefix:
                n = self.lengths[row] = len(prefix.ids)
                self.k[:, row, :n], self.v[:, row, :n] = prefix.k, prefix.v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout | Step) -> Tensor:
        """Store the new k, v (T, nh, hs), then let q (T, nh, hs) see each sequence's past and itself -> (T, nh, hs)."""
        keys, values = self.k[layer], self.v[layer]                                # (B, S, nh, hs)
        if isinstance(layout, Step):
            keys.flatten(0, 1).index_copy_(0, layout.rows, k)
            values.flatten(0, 1).index_copy_(0, layout.rows, v)
            k_, v_ = (x[:, :layout.used].transpose(1, 2) for x in (keys, values))  # (B, nh, used, hs)
            return F.scaled_dot_product_attention(q.unsqueeze(2), k_, v_, attn_mask=layout.mask).squeeze(2)
        at = 0
        for row, (past, n) in enumerate(zip(layout.past, layout.lengths)):
            keys[row, past:past + n], values[row, past:past + n] = k[at:at + n], v[at:at + n]
            at += n
        if not any(layout.past):
            return attend(q, k, v, layout)
        out, at = [], 0
        for row, (past, n) in enumerate(zip(layout.past, layout.lengths)):
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q[at:at + n], keys[row, :past + n], values[row, :past + n]))
            y = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=causal_lower_right(n, past + n))   # (1, nh, n, hs)
            out.append(y[0].transpose(0, 1))
            at += n
        return torch.cat(out)                                                      # (T, nh, hs)


class Graph:
    """A decoding step recorded by CUDA: one launch for all kernels. Good until another 256 positions are read."""
    def __init__(self, model: "LLaVAPhi", ids: Tensor, cache: KVCache):
        self.ids, self.used, self.graph = ids.clone(), cache.used, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                       # libraries set themselves up outside the recording
            model.step(self.ids, cache)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = model.step(self.ids, cache)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


class Attention(nn.Module):
    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        T, C = x.shape
        qk, v = self.qkv(x).view(T, 3, self.n_head, C // self.n_head).split([2, 1], dim=1)
        (q, k), v = apply_rope(qk, cos, sin).unbind(1), v.squeeze(1)               # (T, nh, hs) each
        y = attend(q, k, v, layout) if cache is None else cache.attend(self.layer, q, k, v, layout)
        return self.proj(y.reshape(T, C))                                          # (T, C)


class MLP(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.n_inner)
        self.proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):             # one LayerNorm feeds both branches, and both are added at once
    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        h = self.ln(x)
        attn = F.dropout(self.attn(h, cos, sin, layout, cache), self.dropout, self.training)
        return x + attn + F.dropout(self.mlp(h), self.dropout, self.training)      # (T, C)


class Phi(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.recompute = "none"     # what the backward pass computes again: none, selective or full
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)                 # not tied to wte, and with a bias

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """Embeddings (T, C) -> hidden states (T, C), ready for lm_head."""
        cos, sin = rope(layout.pos, self.config.rotary_dim, self.config.rope_base)
        for block in self.h:
            if self.recompute == "none" or not self.training:
                x = block(x, cos, sin, layout, cache)
            else:
                keep = partial(create_selective_checkpoint_contexts, keep_products)
                keep = keep if self.recompute == "selective" else noop_context_fn
                x = checkpoint(block, x, cos, sin, layout, cache, use_reentrant=False, context_fn=keep)
        return self.ln_f(x)


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective recomputation: keep the wide matrix products (qkv, fc) and attention, redo what is cheap or narrow.

    Half of the memory, for a twelfth of a forward pass more; full recomputation costs two thirds of one.
    """
    wide = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) and args[-1].size(1) > args[-1].size(0)
    keep = wide or "attention" in str(op) or "attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def cross_entropy_sum(h: Tensor, head: nn.Module, targets: Tensor, chunk: int = 4096) -> Tensor:
    """Sum of the M token losses, in fp32. h (M, C), targets (M,). Logits of at most `chunk` rows exist at a time."""
    def loss(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), targets, reduction="sum")
    if targets.numel() <= chunk:
        return loss(h, targets)
    pieces = zip(h.split(chunk), targets.split(chunk))
    return torch.stack([checkpoint(loss, a, b, use_reentrant=False) for a, b in pieces]).sum()

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
    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.vision.n_embd, config.llm.n_embd)
        self.llm = Phi(config.llm)

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        """ids (T,), images (N, 3, H, W) uint8, slots (N * P,): which rows the patches take, in order -> (T, C).

        N = 0 runs the tower on nothing: under FSDP every process must take part, and every gradient must exist.
        """
        assert slots.numel() == images.size(0) * self.config.vision.n_patches, \
            f"{slots.numel()} image positions for {images.size(0)} images of {self.config.vision.n_patches} patches"
        x = self.llm.wte(ids)                                                      # (T, C)
        patches = self.projector(self.vision(images)).flatten(0, 1)                # (N * P, C)
        return x.index_copy(0, slots, patches.type_as(x))                          # (T, C)

    def forward(self, ids: Tensor, lengths: Tensor, images: Tensor, slots: Tensor, rows: Tensor,
                targets: Tensor) -> Tensor:
        """Sum of the losses over the M supervised tokens, an fp32 scalar; the caller divides by its global count.

        ids (T,) packed, 0 at image positions; lengths (B,) on the CPU; images (N, 3, H, W) uint8; slots (N * P,);
        rows (M,): positions whose next token is supervised; targets (M,): those tokens.
        """
        h = self.llm(self.embed(ids, images, slots), Layout(lengths, ids.device))
        return cross_entropy_sum(h[rows], self.llm.lm_head, targets)

    # ---- generation: token ids in, token ids out. Prompts hold IMAGE_ID at every patch position.

    @property
    def device(self) -> torch.device:
        return self.llm.wte.weight.device

    def new_cache(self, batch: int, slots: int) -> KVCache:
        return KVCache(self.config.llm, batch, slots, self.device, self.llm.wte.weight.dtype)

    def prefill(self, prompts: list[list[int]], images: list[Tensor], cache: KVCache) -> Tensor:
        """Run what the cache lacks of each prompt; images[i] (N_i, 3, H, W) are prompt i's. -> logits (B, V), fp32."""
        P = self.config.vision.n_patches
        new = [prompt[past:] for prompt, past in zip(prompts, cache.lengths)]
        unseen = [pics[prompt[:past].count(IMAGE_ID) // P:]
                  for prompt, pics, past in zip(prompts, images, cache.lengths)]
        ids = torch.tensor([i for row in new for i in row])                        # (T,)
        slots = (ids == IMAGE_ID).nonzero().flatten()                              # (N * P,)
        layout = Layout(torch.tensor([len(row) for row in new]), self.device, cache.lengths)
        x = self.embed(ids.clamp_min(0).to(self.device), torch.cat(unseen).to(self.device), slots.to(self.device))
        h = self.llm(x, layout, cache)                                             # (T, C)
        cache.fill([len(prompt) for prompt in prompts])
        return self.llm.lm_head(h[layout.last]).float()                            # (B, V)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One more token (B,) for every sequence -> next-token logits (B, V), fp32. The cache is not advanced."""
        return self.llm.lm_head(self.llm(self.llm.wte(ids), Step(cache), cache)).float()

    def decode(self, ids: Tensor, cache: KVCache, capture: bool = False) -> Tensor:
        """A step, and the cache knows of it."""
        if capture and (cache.graph is None or cache.graph.used != cache.used):
            cache.graph = Graph(self, ids, cache)
        logits = cache.graph(ids) if capture else self.step(ids, cache)
        cache.advance()
        return logits

    def prefixes(self, prompts: list[list[int]], images: list[Tensor], memory: list[Prefix]) -> list[Prefix | None]:
        """For each prompt the longest beginning that is computed, in `memory` or here for several prompts at once.

        Everything up to the end of the picture is the same for all questions about it: it runs once, then is copied.
        """
        found = [longest_prefix(prompt, pics, memory) for prompt, pics in zip(prompts, images)]
        groups: dict[tuple, list[int]] = {}                                    # same picture, same ids up to its end
        for row, (prompt, pics) in enumerate(zip(prompts, images)):
            end = len(prompt) - prompt[::-1].index(IMAGE_ID) if IMAGE_ID in prompt else 0
            if len(prompt) > end > (len(found[row].ids) if found[row] else 0):
                groups.setdefault((id(pics), tuple(prompt[:end])), []).append(row)
        shared = [(list(key[1]), rows) for key, rows in groups.items() if len(rows) > 1]
        if shared:
            cache = self.new_cache(len(shared), max(len(head) for head, _ in shared))
            self.prefill([head for head, _ in shared], [images[rows[0]] for _, rows in shared], cache)
            for i, (head, rows) in enumerate(shared):
                for row in rows:
                    found[row] = cache.prefix(i, head, images[row])
        return found

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], images: list[Tensor], *, max_new_tokens: int, eos_id: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
                 memory: list[Prefix] | None = None, fast: bool = False) -> Iterator[list[int | None]]:
        """Yield one column per step: each prompt's next id, or None where that answer has ended (eos_id or block_size).

        `memory`: a list owned by the caller that carries the last prompt's keys and values from call to call, so the
        next question about the same picture (the same tensor), or the next turn, starts where this one ended.
        `fast`: for long answers on CUDA, steps are captured as a graph and queued before the host reads the last token.
        Raises ValueError when a prompt leaves no room for an answer.
        """
        limit, longest = self.config.llm.block_size, max(len(prompt) for prompt in prompts)
        if longest >= limit:
            raise ValueError(f"the prompt takes {longest} of the model's {limit} positions, none is left for an answer")
        cache = self.new_cache(len(prompts), min(longest + max_new_tokens, limit))
        cache.restore(self.prefixes(prompts, images, memory or []))
        logits = self.prefill(prompts, images, cache)
        ended, answers = [False] * len(prompts), [[] for _ in prompts]
        try:
            for step in range(max_new_tokens):
                ids = pick(logits, temperature, top_k, top_p, generator)
                read = read_later(ids)
                if fast and step + 1 < max_new_tokens:
                    logits = self.decode(ids, cache, capture=ids.is_cuda)
                column = read()
                ended = [e or i == eos_id for e, i in zip(ended, column)]
                if all(ended):
                    return
                for answer, i, e in zip(answers, column, ended):
                    answer.extend([] if e else [i])
                yield [None if e else i for i, e in zip(column, ended)]
                ended = [e or len(prompt) + len(said) >= limit for e, prompt, said in zip(ended, prompts, answers)]
                if all(ended) or step + 1 == max_new_tokens:
                    return
                if not fast:
                    logits = self.decode(ids, cache)
        finally:                                            # also when the caller stops listening
            if memory is not None:
                last = cache.prefix(-1, (prompts[-1] + answers[-1])[:cache.lengths[-1]], images[-1])
                if len(prompts) > 1:                        # keep one row, not all of them
                    last = last._replace(k=last.k.clone(), v=last.v.clone())
                memory[:] = [last]


def read_later(ids: Tensor) -> Callable[[], list[int]]:
    """Start copying ids to the host now; only the call waits for them, and not for what was queued in between."""
    if not ids.is_cuda:
        return ids.tolist
    host, event = torch.empty_like(ids, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(ids, non_blocking=True)
    event.record()
    return lambda: [event.synchronize(), host.tolist()][1]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) fp32 -> ids (B,). Temperature 0: the best; else from the top_k best (0: all) within top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
    probs = logits[:, :top_k or None].softmax(-1)                                  # (B, top_k or V)
    outside = probs.cumsum(-1) - probs >= top_p             # what stands before a token already fills top_p
    choice = torch.multinomial(probs.masked_fill(outside, 0.0), 1, generator=generator)    # (B, 1)
    return order.gather(1, choice).squeeze(1)

# ---------------------------------------------------------------------------------------------------
# Surgery


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """As Hugging Face's Phi starts (and with it LLaVA-Phi's projector): normal 0.02, biases 0, LayerNorm 1 and 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if ".ln" in f".{name}" and name.endswith("weight") else 0.0)


class LoRALinear(nn.Linear):        # y = W x + b + (alpha / r) B A x, W and b frozen; B = 0 at first: the plain layer
    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def apply_lora(llm: Phi, r: int, alpha: float, on: tuple[str, ...] = ("attn", "mlp")) -> int:
    """Give the Linears of every block's `on` a low-rank companion, in place. -> how many (Hu et al. 2021)."""
    found = [getattr(block, name) for block in llm.h for name in on]
    for module in found:
        for name, base in list(module.named_children()):
            setattr(module, name, LoRALinear(base, r, alpha))
    return 2 * len(found)


def merge_lora(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State with `*.lora_a` and `*.lora_b` -> the plain model's state: W + (alpha / r) B A."""
    merged = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for name in tensors:
        if name.endswith(".lora_a"):
            stem, a, b = name.removesuffix("lora_a"), tensors[name], tensors[name.removesuffix("lora_a") + "lora_b"]
            weight = merged[stem + "weight"]
            merged[stem + "weight"] = (weight.float() + alpha / a.size(0) * b.float() @ a.float()).to(weight.dtype)
    return merged


class Int8Linear(nn.Linear):        # weights in 8 bits with a scale per output channel, for inference
    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = nn.Parameter(torch.empty_like(base.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(base.out_features, device=base.weight.device))
        self.bias = base.bias

    def quantize(self, weight: Tensor) -> None:
        """Take over a weight (out, in) of any float dtype, some rows at a time: no second copy of it in fp32."""
        for rows, out, scale in zip(*(t.split(4096) for t in (weight, self.weight, self.scale))):
            rows = rows.to(scale)
            scale.copy_(rows.abs().amax(1).clamp_min(1e-12) / 127)
            out.copy_((rows / scale[:, None]).round_())

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":                          # weight-only: the memory of int8, the arithmetic of x
            return F.linear(x, self.weight.type_as(x)) * self.scale.type_as(x) + self.bias
        rows = x.reshape(-1, x.size(-1)).float()
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127            # of each token
        y = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight.t()).float().mul_(scale)
        return torch.addcmul(self.bias, y, self.scale).type_as(x).view(*x.shape[:-1], self.out_features)


def quantize_int8(model: LLaVAPhi) -> int:
    """Turn the Linears of the decoder, its head, the tower and the projector into Int8Linears, in place. -> how many.

    None is left out: no kind of layer, kept in fp32, takes more than a third off the error of the logits.
    On the meta device only the classes change; load_model then quantises each weight as it arrives.
    """
    found = [(module, name, base) for module in model.modules() for name, base in module.named_children()
             if type(base) is nn.Linear]
    for module, name, base in found:
        setattr(module, name, Int8Linear(base))
        if not base.weight.is_meta:
            getattr(module, name).quantize(base.weight.detach())
    return len(found)
