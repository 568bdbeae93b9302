"""`inspect` says what a folder holds, and with --try whether the weights were read as they were meant."""
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (GOLDEN, ROOT, TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, load_weights_command, rewrite,
                     siglip_folder)
from torch import Tensor
from zoo import projector_file, without_tower

import lib.inspect
import model
import sample
from data import load_tokenizer
from lib.asking import Model
from lib.folders import Kind, open_weights
from lib.inspect import SHAPES, page_loss
from load_weights import export, load_model, merge

DEMO = ROOT / "demo" / "phi"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def inspect(folder: Path, capsys, *flags: str) -> tuple[int, str]:
    """-> exit code and page."""
    code = load_weights_command(["inspect", str(folder), *flags])
    return code, capsys.readouterr().out


PAGES = {           # folder -> words that a person wants to see there
    TINY_PHI: ("a Phi-2 language model", "3 x safetensors", "fused query_key_value, packed head by head",
               "2 layers of width 40, 2 heads, 2048 positions, 512 rows of vocabulary", "tokenizer.json: 444 tokens"),
    GOLDEN / "tiny-phi-split": ("a Phi-2 language model", "split q, k, v", "missing    a tokenizer"),
    GOLDEN / "tiny-phi-mixer": ("a Phi-2 language model", "mixer.Wqkv", "missing    a tokenizer"),
    TINY_CLIP: ("a CLIP vision tower", "1 x bin", "28 x 28 pixels make 4 patches, 2 of 3 layers are used, of width 32",
                "crop: the square in the middle", "checksums  none", "23 tensors: the text tower",
                "18 tensors: layers and LayerNorm after the hidden state", "merge --vision"),
    TINY_MODEL: ("a LLaVA-Phi model", "fused query_key_value", "pad: the whole picture, padded",
                 "projector  4 tensors", "sample.py --model"),
    TINY_MIPHA: ("a Mipha model", "split q, k, v", "33 x 33 pixels make 4 patches, 2 of 3 layers are used, of width 36",
                 "pad: the whole picture, padded", "11 tensors: SigLIP's attention-pooling head", "sample.py --model"),
}


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_every_layout(folder, capsys):
    code, page = inspect(folder, capsys)
    assert code == 0
    for words in PAGES[folder]:
        assert words in page, words


def test_a_whole_siglip(tmp_path, capsys):
    code, page = inspect(siglip_folder("whole", tmp_path / "siglip"), capsys)
    assert code == 0
    for words in ("a SigLIP vision tower", "18 tensors: layers and LayerNorm after the hidden state",
                  "images     squash", "11 tensors: SigLIP's attention-pooling head", "4 tensors: the text tower",
                  "merge --vision"):
        assert words in page, words


def test_a_folded_head_bias_is_seen(tmp_path, capsys):
    export(TINY_MODEL, tmp_path / "folded", None)
    assert "head bias folded" in inspect(tmp_path / "folded", capsys)[1]
    assert "head bias folded" not in inspect(TINY_MODEL, capsys)[1]


def test_parts_that_wait_for_the_others(tmp_path, capsys):
    """LLaVA's released form and its stage 1 are whole as far as they go; their next step makes a model of them."""
    code, page = inspect(without_tower(tmp_path / "llava"), capsys)
    assert code == 0
    for words in ("a LLaVA model without its tower", "projector  4 tensors", "missing    nothing",
                  "next       python load_weights.py merge --llm"):
        assert words in page, words
    code, page = inspect(projector_file(tmp_path / "stage 1").parent, capsys)
    assert code == 0
    for words in ("a projector by itself", "projector  4 tensors, 2,960 parameters", "merge --projector"):
        assert words in page, words


def test_an_untrained_projector_is_noticed(tmp_path, capsys, photo):
    """Such a model answers about pictures that it cannot see. Whoever asks is told; a trained one is not mentioned."""
    merge(TINY_PHI, TINY_CLIP, tmp_path / "base", 0, None)
    for folder, told in ((tmp_path / "base", 1), (TINY_MODEL, 0)):
        _, page = inspect(folder, capsys)
        assert f"next       python {'train.py --stage pretrain' if told else 'sample.py'} --model {folder}" in page
        flags = ["--model", str(folder), "--image", str(photo), "--prompt", "What?", "--max-new-tokens", "1"]
        sample.main(sample.parse(flags))
        asked = capsys.readouterr().err
        Model(folder, load_model, "fp32", "cpu", 16).load()
        scored = capsys.readouterr().err
        for text in (page, asked, scored):
            words = f"the projector is not trained yet, .*python train.py --stage pretrain --model {folder}"
            assert len(re.findall(words, text)) == told


def test_a_fragment(tmp_path, capsys):
    """A head without layers is in no layout."""
    folder = rewrite(TINY_PHI, tmp_path / "x", lambda tensors: {"lm_head.bias": tensors["lm_head.bias"]})
    code, page = inspect(folder, capsys)
    assert code == 2 and "problem    " in page


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    export(TINY_MODEL, out, None)
    return out


def test_one_flipped_bit_is_found(tmp_path, saved, capsys):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    code, page = inspect(folder, capsys)
    assert code == 0 and "checksums  verified: 1 file as written" in page
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    code, page = inspect(folder, capsys)
    assert code == 2 and f"problem    {folder}: model.safetensors is not what was written" in page
    load_model(folder)                          # nothing else would have noticed


@pytest.mark.parametrize("text, words", [
    ("0" * 64 + "  gone.safetensors\n", "gone.safetensors' names no file here"),
    ("0" * 64 + "  ../model.safetensors\n", "../model.safetensors' names no file here"),
    ("<html>", "'<html>' names no file here"),
])
def test_odd_checksum_files(text, words, tmp_path, saved, capsys):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "SHA256SUMS").write_text(text)
    code, page = inspect(folder, capsys)
    assert code == 2 and words in page

# ---------------------------------------------------------------------------------------------------
# --try


def test_the_loss_on_a_page_of_the_demos_language_model():
    """Measured once. A change of the decoder, of the page or of the demo's weights shows here."""
    phi = load_model(open_weights(DEMO, expect=(Kind.PHI,)))
    assert page_loss(phi, load_tokenizer(DEMO), SHAPES) == pytest.approx(0.000309, abs=2e-5)


def test_the_demo_is_sound(capsys):
    code, page = inspect(DEMO, capsys, "--try")
    assert code == 0 and "nats per token, sound" in page and "problem" not in page


def permuted(order: tuple[int, ...]) -> Change:
    """As if a reader took q for k, and so on."""
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for old, new in zip("qkv", order):
                if f".{old}_proj." in name:
                    name = name.replace(f".{old}_proj.", f".{'qkv'[new]}_proj.")
                    break
            renamed[name] = tensor
        return renamed
    return change


def fused(by_head: bool) -> Change:
    """q, k and v in one matrix, under the name of the layout that packs them head by head."""
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
        for name in tensors:
            if ".q_proj." not in name:
                continue
            three = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            packed = torch.stack([tensor.unflatten(0, (8, -1)) for tensor in three], dim=1).flatten(0, 2)
            changed[name.replace("q_proj", "query_key_value")] = packed if by_head else torch.cat(three)
        return changed
    return change


def test_another_layout_of_the_same_weights_is_sound(tmp_path, capsys):
    code, page = inspect(rewrite(DEMO, tmp_path / "x", fused(by_head=True)), capsys, "--try")
    assert code == 0 and "packed head by head" in page and "nats per token, sound" in page


ORDERS = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]


@pytest.mark.parametrize("change", [*map(permuted, ORDERS), fused(by_head=False)], ids=[*map(str, ORDERS), "packing"])
def test_every_way_to_scramble_attention_is_noticed(change, tmp_path, capsys):
    """The shapes are the same, so nothing else would."""
    code, page = inspect(rewrite(DEMO, tmp_path / "x", change), capsys, "--try")
    assert code == 2 and "nats per token, misread" in page and "problem    the tensors are all there" in page


def paired_neighbors(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """The other convention of rotary embeddings: channel 2 i turns with 2 i + 1, not i with i + dim / 2."""
    turned, rest = x.split([dim, x.size(-1) - dim], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)


def test_an_interleaved_rotary_embedding_is_noticed(monkeypatch, capsys):
    """The mildest misreading that is."""
    monkeypatch.setattr(model, "apply_rope", paired_neighbors)
    code, page = inspect(DEMO, capsys, "--try")
    assert code == 2 and "nats per token, misread" in page


def test_random_weights_do_not_pass(capsys):
    """A whole model is asked about pictures too, in English, which its tokenizer decides."""
    code, page = inspect(TINY_MODEL, capsys, "--try")
    assert code == 2 and "below 4.0" in page and "a picture: a red circle is" in page


@pytest.mark.parametrize("drawn, blank, verdict", [
    ("Red", "Black", "sound"), ("Red.", "There is no circle", "sound"), ("Red", "Red", "unclear"),
    ("Blue", "Red", "unclear")])
def test_a_picture_has_to_be_seen(drawn, blank, verdict, monkeypatch, capsys):
    """The color is named where the circle is, and not where there is none."""
    def ask(model, tok, question, pictures, **options):
        return [drawn if len(picture.getcolors(1000)) > 1 else blank for picture in pictures]

    monkeypatch.setattr(lib.inspect, "ask", ask)
    _, page = inspect(TINY_MODEL, capsys, "--try")
    assert f"no circle is {blank!r}, {verdict} " in page


def test_a_tower_has_nothing_to_say(capsys):
    code, page = inspect(TINY_CLIP, capsys, "--try")
    assert code == 0 and "try        nothing: a CLIP vision tower does not speak" in page
