"""Train LLaVA-Phi, all stages of the published recipe. One path from a laptop's CPU to many nodes.

There is always a process group and a mesh, of one process if need be; FSDP2 shards what trains and leaves alone what
is frozen. A step is a set of samples: its loss is the mean over all supervised tokens of its global batch, so neither
the number of processes nor the size of a micro-batch changes what is learned.

$ torchrun --nproc_per_node=8 train.py --stage sft             # optional: Phi-2 alone, on text conversations
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
from collections.abc import Callable, Iterator, Sequence
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
from load_weights import check, config_of, load_config, load_into, read_all, read_folder, save_model, save_phi
from model import LLaVAConfig, LLaVAPhi, Phi, Projector, apply_lora, init_weights, merge_lora

PHI = "a Phi-2 language model"       # what load_weights calls such a folder
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}    # dense bf16, datasheets

# ---------------------------------------------------------------------------------------------------
# Configuration: one flag per field, a row of values per stage


def flag(default, help: str, *choices: str):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class TrainConfig:
    stage: str = flag("pretrain", "which row of recipe values", "pretrain", "finetune", "sft")
    model: str = flag("", "folder to start from; empty: --llm and --vision with a new projector")
    llm: str = flag("", "Phi-2 folder (pretrain, sft)")
    vision: str = flag("", "CLIP folder (pretrain)")
    data: str = flag("", "LLaVA json or jsonl")
    images: str = flag("", "folder that image paths in the data start from")
    follow_links: bool = flag(False, "let links in that folder lead out of it")
    val_data: str = flag("", "a second json, whose loss is measured before, during (--val-every) and after training")
    out: str = flag("", "folder for metrics, checkpoints and the final model")
    train: str = flag("projector", "comma-separated parts that learn: projector, llm, vision")
    freeze: str = flag("", "comma-separated parts taken out of --train again")
    template: str = flag("plain", "prompt: plain (image, caption, newline) or v0 (chat)", "plain", "v0")
    image_mode: str = flag("crop", "pictures: crop the centre or pad to a square", "crop", "pad")
    global_batch: int = flag(256, "samples per optimizer step, over all processes")
    micro_tokens: int = flag(16384, "tokens per forward on one process: as many as its memory holds")
    max_length: int = flag(2048, "positions per sample after the image is expanded; longer ones are cut on the right")
    epochs: float = flag(1.0, "passes over the data")
    max_steps: int = flag(0, "stop after so many steps; 0: what the epochs give")
    lora_r: int = flag(0, "rank of low-rank adapters in the language model, which is then frozen itself; 0: none")
    lora_alpha: float = flag(16.0, "adapters are scaled by lora_alpha / lora_r, and merged when the model is saved")
    lora_on: str = flag("both", "which linear layers of each block get adapters", "both", "attn", "mlp")
    lr: float = flag(1e-3, "peak learning rate")
    projector_lr: float = flag(0.0, "the projector's own peak learning rate; 0: as --lr")
    vision_lr: float = flag(0.0, "the tower's own peak learning rate; 0: as --lr")
    warmup: float = flag(0.03, "share of the steps over which the rate rises from 0")
    schedule: str = flag("cosine", "how it falls to 0 afterwards", "cosine", "linear")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.98, "AdamW")
    eps: float = flag(1e-7, "AdamW")
    weight_decay: float = flag(0.0, "AdamW; biases and LayerNorms are never decayed")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dropout: float = flag(-1.0, "residual dropout of the language model; -1: as its config.json says")
    dtype: str = flag("bfloat16", "compute; master weights and sums are always fp32", "bfloat16", "float32", "float16")
    recompute: str = flag("auto", "in the backward pass: none (fastest), selective (half the memory, 3 %% more work), "
                                  "full (least memory, 22 %% more); auto: the first that fits",
                          "auto", "none", "selective", "full")
    compile: bool = flag(False, "compile each block: one graph for all lengths; it starts a minute later")
    seed: int = flag(42, "data order, dropout and a new projector")
    workers: int = flag(4, "data processes per training process")
    group: str = flag("none", "order within an epoch: none (random) or modality_length (as LLaVA groups its batches)",
                      "none", "modality_length")
    on_bad_sample: str = flag("stop", "stop, or skip: count it, list it in out/bad_samples.jsonl, give up above 0.1 %%",
                              "stop", "skip")
    log_every: int = flag(1, "steps between lines on the screen; metrics.jsonl has every step")
    val_every: int = flag(0, "steps between validations; 0: before and after only")
    save_every: int = flag(0, "steps between checkpoints; 0: only when interrupted")
    keep: int = flag(2, "checkpoints kept")
    stop_after: int = flag(0, "save and leave after this step, as if interrupted; 0: no")
    resume: str = flag("auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint folder")


STAGES: dict[str, dict] = {
    "pretrain": dict(llm="checkpoints/phi-2", vision="checkpoints/clip-vit-large-patch14-336", out="out/pretrain",
                     data="data/pretrain/blip_laion_cc_sbu_558k.json", images="data/pretrain/images"),
    "finetune": dict(model="out/pretrain", data="data/finetune/llava_v1_5_mix665k.json", images="data/finetune",
                     out="out/finetune", train="projector,llm,vision", template="v0", image_mode="pad",
                     global_batch=128, lr=2e-5, group="modality_length"),
    "sft": dict(llm="checkpoints/phi-2", data="data/sft/sharegpt.json", out="out/phi-2-sft", train="llm", template="v0",
                global_batch=128, epochs=2.0, lr=3e-5, schedule="linear"),
}
HARMLESS = {        # fields that may differ between a checkpoint and the run that goes on from it
    "out", "val_data", "val_every", "save_every", "keep", "resume", "workers", "micro_tokens", "recompute", "compile",
    "stop_after", "data", "images", "follow_links", "log_every",
}
LEAST = {"global_batch": 1, "micro_tokens": 1, "max_length": 1, "log_every": 1, "keep": 1, "gpus": 1, "gpu_memory": 1,
         "eps": 1e-30, "dropout": -1}                                   # others: 0
MOST = {"warmup": 1, "dropout": 0.99, "beta1": 0.9999, "beta2": 0.9999999, "seed": 2 ** 63 - 1}


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, dict]:
    """-> the settings of a run, and what is asked for instead of training (plot, plan)."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", default="pretrain")
    stage = first.parse_known_args(argv)[0].stage
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"Defaults shown are those of --stage {stage}.", allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        default = STAGES.get(stage, {}).get(f.name, f.default)
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else \
               {"type": f.type, "choices": f.metadata["choices"]}
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=default, help=f"{f.metadata['help']} (default: {default!r})", **kind)
    parser.error = lambda message: sys.exit(print(f"error: {message}", file=sys.stderr) or 2)       # without the usage
    parser.add_argument("--plot", nargs="+", type=Path, metavar="OUT",
                        help="no training: draw these runs' curves into loss.html")
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=False,
                        help="no training, no weights: print memory, speed and traffic to expect")
    parser.add_argument("--gpus", type=int, default=8, help="for --plan (default: 8)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="for --plan, GB each (default: 80)")
    args = vars(parser.parse_args(argv))
    for name, value in args.items():
        least, most = LEAST.get(name, 0), MOST.get(name, sys.float_info.max)
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more"
                             + f", {most} at most" * (name in MOST))
    action = {name: args.pop(name) for name in ("plot", "plan", "gpus", "gpu_memory")}
    cfg = TrainConfig(**args)
    for name in ("llm", "vision") if cfg.model else ():
        if getattr(cfg, name) != STAGES[stage].get(name, ""):
            raise ValueError(f"--{name} {getattr(cfg, name)}: --model {cfg.model} has one already; with --model '' a "
                             "new model is made from --llm and --vision")
    if cfg.dtype == "float16":
        raise ValueError("--dtype float16: Phi-2's attention scores overflow and give NaN; use bfloat16 or float32")
    if cfg.compile and cfg.recompute == "selective":
        raise ValueError("--compile does what --recompute selective does by itself; give --recompute none or full")
    if cfg.stage == "sft" and (cfg.model or cfg.vision):
        raise ValueError("--stage sft trains a language model alone: give --llm, and neither --model nor --vision")
    return cfg, action


def folders(cfg: TrainConfig) -> list[Path]:
    """What the run starts from."""
    found = [Path(folder) for folder in ([cfg.model] if cfg.model else [cfg.llm, cfg.vision]) if folder]
    if Path(cfg.out).resolve() in [folder.resolve() for folder in found]:
        raise ValueError(f"--out {cfg.out} is what the run starts from; choose another folder")
    return found


def read_config(cfg: TrainConfig) -> LLaVAConfig:
    """As the folders say, but for --image-mode and --dropout."""
    if cfg.stage == "sft":
        folder = read_folder(*folders(cfg), PHI)
        if folder.kind != PHI:
            raise ValueError(f"--llm {cfg.llm}: this looks like {folder.kind}, expected {PHI}")
        config = config_of(folder)
    else:
        config = load_config(*folders(cfg))
    dropout = config.llm.dropout if cfg.dropout < 0 else cfg.dropout
    return dataclasses.replace(config, image_mode=cfg.image_mode, llm=dataclasses.replace(config.llm, dropout=dropout))


def lr_at(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): up from 0 over the warm-up, then down to 0, as Hugging Face's do."""
    if step < warmup:
        return step / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return max(0.0, left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))

# ---------------------------------------------------------------------------------------------------
# Processes, model, optimizer


def setup() -> tuple[DeviceMesh, torch.device]:
    """Join torchrun's group, or make a group of one. Several nodes: shard within a node, replicate across nodes."""
    cuda, timeout = torch.cuda.is_available(), timedelta(minutes=10)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"      # what the CPUs agree on, the GPUs need not wait for
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > local:
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard")), device
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",)), device


class PhiAlone(LLaVAPhi):
    """--stage sft: the language model behind LLaVAPhi's door. Its data has no pictures, so it has no tower."""
    def __init__(self, config: LLaVAConfig):
        nn.Module.__init__(self)
        self.config, self.vision, self.projector, self.llm = config, None, None, Phi(config.llm)

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        return self.llm.wte(ids)


def skeleton(cfg: TrainConfig, config: LLaVAConfig) -> LLaVAPhi:
    """The model without memory, its parts frozen or not; says what will learn. ValueError: a name that is no part."""
    with torch.device("meta"):
        model = (PhiAlone if cfg.stage == "sft" else LLaVAPhi)(config)
        if cfg.lora_r:
            on = ("attn", "mlp") if cfg.lora_on == "both" else (cfg.lora_on,)
            apply_lora(model.llm, cfg.lora_r, cfg.lora_alpha, on)
    parts = dict(model.named_children())
    wanted, frozen = ([name.strip() for name in text.split(",") if name.strip()] for text in (cfg.train, cfg.freeze))
    for name in wanted + frozen:
        if name not in parts:
            raise ValueError(f"{name!r} is no part of the model; the parts are {', '.join(parts)}")
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    train = [name for name in wanted if name not in frozen and not (adapters and name == "llm")]
    if not train and not adapters:
        raise ValueError("nothing would be trained: --train minus --freeze is empty")
    for name, part in parts.items():
        part.requires_grad_(name in train)
        log0(f"{name:10s} {sum(p.numel() for p in part.parameters()):>13,} parameters, "
             + ("trained" if name in train else "frozen"))
    for p in adapters:
        p.requires_grad_(True)
    if adapters:
        log0(f"{'adapters':10s} {sum(p.numel() for p in adapters):>13,} of them, trained")
    return model


def learning(model: LLaVAPhi) -> list[str]:
    """The parts that are trained as a whole."""
    return [name for name, part in model.named_children() if next(part.parameters()).requires_grad]


def shard(model: LLaVAPhi, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 from outside: a unit per decoder block, one for the tower; projector, embeddings and head in the root.

    Frozen parts are held whole in the compute dtype on every process: gathering them again and again would buy nothing.
    A process by itself gathers by copying; it keeps the copy from the forward pass to the backward pass.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    inner = dataclasses.replace(policy, cast_forward_inputs=False)      # rotary angles stay fp32
    frozen, learn = {p for p in model.parameters() if not p.requires_grad}, learning(model)
    for p in frozen:
        p.data = p.data.to(dtype)
    if mesh.size() == 1 and dtype == torch.float32:         # nothing to share out, nothing to cast
        return
    units = [*(model.llm.h if "llm" in learn else []), *([model.vision] if "vision" in learn else [])]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=inner, reshard_after_forward=mesh.size() > 1)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=False)


def compile_blocks(model: LLaVAPhi, device: torch.device) -> None:
    """Inside what FSDP and recomputation wrap. On a CPU without attention: a loop over lengths that always change."""
    blocks = [*model.llm.h] if device.type == "cuda" else [block.mlp for block in model.llm.h]
    for block in blocks + ([*model.vision.h] if model.vision else []):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


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
    model = skeleton(cfg, config)
    recompute = cfg.recompute
    if recompute == "auto":
        recompute = choose_recompute(cfg, model, mesh.size(-1), memory_of(device))
    model.llm.recompute = recompute
    if model.vision:
        model.vision.recompute = recompute != "none"
    shard(model, mesh, DTYPES[cfg.dtype])
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    if cfg.stage == "sft":
        found = check([read_folder(Path(cfg.llm), PHI)], [name for name in parameters if ".lora_" not in name], config)
        for name, tensor in read_all(found, config):
            local_copy(parameters[name], tensor)
    else:
        load_into(model, folders(cfg), copy=local_copy, allow_missing=() if cfg.model else ("projector.",))
    draw = torch.Generator().manual_seed(cfg.seed)          # what is new is drawn whole, then shared out: the same for
    if model.projector and not cfg.model:                   # any number of processes
        fresh = Projector(config.vision.n_embd, config.llm.n_embd)
        init_weights(fresh, draw)
        for parameter, value in zip(model.projector.parameters(), fresh.parameters()):
            local_copy(parameter, value.data)
    for name, parameter in parameters.items():
        if name.endswith("lora_a"):
            local_copy(parameter, torch.randn(parameter.shape, generator=draw) / parameter.size(1) ** 0.5)
        elif name.endswith("lora_b"):
            local_copy(parameter, torch.zeros(parameter.shape))
    if cfg.compile:
        compile_blocks(model, device)
    log0(f"compute in {cfg.dtype}, recompute {recompute}" + ", compiled" * cfg.compile)
    return model.train()


def make_optimizer(model: LLaVAPhi, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, a group per part and kind: matrices decay, biases and LayerNorms do not; a part may have its own rate."""
    rates = {"projector": cfg.projector_lr or cfg.lr, "vision": cfg.vision_lr or cfg.lr, "llm": cfg.lr}
    groups = []
    for part, module in model.named_children():
        rate, params = rates[part], [p for p in module.parameters() if p.requires_grad]
        for decay, wide in ((cfg.weight_decay, True), (0.0, False)):
            if chosen := [p for p in params if (p.dim() > 1) == wide]:
                groups.append(dict(params=chosen, peak_lr=rate, lr=rate, weight_decay=decay))
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

# ---------------------------------------------------------------------------------------------------
# Checkpoints: out/step_NNNNNN, complete or absent. Only what trains is in it, in safetensors files, one per process.


@dataclass
class State:                        # what a checkpoint is made of
    cfg: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: str                       # checksum
    step: int = 0                   # steps done
    updates: int = 0                # of them, those that changed the weights
    failed_saves: int = 0           # in a row

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, under flat names. The optimizer's moments are made, as zeros, if it has none."""
        tensors = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                moments = self.optimizer.state[p]
                if not moments:
                    moments["step"] = torch.zeros((), device=p.device)
                    moments |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                tensors |= {f"{kind}.{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
                tensors[f"model.{name}"] = p.data
        return tensors


def save_checkpoint(state: State) -> Path:
    """Write `out/step_NNNNNN` under another name, make it durable, rename it into place, drop the oldest beyond --keep.

    OSError on every process, with nothing left behind, when any of them cannot write.
    """
    out, tensors = Path(state.cfg.out), state.tensors()
    final, temporary = out / f"step_{state.step:06d}", out / f".writing_step_{state.step:06d}"

    def begin() -> None:
        need, free = sum(t.numel() * t.element_size() for t in tensors.values()), shutil.disk_usage(out).free
        if free < 1.02 * need:
            raise OSError(f"it needs {need / 1e9:.1f} GB and {out} has {free / 1e9:.1f} GB free")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def commit() -> None:
        files = {f.name: f.stat().st_size for f in temporary.iterdir()}
        manifest = dict(step=state.step, updates=state.updates, data=state.data, files=files, torch=torch.__version__,
                        config=dataclasses.asdict(state.cfg), sources=[str(folder) for folder in folders(state.cfg)])
        write_durably(temporary / "checkpoint.json", json.dumps(manifest, indent=2))
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(out)
        steps = sorted(out.glob("step_*"))
        end = steps.index(final) + 1
        for old in steps[:max(0, end - state.cfg.keep)] + steps[end:]:      # later ones are there if --resume went back
            shutil.rmtree(old)

    try:
        on_process_0(begin)
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        on_process_0(commit)
    except (OSError, CheckpointException) as e:             # dcp, too, fails on all processes when it fails on one
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise OSError(f"checkpoint of step {state.step} not written: {cause}") from None
    return final


def try_to_save(state: State) -> None:
    """Save; a full disk does not end the run, the third failure in a row does."""
    try:
        path = save_checkpoint(state)
    except OSError as e:
        state.failed_saves += 1
        if state.failed_saves == 3:
            raise
        return log0(f"warning: {e}; training goes on with the checkpoint before it")
    state.failed_saves = 0
    log0(f"saved {path}")


def on_process_0(work: Callable):
    """Its result, on every process; or what went wrong, raised on every process, so that none waits for ever."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (OSError, ValueError) as e:
            box[1] = e
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise box[1]
    return box[0]


def write_durably(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    part = path.with_name(f".writing_{path.name}")
    with open(part, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


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
    """The newest complete checkpoint under --out (or the one that --resume names); says which it passes over.

    ValueError if there are some and none is complete: a new run would delete them.
    """
    if cfg.resume == "never":
        return None
    named = cfg.resume != "auto"
    candidates = [Path(cfg.resume)] if named else sorted(Path(cfg.out).glob("step_*"), reverse=True)
    for path in candidates:
        problem = problem_with(path)
        if not problem:
            return path
        log0(f"passing over {path}: {problem}")
    if candidates:
        raise ValueError(f"{candidates[0]}: not a complete checkpoint: {problem}"
                         + ("" if named else "; nor is any before it. --resume never deletes them and begins again"))
    return None


def check_same(then: dict, now: dict, harmless: set[str], problem: str) -> None:
    """ValueError with `problem` and every setting that changes the maths and differs."""
    differ = [f"{k}: {then.get(k)!r} then, {v!r} now" for k, v in now.items() if k not in harmless and then.get(k) != v]
    if differ:
        raise ValueError(problem + ":\n  " + "\n  ".join(differ))


def load_checkpoint(path: Path, state: State) -> None:
    """Restore weights, moments and step, whatever number of processes wrote them."""
    manifest = json.loads((path / "checkpoint.json").read_text())
    dcp.load(state.tensors(), storage_reader=HuggingFaceStorageReader(str(path)))
    state.step, state.updates = manifest["step"], manifest["updates"]
    for moments in state.optimizer.state.values():
        moments["step"].fill_(state.updates)


def save_final(cfg: TrainConfig, config: LLaVAConfig, model: LLaVAPhi) -> None:
    """The model at the top of --out, in the saved format. Every process takes part in gathering; process 0 writes."""
    tensors = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if dist.get_rank() == 0:
            tensors[name] = whole.detach().to("cpu", DTYPES[cfg.dtype])
    tensors = merge_lora(tensors, cfg.lora_alpha)
    on_process_0(lambda: save_phi(Path(cfg.out), tensors, config, Path(cfg.llm)) if cfg.stage == "sft" else
                 save_model(Path(cfg.out), tensors, config, folders(cfg)))

# ---------------------------------------------------------------------------------------------------
# What is printed and logged


def log0(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def step_flops(config: LLaVAConfig, learn: list[str], tokens: float, squares: float, images: float,
               rows: float) -> float:
    """Floating-point operations that one step's maths needs (recomputation not counted), 2 per multiply-add.

    squares: sum over sequences of length ** 2; attention is causal, so half of it counts. rows: supervised positions.
    """
    llm, vision = config.llm, config.vision
    S, C, D = vision.n_patches + 1, llm.n_embd, vision.n_embd
    dense = tokens * 2 * llm.n_layer * (4 * C * C + 2 * C * llm.n_inner) + rows * 2 * C * llm.vocab_size
    attention = squares * 2 * llm.n_layer * C
    tower = images * (vision.n_used * (2 * S * (4 * D * D + 2 * D * vision.n_inner) + 4 * S * S * D)
                      + 2 * vision.n_patches * D * 3 * vision.patch_size ** 2)
    projector = images * 2 * vision.n_patches * (D * C + C * C)
    return (dense * (3 if "llm" in learn else 2) + attention * 3        # backward: for the input, and for the weights
            + projector * (3 if "projector" in learn else 2) + tower * (3 if "vision" in learn else 1))


PUBLISHED = {       # samples, and per sample mean length and supervised tokens: estimates, data.py check measures them
    "pretrain": (558_128, 597, 21), "finetune": (665_298, 848, 132), "sft": (40_688, 1126, 800),
}


def memory_plan(cfg: TrainConfig, model: LLaVAPhi, shards: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes on each of `shards` GPUs -> (always there, by kind; added by a token of a micro-batch, by --recompute).

    Counted from what forward keeps for backward; a test holds the counts against measured ones. Any token may be a
    picture's, so each carries its share of the tower.
    """
    llm, vision, learn, width = model.config.llm, model.config.vision, learning(model), DTYPES[cfg.dtype].itemsize
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.llm.h[0].parameters()) * ("llm" in learn)
    tower = sum(p.numel() for p in model.vision.parameters()) if "vision" in learn else 0
    root = trained - tower - block * llm.n_layer
    always = {
        "frozen weights, whole": width * (total - trained),
        "weights, moments and gradients, fp32, shared out": 16 * trained / shards,
        "weights gathered for use": width * (trained if shards == 1 else root + tower + 2 * block),
        "gradients before they are shared out": (width + 4) * max(root, tower, block),
        "logits": 12 * min(4096, cfg.micro_tokens) * llm.vocab_size,
        "workspace": 1e9,
    }
    C, I, D, J = llm.n_embd, llm.n_inner, vision.n_embd, vision.n_inner
    masks = C if llm.dropout else 0                         # two, of a byte a number
    whole = masks + (9 * C + 2 * I if any(p.requires_grad for p in model.llm.parameters()) else 7 * C + I)
    kept = {"none": whole, "selective": 5 * C + I, "full": C}
    per_token = {}
    for mode, numbers in kept.items():
        again = 0 if mode == "none" else whole              # one block at a time
        patch = vision.n_used * (12 * D + 2 * J if mode == "none" else D) if "vision" in learn else 0
        per_token[mode] = width * (llm.n_layer * numbers + again + patch * (1 + 1 / vision.n_patches))
    return always, per_token


def choose_recompute(cfg: TrainConfig, model: LLaVAPhi, shards: int, memory: float) -> str:
    """The fastest --recompute with which a micro-batch fits into so many bytes; the leanest if none does."""
    always, per_token = memory_plan(cfg, model, shards)
    most = (memory - sum(always.values())) / cfg.micro_tokens
    fits = [mode for mode, size in per_token.items() if size <= most and not (cfg.compile and mode == "selective")]
    return [*fits, "full"][0]


def memory_of(device: torch.device) -> float:
    """Bytes that a process may fill."""
    if device.type == "cuda":
        return 0.95 * torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def plan_micro_batch(cfg: TrainConfig, model: LLaVAPhi, gpus: int, memory: float, share: int) -> dict[str, int]:
    """--micro-tokens by --recompute, the best first: what fits, not above a GPU's `share` of a step, in steps of 1024.

    Below 8192 tokens the matrix products are too small to be fast: better to recompute than to take less at a time.
    """
    always, per_token = memory_plan(cfg, model, min(gpus, 8))
    room, most = memory - sum(always.values()), min(24576, share + 1023)
    tokens = {mode: int(min(room / size, most)) // 1024 * 1024 for mode, size in per_token.items()}
    fits = {mode: n for mode, n in tokens.items() if n > 0}
    return dict(sorted(fits.items(), key=lambda pair: -min(pair[1], 8192)))


def print_plan(cfg: TrainConfig, config: LLaVAConfig, gpus: int, gpu_memory: float, peak: float = 0.5) -> None:
    """`--plan`: what a run needs on these GPUs, and how long it takes on 1 to 512 at `peak` of an H100's datasheet."""
    samples, length, supervised = PUBLISHED[cfg.stage]
    n, image = cfg.global_batch, cfg.stage != "sft"
    print(f"stage {cfg.stage} on {gpus} x {gpu_memory:.0f} GB\n")
    model = skeleton(cfg, config)
    always, per_token = memory_plan(cfg, model, min(gpus, 8))
    print(f"\nneeded on each GPU (--dtype {cfg.dtype}):")
    for kind, size in always.items():
        print(f"  {kind:50s} {size / 1e9:6.1f} GB")
    fits = plan_micro_batch(cfg, model, gpus, gpu_memory * 1e9, n * length // gpus)
    for mode, size in per_token.items():
        found = f"--micro-tokens {fits[mode]}" if mode in fits else "does not fit"
        print(f"  --recompute {mode:10s} {size / 2 ** 20:5.2f} MiB a token: {found}")
    print("best: " + next((f"--recompute {mode} --micro-tokens {tokens}" for mode, tokens in fits.items()),
                          "does not fit; take more GPUs, --lora-r 64 or --freeze"))
    flops = step_flops(config, learning(model), n * length, n * length ** 2, n * image, n * supervised)
    steps = math.ceil(cfg.epochs * steps_per_epoch(samples, n))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{steps:,} steps of {n} samples of {length} tokens, {supervised} supervised{', with a picture' * image}: "
          f"{flops / 1e15:.2f} PFLOP a step\n\n  GPUs   hours   GB sent by a GPU in a step")
    for g in (2 ** i for i in range(10)):
        fits = plan_micro_batch(cfg, model, g, gpu_memory * 1e9, n * length // g)
        if not fits:
            print(f"  {g:4d}   does not fit")
            continue
        near, micros = min(g, 8), math.ceil(n * length / g / next(iter(fits.values())))
        sent = micros * trained * (8 * (near - 1) + 8 * (g > 8)) / near     # bf16 gathered twice and fp32 shared out;
        busy = min(g, n)                                                    # then fp32 shares summed across nodes
        print(f"  {g:4d} {flops * steps / busy / peak / 989e12 / 3600:7.2f} {sent / 1e9:9.1f}"
              + f"    only {n} of them have a sample" * (g > n))
    print(f"\nhours at {peak:.0%} of 989 TFLOP/s (dense bf16 of an H100 or H200): an assumption, no measurement")


def memory_gb(device: torch.device) -> float:
    """Peak so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of one GPU's datasheet peak (dense bf16); None where no peak is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops_per_second / peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def read_lines(path: Path) -> list[dict]:
    """A file with one JSON object per line, up to the first that was cut short when a run was killed."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Metrics:
    """metrics.jsonl, one object per step, and skipped_steps.jsonl. Going on from step k keeps what was known at k."""
    def __init__(self, out: Path, done: int):
        self.path, self.skipped = out / "metrics.jsonl", out / "skipped_steps.jsonl"
        for path in (self.path, self.skipped):
            if dist.get_rank() or not path.exists():
                continue
            kept = [r for r in read_lines(path) if done and r["step"] < done + ("val_loss" in r)]
            write_durably(path, "".join(json.dumps(r) + "\n" for r in kept))

    def add(self, record: dict, path: Path | None = None) -> None:
        if dist.get_rank() == 0:
            with open(path or self.path, "a") as f:
                f.write(json.dumps(record) + "\n")


def progress_line(r: dict, steps: int, left: float) -> str:
    mfu = f" | mfu {100 * r['mfu']:.1f} %" if r["mfu"] else ""
    return (f"step {r['step'] + 1}/{steps} | loss {r['loss']:.4f} | norm {r['grad_norm']:.3f} | lr {r['lr']:.2e}"
            f" | {1000 * r['seconds']:.0f} ms | {r['tokens_per_second']:,.0f} tok/s{mfu} | {r['memory_gb']:.1f} GB"
            f" | {left / 60:.1f} min left" + " | SKIPPED: not finite" * r["skipped"])


def plot(runs: list[Path], to: Path) -> None:
    """`--plot OUT...`: the loss curves of one or several runs in one self-contained page."""
    curves = {}
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{run / 'metrics.jsonl'}: not there; --plot takes the --out folders of runs")
        steps = [r for r in read_lines(run / "metrics.jsonl") if "loss" in r and not r.get("skipped")]
        curves[str(run)] = [(r["step"] + 1, r["loss"]) for r in steps]
    style = "body{font:15px sans-serif;max-width:860px;margin:2em auto}"
    page = f"<!doctype html><meta charset=utf-8><title>loss</title><style>{style}</style><h1>Training loss</h1>"
    to.write_text(page + loss_svg(curves))
    print(f"wrote {to}")


def loss_svg(curves: dict[str, list[tuple[int, float]]], width: int = 800, height: int = 360) -> str:
    """Curves of (step, loss) as inline SVG: each thin as measured and thick as a running mean, on common axes."""
    colours = ["#1f6fb2", "#c8501e", "#2f8f4e", "#8a4fa3", "#7a6a00"]
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return "<p>no steps yet</p>"
    right, top = max(x for x, _ in points), max(y for _, y in points) or 1
    place = lambda x, y: f"{50 + (width - 60) * x / right:.1f},{height - 30 - (height - 45) * y / top:.1f}"
    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" font-size="12" font-family="sans-serif">']
    for i in range(5):
        x, y = right * i / 4, top * i / 4
        (px, _), (_, py) = place(x, 0).split(","), place(0, y).split(",")
        parts.append(f'<line x1="50" x2="{width - 10}" y1="{py}" y2="{py}" stroke="#ddd"/>'
                     f'<text x="6" y="{py}">{y:.2f}</text>'
                     f'<text x="{px}" y="{height - 8}" text-anchor="middle">{x:.0f}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour, window = colours[i % len(colours)], max(1, len(curve) // 50)
        losses = np.array([y for _, y in curve])
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        smooth = [(x, y) for (x, _), y in zip(curve[window - 1:], mean)]
        for line, style in ((curve, 'stroke-width="1" opacity="0.3"'), (smooth, 'stroke-width="2"')):
            points = " ".join(place(*p) for p in line)
            parts.append(f'<polyline fill="none" stroke="{colour}" {style} points="{points}"/>')
        parts.append(f'<text x="{width - 12}" y="{22 + 16 * i}" text-anchor="end" fill="{colour}">'
                     f'{html.escape(name)}</text>')
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


def agreed(loader: Loader, asked: Sequence = ()) -> Iterator[tuple[Step, int, bool]]:
    """A loader's steps -> step, supervised tokens in it, whether to stop: the last two the same on every process.

    Data that one process cannot read ends all of them at the same step, with its message: none waits for one that left.
    """
    steps = iter(loader)
    while True:
        step = problem = None
        try:
            step = next(steps, None)
        except (ValueError, OSError) as e:
            problem = str(e)
        if not (step or problem):
            return
        sums = torch.tensor([sum(len(b.targets) for b in step.batches) if step else 0, bool(asked), bool(problem)])
        dist.all_reduce(sums)                               # on the CPU: the GPU need not be waited for
        supervised, stop, failed = sums.tolist()
        if failed:
            problems = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
            raise ValueError(next(problem for problem in problems if problem))
        yield step, supervised, stop > 0


def train_step(model: LLaVAPhi, optimizer: torch.optim.Optimizer, step: Step, cfg: TrainConfig, n_supervised: int,
               rate: float, device: torch.device) -> tuple[float, float, bool]:
    """Forward, backward, update. -> loss, gradient norm, skipped: the same three on every process.

    The loss is the mean over the step's supervised tokens, of all micro-batches and processes; not a mean of means.
    A loss or gradient that is not finite anywhere leaves the weights as they are everywhere.
    """
    world, rank, total = dist.get_world_size(), dist.get_rank(), torch.zeros((), device=device)
    for i, batch in enumerate(step.batches):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step.step, rank, i]).generate_state(1)[0]))    # dropout
        loss = model(*to_device(batch, device)) / max(n_supervised, 1)
        (loss * world).backward()                           # FSDP takes the mean over processes, and we want the sum
        total += loss.detach()
    dist.all_reduce(total)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss, norm = torch.stack([total, norm.to(total)]).tolist()              # the step's one wait for the device
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if not skipped:
        if cfg.grad_clip > 0 and norm > cfg.grad_clip:
            torch._foreach_mul_(grads, cfg.grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, skipped


@torch.no_grad()
def validate(model: LLaVAPhi, loader: Loader, device: torch.device) -> float:
    """Mean loss over every supervised token of the validation set, without dropout. All processes take part."""
    model.eval()
    total, supervised = torch.zeros((), dtype=torch.float64, device=device), 0
    for step, n, _ in agreed(loader):
        total += sum(model(*to_device(batch, device)).double() for batch in step.batches)
        supervised += n
    dist.all_reduce(total)
    model.train()
    return float(total / max(supervised, 1))

# ---------------------------------------------------------------------------------------------------
# The run


def open_data(cfg: TrainConfig, config: LLaVAConfig, path: str) -> Dataset:
    if cfg.stage != "sft" and not Path(cfg.images).is_dir():
        raise FileNotFoundError(f"no image folder at {cfg.images} (--images)")
    return Dataset(Path(path), Path(cfg.images), load_tokenizer(folders(cfg)[0]), cfg.template,
                   config.vision.image_size, cfg.image_mode, config.vision.n_patches,
                   min(cfg.max_length, config.llm.block_size), on_bad_sample=cfg.on_bad_sample, cache_dir=Path(cfg.out),
                   follow_links=cfg.follow_links)


def prepare_out(cfg: TrainConfig, checksum: str) -> Path | None:
    """Make --out ready for a run on data of this checksum; -> the checkpoint to go on from.

    ValueError, before anything is changed: a folder that holds something else, a checkpoint of another run.
    """
    out, checkpoint = Path(cfg.out), on_process_0(lambda: find_checkpoint(cfg))

    def prepare() -> None:
        if checkpoint:
            manifest = json.loads((checkpoint / "checkpoint.json").read_text())
            check_same(manifest["config"] | {"data checksum": manifest["data"]},
                       dataclasses.asdict(cfg) | {"data checksum": checksum}, HARMLESS,
                       f"{checkpoint} was made with other settings; give the same, or --resume never and another --out")
        out.mkdir(parents=True, exist_ok=True)
        if not settings(out) and any(not path.name.startswith(".writing_") for path in out.iterdir()):
            raise ValueError(f"--out {out} holds files that are not a training run's; choose an empty or a new folder")
        afresh = () if checkpoint else ("step_[0-9]*", "model*.safetensors*", "bad_samples.jsonl")
        for old in [path for pattern in (".writing_*", *afresh) for path in out.glob(pattern)]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_durably(out / "config.json", json.dumps({"training": dataclasses.asdict(cfg)}, indent=2) + "\n")
    on_process_0(prepare)
    return checkpoint


def settings(out: Path) -> dict:
    """The config.json of a run's folder; {} where there is none, or another program's."""
    path = out / "config.json"
    try:
        saved = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise ValueError(f"{path}: not json; delete it to go on from the newest checkpoint beside it") from None
    return saved if "training" in saved else {}


def finished(cfg: TrainConfig) -> bool:
    """True if --out holds the model of a finished run with these settings; ValueError if its settings were others."""
    saved = settings(Path(cfg.out))
    if cfg.resume != "auto" or "model_type" not in saved:
        return False
    check_same(saved["training"], dataclasses.asdict(cfg), HARMLESS - {"data"},
               f"--out {cfg.out} holds a finished model made with other settings; choose another --out, "
               "or --resume never to train afresh over it")
    return True


def run(cfg: TrainConfig, config: LLaVAConfig, mesh: DeviceMesh, device: torch.device) -> None:
    """Everything that takes part in a collective does so on every process, in this order."""
    out, began = Path(cfg.out), time.perf_counter()
    if finished(cfg):
        return log0(f"already finished: {out} holds the trained model (--resume never trains afresh)")
    asked = watch_signals()
    data = open_data(cfg, config, cfg.data)
    held_out = open_data(cfg, config, cfg.val_data) if cfg.val_data else None
    checkpoint = prepare_out(cfg, data.checksum)
    log0(f"{dist.get_world_size()} x {device.type}, torch {torch.__version__}\n{data.path}: {data.summary()}")
    for text in (data, held_out) if cfg.stage == "sft" else ():
        if text and text.index.image.any():
            raise ValueError(f"{text.path}: {text.index.image.sum():,} samples have a picture, and sft is for text")
    model = build(cfg, config, mesh, device)
    state = State(cfg, model, make_optimizer(model, cfg), data.checksum)
    if checkpoint:
        load_checkpoint(checkpoint, state)
    steps = math.ceil(cfg.epochs * steps_per_epoch(len(data), cfg.global_batch))
    steps = min(steps, cfg.max_steps or steps)
    log0(f"{steps:,} steps of {cfg.global_batch} samples, the first {math.ceil(cfg.warmup * steps):,} warming up"
         + (f"; going on from {checkpoint}" if checkpoint else ""))
    need, free = sum(p.numel() for p in model.parameters()) * DTYPES[cfg.dtype].itemsize, shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"the trained model will take {need / 1e9:.1f} GB and --out {out} has {free / 1e9:.1f} GB free")
    if train(state, data, held_out, steps, asked, device):
        try:
            save_final(cfg, config, model)
        except OSError as e:
            path = save_checkpoint(state)
            raise OSError(f"the model was not written ({e}); {path} has it: make room, then run this again") from None
        log0(f"done in {(time.perf_counter() - began) / 60:.1f} min: {out}")
    else:
        log0(f"stopped after step {state.step}; the same command goes on from there")


def train(state: State, data: Dataset, held_out: Dataset | None, steps: int, asked: list, device: torch.device) -> bool:
    """The steps from state.step on. -> whether all are done; False: stopped, and saved."""
    cfg, model, world = state.cfg, state.model, dist.get_world_size()
    metrics, warmup, parts = Metrics(Path(cfg.out), state.step), math.ceil(cfg.warmup * steps), learning(model)

    def loader(data: Dataset, steps: int, **more) -> Loader:
        return Loader(data, global_batch=cfg.global_batch, micro_tokens=cfg.micro_tokens, rank=dist.get_rank(),
                      world=world, seed=cfg.seed, steps=steps, workers=cfg.workers, pin=device.type == "cuda", **more)

    def measure() -> None:
        if held_out:
            loss = validate(model, loader(held_out, steps_per_epoch(len(held_out), cfg.global_batch)), device)
            metrics.add(dict(step=state.step, val_loss=loss))
            log0(f"step {state.step}/{steps} | validation loss {loss:.4f}")

    if state.step == 0:
        measure()
    start, bad_in_a_row, began = state.step, 0, time.perf_counter()
    last = began
    # ---- set-up ends here, training begins
    for step, supervised, stop in agreed(loader(data, steps, start_step=start, group=cfg.group), asked):
        rate = lr_at(step.step, steps, warmup, cfg.schedule)
        loss, norm, skipped = train_step(model, state.optimizer, step, cfg, supervised, rate, device)
        state.step, state.updates = step.step + 1, state.updates + (not skipped)
        bad_in_a_row = (bad_in_a_row + 1) * skipped
        now = time.perf_counter()
        seconds, last = now - last, now
        length, images = data.index.length[step.sample_ids].astype(float), int(data.index.image[step.sample_ids].sum())
        flops = step_flops(model.config, parts, length.sum(), (length ** 2).sum(), images, supervised)
        record = dict(step=step.step, loss=loss, lr=rate * cfg.lr, grad_norm=norm, samples=len(length),
                      supervised_tokens=supervised, tokens=int(length.sum()), images=images, seconds=seconds,
                      tokens_per_second=length.sum() / seconds, mfu=mfu(flops / seconds / world, device),
                      memory_gb=memory_gb(device), skipped=skipped)
        metrics.add(record)
        if skipped or state.step % cfg.log_every == 0 or state.step == steps:
            log0(progress_line(record, steps, (now - began) / (state.step - start) * (steps - state.step)))
        if skipped:
            metrics.add(dict(step=step.step, sample_ids=step.sample_ids), metrics.skipped)
        if bad_in_a_row == 5:
            raise ValueError("loss or gradient was not finite in 5 steps in a row, the last with samples "
                             f"{step.sample_ids[:8]}; all are in {metrics.skipped}. Look at them, or lower --lr")
        if state.step == steps:
            break
        if cfg.val_every and state.step % cfg.val_every == 0:
            measure()
            last = time.perf_counter()
        stop = stop or state.step == cfg.stop_after
        if stop or cfg.save_every and state.step % cfg.save_every == 0:
            try_to_save(state)
            last = time.perf_counter()
        if stop:
            return False
    measure()
    return True


def main(argv: list[str] | None = None) -> None:
    cfg, action = parse_args(argv)
    if action["plot"]:
        return plot(action["plot"], action["plot"][0] / "loss.html")
    if action["plan"]:
        known = all(folder.is_dir() for folder in folders(cfg))
        return print_plan(cfg, read_config(cfg) if known else LLaVAConfig(), action["gpus"], action["gpu_memory"])
    config = read_config(cfg)
    mesh, device = setup()
    try:
        run(cfg, config, mesh, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    os._exit(code)                  # gloo's threads may still be letting go of tensors: tearing Python down aborts then
