"""Fast generation: KV cache, prefix caching, sampling, CUDA graphs. Token ids in, token ids out.

A Session answers prompts and keeps the last KV cache, so that the next question about the same image, or the next turn
of a chat, only computes what is new. Its greedy answers are those of LLaVAPhi.generate: start reading there.

Prompts hold IMAGE_ID at every patch position, as data.expand makes them.

Shapes: as in model.py; S cache slots per sequence.
"""
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from data import IMAGE_ID
from model import LLaVAPhi, Packed, Phi, as_batch, to_device_async, varlen_attention

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

        images[i] (N_i, 3, H, W) uint8 belong to prompts[i]. Afterwards `finish` says for each answer why it ended:
        "stop" (eos_id), "length" (max_new_tokens) or "context" (the model's positions are full). The caller may stop
        iterating at any time. logprobs: `scored` gets each token with its log-probability and the `logprobs` likeliest
        ones, before temperature, top_k and top_p. Raises ValueError when a prompt leaves no room for an answer.
        """
        limit = self.model.config.llm.block_size
        longest = max(len(prompt) for prompt in prompts)
        if longest >= limit:
            raise ValueError(f"the prompt takes {longest} of the model's {limit} positions, none is left for an answer")
        finish = self.finish = [""] * len(prompts)
        scored = self.scored = [[] for _ in prompts]
        cache = self.start_cache(prompts, images, min(longest + max_new_tokens, limit))
        logits = prefill(self.model, prompts, images, cache)                       # (B, V)
        for n in range(max_new_tokens):
            is_last = n + 1 == max_new_tokens
            ids = sample_next_token(logits, temperature, top_k, top_p, generator)  # (B,)
            wait_for_ids = copy_to_host_async(ids)
            scores = [] if logprobs is None else score_tokens(logits, ids, logprobs)
            # With a graph the next step is queued before this one's ids are read, so the GPU never idles. The price
            # is one wasted step at the end.
            if self.cuda_graph and not is_last:
                logits = self.decode(ids, cache)
            for row, (end, score) in enumerate(zip(finish, scores)):
                if not end:
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
        """The log-probability of each token of several answers to one prompt, which runs once. See `generate`.

        Raises ValueError when an answer does not fit into the context.
        """
        llm = self.model.llm
        longest = max(map(len, answers))
        if len(prompt) + longest - 1 > llm.config.block_size:      # an answer's last token is not read
            raise ValueError(f"the prompt takes {len(prompt)} of the model's {llm.config.block_size} positions, which "
                             f"leaves too few for an answer of {longest} tokens")
        cache = self.start_cache([prompt[:-1]], [images], len(prompt))
        prefill(self.model, [prompt[:-1]], [images], cache)
        scores = []
        for rows in split_rows(list(map(len, answers)), CPU_PREFILL):
            batch = [answers[row] for row in rows]
            lengths = list(map(len, batch))
            ids = torch.tensor([token for answer in batch for token in [prompt[-1], *answer[:-1]]])        # (T,)
            h = llm(llm.wte(ids.to(self.model.device)).to(llm.dtype), Branches(cache.prefix(0), lengths))  # (T, C)
            targets = torch.tensor(sum(batch, []), device=self.model.device)
            losses = F.cross_entropy(llm.lm_head(h).float(), targets, reduction="none")
            scores += [(-part).tolist() for part in losses.split(lengths)]
        return scores

    def start_cache(self, prompts: list[list[int]], images: list[Tensor], slots: int) -> "KVCache":
        """A new cache, filled with the prefixes known from the last call and those that several prompts share."""
        n_patches = self.model.config.vision.n_patches
        digests = {id(pictures): digests_of(pictures) for pictures in images}      # questions often share a tensor
        contents = [content_of(prompt, digests[id(pictures)], n_patches)
                    for prompt, pictures in zip(prompts, images, strict=True)]
        prefixes = self.known_prefixes(contents)
        groups = shared_beginnings(contents, prefixes)
        if groups:
            shared = KVCache(self.model.llm, [content for content, _ in groups], max(len(c) for c, _ in groups))
            beginnings = [prompts[rows[0]][:len(content)] for content, rows in groups]
            prefill(self.model, beginnings, [images[rows[0]] for _, rows in groups], shared)
            for i, (_, rows) in enumerate(groups):
                for row in rows:
                    prefixes[row] = shared.prefix(i)
        self.cache = KVCache(self.model.llm, contents, slots)
        self.cache.restore(prefixes)
        return self.cache

    def known_prefixes(self, contents: "list[Content]") -> "list[Prefix | None]":
        """For each of these, the prefix it has in common with the last call's last prompt and answer.

        Frees that call's cache.
        """
        if self.cache is None:
            return [None] * len(contents)
        last = self.cache.prefix(-1)
        if len(self.cache.contents) > 1:        # a copy, since a view would keep the whole batch in memory
            last = Prefix(last.content, last.k.clone(), last.v.clone())
        self.cache = None
        return [common_prefix(content, last) for content in contents]

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
        column: list[int | None] = []
        for row, token in enumerate(tokens):
            if not finish[row] and token == eos_id:
                finish[row] = "stop"
            if finish[row]:
                column.append(None)
                continue
            column.append(token)
            cache.contents[row].append(token)
            if len(cache.contents[row]) == self.model.config.llm.block_size:
                finish[row] = "context"
            elif is_last:
                finish[row] = "length"
        return column


def prefill(model: LLaVAPhi, prompts: list[list[int]], images: list[Tensor], cache: "KVCache") -> Tensor:
    """Run the uncached tokens of each prompt -> the next token's logits (B, V), fp32.

    A GPU takes all prompts at once. On a CPU one or two images at a time are faster: the activations between layers
    then stay in the processor's cache.
    """
    n_new = [len(prompt) - past for prompt, past in zip(prompts, cache.lengths)]
    parts = split_rows(n_new, CPU_PREFILL) if model.device.type == "cpu" else [range(len(prompts))]
    logits = [prefill_rows(model, prompts, images, cache, rows) for rows in parts]
    cache.set_lengths([len(prompt) for prompt in prompts])
    return torch.cat(logits)                                                       # (B, V)


def prefill_rows(model: LLaVAPhi, prompts: list[list[int]], images: list[Tensor], cache: "KVCache",
                 rows: range) -> Tensor:
    """`prefill` of some of the prompts, packed into one row of tokens."""
    new_ids = []
    new_images = []
    for row in rows:
        past = cache.lengths[row]
        n_cached = prompts[row][:past].count(IMAGE_ID) // model.config.vision.n_patches
        new_ids += prompts[row][past:]
        new_images.append(images[row][n_cached:])
    ids = torch.tensor(new_ids)                                                    # (T,)
    image_positions = (ids == IMAGE_ID).nonzero().flatten()                        # (N * P,)
    seqs = Prefill(cache, rows, [len(prompts[row]) for row in rows], model.config.llm.block_size)
    device = model.device
    x = model.embed(ids.clamp_min(0).to(device), torch.cat(new_images).to(device), image_positions.to(device))
    h = model.llm(x, seqs)                                                         # (T, C)
    return model.llm.lm_head(h[seqs.last]).float()                                 # (B, V)


def decode_step(model: LLaVAPhi, ids: Tensor, cache: "KVCache") -> Tensor:
    """Run one token (B,) of every sequence -> the next token's logits (B, V), fp32. Does not advance the cache."""
    x = model.llm.wte(ids).to(model.llm.dtype)                                     # (B, C)
    h = model.llm(x, Decode(cache))                                                # (B, C)
    return model.llm.lm_head(h).float()


def split_rows(lengths: list[int], enough: int) -> Iterator[range]:
    """Split a batch into ranges of rows, each closed as soon as its lengths add up to `enough`."""
    first = 0
    total = 0
    for row, length in enumerate(lengths):
        total += length
        if total >= enough or row == len(lengths) - 1:
            yield range(first, row + 1)
            first = row + 1
            total = 0

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
        key_dtype = torch.float32 if device.type == "cpu" else llm.dtype           # see Decode.attend_on_cpu
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
        buckets = (needed + self.bucket - 1) // self.bucket
        return min(buckets * self.bucket, self.k.size(3))

    def write(self, layer: int, rows: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (T, nh, hs) of T tokens: token i is at position pos[i] of row rows[i]."""
        self.k[layer][rows, :, pos] = k.type_as(self.k)
        self.v[layer][rows, :, pos] = v

    def set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.pos = torch.tensor(lengths, device=self.pos.device)

    def advance(self) -> None:
        """Count the token of a step. Finished sequences are parked on the last slot, which no live sequence reads."""
        last = self.k.size(3) - 1
        self.lengths = [min(n + 1, last) for n in self.lengths]
        self.pos.add_(1).clamp_(max=last)

    def prefix(self, row: int) -> "Prefix":
        """A row's tokens with their keys and values. These are views, and keep the whole cache in memory."""
        content = self.contents[row][:self.lengths[row]]
        return Prefix(content, self.k[:, row, :, :len(content)], self.v[:, row, :, :len(content)])

    def restore(self, prefixes: "list[Prefix | None]") -> None:
        """Start each row with its known prefix."""
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                n = len(prefix.content)
                self.lengths[row] = n
                self.k[:, row, :, :n] = prefix.k
                self.v[:, row, :, :n] = prefix.v


class Prefill:
    """The uncached tokens of some prompts, packed, and their attention to everything before them."""

    def __init__(self, cache: KVCache, rows: range, lengths: list[int], max_seqlen: int):
        """lengths: of these rows' whole prompts."""
        device = cache.v.device
        self.cache = cache
        self.rows = rows
        self.lengths = lengths
        past = torch.tensor([cache.lengths[row] for row in rows])                  # (B,)
        n_new = torch.tensor(lengths) - past                                       # (B,)
        self.has_past = bool(past.any())
        self.new = Packed(n_new, device, max_seqlen)
        self.pos = self.new.pos + to_device_async(past.repeat_interleave(n_new), device)           # (T,)
        self.seq_ids = to_device_async(torch.tensor(rows).repeat_interleave(n_new), device)        # (T,)
        self.cu_seqlens_k = to_device_async(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), device)
        self.last = self.new.cu_seqlens[1:].long() - 1                             # (B,) the last token of each prompt

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Store k, v, and attend from q to all of each sequence. q, k, v (T, nh, hs) -> (T, nh, hs)."""
        self.cache.write(layer, self.seq_ids, self.pos, k, v)
        if not self.has_past:
            return self.new.attend(q, k, v, layer)
        # Each sequence's past and new keys; the new ones are in the cache by now.
        keys = [self.cache.k[layer, row, :, :n].type_as(q) for row, n in zip(self.rows, self.lengths)]     # (nh, n, hs)
        values = [self.cache.v[layer, row, :, :n] for row, n in zip(self.rows, self.lengths)]
        if self.new.has_varlen(q):
            k = torch.cat(keys, dim=1).transpose(0, 1)                             # (all keys, nh, hs)
            v = torch.cat(values, dim=1).transpose(0, 1)
            return varlen_attention(q, k, v, self.new.cu_seqlens, self.cu_seqlens_k, self.new.max_seqlen)
        out = []
        for q_row, k_row, v_row in zip(q.split(self.new.lengths), keys, values):
            # Query i is at position past + i, so the causal mask is aligned to the lower right corner.
            mask = causal_lower_right(len(q_row), k_row.size(1))
            y = F.scaled_dot_product_attention(as_batch(q_row, len(q_row)), k_row[None], v_row[None], attn_mask=mask)
            out.append(y[0].transpose(0, 1))                                       # (n, nh, hs)
        return torch.cat(out)                                                      # (T, nh, hs)


class Branches:
    """Several continuations of one cached sequence, packed. Each attends to that sequence and to itself."""

    def __init__(self, past: "Prefix", lengths: list[int]):
        self.past = past
        self.pos = Packed(lengths, past.v.device).pos + len(past.content)          # (T,)
        own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()         # (T, T)
        self.mask = F.pad(own, (len(past.content), 0), value=True).to(past.v.device)       # (T, len(past) + T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k = torch.cat([self.past.k[layer].type_as(k), k.transpose(0, 1)], dim=1)   # (nh, len(past) + T, hs)
        v = torch.cat([self.past.v[layer], v.transpose(0, 1)], dim=1)
        y = F.scaled_dot_product_attention(as_batch(q, len(q)), k[None], v[None], attn_mask=self.mask)
        return y[0].transpose(0, 1)


class Decode:
    """One new token of each sequence in the cache, and its attention. Built without host-device traffic."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.pos = cache.pos                                                       # (B,)
        self.used = cache.used
        self.seq_ids = torch.arange(len(cache.pos), device=self.pos.device)        # (B,)
        self.mask = None            # not needed where all sequences are equally long
        if cache.bucket > 1 or min(cache.lengths) < max(cache.lengths):
            unseen = torch.arange(self.used, device=self.pos.device) > self.pos[:, None]           # (B, used)
            # An additive mask, because SDPA would convert a boolean one in every layer.
            mask = torch.zeros(unseen.shape, dtype=cache.k.dtype, device=self.pos.device)
            self.mask = mask.masked_fill(unseen, float("-inf"))[:, None, None]     # (B, 1, 1, used)
        if self.pos.device.type == "cpu":
            # Row numbers of each head's values, where a layer of the cache is one table (B * nh * S, hs).
            _, batch, n_head, slots, _ = cache.v.shape
            starts = torch.arange(0, batch * n_head * slots, slots, dtype=torch.int32)
            self.value_rows = starts[:, None] + torch.arange(self.used, dtype=torch.int32)         # (B * nh, used)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Store k, v, and attend from q to all of each sequence. q, k, v (B, nh, hs) -> (B, nh, hs)."""
        self.cache.write(layer, self.seq_ids, self.pos, k, v)
        q = q.unsqueeze(2)                                                         # (B, nh, 1, hs)
        k = self.cache.k[layer, :, :, :self.used]                                  # (B, nh, used, hs)
        if q.device.type == "cpu":
            return self.attend_on_cpu(q, k, self.cache.v[layer]).squeeze(2)
        v = self.cache.v[layer, :, :, :self.used]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).squeeze(2)

    def attend_on_cpu(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention for a single query; torch's fused CPU kernel is built for many.

        A plain matmul and a weighted sum of rows are two and a half times as fast, in bf16 with 700 keys. embedding_bag
        is the kernel for such sums, and takes less than half the time of a matmul. The scores stay in fp32, as in the
        fused kernels; that is why the cache holds fp32 keys on a CPU.
        """
        scores = q.float() @ k.transpose(2, 3) * q.size(-1) ** -0.5                # (B, nh, 1, used)
        if self.mask is not None:
            scores += self.mask
        probs = scores.softmax(-1).type_as(v).flatten(0, 2)                        # (B * nh, used)
        values = v.flatten(0, 2)                                                   # (B * nh * S, hs)
        y = F.embedding_bag(self.value_rows, values, per_sample_weights=probs, mode="sum")         # (B * nh, hs)
        return y.view_as(q)                                                        # (B, nh, 1, hs)


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


def digests_of(images: Tensor) -> list[bytes]:
    """A key for each image: equal pixels give equal keys, whatever tensor they are in."""
    return [hashlib.sha256(image.cpu().contiguous().numpy()).digest() for image in images]


def content_of(prompt: list[int], digests: list[bytes], n_patches: int) -> Content:
    """The prompt, with its images' digests at their patch positions."""
    content: Content = list(prompt)
    patches = [i for i, token in enumerate(prompt) if token == IMAGE_ID]
    assert len(patches) == len(digests) * n_patches, \
        f"{len(patches)} image positions for {len(digests)} images of {n_patches} patches"
    for i, position in enumerate(patches):
        content[position] = digests[i // n_patches]
    return content


class Prefix(NamedTuple):           # the beginning of a sequence, with its keys and values
    content: Content
    k: Tensor                       # (n_layer, nh, len(content), hs)
    v: Tensor


def common_prefix(content: Content, known: Prefix) -> Prefix | None:
    """The longest common prefix that leaves at least one token of `content` to run, for its logits."""
    n = 0
    while n < min(len(content) - 1, len(known.content)) and content[n] == known.content[n]:
        n += 1
    while n > 0 and isinstance(content[n], bytes) and content[n - 1] == content[n]:
        n -= 1                      # an image is reused whole or not at all
    return Prefix(known.content[:n], known.k[:, :, :n], known.v[:, :, :n]) if n else None


def shared_beginnings(contents: list[Content], prefixes: list[Prefix | None]) -> list[tuple[Content, list[int]]]:
    """Groups of prompts that agree up to the end of their last image, as (beginning, rows).

    Only where that is longer than the prefix they already have.
    """
    groups: dict[tuple, list[int]] = {}
    for row, (content, prefix) in enumerate(zip(contents, prefixes)):
        end = max((i + 1 for i, item in enumerate(content) if isinstance(item, bytes)), default=0)
        known = len(prefix.content) if prefix else 0
        if known < end < len(content):
            groups.setdefault(tuple(content[:end]), []).append(row)
    return [(list(beginning), rows) for beginning, rows in groups.items() if len(rows) > 1]
