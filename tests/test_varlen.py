"""Attention as GPUs compute it, held against the loop that every other machine runs. All of it on a CPU.

PyTorch implements the operators under `varlen_attn` for CUDA alone. This file gives them a plain implementation for
CPUs, with the checks that the kernels make. So everything above the kernel is the real thing: varlen_attn's signature
in the installed release, its autograd formula, the shapes it promises torch.compile, and our call of it.
"""
import copy
import random

import pytest
import torch
from helpers import TINY_MODEL, draw_image, draw_prompt, draw_samples, draw_words, fast_answers, random_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.varlen import varlen_attn

import train
from data import Step, collate
from lib.generate import Session
from lib.recipes import parse
from load_weights import load_model
from model import LLaVAConfig, LLaVAPhi, Packed, Phi, PhiConfig, init_weights
from vision import VisionConfig

# ---------------------------------------------------------------------------------------------------
# The kernels, in plain torch


def spans(cumulative: Tensor) -> list[tuple[int, int]]:
    """Cumulative lengths (B + 1,) -> first and last row of each sequence."""
    edges = cumulative.tolist()
    return list(zip(edges[:-1], edges[1:]))


def seen(n_queries: int, n_keys: int, left: int, right: int) -> Tensor:
    """Which keys a query may look at -> bool (n_queries, n_keys). The last query stands at the last key.

    left, right: how far it looks to either side of its own place; -1 is without limit.
    """
    own = torch.arange(n_queries)[:, None] + n_keys - n_queries
    key = torch.arange(n_keys)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if left >= 0:
        allowed &= key >= own - left
    if right >= 0:
        allowed &= key <= own + right
    return allowed


def check_as_the_kernel_does(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int) -> None:
    """What flash_api.cpp refuses, and what it silently computes wrong. fp32, which it refuses too, is let through."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and starts_q.is_contiguous() and starts_k.is_contiguous()
    assert len(starts_q) == len(starts_k) > 1, "batch size must be positive"
    assert q.size(-1) % 8 == 0 and q.size(-1) <= 256, "head_size must be a multiple of 8, 256 at most"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension must be contiguous"
    assert q.dtype == k.dtype == v.dtype
    for starts, x in ((starts_q, q), (starts_k, k)):
        lengths = starts.diff()
        assert starts[0] == 0 and starts[-1] == len(x) and bool((lengths >= 0).all())
    assert int(starts_q.diff().max()) <= max_q, "rows behind max_q get no thread: their output would be garbage"


def scores(q: Tensor, k: Tensor, scale: float | None, left: int, right: int) -> Tensor:
    """One sequence's masked attention scores in fp32 (nh, n_queries, n_keys)."""
    products = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.size(-1) ** -0.5)
    return products.masked_fill(~seen(len(q), len(k), left, right), float("-inf"))


def flash_forward(q, k, v, starts_q, starts_k, max_q, max_k, dropout, is_causal, return_debug_mask, *, scale=None,
                  window_size_left=None, window_size_right=None, **unused):
    """aten::_flash_attention_forward: q, k, v (T, nh, hs) -> out (T, nh, hs), log-sum-exp (nh, T), three leftovers."""
    check_as_the_kernel_does(q, k, v, starts_q, starts_k, max_q)
    assert dropout == 0 and not any(value is not None for value in unused.values())
    right = 0 if is_causal else window_size_right
    out = torch.empty_like(q)
    lse = torch.empty(q.size(1), len(q))
    for (q0, q1), (k0, k1) in zip(spans(starts_q), spans(starts_k)):
        s = scores(q[q0:q1], k[k0:k1], scale, window_size_left, right)             # (nh, n_queries, n_keys)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[k0:k1].float()).type_as(q)
        lse[:, q0:q1] = s.logsumexp(-1)
    nothing = torch.empty(0)
    return out, lse, torch.empty(2, dtype=torch.uint64), nothing, nothing


def flash_backward(grad, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, dropout, is_causal, rng_state, unused, *,
                   scale=None, window_size_left=None, window_size_right=None):
    """aten::_flash_attention_backward: the weights again from the log-sum-exp, then the three gradients."""
    check_as_the_kernel_does(q, k, v, starts_q, starts_k, max_q)
    assert grad.stride(-1) == out.stride(-1) == 1
    right = 0 if is_causal else window_size_right
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for (q0, q1), (k0, k1) in zip(spans(starts_q), spans(starts_k)):
        s = scores(q[q0:q1], k[k0:k1], scale, window_size_left, right)
        weights = (s - lse[:, q0:q1, None]).exp()                                  # (nh, n_queries, n_keys)
        g = grad[q0:q1].float()
        grad_weights = torch.einsum("qhd,khd->hqk", g, v[k0:k1].float())
        mean = (g * out[q0:q1].float()).sum(-1).t()[:, :, None]                    # (nh, n_queries, 1)
        grad_scores = weights * (grad_weights - mean) * (scale or q.size(-1) ** -0.5)
        grad_q[q0:q1] = torch.einsum("hqk,khd->qhd", grad_scores, k[k0:k1].float()).type_as(q)
        grad_k[k0:k1] = torch.einsum("hqk,qhd->khd", grad_scores, q[q0:q1].float()).type_as(k)
        grad_v[k0:k1] = torch.einsum("hqk,qhd->khd", weights, g).type_as(v)
    return grad_q, grad_k, grad_v


CPU = torch.device("cpu")
CPU_KERNELS = torch.library.Library("aten", "IMPL", "CPU")      # must outlive the tests: they go when it goes
CPU_KERNELS.impl("_flash_attention_forward", flash_forward)
CPU_KERNELS.impl("_flash_attention_backward", flash_backward)

# ---------------------------------------------------------------------------------------------------
# varlen_attn against attention one sequence at a time

NH, HS = 2, 80                      # Phi-2's head size is what the real kernel has to pad
LENGTHS = {
    "one token": [1],
    "one long sequence": [2048],
    "both ends": [1, 2048],
    "a picture and words": [597, 1, 620, 33],
    "64 sequences": [1 + 37 * i % 128 for i in range(64)],
    "alike": [40] * 8,
}


def draw_qkv(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), NH, HS, generator=g)
    k, v = (torch.randn(sum(lengths_k), NH, HS, generator=g) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], window: tuple) -> Tensor:
    """The oracle: every sequence by itself, with its mask written out."""
    rows = []
    for parts in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        q_, k_, v_ = (x.transpose(0, 1) for x in parts)                            # (nh, n, hs)
        mask = seen(q_.size(1), k_.size(1), *window)
        y = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask)
        rows.append(y.transpose(0, 1))
    return torch.cat(rows)


def values_and_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """An output, and its gradients for a fixed random direction."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).type_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (7, 0)])
@pytest.mark.parametrize("lengths_q, lengths_k", [([5, 1, 9], [5, 1, 9]), ([3, 1, 4], [30, 12, 4])])
def test_the_stand_in_for_the_kernel_computes_attention(lengths_q, lengths_k, window):
    """Also where a sequence has more keys than queries: the mask is then aligned at the end, as for a cached prefix."""
    inputs = draw_qkv(lengths_q, lengths_k)
    starts_q, starts_k = cumulative(lengths_q), cumulative(lengths_k)
    out = varlen_attn(*inputs, starts_q, starts_k, 16, 32, window_size=window)
    expected = one_by_one(*inputs, lengths_q, lengths_k, window)
    for a, b in zip(values_and_gradients(out, inputs), values_and_gradients(expected, inputs)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_stand_in_refuses_what_the_kernel_refuses():
    """The mistakes that only a GPU would report, or that it would not even report."""
    q, k, v = draw_qkv([4, 4], [4, 4])
    starts = cumulative([4, 4])
    for message, arguments in {
        "int32": (q, k, v, starts.long(), starts.long(), 16, 16),
        "batch size": (q[:0], k[:0], v[:0], starts[:1], starts[:1], 16, 16),
        "multiple of 8": (q[..., :20], k[..., :20], v[..., :20], starts, starts, 16, 16),
        "garbage": (q, k, v, starts, starts, 3, 3),
    }.items():
        with pytest.raises((AssertionError, RuntimeError)) as e:
            varlen_attn(*arguments, window_size=(-1, 0))
        assert message in str(e.value) or message == "int32"

# ---------------------------------------------------------------------------------------------------
# Packed.attend: the branch for GPUs against the loop


@pytest.fixture
def on_gpu_kernel(monkeypatch):
    """From here on, attention chooses as it does on a GPU in bf16."""
    def switch() -> None:
        monkeypatch.setattr(Packed, "has_varlen", lambda self, q: q.size(-1) % 8 == 0 and len(q) > 0)
    return switch


@pytest.mark.parametrize("name", LENGTHS)
def test_attend_equals_the_loop(name, on_gpu_kernel):
    """Values and gradients, at head size 80, from the strides that a block really passes."""
    lengths = LENGTHS[name]
    qkv = draw_qkv(lengths, lengths)
    packed = torch.stack(qkv, dim=1).detach().requires_grad_()                     # (T, 3, nh, hs), as after the Linear
    seqs = Packed(lengths, CPU)
    expected = values_and_gradients(seqs.attend(*packed.unbind(1), layer=0), [packed])
    on_gpu_kernel()
    got = values_and_gradients(seqs.attend(*packed.unbind(1), layer=0), [packed])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_process_without_a_sample_computes_nothing(on_gpu_kernel):
    """The kernel refuses an empty batch, and the process must take part in the step all the same."""
    on_gpu_kernel()
    empty = torch.zeros(0, 3, NH, HS, requires_grad=True)
    out = Packed([], CPU).attend(*empty.unbind(1), layer=0)
    out.sum().backward()
    assert out.shape == (0, NH, HS) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("dtype, channels, expected", [(torch.bfloat16, 80, True), (torch.float32, 80, False),
                                                       (torch.bfloat16, 20, False)])
def test_the_kernel_is_chosen_only_for_what_it_can_take(dtype, channels, expected):
    seqs = Packed([3], CPU)
    q = torch.zeros(3, 2, channels, dtype=dtype)
    assert not seqs.has_varlen(q)             # not on a CPU, whatever it is
    seqs.on_ampere = True
    assert seqs.has_varlen(q) == expected
    assert not seqs.has_varlen(q[:0])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_trace_serves_all_lengths(recompute, on_gpu_kernel):
    """As --compile does it: a block with the kernel in it is traced whole, and once for all layers and lengths.

    aot_eager traces forward and backward and checks them against the kernel's shape functions, without a C++ compiler.
    """
    on_gpu_kernel()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    llm = Phi(PhiConfig(vocab_size=64, n_layer=2, n_head=NH, n_embd=NH * HS, n_inner=64)).train()
    init_weights(llm, torch.Generator().manual_seed(0))
    plain = copy.deepcopy(llm)
    llm.recompute = recompute
    for block in llm.h:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=counter)
    traces = []
    for lengths in ([5, 3], [4, 4, 9, 2], [17], [64] * 3):
        grads = []
        for net in (llm, plain):
            torch.manual_seed(0)
            x = torch.ones(sum(lengths), NH * HS).cumsum(0).sin().requires_grad_()
            net(x, Packed(lengths, CPU)).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
        traces.append(counter.frame_count)
    assert traces[-1] == traces[0], f"traced again for other lengths: {traces}"

# ---------------------------------------------------------------------------------------------------
# The whole model on the GPU's kernel


WIDE = LLaVAConfig(         # heads of 80 channels as in Phi-2, everything else as small as it can be
    llm=PhiConfig(vocab_size=97, block_size=256, n_layer=2, n_head=NH, n_embd=NH * HS, n_inner=96, rotary_dim=32,
                  dropout=0.0),
    vision=VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=32, n_inner=64),
)


@pytest.fixture(scope="module")
def wide() -> LLaVAPhi:
    return random_model(WIDE, 8)


def one_step(model: LLaVAPhi) -> tuple[float, float, list[Tensor]]:
    """A step of train.py with two micro-batches, one of them of several samples -> loss, gradient norm, new weights."""
    model = copy.deepcopy(model).train()
    batches = [collate(draw_samples()[:3], 28), collate(draw_samples()[3:], 28)]
    # The bias of the keys has no gradient but rounding, which AdamW would blow up to full steps with its usual eps.
    cfg = parse(["--stage", "finetune", "--dtype", "float32", "--lr", "1e-3", "--eps", "1e-3"])
    mesh, device = train.setup()
    try:
        train.shard(model, mesh, torch.float32)
        optimizer = train.make_optimizer(model, cfg)
        supervised = sum(len(batch.targets) for batch in batches)
        loss, norm, _ = train.train_step(model, optimizer, Step(0, [0, 1], batches), cfg, supervised, 1.0, device)
    finally:
        train.dist.destroy_process_group()
    return loss, norm, [p.detach() for p in model.parameters()]


def test_a_training_step_equals_the_loops(wide, on_gpu_kernel):
    loss, norm, weights = one_step(wide)
    on_gpu_kernel()
    loss_, norm_, weights_ = one_step(wide)
    assert loss_ == pytest.approx(loss, rel=1e-6) and norm_ == pytest.approx(norm, rel=1e-5)
    for a, b in zip(weights_, weights):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_bfloat16_is_as_close_to_fp32_as_the_loop_is(wide, on_gpu_kernel):
    """Neither of the two rounds worse than the other: flash attention keeps its sums in fp32."""
    batch = collate(draw_samples(), 28)
    inputs = batch.ids, batch.lengths, batch.images, batch.image_positions, batch.loss_positions, batch.targets
    rounded = copy.deepcopy(wide).bfloat16()
    with torch.no_grad():
        exact, loop = wide(*inputs), rounded(*inputs)
        on_gpu_kernel()
        kernel = rounded(*inputs)
    assert abs(kernel - exact) < 2 * abs(loop - exact) + 0.01 * exact


def test_answers_through_the_cache_equal_the_loops(wide, on_gpu_kernel):
    """Ragged prompts, some about one picture, then the same again with a beginning that is remembered."""
    rng = random.Random(1)
    head, images = draw_prompt(rng, 1)
    batch = [draw_prompt(rng, n) for n in (0, 2, 1)] + [(head + draw_words(rng, n), images) for n in (3, 40, 1)]
    prompts, pictures = map(list, zip(*batch))

    def ask() -> list:
        session = Session(wide)
        first = fast_answers(session, prompts, pictures, 6)
        return first + fast_answers(session, [prompts[-1] + [5, 6, 7]], [pictures[-1]], 6)
    expected = ask()
    on_gpu_kernel()
    assert ask() == expected
    assert len({tuple(answer) for answer in expected}) > 3


def test_the_published_tiny_model_keeps_its_loop(on_gpu_kernel):
    """Its heads have 20 channels, which the kernel refuses in any dtype."""
    on_gpu_kernel()
    tiny = load_model(TINY_MODEL)
    assert fast_answers(tiny, [[3, 4, 5]], [draw_image(random.Random(0))[:0]], 3)
