"""The samples of each training step, and their micro-batches.

Every process computes all of it from just the seed, the step and the lengths. So no communication is needed, and a
resumed run goes on with exactly the samples that come next.
"""
import math
from collections.abc import Callable
from itertools import chain

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


def epoch_order(seed: int, lengths: np.ndarray, has_image: np.ndarray, global_batch: int, group: str,
                epoch: int) -> np.ndarray:
    """Every sample once. group "modality_length": the samples of a step all have an image, or all have none."""
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
