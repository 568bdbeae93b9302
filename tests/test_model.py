"""Golden numbers of the original; and every fast path against the slow one it replaces.

Golden: tests/golden/, computed by the original code on tiny random weights. Oracles: the cache against no cache,
a batch against one by one, a shared prefix against none, the chunked loss against the whole, int8 against fp32.
"""
import copy
import json
import math
import random
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_vision import to_uint8

import data
from lib import quant
import model as model_file
from lib.lora import LoRALinear
from lib.quant import (Int4Linear, Int8Linear, PackedLinear, check_int4_product, copy_weight, group_of, pack_int4,
                       pack_linears, packing_pays, quantize_groups, quantize_linears, unpack_int4, unpack_to_int8)
from load_weights import load_model
from model import (IMAGE_ID, DecodeLayout, KVCache, Layout, LLaVAConfig, LLaVAPhi, PhiConfig, attend_from_one,
                   cross_entropy_sum, init_weights, pick)
from vision import VisionConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = LLaVAConfig(
    llm=PhiConfig(vocab_size=97, block_size=64, n_layer=3, n_head=3, n_embd=48, n_inner=80, rotary_dim=8, dropout=0.0),
    vision=VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=32, n_inner=64),
)
P = TINY.vision.n_patches
NONE = torch.zeros(0, 3, 28, 28, dtype=torch.uint8)
EOS = 0


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def original():
    return load_model(GOLDEN / "tiny-llava-phi").requires_grad_()


@pytest.fixture(scope="module")
def tiny():
    """Weights twenty times larger than fresh ones: answers that vary, and end at different lengths."""
    model = LLaVAPhi(TINY).eval()
    init_weights(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.dim() > 1 else 1)
        model.llm.lm_head.bias[EOS] = 6
    return model


def pack(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expanded prompts -> packed ids with 0 under the patches, lengths, slots."""
    ids = torch.tensor([i for row in rows for i in row])
    return ids.clamp_min(0), torch.tensor([len(row) for row in rows]), (ids == IMAGE_ID).nonzero().flatten()


def expanded(ids: list[int], n_patches: int = P) -> list[int]:
    return [i for j in ids for i in ([j] * n_patches if j == IMAGE_ID else [j])]


def all_logits(model: LLaVAPhi, rows: list[list[int]], images: torch.Tensor) -> torch.Tensor:
    """The plain forward: no cache. (T, V)"""
    ids, lengths, slots = pack(rows)
    with torch.no_grad():
        return model.llm.lm_head(model.llm(model.embed(ids, images, slots), Layout(lengths, ids.device)))


def slow_greedy(model: LLaVAPhi, prompt: list[int], images: torch.Tensor, n: int) -> list[int]:
    """The oracle of all generation: one prompt, no cache, everything computed anew for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + n, model.config.llm.block_size):
        token = int(all_logits(model, [ids], images)[-1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt):]


def fast(model: LLaVAPhi, prompts: list[list[int]], images: list[torch.Tensor], n: int, **options) -> list[list[int]]:
    columns = list(model.generate(prompts, images, max_new_tokens=n, eos_id=EOS, **options))
    return [[i for i in (column[row] for column in columns) if i is not None] for row in range(len(prompts))]


def draw_image(rng: random.Random, n: int = 1) -> torch.Tensor:
    return torch.tensor([rng.randrange(256) for _ in range(n * 3 * 28 * 28)], dtype=torch.uint8).view(n, 3, 28, 28)


def draw_words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1, 97) for _ in range(n)]


def draw_prompt(rng: random.Random, n_images: int) -> tuple[list[int], torch.Tensor]:
    """A few words, then n_images times a picture and a few words."""
    ids = draw_words(rng, rng.randrange(1, 9))
    for _ in range(n_images):
        ids += [IMAGE_ID] * P + draw_words(rng, rng.randrange(1, 9))
    return ids, draw_image(rng, n_images)

# ---------------------------------------------------------------------------------------------------
# The original's numbers


def test_decoder_logits_equal_the_original(original, golden):
    rows = golden["phi.input_ids"].tolist()
    logits = all_logits(original, rows, torch.zeros(0, 3, 28, 28, dtype=torch.uint8))
    torch.testing.assert_close(logits.view(2, 40, -1), golden["phi.logits"], atol=1e-5, rtol=1e-5)


def test_joined_logits_equal_the_original(original, golden):
    row = expanded(golden["llava.input_ids"][0].tolist())
    logits = all_logits(original, [row], to_uint8(golden["llava.pixel_values"]))
    torch.testing.assert_close(logits, golden["llava.logits"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["one", "two"])
def test_greedy_ids_equal_the_original(original, golden, which):
    prompts = json.loads((GOLDEN / "text.json").read_text())["prompts"]
    prompt = expanded(prompts[which]["input_ids_tiny"])
    images = to_uint8(golden["llava.pixel_values"])
    assert fast(original, [prompt], [images], 24) == [golden[f"generate.{which}"].tolist()]


def test_loss_and_gradients_equal_the_original(original, golden):
    rows, rowlabels = [], []
    for ids, labels, mask in zip(*(golden[f"train.{k}"] for k in ("input_ids", "labels", "attention_mask"))):
        rows.append(expanded(ids[mask.bool()].tolist()))
        at = rows[-1].index(IMAGE_ID)
        labels = labels[mask.bool()].tolist()
        rowlabels += (labels[:at] + [-100] * 4 + labels[at + 1:])[1:] + [-100]     # position t is asked for token t + 1
    ids, lengths, slots = pack(rows)
    targets = torch.tensor(rowlabels)
    supervised = (targets != -100).nonzero().flatten()
    original.zero_grad()
    images = to_uint8(golden["train.pixel_values"])
    loss = original(ids, lengths, images, slots, supervised, targets[supervised]) / len(supervised)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["train.loss"][0], atol=0, rtol=1e-5)
    grads = {name: p.grad.clone() for name, p in original.named_parameters()}
    original.zero_grad()
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    torch.testing.assert_close(norm, golden["train.grad_norm"][0], atol=0, rtol=1e-5)
    fused = golden["train.grad.model.layers.1.self_attn.query_key_value.weight"]   # packed head by head: (nh, 3, hs)
    theirs = {
        "llm.lm_head.bias": golden["train.grad.lm_head.bias"],
        "llm.wte.weight": golden["train.grad.model.embed_tokens.weight"],
        "llm.h.0.mlp.fc.bias": golden["train.grad.model.layers.0.mlp.fc1.bias"],
        "llm.h.1.attn.qkv.weight": fused.view(2, 3, 20, 40).transpose(0, 1).reshape(120, 40),
        "projector.fc.weight": golden["train.grad.model.mm_projector.0.weight"],
        "vision.cls": golden["train.grad.model.vision_tower.vision_model.embeddings.class_embedding"],
    }
    for name, expected in theirs.items():
        error = (grads[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_one_image_id():
    """data.py may not import the model, so the number stands in both."""
    assert IMAGE_ID == data.IMAGE_ID


def test_attention_knows_the_models_length(tiny, monkeypatch):
    """GPU kernels size their grid by it: with less, the positions behind it would be garbage."""
    lengths = []
    monkeypatch.setattr(model_file, "attend", lambda q, k, v, layout: lengths.append(layout.max_length) or q)
    tiny.llm(torch.zeros(2, 48), Layout(torch.tensor([2]), tiny.device))
    assert set(lengths) == {2048}
    lengths.clear()
    all_targets = torch.tensor([3, 4])
    tiny(torch.tensor([3, 4]), torch.tensor([2]), NONE, torch.zeros(0, dtype=torch.int64), torch.arange(2), all_targets)
    next(tiny.generate([[1, 2, 3]], [NONE], max_new_tokens=1, eos_id=EOS))
    assert set(lengths) == {64}


def test_without_varlen_attention_there_is_the_loop(monkeypatch):
    """Releases of PyTorch that lack it, and GPUs before Ampere."""
    layout = Layout(torch.tensor([3]), torch.device("cpu"))
    layout.on_ampere = True
    q = torch.zeros(3, 2, 80, dtype=torch.bfloat16)
    assert model_file.has_varlen(q, layout)
    monkeypatch.setattr(model_file, "varlen_attn", None)
    assert not model_file.has_varlen(q, layout)


def test_the_published_model_has_the_published_size():
    with torch.device("meta"):
        model = LLaVAPhi(LLaVAConfig())
    count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "projector", "llm")}
    assert count == {"vision": 290_909_184, "projector": 9_180_160, "llm": 2_779_683_840}
    assert sum(count.values()) == 3_079_773_184
    assert not list(model.buffers())                        # nothing to cast, to lose or to leave on the meta device

# ---------------------------------------------------------------------------------------------------
# Training forward


def test_packed_neighbours_do_not_see_each_other(tiny):
    rng = random.Random(0)
    rows, images = zip(*(draw_prompt(rng, n) for n in (1, 0, 2, 1)))
    together = all_logits(tiny, list(rows), torch.cat(images))
    apart = torch.cat([all_logits(tiny, [row], pics) for row, pics in zip(rows, images)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


def test_a_batch_without_pictures_still_has_every_gradient(tiny):
    """Under FSDP a process that skips the tower hangs the others."""
    ids = torch.tensor([3, 4, 5, 6])
    tiny.zero_grad()
    no_slots = torch.zeros(0, dtype=torch.int64)
    loss = tiny(ids, torch.tensor([4]), NONE, no_slots, torch.tensor([1, 2]), torch.tensor([5, 6]))
    loss.backward()
    missing = [name for name, p in tiny.named_parameters() if p.grad is None]
    tiny.zero_grad()
    assert not missing and loss > 0


def test_nothing_supervised_is_a_loss_of_zero(tiny):
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = tiny(torch.tensor([3, 4]), torch.tensor([2]), NONE, nothing, nothing, nothing)
    loss.backward()
    tiny.zero_grad()
    assert loss == 0


def test_slots_and_pictures_must_agree(tiny):
    with pytest.raises(AssertionError, match="3 image positions for 1 images of 4 patches"):
        tiny.embed(torch.tensor([3, 4, 5]), draw_image(random.Random(0)), torch.arange(3))


@pytest.mark.parametrize("n_targets", [1, 6, 7, 13])
def test_chunked_loss_equals_whole(n_targets):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 50), torch.randint(0, 50, (n_targets,))
    results = []
    for chunk in (4096, 6):
        h = torch.ones(n_targets, 16).cumsum(0).sin().requires_grad_()
        head.zero_grad()
        loss = cross_entropy_sum(h, head, targets, chunk)
        loss.backward()
        results.append((loss.detach(), h.grad, head.weight.grad.clone()))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_queries_and_keys_stay_finite(dtype):
    """Phi-2's attention scores pass fp16's 65,504 in its last layers: q and k of several hundred."""
    model = LLaVAPhi(TINY).eval()
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.llm.h:
            block.attn.qkv.bias[:96] = 400                  # of q and k: each score is 400 * 400 * 16 / 4
    model.to(dtype)
    prompt, images = draw_prompt(random.Random(0), 1)
    assert all_logits(model, [prompt], images).isfinite().all()
    assert len(fast(model, [prompt], [images], 4)[0]) <= 4

# ---------------------------------------------------------------------------------------------------
# Generation: every fast path against slow_greedy


@pytest.mark.parametrize("seed", range(6))
def test_cached_batched_and_shared_equal_the_slow_path(tiny, seed):
    """A ragged batch with 0, 1 and 2 pictures, some of them shared between prompts, in random order."""
    rng = random.Random(seed)
    batch = [draw_prompt(rng, n) for n in (0, 1, 2, 1)]
    head, images = draw_prompt(rng, 1 + seed % 2)
    batch += [(head + draw_words(rng, n), images) for n in (0, 1, 5)]      # three questions about the same pictures
    rng.shuffle(batch)
    prompts, pictures = map(list, zip(*batch))
    expected = [slow_greedy(tiny, prompt, pics, 9) for prompt, pics in batch]
    assert fast(tiny, prompts, pictures, 9) == expected
    assert [fast(tiny, [prompt], [pics], 9)[0] for prompt, pics in batch] == expected
    assert len({tuple(answer) for answer in expected}) > 3  # the test would be empty if all answers were alike


def test_prompts_that_do_not_go_through_together_change_nothing(tiny, monkeypatch):
    """On a CPU a prefill takes a few prompts at a time, each with its own rows of the cache and its own pictures."""
    rng = random.Random(1)
    head, shared = draw_prompt(rng, 1)
    batch = [draw_prompt(rng, n) for n in (1, 0, 2, 1)] + [(head + draw_words(rng, n), shared) for n in (1, 5)]
    prompts, pictures = map(list, zip(*batch))
    lengths = [len(prompt) for prompt in prompts]
    expected = fast(tiny, prompts, pictures, 9)
    for most, n_parts in [(1, 6), (max(lengths) + 1, None), (sum(lengths), 1)]:
        monkeypatch.setattr(model_file, "CPU_PREFILL", most)
        assert fast(tiny, prompts, pictures, 9) == expected
        parts = list(model_file.rows_together(prompts, [0] * 6, most))
        assert n_parts is None or len(parts) == n_parts
        assert [row for part in parts for row in range(6)[part]] == list(range(6))


def test_answers_end_row_by_row(tiny):
    """A row that has ended says None from then on, and the last column still holds a token."""
    rng = random.Random(3)
    batch = [draw_prompt(rng, 0) for _ in range(12)]
    prompts, pictures = map(list, zip(*batch))
    columns = list(tiny.generate(prompts, pictures, max_new_tokens=12, eos_id=EOS))
    lengths = set()
    for row in zip(*columns):
        n = sum(i is not None for i in row)
        assert all(i is None for i in row[n:]) and EOS not in row
        lengths.add(n)
    assert len(lengths) > 2
    assert any(i is not None for i in columns[-1])


def test_columns_come_as_they_are_made(tiny):
    prompt, images = draw_prompt(random.Random(5), 1)
    steps, real = [], tiny.decode
    tiny.decode = lambda *a: steps.append(1) or real(*a)
    try:
        stream = tiny.generate([prompt], [images], max_new_tokens=9, eos_id=-1)
        assert next(stream)[0] is not None and not steps    # the first token needs no decoding step
        next(stream)
        assert len(steps) == 1
        stream.close()
    finally:
        del tiny.decode


@pytest.mark.parametrize("room", [1, 2, 5])
def test_answers_stop_where_the_positions_end(tiny, room):
    """...and the other rows go on: each equals what it says alone."""
    rng = random.Random(room)
    full, short = draw_words(rng, 64 - room), draw_words(rng, 3)
    expected = [slow_greedy(tiny, prompt, NONE, 20) for prompt in (full, short)]
    memory = []
    assert fast(tiny, [short, full], [NONE, NONE], 20, memory=memory) == expected[::-1]
    assert len(expected[0]) <= room
    again = full[:30] + [1, 2, 3]
    assert fast(tiny, [again], [NONE], 5, memory=memory) == [slow_greedy(tiny, again, NONE, 5)]


def test_all_rows_can_be_remembered(tiny):
    """A batch of conversations that all go on: the next turn of each computes only what is new."""
    model = copy.deepcopy(tiny)
    seen = count_images(model)
    rng, memory = random.Random(7), []
    prompts, pictures = map(list, zip(*(draw_prompt(rng, 1) for _ in range(3))))
    said = fast(model, prompts, pictures, 5, memory=memory, remember_all=True)
    assert len(memory) == 3 and sum(seen) == 3
    assert len({prefix.k.untyped_storage().data_ptr() for prefix in memory}) == 3   # copies, not views of one cache
    prompts = [prompt + answer + [EOS] + draw_words(rng, 3) for prompt, answer in zip(prompts, said)]
    expected = [slow_greedy(tiny, prompt, pics, 5) for prompt, pics in zip(prompts, pictures)]
    assert fast(model, prompts, pictures, 5, memory=memory, remember_all=True) == expected
    assert sum(seen) == 3


def test_a_prompt_without_room_is_the_users_error(tiny):
    with pytest.raises(ValueError, match="64 of the model's 64 positions"):
        next(tiny.generate([[1] * 64], [NONE], max_new_tokens=1, eos_id=EOS))


def count_images(model: LLaVAPhi) -> list[int]:
    """How many pictures each call of the tower sees, from now on."""
    calls = []
    model.vision.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def test_one_picture_many_questions_is_one_look(tiny):
    model = copy.deepcopy(tiny)
    seen = count_images(model)
    rng = random.Random(0)
    head, images = draw_prompt(rng, 1)
    prompts = [head + draw_words(rng, n) for n in (1, 4, 2, 7)]
    assert fast(model, prompts, [images] * 4, 4) == [slow_greedy(tiny, prompt, images, 4) for prompt in prompts]
    assert sum(seen) == 1


def test_a_chat_only_computes_what_is_new(tiny):
    """Turn after turn over one memory equals every turn from nothing; the tower looks once per picture."""
    model = copy.deepcopy(tiny)
    seen, tokens = count_images(model), []
    model.llm.h[0].register_forward_pre_hook(lambda module, args: tokens.append(len(args[0])))
    rng, memory = random.Random(1), []
    prompt, images = draw_prompt(rng, 1)
    for turn in range(4):
        expected = slow_greedy(tiny, prompt, images, 5)
        tokens.clear()
        assert fast(model, [prompt], [images], 5, memory=memory) == [expected]
        assert sum(tokens) < 12 or turn == 0
        prompt = prompt + expected + [EOS] + draw_words(rng, 3)
    assert sum(seen) == 1
    other = draw_image(rng)                                 # another picture behind the same words
    assert fast(model, [prompt], [other], 5, memory=memory) == [slow_greedy(tiny, prompt, other, 5)]
    assert sum(seen) == 2


def test_memory_survives_an_interrupted_answer(tiny):
    prompt, images = draw_prompt(random.Random(2), 1)
    memory = []
    stream = tiny.generate([prompt], [images], max_new_tokens=9, eos_id=-1, memory=memory)
    said = [next(stream)[0] for _ in range(3)]
    stream.close()
    assert memory[0].ids == prompt + said[:2]               # the third was said but not yet fed back
    prompt = prompt + said + [7, 8]
    assert fast(tiny, [prompt], [images], 5, memory=memory) == [slow_greedy(tiny, prompt, images, 5)]


def test_a_picture_at_the_very_end_is_remembered_whole(tiny):
    """Without words behind it, one position short of the prompt would cut the picture in two."""
    rng, memory = random.Random(4), []
    images = draw_image(rng, 2)
    prompt = [5, 6] + [IMAGE_ID] * P + [7] + [IMAGE_ID] * P
    for _ in range(2):
        assert fast(tiny, [prompt], [images], 4, memory=memory) == [slow_greedy(tiny, prompt, images, 4)]
    assert fast(tiny, [prompt] * 2, [images] * 2, 4) == [slow_greedy(tiny, prompt, images, 4)] * 2


def test_fixed_shapes_change_nothing(tiny, monkeypatch):
    """On CUDA a step reads the cache in blocks of 256 positions and masks what is not there yet."""
    rng = random.Random(6)
    prompts, pictures = map(list, zip(*(draw_prompt(rng, n) for n in (0, 2, 1))))
    expected = fast(tiny, prompts, pictures, 9)
    real = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a: (real(self, *a), setattr(self, "bucket", 16))[0])
    assert fast(tiny, prompts, pictures, 9) == expected


@pytest.mark.parametrize("room", [1, 5, 30])
def test_a_step_ahead_of_the_host_changes_nothing(tiny, room):
    """What --compile does on CUDA: the next step is queued before a token is read, also at the last position."""
    rng, memory = random.Random(room), []
    prompts, pictures = [draw_words(rng, 3), draw_words(rng, 64 - room)], [NONE, NONE]
    expected = fast(tiny, prompts, pictures, 9)
    assert fast(tiny, prompts, pictures, 9, fast=True, memory=memory) == expected
    again = prompts[1][:30] + [1, 2, 3]
    assert fast(tiny, [again], [NONE], 5, memory=memory) == [slow_greedy(tiny, again, NONE, 5)]

# ---------------------------------------------------------------------------------------------------
# Picking


def draws(logits: list[float], n: int = 4000, **options) -> list[float]:
    """Share of each id among n draws."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    rows = torch.tensor(logits).expand(n, -1)
    ids = pick(rows, generator=torch.Generator().manual_seed(0), **settings)
    return (ids.bincount(minlength=len(logits)) / n).tolist()


def test_pick_is_greedy_at_temperature_zero():
    assert pick(torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 5.0]]), 0, 0, 1.0, None).tolist() == [1, 0]


def test_pick_draws_from_the_distribution():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    logits = [math.log(p) for p in probabilities]
    assert draws(logits) == pytest.approx(probabilities, abs=0.03)
    assert draws(logits, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(logits, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(logits, top_p=0.4) == [0, 1, 0, 0]          # the best is always allowed
    assert draws(logits, temperature=0.01) == [0, 1, 0, 0]
    assert draws(logits, top_k=99) == pytest.approx(probabilities, abs=0.03)


def test_same_seed_same_answer(tiny):
    prompt, images = draw_prompt(random.Random(8), 1)
    settings = {"temperature": 2.0, "top_p": 0.9}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 2)]
    said = [fast(tiny, [prompt], [images], 9, generator=generator, **settings) for generator in generators]
    assert said[0] == said[1] and said[2] != said[3]

@pytest.mark.parametrize("lengths", [[37], [5, 5], [40, 1, 17]])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_from_one_token_is_torchs_fused_attention(dtype, bound, lengths):
    """Of one token for each sequence, which may see what its own sequence holds and itself."""
    torch.manual_seed(0)
    config = PhiConfig(n_layer=1, n_head=4, n_embd=64)
    cache = KVCache(config, len(lengths), 48, torch.device("cpu"), dtype)
    cache.k.copy_(torch.randn_like(cache.k))
    cache.v.copy_(torch.randn_like(cache.v))
    cache.fill(lengths)
    [layer] = cache.layers
    q = torch.randn(len(lengths), 4, 16, dtype=dtype)
    y = attend_from_one(q, layer, DecodeLayout(cache))
    for row, n in enumerate(lengths):
        k, v = layer.k[row, :, :n + 1].to(dtype), layer.v[row, :, :n + 1]
        expected = F.scaled_dot_product_attention(q[row, :, None], k, v)[:, 0]
        torch.testing.assert_close(y[row], expected, atol=bound, rtol=bound)

# ---------------------------------------------------------------------------------------------------
# Weights in the order in which a CPU multiplies them

needs_packing = pytest.mark.skipif(not packing_pays(torch.float32), reason="oneDNN's packed products are used with AVX-512 alone")


@needs_packing
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("n_in, n_out", [(512, 512), (2560, 1024), (100, 4000)])
def test_packed_products_are_the_plain_ones(dtype, bound, n_in, n_out):
    """For no row, one, a few (which are padded) and many; bf16 may round the same sum to a neighbour."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out, dtype=dtype).requires_grad_(False)
    packed = PackedLinear(base)
    for rows in (0, 1, 2, 5, 6, 7, 200):
        x = torch.randn(rows, n_in, dtype=dtype)
        torch.testing.assert_close(packed(x), base(x), atol=bound, rtol=bound)
    x = torch.randn(2, 3, n_in, dtype=dtype)
    torch.testing.assert_close(packed(x), base(x), atol=bound, rtol=bound)


@needs_packing
def test_a_packed_model_says_the_same(original, golden, monkeypatch):
    """Its logits are the original code's, and a batch changes no answer, as without packing."""
    monkeypatch.setattr(quant, "PACKED_FROM", 1)
    row, images = expanded(golden["llava.input_ids"][0].tolist()), to_uint8(golden["llava.pixel_values"])
    packed = copy.deepcopy(original).requires_grad_(False)
    assert pack_linears(packed) == 2 * 4 + 1 + 2 + 2 * 4     # decoder, head, projector, tower
    assert pack_linears(packed) == 0
    torch.testing.assert_close(all_logits(packed, [row], images), golden["llava.logits"][0], atol=1e-5, rtol=1e-5)
    rng = random.Random(0)
    prompts, pictures = zip(*[draw_prompt(rng, n % 3) for n in range(9)])
    together = fast(packed, list(prompts), list(pictures), 8)
    assert together == [fast(packed, [prompt], [images], 8)[0] for prompt, images in zip(prompts, pictures)]
    assert together == fast(original, list(prompts), list(pictures), 8)


@needs_packing
def test_packing_frees_each_weight_before_the_next(monkeypatch):
    """A model that just fits into memory must not need it twice."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
                                  for _ in range(4)]).requires_grad_(False)
    plain = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    alive = []
    monkeypatch.setattr(quant, "PackedLinear", lambda base: (
        alive.append(sum(weight() is not None for weight in plain)), PackedLinear(base))[1])
    assert pack_linears(model) == 8
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]


def test_quantised_and_small_layers_are_not_packed(original, monkeypatch):
    assert pack_linears(copy.deepcopy(original)) == 0        # so small that it would be slower
    monkeypatch.setattr(quant, "PACKED_FROM", 1)
    quantised = copy.deepcopy(original)
    quantize_linears(quantised, 8)
    assert pack_linears(quantised) == 0
    monkeypatch.setattr(quant, "packing_pays", lambda dtype: False)
    assert pack_linears(copy.deepcopy(original)) == 0

# ---------------------------------------------------------------------------------------------------
# int8


@pytest.mark.parametrize("n_in, n_out", [(2560, 7680), (10240, 2560), (1024, 4096)])
def test_int8_error_of_a_linear_at_full_size(n_in, n_out):
    """1.3 % on even activations; channels 20 times as large as the others cost the rest of a token's channels bits."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out)
    torch.nn.init.normal_(base.weight, std=0.02)
    layer = Int8Linear(base)
    layer.quantize(base.weight.detach())
    x = torch.randn(8, n_in)
    outliers = x.clone()
    outliers[:, ::200] *= 20
    with torch.no_grad():
        for rows, bound in ((x, 0.015), (outliers, 0.075), (x[:1], 0.015), (x.bfloat16().float() * 1e4, 0.015)):
            expected = base(rows)
            assert (layer(rows) - expected).norm() / expected.norm() < bound
        assert layer(torch.zeros(2, n_in)).equal(base.bias.expand(2, -1))          # no division by a scale of zero
        assert layer(x.view(2, 4, n_in)).shape == (2, 4, n_out) and layer(x[:0]).shape == (0, n_out)


def test_int8_model_says_nearly_the_same(original, golden):
    """Streamed into int8 from the folder, or turned into it in memory: one and the same, and close to fp32."""
    row, images = expanded(golden["llava.input_ids"][0].tolist()), to_uint8(golden["llava.pixel_values"])
    streamed, turned = load_model(GOLDEN / "tiny-llava-phi", int8=True), copy.deepcopy(original)
    assert quantize_linears(turned, 8) == 2 * 4 + 1 + 2 + 2 * 4  # decoder, head, projector, tower
    for a, b in zip(streamed.state_dict().values(), turned.state_dict().values()):
        assert torch.equal(a, b)
    logits = all_logits(streamed, [row], images)
    expected = golden["llava.logits"][0]
    assert (logits - expected).norm() / expected.norm() < 0.03
    agreement = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.8
    fast_ids = fast(streamed, [row, row[:20]], [images, images[:0]], 4)
    assert len(fast_ids[0]) == 4


def test_int8_is_small():
    with torch.device("meta"):
        model = LLaVAPhi(LLaVAConfig())
        quantize_linears(model, 8)
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) < 3.6e9

# ---------------------------------------------------------------------------------------------------
# 4 bits

HAS_INT4 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_int4 = pytest.mark.skipif(not HAS_INT4, reason="torch's 4-bit product for CPUs wants AVX2 or AVX-512")
EVEN = LLaVAConfig(                 # as TINY, with widths that groups divide: 64 into one of 64, 160 into 32s
    llm=PhiConfig(vocab_size=97, block_size=512, n_layer=2, n_head=2, n_embd=64, n_inner=160, rotary_dim=8, dropout=0.0),
    vision=VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=32, n_inner=64),
)


def packed_int4(n_in: int, n_out: int) -> tuple[torch.nn.Linear, Int4Linear]:
    """A Linear as Phi-2's are, and the same in 4 bits."""
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out)
    torch.nn.init.normal_(base.weight, std=0.02)
    layer = Int4Linear(base).eval()
    layer.quantize(base.weight.detach())
    return base, layer


@needs_int4
@pytest.mark.parametrize("n_in, n_out", [(160, 97), (64, 64), (2560, 1024), (320, 1100)])
def test_packed_weights_are_those_that_torch_multiplies(n_in, n_out):
    """Both products of the layer against the plain one with the weights that unpack_int4 gives.

    The packed product rounds activations and sums to bf16 (8 bits: 0.4 %); unpacked in fp32 only the order of the sum
    differs; where the CPU has int8 products, weights and tokens are rounded to 8 bits once more (about 1 %).
    """
    base, layer = packed_int4(n_in, n_out)
    weight = unpack_int4(layer.weight, layer.scales)[:, :n_out]                    # (in, out)
    x = torch.randn(192, n_in)
    many = 0.02 if quant.has_int8_product() else 1e-5
    with torch.no_grad():
        for rows, bound in ((x[:1], 0.006), (x[:5], 0.006), (x, many)):
            expected = rows @ weight + base.bias
            error = (layer(rows) - expected).norm() / expected.norm()
            assert error < bound, f"{len(rows)} rows: {error:.1e}"
        assert layer(x.view(2, -1, n_in)).shape == (2, 192 // 2, n_out) and layer(x[:0]).shape == (0, n_out)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("n_in, n_out", [(160, 128), (2560, 256)])
def test_4_bits_become_8_without_losing_more_than_a_rounding(n_in, n_out):
    """In 16-bit integers, against the weights in fp32: half a step of 8 bits, and what a and b themselves round off."""
    for spread in (1.0, 1e-6, 0.0):
        weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * spread
        weight[0, 0] = 30 * spread                          # an outlier takes most of its channel's 8 bits
        packed = torch.empty(n_out, n_in // 2, dtype=torch.uint8)
        scales = torch.empty(n_in // group_of(n_in), n_out, 2, dtype=torch.bfloat16)
        pack_int4(weight, packed, scales)
        exact = unpack_int4(packed, scales)                                        # (n_in, n_out)
        numbers, row_scale = unpack_to_int8(packed, scales)
        assert numbers.dtype == torch.int8 and int(numbers.min()) >= -127
        assert ((numbers.float() * row_scale - exact).abs() <= 0.57 * row_scale).all()


def test_fitting_the_scales_beats_rounding():
    """Rounding between a group's smallest and largest weight costs 9.0 % of even weights; fitting takes 6 % off that."""
    torch.manual_seed(0)
    weight = torch.randn(256, 640) * 0.02
    groups = weight.view(256, 10, 64)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    rounded = ((groups - low) / step).round() * step + low
    q, scales = quantize_groups(weight, 64)
    scale, zero = scales.float().transpose(0, 1).unbind(-1)                        # (256, 10)
    fitted = (q.view(256, 10, 64) - 8.0) * scale[..., None] + zero[..., None]
    errors = [(w - groups).norm() / groups.norm() for w in (rounded, fitted)]
    assert int(q.max()) <= 15 and errors[1] < 0.95 * errors[0] < 0.09
    flat, scales = quantize_groups(torch.full((64, 64), 0.25), 64)                 # a spread of nothing
    assert torch.equal((flat - 8.0) * scales[0, :, :1].float() + scales[0, :, 1:].float(), torch.full((64, 64), 0.25))


@needs_int4
def test_int4_error_of_a_linear():
    """About 8.6 % on even weights, the half of which is one bit more; 8 bits cost 1.3 %."""
    base, layer = packed_int4(2560, 1024)
    x = torch.randn(8, 2560)
    with torch.no_grad():
        error = (layer(x) - base(x)).norm() / base(x).norm()
    assert 0.05 < error < 0.092


@needs_int4
def test_int4_model():
    """Streamed into 4 bits from a folder, or turned into it in memory: the same; cached decoding equals no cache."""
    model = LLaVAPhi(EVEN).eval().requires_grad_(False)
    init_weights(model, torch.Generator().manual_seed(1))
    for p in model.parameters():
        p.mul_(8 if p.dim() > 1 else 1)
    turned = copy.deepcopy(model)
    assert quantize_linears(turned, 4) == 2 * 4 + 1 + 2 + 2 * 4
    assert {type(m) for m in turned.llm.modules() if isinstance(m, torch.nn.Linear)} == {Int4Linear}
    assert {type(m) for m in turned.vision.modules() if isinstance(m, torch.nn.Linear)} == {Int8Linear}
    with torch.device("meta"):
        streamed = LLaVAPhi(EVEN).eval()
        quantize_linears(streamed, 4)
    streamed.to_empty(device="cpu").requires_grad_(False)
    copy_into = copy_weight(streamed, fill=torch.Tensor.copy_)
    for name, parameter in streamed.named_parameters():
        copy_into(parameter, model.get_parameter(name))
    for (name, a), b in zip(streamed.state_dict().items(), turned.state_dict().values()):
        assert torch.equal(a, b), name
    prompt, images = draw_prompt(random.Random(0), 1)
    row = prompt + draw_words(random.Random(1), 192)                         # long enough for unpacked weights
    for ids in (prompt, row):
        error = all_logits(turned, [ids], images) - all_logits(model, [ids], images)
        assert error.norm() / all_logits(model, [ids], images).norm() < 0.2
    assert len(fast(turned, [prompt, row], [images, images], 4)) == 2


def test_int4_refuses_in_words(monkeypatch):
    with pytest.raises(ValueError, match="40 wide, no multiple of a group of 32"):
        load_model(GOLDEN / "tiny-llava-phi", bits=4)
    with pytest.raises(ValueError, match="4 bits need a CPU with AVX2 or .* take 8 bits"):
        check_int4_product(torch.device("mps"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="4 bits need a CPU with AVX2"):
        load_model(GOLDEN / "tiny-llava-phi", bits=4)


def test_int4_is_small():
    with torch.device("meta"):
        model = LLaVAPhi(LLaVAConfig())
        quantize_linears(model, 4)
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) < 2.1e9


def test_adapters_learn_through_a_base_in_4_bits():
    """Values and gradients of x, A and B, against the same adapters on the unpacked weights."""
    torch.manual_seed(0)
    quantized = Int4Linear(torch.nn.Linear(160, 97))
    adapted = LoRALinear(quantized, 4, 8.0)
    adapted.quantize(torch.randn(97, 160))
    torch.nn.init.normal_(adapted.lora_a)
    torch.nn.init.normal_(adapted.lora_b)
    plain = torch.nn.Linear(160, 97)
    plain.weight.data = unpack_int4(adapted.weight, adapted.scales)[:, :97].t().contiguous()
    plain.bias.data = adapted.bias.data
    oracle = LoRALinear(plain, 4, 8.0)
    oracle.lora_a.data = adapted.lora_a.data
    oracle.lora_b.data = adapted.lora_b.data
    x = torch.randn(7, 160)
    results = []
    for layer in (adapted, oracle):
        x_ = x.clone().requires_grad_()
        y = layer(x_)
        y.square().sum().backward()
        results.append((y.detach(), x_.grad, layer.lora_a.grad, layer.lora_b.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)
    assert adapted.weight.grad is None
