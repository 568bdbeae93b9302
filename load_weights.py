"""Every way weights enter or leave: published Phi-2, CLIP and LLaVA-Phi folders in, one saved format out.

A folder is recognised by the names of its tensors; config.json gives numbers only, the folder's name gives nothing.
Tensors go one at a time from their place in the file to their place in the model: no file is held or mapped.
What is saved is a folder that transformers' LlavaForConditionalGeneration and vLLM read, complete by itself.

$ python load_weights.py merge --llm checkpoints/phi-2 --vision checkpoints/clip-vit-large-patch14-336 --out out/base
$ python load_weights.py inspect out/base
$ python load_weights.py export --model out/finetune --out out/llava-phi --dtype bfloat16
$ python load_weights.py export --model out/finetune --out out/parts --to parts
"""
import argparse
import json
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from model import Int8Linear, LLaVAConfig, LLaVAPhi, PhiConfig, Projector, init_weights, merge_lora, quantize_int8
from vision import CLIP_MEAN, CLIP_STD, VisionConfig

# ---------------------------------------------------------------------------------------------------
# Names

SAVED = {       # ours -> as saved, in transformers' names. {} is the layer; * is q, k, v: our matrix's rows in thirds
    "llm.wte": "model.embed_tokens",
    "llm.h.{}.ln": "model.layers.{}.input_layernorm",
    "llm.h.{}.attn.qkv": "model.layers.{}.self_attn.*_proj",
    "llm.h.{}.attn.proj": "model.layers.{}.self_attn.dense",
    "llm.h.{}.mlp.fc": "model.layers.{}.mlp.fc1",
    "llm.h.{}.mlp.proj": "model.layers.{}.mlp.fc2",
    "llm.ln_f": "model.final_layernorm",
    "llm.lm_head": "lm_head",
    "vision.cls": "embeddings.class_embedding",
    "vision.patch": "embeddings.patch_embedding",
    "vision.pos": "embeddings.position_embedding.weight",
    "vision.ln_pre": "pre_layrnorm",                                # [sic]
    "vision.h.{}.ln_1": "encoder.layers.{}.layer_norm1",
    "vision.h.{}.attn.qkv": "encoder.layers.{}.self_attn.*_proj",
    "vision.h.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "vision.h.{}.ln_2": "encoder.layers.{}.layer_norm2",
    "vision.h.{}.mlp.fc": "encoder.layers.{}.mlp.fc1",
    "vision.h.{}.mlp.proj": "encoder.layers.{}.mlp.fc2",
    "vision.ln_post": "post_layernorm",                             # never built: only passed on
    "projector.fc": "linear_1",
    "projector.proj": "linear_2",
}
OTHER = {       # other spellings -> ours. The name alone says how q, k and v are packed: /heads is (head, 3, size) rows
    "model.layers.{}.self_attn.query_key_value": "llm.h.{}.attn.qkv/heads",     # transformers 4.36, LLaVA-Phi
    "transformer.embd.wte": "llm.wte",                                          # phi-msft
    "transformer.h.{}.ln": "llm.h.{}.ln",
    "transformer.h.{}.mixer.Wqkv": "llm.h.{}.attn.qkv",                         # (3, head, size), as ours
    "transformer.h.{}.mixer.out_proj": "llm.h.{}.attn.proj",
    "transformer.h.{}.mlp.fc1": "llm.h.{}.mlp.fc",
    "transformer.h.{}.mlp.fc2": "llm.h.{}.mlp.proj",
    "lm_head.ln": "llm.ln_f",
    "lm_head.linear": "llm.lm_head",
    "0": "projector.fc",                                                        # mm_projector.0, .2
    "2": "projector.proj",
}
BEGINNINGS = (  # how a tensor's name may begin, the part it is of, what stands for that beginning in the tables above
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision", ""),
    (r"vision_model\.|(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", "vision", ""),
    (r"(model\.)?(mm_projector|multi_modal_projector)\.", "projector", ""),
    (r"model\.language_model\.", "llm", "model."),
    (r"language_model\.|(?=model\.|lm_head\.|transformer\.)", "llm", ""),
)
PREFIX = {"llm": "language_model.", "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector."}
PLACES = {(ours.split(".")[0], theirs): ours for theirs, ours in [*OTHER.items(), *((t, o) for o, t in SAVED.items())]}
DROPPED = (     # tensors of published files that are left out on purpose
    (r".*rotary_emb", "rotary angles are computed in every forward"),
    (r".*position_ids", "0, 1, 2, ..."),
    (r"text_model\.|text_projection|visual_projection|logit_scale", "CLIP's text tower and contrastive heads"),
)
UNUSED = "behind the hidden state that is read: not loaded, kept in saved models"


def to_saved(name: str) -> list[str]:
    """Our name -> the saved names: one, or those of q, k and v, whose rows follow each other in our tensor."""
    layer = re.search(r"\.(\d+)\.|$", name)[1]
    stem, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias|)", re.sub(r"\.\d+\.", ".{}.", name)).groups()
    saved = PREFIX[name.split(".")[0]] + SAVED[stem].format(layer) + leaf
    return [saved.replace("*", piece) for piece in "qkv"] if "*" in saved else [saved]


def to_ours(name: str) -> tuple[str, str] | None:
    """A tensor's name in any layout -> (our name, piece: "" for all of it, "q", "k", "v", "heads"), or None."""
    for beginning, part, stand_in in BEGINNINGS:
        if match := re.match(beginning, name):
            rest = stand_in + name[match.end():]
            layer, third = (re.search(mark + "|$", rest)[1] for mark in (r"\.(\d+)\.", r"\.([qkv])_proj\."))
            stem = re.sub(r"\.[qkv]_proj\.", ".*_proj.", re.sub(r"\.\d+\.", ".{}.", rest, count=1))
            for theirs, dot, leaf in ((stem, "", ""), stem.rpartition(".")):
                if ours := PLACES.get((part, theirs)):
                    ours, _, packing = ours.partition("/")
                    return ours.format(int(layer or 0)) + dot + leaf, third or packing
            return None
    return None


def unroll(names: Iterable[str]) -> dict[str, str]:
    """The oldest layout is one list, from embedding (0) to head (last): -> what phi-msft calls the same tensors."""
    places = {name: int(m[1]) for name in names if (m := re.match(r"layers\.(\d+)\.", name))}
    ends = {0: "transformer.embd", max(places.values(), default=0): "lm_head"}
    return {name: ends.get(i, f"transformer.h.{i - 1}") + name[len(f"layers.{i}"):] for name, i in places.items()}


def meta_model(config: LLaVAConfig) -> LLaVAPhi:
    with torch.device("meta"):
        return LLaVAPhi(config)


def blueprint(config: LLaVAConfig) -> dict[str, torch.Size]:
    """Our name -> shape of everything a saved model holds, in order: also the vision layers that are never built."""
    whole = meta_model(replace(config, vision=replace(config.vision, feature_layer=-1)))
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    return shapes | {f"vision.ln_post.{leaf}": torch.Size([config.vision.n_embd]) for leaf in ("weight", "bias")}

# ---------------------------------------------------------------------------------------------------
# Files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
HEADER_LIMIT = 2_000_000                    # bytes of a table of tensors; the whole model's has 90 thousand
JSON_LIMIT = 20_000_000                     # bytes; Phi-2's tokenizer.json has two million
SHARD_BYTES = 5_000_000_000
EXPECTED_DTYPES = "expected bfloat16 or float32; Phi-2's attention scores overflow in fp16"


class Stored(NamedTuple):                   # where a tensor's bytes lie, to be read or to be written
    name: str                               # as it is called there
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Folder(NamedTuple):                   # what a folder holds
    path: Path
    found: dict[str, dict[str, Stored]]     # our name -> piece -> tensor
    dropped: dict[str, str]                 # its name there -> why it is left out
    unexpected: list[Stored]                # we have no place for these

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in PREFIX if any(name.startswith(part + ".") for name in self.found))

    @property
    def kind(self) -> str:
        others = ", ".join(stored.name for stored in self.unexpected[:3])
        return KINDS.get(self.parts, f"a folder of other tensors ({others}, ...)")


PHI, CLIP, LLAVA = "a Phi-2 language model", "a CLIP vision tower", "a LLaVA-Phi model"
KINDS = {("llm",): PHI, ("vision",): CLIP, ("llm", "vision", "projector"): LLAVA,
         ("llm", "vision"): "a LLaVA-Phi model without projector"}
HINTS = {
    PHI: "get it with: hf download microsoft/phi-2 --local-dir {}",
    CLIP: "get it with: hf download openai/clip-vit-large-patch14-336 --local-dir {}",
    LLAVA: "train one (python train.py --stage pretrain) or get the published one with: "
           "hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi",
}


def read_json(path: Path) -> dict:
    """A json object from a file that somebody else wrote. ValueError names the file and what it looks like instead."""
    if not path.is_file():
        raise ValueError(f"{path}: not there; it belongs to the download")
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large for a json file of a model folder")
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not json, begins with {data[:40]!r}: was a web page saved in its place?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a json object, found {type(value).__name__}")
    return value


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors before .bin, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        shards = read_json(index).get("weight_map")         # names the shards; what is in them they say themselves
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index}: has no weight_map of tensor names to file names")
        for shard in set(shards.values()):
            if Path(shard).name != shard or Path(shard).suffix != Path(name).suffix:
                raise ValueError(f"{index}: {shard!r} is not the plain name of a shard in this folder")
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: named in {index.name}, but not there: incomplete download?")
        return [folder / shard for shard in sorted(set(shards.values()))]
    for path in [folder / "checkpoint.json", *sorted(folder.glob("step_*/checkpoint.json"), reverse=True)]:
        if path.is_file():
            raise ValueError(f"{folder}: a training run's checkpoint and no model yet; make one of it with: "
                             f"python load_weights.py export --model {path.parent} --out DIR")
    raise ValueError(f"{folder}: holds no model.safetensors and no pytorch_model.bin, in one file or with an index")


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The table at the head of a safetensors file, believed only if it accounts for every byte behind it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"{path}: file is {size} bytes, header says it alone has {length}: incomplete download?")
        header = file.read(length)
    try:
        table = json.loads(header)
        table.pop("__metadata__", None)
        stored, end = {}, 0
        for name, row in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = row["data_offsets"]
            stored[name] = Stored(name, path, 8 + length + start, DTYPES[row["dtype"]], tuple(row["shape"]))
            counts = all(type(n) is int and n >= 0 for n in row["shape"])
            if not counts or start != end or stop - start != stored[name].nbytes:
                raise ValueError(f"the entry of {name[:80]} does not fit its place")
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: not a safetensors file, or a broken one ({type(e).__name__}: {e})") from None
    if 8 + length + end != size:
        raise ValueError(f"{path}: file is {size} bytes, header says {8 + length + end}: incomplete download?")
    return stored


def read_bin(path: Path) -> dict[str, Stored]:
    """The same table for a file of torch.save: a zip of one pickle (names, shapes) and one plain record per tensor.

    torch's safe unpickler reads the pickle onto fake tensors, which have no memory but know their place in the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:          # the length of the zip's table stands near its end: look before parsing it
        file.seek(max(0, size - 66_000))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    length = int.from_bytes(tail[end + 12:end + 16], "little") if end >= 0 else 0
    if length > HEADER_LIMIT:
        raise ValueError(f"{path}: its table of contents says it has {length} bytes, far more than a model needs")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise ValueError(f"{path}: not a file of torch.save (of torch 1.6 or newer): incomplete download?") from None
    for record in records:
        large = record.filename.endswith(".pkl") and record.file_size > HEADER_LIMIT
        if record.compress_type != zipfile.ZIP_STORED or large:
            raise ValueError(f"{path}: {record.filename} is compressed or too large, torch.save writes no such thing")
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except Exception as e:                  # a stranger's pickle can fail in any way
        reason = [*str(e).strip().splitlines(), type(e).__name__][0]
        raise ValueError(f"{path}: refused, it holds more than plain tensors ({reason})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    stored = {}
    for name, x in state.items():
        if not isinstance(name, str) or not isinstance(x, Tensor) or x.layout != torch.strided or x.is_quantized:
            raise ValueError(f"{path}: {str(name)[:80]!r} is not a plain dense tensor")
        if not x.is_contiguous() or not hasattr(x.untyped_storage(), "_checkpoint_offset"):
            raise ValueError(f"{path}: {name!r} is not stored row by row")
        offset = x.untyped_storage()._checkpoint_offset + x.storage_offset() * x.dtype.itemsize
        stored[name] = Stored(name, path, offset, x.dtype, tuple(x.shape))
        if offset + stored[name].nbytes > size:
            raise ValueError(f"{path}: file is {size} bytes, {name!r} would end at {offset + stored[name].nbytes}")
    return stored


def read_folder(folder: Path, expected: str = LLAVA) -> Folder:
    """What lies in a folder, without reading a tensor. `expected`: what the messages say was wanted."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; " + HINTS[expected].format(folder))
    tensors: dict[str, Stored] = {}
    for path in tensor_files(folder):
        stored = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise ValueError(f"{path}: holds {twice[0]}, which {tensors[twice[0]].path.name} holds too")
        tensors |= stored
    result = Folder(folder, {}, {}, [])
    modern = unroll(tensors)
    for name, stored in tensors.items():
        if reason := next((why for pattern, why in DROPPED if re.match(pattern, name)), None):
            result.dropped[name] = reason
        elif place := to_ours(modern.get(name, name)):
            pieces = result.found.setdefault(place[0], {})
            if pieces and (place[1] in pieces or {"", "heads"} & {place[1], *pieces}):
                other = next(iter(pieces.values())).name
                raise ValueError(f"{folder}: {name} and {other} are the same tensor in two layouts")
            pieces[place[1]] = stored
        else:
            result.unexpected.append(stored)
    return result


def in_order(pieces: dict[str, Stored]) -> list[Stored]:
    return [pieces[piece] for piece in "qkv"] if "q" in pieces else list(pieces.values())


def read(name: str, pieces: dict[str, Stored], config: LLaVAConfig, memory: Tensor | None = None) -> Tensor:
    """One of our tensors from its pieces in the files. It lies in `memory` (bytes), until that is used again."""
    if memory is None:
        memory = torch.empty(sum(stored.nbytes for stored in pieces.values()), dtype=torch.uint8)
    view, end = memoryview(memory.numpy()), 0
    for stored in in_order(pieces):         # q, k and v follow each other, as their rows do in our matrix
        start, end = end, end + stored.nbytes
        with open(stored.path, "rb") as file:
            file.seek(stored.offset)
            if file.readinto(view[start:end]) != stored.nbytes:
                raise ValueError(f"{stored.path}: ends in the middle of a tensor: incomplete download?")
    x = memory[:end].view(stored.dtype)
    x = x.view(stored.shape) if len(pieces) == 1 else x.view(-1, *stored.shape[1:])
    if "heads" in pieces:                   # (head, 3, size) -> (3, head, size) rows
        n_head = config.llm.n_head if name.startswith("llm") else config.vision.n_head
        x = x.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return x

# ---------------------------------------------------------------------------------------------------
# Config

PHI_KEYS = {    # ours -> (its spellings in config.json through the years, what transformers takes when it is not there)
    "vocab_size": (("vocab_size",), 51200),
    "block_size": (("max_position_embeddings", "n_positions"), 2048),
    "n_layer": (("num_hidden_layers", "n_layer"), 24),
    "n_head": (("num_attention_heads", "n_head"), 32),
    "n_embd": (("hidden_size", "n_embd"), 2048),
    "n_inner": (("intermediate_size", "n_inner"), None),
    "rope_base": (("rope_theta",), 10000.0),
    "eps": (("layer_norm_eps", "layer_norm_epsilon"), 1e-5),
    "dropout": (("resid_pdrop",), 0.0),
}
ROTARY_KEYS = {"dim": (("rotary_dim",), None), "factor": (("partial_rotary_factor",), 0.5)}
VISION_KEYS = {
    "image_size": (("image_size",), 224),
    "patch_size": (("patch_size",), 32),
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_inner": (("intermediate_size",), 3072),
    "eps": (("layer_norm_eps",), 1e-5),
}


def numbers(c: dict, keys: dict, path: Path) -> dict:
    """Our config fields from a config.json of any era; null is the same as absent."""
    values = {}
    for field, (spellings, default) in keys.items():
        value = next((c[key] for key in spellings if c.get(key) is not None), default)
        fits = type(value) in (int, float) if isinstance(default, float) else type(value) is int and value > 0
        if value is not None and not (fits and 0 <= value < 1e9):
            raise ValueError(f"{path}: {spellings[0]} is {value!r}, expected a number")
        values[field] = value
    return values


def inner(c: dict, key: str, default: dict, path: Path) -> dict:
    """A config inside a config."""
    value = default if c.get(key) is None else c[key]
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}, expected an object")
    return value


def expect(path: Path, what: str, found: object, *known: object) -> None:
    if found not in known:
        raise ValueError(f"{path}: {what} is {found!r}, and only {' or '.join(map(repr, known))} is implemented here")


def phi_config(c: dict, path: Path) -> PhiConfig:
    rope = inner(c, "rope_parameters", {}, path)                    # transformers 5
    values = numbers(c | rope, PHI_KEYS | ROTARY_KEYS, path)
    rotary_dim, rotary_factor = values.pop("dim"), values.pop("factor")
    if values["n_inner"] is None:
        values["n_inner"] = 8192 if "hidden_size" in c else 4 * values["n_embd"]
    expect(path, "rope_scaling", c.get("rope_scaling"), None)
    expect(path, "rope_type", rope.get("rope_type", "default"), "default")
    expect(path, "qk_layernorm", c.get("qk_layernorm", False), False)
    expect(path, "tie_word_embeddings", c.get("tie_word_embeddings", False), False)
    activation = c.get("hidden_act", c.get("activation_function", "gelu_new"))
    expect(path, "activation", activation, "gelu_new", "gelu_pytorch_tanh")
    kv_heads = c.get("num_key_value_heads", c.get("n_head_kv"))
    expect(path, "the number of key and value heads", kv_heads, None, values["n_head"])
    if values["n_embd"] % values["n_head"]:
        raise ValueError(f"{path}: hidden_size {values['n_embd']} is not a multiple of {values['n_head']} heads")
    return PhiConfig(**values, rotary_dim=rotary_dim or int(values["n_embd"] // values["n_head"] * rotary_factor))


def vision_config(c: dict, feature_layer: object, path: Path) -> VisionConfig:
    expect(path, "the vision tower's activation", c.get("hidden_act", "quick_gelu"), "quick_gelu")
    expect(path, "num_channels", c.get("num_channels", 3), 3)
    values = numbers(c, VISION_KEYS, path)
    if type(feature_layer) is not int or not -values["n_layer"] <= feature_layer < 0:
        raise ValueError(f"{path}: the vision layer to read is {feature_layer!r}, expected one counted from the end")
    return VisionConfig(**values, feature_layer=feature_layer)


def image_mode(c: dict, folder: Path) -> str:
    """How a folder's model saw its pictures: LLaVA says so in config.json, transformers in its processor's file."""
    if "image_aspect_ratio" in c:
        return "pad" if c["image_aspect_ratio"] == "pad" else "crop"
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            processor = read_json(folder / name)
            if inner(processor, "image_processor", processor, folder / name).get("do_pad"):
                return "pad"
    return "crop"


def read_folders(paths: Iterable[Path]) -> list[Folder]:
    """One LLaVA-like folder, or a Phi folder and a CLIP folder, in this order. ValueError: they are something else."""
    paths = [Path(path) for path in paths]
    folders = []
    for path, kind in zip(paths, [PHI, CLIP] if len(paths) == 2 else [LLAVA], strict=True):
        folders.append(read_folder(path, kind))
        if folders[-1].kind != kind:
            found = folders[-1].kind
            raise ValueError(f"{path}: this looks like {found}, expected {kind}; {HINTS[kind].format(path)}")
    return folders


def config_of(*folders: Folder) -> LLaVAConfig:
    """The config of one folder, or of a Phi and a CLIP folder. A part that is in neither keeps our defaults."""
    llm, vision = folders[0], folders[-1]
    path, v_path = llm.path / "config.json", vision.path / "config.json"
    c, v = read_json(path), read_json(v_path)
    text, tower = inner(c, "text_config", c, path), inner(v, "vision_config", v, v_path)
    projector = inner(tower, "mm_projector", {}, v_path)            # LLaVA-Phi keeps both in its vision_config
    tower = inner(tower, "vision_tower", tower, v_path)
    expect(path, "tie_word_embeddings", c.get("tie_word_embeddings", False), False)
    expect(v_path, "the projector", projector.get("mm_projector_type", "mlp2x_gelu"), "mlp2x_gelu")
    expect(v_path, "the projector's activation", v.get("projector_hidden_act", "gelu"), "gelu")
    expect(v_path, "vision_feature_select_strategy", v.get("vision_feature_select_strategy", "default"), "default")
    expect(v_path, "the features taken", tower.get("mm_vision_select_feature", "patch"), "patch")
    feature_layer = v.get("vision_feature_layer", tower.get("mm_vision_select_layer", -2))
    config = LLaVAConfig(
        phi_config(text, path) if "llm" in llm.parts else PhiConfig(),
        vision_config(tower, feature_layer, v_path) if "vision" in vision.parts else VisionConfig(),
        image_mode(c, llm.path) if len(folders) == 1 else "crop",   # two bases have seen no padded picture yet
    )
    for part, folder, n in (("llm", llm, config.llm.n_layer), ("vision", vision, config.vision.n_layer)):
        there = {int(m[1]) for name in folder.found if (m := re.match(part + r"\.h\.(\d+)\.", name))}
        if there and len(there) != n:
            raise ValueError(f"{folder.path}: config.json says {n} {part} layers, the tensors are of {len(there)}")
    return config


def load_config(*folders: Path) -> LLaVAConfig:
    """The config of one LLaVA-like folder, or of a Phi folder and a CLIP folder together, in any era's spelling."""
    return config_of(*read_folders(folders))

# ---------------------------------------------------------------------------------------------------
# Loading


def check(folders: list[Folder], needed: Iterable[str], config: LLaVAConfig, allow_missing: tuple[str, ...] = (),
          limit: int = 8) -> dict[str, dict[str, Stored]]:
    """-> our name -> its pieces, of all folders. ValueError lists what is missing, unexpected and misshapen at once."""
    def say(name: str, shape: Iterable[int]) -> str:
        return f"{name[:100]} ({', '.join(map(str, shape))})"
    shapes = blueprint(config)
    found = {name: pieces for folder in folders for name, pieces in folder.found.items()}
    absent = tuple(part for part in allow_missing if not any(name.startswith(part) for name in found))
    missing, misshapen, unexpected = [], [], [say(s.name, s.shape) for folder in folders for s in folder.unexpected]
    for name in dict.fromkeys([*needed, *found]):
        pieces = found.get(name, {})
        if name not in shapes:
            unexpected += [say(s.name, s.shape) for s in pieces.values()]
            continue
        saved, whole = to_saved(name), tuple(shapes[name])
        shape = (whole[0] // len(saved), *whole[1:])                    # of each as it is saved, q, k and v apart
        if not (name.startswith(absent) or "" in pieces or "heads" in pieces):
            missing += [say(n, shape) for n, piece in zip(saved, "qkv") if piece not in pieces]
        for piece, s in pieces.items():
            wanted = whole if piece in ("", "heads") else shape
            if s.shape != wanted or not s.dtype.is_floating_point or s.dtype != next(iter(pieces.values())).dtype:
                misshapen.append(f"{say(s.name, s.shape)} {str(s.dtype)[6:]}, expected{say('', wanted)} of floats")
    wrong = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    lists = [f"{len(names)} {what}: {', '.join(names[:limit])}" + ", ..." * (len(names) > limit)
             for what, names in wrong.items() if names]
    if lists:
        where = " and ".join(str(folder.path) for folder in folders)
        raise ValueError(f"{where}: {'; '.join(lists)} (all of them: python load_weights.py inspect {folders[0].path})")
    return found


def load_into(model: LLaVAPhi, folders: Iterable[Path], copy: Callable[[Tensor, Tensor], object] | None = None,
              allow_missing: tuple[str, ...] = ()) -> None:
    """Fill a model from one LLaVA-like folder, or from a Phi folder and a CLIP folder, one tensor at a time.

    copy(parameter, tensor): called once per parameter, must cast and be done with `tensor` (CPU, the file's dtype) when
    it returns. Not given: parameter.copy_(tensor), or a read straight into it.
    allow_missing: parts such as "projector." that the folders need not have; they are left as they are.
    """
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}  # adapters are in no folder
    found = check(read_folders(folders), parameters, model.config, allow_missing)
    found = {name: pieces for name, pieces in found.items() if name in parameters}
    own = {}                                # parameters that the files' bytes can be read into as they are
    for name, pieces in found.items():
        p = parameters[name]
        same = "heads" not in pieces and p.dtype == in_order(pieces)[0].dtype
        if not copy and same and type(p.data) is Tensor and p.device.type == "cpu" and p.is_contiguous():
            own[name] = p.data
    for name, tensor in read_all(found, model.config, own):
        if copy:
            copy(parameters[name], tensor)
        elif name not in own:
            parameters[name].data.copy_(tensor)


def read_all(found: dict[str, dict[str, Stored]], config: LLaVAConfig,
             in_place: Mapping[str, Tensor] = {}) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor), in the order of the files. Each is gone when the next one is asked for, but those that have
    a tensor of their size and dtype in `in_place` are read into that."""
    sizes = [sum(s.nbytes for s in pieces.values()) for name, pieces in found.items() if name not in in_place]
    shared = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    names = sorted(found, key=lambda name: in_order(found[name])[0][1:3])
    for name, following in zip(names, [*names[1:], None]):
        memory = in_place[name].flatten().view(torch.uint8) if name in in_place else shared
        tensor = read(name, found[name], config, memory)
        for stored in in_order(found[following]) if following and hasattr(os, "posix_fadvise") else []:
            with open(stored.path, "rb") as file:       # the disk works while the caller copies
                os.posix_fadvise(file.fileno(), stored.offset, stored.nbytes, os.POSIX_FADV_WILLNEED)
        yield name, tensor


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               int8: bool = False) -> LLaVAPhi:
    """A LLaVA-like folder of any layout as a frozen model in eval mode, straight on its device.

    int8: each Linear's weight is quantised as it arrives, so the model never exists in a larger type.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype}: {EXPECTED_DTYPES}")
    model = meta_model(load_config(folder)).to(dtype)
    if int8:
        quantize_int8(model)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    owners = {m.weight: m for m in model.modules() if isinstance(m, Int8Linear)}
    take = lambda p, tensor: owners[p].quantize(tensor) if p in owners else p.data.copy_(tensor)
    load_into(model, [folder], take if int8 else None)
    return model

# ---------------------------------------------------------------------------------------------------
# Saving

ALONE = {       # how saved names begin where one part is written without the others: as Phi, CLIP and LLaVA call them
    "llm": {"language_model.": ""},
    "vision": {"vision_tower.": ""},
    "projector": {f"multi_modal_projector.linear_{i + 1}.": f"model.mm_projector.{2 * i}." for i in range(2)},
}
Lazy = Tensor | Callable[[], Tensor]        # a tensor, or what loads it when its turn has come


def write_tensors(part: str, folder: Path, dtypes: dict[str, torch.dtype], tensors: Mapping[str, Lazy],
                  found: dict[str, dict[str, Stored]], config: LLaVAConfig) -> None:
    """Write the tensors of `dtypes` (our name -> what to save it in) as safetensors, in shards where they are large.

    They come from `tensors`, else from where they are `found`, one at a time.
    """
    shapes, shards, room = blueprint(config), [], 0
    for name, dtype in dtypes.items():
        nbytes = shapes[name].numel() * dtype.itemsize
        if nbytes > room:
            shards, room = [*shards, []], SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    codes, where, total = {dtype: code for code, dtype in DTYPES.items()}, {}, 0
    for i, names in enumerate(shards):
        number = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        header, end = {"__metadata__": {"format": "pt"}}, 0
        names.sort(key=lambda name: -dtypes[name].itemsize)             # wide ones first: all stay aligned
        for name in names:
            pieces, (rows, *rest) = to_saved(name), shapes[name]
            for saved in pieces:                                        # q, k and v follow each other, as in our matrix
                for old, new in ALONE.get(part, {}).items():
                    saved = re.sub("^" + re.escape(old), new, saved)
                shape = [rows // len(pieces), *rest]
                start, end = end, end + prod(shape) * dtypes[name].itemsize
                header[saved] = {"dtype": codes[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
                where[saved] = f"model{number}.safetensors"
        total += end
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / f"model{number}.safetensors", "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                tensor = tensors[name] if name in tensors else read(name, found[name], config)
                tensor = tensor() if callable(tensor) else tensor
                assert tensor.shape == shapes[name], f"{name}: {tuple(tensor.shape)} is not {tuple(shapes[name])}"
                data = tensor.detach().to("cpu", dtypes[name]).contiguous().flatten().view(torch.uint8)
                file.write(memoryview(data.numpy()))
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def finished_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to write to. At the end it is renamed to `out`, or its files are moved into it.

    The second happens where a training run, or an older saved model, is already: config.json is moved last, and until
    then the one that is there says nothing of a model, so a crash in between leaves no mixture that would load.
    Raises ValueError where `out` holds anything else.
    """
    old = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    used = out.exists() and any(out.iterdir())
    ours = "training" in old or (out / "load_hf.py").exists() or (out / "mm_projector.safetensors").exists()
    if used and not ours:
        raise ValueError(f"{out}: holds files that are not a saved model's; give --out a new folder")
    made = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        if used and (made / "config.json").exists():
            training = {"training": old["training"]} if "training" in old else {}
            write_json(made / "config.json", read_json(made / "config.json") | training)
            write_json(made / "old.json", training)
        for path in [*made.rglob("*"), made]:
            sync(path)
        if used:
            move_into(made, out)
        else:
            made.rename(out)                # over an empty folder at the most
        sync(out.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def move_into(made: Path, out: Path) -> None:
    if (made / "old.json").exists():
        os.replace(made / "old.json", out / "config.json")
        for path in out.glob("model*.safetensors*"):
            path.unlink()
    for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        os.replace(path, out / path.name)
    made.rmdir()
    sync(out)


def save_model(out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, sources: Iterable[Path],
               dtype: torch.dtype | None = None) -> None:
    """Write a model folder that is complete by itself, in the one format we save.

    tensors: those of our parameters that changed; everything else (other parameters, the vision layers behind the one
    that is read, the tokenizer) is taken from `sources`, the folders that the model came from.
    dtype None: each tensor's own; functions need one. In a training folder config.json keeps the trainer's settings
    under its key "training". Nothing is at `out` before all of it is there.
    """
    save("", out, tensors, config, read_folders(sources), dtype)


def save_phi(out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, source: Path) -> None:
    """The same for a plain Phi-2 folder, as transformers' PhiForCausalLM and `merge --llm` take it."""
    save("llm", out, tensors, config, [read_folder(source, PHI)], None)


def save(part: str, out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, sources: list[Folder],
         dtype: torch.dtype | None) -> None:
    """The whole model (part ""), or one part as a folder of its own."""
    names = [name for name in blueprint(config) if name.startswith(part)]
    found = check(sources, [name for name in names if name not in tensors], config)
    assert tensors.keys() <= set(names), f"not in the model: {tensors.keys() - set(names)}"
    dtypes = {name: dtype or (tensors[name] if name in tensors else in_order(found[name])[0]).dtype for name in names}
    tokenizer = read_tokenizer(sources[0].path)
    if not part and max(token_ids(tokenizer).values()) + 1 >= config.llm.vocab_size:
        n = config.llm.vocab_size
        raise ValueError(f"{sources[0].path}: all {n} embedding rows are taken, none is left for <image>")
    with finished_folder(out) as made:
        write_tensors(part, made, dtypes, tensors, found, config)
        write_texts(part, made, config, tokenizer, dtypes[names[0]])

# ---------------------------------------------------------------------------------------------------
# Saving: the text files that transformers and vLLM read beside the tensors

EOT = "<|endoftext|>"
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
    {{- messages[0]['content'] + ' ' -}}
{%- else -%}
    {{- "A chat between a curious user and an artificial intelligence assistant. " -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set text = message['content'] -%}
    {%- else -%}
        {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- if message['content'] | selectattr('type', 'equalto', 'image') | list -%}
            {%- set text = '<image>\\n' + text -%}
        {%- endif -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + text -}}
        {%- if add_generation_prompt or not loop.last -%}{{- ' ASSISTANT:' -}}{%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + text + '<|endoftext|>' -}}
    {%- endif -%}
{%- endfor -%}
"""
LOAD_HF = '''\
"""transformers' Llava has no bias in its language model's head, Phi-2 has one: this loads the folder and puts it back.

>>> from load_hf import load
>>> model = load()          # keywords go to from_pretrained
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText


def load(folder=Path(__file__).resolve().parent, **kwargs):
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    name, index = "language_model.lm_head.bias", Path(folder) / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(Path(folder) / shard, "pt") as file:
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(file.get_tensor(name).to(head.weight), requires_grad=False)
    return model
'''
README = """\
# LLaVA-Phi

A CLIP ViT, a two-layer projector and Phi-2, in the layout of transformers' `LlavaForConditionalGeneration`.
`AutoProcessor.from_pretrained` gives the processor and its chat template. The model is loaded with `load_hf.py`:
plain `from_pretrained` drops the bias of the language model's head, and the answers change.

    from load_hf import load
    model = load(dtype="bfloat16")      # never float16: Phi-2's attention scores overflow
"""


def added_token(id: int, text: str, special: bool) -> dict:
    return {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def read_tokenizer(folder: Path) -> dict:
    """tokenizer.json as it is, or made of vocab.json, merges.txt and added_tokens.json; without an <image> token."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        added = {text: vocab[text] for text in (EOT,) if text in vocab}
        if (folder / "added_tokens.json").is_file():
            added |= read_json(folder / "added_tokens.json")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        added = sorted((id, text) for text, id in added.items())
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added_token(id, text, text == EOT) for id, text in added],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": [line for line in lines if line and not line.startswith("#version")]},
        }
    else:
        raise ValueError(f"{folder}: has no tokenizer.json and no vocab.json with merges.txt; microsoft/phi-2 has both")
    try:
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
        ids = token_ids(tokenizer)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}: its tokenizer is not a byte-level BPE such as Phi-2's") from None
    if EOT not in ids:
        raise ValueError(f"{folder}: its tokenizer has no {EOT} token")
    return tokenizer


def token_ids(tokenizer: dict) -> dict[str, int]:
    return tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def image_processor(config: LLaVAConfig) -> dict:
    """What transformers needs to make the pixels that data.load_image and VisionTower make."""
    size = config.vision.image_size
    return {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": config.image_mode == "pad",
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
    }


def phi_json(config: PhiConfig, eot: int, dtype: str) -> dict:
    """config.json of a PhiForCausalLM, with the rotary numbers where transformers 4 looks and where 5 does."""
    factor = config.rotary_dim / (config.n_embd // config.n_head)
    rope = {"rope_theta": config.rope_base, "partial_rotary_factor": factor}
    return {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new",
        **{spellings[0]: getattr(config, field) for field, (spellings, _) in PHI_KEYS.items()},
        "num_key_value_heads": config.n_head, "qk_layernorm": False, "tie_word_embeddings": False, "embd_pdrop": 0.0,
        "attention_dropout": 0.0, **rope, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "torch_dtype": dtype,
    }


def clip_json(config: VisionConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
        **{spellings[0]: getattr(config, field) for field, (spellings, _) in VISION_KEYS.items()},
        "num_channels": 3, "attention_dropout": 0.0, "projection_dim": config.n_embd * 3 // 4,
    }


def write_tokenizer(folder: Path, tokenizer: dict, image: bool) -> int:
    """tokenizer.json and the files around it -> the id of <|endoftext|>. image: with <image> as the first id behind."""
    ids, added = token_ids(tokenizer), tokenizer["added_tokens"]
    if image:
        added = added + [added_token(max(ids.values()) + 1, "<image>", True)]
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOT)
    write_json(folder / "tokenizer.json", tokenizer | {"added_tokens": added})
    write_json(folder / "added_tokens.json", {token["content"]: token["id"] for token in added})
    special = {"additional_special_tokens": ["<image>"]} if image else {}
    write_json(folder / "special_tokens_map.json", names | special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False, **names,
        **({"extra_special_tokens": {"image_token": "<image>"}} if image else {}),
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
    })
    return ids[EOT]


def write_texts(part: str, folder: Path, config: LLaVAConfig, tokenizer: dict, dtype: torch.dtype) -> None:
    """All of a saved folder but its tensors: of the whole model, of a plain Phi or CLIP; a projector needs none.

    dtype: the first tensor's, for config.json. It never says fp16, which this model must not be computed in.
    """
    name = str(torch.float32 if dtype == torch.float16 else dtype).removeprefix("torch.")
    processor, clip = image_processor(config), clip_json(config.vision)
    if part == "vision":
        write_json(folder / "config.json", clip | {"torch_dtype": name})
        write_json(folder / "preprocessor_config.json", processor | {"image_processor_type": "CLIPImageProcessor"})
    if part in ("vision", "projector"):
        return
    eot, image_id = write_tokenizer(folder, tokenizer, image=not part), max(token_ids(tokenizer).values()) + 1
    text, ends = phi_json(config.llm, eot, name), {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "generation_config.json", ends)
    if part == "llm":
        return write_json(folder / "config.json", text)
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": image_id, "image_seq_length": config.vision.n_patches,
        "image_aspect_ratio": config.image_mode,                        # LLaVA's key, for us
        "vision_feature_layer": config.vision.feature_layer, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        **ends, "torch_dtype": name, "text_config": text, "vision_config": clip,
    })
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    })
    for file, content in (("chat_template.jinja", CHAT_TEMPLATE), ("load_hf.py", LOAD_HF), ("README.md", README)):
        (folder / file).write_text(content, encoding="utf-8")

# ---------------------------------------------------------------------------------------------------
# Commands


def merge(llm: Path, vision: Path, out: Path, seed: int, dtype: torch.dtype | None) -> None:
    """One base model from a Phi-2 folder and a CLIP folder; the projector is new."""
    folders = read_folders([llm, vision])
    config = config_of(*folders)
    found = check(folders, [name for name in blueprint(config) if not name.startswith("projector")], config)
    projector = Projector(config.vision.n_embd, config.llm.n_embd)
    init_weights(projector, torch.Generator().manual_seed(seed))
    projector.to(dtype or found["llm.wte.weight"][""].dtype)
    save_model(out, {f"projector.{name}": p for name, p in projector.named_parameters()}, config, [llm, vision], dtype)


def export(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Any readable model, or a training checkpoint (out/step_NNNNNN), in the saved format."""
    if not (model / "checkpoint.json").is_file():
        return save_model(out, {}, load_config(model), [model], dtype)
    manifest = read_json(model / "checkpoint.json")
    settings, sources = manifest["config"], [Path(source) for source in manifest["sources"]]
    only_llm = settings["stage"] == "sft"
    folders = [read_folder(*sources, PHI)] if only_llm else read_folders(sources)
    config = config_of(*folders)
    dropout = config.llm.dropout if settings["dropout"] < 0 else settings["dropout"]
    config = replace(config, image_mode=settings["image_mode"], llm=replace(config.llm, dropout=dropout))
    tensors = trained(model, folders, config, settings["lora_alpha"])
    save("llm" if only_llm else "", out, tensors, config, folders, dtype or dtype_called(settings["dtype"]))


def export_parts(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """A plain Phi folder, a plain CLIP folder and LLaVA's mm_projector: what llama.cpp's converters and LLaVA take."""
    folders = read_folders([model])
    config = config_of(*folders)
    check(folders, blueprint(config), config)
    with finished_folder(out) as made:
        for part, name in (("llm", "phi-2"), ("vision", "clip"), ("projector", "projector")):
            save(part, made / name, {}, config, folders, dtype)
        (made / "projector" / "model.safetensors").rename(made / "mm_projector.safetensors")
        (made / "projector").rmdir()


def trained(checkpoint: Path, sources: list[Folder], config: LLaVAConfig, lora_alpha: float) -> dict[str, Lazy]:
    """Everything that a run has changed, to be loaded when its turn comes, LoRA adapters merged into their weights."""
    sizes = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    names = [name.removeprefix("model.") for name in sizes if name.startswith("model.")]
    stems = [name.removesuffix("lora_a") for name in names if name.endswith("lora_a")]
    found = check(sources, [stem + "weight" for stem in stems], config)

    def load(name: str) -> Tensor:
        tensor = torch.empty(sizes[f"model.{name}"].size)
        with warnings.catch_warnings():                     # about there being one process, which no_dist says
            warnings.simplefilter("ignore")
            dcp.load({f"model.{name}": tensor}, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
        return tensor

    def merged(stem: str) -> Tensor:
        weight = {stem + "weight": read(stem + "weight", found[stem + "weight"], config).float()}
        adapters = {stem + leaf: load(stem + leaf) for leaf in ("lora_a", "lora_b")}
        return merge_lora(weight | adapters, lora_alpha)[stem + "weight"]

    plain = {name: partial(load, name) for name in names if ".lora_" not in name}
    return plain | {stem + "weight": partial(merged, stem) for stem in stems}


LAYOUTS = (     # a piece of a language model's tensor names -> which of the published layouts it is in
    (".q_proj.", "split q, k, v (transformers 4.37 and newer)"),
    ("query_key_value", "fused query_key_value, packed head by head (transformers 4.36, LLaVA-Phi)"),
    ("transformer.h.", "mixer.Wqkv (phi-msft)"),
    ("layers.", "one list, layers.N (the earliest Phi files)"),
)
NEXT = {
    PHI: "python load_weights.py merge --llm {}    (with a CLIP folder as --vision)",
    CLIP: "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)",
    LLAVA: "python sample.py --model {} --image x.jpg",
}


def inspect(path: Path) -> None:
    """Print a page about a folder: what it is, what would be left out, what is missing, and what to run next."""
    def line(label: str, text: object) -> None:
        print(f"  {label:10} {text}")
    folder, files = read_folder(path), tensor_files(path)
    print(f"{path}: {folder.kind}")
    line("files", f"{len(files)} x {files[0].suffix[1:]}, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    for part in folder.parts:
        mine = [s for name, pieces in folder.found.items() if name.startswith(part + ".") for s in pieces.values()]
        dtypes, size = " and ".join(sorted({str(s.dtype)[6:] for s in mine})), sum(s.nbytes for s in mine) / 1e6
        line(part, f"{len(mine)} tensors, {sum(prod(s.shape) for s in mine):,} parameters, {dtypes}, {size:,.1f} MB")
        if part == "llm":
            line("", next(text for mark, text in LAYOUTS if any(mark in s.name for s in mine)))
    missing = "nothing"
    if "llm" in folder.parts:
        try:
            ids = token_ids(read_tokenizer(path))
            where = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.json and merges.txt"
            line("tokenizer", f"{where}: {len(ids):,} tokens, {EOT} is {ids[EOT]}")
        except ValueError as e:
            line("tokenizer", f"none: {e}")
            missing = "a tokenizer"
    try:
        config = config_of(folder)
        for part, sizes in (("llm", config.llm), ("vision", config.vision)):
            if part in folder.parts:
                line("config", sizes)
        line("images", config.image_mode)
        built = {name for name, _ in meta_model(config).named_parameters()}
        unused = [UNUSED for name, pieces in folder.found.items() if name not in built for _ in pieces]
        for reason, n in Counter([*folder.dropped.values(), *unused]).items():
            line("ignored", f"{n} tensors: {reason}")
        check([folder], [name for name in blueprint(config) if name.startswith(folder.parts)], config, limit=10 ** 6)
        line("missing", missing)
        line("next", NEXT.get(folder.kind, "nothing").format(path))
    except (ValueError, OSError) as e:
        line("problem", e)


def dtype_called(name: str) -> torch.dtype:
    if name not in ("bfloat16", "float32"):
        raise argparse.ArgumentTypeError(f"{name}: {EXPECTED_DTYPES}")
    return getattr(torch, name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="one base model from a Phi-2 folder and a CLIP folder")
    merging.add_argument("--llm", type=Path, default=Path("checkpoints/phi-2"), help="folder of the language model")
    merging.add_argument("--vision", type=Path, default=Path("checkpoints/clip-vit-large-patch14-336"), help="CLIP's")
    merging.add_argument("--out", type=Path, default=Path("out/base"), help="folder to write")
    merging.add_argument("--seed", type=int, default=42, help="of the new projector's weights")
    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("folder", type=Path)
    exporting = commands.add_parser("export", help="any readable model in the saved format")
    exporting.add_argument("--model", type=Path, default=Path("out/finetune"), help="folder to read")
    exporting.add_argument("--out", type=Path, required=True, help="folder to write")
    exporting.add_argument("--to", choices=("model", "parts"), default="model",
                           help="model: one folder, which transformers and vLLM read too; parts: Phi, CLIP, projector")
    for p in (merging, exporting):
        p.add_argument("--dtype", type=dtype_called, help="bfloat16 or float32; not given: as it is stored")

    def fail(message: str) -> None:                         # without the usage
        raise ValueError(message)

    for p in (parser, merging, inspecting, exporting):
        p.error, p.formatter_class = fail, argparse.ArgumentDefaultsHelpFormatter
    args = parser.parse_args(argv)
    if args.command == "merge":
        merge(args.llm, args.vision, args.out, args.seed, args.dtype)
    elif args.command == "export" and args.to == "parts":
        return export_parts(args.model, args.out, args.dtype)
    elif args.command == "export":
        export(args.model, args.out, args.dtype)
    inspect(args.folder if args.command == "inspect" else args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
