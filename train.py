"""Train LLaVA-Phi, both stages of the published recipe. One path from a laptop's CPU to many nodes.

There is always a process group and a mesh, of one process if need be; FSDP2 shards what trains and leaves what is
frozen alone. A step is a set of samples: its loss is the mean over all supervised tokens of its global batch, so neither
the number of processes nor the size of a micro-batch changes what is learned.

$ torchrun --nproc_per_node=8 train.py --stage pretrain        # projector only, frozen towers: picture -> caption
$ torchrun --nproc_per_node=8 train.py --stage finetune        # everything, on conversations
$ python train.py --stage finetune --model out/demo/pretrain --data my.json --images my_pictures --out out/mine
"""
import argparse
import dataclasses
import html
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import Batch, Dataset, Loader, Step, load_tokenizer, steps_per_epoch
from load_weights import load_config, load_into, save_model
from model import LLaVAConfig, LLaVAPhi, Projector, apply_lora, init_weights, merge_lora

PARTS = ("projector", "llm", "vision")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}    # dense bf16, datasheets

# ---------------------------------------------------------------------------------------------------
# Configuration: one flag per field, a row of values per stage


def flag(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    stage: str = flag("pretrain", "which row of recipe values: pretrain or finetune")
    model: str = flag("", "folder to start from; empty: --llm and --vision with a new projector")
    llm: str = flag("", "Phi-2 folder (pretrain)")
    vision: str = flag("", "CLIP folder (pretrain)")
    data: str = flag("", "LLaVA json or jsonl")
    images: str = flag("", "folder that image paths in the data start from")
    val_data: str = flag("", "a second json, whose loss is measured before, during (--val-every) and after training")
    out: str = flag("", "folder for metrics, checkpoints and the final model")
    train: str = flag("projector", "comma-separated parts that learn: projector, llm, vision")
    freeze: str = flag("", "comma-separated parts taken out of --train again")
    template: str = flag("plain", "prompt: plain (image, caption, newline) or v0 (chat)")
    image_mode: str = flag("crop", "pictures: crop the centre or pad to a square")
    global_batch: int = flag(256, "samples per optimizer step, over all processes")
    micro_tokens: int = flag(16384, "tokens per forward on one process: as many as its memory holds")
    max_length: int = flag(2048, "positions per sample after the image is expanded; longer ones are cut on the right")
    epochs: float = flag(1.0, "passes over the data")
    max_steps: int = flag(0, "stop after so many steps; 0: what the epochs give")
    lora_r: int = flag(0, "rank of low-rank adapters in the language model, which is then frozen itself; 0: none")
    lora_alpha: float = flag(16.0, "adapters are scaled by lora_alpha / lora_r; merged into the weights when the model is saved")
    lr: float = flag(1e-3, "peak learning rate")
    projector_lr: float = flag(0.0, "the projector's own peak learning rate; 0: as --lr")
    vision_lr: float = flag(0.0, "the tower's own peak learning rate; 0: as --lr")
    warmup: float = flag(0.03, "share of the steps over which the rate rises from 0")
    schedule: str = flag("cosine", "how it falls to 0 afterwards: cosine or linear")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.98, "AdamW")
    eps: float = flag(1e-7, "AdamW")
    weight_decay: float = flag(0.0, "AdamW; biases and LayerNorms are never decayed")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dropout: float = flag(-1.0, "residual dropout of the language model; -1: as its config.json says")
    dtype: str = flag("bfloat16", "compute: bfloat16 or float32; master weights and sums are always fp32")
    recompute: str = flag("none", "in the backward pass: none (fastest), selective (half the memory, 3 %% more work), full (least "
                                  "memory, 22 %% more)")
    seed: int = flag(42, "data order, dropout and a new projector")
    workers: int = flag(4, "data processes per training process")
    group: str = flag("none", "order within an epoch: none (random) or modality_length (as LLaVA groups its batches)")
    on_bad_sample: str = flag("stop", "stop, or skip: count it, list it in out/bad_samples.jsonl, give up above 0.1 %%")
    val_every: int = flag(0, "steps between validations; 0: before and after only")
    save_every: int = flag(0, "steps between checkpoints; 0: only when interrupted, and at the end")
    keep: int = flag(2, "checkpoints kept")
    stop_after: int = flag(0, "save and leave after this step, as if interrupted; 0: no")
    resume: str = flag("auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint folder")


STAGES: dict[str, dict] = {
    "pretrain": dict(llm="checkpoints/phi-2", vision="checkpoints/clip-vit-large-patch14-336",
                     data="data/pretrain/blip_laion_cc_sbu_558k.json", images="data/pretrain/images", out="out/pretrain"),
    "finetune": dict(model="out/pretrain", data="data/finetune/llava_v1_5_mix665k.json", images="data/finetune",
                     out="out/finetune", train="projector,llm,vision", template="v0", image_mode="pad",
                     global_batch=128, lr=2e-5, group="modality_length"),
}
HARMLESS = {"out", "val_data", "val_every", "save_every", "keep", "resume", "workers", "micro_tokens", "recompute",
            "stop_after", "data", "images"}     # fields that may differ between a checkpoint and the run that goes on from it


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, dict]:
    """-> the settings of a run, and what is asked for instead of training (plot, plan)."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", default="pretrain")
    stage = first.parse_known_args(argv)[0].stage
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"Defaults shown are those of --stage {stage}.", allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        default = STAGES.get(stage, {}).get(f.name, f.default)
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        choices = {"stage": list(STAGES), "dtype": [*DTYPES, "float16"], "template": ["plain", "v0"], "image_mode": ["crop", "pad"],
                   "recompute": ["none", "selective", "full"], "schedule": ["cosine", "linear"], "group": ["none", "modality_length"], "on_bad_sample": ["stop", "skip"]}
        if f.name in choices:
            kind["choices"] = choices[f.name]
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=default, help=f"{f.metadata['help']} (default: {default!r})", **kind)
    parser.add_argument("--plot", nargs="+", type=Path, metavar="OUT", help="no training: draw these runs' curves into loss.html")
    parser.add_argument("--plan", action="store_true", help="no training, no weights: print memory, speed and traffic to expect")
    parser.add_argument("--gpus", type=int, default=8, help="for --plan (default: 8)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="for --plan, GB each (default: 80)")
    args = vars(parser.parse_args(argv))
    action = {name: args.pop(name) for name in ("plot", "plan", "gpus", "gpu_memory")}
    cfg = TrainConfig(**args)
    if cfg.dtype == "float16":
        raise ValueError("--dtype float16: Phi-2's attention scores overflow in fp16 and give NaN; use bfloat16 or float32")
    return cfg, action


def lr_at(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): linear from 0 over the warm-up, then to 0, as Hugging Face's schedules do."""
    if step < warmup:
        return step / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return max(0.0, left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))

# ---------------------------------------------------------------------------------------------------
# Processes, model, optimizer


def setup() -> tuple[DeviceMesh, torch.device]:
    """Join torchrun's group, or make a group of one. More than one node: shard within a node, replicate across nodes."""
    cuda, timeout = torch.cuda.is_available(), timedelta(minutes=10)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > local:
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard")), device
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",)), device


def set_trainable(model: LLaVAPhi, names: str, frozen: str) -> None:
    """Freeze everything but the named parts and say what is left to learn. ValueError for a name that is no part."""
    wanted, frozen = ([name.strip() for name in text.split(",") if name.strip()] for text in (names, frozen))
    for name in wanted + frozen:
        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of the model; the parts are {', '.join(PARTS)}")
    train = [name for name in wanted if name not in frozen]
    adapters = [p for name, p in model.llm.named_parameters() if ".lora_" in name]
    if adapters:
        train = [name for name in train if name != "llm"]
    if not train and not adapters:
        raise ValueError("nothing would be trained: --train minus --freeze is empty")
    for name in PARTS:
        getattr(model, name).requires_grad_(name in train)
        log0(f"{name:10s} {sum(p.numel() for p in getattr(model, name).parameters()):>13,} parameters, "
             + ("trained" if name in train else "frozen"))
    for p in adapters:
        p.requires_grad_(True)
    if adapters:
        log0(f"{'adapters':10s} {sum(p.numel() for p in adapters):>13,} parameters, trained")


def shard(model: LLaVAPhi, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 from outside: a unit per decoder block, one for the tower; projector, embeddings and head in the root.

    Frozen parts are held whole in the compute dtype on every process: gathering them again and again would buy nothing.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # rotary angles stay fp32
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(dtype)
    if model.llm.wte.weight.requires_grad:
        for block in model.llm.h:
            fully_shard(block, mesh=mesh, mp_policy=inner)
    if model.vision.cls.requires_grad:
        fully_shard(model.vision, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=False)


def local_copy(parameter: Tensor, tensor: Tensor) -> None:
    """Put a whole tensor into a parameter, or this process's share of it into a sharded one."""
    if isinstance(parameter, DTensor):
        dim = next((i for i, p in enumerate(parameter.placements) if p.is_shard()), None)
        if dim is not None:
            chunks = tensor.chunk(parameter.device_mesh.size(dim))
            rank = parameter.device_mesh.get_local_rank(dim)
            tensor = chunks[rank] if rank < len(chunks) else tensor[:0]
        parameter = parameter.to_local()
    parameter.data.copy_(tensor)


def build(cfg: TrainConfig, config: LLaVAConfig, mesh: DeviceMesh, device: torch.device) -> LLaVAPhi:
    """Meta -> shard -> empty -> stream the weights in: no process ever holds more than its share plus one tensor."""
    with torch.device("meta"):
        model = LLaVAPhi(config)
        if cfg.lora_r:
            apply_lora(model.llm, cfg.lora_r, cfg.lora_alpha)
    set_trainable(model, cfg.train, cfg.freeze)
    shard(model, mesh, DTYPES[cfg.dtype])
    model.to_empty(device=device)
    model.llm.recompute, model.vision.recompute = cfg.recompute, cfg.recompute != "none"
    load_into(model, folders(cfg), copy=local_copy, allow_missing=() if cfg.model else ("projector.",))
    draw = torch.Generator().manual_seed(cfg.seed)          # what is new is drawn whole, then shared out: the same for any number
    if not cfg.model:                                       # of processes
        fresh = Projector(config.vision.n_embd, config.llm.n_embd)
        init_weights(fresh, draw)
        for parameter, value in zip(model.projector.parameters(), fresh.parameters()):
            local_copy(parameter, value.data)
    for name, parameter in model.llm.named_parameters():
        if ".lora_" in name:
            local_copy(parameter, torch.randn(parameter.shape, generator=draw) / parameter.size(1) ** 0.5
                       if name.endswith("lora_a") else torch.zeros(parameter.shape))
    return model.train()


def folders(cfg: TrainConfig) -> list[Path]:
    return [Path(cfg.model)] if cfg.model else [Path(cfg.llm), Path(cfg.vision)]


def make_optimizer(model: LLaVAPhi, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group per part and kind: matrices decay, biases and LayerNorms do not; a part may have its own rate."""
    rates = {"projector": cfg.projector_lr or cfg.lr, "vision": cfg.vision_lr or cfg.lr, "llm": cfg.lr}
    groups = []
    for part, rate in rates.items():
        params = [p for p in getattr(model, part).parameters() if p.requires_grad]
        for decay, chosen in ((cfg.weight_decay, [p for p in params if p.dim() > 1]), (0.0, [p for p in params if p.dim() <= 1])):
            if chosen:
                groups.append(dict(params=chosen, peak_lr=rate, lr=rate, weight_decay=decay))
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

# ---------------------------------------------------------------------------------------------------
# Checkpoints: out/step_NNNNNN, complete or absent. Only what trains is in it, in safetensors files, one per process.


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes, under flat names. The optimizer's moments are made (as zeros) if it has none yet."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = optimizer.state[p]
            if not state:
                device = p.to_local().device if isinstance(p, DTensor) else p.device
                state.update(step=torch.zeros((), device=device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            tensors |= {f"model.{name}": p.data, f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    return tensors


def save_checkpoint(out: Path, step: int, updates: int, cfg: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer,
                    data_checksum: str) -> Path:
    """Write `out/step_NNNNNN` under another name, make it durable, rename it into place, drop the oldest beyond --keep.

    OSError on every process, with nothing left behind, when any of them cannot write.
    """
    final, temporary = out / f"step_{step:06d}", out / f".writing_step_{step:06d}"
    tensors = checkpoint_tensors(model, optimizer)

    def begin() -> None:
        need, free = sum(t.numel() * t.element_size() for t in tensors.values()), shutil.disk_usage(out).free
        if free < 1.02 * need:
            raise OSError(f"it needs {need / 1e9:.1f} GB and {out} has {free / 1e9:.1f} GB free")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def commit() -> None:
        manifest = dict(step=step, updates=updates, data=data_checksum, files={f.name: f.stat().st_size for f in temporary.iterdir()},
                        config=dataclasses.asdict(cfg), sources=[str(folder) for folder in folders(cfg)], torch=torch.__version__)
        write_durably(temporary / "checkpoint.json", json.dumps(manifest, indent=2))
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(out)
        for old in sorted(out.glob("step_*"))[:-cfg.keep]:
            shutil.rmtree(old)

    try:
        on_process_0(begin)
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        on_process_0(commit)
    except (OSError, CheckpointException) as e:             # dcp, too, fails on all processes when it fails on one
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} not written: {e}") from None
    return final


def try_to_save(cfg: TrainConfig, done: int, updates: int, model: nn.Module, optimizer: torch.optim.Optimizer, data_checksum: str,
                failed: int) -> int:
    """Save; a full disk does not end the run, the third failure in a row does. -> failures in a row."""
    try:
        path = save_checkpoint(Path(cfg.out), done, updates, cfg, model, optimizer, data_checksum)
    except OSError as e:
        if failed == 2:
            raise
        log0(f"warning: {e}; training goes on with the checkpoint before it")
        return failed + 1
    log0(f"saved {path}")
    return 0


def agree(value):
    """Process 0's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_process_0(work: Callable[[], None]) -> None:
    """Do it there while the others wait; what goes wrong is raised on every process, so that none waits for ever."""
    problem = None
    if dist.get_rank() == 0:
        try:
            work()
        except (OSError, ValueError) as e:
            problem = e
    problem = agree(problem)
    if problem:
        raise problem


def write_durably(path: Path, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def problem_with(checkpoint: Path) -> str:
    """Why this folder is not a complete checkpoint, or "" if it is one."""
    try:
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
        for name, size in manifest["files"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes, checkpoint.json says {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"checkpoint.json cannot be read ({type(e).__name__})"
    return ""


def find_checkpoint(cfg: TrainConfig) -> Path | None:
    """The newest complete checkpoint under --out (or the one that --resume names); names every one it passes over."""
    if cfg.resume == "never":
        return None
    candidates = sorted(Path(cfg.out).glob("step_*"), reverse=True) if cfg.resume == "auto" else [Path(cfg.resume)]
    for path in candidates:
        problem = problem_with(path)
        if not problem:
            return path
        if cfg.resume != "auto":
            raise ValueError(f"--resume {path}: not a complete checkpoint: {problem}")
        log0(f"passing over {path}: {problem}")
    return None


def load_checkpoint(path: Path, cfg: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, data_checksum: str) -> tuple[int, int]:
    """Restore weights and moments, whatever number of processes wrote them. -> (steps done, updates made).

    ValueError lists every setting that changes the maths and differs from the one the checkpoint was made with.
    """
    manifest = json.loads((path / "checkpoint.json").read_text())
    now = dataclasses.asdict(cfg) | {"data checksum": data_checksum}
    then = manifest["config"] | {"data checksum": manifest["data"]}
    differ = [f"{k}: {then.get(k)!r} in the checkpoint, {v!r} now" for k, v in now.items() if k not in HARMLESS and then.get(k) != v]
    if differ:
        raise ValueError(f"{path} was made with other settings; give the same ones, or --resume never and another --out:\n  "
                         + "\n  ".join(differ))
    dcp.load(checkpoint_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(path)))
    for state in optimizer.state.values():
        state["step"].fill_(manifest["updates"])
    return manifest["step"], manifest["updates"]


def save_final(cfg: TrainConfig, config: LLaVAConfig, model: LLaVAPhi) -> None:
    """The model at the top of --out, in the saved format. Every process takes part in gathering; process 0 writes."""
    tensors = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if dist.get_rank() == 0:
            tensors[name] = whole.detach().to("cpu", DTYPES[cfg.dtype])
    if dist.get_rank() == 0:
        save_model(Path(cfg.out), merge_lora(tensors, cfg.lora_alpha), config, folders(cfg))
    dist.barrier()

# ---------------------------------------------------------------------------------------------------
# What is printed and logged


def log0(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def step_flops(config: LLaVAConfig, train: list[str], tokens: float, squares: float, images: float, rows: float) -> float:
    """Floating-point operations that one step's maths needs (recomputation not counted), 2 per multiply-add.

    `squares`: sum over sequences of length ** 2; attention is causal, so half of it counts. `rows`: supervised positions.
    """
    llm, vision = config.llm, config.vision
    S, C, D = vision.n_patches + 1, llm.n_embd, vision.n_embd
    dense = tokens * 2 * llm.n_layer * (4 * C * C + 2 * C * llm.n_inner) + rows * 2 * C * llm.vocab_size
    attention = squares * 2 * llm.n_layer * C
    tower = images * (vision.n_used * (2 * S * (4 * D * D + 2 * D * vision.n_inner) + 4 * S * S * D)
                      + 2 * vision.n_patches * D * 3 * vision.patch_size ** 2)
    projector = images * 2 * vision.n_patches * (D * C + C * C)
    learns = {part: 2 if part in train else 1 for part in PARTS}        # gradient of the input, and of the weights
    return (dense * (1 + learns["llm"]) + attention * 3 + projector * (1 + learns["projector"])
            + tower * (3 if "vision" in train else 1))


TOKENS = {"pretrain": (597, 21), "finetune": (848, 132)}    # per sample: mean length, supervised, on the published data


def memory_plan(cfg: TrainConfig, config: LLaVAConfig, gpus: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Bytes on each GPU -> (what is always there, by kind; activations per token, by --recompute; per image with gradient).

    Counted from the shapes that forward keeps for backward, in bf16; a test holds the counts against a measured run.
    """
    llm, vision = config.llm, config.vision
    with torch.device("meta"):
        model = LLaVAPhi(config)
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}
    learns = [part for part in cfg.train.split(",") if part not in cfg.freeze.split(",")]
    trained = sum(sizes[part] for part in learns)
    block = sum(p.numel() for p in model.llm.h[0].parameters())
    root = sizes["llm"] - block * llm.n_layer if "llm" in learns else 0
    always = {
        "frozen weights, bf16, whole": 2 * (sum(sizes.values()) - trained),
        "master weights and moments, fp32, shared out": 12 * trained / min(gpus, 8),
        "gradients, fp32, shared out": 4 * trained / min(gpus, 8),
        "gathered for use, bf16 and fp32": 2 * (root + sizes["projector"]) + ("llm" in learns) * 12 * block
                                           + ("vision" in learns) * 6 * sizes["vision"],
        "logits, fp32": 12 * 4096 * llm.vocab_size,
        "workspace": 2e9,
    }
    wide = 9 * llm.n_embd + 2 * llm.n_inner if "llm" in learns else 7 * llm.n_embd + llm.n_inner
    per_token = {"none": wide, "selective": 5 * llm.n_embd + llm.n_inner, "full": llm.n_embd}
    per_image = (vision.n_patches + 1) * vision.n_used * (12 * vision.n_embd + 2 * vision.n_inner) * 2 if "vision" in learns else 0
    return always, {mode: 2 * n * llm.n_layer for mode, n in per_token.items()}, per_image


def print_plan(cfg: TrainConfig, config: LLaVAConfig, gpus: int, gpu_memory: float, share: float = 0.5) -> None:
    """`--plan`: what a run needs and how long it takes at `share` of the peak of an H100, on these GPUs and on 1 to 512."""
    length, supervised = TOKENS[cfg.stage]
    always, per_token, per_image = memory_plan(cfg, config, gpus)
    free = gpu_memory * 1e9 - sum(always.values())
    print(f"stage {cfg.stage} on {gpus} x {gpu_memory:.0f} GB, samples of {length} tokens with one image and {supervised} supervised tokens\n")
    for kind, size in always.items():
        print(f"  {kind:48s} {size / 1e9:6.1f} GB")
    choice = None
    for mode, size in per_token.items():
        images = per_image * (0.05 if mode != "none" else 1) / length
        tokens = max(0, min(24576, int(free / (size + images)) // 1024 * 1024))
        print(f"  --recompute {mode:10s} {size / 2 ** 20:5.2f} MiB per token: --micro-tokens {tokens}" + ("" if tokens else " (does not fit)"))
        if choice is None and tokens >= min(8192, cfg.global_batch * length // gpus):
            choice = mode, tokens
    print("\nbest: " + ("--recompute {} --micro-tokens {}".format(*choice) if choice else "does not fit; use more GPUs, --lora-r 64 or --freeze"))
    n, steps = cfg.global_batch, math.ceil({"pretrain": 558128, "finetune": 665298}[cfg.stage] / cfg.global_batch)
    learns = [part for part in cfg.train.split(",") if part not in cfg.freeze.split(",")]
    flops = step_flops(config, learns, n * length, n * length ** 2, n, n * supervised)
    print(f"one step: {flops / 1e15:.2f} PFLOP; {steps:,} steps of {n} samples for the published data\n\n  GPUs   hours   GB moved per GPU and step")
    with torch.device("meta"):
        trained = sum(sum(p.numel() for p in getattr(LLaVAPhi(config), part).parameters()) for part in learns)
    for g in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        traffic = 0 if g == 1 else trained * (2 * 2 + 4) * (min(g, 8) - 1) / min(g, 8) + (g > 8) * 2 * 4 * trained / 8
        print(f"  {g:4d} {flops * steps / g / share / 989e12 / 3600:7.2f} {traffic / 1e9:9.1f}")
    print(f"\nhours at {share:.0%} of 989 TFLOP/s (dense bf16 of an H100 or H200); beyond {n} GPUs there are fewer samples than GPUs in a step")


def memory_gb(device: torch.device) -> float:
    """Peak so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of one GPU's datasheet peak (dense bf16); None where no peak is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops_per_second / peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Metrics:
    """out/metrics.jsonl: one object per step, appended by process 0. Going on from step k keeps the k lines before it."""
    def __init__(self, out: Path, done: int):
        self.path = out / "metrics.jsonl"
        if dist.get_rank() != 0:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() and done else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] < done + (1 if "val_loss" in json.loads(line) else 0):
                    kept.append(line + "\n")
            except (ValueError, KeyError):                  # a line cut short when the run was killed
                break
        temporary = self.path.with_suffix(".new")
        write_durably(temporary, "".join(kept))
        temporary.replace(self.path)

    def add(self, record: dict, path: Path | None = None) -> None:
        if dist.get_rank() == 0:
            with open(path or self.path, "a") as f:
                f.write(json.dumps(record) + "\n")

    def note_skipped(self, step: Step) -> None:
        self.add(dict(step=step.step, sample_ids=step.sample_ids), self.path.with_name("skipped_steps.jsonl"))


def progress_line(r: dict, steps: int, left: float) -> str:
    mfu = f" | mfu {100 * r['mfu']:.1f} %" if r["mfu"] else ""
    return (f"step {r['step'] + 1}/{steps} | loss {r['loss']:.4f} | norm {r['grad_norm']:.3f} | lr {r['lr']:.2e} | {1000 * r['seconds']:.0f} ms"
            f" | {r['tokens_per_second']:,.0f} tok/s{mfu} | {r['memory_gb']:.1f} GB | {left / 60:.1f} min left"
            + (" | SKIPPED: not finite" if r["skipped"] else ""))


def plot(runs: list[Path], to: Path) -> None:
    """`--plot OUT...`: the loss curves of one or several runs in one self-contained page."""
    curves = {}
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[str(run)] = [(r["step"] + 1, r["loss"]) for r in lines if "loss" in r and not r["skipped"]]
    page = ("<!doctype html><meta charset=utf-8><title>loss</title><style>body{font:15px sans-serif;max-width:860px;margin:2em auto}"
            f"</style><h1>Training loss</h1>{loss_svg(curves)}")
    to.write_text(page)
    print(f"wrote {to}")


def loss_svg(curves: dict[str, list[tuple[int, float]]], width: int = 800, height: int = 360) -> str:
    """Curves of (step, loss) as inline SVG: each thin as measured and thick as a running mean, on common axes."""
    colours = ["#1f6fb2", "#c8501e", "#2f8f4e", "#8a4fa3", "#7a6a00"]
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return "<p>no steps yet</p>"
    right, top = max(x for x, _ in points), max(y for _, y in points)
    place = lambda x, y: f"{50 + (width - 60) * x / right:.1f},{height - 30 - (height - 45) * y / top:.1f}"
    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" font-size="12" font-family="sans-serif">']
    for i in range(5):
        x, y = right * i / 4, top * i / 4
        (px, _), (_, py) = place(x, 0).split(","), place(0, y).split(",")
        parts.append(f'<line x1="50" x2="{width - 10}" y1="{py}" y2="{py}" stroke="#ddd"/><text x="6" y="{py}">{y:.2f}</text>'
                     f'<text x="{px}" y="{height - 8}" text-anchor="middle">{x:.0f}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour, window = colours[i % len(colours)], max(1, len(curve) // 50)
        losses = np.array([y for _, y in curve])
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        smooth = [(x, y) for (x, _), y in zip(curve[window - 1:], mean)]
        for line, style in ((curve, 'stroke-width="1" opacity="0.3"'), (smooth, 'stroke-width="2"')):
            parts.append(f'<polyline fill="none" stroke="{colour}" {style} points="{" ".join(place(*p) for p in line)}"/>')
        parts.append(f'<text x="{width - 12}" y="{22 + 16 * i}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def watch_signals() -> list:
    """A list that fills when SIGTERM, SIGUSR1 or Ctrl-C asks to stop; a second Ctrl-C leaves at once."""
    asked: list[int] = []

    def note(number, frame):
        if asked and number == signal.SIGINT:
            os._exit(130)
        asked.append(number)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)
    return asked

# ---------------------------------------------------------------------------------------------------
# The step


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """In the order of LLaVAPhi.forward; lengths stay on the CPU, where the attention layout is made."""
    ids, images, slots, rows, targets = (x.to(device, non_blocking=True) for x in
                                         (batch.ids, batch.images, batch.slots, batch.rows, batch.targets))
    return ids, batch.lengths, images, slots, rows, targets


def count(batches: list[Batch], device: torch.device) -> list[float]:
    """Over all processes: supervised tokens, tokens, images, sum of squared lengths."""
    mine = [[len(b.targets), len(b.ids), len(b.images), int((b.lengths ** 2).sum())] for b in batches]
    total = torch.tensor(mine, dtype=torch.float64, device=device).sum(0)
    dist.all_reduce(total)
    return total.tolist()


def train_step(model: LLaVAPhi, optimizer: torch.optim.Optimizer, step: Step, cfg: TrainConfig, n_supervised: float, rate: float,
               device: torch.device, stop: bool) -> tuple[float, float, bool, bool]:
    """Forward, backward, update. -> loss, gradient norm, skipped, stop: the same four on every process.

    The loss is the mean over the step's supervised tokens, all micro-batches and processes together, not a mean of means.
    A loss or gradient that is not finite anywhere leaves the weights as they are everywhere.
    """
    world, rank, total = dist.get_world_size(), dist.get_rank(), torch.zeros((), device=device)
    for i, batch in enumerate(step.batches):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step.step, rank, i]).generate_state(1)[0]))    # dropout
        loss = model(*to_device(batch, device)) / max(n_supervised, 1)
        (loss * world).backward()                           # FSDP takes the mean over processes, and we want the sum
        total += loss.detach()
    sums = torch.stack([total, torch.tensor(float(stop), device=device)])
    dist.all_reduce(sums)
    params = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss, stop, norm = torch.cat([sums, norm[None].to(sums)]).tolist()      # the step's one wait for the device
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if not skipped:
        if cfg.grad_clip > 0 and norm > cfg.grad_clip:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], cfg.grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, skipped, stop > 0


@torch.no_grad()
def validate(model: LLaVAPhi, loader: Loader, device: torch.device) -> float:
    """Mean loss over every supervised token of the validation set, without dropout. All processes take part."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for step in loader:
        for batch in step.batches:
            sums += torch.stack([model(*to_device(batch, device)).double(), torch.tensor(len(batch.targets), device=device)])
    dist.all_reduce(sums)
    model.train()
    return float(sums[0] / sums[1])

# ---------------------------------------------------------------------------------------------------


def open_data(cfg: TrainConfig, config: LLaVAConfig, path: str) -> Dataset:
    return Dataset(Path(path), Path(cfg.images), load_tokenizer(folders(cfg)[0]), cfg.template, config.vision.image_size,
                   cfg.image_mode, config.vision.n_patches, min(cfg.max_length, config.llm.block_size),
                   on_bad_sample=cfg.on_bad_sample, cache_dir=Path(cfg.out))


def prepare_out(cfg: TrainConfig) -> Path | None:
    """Make --out ready; -> the checkpoint to go on from. A folder that holds something else is refused, not mixed into."""
    out = Path(cfg.out)
    checkpoint = agree(find_checkpoint(cfg) if dist.get_rank() == 0 else None)

    def prepare() -> None:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / "config.json").exists():
            raise ValueError(f"--out {out} holds files that are not a training run's; choose an empty or a new folder")
        for old in [*out.glob(".writing_*"), *([] if checkpoint else [*out.glob("step_*"), *out.glob("*.safetensors*")])]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_durably(out / "config.json", json.dumps({"training": dataclasses.asdict(cfg)}, indent=2) + "\n")
    on_process_0(prepare)
    return checkpoint


def finished(cfg: TrainConfig) -> bool:
    """True if --out holds the model of a finished run with these settings; ValueError if its settings were others."""
    path = Path(cfg.out) / "config.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if cfg.resume != "auto" or "model_type" not in saved:
        return False
    then, now = saved.get("training", {}), dataclasses.asdict(cfg)
    differ = [f"{k}: {then.get(k)!r} then, {v!r} now" for k, v in now.items() if k not in HARMLESS and then.get(k) != v]
    if differ:
        raise ValueError(f"--out {cfg.out} holds a finished model made with other settings; choose another --out, "
                         "or --resume never to train afresh over it:\n  " + "\n  ".join(differ))
    return True


def run(cfg: TrainConfig, config: LLaVAConfig, mesh: DeviceMesh, device: torch.device) -> None:
    """Set-up, then the loop. Everything that takes part in a collective does so on every process, in this order."""
    out, world, rank = Path(cfg.out), dist.get_world_size(), dist.get_rank()
    if finished(cfg):
        return log0(f"already finished: {out} holds the trained model (--resume never trains afresh)")
    asked = watch_signals()
    dataset = open_data(cfg, config, cfg.data)
    held_out = open_data(cfg, config, cfg.val_data) if cfg.val_data else None
    checkpoint = prepare_out(cfg)
    log0(f"{world} process{'es' * (world > 1)} on {device.type}, compute in {cfg.dtype}, torch {torch.__version__}")
    model = build(cfg, config, mesh, device)
    optimizer = make_optimizer(model, cfg)
    start, updates = load_checkpoint(checkpoint, cfg, model, optimizer, dataset.checksum) if checkpoint else (0, 0)
    steps = math.ceil(cfg.epochs * steps_per_epoch(len(dataset), cfg.global_batch))
    steps = min(steps, cfg.max_steps or steps)
    warmup = math.ceil(cfg.warmup * steps)
    log0(f"{len(dataset):,} samples, {cfg.global_batch} per step: {steps:,} steps, the first {warmup:,} warming up"
         + (f"; going on from {checkpoint}" if checkpoint else ""))
    metrics = Metrics(out, start)

    def loader(data: Dataset, steps: int, **more) -> Loader:
        return Loader(data, global_batch=cfg.global_batch, micro_tokens=cfg.micro_tokens, rank=rank, world=world, seed=cfg.seed,
                      steps=steps, workers=cfg.workers, pin=device.type == "cuda", **more)

    def measure(done: int) -> None:
        if held_out:
            loss = validate(model, loader(held_out, steps_per_epoch(len(held_out), cfg.global_batch)), device)
            metrics.add(dict(step=done, val_loss=loss))
            log0(f"step {done}/{steps} | validation loss {loss:.4f}")

    if start == 0:
        measure(0)
    parts = [part for part in PARTS if next(getattr(model, part).parameters()).requires_grad]
    began = last = time.perf_counter()
    bad_in_a_row = failed_saves = 0
    # ---- set-up ends here, training begins
    for step in loader(dataset, steps, start_step=start, group=cfg.group):
        supervised, tokens, images, squares = count(step.batches, device)
        rate = lr_at(step.step, steps, warmup, cfg.schedule)
        loss, norm, skipped, stop = train_step(model, optimizer, step, cfg, supervised, rate, device, bool(asked))
        done, updates = step.step + 1, updates + (not skipped)
        now = time.perf_counter()
        seconds, last = now - last, now
        flops = step_flops(config, parts, tokens, squares, images, supervised)
        record = dict(step=step.step, loss=loss, lr=rate * cfg.lr, grad_norm=norm, samples=len(step.sample_ids),
                      supervised_tokens=int(supervised), tokens=int(tokens), images=int(images), seconds=seconds,
                      tokens_per_second=tokens / seconds, mfu=mfu(flops / seconds / world, device), memory_gb=memory_gb(device),
                      skipped=skipped)
        metrics.add(record)
        log0(progress_line(record, steps, (now - began) / (done - start) * (steps - done)))
        bad_in_a_row = bad_in_a_row + 1 if skipped else 0
        if skipped:
            metrics.note_skipped(step)
        if bad_in_a_row == 5:
            raise ValueError(f"loss or gradient was not finite in 5 steps in a row, the last with samples {step.sample_ids[:8]}; "
                             f"their ids are in {out}/skipped_steps.jsonl. Look at those samples, or lower --lr")
        if cfg.val_every and done % cfg.val_every == 0 and done < steps:
            measure(done)
        stop = stop or done == cfg.stop_after
        if done < steps and (stop or cfg.save_every and done % cfg.save_every == 0):
            failed_saves = try_to_save(cfg, done, updates, model, optimizer, dataset.checksum, failed_saves)
        if stop and done < steps:
            return log0(f"stopped after step {done}; the same command goes on from there")
    measure(steps)
    save_final(cfg, config, model)
    log0(f"done in {(time.perf_counter() - began) / 60:.1f} min: {out}")


def main(argv: list[str] | None = None) -> None:
    cfg, action = parse_args(argv)
    if action["plot"]:
        return plot(action["plot"], action["plot"][0] / "loss.html")
    if action["plan"]:
        known = all(folder.is_dir() for folder in folders(cfg))
        return print_plan(cfg, load_config(*folders(cfg)) if known else LLaVAConfig(), action["gpus"], action["gpu_memory"])
    config = load_config(*folders(cfg))
    dropout = config.llm.dropout if cfg.dropout < 0 else cfg.dropout
    config = dataclasses.replace(config, image_mode=cfg.image_mode, llm=dataclasses.replace(config.llm, dropout=dropout))
    mesh, device = setup()
    try:
        run(cfg, config, mesh, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
