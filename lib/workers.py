"""An ordered map in worker processes, which run ahead of the consumer."""
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import DataLoader

AHEAD = 4           # chunks of results that each worker prepares ahead
TIMEOUT = 300       # seconds after which a worker counts as hung: one that finds shared memory full may wait for ever


@dataclass
class MapDataset:
    """A map-style dataset for DataLoader: `ds[item]` is `function(item)`."""
    function: Callable

    def __getitem__(self, item):
        return self.function(item)


def leave_process_group(worker: int) -> None:
    """Move a worker out of the trainer's process group.

    Ctrl-C and torchrun's SIGTERM go to the whole group, and if workers died of them, the trainer could not finish its
    step and save.
    """
    if hasattr(os, "setsid"):       # Windows has no process groups of this kind
        os.setsid()


def map_in_workers(function: Callable, items: Iterable, workers: int, pin: bool = False, chunk: int = 1) -> Iterator:
    """function(item) for every item, in order, in single-threaded workers, at most one per core; 0: in this process.

    pin: return results in page-locked memory, which a GPU can copy from while it computes.
    chunk: items that travel to a worker together, and their results back. Small work needs more than one.
    """
    workers = min(workers, os.cpu_count())
    chunks = DataLoader(
        MapDataset(function),
        batch_size=chunk,
        sampler=items,
        collate_fn=list,                                    # the default would turn results into tensors
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        timeout=TIMEOUT if workers else 0,
        pin_memory=pin,
        worker_init_fn=leave_process_group,
        generator=torch.Generator(),                        # the global one belongs to training
    )
    return chain.from_iterable(chunks)
