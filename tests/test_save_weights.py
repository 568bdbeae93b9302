"""The saved format: what others read, byte for byte the same when saved again, and never half of it."""
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import (TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, contents, load_weights_command, model_from, rewrite,
                     same, tensors_of)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from data import load_tokenizer
from lib.common import read_json
from lib.folders import open_weights
from lib.save_weights import save_model
from load_weights import export, load_model, merge

VISION = "vision_tower.vision_model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    export(TINY_MODEL, out, None, fold=False)
    return out


@pytest.fixture(scope="module")
def tiny():
    return open_weights(TINY_MODEL)

# ---------------------------------------------------------------------------------------------------
# What is saved


@pytest.mark.parametrize("folder", [TINY_MODEL, TINY_MIPHA])
def test_a_saved_model_is_the_same_model(folder, tmp_path):
    """And saved again it is the same files. See test_head_bias.py for the folded one."""
    export(folder, tmp_path / "a", None, fold=False)
    export(tmp_path / "a", tmp_path / "b", None, fold=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    there, original = load_model(tmp_path / "a"), load_model(folder)
    assert same(there, original) and there.config == original.config


def test_the_saved_tensors_are_what_others_read(saved):
    """Read with the safetensors library: legacy names, all three vision layers, nothing of ours in between."""
    tensors, original = load_file(saved / "model.safetensors"), tensors_of(TINY_MODEL)
    assert len(tensors) == 33 + 55 + 4
    assert {"language_model.lm_head.bias", "multi_modal_projector.linear_2.weight",
            VISION + "post_layernorm.weight"} <= tensors.keys()
    last_layer = VISION + "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(tensors[last_layer], original["model." + last_layer])
    fused = original["model.layers.1.self_attn.query_key_value.weight"].view(2, 3, 20, 40)
    k = tensors["language_model.model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(k, fused[:, 1].reshape(40, 40))
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_all_of_siglip_is_passed_on_but_its_pooling_head(tmp_path):
    """The last layer, too, which our model does not have. In the head's code vLLM on a CPU ends at the first image."""
    export(TINY_MIPHA, tmp_path / "model", None)
    there, original = tensors_of(tmp_path / "model"), tensors_of(TINY_MIPHA)
    assert len(there) == len(original) - 11
    assert read_json(tmp_path / "model" / "config.json")["vision_config"]["vision_use_head"] is False
    for name, tensor in original.items():
        if "vision_model" in name and "vision_model.head." not in name:
            assert torch.equal(there[name.removeprefix("model.")], tensor), name
    config = read_json(tmp_path / "model" / "config.json")
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["vision_feature_select_strategy"] == "full"


def test_saved_config(saved):
    config = read_json(saved / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and text["architectures"] == ["PhiForCausalLM"]
    assert config["image_token_index"] == 444 and config["vision_feature_layer"] == -2
    assert vision["num_hidden_layers"] == 3 and vision["model_type"] == "clip_vision_model"
    assert text["partial_rotary_factor"] == text["rope_parameters"]["partial_rotary_factor"] == 0.4
    assert config["tie_word_embeddings"] is False and text["eos_token_id"] == 0 and config["torch_dtype"] == "float32"


def test_saved_files_are_readable_like_any_new_file(saved, tmp_path):
    """Group and others too, as the umask has it: models are shared."""
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_shards(saved, tmp_path, monkeypatch, tiny_model):
    out = tmp_path / "x"
    monkeypatch.setattr("lib.save_weights.SHARD_BYTES", 100_000)
    export(TINY_MODEL, out, None, fold=False)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors, index = {}, read_json(out / "model.safetensors.index.json")
    for shard in shards:
        part = load_file(out / shard)
        assert {name for name, where in index["weight_map"].items() if where == shard} == part.keys()
        tensors |= part
    whole = load_file(saved / "model.safetensors")
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert same(load_model(out), tiny_model)


def lazily(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def test_changed_tensors_come_as_such_or_as_functions_and_the_rest_from_the_source(tmp_path, tiny_model, tiny):
    trained = {name: p + 1 for name, p in tiny_model.named_parameters()}
    save_model(tmp_path / "tensors", trained, tiny.config, tiny)
    functions = {name: lazily(tensor) for name, tensor in reversed(trained.items())}
    save_model(tmp_path / "functions", functions, tiny.config, tiny, torch.float32)
    assert contents(tmp_path / "tensors") == contents(tmp_path / "functions")
    there = load_model(tmp_path / "tensors")
    assert all(torch.equal(p, trained[name]) for name, p in there.named_parameters())
    projector = {name: p for name, p in trained.items() if name.startswith("projector")}
    save_model(tmp_path / "part", projector, tiny.config, tiny)
    part = load_model(tmp_path / "part")
    assert same(part, tiny_model, "llm") and same(part, there, "projector")


def test_half_precision_bases_are_kept_but_never_computed_in(tmp_path):
    half = rewrite(TINY_PHI, tmp_path / "half", lambda tensors: {name: x.half() for name, x in tensors.items()})
    merge(half, TINY_CLIP, tmp_path / "kept", 0, None)
    config = read_json(tmp_path / "kept" / "config.json")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"
    tensors = load_file(tmp_path / "kept" / "model.safetensors")
    assert tensors["language_model.lm_head.weight"].dtype == torch.float16
    assert tensors[VISION + "pre_layrnorm.weight"].dtype == torch.float32
    merge(half, TINY_CLIP, tmp_path / "wide", 0, torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "wide").values()} == {torch.bfloat16}


def test_tokenizer_files(tmp_path, saved):
    """From vocab + merges + added tokens the same tokenizer as from tokenizer.json; <image> is the next free id."""
    original = json.loads((TINY_PHI / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(original["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(original["model"]["merges"]) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"   ": 445, "  ": 444}))
    # As it is saved: there the end token is one again.
    built = tokenizers.Tokenizer.from_str(load_tokenizer(tmp_path).to_str())
    plain = tokenizers.Tokenizer.from_file(str(TINY_PHI / "tokenizer.json"))
    for text in ("A chat. USER: What is this?\n ASSISTANT:", "tab\there, naïve 中文 🙂", "x<|endoftext|>y"):
        ids = plain.encode(text).ids
        assert built.encode(text).ids == ids and built.decode(ids) == plain.decode(ids)
    assert built.encode("a   b").ids.count(445) == 1
    with_image = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert with_image.token_to_id("<image>") == 444 == read_json(saved / "config.json")["image_token_index"]
    assert load_tokenizer(saved).get_vocab() == load_tokenizer(TINY_PHI).get_vocab()
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        export(rewrite(TINY_MODEL, tmp_path / "none", keep=("config.json",)), tmp_path / "x", None)


def test_parts_can_be_joined_again(tmp_path, tiny_model, tiny):
    parts = tmp_path / "parts"
    export(TINY_MODEL, parts, None, "parts")
    assert read_json(parts / "clip" / "config.json")["vision_feature_layer"] == -2          # for llama.cpp
    assert (parts / "phi-2" / "chat_template.jinja").is_file()
    joined = model_from(parts / "phi-2", parts / "clip")
    assert same(joined, tiny_model, "llm") and same(joined, tiny_model, "vision")
    projector = load_file(parts / "mm_projector.safetensors")
    assert torch.equal(projector["model.mm_projector.2.weight"], tiny_model.projector.proj.weight)
    assert len(projector) == 4
    export(TINY_MODEL, parts, None, "parts")                 # over itself
    shutil.rmtree(parts / "clip")
    export(TINY_MODEL, parts, None, "parts")
    mipha = open_weights(TINY_MIPHA)
    export(TINY_MIPHA, tmp_path / "mipha", None, "parts")
    assert open_weights(TINY_PHI, tmp_path / "mipha" / "siglip").config.vision == mipha.config.vision


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
@pytest.mark.parametrize("folder", [TINY_MODEL, TINY_MIPHA])
def test_parts_carry_the_way_in_which_pictures_were_made_square(folder, mode, tmp_path, capsys):
    """A projector was trained with one of them, which need not be the published tower's own. inspect, with which merge
    ends, says what is done, and where it stands."""
    model = rewrite(folder, tmp_path / "model", config=lambda config: config | {"image_aspect_ratio": mode})
    export(model, tmp_path / "parts", None, "parts")
    tower = tmp_path / "parts" / ("clip" if folder == TINY_MODEL else "siglip")
    flags = ["--llm", tmp_path / "parts" / "phi-2", "--vision", tower, "--out", tmp_path / "out",
             "--projector", tmp_path / "parts" / "mm_projector.safetensors"]
    load_weights_command(["merge", *map(str, flags)])
    assert re.search(rf"images +{mode}: .* \(config.json's image_aspect_ratio changes it\)", capsys.readouterr().out)
    assert load_model(tmp_path / "out").config == load_model(model).config

# ---------------------------------------------------------------------------------------------------
# Where it is saved


def test_saving_into_a_training_folder_keeps_what_is_there(tmp_path, tiny_model, tiny):
    out = tmp_path / "run"
    (out / "step_000010").mkdir(parents=True)
    (out / "config.json").write_text('{"training": {"lr": 0.001}}')
    (out / "metrics.jsonl").write_text("{}\n")
    before = {"step_000010", "metrics.jsonl"}
    for _ in range(2):                      # a second save replaces the first
        save_model(out, {}, tiny.config, tiny)
        assert same(load_model(out), tiny_model)
        assert read_json(out / "config.json")["training"] == {"lr": 0.001}
        assert before <= set(os.listdir(out)) and not any(name.startswith(".writing") for name in os.listdir(out))
    export(out, tmp_path / "x", None)
    assert "training" not in read_json(tmp_path / "x" / "config.json")


def test_other_peoples_folders_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not a saved model's"):
        export(TINY_MODEL, tmp_path, None)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_behind_a_link_is_written_where_it_is(tmp_path, tiny_model):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    export(TINY_MODEL, tmp_path / "out", None, fold=False)
    assert (tmp_path / "out").is_symlink() and same(load_model(tmp_path / "large disk"), tiny_model)


@pytest.mark.parametrize("before", ["nothing", "a model"])
def test_a_save_that_fails_leaves_what_was_there(before, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    if before == "a model":
        export(TINY_MODEL, tmp_path / "x", None)
    there = contents(tmp_path)
    monkeypatch.setattr("lib.save_weights.write_model_texts", full)
    with pytest.raises(OSError, match="No space left"):
        export(TINY_MODEL, tmp_path / "x", None)
    assert contents(tmp_path) == there


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 9, 13])
def test_a_crash_while_files_are_moved_leaves_no_mixture_that_would_load(moved, tmp_path, monkeypatch):
    """At most the old model or the new one: here they are of different sizes, so a mixture of them would not load."""
    out = tmp_path / "run"
    export(TINY_MODEL, out, None)
    replace, calls = os.replace, []

    def crash(old, new):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export(TINY_MIPHA, out, None)
    monkeypatch.undo()
    if moved < 2:                           # the new model is complete under another name, and nothing has been moved
        assert open_weights(out).config == open_weights(TINY_MODEL).config
    else:
        with pytest.raises(ValueError):
            open_weights(out)
    export(TINY_MIPHA, out, None)           # and the next save is not stopped by what is left
    assert open_weights(out).config == open_weights(TINY_MIPHA).config and not list(out.glob(".writing*"))

# ---------------------------------------------------------------------------------------------------
# Checksums


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_checksums_are_sha256sums_own(tmp_path, saved, tiny):
    """Of a whole model and of its parts; every file with tensors is listed."""
    parts = tmp_path / "parts"
    export(TINY_MODEL, parts, None, "parts")
    for folder in (saved, parts, parts / "phi-2", parts / "clip"):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert done.returncode == 0 and done.stdout.splitlines() == [f"{file}: OK" for file in files] and files
