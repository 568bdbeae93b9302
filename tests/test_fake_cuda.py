"""What generation asks of a GPU, on one that is not there: the published model's shapes, and which device is meant.

FakeTensorMode runs every operator's shape function for CUDA and computes nothing. For the whole model it needs a
PyTorch that was built for CUDA (what `pip install torch` brings on Linux), but neither a GPU nor memory. Autograd's
backward pass asks for a device, so it cannot be run like this; test_varlen.py covers it on a CPU.
"""
import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lib.generate import CudaGraph, Decode, KVCache, Prefill, Session, copy_to_host_async, decode_step
from lib.quant import Int4Linear, Int8Linear
from model import LLaVAConfig, LLaVAPhi, Packed, cross_entropy_sum

built_for_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
P = LLaVAConfig().vision.n_patches

# ---------------------------------------------------------------------------------------------------
# Which device: with several GPUs the ids are not always on the current one


class Recorded:
    """Streams, events and graphs that note which GPU each belongs to; the current one is 0 to begin with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current = 0
        self.seen: list[tuple[str, int]] = []
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "device", self.switch)
        monkeypatch.setattr(cuda, "current_stream", self.stream_of)
        monkeypatch.setattr(cuda, "Stream", lambda device=None: self.stream_of(device, "side stream"))
        monkeypatch.setattr(cuda, "Event", lambda: self)
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "graph", self.capture)

    @contextlib.contextmanager
    def switch(self, device: torch.device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def stream_of(self, device: torch.device | None = None, name: str = "current stream"):
        index = self.current if device is None else device.index
        self.seen.append((name, index))
        return self

    @contextlib.contextmanager
    def capture(self, graph, stream=None, capture_error_mode: str = "global"):
        # Without a stream, torch takes one that it made when a capture first ran, on whatever device that was.
        self.seen.append(("capture", self.current if stream is not None else 0))
        yield

    def record(self, stream=None) -> None:
        if stream is None:                                  # as torch does
            self.stream_of()

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    return Recorded(monkeypatch)


@pytest.fixture
def ids_on_gpu_1():
    with FakeTensorMode() as mode:
        yield FakeTensor(mode, torch.empty(3, dtype=torch.int64, device="meta"), torch.device("cuda:1"))


def test_ids_are_awaited_in_the_stream_that_copies_them(recorded, ids_on_gpu_1, monkeypatch):
    """An event in the current device's stream would be reached at once, and the ids read before they have arrived."""
    host = torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: host)
    monkeypatch.setattr(host, "copy_", lambda *args, **options: host, raising=False)
    copy_to_host_async(ids_on_gpu_1)
    assert recorded.seen == [("current stream", 1)]


def test_a_graph_is_captured_on_the_device_of_the_ids(recorded, ids_on_gpu_1, monkeypatch):
    """Streams and captures belong to the current device, and a capture there would record none of the step."""
    steps = []
    monkeypatch.setattr("lib.generate.decode_step", lambda model, ids, cache: steps.append(recorded.current))
    monkeypatch.setattr(FakeTensor, "clone", lambda self: self)

    class Cache:
        used = 256
    CudaGraph(None, ids_on_gpu_1, Cache())
    assert {device for _, device in recorded.seen} == {1} and ("capture", 1) in recorded.seen
    assert steps == [1, 1] and recorded.current == 0


def test_generation_does_not_use_cudnns_attention(tiny_model):
    """It builds an execution plan for every new shape, and generation has a new one for almost every prompt."""
    torch.backends.cuda.enable_cudnn_sdp(True)              # torch's default, which training keeps
    Session(tiny_model)
    assert not torch.backends.cuda.cudnn_sdp_enabled()

# ---------------------------------------------------------------------------------------------------
# The published model's shapes


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


# Ids, positions: what they are does not matter here, since nothing is computed.


def numbers(n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, device="cuda")


def packed(length: int, batch: int) -> Packed:
    """Packed reads its lengths, which fake tensors do not have. So it is made without them and given the shapes."""
    seqs = Packed([], torch.device("cpu"))
    give_shapes(seqs, length, batch)
    return seqs


def give_shapes(seqs: Packed, length: int, batch: int) -> None:
    seqs.lengths = [length] * batch
    seqs.max_seqlen = 2048
    seqs.pos = numbers(batch * length)
    seqs.cu_seqlens = numbers(batch + 1, torch.int32)
    seqs.on_ampere = True


def prefill_of(cache: KVCache, length: int, batch: int, past: int = 0) -> Prefill:
    """The same for prompts whose beginnings may be in the cache."""
    seqs = Prefill.__new__(Prefill)
    give_shapes(seqs, length, batch)
    seqs.cache, seqs.rows, seqs.has_past, seqs.keys = cache, range(batch), past > 0, packed(past + length, batch)
    seqs.seq_ids = numbers(batch * length)
    seqs.key_seq_ids = numbers(batch * (past + length))
    return seqs


@built_for_cuda
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_loss_of_a_micro_batch_of_16k_tokens(model, recompute):
    """16 samples of a picture and 448 words, a quarter supervised: tower, splicing, flash attention, loss in chunks."""
    model.train()
    model.llm.recompute = recompute
    images = torch.empty(16, 3, 336, 336, dtype=torch.uint8, device="cuda")
    x = model.embed(numbers(16 * 1024), images, numbers(16 * P))
    assert x.shape == (16 * 1024, 2560) and x.dtype == torch.bfloat16 and x.is_cuda
    h = model.llm(x, packed(1024, 16))
    loss = cross_entropy_sum(h[numbers(6000)], model.llm.lm_head, numbers(6000))
    assert loss.shape == () and loss.dtype == torch.float32 and loss.is_cuda


@built_for_cuda
@pytest.mark.parametrize("batch", [1, 64])
def test_prefill_with_and_without_a_prefix_then_a_step(model, batch):
    model.eval()
    cache = KVCache(model.llm, [[]] * batch, 900)
    assert cache.bucket == 256
    x = torch.empty(batch * 640, 2560, dtype=torch.bfloat16, device="cuda")
    assert model.llm(x, prefill_of(cache, 640, batch)).shape == x.shape
    behind = torch.empty(batch * 40, 2560, dtype=torch.bfloat16, device="cuda")
    assert model.llm(behind, prefill_of(cache, 40, batch, past=600)).shape == behind.shape
    # 640 tokens and the new one: the third bucket of 256 positions is the last that the step reads.
    cache.lengths = [640] * batch
    assert Decode(cache).mask.shape == (batch, 1, 1, 768)
    logits = decode_step(model, numbers(batch), cache)
    assert logits.shape == (batch, 51200) and logits.dtype == torch.float32 and logits.is_cuda


@built_for_cuda
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("n_in, n_out", [(2560, 7680), (10240, 2560), (2560, 51200)])
def test_quantized_products_take_the_published_widths(fake, kind, n_in, n_out):
    """Both steps: weights into the layout of the product on CUDA, and the product."""
    linear = kind(torch.nn.Linear(n_in, n_out, device="cuda", dtype=torch.bfloat16))
    for rows in (1, 640):
        y = linear(torch.empty(rows, n_in, dtype=torch.bfloat16, device="cuda"))
        assert y.shape == (rows, n_out) and y.dtype == torch.bfloat16 and y.is_cuda
