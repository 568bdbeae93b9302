"""The processes of a run: they print once, fail together, agree on numbers, and explain in one line why a run ended."""
import errno
import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from data import Loader, Step
from lib.common import detach_stdout, torchrun_env, warn_once

# ---------------------------------------------------------------------------------------------------
# Collectives


def join_group(backend: str, timeout: timedelta) -> None:
    """Join the group that torchrun's environment describes; without torchrun, make a group of one."""
    try:
        dist.init_process_group(backend, timeout=timeout, **meeting_point(timeout))
    except RuntimeError as e:
        first_line = str(e).partition("\n")[0][:200]
        if "EADDRINUSE" in first_line:
            problem = (f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is taken, perhaps by another run; "
                       "give torchrun --standalone on one node, another port in --rdzv-endpoint on several")
        else:
            problem = (f"the processes cannot reach each other ({first_line}); between nodes, set GLOO_SOCKET_IFNAME "
                       "and NCCL_SOCKET_IFNAME to the network interface that they share; `ip addr` lists them")
        raise OSError(problem) from None


def meeting_point(timeout: timedelta) -> dict:
    """Options of init_process_group that say where the processes meet; {}: where torchrun's variables say.

    A process by itself needs no address. All attempts of torchrun --max-restarts share a key-value store: with the same
    keys, a new process may read the address that its predecessor left there, and wait in vain. Nodes count their
    attempts separately, so several have no common prefix; docs/cluster.md names the variable that gives each attempt a
    store of its own.
    """
    here, attempt = torchrun_env(), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if attempt is None or here.world > here.local_world:
        return {}
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": world}


def launch_problem() -> str:
    """Why these processes cannot train together: something other than torchrun started them. "" if they can."""
    tasks = [int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    if "RANK" not in os.environ and max(tasks) > 1:
        return (f"{max(tasks)} processes that know nothing of each other, started without torchrun: start one torchrun "
                "on each node; docs/cluster.md has a script for Slurm")
    missing = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if torchrun_env().world > 1 and missing:
        return (f"WORLD_SIZE is set and {' and '.join(missing)} not: start one torchrun on each node, which sets all "
                "of them; docs/cluster.md has a script for Slurm")
    return ""


def print0(text: str) -> None:
    """Print on process 0 only. A log on a full disk, or a reader that has gone (a closed terminal, a tee that Ctrl-C
    ended), does not end a run.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError as e:
            if e.errno != errno.ENOSPC:         # a disk may have room again later, a reader does not come back
                detach_stdout()
            with suppress(OSError):             # stderr may have gone with it
                warn_once(f"nothing can be printed ({e.strerror}); the run goes on")


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
    sent = [outcome_of(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0, group=patient_group())
    [(result, error)] = sent
    if error:
        raise error
    return result


def on_every_process(work: Callable) -> list:
    """Call `work` on every process -> all results, on every process. An error on one is raised on all."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, outcome_of(work), group=patient_group())
    for _, error in gathered:
        if error:
            raise error
    return [result for result, _ in gathered]


def outcome_of(work: Callable) -> tuple:
    """The result of `work` and no error, or none and the OSError or ValueError that it ended with."""
    try:
        return work(), None
    except (OSError, ValueError) as e:
        return None, e


LAUNCHER = os.getppid()


def synchronized_steps(loader: Loader, signals: list[int],
                       save_is_due: Callable[[], bool] = lambda: False) -> Iterator[tuple[Step, int, bool, bool]]:
    """A loader's steps -> (step, its supervised tokens over all processes, and whether to stop, and to save, after it).

    They are the same on every process. One that cannot read its data, or has been told by a signal to stop, cannot
    simply leave: the others would wait for it in their next collective. So all processes exchange their status before
    each step, and an error on one of them is raised as a ValueError on all.
    """
    steps = iter(loader)
    while True:
        step = problem = None
        try:
            step = next(steps, None)
            # A worker's death must be noticed here, where all processes learn of it. Torch's handler for this signal
            # would raise in the middle of whatever this process is doing.
            if hasattr(signal, "SIGCHLD"):      # Windows has neither
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except (RuntimeError, EOFError, ConnectionError) as e:
            problem = explain_dead_worker(e)
            if not problem:
                raise
        except (ValueError, OSError) as e:
            problem = str(e)
        if step is None and problem is None:
            return
        supervised = sum(len(batch.targets) for batch in step.batches) if step else 0
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER:
            signals.append(signal.SIGTERM)      # torchrun is gone, and nobody else would end this process
        # The tensor is on the CPU, so this goes over gloo and no process waits for its GPU.
        sums = torch.tensor([supervised, len(signals), save_is_due(), problem is not None])
        dist.all_reduce(sums)
        supervised, stop, save, n_problems = sums.tolist()
        if n_problems:
            raise ValueError(next(filter(None, on_every_process(lambda: problem))))
        yield step, supervised, bool(stop), bool(save)

# ---------------------------------------------------------------------------------------------------
# Signals and errors


def watch_signals() -> list[int]:
    """A list that grows when SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C asks for a save and a stop.

    Ctrl-C after any of them exits at once. A signal that is ignored on entry stays so: nohup ignores SIGHUP.
    """
    received: list[int] = []
    trainer = os.getpid()

    def note(number, frame):
        if received and number == signal.SIGINT:
            os._exit(130)
        if not received and torchrun_env().rank == 0 and os.getpid() == trainer:        # rather than a data worker
            again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
            with suppress(OSError):             # not print, which the signal may just have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving; {again} ends it now, "
                            "without\n".encode())
        received.append(number)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
        number = getattr(signal, name, None)            # Windows has the first and the last
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return received


def exit_code_of_stop(received: list[int]) -> int:
    """128 + the number of the signal that stopped the run, whichever process it came to.

    The other processes of a node leave with 0, so that torchrun's list of failures has one entry.
    """
    everywhere = on_every_process(lambda: received)
    first = next((numbers[0] for numbers in everywhere if numbers), signal.SIGTERM)
    return 0 if torchrun_env().local_rank else 128 + first


# What gloo and NCCL say when another process is gone. Neither has an exception type of its own for that.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "imeout",
        "was likely closed", "remote process exited")


def explain(error: RuntimeError, cfg: Namespace) -> str:
    """One line about a failed collective or a full GPU; "" for every other error, a bug, which keeps its traceback.

    The lost process has printed its own reason, or torchrun will. NCCL's messages have several lines, and the last
    names the cause. Of torch's paragraph about memory: what was requested and what there is.
    """
    message = str(error)
    process = f"process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
    cause = message.partition("Last error:")[2].strip() or message.partition("\n")[0]
    cause = " ".join(cause.split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        facts = re.findall(r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", message)
        advice = f"give --micro-tokens less than {cfg.micro_tokens}"
        if cfg.recompute != "full":
            advice += " or --recompute full"
        return f"{process} is out of GPU memory ({', '.join(facts)}): {advice}; --plan says what fits"
    if dist.get_world_size() > 1 and any(sign in message for sign in LOST):
        return f"{process} lost another one ({cause}); start again to go on from the newest checkpoint"
    if "NCCL error" in message:
        return f"{process}: NCCL failed: {cause}; NCCL_DEBUG=INFO says more"
    return ""


def explain_dead_worker(error: RuntimeError | EOFError | ConnectionError) -> str:
    """One line about a data worker that died or hangs; "" for every other error.

    DataLoader reports it as a RuntimeError, unless it was just receiving a tensor: then the connection breaks.
    An exception that a worker raised also arrives as a RuntimeError, with its traceback. It is a defect, unless it
    says that shared memory could not be had.
    """
    message = str(error)
    if isinstance(error, RuntimeError) and not re.search("DataLoader (worker|timed out)", message):
        return ""
    reason = message.partition("\n")[0].partition(". ")[0][:200] or "it closed the connection"
    if isinstance(error, RuntimeError) and message.startswith("Caught "):
        if not any(sign in message for sign in ("shared memory", "</torch_", "No space left")):
            return ""
        reason = message.strip().rpartition("\n")[2][:200]
    return (f"a data worker of process {dist.get_rank()} on {socket.gethostname()} died ({reason}). In a container "
            "it may lack shared memory: start that with --ipc=host or --shm-size=8g; or give --workers 0")
