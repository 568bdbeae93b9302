"""Fold the bias of Phi-2's head into the head's weight, exactly, since transformers' Llava has no such bias.

The last LayerNorm gives h = gamma * n + beta, where n sums to zero, because its mean was subtracted. So for the
direction v that is proportional to 1 / gamma, the product h . v = beta . v is the same number at every position: this
one direction of the head's input carries no information. We move it to t = |gamma|, of the size of a usual h, and let
the head read the bias from it:

    beta' = beta + (t - v . beta) v             so that h' . v = t at every position
    u = (b - W (beta' - beta)) / t
    W' = W + u v^T                              W' h' = W h' + u t = W h + b

Nothing is divided by gamma alone: 1 / gamma is scaled by the smallest |gamma|. If one gamma is tiny, v is nearly that
axis, on which h hardly changes; if one is exactly 0, h is constant on that axis, and the axis is v.
"""
from collections.abc import Callable

import torch
from torch import Tensor

NORM_WEIGHT, NORM_BIAS = "llm.ln_f.weight", "llm.ln_f.bias"
HEAD_WEIGHT, HEAD_BIAS = "llm.lm_head.weight", "llm.lm_head.bias"
ROWS = 4096                                     # of the head that are in fp32 at a time: 42 MB of Phi-2's


def free_direction(gamma: Tensor) -> Tensor:
    """The unit vector (C,) along 1 / gamma, or along the axes where gamma is 0."""
    smallest = gamma.abs().min()
    inverse = (gamma == 0).double() if smallest == 0 else smallest / gamma         # at most 1, so it cannot overflow
    return inverse / inverse.norm()


def fold_head_bias(load: Callable[[str], Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Callable[[], Tensor]]:
    """The three tensors that differ in the folded model, as functions that compute them; {} if the bias is zero.

    load(name) reads one of our tensors. dtypes are those that they will be stored in: `u` is computed from gamma and
    beta as they will be read again, so their rounding costs no accuracy.
    """
    bias = load(HEAD_BIAS).double()                                                 # (V,)
    if not bias.any():
        return {}
    gamma = load(NORM_WEIGHT).to(dtypes[NORM_WEIGHT]).double()                      # (C,)
    beta = load(NORM_BIAS).double()
    v = free_direction(gamma)
    folded_beta = (beta + (gamma.norm() - v @ beta) * v).to(dtypes[NORM_BIAS])
    t = v @ folded_beta.double()
    moved = (folded_beta.double() - beta).float()                                   # (C,), what was added to beta
    # A few rows at a time, since all of Phi-2's head would take 0.5 GB in fp32.
    shift = torch.cat([rows.float() @ moved for rows in load(HEAD_WEIGHT).split(ROWS)])
    u = (bias - shift.double()) / t                                                 # (V,)

    def folded_weight() -> Tensor:
        weight = load(HEAD_WEIGHT)
        folded = torch.empty(weight.shape, dtype=dtypes[HEAD_WEIGHT])               # (V, C)
        for first in range(0, len(weight), ROWS):
            rows = slice(first, first + ROWS)
            folded[rows] = weight[rows].float() + torch.outer(u[rows], v).float()
        return folded

    return {NORM_BIAS: lambda: folded_beta, HEAD_WEIGHT: folded_weight, HEAD_BIAS: lambda: torch.zeros_like(bias)}

