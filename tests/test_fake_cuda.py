"""The published model at full size on a GPU that is not there: shapes, types and kernels' own checks, without numbers.

FakeTensorMode runs every operator's shape function for CUDA and computes nothing. It needs a PyTorch that was built for
CUDA (what `pip install torch` brings on Linux), but neither a GPU nor memory. Autograd's backward pass asks for a
device, so it cannot be run like this; test_varlen.py covers it on a CPU.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lib.quant import Int4Linear, Int8Linear
from model import DecodeLayout, Layout, LLaVAConfig, LLaVAPhi, cross_entropy_sum

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
P = LLaVAConfig().vision.n_patches


@pytest.fixture
def fake():
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.fixture
def model(fake) -> LLaVAPhi:
    """In bf16 from the start: fake parameters cannot be cast in place."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LLaVAPhi(LLaVAConfig())
    finally:
        torch.set_default_dtype(torch.float32)


# Ids, positions, rows: what they are does not matter here, since nothing is computed.


def numbers(n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, device="cuda")


def layout(length: int, batch: int, past: int = 0) -> Layout:
    """A Layout reads its lengths, which fake tensors do not have. It is made empty, then given the shapes."""
    made = Layout.__new__(Layout)
    made.lengths = [length] * batch
    made.past = [past] * batch
    made.max_length = 2048
    made.pos = numbers(batch * length)
    made.sequence = numbers(batch * length)
    made.starts = numbers(batch + 1, torch.int32)
    made.key_starts = numbers(batch + 1, torch.int32)
    made.on_ampere = True
    return made


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_loss_of_a_micro_batch_of_16k_tokens(model, recompute):
    """16 samples of a picture and 448 words, a quarter supervised: tower, splicing, flash attention, loss in chunks."""
    model.train()
    model.llm.recompute = recompute
    images = torch.empty(16, 3, 336, 336, dtype=torch.uint8, device="cuda")
    x = model.embed(numbers(16 * 1024), images, numbers(16 * P))
    assert x.shape == (16 * 1024, 2560) and x.dtype == torch.bfloat16 and x.is_cuda
    h = model.llm(x, layout(1024, 16))
    loss = cross_entropy_sum(h[numbers(6000)], model.llm.lm_head, numbers(6000))
    assert loss.shape == () and loss.dtype == torch.float32 and loss.is_cuda


@pytest.mark.parametrize("batch", [1, 64])
def test_prefill_with_and_without_a_prefix_then_a_step(model, batch):
    model.eval()
    cache = model.new_cache(batch, 900)
    assert cache.bucket == 256
    h = model.llm(torch.empty(batch * 640, 2560, dtype=torch.bfloat16, device="cuda"), layout(640, batch), cache)
    assert h.shape == (batch * 640, 2560)
    behind = torch.empty(batch * 40, 2560, dtype=torch.bfloat16, device="cuda")
    assert model.llm(behind, layout(40, batch, past=600), cache).shape == behind.shape
    # 640 tokens and the new one: the third bucket of 256 positions is the last that the step reads.
    cache.lengths = [640] * batch
    assert DecodeLayout(cache).mask.shape == (batch, 1, 1, 768)
    logits = model.step(numbers(batch), cache)
    assert logits.shape == (batch, 51200) and logits.dtype == torch.float32 and logits.is_cuda


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("n_in, n_out", [(2560, 7680), (10240, 2560), (2560, 51200)])
def test_quantized_products_take_the_published_widths(fake, kind, n_in, n_out):
    """Both steps: weights into the layout of the product on CUDA, and the product."""
    linear = kind(torch.nn.Linear(n_in, n_out, device="cuda", dtype=torch.bfloat16))
    for rows in (1, 640):
        y = linear(torch.empty(rows, n_in, dtype=torch.bfloat16, device="cuda"))
        assert y.shape == (rows, n_out) and y.dtype == torch.bfloat16 and y.is_cuda
