"""Memory per GPU and FLOPs of a training run, computed just from shapes."""
import math
from argparse import Namespace
from collections.abc import Callable

from lib.checkpoint import host_memory_to_save
from lib.common import plural
from lib.device import USABLE, torch_dtype
from lib.recipes import replace
from lib.schedule import steps_per_epoch
from model import LLaVAConfig, LLaVAPhi, trained_parts

RECOMPUTE_MODES = ("none", "selective", "full")         # the fastest first
# Samples, the fraction of them with an image, mean text tokens and mean supervised tokens per sample. Estimates;
# `data.py check` measures them on the real data.
PUBLISHED = {
    "pretrain": (558_128, 1.0, 21, 21),
    "finetune": (665_298, 0.939, 307, 132),
    "sft": (40_688, 0.0, 1126, 800),
}


def step_flops(config: LLaVAConfig, parts: list[str], tokens: float, squares: float, images: float,
               supervised: float) -> float:
    """Model FLOPs of one step, 2 per multiply-add, not counting recomputation.

    parts: those that are trained. squares: sum over sequences of length ** 2. supervised: number of such tokens.
    """
    llm, vision = config.llm, config.vision
    S, C, D = vision.n_positions, llm.n_embd, vision.n_embd
    dense = tokens * 2 * llm.n_layer * (4 * C * C + 2 * C * llm.n_inner) + supervised * 2 * C * llm.vocab_size
    attention = squares * 2 * llm.n_layer * C               # causal: only half of the square is computed
    patches = vision.n_patches * 2 * D * 3 * vision.patch_size ** 2
    tower_block = 2 * S * (4 * D * D + 2 * D * vision.n_inner) + 4 * S * S * D
    tower = images * (patches + vision.n_used * tower_block)
    projector = images * 2 * vision.n_patches * (D * C + C * C)
    # The forward pass counts 1, the backward pass 1 for the gradient of the input and 1 for that of the weights. A
    # frozen decoder still has to pass the gradient on to the projector; a frozen tower has nothing to pass it on to.
    passes = {name: 3 if name in parts else 2 for name in ("llm", "projector")}
    passes["vision"] = 3 if "vision" in parts else 1
    return dense * passes["llm"] + attention * 3 + projector * passes["projector"] + tower * passes["vision"]


def picture_cost(config: LLaVAConfig, parts: list[str]) -> float:
    """Compute cost of an image in tower and projector, in units of a token's in the decoder's linear layers."""
    return step_flops(config, parts, 0, 0, 1, 0) / step_flops(config, parts, 1, 0, 0, 0)

# ---------------------------------------------------------------------------------------------------
# Memory


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
    for mode in ("none", "selective"):
        refused = mode == "selective" and cfg.compile
        if not refused and fits(cfg, model, shards, memory, mode, "off"):
            return mode
    return "full"


def choose_gather(cfg: Namespace, model: LLaVAPhi, shards: int, memory: float, recompute: str) -> str:
    """--gather on, if there is memory left for it after --recompute has been chosen.

    Recomputation costs more than communication, which FSDP overlaps with compute within a node.
    """
    return "on" if fits(cfg, model, shards, memory, recompute, "on") else "off"


def shards_of(gpus: int, per_node: int) -> int:
    """The number of GPUs that a weight is sharded over: a node's, or all of them if each node has only one."""
    return gpus if per_node == 1 else min(gpus, per_node)


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
        try:
            other_fits = fits(other, build(other), shards, memory, "full", "off")
        except ValueError:                      # a model too narrow for 4 bits
            continue
        if other_fits:
            advice = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items()) + " would fit"
            break
    return (f"planned {need / 1e9:.0f} GB on each GPU even with --recompute full, and {memory / 1e9:.0f} GB can be "
            f"used: {advice}")


def print_plan(cfg: Namespace, config: LLaVAConfig, build: Callable[[Namespace], LLaVAPhi]) -> None:
    """`--plan`: what fits on --gpus GPUs with --gpu-memory GB each. Needs no weights."""
    model = build(cfg)
    shards = shards_of(cfg.gpus, cfg.gpus_per_node)
    memory = USABLE * cfg.gpu_memory * 1e9
    columns = [(mode, gather) for mode in RECOMPUTE_MODES for gather in ("on", "off")]
    plans = [memory_plan(cfg, model, shards, *column) for column in columns]
    rows = {"--recompute": [mode for mode, _ in columns], "--gather": [gather for _, gather in columns]}
    for kind in plans[0]:
        rows[kind + ", GB"] = [f"{plan[kind] / 1e9:.1f}" for plan in plans]
    rows[f"in all, with --micro-tokens {cfg.micro_tokens}"] = [f"{sum(plan.values()) / 1e9:.1f}" for plan in plans]
    rows["the most --micro-tokens"] = [most_tokens(cfg, model, shards, memory, *column) or "none" for column in columns]
    print(f"stage {cfg.stage} in {cfg.dtype} on {cfg.gpus} x {cfg.gpu_memory:g} GB, of which {memory / 1e9:.0f} can be "
          f"used; weights sharded over {shards}\n")
    for title, cells in rows.items():
        print(f"{title:40}" + "".join(f"{cell:>11}" for cell in cells))

    mode = choose_recompute(cfg, model, shards, memory)
    gather = choose_gather(cfg, model, shards, memory, mode)
    print("\n" + (too_small(cfg, build, shards, memory) or f"auto takes --recompute {mode} --gather {gather}"))
    trained = count(p for p in model.parameters() if p.requires_grad)
    in_memory = host_memory_to_save(min(cfg.gpus, cfg.gpus_per_node))
    print(f"a checkpoint takes {12 * trained / 1e9:.1f} GB of disk, and writing it {in_memory / 1e9:.1f} GB of host "
          "memory on each node")

    samples, with_picture, text_tokens, supervised = PUBLISHED[cfg.stage]
    length = round(text_tokens + with_picture * config.vision.n_patches)
    steps = math.ceil(cfg.epochs * steps_per_epoch(samples, cfg.global_batch))
    flops = cfg.global_batch * step_flops(config, trained_parts(model), length, length ** 2, with_picture, supervised)
    print(f"{plural(steps, 'step')} of {plural(cfg.global_batch, 'sample')} of {length} tokens: {flops / 1e15:.2f} PFLOP a step")
