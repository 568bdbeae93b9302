"""Weights in and out: every layout gives the same model, everything else is refused with words, what is saved reads back."""
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from data import IMAGE_ID, load_image, load_tokenizer, mean_color
from lib.common import read_json, without_control
from lib.folders import blueprint, load_config, read_bin, read_folder
from lib.generate import Session
from lib.layouts import to_ours, to_saved
from lib.save_weights import save_model
from load_weights import export, export_parts, load_into, load_model, main, merge
from model import LLaVAConfig, LLaVAPhi, Packed
from vision import SIGLIP_SO400M_384, VisionConfig, normalize

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_MIPHA = Path(__file__).parent / "golden-mipha"
MIPHA = GOLDEN_MIPHA / "tiny-mipha"
PHI, CLIP, LLAVA = GOLDEN / "tiny-phi", GOLDEN / "tiny-clip", GOLDEN / "tiny-llava-phi"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def model() -> LLaVAPhi:
    return load_model(LLAVA)


def same(a: LLaVAPhi, b: LLaVAPhi, prefix: str = "") -> bool:
    a, b = ({k: v for k, v in m.state_dict().items() if k.startswith(prefix)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def from_bases(phi: Path, clip: Path) -> LLaVAPhi:
    model = LLaVAPhi(load_config(phi, clip))
    load_into(model, [phi, clip], allow_missing=("projector.",))
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def rewrite(source: Path, out: Path, change=lambda tensors: tensors, config=lambda c: c, keep: tuple[str, ...] = ()) -> Path:
    """A copy of a folder with its tensors (one safetensors file) and its config changed. keep: of its json files only these."""
    out.mkdir()
    for path in source.glob("*.json"):
        if "index" not in path.name and (not keep or path.name in keep):
            shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps(config(json.loads((source / "config.json").read_text()))))
    save_file({k: v.contiguous() for k, v in change(tensors_of(source)).items()}, out / "model.safetensors")
    return out

# ---------------------------------------------------------------------------------------------------
# The original's numbers


@torch.no_grad()
def llm_logits(model: LLaVAPhi, ids: Tensor) -> Tensor:
    B, T = ids.shape
    h = model.llm(model.llm.wte(ids.flatten().long()), Packed(torch.tensor([T] * B), ids.device))
    return model.llm.lm_head(h).view(B, T, -1)


@pytest.mark.parametrize("name", ["tiny-phi", "tiny-phi-split", "tiny-phi-mixer"])
def test_golden_logits_from_every_given_layout(name, golden):
    logits = llm_logits(from_bases(GOLDEN / name, CLIP), golden["phi.input_ids"])
    torch.testing.assert_close(logits, golden["phi.logits"], atol=1e-5, rtol=0)


def test_the_given_layouts_are_the_same_model():
    first, *others = (from_bases(GOLDEN / name, CLIP) for name in ("tiny-phi", "tiny-phi-split", "tiny-phi-mixer"))
    assert all(same(first, other, "llm") for other in others)


def test_names_json_is_what_we_take_and_leave():
    names = json.loads((GOLDEN / "names.json").read_text())
    folder, config = read_folder(LLAVA), load_config(LLAVA)
    assert {s.name: list(s.shape) for pieces in folder.found.values() for s in pieces.values()} == names["names"]
    built = {name for name, _ in LLaVAPhi(config).named_parameters()}
    assert {s.name for name, pieces in folder.found.items() if name not in built for s in pieces.values()} == set(names["no_grad"])


def test_published_sizes():
    shapes = blueprint(LLaVAConfig())
    count = lambda part: sum(s.numel() for name, s in shapes.items() if name.startswith(part))
    assert (count("llm"), count("vision"), count("projector")) == (2_779_683_840, 303_507_456, 9_180_160)
    assert sum(len(to_saved(name)) for name in shapes) == 453 + 391 + 4

# ---------------------------------------------------------------------------------------------------
# Layouts


def sequential(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """phi-msft names -> the earliest ones: layers.0 is the embedding, layers.(n + 1) the head."""
    def name(old: str) -> str:
        for begin, n in (("transformer.embd", 0), ("lm_head", 3), ("transformer.h.0", 1), ("transformer.h.1", 2)):
            old = f"layers.{n}" + old.removeprefix(begin) if old.startswith(begin + ".") else old
        return old
    return {name(k): v for k, v in tensors.items()}


def renamed(*pairs: tuple[str, str]):
    """A function over tensors that gives each the first of the new beginnings that fits."""
    def name(old: str) -> str:
        return next((new + old[len(begin):] for begin, new in pairs if old.startswith(begin)), old)
    return lambda tensors: {name(k): v for k, v in tensors.items()}


PROJECTOR = [(f"model.mm_projector.{2 * i}.", f"multi_modal_projector.linear_{i + 1}.") for i in range(2)]
RELAYOUTS = {       # of the LLaVA-Phi folder: name -> change
    "as released": lambda t: t,
    "transformers, old names": renamed(*PROJECTOR, ("model.vision_tower.", "vision_tower."), ("", "language_model.")),
    "transformers, as 5 saves": renamed(*PROJECTOR, ("model.vision_tower.vision_model.", "vision_tower."), ("", "language_model.")),
    "transformers 5 in memory": renamed(*[(a, "model." + b) for a, b in PROJECTOR], ("model.vision_tower.vision_model.", "model.vision_tower."),
                                        ("model.", "model.language_model.")),
    "LLaVA's nesting": renamed(("model.vision_tower.", "model.vision_tower.vision_tower.")),
}


@pytest.mark.parametrize("name", RELAYOUTS)
def test_every_spelling_of_the_joined_model(name, tmp_path, model):
    assert same(model, load_model(rewrite(LLAVA, tmp_path / "x", RELAYOUTS[name])))


def test_split_layout_of_the_joined_model(tmp_path, model):
    """Mipha, and LLaVA-Phi saved by newer transformers."""
    def split(tensors):
        split_phi = tensors_of(GOLDEN / "tiny-phi-split")
        return {k: v for k, v in tensors.items() if "vision" in k or "projector" in k} | split_phi
    there = load_model(rewrite(LLAVA, tmp_path / "x", split))
    assert same(there, from_bases(PHI, CLIP), "llm") and same(there, model, "vision") and same(there, model, "projector")


def test_the_earliest_layout(tmp_path):
    folder = rewrite(GOLDEN / "tiny-phi-mixer", tmp_path / "x", sequential)
    assert same(from_bases(PHI, CLIP), from_bases(folder, CLIP), "llm")


CLIPS = {
    "whole": lambda t: t,
    "vision only": lambda t: {k: v for k, v in t.items() if k.startswith("vision_model.")},
    "without prefix": lambda t: {k.removeprefix("vision_model."): v for k, v in t.items() if k.startswith("vision_model.")},
    "with position_ids": lambda t: t | {"vision_model.embeddings.position_ids": torch.arange(5)[None],
                                        "text_model.embeddings.position_ids": torch.arange(77)[None]},
}


@pytest.mark.parametrize("name", CLIPS)
def test_every_spelling_of_clip(name, tmp_path):
    folder = rewrite(CLIP, tmp_path / "x", CLIPS[name], (lambda c: c) if name == "whole" else (lambda c: c["vision_config"]))
    assert same(from_bases(PHI, CLIP), from_bases(PHI, folder), "vision")


def test_rotary_buffers_are_left_out_by_name(tmp_path):
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = rewrite(PHI, tmp_path / "x", lambda t: t | stray)
    assert same(from_bases(PHI, CLIP), from_bases(folder, CLIP), "llm")
    assert list(read_folder(folder).dropped) == list(stray)


def test_bin_files_single_and_sharded(tmp_path):
    tensors, config = tensors_of(PHI), (PHI / "config.json").read_text()
    names = sorted(tensors)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    torch.save({k: torch.nn.Parameter(v) for k, v in tensors.items()}, one / "pytorch_model.bin")
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for shard, part in shards.items():
        torch.save({k: tensors[k] for k in part}, two / shard)
    index = {"weight_map": {k: shard for shard, part in shards.items() for k in part}}
    (two / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(from_bases(PHI, CLIP), from_bases(one, CLIP)) is False      # the projector was drawn anew
    assert same(from_bases(PHI, CLIP), from_bases(one, CLIP), "llm") and same(from_bases(PHI, CLIP), from_bases(two, CLIP), "llm")


def test_tensors_that_share_a_storage_in_a_bin(tmp_path):
    base = torch.arange(60.0)
    torch.save({"a": base[:20].view(4, 5), "b": base[20:].view(2, 20), "c": torch.tensor(7.0)}, tmp_path / "x.bin")
    stored = read_bin(tmp_path / "x.bin")
    assert torch.equal(stored["a"].load(), base[:20].view(4, 5)) and torch.equal(stored["b"].load(), base[20:].view(2, 20))
    assert stored["c"].shape == () and stored["c"].load() == 7


def test_any_dtype_is_cast_on_the_way(tmp_path, model):
    folder = rewrite(LLAVA, tmp_path / "x", lambda t: {k: v.bfloat16() for k, v in t.items()})
    there = load_model(folder, torch.bfloat16)
    assert all(torch.equal(p, q.bfloat16()) and p.dtype == torch.bfloat16 for p, q in zip(there.parameters(), model.parameters()))
    wide = load_model(folder, torch.float32)
    assert all(torch.equal(p, q.float()) for p, q in zip(wide.parameters(), there.parameters()))


def test_a_loaded_model_is_frozen_and_in_eval_mode(model):
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="overflow in fp16"):
        load_model(LLAVA, torch.float16)


def test_names_go_both_ways():
    for name in blueprint(load_config(LLAVA)):
        back = [to_ours(saved) for saved in to_saved(name)]
        assert [place[0] for place in back] == [name] * len(back)
        assert [place[1] for place in back] == (["q", "k", "v"] if len(back) == 3 else [""])
    assert to_ours("transformer.h.7.mixer.Wqkv.bias") == ("llm.h.7.attn.qkv.bias", "")
    assert to_ours("model.layers.7.self_attn.query_key_value.bias") == ("llm.h.7.attn.qkv.bias", "heads")
    assert to_ours("something.else") is None

# ---------------------------------------------------------------------------------------------------
# Mipha: the same decoder and projector, SigLIP as the tower


@pytest.fixture(scope="module")
def mipha() -> LLaVAPhi:
    return load_model(MIPHA)


@torch.no_grad()
def test_mipha_golden(mipha):
    """Features, projector, logits and greedy ids of the original, from the released layout, through the saved one too."""
    golden = load_file(GOLDEN_MIPHA / "forward.safetensors")
    tower = mipha.config.vision
    pictures = [load_image(GOLDEN / "images" / name, tower.image_size, mipha.config.image_mode, mean_color(tower.mean))
                for name in ("photo.jpg", "square.png")]
    images = torch.stack(pictures)
    assert torch.equal(normalize(images, tower.mean, tower.std), golden["vision.pixel_values"])
    features = mipha.vision(images)
    torch.testing.assert_close(features, golden["vision.features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(mipha.projector(features), golden["projector.out"], atol=1e-5, rtol=0)
    prefix, suffix = golden["mipha.prefix_ids"].tolist(), golden["mipha.suffix_ids"].tolist()
    ids = prefix + [IMAGE_ID] * tower.n_patches + suffix
    row = torch.tensor(ids)
    x = mipha.embed(row.clamp_min(0), images[:1], (row == IMAGE_ID).nonzero().flatten())
    logits = mipha.llm.lm_head(mipha.llm(x, Packed(torch.tensor([len(ids)]), x.device)))
    torch.testing.assert_close(logits, golden["mipha.logits"][0], atol=1e-5, rtol=0)
    columns = Session(mipha).generate([ids], [images[:1]], max_new_tokens=24, eos_id=-1)
    assert [column[0] for column in columns] == golden["generate.ids"].tolist()


def test_mipha_through_sample(tmp_path):
    """The command of a user gives the original's greedy text."""
    golden = load_file(GOLDEN_MIPHA / "forward.safetensors")
    done = subprocess.run([sys.executable, "sample.py", "--model", str(MIPHA), "--image", str(GOLDEN / "images" / "photo.jpg"),
                           "--prompt", "What is this?", "--temperature", "0", "--max-new-tokens", "24"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(MIPHA)
    assert without_control(tokenizer.decode(golden["generate.ids"].tolist()).strip()) in done.stdout


def test_mipha_config(mipha):
    tower = VisionConfig(33, 14, 3, 2, 36, 116, eps=1e-6, class_token=False, pre_norm=False, patch_bias=True, gelu="tanh",
                         mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert mipha.config.vision == tower and mipha.config.image_mode == "pad" and tower.n_patches == 4


def test_published_sizes_of_mipha():
    shapes = blueprint(LLaVAConfig(vision=SIGLIP_SO400M_384))
    count = lambda part: sum(s.numel() for name, s in shapes.items() if name.startswith(part))
    assert (count("llm"), count("vision"), count("projector")) == (2_779_683_840, 428_225_600, 9_507_840)
    assert count("vision.head") == 15_238_352


SIGLIPS = {         # of the tower in tiny-mipha: what its names begin with there
    "whole": "vision_model.",
    "vision only": "vision_model.",
    "without prefix": "",
}


def siglip_folder(kind: str, out: Path) -> Path:
    """google's SiglipModel with its text tower, or the vision tower alone, from the tower in tiny-mipha."""
    prefix = "model.vision_tower.vision_model."
    def change(tensors):
        tower = {SIGLIPS[kind] + k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        text = {"text_model.final_layer_norm.weight": torch.ones(4), "text_model.head.weight": torch.ones(4, 4),
                "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
        return tower | (text if kind == "whole" else {})
    def config(c):
        tower = c["vision_config"]["vision_tower"]
        tower = {k: v for k, v in tower.items() if not k.startswith("mm_")}
        # What is at its default is left out of published files.
        tower = {k: v for k, v in tower.items() if k not in ("hidden_act", "layer_norm_eps", "num_channels")}
        return {"model_type": "siglip", "vision_config": tower} if kind == "whole" else tower
    return rewrite(MIPHA, out, change, config, keep=("config.json", "preprocessor_config.json"))


@pytest.mark.parametrize("kind", SIGLIPS)
def test_every_spelling_of_siglip(kind, tmp_path, mipha, capsys):
    """Recognised by its tensors, and passed through: all that belongs to the vision part is in the merged model."""
    folder = siglip_folder(kind, tmp_path / "resnet")
    main(["merge", "--llm", str(PHI), "--vision", str(folder), "--out", str(tmp_path / "base")])
    assert "a Mipha model" in capsys.readouterr().out
    base = load_model(tmp_path / "base")
    assert same(base, mipha, "vision") and base.config.image_mode == "squash"
    assert replace(base.config, image_mode="pad") == mipha.config
    saved, original = tensors_of(tmp_path / "base"), tensors_of(MIPHA)
    for name, tensor in original.items():
        if "vision_model" in name:
            assert torch.equal(saved[name.removeprefix("model.")], tensor), name
    main(["inspect", str(folder)])
    page = capsys.readouterr().out
    for words in ("a SigLIP vision tower", "18 tensors: layers and LayerNorm after the hidden state", "11 tensors: attention-pooling head",
                  "images     squash", "merge --vision"):
        assert words in page
    assert ("4 tensors: the text tower" in page) == (kind == "whole")


def test_mipha_saved_and_read_again(tmp_path, mipha):
    export(MIPHA, tmp_path / "a", None)
    export(tmp_path / "a", tmp_path / "b", None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = load_model(tmp_path / "a")
    assert same(again, mipha) and again.config == mipha.config
    assert len(tensors_of(tmp_path / "a")) == len(tensors_of(MIPHA))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "siglip_vision_model" and config["vision_feature_select_strategy"] == "full"
    export_parts(MIPHA, tmp_path / "parts", None)
    assert load_config(PHI, tmp_path / "parts" / "siglip").vision == mipha.config.vision


def test_mipha_in_two_bf16_shards_without_tokenizer_json(tmp_path, mipha):
    """As zhumj34/Mipha-3B is published."""
    tensors = {k: v.bfloat16() for k, v in tensors_of(MIPHA).items()}
    names = sorted(tensors)
    index = {}
    for number, part in ((1, names[:50]), (2, names[50:])):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
        index |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(MIPHA / "config.json", tmp_path)
    tokenizer = json.loads((MIPHA / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    there = load_model(tmp_path, torch.bfloat16)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(there.parameters(), mipha.parameters(), strict=True))
    export(tmp_path, tmp_path / "out", None)
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(MIPHA).get_vocab()


FOREIGN = {         # a tensor that the folder holds -> what is said about it
    "model.layers.0.mlp.gate_up_proj.weight": "a tensor of Phi-3; implemented here are Phi-2",
    "language_model.model.layers.0.mlp.gate_proj.weight": "a tensor of Gemma, or another",
    "model.vision_tower.encoder.layer.0.layer_scale1.lambda1": "a tensor of DINOv2; implemented here",
    "embeddings.patch_embeddings.projection.weight": "a tensor of DINOv2, or another vision tower",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_relatives_are_refused_in_words(name, tmp_path):
    folder = rewrite(MIPHA, tmp_path / "x", lambda tensors: tensors | {name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=FOREIGN[name]):
        load_model(folder)


@pytest.mark.parametrize("part, change, words", [
    ("vision", {"hidden_act": "quick_gelu"}, "the SigLIP tower's activation is 'quick_gelu'"),
    ("llm", {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32},
     "24 layers of width 2048 are Phi-1 or Phi-1.5"),
])
def test_variants_of_mipha_are_refused_in_words(part, change, words, tmp_path):
    def config(c):
        if part == "llm":
            return c | change
        vision = c["vision_config"]
        return c | {"vision_config": vision | {"vision_tower": vision["vision_tower"] | change}}
    with pytest.raises(ValueError, match=words):
        load_config(rewrite(MIPHA, tmp_path / "x", config=config))

# ---------------------------------------------------------------------------------------------------
# Config spellings


def test_config_spellings_of_every_era(tmp_path):
    expected = load_config(PHI, CLIP)
    five = {"rope_theta": None, "partial_rotary_factor": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}}
    folder = rewrite(PHI, tmp_path / "five", config=lambda c: {k: v for k, v in (c | five).items() if v is not None})
    assert load_config(folder, CLIP) == expected
    assert load_config(GOLDEN / "tiny-phi-mixer", CLIP) == expected


def test_missing_keys_take_the_official_defaults(tmp_path):
    def bare(c):
        return {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                "intermediate_size": 128, "image_size": 28, "patch_size": 14}
    assert load_config(PHI, rewrite(CLIP, tmp_path / "x", config=bare)).vision == VisionConfig(28, 14, 3, 2, 32, 128)
    folder = rewrite(PHI, tmp_path / "y", config=lambda c: {k: v for k, v in c.items() if k not in ("rope_theta", "resid_pdrop")} | {"resid_pdrop": 0.1})
    assert load_config(folder, CLIP).llm.rope_base == 10000.0 and load_config(folder, CLIP).llm.dropout == 0.1


@pytest.mark.parametrize("change, words", [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"qk_layernorm": True}, "qk_layernorm"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"hidden_act": "silu"}, "activation is 'silu'"),
    ({"num_key_value_heads": 1}, "key and value heads"),
    ({"hidden_size": "40"}, "hidden_size is '40'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    ({"num_hidden_layers": 10 ** 8}, "config.json says 100000000 llm layers"),
    ({"partial_rotary_factor": "0.4"}, "partial_rotary_factor is '0.4'"),
    ({"rope_parameters": [1]}, "rope_parameters is .1., expected an object"),
    ({"num_hidden_layers": 3}, "config.json says 3 llm layers, the tensors are of 2"),
])
def test_what_we_do_not_implement_is_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_config(rewrite(PHI, tmp_path / "x", config=lambda c: c | change), CLIP)


def test_image_mode(tmp_path):
    assert load_config(LLAVA).image_mode == "pad" and load_config(PHI, CLIP).image_mode == "crop"
    square = rewrite(LLAVA, tmp_path / "a", config=lambda c: c | {"image_aspect_ratio": "square"})
    assert load_config(square).image_mode == "crop"
    silent = rewrite(LLAVA, tmp_path / "b", config=lambda c: {k: v for k, v in c.items() if k != "image_aspect_ratio"})
    assert load_config(silent).image_mode == "crop"
    (silent / "preprocessor_config.json").write_text('{"do_pad": true}')
    assert load_config(silent).image_mode == "pad"

# ---------------------------------------------------------------------------------------------------
# Strictness


def test_missing_unexpected_and_misshapen_in_one_message(tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.fc3.weight"] = tensors.pop("model.layers.1.mlp.fc1.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:500]
        tensors["model.final_layernorm.bias"] = tensors["model.final_layernorm.bias"].int()
        return tensors
    folder = rewrite(PHI, tmp_path / "x", spoil)
    with pytest.raises(ValueError) as e:
        from_bases(folder, CLIP)
    for words in (str(folder), "1 missing: language_model.model.layers.1.mlp.fc1.weight (160, 40)",
                  "1 unexpected: model.layers.1.mlp.fc3.weight (160, 40)", "lm_head.weight (500, 40) float32, expected (512, 40)",
                  "final_layernorm.bias (40) int32"):
        assert words in str(e.value)


@pytest.mark.parametrize("packing", ["thirds", "heads"])
def test_a_fused_matrix_takes_its_packing_from_its_name(packing, tmp_path):
    """Renaming query_key_value to Wqkv changes where the rows go, so a file cannot be read under the other's packing by
    accident: the names of the rest of the layout would not fit either."""
    old, new = ("query_key_value", "Wqkv") if packing == "thirds" else ("mixer.Wqkv", "mixer.query_key_value")
    folder = rewrite(PHI if packing == "thirds" else GOLDEN / "tiny-phi-mixer", tmp_path / "x",
                     lambda t: {k.replace(old, new): v for k, v in t.items()})
    with pytest.raises(ValueError, match="12 missing: .*q_proj.*4 unexpected: .*" + new):
        from_bases(folder, CLIP)


def test_two_layouts_in_one_file_are_refused(tmp_path):
    folder = rewrite(PHI, tmp_path / "x", lambda t: t | tensors_of(GOLDEN / "tiny-phi-split"))
    with pytest.raises(ValueError, match="the same tensor in two layouts"):
        from_bases(folder, CLIP)


def test_one_of_q_k_v_alone_is_missing(tmp_path):
    def spoil(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        return tensors
    with pytest.raises(ValueError, match=r"1 missing: language_model.model.layers.0.self_attn.k_proj.weight \(40, 40\)"):
        from_bases(rewrite(GOLDEN / "tiny-phi-split", tmp_path / "x", spoil), CLIP)


def test_only_whole_parts_may_be_missing(tmp_path):
    with pytest.raises(ValueError, match="4 missing: multi_modal_projector"):
        load_into(LLaVAPhi(load_config(PHI, CLIP)), [PHI, CLIP])
    def spoil(tensors):
        del tensors["model.mm_projector.0.bias"]
        return tensors
    folder = rewrite(LLAVA, tmp_path / "x", spoil)
    with pytest.raises(ValueError, match="1 missing: multi_modal_projector.linear_1.bias"):
        load_into(LLaVAPhi(load_config(LLAVA)), [folder], allow_missing=("projector.",))


def test_wrong_kinds_are_named(tmp_path):
    for folders, words in (([CLIP, PHI], "looks like a CLIP vision tower, expected a Phi-2 language model"),
                           ([PHI, LLAVA], "looks like a LLaVA-Phi model, expected a CLIP vision tower"),
                           ([PHI], "looks like a Phi-2 language model, expected a LLaVA-Phi model"),
                           ([tmp_path / "phi", CLIP], "phi: no such folder; get it with: hf download microsoft/phi-2")):
        with pytest.raises(ValueError, match=words):
            load_config(*folders)
    other = tmp_path / "bert"
    other.mkdir()
    save_file({"bert.x": torch.zeros(2)}, other / "model.safetensors")
    with pytest.raises(ValueError, match="other tensors .bert.x"):
        load_config(other)


def test_a_renamed_folder_is_the_same_folder(tmp_path, model):
    shutil.copytree(LLAVA, tmp_path / "resnet50-lora-4bit")
    assert same(model, load_model(tmp_path / "resnet50-lora-4bit"))


def test_load_into_calls_copy_once_per_parameter():
    model, seen = LLaVAPhi(load_config(LLAVA)), []
    load_into(model, [LLAVA], copy=lambda parameter, tensor: seen.append((parameter, tensor.shape)))
    assert [p.shape for p, _ in seen] == [shape for _, shape in seen]
    assert {id(p) for p, _ in seen} == {id(p) for p in model.parameters()} and len(seen) == len(list(model.parameters()))

# ---------------------------------------------------------------------------------------------------
# Broken and hostile files


def header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BROKEN = {          # bytes of a model.safetensors -> what is said about it
    "truncated": (header({"a": entry(0, 16, [4])}, b"\0" * 12), r"incomplete download\? .file is 82 bytes; .*not fully covered"),
    "trailing bytes": (header({"a": entry(0, 16, [4])}, b"\0" * 20), "file is 90 bytes; .*not fully covered"),
    "header of a terabyte": (header({}, length=2 ** 40), "header says it alone has 1099511627776"),
    "header cut": (header({"a": entry(0, 16, [4])})[:30], "incomplete download"),
    "empty": (b"", "file is 0 bytes"),
    "wrong shape": (header({"a": entry(0, 16, [5])}, b"\0" * 16), "invalid shape, data type, or offset for tensor"),
    "overlap": (header({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, b"\0" * 24), "invalid offset for tensor `b`"),
    "hole": (header({"a": entry(0, 16, [4]), "b": entry(20, 36, [4])}, b"\0" * 36), "invalid offset for tensor `b`"),
    "negative": (header({"a": entry(0, 16, [-2, -2])}, b"\0" * 16), "invalid value: integer `-2`"),
    "shape is text": (header({"a": entry(0, 16, "4444")}, b"\0" * 16), "not a safetensors file"),
    "a dtype of another kind": (header({"a": entry(0, 4, [4], "F8_E4M3")}, b"\0" * 4), "a is of dtype F8_E4M3, which is not read here"),
    "unknown dtype": (header({"a": entry(0, 16, [4], "F4")}, b"\0" * 16), "invalid shape, data type, or offset for tensor"),
    "offsets are text": (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}}, b"\0" * 16), "not a safetensors file"),
    "a list": (header([1, 2, 3]), "not a safetensors file"),
    "deep": (header(b"[" * 100_000), "invalid JSON in header"),
    "html": (b"<!DOCTYPE html><html><head><title>404</title></head></html>", "header says it alone has"),
    "a million entries": (header({f"{i:x}": entry(0, 0, [0]) for i in range(10 ** 6)}), "header says it alone has"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors(name, tmp_path):
    data, words = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as e:
        read_folder(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def rezip(data: bytes, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", method) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return file.getvalue()


def many_records() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(30_000):
            archive.writestr(f"archive/{'x' * 60}{i}", b"")
    return file.getvalue()


BROKEN_BINS = {
    "runs code": (lambda t: save_bytes({"a": Evil(t / "trace")}), "more than plain tensors"),
    "runs code, no zip": (lambda t: pickle.dumps(Evil(t / "trace")), "not a file of torch.save"),
    "sparse": (lambda t: save_bytes({"a": torch.eye(3).to_sparse()}), "'a' is not a plain dense tensor|more than plain tensors"),
    "quantised": (lambda t: save_bytes({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}), "plain"),
    "nested": (lambda t: save_bytes({"state": {"a": torch.ones(3)}}), "'state' is not a plain dense tensor"),
    "a tensor alone": (lambda t: save_bytes(torch.ones(3)), "expected a dict of tensors"),
    "transposed": (lambda t: save_bytes({"a": torch.ones(3, 4).T}), "'a' is not stored row by row"),
    "cut": (lambda t: save_bytes({"a": torch.ones(300)})[:-200], "incomplete download"),
    "compressed": (lambda t: rezip(save_bytes({"a": torch.zeros(300)}), zipfile.ZIP_DEFLATED), "compressed"),
    "html": (lambda t: b"<!DOCTYPE html><html></html>", "not a file of torch.save"),
    "many records": (lambda t: many_records(), "table of contents"),
}


@pytest.mark.parametrize("name", BROKEN_BINS)
@pytest.mark.filterwarnings("ignore")
def test_broken_bin(name, tmp_path):
    make, words = BROKEN_BINS[name]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match=words) as e:
        read_folder(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "trace").exists()


def test_a_bin_whose_pickle_claims_more_than_there_is(tmp_path):
    """A lying shape must end at the end of the file at the latest: nothing outside of it is ever read or allocated."""
    data = save_bytes({"a": torch.ones(4)})
    lie = data.replace(b"K\x04\x85", b"M\xff\xff\x85"[:4]) if b"K\x04\x85" in data else data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {r.filename: archive.read(r) for r in archive.infolist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    records[name] = records[name].replace(b"K\x04", b"J\xff\xff\xff\x0f")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    (tmp_path / "pytorch_model.bin").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_folder(tmp_path)


@pytest.mark.parametrize("shard, words", [
    ("../x.safetensors", "not the plain name of a shard"),
    ("/etc/passwd", "not the plain name of a shard"),
    ("sub/x.safetensors", "not the plain name of a shard"),
    ("x.bin", "not the plain name of a shard"),
    ("gone.safetensors", "gone.safetensors: named in model.safetensors.index.json, but not there"),
    (7, "no weight_map"),
])
def test_index_files_do_not_leave_the_folder(shard, words, tmp_path):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path, inside / "sub"):
        save_file({"a": torch.zeros(2)}, place / "x.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=words):
        read_folder(inside)


def test_a_tensor_in_two_shards(tmp_path):
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(2)}, tmp_path / shard)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds x, which a.safetensors holds too"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["<!DOCTYPE html><html>", "", "[1]", "{\"a\": ", "[" * 100_000])
def test_a_config_that_is_not_json(text, tmp_path):
    folder = rewrite(LLAVA, tmp_path / "x")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: "):
        load_config(folder)

# ---------------------------------------------------------------------------------------------------
# Saving


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    export(LLAVA, out, None)
    return out


def test_export_then_load_is_the_same_model(saved, model):
    assert same(load_model(saved), model) and load_config(saved) == load_config(LLAVA)


def test_export_of_an_export_is_byte_identical(saved, tmp_path):
    export(saved, tmp_path / "again", None)
    assert contents(saved) == contents(tmp_path / "again")


def test_the_saved_tensors_are_what_others_read(saved):
    """Read with the safetensors library: legacy names, all three vision layers, nothing of ours in between."""
    tensors, original = load_file(saved / "model.safetensors"), tensors_of(LLAVA)
    assert len(tensors) == 33 + 55 + 4
    for name in ("language_model.lm_head.bias", "multi_modal_projector.linear_2.weight", "vision_tower.vision_model.post_layernorm.weight",
                 "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight", "language_model.model.layers.1.self_attn.k_proj.weight"):
        assert name in tensors
    assert torch.equal(tensors["vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"],
                       original["model.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"])
    fused = original["model.layers.1.self_attn.query_key_value.weight"].view(2, 3, 20, 40)
    assert torch.equal(tensors["language_model.model.layers.1.self_attn.k_proj.weight"], fused[:, 1].reshape(40, 40))
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saved_files_are_readable_like_any_new_file(saved, tmp_path):
    """Group and others too, as the umask has it: models are shared."""
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_saved_config(saved):
    config = json.loads((saved / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and text["architectures"] == ["PhiForCausalLM"]
    assert config["image_token_index"] == 444 and config["vision_feature_layer"] == -2 and vision["num_hidden_layers"] == 3
    assert text["partial_rotary_factor"] == text["rope_parameters"]["partial_rotary_factor"] == 0.4
    assert config["tie_word_embeddings"] is False and text["eos_token_id"] == 0 and config["torch_dtype"] == "float32"


def test_shards(saved, tmp_path, monkeypatch, model):
    monkeypatch.setattr("lib.save_weights.SHARD_BYTES", 100_000)
    export(LLAVA, tmp_path / "x", None)
    shards = sorted(path.name for path in (tmp_path / "x").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors, index = {}, json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    for shard in shards:
        part = load_file(tmp_path / "x" / shard)
        assert {name for name, where in index["weight_map"].items() if where == shard} == part.keys()
        tensors |= part
    whole = load_file(saved / "model.safetensors")
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[k], whole[k]) for k in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values()) and same(load_model(tmp_path / "x"), model)


def test_merge_joins_the_bases_around_a_new_projector(tmp_path):
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        merge(PHI, CLIP, tmp_path / out, seed, None)
    a, b, c = (load_model(tmp_path / out) for out in "abc")
    assert same(a, b) and same(a, c, "llm") and same(a, c, "vision") and not same(a, c, "projector")
    assert same(a, from_bases(PHI, CLIP), "llm") and same(a, from_bases(PHI, CLIP), "vision")
    weights = torch.cat([p.flatten() for name, p in a.projector.named_parameters() if name.endswith("weight")])
    assert 0.018 < weights.std() < 0.022 and not any(p.any() for name, p in a.projector.named_parameters() if name.endswith("bias"))


def test_merge_names_a_missing_embedding(tmp_path):
    """Its dtype is the new projector's, and was looked up before anybody had checked that it is there."""
    without = rewrite(PHI, tmp_path / "x", lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k})
    with pytest.raises(ValueError, match="1 missing: language_model.model.embed_tokens.weight"):
        merge(without, CLIP, tmp_path / "out", 0, None)
    assert not (tmp_path / "out").exists()


def test_half_precision_bases_are_kept_but_never_computed_in(tmp_path):
    half = rewrite(PHI, tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()})
    merge(half, CLIP, tmp_path / "kept", 0, None)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"
    tensors = load_file(tmp_path / "kept" / "model.safetensors")
    assert tensors["language_model.lm_head.weight"].dtype == torch.float16
    assert tensors["vision_tower.vision_model.pre_layrnorm.weight"].dtype == torch.float32
    merge(half, CLIP, tmp_path / "wide", 0, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.bfloat16}


def test_save_model_takes_tensors_or_functions_in_any_order_and_the_rest_from_the_sources(tmp_path, model):
    trained = {name: p + 1 for name, p in model.named_parameters()}
    save_model(tmp_path / "dict", trained, model.config, [LLAVA])
    later = {name: lambda tensor=tensor: tensor for name, tensor in reversed(trained.items())}
    save_model(tmp_path / "functions", later, model.config, [LLAVA], torch.float32)
    assert contents(tmp_path / "dict") == contents(tmp_path / "functions")
    there = load_model(tmp_path / "dict")
    assert all(torch.equal(p, trained[name]) for name, p in there.named_parameters())
    only = {name: p for name, p in trained.items() if name.startswith("projector")}
    save_model(tmp_path / "part", only, model.config, [LLAVA])
    assert same(load_model(tmp_path / "part"), model, "llm") and same(load_model(tmp_path / "part"), there, "projector")


def test_saving_into_a_training_folder_keeps_what_is_there(tmp_path, model):
    out = tmp_path / "run"
    (out / "step_000010").mkdir(parents=True)
    (out / "config.json").write_text('{"training": {"lr": 0.001}}')
    (out / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):                          # a second save replaces the first
        save_model(out, {}, model.config, [LLAVA])
        assert same(load_model(out), model) and (out / "step_000010").is_dir() and (out / "metrics.jsonl").exists()
        assert json.loads((out / "config.json").read_text())["training"] == {"lr": 0.001}
    export(out, tmp_path / "x", None)
    assert "training" not in json.loads((tmp_path / "x" / "config.json").read_text())


def test_other_peoples_folders_are_not_touched(tmp_path, model):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not a saved model's"):
        export(LLAVA, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_nothing(tmp_path, model, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")
    monkeypatch.setattr("lib.save_weights.write_texts", full)
    with pytest.raises(OSError, match="No space left"):
        export(LLAVA, tmp_path / "x", None)
    assert not any(tmp_path.iterdir())


def test_a_crash_while_files_are_moved_leaves_no_model_that_would_load(tmp_path, monkeypatch):
    out = tmp_path / "run"
    export(LLAVA, out, None)
    replaced = []
    def crash(a, b, real=os.replace):
        if len(replaced) == 3:
            raise KeyboardInterrupt
        replaced.append(b)
        real(a, b)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export(LLAVA, out, None)
    with pytest.raises(ValueError):
        load_model(out)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_checksums_are_sha256sums_own(tmp_path, saved):
    """Of a whole model and of its parts; every file with tensors is listed."""
    export_parts(LLAVA, tmp_path / "parts", None)
    for folder in (saved, tmp_path / "parts", tmp_path / "parts" / "phi-2", tmp_path / "parts" / "clip"):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert done.returncode == 0 and done.stdout.splitlines() == [f"{file}: OK" for file in files] and files


def test_inspect_finds_one_flipped_bit(tmp_path, saved, capsys):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    assert main(["inspect", str(folder)]) == 0
    assert "checksums  verified: 1 files are as they were written" in capsys.readouterr().out
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    assert main(["inspect", str(folder)]) == 2
    assert "problem    " + str(folder) + ": model.safetensors is not what was written" in capsys.readouterr().out
    load_model(folder)                          # nothing else would have noticed


@pytest.mark.parametrize("text, words", [
    ("0" * 64 + "  gone.safetensors\n", "gone.safetensors is not there"),
    ("0" * 64 + "  ../model.safetensors\n", "is not a checksum and the name of a file here"),
    ("<html>", "'<html>' is not a checksum"),
])
def test_odd_checksum_files(text, words, tmp_path, saved, capsys):
    shutil.copytree(saved, tmp_path / "x")
    (tmp_path / "x" / "SHA256SUMS").write_text(text)
    assert main(["inspect", str(tmp_path / "x")]) == 2 and words in capsys.readouterr().out


def test_tokenizer_files(tmp_path, saved):
    """From vocab + merges + added tokens the same tokenizer as from tokenizer.json; <image> is the first id behind the others."""
    tokenizers = pytest.importorskip("tokenizers")
    original = json.loads((PHI / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(original["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(original["model"]["merges"]) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"   ": 445, "  ": 444}))
    built = tokenizers.Tokenizer.from_str(load_tokenizer(tmp_path).to_str())    # as it is saved: there the end token is one again
    plain = tokenizers.Tokenizer.from_file(str(PHI / "tokenizer.json"))
    for text in ("A chat. USER: What is this?\n ASSISTANT:", "tab\there, naïve 中文 🙂", "x<|endoftext|>y"):
        assert built.encode(text).ids == plain.encode(text).ids and built.decode(built.encode(text).ids) == plain.decode(plain.encode(text).ids)
    assert built.encode("a   b").ids.count(445) == 1
    with_image = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert with_image.token_to_id("<image>") == 444 == json.loads((saved / "config.json").read_text())["image_token_index"]
    assert load_tokenizer(saved).get_vocab() == load_tokenizer(PHI).get_vocab()
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        export(rewrite(LLAVA, tmp_path / "none", keep=("config.json",)), tmp_path / "x", None)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_of_a_training_checkpoint(lora, tmp_path, model):
    """What trained comes from the checkpoint (adapters merged), the rest from where the run began."""
    weights = {f"model.{name}": p + 1 for name, p in model.named_parameters() if name.startswith("projector")}
    a, b = torch.randn(4, 40), torch.randn(160, 4)
    if lora:
        weights |= {"model.llm.h.1.mlp.fc.lora_a": a, "model.llm.h.1.mlp.fc.lora_b": b}
    step = tmp_path / "step_000007"
    dcp.save(weights | {"exp_avg.projector.fc.bias": torch.zeros(40)}, no_dist=True,
             storage_writer=HuggingFaceStorageWriter(str(step), save_distributed=True))
    settings = {"dropout": 0.2, "image_mode": "crop", "dtype": "float32", "stage": "finetune", "lora_alpha": 8.0}
    (step / "checkpoint.json").write_text(json.dumps({"config": settings, "sources": [str(LLAVA)]}))
    export(step, tmp_path / "out", None)
    there, old = load_model(tmp_path / "out"), dict(model.named_parameters())
    assert there.config.image_mode == "crop" and there.config.llm.dropout == 0.2
    for name, p in there.named_parameters():
        expected = old[name] + 2.0 * b @ a if lora and name == "llm.h.1.mlp.fc.weight" else old[name] + name.startswith("projector")
        torch.testing.assert_close(p, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_of_a_language_models_checkpoint_is_as_the_run_set_it(tmp_path, model):
    """The end of a run of --stage sft writes its --dropout; a checkpoint on the way wrote the old folder's."""
    step = tmp_path / "step_000003"
    dcp.save({"model.llm.ln_f.bias": model.llm.ln_f.bias + 1}, no_dist=True,
             storage_writer=HuggingFaceStorageWriter(str(step), save_distributed=True))
    settings = {"dropout": 0.3, "image_mode": "crop", "dtype": "bfloat16", "stage": "sft", "lora_alpha": 8.0}
    (step / "checkpoint.json").write_text(json.dumps({"config": settings, "sources": [str(PHI)]}))
    export(step, tmp_path / "out", None)
    assert load_config(tmp_path / "out", CLIP).llm.dropout == 0.3
    there, old = load_file(tmp_path / "out" / "model.safetensors"), from_bases(PHI, CLIP).llm
    assert {t.dtype for t in there.values()} == {torch.bfloat16} and len(there) == 33
    assert torch.equal(there["model.final_layernorm.bias"], (model.llm.ln_f.bias + 1).bfloat16())
    assert torch.equal(there["lm_head.weight"], old.lm_head.weight.bfloat16())


@pytest.mark.parametrize("processor", [{"image_processor": "LlavaImageProcessor"}, {"image_processor": [1]}])
def test_an_odd_processor_file_is_refused_with_words(processor, tmp_path):
    folder = rewrite(LLAVA, tmp_path / "x", config=lambda c: {k: v for k, v in c.items() if k != "image_aspect_ratio"})
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="processor_config.json: image_processor is .*expected an object"):
        load_config(folder)


def test_export_parts_and_join_them_again(tmp_path, model):
    export_parts(LLAVA, tmp_path / "parts", None)
    assert read_json(tmp_path / "parts" / "clip" / "config.json")["vision_feature_layer"] == -2    # for llama.cpp
    assert (tmp_path / "parts" / "phi-2" / "chat_template.jinja").is_file()
    assert same(from_bases(tmp_path / "parts" / "phi-2", tmp_path / "parts" / "clip"), model, "llm")
    assert same(from_bases(tmp_path / "parts" / "phi-2", tmp_path / "parts" / "clip"), model, "vision")
    projector = load_file(tmp_path / "parts" / "mm_projector.safetensors")
    assert torch.equal(projector["model.mm_projector.2.weight"], model.projector.proj.weight) and len(projector) == 4
    export_parts(LLAVA, tmp_path / "parts", None)       # over itself
    shutil.rmtree(tmp_path / "parts" / "clip")
    export_parts(LLAVA, tmp_path / "parts", None)

# ---------------------------------------------------------------------------------------------------
# The command line, and memory


def test_commands(tmp_path, capsys):
    main(["merge", "--llm", str(PHI), "--vision", str(CLIP), "--out", str(tmp_path / "base")])
    page = capsys.readouterr().out
    for words in ("a LLaVA-Phi model", "80,832 parameters", "<|endoftext|> is 0", "missing    nothing", "images     crop", "sample.py"):
        assert words in page
    main(["inspect", str(CLIP)])
    page = capsys.readouterr().out
    for words in ("a CLIP vision tower", "23 tensors: the text tower", "18 tensors: layers and LayerNorm after the hidden state", "merge --vision"):
        assert words in page
    with pytest.raises(ValueError, match="looks like a Phi-2 language model, expected a LLaVA-Phi model"):
        main(["export", "--model", str(PHI), "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="overflow in fp16"):
        main(["export", "--model", str(LLAVA), "--out", str(tmp_path / "x"), "--dtype", "float16"])
    assert not (tmp_path / "x").exists()


PAGES = {           # folder -> what a person wants to know of it
    PHI: ("a Phi-2 language model", "3 x safetensors", "fused query_key_value, packed head by head",
          "2 layers of width 40, 2 heads, 2048 positions, 512 rows of vocabulary", "tokenizer.json: 444 tokens"),
    GOLDEN / "tiny-phi-split": ("a Phi-2 language model", "split q, k, v", "missing    a tokenizer"),
    GOLDEN / "tiny-phi-mixer": ("a Phi-2 language model", "mixer.Wqkv", "missing    a tokenizer"),
    CLIP: ("a CLIP vision tower", "1 x bin", "28 x 28 pixels make 4 patches, 2 of 3 layers are used, of width 32",
           "crop: the square in the middle", "checksums  none"),
    LLAVA: ("a LLaVA-Phi model", "fused query_key_value", "pad: the whole picture, padded", "projector  4 tensors", "sample.py --model"),
    MIPHA: ("a Mipha model", "split q, k, v", "33 x 33 pixels make 4 patches, 2 of 3 layers are used, of width 36",
            "pad: the whole picture, padded", "11 tensors: attention-pooling head", "sample.py --model"),
}


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_inspect_on_every_layout(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    page = capsys.readouterr().out
    for words in PAGES[folder]:
        assert words in page, words


def test_inspect_of_a_fragment(tmp_path, capsys):
    """A head without layers is in no layout."""
    folder = rewrite(PHI, tmp_path / "x", lambda t: {"lm_head.bias": t["lm_head.bias"]})
    assert main(["inspect", str(folder)]) == 2
    assert "problem    " in capsys.readouterr().out


def test_an_error_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "load_weights.py", "merge", "--llm", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: no such folder; get it with: hf download microsoft/phi-2 --local-dir nowhere\n"


@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["merge", "--help"], 0), (["merge", "--speed"], 2), (["export"], 2)])
def test_help_and_wrong_flags_do_not_wait_for_torch(flags, code, tmp_path):
    """torch takes seconds to import; here it cannot be imported at all."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    done = subprocess.run([sys.executable, "load_weights.py", *flags], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == code, done.stderr
    assert code == 0 or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


MEASURE = """
import re, sys, torch
from pathlib import Path
from load_weights import load_config, load_into, meta_model
def memory(what):       # getrusage would not do: it remembers the parent's peak
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def copy(parameter, tensor):
    parameter.data.copy_(tensor)
    seen.append(memory("RssAnon"))      # now there are both: all of the model so far, and what was read for it
phi, clip = map(Path, sys.argv[1:])
model = meta_model(load_config(phi, clip)).bfloat16().to_empty(device="cpu")
before, seen, total = memory("RssAnon"), [], memory("VmRSS")
load_into(model, [phi, clip], copy, allow_missing=("projector.",))
print(max(seen) - before, memory("VmHWM") - total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_needs_the_model_and_one_tensor(suffix, tmp_path):
    """A fresh process, 100 MB of bf16 weights of which the largest tensor is 42 MB: a second copy of the model would show."""
    config = json.loads((PHI / "config.json").read_text()) | {"vocab_size": 51200, "hidden_size": 400, "intermediate_size": 800}
    shapes = {"model.embed_tokens.weight": (51200, 400), "lm_head.weight": (51200, 400), "lm_head.bias": (51200,)}
    for name, tensor in tensors_of(PHI).items():
        shapes.setdefault(name, [{40: 400, 120: 1200, 160: 800}.get(n, n) for n in tensor.shape])
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    size, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), str(CLIP)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anonymous, everything = map(int, done.stdout.split())
    limit = size + largest + 15e6
    assert anonymous < limit, f"{anonymous:,} bytes for {size:,} of weights, the largest {largest:,}"
    # A .bin is mapped: its pages are counted too while there is room for them, but the kernel takes them back at will.
    assert suffix == "bin" or everything < limit, f"{everything:,} bytes for {size:,} of weights, the largest {largest:,}"


def test_memory_is_taken_only_for_what_the_files_hold(tmp_path):
    """A config.json that promises a tensor of 75 GB is compared with the files before anything is allocated."""
    def enlarge(config: dict) -> dict:
        config["vision_config"]["vision_tower"]["patch_size"] = 14_000
        return config

    folder = rewrite(LLAVA, tmp_path / "model", config=enlarge)
    with pytest.raises(ValueError, match="misshapen.*14000"):
        load_model(folder)


@pytest.mark.parametrize("change", [{"config": None}, {"sources": "x"}, {"sources": [3]}])
def test_a_damaged_checkpoint_json_is_not_exported(tmp_path, change):
    settings = {"stage": "finetune", "dropout": 0.0, "image_mode": "pad", "lora_alpha": 16.0, "dtype": "fp32"}
    saved = {"config": settings, "sources": [str(LLAVA)]} | change
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="checkpoint.json"):
        export(tmp_path, tmp_path / "out", None)
    for name, value in (("dtype", "fp16"), ("image_mode", "x"), ("dropout", "0"), ("stage", None)):
        saved = {"config": settings | {name: value}, "sources": [str(LLAVA)]}
        (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
        with pytest.raises(ValueError, match="checkpoint.json"):
            export(tmp_path, tmp_path / "out", None)
