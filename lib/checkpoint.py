"""The output folder of a training run and its checkpoints: save, find, resume, read for export.

A checkpoint is a folder out/step_NNNNNN that is either complete or absent. It holds only what training changes: the
trained weights in fp32 and AdamW's two moments, in safetensors files that torch.distributed.checkpoint (dcp) writes
from each process, and reads back on any number of processes. Frozen weights are not in it; checkpoint.json names the
folders that they come from, together with the run's settings and the size and checksum of every file.
"""
import json
import shutil
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from lib.common import (DTYPES, LOCK, hold_folder, plural, read_json, remove, sha256, sync_folder, torchrun_env,
                        warn_once, write_whole)
from lib.device import free_memory
from lib.processes import on_every_process, on_process_0, patient_group, print0
from lib.recipes import IMAGE_MODES, weighted
from lib.records import BAD_SAMPLES
from lib.schedule import joint_checksum

# Settings that may differ between a checkpoint and the run that resumes it: none of them changes what is learned. Data
# and images may have moved; the checksum decides whether the data is the same. A recipe's name does not matter, since
# its values are compared one by one.
MAY_CHANGE = {
    "recipe", "out", "data", "images", "follow_links", "val_data", "val_every", "save_every", "save_minutes", "keep",
    "keep_best", "patience", "recheck_every", "track", "log_every", "resume", "workers", "micro_tokens", "recompute",
    "gather", "compile", "device",
}
DATA_CHECKSUM = "data checksum"          # its name among the settings of a run


@dataclass
class TrainState:
    settings: dict                  # the run's flags, and its DATA_CHECKSUM
    sources: list[Path]             # folders that the run started from
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0                   # steps done
    updates: int = 0                # those of them that changed the weights
    failed_saves: int = 0           # in a row
    newest: Path | None = None      # checkpoint
    saved_updates: int = 0          # those in it
    tried_at: float = 0.0           # when the last save began, by this process's clock

    def tensors(self) -> dict[str, DTensor]:
        """Everything that training changes, under flat names: model.NAME, exp_avg.NAME, exp_avg_sq.NAME."""
        tensors = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                tensors[f"exp_avg.{name}"] = self.optimizer.state[p]["exp_avg"]
                tensors[f"exp_avg_sq.{name}"] = self.optimizer.state[p]["exp_avg_sq"]
                tensors[f"model.{name}"] = p.data
        return tensors


class Checkpoint(NamedTuple):
    path: Path
    manifest: dict                  # the content of checkpoint.json

# ---------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(state: TrainState) -> None:
    """Write out/step_NNNNNN. All processes take part.

    The files are written to a temporary folder, synced to disk, and only then renamed, so a crash at any moment leaves
    the older checkpoints intact. OSError on every process when any of them cannot write.
    """
    out = Path(state.settings["out"])
    final = out / f"step_{state.step:06d}"
    part = out / f".writing_{final.name}"
    tensors = state.tensors()
    state.tried_at = time.monotonic()

    def prepare() -> None:
        need = sum(tensor.nbytes for tensor in tensors.values())
        check_room("it", 1.02 * need, shutil.disk_usage(out).free, out)
        remove(part)
        part.mkdir()

    try:
        in_memory = host_memory_to_save(torchrun_env().local_world)
        on_every_process(lambda: check_room("writing it", in_memory, free_memory("cpu"),
                                            f"the memory of {socket.gethostname()}"))
        on_process_0(prepare)
        writer = HuggingFaceStorageWriter(str(part), split_into_files(tensors), save_distributed=True)
        writer.sync_files = False           # sync_folder does that, also where a file system cannot
        # From a GPU into ordinary memory. Copying ahead would take page-locked memory, which is rounded up to a power
        # of two and stays with the process.
        writer.per_thread_copy_ahead = 0
        dcp.save(tensors, storage_writer=writer, process_group=patient_group())
        checksums = {}
        for of_one_process in on_every_process(lambda: checksums_of_own_files(part)):
            checksums |= of_one_process
        on_process_0(lambda: complete(state, part, checksums))
    except (OSError, CheckpointException) as e:
        # dcp.save, like on_process_0, fails on all processes when it fails on one.
        if dist.get_rank() == 0 and not (part / "checkpoint.json").exists():
            remove(part)
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise OSError(f"checkpoint of step {state.step} not written: {cause}") from None
    state.newest, state.saved_updates = final, state.updates
    print0(f"saved {final}")


FILE_BYTES = 2 ** 29        # largest file of a checkpoint; Phi-2's embedding, the largest tensor, is just below it
HOST_COPIES = 2             # dcp holds a whole file in host memory twice, as tensors and as bytes, before it writes


def host_memory_to_save(processes: int) -> int:
    """Bytes that saving a checkpoint takes on a machine with this many processes."""
    return HOST_COPIES * FILE_BYTES * processes


def split_into_files(tensors: dict[str, DTensor]) -> dict[str, int]:
    """Assign each tensor to a numbered file, so that a process's part of a file has at most FILE_BYTES.

    A single file would take host memory for two checkpoints: 74 GB at stage 2. A tensor above the limit gets a file of
    its own.
    """
    files = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        size = tensor.to_local().nbytes
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


def checksums_of_own_files(part: Path) -> dict[str, str]:
    """Sync the files that this process wrote to disk -> their CRC-32. dcp names them by rank, starting at 1.

    Reading them back is cheap, since they are still in the page cache. For the same reason a checksum covers what was
    written, and not yet what the disk will return.
    """
    checksums = {}
    for file in part.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"):
        checksums[file.name] = crc32(file)
        sync_folder(file)
    return checksums


def crc32(path: Path) -> str:
    """CRC-32 of a file. It detects any single flipped bit, and misses other corruption with a probability of 2^-32.

    The fastest checksum in the standard library (one core, one GB: crc32 0.3 s, sha256 0.6 s, blake2b 1.4 s). At that
    rate the 37 GB of a stage-2 checkpoint take 11 s on one process and 1.4 s on eight. It does not protect against
    tampering, but whoever can change the files can change checkpoint.json, too.
    """
    value = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def complete(state: TrainState, part: Path, checksums: dict[str, str]) -> None:
    """Write checkpoint.json, which completes the folder, and put it in its place."""
    for name in checksums:
        (part / name).stat()        # FileNotFoundError if another process wrote it into a folder of its own
    manifest = {
        "step": state.step,
        "updates": state.updates,
        "crc32": checksums,
        "torch": torch.__version__,
        "config": state.settings,
        "sources": [str(source.absolute()) for source in state.sources],       # export may run in another folder
    }
    write_whole(part / "checkpoint.json", json.dumps(manifest, indent=2))
    put_in_place(part, state.settings["keep"])


def put_in_place(part: Path, keep: int) -> None:
    """Rename a complete .writing_step_NNNNNN, and delete the checkpoints that are not kept: all but the last `keep`.

    The step may be there already, if --resume went back to an older one. A kill after that has been deleted leaves the
    complete `part`, and the next run comes here again. Checkpoints of later steps then belong to an abandoned branch of
    the run, and the next --resume auto would mistake them for the newest.
    """
    out = part.parent
    final = out / part.name.removeprefix(".writing_")
    sync_folder(part)
    sync_folder(out)
    remove(final)
    part.rename(final)
    sync_folder(out)
    kept = [checkpoint for checkpoint in sorted(out.glob("step_*")) if checkpoint <= final][-keep:]
    for checkpoint in [*out.glob("step_*"), *out.glob(".writing_step_*")]:
        if checkpoint not in kept:
            try:
                remove(checkpoint)
            except OSError as e:            # the new one is in its place all the same
                warn_once(f"{checkpoint} cannot be deleted ({e})")


def check_room(what: str, need: float, free: float, where: object, advice: str = "make room") -> None:
    if need > free:
        raise OSError(f"{what} will take {need / 1e9:.1f} GB, and {where} has {free / 1e9:.1f} GB free: {advice}")


def plan_saving(state: TrainState, model_bytes: float) -> str:
    """When a run saves, for its first lines on the screen.

    OSError if the disk has no room for what is saved: days of training should not end with a full one.
    """
    settings, when = state.settings, []
    if settings["save_every"]:
        when.append(plural(settings["save_every"], "step"))
    if settings["save_minutes"]:
        when.append(f"{settings['save_minutes']:g} minutes")
    free, where = shutil.disk_usage(settings["out"]).free, f"--out {settings['out']}"
    if not when:
        check_room("the trained model", model_bytes, free, where)
        return "a checkpoint only if a signal or an error ends the run: kill -9 would lose all of it"
    size = sum(tensor.nbytes for tensor in state.tensors().values())
    check_room("the trained model and a checkpoint", model_bytes + size, free, where,
               "make room, or give --save-minutes 0 to do without a checkpoint")
    return (f"a checkpoint of {size / 1e9:.2g} GB every {' and every '.join(when)}; the newest {settings['keep']} are "
            "kept")


def save_is_due(state: TrainState) -> bool:
    """After the step that comes next, by --save-every or --save-minutes.

    Clocks differ, and no process can save alone, so `synchronized_steps` asks all of them.
    """
    every, minutes = state.settings["save_every"], state.settings["save_minutes"]
    if every and (state.step + 1) % every == 0:
        return True
    return minutes > 0 and time.monotonic() - state.tried_at >= 60 * minutes


@contextmanager
def saved_on_error(state: TrainState) -> Iterator[None]:
    """Save before an error that all processes raise alike ends the run, and say what to do with the checkpoint.

    Without an update since the newest checkpoint, that one is as good. So a run that diverges each time it is resumed
    does not push out the checkpoints from before.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        try:
            if state.updates > state.saved_updates:
                save_checkpoint(state)
        except OSError as e:
            text += f"; {e}"
        if state.newest:
            path = state.newest
            text += (f"; {path} has it as trained up to that step: when this is mended, the same command goes on from "
                     f"there; `python load_weights.py export --model {path} --out DIR` makes a model of it")
        raise ValueError(text) from None


def try_to_save(state: TrainState) -> None:
    """Save. A full disk does not end the run until the third failure in a row."""
    try:
        save_checkpoint(state)
        state.failed_saves = 0
    except OSError as e:
        state.failed_saves += 1
        if state.failed_saves == 3:
            raise
        print0(f"warning: {e}; training goes on with the checkpoint before it")

# ---------------------------------------------------------------------------------------------------
# Finding and resuming

# Fields of checkpoint.json, and of its settings those that are used rather than just compared: their type or values.
MANIFEST = {"step": int, "updates": int, "crc32": dict, "config": dict, "sources": list}
SETTINGS = {"stage": str, "dtype": [*DTYPES], "image_mode": [*IMAGE_MODES], "dropout": (int, float),
            "lora_alpha": (int, float)}


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint. ValueError: a field is missing or wrong, or a file does not hold what was written."""
    manifest = read_json(path / "checkpoint.json")
    problem = wrong_field(manifest) or damage(path, manifest["crc32"])
    if problem:
        raise ValueError(f"{path}: {problem}")
    return Checkpoint(path, manifest)


def wrong_field(manifest: dict) -> str:
    """The first field of checkpoint.json that cannot be used; "" if all can."""
    for values, kinds in ((manifest, MANIFEST), (manifest.get("config"), SETTINGS)):
        for name, kind in kinds.items():
            value = values.get(name)
            fits = value in kind if isinstance(kind, list) else isinstance(value, kind)
            if not fits:
                return f"checkpoint.json has {str(value)[:40]!r} for {name!r}"
    strange = [source for source in manifest["sources"] if not isinstance(source, str)]
    return f"checkpoint.json has {strange[0]!r} among its 'sources'" if strange else ""


def damage(path: Path, checksums: dict[str, str]) -> str:
    """The first file that is missing or does not hold what was written; "" if all do. Reads all of them."""
    missing = [name for name in checksums if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    # Both reading and zlib release the GIL: threads keep the disk and several cores busy.
    with ThreadPoolExecutor() as pool:
        found = pool.map(crc32, [path / name for name in checksums])
        for name, value in zip(checksums, found):
            if value != checksums[name]:
                return f"{name} is damaged: its checksum is {value}, checkpoint.json says {checksums[name]}"
    return ""


def find_checkpoint(settings: dict) -> Checkpoint | None:
    """The newest intact checkpoint in --out, or the one that --resume names. Prints which ones it passes over.

    ValueError if there are checkpoints but none is complete: a new run would delete them, and nobody asked for that.
    """
    out, resume = Path(settings["out"]), settings["resume"]
    if resume == "never":
        return None
    for part in out.glob(".writing_step_*"):
        if (part / "checkpoint.json").is_file():                # a kill came between completing and renaming it
            put_in_place(part, settings["keep"])
    candidates, advice = [Path(resume)], f"--resume auto takes the newest one in {out}"
    if resume == "auto":
        candidates = sorted(out.glob("step_*"), reverse=True)
        advice = "--resume never deletes all of them and begins again"
    for path in candidates:
        try:
            return read_checkpoint(path)
        except (ValueError, OSError) as e:
            problem = e
            print0(f"passing over {path.name}: {e}")
    if candidates:
        raise ValueError(f"no complete checkpoint: {problem}; {advice}")
    return None


def load_checkpoint(checkpoint: Checkpoint, state: TrainState) -> None:
    """Restore weights, moments and step, no matter how many processes wrote them."""
    dcp.load(state.tensors(), storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
             process_group=patient_group())
    state.step = checkpoint.manifest["step"]
    state.updates = state.saved_updates = checkpoint.manifest["updates"]
    state.newest = checkpoint.path
    for moments in state.optimizer.state.values():
        moments["step"].fill_(state.updates)

# ---------------------------------------------------------------------------------------------------
# Export


def read_for_export(checkpoint: Path) -> tuple[dict, list[Path]]:
    """The run's settings and the folders that it started from. ValueError if the checkpoint is damaged."""
    manifest = read_checkpoint(checkpoint).manifest
    return manifest["config"], [Path(source) for source in manifest["sources"]]


def trained_tensors(checkpoint: Path) -> dict[str, Callable[[], Tensor]]:
    """Name of each trained weight -> a function that reads it, whole and in fp32, without a process group.

    For `load_weights.py export`. LoRA adapters keep their own names; merging them is left to the caller.
    """
    sizes = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata

    def read(name: str) -> Tensor:
        tensor = torch.empty(sizes[name].size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # dcp warns that there is one process, which no_dist has just said
            dcp.load({name: tensor}, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
        return tensor

    return {name.removeprefix("model."): partial(read, name) for name in sizes if name.startswith("model.")}

# ---------------------------------------------------------------------------------------------------
# The output folder


def read_settings(out: Path) -> dict:
    """The config.json of a run's folder; {} if there is none, or if another program wrote it.

    During a run it only holds the run's settings, under "training"; the finished model's config is added to them.
    """
    path = out / "config.json"
    saved = read_json(path) if path.exists() else {}
    return saved if "training" in saved else {}


@contextmanager
def lock_output(out: Path, patience: float = 40) -> Iterator[None]:
    """Reserve --out for this run: process 0 holds the lock, and all processes end if another run has it.

    ValueError, before the lock file is written, if `out` holds files that are not a training run's; ValueError also if
    it is not the same folder for all processes.
    """
    with ExitStack() as stack:
        def hold() -> str:
            files = out.iterdir() if out.exists() else []
            foreign = [path for path in files if path.name != LOCK and not path.name.startswith(".writing_")]
            if foreign and not read_settings(out):
                raise ValueError(f"--out {out} holds files that are not a training run's; choose an empty or a new "
                                 "folder")
            stack.enter_context(hold_folder(out))
            token = out / f".writing_token_{time.time_ns()}"
            token.touch()
            return token.name
        check_shared(out / on_process_0(hold), patience)
        yield


def check_shared(token: Path, patience: float) -> None:
    """ValueError on every process if one does not see this file, which process 0 has just written to --out.

    Each process writes its part of a checkpoint there: with separate folders per node, none would be complete. NFS may
    show a new folder half a minute late, hence `patience`, in seconds.
    """
    def look() -> str:
        wait_until = time.monotonic() + patience
        while not token.exists():
            if time.monotonic() > wait_until:
                return socket.gethostname()
            time.sleep(0.1)
        return ""
    blind = [host for host in on_every_process(look) if host]
    on_process_0(token.unlink)
    if blind:
        raise ValueError(f"--out {token.parent} is not shared: {blind[0]} does not see what process 0 writes there; "
                         "give a folder that is the same one on all nodes")


def check_same_settings(then: dict, now: dict, may_change: set[str], problem: str) -> None:
    """ValueError with `problem` and every setting that differs and is not among `may_change`."""
    different = []
    for name, value in now.items():
        if name not in may_change and then.get(name) != value:
            different.append(f"{name}: {then.get(name)!r} then, {value!r} now")
    if different:
        raise ValueError(problem + ":\n  " + "\n  ".join(different))


def is_finished(settings: dict) -> bool:
    """True if --out holds the model of a finished run with these settings; ValueError if they were different.

    The data is the same if its content is, wherever it has moved. Of the pictures only the folders' names are known.
    """
    saved = read_settings(Path(settings["out"]))
    if settings["resume"] != "auto" or "model_type" not in saved:
        return False
    files, weights = zip(*map(weighted, settings["data"]))
    now = settings | {DATA_CHECKSUM: joint_checksum([sha256(Path(file)) for file in files], weights)}
    check_same_settings(saved["training"], now, MAY_CHANGE - {"images"},
                        f"--out {settings['out']} holds a finished model made with other settings; "
                        "choose another --out, or --resume never to train afresh over it")
    return True


def prepare_out(settings: dict) -> Checkpoint | None:
    """Make --out ready for a run with these settings -> the checkpoint to go on from, if there is one.

    ValueError, before anything is changed, if that checkpoint was made with other settings.
    """
    out = Path(settings["out"])

    def prepare() -> Checkpoint | None:
        checkpoint = find_checkpoint(settings)
        leftovers = [".writing_*"]
        if checkpoint:
            check_same_settings(checkpoint.manifest["config"], settings, MAY_CHANGE,
                                f"{checkpoint.path} was made with other settings; give the same, or --resume never "
                                "and another --out")
        else:
            leftovers += ["step_[0-9]*", "model*.safetensors*", "best", BAD_SAMPLES]
        for pattern in leftovers:
            for path in out.glob(pattern):
                remove(path)
        write_whole(out / "config.json", json.dumps({"training": settings}, indent=2) + "\n")
        return checkpoint

    return on_process_0(prepare)
