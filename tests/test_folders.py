"""Folders of weights: opened once, compared with the model in both directions, and believed in nothing unchecked."""
import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, model_from, rewrite, same, tensors_of
from safetensors.torch import save_file
from torch import Tensor
from zoo import FOREIGN_FOLDERS, LFS_POINTER, PROJECTOR, hub_cache, projector_file, without_tower

from data import load_tokenizer
from lib.folders import Kind, meta_model, open_folder, open_weights, read_tensor, saved_shapes
from lib.layouts import to_saved
from lib.lora import apply_lora
from lib.quant import quantize_linears
from lib.save_weights import collect, save_parts
from lib.tensor_files import read_tensors
from load_weights import load_into, load_model, merge
from model import MIPHA_CONFIG, LLaVAConfig, LLaVAPhi

Tensors = dict[str, Tensor]

# ---------------------------------------------------------------------------------------------------
# What a folder is


@pytest.mark.parametrize("folder, kind", [
    (TINY_PHI, Kind.PHI), (TINY_CLIP, Kind.CLIP), (TINY_MODEL, Kind.LLAVA), (TINY_MIPHA, Kind.MIPHA)])
def test_kinds(folder, kind):
    """`expect` is a guard against a wrong flag; what a folder is, its tensors say."""
    assert open_weights(folder, expect=(kind,)).kind == open_folder(folder).kind == kind


def test_two_bases_are_one_model():
    bases = open_weights(TINY_PHI, TINY_CLIP)
    assert bases.parts == ("llm", "vision") and not bases.has_siglip and bases.paths == [TINY_PHI, TINY_CLIP]
    assert bases.found.keys() == open_folder(TINY_PHI).found.keys() | open_folder(TINY_CLIP).found.keys()


@pytest.mark.parametrize("folders, words", [
    ([TINY_CLIP, TINY_PHI], "looks like a CLIP vision tower, expected a Phi-2 language model"),
    ([TINY_PHI, TINY_MODEL], "looks like a LLaVA-Phi model, expected a CLIP vision tower"),
    ([TINY_PHI], "looks like a Phi-2 language model, expected a LLaVA-Phi model"),
    ([Path("phi"), TINY_CLIP], "phi: no such folder; get it with: hf download microsoft/phi-2"),
])
def test_a_wrong_kind_is_named(folders, words):
    with pytest.raises(ValueError, match=words):
        open_weights(*folders)


def test_a_folder_of_something_else_is_named_by_its_tensors(tmp_path):
    save_file({"bert.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="looks like a folder of other tensors .bert.x, "):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", FOREIGN_FOLDERS)
def test_common_folders_of_others_are_called_by_their_names(name, tmp_path):
    """In one line, with what to do, whichever flag they are given to."""
    make, what, advice = FOREIGN_FOLDERS[name]
    folder = make(tmp_path / "x")
    as_a_part = [[TINY_PHI, folder], [folder, TINY_CLIP]]
    if name == "LLaVA without its tower":
        as_a_part.pop()                                 # --llm takes it
    elif name == "a tower inside":
        as_a_part = []                                  # then it is just a whole model
    for paths in ([folder], *as_a_part):
        with pytest.raises(ValueError) as e:
            open_weights(*paths)
        assert re.search(what, str(e.value)) and "\n" not in str(e.value) and "(, ...)" not in str(e.value)
        if len(paths) == 1:
            assert re.search(advice, str(e.value)), e.value


def test_a_pointer_in_place_of_a_text_file(tmp_path):
    """git-lfs keeps large json files too."""
    folder = rewrite(TINY_MODEL, tmp_path / "x")
    (folder / "tokenizer.json").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match="tokenizer.json: a git-lfs pointer"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match="config.json: a git-lfs pointer"):
        open_weights(folder)


def test_a_snapshot_in_the_hubs_cache_is_a_folder_as_any_other(tmp_path):
    [snapshot] = (hub_cache(tmp_path / "x") / "snapshots").iterdir()
    assert same(model_from(snapshot, TINY_CLIP), model_from(TINY_PHI, TINY_CLIP), "llm")


@pytest.mark.parametrize("path, words", [
    (TINY_MODEL / "model.safetensors", "a file; give its folder, .*tiny-llava-phi"),
    (Path("checkpoints/phi-2"), "no such folder; published are microsoft/phi-2.*--local-dir checkpoints/phi-2"),
])
def test_what_is_no_folder(path, words):
    with pytest.raises(ValueError, match=words):
        open_folder(path)

# ---------------------------------------------------------------------------------------------------
# Models in parts


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """The tower of TINY_MODEL by itself."""
    out = tmp_path_factory.mktemp("parts") / "x"
    source = open_weights(TINY_MODEL)
    save_parts(out, collect({}, source.config, source, None))
    return out / "clip"


def test_a_tower_is_given_to_a_model_without_one(tmp_path, tower, tiny_model):
    """LLaVA's released form becomes a whole model; its projector and its settings are kept."""
    llava = without_tower(tmp_path / "llava")
    merge(llava, tower, tmp_path / "out", 0, None)
    there = load_model(tmp_path / "out")
    assert same(there, tiny_model) and there.config == tiny_model.config and there.config.image_mode == "pad"


@pytest.mark.parametrize("kind", ["bin", "safetensors", "folder"])
def test_a_projector_by_itself(kind, tmp_path, tower, tiny_model):
    file = projector_file(tmp_path / "stage 1")
    if kind == "safetensors":
        file = tmp_path / "x.safetensors"
        save_file({name: x for name, x in tensors_of(TINY_MODEL).items() if name.startswith(PROJECTOR)}, file)
    merge(TINY_PHI, tower, tmp_path / "out", 0, None, file.parent if kind == "folder" else file)
    there = load_model(tmp_path / "out")
    assert same(there, tiny_model, "projector") and same(there, tiny_model, "vision")
    # LLaVA's own config.json beside the file says "square". Without one, the tower does, as it was exported.
    assert there.config.image_mode == ("pad" if kind == "safetensors" else "crop")


@pytest.mark.parametrize("llm, projector, words", [
    (TINY_PHI, TINY_PHI, "looks like a Phi-2 language model, expected a projector by itself"),
    (TINY_PHI, Path("gone.bin"), "gone.bin: no such folder; LLaVA's stage 1 writes mm_projector.bin"),
    ("without tower", "projector", "looks like a LLaVA model without its tower, expected a Phi-2 language model"),
    (TINY_PHI, "narrow", "misshapen: model.mm_projector.0.weight"),
    (TINY_PHI, "config", "config.json: mm_projector_type is 'linear'"),
])
def test_a_projector_that_does_not_fit(llm, projector, words, tmp_path, tower):
    file = projector_file(tmp_path / "stage 1", TINY_MIPHA if projector == "narrow" else TINY_MODEL)
    if projector == "config":
        (file.parent / "config.json").write_text('{"mm_projector_type": "linear"}')
    llm = without_tower(tmp_path / "llava") if llm == "without tower" else llm
    with pytest.raises(ValueError, match=words):
        merge(llm, tower, tmp_path / "out", 0, None, projector if isinstance(projector, Path) else file)


def test_names_json_is_what_we_take_and_leave():
    """Recorded from the original code: all of its parameters, and those that never get a gradient."""
    names = json.loads((GOLDEN / "names.json").read_text())
    weights = open_weights(TINY_MODEL)
    built = {name for name, _ in LLaVAPhi(weights.config).named_parameters()}
    shapes, left = {}, set()
    for name, pieces in weights.found.items():
        for stored in pieces.values():
            shapes[stored.name] = list(stored.shape)
            if name not in built:
                left.add(stored.name)
    assert shapes == names["names"] and left == set(names["no_grad"])


@pytest.mark.parametrize("config, n_tensors, sizes", [
    (LLaVAConfig(), 453 + 391 + 4, {"llm": 2_779_683_840, "vision": 303_507_456, "projector": 9_180_160}),
    (MIPHA_CONFIG, 453 + 437 + 4, {"llm": 2_779_683_840, "vision": 412_987_248, "projector": 9_507_840}),
])
def test_published_sizes(config, n_tensors, sizes):
    shapes = saved_shapes(meta_model(config))
    for part, size in sizes.items():
        assert sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(part)) == size
    assert sum(len(to_saved(name)) for name in shapes) == n_tensors


def test_a_folder_is_compared_with_a_model_as_it_was_stored():
    """Training fills models whose weights are in 4 bits, or which have adapters. No folder is either."""
    weights, plain = open_weights(TINY_MODEL), load_model(TINY_MODEL)
    quantized, adapted = meta_model(weights.config), LLaVAPhi(weights.config)
    quantize_linears(quantized, 8)
    quantized.to_empty(device="cpu")
    apply_lora(adapted.llm, r=2, alpha=4.0)
    for model in (quantized, adapted):
        load_into(model, weights)
        assert torch.equal(model.llm.ln_f.weight, plain.llm.ln_f.weight)

# ---------------------------------------------------------------------------------------------------
# Strictness


def test_missing_unexpected_and_misshapen_in_one_message(tmp_path):
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.fc3.weight"] = tensors.pop("model.layers.1.mlp.fc1.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:500]
        tensors["model.final_layernorm.bias"] = tensors["model.final_layernorm.bias"].int()
        return tensors

    folder = rewrite(TINY_PHI, tmp_path / "x", spoil)
    with pytest.raises(ValueError) as e:
        model_from(folder, TINY_CLIP)
    for words in (str(folder), "1 missing: language_model.model.layers.1.mlp.fc1.weight (160, 40)",
                  "1 unexpected: model.layers.1.mlp.fc3.weight (160, 40)",
                  "lm_head.weight (500, 40) float32, expected (512, 40)", "final_layernorm.bias (40) int32"):
        assert words in str(e.value)


def test_one_of_q_k_v_is_missing(tmp_path):
    def spoil(tensors: Tensors) -> Tensors:
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        return tensors

    words = r"1 missing: language_model.model.layers.0.self_attn.k_proj.weight \(40, 40\)"
    with pytest.raises(ValueError, match=words):
        model_from(rewrite(GOLDEN / "tiny-phi-split", tmp_path / "x", spoil), TINY_CLIP)


def test_only_whole_parts_may_be_missing(tmp_path):
    bases = open_weights(TINY_PHI, TINY_CLIP)
    with pytest.raises(ValueError, match="4 missing: multi_modal_projector"):
        load_into(LLaVAPhi(bases.config), bases)

    def spoil(tensors: Tensors) -> Tensors:
        del tensors["model.mm_projector.0.bias"]
        return tensors

    weights = open_weights(rewrite(TINY_MODEL, tmp_path / "x", spoil))
    with pytest.raises(ValueError, match="1 missing: multi_modal_projector.linear_1.bias"):
        load_into(LLaVAPhi(weights.config), weights, allow_missing=("projector.",))


def test_memory_is_taken_only_for_what_the_files_hold(tmp_path):
    """A config.json that promises a tensor of 75 GB is compared with the files before anything is allocated."""
    def enlarge(config: dict) -> dict:
        config["vision_config"]["vision_tower"]["patch_size"] = 14_000
        return config

    folder = rewrite(TINY_MODEL, tmp_path / "model", config=enlarge)
    with pytest.raises(ValueError, match="misshapen.*14000"):
        load_model(folder)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = rewrite(TINY_MODEL, tmp_path / "x")
    weights = open_weights(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises((ValueError, OSError)):
        for name in weights.found:
            read_tensor(weights, name)


@pytest.mark.parametrize("text", ["<!DOCTYPE html><html>", "", "[1]", "{\"a\": ", "[" * 100_000])
def test_a_config_that_is_not_json(text, tmp_path):
    folder = rewrite(TINY_MODEL, tmp_path / "x")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not a json object, begins with"):
        open_weights(folder)

# ---------------------------------------------------------------------------------------------------
# Shards


def test_bin_files_single_and_sharded(tmp_path):
    tensors, config = tensors_of(TINY_PHI), (TINY_PHI / "config.json").read_text()
    names = sorted(tensors)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    torch.save({name: torch.nn.Parameter(x) for name, x in tensors.items()}, one / "pytorch_model.bin")
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, two / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (two / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = model_from(TINY_PHI, TINY_CLIP)
    assert same(expected, model_from(one, TINY_CLIP), "llm") and same(expected, model_from(two, TINY_CLIP), "llm")
    assert not same(expected, model_from(one, TINY_CLIP), "projector")          # it was drawn anew


def test_tensors_that_share_a_storage_in_a_bin(tmp_path):
    base = torch.arange(60.0)
    torch.save({"a": base[:20].view(4, 5), "b": base[20:].view(2, 20), "c": torch.tensor(7.0)}, tmp_path / "x.bin")
    a, b, c = read_tensors(tmp_path / "x.bin")
    assert torch.equal(a.read(), base[:20].view(4, 5)) and torch.equal(b.read(), base[20:].view(2, 20))
    assert c.shape == () and c.read() == 7


@pytest.mark.parametrize("shard, words", [
    ("../x.safetensors", "plain names of .safetensors files in this folder, found '../x.safetensors'"),
    ("/etc/passwd", "plain names of"), ("sub/x.safetensors", "plain names of"), ("x.bin", "plain names of"),
    ("gone.safetensors", "index.json: gone.safetensors is named there, but is not in the folder: incomplete"),
    (7, "expected a weight_map of tensor names"),
])
def test_index_files_do_not_leave_the_folder(shard, words, tmp_path):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path, inside / "sub"):
        save_file({"a": torch.zeros(2)}, place / "x.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=words):
        open_folder(inside)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["x.safetensors"]}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: expected a weight_map"):
        open_folder(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({"lm_head.bias": torch.zeros(2)}, tmp_path / shard)
    index = {"weight_map": {"lm_head.bias": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    words = "lm_head.bias in a.safetensors and lm_head.bias in b.safetensors are the same tensor"
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_a_training_run_without_a_model_says_how_to_get_one(tmp_path):
    for step in ("step_000002", "step_000010"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="export --model .*step_000010 --out DIR"):
        open_folder(tmp_path)

# ---------------------------------------------------------------------------------------------------
# Broken and hostile files


def header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: object, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ONE = header({"a": entry(0, 16, [4])}, b"\0" * 16)
TWO = {"a": entry(0, 16, [4])}
TEXT_OFFSETS = {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}}
BROKEN = {              # bytes of a model.safetensors -> what is said about it
    "truncated": (ONE[:-4], r"incomplete download\? .file is 82 bytes; .*not fully covered"),
    "trailing bytes": (ONE + b"\0" * 4, "file is 90 bytes; .*not fully covered"),
    "header of a terabyte": (header({}, length=2 ** 40), "table of tensors alone claims 1099511627776"),
    "header cut": (ONE[:30], "incomplete download"),
    "empty": (b"", "file is 0 bytes"),
    "wrong shape": (header({"a": entry(0, 16, [5])}, b"\0" * 16), "invalid shape, data type, or offset for tensor"),
    "overlap": (header(TWO | {"b": entry(8, 24, [4])}, b"\0" * 24), "invalid offset for tensor `b`"),
    "hole": (header(TWO | {"b": entry(20, 36, [4])}, b"\0" * 36), "invalid offset for tensor `b`"),
    "negative": (header({"a": entry(0, 16, [-2, -2])}, b"\0" * 16), "invalid value: integer `-2`"),
    "shape is text": (header({"a": entry(0, 16, "4444")}, b"\0" * 16), "expected plain tensors and nothing else"),
    "a dtype of another kind": (header({"a": entry(0, 4, [4], "F8_E4M3")}, b"\0" * 4),
                                "a has dtype F8_E4M3, which is not supported here"),
    "unknown dtype": (header({"a": entry(0, 16, [4], "F4")}, b"\0" * 16), "invalid shape, data type, or offset"),
    "offsets are text": (header(TEXT_OFFSETS, b"\0" * 16), "expected plain tensors and nothing else"),
    "a list": (header([1, 2, 3]), "expected plain tensors and nothing else"),
    "deep": (header(b"[" * 100_000), "invalid JSON in header"),
    "html": (b"<!DOCTYPE html><html><head><title>404</title></head></html>", "table of tensors alone claims"),
    "a million entries": (header({f"{i:x}": entry(0, 0, [0]) for i in range(10 ** 6)}), "tensors alone claims"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors(name, tmp_path):
    data, words = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as e:
        open_folder(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


class Evil:
    """Makes a folder when it is unpickled."""
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zip_bytes(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BROKEN_BINS = {         # what is in a pytorch_model.bin, made when it is needed -> what is said about it
    "runs code": (lambda trace: save_bytes({"a": Evil(trace)}), "expected plain tensors and nothing else"),
    "runs code, no zip": (lambda trace: pickle.dumps(Evil(trace)), "torch.save since 1.6 .*not a zip file"),
    "sparse": (lambda _: save_bytes({"a": torch.eye(3).to_sparse()}), "'a' is not a plain|expected plain"),
    "quantized": (lambda _: save_bytes({"a": quantized()}), "plain"),
    "nested": (lambda _: save_bytes({"state": {"a": torch.ones(3)}}), "'state' is not a plain dense tensor"),
    "a tensor alone": (lambda _: save_bytes(torch.ones(3)), "expected plain .*'Tensor' object has no .*'items'"),
    "transposed": (lambda _: save_bytes({"a": torch.ones(3, 4).T}), "'a' is not a plain dense .*stored row by row"),
    "cut": (lambda _: save_bytes({"a": torch.ones(300)})[:-200], "incomplete download"),
    "compressed": (lambda _: zip_bytes(unzip(save_bytes({"a": torch.zeros(300)})), zipfile.ZIP_DEFLATED), "compressed"),
    "html": (lambda _: b"<!DOCTYPE html><html></html>", "torch.save since 1.6 .*not a zip file"),
    "many records": (lambda _: zip_bytes({f"archive/{'x' * 60}{i}": b"" for i in range(30_000)}), "alone claims"),
}


@pytest.mark.parametrize("name", BROKEN_BINS)
@pytest.mark.filterwarnings("ignore")
def test_broken_bin(name, tmp_path):
    make, words = BROKEN_BINS[name]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make(tmp_path / "trace"))
    with pytest.raises(ValueError, match=words) as e:
        open_folder(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "trace").exists()


def test_a_bin_whose_pickle_claims_more_than_there_is(tmp_path):
    """A lying shape must end at the end of the file at the latest: nothing outside of it is ever read or allocated."""
    records = unzip(save_bytes({"a": torch.ones(4)}))
    for name in records:
        if name.endswith("data.pkl"):
            records[name] = records[name].replace(b"K\x04", b"J\xff\xff\xff\x0f")           # 4 -> 268 million
    (tmp_path / "pytorch_model.bin").write_bytes(zip_bytes(records))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        open_folder(tmp_path)
