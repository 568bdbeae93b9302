"""The samples of each training step, and their micro-batches.

Every process computes all of it from just the seed, the step and the lengths. So no communication is needed, and a
resumed run goes on with exactly the samples that come next.
"""
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


def steps_per_epoch(n: int, global_batch: int) -> int:
    return math.ceil(n / global_batch)                      # the last step of an epoch may be smaller


def run_length(n: int, global_batch: int, epochs: float, max_steps: int) -> int:
    """The steps of a run over n samples. max_steps: 0 if there is no limit."""
    steps = math.ceil(epochs * steps_per_epoch(n, global_batch))
    return min(steps, max_steps or steps)


def modality_order(lengths: np.ndarray, has_image: np.ndarray, run_length: int,
                   generator: torch.Generator) -> list[int]:
    """LLaVA's group_by_modality_length: runs of samples that all have an image, or all have none, the longest first.

    The last, incomplete runs of both kinds are merged.
    """
    runs = []
    rest = []
    for kind in (np.flatnonzero(has_image), np.flatnonzero(has_image == 0)):
        mixed = kind[torch.randperm(len(kind), generator=generator).numpy()]
        for i in range(0, len(mixed), run_length):
            run = mixed[i:i + run_length]
            run = run[np.argsort(-lengths[run], kind="stable")].tolist()
            if i + run_length < len(mixed):
                runs.append(run)
            else:
                rest += run                                 # as in LLaVA, the last one counts as incomplete
    runs = [runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()]
    if len(rest) >= run_length:
        runs.insert(0, rest[:run_length])
        rest = rest[run_length:]
    return [*chain(*runs), *rest]


def epoch_order(seed: int, lengths: np.ndarray, has_image: np.ndarray, global_batch: int, group: str, epoch: int,
                shares: Sequence["Share"] = ()) -> np.ndarray:
    """Every sample once, or as often as `shares` say.

    group "modality_length": the samples of a step all have an image, or all have none.
    """
    if shares:
        chosen = np.concatenate([samples_of_share(seed, epoch, share) for share in shares])
        return chosen[epoch_order(seed, lengths[chosen], has_image[chosen], global_batch, group, epoch)]
    assert group in ("none", "modality_length"), f"group {group!r} is neither none nor modality_length"
    epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    if group == "none":
        return np.random.default_rng(epoch_seed).permutation(len(lengths))
    return np.array(modality_order(lengths, has_image, global_batch, torch.Generator().manual_seed(epoch_seed)))


def step_samples(step: int, n: int, global_batch: int, order: Callable[[int], np.ndarray]) -> list[int]:
    """The samples of a global step, independent of processes and micro-batches. order: epoch -> its samples."""
    epoch, k = divmod(step, steps_per_epoch(n, global_batch))
    return order(epoch)[k * global_batch:(k + 1) * global_batch].tolist()


def split_step(lengths: list[int], costs: list[float], world: int, budget: int) -> list[list[list[int]]]:
    """Split a step into micro-batches -> [rank][micro-batch] -> positions in `lengths`.

    Uses as few micro-batches as the token budget allows, and the same number on every rank, because FSDP synchronizes
    the ranks in each. Samples are placed most expensive first, each in the cheapest micro-batch that has room (greedy
    bin packing). A sample above the budget gets a micro-batch of its own; with fewer samples than ranks, some
    micro-batches are empty. `world` only affects which samples share one if the number of micro-batches is rounded up.
    """
    order = sorted(range(len(lengths)), key=lambda i: -costs[i])
    tokens = sum(min(length, budget) for length in lengths)
    n = world * max(1, math.ceil(tokens / budget / world))
    while (micro_batches := pack_greedily(order, lengths, costs, n, budget)) is None:
        n += world                                          # they were not enough: one more for every rank
    # The ranks run micro-batches in lockstep, so those at the same position should be about equally expensive.
    micro_batches.sort(key=lambda micro: -sum(costs[i] for i in micro))
    return [micro_batches[rank::world] for rank in range(world)]


def pack_greedily(order: list[int], lengths: list[int], costs: list[float], n: int,
                  budget: int) -> list[list[int]] | None:
    """Distribute the samples, in this order, over n micro-batches; None if a sample does not fit into any."""
    micro_batches = [[] for _ in range(n)]
    tokens = [0] * n
    sums = [0.0] * n                                        # of costs
    for i in order:
        with_room = [b for b in range(n) if not micro_batches[b] or tokens[b] + lengths[i] <= budget]
        if not with_room:
            return None
        cheapest = min(with_room, key=lambda b: sums[b])
        micro_batches[cheapest].append(i)
        tokens[cheapest] += lengths[i]
        sums[cheapest] += costs[i]
    return [sorted(micro) for micro in micro_batches]

# ---------------------------------------------------------------------------------------------------
# Mixtures of several files


class Share(NamedTuple):
    """A file's part of a mixture."""
    name: str
    first: int                      # number of its first record in the mixture
    n: int                          # records
    per_epoch: int                  # samples that it gives to an epoch


def samples_of_share(seed: int, epoch: int, share: Share) -> np.ndarray:
    """Which samples a file gives to an epoch: the next ones of an endless row of permutations of the file."""
    positions = np.arange(epoch * share.per_epoch, (epoch + 1) * share.per_epoch)
    passes = positions // share.n
    chosen = []
    for i in np.unique(passes).tolist():
        order = np.random.default_rng([seed, share.first, i]).permutation(share.n)
        chosen.append(np.sort(order[positions[passes == i] % share.n]))
    return share.first + np.concatenate(chosen)


def split_by_file(batch, sample_ids: list[int], shares: Sequence[Share]) -> list[int]:
    """How many of the supervised tokens of a data.Batch of these samples, in ascending order, are from each file."""
    sample_of_token = np.searchsorted(batch.lengths.numpy().cumsum(), batch.loss_positions.numpy(), side="right")
    file_of_token = files_of(sample_ids, shares)[sample_of_token]
    return np.bincount(file_of_token, minlength=len(shares)).tolist()


def files_of(sample_ids: list[int], shares: Sequence[Share]) -> np.ndarray:
    """The number of each sample's file."""
    return np.searchsorted([share.first for share in shares], sample_ids, side="right") - 1


def joint_checksum(checksums: Sequence[str], weights: Sequence[float]) -> str:
    """Of several data files and how much of each is taken; that of one whole file is its own."""
    if tuple(weights) == (1.0,):
        return checksums[0]
    return hashlib.sha256(json.dumps(list(zip(checksums, weights))).encode()).hexdigest()


class Mixture:
    """Several data.Datasets as one, whose records are numbered through. An epoch has `weight` epochs of each."""

    def __init__(self, parts: list, weights: Sequence[float]):
        self.parts, self.weights = parts, weights
        first = parts[0]
        self.tok, self.image_config = first.tok, first.image_config
        self.on_bad_sample, self.cache_dir = first.on_bad_sample, first.cache_dir
        self.path = " ".join(str(part.path) for part in parts)
        self.checksum = joint_checksum([part.checksum for part in parts], weights)

    @cached_property
    def shares(self) -> list[Share]:
        shares = []
        first = 0
        for part, weight in zip(self.parts, self.weights):
            times = sum(part.path == before.path for before in self.parts[:len(shares)]) + 1
            name = f"{part.path} ({times})" if times > 1 else str(part.path)
            shares.append(Share(name, first, len(part), max(1, round(len(part) * weight))))
            first += len(part)
        return shares

    @cached_property
    def index(self):
        return self.parts[0].index._make(map(np.concatenate, zip(*(part.index for part in self.parts))))

    @cached_property
    def pictures(self):
        for part in self.parts[1:]:                         # one index of each archive is enough
            part.pictures = self.parts[0].pictures
        return self.parts[0].pictures

    def __len__(self) -> int:
        return sum(share.per_epoch for share in self.shares)

    def sample(self, i: int):
        [file] = files_of([i], self.shares)
        return self.parts[file].sample(i - self.shares[file].first)

    def summary(self) -> str:
        return "\n".join([f"{len(self):,} samples an epoch", *(
            f"{share.name}: {share.per_epoch:,} of them ({share.per_epoch / len(self):.1%}), of {part.summary()}"
            for part, share in zip(self.parts, self.shares))])
