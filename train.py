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
import functools
import html
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from common import (LLAVA_PHI, RECIPES, Parser, dtype_name, faster_dtype, html_page, read_jsonl, run_command,
                    torch_dtype, write_whole)

# ---------------------------------------------------------------------------------------------------
# Configuration: every field of TrainConfig is a flag; --recipe and --stage select a row of common.RECIPES


def flag(default, help: str, *choices: str, least: float = 0, most: float = sys.float_info.max):
    """A field of TrainConfig with what its command-line flag needs. Numbers must lie between `least` and `most`."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most))


def by_stage(help: str, *choices: str, least: float = 0, most: float = sys.float_info.max):
    """A field whose default is in common.RECIPES: it depends on --stage and --recipe."""
    return flag(dataclasses.MISSING, help, *choices, least=least, most=most)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    stage: str = flag("pretrain", "pretrain: the projector; finetune: all; sft: the language model alone, before both",
                      "pretrain", "finetune", "sft")
    recipe: str = flag("llava-phi", "whose defaults: llava-phi's (CLIP) or mipha's (SigLIP)", *RECIPES)
    model: str = by_stage("folder to start from; empty: --llm and --vision with a new projector")
    llm: str = by_stage("Phi-2 folder (pretrain, sft)")
    vision: str = by_stage("CLIP or SigLIP folder (pretrain)")
    data: str = by_stage("LLaVA json or jsonl")
    images: str = by_stage("folder that image paths in the data start from")
    follow_links: bool = flag(False, "let links in that folder lead out of it")
    val_data: str = flag("", "a second json, whose loss is measured before, during (--val-every) and after training")
    out: str = by_stage("folder for metrics, checkpoints and the final model")
    # what is learned, and from what
    train: str = by_stage("comma-separated parts that learn: projector, llm, vision")
    freeze: str = flag("", "comma-separated parts taken out of --train again")
    lora_r: int = flag(0, "rank of low-rank adapters in the language model, which is then frozen itself; 0: none")
    lora_alpha: float = flag(16.0, "adapters are scaled by lora_alpha / lora_r, and merged when the model is saved")
    lora_on: str = flag("both", "which linear layers of each block get adapters", "both", "attn", "mlp")
    base_bits: int = flag(16, "4: the language model under the adapters is held in 4 bits, for one small GPU (QLoRA)")
    template: str = by_stage("prompt: plain (image, caption, newline) or v0 (chat)", "plain", "v0")
    image_mode: str = by_stage("pictures: crop the centre, pad to a square, or squash into one",
                               "crop", "pad", "squash")
    max_length: int = flag(2048, "positions per sample, image expanded; longer ones are cut on the right", least=1)
    group: str = by_stage("order within an epoch: none (random) or modality_length (as LLaVA groups its batches)",
                          "none", "modality_length")
    on_bad_sample: str = flag("stop", "stop, or skip: count it, list it in out/bad_samples.jsonl, give up above 0.1 %%",
                              "stop", "skip")
    seed: int = flag(42, "data order, dropout and a new projector", most=2 ** 63 - 1)
    # how long, how fast
    global_batch: int = by_stage("samples per optimizer step, over all processes", least=1)
    epochs: float = by_stage("passes over the data")
    max_steps: int = flag(0, "stop after so many steps; 0: what the epochs give")
    lr: float = by_stage("peak learning rate")
    projector_lr: float = flag(0.0, "the projector's own peak learning rate; 0: as --lr")
    vision_lr: float = flag(0.0, "the tower's own peak learning rate; 0: as --lr")
    warmup: float = flag(0.03, "share of the steps over which the rate rises from 0", most=1)
    schedule: str = by_stage("how it falls to 0 afterwards", "cosine", "linear")
    beta1: float = flag(0.9, "AdamW", most=0.9999)
    beta2: float = by_stage("AdamW", most=0.9999999)
    eps: float = by_stage("AdamW", least=1e-30)
    weight_decay: float = flag(0.0, "AdamW; biases and LayerNorms are never decayed")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dropout: float = flag(-1.0, "residual dropout of the language model; -1: as its config.json says",
                          least=-1, most=0.99)
    # the machine
    dtype: str = flag("bf16", "arithmetic, fp32 or bf16; master weights and sums are always fp32")
    micro_tokens: int = flag(16384, "tokens per forward on one process: as many as its memory holds", least=1)
    recompute: str = flag("auto", "in the backward pass: none (fastest), selective (half the memory, 3 %% more work), "
                                  "full (least memory, 22 %% more); auto: the first that fits",
                          "auto", "none", "selective", "full")
    gather: str = flag("auto", "what several processes exchange only once a step (less traffic, more memory): none, "
                               "weights, or both weights and gradients; auto: as much as fits",
                       "auto", "none", "weights", "both")
    compile: bool = flag(False, "compile each block: one graph for all lengths; it starts a minute later")
    workers: int = flag(4, "data processes per training process")
    # what is written, and when
    log_every: int = flag(1, "steps between lines on the screen; metrics.jsonl has every step", least=1)
    val_every: int = flag(0, "steps between validations; 0: before and after only")
    save_every: int = flag(0, "steps between checkpoints; 0: only when interrupted")
    keep: int = flag(2, "checkpoints kept", least=1)
    stop_after: int = flag(0, "save and leave after this step, as if interrupted; 0: no")
    resume: str = flag("auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint folder")


def parse_args(argv: list[str] | None = None) -> tuple[TrainConfig, dict]:
    """-> the settings of a run, and what is asked for instead of training (plot, plan). ValueError: a bad flag."""
    # The defaults depend on stage and recipe, so these two flags are looked for first.
    row_parser = Parser(add_help=False)
    row_parser.add_argument("--stage", default="pretrain")
    row_parser.add_argument("--recipe", default="llava-phi")
    row = row_parser.parse_known_args(argv)[0]
    defaults = RECIPES.get(row.recipe, {}).get(row.stage)
    if defaults is None and row.recipe == "mipha" and row.stage == "sft":
        raise ValueError("--recipe mipha has no --stage sft: start from Phi-2 as it is published")

    parser = Parser(description=__doc__, epilog=f"Defaults in brackets are those of --stage {row.stage}; where a "
                    f"recipe is named, those that {row.recipe} was published with (common.py says where).")
    defaults = defaults or LLAVA_PHI["pretrain"]        # a name that is not known is refused below, with the choices
    for f in dataclasses.fields(TrainConfig):
        kind = {"type": f.type, "choices": f.metadata["choices"] or None}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if f.name == "dtype":
            kind = {"type": dtype_name}
        default = defaults.get(f.name, f.default)
        source = row.recipe if f.name in defaults else "default"
        shown = "" if default == "" else f" ({source}: %(default)r)"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"] + shown, **kind)
    parser.add_argument("--plot", nargs="+", type=Path, metavar="OUT",
                        help="no training: draw these runs' curves into loss.html")
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=False,
                        help="no training, no weights: print memory, speed and traffic to expect")
    parser.add_argument("--gpus", type=int, default=8, help="for --plan")
    parser.add_argument("--gpu-memory", type=float, default=80, help="for --plan, GB each")
    args = vars(parser.parse_args(argv))

    action = {name: args.pop(name) for name in ("plot", "plan", "gpus", "gpu_memory")}
    cfg = TrainConfig(**args)
    check_flags(cfg)
    for name in ("gpus", "gpu_memory"):
        check_range(name, action[name], 1, sys.float_info.max)
    return cfg, action


def check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:              # also refuses NaN, with which no comparison is true
        limit = f", {most} at most" if most < sys.float_info.max else ""
        raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more{limit}")


def check_flags(cfg: TrainConfig) -> None:
    """ValueError for values out of range and for flags that contradict each other."""
    for f in dataclasses.fields(TrainConfig):
        if f.type in (int, float):
            check_range(f.name, getattr(cfg, f.name), f.metadata["least"], f.metadata["most"])
    for name in ("llm", "vision"):
        # A model brings its own parts. A flag that would change nothing is an error, not a default to be ignored.
        if cfg.model and getattr(cfg, name) != RECIPES[cfg.recipe][cfg.stage][name]:
            raise ValueError(f"--{name} {getattr(cfg, name)}: --model {cfg.model} has one already; with --model '' a "
                             "new model is made from --llm and --vision")
    if cfg.compile and cfg.recompute == "selective":
        raise ValueError("--compile does what --recompute selective does by itself; give --recompute none or full")
    if cfg.base_bits not in (4, 16):
        raise ValueError(f"--base-bits {cfg.base_bits}: expected 4 or 16")
    if cfg.base_bits == 4 and (not cfg.lora_r or cfg.lora_on != "both"):
        raise ValueError("--base-bits 4 needs --lora-r (64, say) and --lora-on both: weights in 4 bits cannot learn, "
                         "only adapters on them can")
    if cfg.base_bits == 4 and cfg.compile:
        raise ValueError("--base-bits 4 works without --compile only")
    if cfg.stage == "sft" and (cfg.model or cfg.vision):
        raise ValueError("--stage sft trains a language model alone: give --llm, and neither --model nor --vision")


def check_command_line() -> None:
    parse_args()


if __name__ == "__main__":
    # The imports below take seconds. `--help` and a mistake in a flag are answered before them.
    exit_code = run_command(check_command_line)
    if exit_code:
        sys.exit(exit_code)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint import (State, hold_out, is_finished, load_checkpoint, on_process_0, prepare_out, print0,
                        save_checkpoint, try_to_save)
from data import (BAD_SAMPLES, TOKEN_COST, Batch, Dataset, Loader, Step, load_tokenizer, mean_color, read_bad_samples,
                  steps_per_epoch)
from load_weights import (PHI, check_tensors, config_of_run, is_siglip, load_into, read_all, read_folders, read_kind,
                          save_model, save_phi)
from model import (MIPHA, LLaVAConfig, LLaVAPhi, Phi, Projector, apply_lora, copy_weight, init_weights,
                   merge_lora)

# ---------------------------------------------------------------------------------------------------
# Set-up: processes, model, optimizer, data


def setup() -> tuple[DeviceMesh, torch.device]:
    """Join torchrun's group, or make a group of one -> the mesh that FSDP shards over, and this process's device.

    On several nodes the weights are sharded within a node and replicated across nodes: gathering them in every layer
    then never leaves the fast links within a node.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"{local_world} processes on a machine with {torch.cuda.device_count()} GPUs: give "
                             "torchrun one for each (--nproc_per_node)")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"          # small messages between the hosts do not wait for the GPUs' queues
    else:
        device = torch.device("cpu")
        backend = "gloo"
    timeout = timedelta(minutes=10)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    world = dist.get_world_size()
    if world > local_world:
        shape, names = (world // local_world, local_world), ("replicate", "shard")
    else:
        shape, names = (world,), ("shard",)
    return init_device_mesh(device.type, shape, mesh_dim_names=names), device


def check_arithmetic(dtype: str, device: torch.device) -> None:
    """ValueError where a GPU could only imitate bf16, many times slower than it computes in fp32 (V100, T4)."""
    if device.type == "cuda" and dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; give --dtype fp32, which takes "
                         "twice the memory and no flash attention")


def folders(cfg: TrainConfig) -> list[Path]:
    """The folders that the run starts from: a whole model, or a language model and a tower."""
    names = [cfg.model] if cfg.model else [cfg.llm, cfg.vision]
    sources = [Path(name) for name in names if name]
    if Path(cfg.out).resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"--out {cfg.out} is what the run starts from; choose another folder")
    return sources


def read_config(cfg: TrainConfig) -> LLaVAConfig:
    """The config that the folders give, with --image-mode and --dropout instead of theirs."""
    if cfg.stage == "sft":
        sources = [read_kind(*folders(cfg), PHI)]
    else:
        sources = read_folders(folders(cfg))
    return config_of_run(sources, cfg.dropout, cfg.image_mode)


class PhiAlone(LLaVAPhi):
    """--stage sft: a language model with LLaVAPhi's interface. Its data has no pictures, so it has no tower."""
    def __init__(self, config: LLaVAConfig):
        nn.Module.__init__(self)
        self.config = config
        self.vision = None
        self.projector = None
        self.llm = Phi(config.llm)

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        return self.llm.wte(ids)


def skeleton(cfg: TrainConfig, config: LLaVAConfig) -> LLaVAPhi:
    """The model on the meta device, which costs no memory, with what is frozen marked as such."""
    with torch.device("meta"):
        model = PhiAlone(config) if cfg.stage == "sft" else LLaVAPhi(config)
        if cfg.lora_r:
            layers = ("attn", "mlp") if cfg.lora_on == "both" else (cfg.lora_on,)
            apply_lora(model.llm, cfg.lora_r, cfg.lora_alpha, layers, cfg.base_bits)
    freeze(model, cfg)
    return model


def freeze(model: LLaVAPhi, cfg: TrainConfig) -> None:
    """Freeze all but --train minus --freeze, and print what learns. ValueError: a name that is no part of the model."""
    parts = dict(model.named_children())
    trained, frozen = split_names(cfg.train), split_names(cfg.freeze)
    for name in trained + frozen:
        if name not in parts:
            raise ValueError(f"{name!r} is no part of the model; the parts are {', '.join(parts)}")
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    trained = [name for name in trained if name not in frozen]
    if adapters and "llm" in trained:
        trained.remove("llm")                   # its adapters learn in its place
    if not trained and not adapters:
        raise ValueError("nothing would be trained: --train minus --freeze is empty")
    for name, part in parts.items():
        part.requires_grad_(name in trained)
        print0(f"{name:10s} {count(part.parameters()):>13,} parameters, {'trained' if name in trained else 'frozen'}")
    if adapters:
        for p in adapters:
            p.requires_grad_(True)
        print0(f"{'adapters':10s} {sum(p.numel() for p in adapters):>13,} of them, trained")


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def trained_parts(model: LLaVAPhi) -> list[str]:
    """The parts of which every parameter is trained."""
    return [name for name, part in model.named_children() if next(part.parameters()).requires_grad]


def shard(model: LLaVAPhi, mesh: DeviceMesh, dtype: torch.dtype, gather: str = "none") -> None:
    """Apply FSDP2: a unit per decoder block, one for the tower, and the rest (projector, embeddings, head) in the root.

    Frozen parts are held whole in the compute dtype on every process: nothing about them has to be synchronised, so
    gathering them again and again would cost much and save little. What trains is gathered for every micro-batch, or
    once a step (`gather`, see train_step). One process by itself has nothing to share out; keep_masters is for it.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        if p.is_floating_point():               # and not bytes that hold two weights of 4 bits each
            p.data = p.data.to(dtype)
    if mesh.size() == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # FSDP would cast every floating-point argument of a block. The rotary angles among them have to stay fp32.
    block_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    units = []
    if "llm" in trained_parts(model):
        units += model.llm.h
    if "vision" in trained_parts(model):
        units.append(model.vision)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=block_policy, reshard_after_forward=gather == "none")
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=False)
    model.gather = gather


def keep_masters(model: LLaVAPhi, dtype: torch.dtype) -> None:
    """On one process: compute in `dtype`, train fp32 masters. Each trained weight's master is its attribute `master`.

    It is what FSDP does on several processes, with the same result bit for bit. But FSDP on one process still casts
    all weights anew for every micro-batch and copies all gradients twice: 110 GB through an H200's memory for the full
    model, 26 ms of a micro-batch's 490.
    """
    for p in model.parameters():
        if p.requires_grad:
            p.master = nn.Parameter(p.data)
            p.data = p.data.to(dtype)
            p.register_post_accumulate_grad_hook(move_gradient_to_master)


def move_gradient_to_master(p: Tensor) -> None:
    """Called by autograd for each weight in each backward pass: micro-batches are summed in fp32."""
    if p.master.grad is None:
        p.master.grad = p.grad.float()
    else:
        p.master.grad += p.grad
    p.grad = None


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the fp32 tensor that the optimizer trains: a parameter or a shard of it, or its master."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.master if hasattr(p, "master") else p for name, p in trained.items()}


@torch.no_grad()
def copy_masters(model: nn.Module) -> None:
    """Bring the compute weights up to date, after their masters have changed."""
    weights = [p for p in model.parameters() if hasattr(p, "master")]
    if weights:
        torch._foreach_copy_(weights, [p.master for p in weights])


def build(cfg: TrainConfig, config: LLaVAConfig, mesh: DeviceMesh, device: torch.device) -> LLaVAPhi:
    """Make, shard and fill the model. Sharding comes before memory, so no process holds more than its share."""
    model = skeleton(cfg, config)
    recompute = cfg.recompute
    if recompute == "auto":
        recompute = choose_recompute(cfg, model, mesh.size(-1), memory_of(device))
    model.llm.recompute = recompute
    if model.vision:
        model.vision.recompute = recompute != "none"
    gather = cfg.gather
    if gather == "auto":
        gather = choose_gather(cfg, model, mesh.size(-1), memory_of(device), recompute)
    shard(model, mesh, torch_dtype(cfg.dtype), gather)
    model.to_empty(device=device)
    read_weights(model, cfg, config)
    draw_new_weights(model, cfg, config)
    if mesh.size() == 1 and cfg.dtype != "fp32":
        keep_masters(model, torch_dtype(cfg.dtype))
    if cfg.compile:
        compile_blocks(model, device)
    if device.type == "cpu" and dist.get_rank() == 0:
        hint = faster_dtype(cfg.dtype)
        if hint:
            print0(hint)
    print0(f"compute in {cfg.dtype}, recompute {recompute}" + (", compiled" if cfg.compile else ""))
    return model.train()


def read_weights(model: LLaVAPhi, cfg: TrainConfig, config: LLaVAConfig) -> None:
    """Stream the weights in, one tensor at a time: every process reads all of them and keeps its share."""
    copy = copy_weight(model, fill)
    if cfg.stage == "sft":
        parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
        found = check_tensors([read_kind(Path(cfg.llm), PHI)], parameters, config)
        for name, tensor in read_all(found, config):
            copy(parameters[name], tensor)
    else:
        load_into(model, folders(cfg), copy, allow_missing=() if cfg.model else ("projector.",))


def read_base(cfg: TrainConfig, config: LLaVAConfig, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights that the run holds in 4 bits, as the folders have them."""
    sources = [read_kind(Path(cfg.llm), PHI)] if cfg.stage == "sft" else read_folders(folders(cfg))
    found = check_tensors(sources, names, config)
    yield from read_all({name: found[name] for name in names}, config)


def draw_new_weights(model: LLaVAPhi, cfg: TrainConfig, config: LLaVAConfig) -> None:
    """Start a new projector and adapters. Whole tensors are drawn, so any number of processes gets the same ones."""
    generator = torch.Generator().manual_seed(cfg.seed)
    if model.projector and not cfg.model:
        fresh = Projector(config.vision.n_embd, config.llm.n_embd)
        init_weights(fresh, generator)
        for parameter, value in zip(model.projector.parameters(), fresh.parameters()):
            fill(parameter, value.data)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a"):
            fill(parameter, torch.randn(parameter.shape, generator=generator) / parameter.size(1) ** 0.5)
        elif name.endswith("lora_b"):
            fill(parameter, torch.zeros(parameter.shape))       # B A = 0: training starts from the model as it is


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one, this process's share of it."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every process has the whole tensor and takes its share of it, nothing is sent.
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(tensor)


def compile_blocks(model: LLaVAPhi, device: torch.device) -> None:
    """Compile each block, inside of what FSDP and recomputation wrap, with one graph for all lengths."""
    blocks = [*model.llm.h]
    if device.type != "cuda":
        # Attention on a CPU is a loop over the samples' lengths, which are new in every step. It stays out.
        blocks = [block.mlp for block in model.llm.h]
    if model.vision:
        blocks += model.vision.h
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def make_optimizer(model: LLaVAPhi, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Of each part, matrices form a group that decays, biases and LayerNorms one that does not."""
    peak_lrs = {"projector": cfg.projector_lr or cfg.lr, "vision": cfg.vision_lr or cfg.lr, "llm": cfg.lr}
    groups = []
    for part, module in model.named_children():
        trained = trained_weights(module).values()
        matrices = [p for p in trained if p.dim() > 1]
        vectors = [p for p in trained if p.dim() <= 1]
        for params, decay in ((matrices, cfg.weight_decay), (vectors, 0.0)):
            if params:
                groups.append(dict(params=params, peak_lr=peak_lrs[part], lr=peak_lrs[part], weight_decay=decay))
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def open_data(cfg: TrainConfig, config: LLaVAConfig, path: str) -> Dataset:
    if cfg.stage != "sft" and not Path(cfg.images).is_dir():
        raise FileNotFoundError(f"no image folder at {cfg.images} (--images)")
    # Sizes are the model's, so that a picture takes as many positions as its tower makes patches.
    return Dataset(Path(path), Path(cfg.images), load_tokenizer(folders(cfg)[0]), cfg.template,
                   config.vision.image_size, cfg.image_mode, config.vision.n_patches,
                   min(cfg.max_length, config.llm.block_size),
                   on_bad_sample=cfg.on_bad_sample, cache_dir=Path(cfg.out), follow_links=cfg.follow_links,
                   pad_color=mean_color(config.vision.mean))


def check_text_only(data: Dataset) -> None:
    with_picture = int(data.index.image.sum())
    if with_picture:
        raise ValueError(f"{data.path}: {with_picture:,} samples have a picture, and sft is for text")

# ---------------------------------------------------------------------------------------------------
# The step


def lr_at(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Share of the peak rate at `step` (from 0): up from 0 over the warm-up, then down to 0, as Hugging Face's do."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return max(0.0, 1 - done)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of LLaVAPhi.forward. Lengths stay on the CPU, where the attention layout is made."""
    ids = batch.ids.to(device, non_blocking=True)
    images = batch.images.to(device, non_blocking=True)
    slots = batch.slots.to(device, non_blocking=True)
    rows = batch.rows.to(device, non_blocking=True)
    targets = batch.targets.to(device, non_blocking=True)
    return ids, batch.lengths, images, slots, rows, targets


@functools.cache
def copy_stream(device: torch.device) -> "torch.cuda.Stream":
    """One for all steps: the allocator keeps each stream's memory apart, so every new stream would need its own."""
    return torch.cuda.Stream(device)


def prefetch(batches: list[Batch], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches on the device, each copied while the one before is computed.

    On CUDA the copies have a stream of their own. The loader pins its batches, so the host does not wait for them.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    copies = copy_stream(device)
    computing = torch.cuda.current_stream(device)

    def copy(batch: Batch) -> tuple[Tensor, ...]:
        with torch.cuda.stream(copies):
            return to_device(batch, device)

    ready = copy(batches[0])
    for following in [*batches[1:], None]:
        computing.wait_stream(copies)
        for tensor in ready:
            if tensor.is_cuda:
                tensor.record_stream(computing)     # its memory must not be reused before the computation is done
        current = ready
        if following is not None:
            ready = copy(following)
        yield current


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Dropout is a function of these four, so a resumed run draws what an uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1)[0])


def train_step(model: LLaVAPhi, optimizer: torch.optim.Optimizer, step: Step, cfg: TrainConfig, n_supervised: int,
               rate: float, device: torch.device) -> tuple[float, float, bool]:
    """Forward, backward, update -> loss, gradient norm, skipped: the same three on every process.

    The loss is the mean over the step's n_supervised tokens, of all micro-batches and processes; not a mean of means.
    A loss or gradient that is not finite on any process leaves the weights as they are on all of them.
    """
    world = dist.get_world_size()
    total = torch.zeros((), device=device)
    sharded = isinstance(model, FSDPModule)
    # Every process has the same number of micro-batches, an empty one if need be: FSDP's collectives must match.
    for i, batch in enumerate(prefetch(step.batches, device)):
        torch.manual_seed(dropout_seed(cfg.seed, step.step, dist.get_rank(), i))
        if sharded:
            # What is exchanged once a step: gathered weights stay for the next micro-batch, and gradients pile up
            # where they are, in fp32. The last micro-batch shares the sums out and frees the gathered weights, since
            # the optimizer is about to change them.
            last = i + 1 == len(step.batches)
            model.set_reshard_after_backward(last or model.gather == "none")
            model.set_requires_gradient_sync(last or model.gather != "both")
        loss = model(*batch) / max(n_supervised, 1)
        # Each process divides by the global token count, so gradients have to be summed over the processes. FSDP
        # averages them: multiplying by the number of processes turns its mean into that sum.
        (loss * world).backward()
        total += loss.detach()
    dist.all_reduce(total)

    # In the model's order, not the optimizer's: in another one the norm's last digit differs, and so does the run.
    grads = [weight.grad for weight in trained_weights(model).values() if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    # Both numbers are read at once: it is the only time in a step that the host waits for the device.
    loss, norm = torch.stack([total, norm.to(total)]).tolist()
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if not skipped:
        # The formula of clip_grad_norm_, which would compute the norm once more.
        if cfg.grad_clip > 0 and norm > cfg.grad_clip:
            torch._foreach_mul_(grads, cfg.grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        optimizer.step()
        copy_masters(model)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, skipped

# ---------------------------------------------------------------------------------------------------
# The loop


def train(state: State, cfg: TrainConfig, data: Dataset, held_out: Dataset | None, steps: int, signals: list[int],
          device: torch.device) -> bool:
    """Take the steps from state.step on -> True when all are done, False if stopped, with a checkpoint, before."""
    metrics = Metrics(Path(cfg.out), state.step, trained_parts(state.model), device)
    warmup = math.ceil(cfg.warmup * steps)
    loader = make_loader(cfg, state.model, data, steps, device, start_step=state.step, group=cfg.group)
    skipped_in_a_row = 0
    if state.step == 0:                         # a resumed run has this number in its metrics already
        measure_held_out(state, cfg, held_out, steps, metrics, device)
    metrics.start_clock()
    # ---- set-up ends here, training begins
    for step, n_supervised, stop in synchronized_steps(loader, signals):
        rate = lr_at(step.step, steps, warmup, cfg.schedule)
        loss, norm, skipped = train_step(state.model, state.optimizer, step, cfg, n_supervised, rate, device)
        state.step += 1
        if skipped:
            skipped_in_a_row += 1
        else:
            state.updates += 1
            skipped_in_a_row = 0

        record = metrics.add_step(step, data, state.model.config, n_supervised, loss, norm, rate * cfg.lr, skipped)
        if skipped or state.step % cfg.log_every == 0 or state.step == steps:
            print0(progress_line(record, steps, metrics.seconds_a_step() * (steps - state.step)))
        if skipped_in_a_row == 5:
            # One bad sample gives one such step. Five in a row mean that the run has diverged.
            raise ValueError("loss or gradient was not finite in 5 steps in a row, the last with samples "
                             f"{step.sample_ids[:8]}; all are in {metrics.skipped_path}. Look at them, or lower --lr")
        if state.step == steps:
            break                               # the final model is written instead of a checkpoint
        if cfg.val_every and state.step % cfg.val_every == 0:
            measure_held_out(state, cfg, held_out, steps, metrics, device)
        if state.step == cfg.stop_after:
            stop = True
        if stop or (cfg.save_every and state.step % cfg.save_every == 0):
            try_to_save(state)
        if stop:
            return False
        metrics.restart_step_clock()            # validating and saving are no part of the next step's time
    measure_held_out(state, cfg, held_out, steps, metrics, device)
    return True


def run(cfg: TrainConfig, config: LLaVAConfig, mesh: DeviceMesh, device: torch.device) -> None:
    """One run from data to saved model. All of it happens on every process, in the same order."""
    began = time.perf_counter()
    out = Path(cfg.out)
    if is_finished(asdict(cfg)):
        print0(f"already finished: {out} holds the trained model (--resume never trains afresh)")
        return
    # From here on a signal is noted, and obeyed after the next step.
    signals = watch_signals()
    data = open_data(cfg, config, cfg.data)
    held_out = open_data(cfg, config, cfg.val_data) if cfg.val_data else None
    checkpoint = prepare_out(asdict(cfg), data.checksum)
    print0(f"{dist.get_world_size()} x {device.type}, torch {torch.__version__}\n{data.path}: {data.summary()}")
    if cfg.stage != "sft" and is_siglip(config.vision) != (cfg.recipe == "mipha"):
        print0(f"note: the vision tower is {'SigLIP' if is_siglip(config.vision) else 'CLIP'}, and the defaults are "
               f"those of --recipe {cfg.recipe}")
    if cfg.stage == "sft":
        check_text_only(data)
        if held_out:
            check_text_only(held_out)

    model = build(cfg, config, mesh, device)
    optimizer = make_optimizer(model, cfg)
    state = State(asdict(cfg), folders(cfg), data.checksum, model, trained_weights(model), optimizer)
    if checkpoint:
        load_checkpoint(checkpoint, state)
        copy_masters(model)
    steps = math.ceil(cfg.epochs * steps_per_epoch(len(data), cfg.global_batch))
    if cfg.max_steps:
        steps = min(steps, cfg.max_steps)
    print_steps(cfg, steps, checkpoint)
    # Days of training should not end with a model that finds no room.
    need = count(model.parameters()) * torch_dtype(cfg.dtype).itemsize
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"the trained model will take {need / 1e9:.1f} GB and --out {out} has {free / 1e9:.1f} GB free")

    is_complete = train(state, cfg, data, held_out, steps, signals, device)
    print_skipped(out)
    if not is_complete:
        print0(f"stopped after step {state.step}; the same command goes on from there")
        return
    try:
        save_final(cfg, config, model)
    except OSError as e:
        path = save_checkpoint(state)
        raise OSError(f"the model was not written ({e}); {path} has it: make room, then run this again") from None
    print0(f"done in {(time.perf_counter() - began) / 60:.1f} min: {out}")

# ---------------------------------------------------------------------------------------------------
# What the loop calls


def print_steps(cfg: TrainConfig, steps: int, checkpoint: Path | None) -> None:
    warmup = math.ceil(cfg.warmup * steps)
    print0(f"{steps:,} steps of {cfg.global_batch} samples, the first {warmup:,} warming up"
           + (f"; going on from {checkpoint}" if checkpoint else ""))
    if steps == warmup == 1:
        print0("note: the first step of a warm-up has the rate 0, so this run learns nothing: take a smaller "
               "--global-batch, more --epochs, or --warmup 0")


def print_skipped(out: Path) -> None:
    """How many bad samples a run went on without. Each process has skipped some; the file has them all."""
    bad = read_bad_samples(out)
    if bad:
        print0(f"bad samples skipped: {len(bad):,}; {out / BAD_SAMPLES} says what is wrong with them")


def make_loader(cfg: TrainConfig, model: LLaVAPhi, data: Dataset, steps: int, device: torch.device,
                start_step: int = 0, group: str = "none") -> Loader:
    cost = picture_cost(model.config, trained_parts(model))
    return Loader(data, global_batch=cfg.global_batch, micro_tokens=cfg.micro_tokens, rank=dist.get_rank(),
                  world=dist.get_world_size(), seed=cfg.seed, steps=steps, start_step=start_step, workers=cfg.workers,
                  group=group, pin=device.type == "cuda", picture_cost=cost)


def synchronized_steps(loader: Loader, signals: list[int]) -> Iterator[tuple[Step, int, bool]]:
    """A loader's steps -> (step, supervised tokens in all of it, whether to stop), the same on every process.

    A process that cannot read its data, or has been asked by a signal to stop, cannot simply leave: the others would
    wait for it in their next collective. So all processes exchange how they are before each step, and a problem of one
    is raised as a ValueError on all.
    """
    steps = iter(loader)
    while True:
        step = problem = None
        try:
            step = next(steps, None)
        except (ValueError, OSError) as e:
            problem = str(e)
        if step is None and problem is None:
            return
        supervised = sum(len(batch.targets) for batch in step.batches) if step else 0
        # The tensor is on the CPU, so this goes over gloo and no process waits for its GPU.
        sums = torch.tensor([supervised, len(signals), int(problem is not None)])
        dist.all_reduce(sums)
        supervised, n_signals, n_problems = sums.tolist()
        if n_problems:
            problems = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
            raise ValueError(next(p for p in problems if p))
        yield step, supervised, n_signals > 0


def measure_held_out(state: State, cfg: TrainConfig, held_out: Dataset | None, steps: int, metrics: "Metrics",
                     device: torch.device) -> None:
    if held_out is None:
        return
    loader = make_loader(cfg, state.model, held_out, steps_per_epoch(len(held_out), cfg.global_batch), device)
    loss = validate(state.model, loader, device)
    metrics.add({"step": state.step, "val_loss": loss})
    print0(f"step {state.step}/{steps} | validation loss {loss:.4f}")


@torch.no_grad()
def validate(model: LLaVAPhi, loader: Loader, device: torch.device) -> float:
    """Mean loss over every supervised token of the validation set, without dropout. All processes take part."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    supervised = 0
    for step, n_supervised, _ in synchronized_steps(loader, []):
        for batch in prefetch(step.batches, device):
            total += model(*batch).double()
        supervised += n_supervised
    dist.all_reduce(total)
    model.train()
    return float(total / max(supervised, 1))


def save_final(cfg: TrainConfig, config: LLaVAConfig, model: LLaVAPhi) -> None:
    """The model at the top of --out, in the saved format. Every process takes part in gathering; process 0 writes."""
    tensors = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if dist.get_rank() == 0:
            tensors[name] = whole.detach().to("cpu", torch_dtype(cfg.dtype) if p.is_floating_point() else None)
    if dist.get_rank() == 0:
        # Adapters are merged into the weights that the run started from, not into their 4-bit approximations.
        in_4_bits = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
        for name, tensor in read_base(cfg, config, in_4_bits):
            tensors[name] = tensor.to(torch_dtype(cfg.dtype))
    tensors = merge_lora(tensors, cfg.lora_alpha)

    def write() -> None:
        if cfg.stage == "sft":
            save_phi(Path(cfg.out), tensors, config, Path(cfg.llm))
        else:
            save_model(Path(cfg.out), tensors, config, folders(cfg))
    on_process_0(write)


def watch_signals() -> list[int]:
    """A list that fills when SIGTERM, SIGUSR1 or Ctrl-C asks the run to save and stop; a second Ctrl-C ends it now."""
    received: list[int] = []

    def note(number, frame):
        if received and number == signal.SIGINT:
            os._exit(130)
        received.append(number)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)
    return received

# ---------------------------------------------------------------------------------------------------
# What is logged


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}    # dense bf16, datasheets


class Metrics:
    """metrics.jsonl, one object per step, and skipped_steps.jsonl. Going on from step k keeps what was known at k."""

    def __init__(self, out: Path, done: int, parts: list[str], device: torch.device):
        self.path = out / "metrics.jsonl"
        self.skipped_path = out / "skipped_steps.jsonl"
        self.parts = parts
        self.device = device
        self.steps = 0                          # taken by this process since start_clock
        if dist.get_rank() == 0:
            forget_later_steps(self.path, done)
            forget_later_steps(self.skipped_path, done)

    def start_clock(self) -> None:
        self.began = self.step_began = time.perf_counter()

    def restart_step_clock(self) -> None:
        self.step_began = time.perf_counter()

    def seconds_a_step(self) -> float:
        return (time.perf_counter() - self.began) / self.steps

    def add(self, record: dict, path: Path | None = None) -> None:
        if dist.get_rank() == 0:
            with open(path or self.path, "a") as f:
                f.write(json.dumps(record) + "\n")

    def add_step(self, step: Step, data: Dataset, config: LLaVAConfig, n_supervised: int, loss: float, norm: float,
                 lr: float, skipped: bool) -> dict:
        """Write a step's line -> the line. Its numbers are of all processes together, but memory_gb is of process 0."""
        self.steps += 1
        seconds = time.perf_counter() - self.step_began
        lengths = data.index.length[step.sample_ids].astype(float)
        images = int(data.index.image[step.sample_ids].sum())
        flops = step_flops(config, self.parts, lengths.sum(), (lengths ** 2).sum(), images, n_supervised)
        record = {
            "step": step.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "samples": len(lengths),
            "supervised_tokens": n_supervised,
            "tokens": int(lengths.sum()),
            "images": images,
            "seconds": seconds,
            "tokens_per_second": lengths.sum() / seconds,
            "mfu": mfu(flops / seconds / dist.get_world_size(), self.device),
            "memory_gb": memory_gb(self.device),
            "skipped": skipped,
        }
        self.add(record)
        if skipped:
            self.add({"step": step.step, "sample_ids": step.sample_ids}, self.skipped_path)
        return record


def forget_later_steps(path: Path, done: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint from which this one goes on at step `done`.

    A validation loss measured after k steps carries step k, and the next training step, from 0, carries k as well.
    """
    if not path.exists():
        return
    kept = []
    for record in read_jsonl(path, torn=True):
        limit = done + 1 if "val_loss" in record else done
        if done and record["step"] < limit:
            kept.append(json.dumps(record) + "\n")
    write_whole(path, "".join(kept))


def progress_line(r: dict, steps: int, seconds_left: float) -> str:
    parts = [
        f"step {r['step'] + 1}/{steps}",
        f"loss {r['loss']:.4f}",
        f"norm {r['grad_norm']:.3f}",
        f"lr {r['lr']:.2e}",
        f"{1000 * r['seconds']:.0f} ms",
        f"{r['tokens_per_second']:,.0f} tok/s",
    ]
    if r["mfu"] is not None:
        parts.append(f"mfu {100 * r['mfu']:.1f} %")
    parts.append(f"{r['memory_gb']:.1f} GB")
    parts.append(f"{seconds_left / 60:.1f} min left")
    if r["skipped"]:
        parts.append("SKIPPED: not finite")
    return " | ".join(parts)


def memory_gb(device: torch.device) -> float:
    """Peak so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of one GPU's datasheet peak (dense bf16); None where no peak is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model, peak in PEAK_FLOPS.items():
        if model in name:
            return flops_per_second / peak
    return None


def step_flops(config: LLaVAConfig, parts: list[str], tokens: float, squares: float, images: float,
               rows: float) -> float:
    """Floating-point operations that one step's maths needs (recomputation not counted), 2 per multiply-add.

    parts: those that are trained. squares: sum over sequences of length ** 2. rows: supervised positions.
    """
    llm, vision = config.llm, config.vision
    S, C, D = vision.n_positions, llm.n_embd, vision.n_embd
    dense = tokens * 2 * llm.n_layer * (4 * C * C + 2 * C * llm.n_inner) + rows * 2 * C * llm.vocab_size
    attention = squares * 2 * llm.n_layer * C               # causal: half of the square is computed
    patches = vision.n_patches * 2 * D * 3 * vision.patch_size ** 2
    tower_block = 2 * S * (4 * D * D + 2 * D * vision.n_inner) + 4 * S * S * D
    tower = images * (patches + vision.n_used * tower_block)
    projector = images * 2 * vision.n_patches * (D * C + C * C)
    # A forward pass counts 1, the backward pass 1 for the input's gradient and 1 for the weights'. A frozen decoder
    # still hands the gradient on to the projector; behind a frozen tower there is nothing that could use it.
    passes = {name: 3 if name in parts else 2 for name in ("llm", "projector")}
    passes["vision"] = 3 if "vision" in parts else 1
    return dense * passes["llm"] + attention * 3 + projector * passes["projector"] + tower * passes["vision"]



def picture_cost(config: LLaVAConfig, parts: list[str]) -> float:
    """What a picture's way through tower and projector costs, in the units of data.training_cost."""
    picture = step_flops(config, parts, 0, 0, 1, 0)
    token = step_flops(config, parts, 1, 0, 0, 0)
    return TOKEN_COST * picture / token

# ---------------------------------------------------------------------------------------------------
# The plan: memory and time, from shapes alone


# Samples, the share of them with a picture, and per sample mean text tokens and supervised tokens. Estimates; `data.py
# check` measures them on the real data.
PUBLISHED = {
    "pretrain": (558_128, 1.0, 21, 21),
    "finetune": (665_298, 0.939, 307, 132),
    "sft": (40_688, 0.0, 1126, 800),
}
GPUS_A_NODE = 8
RECOMPUTE_MODES = ("none", "selective", "full")         # the fastest first
H100_PEAK = PEAK_FLOPS["H100"]


def count(parameters) -> int:
    """How many weights the parameters hold; two of 4 bits share a byte."""
    return sum(p.numel() if p.is_floating_point() else 2 * p.numel() for p in parameters)


def memory_plan(cfg: TrainConfig, model: LLaVAPhi, shards: int,
                gather: str = "none") -> tuple[dict[str, float], dict[str, float]]:
    """Bytes on each of `shards` GPUs -> (always there, by kind; added by a token of a micro-batch, by --recompute)."""
    llm = model.config.llm
    width = torch_dtype(cfg.dtype).itemsize
    parts = trained_parts(model)
    total = count(model.parameters())
    trained = count(p for p in model.parameters() if p.requires_grad)
    in_4_bits = count(p for p in model.parameters() if not p.is_floating_point())
    scales = sum(b.nbytes for b in model.buffers())
    # FSDP's units: a decoder block, the tower, and the root with everything else that is trained.
    block = count(model.llm.h[0].parameters()) if "llm" in parts else 0
    tower = count(model.vision.parameters()) if "vision" in parts else 0
    root = trained - tower - block * llm.n_layer
    if shards == 1:
        gathered = 0 if cfg.dtype == "fp32" else trained    # the compute weights beside their masters
        waiting = 0
    else:
        one_unit = max(root, tower, block)
        gathered = root + tower + 2 * block if gather == "none" else trained    # one block in use, the next on its way
        waiting = 4 * trained if gather == "both" else 4 * one_unit             # fp32 gradients, not yet shared out
    # A trained weight takes 4 bytes for itself, 8 for AdamW's two moments and 4 for its gradient. A logit takes 12: as
    # bf16 and fp32 in the forward pass, its gradient in both in the backward pass, of which not all live at once. The
    # workspace is what cuBLAS, NCCL and the allocator's fragments need; it is a guess.
    always = {
        "frozen weights, whole": width * (total - trained - in_4_bits) + in_4_bits / 2 + scales,
        "weights, moments and gradients, fp32, shared out": 16 * trained / shards,
        "weights gathered for use": width * gathered,
        "gradients before they are shared out": width * max(root, tower, block) + waiting,
        "logits": 12 * min(4096, cfg.micro_tokens) * llm.vocab_size,
        "workspace": 1e9,
    }
    return always, {mode: width * numbers_per_token(model, parts, mode) for mode in RECOMPUTE_MODES}


def numbers_per_token(model: LLaVAPhi, parts: list[str], mode: str) -> float:
    """Numbers that forward keeps for backward, per token; a test holds these counts against measured ones.

    Any token may be a picture's, so each carries its share of the tower.
    """
    llm, vision = model.config.llm, model.config.vision
    C, I = llm.n_embd, llm.n_inner
    needs_weight_gradients = any(p.requires_grad for p in model.llm.parameters())
    # Kept of a block are nine tensors of the model's width (its input, LayerNorm's output, q, k and v, q and k again
    # when they are rotated, attention's output in two layouts) and two of the MLP's (before and after GELU). Frozen
    # linear layers do not need their inputs in the backward pass.
    block = 9 * C + 2 * I if needs_weight_gradients else 7 * C + I
    if llm.dropout:
        block += C                              # two masks of a byte a number, half of bf16 each
    kept = {"none": block, "selective": 5 * C + I, "full": C}[mode]
    in_decoder = llm.n_layer * kept
    if mode != "none":
        in_decoder += block                     # one block at a time is computed again, and then held as a whole
    if "vision" not in parts:
        return in_decoder
    D = vision.n_embd
    tower_block = 12 * D + 2 * vision.n_inner if mode == "none" else D
    return in_decoder + vision.n_used * tower_block * vision.n_positions / vision.n_patches


def fits_in(memory: float, cfg: TrainConfig, model: LLaVAPhi, shards: int, recompute: str, gather: str) -> bool:
    """Whether a micro-batch fits into so many bytes."""
    always, per_token = memory_plan(cfg, model, shards, gather)
    return sum(always.values()) + cfg.micro_tokens * per_token[recompute] <= memory


def choose_recompute(cfg: TrainConfig, model: LLaVAPhi, shards: int, memory: float) -> str:
    """The fastest --recompute with which a micro-batch fits into so many bytes; the leanest if none does."""
    for mode in ("none", "selective"):
        refused = mode == "selective" and cfg.compile
        if not refused and fits_in(memory, cfg, model, shards, mode, "none"):
            return mode
    return "full"


def choose_gather(cfg: TrainConfig, model: LLaVAPhi, shards: int, memory: float, recompute: str) -> str:
    """The --gather with the least traffic for which there is memory left, once --recompute has been chosen.

    Recomputing costs more than sending: within a node, FSDP sends while it computes.
    """
    for gather in ("both", "weights"):
        if fits_in(memory, cfg, model, shards, recompute, gather):
            return gather
    return "none"


def memory_of(device: torch.device) -> float:
    """Bytes that a process may fill."""
    if device.type == "cuda":
        return 0.95 * torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


def plan_micro_batch(cfg: TrainConfig, model: LLaVAPhi, gpus: int, memory: float, share: int) -> dict[str, int]:
    """--micro-tokens by --recompute, the best first: what fits, not above a GPU's `share` of a step, in steps of 1024.

    Below 8192 tokens the matrix products are too small to be fast: better to recompute than to take less at a time.
    """
    sizes = range(1024, min(24576, share + 1023) + 1, 1024)
    fits = {}
    for mode in RECOMPUTE_MODES:
        def is_too_large(micro_tokens: int) -> bool:
            # Asked for each size anew, since the logits' share depends on it, too.
            smaller = dataclasses.replace(cfg, micro_tokens=micro_tokens)
            return not fits_in(memory, smaller, model, min(gpus, GPUS_A_NODE), mode, "none")
        n_fitting = bisect_left(sizes, True, key=is_too_large)
        if n_fitting > 0:
            fits[mode] = sizes[n_fitting - 1]
    return dict(sorted(fits.items(), key=lambda mode_and_n: -min(mode_and_n[1], 8192)))


def print_plan(cfg: TrainConfig, config: LLaVAConfig, gpus: int, gpu_memory: float) -> None:
    """`--plan`: what a run needs on these GPUs, and how long it takes on 1 to 512, from formulas, without weights."""
    samples, with_picture, text_tokens, supervised = PUBLISHED[cfg.stage]
    length = round(text_tokens + with_picture * config.vision.n_patches)
    print(f"stage {cfg.stage} on {gpus} x {gpu_memory:.0f} GB\n")
    model = skeleton(cfg, config)
    print_memory(cfg, model, gpus, gpu_memory * 1e9, cfg.global_batch * length // gpus)
    steps = math.ceil(cfg.epochs * steps_per_epoch(samples, cfg.global_batch))
    pictures = f", {with_picture:.0%} with a picture" if with_picture else ""
    flops = cfg.global_batch * step_flops(config, trained_parts(model), length, length ** 2, with_picture, supervised)
    print(f"\n{steps:,} steps of {cfg.global_batch} samples of {length} tokens, {supervised} supervised{pictures}: "
          f"{flops / 1e15:.2f} PFLOP a step")
    print_hours(cfg, model, gpu_memory * 1e9, steps, flops, cfg.global_batch * length)


def print_memory(cfg: TrainConfig, model: LLaVAPhi, gpus: int, memory: float, share: int) -> None:
    fits = plan_micro_batch(cfg, model, gpus, memory, share)
    if fits:
        cfg = dataclasses.replace(cfg, micro_tokens=next(iter(fits.values())))
    always, per_token = memory_plan(cfg, model, min(gpus, GPUS_A_NODE))
    print(f"\nneeded on each GPU (--dtype {cfg.dtype} --micro-tokens {cfg.micro_tokens}):")
    for kind, size in always.items():
        print(f"  {kind:50s} {size / 1e9:6.1f} GB")
    for mode, size in per_token.items():
        verdict = f"--micro-tokens {fits[mode]}" if mode in fits else "does not fit"
        print(f"  --recompute {mode:10s} {size / 2 ** 20:5.2f} MiB a token: {verdict}")
    if fits:
        best = next(iter(fits))
        print(f"best: --recompute {best} --micro-tokens {fits[best]}")
    else:
        print("best: does not fit; take more GPUs, --lora-r 64 (--base-bits 4) or --freeze")
    if cfg.base_bits == 4:
        print_small_gpus(cfg, model)


def print_small_gpus(cfg: TrainConfig, model: LLaVAPhi) -> None:
    """What QLoRA is for: the largest micro-batch that one small GPU can take, with full recomputation."""
    print("\none GPU with --base-bits 4 --recompute full:")
    for gb in (8, 12, 16, 24):
        verdict = "does not fit" + ("; with --freeze vision it may" if "vision" in trained_parts(model) else "")
        for micro_tokens in (1024, 2048, 4096, 8192, 16384):
            smaller = dataclasses.replace(cfg, micro_tokens=micro_tokens)
            if fits_in(gb * 1e9, smaller, model, shards=1, recompute="full", gather="none"):
                verdict = f"--micro-tokens {micro_tokens}"
        print(f"  {gb:2d} GB  {verdict}")


def print_hours(cfg: TrainConfig, model: LLaVAPhi, memory: float, steps: int, flops: float, step_tokens: int) -> None:
    """Time and traffic by the number of GPUs. flops and step_tokens are of a whole step."""
    trained = count(p for p in model.parameters() if p.requires_grad)
    print("\n  GPUs   hours   GB sent by a GPU in a step")
    for n in (1, 2, 4, 8, 64, 512):
        fits = plan_micro_batch(cfg, model, n, memory, step_tokens // n)
        if not fits:
            print(f"  {n:4d}   does not fit")
            continue
        mode, micro_tokens = next(iter(fits.items()))
        gather = cfg.gather
        if gather == "auto":
            micro = dataclasses.replace(cfg, micro_tokens=micro_tokens)
            gather = choose_gather(micro, model, min(n, GPUS_A_NODE), memory, mode)
        sent = traffic(trained, n, math.ceil(step_tokens / n / micro_tokens), gather)
        busy = min(n, cfg.global_batch)
        hours = flops * steps / busy / (0.5 * H100_PEAK) / 3600
        note = f"    --gather {gather}" if n > 1 else ""
        if busy < n:
            note += f"    only {busy} of them have a sample"
        print(f"  {n:4d} {hours:7.2f} {sent / 1e9:9.1f}{note}")
    print("\nhours at 50% of 989 TFLOP/s (dense bf16 of an H100 or H200): an assumption, no measurement")


def traffic(trained: int, gpus: int, micro_batches: int, gather: str) -> float:
    """Bytes that one GPU sends in a step with so many trained weights.

    Within a node weights are gathered in bf16, for the forward and again for the backward pass unless they stay, and
    gradients are shared out in fp32. Then the nodes exchange their sums, in fp32 and both ways.
    """
    near = min(gpus, GPUS_A_NODE)
    weights = 2 if gather != "none" else (2 + 2) * micro_batches
    reductions = 1 if gather == "both" else micro_batches
    between_nodes = 8 * reductions if gpus > near else 0
    return trained * ((weights + 4 * reductions) * (near - 1) + between_nodes) / near

# ---------------------------------------------------------------------------------------------------
# The plot


def plot(runs: list[Path], to: Path) -> None:
    """`--plot OUT...`: the loss curves of one or several runs in one self-contained page."""
    curves = {}
    for folder in runs:
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; --plot takes the --out folders of runs")
        curves[str(folder)] = loss_curve(path)
    write_whole(to, html_page("Training loss", loss_svg(curves)))
    print(f"wrote {to}")


def loss_curve(path: Path) -> list[tuple[int, float]]:
    """(steps done, loss) of each training step in a metrics.jsonl; steps that were skipped have no loss to show."""
    return [(r["step"] + 1, r["loss"]) for r in read_jsonl(path, torn=True) if "loss" in r and not r["skipped"]]


def loss_svg(curves: dict[str, list[tuple[int, float]]], width: int = 800, height: int = 360) -> str:
    """Curves of (step, loss) as inline SVG: each thin as measured and thick as a running mean, on common axes."""
    colours = ["#1f6fb2", "#c8501e", "#2f8f4e", "#8a4fa3", "#7a6a00"]
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>no steps yet</p>"
    last_step = max(step for step, _ in points)
    highest = max(loss for _, loss in points) or 1

    def x(step: float) -> float:
        return 50 + (width - 60) * step / last_step

    def y(loss: float) -> float:
        return height - 30 - (height - 45) * loss / highest

    def line(curve: list[tuple[float, float]], style: str) -> str:
        places = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        return f'<polyline fill="none" {style} points="{places}"/>'

    svg = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" font-size="12" font-family="sans-serif">']
    for i in range(5):                          # four grid lines and the axis, with their numbers
        step, loss = last_step * i / 4, highest * i / 4
        svg.append(f'<line x1="50" x2="{width - 10}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        svg.append(f'<text x="6" y="{y(loss):.1f}">{loss:.2f}</text>')
        svg.append(f'<text x="{x(step):.1f}" y="{height - 8}" text-anchor="middle">{step:.0f}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        window = max(1, len(curve) // 50)
        losses = np.array([loss for _, loss in curve])
        means = np.convolve(losses, np.ones(window) / window, "valid")
        steps = [step for step, _ in curve[window - 1:]]
        svg.append(line(curve, f'stroke="{colour}" stroke-width="1" opacity="0.3"'))
        svg.append(line([*zip(steps, means)], f'stroke="{colour}" stroke-width="2"'))
        svg.append(f'<text x="{width - 12}" y="{22 + 16 * i}" text-anchor="end" fill="{colour}">'
                   f'{html.escape(name)}</text>')
    return "".join(svg) + "</svg>"

# ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    cfg, action = parse_args(argv)
    if action["plot"]:
        plot(action["plot"], action["plot"][0] / "loss.html")
        return
    if action["plan"]:
        # A plan needs no downloads: without the folders it is for the published model's sizes.
        config = MIPHA if cfg.recipe == "mipha" else LLaVAConfig()
        if all(folder.is_dir() for folder in folders(cfg)):
            config = read_config(cfg)
        print_plan(cfg, config, action["gpus"], action["gpu_memory"])
        return
    config = read_config(cfg)
    mesh, device = setup()
    try:
        check_arithmetic(cfg.dtype, device)
        with hold_out(Path(cfg.out)):
            run(cfg, config, mesh, device)
    except torch.OutOfMemoryError as e:
        raise ValueError(out_of_memory(str(e), cfg)) from None
    except RuntimeError as e:
        # Gloo and NCCL have no exception of their own for a lost process. The one that died first has printed the
        # reason, or torchrun will.
        if dist.get_world_size() == 1 or not is_lost_connection(str(e)):
            raise
        process = f"process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
        reason = str(e).splitlines()[0][:200]
        raise OSError(f"{process} lost another one ({reason}); "
                      "start again to go on from the newest checkpoint") from None
    finally:
        dist.destroy_process_group()


def is_lost_connection(message: str) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "imed out")
    return any(sign in message for sign in signs)


def out_of_memory(message: str, cfg: TrainConfig) -> str:
    """One line of torch's paragraph -> what was asked for, what there is, and which flag to lower."""
    facts = re.findall(r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", message)
    advice = f"give --micro-tokens less than {cfg.micro_tokens}"
    if cfg.recompute != "full":
        advice += " or --recompute full"
    return f"process {dist.get_rank()} is out of GPU memory ({', '.join(facts)}): {advice}; --plan says what fits"


if __name__ == "__main__":
    exit_code = run_command(main)
    sys.stdout.flush()
    os._exit(exit_code)         # gloo's threads may still be letting go of tensors: tearing Python down aborts then
