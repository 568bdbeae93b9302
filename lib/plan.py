"""Memory per GPU and hours of a training run, computed just from shapes; shared memory for its data workers."""
import math
import mmap
import os
import shutil
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

from data import Dataset, Index
from lib.checkpoint import host_memory_to_save
from lib.common import plural, torchrun_env
from lib.device import USABLE, planned_card, torch_dtype
from lib.flops import PUBLISHED, mean_sample, recomputed_flops, step_flops
from lib.recipes import RECIPES, parse, replace, weighted
from lib.schedule import run_length
from lib.workers import AHEAD
from model import LLaVAConfig, LLaVAPhi, trained_parts

RECOMPUTE_MODES = ("none", "selective", "full")         # the fastest first


def count(parameters) -> int:
    """Number of weights in these parameters, of which a byte holds two in 4 bits."""
    return sum(p.numel() if p.is_floating_point() else 2 * p.numel() for p in parameters)


def memory_plan(cfg: Namespace, model: LLaVAPhi, shards: int, recompute: str, gather: str,
                pictures: float | None = None) -> dict[str, float]:
    """Bytes on one of `shards` GPUs at the peak of a step with several micro-batches, by kind.

    pictures: number in a micro-batch. None: as many as --micro-tokens has room for, since texts may be short.
    """
    llm = model.config.llm
    if pictures is None:
        pictures = cfg.micro_tokens / model.config.vision.n_patches if model.vision else 0
    width = torch_dtype(cfg.dtype).itemsize
    total = count(model.parameters())
    trained = count(p for p in model.parameters() if p.requires_grad)
    in_4_bits = count(p for p in model.parameters() if not p.is_floating_point())
    scales = sum(b.nbytes for b in model.buffers())

    # FSDP's units: the decoder's blocks, the tower, and the root with all other trained weights.
    parts = trained_parts(model)
    block = count(model.llm.h[0].parameters()) if "llm" in parts else 0
    tower = count(model.vision.parameters()) if "vision" in parts else 0
    root = trained - tower - block * llm.n_layer
    if gather == "on":
        gathered, gradients = trained, 4 * trained
    else:
        gathered, gradients = root + block, 4 * trained / shards

    # The peak is where the backward pass begins: all activations are alive, and a chunk of logits takes 12 bytes each,
    # for log-probabilities, their gradient and that of the logits, in fp32. With few tokens the peak is at the end of
    # the backward pass, where a unit's gradients are copied to fp32 for reduction.
    activations = activation_bytes(model, recompute, width, cfg.micro_tokens, pictures)
    logits = 12 * min(4096, cfg.micro_tokens) * llm.vocab_size + width * root
    reduction = (width + 4) * max(root, tower, block) + width * tower
    return {
        "frozen weights": width * (total - trained - in_4_bits) + in_4_bits / 2 + scales,
        "fp32 weights and moments, sharded": 12 * trained / shards,
        "gradients": gradients,
        "gathered weights": width * gathered,
        "activations and logits": max(activations + logits, reduction),
        "workspace": 1e9,       # cuBLAS, NCCL and the allocator's fragments: a guess
    }


def activation_bytes(model: LLaVAPhi, recompute: str, width: int, tokens: int, pictures: float) -> float:
    """Bytes that the forward pass keeps for the backward pass, at `width` bytes per number."""
    llm, vision = model.config.llm, model.config.vision
    C, I = llm.n_embd, llm.n_inner
    # A decoder block keeps its input, LayerNorm's output, q, k and v, rotated q and k, attention's output, and two
    # tensors of the MLP's width, before and after GELU. A frozen linear layer does not need its input. In fp32, without
    # variable-length attention, there is a copy of attention's output.
    learns = any(p.requires_grad for p in model.llm.parameters())
    block = {
        "none": width * (8 * C + 2 * I if learns else 7 * C + I),
        "selective": width * (5 * C + I),
        "full": width * C,
    }[recompute]
    if recompute == "none" and learns and width == 4:
        block += width * C
    if recompute == "none" and llm.dropout:
        block += 2 * C                              # two masks with one byte per number
    decoder = tokens * (llm.n_layer * block + width * 2 * C)        # plus embeddings, before and after adding images
    if model.vision is None:
        return decoder

    D = vision.n_embd
    projector = pictures * vision.n_patches * width * (3 * C + D)
    if "vision" not in trained_parts(model):
        return decoder + projector
    if recompute == "none":
        # A tower block keeps its input, the outputs of two LayerNorms, q, k, v, attention's output, the sum after it,
        # and two tensors of the MLP's width; CLIP's quick GELU needs three.
        tower_block = 8 * D + (3 if vision.gelu == "quick" else 2) * vision.n_inner
    else:
        tower_block = D
    return decoder + projector + pictures * vision.n_positions * width * (vision.n_used * tower_block + 3 * D)


def fits(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float, recompute: str, gather: str) -> bool:
    return sum(memory_plan(cfg, model, shards, recompute, gather).values()) <= memory


def choose_recompute(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float) -> str:
    """The fastest --recompute with which a micro-batch fits into `memory` bytes, or "full" if none does."""
    for mode in ("none",) if cfg.compile else ("none", "selective"):        # --compile refuses selective
        if fits(cfg, model, shards, memory, mode, "off"):
            return mode
    return "full"


def choose_gather(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float, recompute: str) -> str:
    """--gather on, if there is memory left for it after --recompute has been chosen.

    Recomputation costs more than communication, which FSDP overlaps with compute within a node.
    """
    return "on" if fits(cfg, model, shards, memory, recompute, "on") else "off"


def most_tokens(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float, recompute: str, gather: str) -> int:
    """The largest --micro-tokens that fits, in steps of 1024 up to 24,576; 0 if none does."""
    sizes = range(1024, 24 * 1024 + 1, 1024)
    return max((n for n in sizes if fits(replace(cfg, micro_tokens=n), model, shards, memory, recompute, gather)),
               default=0)


def too_small(cfg: Namespace, build: Callable[[Namespace], LLaVAPhi], shards: int, memory: float) -> str:
    """A line that says so if even full recomputation needs more than `memory` bytes, with flags that fit; else "".

    build: settings -> their model, on the meta device.
    """
    model = build(cfg)
    need = sum(memory_plan(cfg, model, shards, "full", "off").values())
    if need <= memory:
        return ""
    small = {"micro_tokens": min(2048, cfg.micro_tokens)}
    changes = [small]
    if "llm" in cfg.train:
        frozen = {"freeze": f"{cfg.freeze},vision".strip(",")} if "vision" in trained_parts(model) else {}
        lora = {"lora_r": cfg.lora_r or 64}
        qlora = lora | {"base_bits": 4}
        changes += [frozen, lora, lora | frozen, qlora, qlora | frozen, qlora | frozen | small]
    advice = "take larger GPUs or more of them"
    for change in changes:
        other = replace(cfg, **change)
        with suppress(ValueError):              # a model too narrow for 4 bits
            if fits(other, build(other), shards, memory, "full", "off"):
                flags = [f"--{name.replace('_', '-')} {value}" for name, value in change.items()]
                advice = f"{' '.join(flags)} would fit"
                break
    return (f"planned {need / 1e9:.0f} GB on each GPU even with --recompute full, and {memory / 1e9:.0f} GB can be "
            f"used: {advice}")


def check_shared_memory(cfg: Namespace, data: Dataset) -> None:
    """OSError if this machine's data workers may run out of shared memory, where a worker dies or waits for ever."""
    where = Path("/dev/shm")
    here = torchrun_env()
    pixels = 3 * data.image_config.size ** 2 * bool(data.index.image.any())
    pictures = min(cfg.global_batch, math.ceil(cfg.micro_tokens / data.image_config.n_patches))
    # For each position a token, and at most a label, a place in the loss and a place for a patch, all int64. Each of a
    # batch's six tensors begins a page of memory.
    micro_batch = 8 * 4 * cfg.micro_tokens + pixels * pictures + 6 * mmap.PAGESIZE
    loaders = 2 if cfg.val_data else 1
    in_use = pixels * math.ceil(cfg.global_batch / here.world)          # by the step that is being computed
    need = here.local_world * (loaders * min(cfg.workers, os.cpu_count()) * AHEAD * micro_batch + in_use)
    free = shutil.disk_usage(where).free if where.is_dir() else math.inf            # macOS has no such folder
    if cfg.workers and need > free:
        raise OSError(f"{where} on {socket.gethostname()} has {free / 1e9:.2f} GB free, and the data workers take up "
                      f"to {need / 1e9:.2f} GB: start the container with --shm-size={math.ceil(need / 1e9) + 1}g or "
                      "--ipc=host, or give --workers 0")


def print_plan(cfg: Namespace, config: LLaVAConfig, build: Callable[[Namespace], LLaVAPhi],
               index: Index | None) -> None:
    """`--plan`: what fits on --gpus GPUs, and for how long they would train. Needs no weights.

    index: of the data, where that is there.
    """
    model = build(cfg)
    parts = trained_parts(model)
    # A weight is sharded over a node's GPUs, or over all of them if each node has only one.
    shards = cfg.gpus if cfg.gpus_per_node == 1 else min(cfg.gpus, cfg.gpus_per_node)
    card_memory, peak = planned_card(cfg.gpu, cfg.gpu_memory, cfg.tflops, cfg.dtype)
    memory = USABLE * card_memory
    samples = PUBLISHED[cfg.stage][0] if index is None else len(index.length)
    steps = run_length(samples, cfg.global_batch, cfg.epochs, cfg.max_steps)
    seen = min(cfg.epochs * samples, steps * cfg.global_batch)      # an epoch's last step may be smaller
    mean = tokens, squares, images, _ = mean_sample(cfg.stage, config, index)
    flops = step_flops(config, parts, *mean)

    columns = []
    for mode, gather in product(RECOMPUTE_MODES, ("on", "off")):
        column = {"--recompute": mode, "--gather": gather}
        plan = memory_plan(cfg, model, shards, mode, gather)
        column |= {f"{kind}, GB": f"{size / 1e9:.1f}" for kind, size in plan.items()}
        column[f"in all, with --micro-tokens {cfg.micro_tokens}"] = f"{sum(plan.values()) / 1e9:.1f}"
        column["the most --micro-tokens"] = most_tokens(cfg, model, shards, memory, mode, gather) or "none"
        if peak:
            total = seen * (flops + recomputed_flops(config, parts, mode, tokens, squares, images))
            column[f"hours at half of {peak / 1e12:g} TFLOP/s"] = f"{total / cfg.gpus / (peak / 2) / 3600:.1f}"
        columns.append(column)
    print(f"stage {cfg.stage} in {cfg.dtype} on {cfg.gpus} x {card_memory / 1e9:g} GB, of which {memory / 1e9:.0f} can "
          f"be used; weights sharded over {shards}\n")
    for title in columns[0]:
        print(f"{title:40}" + "".join(f"{column[title]:>11}" for column in columns))
    print_choice(cfg, model, build, shards, memory)
    lengths = f"of {' '.join(cfg.data)}" if index else "as published"
    if index is None and all(Path(file).is_file() for file, _ in map(weighted, cfg.data)):
        lengths += ", since the model's folder is not here"
    print(f"{plural(steps, 'step')} of {plural(cfg.global_batch, 'sample')} of {tokens:.0f} tokens: "
          f"{cfg.global_batch * flops / 1e15:.2f} PFLOP a step; lengths {lengths}"
          + ("" if peak else "; --tflops gives hours, and so does --gpu in bf16"))


def print_choice(cfg: Namespace, model: LLaVAPhi, build: Callable[[Namespace], LLaVAPhi], shards: int,
                 memory: float) -> None:
    """Print what auto takes, or what would fit; whether stage 1, which the run starts from, fits; what a save takes."""
    mode = choose_recompute(cfg, model, shards, memory)
    gather = choose_gather(cfg, model, shards, memory, mode)
    print("\n" + (too_small(cfg, build, shards, memory) or f"auto takes --recompute {mode} --gather {gather}"))
    if cfg.stage == "finetune" and cfg.model == RECIPES[cfg.recipe]["pretrain"]["out"]:
        before = parse(["--stage", "pretrain", "--recipe", cfg.recipe, "--dtype", cfg.dtype, "--micro-tokens", "2048"])
        problem = too_small(before, build, shards, memory)
        if problem:
            print(f"--model {cfg.model} is what stage 1 writes, which does not fit here: {problem.split(':')[0]}. "
                  "Start from a whole model instead (--model checkpoints/llava-phi), or run stage 1 elsewhere")
    trained = count(p for p in model.parameters() if p.requires_grad)
    in_memory = host_memory_to_save(min(cfg.gpus, cfg.gpus_per_node))
    print(f"a checkpoint takes {12 * trained / 1e9:.1f} GB of disk, and writing it {in_memory / 1e9:.1f} GB of host "
          "memory on each node")
