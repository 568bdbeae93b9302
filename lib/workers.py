"""Work done ahead in other processes, in order."""
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

import torch
from torch.utils.data import DataLoader


class MapDataset:
    """A map-style dataset for DataLoader: `ds[item]` is `function(item)`."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def identity(item):
    return item


def leave_process_group(worker: int) -> None:
    """Workers get a group of their own. Ctrl-C and torchrun's SIGTERM go to the trainer's whole group, and if workers
    died of them, the trainer could not finish its step and save."""
    os.setsid()


def map_in_workers(function: Callable, items: Iterable, workers: int, pin: bool = False) -> Iterator:
    """function(item) for every item, in order, in worker processes of one thread, at most one per core; 0: here.

    pin: results come in page-locked memory, from which a GPU copies while it computes.
    """
    workers = min(workers, os.cpu_count())
    return iter(DataLoader(
        MapDataset(function),
        batch_size=None,                                    # an item is a whole micro-batch already
        sampler=items,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=leave_process_group,
        collate_fn=identity,                                # DataLoader's own would turn lists into tensors
        generator=torch.Generator(),                        # its own: the global one belongs to the training
    ))


def map_in_chunks(function: Callable, items: list, workers: int, size: int = 256) -> Iterator:
    """map_in_workers for small work: the items travel to the workers, and the results back, `size` at a time."""
    chunks = [items[i:i + size] for i in range(0, len(items), size)]
    return chain.from_iterable(map_in_workers(partial(map_chunk, function), chunks, workers))


def map_chunk(function: Callable, chunk: list) -> list:
    return [function(item) for item in chunk]
