"""The files of a model folder: which of them hold its tensors, and what these are called, without reading them yet.

The files are untrusted: nothing in them is executed, and no number in them decides how much memory is allocated before
it has been compared with the file's size.
"""
import os
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.common import pointer_problem, read_json

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")      # as LLaVA's stage 1 and our export name them
HEADER_LIMIT = 2_000_000        # bytes of a file's table of tensors; that of the whole model takes 90 thousand
EXPORT = "make one of it with: python load_weights.py export --model {} --out DIR"
MERGE_ADAPTERS = "merge them into it with peft (merge_and_unload, then save_pretrained), and give the folder saved"
GET_WEIGHTS = "get the model.safetensors or pytorch_model.bin that it was made from"
COPY_BLOBS = "in the hub's cache, blobs/ belongs to it; copy that as well, or download it again"
OTHER_FORMS = (         # what lies in a folder without a model -> what it is, and what to do; {} is where it lies
    ("checkpoint.json", "a training run's checkpoint and no model yet", EXPORT),
    ("step_*/checkpoint.json", "a training run's checkpoint and no model yet", EXPORT),
    ("non_lora_trainables.bin", "PEFT adapters as LLaVA saves them, without their base", "merge them into it with "
     "LLaVA's scripts/merge_lora_weights.py, and give the folder saved"),
    ("adapter_config.json", "PEFT adapters without their base", MERGE_ADAPTERS),
    ("adapter_model.*", "PEFT adapters without their base", MERGE_ADAPTERS),
    ("snapshots/*", "the top folder of a model in the hub's cache", "give the folder with its files: {}"),
    ("models--*/snapshots/*", "the hub's cache", "give the folder of one model's files, such as {}"),
    ("global_step*", "a checkpoint of DeepSpeed", "make pytorch_model.bin of it: python zero_to_fp32.py . ."),
    ("*.distcp", "a checkpoint of torch.distributed", "make pytorch_model.bin of it: python -m "
     "torch.distributed.checkpoint.format_utils dcp_to_torch {} pytorch_model.bin"),
    ("*-of-*.safetensors", "shards without their index", "download model.safetensors.index.json as well"),
    ("*-of-*.bin", "shards without their index", "download pytorch_model.bin.index.json as well"),
    ("model.safetensor[s]", "a link to a file that is not there", COPY_BLOBS),
    ("pytorch_model.bi[n]", "a link to a file that is not there", COPY_BLOBS),
    ("*.gguf", "a model for llama.cpp", GET_WEIGHTS),
    ("tf_model.h5", "a model for TensorFlow", GET_WEIGHTS),
    ("flax_model.msgpack", "a model for Flax", GET_WEIGHTS),
    ("*/config.json", "a folder of folders", "give the one with the model's files, such as {}"),
)


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""
    name: str                               # in the file
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    opened: os.stat_result                  # the file as it was then

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Pieces = dict[str, Stored]                  # how one of our tensors is stored; for the keys see layouts.to_ours


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors before .bin, one file before shards, a model before parts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            return shard_files(folder / f"{name}.index.json")
    for name in PROJECTOR_FILES:
        if (folder / name).exists():
            return [folder / name]
    raise ValueError(f"{folder}: {other_form(folder)}")


def other_form(folder: Path) -> str:
    """What a folder without a model's tensors holds instead, and what to do with it."""
    for pattern, name, advice in OTHER_FORMS:
        found = sorted(folder.glob(pattern), key=lambda path: (path.lstat().st_mtime, path.name))
        if found:
            newest = found[-1]
            return f"{name}; {advice.format(newest if newest.is_dir() else newest.parent)}"
    return "holds no model.safetensors and no pytorch_model.bin, in one file or with an index"


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


def first_line(error: Exception) -> str:
    """A library's error in one line, for the end of ours. It is cut, because it may quote a name of any length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_tensors(path: Path) -> list[Stored]:
    """The tensors of a file in either format, none of them read yet."""
    with open(path, "rb") as file:
        problem = pointer_problem(file.read(100))
    if problem:
        raise ValueError(f"{path}: {problem}")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)


def read_safetensors(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, none of them read yet."""
    opened = path.stat()
    size = opened.st_size
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
            stored.append(Stored(name, path, dtype, shape, partial(file.get_tensor, name), opened))
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
    opened = path.stat()
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
        stored.append(Stored(name, path, tensor.dtype, tuple(tensor.shape), tensor.detach, opened))
    return stored
