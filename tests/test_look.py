"""lib/look.py: maps equal to slow oracles, at the right place of the picture; a page that is safe and complete."""
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench.look import measure
from helpers import GOLDEN, ROOT, TINY_MODEL, pattern
from PIL import Image

import lib.quant
import sample
from data import IMAGE_ID, ImageConfig, load_image, load_tokenizer
from lib.chat import encode_chat, open_image
from lib.look import look, look_page, seen_box
from load_weights import load_model
from model import Packed, apply_rope, rope

PHOTO = GOLDEN / "images/photo.jpg"
DEMO = ROOT / "out/demo/finetune"
WORDS = ["What is this?"]


def slow_weights(model, x: torch.Tensor, layer: int) -> torch.Tensor:
    """The attention of a layer, averaged over its heads, one head and one query at a time -> (T, T)."""
    seqs = Packed([len(x)], x.device)
    cos, sin = rope(seqs.pos, model.config.llm.rotary_dim, model.config.llm.rope_base)
    for block in model.llm.h[:layer]:
        x = block(x, cos, sin, seqs)
    attn = model.llm.h[layer].attn
    qkv = attn.qkv(model.llm.h[layer].ln(x)).view(len(x), 3, attn.n_head, -1)
    q, k = apply_rope(qkv[:, :2], cos, sin, attn.rotary_dim).unbind(1)
    weights = torch.zeros(attn.n_head, len(x), len(x))
    for head in range(attn.n_head):
        for i in range(len(x)):
            weights[head, i, :i + 1] = F.softmax(k[:i + 1, head] @ q[i, head] / math.sqrt(q.size(-1)), dim=-1)
    return weights.mean(0)


@pytest.mark.parametrize("layer", [0, 1])
def test_both_maps_are_the_slow_ones(tiny_model, tiny_tokenizer, layer):
    """Attention head by head; the gradient from a forward and a backward of its own for each token."""
    looks = look(tiny_model, tiny_tokenizer, WORDS[0], PHOTO, layer, max_new_tokens=5)
    images = open_image(PHOTO, tiny_model.config)
    prompt = encode_chat(tiny_model.config, tiny_tokenizer, WORDS, images)
    said = [tiny_tokenizer.token_to_id(each["token"].replace(" ", "Ġ")) for each in looks]
    assert len(looks) == 5 and None not in said[:2]
    patches = [i for i, token in enumerate(prompt) if token == IMAGE_ID]
    for n in range(2):
        ids = torch.tensor(prompt + said[:n])
        x = tiny_model.embed(ids.clamp_min(0), images, torch.tensor(patches)).detach().requires_grad_()
        weights = slow_weights(tiny_model, x, layer)[-1, patches]
        assert torch.allclose(torch.tensor(looks[n]["attention"]).flatten(), weights, atol=1e-6)
        logits = tiny_model.llm.lm_head(tiny_model.llm(x, Packed([len(x)], x.device)))[-1]
        assert looks[n]["logprob"] == pytest.approx(logits.log_softmax(-1)[said[n]].item(), abs=1e-5)
        best, second = logits.topk(2)[0]
        (best - second).backward()
        effects = (x.grad * x).norm(dim=-1)
        expected = (effects / effects.sum())[patches]
        assert torch.allclose(torch.tensor(looks[n]["gradient"]).flatten(), expected, atol=1e-6)


def test_looking_needs_no_more_than_the_asked_layer(tiny_model, tiny_tokenizer):
    """Parameters get no gradients, and the answer is the usual one."""
    looks = look(tiny_model, tiny_tokenizer, WORDS[0], PHOTO, max_new_tokens=2)
    assert len(looks) == 2 and all(p.grad is None for p in tiny_model.parameters())
    assert all(0 < sum(map(sum, each[kind])) < 1 for each in looks for kind in ("attention", "gradient"))


def test_prepacked_weights_give_the_same_gradient(tiny_model, tiny_tokenizer):
    """Large models on a CPU are prepacked when they are loaded."""
    if not lib.quant.prepacking_pays(torch.float32):
        pytest.skip("this CPU does not prepack")
    packed = load_model(TINY_MODEL)
    lib.quant.prepack_linears(packed, min_size=0)
    assert any(isinstance(module, lib.quant.PrepackedLinear) for module in packed.llm.modules())
    expected, found = (look(model, tiny_tokenizer, WORDS[0], PHOTO, max_new_tokens=3) for model in (tiny_model, packed))
    for one, other in zip(expected, found):
        assert one["token"] == other["token"]
        assert np.allclose(one["gradient"], other["gradient"], atol=1e-5)
        assert np.allclose(one["attention"], other["attention"], atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"layer": 2}, "a layer from 0 to 1"), ({"layer": -1}, "found 1 pictures, layer -1"),
    ({"image": None}, "found 0 pictures"), ({"image": [PHOTO, PHOTO]}, "found 2 pictures")])
def test_what_cannot_be_looked_at_is_one_line(tiny_model, tiny_tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        look(tiny_model, tiny_tokenizer, WORDS[0], **{"image": PHOTO, "max_new_tokens": 1} | change)


def test_a_quantized_model_has_no_gradient(tiny_tokenizer):
    with pytest.raises(ValueError, match="fewer bits"):
        look(load_model(TINY_MODEL, bits=8), tiny_tokenizer, WORDS[0], PHOTO, max_new_tokens=1)


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (257, 64), (100, 100)])
def test_the_square_is_put_back_where_it_was(mode, size):
    """A dot is looked for in the model's square; undone, it is where it was in the picture."""
    rng = random.Random(str(size))
    left, top, width, height = seen_box(*size, 84, mode)
    for _ in range(4):
        x, y = (rng.uniform(0.4, 0.6) * n for n in size)            # in the middle, which no crop loses
        picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        rows, columns = np.ogrid[:size[1], :size[0]]
        picture[(rows - y) ** 2 + (columns - x) ** 2 < 64] = 255
        pixels = load_image(Image.fromarray(picture), ImageConfig(84, mode, (0, 0, 0), 36)).float().sum(0)
        v, u = ((pixels.sum(1 - axis) * (torch.arange(84) + 0.5)).sum() / pixels.sum() / 84 for axis in (0, 1))
        assert size[0] * (left + width * u) == pytest.approx(x + 0.5, abs=0.8)
        assert size[1] * (top + height * v) == pytest.approx(y + 0.5, abs=0.8)


def test_the_page_is_complete_and_safe(tiny_model):
    """A hostile token is text; the picture is there once; there is a map of each kind for each token."""
    hostile = '<script>alert(1)</script>"\u202e'
    grid = [[0.1, 0.2], [0.0, 0.05]]
    looks = [{"token": token, "logprob": -0.5, "attention": grid, "gradient": grid} for token in (hostile, "b")]
    page = look_page(pattern(60, 30), hostile, looks, replace(tiny_model.config, image_mode="pad"), 1)
    assert "<script" not in page and "\u202e" not in page and "default-src 'none'" in page
    assert page.count("url(data:image/png") == 1 and page.count("<img ") == 4
    assert not re.search(r"https?://", page)
    assert page.count('style="left:0.000%;top:-50.000%;width:100.000%;height:200.000%"') == 4
    assert "60.7%" in page and "35% on the picture" in page and "of layer\n1 " in page


def test_look_on_the_command_line(tmp_path, capsys):
    """The answer on stdout is the usual one, and an upright picture stays upright."""
    photo = Image.open(PHOTO).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    flags = ["--model", str(TINY_MODEL), "--image", str(tmp_path / "turned.jpg"), "--prompt", "What is this?",
             "--max-new-tokens", "3"]
    sample.main(sample.parse(flags))
    expected = capsys.readouterr().out
    sample.main(sample.parse([*flags, "--look", str(tmp_path / "look.html"), "--look-layer", "1"]))
    assert capsys.readouterr().out == expected
    page = (tmp_path / "look.html").read_text()
    assert f"aspect-ratio: {photo.height} / {photo.width}" in page and page.count("<figure>") == 3


@pytest.mark.skipif(not (DEMO / "config.json").exists(), reason="needs the model that `make demo` trains")
def test_the_demo_looks_at_the_shape_that_it_is_asked_about():
    """Chance is 0.25, the share of the shape's quarter in the area. docs/measurements.md has 100 scenes."""
    means, asked, right = measure(load_model(DEMO), load_tokenizer(DEMO), 20, range(1))
    assert right > 0.8 * asked
    assert means["gradient"]["all"] > 0.25 + 0.25 and means["attention of layer 0"]["all"] > 0.25 + 0.1
