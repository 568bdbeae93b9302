"""What a training run will need: memory, floating-point operations and time, from shapes alone."""
import math
import os
from argparse import Namespace
from bisect import bisect_left

import torch

from lib.common import torch_dtype
from lib.recipes import replace
from lib.schedule import steps_per_epoch
from model import LLaVAConfig, LLaVAPhi, trained_parts

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}    # dense bf16, datasheets


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
    """What a picture's way through tower and projector costs, in tokens through the decoder's linear layers."""
    return step_flops(config, parts, 0, 0, 1, 0) / step_flops(config, parts, 1, 0, 0, 0)


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


def memory_plan(cfg: Namespace, model: LLaVAPhi, shards: int,
                gather: str = "off") -> tuple[dict[str, float], dict[str, float]]:
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
        gathered = root + tower + 2 * block if gather == "off" else trained     # one block in use, the next on its way
        waiting = 4 * trained if gather == "on" else 4 * one_unit               # fp32 gradients, not yet shared out
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


def fits_in(memory: float, cfg: Namespace, model: LLaVAPhi, shards: int, recompute: str, gather: str) -> bool:
    """Whether a micro-batch fits into so many bytes."""
    always, per_token = memory_plan(cfg, model, shards, gather)
    return sum(always.values()) + cfg.micro_tokens * per_token[recompute] <= memory


def choose_recompute(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float) -> str:
    """The fastest --recompute with which a micro-batch fits into so many bytes; the leanest if none does."""
    for mode in ("none", "selective"):
        refused = mode == "selective" and cfg.compile
        if not refused and fits_in(memory, cfg, model, shards, mode, "off"):
            return mode
    return "full"


def choose_gather(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float, recompute: str) -> str:
    """--gather on, if there is memory left for it once --recompute has been chosen.

    Recomputing costs more than sending: within a node, FSDP sends while it computes.
    """
    return "on" if fits_in(memory, cfg, model, shards, recompute, "on") else "off"


def memory_of(device: torch.device) -> float:
    """Bytes that a process may fill."""
    if device.type == "cuda":
        return 0.95 * torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


def plan_micro_batch(cfg: Namespace, model: LLaVAPhi, gpus: int, memory: float, share: int) -> dict[str, int]:
    """--micro-tokens by --recompute, the best first: what fits, not above a GPU's `share` of a step, in steps of 1024.

    Below 8192 tokens the matrix products are too small to be fast: better to recompute than to take less at a time.
    """
    sizes = range(1024, min(24576, share + 1023) + 1, 1024)
    fits = {}
    for mode in RECOMPUTE_MODES:
        def is_too_large(micro_tokens: int) -> bool:
            # Asked for each size anew, since the logits' share depends on it, too.
            smaller = replace(cfg, micro_tokens=micro_tokens)
            return not fits_in(memory, smaller, model, min(gpus, GPUS_A_NODE), mode, "off")
        n_fitting = bisect_left(sizes, True, key=is_too_large)
        if n_fitting > 0:
            fits[mode] = sizes[n_fitting - 1]
    return dict(sorted(fits.items(), key=lambda mode_and_n: -min(mode_and_n[1], 8192)))


def print_plan(cfg: Namespace, config: LLaVAConfig, model: LLaVAPhi, gpus: int, gpu_memory: float) -> None:
    """`--plan`: what a run needs on these GPUs, and how long it takes on 1 to 512, from formulas, without weights."""
    samples, with_picture, text_tokens, supervised = PUBLISHED[cfg.stage]
    length = round(text_tokens + with_picture * config.vision.n_patches)
    print(f"stage {cfg.stage} on {gpus} x {gpu_memory:.0f} GB\n")
    print_memory(cfg, model, gpus, gpu_memory * 1e9, cfg.global_batch * length // gpus)
    steps = math.ceil(cfg.epochs * steps_per_epoch(samples, cfg.global_batch))
    pictures = f", {with_picture:.0%} with a picture" if with_picture else ""
    flops = cfg.global_batch * step_flops(config, trained_parts(model), length, length ** 2, with_picture, supervised)
    print(f"\n{steps:,} steps of {cfg.global_batch} samples of {length} tokens, {supervised} supervised{pictures}: "
          f"{flops / 1e15:.2f} PFLOP a step")
    print_hours(cfg, model, gpu_memory * 1e9, steps, flops, cfg.global_batch * length)


def print_memory(cfg: Namespace, model: LLaVAPhi, gpus: int, memory: float, share: int) -> None:
    fits = plan_micro_batch(cfg, model, gpus, memory, share)
    if fits:
        cfg = replace(cfg, micro_tokens=next(iter(fits.values())))
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


def print_small_gpus(cfg: Namespace, model: LLaVAPhi) -> None:
    """What QLoRA is for: the largest micro-batch that one small GPU can take, with full recomputation."""
    print("\none GPU with --base-bits 4 --recompute full:")
    for gb in (8, 12, 16, 24):
        verdict = "does not fit" + ("; with --freeze vision it may" if "vision" in trained_parts(model) else "")
        for micro_tokens in (1024, 2048, 4096, 8192, 16384):
            smaller = replace(cfg, micro_tokens=micro_tokens)
            if fits_in(gb * 1e9, smaller, model, shards=1, recompute="full", gather="off"):
                verdict = f"--micro-tokens {micro_tokens}"
        print(f"  {gb:2d} GB  {verdict}")


def print_hours(cfg: Namespace, model: LLaVAPhi, memory: float, steps: int, flops: float, step_tokens: int) -> None:
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
            micro = replace(cfg, micro_tokens=micro_tokens)
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
    weights = 2 if gather == "on" else (2 + 2) * micro_batches
    reductions = 1 if gather == "on" else micro_batches
    between_nodes = 8 * reductions if gpus > near else 0
    return trained * ((weights + 4 * reductions) * (near - 1) + between_nodes) / near
