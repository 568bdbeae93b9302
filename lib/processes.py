"""The processes of a run: they print once, fail together, agree on numbers, and explain in one line why a run ended."""
import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.common import warn_once

# ---------------------------------------------------------------------------------------------------
# Collectives


def join_group(backend: str, timeout: timedelta, **group_of_one) -> None:
    """Join the group that torchrun's environment describes, or make a group of one from these options."""
    try:
        dist.init_process_group(backend, timeout=timeout, **group_of_one)
    except RuntimeError as e:
        first_line = str(e).partition("\n")[0][:200]
        raise OSError(f"the processes cannot reach each other ({first_line}); between nodes, set GLOO_SOCKET_IFNAME "
                      "and NCCL_SOCKET_IFNAME to the network interface that they share; `ip addr` lists them") from None


def print0(text: str) -> None:
    """Print on process 0 only. A log on a full disk, or a reader that has gone, does not end a run."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError as e:
            warn_once(f"nothing can be printed any more ({e}); the run goes on")


PATIENCE = timedelta(days=1)
patient_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}     # by the group of all processes


def patient_group() -> dist.ProcessGroup:
    """The group in which processes wait for each other's work on files.

    Indexing millions of records, or checking and writing gigabytes on a slow disk, takes longer than the ten minutes
    after which a collective of the training itself counts as hung. A process that dies is noticed at once in either.
    """
    world = dist.group.WORLD
    if world not in patient_groups:
        patient_groups.clear()
        patient_groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return patient_groups[world]


def on_process_0(work: Callable):
    """Call `work` on process 0 -> its result, on every process.

    An OSError or ValueError is raised on every process as well: if only process 0 left, the others would wait for it
    in their next collective until that timed out.
    """
    result_and_error = [None, None]
    if dist.get_rank() == 0:
        try:
            result_and_error[0] = work()
        except (OSError, ValueError) as e:
            result_and_error[1] = e
    dist.broadcast_object_list(result_and_error, src=0, group=patient_group())
    result, error = result_and_error
    if error:
        raise error
    return result


def on_every_process(work: Callable) -> list:
    """Call `work` on every process -> all results, on every process. An error on one is raised on all."""
    result_and_error = [None, None]
    try:
        result_and_error[0] = work()
    except (OSError, ValueError) as e:
        result_and_error[1] = e
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result_and_error, group=patient_group())
    for _, error in gathered:
        if error:
            raise error
    return [result for result, _ in gathered]


def smallest(number: float) -> float:
    """The smallest of all processes' numbers. It is reduced on the CPU, so no process waits for its GPU."""
    numbers = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return numbers.item()

# ---------------------------------------------------------------------------------------------------
# Signals and errors


def watch_signals() -> list[int]:
    """A list that grows when SIGTERM, SIGUSR1 or Ctrl-C asks for a save and a stop. A second Ctrl-C exits at once."""
    received: list[int] = []

    def note(number, frame):
        if received and number == signal.SIGINT:
            os._exit(130)
        received.append(number)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)
    return received


# What gloo and NCCL say when another process is gone. Neither has an exception type of its own for that.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "imeout",
        "was likely closed", "remote process exited")


def explain(error: RuntimeError) -> str:
    """One line about a failed collective; "" for every other error, which is a bug and keeps its traceback.

    The lost process has printed its own reason, or torchrun will. NCCL's messages have several lines, and the last
    names the cause.
    """
    message = str(error)
    process = f"process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
    cause = message.partition("Last error:")[2].strip() or message.partition("\n")[0]
    cause = " ".join(cause.split())[:300]
    if dist.get_world_size() > 1 and any(sign in message for sign in LOST):
        return f"{process} lost another one ({cause}); start again to go on from the newest checkpoint"
    if "NCCL error" in message:
        return f"{process}: NCCL failed: {cause}; NCCL_DEBUG=INFO says more"
    return ""


def explain_dead_worker(error: RuntimeError | EOFError | ConnectionError) -> str:
    """One line about a data worker that died; "" for every other error.

    DataLoader reports it as a RuntimeError, unless it was just receiving a tensor: then the connection breaks.
    An exception that a worker raised also arrives as a RuntimeError, with its traceback. It is a defect, unless it
    says that shared memory could not be had.
    """
    message = str(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" not in message:
        return ""
    reason = message.partition("\n")[0].partition(". ")[0][:200] or "it closed the connection"
    if isinstance(error, RuntimeError) and message.startswith("Caught "):
        if not any(sign in message for sign in ("shared memory", "</torch_", "No space left")):
            return ""
        reason = message.strip().rpartition("\n")[2][:200]
    return (f"a data worker of process {dist.get_rank()} on {socket.gethostname()} died ({reason}). In a container "
            "it may lack shared memory: start that with --ipc=host or --shm-size=8g; or take fewer --workers")


def explain_out_of_memory(error: torch.OutOfMemoryError, cfg: Namespace) -> str:
    """torch's paragraph in one line: what was requested, what there is, and which flag to lower."""
    facts = re.findall(r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", str(error))
    advice = f"give --micro-tokens less than {cfg.micro_tokens}"
    if cfg.recompute != "full":
        advice += " or --recompute full"
    return f"process {dist.get_rank()} is out of GPU memory ({', '.join(facts)}): {advice}; --plan says what fits"
