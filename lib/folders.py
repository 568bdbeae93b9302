"""Model folders: which tensors they store, whether these fit our model, and the model's config.

`open_weights` reads a folder's headers and config once; everything else works on the Weights that it returns. A tensor
is only read when it is copied into a model. Model folders are untrusted: nothing in them is executed, and no number in
them decides how much memory is allocated before it has been compared with the files' sizes.
"""
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.common import read_json
from lib.layouts import (DROPPED, FOREIGN, PREFIX, feature_strategy, phi_config, rename_sequential, require, subconfig,
                         to_ours, to_saved, vision_config, without_layer)
from lib.recipes import IMAGE_MODES
from model import LLaVAConfig, LLaVAPhi, PhiConfig
from vision import VisionConfig

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
HEADER_LIMIT = 2_000_000        # bytes of a file's table of tensors; that of the whole model takes 90 thousand


class Kind(StrEnum):
    """Kinds of folders, recognized by the names of their tensors."""
    PHI = "a Phi-2 language model"
    CLIP = "a CLIP vision tower"
    SIGLIP = "a SigLIP vision tower"
    LLAVA = "a LLaVA-Phi model"
    MIPHA = "a Mipha model"
    NO_PROJECTOR = "a LLaVA-Phi or Mipha model without projector"
    OTHER = "a folder of other tensors"


KIND_OF_PARTS = {                       # the parts in a folder -> its kind with CLIP as the tower, and with SigLIP
    ("llm",): (Kind.PHI, Kind.PHI),
    ("vision",): (Kind.CLIP, Kind.SIGLIP),
    ("llm", "vision"): (Kind.NO_PROJECTOR, Kind.NO_PROJECTOR),
    ("llm", "vision", "projector"): (Kind.LLAVA, Kind.MIPHA),
}
GET_A_TOWER = ("get it with: hf download openai/clip-vit-large-patch14-336 --local-dir {} "
               "(or google/siglip-so400m-patch14-384)")
GET_A_MODEL = ("train one (python train.py --stage pretrain) or get a published one with: "
               "hf download zhumj34/Mipha-3B --local-dir checkpoints/mipha-3b, or "
               "hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi")
HINTS = {
    Kind.PHI: "get it with: hf download microsoft/phi-2 --local-dir {}",
    Kind.CLIP: GET_A_TOWER, Kind.SIGLIP: GET_A_TOWER, Kind.LLAVA: GET_A_MODEL, Kind.MIPHA: GET_A_MODEL,
}


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""
    name: str                               # in the file
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Pieces = dict[str, Stored]                  # how one of our tensors is stored; for the keys see layouts.to_ours


class Folder(NamedTuple):
    """The tensors stored in one folder."""
    path: Path
    found: dict[str, Pieces]                # under our names, in the order of the files
    dropped: dict[str, str]                 # a tensor's name in the file -> why it is left out
    unexpected: list[Stored]                # tensors that our model does not have

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of llm, vision and projector are there."""
        present = {name.split(".")[0] for name in self.found}
        return tuple(part for part in PREFIX if part in present)

    @property
    def has_siglip(self) -> bool:
        """SigLIP's patch convolution has a bias, and there is no class token."""
        return "vision.patch.bias" in self.found and "vision.cls" not in self.found

    @property
    def kind(self) -> Kind:
        with_clip, with_siglip = KIND_OF_PARTS.get(self.parts, (Kind.OTHER, Kind.OTHER))
        return with_siglip if self.has_siglip else with_clip


@dataclass(frozen=True)
class Weights:
    """One opened model folder, or a language model's and a tower's, with their config."""
    folders: tuple[Folder, ...]
    config: LLaVAConfig

    @property
    def paths(self) -> list[Path]:
        return [folder.path for folder in self.folders]

    @property
    def kind(self) -> Kind:
        """That of the folder, or of the model that two folders make."""
        if len(self.folders) == 1:
            return self.folders[0].kind
        return Kind.MIPHA if self.has_siglip else Kind.LLAVA

    @property
    def has_siglip(self) -> bool:
        return self.folders[-1].has_siglip

    @cached_property
    def found(self) -> dict[str, Pieces]:
        """The tensors under our names, in the order of the files."""
        found = {}
        for folder in self.folders:
            found |= folder.found
        return found


def open_weights(*paths: Path, expect: tuple[Kind, ...] = (Kind.LLAVA, Kind.MIPHA)) -> Weights:
    """Open one model folder, or a Phi folder and a tower's, in this order.

    expect: the kinds allowed for a single folder. ValueError if it is of another kind, or has no weights.
    """
    kinds = [(Kind.PHI,), (Kind.CLIP, Kind.SIGLIP)] if len(paths) == 2 else [expect]
    folders = tuple(open_folder(Path(path), *allowed) for path, allowed in zip(paths, kinds, strict=True))
    return Weights(folders, config_of(*folders))

# ---------------------------------------------------------------------------------------------------
# One folder


def open_folder(path: Path, *kinds: Kind) -> Folder:
    """Read the headers of a folder's files. ValueError if it is none of these kinds; without any, all are allowed."""
    hint = HINTS[kinds[0] if kinds else Kind.LLAVA].format(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; {hint}")
    tensors = []
    for file in tensor_files(path):
        tensors += read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file)
    folder = sort_tensors(path, tensors)
    if kinds and folder.kind not in kinds:
        others = ", ".join(stored.name[:100] for stored in folder.unexpected[:3]) if folder.kind is Kind.OTHER else ""
        found = f"{folder.kind} ({others}, ...)" if others else folder.kind
        raise ValueError(f"{path}: this looks like {found}, expected {' or '.join(kinds)}; {hint}")
    return folder


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors before .bin, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            return shard_files(folder / f"{name}.index.json")
    problem = "holds no model.safetensors and no pytorch_model.bin, in one file or with an index"
    for checkpoint in sorted([folder, *folder.glob("step_*")]):
        if (checkpoint / "checkpoint.json").is_file():
            problem = ("a training run's checkpoint and no model yet; make one of it with: "
                       f"python load_weights.py export --model {checkpoint} --out DIR")
    raise ValueError(f"{folder}: {problem}")


def shard_files(index: Path) -> list[Path]:
    """The shards that an index names. Only file names are taken from it, since each shard lists its own tensors."""
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    shards = set()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
            raise ValueError(f"{index}: expected a weight_map of tensor names to the plain names of {suffix} files in "
                             f"this folder, found {str(name)[:80]!r}")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name}: named in {index.name}, but not there: incomplete download?")
        shards.add(index.parent / name)
    return sorted(shards)


def sort_tensors(path: Path, tensors: list[Stored]) -> Folder:
    """Find each tensor's place in our model. ValueError for a duplicate, or a tensor of another model."""
    folder = Folder(path, {}, {}, [])
    renamed = rename_sequential(stored.name for stored in tensors)
    for stored in tensors:
        name = stored.name
        dropped = [reason for pattern, reason in DROPPED if re.match(pattern, name)]
        foreign = [model for mark, model in FOREIGN if mark in name]
        place = to_ours(renamed.get(name, name))
        if dropped:
            folder.dropped[name] = dropped[0]
        elif place:
            add_piece(folder, *place, stored)
        elif foreign:
            raise ValueError(f"{path}: {name[:80]} is a tensor of {foreign[0]}; only Phi-2 is implemented here as the "
                             "language model, and CLIP and SigLIP as vision towers")
        else:
            folder.unexpected.append(stored)
    return folder


def add_piece(folder: Folder, name: str, piece: str, stored: Stored) -> None:
    """Record that `stored` is (a piece of) our tensor `name`. ValueError if the folder already has it."""
    pieces = folder.found.setdefault(name, {})
    thirds = {piece, *pieces} <= {"q", "k", "v"}
    if pieces and (piece in pieces or not thirds):
        other = next(iter(pieces.values()))
        raise ValueError(f"{folder.path}: {other.name} in {other.path.name} and {stored.name} in {stored.path.name} "
                         "are the same tensor")
    pieces[piece] = stored

# ---------------------------------------------------------------------------------------------------
# One file


def first_line(error: Exception) -> str:
    """A library's error in one line, for the end of ours. It is cut, because it may quote a name of any length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_safetensors(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, none of them read yet."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")     # of the json header that follows
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"{path}: file is {size} bytes, its header alone claims {length}: incomplete download?")
    stored = []
    try:
        # "pread" reads a tensor into memory of its own. The default maps the file: if another program then changed or
        # truncated it, the model would change, or the process would be killed.
        file = safe_open(path, "pt", backend="pread")
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in SAFETENSORS_DTYPES:
                raise ValueError(f"{path}: {name[:80]} has dtype {entry.get_dtype()}, which is not supported here")
            dtype, shape = SAFETENSORS_DTYPES[entry.get_dtype()], tuple(entry.get_shape())
            stored.append(Stored(name, path, dtype, shape, partial(file.get_tensor, name)))
    except SafetensorError as e:
        raise ValueError(f"{path}: not a safetensors file, or not all of one: incomplete download? "
                         f"(file is {size} bytes; {first_line(e)})") from None
    return stored


def zip_problem(path: Path) -> str:
    """Why a .bin file is not a plain zip archive of torch.save, or "". Checked before torch reads anything in it.

    torch maps the file and takes each tensor's bytes as they are, so a compressed record would be read as noise. A
    table of millions of records, or a pickle of gigabytes, would exhaust memory before torch could object.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 66_000))     # the table's length is within the last 66 kB
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    length = int.from_bytes(tail[end + 12:end + 16], "little") if end >= 0 else 0
    if length > HEADER_LIMIT:
        return f"its table of contents says it has {length} bytes, far more than a model needs"
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return "not a file of torch.save (of torch 1.6 or newer): incomplete download?"
    for record in records:
        large = record.filename.endswith(".pkl") and record.file_size > HEADER_LIMIT
        if record.compress_type != zipfile.ZIP_STORED or large:
            return f"{record.filename} is compressed or too large for a file of torch.save"
    return ""


def read_bin(path: Path) -> list[Stored]:
    """The tensors of a torch.save file, memory-mapped: their bytes are read when they are copied into a model."""
    problem = zip_problem(path)
    if problem:
        raise ValueError(f"{path}: {problem}")
    try:
        with warnings.catch_warnings():     # about quantized tensors, which are refused below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:                  # an untrusted pickle can fail in any way
        raise ValueError(f"{path}: refused, it holds more than plain tensors ({first_line(e)})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    stored = []
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not dense or not tensor.is_contiguous():
            raise ValueError(f"{path}: {str(name)[:80]!r} is not a plain dense tensor, stored row by row")
        stored.append(Stored(name, path, tensor.dtype, tuple(tensor.shape), tensor.detach))
    return stored

# ---------------------------------------------------------------------------------------------------
# Config


def config_of(*folders: Folder) -> LLaVAConfig:
    """The config of one folder, or of a Phi folder and a tower's. A part that is missing keeps our defaults."""
    llm, vision = folders[0], folders[-1]
    path, vision_path = llm.path / "config.json", vision.path / "config.json"
    llm_json = read_json(path)
    vision_json = read_json(vision_path) if vision is not llm else llm_json
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
    # Two base models have not been trained on padded images yet. Stage 1, which comes next, uses the tower's own
    # processor: CLIP's crops the center, SigLIP's squashes the whole image into a square.
    own_mode = "squash" if siglip else "crop"
    config = LLaVAConfig(
        llm=phi_config(text, path) if "llm" in llm.parts else PhiConfig(),
        vision=vision_config(tower, siglip, feature_layer, vision_path) if "vision" in vision.parts else VisionConfig(),
        image_mode=trained_image_mode(llm_json, llm.path, own_mode) if len(folders) == 1 else own_mode,
    )
    require_layers("llm", llm, config.llm.n_layer)
    require_layers("vision", vision, config.vision.n_layer)
    return config


def trained_image_mode(config: dict, folder: Path, own_mode: str) -> str:
    """How images were made square in training: in LLaVA's config.json, or transformers' config of the processor.

    own_mode: the tower's own mode, used if neither says so.
    """
    if "image_aspect_ratio" in config:
        mode = config["image_aspect_ratio"]
        return mode if mode in IMAGE_MODES else own_mode
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            processor = read_json(folder / name)
            if subconfig(processor, "image_processor", processor, folder / name).get("do_pad"):
                return "pad"
    return own_mode


def require_layers(part: str, folder: Folder, n_layer: int) -> None:
    """config.json and the tensors must agree, before a mistyped number can build a model with that many layers."""
    layers = {without_layer(name)[1] for name in folder.found if name.startswith(part + ".")} - {""}
    if layers and len(layers) != n_layer:
        raise ValueError(f"{folder.path}: config.json says {n_layer} {part} layers, the tensors are of {len(layers)}")


def config_of_run(config: LLaVAConfig, dropout: float, image_mode: str) -> LLaVAConfig:
    """The config of a training run: that of the weights it starts from, with the run's own settings.

    A negative dropout keeps that of the language model's config.json.
    """
    if dropout >= 0:
        config = replace(config, llm=replace(config.llm, dropout=dropout))
    return replace(config, image_mode=image_mode)

# ---------------------------------------------------------------------------------------------------
# The model's tensors and those of the folders


def meta_model(config: LLaVAConfig, tower: bool = True) -> LLaVAPhi:
    """A model on the meta device: it has names and shapes, but takes no memory."""
    with torch.device("meta"):
        return LLaVAPhi(config, tower)


def saved_shapes(model: LLaVAPhi) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor in the saved folder of such a model.

    A folder holds more than our model: other programs expect the whole tower, including the layers and the LayerNorm
    after the hidden state that LLaVA reads.
    """
    shapes = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:                # a saved model has its adapters merged
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith(".weight"):
            shapes[name] = (module.out_features, module.in_features)    # a quantized weight has another shape here
        else:
            shapes[name] = tuple(parameter.shape)
    vision = model.config.vision
    for name, shape in list(shapes.items()):
        if name.startswith("vision.h.0."):
            for layer in range(vision.n_used, vision.n_layer):
                shapes[name.replace(".0.", f".{layer}.", 1)] = shape
    return shapes | {"vision.ln_post.weight": (vision.n_embd,), "vision.ln_post.bias": (vision.n_embd,)}


def check_tensors(weights: Weights, shapes: dict[str, tuple[int, ...]], needed: Iterable[str], limit: int = 8) -> None:
    """Compare the stored tensors with a model's `shapes`: all of `needed` must be there, and nothing unknown.

    ValueError lists everything that is missing, unexpected or misshapen at once, up to `limit` names of each.
    """
    found = weights.found
    missing, unexpected, misshapen = [], [], []
    for name in needed:
        missing += missing_pieces(name, found.get(name, {}), shapes[name])
    for name, pieces in found.items():
        if name in shapes:
            misshapen += misfits(pieces, shapes[name])
        else:
            unexpected += pieces.values()
    for folder in weights.folders:
        unexpected += folder.unexpected
    unexpected = [describe(stored.name, stored.shape) for stored in unexpected]
    complaints = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            more = ", ..." if len(names) > limit else ""
            complaints.append(f"{len(names)} {what}: {', '.join(names[:limit])}{more}")
    if complaints:
        where = " and ".join(map(str, weights.paths))
        raise ValueError(f"{where}: {'; '.join(complaints)} "
                         f"(all of them: python load_weights.py inspect {weights.paths[0]})")


def describe(name: str, shape: Iterable[int]) -> str:
    return f"{name[:100]} ({', '.join(str(n) for n in shape)})"


def missing_pieces(name: str, pieces: Pieces, shape: tuple[int, ...]) -> list[str]:
    """The missing pieces of one of our tensors, by their saved names: all of it, or some of q, k and v."""
    if "whole" in pieces or "by head" in pieces:
        return []
    saved = to_saved(name)
    if len(saved) == 1:
        return [describe(saved[0], shape)]
    third = (shape[0] // 3, *shape[1:])
    return [describe(theirs, third) for theirs, piece in zip(saved, "qkv") if piece not in pieces]


def misfits(pieces: Pieces, shape: tuple[int, ...]) -> list[str]:
    """The pieces of one of our tensors whose shape or dtype is wrong, each with what was expected."""
    first_dtype = in_order(pieces)[0].dtype
    found = []
    for piece, stored in pieces.items():
        expected = (shape[0] // 3, *shape[1:]) if piece in ("q", "k", "v") else shape
        if stored.shape != expected or not stored.dtype.is_floating_point or stored.dtype != first_dtype:
            dtype = str(stored.dtype).removeprefix("torch.")
            found.append(f"{describe(stored.name, stored.shape)} {dtype}, expected{describe('', expected)} of floats")
    return found


def in_order(pieces: Pieces) -> list[Stored]:
    """The pieces in the order of our tensor's rows. A file may hold q, k and v in any order."""
    return [pieces[piece] for piece in ("whole", "by head", "q", "k", "v") if piece in pieces]


def read_tensor(weights: Weights, name: str) -> Tensor:
    """One of our tensors, in the file's dtype. OSError or ValueError if its file has changed since it was opened."""
    pieces = weights.found[name]
    tensors = []
    for stored in in_order(pieces):
        try:
            tensors.append(stored.load())
        except SafetensorError as e:
            raise ValueError(f"{stored.path}: {stored.name} cannot be read ({first_line(e)})") from None
    if "by head" in pieces:
        n_head = weights.config.llm.n_head if name.startswith("llm") else weights.config.vision.n_head
        by_head = tensors[0].unflatten(0, (n_head, 3, -1))                         # (head, 3, size, ...)
        return by_head.transpose(0, 1).flatten(0, 2)                               # (3 * head * size, ...)
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors)
