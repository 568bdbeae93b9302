"""An ordered map in worker processes, which run ahead of the consumer."""
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

import torch
from torch.utils.data import DataLoader

AHEAD = 4           # results that each worker prepares ahead
TIMEOUT = 300       # seconds after which a worker counts as hung: one that finds shared memory full may wait for ever


class MapDataset:
    """A map-style dataset for DataLoader: `ds[item]` is `function(item)`."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def identity(item):
    return item


def leave_process_group(worker: int) -> None:
    """Move a worker out of the trainer's process group.

    Ctrl-C and torchrun's SIGTERM go to the whole group, and if workers died of them, the trainer could not finish its
    step and save.
    """
    if hasattr(os, "setsid"):       # Windows has no process groups of this kind
        os.setsid()


def map_in_workers(function: Callable, items: Iterable, workers: int, pin: bool = False) -> Iterator:
    """function(item) for every item, in order, in single-threaded workers, at most one per core; 0: in this process.

    pin: return results in page-locked memory, which a GPU can copy from while it computes.
    """
    workers = min(workers, os.cpu_count())
    return iter(DataLoader(
        MapDataset(function),
        batch_size=None,                                    # a result is a whole micro-batch already
        sampler=items,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        timeout=TIMEOUT if workers else 0,
        pin_memory=pin,
        worker_init_fn=leave_process_group,
        collate_fn=identity,                                # the default would turn lists into tensors
        generator=torch.Generator(),                        # the global one belongs to training
    ))


def map_in_chunks(function: Callable, items: list, workers: int, size: int = 256) -> Iterator:
    """map_in_workers for small work: the items travel to the workers, and the results back, `size` at a time."""
    chunks = [items[i:i + size] for i in range(0, len(items), size)]
    return chain.from_iterable(map_in_workers(partial(map_chunk, function), chunks, workers))


def map_chunk(function: Callable, chunk: list) -> list:
    return [function(item) for item in chunk]
