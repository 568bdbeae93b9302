"""Model folders: which tensors they store, and whether these fit our model.

`open_weights` reads the files' headers and the config once; everything else works on the Weights that it returns. A
tensor is only read when it is copied into a model. lib/tensor_files.py reads the files, lib/configs.py the config.
"""
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import load_tokenizer
from lib.configs import config_of
from lib.layouts import DROPPED, FOREIGN, PREFIX, rename_sequential, to_ours, to_saved
from lib.tensor_files import Pieces, Stored, read_tensors, tensor_files
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


MODELS = (Kind.LLAVA, Kind.MIPHA)
KIND_OF_PARTS = {("llm",): Kind.PHI, ("vision",): Kind.CLIP, ("projector",): Kind.PROJECTOR,
                 ("llm", "projector"): Kind.NO_TOWER, ("llm", "vision"): Kind.NO_PROJECTOR,
                 ("llm", "vision", "projector"): Kind.LLAVA}
WITH_SIGLIP = {Kind.CLIP: Kind.SIGLIP, Kind.LLAVA: Kind.MIPHA}      # what they are if SigLIP is the tower
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
QKV = ("q", "k", "v")


@dataclass
class Weights:
    """An opened model folder, or the folders that make a model together."""
    paths: list[Path]
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
        kind = KIND_OF_PARTS.get(self.parts, Kind.OTHER)
        return WITH_SIGLIP.get(kind, kind) if self.has_siglip else kind

    @property
    def has_siglip(self) -> bool:
        """SigLIP's patch convolution has a bias, and there is no class token."""
        return "vision.patch.bias" in self.found and "vision.cls" not in self.found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Kept once it has been read: the folder may have moved when a long run comes to save its model."""
        return load_tokenizer(self.paths[0])

    @cached_property
    def config(self) -> LLaVAConfig:
        return config_of(self.paths, self.found, self.has_siglip)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that one of our tensors is stored in, as all of its pieces are."""
        return next(iter(self.found[name].values())).dtype


def open_weights(*paths: Path, expect: tuple[Kind, ...] = MODELS) -> Weights:
    """Open one model folder, or a language model's, a tower's and perhaps a projector's, in this order.

    expect: the kinds allowed for a single folder. ValueError if it is of another kind, or has no weights.
    """
    llm = (Kind.PHI,) if len(paths) == 3 else (Kind.PHI, Kind.NO_TOWER)         # which brings a projector of its own
    kinds = [llm, (Kind.CLIP, Kind.SIGLIP), (Kind.PROJECTOR,)] if len(paths) > 1 else [expect]
    weights, *others = [open_folder(Path(path), *allowed) for path, allowed in zip(paths, kinds)]
    for other in others:
        weights.paths += other.paths
        weights.found |= other.found
        weights.unexpected += other.unexpected
    weights.config                          # read it now, so that its errors come before anything else is done
    return weights

# ---------------------------------------------------------------------------------------------------
# One folder


def open_folder(path: Path, *kinds: Kind) -> Weights:
    """Read the headers of a folder's files. ValueError if it is none of these kinds; without any, all are allowed.

    A projector may also be given as its file.
    """
    folder, problem = Weights([path], {}, {}, []), ""
    hint = HINTS[kinds[0] if kinds else None].format(path)
    is_projector = path.is_file() and path.suffix in (".safetensors", ".bin") and Kind.PROJECTOR in kinds
    if is_projector or path.is_dir():
        tensors = []
        for file in [path] if is_projector else tensor_files(path):
            tensors += read_tensors(file)
        problem = sort_tensors(folder, tensors)
    else:
        problem = f"a file; give its folder, {path.parent}" if path.is_file() else f"no such folder; {hint}"
    if not problem and kinds and folder.kind not in kinds:
        names = [stored.name[:100] for stored in folder.unexpected[:3]] or ["none"]
        found = f"{folder.kind} ({', '.join(names)}, ...)" if folder.kind is Kind.OTHER else folder.kind
        hint = COMPLETE.get(folder.kind, hint).format(path)
        problem = f"this looks like {found}, expected {' or '.join(kinds)}; {hint}"
    if problem:
        raise ValueError(f"{path}: {problem}")
    return folder


def sort_tensors(folder: Weights, tensors: list[Stored]) -> str:
    """Find each tensor's place in our model -> a problem if one is of another model or there twice, else ""."""
    renamed = rename_sequential(stored.name for stored in tensors)
    for stored in tensors:
        name = stored.name
        place = to_ours(renamed.get(name, name))
        if place:
            ours, piece = place
            pieces = folder.found.setdefault(ours, {})
            if piece in pieces or (pieces and not {piece, *pieces} <= set(QKV)):
                other = next(iter(pieces.values()))
                return f"{other.name} in {other.path.name} and {name} in {stored.path.name} are the same tensor"
            pieces[piece] = stored
            continue
        dropped = [reason for pattern, reason in DROPPED if re.match(pattern, name)]
        foreign = [f"{model}; {advice}" for pattern, model, advice in FOREIGN if re.search(pattern, name)]
        if dropped:
            folder.dropped[name] = dropped[0]
        elif foreign:
            return f"{name[:80]} is a tensor of {foreign[0]}"
        else:
            folder.unexpected.append(stored)
    return ""

# ---------------------------------------------------------------------------------------------------
# The model's tensors and those of the folders


def meta_model(config: LLaVAConfig, tower: bool = True) -> LLaVAPhi:
    """A model on the meta device: it has names and shapes, but takes no memory."""
    with torch.device("meta"):
        return LLaVAPhi(config, tower)


def saved_shapes(model: LLaVAPhi) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor in the saved folder of such a model, which is neither quantized nor adapted.

    A folder holds more than our model: other programs expect the whole tower, including the layers and the LayerNorm
    after the hidden state that LLaVA reads.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
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
    missing, unexpected, misshapen = [], [*weights.unexpected], []
    for name in needed:
        there = weights.found.get(name, {}).keys()
        if there & {"whole", "by head"} or there == {*QKV}:
            continue
        rows, *others = shapes[name]
        saved = to_saved(name)                              # one name, or q's, k's and v's
        missing += [describe(theirs, [rows // len(saved), *others])
                    for piece, theirs in zip(QKV, saved) if piece not in there]
    for name, pieces in weights.found.items():
        dtypes = {stored.dtype for stored in pieces.values()}
        for piece, stored in pieces.items():
            if name not in shapes:
                unexpected.append(stored)
                continue
            rows, *others = shapes[name]
            expected = (rows // 3 if piece in QKV else rows, *others)
            if stored.shape != expected or len(dtypes) > 1 or not stored.dtype.is_floating_point:
                dtype = str(stored.dtype).removeprefix("torch.")
                found = describe(stored.name, stored.shape)
                misshapen.append(f"{found} {dtype}, expected{describe('', expected)} of floats")
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


def read_tensor(weights: Weights, name: str) -> Tensor:
    """One of our tensors, in the file's dtype. ValueError if its file has changed since it was opened."""
    pieces = weights.found[name]
    # In the order of our rows: a file may hold q, k and v in any order.
    tensors = [pieces[piece].read() for piece in ("whole", "by head", *QKV) if piece in pieces]
    if "by head" in pieces:
        by_head = tensors[0].unflatten(0, (weights.config.llm.n_head, 3, -1))      # (head, 3, size, ...)
        return by_head.transpose(0, 1).flatten(0, 2)                               # (3 * head * size, ...)
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def projector_warning(weights: Weights) -> str:
    """One line if the projector is as it was initialized: no training leaves biases of exactly zero. Else ""."""
    biases = [name for name in weights.found if name.startswith("projector.") and name.endswith(".bias")]
    if not biases or any(read_tensor(weights, name).count_nonzero() for name in biases):
        return ""
    return ("the projector is not trained yet, so this model cannot see; train it with: python train.py --stage "
            f"pretrain --model {weights.paths[0]}")
