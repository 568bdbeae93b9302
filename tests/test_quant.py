"""Prepacked, 8-bit and 4-bit weights against the plain ones: errors of a layer and of a model, and memory."""
import copy
import os
import random
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from helpers import ROOT, TINY_MODEL, all_logits, draw_prompt, draw_words, expanded, fast_answers, to_uint8

import eval as ev
import load_weights
import sample
from lib import quant
from lib.lora import Int4LoRALinear
from lib.quant import (Int4Linear, Int8Embedding, Int8Linear, PrepackedLinear, check_int4_product, copy_or_quantize,
                       group_size, has_int8_product, int4_to_int8, int8_times_int8, prepack_linears, prepacking_pays,
                       quantize_groups, quantize_linears, quantize_rows, widen_on_cpu, widen_on_gpu)
from load_weights import load_model
from model import LLaVAConfig, LLaVAPhi, PhiConfig, init_weights
from vision import VisionConfig


@pytest.mark.parametrize("script", [sample, ev])
def test_8_bits_promise_memory_and_not_time_on_a_gpu(script, capsys):
    """There the weights are widened before they are multiplied, so more bytes are moved than bf16's."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    assert "8 bits save memory but no time" in " ".join(capsys.readouterr().out.split())

# ---------------------------------------------------------------------------------------------------
# Prepacked weights

needs_prepacking = pytest.mark.skipif(not prepacking_pays(torch.float32), reason="prepacking wants AVX-512")


def count_of(kind: type, model: torch.nn.Module) -> int:
    return sum(type(module) is kind for module in model.modules())


@needs_prepacking
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("n_in, n_out", [(512, 512), (2560, 1024), (100, 4000)])
def test_prepacked_products_are_the_plain_ones(dtype, bound, n_in, n_out):
    """For no row, one, a few (which are padded) and many; bf16 may round the same sum to a neighbor."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out, dtype=dtype).requires_grad_(False)
    prepacked = PrepackedLinear(base)
    for rows in (0, 1, 2, 5, 6, 7, 200):
        x = torch.randn(rows, n_in, dtype=dtype)
        torch.testing.assert_close(prepacked(x), base(x), atol=bound, rtol=bound)
    x = torch.randn(2, 3, n_in, dtype=dtype)
    torch.testing.assert_close(prepacked(x), base(x), atol=bound, rtol=bound)
    assert torch.equal(prepacked.weight.to_dense(), base.weight)                   # for whoever reads weights


@needs_prepacking
def test_a_prepacked_model_says_the_same(tiny_model, golden):
    """Its logits are the original code's, and a batch changes no answer, as with plain weights."""
    row, images = expanded(golden["llava.input_ids"][0].tolist()), to_uint8(golden["llava.pixel_values"])
    prepacked = copy.deepcopy(tiny_model)
    prepack_linears(prepacked, min_size=1)
    assert count_of(PrepackedLinear, prepacked) == 2 * 4 + 1 + 2 + 2 * 4           # decoder, head, projector, tower
    torch.testing.assert_close(all_logits(prepacked, [row], images), golden["llava.logits"][0], atol=1e-5, rtol=1e-5)
    rng = random.Random(0)
    prompts, pictures = zip(*[draw_prompt(rng, n % 3) for n in range(9)])
    together = fast_answers(prepacked, list(prompts), list(pictures), 8)
    assert together == [fast_answers(prepacked, [prompt], [images], 8)[0] for prompt, images in zip(prompts, pictures)]
    assert together == fast_answers(tiny_model, list(prompts), list(pictures), 8)


@needs_prepacking
def test_prepacking_frees_each_weight_before_the_next(monkeypatch):
    """A model that just fits into memory must not need it twice."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
                                  for _ in range(4)]).requires_grad_(False)
    plain = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    alive = []

    def count_and_prepack(base: torch.nn.Linear) -> PrepackedLinear:
        alive.append(sum(weight() is not None for weight in plain))
        return PrepackedLinear(base)
    monkeypatch.setattr(quant, "PrepackedLinear", count_and_prepack)
    prepack_linears(model)
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]


def test_small_and_quantized_layers_stay_as_they_are(tiny_model):
    """Small ones would become slower; and nothing is prepacked where it would not pay."""
    model = copy.deepcopy(tiny_model)
    prepack_linears(model)
    assert count_of(PrepackedLinear, model) == 0
    quantize_linears(model, 8)
    prepack_linears(model, min_size=1)
    assert count_of(PrepackedLinear, model) == 0


def test_nothing_is_prepacked_where_that_does_not_pay(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = copy.deepcopy(tiny_model)
    prepack_linears(model, min_size=1)
    assert count_of(PrepackedLinear, model) == 0


@needs_prepacking
def test_load_model_prepacks(monkeypatch):
    """Its callers need not know: the model is ready to answer. (The tiny one's layers are too small by themselves.)"""
    monkeypatch.setattr(load_weights, "prepack_linears", partial(prepack_linears, min_size=1))
    assert count_of(PrepackedLinear, load_model(TINY_MODEL)) == 2 * 4 + 1 + 2 + 2 * 4

# ---------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("n_in, n_out", [(2560, 7680), (10240, 2560), (1024, 4096)])
def test_int8_error_of_a_linear_at_full_size(n_in, n_out):
    """1.3 % on even activations; channels 20 times as large as the others cost the rest of a token's channels bits."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out)
    torch.nn.init.normal_(base.weight, std=0.02)
    layer = Int8Linear(base)
    x = torch.randn(8, n_in)
    outliers = x.clone()
    outliers[:, ::200] *= 20
    with torch.no_grad():
        for rows, bound in ((x, 0.015), (outliers, 0.075), (x[:1], 0.015), (x.bfloat16().float() * 1e4, 0.015)):
            expected = base(rows)
            assert (layer(rows) - expected).norm() / expected.norm() < bound
        assert layer(torch.zeros(2, n_in)).equal(base.bias.expand(2, -1))          # no division by a scale of zero
        assert layer(x.view(2, 4, n_in)).shape == (2, 4, n_out) and layer(x[:0]).shape == (0, n_out)


needs_vnni = pytest.mark.skipif(not has_int8_product(), reason="products in integers want AVX-512 and VNNI")


def int8_weights(n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, scales and biases of a layer, the largest and the smallest weight among them."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (n_out, n_in)).to(torch.int8)
    weight[0], weight[1] = 127, -127
    return weight, torch.rand(n_out) / 1000, torch.randn(n_out)


@pytest.mark.parametrize("product, bound", [(widen_on_cpu, 0.005), (widen_on_gpu, 1e-5),
                                            pytest.param(int8_times_int8, 0.01, marks=needs_vnni)])
@pytest.mark.parametrize("n", [1, 40])
def test_each_int8_product_is_the_plain_one_with_the_same_weights(product, bound, n):
    """Whichever the machine gets. The first rounds a few rows of tokens to bf16, the last all of them to 8 bits."""
    weight, scale, bias = int8_weights(1100, 512)
    x = torch.randn(n, 512)
    expected = x @ (weight.float() * scale[:, None]).t() + bias
    if product is int8_times_int8:
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
    got = product(x, weight, scale, bias)
    assert (got - expected).norm() / expected.norm() < bound
    assert product(x.bfloat16(), weight, scale, bias.bfloat16()).dtype == torch.bfloat16


@needs_vnni
@pytest.mark.parametrize("n_in, n_out", [(512, 1100), (40, 97), (33, 5), (4304, 64)])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 200])
def test_onednns_int8_product_is_exact(n_in, n_out, n):
    """Its sums are the integers' own, at the largest magnitudes as well: nothing but tokens and weights is rounded.
    The shift of tokens into unsigned bytes leaves no trace."""
    weight, scale, bias = int8_weights(n_out, n_in)
    x = torch.randn(n, n_in)
    x[1:3] = torch.tensor([[1.0], [-1.0]])[:len(x[1:3])]        # whole rows of 127 and of -127
    q, x_scale = quantize_rows(x)
    expected = (q.double() @ weight.double().t()) * x_scale * scale + bias
    got = int8_times_int8(x, torch.ops.onednn.qlinear_prepack(weight, None), scale, bias)
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("has_product", [pytest.param(True, marks=needs_vnni), False])
def test_an_8_bit_layer_gets_the_product_of_its_processor(has_product, monkeypatch):
    """Once, when it is quantized; prepacked weights can be read back."""
    monkeypatch.setattr(quant, "has_int8_product", lambda: has_product)
    layer = Int8Linear(phi_like(64, 128))
    assert layer.product is (int8_times_int8 if has_product else widen_on_cpu)
    assert layer.weight.is_mkldnn == has_product
    assert torch.equal(stored(layer.weight), quantize_rows(phi_like(64, 128).weight)[0])


def stored(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of a quantized model; one that oneDNN has prepacked, as it was before."""
    return weight.to_dense().t() if weight.is_mkldnn else weight


def test_an_int8_model_says_nearly_the_same(tiny_model, golden):
    """Streamed into int8 from the folder, or turned into it in memory: one and the same, and close to fp32."""
    row, images = expanded(golden["llava.input_ids"][0].tolist()), to_uint8(golden["llava.pixel_values"])
    streamed, turned = load_model(TINY_MODEL, bits=8), copy.deepcopy(tiny_model)
    quantize_linears(turned, 8)
    assert count_of(Int8Linear, turned) == 2 * 4 + 1 + 2 + 2 * 4                   # decoder, head, projector, tower
    for a, b in zip(streamed.state_dict().values(), turned.state_dict().values()):
        assert torch.equal(stored(a), stored(b))
    logits = all_logits(streamed, [row], images)
    expected = golden["llava.logits"][0]
    assert (logits - expected).norm() / expected.norm() < 0.03
    agreement = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.8
    fast_ids = fast_answers(streamed, [row, row[:20]], [images, images[:0]], 4)
    assert len(fast_ids[0]) == 4

# ---------------------------------------------------------------------------------------------------
# 4 bits

HAS_INT4 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_int4 = pytest.mark.skipif(not HAS_INT4, reason="torch's 4-bit product for CPUs wants AVX2 or AVX-512")
EVEN = LLaVAConfig(                 # with widths that groups divide: 64 into one of 64, 160 into 32s
    llm=PhiConfig(vocab_size=97, block_size=512, n_layer=2, n_head=2, n_embd=64, n_inner=160, rotary_dim=8),
    vision=VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=32, n_inner=64),
)


def phi_like(n_in: int, n_out: int) -> torch.nn.Linear:
    """A Linear with weights as small as Phi-2's."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out).requires_grad_(False)
    torch.nn.init.normal_(base.weight, std=0.02)
    return base


def rounded_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """The weights that a layer in 4 bits stands for. (n, K)"""
    group = group_size(weight.size(1))
    q, scales = quantize_groups(weight, group)
    scale, zero = scales.float().transpose(0, 1).unbind(-1)                        # (n, K / group)
    return ((q.unflatten(1, (-1, group)) - 8.0) * scale[..., None] + zero[..., None]).flatten(1)


@needs_int4
@pytest.mark.parametrize("n_in, n_out", [(160, 97), (64, 64), (2560, 1024), (320, 1100)])
def test_a_4_bit_layer_multiplies_the_weights_that_it_stands_for(n_in, n_out):
    """One row and a few, through torch's product, which rounds to bf16 (0.4 %). Many, where the CPU has integer
    products, through weights and tokens in 8 bits: about 1 %. Widths that fill a tile and widths that do not."""
    base = phi_like(n_in, n_out)
    layer = Int4Linear(base)
    weight = rounded_to_int4(base.weight)
    x = torch.randn(192, n_in)
    for rows, bound in ((x[:1], 0.006), (x[:5], 0.006), (x, 0.02)):
        expected = rows @ weight.t() + base.bias
        error = (layer(rows) - expected).norm() / expected.norm()
        assert error < bound, f"{len(rows)} rows: {error:.1e}"
    assert layer(x.view(2, -1, n_in)).shape == (2, 192 // 2, n_out) and layer(x[:0]).shape == (0, n_out)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@needs_vnni
@pytest.mark.parametrize("n_in, n_out", [(160, 128), (2560, 256)])
def test_4_bits_become_8_without_losing_more_than_a_rounding(n_in, n_out):
    """In 16-bit integers, against the weights in fp32: half a step of 8 bits, and what a and b themselves round off."""
    for spread in (1.0, 1e-6, 0.0):
        base = torch.nn.Linear(n_in, n_out).requires_grad_(False)
        base.weight.copy_(torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * spread)
        base.weight[0, 0] = 30 * spread                     # an outlier takes most of its channel's 8 bits
        exact = rounded_to_int4(base.weight)
        layer = Int4Linear(base)
        weight, scale = int4_to_int8(layer.weight, layer.group_scales)
        assert weight.dtype == torch.int8 and int(weight.min()) >= -127
        assert ((weight.float() * scale[:, None] - exact).abs() <= 0.57 * scale[:, None]).all()


def test_fitting_the_scales_beats_rounding():
    """Rounding between a group's smallest and largest weight costs 9.0 % of even weights; fitting takes 6 % off."""
    torch.manual_seed(0)
    weight = torch.randn(256, 640) * 0.02
    groups = weight.view(256, 10, 64)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    rounded = ((groups - low) / step).round() * step + low
    errors = [(w.view_as(weight) - weight).norm() / weight.norm() for w in (rounded, rounded_to_int4(weight))]
    assert errors[1] < 0.95 * errors[0] < 0.09
    assert int(quantize_groups(weight, 64)[0].max()) <= 15
    flat = torch.full((64, 64), 0.25)                       # a spread of nothing
    assert torch.equal(rounded_to_int4(flat), flat)


@needs_int4
def test_int4_error_of_a_linear():
    """About 8.6 % on even weights; 8 bits cost 1.3 %."""
    base = phi_like(2560, 1024)
    x = torch.randn(8, 2560)
    error = (Int4Linear(base)(x) - base(x)).norm() / base(x).norm()
    assert 0.05 < error < 0.092


@needs_int4
def test_an_int4_model():
    """Filled tensor by tensor, or turned into 4 bits in memory: the same; and not far from fp32."""
    model = LLaVAPhi(EVEN).eval().requires_grad_(False)
    init_weights(model, torch.Generator().manual_seed(1))
    for p in model.parameters():
        p.mul_(8 if p.dim() > 1 else 1)
    turned = copy.deepcopy(model)
    quantize_linears(turned, 4)
    assert count_of(Int4Linear, turned.llm) == 2 * 4 + 1 and count_of(Int8Embedding, turned.llm) == 1
    assert count_of(Int8Linear, turned) == 2 + 2 * 4                               # projector, tower
    with torch.device("meta"):
        streamed = LLaVAPhi(EVEN).eval()
        quantize_linears(streamed, 4)
    streamed.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in model.named_parameters():
        copy_or_quantize(streamed, name, parameter, torch.Tensor.copy_)
    for (name, a), b in zip(streamed.state_dict().items(), turned.state_dict().values()):
        assert torch.equal(stored(a), stored(b)), name
    prompt, images = draw_prompt(random.Random(0), 1)
    row = prompt + draw_words(random.Random(1), 192)                               # long enough to be widened to 8 bits
    for ids in (prompt, row):
        error = all_logits(turned, [ids], images) - all_logits(model, [ids], images)
        assert error.norm() / all_logits(model, [ids], images).norm() < 0.2
    assert len(fast_answers(turned, [prompt, row], [images, images], 4)) == 2


def test_int4_refuses_in_words(monkeypatch):
    with pytest.raises(ValueError, match="40 wide, no multiple of a group of 32 .* take more bits"):
        load_model(TINY_MODEL, bits=4)
    with pytest.raises(ValueError, match="take more bits"):             # train.py --base-bits has no 8
        Int4LoRALinear(torch.nn.Linear(40, 64), r=4, alpha=8)
    with pytest.raises(ValueError, match="4 bits need a CPU with AVX2 or .* take 8 bits"):
        check_int4_product(torch.device("mps"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="4 bits need a CPU with AVX2"):
        load_model(TINY_MODEL, bits=4)

# ---------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("bits, size", [(8, 3.6e9), (4, 2.1e9)])
def test_the_published_model_becomes_small(bits, size):
    with torch.device("meta"):
        model = LLaVAPhi(LLaVAConfig())
        quantize_linears(model, bits)
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) < size


@pytest.mark.parametrize("limit", [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_less_than_the_processor_has_is_enough(limit):
    """oneDNN kept from AVX-512: bf16 cannot be prepacked, and sums of its int8 products saturate without a warning.
    torch kept from it: 4-bit weights lie in other tiles. A process each, since both are read when torch starts."""
    code = """if True:
        import torch
        from lib.quant import Int4Linear, Int8Linear, prepack_linears
        prepack_linears(torch.nn.Sequential(torch.nn.Linear(512, 512, dtype=torch.bfloat16)))
        torch.manual_seed(0)
        base = torch.nn.Linear(512, 512).requires_grad_(False)
        base.weight.copy_(torch.randint(0, 16, (512, 512)) * torch.rand(512, 1))       # 4 bits can hold these
        for kind in (Int8Linear, Int4Linear):
            for n in (1, 40, 200):
                x = torch.rand(n, 512)
                error = (kind(base)(x) - base(x)).norm() / base(x).norm()
                assert error < 0.02, (kind, n, error)
        print("right")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | limit)
    assert done.stdout == "right\n", done.stderr
