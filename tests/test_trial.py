"""`inspect --try`: the demo's language model shows what a sound one shows, and every way to misread it is noticed."""
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import lib.try_model
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor
from lib.try_model import ENGLISH, KNOWN, SHAPES, fingerprint, judge_picture, language_of, mean_loss

import model
from data import load_tokenizer
from load_weights import load_model, load_phi, main

DEMO = ROOT / "demo" / "phi"
GOLDEN = Path(__file__).parent / "golden"
KINDS = ("q", "k", "v")


def inspect(folder: Path, capsys) -> tuple[int, str]:
    code = main(["inspect", str(folder), "--try"])
    return code, capsys.readouterr().out


def rewrite(out: Path, change=lambda tensors: tensors, config: dict = {}) -> Path:
    """A copy of the demo's language model with its tensors or its config changed."""
    shutil.copytree(DEMO, out)
    old = json.loads((DEMO / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(old | config))
    tensors = change(load_file(DEMO / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def test_reference_values_of_the_demo():
    """Measured once. A change of the decoder, of the pages or of the demo's weights shows here."""
    llm, tok = load_phi(DEMO), load_tokenizer(DEMO)
    assert mean_loss(llm, tok, SHAPES.page) == pytest.approx(0.000305, abs=2e-5)
    assert mean_loss(llm, tok, ENGLISH.page) == pytest.approx(18.7336, abs=1e-3) == KNOWN[fingerprint(llm)]


def test_the_demo_is_sound(capsys):
    code, page = inspect(DEMO, capsys)
    assert code == 0 and page.count("try        sound ") == 4 and "problem" not in page
    assert "goes on 'a red circle at the top right" in page


def test_another_layout_of_the_same_weights_is_sound(tmp_path, capsys):
    code, page = inspect(rewrite(tmp_path / "x", fused_as("heads")), capsys)
    assert code == 0 and "packed head by head" in page and page.count("try        sound ") == 4


@pytest.mark.parametrize("branch", [".mlp.", ".self_attn."])
def test_a_tuned_model_is_not_taken_for_the_one_it_was_made_from(branch, tmp_path, capsys):
    """As adapters leave it: one branch has changed, the embedding has not. Nobody has measured the loss of that."""
    def tune(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t + 1e-4 * torch.randn(t.shape) if branch in name and t.dim() == 2 else t
                for name, t in tensors.items()}

    assert "these very weights" in inspect(DEMO, capsys)[1]
    code, page = inspect(rewrite(tmp_path / "x", tune), capsys)
    assert code == 0 and "these very weights" not in page


def permuted(order: tuple[int, ...]):
    """As if a reader took q for k, and so on."""
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for name, tensor in tensors.items():
            for old, new in enumerate(order):
                if f".{KINDS[old]}_proj." in name:
                    name = name.replace(f".{KINDS[old]}_proj.", f".{KINDS[new]}_proj.")
                    break
            changed[name] = tensor
        return changed
    return change


def fused_as(packing: str):
    """q, k and v in one matrix under the name of the layout that packs by head. "thirds" is a file that does not."""
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
        for name, q in tensors.items():
            if ".q_proj." not in name:
                continue
            k, v = tensors[name.replace("q_proj", "k_proj")], tensors[name.replace("q_proj", "v_proj")]
            heads = [tensor.unflatten(0, (8, -1)) for tensor in (q, k, v)]             # (head, size, ...) each
            by_head = torch.stack(heads, dim=1).flatten(0, 2)
            changed[name.replace("q_proj", "query_key_value")] = by_head if packing == "heads" else torch.cat([q, k, v])
        return changed
    return change


def without_head_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.bias": torch.zeros_like(tensors["lm_head.bias"])}


ORDERS = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
COARSE = {f"order {order}": {"change": permuted(order)} for order in ORDERS}
COARSE |= {"packing": {"change": fused_as("thirds")}}
FINE = {f"eps {eps}": {"config": {"layer_norm_eps": eps}} for eps in (1e-3, 1e-4, 1e-6, 1e-12)}
FINE |= {"head bias": {"change": without_head_bias}, "rotary base": {"config": {"rope_theta": 500000.0, "rope_parameters": None}}}


@pytest.mark.parametrize("name", COARSE | FINE)
def test_every_misreading_is_noticed(name, tmp_path, capsys):
    code, page = inspect(rewrite(tmp_path / "x", **(COARSE | FINE)[name]), capsys)
    assert code == 2 and "try        misread " in page and "problem    the tensors are all there" in page


def paired_neighbours(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """The other convention of rotary embeddings: channel 2 i turns with 2 i + 1, not i with i + dim / 2."""
    turned, rest = x.split([dim, x.size(-1) - dim], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)


def test_an_interleaved_rotary_embedding_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(model, "apply_rope", paired_neighbours)
    code, page = inspect(DEMO, capsys)
    assert code == 2 and page.count("try        misread ") == 2       # by the limit, and by the known value


@pytest.mark.parametrize("name", COARSE)
def test_the_limits_alone_find_what_scrambles_attention(name, tmp_path, monkeypatch, capsys):
    """For weights whose exact loss nobody has measured."""
    monkeypatch.setattr(lib.try_model, "KNOWN", {})
    code, page = inspect(rewrite(tmp_path / "x", **COARSE[name]), capsys)
    assert code == 2 and "these very weights" not in page


def test_a_missing_head_bias_is_noticed_in_any_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lib.try_model, "KNOWN", {})
    code, page = inspect(rewrite(tmp_path / "x", without_head_bias), capsys)
    assert code == 2 and "the head's bias: 0 at the most" in page


def test_random_weights_do_not_pass(capsys):
    """A whole model is asked about pictures too, in English, which its tokenizer decides."""
    code, page = inspect(GOLDEN / "tiny-llava-phi", capsys)
    assert code == 2 and "'The capital of France is' goes on" in page and "a picture: a red circle is" in page
    assert language_of(load_tokenizer(GOLDEN / "tiny-llava-phi")) is ENGLISH and language_of(load_tokenizer(DEMO)) is SHAPES


@pytest.mark.parametrize("drawn, blank, verdict", [
    ("Red", "Black", "sound"), ("Red.", "There is no circle", "sound"), ("Red", "Red", "unclear"), ("Blue", "Red", "unclear"),
])
def test_a_picture_has_to_be_seen(drawn, blank, verdict, monkeypatch):
    """The colour is named where the circle is, and not where there is none."""
    def ask(model, tok, question, pictures, max_new_tokens):
        return [drawn if len(picture.getcolors(1000)) > 1 else blank for picture in pictures]
    monkeypatch.setattr(lib.try_model, "ask", ask)
    tok = load_tokenizer(GOLDEN / "tiny-llava-phi")
    assert judge_picture(load_model(GOLDEN / "tiny-llava-phi"), tok, ENGLISH).verdict == verdict


def test_a_tower_alone_has_nothing_to_say(capsys):
    code, page = inspect(GOLDEN / "tiny-clip", capsys)
    assert code == 0 and "try        nothing: a CLIP vision tower does not speak" in page
