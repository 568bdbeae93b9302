"""Weights in, and the commands merge and export: the original's numbers, one reading of a folder, little memory."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forks import run_forked
from helpers import (GOLDEN, ROOT, TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, load_weights_command, model_from,
                     rewrite, same, tensors_of)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import lib.tensor_files
import load_weights
import model as model_file
import sample
from data import IMAGE_ID, ImageConfig, load_image, load_tokenizer
from lib.common import without_control
from lib.folders import Kind, open_weights
from lib.generate import Session
from load_weights import export, load_into, load_model, merge
from model import LLaVAPhi, Packed
from vision import normalize

GOLDEN_MIPHA = TINY_MIPHA.parent

# ---------------------------------------------------------------------------------------------------
# The original's numbers


@torch.no_grad()
def logits_of_words(model: LLaVAPhi, ids: Tensor) -> Tensor:
    """(B, T) -> (B, T, V)"""
    B, T = ids.shape
    h = model.llm(model.llm.wte(ids.flatten().long()), Packed(torch.tensor([T] * B), ids.device))
    return model.llm.lm_head(h).view(B, T, -1)


@pytest.mark.parametrize("name", ["tiny-phi", "tiny-phi-split", "tiny-phi-mixer"])
def test_golden_logits_from_every_given_layout(name, golden):
    phi = load_model(open_weights(GOLDEN / name, expect=(Kind.PHI,)))
    torch.testing.assert_close(logits_of_words(phi, golden["phi.input_ids"]), golden["phi.logits"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mipha_golden():
    """Features, projector, logits and greedy ids of the original, from the released layout."""
    golden, mipha = load_file(GOLDEN_MIPHA / "forward.safetensors"), load_model(TINY_MIPHA)
    tower = mipha.config.vision
    image_config = ImageConfig.of(tower, mipha.config.image_mode)
    pictures = [load_image(GOLDEN / "images" / name, image_config) for name in ("photo.jpg", "square.png")]
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


def test_mipha_through_sample(photo):
    """The command of a user gives the original's greedy text."""
    golden = load_file(GOLDEN_MIPHA / "forward.safetensors")
    done = run_forked("sample.py", "--model", TINY_MIPHA, "--image", photo, "--prompt", "What is this?",
                      "--temperature", "0", "--max-new-tokens", "24")
    assert done.returncode == 0, done.stderr
    text = load_tokenizer(TINY_MIPHA).decode(golden["generate.ids"].tolist())
    assert without_control(text.strip()) in done.stdout


def test_mipha_in_two_bf16_shards_without_tokenizer_json(tmp_path):
    """As zhumj34/Mipha-3B is published."""
    tensors = {name: x.bfloat16() for name, x in tensors_of(TINY_MIPHA).items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[:50]), (2, names[50:])):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(TINY_MIPHA / "config.json", tmp_path)
    tokenizer = json.loads((TINY_MIPHA / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    there, original = load_model(tmp_path, torch.bfloat16), load_model(TINY_MIPHA)
    for p, q in zip(there.parameters(), original.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())
    export(tmp_path, tmp_path / "out", None)
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(TINY_MIPHA).get_vocab()

# ---------------------------------------------------------------------------------------------------
# Loading


def test_a_folder_is_read_once_and_a_model_built_once_for_an_answer(monkeypatch, capsys, photo):
    """What a command knows of a folder is handed on. Everything that opens a file of weights, or builds a model, is
    counted during one `sample.py --prompt`."""
    counts = {"opened": [], "built": []}
    safe_open, build = lib.tensor_files.safe_open, model_file.LLaVAPhi.__init__

    def counting_open(path, *args, **options):
        counts["opened"].append(path.name)
        return safe_open(path, *args, **options)

    def counting_build(self, config, *args, **options):
        counts["built"].append(config)
        build(self, config, *args, **options)

    monkeypatch.setattr(lib.tensor_files, "safe_open", counting_open)
    monkeypatch.setattr(model_file.LLaVAPhi, "__init__", counting_build)
    sample.main(sample.parse(["--model", str(TINY_MODEL), "--image", str(photo), "--prompt", "What is this?", "--dtype",
                              "fp32", "--max-new-tokens", "4"]))
    assert capsys.readouterr().out.strip()
    assert counts["opened"] == ["model.safetensors"] and len(counts["built"]) == 1


def test_any_dtype_is_cast_on_the_way(tmp_path, tiny_model):
    folder = rewrite(TINY_MODEL, tmp_path / "x", lambda tensors: {name: x.bfloat16() for name, x in tensors.items()})
    there = load_model(folder, torch.bfloat16)
    for p, q in zip(there.parameters(), tiny_model.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16())
    wide = load_model(folder, torch.float32)
    assert all(torch.equal(p, q.float()) for p, q in zip(wide.parameters(), there.parameters(), strict=True))


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny_model):
    assert not tiny_model.training and not any(p.requires_grad for p in tiny_model.parameters())
    with pytest.raises(ValueError, match="overflow in fp16"):
        load_model(TINY_MODEL, torch.float16)


def test_load_into_calls_copy_once_per_parameter():
    weights, seen = open_weights(TINY_MODEL), []
    model = LLaVAPhi(weights.config)
    load_into(model, weights, copy=lambda parameter, tensor: seen.append((parameter, tensor.shape)))
    assert [p.shape for p, _ in seen] == [shape for _, shape in seen]
    parameters = list(model.parameters())
    assert {id(p) for p, _ in seen} == {id(p) for p in parameters} and len(seen) == len(parameters)


MEASURE = """
import re, sys, torch
from pathlib import Path
from lib.folders import meta_model, open_weights
from load_weights import load_into
def memory(name):       # getrusage would not do: it remembers the parent's peak
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def copy(parameter, tensor):
    parameter.data.copy_(tensor)
    seen.append(memory("RssAnon"))      # now there are both: all of the model so far, and what was read for it
bases = open_weights(*sys.argv[1:])
model = meta_model(bases.config).bfloat16().to_empty(device="cpu")
before, seen, total = memory("RssAnon"), [], memory("VmRSS")
load_into(model, bases, copy, allow_missing=("projector.",))
print(max(seen) - before, memory("VmHWM") - total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_needs_the_model_and_one_tensor(suffix, tmp_path):
    """A fresh process, 100 MB of bf16 weights of which the largest tensor is 42 MB: a second copy would show."""
    wide = {"vocab_size": 51200, "hidden_size": 400, "intermediate_size": 800}
    shapes = {"model.embed_tokens.weight": (51200, 400), "lm_head.weight": (51200, 400), "lm_head.bias": (51200,)}
    for name, tensor in tensors_of(TINY_PHI).items():
        shapes.setdefault(name, [{40: 400, 120: 1200, 160: 800}.get(n, n) for n in tensor.shape])
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    config = json.loads((TINY_PHI / "config.json").read_text()) | wide
    (tmp_path / "config.json").write_text(json.dumps(config))
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    size, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), str(TINY_CLIP)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anonymous, everything = map(int, done.stdout.split())
    limit = size + largest + 15e6
    assert anonymous < limit, f"{anonymous:,} bytes for {size:,} of weights, the largest {largest:,}"
    if suffix == "safetensors":     # a .bin is mapped: its pages are counted, but the kernel takes them back at will
        assert everything < limit, f"{everything:,} bytes for {size:,} of weights, the largest {largest:,}"

# ---------------------------------------------------------------------------------------------------
# merge


def test_merge_joins_the_bases_around_a_new_projector(tmp_path):
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        merge(TINY_PHI, TINY_CLIP, tmp_path / out, seed, None)
    a, b, c = (load_model(tmp_path / out) for out in "abc")
    assert same(a, b) and same(a, c, "llm") and same(a, c, "vision") and not same(a, c, "projector")
    bases = model_from(TINY_PHI, TINY_CLIP)
    assert same(a, bases, "llm") and same(a, bases, "vision")
    weights = torch.cat([p.flatten() for p in (a.projector.fc.weight, a.projector.proj.weight)])
    assert 0.018 < weights.std() < 0.022
    assert not a.projector.fc.bias.any() and not a.projector.proj.bias.any()


def test_merge_names_a_missing_embedding(tmp_path):
    """The new projector gets the embedding's dtype, but that it is there has to be checked before."""
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in tensors.items() if "embed_tokens" not in name}

    without = rewrite(TINY_PHI, tmp_path / "x", spoil)
    with pytest.raises(ValueError, match="1 missing: language_model.model.embed_tokens.weight"):
        merge(without, TINY_CLIP, tmp_path / "out", 0, None)
    assert not (tmp_path / "out").exists()

# ---------------------------------------------------------------------------------------------------
# export


NO_FILES = {"step": 1, "updates": 1, "data": "", "files": {}, "crc32": {}}      # none that would be checked


def write_checkpoint(step: Path, weights: dict[str, Tensor], source: Path, **settings) -> None:
    """A training checkpoint as a run writes it, as far as export reads it."""
    dcp.save({f"model.{name}": tensor for name, tensor in weights.items()}, no_dist=True,
             storage_writer=HuggingFaceStorageWriter(str(step), save_distributed=True))
    manifest = NO_FILES | {"config": settings, "sources": [str(source)]}
    (step / "checkpoint.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_of_a_training_checkpoint(lora, tmp_path, tiny_model):
    """What trained comes from the checkpoint (adapters merged), the rest from where the run began."""
    old = dict(tiny_model.named_parameters())
    weights = {name: p + 1 for name, p in old.items() if name.startswith("projector")}
    a, b = torch.randn(4, 40), torch.randn(160, 4)
    if lora:
        weights |= {"llm.h.1.mlp.fc.lora_a": a, "llm.h.1.mlp.fc.lora_b": b}
    step = tmp_path / "step_000007"
    write_checkpoint(step, weights, TINY_MODEL, dropout=0.2, image_mode="crop", dtype="fp32", stage="finetune",
                     lora_alpha=8.0)
    export(step, tmp_path / "out", None, fold=False)
    there = load_model(tmp_path / "out")
    assert there.config.image_mode == "crop" and there.config.llm.dropout == 0.2
    for name, p in there.named_parameters():
        expected = old[name] + name.startswith("projector")
        if lora and name == "llm.h.1.mlp.fc.weight":
            expected = old[name] + 8.0 / 4 * b @ a
        torch.testing.assert_close(p, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_of_a_language_models_checkpoint_is_as_the_run_set_it(tmp_path, tiny_model):
    """The end of a run of --stage sft writes its --dropout, and so does a checkpoint on the way."""
    bias = tiny_model.llm.ln_f.bias + 1
    step = tmp_path / "step_000003"
    write_checkpoint(step, {"llm.ln_f.bias": bias}, TINY_PHI, dropout=0.3, image_mode="crop", dtype="bf16",
                     stage="sft", lora_alpha=8.0)
    export(step, tmp_path / "out", None)
    with pytest.raises(ValueError, match="looks like a Phi-2 language model, expected a LLaVA-Phi model"):
        export(step, tmp_path / "gguf", None, "gguf")
    assert open_weights(tmp_path / "out", TINY_CLIP).config.llm.dropout == 0.3
    there, old = tensors_of(tmp_path / "out"), model_from(TINY_PHI, TINY_CLIP).llm
    assert {tensor.dtype for tensor in there.values()} == {torch.bfloat16} and len(there) == 33
    assert torch.equal(there["model.final_layernorm.bias"], bias.bfloat16())
    assert torch.equal(there["lm_head.weight"], old.lm_head.weight.bfloat16())


DAMAGE = [{"config": None}, {"sources": "x"}, {"sources": [3]}, {"dtype": "fp16"}, {"image_mode": "x"},
          {"dropout": "0"}, {"stage": None}]


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_a_damaged_checkpoint_json_is_not_exported(tmp_path, change):
    settings = {"stage": "finetune", "dropout": 0.0, "image_mode": "pad", "lora_alpha": 16.0, "dtype": "fp32"}
    saved = NO_FILES | {"config": settings, "sources": [str(TINY_MODEL)]}
    for key, value in change.items():
        (saved if key in saved else settings)[key] = value
    (tmp_path / "checkpoint.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="checkpoint.json"):
        export(tmp_path, tmp_path / "out", None)

# ---------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(("to", "flag"), [("model", "--type q8_0"), ("parts", "--type f16"), ("gguf", "--dtype bf16"),
                                          ("gguf", "--head-bias keep"), ("parts", "--scores out/eval")])
def test_a_flag_that_would_change_nothing_is_refused(to, flag):
    """Each form that `export` writes has flags of its own."""
    with pytest.raises(ValueError, match=f"{flag.split()[0]} is for --to .*, found --to {to}; see"):
        load_weights.parse(["export", "--out", "x", "--to", to, *flag.split()])


def test_commands(tmp_path, capsys):
    """merge and export end with a page about what they wrote."""
    base = str(tmp_path / "base")
    load_weights_command(["merge", "--llm", str(TINY_PHI), "--vision", str(TINY_CLIP), "--out", base])
    page = capsys.readouterr().out
    for words in ("a LLaVA-Phi model", "80,832 parameters", "<|endoftext|> is 0", "missing    nothing",
                  "images     crop", "train.py --stage pretrain"):
        assert words in page
    load_weights_command(["export", "--model", base, "--out", str(tmp_path / "parts"), "--to", "parts"])
    assert "parts: SHA256SUMS, clip, mm_projector.safetensors, phi-2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="looks like a Phi-2 language model, expected a LLaVA-Phi model"):
        load_weights_command(["export", "--model", str(TINY_PHI), "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="overflow in fp16"):
        load_weights_command(["export", "--model", base, "--out", str(tmp_path / "x"), "--dtype", "float16"])
    assert not (tmp_path / "x").exists()


def test_an_error_is_one_line_and_exit_code_2():
    done = run_forked("load_weights.py", "merge", "--llm", "nowhere")
    hint = "get it with: hf download microsoft/phi-2 --local-dir nowhere"
    assert done.returncode == 2 and done.stderr == f"error: nowhere: no such folder; {hint}\n"


@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["merge", "--help"], 0), (["merge", "--speed"], 2),
                                         (["export"], 2)])
def test_help_and_wrong_flags_do_not_wait_for_torch(flags, code, tmp_path, run_script):
    """torch takes seconds to import; here it cannot be imported at all."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    done = run_script("load_weights.py", *flags, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == code, done.stderr
    assert code == 0 or re.fullmatch(r"error: .*\n", done.stderr)
