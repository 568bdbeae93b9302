"""The head's bias folded into its weight: the same logits, with a bias of zero."""
import pytest
import torch
import torch.nn as nn
from helpers import TINY_MIPHA, TINY_MODEL, contents
from torch import Tensor

from lib.head_bias import HEAD_BIAS, HEAD_WEIGHT, NORM_BIAS, NORM_WEIGHT, fold_head_bias
from load_weights import export, load_model


def random_head(width: int, vocab: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A last LayerNorm and a head with numbers of Phi-2's size, both signs of gamma among them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {NORM_WEIGHT: 1 + 0.5 * torch.randn(width, generator=generator),
               NORM_BIAS: 0.5 * torch.randn(width, generator=generator),
               HEAD_WEIGHT: 0.02 * torch.randn(vocab, width, generator=generator),
               HEAD_BIAS: torch.randn(vocab, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    new = fold_head_bias(tensors.__getitem__, dtypes)
    return tensors | {name: compute().to(dtypes[name]) for name, compute in new.items()}


def logits(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """In fp64, so that only the weights' own rounding shows."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    h = nn.functional.layer_norm(x, x.shape[-1:], tensors[NORM_WEIGHT], tensors[NORM_BIAS], 1e-5)
    return h @ tensors[HEAD_WEIGHT].T + tensors[HEAD_BIAS]


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1.2e-3)])
def test_at_full_width(dtype, rms):
    """51,200 rows of 2560. In 16 bits the weight is rounded once more: with the bias kept, bf16 has 0.0055."""
    exact = random_head(2560, 51200)
    stored = {name: tensor.to(dtype) for name, tensor in exact.items()}
    new = fold_head_bias(exact.__getitem__, {name: dtype for name in exact})
    new = stored | {name: compute().to(dtype) for name, compute in new.items()}
    x = torch.randn(4, 2560, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    error = logits(new, x) - logits(exact, x)
    assert not new[HEAD_BIAS].any() and new[HEAD_WEIGHT].dtype == dtype
    assert error.square().mean().sqrt() < rms


@pytest.mark.parametrize("gammas", [{0: 0.0}, {0: 0.0, 3: 0.0}, {0: 1e-30}, {0: -1e-42, 1: 1e-3}, {0: 30.0}, {}])
def test_any_gamma(gammas):
    """Zero, tiny and large weights of the LayerNorm."""
    tensors = random_head(64, 300)
    for axis, value in gammas.items():
        tensors[NORM_WEIGHT][axis] = value
    x = torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(folded(tensors), x), logits(tensors, x), atol=1e-4, rtol=1e-5)


def test_a_bias_of_zero_changes_nothing():
    tensors = random_head(64, 300)
    tensors[HEAD_BIAS].zero_()
    assert fold_head_bias(tensors.__getitem__, {}) == {}


@pytest.mark.parametrize("source", [TINY_MODEL, TINY_MIPHA])
@torch.no_grad()
def test_export_folds_and_is_stable(source, tmp_path):
    """By default. An exported folder exported again is the same files, and what is kept is the original."""
    export(source, tmp_path / "once", None)
    export(tmp_path / "once", tmp_path / "twice", None)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    model, original = load_model(tmp_path / "once"), load_model(source)
    x = torch.randn(9, original.config.llm.n_embd)
    expected = original.llm.lm_head(original.llm.ln_f(x))
    torch.testing.assert_close(model.llm.lm_head(model.llm.ln_f(x)), expected, atol=2e-6, rtol=0)
    assert original.llm.lm_head.bias.abs().max() > 0.1 and not model.llm.lm_head.bias.any()
