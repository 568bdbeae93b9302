"""The model against the original's golden numbers, and its loss and gradients against slower ways to the same."""
import json
import random

import pytest
import torch
from helpers import (GOLDEN, SMALL, TINY_MODEL, all_logits, draw_image, draw_prompt, expanded, fast_answers, pack,
                     plain_answer, random_model, to_uint8)

import model as model_file
from data import IMAGE_ID
from lib.generate import Session
from load_weights import load_model
from model import LLaVAConfig, LLaVAPhi, Packed, cross_entropy_sum, init_weights

NO_IMAGE = torch.zeros(0, 3, 28, 28, dtype=torch.uint8)
NOWHERE = torch.zeros(0, dtype=torch.int64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original():
    """A copy of the goldens' model that can be trained."""
    return load_model(TINY_MODEL).requires_grad_()


@pytest.fixture(scope="module")
def small():
    return random_model(SMALL, 20, eos_bias=6)

# ---------------------------------------------------------------------------------------------------
# The original's numbers


def test_decoder_logits_equal_the_original(original, golden):
    rows = golden["phi.input_ids"].tolist()
    logits = all_logits(original, rows, NO_IMAGE)
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
    expected = golden[f"generate.{which}"].tolist()
    assert plain_answer(original, prompt, images, 24) == expected
    assert fast_answers(original, [prompt], [images], 24) == [expected]


def test_loss_and_gradients_equal_the_original(original, golden):
    rows, rowlabels = [], []
    for ids, labels, mask in zip(*(golden[f"train.{k}"] for k in ("input_ids", "labels", "attention_mask"))):
        rows.append(expanded(ids[mask.bool()].tolist()))
        at = rows[-1].index(IMAGE_ID)
        labels = labels[mask.bool()].tolist()
        rowlabels += (labels[:at] + [-100] * 4 + labels[at + 1:])[1:] + [-100]     # position t is asked for token t + 1
    ids, lengths, image_positions = pack(rows)
    targets = torch.tensor(rowlabels)
    supervised = (targets != -100).nonzero().flatten()
    original.zero_grad()
    images = to_uint8(golden["train.pixel_values"])
    loss = original(ids, lengths, images, image_positions, supervised, targets[supervised]) / len(supervised)
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


def test_attention_knows_the_models_length(small, monkeypatch):
    """GPU kernels size their grid by it: with less, the positions behind it would be garbage."""
    seen = []
    monkeypatch.setattr(Packed, "attend", lambda self, q, k, v, layer: seen.append(self.max_seqlen) or q)
    small.llm(torch.zeros(2, 48), Packed([2], CPU))
    assert set(seen) == {2048}
    for use in (lambda: small(torch.tensor([3, 4]), [2], NO_IMAGE, NOWHERE, torch.arange(2), torch.tensor([3, 4])),
                lambda: small.generate(torch.tensor([1, 2, 3]), NO_IMAGE, NOWHERE, 1, eos_id=0),
                lambda: next(Session(small).generate([[1, 2, 3]], [NO_IMAGE], max_new_tokens=1, eos_id=-1))):
        seen.clear()
        use()
        assert set(seen) == {64}


def test_without_varlen_attention_there_is_the_loop(monkeypatch):
    """Releases of PyTorch that lack it, and GPUs before Ampere."""
    packed = Packed([3], CPU)
    packed.on_ampere = True
    q = torch.zeros(3, 2, 80, dtype=torch.bfloat16)
    assert packed.has_varlen(q)
    monkeypatch.setattr(model_file, "varlen_attn", None)
    assert not packed.has_varlen(q)


def test_each_layer_knows_its_number(small):
    """By it, attention finds its layer of the KV cache."""
    assert [block.attn.layer for block in small.llm.h] == [0, 1, 2]


def test_the_published_model_has_the_published_size():
    with torch.device("meta"):
        model = LLaVAPhi(LLaVAConfig())
    count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "projector", "llm")}
    assert count == {"vision": 290_909_184, "projector": 9_180_160, "llm": 2_779_683_840}
    assert sum(count.values()) == 3_079_773_184
    assert not list(model.buffers())                        # nothing to cast, to lose or to leave on the meta device


def test_the_tower_is_optional(small):
    """Without it, this is a language model: the same loss on text, and nothing else to ask for."""
    alone = LLaVAPhi(SMALL, tower=False)
    alone.llm.load_state_dict(small.llm.state_dict())
    assert [name for name, _ in alone.named_children()] == ["llm"]
    text = torch.tensor([3, 4, 5, 6]), [4], NO_IMAGE, NOWHERE, torch.tensor([1, 2]), torch.tensor([5, 6])
    assert torch.equal(alone(*text), small(*text))
    prompts = [[5, 6, 7], [8, 9]]
    assert fast_answers(alone, prompts, [NO_IMAGE] * 2, 6) == fast_answers(small, prompts, [NO_IMAGE] * 2, 6)

# ---------------------------------------------------------------------------------------------------
# The forward pass of training


def test_packed_neighbors_do_not_see_each_other(small):
    rng = random.Random(0)
    rows, images = zip(*(draw_prompt(rng, n) for n in (1, 0, 2, 1)))
    together = all_logits(small, list(rows), torch.cat(images))
    apart = torch.cat([all_logits(small, [row], pics) for row, pics in zip(rows, images)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


def test_a_batch_without_pictures_still_has_every_gradient(small):
    """Under FSDP a process that skips the tower hangs the others."""
    ids = torch.tensor([3, 4, 5, 6])
    small.zero_grad()
    loss = small(ids, [4], NO_IMAGE, NOWHERE, torch.tensor([1, 2]), torch.tensor([5, 6]))
    loss.backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None]
    small.zero_grad()
    assert not missing and loss > 0


def test_nothing_supervised_is_a_loss_of_zero(small):
    loss = small(torch.tensor([3, 4]), [2], NO_IMAGE, NOWHERE, NOWHERE, NOWHERE)
    loss.backward()
    small.zero_grad()
    assert loss == 0


def test_a_process_without_a_sample_takes_part(small):
    """A micro-batch of nothing: under FSDP it must compute a loss of zero and every gradient."""
    small.zero_grad()
    loss = small(NOWHERE, [], NO_IMAGE, NOWHERE, NOWHERE, NOWHERE)
    loss.backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None]
    small.zero_grad()
    assert not missing and loss == 0


def test_image_positions_and_pictures_must_agree(small):
    with pytest.raises(AssertionError, match="3 image positions for 1 images of 4 patches"):
        small.embed(torch.tensor([3, 4, 5]), draw_image(random.Random(0)), torch.arange(3))


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
    model = LLaVAPhi(SMALL).eval()
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.llm.h:
            block.attn.qkv.bias[:96] = 400                  # of q and k: each score is 400 * 400 * 16 / 4
    model.to(dtype)
    prompt, images = draw_prompt(random.Random(0), 1)
    assert all_logits(model, [prompt], images).isfinite().all()
    assert len(fast_answers(model, [prompt], [images], 4)[0]) <= 4
