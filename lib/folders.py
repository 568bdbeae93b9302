"""Model folders: which tensors they store, and whether these fit our model.

`open_weights` reads the files' headers and the config once; everything else works on the Weights that it returns. A
tensor is only read when it is copied into a model. lib/tensor_files.py reads the files, lib/configs.py the config.
"""
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from data import load_tokenizer
from lib.configs import config_of, has_siglip
from lib.layouts import DROPPED, FOREIGN, PREFIX, rename_sequential, to_ours, to_saved
from lib.tensor_files import Pieces, Stored, first_line, read_tensors, tensor_files
from model import LLaVAConfig, LLaVAPhi


class Kind(StrEnum):
    """Kinds of folders, recognized by the names of their tensors."""
    PHI = "a Phi-2 language model"
    CLIP = "a CLIP vision tower"
    SIGLIP = "a SigLIP vision tower"
    LLAVA = "a LLaVA-Phi model"
    MIPHA = "a Mipha model"
    NO_TOWER = "a LLaVA model without its tower"        # LLaVA's released form: the tower is downloaded separately
    NO_PROJECTOR = "a LLaVA-Phi or Mipha model without projector"
    PROJECTOR = "a projector by itself"                 # the output of LLaVA's stage 1
    OTHER = "a folder of other tensors"


KIND_OF_PARTS = {                       # the parts in a folder -> its kind with CLIP as the tower, and with SigLIP
    ("llm",): (Kind.PHI, Kind.PHI),
    ("vision",): (Kind.CLIP, Kind.SIGLIP),
    ("projector",): (Kind.PROJECTOR, Kind.PROJECTOR),
    ("llm", "projector"): (Kind.NO_TOWER, Kind.NO_TOWER),
    ("llm", "vision"): (Kind.NO_PROJECTOR, Kind.NO_PROJECTOR),
    ("llm", "vision", "projector"): (Kind.LLAVA, Kind.MIPHA),
}
GET_A_TOWER = ("get it with: hf download openai/clip-vit-large-patch14-336 --local-dir {0} "
               "(or google/siglip-so400m-patch14-384)")
GET_A_MODEL = ("train one (python train.py --stage pretrain) or get a published one with: "
               "hf download zhumj34/Mipha-3B --local-dir checkpoints/mipha-3b, or "
               "hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi")
HINTS = {                               # the kind that is wanted -> where to get it
    Kind.PHI: "get it with: hf download microsoft/phi-2 --local-dir {0}",
    Kind.CLIP: GET_A_TOWER, Kind.SIGLIP: GET_A_TOWER, Kind.LLAVA: GET_A_MODEL, Kind.MIPHA: GET_A_MODEL,
    Kind.PROJECTOR: "LLaVA's stage 1 writes mm_projector.bin, and `load_weights.py export --to parts` such a file",
    None: "published are microsoft/phi-2, openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384, "
          "zhumj34/Mipha-3B and zxmonent/llava-phi: hf download NAME --local-dir {0}",
}
COMPLETE = {                            # the kind that is there instead of a whole model -> what to do with it
    Kind.NO_TOWER: "give it one: python load_weights.py merge --llm {} --vision TOWER --out DIR",
    Kind.PROJECTOR: "give it as --projector, beside --llm and --vision, to train.py or `load_weights.py merge`",
    Kind.NO_PROJECTOR: "a part of it was lost; copy or download it again",
}


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
    def kind(self) -> Kind:
        return KIND_OF_PARTS.get(self.parts, (Kind.OTHER, Kind.OTHER))[has_siglip(self.found)]


@dataclass(frozen=True)
class Weights:
    """An opened model folder, or the folders that make a model together."""
    folders: tuple[Folder, ...]

    @property
    def paths(self) -> list[Path]:
        return [folder.path for folder in self.folders]

    @property
    def kind(self) -> Kind:
        """That of the folder, or of the model that several make."""
        if len(self.folders) == 1:
            return self.folders[0].kind
        return Kind.MIPHA if self.has_siglip else Kind.LLAVA

    @property
    def has_siglip(self) -> bool:
        return has_siglip(self.found)

    @property
    def has_projector(self) -> bool:
        return any("projector" in folder.parts for folder in self.folders)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Kept once it has been read: the folder may have moved when a long run comes to save its model."""
        return load_tokenizer(self.paths[0])

    @cached_property
    def found(self) -> dict[str, Pieces]:
        """The tensors under our names, in the order of the files."""
        found = {}
        for folder in self.folders:
            found |= folder.found
        return found

    @cached_property
    def config(self) -> LLaVAConfig:
        return config_of(self.paths, self.found)


def open_weights(*paths: Path, expect: tuple[Kind, ...] = (Kind.LLAVA, Kind.MIPHA)) -> Weights:
    """Open one model folder, or a language model's, a tower's and perhaps a projector's, in this order.

    expect: the kinds allowed for a single folder. ValueError if it is of another kind, or has no weights.
    """
    llm = (Kind.PHI,) if len(paths) == 3 else (Kind.PHI, Kind.NO_TOWER)         # which brings a projector of its own
    kinds = [llm, (Kind.CLIP, Kind.SIGLIP), (Kind.PROJECTOR,)][:len(paths)] if len(paths) > 1 else [expect]
    weights = Weights(tuple(open_folder(Path(path), *allowed) for path, allowed in zip(paths, kinds, strict=True)))
    weights.config                          # read it now, so that its errors come before anything else is done
    return weights

# ---------------------------------------------------------------------------------------------------
# One folder


def open_folder(path: Path, *kinds: Kind) -> Folder:
    """Read the headers of a folder's files. ValueError if it is none of these kinds; without any, all are allowed.

    A projector may also be given as its file.
    """
    hint = HINTS[kinds[0] if kinds else None].format(path)
    file = path.is_file() and path.suffix in (".safetensors", ".bin") and Kind.PROJECTOR in kinds
    if not path.is_dir() and not file:
        problem = f"a file; give its folder, {path.parent}" if path.is_file() else f"no such folder; {hint}"
        raise ValueError(f"{path}: {problem}")
    tensors = []
    for file in [path] if file else tensor_files(path):
        tensors += read_tensors(file)
    folder = sort_tensors(path, tensors)
    if kinds and folder.kind not in kinds:
        names = [stored.name[:100] for stored in folder.unexpected[:3]] or ["none"]
        found = f"{folder.kind} ({', '.join(names)}, ...)" if folder.kind is Kind.OTHER else folder.kind
        hint = COMPLETE.get(folder.kind, hint).format(path)
        raise ValueError(f"{path}: this looks like {found}, expected {' or '.join(kinds)}; {hint}")
    return folder


def sort_tensors(path: Path, tensors: list[Stored]) -> Folder:
    """Find each tensor's place in our model. ValueError for a duplicate, or a tensor of another model."""
    folder = Folder(path, {}, {}, [])
    renamed = rename_sequential(stored.name for stored in tensors)
    for stored in tensors:
        name = stored.name
        dropped = [reason for pattern, reason in DROPPED if re.match(pattern, name)]
        foreign = [f"{model}; {advice}" for mark, model, advice in FOREIGN if mark in name]
        place = to_ours(renamed.get(name, name))
        if dropped:
            folder.dropped[name] = dropped[0]
        elif foreign:
            raise ValueError(f"{path}: {name[:80]} is a tensor of {foreign[0]}")
        elif place:
            add_piece(folder, *place, stored)
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


def changed_in_place(stored: Stored) -> str:
    """What is wrong if somebody has written into a tensor's file since it was opened; "" if nobody has."""
    try:
        now = stored.path.stat()
    except OSError:
        return ""
    same = os.path.samestat(now, stored.opened)
    if same and (now.st_size, now.st_mtime_ns) != (stored.opened.st_size, stored.opened.st_mtime_ns):
        return "the file has been written to since it was opened"
    return ""


def in_order(pieces: Pieces) -> list[Stored]:
    """The pieces in the order of our tensor's rows. A file may hold q, k and v in any order."""
    return [pieces[piece] for piece in ("whole", "by head", "q", "k", "v") if piece in pieces]


def read_tensor(weights: Weights, name: str) -> Tensor:
    """One of our tensors, in the file's dtype. OSError or ValueError if its file has changed since it was opened.

    A file that has been moved, replaced or deleted stays readable, because it is open.
    """
    pieces = weights.found[name]
    tensors = []
    for stored in in_order(pieces):
        problem = changed_in_place(stored)          # a mapped file that was truncated would even kill the process
        try:
            tensors += [stored.load()] if not problem else []
        except SafetensorError as e:
            problem = first_line(e)
        if problem:
            raise ValueError(f"{stored.path}: {stored.name} cannot be read ({problem})")
    if "by head" in pieces:
        n_head = weights.config.llm.n_head if name.startswith("llm") else weights.config.vision.n_head
        by_head = tensors[0].unflatten(0, (n_head, 3, -1))                         # (head, 3, size, ...)
        return by_head.transpose(0, 1).flatten(0, 2)                               # (3 * head * size, ...)
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors)


def projector_warning(weights: Weights) -> str:
    """One line if the projector is as it was initialized: no training leaves biases of exactly zero. Else ""."""
    biases = [name for name in weights.found if name.startswith("projector.") and name.endswith(".bias")]
    if not biases or any(read_tensor(weights, name).count_nonzero() for name in biases):
        return ""
    return ("the projector is not trained yet, so this model cannot see; train it with: python train.py --stage "
            f"pretrain --model {weights.paths[0]}")
