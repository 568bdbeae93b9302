"""Is this run healthy? Held-out losses with and without the picture, and what the numbers say in plain words.

Each check is a function that returns a sentence, or "" where nothing is wrong. A warning never ends a run.
"""
import math
import socket
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from data import Batch, Dataset, Step
from lib.device import to_device
from lib.folders import Weights, projector_warning
from lib.processes import on_every_process, print0, synchronized_steps

# ---------------------------------------------------------------------------------------------------
# Held-out losses, of the same samples seen in several ways

View = Callable[[Batch], Batch]


def blank_pictures(batch: Batch, color: Sequence[int]) -> Batch:
    """Every picture filled with the padding color, which normalization maps to almost zero."""
    pixels = torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1)
    return batch._replace(images=pixels.expand_as(batch.images).contiguous())


def after_the_first_word(batch: Batch) -> Batch:
    """Without the tokens that are predicted at a patch: the words that `no_pictures` has left to predict."""
    kept = ~torch.isin(batch.loss_positions, batch.image_positions)
    return batch._replace(loss_positions=batch.loss_positions[kept], targets=batch.targets[kept])


def no_pictures(batch: Batch) -> Batch:
    """The text alone, as the language model was trained on it."""
    batch = after_the_first_word(batch)
    kept = torch.ones(len(batch.ids), dtype=torch.bool)
    kept[batch.image_positions] = False
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.lengths)[kept]
    return batch._replace(ids=batch.ids[kept], lengths=torch.bincount(sequence, minlength=len(batch.lengths)),
                          images=batch.images[:0], image_positions=batch.image_positions[:0],
                          loss_positions=(kept.cumsum(0) - 1)[batch.loss_positions])


def views_of(cfg: Namespace, held_out: Dataset, step: int) -> list[View]:
    """How else the held-out samples are seen: with blank pictures, and before stage 1 also without any."""
    if not held_out.index.image.any():
        return []
    views = [partial(blank_pictures, color=held_out.image_config.pad_color)]
    if step == 0 and cfg.stage == "pretrain" and has_new_projector(cfg):
        views += [after_the_first_word, no_pictures]
    return views


def has_new_projector(cfg: Namespace) -> bool:
    return bool(cfg.vision and not cfg.model and not cfg.projector)


class HeldOut(NamedTuple):
    """Mean losses per supervised token: of the samples as they are, and in each view."""
    losses: list[float]
    error: float                # standard error of the second minus the first; NaN where it cannot be estimated
    counted: float              # the loss of a model that only counts how often each token has occurred

    def record(self) -> dict[str, float]:
        return dict(zip(("val_loss", "val_loss_blank"), self.losses))

    def line(self) -> str:
        text = f"validation loss {self.losses[0]:.4f}"
        if len(self.losses) > 1:
            worth = self.losses[1] - self.losses[0]
            text += f"; without the picture {self.losses[1]:.4f}: the picture is worth {worth:.3f} nats a token"
        return text


@torch.no_grad()
def validate(model: nn.Module, loader: Iterable[Step], device: torch.device, views: Sequence[View] = ()) -> HeldOut:
    """Mean losses over every supervised token of the validation set, without dropout. All processes take part."""
    model.eval()
    losses, tokens = [], []                     # of each micro-batch, as it is and in each view
    counts = torch.zeros(model.config.llm.vocab_size, dtype=torch.int64)
    try:
        for step, *_ in synchronized_steps(loader, []):
            for batch in step.batches:
                seen = [batch, *(view(batch) for view in views)]
                losses.append(torch.stack([model(*to_device(view, device)).sum() for view in seen]))
                tokens.append([len(view.targets) for view in seen])
                counts += torch.bincount(batch.targets, minlength=len(counts))
    finally:
        # A backward pass would have given the gathered weights back. While they are there, the model's parameters are
        # copies in the compute dtype, which the optimizer and a checkpoint know nothing of.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train()
    table = torch.cat([torch.stack(losses).cpu(), torch.tensor(tokens)], dim=1).double()
    everywhere = torch.cat(on_every_process(lambda: table))     # of the micro-batches of all processes
    losses, tokens = everywhere.chunk(2, dim=1)                 # (micro-batches, views) each
    dist.all_reduce(counts)
    return HeldOut((losses.sum(0) / tokens.sum(0).clamp_min(1)).tolist(), error_of_difference(losses, tokens),
                   loss_of_counting(counts))


def error_of_difference(losses: Tensor, tokens: Tensor) -> float:
    """The standard error of the second view's mean loss minus the first's, from how micro-batches differ in it.

    Tokens of one sample are not independent, samples are, and no sample is in two micro-batches, which are the rows.
    """
    n = int((tokens[:, 0] > 0).sum())
    if losses.size(1) < 2 or n < 2:
        return math.nan
    worth = losses[:, 1] - losses[:, 0]
    tokens = tokens[:, 0]
    squares = (worth - tokens * worth.sum() / tokens.sum()).square().sum()
    return float((squares * n / (n - 1)).sqrt() / tokens.sum())


def loss_of_counting(counts: Tensor) -> float:
    """Nats per token of Laplace's rule: each token is as likely as it has been so far, every one counted once more.

    Unlike the entropy of the frequencies it does not know them in advance, so few tokens do not make it small.
    """
    total, vocabulary = counts.sum().double(), torch.tensor(len(counts), dtype=torch.float64)
    nats = torch.lgamma(vocabulary + total) - torch.lgamma(vocabulary) - torch.lgamma(counts.double() + 1).sum()
    return float(nats / total.clamp_min(1))

# ---------------------------------------------------------------------------------------------------
# What the numbers say


def doubts(held: HeldOut, step: int, steps: int) -> list[str]:
    """What a validation after `step` of `steps` says against the run, a sentence each."""
    found = []
    loss, *others = held.losses
    if step == 0 and loss > held.counted:
        found.append(f"the loss before training is {loss:.2f} nats a token, and counting the tokens gives "
                     f"{held.counted:.2f}: labels, tokenizer and weights do not belong together (labels shifted by one "
                     "token look like this)")
    if len(others) > 1:
        _, with_patches, alone = others
        if abs(with_patches - alone) > max(1, alone / 2):
            found.append(f"a new projector changes the loss on captions from {alone:.2f}, without pictures, to "
                         f"{with_patches:.2f}, by more than its small weights can: look at the patches and where "
                         "they go")
    if others and step * 10 >= steps and others[0] - loss <= held.error:
        found.append(f"blank pictures do as well as the right ones ({others[0] - loss:.3f} nats a token, standard "
                     f"error {held.error:.3f}): the model does not look at them. Are they the right pictures, and is "
                     "the projector among what is trained?")
    return found


def rate_problems(model: nn.Module, rates: dict[str, float]) -> list[str]:
    """A sentence for each part whose peak rate would replace its weights rather than move them. Takes all processes.

    In its first steps AdamW moves a weight by about the rate.
    """
    found = []
    for name, part in model.named_children():
        matrices = [p.detach() for p in part.parameters() if p.requires_grad and p.dim() > 1]
        if not matrices:
            continue
        norm = torch.nn.utils.get_total_norm(matrices).full_tensor()
        size = float(norm) / math.sqrt(sum(p.numel() for p in matrices))
        if rates[name] > size > 0:
            found.append(f"the rate {rates[name]:g} is too high for the {name}: its weights are {size:.2g} in the "
                         f"mean, and AdamW moves each by about the rate in a step; try {size / 20:.1g}")
    return found


def projector_problem(cfg: Namespace, source: Weights) -> str:
    """A sentence where stage 2 begins with a projector that stage 1 has not trained; else ""."""
    if cfg.stage != "finetune":
        return ""
    if has_new_projector(cfg):
        return "the projector is new, and stage 2 trains it along with all else; stage 1 (--stage pretrain) comes first"
    return projector_warning(source)


def rise(losses: Sequence[float], warmup: int) -> str:
    """A sentence if each of the last five steps has a loss far above that of the first ones; else ""."""
    first = max(1, min(warmup, 5))
    start, last = max(losses[:first]), losses[max(first, len(losses) - 5):]
    if len(last) < 5 or min(last) < max(1.5 * start, start + 0.5):
        return ""
    return (f"the loss began at {start:.2f} and has been above {min(last):.2f} for five steps: the rate is too high; "
            "try a tenth of it")

# ---------------------------------------------------------------------------------------------------
# Silent corruption: a GPU that computes something else the second time

CORRUPTED = 3               # exit code


class Corrupted(Exception):
    """The same computation gave two results."""


class Recheck:
    """--recheck-every N: in every N-th step the first micro-batch is computed twice, and the gradients must be equal.

    They are compared bit for bit, by a checksum in which no flipped bit cancels out, and before the processes add them
    up: afterwards a wrong bit is everywhere, and nobody knows where it came from. The hooks sit on FSDP's unsharded
    parameters, which stay the same objects for the whole run.
    """

    def __init__(self, model: nn.Module, every: int, device: torch.device):
        self.every = every
        self.device = device
        self.is_trial = device.type == "cuda"           # the first check finds out which kernels are deterministic
        self.unsteady: set[str] = set()                 # gradients that are not, and are left out
        self.sums: dict[str, Tensor] | None = None      # of the pass that is being watched
        for unit in model.modules():
            if every and isinstance(unit, FSDPModule):
                unit.unshard()
                for name, p in model.named_parameters():
                    if p.requires_grad and not isinstance(p, DTensor):
                        p.register_post_accumulate_grad_hook(partial(self.note, name))
                unit.reshard()

    def is_due(self, step: int) -> bool:
        return bool(self.every) and (self.is_trial or (step + 1) % self.every == 0)

    def note(self, name: str, p: Tensor) -> None:
        if self.sums is not None:
            self.sums[name] = checksum_of_bits(p.grad)

    def add_twice(self, add_gradients: Callable[[bool], Tensor], last: bool,
                  optimizer: torch.optim.Optimizer) -> Tensor:
        """Compute a micro-batch's gradients and losses, compare, and keep those of the second pass.

        Corrupted, on every process, if the two passes of any of them differ.
        """
        passes = []
        for is_last in (True, last):
            optimizer.zero_grad(set_to_none=True)
            self.sums = {}
            losses = add_gradients(is_last)
            passes.append(dict(zip(self.sums, torch.stack([*self.sums.values()]).tolist())))
        self.sums = None
        self.compare(*passes)
        return losses

    def compare(self, one: dict[str, int], two: dict[str, int]) -> None:
        found = on_every_process(lambda: ([name for name in one | two if one.get(name) != two.get(name)],
                                          f"process {dist.get_rank()} on {socket.gethostname()}, {self.device}"))
        if self.is_trial:
            self.is_trial = False
            times = Counter(name for names, _ in found for name in names)
            self.unsteady = {name for name, n in times.items() if 2 * n > len(found)}
            if self.unsteady:
                print0(f"--recheck-every leaves out {len(self.unsteady)} of {len(one)} gradients, which the kernels of "
                       f"{torch.cuda.get_device_name(self.device)} do not compute twice alike: "
                       f"{', '.join(sorted(self.unsteady)[:5])}")
        for names, where in found:
            for name in names:
                if name not in self.unsteady:
                    raise Corrupted(f"{where}: the gradient of {name} was not the same when it was computed again, so "
                                    "the hardware cannot be trusted. Nothing was saved since; take that device out and "
                                    "run the same command, which goes on from the newest checkpoint")


def checksum_of_bits(x: Tensor, chunk: int = 1 << 22) -> Tensor:
    """A 64-bit sum over the bits of a tensor, every 16 of them weighted by an odd number of their own."""
    bits = x.detach().reshape(-1).view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(bits), chunk):
        part = bits[start:start + chunk]
        weights = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=x.device)
        total += (part * weights).sum()
    return total
