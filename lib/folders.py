"""Folders of weights, opened and checked: what lies in them, whether it is what the model needs, and its config."""
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.common import read_json
from lib.layouts import (DROPPED, FOREIGN, PREFIX, feature_strategy, is_siglip, phi_config, rename_sequential, require,
                         subconfig, to_ours, to_saved, vision_config, without_layer)
from lib.recipes import IMAGE_MODES
from model import LLaVAConfig, LLaVAPhi, PhiConfig
from vision import VisionConfig


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


def read_all(found: dict[str, Pieces], config: LLaVAConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) in the order of the files, which a disk likes best. None is kept when the next is read."""
    for name, pieces in found.items():
        yield name, read_tensor(name, pieces, config)
