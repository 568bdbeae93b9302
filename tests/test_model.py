"""Golden numbers of the original; and every fast path against the slow one it replaces.

Golden: tests/golden/, computed by the original code on tiny random weights. Oracles: the cache against no cache,
a batch against one by one, a shared prefix against none, the chunked loss against the whole.
"""
import copy
import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_vision import to_uint8

import data
import model as model_file
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
