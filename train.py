"""Train LLaVA-Phi, all stages of the published recipe, on a laptop's CPU, on one GPU, or on many nodes.

There is always a process group and a mesh, even for one process; FSDP2 shards the trained parts and keeps frozen ones
whole. A step is a set of samples: its loss is the mean over all supervised tokens of the global batch, so neither the
number of processes nor the micro-batch size changes what is learned.

$ torchrun --nproc_per_node=8 train.py --stage sft             # optional: Phi-2 alone, on text conversations
$ torchrun --nproc_per_node=8 train.py --stage pretrain        # projector only, all else frozen: image -> caption
$ torchrun --nproc_per_node=8 train.py --stage finetune        # everything, on conversations
$ python train.py --stage finetune --model out/demo/pretrain --data my.json --images my_pictures --out out/mine

Every flag and the recipes' values are in lib/recipes.py.
"""
import dataclasses
import math
import os
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from lib.common import parse_or_exit, plural, print_last, run_command, torchrun_env
from lib.recipes import parse, recipe_note, settings, weighted

if __name__ == "__main__":
    ARGS = parse_or_exit(parse)         # --help and mistakes are answered before the imports below take seconds

# Micro-batches differ in length; expandable segments keep the CUDA allocator from fragmenting the GPU's memory. Torch
# reads the variable when it is imported. A user's own setting takes precedence.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data import Batch, Dataset, ImageConfig, Loader, Step, load_tokenizer
from lib.archives import find_place
from lib.checkpoint import (DATA_CHECKSUM, TrainState, is_finished, load_checkpoint, lock_output, plan_saving,
                            prepare_out, save_checkpoint, save_is_due, saved_on_error, try_to_save)
from lib.configs import config_of_run
from lib.device import choose_device, cpu_warning, memory_of, take_gpu, to_device, torch_dtype
from lib.flops import picture_cost
from lib.folders import Kind, Weights, open_weights, read_tensor
from lib.health import CORRUPTED, Corrupted, Recheck, doubts, projector_problem, rate_problems, validate, views_of
from lib.lora import apply_lora, merge_lora
from lib.metrics import Metrics, progress_line
from lib.plan import check_shared_memory, choose_gather, choose_recompute, count, print_plan, too_small
from lib.processes import (exit_code_of_stop, explain, join_group, launch_problem, on_every_process, on_process_0,
                           print0, synchronized_steps, watch_signals)
from lib.records import BAD_SAMPLES, read_bad_samples
from lib.save_weights import check_before_training, save_model
from lib.schedule import Mixture, epoch_order, run_length, steps_per_epoch
from load_weights import load_into
from model import MIPHA_CONFIG, LLaVAConfig, LLaVAPhi, Projector, init_weights, trained_parts

# ---------------------------------------------------------------------------------------------------
# Set-up: processes, model, optimizer, data


def setup(asked: str = "auto", dtype: str = "fp32") -> tuple[DeviceMesh, torch.device]:
    """Join torchrun's group, or make a group of one -> the mesh that FSDP shards over, and this process's device.

    On several nodes the weights are sharded within a node and replicated across nodes: gathering them in every layer
    then never leaves the fast links within a node. Nodes of one process each shard across all of them. ValueError where
    they cannot train.
    """
    problem = launch_problem()
    if problem:
        raise ValueError(problem)
    device, backend = torch.device("cpu"), "gloo"
    if asked == "cuda":
        choose_device(asked)                    # ValueError where there is none
    if torch.cuda.is_available() and asked != "cpu":
        device = take_gpu(dtype)
        backend = "cpu:gloo,cuda:nccl"          # small messages between hosts need not wait for the GPUs' queues
    join_group(backend, timedelta(minutes=10))
    world, local_world = dist.get_world_size(), torchrun_env().local_world
    sizes = sorted(set(on_every_process(lambda: local_world)))
    if len(sizes) > 1:
        raise ValueError(f"nodes with {' and '.join(map(str, sizes))} processes: start the same number on every node "
                         "(--nproc_per_node)")
    shape, names = (world,), ("shard",)
    if world > local_world > 1:
        shape, names = (world // local_world, local_world), ("replicate", "shard")
    return init_device_mesh(device.type, shape, mesh_dim_names=names), device


def folders(cfg: Namespace) -> list[Path]:
    """What the run starts from: a whole model, or a language model and perhaps a tower and a projector."""
    names = [cfg.model] if cfg.model else [cfg.llm, cfg.vision, cfg.projector]
    sources = [Path(name) for name in names if name]
    if Path(cfg.out).resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"--out {cfg.out} is what the run starts from; choose another folder")
    return sources


def has_tower(cfg: Namespace) -> bool:
    """Does the model have a vision tower? --stage sft trains a language model by itself."""
    return bool(cfg.model or cfg.vision)


def open_source(cfg: Namespace) -> tuple[Weights, LLaVAConfig]:
    """The weights that the run starts from, and their config with --image-mode and --dropout instead of its own."""
    expect = (Kind.LLAVA, Kind.MIPHA) if has_tower(cfg) else (Kind.PHI,)
    source = open_weights(*folders(cfg), expect=expect)
    return source, config_of_run(source.config, cfg.dropout, cfg.image_mode)


def build_on_meta(cfg: Namespace, config: LLaVAConfig) -> LLaVAPhi:
    """Build the model on the meta device, which costs no memory, and freeze what does not train."""
    with torch.device("meta"):
        model = LLaVAPhi(config, tower=has_tower(cfg))
        if cfg.lora_r:
            layers = ("attn", "mlp") if cfg.lora_on == "both" else (cfg.lora_on,)
            apply_lora(model.llm, cfg.lora_r, cfg.lora_alpha, layers, cfg.base_bits)
    freeze(model, cfg)
    return model


def freeze(model: LLaVAPhi, cfg: Namespace) -> None:
    """Freeze everything but --train minus --freeze, and the adapters. ValueError: a name that is not a part."""
    parts = [name for name, _ in model.named_children()]
    chosen, frozen = cfg.train.replace(",", " ").split(), cfg.freeze.replace(",", " ").split()
    unknown = [name for name in chosen + frozen if name not in parts]
    trained = [name for name in chosen if name not in frozen]
    problem = ""
    if unknown:
        problem = f"{unknown[0]!r} is not a part of the model; its parts are {', '.join(parts)}"
    elif not trained and not cfg.lora_r:
        problem = "nothing would be trained: --train minus --freeze is empty"
    if problem:
        raise ValueError(problem)
    if cfg.lora_r and "llm" in trained:
        trained.remove("llm")                   # its adapters are trained instead
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] in trained or ".lora_" in name)


def print_parts(model: LLaVAPhi, cfg: Namespace) -> None:
    """Print each part's number of parameters, and whether they are trained, at which peak rate."""
    adapters = count(p for name, p in model.named_parameters() if ".lora_" in name)
    rates = peak_lrs(cfg)
    for name, part in model.named_children():
        trained = name in trained_parts(model) and not (name == "llm" and adapters)
        how = f"trained at {rates[name]:g}" if trained else "frozen"
        print0(f"{name:10s} {count(part.parameters()):>13,} parameters, {how}")
    if adapters:
        print0(f"{'adapters':10s} {adapters:>13,} of llm's, trained at {cfg.lr:g}, scaled by {cfg.lora_alpha:g} / "
               f"{cfg.lora_r}")


def shard(model: LLaVAPhi, mesh: DeviceMesh, dtype: torch.dtype, gather: str = "off") -> None:
    """Apply FSDP2: a unit per decoder block, one for the tower, and the rest (projector, embeddings, head) in the root.

    FSDP holds the fp32 master weights and computes in `dtype`. Frozen parts are replicated in `dtype` on every process:
    they need no synchronization, and gathering them in every pass would cost much and save little. Trained weights are
    gathered for every micro-batch, or once per step (`gather`, see train_step).

    One process takes the same path, so that what one GPU tests is what eight run. Managing master weights by hand would
    save it two copies of the gradients per step: with --gather on, an estimated 49 GB of traffic or 10 ms of the 3.2 s
    that a step of stage 2 takes on an H200. On a CPU, FSDP's hooks take a measured 9 ms per step of the smallest model.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:
        if p.is_floating_point():               # rather than bytes that hold two 4-bit weights each
            p.data = p.data.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # FSDP would cast every floating-point argument of a block, but the rotary angles among them have to stay fp32.
    block_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    units = []
    if "llm" in trained_parts(model):
        units += model.llm.h
    if "vision" in trained_parts(model):
        units.append(model.vision)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=block_policy, reshard_after_forward=gather == "off")
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=False)
    model.gather = gather


def build(cfg: Namespace, config: LLaVAConfig, source: Weights, mesh: DeviceMesh, device: torch.device) -> LLaVAPhi:
    """Build, shard and load the model. It is sharded before it is allocated: no process holds more than its share."""
    model = build_on_meta(cfg, config)
    print_parts(model, cfg)
    # Processes that chose differently would call different collectives, so the one with the least memory decides.
    memory = min(on_every_process(partial(memory_of, device)))
    for warning in (cpu_warning(cfg.device, device, count(model.parameters())),
                    too_small(cfg, partial(build_on_meta, config=config), mesh.size(-1), memory)):
        if warning:
            print0(warning)
    recompute, gather = cfg.recompute, cfg.gather
    if recompute == "auto":
        recompute = choose_recompute(cfg, model, mesh.size(-1), memory)
    if gather == "auto":
        gather = choose_gather(cfg, model, mesh.size(-1), memory, recompute)
    model.llm.recompute = recompute
    if model.vision:
        model.vision.recompute = recompute != "none"
    shard(model, mesh, torch_dtype(cfg.dtype), gather)
    model.to_empty(device=device)
    init_new_parameters(model, cfg)
    read_weights(model, source, cfg)            # may bring a trained projector
    if cfg.compile:
        compile_blocks(model, device)
    print0(f"compute in {cfg.dtype}, recompute {recompute}, gather {gather}" + (", compiled" if cfg.compile else ""))
    return model.train()


def read_weights(model: LLaVAPhi, source: Weights, cfg: Namespace) -> None:
    """Stream in the weights, one tensor at a time: every process reads all of them and keeps its share."""
    load_into(model, source, copy_into, allow_missing=() if cfg.model else ("projector.",))


def init_new_parameters(model: LLaVAPhi, cfg: Namespace) -> None:
    """Initialize a new projector and adapters. Every process draws whole tensors, so their number does not matter."""
    generator = torch.Generator().manual_seed(cfg.seed)
    if model.projector and not cfg.model:
        fresh = Projector(model.config.vision.n_embd, model.config.llm.n_embd)
        init_weights(fresh, generator)
        for parameter, value in zip(model.projector.parameters(), fresh.parameters()):
            copy_into(parameter, value.data)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a"):
            copy_into(parameter, torch.randn(parameter.shape, generator=generator) / parameter.size(1) ** 0.5)
        elif name.endswith("lora_b"):
            copy_into(parameter, torch.zeros(parameter.shape))       # B A = 0: training starts from the base model


@torch.no_grad()
def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one, this process's share of it."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every process has the whole tensor and takes its share, without communication.
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(tensor)


def compile_blocks(model: LLaVAPhi, device: torch.device) -> None:
    """Compile each block, inside FSDP and activation checkpointing, with one graph for all lengths."""
    # Attention on a CPU loops over the samples' lengths, which change in every step, so it is left out.
    blocks = [block if device.type == "cuda" else block.mlp for block in model.llm.h]
    if model.vision:
        blocks += model.vision.h
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def peak_lrs(cfg: Namespace) -> dict[str, float]:
    """Each part's peak learning rate."""
    return {"projector": cfg.projector_lr or cfg.lr, "vision": cfg.vision_lr or cfg.lr, "llm": cfg.lr}


def make_optimizer(model: LLaVAPhi, cfg: Namespace) -> torch.optim.AdamW:
    """AdamW with two groups per part: matrices with weight decay, biases and LayerNorms without."""
    groups = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[name.split(".")[0], p.dim() > 1].append(p)
    rates = peak_lrs(cfg)
    optimizer = torch.optim.AdamW([dict(params=params, peak_lr=rates[part], lr=rates[part],
                                        weight_decay=cfg.weight_decay if is_matrix else 0.0)
                                   for (part, is_matrix), params in groups.items()],
                                  betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    # AdamW creates its moments in the first step, but a checkpoint has to be loaded into them before that.
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


def open_data(cfg: Namespace, config: LLaVAConfig, names: list[str]) -> Dataset | Mixture:
    # The sizes come from the model, so that an image takes as many positions as its tower makes patches.
    # Archives are opened later, but a place that is not there should be noticed before --out is touched.
    places = [find_place(Path(place)) for place in cfg.images] if has_tower(cfg) else []
    files, weights = zip(*map(weighted, names))
    parts = [Dataset(Path(file), places, load_tokenizer(folders(cfg)[0]), cfg.template,
                     ImageConfig.of(config.vision, cfg.image_mode), min(cfg.max_length, config.llm.block_size),
                     on_bad_sample=cfg.on_bad_sample, follow_links=cfg.follow_links,
                     cache_dir=Path(cfg.out) if Path(cfg.out).is_dir() else None)             # not there: --plan
             for file in files]
    return parts[0] if weights == (1.0,) else Mixture(parts, weights)


def make_index(data: Dataset, cfg: Namespace) -> None:
    """Process 0 tokenizes all samples and writes their index, which the others read."""
    def look() -> None:
        data.pictures                           # whose archives get an index, too
        data.index
    on_process_0(look)
    with_picture = int((data.index.image > 0).sum())
    problem = "" if data.index.supervised.any() else f"nothing to learn in its {plural(len(data), 'sample')}"
    if with_picture and not has_tower(cfg):
        problem = f"{plural(with_picture, 'sample')} with an image, and --stage {cfg.stage} is for text"
    if problem:
        raise ValueError(f"{data.path}: {problem}; python data.py check --data {data.path} says why")

# ---------------------------------------------------------------------------------------------------
# The step


def lr_at(step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Fraction of the peak rate at `step`: linear warm-up from 0, then decay to 0, as in Hugging Face's schedules."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A seed from these four, so that a resumed run draws the same dropout masks as an uninterrupted one."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1)[0])


def add_gradients(model: LLaVAPhi, batch: Batch, n_supervised: int, seed: int, device: torch.device,
                  last: bool) -> Tensor:
    """Forward and backward of a micro-batch -> its share of the step's loss, of each file of a Mixture.

    With --gather on, gathered weights are kept for the next micro-batch, and gradients accumulate locally in fp32. The
    last micro-batch reduces the gradients and frees the gathered weights, which the optimizer is about to change.
    """
    torch.manual_seed(seed)
    model.set_reshard_after_backward(last or model.gather == "off")
    model.set_requires_gradient_sync(last or model.gather == "off")
    losses = model(*to_device(batch, device)) / max(n_supervised, 1)
    # Each process divides by the global token count, so gradients have to be summed over the processes. FSDP averages
    # them; multiplying by the number of processes turns the mean into the sum.
    (losses.sum() * dist.get_world_size()).backward()
    return losses.detach()


def train_step(model: LLaVAPhi, optimizer: torch.optim.Optimizer, step: Step, cfg: Namespace, n_supervised: int,
               rate: float, device: torch.device, of_files: list | None = None,
               recheck: Recheck | None = None) -> tuple[float, float, bool]:
    """Forward, backward, update -> loss, gradient norm, skipped: the same three on every process.

    of_files: a list that receives, for each file of a Mixture, the sum of its losses and its supervised tokens.

    The loss is the mean over the step's n_supervised tokens of all micro-batches and processes, not a mean of means.
    If the loss or the gradient norm is not finite, the update is skipped.
    """
    tokens = torch.tensor([batch.split or [len(batch.targets)] for batch in step.batches]).sum(0)    # of each file
    total = torch.stack([torch.zeros(len(tokens)), tokens.float()]).to(device, non_blocking=True)
    # Every process has the same number of micro-batches, an empty one if need be: FSDP's collectives must match.
    for i, batch in enumerate(step.batches):
        seed = dropout_seed(cfg.seed, step.step, dist.get_rank(), i)
        add = partial(add_gradients, model, batch, n_supervised, seed, device)
        last = i + 1 == len(step.batches)
        if recheck and i == 0 and recheck.is_due(step.step):
            total[0] += recheck.add_twice(add, last, optimizer)
        else:
            total[0] += add(last)
    dist.all_reduce(total)

    # In the model's order, not the optimizer's: another order changes the norm's last digit, and with it the run.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).full_tensor()
    # All numbers are read at once: the only host-device synchronization in a step.
    *sums, norm = torch.cat([total.T.flatten(), norm.to(total)[None]]).tolist()
    loss = sum(sums[::2])
    if of_files is not None:
        of_files += [(n_supervised * loss_of_file, n) for loss_of_file, n in zip(sums[::2], sums[1::2])]
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if not skipped:
        # The formula of clip_grad_norm_, which would compute the norm a second time.
        if cfg.grad_clip > 0 and norm > cfg.grad_clip:
            torch._foreach_mul_(grads, cfg.grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, skipped

# ---------------------------------------------------------------------------------------------------
# The loop


def run(cfg: Namespace, config: LLaVAConfig, source: Weights, mesh: DeviceMesh, device: torch.device) -> int | None:
    """One run, from data to saved model -> exit code (None: 0). Every process goes through all of it in this order."""
    began = time.perf_counter()
    out = Path(cfg.out)
    if is_finished(settings(cfg)):
        print0(f"already finished: {out} holds the trained model (--resume never trains afresh)")
        return
    # From here on a signal is only recorded, and acted on after the next step.
    signals = watch_signals()
    data = open_data(cfg, config, cfg.data)
    held_out = open_data(cfg, config, [cfg.val_data]) if cfg.val_data else None
    flags = settings(cfg) | {DATA_CHECKSUM: data.checksum}
    checkpoint = prepare_out(flags)
    make_index(data, cfg)
    if held_out is not None:                    # not `if held_out`, which asks for its length and so makes the index
        make_index(held_out, cfg)
    on_every_process(partial(check_shared_memory, cfg, data))
    print0(f"{dist.get_world_size()} x {device.type}, torch {torch.__version__}\n{data.path}: {data.summary()}")
    if has_tower(cfg) and (note := recipe_note(source.has_siglip, cfg.recipe)):
        print0(note)

    model = build(cfg, config, source, mesh, device)
    state = TrainState(flags, source.paths, model, make_optimizer(model, cfg))
    if checkpoint:
        load_checkpoint(checkpoint, state)
    steps = run_length(len(data), cfg.global_batch, cfg.epochs, cfg.max_steps)
    warmup = math.ceil(cfg.warmup * steps)
    print_run(state, cfg, source, steps, warmup)
    with saved_on_error(state):
        metrics = Metrics(out, state.step, trained_parts(model), device, again=state.step == steps)
        metrics.start_tracker(cfg.track, state.settings)
        measure = partial(measure_held_out, state, cfg, source, held_out, steps, metrics, device)
        is_complete = train(state, cfg, data, steps, warmup, metrics, measure, signals, device)
        metrics.close_tracker()
        if bad := on_process_0(lambda: len(read_bad_samples(out))):
            print0(f"bad samples skipped: {bad:,}; {out / BAD_SAMPLES} says what is wrong with them")
        if not is_complete:
            print0(f"stopped after step {state.step}; the same command goes on from there")
            return exit_code_of_stop(signals)
        losses = dict(metrics.val_losses)       # a run resumed in a new folder has none from before the training
        if cfg.keep_best and losses.get(0) == min(losses.values()):
            print0(f"no {out / 'best'}: the lowest validation loss is the first one, from before the training")
        save_final(cfg, source, model, out)
    print0(f"done in {(time.perf_counter() - began) / 60:.1f} min: {out}")


def print_run(state: TrainState, cfg: Namespace, source: Weights, steps: int, warmup: int) -> None:
    """Print what the run is going to do, and what speaks against it. OSError if the disk has no room for it."""
    for problem in [projector_problem(cfg, source), *rate_problems(state.model, peak_lrs(cfg))]:
        if problem:
            print0(f"WARNING: {problem}")
    print0(f"{plural(steps, 'step')} of {plural(cfg.global_batch, 'sample')}, the first {warmup:,} warming up"
           + (f"; going on from {state.newest}" if state.newest else ""))
    if steps == warmup == 1:
        print0("note: the first step of a warm-up has the rate 0, so this run learns nothing: take a smaller "
               "--global-batch, more --epochs, or --warmup 0")
    models = 1 + 2 * cfg.keep_best              # the best one is replaced after the next has been written
    print0(plan_saving(state, models * count(state.model.parameters()) * torch_dtype(cfg.dtype).itemsize))


def train(state: TrainState, cfg: Namespace, data: Dataset, steps: int, warmup: int, metrics: Metrics,
          measure: Callable[[], None], signals: list[int], device: torch.device) -> bool:
    """Train from state.step on -> True if the run is over, False if stopped early, with a checkpoint.

    measure: looks at the held-out samples, if there are any.
    """
    loader = make_loader(cfg, state.model, data, steps, device, start_step=state.step, group=cfg.group)
    recheck = Recheck(state.model, cfg.recheck_every, device)
    skipped_in_a_row = 0
    if state.step == 0:                         # a resumed run already has this in its metrics
        measure()
    metrics.start_clock()
    state.tried_at = time.monotonic()
    for step, n_supervised, stop, save in synchronized_steps(loader, signals, partial(save_is_due, state)):
        rate = lr_at(step.step, steps, warmup, cfg.schedule)
        of_files = []
        loss, norm, skipped = train_step(state.model, state.optimizer, step, cfg, n_supervised, rate, device, of_files,
                                         recheck)
        state.step += 1
        state.updates += not skipped
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0

        record = metrics.add_step(step, data, state.model.config, n_supervised, loss, norm, rate * cfg.lr, skipped,
                                  of_files)
        if problem := metrics.rise(warmup):
            print0(f"WARNING: {problem}")
        if skipped or state.step % cfg.log_every == 0 or state.step == steps:
            print0(progress_line(record, steps, metrics.seconds_a_step() * (steps - state.step)))
        if skipped_in_a_row == 5:
            # A bad sample spoils one step. Five in a row mean that the run has diverged.
            raise ValueError("loss or gradient was not finite in 5 steps in a row, the last with samples "
                             f"{step.sample_ids[:8]}; all are in {metrics.skipped_path}. Look at them, or lower --lr")
        if state.step == steps:
            break                               # the final model is written instead of a checkpoint
        if cfg.val_every and state.step % cfg.val_every == 0:
            measure()
            if reason := metrics.out_of_patience(cfg.patience):
                print0(reason)
                return True
        if stop:
            save_checkpoint(state)
            return False
        if save:
            try_to_save(state)
        metrics.restart_step_clock()            # validation and saving do not count towards the next step's time
    measure()
    return True


def make_loader(cfg: Namespace, model: LLaVAPhi, data: Dataset, steps: int, device: torch.device,
                start_step: int = 0, group: str = "none") -> Loader:
    cost = picture_cost(model.config, trained_parts(model))
    return Loader(data, global_batch=cfg.global_batch, micro_tokens=cfg.micro_tokens, rank=dist.get_rank(),
                  world=dist.get_world_size(), seed=cfg.seed, steps=steps, start_step=start_step, workers=cfg.workers,
                  group=group, pin=device.type == "cuda", picture_cost=cost)


def measure_held_out(state: TrainState, cfg: Namespace, source: Weights, held_out: Dataset | None, steps: int,
                     metrics: Metrics, device: torch.device) -> None:
    if held_out is None:
        return
    loader = make_loader(cfg, state.model, held_out, steps_per_epoch(len(held_out), cfg.global_batch), device)
    held = validate(state.model, loader, device, views_of(cfg, held_out, state.step))
    lowest = metrics.add_validation(state.step, held.record())
    print0(f"step {state.step}/{steps} | {held.line()}")
    for doubt in doubts(held, state.step, steps):
        print0(f"WARNING: {doubt}")
    if cfg.keep_best and lowest and state.step:         # after step 0 it is the model that the run starts from
        best = Path(cfg.out) / "best"
        try:
            save_final(cfg, source, state.model, best)
            print0(f"saved {best}: the lowest validation loss so far")
        except OSError as e:
            print0(f"warning: the best model so far was not written to {best} ({e}); training goes on")


def save_final(cfg: Namespace, source: Weights, model: LLaVAPhi, out: Path) -> None:
    """Write the trained model to `out`. Every process takes part in gathering it; process 0 writes."""
    dtype = torch_dtype(cfg.dtype)
    tensors = {}
    in_4_bits = []
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if not p.is_floating_point():
            in_4_bits.append(name)
        elif dist.get_rank() == 0:
            tensors[name] = whole.detach().to("cpu", dtype)

    def write() -> None:
        for name in in_4_bits:                  # their adapters are merged into the original, more precise weights
            tensors[name] = read_tensor(source, name).to(dtype)
        save_model(out, merge_lora(tensors, cfg.lora_alpha), model.config, source)
    on_process_0(write)


def main(args: Namespace) -> int | None:
    if args.plot:
        from lib.plot import plot               # imported here because training needs none of it
        plot(args.plot, Path(args.plot_to or args.plot[0] / "loss.html"), args.against)
        return
    if args.plan:
        # Planning needs no downloads: without the folders it assumes the published model's sizes and data.
        config = MIPHA_CONFIG if args.recipe == "mipha" else LLaVAConfig()
        index = None
        if all(folder.exists() for folder in folders(args)):
            _, config = open_source(args)
            if all(Path(file).is_file() for file, _ in map(weighted, args.data)):
                data = open_data(args, config, args.data)
                epoch = epoch_order(args.seed, data.index.length, data.index.image, args.global_batch, args.group, 0,
                                    data.shares)
                index = data.index._make(column[epoch] for column in data.index)
        print_parts(build_on_meta(args, config), args)
        print_plan(args, config, partial(build_on_meta, config=config), index)
        return
    source, config = open_source(args)
    check_before_training(config, source)
    mesh, device = setup(args.device, args.dtype)
    try:
        with lock_output(Path(args.out)):
            exit_code = run(args, config, source, mesh, device)
    except Corrupted as e:
        if torchrun_env().local_rank:
            return 0                            # one failure is enough for torchrun's list
        print_last(f"error: {e}")
        return CORRUPTED
    except RuntimeError as e:
        problem = explain(e, args)
        if not problem:
            raise
        raise OSError(problem) from None
    # Only after success: leaving waits for the other processes, which may be waiting for one that failed.
    dist.destroy_process_group()
    return exit_code


if __name__ == "__main__":
    exit_code = run_command(main, ARGS)
    run_command(sys.stdout.flush)       # a log on a full disk, or a reader that has gone, does not spoil what is done
    os._exit(exit_code)         # gloo's threads may still be releasing tensors, and Python's shutdown would then abort
