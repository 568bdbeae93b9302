"""FLOPs of a training step, computed just from shapes."""
from data import Index
from model import LLaVAConfig

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


def recomputed_flops(config: LLaVAConfig, parts: list[str], recompute: str, tokens: float, squares: float,
                     images: float) -> float:
    """FLOPs that activation checkpointing adds to a step: the forward pass of the blocks that keep only their input.

    It stops before a block's last product, whose result no gradient needs. What selective repeats in the decoder is
    elementwise, and not counted.
    """
    llm, vision = config.llm, config.vision
    S, C, D = vision.n_positions, llm.n_embd, vision.n_embd
    flops = 0.0
    if recompute == "full":
        flops += 2 * llm.n_layer * (tokens * C * (4 * C + llm.n_inner) + squares * C)
    if recompute != "none" and "vision" in parts:
        flops += images * vision.n_used * (2 * S * D * (4 * D + vision.n_inner) + 4 * S * S * D)
    return flops


def picture_cost(config: LLaVAConfig, parts: list[str]) -> float:
    """Compute cost of an image in tower and projector, in units of a token's in the decoder's linear layers."""
    return step_flops(config, parts, 0, 0, 1, 0) / step_flops(config, parts, 1, 0, 0, 0)


def mean_sample(stage: str, config: LLaVAConfig, index: Index | None) -> tuple[float, float, float, float]:
    """Means of a sample's tokens, their square, pictures and supervised tokens: those of the data, or as published."""
    if index is not None:
        return (index.length.mean(), (index.length.astype(float) ** 2).mean(), index.image.mean(),
                index.supervised.mean())
    _, with_picture, text_tokens, supervised = PUBLISHED[stage]
    length = round(text_tokens + with_picture * config.vision.n_patches)
    return length, length ** 2, with_picture, supervised
