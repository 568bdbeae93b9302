"""Weights in 8 bits, in 4 bits, and in the order in which a CPU multiplies them. A reader of the model can skip this file."""
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import LLaVAPhi

MIN_ROWS = 6                        # rows per product: measured, six take a tenth less time than one


def prepacking_pays(dtype: torch.dtype) -> bool:
    """Are oneDNN's prepacked products of this dtype faster than torch's usual ones on this CPU?

    With AVX-512 they take half the time for one row and up to a third less for many. With AVX2 only they were slower
    where we tried them, and bf16 cannot be prepacked at all. The answer depends on the processor alone and is not
    timed at every start: the same machine must always compute the same numbers.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if dtype == torch.bfloat16:     # False where ONEDNN_MAX_CPU_ISA keeps oneDNN from the processor's AVX-512
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PrepackedLinear(nn.Linear):
    """For inference on a CPU: the weight in the blocked layout of oneDNN's kernels, which nothing else can read."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        packed = torch.ops.mkldnn._reorder_linear_weight(base.weight.detach(), MIN_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        missing = MIN_ROWS - len(x) if x.dim() == 2 and len(x) > 0 else 0
        if missing > 0:
            x = F.pad(x, (0, 0, 0, missing))
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y[:-missing] if missing > 0 else y


def prepack_linears(model: nn.Module, min_size: int = 2 ** 18) -> None:
    """Replace a finished model's Linears by PrepackedLinears, in place, where that makes them faster.

    Weights with fewer than `min_size` elements stay plain: setting up oneDNN's call takes longer than it saves.
    Takes a few seconds and the memory of one extra weight. Quantized layers, GPUs and CPUs without AVX-512 are left
    unchanged.
    """
    for parent, name, base in plain_linears(model):
        weight = base.weight
        if weight.device.type == "cpu" and weight.numel() >= min_size and prepacking_pays(weight.dtype):
            setattr(parent, name, PrepackedLinear(base))


def plain_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each plain Linear with its parent and its name there, to be replaced.

    No list of all is kept: it would hold the weights of those that have been replaced.
    """
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear]:
            yield parent, name, getattr(parent, name)


@lru_cache
def has_int8_product() -> bool:
    """Whether this CPU multiplies int8 in its vector units (VNNI). Without them torch._int_mm is slower than fp32.

    The largest product is tried, too: where oneDNN is told not to use VNNI (ONEDNN_MAX_CPU_ISA), its sums are cut off
    at 16 bits, and nothing says so.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) -> int8 (n, K) and the scale of each row (n, 1) fp32: the largest number of a row becomes 127."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def int8_linear(x: Tensor, pieces: Iterable[tuple[slice, Tensor, Tensor]], bias: Tensor) -> Tensor:
    """x (n, K) of any float dtype, each token quantised by itself, times int8 weights -> (n, N) of the same dtype.

    pieces: which output channels, their weights (K, some), their scales (some,).
    """
    numbers, x_scale = quantize_rows(x)
    y = torch.empty(len(x), len(bias), dtype=x.dtype)
    for channels, weight, scale in pieces:
        product = torch._int_mm(numbers, weight).float()                           # (n, some), from int32
        torch.addcmul(bias[channels].float(), product.mul_(x_scale), scale, out=y[:, channels])
    return y


class Int8Linear(nn.Linear):
    """Weights in 8 bits with a scale per output channel, for inference.

    Three ways to multiply, the fastest on each machine: int8 times int8 where the CPU can; else the weights are widened
    to the activations' type, by a kernel of torch's for the few rows of a decoding step, by us for many rows.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = nn.Parameter(torch.empty_like(base.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(base.out_features, device=base.weight.device))
        self.bias = base.bias

    def quantize(self, weight: Tensor) -> None:
        """Take over a weight (out, in) of any float dtype, some rows at a time: no second copy of it in fp32."""
        for first in range(0, self.out_features, 4096):
            rows = slice(first, first + 4096)
            self.weight.data[rows], scale = quantize_rows(weight[rows].to(self.scale))
            self.scale[rows] = scale[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":                          # the memory of int8, the arithmetic of x
            return F.linear(x, self.weight.type_as(x)) * self.scale.type_as(x) + self.bias
        rows = x.reshape(-1, x.size(-1))                                           # (n, in)
        if has_int8_product():
            y = int8_linear(rows, [(slice(None), self.weight.t(), self.scale)], self.bias)
        elif len(rows) <= 32:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).float() + self.bias
        else:
            rows = rows.float()
            pieces = [F.linear(rows, weight.float()) for weight in self.weight.split(512)]
            y = torch.cat(pieces, dim=1).mul_(self.scale) + self.bias
        return y.type_as(x).view(*x.shape[:-1], self.out_features)


class Int8Embedding(nn.Embedding):
    """Rows in 8 bits with a scale each, which become fp32 when they are looked up."""

    def __init__(self, base: nn.Embedding):
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = nn.Parameter(torch.empty_like(base.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(base.num_embeddings, 1, device=base.weight.device))

    def quantize(self, weight: Tensor) -> None:
        for first in range(0, self.num_embeddings, 4096):   # no second copy of it in fp32
            rows = slice(first, first + 4096)
            self.weight.data[rows], self.scale[rows] = quantize_rows(weight[rows].to(self.scale))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale[ids]


FITS = 7                            # times that a group's scale is fitted; loading Phi-2 takes about a minute with it
ROWS_OF_A_TILE = 64                 # the packed order works on so many output channels at a time, or on half as many


def group_of(width: int) -> int:
    """How many weights share a scale. ValueError for an input width that no group divides."""
    for group in (64, 32):
        if width % group == 0:
            return group
    raise ValueError(f"4 bits: a layer's input is {width} wide, no multiple of a group of 32 weights; take 8 bits")


def tile() -> int:
    """Output channels that are packed together: what the kernels for this CPU's vector units expect."""
    return 32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else ROWS_OF_A_TILE


def many_rows() -> int:
    """From how many rows on it is faster to unpack the weights once than to multiply packed ones."""
    return 64 if has_int8_product() else 192


def check_int4_product(device: torch.device) -> None:
    """ValueError on a device for which torch has no product with packed 4-bit weights."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return
    raise ValueError(f"4 bits need a CPU with AVX2 or an NVIDIA GPU since Ampere; {device} here has no product for "
                     "them, take 8 bits")


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(n, K) -> q uint8 (n, K) in 0..15, and scales and zero points (K / group, n, 2) in bf16.

    Begins by rounding between the smallest and the largest weight of a group. Then, FITS times: the scale and zero
    point that fit these q best (least squares), and the q nearest to them. It takes 5 to 7 % off the error of rounding.
    """
    w = weight.float().unflatten(1, (-1, group))                                   # (n, K / group, group)
    low, high = w.aminmax(dim=2, keepdim=True)                                     # (n, K / group, 1)
    scale = (high - low) / 15
    zero = low + 8 * scale
    for fit in range(FITS + 1):
        scale = scale.clamp_min(1e-8).bfloat16().float()    # what is stored must be what q is chosen for
        zero = zero.bfloat16().float()
        q = ((w - zero) / scale).round_().clamp_(-8, 7)
        if fit < FITS:
            q_mean = q.mean(2, keepdim=True)
            w_mean = w.mean(2, keepdim=True)
            spread = (q - q_mean).square_().sum(2, keepdim=True).clamp_min(1e-8)
            scale = ((q - q_mean) * w).sum(2, keepdim=True) / spread
            zero = w_mean - scale * q_mean
    scales = torch.cat([scale, zero], dim=2).transpose(0, 1).bfloat16()            # (K / group, n, 2)
    return q.add_(8).to(torch.uint8).flatten(1), scales


@torch.no_grad()
def pack_int4(weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Quantise weight (N, K) of any float dtype into packed (N', K / 2) uint8 and scales (K / group, N', 2) bf16.

    N' is N in whole tiles; the rows that fill the last one are zero. Some rows at a time: no second copy in fp32.
    A tile's bytes lie as (K, tile / 2): the lower four bits are the first half of its channels, the upper the second.
    """
    group = weight.size(1) // len(scales)
    half = tile() // 2
    n = 2 * ROWS_OF_A_TILE                                  # few enough for a CPU's cache: several times faster
    for first in range(0, len(packed), n):
        rows = slice(first, min(first + n, len(packed)))
        chunk = weight[rows].to(scales.device, torch.float32)                      # (n, K)
        chunk = F.pad(chunk, (0, 0, 0, rows.stop - rows.start - len(chunk)))
        q, scales[:, rows] = quantize_groups(chunk, group)
        q = q.unflatten(0, (-1, 2 * half)).transpose(1, 2)                         # (tiles, K, tile)
        packed[rows] = (q[..., :half] | q[..., half:] << 4).reshape(len(chunk), -1)


def by_tile(packed: Tensor, n_groups: int) -> Tensor:
    """Some whole tiles of packed (n, K / 2) -> (tiles, K / group, group, tile / 2)."""
    half = tile() // 2
    return packed.view(len(packed) // (2 * half), n_groups, -1, half)


def unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Some whole tiles of packed (n, K / 2) uint8 and their scales (K / group, n, 2) -> weights (K, n), fp32."""
    packed = by_tile(packed, len(scales))
    tiles, n_groups, group, half = packed.shape
    w = torch.empty(tiles, n_groups, group, 2 * half, device=packed.device)
    w[..., :half] = packed & 15
    w[..., half:] = packed >> 4
    scale, zero = scales.float().view(n_groups, tiles, 1, 2 * half, 2).transpose(0, 1).unbind(-1)
    w.sub_(8).mul_(scale).add_(zero)                                               # (tiles, K / group, group, tile)
    return w.flatten(1, 2).transpose(0, 1).flatten(1)                              # (K, n)


def unpack_to_int8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same as int8 weights (K, n) with a scale for each output channel (n,) fp32.

    w = (q - 8) scale + zero = (q a + b) row_scale. a and b are 16-bit integers, seven bits of which are a fraction: no
    sum exceeds them, since a weight is at most 127, and it takes a third of the time of the way over fp32.
    """
    scale, zero = scales.float().unbind(-1)                                        # (K / group, n)
    lowest = zero - 8 * scale
    highest = zero + 7 * scale
    row_scale = torch.maximum(lowest.abs(), highest.abs()).amax(0).clamp_min(1e-12) / 127          # (n,)
    a = (128 * scale / row_scale).round().short()
    b = (128 * lowest / row_scale + 64).round().short()                            # half a unit more: >> rounds down
    packed = by_tile(packed, len(scales)).short()
    tiles, n_groups, group, half = packed.shape
    w = torch.empty(tiles, n_groups, group, 2 * half, dtype=torch.int16)
    torch.bitwise_and(packed, 15, out=w[..., :half])
    torch.bitwise_right_shift(packed, 4, out=w[..., half:])
    a, b = (x.view(n_groups, tiles, 1, 2 * half).transpose(0, 1) for x in (a, b))
    torch.addcmul(b, w, a, out=w)
    w >>= 7                                                                        # (tiles, K / group, group, tile)
    return w.char().flatten(1, 2).transpose(0, 1).flatten(1), row_scale            # (K, n)


def unpacked_pieces(packed: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All weights, a few tiles at a time, which stay in a CPU's cache -> (which output channels, weights (K, n))."""
    n = 512 if packed.device.type == "cpu" else 8192
    for first in range(0, len(packed), n):
        channels = slice(first, min(first + n, len(packed)))
        yield channels, unpack_int4(packed[channels], scales[:, channels])


class UnpackedProduct(torch.autograd.Function):
    """x (..., K) times packed weights, with a gradient for x. -> (..., N')

    Autograd by itself would keep every layer's unpacked weights for the backward pass, which is what 4 bits are to
    save; here the backward pass unpacks them again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        pieces = [x @ weight.type_as(x) for _, weight in unpacked_pieces(packed, scales)]
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        packed, scales = ctx.saved_tensors
        grad_x = 0
        for channels, weight in unpacked_pieces(packed, scales):
            grad_x = grad_x + grad[..., channels] @ weight.type_as(grad).t()
        return grad_x, None, None


class Int4Linear(nn.Linear):
    """Weights in 4 bits. For inference through torch's packed products, which want activations in bf16.

    On CUDA the packed bytes are in the order of torch._weight_int4pack_mm instead, which only that product can read.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        device = base.weight.device
        self.group = group_of(base.in_features)
        n = -(-base.out_features // ROWS_OF_A_TILE) * ROWS_OF_A_TILE               # N', whole tiles
        packed = torch.empty(n, base.in_features // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = torch.empty(base.in_features // self.group, n, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("scales", scales)
        self.bias = base.bias

    def quantize(self, weight: Tensor) -> None:
        """Take over a weight (out, in) of any float dtype."""
        pack_int4(weight, self.weight.data, self.scales)
        if self.weight.is_cuda and not self.training:
            self.pack_for_cuda()

    def pack_for_cuda(self) -> None:
        """Turn our order of the packed weights into that of torch._weight_int4pack_mm, in place."""
        for first in range(0, len(self.weight), 1024):
            rows = slice(first, first + 1024)
            ones = torch.ones_like(self.scales[:, rows])
            ones[..., 1] = 8                                # (q - 8) * 1 + 8 is q itself
            q = unpack_int4(self.weight[rows], ones).t().to(torch.uint8)           # (n, K)
            pairs = q[:, ::2] << 4 | q[:, 1::2]                                    # (n, K / 2)
            tiled = torch._convert_weight_to_int4pack(pairs.contiguous(), 2)
            self.weight.data[rows] = tiled.view(torch.uint8).view(len(q), -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))                                           # (n, in)
        if x.is_cuda:
            tiled = self.weight.view(torch.int32).view(len(self.weight) // 8, self.in_features // 32, 32, 1)
            y = torch._weight_int4pack_mm(rows.bfloat16(), tiled, self.group, self.scales)
        elif len(rows) < many_rows():
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.weight, self.group, self.scales)
        elif has_int8_product():
            return int8_linear(rows, self.int8_pieces(), self.bias).view(*x.shape[:-1], self.out_features)
        else:
            y = torch.cat([rows.float() @ weight for _, weight in unpacked_pieces(self.weight, self.scales)], dim=1)
        y = y[:, :self.out_features] + self.bias
        return y.type_as(x).view(*x.shape[:-1], self.out_features)

    def int8_pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The weights for int8_linear, a few at a time, which stay in the processor's cache."""
        size = max(1, 2 ** 15 // self.in_features) * ROWS_OF_A_TILE                # two million weights
        for first in range(0, self.out_features, size):
            channels = slice(first, min(first + size, self.out_features))
            whole_tiles = slice(first, first + size)
            weight, scale = unpack_to_int8(self.weight[whole_tiles], self.scales[:, whole_tiles])
            n = channels.stop - first
            yield channels, weight[:, :n], scale[:n]


def quantize_linears(model: LLaVAPhi, bits: int) -> int:
    """Turn the Linears into Int8Linears, in place. With 4 bits: the decoder's and its head's into Int4Linears, and the
    embedding, of which a token reads one row, into an Int8Embedding.

    -> how many Linears. None is left out: no kind of layer, kept in fp32, takes more than a third off the error of the
    logits. On the meta device only the classes change; load_model then quantises each weight as it arrives.
    Raises ValueError for a width that 4 bits cannot take.
    """
    assert bits in (4, 8), bits
    count = 0
    if bits == 4:
        model.llm.wte = with_weight(Int8Embedding(model.llm.wte), model.llm.wte.weight)
    for part_name, part in model.named_children():
        for parent, name, base in plain_linears(part):
            linear = Int4Linear(base) if bits == 4 and part_name == "llm" else Int8Linear(base)
            setattr(parent, name, with_weight(linear, base.weight))
            count += 1
    return count


def with_weight(module: Int4Linear | Int8Linear | Int8Embedding, weight: Tensor) -> nn.Module:
    """The module, ready for inference, with this weight unless it is still to be loaded."""
    module.eval()
    if not weight.is_meta:
        module.quantize(weight.detach())
    return module


def copy_weight(model: nn.Module, fill: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor, Tensor], None]:
    """fill(parameter, tensor), except that the model's quantised weights quantise the tensor as they take it over."""
    quantized = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_floating_point():
            quantized[module.weight] = module

    def copy(parameter: Tensor, tensor: Tensor) -> None:
        if parameter in quantized:
            quantized[parameter].quantize(tensor)
        else:
            fill(parameter, tensor)
    return copy
