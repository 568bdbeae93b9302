"""Every way weights enter or leave: published folders of Phi-2, CLIP, SigLIP, LLaVA-Phi and Mipha in, one format out.

A folder is recognised by the names of its tensors. Its config.json gives sizes only, and its own name means nothing.
Reading is strict in both directions: a tensor that is missing, unknown or of the wrong shape is an error, and what is
left out on purpose is listed in DROPPED. Tensors are read one at a time and copied into the model, so loading takes the
memory of the model and of one tensor. What we save is a folder that is complete by itself and that transformers'
LlavaForConditionalGeneration and vLLM read as well.

    python load_weights.py merge --llm checkpoints/phi-2 --vision checkpoints/clip-vit-large-patch14-336 --out out/base
    python load_weights.py merge --vision checkpoints/siglip-so400m-patch14-384 --out out/mipha-base
    python load_weights.py inspect out/base --try
    python load_weights.py export --model out/finetune --out out/llava-phi --dtype bf16
    python load_weights.py export --model out/finetune --out out/parts --to parts
"""
import argparse
import hashlib
import json
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

from common import Parser, choose_device, dtype_name, read_json, run_command, sync_folder, torch_dtype


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python load_weights.py`. ValueError describes a mistake in it."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="make one base model from a Phi-2 folder and a CLIP or SigLIP folder")
    merging.add_argument("--llm", type=Path, default=Path("checkpoints/phi-2"), help="folder of the language model")
    merging.add_argument("--vision", type=Path, default=Path("checkpoints/clip-vit-large-patch14-336"),
                         help="folder of the vision tower, CLIP or SigLIP")
    merging.add_argument("--out", type=Path, default=Path("out/base"), help="folder to write")
    merging.add_argument("--seed", type=int, default=42, help="seed of the new projector's weights")
    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("folder", type=Path)
    inspecting.add_argument("--try", dest="try_out", action=argparse.BooleanOptionalAction, default=False,
                            help="also run the model for a minute, and say whether what it does makes sense")
    exporting = commands.add_parser("export", help="write any readable model in the format we save")
    exporting.add_argument("--model", type=Path, default=Path("out/finetune"),
                           help="folder to read: a model, or a training checkpoint (out/step_NNNNNN)")
    exporting.add_argument("--out", type=Path, required=True, help="folder to write")
    exporting.add_argument("--to", choices=("model", "parts"), default="model",
                           help="model: one folder, which transformers and vLLM read too; "
                                "parts: Phi, vision tower and projector apart, as llama.cpp's converters want them")
    for command in (merging, exporting):
        command.add_argument("--dtype", type=dtype_name, help="bf16 or fp32; not given: each tensor as it is stored")
    return parser.parse_args(argv)


def check_command_line() -> None:
    parse()


if __name__ == "__main__":
    # The imports below take seconds. `--help` and a mistake in a flag are answered before them.
    exit_code = run_command(check_command_line)
    if exit_code:
        sys.exit(exit_code)

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from data import EOT, IMAGE, IMAGE_MODES, eot_id, load_tokenizer
from model import (LLaVAConfig, LLaVAPhi, Phi, PhiConfig, check_int4_product, copy_weight, init_weights, merge_lora,
                   quantize_linears)
from vision import SIGLIP_SO400M_384, VisionConfig

# ---------------------------------------------------------------------------------------------------
# Names
#
# We call a tensor "llm.h.3.attn.qkv.weight"; a published file calls it something else in each era. The tables hold
# names without ".weight" and ".bias", {layer} stands for a layer's number and {qkv} for q, k and v in turn: three
# published tensors whose rows follow each other in ours.

SAVED = {       # our name -> the name behind PREFIX in the folders we save, which are transformers' own names
    "llm.wte": "model.embed_tokens",
    "llm.h.{layer}.ln": "model.layers.{layer}.input_layernorm",
    "llm.h.{layer}.attn.qkv": "model.layers.{layer}.self_attn.{qkv}_proj",
    "llm.h.{layer}.attn.proj": "model.layers.{layer}.self_attn.dense",
    "llm.h.{layer}.mlp.fc": "model.layers.{layer}.mlp.fc1",
    "llm.h.{layer}.mlp.proj": "model.layers.{layer}.mlp.fc2",
    "llm.ln_f": "model.final_layernorm",
    "llm.lm_head": "lm_head",
    "vision.cls": "embeddings.class_embedding",
    "vision.patch": "embeddings.patch_embedding",
    "vision.pos": "embeddings.position_embedding.weight",
    "vision.ln_pre": "pre_layrnorm",                                # [sic], in every CLIP there is
    "vision.h.{layer}.ln_1": "encoder.layers.{layer}.layer_norm1",
    "vision.h.{layer}.attn.qkv": "encoder.layers.{layer}.self_attn.{qkv}_proj",
    "vision.h.{layer}.attn.proj": "encoder.layers.{layer}.self_attn.out_proj",
    "vision.h.{layer}.ln_2": "encoder.layers.{layer}.layer_norm2",
    "vision.h.{layer}.mlp.fc": "encoder.layers.{layer}.mlp.fc1",
    "vision.h.{layer}.mlp.proj": "encoder.layers.{layer}.mlp.fc2",
    "vision.ln_post": "post_layernorm",                             # this and what follows is not in our model: it
    "vision.head.probe": "head.probe",                              # is only passed on when a folder is saved
    "vision.head.attn.in_proj_weight": "head.attention.in_proj_weight",
    "vision.head.attn.in_proj_bias": "head.attention.in_proj_bias",
    "vision.head.attn.proj": "head.attention.out_proj",
    "vision.head.ln": "head.layernorm",
    "vision.head.mlp.fc": "head.mlp.fc1",
    "vision.head.mlp.proj": "head.mlp.fc2",
    "projector.fc": "linear_1",
    "projector.proj": "linear_2",
}
PREFIX = {"llm": "language_model.", "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector."}

BEGINNINGS = (  # how a published name may begin, the part of the model it belongs to, what SAVED and OTHER have there
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),        # LLaVA
    ("model.vision_tower.vision_model.", "vision", ""),                     # LLaVA-Phi, Mipha
    ("model.vision_tower.vision_tower.", "vision", ""),
    ("model.vision_tower.", "vision", ""),                                  # transformers 5, in memory
    ("vision_tower.vision_tower.vision_model.", "vision", ""),
    ("vision_tower.vision_model.", "vision", ""),                           # what we save
    ("vision_tower.", "vision", ""),                                        # transformers 5, saved
    ("vision_model.", "vision", ""),                                        # CLIP, SigLIP
    ("embeddings.", "vision", "embeddings."),                               # a vision tower without a prefix
    ("encoder.", "vision", "encoder."),
    ("pre_layrnorm.", "vision", "pre_layrnorm."),
    ("post_layernorm.", "vision", "post_layernorm."),
    ("head.", "vision", "head."),
    ("model.mm_projector.", "projector", ""),                               # LLaVA, LLaVA-Phi, Mipha
    ("mm_projector.", "projector", ""),
    ("model.multi_modal_projector.", "projector", ""),                      # transformers 5, in memory
    ("multi_modal_projector.", "projector", ""),                            # what we save
    ("model.language_model.", "llm", "model."),                             # transformers 5, in memory
    ("language_model.", "llm", ""),                                         # what we save
    ("model.", "llm", "model."),                                            # Phi-2
    ("lm_head.", "llm", "lm_head."),
    ("transformer.", "llm", "transformer."),                                # Phi-2 as Microsoft first released it
)
OTHER = {       # other published names -> ours
    "model.layers.{layer}.self_attn.query_key_value": "llm.h.{layer}.attn.qkv",     # transformers 4.36, LLaVA-Phi
    "transformer.embd.wte": "llm.wte",
    "transformer.h.{layer}.ln": "llm.h.{layer}.ln",
    "transformer.h.{layer}.mixer.Wqkv": "llm.h.{layer}.attn.qkv",
    "transformer.h.{layer}.mixer.out_proj": "llm.h.{layer}.attn.proj",
    "transformer.h.{layer}.mlp.fc1": "llm.h.{layer}.mlp.fc",
    "transformer.h.{layer}.mlp.fc2": "llm.h.{layer}.mlp.proj",
    "lm_head.ln": "llm.ln_f",
    "lm_head.linear": "llm.lm_head",
    "0": "projector.fc",
    "2": "projector.proj",
}
# The rows of Wqkv are (3, head, size), as ours are; those of query_key_value are (head, 3, size). Both matrices have
# the same shape, so the name alone says which it is.
PACKED_BY_HEAD = "query_key_value"

DROPPED = (     # tensors of published files that are left out on purpose: a pattern, and the reason that `inspect` gives
    (r".*rotary_emb", "rotary angles are computed in every forward"),
    (r".*position_ids", "they are 0, 1, 2, ..."),
    (r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias",
     "the text tower and contrastive heads, with which the vision tower was trained"),
)
KEPT = "not loaded, but kept when a model is saved"
UNUSED_LAYERS = f"layers and LayerNorm after the hidden state that is read: {KEPT}"
UNUSED_HEAD = f"attention-pooling head, which makes one vector of a picture where LLaVA wants all patches: {KEPT}"

# Relatives that are not implemented here: a piece of a tensor's name that gives them away, and what they are. Without
# this they would be refused just as well, but by a list of names.
FOREIGN = (
    ("mlp.gate_up_proj", "Phi-3"),
    ("mlp.gate_proj", "Gemma, or another language model in the manner of Llama"),
    ("layer_scale1.", "DINOv2"),
    ("embeddings.patch_embeddings.", "DINOv2, or another vision tower in the manner of transformers' ViT"),
)


def known_names() -> dict[tuple[str, str], tuple[str, str]]:
    """(part, published name) -> (our name, piece), from the tables. For the pieces see `to_ours`."""
    names = {}
    for ours, theirs in SAVED.items():
        part = ours.split(".")[0]
        if "{qkv}" in theirs:
            for letter in "qkv":
                names[part, theirs.replace("{qkv}", letter)] = (ours, letter)
        else:
            names[part, theirs] = (ours, "")
    for theirs, ours in OTHER.items():
        part = ours.split(".")[0]
        names[part, theirs] = (ours, "heads" if theirs.endswith(PACKED_BY_HEAD) else "")
    return names


KNOWN_NAMES = known_names()
LAYER = re.compile(r"\.(\d+)\.")


def without_layer(name: str) -> tuple[str, str]:
    """"h.3.mlp.fc" -> ("h.{layer}.mlp.fc", "3"). A name outside of the layers stays, with an empty number."""
    match = LAYER.search(name)
    if match is None:
        return name, ""
    return LAYER.sub(".{layer}.", name, count=1), match[1]


def to_saved(name: str) -> list[str]:
    """Our name -> the names it is saved under: one, or those of q, k and v."""
    template, layer = without_layer(name)
    leaf = ""
    if template not in SAVED:
        template, _, leaf = template.rpartition(".")
        leaf = "." + leaf
    saved = PREFIX[name.split(".")[0]] + SAVED[template].replace("{layer}", layer) + leaf
    if "{qkv}" in saved:
        return [saved.replace("{qkv}", letter) for letter in "qkv"]
    return [saved]


def to_ours(name: str) -> tuple[str, str] | None:
    """A tensor's name in any layout -> (our name, piece), or None for a name that we do not know.

    The piece is "" for the whole of our tensor; "q", "k" or "v" for a third of its rows; "heads" for all of its rows,
    but packed head by head.
    """
    for beginning, part, standard in BEGINNINGS:
        if name.startswith(beginning):
            break
    else:
        return None
    template, layer = without_layer(standard + name.removeprefix(beginning))
    leaf = ""
    if (part, template) not in KNOWN_NAMES:
        template, _, leaf = template.rpartition(".")
        leaf = "." + leaf
    if (part, template) not in KNOWN_NAMES:
        return None
    ours, piece = KNOWN_NAMES[part, template]
    return ours.replace("{layer}", layer) + leaf, piece


def rename_sequential(names: Iterable[str]) -> dict[str, str]:
    """The earliest Phi files are one list, from layers.0 (the embedding) to the last (the head) -> their later names."""
    numbers = {}
    for name in names:
        match = re.match(r"layers\.(\d+)\.", name)
        if match:
            numbers[name] = int(match[1])
    last = max(numbers.values(), default=0)
    renamed = {}
    for name, number in numbers.items():
        rest = name.removeprefix(f"layers.{number}.")
        if number == 0:
            renamed[name] = f"transformer.embd.{rest}"
        elif number == last:
            renamed[name] = f"lm_head.{rest}"
        else:
            renamed[name] = f"transformer.h.{number - 1}.{rest}"
    return renamed


def meta_model(config: LLaVAConfig) -> LLaVAPhi:
    """A model that has names and shapes but no memory yet."""
    with torch.device("meta"):
        return LLaVAPhi(config)


def blueprint(config: LLaVAConfig) -> dict[str, torch.Size]:
    """Our name -> shape of everything that a saved model holds, in order.

    That is more than our model holds: the vision layers behind the hidden state that LLaVA reads are never built here,
    but whoever loads our folder with another program expects the whole tower.
    """
    whole = meta_model(replace(config, vision=replace(config.vision, feature_layer=-1)))
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    width, inner = config.vision.n_embd, config.vision.n_inner
    unused = {"ln_post.weight": [width], "ln_post.bias": [width]}
    if is_siglip(config.vision):
        unused |= {
            "head.probe": [1, 1, width],
            "head.attn.in_proj_weight": [3 * width, width], "head.attn.in_proj_bias": [3 * width],
            "head.attn.proj.weight": [width, width], "head.attn.proj.bias": [width],
            "head.ln.weight": [width], "head.ln.bias": [width],
            "head.mlp.fc.weight": [inner, width], "head.mlp.fc.bias": [inner],
            "head.mlp.proj.weight": [width, inner], "head.mlp.proj.bias": [width],
        }
    for name, shape in unused.items():
        shapes[f"vision.{name}"] = torch.Size(shape)
    return shapes


def is_siglip(config: VisionConfig) -> bool:
    """Which of the two towers it is. CLIP has a class token, SigLIP pools its patches by attention instead."""
    return not config.class_token

# ---------------------------------------------------------------------------------------------------
# Files

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
# Bytes of a table of tensors. The whole model's has 90 thousand; a file that claims far more wants our memory.
HEADER_LIMIT = 2_000_000


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""
    name: str                               # as the file calls it
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Pieces = dict[str, Stored]                  # the parts of one of our tensors in the files; for the keys see `to_ours`


class Folder(NamedTuple):
    """What a folder holds."""
    path: Path
    found: dict[str, Pieces]                # by our names, in the order of the files
    dropped: dict[str, str]                 # the file's name of a tensor -> why it is left out
    unexpected: list[Stored]                # tensors that we have no place for

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of llm, vision and projector are there."""
        present = {name.split(".")[0] for name in self.found}
        return tuple(part for part in PREFIX if part in present)

    @property
    def has_siglip(self) -> bool:
        """Whether the tower is SigLIP: its patch convolution has a bias, and there is no class token."""
        return "vision.patch.bias" in self.found and "vision.cls" not in self.found

    @property
    def kind(self) -> str:
        """What the folder is, in words."""
        others = ", ".join(stored.name for stored in self.unexpected[:3])
        kinds = KINDS_WITH_SIGLIP if self.has_siglip else KINDS
        return kinds.get(self.parts, f"a folder of other tensors ({others}, ...)")


PHI = "a Phi-2 language model"
CLIP = "a CLIP vision tower"
SIGLIP = "a SigLIP vision tower"
LLAVA = "a LLaVA-Phi model"
MIPHA = "a Mipha model"
KINDS = {("llm",): PHI, ("vision",): CLIP, ("llm", "vision", "projector"): LLAVA,
         ("llm", "vision"): "a LLaVA-Phi model without projector"}
KINDS_WITH_SIGLIP = {("vision",): SIGLIP, ("llm", "vision", "projector"): MIPHA,
                     ("llm", "vision"): "a Mipha model without projector"}
HINTS = {
    PHI: "get it with: hf download microsoft/phi-2 --local-dir {}",
    CLIP: "get it with: hf download openai/clip-vit-large-patch14-336 --local-dir {} "
          "(or google/siglip-so400m-patch14-384)",
    LLAVA: "train one (python train.py --stage pretrain) or get a published one with: "
           "hf download zhumj34/Mipha-3B --local-dir checkpoints/mipha-3b, or "
           "hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi",
}


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors before .bin, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            return shard_files(folder, name)
    for checkpoint in [folder, *sorted(folder.glob("step_*"), reverse=True)]:
        if (checkpoint / "checkpoint.json").is_file():
            raise ValueError(f"{folder}: a training run's checkpoint and no model yet; make one of it with: "
                             f"python load_weights.py export --model {checkpoint} --out DIR")
    raise ValueError(f"{folder}: holds no model.safetensors and no pytorch_model.bin, in one file or with an index")


def shard_files(folder: Path, name: str) -> list[Path]:
    """The shards that an index names. Only their names are taken from it: what is in them, they say themselves."""
    index = folder / f"{name}.index.json"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or Path(shard).suffix != Path(name).suffix:
            raise ValueError(f"{index}: {shard!r} is not the plain name of a shard in this folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard}: named in {index.name}, but not there: incomplete download?")
    return [folder / shard for shard in shards]


def first_line(error: Exception) -> str:
    """A library's error in one line, for the end of ours. It may quote a name from the file, of any length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, none of them read yet."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")     # of the header, a table in json, which comes first
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"{path}: file is {size} bytes, header says it alone has {length}: incomplete download?")
    stored = {}
    try:
        # "pread" reads a tensor into memory of its own. By default the file would be mapped, and changed or cut by
        # somebody else it would change the model, or end the process.
        file = safe_open(path, "pt", backend="pread")
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in SAFETENSORS_DTYPES:
                raise ValueError(f"{path}: {name[:80]} is of dtype {entry.get_dtype()}, which is not read here")
            dtype, shape = SAFETENSORS_DTYPES[entry.get_dtype()], tuple(entry.get_shape())
            stored[name] = Stored(name, path, dtype, shape, partial(file.get_tensor, name))
    except SafetensorError as e:
        raise ValueError(f"{path}: not a safetensors file, or not all of one: incomplete download? "
                         f"(file is {size} bytes; {first_line(e)})") from None
    return stored


def check_zip(path: Path) -> None:
    """Refuse a .bin file that is no plain zip archive, before torch believes anything in it.

    torch maps the file and takes each tensor's bytes as they lie there, so a compressed record would be read as noise.
    A table of millions of records, or a pickle of gigabytes, would take all memory before torch could object.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 66_000))     # the table's length stands in the last 66 thousand bytes
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


def read_bin(path: Path) -> dict[str, Stored]:
    """The tensors of a file of torch.save, mapped: their bytes are read when they are copied into a model."""
    check_zip(path)
    try:
        with warnings.catch_warnings():     # about quantised tensors, which are refused below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:                  # a stranger's pickle can fail in any way
        raise ValueError(f"{path}: refused, it holds more than plain tensors ({first_line(e)})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    stored = {}
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{path}: {str(name)[:80]!r} is not a plain dense tensor")
        if not tensor.is_contiguous():
            raise ValueError(f"{path}: {name!r} is not stored row by row")
        stored[name] = Stored(name, path, tensor.dtype, tuple(tensor.shape), tensor.detach)
    return stored


def read_folder(folder: Path, expected: str = LLAVA) -> Folder:
    """What lies in a folder, without reading a tensor. `expected` is the kind that an error message asks for."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; " + HINTS[expected].format(folder))
    tensors: dict[str, Stored] = {}
    for path in tensor_files(folder):
        stored = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
        repeated = sorted(tensors.keys() & stored.keys())
        if repeated:
            raise ValueError(f"{path}: holds {repeated[0]}, which {tensors[repeated[0]].path.name} holds too")
        tensors |= stored
    result = Folder(folder, {}, {}, [])
    renamed = rename_sequential(tensors)
    for name, stored in tensors.items():
        reason = reason_to_drop(name)
        known = to_ours(renamed.get(name, name))
        if reason:
            result.dropped[name] = reason
        elif known is None:
            result.unexpected.append(stored)
        else:
            add_piece(result, *known, stored)
    refuse_foreign(result)
    return result


def refuse_foreign(folder: Folder) -> None:
    for stored in folder.unexpected:
        for piece, model in FOREIGN:
            if piece in stored.name:
                raise ValueError(f"{folder.path}: {stored.name[:80]} is a tensor of {model}; implemented here are Phi-2 "
                                 "as language model, CLIP and SigLIP as vision towers")


def reason_to_drop(name: str) -> str | None:
    for pattern, reason in DROPPED:
        if re.match(pattern, name):
            return reason
    return None


def add_piece(folder: Folder, name: str, piece: str, stored: Stored) -> None:
    """Note that `stored` is (a piece of) our tensor `name`. ValueError if the folder has it in another layout too."""
    pieces = folder.found.setdefault(name, {})
    thirds = {piece, *pieces} <= {"q", "k", "v"}
    if pieces and (piece in pieces or not thirds):
        other = next(iter(pieces.values())).name
        raise ValueError(f"{folder.path}: {stored.name} and {other} are the same tensor in two layouts")
    pieces[piece] = stored


def in_order(pieces: Pieces) -> list[Stored]:
    """As their rows follow each other in our tensor. A file may hold q, k and v in any order."""
    return [pieces[piece] for piece in ("", "heads", "q", "k", "v") if piece in pieces]


def read_tensor(name: str, pieces: Pieces, config: LLaVAConfig) -> Tensor:
    """One of our tensors, in the file's dtype, from its pieces. OSError or ValueError: its file has changed since."""
    tensors = []
    for stored in in_order(pieces):
        try:
            tensors.append(stored.load())
        except SafetensorError as e:
            raise ValueError(f"{stored.path}: {stored.name} cannot be read ({first_line(e)})") from None
    if "heads" in pieces:
        n_head = config.llm.n_head if name.startswith("llm") else config.vision.n_head
        by_head = tensors[0].unflatten(0, (n_head, 3, -1))                         # (head, 3, size, ...)
        return by_head.transpose(0, 1).flatten(0, 2)                               # (3 * head * size, ...)
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors)

# ---------------------------------------------------------------------------------------------------
# Config

# Our field -> its spellings in config.json through the years, and what transformers takes where none is there.
PHI_KEYS = {
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
ROTARY_KEYS = {"rotary_dim": (("rotary_dim",), None), "rotary_factor": (("partial_rotary_factor",), 0.5)}
VISION_KEYS = {
    "image_size": (("image_size",), 224),
    "patch_size": (("patch_size",), 32),
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_inner": (("intermediate_size",), 3072),
    "eps": (("layer_norm_eps",), 1e-5),
}
SIGLIP_KEYS = VISION_KEYS | {"patch_size": (("patch_size",), 16), "eps": (("layer_norm_eps",), 1e-6)}


def is_number(value: object, default: int | float | None) -> bool:
    """Whether a value of somebody's json can stand for a field with this default."""
    if isinstance(default, float):
        return type(value) in (int, float) and 0 <= value < 1e9
    return type(value) is int and 0 < value < 1e9


def config_fields(config: dict, keys: dict, path: Path) -> dict:
    """Our config fields from a config.json of any era. A null there is the same as nothing."""
    fields = {}
    for field, (spellings, default) in keys.items():
        fields[field] = default
        for key in spellings:
            value = config.get(key)
            if value is None:
                continue
            if not is_number(value, default):
                raise ValueError(f"{path}: {key} is {value!r}, expected a number")
            fields[field] = value
            break
    return fields


def subconfig(config: dict, key: str, default: dict, path: Path) -> dict:
    """A config inside a config."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}, expected an object")
    return value


def require(path: Path, what: str, value: object, *implemented: object) -> None:
    """Refuse a variant of the model that is not implemented here, instead of computing something else."""
    if value not in implemented:
        choices = " or ".join(repr(choice) for choice in implemented)
        raise ValueError(f"{path}: {what} is {value!r}, and only {choices} is implemented here")


def phi_config(config: dict, path: Path) -> PhiConfig:
    rope = subconfig(config, "rope_parameters", {}, path)           # transformers 5 keeps the rotary numbers there
    fields = config_fields(config | rope, PHI_KEYS | ROTARY_KEYS, path)
    rotary_dim = fields.pop("rotary_dim")
    rotary_factor = fields.pop("rotary_factor")
    if fields["n_inner"] is None:
        fields["n_inner"] = 8192 if "hidden_size" in config else 4 * fields["n_embd"]
    activation = config.get("hidden_act", config.get("activation_function", "gelu_new"))
    kv_heads = config.get("num_key_value_heads", config.get("n_head_kv"))
    require(path, "rope_scaling", config.get("rope_scaling"), None)
    require(path, "rope_type", rope.get("rope_type", "default"), "default")
    require(path, "qk_layernorm", config.get("qk_layernorm", False), False)
    require(path, "tie_word_embeddings", config.get("tie_word_embeddings", False), False)
    require(path, "activation", activation, "gelu_new", "gelu_pytorch_tanh")
    require(path, "the number of key and value heads", kv_heads, None, fields["n_head"])
    if fields["n_embd"] % fields["n_head"]:
        raise ValueError(f"{path}: hidden_size {fields['n_embd']} is not a multiple of {fields['n_head']} heads")
    # Phi-1 and Phi-1.5 have Phi-2's architecture at another size. Nobody has compared their numbers with the original's
    # here, so they are refused instead of half supported.
    if (fields["n_layer"], fields["n_embd"]) == (24, 2048):
        raise ValueError(f"{path}: 24 layers of width 2048 are Phi-1 or Phi-1.5, and only Phi-2 is implemented here")
    if rotary_dim is None:
        rotary_dim = int(fields["n_embd"] // fields["n_head"] * rotary_factor)
    return PhiConfig(**fields, rotary_dim=rotary_dim)


def vision_config(config: dict, siglip: bool, feature_layer: object, path: Path) -> VisionConfig:
    """The tower's sizes come from config.json; which of the two towers it is, its tensors have told."""
    require(path, "num_channels", config.get("num_channels", 3), 3)
    activation = config.get("hidden_act")
    if siglip:
        require(path, "the SigLIP tower's activation", activation, "gelu_pytorch_tanh", "gelu_new", None)
        fields = config_fields(config, SIGLIP_KEYS, path)
    else:
        require(path, "the vision tower's activation", activation, "quick_gelu", None)
        fields = config_fields(config, VISION_KEYS, path)
    if type(feature_layer) is not int or not -fields["n_layer"] <= feature_layer < 0:
        raise ValueError(f"{path}: the vision layer to read is {feature_layer!r}, expected one counted from the end")
    published = SIGLIP_SO400M_384 if siglip else VisionConfig()
    return replace(published, **fields, feature_layer=feature_layer)


def image_mode(config: dict, folder: Path, unpadded: str) -> str:
    """How a folder's model saw its pictures: LLaVA says so in config.json, transformers in its processor's file.

    `unpadded` is the tower's own way, where neither says anything that we know.
    """
    if "image_aspect_ratio" in config:
        mode = config["image_aspect_ratio"]
        return mode if mode in IMAGE_MODES else unpadded
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            processor = read_json(folder / name)
            if subconfig(processor, "image_processor", processor, folder / name).get("do_pad"):
                return "pad"
    return unpadded


def read_folders(paths: Iterable[Path]) -> list[Folder]:
    """One LLaVA-like folder, or a Phi folder and a tower's folder, in this order. ValueError: something else."""
    paths = [Path(path) for path in paths]
    expected = [(PHI,), (CLIP, SIGLIP)] if len(paths) == 2 else [(LLAVA, MIPHA)]
    return [read_kind(path, *kinds) for path, kinds in zip(paths, expected, strict=True)]


def read_kind(path: Path, *kinds: str) -> Folder:
    """A folder that has to hold one of these. ValueError: it is something else."""
    folder = read_folder(path, kinds[0])
    if folder.kind not in kinds:
        raise ValueError(f"{path}: this looks like {folder.kind}, expected {' or '.join(kinds)}; "
                         + HINTS[kinds[0]].format(path))
    return folder


def config_of(*folders: Folder) -> LLaVAConfig:
    """The config of one folder, or of a Phi folder and a tower's. A part that is in neither keeps our defaults."""
    llm, vision = folders[0], folders[-1]
    path, vision_path = llm.path / "config.json", vision.path / "config.json"
    llm_json, vision_json = read_json(path), read_json(vision_path)
    text = subconfig(llm_json, "text_config", llm_json, path)
    tower = subconfig(vision_json, "vision_config", vision_json, vision_path)
    projector = subconfig(tower, "mm_projector", {}, vision_path)       # LLaVA-Phi has these two in vision_config
    tower = subconfig(tower, "vision_tower", tower, vision_path)
    siglip = vision.has_siglip
    every_patch = feature_strategy(siglip)
    strategy = vision_json.get("vision_feature_select_strategy", every_patch)
    require(path, "tie_word_embeddings", llm_json.get("tie_word_embeddings", False), False)
    require(vision_path, "the projector", projector.get("mm_projector_type", "mlp2x_gelu"), "mlp2x_gelu")
    require(vision_path, "the projector's activation", vision_json.get("projector_hidden_act", "gelu"), "gelu")
    require(vision_path, "vision_feature_select_strategy", strategy, every_patch)
    require(vision_path, "the features taken", tower.get("mm_vision_select_feature", "patch"), "patch")
    feature_layer = vision_json.get("vision_feature_layer", tower.get("mm_vision_select_layer", -2))
    # Two bases have seen no padded picture yet. Stage 1, which is next for them, leaves pictures to the tower's own
    # processor: CLIP's cuts the edges off, SigLIP's squeezes the whole picture into a square.
    unpadded = "squash" if siglip else "crop"
    config = LLaVAConfig(
        llm=phi_config(text, path) if "llm" in llm.parts else PhiConfig(),
        vision=vision_config(tower, siglip, feature_layer, vision_path) if "vision" in vision.parts else VisionConfig(),
        image_mode=image_mode(llm_json, llm.path, unpadded) if len(folders) == 1 else unpadded,
    )
    require_layers("llm", llm, config.llm.n_layer)
    require_layers("vision", vision, config.vision.n_layer)
    return config


def config_of_run(folders: list[Folder], dropout: float, image_mode: str) -> LLaVAConfig:
    """The config of a training run: that of the folders it starts from, with what the run sets itself.

    A negative dropout stands for "as the language model's config.json says".
    """
    config = config_of(*folders)
    if dropout >= 0:
        config = replace(config, llm=replace(config.llm, dropout=dropout))
    return replace(config, image_mode=image_mode)


def feature_strategy(siglip: bool) -> str:
    """transformers' word for "the patches": all positions but the first, or all, since SigLIP has no class token."""
    return "full" if siglip else "default"


def require_layers(part: str, folder: Folder, n_layer: int) -> None:
    """config.json and the tensors must agree. A mistyped number would otherwise build a model of that many layers."""
    layers = set()
    for name in folder.found:
        if name.startswith(part + "."):
            layers.add(without_layer(name)[1])
    layers.discard("")
    if layers and len(layers) != n_layer:
        raise ValueError(f"{folder.path}: config.json says {n_layer} {part} layers, the tensors are of {len(layers)}")


def load_config(*folders: Path) -> LLaVAConfig:
    """The config of one LLaVA-like folder, or of a Phi folder and a tower's together, in any era's spelling."""
    return config_of(*read_folders(folders))

# ---------------------------------------------------------------------------------------------------
# Loading


def describe(name: str, shape: Iterable[int]) -> str:
    return f"{name[:100]} ({', '.join(str(n) for n in shape)})"


def misfits(pieces: Pieces, shape: torch.Size) -> list[str]:
    """What is wrong with the shapes and dtypes of the pieces of one of our tensors."""
    third = (shape[0] // 3, *shape[1:])
    first_dtype = in_order(pieces)[0].dtype
    found = []
    for piece, stored in pieces.items():
        expected = third if piece in ("q", "k", "v") else tuple(shape)
        if stored.shape != expected or not stored.dtype.is_floating_point or stored.dtype != first_dtype:
            dtype = str(stored.dtype).removeprefix("torch.")
            found.append(f"{describe(stored.name, stored.shape)} {dtype}, expected{describe('', expected)} of floats")
    return found


def missing_pieces(name: str, pieces: Pieces, shape: torch.Size) -> list[str]:
    """Name the missing pieces of one of our tensors, as they are saved: all of it, or some of its q, k and v."""
    if "" in pieces or "heads" in pieces:
        return []
    saved = to_saved(name)
    if len(saved) == 1:
        return [describe(saved[0], shape)]
    third = (shape[0] // 3, *shape[1:])
    return [describe(theirs, third) for theirs, piece in zip(saved, "qkv") if piece not in pieces]


def check_tensors(folders: list[Folder], needed: Iterable[str], config: LLaVAConfig,
                  allow_missing: tuple[str, ...] = (), limit: int = 8) -> dict[str, Pieces]:
    """Compare the folders' tensors with the model's -> {our name: its pieces}.

    All of `needed` must be there, and nothing that the model does not know.

    `allow_missing` are beginnings of names ("projector.") that may be missing altogether, but not in part.
    ValueError lists all that is missing, unexpected and of the wrong shape at once, `limit` names of each.
    """
    shapes = blueprint(config)
    found, missing, unexpected, misshapen = {}, [], [], []
    for folder in folders:
        found |= folder.found
        unexpected += [describe(stored.name, stored.shape) for stored in folder.unexpected]
    absent = tuple(part for part in allow_missing if not any(name.startswith(part) for name in found))
    for name in dict.fromkeys([*needed, *found]):           # both, each name once
        pieces = found.get(name, {})
        if name not in shapes:
            unexpected += [describe(stored.name, stored.shape) for stored in pieces.values()]
            continue
        if not name.startswith(absent):                     # with an empty tuple no name does
            missing += missing_pieces(name, pieces, shapes[name])
        if pieces:
            misshapen += misfits(pieces, shapes[name])
    complaints = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            more = ", ..." if len(names) > limit else ""
            complaints.append(f"{len(names)} {what}: {', '.join(names[:limit])}{more}")
    if complaints:
        where = " and ".join(str(folder.path) for folder in folders)
        raise ValueError(f"{where}: {'; '.join(complaints)} "
                         f"(all of them: python load_weights.py inspect {folders[0].path})")
    return found


def load_into(model: LLaVAPhi, folders: Iterable[Path], copy: Callable[[Tensor, Tensor], object] | None = None,
              allow_missing: tuple[str, ...] = ()) -> None:
    """Fill a model from one LLaVA-like folder, or from a Phi folder and a tower's, one tensor at a time.

    copy(parameter, tensor): called once per parameter; it must cast, and be done with `tensor` (on the CPU, in the
    file's dtype) when it returns. Not given: parameter.copy_(tensor).
    allow_missing: parts such as "projector." that the folders need not have; they are left as they are.
    """
    # LoRA's adapters are in no folder: a run draws them, and a saved model has them merged.
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    found = check_tensors(read_folders(folders), parameters, model.config, allow_missing)
    wanted = {name: pieces for name, pieces in found.items() if name in parameters}
    for name, tensor in read_all(wanted, model.config):
        if copy:
            copy(parameters[name], tensor)
        else:
            parameters[name].data.copy_(tensor)
        del tensor              # else it would still be there while the next one is read


def read_all(found: dict[str, Pieces], config: LLaVAConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) in the order of the files, which a disk likes best. None is kept when the next is read."""
    for name, pieces in found.items():
        yield name, read_tensor(name, pieces, config)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               int8: bool = False, bits: int = 16) -> LLaVAPhi:
    """A LLaVA-like folder of any layout as a frozen model in eval mode, straight on its device.

    bits: 8 or 4 for Linears in so many bits. Each weight is quantised as it arrives, so the model never exists in a
    larger type. int8 is the older name of bits=8. Raises ValueError where 4 bits cannot be had.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype}: expected bfloat16 or float32; Phi-2's attention scores overflow in fp16")
    if bits == 4:
        check_int4_product(torch.device(device))
    model = meta_model(load_config(folder)).to(dtype).eval()
    if bits < 16 or int8:
        quantize_linears(model, 8 if int8 else bits)    # on the meta device this only changes classes
    # Before memory is taken: a config.json can promise tensors of any size.
    check_tensors(read_folders([folder]), dict(model.named_parameters()), model.config)
    model = model.to_empty(device=device).requires_grad_(False)
    load_into(model, [folder], copy_weight(model, fill=Tensor.copy_))
    return model


def load_phi(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Phi:
    """The same for a plain Phi-2 folder: the language model alone."""
    source = read_kind(folder, PHI)
    config = config_of(source)
    llm = meta_model(config).llm.to(dtype)
    found = check_tensors([source], [f"llm.{name}" for name, _ in llm.named_parameters()], config)
    llm = llm.to_empty(device=device).eval().requires_grad_(False)
    parameters = {f"llm.{name}": parameter for name, parameter in llm.named_parameters()}
    for name, tensor in read_all(found, config):
        parameters[name].copy_(tensor)
    return llm

# ---------------------------------------------------------------------------------------------------
# Saving: the tensors

# Shards are built in memory, one at a time, so they are smaller than the 5 GB that are usual.
SHARD_BYTES = 1_500_000_000
ALONE = {       # how saved names begin where one part is written by itself: as Phi, CLIP and LLaVA call them
    "llm": {"language_model.": ""},
    "vision": {"vision_tower.": ""},
    "projector": {"multi_modal_projector.linear_1.": "model.mm_projector.0.",
                  "multi_modal_projector.linear_2.": "model.mm_projector.2."},
}
Lazy = Tensor | Callable[[], Tensor]        # a tensor, or what loads it when its turn has come


def plan_shards(nbytes: dict[str, int]) -> list[list[str]]:
    """Tensors' sizes in bytes -> their names in groups of at most SHARD_BYTES, or of one tensor that is larger."""
    shards, room = [], 0
    for name, size in nbytes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def saved_pieces(part: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our tensors as it is saved, q, k and v apart: views of it under their names."""
    names = to_saved(name)
    pieces = {}
    for saved, piece in zip(names, tensor.chunk(len(names)), strict=True):
        for old, new in ALONE.get(part, {}).items():
            if saved.startswith(old):
                saved = new + saved.removeprefix(old)
        pieces[saved] = piece
    return pieces


def write_tensors(part: str, folder: Path, dtypes: dict[str, torch.dtype], tensors: Mapping[str, Lazy],
                  found: dict[str, Pieces], config: LLaVAConfig, file: str = "model") -> None:
    """Write the tensors of `dtypes` (our name -> what to save it in) as safetensors, in shards where they are large.

    They come from `tensors`, else from where they are `found`. `file` is the files' name without its ending.
    """
    shapes = blueprint(config)
    shards = plan_shards({name: shapes[name].numel() * dtype.itemsize for name, dtype in dtypes.items()})
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        shard = {}
        for name in names:
            tensor = tensors[name] if name in tensors else read_tensor(name, found[name], config)
            if callable(tensor):
                tensor = tensor()
            assert tensor.shape == shapes[name], f"{name}: {tuple(tensor.shape)} is not {tuple(shapes[name])}"
            tensor = tensor.detach().to("cpu", dtypes[name]).contiguous()
            shard |= saved_pieces(part, name, tensor)
            total += tensor.nbytes
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{file}{suffix}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})               # transformers refuses files without "format"
        # safetensors makes a file that only its owner may read. Give it the rights of any new file: the folder's own,
        # which the umask has shaped, without those to enter it.
        path.chmod(folder.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{file}.safetensors.index.json", index)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CHECKSUMS = "SHA256SUMS"        # the usual name and form: `sha256sum -c SHA256SUMS` reads it too


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Note what the files with the tensors are, so that `inspect` can tell later whether a bit has changed.

    The files are read back for it. The text files are left out: people edit a config.json, and may.
    """
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUMS).write_text("".join(lines))


def verify_checksums(folder: Path) -> int | None:
    """Read a saved folder's tensor files again -> how many are as they were written; None: it has no checksums.

    ValueError names every file that is not.
    """
    if not (folder / CHECKSUMS).is_file():
        return None
    changed, intact = [], 0
    for line in (folder / CHECKSUMS).read_text(errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if match is None:
            raise ValueError(f"{folder / CHECKSUMS}: {line[:80]!r} is not a checksum and the name of a file here")
        checksum, name = match.groups()
        if not (folder / name).is_file():
            changed.append(f"{name} is not there")
        elif sha256(folder / name) != checksum:
            changed.append(f"{name} is not what was written")
        else:
            intact += 1
    if changed:
        raise ValueError(f"{folder}: {', '.join(changed)}, by the checksums in {CHECKSUMS}: "
                         "a damaged disk or an incomplete copy; copy or export it again")
    return intact


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
            sync_folder(path)               # which forces a file to the disk just as well
        if used:
            move_into(made, out)
        else:
            made.rename(out)                # `out` is an empty folder at the most
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def move_into(made: Path, out: Path) -> None:
    """Replace the model in `out` by the one in `made`, config.json last."""
    if (made / "old.json").exists():
        (made / "old.json").replace(out / "config.json")
        for path in out.glob("model*.safetensors*"):
            path.unlink()
    for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        path.replace(out / path.name)
    made.rmdir()
    sync_folder(out)


def saved_dtypes(names: list[str], tensors: Mapping[str, Lazy], found: dict[str, Pieces],
                 dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Our name -> what to save it in: the given dtype, else the tensor's own."""
    dtypes = {}
    for name in names:
        own = tensors[name] if name in tensors else in_order(found[name])[0]
        dtypes[name] = dtype or own.dtype
    return dtypes


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
    save("llm", out, tensors, config, [read_kind(source, PHI)], None)


def save(part: str, out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, sources: list[Folder],
         dtype: torch.dtype | None) -> None:
    """The whole model (part ""), or one part as a folder of its own."""
    names = [name for name in blueprint(config) if name.startswith(part)]
    found = check_tensors(sources, [name for name in names if name not in tensors], config)
    assert tensors.keys() <= set(names), f"not in the model: {tensors.keys() - set(names)}"
    dtypes = saved_dtypes(names, tensors, found, dtype)
    tokenizer = load_tokenizer(sources[0].path)
    # <image> gets the first id after the tokenizer's own. Phi-2's table has 900 rows that no token uses.
    if not part and image_token_id(tokenizer) >= config.llm.vocab_size:
        rows = config.llm.vocab_size
        raise ValueError(f"{sources[0].path}: all {rows} embedding rows are taken, none is left for <image>")
    with finished_folder(out) as made:
        write_tensors(part, made, dtypes, tensors, found, config)
        write_texts(part, made, config, tokenizer, dtypes[names[0]])
        write_checksums(made)

# ---------------------------------------------------------------------------------------------------
# Saving: the text files that transformers and vLLM read beside the tensors

SAVED_MODEL = Path(__file__).parent / "saved_model"         # files that go into every saved folder as they are


def image_token_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def image_processor(config: LLaVAConfig) -> dict:
    """What transformers needs to make the pixels that data.load_image and VisionTower make."""
    size = config.vision.image_size
    processor = {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": config.image_mode == "pad",
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config.vision.mean), "image_std": list(config.vision.std),
    }
    if config.image_mode == "squash":
        processor |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size},
                      "do_center_crop": False}
    return processor


def named_as_published(config: PhiConfig | VisionConfig, keys: dict) -> dict:
    """Our fields under the newest of their spellings in config.json."""
    return {spellings[0]: getattr(config, field) for field, (spellings, default) in keys.items()}


def phi_json(config: PhiConfig, eot: int, dtype: str) -> dict:
    """config.json of a PhiForCausalLM, with the rotary numbers where transformers 4 looks and where 5 does."""
    factor = config.rotary_dim / (config.n_embd // config.n_head)
    rope = {"rope_theta": config.rope_base, "partial_rotary_factor": factor}
    return {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new",
        **named_as_published(config, PHI_KEYS),
        "num_key_value_heads": config.n_head, "qk_layernorm": False, "tie_word_embeddings": False, "embd_pdrop": 0.0,
        "attention_dropout": 0.0, **rope, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "torch_dtype": dtype,
    }


def clip_json(config: VisionConfig) -> dict:
    """config.json of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
        **named_as_published(config, VISION_KEYS),
        "num_channels": 3, "attention_dropout": 0.0, "projection_dim": config.n_embd * 3 // 4,
    }


def siglip_json(config: VisionConfig) -> dict:
    """config.json of a SiglipVisionModel."""
    return {
        "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh",
        **named_as_published(config, SIGLIP_KEYS),
        "num_channels": 3, "attention_dropout": 0.0, "vision_use_head": True,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, image: bool) -> None:
    """tokenizer.json and the files around it that transformers 4 and 5 read, with a token for the picture or without.

    Only transformers needs that token. `load_tokenizer` takes it out again: here "<image>" in a text is text.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())      # a copy, the caller's own stays as it is
    roles = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT, "unk_token": EOT}
    special, image_role = {}, {}
    if image:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        special = {"additional_special_tokens": [IMAGE]}                # transformers 4
        image_role = {"extra_special_tokens": {"image_token": IMAGE}}   # transformers 5
    tokenizer.save(str(folder / "tokenizer.json"))
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    decoder = {}
    for id, token in added:
        decoder[str(id)] = {"content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
                            "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special}
    write_json(folder / "added_tokens.json", {token.content: id for id, token in added})
    write_json(folder / "special_tokens_map.json", roles | special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        **roles, **image_role, "added_tokens_decoder": decoder,
    })


def write_texts(part: str, folder: Path, config: LLaVAConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """All of a saved folder but its tensors: of the whole model (part ""), or of a plain Phi, CLIP or SigLIP.

    dtype: the first tensor's, for config.json. It never says fp16, which this model must not be computed in.
    """
    name = str(torch.float32 if dtype == torch.float16 else dtype).removeprefix("torch.")
    siglip = is_siglip(config.vision)
    tower = siglip_json(config.vision) if siglip else clip_json(config.vision)
    if part == "vision":
        own_mode = replace(config, image_mode="squash" if siglip else "crop")
        own_type = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
        # transformers has no use for the layer; llama.cpp's converter would otherwise leave out one too many.
        tower["vision_feature_layer"] = config.vision.feature_layer
        write_json(folder / "config.json", tower | {"torch_dtype": name})
        write_json(folder / "preprocessor_config.json", image_processor(own_mode) | {"image_processor_type": own_type})
        return
    write_tokenizer(folder, tokenizer, image=not part)
    eot = eot_id(tokenizer)
    special_ids = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "generation_config.json", special_ids)
    text = phi_json(config.llm, eot, name)
    if part == "llm":
        write_json(folder / "config.json", text)
        return
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": image_token_id(tokenizer), "image_seq_length": config.vision.n_patches,
        "image_aspect_ratio": config.image_mode,                        # LLaVA's key, which we read
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": feature_strategy(siglip),
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        **special_ids, "torch_dtype": name, "text_config": text, "vision_config": tower,
    })
    write_json(folder / "preprocessor_config.json", image_processor(config))
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": config.vision.n_positions - config.vision.n_patches,
        "vision_feature_select_strategy": feature_strategy(siglip),
    })
    for file in ("chat_template.jinja", "load_hf.py", "README.md"):
        shutil.copyfile(SAVED_MODEL / file, folder / file)

# ---------------------------------------------------------------------------------------------------
# Commands


def merge(llm: Path, vision: Path, out: Path, seed: int, dtype: torch.dtype | None) -> None:
    """Write one base model from a Phi-2 folder and a CLIP or SigLIP folder; the projector between them is new."""
    folders = read_folders([llm, vision])
    config = config_of(*folders)
    needed = [name for name in blueprint(config) if not name.startswith("projector")]
    found = check_tensors(folders, needed, config)
    projector = meta_model(config).projector.to_empty(device="cpu")
    init_weights(projector, torch.Generator().manual_seed(seed))
    projector.to(dtype or found["llm.wte.weight"][""].dtype)
    tensors = {f"projector.{name}": parameter for name, parameter in projector.named_parameters()}
    save_model(out, tensors, config, [llm, vision], dtype)


def export(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Write any readable model, or a training checkpoint (out/step_NNNNNN), in the format we save."""
    if not (model / "checkpoint.json").is_file():
        save_model(out, {}, load_config(model), [model], dtype)
        return
    from checkpoint import read_for_export      # brings torch.distributed, which takes a moment
    settings, sources = read_for_export(model)
    only_llm = settings["stage"] == "sft"
    folders = [read_kind(*sources, PHI)] if only_llm else read_folders(sources)
    config = config_of_run(folders, settings["dropout"], settings["image_mode"])
    tensors = checkpoint_tensors(model, folders, config, settings["lora_alpha"])
    part = "llm" if only_llm else ""
    save(part, out, tensors, config, folders, dtype or torch_dtype(settings["dtype"]))


def export_parts(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """A plain Phi folder, a tower's and LLaVA's mm_projector: what llama.cpp's converters and LLaVA take."""
    folders = read_folders([model])
    config = config_of(*folders)
    found = check_tensors(folders, blueprint(config), config)
    projector = [name for name in blueprint(config) if name.startswith("projector")]
    with finished_folder(out) as made:
        save("llm", made / "phi-2", {}, config, folders, dtype)
        shutil.copyfile(SAVED_MODEL / "chat_template.jinja", made / "phi-2" / "chat_template.jinja")
        save("vision", made / ("siglip" if is_siglip(config.vision) else "clip"), {}, config, folders, dtype)
        write_tensors("projector", made, saved_dtypes(projector, {}, found, dtype), {}, found, config, "mm_projector")
        write_checksums(made)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def checkpoint_tensors(checkpoint: Path, sources: list[Folder], config: LLaVAConfig,
                       lora_alpha: float) -> dict[str, Lazy]:
    """Everything that a run has changed, to be loaded when its turn comes, LoRA adapters merged into their weights."""
    from checkpoint import trained_tensors      # brings torch.distributed, which nothing else here needs
    trained = trained_tensors(checkpoint)
    stems = [name.removesuffix("lora_a") for name in trained if name.endswith("lora_a")]
    found = check_tensors(sources, [stem + "weight" for stem in stems], config)

    def merged(stem: str) -> Tensor:
        name = stem + "weight"
        weight = {name: read_tensor(name, found[name], config).float()}
        adapters = {stem + leaf: trained[stem + leaf]() for leaf in ("lora_a", "lora_b")}
        return merge_lora(weight | adapters, lora_alpha)[name]

    tensors = {name: load for name, load in trained.items() if ".lora_" not in name}
    for stem in stems:
        tensors[stem + "weight"] = partial(merged, stem)
    return tensors


LAYOUTS = (     # a piece of a language model's tensor names -> which of the published layouts it is in
    (".q_proj.", "split q, k, v (transformers 4.37 and newer)"),
    ("query_key_value", "fused query_key_value, packed head by head (transformers 4.36, LLaVA-Phi)"),
    ("transformer.h.", "mixer.Wqkv (phi-msft)"),
    ("layers.", "one list, layers.N (the earliest Phi files)"),
)
IMAGE_WORDS = {
    "crop": "the square in the middle of a picture",
    "pad": "the whole picture, padded to a square",
    "squash": "the whole picture, squeezed into a square",
}
NEXT = {
    PHI: "python load_weights.py merge --llm {}    (with a CLIP or SigLIP folder as --vision)",
    CLIP: "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)",
    SIGLIP: "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)",
    LLAVA: "python sample.py --model {} --image x.jpg",
    MIPHA: "python sample.py --model {} --image x.jpg",
}


def print_row(label: str, text: object) -> None:
    print(f"  {label:10} {text}")


def inspect(path: Path, try_out: bool = False) -> int:
    """Print a page about a folder: what it is, what would be left out, what is missing, and what to run next.

    try_out: run the model as well. -> the exit code: 2 if there is a problem.
    """
    folder = read_folder(path)
    files = tensor_files(path)
    print(f"{path}: {folder.kind}")
    print_row("files", f"{len(files)} x {files[0].suffix[1:]}, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")
    for part in folder.parts:
        inspect_part(folder, part)
    missing = "nothing"
    if "llm" in folder.parts:
        try:
            tokenizer = load_tokenizer(path)
            where = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.json and merges.txt"
            print_row("tokenizer", f"{where}: {tokenizer.get_vocab_size():,} tokens, {EOT} is {eot_id(tokenizer)}")
        except (ValueError, OSError) as e:
            print_row("tokenizer", f"none: {e}")
            missing = "a tokenizer"
    try:
        inspect_config(folder)
        intact = verify_checksums(path)
        if intact is None:
            print_row("checksums", "none; folders that this program saves have them")
        else:
            print_row("checksums", f"verified: {intact} files are as they were written")
    except (ValueError, OSError) as e:
        print_row("problem", e)
        return 2
    print_row("missing", missing)
    sound = try_folder(folder) if try_out else True
    print_row("next", NEXT.get(folder.kind, "nothing").format(path))
    return 0 if sound else 2


def try_folder(folder: Folder) -> bool:
    """Run a folder's model on a few texts and pictures and print what it shows. -> False if it was read wrong."""
    from trial.run import try_model
    if folder.kind not in (PHI, LLAVA, MIPHA):
        print_row("try", f"nothing: {folder.kind} does not speak; merge it with a language model first")
        return True
    parameters = sum(prod(stored.shape) for pieces in folder.found.values() for stored in pieces.values())
    # fp32 shows the fine differences. A model of billions of parameters would take all memory in it, and minutes.
    dtype = torch.float32 if parameters < 1e9 else torch.bfloat16
    device = choose_device(None)
    model = None
    if folder.kind == PHI:
        llm = load_phi(folder.path, dtype, device)
    else:
        model = load_model(folder.path, dtype, device)
        llm = model.llm
    sound = True
    for finding in try_model(llm, load_tokenizer(folder.path), model):
        print_row("try", f"{finding.verdict:8} {finding.what}: {finding.shown} (a sound model: {finding.expected})")
        sound = sound and finding.verdict != "misread"
    if not sound:
        print_row("problem", "the tensors are all there, but what the model does is not what such a model was trained "
                             "to do: these are other weights than expected, or they are read in the wrong way")
    return sound


def inspect_part(folder: Folder, part: str) -> None:
    """Print how many tensors there are of the language model, the tower or the projector, and how large they are."""
    tensors = []
    for name, pieces in folder.found.items():
        if name.startswith(part + "."):
            tensors += pieces.values()
    dtypes = " and ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in tensors}))
    parameters = sum(prod(stored.shape) for stored in tensors)
    size = sum(stored.nbytes for stored in tensors) / 1e6
    print_row(part, f"{len(tensors)} tensors, {parameters:,} parameters, {dtypes}, {size:,.1f} MB")
    if part == "llm":
        for mark, text in LAYOUTS:
            if any(mark in stored.name for stored in tensors):
                print_row("", text)
                break


def inspect_config(folder: Folder) -> None:
    """Print a folder's sizes and what would be left out. ValueError names everything that does not fit."""
    config = config_of(folder)
    if "llm" in folder.parts:
        llm = config.llm
        print_row("config", f"{llm.n_layer} layers of width {llm.n_embd}, {llm.n_head} heads, {llm.block_size} positions, "
                            f"{llm.vocab_size} rows of vocabulary, dropout {llm.dropout:g}")
    if "vision" in folder.parts:
        vision = config.vision
        print_row("config", f"{vision.image_size} x {vision.image_size} pixels make {vision.n_patches} patches, "
                            f"{vision.n_used} of {vision.n_layer} layers are used, of width {vision.n_embd}, "
                            f"{vision.n_head} heads")
        print_row("images", f"{config.image_mode}: {IMAGE_WORDS[config.image_mode]}")
    built = {name for name, parameter in meta_model(config).named_parameters()}
    ignored = Counter(folder.dropped.values())
    for name, pieces in folder.found.items():
        if name.startswith("vision.head."):
            ignored[UNUSED_HEAD] += len(pieces)
        elif name not in built:
            ignored[UNUSED_LAYERS] += len(pieces)
    for reason, count in ignored.items():
        print_row("ignored", f"{count} tensors: {reason}")
    needed = [name for name in blueprint(config) if name.startswith(folder.parts)]
    check_tensors([folder], needed, config, limit=10 ** 6)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "inspect":
        return inspect(args.folder, args.try_out)
    dtype = torch_dtype(args.dtype) if args.dtype else None
    if args.command == "merge":
        merge(args.llm, args.vision, args.out, args.seed, dtype)
    elif args.to == "parts":
        export_parts(args.model, args.out, dtype)
        return 0
    else:
        export(args.model, args.out, dtype)
    return inspect(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
