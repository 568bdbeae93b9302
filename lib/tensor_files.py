"""The files of a model folder: which of them hold its tensors, and what these are called, without reading them yet.

The files are untrusted: nothing in them is executed, and no number in them decides how much memory is allocated before
it has been compared with the file's size.
"""
import os
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
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

    def read(self) -> Tensor:
        """The tensor. ValueError if somebody has written into its file since it was opened.

        A file that has been moved, replaced or deleted stays readable, because it is open.
        """
        then, problem = self.opened, ""
        with suppress(OSError):
            now = self.path.stat()
            if os.path.samestat(now, then) and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                problem = "the file has been written to since it was opened"
        try:
            if not problem:         # a mapped file that was truncated would even kill the process
                return self.load()
        except SafetensorError as e:
            problem = first_line(e)
        raise ValueError(f"{self.path}: {self.name} cannot be read ({problem})")


Pieces = dict[str, Stored]                  # how one of our tensors is stored; for the keys see layouts.to_ours


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors before .bin, one file before shards, a model before parts."""
    for name in ("model.safetensors", "pytorch_model.bin", *PROJECTOR_FILES):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            return shard_files(folder / f"{name}.index.json")
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
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for name in names or {"none"}:
        problem = ""
        if Path(name).name != name or Path(name).suffix != suffix:
            problem = (f"expected a weight_map of tensor names to the plain names of {suffix} files in this folder, "
                       f"found {name[:80]!r}")
        elif not (index.parent / name).is_file():
            problem = f"{name} is named there, but is not in the folder: incomplete download?"
        if problem:
            raise ValueError(f"{index}: {problem}")
    return [index.parent / name for name in sorted(names)]


def first_line(error: Exception) -> str:
    """A library's error in one line, for the end of ours. It is cut, because it may quote a name of any length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def read_tensors(path: Path) -> list[Stored]:
    """The tensors of a file in either format, none of them read yet. ValueError says what is wrong with the file."""
    with open(path, "rb") as file:          # OSError if it must not be read
        opened = os.fstat(file.fileno())
        begin = file.read(100)
    try:
        problem = file_problem(path, opened.st_size)
        if not problem:
            return read_bin(path, opened) if path.suffix == ".bin" else read_safetensors(path, opened)
    except Exception as e:                  # an untrusted file can fail in any way
        problem = ("cannot be read, expected plain tensors and nothing else, as safetensors or torch.save since 1.6 "
                   f"writes them; incomplete download? (file is {opened.st_size} bytes; {first_line(e)})")
    raise ValueError(f"{path}: {pointer_problem(begin) or problem}")


def file_problem(path: Path, size: int) -> str:
    """What is wrong with a file of tensors, as far as its first and last bytes show it, or "".

    torch maps a .bin file and takes each tensor's bytes as they are, so a compressed record would be read as noise. A
    table of millions of tensors, or a pickle of gigabytes, would exhaust memory before a library could object.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")         # of the json header that follows
        file.seek(max(0, size - 66_000))
        tail = file.read()
    if path.suffix == ".bin":
        end = tail.rfind(b"PK\5\6")                 # the length of a zip's table is within the last 66 kB
        length = int.from_bytes(tail[end + 12:end + 16], "little") if end >= 0 else 0
    if length > min(HEADER_LIMIT, size - 8):
        return f"file is {size} bytes, its table of tensors alone claims {length}: incomplete download?"
    if path.suffix != ".bin":
        return ""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        large = record.filename.endswith(".pkl") and record.file_size > HEADER_LIMIT
        if record.compress_type != zipfile.ZIP_STORED or large:
            return f"{record.filename} is compressed or too large for a file of torch.save"
    return ""


def read_safetensors(path: Path, opened: os.stat_result) -> list[Stored]:
    """The tensors of a safetensors file, none of them read yet."""
    # "pread" reads a tensor into memory of its own. The default maps the file: if another program then changed or
    # truncated it, the model would change, or the process would be killed.
    file = safe_open(path, "pt", backend="pread")
    stored = []
    for name in file.offset_keys():
        entry = file.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise ValueError(f"{name[:80]} has dtype {entry.get_dtype()}, which is not supported here")
        stored.append(Stored(name, path, dtype, tuple(entry.get_shape()), partial(file.get_tensor, name), opened))
    return stored


def read_bin(path: Path, opened: os.stat_result) -> list[Stored]:
    """The tensors of a torch.save file, memory-mapped: their bytes are read when they are copied into a model."""
    with warnings.catch_warnings():         # about quantized tensors, which are refused below
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    stored = []
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not dense or not tensor.is_contiguous():
            raise ValueError(f"{str(name)[:80]!r} is not a plain dense tensor, stored row by row")
        stored.append(Stored(name, path, tensor.dtype, tuple(tensor.shape), tensor.detach, opened))
    return stored
