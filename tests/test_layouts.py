"""Every layout and every spelling of config.json that was ever published gives the same model."""
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (GOLDEN, TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, load_weights_command, model_from, rewrite,
                     same, siglip_folder, tensors_of, train_flags, without)
from torch import Tensor
from training import train_here

import sample
from lib.configs import config_of
from lib.folders import meta_model, open_folder, open_weights, saved_shapes
from lib.layouts import to_ours, to_saved
from lib.tensor_files import Pieces, Stored
from load_weights import load_model
from model import LLaVAConfig
from vision import CLIP_L_336, SIGLIP_SO400M_384, VisionConfig

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------
# Names


def test_names_go_both_ways():
    for folder in (TINY_MODEL, TINY_MIPHA):
        for name in saved_shapes(meta_model(open_weights(folder).config)):
            back = [to_ours(saved) for saved in to_saved(name)]
            pieces = ["q", "k", "v"] if len(back) == 3 else ["whole"]
            assert back == [(name, piece) for piece in pieces]
    assert to_ours("transformer.h.7.mixer.Wqkv.bias") == ("llm.h.7.attn.qkv.bias", "whole")
    assert to_ours("model.layers.7.self_attn.query_key_value.bias") == ("llm.h.7.attn.qkv.bias", "by head")
    assert to_ours("something.else") is None


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """A function that gives each tensor the new beginning of the first pair whose old one fits."""
    def rename(old: str) -> str:
        for begin, new in pairs:
            if old.startswith(begin):
                return new + old.removeprefix(begin)
        return old
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


TO_TRANSFORMERS = (("model.mm_projector.0.", "multi_modal_projector.linear_1."),
                   ("model.mm_projector.2.", "multi_modal_projector.linear_2."))
TO_TRANSFORMERS_5 = (("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
                     ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."))
SPELLINGS = {           # of the released LLaVA-Phi folder
    "as released": renamed(),
    "transformers 4": renamed(*TO_TRANSFORMERS, ("model.vision_tower.", "vision_tower."), ("", "language_model.")),
    "transformers 5, saved": renamed(*TO_TRANSFORMERS, ("model.vision_tower.vision_model.", "vision_tower."),
                                     ("", "language_model.")),
    "transformers 5, in memory": renamed(*TO_TRANSFORMERS_5,
                                         ("model.vision_tower.vision_model.", "model.vision_tower."),
                                         ("model.", "model.language_model.")),
    "LLaVA's nesting": renamed(("model.vision_tower.", "model.vision_tower.vision_tower.")),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_joined_model(name, tmp_path, tiny_model):
    assert same(tiny_model, load_model(rewrite(TINY_MODEL, tmp_path / "x", SPELLINGS[name])))


def test_the_joined_model_with_q_k_and_v_apart(tmp_path, tiny_model):
    """As Mipha is published, and LLaVA-Phi if a newer transformers saves it."""
    def split(tensors: Tensors) -> Tensors:
        others = {name: x for name, x in tensors.items() if "vision" in name or "projector" in name}
        return others | tensors_of(GOLDEN / "tiny-phi-split")

    there = load_model(rewrite(TINY_MODEL, tmp_path / "x", split))
    assert same(there, model_from(TINY_PHI, TINY_CLIP), "llm")
    assert same(there, tiny_model, "vision") and same(there, tiny_model, "projector")


def as_one_list(tensors: Tensors) -> Tensors:
    """phi-msft's names -> the earliest ones: layers.0 is the embedding, the last one is the head."""
    rename = renamed(("transformer.embd.", "layers.0."), ("lm_head.", "layers.3."),
                     ("transformer.h.0.", "layers.1."), ("transformer.h.1.", "layers.2."))
    return rename(tensors)


def test_every_layout_of_phi(tmp_path):
    earliest = rewrite(GOLDEN / "tiny-phi-mixer", tmp_path / "x", as_one_list)
    fused = model_from(TINY_PHI, TINY_CLIP)
    for folder in (GOLDEN / "tiny-phi-split", GOLDEN / "tiny-phi-mixer", earliest):
        assert same(fused, model_from(folder, TINY_CLIP), "llm"), folder


def vision_only(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name.startswith("vision_model.")}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("vision_model."): x for name, x in vision_only(tensors).items()}


def with_position_ids(tensors: Tensors) -> Tensors:
    return tensors | {"vision_model.embeddings.position_ids": torch.arange(5)[None],
                      "text_model.embeddings.position_ids": torch.arange(77)[None]}


@pytest.mark.parametrize("change", [vision_only, without_prefix, with_position_ids])
def test_every_spelling_of_clip(change, tmp_path):
    folder = rewrite(TINY_CLIP, tmp_path / "x", change, config=lambda config: config["vision_config"])
    assert same(model_from(TINY_PHI, TINY_CLIP), model_from(TINY_PHI, folder), "vision")


@pytest.mark.parametrize("kind", ["whole", "vision only", "without prefix"])
def test_every_spelling_of_siglip(kind, tmp_path):
    """Recognized by its tensors; how it wants its pictures is not asked, since stage 1 comes next."""
    folder, mipha = siglip_folder(kind, tmp_path / "resnet"), load_model(TINY_MIPHA)
    there = model_from(TINY_PHI, folder)
    assert same(there, mipha, "vision") and there.config.image_mode == "squash"
    assert replace(there.config, image_mode="pad") == mipha.config
    assert len(open_folder(folder).dropped) == 11 + (4 if kind == "whole" else 0)


def test_rotary_buffers_are_left_out_by_name(tmp_path):
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = rewrite(TINY_PHI, tmp_path / "x", lambda tensors: tensors | stray)
    assert same(model_from(TINY_PHI, TINY_CLIP), model_from(folder, TINY_CLIP), "llm")
    assert list(open_folder(folder).dropped) == list(stray)


def test_a_renamed_folder_is_the_same_folder(tmp_path, tiny_model):
    shutil.copytree(TINY_MODEL, tmp_path / "resnet50-lora-4bit")
    assert same(tiny_model, load_model(tmp_path / "resnet50-lora-4bit"))


@pytest.mark.parametrize("folder, old, new", [
    (TINY_PHI, "query_key_value", "Wqkv"), (GOLDEN / "tiny-phi-mixer", "mixer.Wqkv", "mixer.query_key_value")])
def test_a_fused_matrix_takes_its_packing_from_its_name(folder, old, new, tmp_path):
    """Renaming one to the other changes where its rows go. That cannot happen by accident: a file whose other names
    are not of that layout is refused."""
    changed = rewrite(folder, tmp_path / "x", lambda tensors: {k.replace(old, new): x for k, x in tensors.items()})
    with pytest.raises(ValueError, match="12 missing: .*q_proj.*4 unexpected: .*" + new):
        model_from(changed, TINY_CLIP)


def test_two_layouts_in_one_file_are_refused(tmp_path):
    folder = rewrite(TINY_PHI, tmp_path / "x", lambda tensors: tensors | tensors_of(GOLDEN / "tiny-phi-split"))
    with pytest.raises(ValueError, match="[qkv]_proj.* and .*query_key_value.* are the same tensor"):
        open_folder(folder)


@pytest.mark.parametrize("name, words", [
    ("model.layers.0.mlp.gate_up_proj.weight", "a tensor of Phi-3; only Phi-2 is implemented here"),
    ("language_model.model.layers.0.mlp.gate_proj.weight", "a tensor of Gemma, or another"),
    ("model.vision_tower.encoder.layer.0.layer_scale1.lambda1", "a tensor of DINOv2; only Phi-2 is implemented here"),
    ("embeddings.patch_embeddings.projection.weight", "a tensor of DINOv2, or another vision tower"),
])
def test_related_models_are_refused_by_their_names(name, words, tmp_path):
    folder = rewrite(TINY_MIPHA, tmp_path / "x", lambda tensors: tensors | {name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=words):
        open_weights(folder)

# ---------------------------------------------------------------------------------------------------
# config.json


def test_config_spellings_of_every_era(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}

    def as_transformers_5(config: dict) -> dict:
        return without(config, "rope_theta", "partial_rotary_factor") | {"rope_parameters": rope}

    expected = open_weights(TINY_PHI, TINY_CLIP).config
    for folder in (rewrite(TINY_PHI, tmp_path / "5", config=as_transformers_5), GOLDEN / "tiny-phi-mixer"):
        assert open_weights(folder, TINY_CLIP).config == expected


def test_missing_keys_take_the_official_defaults(tmp_path):
    bare = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 128, "image_size": 28, "patch_size": 14}
    clip = rewrite(TINY_CLIP, tmp_path / "clip", config=lambda config: bare)
    phi = rewrite(TINY_PHI, tmp_path / "phi",
                  config=lambda config: without(config, "rope_theta") | {"resid_pdrop": 0.1})
    config = open_weights(phi, clip).config
    assert config.vision == VisionConfig(28, 14, 3, 2, 32, 128)
    assert config.llm.rope_base == 10000.0 and config.llm.dropout == 0.1


def test_config_of_mipha():
    tower = VisionConfig(33, 14, 3, 2, 36, 116, eps=1e-6, class_token=False, pre_norm=False, patch_bias=True,
                         gelu="tanh", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = open_weights(TINY_MIPHA).config
    assert config.vision == tower and config.image_mode == "pad" and tower.n_patches == 4


@pytest.mark.parametrize("change, words", [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"rope_parameters": [1]}, "rope_parameters is .1., expected an object"),
    ({"qk_layernorm": True}, "qk_layernorm"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1, and only 2"),
    ({"hidden_size": "40"}, "hidden_size is '40'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    ({"partial_rotary_factor": "0.4"}, "partial_rotary_factor is '0.4'"),
    ({"num_hidden_layers": 10 ** 8}, "config.json says 100000000 llm layers"),
    ({"num_hidden_layers": 3}, "config.json says 3 llm layers, the tensors are of 2"),
    ({"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32},
     "24 layers of width 2048 are Phi-1 or Phi-1.5"),
])
def test_variants_that_are_not_implemented_are_refused(change, words, tmp_path):
    folder = rewrite(TINY_PHI, tmp_path / "x", config=lambda config: config | change)
    with pytest.raises(ValueError, match=words):
        open_weights(folder, TINY_CLIP)


@pytest.mark.parametrize("change", [
    {"sliding_window": 2047}, {"attention_dropout": 0.1}, {"embd_pdrop": 0.1}, {"attn_pdrop": 0.1}, {"head_dim": 64},
    {"hidden_act": "relu"}, {"activation_function": "relu", "hidden_act": None}, {"partial_rotary_factor": 1.5},
    {"partial_rotary_factor": 0.05}, {"rotary_dim": 7}, {"rope_parameters": {"partial_rotary_factor": 0.0}},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
], ids=str)
def test_keys_of_a_language_model_are_read_or_refused_by_name(change, tmp_path):
    """Ignored, each would change what is computed, and nothing would show it."""
    phi = rewrite(TINY_PHI, tmp_path / "x", config=lambda config: config | change)
    with pytest.raises(ValueError, match="would rotate|" + next(iter(change))) as e:
        open_weights(phi, TINY_CLIP)
    assert str(e.value).startswith(f"{phi / 'config.json'}: ")


LLAVA_KEYS = {          # a key of LLaVA's family -> values that would change what is computed
    "mm_projector_type": ["linear", "mlp3x_gelu", "identity", ["mlp2x_gelu"]], "projector_hidden_act": ["relu"],
    "multimodal_projector_bias": [False], "mm_resampler_type": ["perceiver"], "mm_patch_merge_type": ["spatial_unpad"],
    "mm_vision_select_feature": ["cls_patch"], "vision_feature_select_strategy": ["full"],
    "vision_feature_layer": [-1], "mm_vision_select_layer": [-1, [-2, -5]],
    "mm_use_im_start_end": [True], "mm_use_im_patch_token": [True], "use_s2": [True], "s2": [True],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
}


@pytest.mark.parametrize("key", LLAVA_KEYS)
def test_keys_of_llavas_family_are_refused_wherever_they_stand(key, tmp_path):
    """At the top of config.json, as in LLaVA, or inside vision_config, as in LLaVA-Phi."""
    def put(path: tuple[str, ...], value: object) -> Callable[[dict], dict]:
        def change(config: dict) -> dict:
            inner = config
            for name in path:
                inner = inner[name]
            inner[key] = value
            return config
        return change

    places = [(), ("vision_config",), ("vision_config", "vision_tower"), ("vision_config", "mm_projector")]
    for i, value in enumerate(LLAVA_KEYS[key]):
        for j, place in enumerate(places[:1] if key.endswith("_layer") else places):
            folder = rewrite(TINY_MODEL, tmp_path / f"{i} {j}", config=put(place, value))
            words = f"config.json: ({key}|mm_vision_select_layer or .*) .*, and only .* is implemented here"
            with pytest.raises(ValueError, match=words):
                open_weights(folder)
    silent = rewrite(TINY_MODEL, tmp_path / "null", config=put((), None))
    assert open_weights(silent).config == open_weights(TINY_MODEL).config


@pytest.mark.parametrize("change", [{"num_channels": 4}, {"attention_dropout": 0.1}, {"hidden_act": "gelu"},
                                    {"dropout": 0.1}, {"num_attention_heads": 3}], ids=str)
def test_keys_of_a_tower_are_refused_by_name(change, tmp_path):
    def config(whole: dict) -> dict:
        whole["vision_config"] |= change
        return whole

    with pytest.raises(ValueError, match=f"{next(iter(change))}|not a multiple of 3 heads"):
        open_weights(TINY_PHI, rewrite(TINY_CLIP, tmp_path / "x", config=config))


@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_9", "highres", "resize", ["pad"], True, "Pad"])
def test_no_command_takes_one_image_aspect_ratio_for_another(aspect, tmp_path, chat_json, photo):
    """"anyres" was read as "crop", and written as that. Every command reads the same config."""
    folder = rewrite(TINY_MODEL, tmp_path / "x", config=lambda config: config | {"image_aspect_ratio": aspect})
    commands = [
        lambda: sample.main(sample.parse(["--model", str(folder), "--image", str(photo), "--prompt", "What?"])),
        lambda: train_here(train_flags(tmp_path / "run", chat_json, "--model", str(folder))),
        lambda: load_weights_command(["export", "--model", str(folder), "--out", str(tmp_path / "exported")]),
        lambda: load_model(folder),
    ]
    for command in commands:
        with pytest.raises(ValueError, match="image_aspect_ratio is .* and only 'square' or 'crop' or 'pad'"):
            command()
    assert load_weights_command(["inspect", str(folder)]) == 2
    assert not (tmp_path / "exported").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, words", [
    ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .0.5"), ({"image_std": [1]}, "image_std"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"), ({"do_rescale": False}, "do_rescale"),
    ({"do_normalize": False}, "do_normalize"), ({"do_resize": False}, "do_resize"), ({"resample": 2}, "resample is 2"),
    ({"size": {"shortest_edge": 56}}, "size is .*and only 28"), ({"size": 56}, "size is 56"),
    ({"crop_size": {"height": 28, "width": 56}}, "crop_size"), ({"do_center_crop": False}, "do_center_crop"),
], ids=str)
def test_a_processor_that_makes_other_pixels_is_refused(change, words, tmp_path):
    """preprocessor_config.json says how transformers makes pixels. Ours have to be the same."""
    folder = rewrite(TINY_MODEL, tmp_path / "x")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {words}"):
        open_weights(folder)


def test_a_processors_older_spelling(tmp_path):
    """As openai's folder has it: plain numbers, rounded."""
    folder = rewrite(TINY_MODEL, tmp_path / "x", config=lambda config: without(config, "image_aspect_ratio"))
    old = {"crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28,
           "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
           "image_std": [0.268629, 0.261302, 0.275777]}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    assert open_weights(folder).config.image_mode == "crop"
    (folder / "preprocessor_config.json").write_text(json.dumps(old | {"size": {"height": 28, "width": 28}}))
    assert open_weights(folder).config.image_mode == "squash"


def tower_of(published: VisionConfig, n_layer: int) -> dict[str, Pieces]:
    """The stored tensors of a tower at full width, in names and shapes only."""
    shapes = saved_shapes(meta_model(LLaVAConfig(vision=replace(published, n_layer=n_layer))))
    file = Path(__file__)               # nothing is read of it
    return {name: {"whole": Stored(name, file, torch.float16, shape, Tensor, file.stat())}
            for name, shape in shapes.items()}


@pytest.mark.parametrize("published, n_layer, feature_layer", [
    (CLIP_L_336, 24, -2), (SIGLIP_SO400M_384, 27, -2), (SIGLIP_SO400M_384, 26, -1)])
def test_a_published_tower_inside_a_flat_config(published, n_layer, feature_layer, tmp_path):
    """LLaVA with a tuned tower, and Bunny (26 layers): config.json has the language model's numbers only."""
    flat = {"hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 10240, "partial_rotary_factor": 0.4,
            "hidden_act": "gelu_new", "mm_hidden_size": published.n_embd, "image_aspect_ratio": "pad"}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    config = config_of([tmp_path], tower_of(published, n_layer), siglip=not published.class_token)
    assert config.vision == replace(published, n_layer=n_layer, feature_layer=feature_layer)
    assert config.vision.n_used == published.n_used and config.image_mode == "pad" and config.llm.n_embd == 2560


def test_a_siglip_with_clips_activation_is_refused(tmp_path):
    def config(mipha: dict) -> dict:
        mipha["vision_config"]["vision_tower"]["hidden_act"] = "quick_gelu"
        return mipha

    with pytest.raises(ValueError, match="hidden_act is 'quick_gelu', and only 'gelu_new' or"):
        open_weights(rewrite(TINY_MIPHA, tmp_path / "x", config=config))


def test_image_mode(tmp_path):
    """LLaVA's key decides, then the processor's file; two bases get the tower's own way."""
    assert open_weights(TINY_MODEL).config.image_mode == "pad"
    assert open_weights(TINY_PHI, TINY_CLIP).config.image_mode == "crop"
    square = rewrite(TINY_MODEL, tmp_path / "a", config=lambda config: config | {"image_aspect_ratio": "square"})
    assert open_weights(square).config.image_mode == "crop"
    silent = rewrite(TINY_MODEL, tmp_path / "b", config=lambda config: without(config, "image_aspect_ratio"))
    assert open_weights(silent).config.image_mode == "crop"
    (silent / "preprocessor_config.json").write_text('{"do_pad": true}')
    assert open_weights(silent).config.image_mode == "pad"


@pytest.mark.parametrize("processor", ['{"image_processor": "LlavaImageProcessor"}', '{"image_processor": [1]}'])
def test_an_odd_processor_file_is_refused(processor, tmp_path):
    folder = rewrite(TINY_MODEL, tmp_path / "x", config=lambda config: without(config, "image_aspect_ratio"))
    (folder / "processor_config.json").write_text(processor)
    with pytest.raises(ValueError, match="processor_config.json: image_processor is .*expected an object"):
        open_weights(folder)
