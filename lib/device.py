"""What a GPU or this machine has and has used of memory, in bytes."""
import os
import re
import resource
import sys
from pathlib import Path

import torch

from lib.common import torchrun_env

USABLE = 0.92       # of a GPU's free memory. Micro-batches of other sizes each time leave gaps between their tensors.


def peak_memory(device: str | torch.device) -> int:
    """The most that was allocated so far: on the GPU, or by this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024          # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: str | torch.device) -> int:
    """What can still be allocated: on the GPU, or without swapping; all of the memory where macOS does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text()).group(1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(device: torch.device) -> float:
    """What a training process plans with. On a CPU it is a share of all there is, which is the same in every run."""
    if device.type == "cuda":
        return USABLE * free_memory(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / torchrun_env().local_world
