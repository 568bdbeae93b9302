"""The device and the dtype that a command computes with, and the device's free and used memory, in bytes."""
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from data import Batch
from lib.common import DTYPES, torchrun_env

resource = None
with suppress(ImportError):
    import resource     # Windows does not have it

USABLE = 0.92       # of a GPU's free memory; micro-batches of varying size fragment the rest


def peak_memory(device: str | torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024          # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: str | torch.device) -> float:
    """Memory that can still be allocated, on a CPU without swapping. macOS does not tell, so there it is all of it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return total_memory()
    return min(1024 * number_after("MemAvailable:", info), free_in_container())


def number_after(name: str, file: Path) -> int:
    return int(re.search(rf"^{name}\s+(\d+)", file.read_text(), re.MULTILINE).group(1))


def total_memory() -> float:
    """This machine's memory; infinite on Windows, which does not tell."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def free_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's memory limit leaves, by its cgroup (version 2); infinite where there is no limit.

    Page cache counts as used there, although the kernel gives it back when asked for memory.
    """
    limit = cgroup / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return math.inf
    used = int((cgroup / "memory.current").read_text()) - number_after("inactive_file", cgroup / "memory.stat")
    return int(limit.read_text()) - used


def memory_of(device: torch.device) -> float:
    """The memory that a training process plans with. On a CPU, its share of all there is: the same in every run."""
    if device.type == "cuda":
        return USABLE * free_memory(device)
    return total_memory() / torchrun_env().local_world


def torch_dtype(name: str) -> torch.dtype:
    """Our name for a dtype -> torch's dtype."""
    return getattr(torch, DTYPES[name])


def unused_gpu(dev: Path = Path("/dev")) -> str:
    """Why torch cannot use the NVIDIA GPU of this machine; "" if it can, if there is none, or if it is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(dev.glob("nvidia[0-9]*")):
        return ""
    build = f"built for CUDA {torch.version.cuda}, and its driver may be older" if torch.version.cuda else "a CPU build"
    return (f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use ({build}): `nvidia-smi` names "
            "the CUDA version of the driver, and https://pytorch.org/get-started the torch for it")


FULL_SIZE = 1e9     # parameters


def cpu_warning(asked: str, device: torch.device, parameters: int) -> str:
    """What to say, loudly, before training on a CPU that nobody asked for; "" for a small model without a GPU."""
    if asked == "cpu" or device.type != "cpu":
        return ""
    problem = unused_gpu()
    if parameters > FULL_SIZE:
        slow = f"{parameters / 1e9:.1f}B parameters would train on the CPU, some hundred times slower than on a GPU"
        problem = f"{slow}; {problem}" if problem else f"{slow}, and torch {torch.__version__} finds no GPU here"
    return f"WARNING: {problem}; --device cpu trains on the CPU without this warning" if problem else ""


def choose_device(asked: str | None) -> str:
    """The device that was asked for, else the best one here. ValueError if this machine or this torch lacks it.

    A GPU that is asked for by its number becomes this thread's current one, since streams, events, graphs and memory
    statistics are the current GPU's. Every other thread starts on cuda:0.
    """
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.append("mps")
    if torch.cuda.is_available():
        number = asked.partition(":")[2] if asked else ""
        problem = missing_kernels(int(number) if number.isdecimal() else 0)
        if not problem:
            here.append("cuda")
    else:
        problem = unused_gpu()
    device = asked or here[-1]
    if problem and not asked:
        print(f"{problem}; computing on the {device}", file=sys.stderr)
    refusal = ""
    if device.split(":")[0] in here:
        try:
            torch.empty(0, device=device)   # "cuda:7" on a machine with two
            if device.startswith("cuda:"):
                torch.cuda.set_device(device)
        except (RuntimeError, AssertionError) as e:
            refusal = str(e).splitlines()[0]
    else:
        refusal = f"this machine and this torch {torch.__version__} offer {', '.join(here)}"
        refusal += f"; {problem}" if problem else ""
    if refusal:
        raise ValueError(f"--device {device}: {refusal}")
    return device


def check_gpu_count() -> None:
    """ValueError if torchrun started more processes on this machine than it has GPUs."""
    here = torchrun_env()
    n_gpus = torch.cuda.device_count()
    if max(here.local_world, here.local_rank + 1) > n_gpus:
        raise ValueError(f"{here.local_world} processes on a machine with {n_gpus} GPUs: give torchrun one for each "
                         "(--nproc_per_node)")


def take_gpu(dtype: str) -> torch.device:
    """Make this process's GPU the current one, and return it. ValueError where it cannot train in this dtype.

    A V100 or T4 can only emulate bf16, many times slower than it computes in fp32.
    """
    check_gpu_count()
    device = torch.device("cuda", torchrun_env().local_rank)
    torch.cuda.set_device(device)
    problem = missing_kernels(device.index)
    advice = "--device cpu trains on the CPU"
    if not problem and dtype == "bf16" and not has_bf16("cuda"):
        problem = f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic"
        advice = "give --dtype fp32, which takes twice the memory and no flash attention"
    if problem:
        raise ValueError(f"{problem}; {advice}")
    return device


def missing_kernels(card: int) -> str:
    """Why this build of torch cannot compute on a CUDA card that it sees; "" if it can.

    Kernels built for sm_86 also run on later cards of major version 8. Code for compute_90 (PTX) is compiled by the
    driver for any later card.
    """
    if card >= torch.cuda.device_count() or torch.version.cuda is None:     # AMD numbers its architectures differently
        return ""
    major, minor = torch.cuda.get_device_capability(card)
    built_for = torch.cuda.get_arch_list()
    for arch in built_for:
        kind, number = re.match(r"(sm|compute)_(\d+)", arch).groups()
        built = divmod(int(number), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return ""
    return (f"{torch.cuda.get_device_name(card)} has compute capability {major}.{minor}, and this torch "
            f"{torch.__version__} has kernels for {', '.join(built_for)}")


def has_bf16(device: str) -> bool:
    """Does the hardware multiply bf16? A V100 or T4 does not; CPUs with AVX-512 BF16, AMX or Arm's BF16 do.

    Without --dtype, sample.py computes in bf16 where this holds, and so does eval.py on a GPU; on a CPU eval.py stays
    with fp32, where the batch size does not change the answers. It is looked up rather than timed, so a machine always
    computes the same numbers. train.py computes in bf16 unless told otherwise, and refuses a GPU that would have to
    emulate it.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return True                                 # Apple's GPUs


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor | list[int], ...]:
    """The arguments of LLaVAPhi.forward, which are a batch's fields.

    The loader pins its batches, so the host does not wait for the copies. Lengths are plain ints: FSDP moves every
    tensor argument to the GPU, but the host needs the lengths to lay out the attention.
    """
    batch = batch._replace(lengths=batch.lengths.tolist())
    return tuple(field.to(device, non_blocking=True) if isinstance(field, Tensor) else field for field in batch)

# ---------------------------------------------------------------------------------------------------
# Cards

# Dense bf16 FLOP/s with fp32 accumulation, and GB of memory, from NVIDIA's datasheets. An entry matches every card
# whose name has all of its words; more specific entries come first, so a mere "H100" is the SXM one.
CARDS = {
    "H100 PCIe": (756e12, 80), "H100 NVL": (835e12, 94), "H100": (989e12, 80), "H200 NVL": (835e12, 141),
    "H200": (989e12, 141), "GH200": (989e12, 96), "B200": (2250e12, 180), "A100": (312e12, 80), "A40": (149.7e12, 48),
    "A30": (165e12, 24), "A10": (125e12, 24), "RTX A6000": (154.8e12, 48), "L40S": (362e12, 48), "L40": (181e12, 48),
    "L4": (121e12, 24), "RTX 3090": (71e12, 24), "RTX 4090": (165.2e12, 24), "RTX 5090": (209.5e12, 32),
}
VARIANTS = {"laptop", "mig", "max", "d", "ti"}              # words that mark a partition or another variant of a card


def find_card(name: str) -> tuple[float, float] | None:
    """A card's peak FLOP/s and its GB, by torch's name for it or a user's; None if it is not in the table."""
    words = set(re.split("[ -]", name.lower()))
    if words & VARIANTS:
        return None
    for model, (peak, memory) in CARDS.items():
        its_words = model.lower().split()
        if words >= {*its_words} or "".join(its_words) in words:        # "rtx4090"
            size = re.search(r"(\d+) ?GB", name)            # an A100 has 40 or 80
            return peak, float(size.group(1)) if size else memory
    return None


def peak_flops(name: str) -> float | None:
    found = find_card(name)
    return found[0] if found else None


def planned_card(name: str, gigabytes: float, tflops: float, dtype: str) -> tuple[float, float]:
    """Bytes of memory and peak FLOP/s of a card to plan with; what is 0 is looked up by its name.

    Without a name it has 80 GB, and its FLOP/s are unknown: 0. ValueError for a card that is not in the table.
    """
    found = find_card(name) if name else (0.0, 80.0)
    if found is None:
        raise ValueError(f"--gpu {name}: not in the table; give --gpu-memory and --tflops, or one of "
                         + ", ".join(CARDS))
    peak = found[0] if dtype == "bf16" else 0.0             # the table has no other
    return (gigabytes or found[1]) * 1e9, tflops * 1e12 or peak
