"""Fast generation: KV cache, prefix caching, sampling, CUDA graphs. Token ids in, token ids out.

A Session answers prompts and keeps the last KV cache, so that the next question about the same image, or the next turn
of a chat, only computes what is new. Its greedy answers are those of LLaVAPhi.generate: start reading there.

Prompts hold IMAGE_ID at every patch position, as data.expand makes them.

Shapes: as in model.py; S cache slots per sequence.
"""
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from data import IMAGE_ID
from model import LLaVAPhi, Packed, Phi, to_device_async, varlen_attention

CPU_PREFILL = 1200                  # tokens, i.e. two LLaVA prompts; 16 at a time were measured to be a fifth slower


class Session:
    """A model with its KV cache. It keeps the last prompt and answer, and reuses their common prefix with the next."""

    def __init__(self, model: LLaVAPhi, cuda_graph: bool = False):
        """cuda_graph: capture the decoding step as a CUDA graph, and queue each before the host has read the token
        before it. Capturing takes a while, so it pays for long answers."""
        self.model = model
        self.cuda_graph = cuda_graph
        self.cache: KVCache | None = None       # of the last call
        self.finish: list[str] = []             # why each of its answers ended, "" while it is being written
        self.scored: list[list[Scored]] = []    # their tokens and the one that ended each, if asked for
        # On Hopper, torch prefers cuDNN's attention, which takes tens to hundreds of milliseconds to build an execution
        # plan for every new shape and stride. Generation keeps meeting new shapes (prompts, batches, cache lengths), so
        # a process that generates uses torch's other kernels. Training has no session and keeps torch's choice: its
        # decoder calls varlen_attn, and its tower sees only a few dozen different batch sizes in a whole run.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], images: list[Tensor], *, max_new_tokens: int, eos_id: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 generator: torch.Generator | None = None, logprobs: int | None = None) -> Iterator[list[int | None]]:
        """Yield one column per step: the next id of each answer, or None where that answer has ended.

        images[i] (N_i, 3, H, W) uint8 belong to prompts[i], which leaves room for an answer (lib.chat.encode_chat sees
        to it). Afterwards `finish` says for each answer why it ended: "stop" (eos_id), "length" (max_new_tokens) or
        "context" (the model's positions are full). The caller may stop iterating at any time. logprobs: `scored` gets
        each token with its log-probability and the `logprobs` likeliest ones, before temperature, top_k and top_p.
        """
        finish = self.finish = [""] * len(prompts)
        scored = self.scored = [[] for _ in prompts]
        longest = max(map(len, prompts))
        logits = self.prefill(prompts, images, min(longest + max_new_tokens, self.model.config.llm.block_size))
        cache = self.cache                      # of this answer, even if the caller starts another one meanwhile
        for n in range(max_new_tokens):
            is_last = n + 1 == max_new_tokens
            ids = sample_next_token(logits, temperature, top_k, top_p, generator)  # (B,)
            wait_for_ids = copy_to_host_async(ids)
            scores = [] if logprobs is None else score_tokens(logits, ids, logprobs)
            # With a graph the next step is queued before this one's ids are read, so the GPU never idles. The price
            # is one wasted step at the end.
            if self.cuda_graph and not is_last:
                logits = self.decode(ids, cache)
            for row, score in enumerate(scores):
                if not finish[row]:
                    scored[row].append(score)
            column = self.accept(wait_for_ids(), cache, finish, eos_id, is_last)
            if any(token is not None for token in column):
                yield column
            if all(finish):
                return
            if not self.cuda_graph:
                logits = self.decode(ids, cache)

    @torch.inference_mode()
    def score(self, prompt: list[int], images: Tensor, answers: list[list[int]]) -> list[list[float]]:
        """The log-probability of each token of several answers to one prompt, which runs once. See `generate`."""
        llm = self.model.llm
        self.prefill([prompt[:-1]], [images], len(prompt))
        scores = []
        for rows in split_rows(range(len(answers)), list(map(len, answers)), CPU_PREFILL):
            batch = [answers[row] for row in rows]
            lengths = list(map(len, batch))
            # The prompt's last token begins each branch, since it predicts the first of the answer. An answer's last
            # token is not read.
            ids = torch.tensor([token for answer in batch for token in [prompt[-1], *answer[:-1]]])        # (T,)
            targets = torch.tensor([token for answer in batch for token in answer])                        # (T,)
            h = llm(llm.wte(ids.to(self.model.device)).to(llm.dtype), Branches(self.cache, lengths))       # (T, C)
            losses = F.cross_entropy(llm.lm_head(h).float(), targets.to(h.device), reduction="none")       # (T,)
            scores += [(-part).tolist() for part in losses.split(lengths)]
        return scores

    def prefill(self, prompts: list[list[int]], images: list[Tensor], slots: int) -> Tensor:
        """Start a cache with these prompts -> the next token's logits (B, V), fp32.

        What is known is not computed again. A prompt begins with what it has in common with the last call's last prompt
        and answer. Where several agree up to the end of their last image, one runs first, and the others begin with
        what it has computed.
        """
        config = self.model.config
        device = self.model.device
        contents = [content_of(*pair, config.vision.n_patches) for pair in zip(prompts, images, strict=True)]
        sources = find_sources(contents)
        first = [row for row in range(len(prompts)) if row not in sources]
        cache = self.start_cache(contents, slots, first)
        logits = torch.empty(len(prompts), config.llm.vocab_size, device=device)
        # A GPU takes all prompts at once. On a CPU one or two images at a time are faster: the activations between
        # layers then stay in the processor's cache.
        enough = CPU_PREFILL if device.type == "cpu" else math.inf
        for rows in (first, list(sources)):
            for row in rows:
                if row in sources:
                    cache.reuse(row, cache.prefix(sources[row]))
            n_new = [len(prompt) - past for prompt, past in zip(prompts, cache.lengths)]
            for part in split_rows(rows, n_new, enough):
                logits[part] = prefill_rows(self.model, prompts, images, cache, part)
        cache.pos = torch.tensor(cache.lengths, device=device)
        return logits

    def start_cache(self, contents: "list[Content]", slots: int, rows: list[int]) -> "KVCache":
        """A new cache, in which these rows begin with what they share with the last call's last prompt and answer.

        Frees that call's cache, a batch's before the new one is there.
        """
        last = None
        if self.cache is not None:
            last = self.cache.prefix(-1)
            if len(self.cache.contents) > 1:    # a copy, since a view would keep the whole batch in memory
                last = Prefix(last.content, last.k.clone(), last.v.clone())
            self.cache = None
        self.cache = KVCache(self.model.llm, contents, slots)
        if last:
            for row in rows:
                self.cache.reuse(row, last)
        return self.cache

    def decode(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """Append one token (B,) to every sequence -> the next token's logits (B, V)."""
        if self.cuda_graph and ids.is_cuda:
            if cache.graph is None or cache.graph.used != cache.used:
                cache.graph = CudaGraph(self.model, ids, cache)
            logits = cache.graph.replay(ids)
        else:
            logits = decode_step(self.model, ids, cache)
        cache.advance()
        return logits

    def accept(self, tokens: list[int], cache: "KVCache", finish: list[str], eos_id: int,
               is_last: bool) -> list[int | None]:
        """Append a step's tokens to the answers, and note in `finish` which end with them -> the column to yield."""
        column: list[int | None] = [None] * len(tokens)
        for row, token in enumerate(tokens):
            if not finish[row] and token == eos_id:
                finish[row] = "stop"
            if not finish[row]:
                column[row] = token
                cache.contents[row].append(token)
                if len(cache.contents[row]) == self.model.config.llm.block_size:
                    finish[row] = "context"
                elif is_last:
                    finish[row] = "length"
        return column


def prefill_rows(model: LLaVAPhi, prompts: list[list[int]], images: list[Tensor], cache: "KVCache",
                 rows: list[int]) -> Tensor:
    """Run the uncached tokens of some of the prompts, packed -> the next token's logits (B, V)."""
    new_ids = []
    new_images = []
    for row in rows:
        past = cache.lengths[row]
        n_cached = prompts[row][:past].count(IMAGE_ID) // model.config.vision.n_patches
        new_ids += prompts[row][past:]
        new_images.append(images[row][n_cached:])
    ids = torch.tensor(new_ids)                                                    # (T,)
    image_positions = (ids == IMAGE_ID).nonzero().flatten()                        # (N * P,)
    device = model.device
    x = model.embed(ids.clamp_min(0).to(device), torch.cat(new_images).to(device), image_positions.to(device))
    seqs = Prefill(cache, rows, model.config.llm.block_size)
    h = model.llm(x, seqs)                                                         # (T, C)
    for row in rows:
        cache.lengths[row] = len(prompts[row])
    return model.llm.lm_head(h[seqs.last]).float()                                 # (B, V)


def decode_step(model: LLaVAPhi, ids: Tensor, cache: "KVCache") -> Tensor:
    """Run one token (B,) of every sequence -> the next token's logits (B, V), fp32. Does not advance the cache."""
    x = model.llm.wte(ids).to(model.llm.dtype)                                     # (B, C)
    h = model.llm(x, Decode(cache))                                                # (B, C)
    return model.llm.lm_head(h).float()


def split_rows(rows: Sequence[int], n_tokens: list[int], enough: float) -> Iterator[list[int]]:
    """Split rows of a batch into parts, each closed as soon as its tokens are enough. n_tokens: of every row."""
    part = []
    for row in rows:
        part.append(row)
        if sum(n_tokens[row] for row in part) >= enough or row == rows[-1]:
            yield part
            part = []

# ---------------------------------------------------------------------------------------------------
# Sampling


def sample_next_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
                      generator: torch.Generator | None) -> Tensor:
    """logits (B, V) fp32 -> ids (B,). Temperature 0: greedy; otherwise sample from the top_k (0: all) within top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)      # (B, V)
    if top_k:
        logits = logits[:, :top_k]
    probs = logits.softmax(-1)                                                     # (B, top_k or V)
    better = probs.cumsum(-1) - probs                       # probability mass of the likelier tokens
    probs = probs.masked_fill(better >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)                      # (B, 1)
    return order.gather(1, choice).squeeze(1)                                      # (B,)


class Scored(NamedTuple):           # a token of an answer
    token: int
    logprob: float
    likeliest: list[tuple[int, float]]      # tokens and their log-probabilities, best first


def score_tokens(logits: Tensor, ids: Tensor, n: int) -> list[Scored]:
    """logits (B, V) fp32, the ids (B,) chosen from them -> their log-probabilities, and the n likeliest ids'."""
    logprobs = logits.log_softmax(-1)                                              # (B, V)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)                           # (B,)
    best, best_ids = logprobs.topk(min(n, logprobs.size(1)))                       # (B, n)
    likeliest = [list(zip(*row)) for row in zip(best_ids.tolist(), best.tolist())]
    return list(map(Scored, ids.tolist(), chosen.tolist(), likeliest))


def copy_to_host_async(ids: Tensor) -> Callable[[], list[int]]:
    """Start copying ids to the host -> a function that waits for them, but not for what is queued after this call."""
    if not ids.is_cuda:
        return ids.tolist
    host = torch.empty_like(ids, device="cpu", pin_memory=True)
    host.copy_(ids, non_blocking=True)
    copied = torch.cuda.Event()
    # The copy is on the stream of the ids' device, which need not be the current device.
    copied.record(torch.cuda.current_stream(ids.device))

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()
    return wait

# ---------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of every layer for B sequences of at most S tokens, allocated once."""

    def __init__(self, llm: Phi, contents: "list[Content]", slots: int):
        """contents: of the B prompts, see Content; the answers are appended to them."""
        config = llm.config
        device = llm.wte.weight.device
        slots = -(-slots // 16) * 16                        # SDPA copies a mask of any other width in every layer
        shape = (config.n_layer, len(contents), config.n_head, slots, config.n_embd // config.n_head)
        key_dtype = torch.float32 if device.type == "cpu" else llm.dtype           # see Decode.attend
        self.k = torch.zeros(shape, device=device, dtype=key_dtype)                # (n_layer, B, nh, S, hs)
        self.v = torch.zeros(shape, device=device, dtype=llm.dtype)
        self.contents = contents
        self.lengths = [0] * len(contents)                  # tokens in each row, on the host
        self.pos = torch.zeros(len(contents), dtype=torch.int64, device=device)    # (B,) the same on the device
        self.bucket = 256 if self.k.is_cuda else 1          # attention reads whole buckets: graphs need fixed shapes
        self.graph: CudaGraph | None = None

    @property
    def used(self) -> int:
        """Slots of each row that the next step reads: the longest sequence plus the new token, in whole buckets."""
        needed = max(self.lengths) + 1
        return min(needed + -needed % self.bucket, self.k.size(3))

    def write(self, layer: int, rows: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (T, nh, hs) of T tokens: token i is at position pos[i] of row rows[i]."""
        self.k[layer][rows, :, pos] = k.type_as(self.k)
        self.v[layer][rows, :, pos] = v

    def advance(self) -> None:
        """Count the token of a step. Finished sequences are parked on the last slot, which no live sequence reads."""
        last = self.k.size(3) - 1
        self.lengths = [min(n + 1, last) for n in self.lengths]
        self.pos.add_(1).clamp_(max=last)

    def prefix(self, row: int) -> "Prefix":
        """A row's tokens with their keys and values. These are views, and keep the whole cache in memory."""
        content = self.contents[row][:self.lengths[row]]
        return Prefix(content, self.k[:, row, :, :len(content)], self.v[:, row, :, :len(content)])

    def reuse(self, row: int, known: "Prefix") -> None:
        """Begin a row with its longest common prefix with what is known.

        At least one of its tokens is left to run, for its logits. An image is reused whole or not at all.
        """
        content = self.contents[row]
        n = 0
        while n < min(len(content) - 1, len(known.content)) and content[n] == known.content[n]:
            n += 1
        while n > 0 and isinstance(content[n], bytes) and content[n - 1] == content[n]:
            n -= 1
        self.k[:, row, :, :n] = known.k[:, :, :n]
        self.v[:, row, :, :n] = known.v[:, :, :n]
        self.lengths[row] = n


class Prefill(Packed):
    """The uncached tokens of some rows, packed, and their attention to everything before them."""

    def __init__(self, cache: KVCache, rows: list[int], max_seqlen: int):
        device = cache.v.device
        past = torch.tensor([cache.lengths[row] for row in rows])                  # (B,)
        whole = torch.tensor([len(cache.contents[row]) for row in rows])           # (B,)
        n_new = whole - past                                                       # (B,)
        super().__init__(n_new, device, max_seqlen)
        self.cache = cache
        self.rows = rows
        self.has_past = bool(past.any())
        self.pos = self.pos + to_device_async(past.repeat_interleave(n_new), device)               # (T,)
        self.seq_ids = to_device_async(torch.tensor(rows).repeat_interleave(n_new), device)        # (T,)
        self.last = self.cu_seqlens[1:].long() - 1                                 # (B,) the last token of each prompt
        self.keys = Packed(whole, device)                                          # of new and cached tokens
        self.key_seq_ids = to_device_async(torch.tensor(rows).repeat_interleave(whole), device)    # (all keys,)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Store k, v, and attend from q to all of each sequence. q, k, v (T, nh, hs) -> (T, nh, hs)."""
        self.cache.write(layer, self.seq_ids, self.pos, k, v)
        if not self.has_past:
            return super().attend(q, k, v, layer)
        # Attend to all keys and values of each sequence; the new ones are in the cache by now.
        if self.has_varlen(q):
            k = self.cache.k[layer][self.key_seq_ids, :, self.keys.pos]            # (all keys, nh, hs)
            v = self.cache.v[layer][self.key_seq_ids, :, self.keys.pos]
            return varlen_attention(q, k, v, self.cu_seqlens, self.keys.cu_seqlens, self.max_seqlen)
        out = []
        for row, n, q_row in zip(self.rows, self.keys.lengths, q.split(self.lengths)):
            q_row = q_row.transpose(0, 1)[None]                                    # (1, nh, n_new, hs)
            k_row = self.cache.k[layer, row, None, :, :n].type_as(q)               # (1, nh, n, hs)
            v_row = self.cache.v[layer, row, None, :, :n]
            # Query i is at position past + i, so the causal mask is aligned to the lower right corner.
            mask = causal_lower_right(q_row.size(2), n)
            y = F.scaled_dot_product_attention(q_row, k_row, v_row, attn_mask=mask)
            out.append(y[0].transpose(0, 1))                                       # (n_new, nh, hs)
        return torch.cat(out)                                                      # (T, nh, hs)


class Branches(Packed):
    """Several continuations of the sequence in a cache's only row, packed. Each attends to that sequence and itself."""

    def __init__(self, cache: KVCache, lengths: list[int]):
        super().__init__(lengths, cache.v.device)
        self.past = cache.prefix(0)
        n_past = len(self.past.content)
        self.pos = self.pos + n_past                                               # (T,)
        own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()         # (T, T)
        self.mask = F.pad(own, (n_past, 0), value=True).to(cache.v.device)         # (T, n_past + T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k = torch.cat([self.past.k[layer].type_as(k), k.transpose(0, 1)], dim=1)   # (nh, n_past + T, hs)
        v = torch.cat([self.past.v[layer], v.transpose(0, 1)], dim=1)
        y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=self.mask)
        return y[0].transpose(0, 1)                                                # (T, nh, hs)


class Decode:
    """One new token of each sequence in the cache, and its attention. Built without host-device traffic."""

    def __init__(self, cache: KVCache):
        device = cache.pos.device
        self.cache = cache
        self.pos = cache.pos                                                       # (B,)
        self.used = cache.used
        self.seq_ids = torch.arange(len(cache.pos), device=device)                 # (B,)
        unseen = torch.arange(self.used, device=device) > self.pos[:, None]        # (B, used)
        # An additive mask, because SDPA would convert a boolean one in every layer.
        mask = torch.zeros(unseen.shape, dtype=cache.k.dtype, device=device).masked_fill(unseen, float("-inf"))
        self.mask = mask[:, None, None]                                            # (B, 1, 1, used)
        if device.type == "cpu":
            # Row numbers of each head's values, where a layer of the cache is one table (B * nh * S, hs).
            _, batch, n_head, slots, _ = cache.v.shape
            starts = torch.arange(0, batch * n_head * slots, slots, dtype=torch.int32)
            self.value_rows = starts[:, None] + torch.arange(self.used, dtype=torch.int32)         # (B * nh, used)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Store k, v, and attend from q to all of each sequence. q, k, v (B, nh, hs) -> (B, nh, hs)."""
        self.cache.write(layer, self.seq_ids, self.pos, k, v)
        q = q.unsqueeze(2)                                                         # (B, nh, 1, hs)
        k = self.cache.k[layer, :, :, :self.used]                                  # (B, nh, used, hs)
        v = self.cache.v[layer]                                                    # (B, nh, S, hs)
        if q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, k, v[:, :, :self.used], attn_mask=self.mask).squeeze(2)
        # torch's fused CPU kernel is built for many queries. For one, a plain matmul and a weighted sum of rows are two
        # and a half times as fast, in bf16 with 700 keys. embedding_bag is the kernel for such sums, and takes less
        # than half the time of a matmul. The scores stay in fp32, as in the fused kernels; that is why the cache holds
        # fp32 keys on a CPU.
        scores = q.float() @ k.transpose(2, 3) * q.size(-1) ** -0.5 + self.mask    # (B, nh, 1, used)
        probs = scores.softmax(-1).type_as(v).flatten(0, 2)                        # (B * nh, used)
        values = v.flatten(0, 2)                                                   # (B * nh * S, hs)
        y = F.embedding_bag(self.value_rows, values, per_sample_weights=probs, mode="sum")         # (B * nh, hs)
        return y.view(q.size(0), q.size(1), -1)                                    # (B, nh, hs)


class CudaGraph:
    """A captured decoding step: one launch for all kernels.

    Valid until the context grows into the cache's next bucket of slots; then a new graph is captured.
    """

    def __init__(self, model: LLaVAPhi, ids: Tensor, cache: KVCache):
        self.ids = ids.clone()      # the graph reads its input here and writes to self.logits
        self.used = cache.used
        with torch.cuda.device(ids.device):                 # streams and captures belong to the current device
            self.graph = torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                   # a warm-up, so that libraries initialize before the capture
                decode_step(model, self.ids, cache)
            torch.cuda.current_stream().wait_stream(side)
            # thread_local: other threads (a server's, a loader's that pins memory) may use CUDA meanwhile.
            # Without a stream of ours torch would capture on the one of the first device that ever captured.
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self.logits = decode_step(model, self.ids, cache)                  # (B, V)

    def replay(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

# ---------------------------------------------------------------------------------------------------
# Prefix caching. Prompts have the same prefix if their contents, defined here, do.

Content = list[int | bytes]         # of a sequence: token ids, and at patch positions the image's digest


class Prefix(NamedTuple):           # the beginning of a sequence, with its keys and values
    content: Content
    k: Tensor                       # (n_layer, nh, len(content), hs)
    v: Tensor


def content_of(prompt: list[int], images: Tensor, n_patches: int) -> Content:
    """The prompt, with its images' digests at their patch positions. Equal pixels give equal digests."""
    digests = [hashlib.sha256(image.cpu().contiguous().numpy()).digest() for image in images]
    content: Content = list(prompt)
    patches = [i for i, token in enumerate(prompt) if token == IMAGE_ID]
    for i, position in enumerate(patches):
        content[position] = digests[i // n_patches]
    return content


def find_sources(contents: list[Content]) -> dict[int, int]:
    """Row -> an earlier row that agrees with it up to the end of its last image, where there is one.

    A prompt without an image must agree as a whole.
    """
    first: dict[tuple, int] = {}
    sources = {}
    for row, content in enumerate(contents):
        patches = [i for i, item in enumerate(content) if isinstance(item, bytes)]
        end = patches[-1] + 1 if patches else len(content)
        source = first.setdefault(tuple(content[:end]), row)
        if source != row:
            sources[row] = source
    return sources
