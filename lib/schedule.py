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


def modality_order(lengths: np.ndarray, world: int, batch: int, shuffle: torch.Generator | None,
                   shuffle_runs: torch.Generator) -> list[int]:
    """LLaVA's group_by_modality_length: runs of world * batch samples that all have an image, or all have none.

    lengths are negative for text-only samples. The last, incomplete runs of both kinds are merged.
    """
    run_length = world * batch
    absolute = np.abs(lengths)
    runs = []
    rest = []
    for kind in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        mixed = kind[torch.randperm(len(kind), generator=shuffle).numpy()]
        of_kind = []
        for i in range(0, len(mixed), run_length):
            of_kind.append(deal(mixed[i:i + run_length], absolute, world))
        runs += of_kind[:-1]                                # as in LLaVA, the last one counts as incomplete
        rest += of_kind[-1] if of_kind else []
    runs = [runs[i] for i in torch.randperm(len(runs), generator=shuffle_runs).tolist()]
    if len(rest) >= run_length:
        runs.insert(0, rest[:run_length])
        rest = rest[run_length:]
    return [*chain.from_iterable(runs), *rest]


def deal(run: np.ndarray, lengths: np.ndarray, world: int) -> list[int]:
    """Order a run so that cutting it into one part per rank gives parts of about equal length.

    The longest sample left always goes to the rank with the least so far.
    """
    by_length = run[np.argsort(-lengths[run], kind="stable")].tolist()
    if world == 1 or len(by_length) % world:
        return [i for rank in range(world) for i in by_length[rank::world]]
    hands = [[] for _ in range(world)]
    for i in by_length:
        open_hands = [hand for hand in hands if len(hand) < len(by_length) // world]
        min(open_hands, key=lambda hand: sum(lengths[j] for j in hand)).append(i)
    return [*chain.from_iterable(hands)]


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
    generator = torch.Generator().manual_seed(epoch_seed)
    signed = np.where(has_image, lengths, -lengths)
    return np.array(modality_order(signed, 1, global_batch, generator, generator))


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
    micro_batches = pack_greedily(order, lengths, costs, n, budget)
    while micro_batches is None:                            # n were not enough: one more for every rank
        n += world
        micro_batches = pack_greedily(order, lengths, costs, n, budget)
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


def split_by_file(batch, sample_ids: list[int], shares: Sequence[Share]):
    """A data.Batch of these samples, in ascending order, with its `split`."""
    if not shares:
        return batch
    sample_of_token = np.searchsorted(batch.lengths.numpy().cumsum(), batch.loss_positions.numpy(), side="right")
    file_of_token = files_of(sample_ids, shares)[sample_of_token]
    return batch._replace(split=np.bincount(file_of_token, minlength=len(shares)).tolist())


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
        self.tok, self.image_config, self.on_bad_sample = first.tok, first.image_config, first.on_bad_sample
        self.cache_dir = first.cache_dir
        self.path = " ".join(str(part.path) for part in parts)
        self.checksum = joint_checksum([part.checksum for part in parts], weights)

    @cached_property
    def shares(self) -> list[Share]:
        starts = np.cumsum([0, *map(len, self.parts)]).tolist()
        return [Share(str(part.path), start, len(part), max(1, round(len(part) * weight)))
                for part, weight, start in zip(self.parts, self.weights, starts)]

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
