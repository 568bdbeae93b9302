"""Weights for inference: prepacked, 8-bit and 4-bit. A reader of the model can skip this file."""
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import LLaVAPhi

# ---------------------------------------------------------------------------------------------------
# Prepacked weights

MIN_ROWS = 6                        # measured: a matmul with six rows takes a tenth less time than with a single one


def prepacking_pays(dtype: torch.dtype) -> bool:
    """Are oneDNN's prepacked products in this dtype faster than torch's usual ones on this CPU?

    With AVX-512 they take half the time for one row and up to a third less for many. With only AVX2 they were slower
    where we tried them, and bf16 cannot be prepacked at all. The answer is looked up rather than timed, so that a
    machine always computes the same numbers.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if dtype == torch.bfloat16:     # False where ONEDNN_MAX_CPU_ISA keeps oneDNN from using AVX-512
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PrepackedLinear(nn.Linear):
    """A Linear whose weight is in the blocked layout of oneDNN's kernels; weight.to_dense() gives the plain one."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        weight = torch.ops.mkldnn._reorder_linear_weight(base.weight.detach(), MIN_ROWS)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:             # oneDNN's operator has no gradient; the plain weight lives for one product
            return checkpoint(lambda x: F.linear(x, self.weight.to_dense(), self.bias), x, use_reentrant=False)
        n = len(x)
        if x.dim() == 2 and 0 < n < MIN_ROWS:
            x = F.pad(x, (0, 0, 0, MIN_ROWS - n))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[:n]


def prepack_linears(model: nn.Module, min_size: int = 2 ** 18) -> None:
    """Replace a finished model's Linears by PrepackedLinears, in place, where that makes them faster.

    Takes a few seconds and the memory of one extra weight. Quantized layers, GPUs and CPUs without AVX-512 are left
    unchanged, and so are weights of fewer than `min_size` elements: calling oneDNN would cost more than it saves.
    """
    for parent, name, base in plain_linears(model):
        weight = base.weight
        if weight.device.type == "cpu" and weight.numel() >= min_size and prepacking_pays(weight.dtype):
            setattr(parent, name, PrepackedLinear(base))

# ---------------------------------------------------------------------------------------------------
# 8 bits


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) -> int8 (n, K), and a scale per row (n, 1) in fp32 that maps the row's largest magnitude to 127."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def quantize_into(q: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Quantize weight (n, K) into q and scale, 4096 rows at a time: a full fp32 copy would be 4x as large."""
    for first in range(0, len(weight), 4096):
        rows = slice(first, first + 4096)
        q[rows], scale[rows] = quantize_rows(weight[rows].to(scale))


# Three matmuls with int8 weights (N, K) and their scales (N,). They take x (n, K) in any float dtype and return (n, N)
# in the same one.


def int8_times_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Dynamic quantization: each token is quantized with a scale of its own, and the matmul is in integers.

    weight: prepacked by oneDNN. Tokens are shifted by 128 into uint8: the processor's instructions multiply unsigned
    by signed, and without AMX oneDNN has only a reference kernel for two signed ones, a thousand times slower.
    """
    q, x_scale = quantize_rows(x)
    no_shift = torch.zeros(len(scale), dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(q.view(torch.uint8) + 128, 1.0, 128, weight, scale, no_shift, None, 1.0, 0,
                                           torch.float32, "none", [], "")          # (n, N)
    return torch.addcmul(bias.float(), y, x_scale).type_as(x)


def widen_on_cpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Weight-only quantization, for CPUs without VNNI: torch's kernel for the few rows of decoding, else fp32."""
    if len(x) <= 32:
        y = torch._weight_int8pack_mm(x.bfloat16(), weight, torch.ones_like(scale, dtype=torch.bfloat16)).float()
    else:                           # 512 channels at a time, so that their fp32 weights fit the CPU's cache
        y = torch.cat([F.linear(x.float(), some.float()) for some in weight.split(512)], dim=1)
    return torch.addcmul(bias.float(), y, scale).type_as(x)


def widen_on_gpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Weight-only quantization: the memory of int8, the arithmetic of x."""
    return F.linear(x, weight.type_as(x)) * scale.type_as(x) + bias


@lru_cache
def has_int8_product() -> bool:
    """Does this CPU multiply int8 in its vector units (VNNI) or tiles (AMX)? Without them fp32 is faster.

    The largest product is tried as well: where ONEDNN_MAX_CPU_ISA keeps oneDNN from using VNNI, its sums silently
    saturate at 16 bits.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._is_vnni_supported():
        return False                                        # every CPU with AMX has both
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


def hold_in_int8(layer: nn.Module, base: nn.Module) -> None:
    """Give a layer int8 weights in place of base's, with a scale per row. They stay empty on the meta device."""
    layer.weight = nn.Parameter(torch.empty_like(base.weight, dtype=torch.int8), requires_grad=False)
    layer.register_buffer("scale", torch.empty(len(base.weight), 1, device=base.weight.device))
    if not base.weight.is_meta:
        layer.quantize(base.weight.detach())


class Int8Linear(nn.Linear):
    """Weights in int8 with a scale per output channel.

    The matmul is chosen once, when the weight is quantized, for its device: a quantized model cannot move to another.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.bias = base.bias
        hold_in_int8(self, base)

    def quantize(self, weight: Tensor) -> None:
        """Quantize and store a weight (out, in) of any float dtype."""
        quantize_into(self.weight, self.scale, weight)
        if self.weight.device.type != "cpu":
            self.product = widen_on_gpu
        elif not has_int8_product():
            self.product = widen_on_cpu
        else:
            self.product = int8_times_int8
            packed = torch.ops.onednn.qlinear_prepack(self.weight, None)           # to_dense() gives (in, out)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features), self.weight, self.scale[:, 0], self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class Int8Embedding(nn.Embedding):
    """Rows in int8 with a scale each, dequantized to fp32 when they are looked up."""

    def __init__(self, base: nn.Embedding):
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        hold_in_int8(self, base)

    def quantize(self, weight: Tensor) -> None:
        quantize_into(self.weight, self.scale, weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale[ids]

# ---------------------------------------------------------------------------------------------------
# 4 bits
#
# A weight is (q - 8) * scale + zero with q in 0..15. Groups of 64 or 32 adjacent weights in a row share a scale and a
# zero.

FITS = 7                            # rounds of fitting a group's scale; more did not help on the demo's questions
MANY_ROWS = 64                      # measured: from here on a product in 8 bits is faster, where the CPU has one
TILE = 64                           # output channels are padded to a multiple of this, as torch's kernels want them


def group_size(width: int) -> int:
    """Number of weights that share a scale. ValueError for an input width that is not a multiple of it."""
    for size in (64, 32):
        if width % size == 0:
            return size
    raise ValueError(f"4 bits: a layer's input is {width} wide, no multiple of a group of 32 weights; take "
                     "more bits")


def check_int4_product(device: torch.device) -> None:
    """ValueError on a device for which torch has no product with 4-bit weights."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return
    raise ValueError(f"4 bits need a CPU with AVX2 or an NVIDIA GPU since Ampere; {device} here has no product for "
                     "them, take 8 bits")


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(n, K) -> q uint8 (n, K) in 0..15, and scales and zeros (K / group, n, 2) in bf16.

    Starts with a group's smallest and largest weight as q = 0 and 15. Then, FITS times: the scale and zero that fit
    these q best (least squares), and the q nearest to the weights, which takes 5 to 7 % off the rounding error.
    """
    w = weight.float().unflatten(1, (-1, group))                                   # (n, K / group, group)
    low, high = w.aminmax(dim=2, keepdim=True)                                     # (n, K / group, 1)
    scale = (high - low) / 15
    zero = low + 8 * scale
    for fit in range(FITS + 1):
        scale = scale.clamp_min(1e-8).bfloat16().float()    # q has to match the scale as it is stored
        zero = zero.bfloat16().float()
        q = ((w - zero) / scale).round_().clamp_(-8, 7)
        if fit < FITS:
            q_mean = q.mean(2, keepdim=True)
            spread = q - q_mean
            scale = (spread * w).sum(2, keepdim=True) / spread.square().sum(2, keepdim=True).clamp_min(1e-8)
            zero = w.mean(2, keepdim=True) - scale * q_mean
    scales = torch.cat([scale, zero], dim=2).transpose(0, 1).bfloat16()            # (K / group, n, 2)
    return q.add_(8).to(torch.uint8).flatten(1), scales


# Three layouts of q uint8 (n, K) in n * K / 2 bytes: plain nibbles, which QLoRA dequantizes, and those of torch's 4-bit
# matmuls on CUDA and on a CPU.


def nibbles(q: Tensor) -> Tensor:
    return q[:, ::2] << 4 | q[:, 1::2]                                             # (n, K / 2)


def layout_for_cuda(q: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack(nibbles(q), 2)


def layout_for_cpu(q: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)


def quantize_into_int4(packed: Tensor, scales: Tensor, weight: Tensor, layout: Callable[[Tensor], Tensor]) -> None:
    """Quantize weight (N, K) in any float dtype into packed (N', K / 2) uint8 and scales (K / group, N', 2) bf16.

    The rows from N to N' become zero. Rows are done in chunks, to avoid a whole fp32 copy; on a CPU the chunks fit its
    cache, which is several times faster.
    """
    group = weight.size(1) // len(scales)
    step = 2 * TILE if packed.device.type == "cpu" else 32 * TILE
    for first in range(0, len(packed), step):
        rows = slice(first, min(first + step, len(packed)))
        chunk = weight[rows].to(packed.device, torch.float32)                      # (n, K)
        chunk = F.pad(chunk, (0, 0, 0, rows.stop - rows.start - len(chunk)))
        q, scales[:, rows] = quantize_groups(chunk, group)
        packed[rows] = layout(q).view(torch.uint8).view(len(q), -1)


def int4_to_int8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Whole tiles in the CPU's layout (n, K / 2) and their scales -> int8 weights (n, K), and a scale per row (n,).

    w = (q - 8) scale + zero = (q a + b) row_scale. a and b are 16-bit fixed-point numbers with seven fractional bits.
    No sum overflows, since a weight is at most 127, and it takes a third of the time that fp32 would.
    """
    scale, zero = scales.float().unbind(-1)                                        # (K / group, n)
    lowest = zero - 8 * scale
    highest = zero + 7 * scale
    row_scale = torch.maximum(lowest.abs(), highest.abs()).amax(0).clamp_min(1e-12) / 127          # (n,)
    a = (128 * scale / row_scale).round().short()
    b = (128 * lowest / row_scale + 64).round().short()                            # half a unit more: >> rounds down
    # With AVX-512 torch stores a tile as (K, tile / 2): its first channels in the low nibbles, the others in the high.
    packed = packed.view(len(packed) // TILE, len(scales), -1, TILE // 2)          # (tiles, K / group, group, tile / 2)
    w = torch.cat([packed & 15, packed >> 4], dim=-1).short()                      # (tiles, K / group, group, tile)
    a, b = (x.view(len(scales), -1, 1, TILE).transpose(0, 1) for x in (a, b))      # (tiles, K / group, 1, tile)
    torch.addcmul(b, w, a, out=w)
    w >>= 7
    return w.char().flatten(1, 2).transpose(0, 1).flatten(1).t(), row_scale


# Two matmuls with packed 4-bit weights (N', K / 2) and their groups' scales. They take x (n, K) in any float dtype and
# return (n, N').


def int4_on_gpu(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    group = x.size(1) // len(scales)
    tiled = packed.view(torch.int32).view(len(packed) // 8, x.size(1) // 32, 32, 1)
    return torch._weight_int4pack_mm(x.bfloat16(), tiled, group, scales)


def int4_on_cpu(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """torch's kernel for the few rows of decoding. The many of a prompt are faster in 8 bits, where the CPU has these.

    Weights become 8 bits on the way, two million at a time to fit the CPU's cache. They are not prepacked as in
    Int8Linear: that takes as long as multiplying 640 rows.
    """
    if len(x) < MANY_ROWS or not has_int8_product():
        group = x.size(1) // len(scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales)
    q, x_scale = quantize_rows(x)
    step = max(1, 2 ** 15 // x.size(1)) * TILE
    y = torch.empty(len(x), len(packed))
    for first in range(0, len(packed), step):
        channels = slice(first, first + step)
        weight, scale = int4_to_int8(packed[channels], scales[:, channels])
        torch.mul(torch._int_mm(q, weight.t()), x_scale, out=y[:, channels]).mul_(scale)
    return y


class Int4Linear(nn.Linear):
    """Weights in 4 bits, in the layout of torch's matmul for their device, which takes activations in bf16.

    For training, lib/lora.py has Int4LoRALinear, whose backward pass torch's layouts cannot serve.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        device = base.weight.device
        n = -(-base.out_features // TILE) * TILE                                   # N', whole tiles
        packed = torch.empty(n, base.in_features // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        n_groups = base.in_features // group_size(base.in_features)
        self.register_buffer("group_scales", torch.empty(n_groups, n, 2, dtype=torch.bfloat16, device=device))
        self.bias = base.bias
        if not base.weight.is_meta:
            self.quantize(base.weight.detach())

    def quantize(self, weight: Tensor) -> None:
        """Quantize and store a weight (out, in) of any float dtype."""
        on_cpu = self.weight.device.type == "cpu"
        self.product = int4_on_cpu if on_cpu else int4_on_gpu
        layout = layout_for_cpu if on_cpu else layout_for_cuda
        quantize_into_int4(self.weight, self.group_scales, weight, layout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features), self.weight, self.group_scales)
        y = y[:, :self.out_features] + self.bias                            # without the padding of the last tile
        return y.type_as(x).view(*x.shape[:-1], self.out_features)

# ---------------------------------------------------------------------------------------------------
# A model's layers


def plain_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each plain Linear with its parent and its name there, for replacing it.

    A generator, because a list would keep the weights of the replaced ones alive.
    """
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear]:
            yield parent, name, getattr(parent, name)


def quantize_linears(model: LLaVAPhi, bits: int) -> None:
    """Quantize all Linears to 8 bits, in place; with bits = 4, the decoder's and its head's to 4, its embedding to 8.

    No layer is exempt: keeping any one kind in fp32 takes at most a third off the error of the logits. On the meta
    device only the classes change, and each weight is quantized as it is loaded. ValueError for a width that is not a
    multiple of a 4-bit group.
    """
    assert bits in (4, 8), bits
    if bits == 4:
        model.llm.wte = Int8Embedding(model.llm.wte)
    for part_name, part in model.named_children():
        kind = Int4Linear if bits == 4 and part_name == "llm" else Int8Linear
        for parent, name, base in plain_linears(part):
            setattr(parent, name, kind(base))


def copy_or_quantize(model: nn.Module, name: str, tensor: Tensor, copy: Callable[[Tensor, Tensor], object]) -> None:
    """copy(parameter, tensor) into the parameter of this name, or let its layer quantize the tensor."""
    parameter = model.get_parameter(name)
    if parameter.is_floating_point():
        copy(parameter, tensor)
    else:
        model.get_submodule(name.removesuffix(".weight")).quantize(tensor)
