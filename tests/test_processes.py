"""Processes: how they are set up, and what ends a run: signals, kills, lost peers, full memory, unreadable data."""
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import TORCHRUN, Fork, run_forked, start_ranks
from helpers import ROOT, metrics, run_script, start_script, train_flags
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import assert_same_run, run_train, start_train, train_here

import lib.device
import lib.plan
import lib.workers
import train
from data import ImageConfig
from lib.checkpoint import read_checkpoint
from lib.common import LOCK
from lib.plan import check_shared_memory
from lib.processes import explain, explain_dead_worker, watch_signals
from lib.recipes import parse, replace
from lib.workers import map_in_workers
from model import LLaVAConfig

# ---------------------------------------------------------------------------------------------------
# Setting up


def test_help_and_wrong_flags_import_no_torch():
    """Protects the half second in which --help answers; torch alone takes three."""
    for flags, code in ((["--help"], 0), (["--lerning-rate", "1"], 2), (["--lr", "-1"], 2)):
        asked = subprocess.run([sys.executable, "-X", "importtime", "train.py", *flags], cwd=ROOT, text=True,
                               capture_output=True)
        assert asked.returncode == code
        assert not any(line.split("|")[-1].strip() == "torch" for line in asked.stderr.splitlines())


def test_64_processes_shard_within_a_node_and_replicate_across_nodes(monkeypatch, tmp_path):
    """The full-size model's wrapping, with a process group that only pretends."""
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=11, world_size=64))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(train, "on_every_process", lambda work: [work()] * 64)
    mesh, _ = train.setup()
    try:
        assert mesh.shape == (8, 8) and mesh.mesh_dim_names == ("replicate", "shard")
        for stage, units, trained in (("finetune", 34, 3_079_773_184), ("pretrain", 1, 9_180_160)):
            model = train.build_on_meta(parse(["--stage", stage]), LLaVAConfig())
            train.shard(model, mesh, torch.bfloat16)
            assert sum(isinstance(m, FSDPModule) for m in model.modules()) == units
            sharded = [p for p in model.parameters() if isinstance(p, train.DTensor)]
            assert sum(p.numel() for p in sharded) == trained
            assert sum(p.to_local().numel() for p in sharded) == pytest.approx(trained / 8, rel=1e-3)
            assert all(str(p.placements) == "(Replicate(), Shard(dim=0))" for p in sharded)
            whole = [p for p in model.parameters() if not isinstance(p, train.DTensor)]
            assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in whole)
    finally:
        train.dist.destroy_process_group()


def test_nodes_of_one_process_each_share_the_weights_out(monkeypatch):
    """A mesh of (nodes, 1) would shard nothing."""
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=1, world_size=2))
    monkeypatch.setattr(train, "on_every_process", lambda work: [work()] * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    mesh, _ = train.setup()
    try:
        assert mesh.shape == (2,) and mesh.mesh_dim_names == ("shard",)
    finally:
        train.dist.destroy_process_group()


def test_nodes_with_different_numbers_of_processes_are_refused(monkeypatch):
    """A mesh over nodes of 2 and 1 would end in an abort or in silence."""
    real = train.dist.init_process_group
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda *a, **k: real("fake", store=FakeStore(), rank=0, world_size=3))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train, "on_every_process", lambda work: [work(), work(), 1])
    try:
        with pytest.raises(ValueError, match="nodes with 1 and 2 processes: start the same number on every node"):
            train.setup()
    finally:
        train.dist.destroy_process_group()


def test_a_card_that_torch_has_no_kernels_for_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(lib.device, "missing_kernels", lambda card: "Tesla V100 has compute capability 7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ValueError, match="Tesla V100 has compute capability 7.0; --device cpu trains on"):
        train.setup()


def test_device_cuda_is_refused_where_there_is_none():
    """Rather than trained on the CPU."""
    with pytest.raises(ValueError, match="--device cuda: this machine and this torch .* offer cpu"):
        train.setup("cuda")


def test_processes_that_cannot_reach_each_other_name_the_variables(monkeypatch):
    """Debian's host name leads to 127.0.1.1, where no other node can reach gloo."""
    def refuse(*args, **kwargs):
        raise RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error\nand more")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train.dist, "init_process_group", refuse)
    with pytest.raises(OSError, match="connectFullMesh failed.*GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME") as refused:
        train.setup()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("users, expected", [({}, "expandable_segments:True"),
                                             ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
                                              "backend:cudaMallocAsync"),
                                             ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "None")])
def test_the_allocator_may_expand_its_segments_unless_the_user_chose(users, expected):
    """Each micro-batch has another length, which fragments the default allocator. Torch reads it when imported."""
    code = """
import builtins, os
real = builtins.__import__
def look(name, *args, **kwargs):
    if name == "torch":
        print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
        os._exit(0)
    return real(name, *args, **kwargs)
builtins.__import__ = look
import train
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")} | users
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.stdout.strip() == expected


def test_the_process_with_the_least_memory_decides_for_all(chat_json, tmp_path, monkeypatch):
    """Processes that recompute or gather differently call other collectives and wait for each other for ever."""
    flags = ["--gather", "auto", "--recompute", "auto"]
    cfg = parse(train_flags(tmp_path, chat_json, *flags))
    mesh, device = train.setup()
    try:
        monkeypatch.setattr(train, "on_every_process", lambda work: [work(), 1.0])      # another one has one byte
        source, config = train.open_source(cfg)
        model = train.build(cfg, config, source, mesh, device)
        assert model.llm.recompute == "full" and model.gather == "off"
    finally:
        train.dist.destroy_process_group()


def test_a_taken_port_is_named(monkeypatch):
    """Advice about network interfaces would lead nowhere."""
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        variables = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": s.getsockname()[1]}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(OSError, match=f"port {s.getsockname()[1]} of .* is taken.*--rdzv-endpoint") as refused:
            train.setup()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("variables, words", [
    ({"SLURM_STEP_NUM_TASKS": "4"}, "4 processes .* without torchrun.*docs/cluster.md"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes .* without torchrun"),
    ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "WORLD_SIZE is set and LOCAL_WORLD_SIZE not"),
    ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK and LOCAL_WORLD_SIZE not"),
])
def test_processes_of_another_launcher_are_refused(variables, words, monkeypatch):
    """Each would have trained by itself, or sharded nothing."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        train.setup()


@pytest.mark.parametrize("sizes", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_uneven_nodes_end_with_one_line(sizes, chat_json, tmp_path):
    """Two torchruns. A mesh over their processes would end in an abort, or in ten minutes of silence."""
    port = free_port()
    flags = train_flags(tmp_path / "out", chat_json)
    torchrun = [TORCHRUN, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    nodes = [Fork(*torchrun, f"--rdzv-conf=is_host={int(i == 0)}", f"--nproc_per_node={size}", "train.py", *flags)
             for i, size in enumerate(sizes)]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode for node in nodes)
    # The other node's torchrun may first notice that the first one's is gone.
    line = "error: nodes with 1 and 2 processes: start the same number on every node"
    assert any(said_once(line, stderr) for stderr in said), said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


JOIN_AND_LOCK = """
import os
import sys
from pathlib import Path
import train
from lib.checkpoint import lock_output
from lib.common import run_command

def main():
    train.setup()
    with lock_output(Path(sys.argv[1]), patience=0.5):
        print("locked")
exit_code = run_command(main)
sys.stdout.flush()
os._exit(exit_code)
"""


@pytest.mark.parametrize("folders, code, words", [
    (["out", "out"], 0, "locked"),
    (["node0", "node1"], 2, "is not shared: .* does not see what process 0 writes there"),
])
def test_nodes_without_a_shared_folder_are_refused(folders, code, words, tmp_path):
    """Each would write its part of every checkpoint into a folder of its own, and none could be read."""
    (tmp_path / "node.py").write_text(JOIN_AND_LOCK)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    nodes = [Fork(tmp_path / "node.py", tmp_path / folder, **group, RANK=rank, LOCAL_RANK=0)
             for rank, folder in enumerate(folders)]
    for node in nodes:
        stdout, stderr = node.communicate(timeout=120)
        assert node.returncode == code, stderr
        assert re.search(words, stdout + stderr) and (stdout + stderr).count("\n") == 1
    assert not [path for path in tmp_path.rglob(".*")]


def test_gpus_that_have_no_bf16(monkeypatch):
    for name, stub in {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
                       "get_device_name": lambda device: "Tesla V100-SXM2-32GB",
                       "is_bf16_supported": lambda including_emulation: including_emulation}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(lib.device, "missing_kernels", lambda card: "")
    with pytest.raises(ValueError, match="V100-SXM2-32GB has no bf16 arithmetic; give --dtype fp32"):
        lib.device.take_gpu("bf16")
    assert lib.device.take_gpu("fp32") == torch.device("cuda", 0)

# ---------------------------------------------------------------------------------------------------
# The end of a run


def wait_for(path: Path, lines: int = 1) -> None:
    """Wait until a run has written this many lines."""
    wait_until = time.time() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.time() < wait_until, f"{path} does not grow"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def said_once(line: str, stderr: str) -> bool:
    """Is it there once, as the last thing that torchrun prints? What follows is the lower edge of its table."""
    return stderr.count(line) == 1 and line in stderr.rstrip("\n=").splitlines()[-1]


def test_a_failing_rank_says_why_before_it_leaves_the_group(chat_json, tmp_path, monkeypatch):
    """On NCCL, leaving waits for the other processes, which wait in a collective for the one that failed."""
    def fail(*args):
        raise ValueError("a reason")
    monkeypatch.setattr(train, "train_step", fail)
    real = train.dist.destroy_process_group

    def leave(group=None):
        assert group is not None, "leaving the run's group would block"
        real(group)
    with monkeypatch.context() as patch:
        patch.setattr(train.dist, "destroy_process_group", leave)
        with pytest.raises(ValueError, match="a reason"):
            train.main(parse(train_flags(tmp_path / "out", chat_json)))
    train.dist.destroy_process_group()


PATIENT = """
import os, time
from datetime import timedelta
from lib.processes import join_group, on_process_0
join_group("gloo", timedelta(seconds=2))
print(on_process_0(lambda: time.sleep(5) or "read"), flush=True)
os._exit(0)
"""


def test_the_others_wait_as_long_as_process_0_needs_for_its_files(tmp_path):
    """Checking a checkpoint or writing a model on a slow disk takes longer than a collective of the training may."""
    (tmp_path / "rank.py").write_text(PATIENT)
    done = run_forked(tmp_path / "rank.py", processes=2)
    assert done.stdout == "read\n" * 2, done.stderr


NCCL = "NCCL error in: NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"


@pytest.mark.parametrize("message, line", [
    ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:12345", "lost another one"),
    ("Timed out waiting 600000ms for recv operation to complete", "lost another one"),
    ("Application timeout caused pair closure", "lost another one"),
    ("recvValue failed on SocketImpl: failed to recv, got 0 bytes. Connection was likely closed.", "lost another one"),
    (NCCL.format("remote process exited or there was a network error", "ncclRemoteError: ...", "socket closed"),
     "lost another one"),
    (NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: ...", "Cuda failure 2 'out of memory'"),
     "NCCL failed: Cuda failure 2 'out of memory'"),
    (NCCL.format("unhandled system error", "ncclSystemError: ...", "Error while creating shared memory segment"),
     "NCCL failed: Error while creating shared memory segment"),
])
def test_only_a_lost_connection_counts_as_a_lost_process(message, line, monkeypatch):
    """Any message with "NCCL" in it did, and the cause, which NCCL writes last, was cut off."""
    monkeypatch.setattr(train.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 8)
    said = explain(RuntimeError(message), parse([]))
    assert line in said and "process 3 of 8" in said and "\n" not in said


def test_other_errors_of_torch_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(train.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 8)
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), parse([])) == ""


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
     "DataLoader worker (pid 7) is killed by signal: Bus error"),
    (EOFError("Caught EOFError in pin memory thread for device 0.\nOriginal Traceback"),
     "Caught EOFError in pin memory"),
    (ConnectionResetError(), "it closed the connection"),
])
def test_a_dead_worker_is_known_by_any_of_its_errors(error, reason, monkeypatch):
    monkeypatch.setattr(train.dist, "get_rank", lambda: 3)
    said = explain_dead_worker(error)
    assert f"a data worker of process 3 on {socket.gethostname()} died ({reason}" in said and "\n" not in said
    assert explain_dead_worker(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


def test_an_exception_in_a_worker_is_no_death_unless_shared_memory_was_short(monkeypatch):
    """A defect keeps its traceback, instead of being blamed on the container."""
    monkeypatch.setattr(train.dist, "get_rank", lambda: 3)
    caught = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    assert explain_dead_worker(RuntimeError(caught + "RuntimeError: shape '[3]' is invalid")) == ""
    short = "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
    assert f"died ({short})" in explain_dead_worker(RuntimeError(caught + short))


def test_a_data_worker_that_dies_ends_all_processes_and_names_the_flag(chat_json, tmp_path):
    """In a container with little shared memory a worker dies of SIGBUS, and only its own process would know."""
    out = tmp_path / "out"
    flags = train_flags(out, chat_json, "--epochs", "1000", "--workers", "1")
    first, last = start_ranks("train.py", *flags, processes=2)
    wait_for(out / "metrics.jsonl")
    os.kill(children(last.pid)[-1], signal.SIGBUS)
    _, stderr = first.communicate(timeout=120)
    last.kill()                                 # it leaves the message to the first process
    assert stderr.count("error: a data worker of process 1") == 1 and "Traceback" not in stderr, stderr
    assert "--ipc=host or --shm-size" in stderr and "--workers 0" in stderr


def test_a_second_run_in_the_same_folder_is_refused_and_kill_9_frees_it(chat_json, tmp_path):
    """Protects two runs from sharing one metrics.jsonl and deleting each other's checkpoints.

    Data workers outlive a killed run by some seconds: they must not keep its folder locked.
    """
    out, more = tmp_path / "out", ["--epochs", "1000", "--workers", "1"]
    first = start_train(train_flags(out, chat_json, *more))
    wait_for(out / "metrics.jsonl")
    second = run_forked("train.py", *train_flags(out, chat_json, *more), processes=2)
    assert second.returncode == 2
    line = f"error: {out} is in use by process {first.pid} on {socket.gethostname()} since 20"
    assert second.stderr.startswith(line) and second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    train_here(train_flags(out, chat_json, *more[:-2], "--resume", "never"), stop_after=1)
    assert [m["step"] for m in metrics(out)] == [0] and not (out / LOCK).exists()
    first.communicate(timeout=120)


def test_a_mistake_under_torchrun_is_one_line(tmp_path):
    """It was a copy from every process, above the table of torchrun."""
    done = run_script("train.py", "--lr", "-1", processes=3)
    assert done.returncode != 0 and said_once("error: argument --lr: expected a number of at least 0", done.stderr)
    assert len(done.stderr.splitlines()) < 50               # most of them torchrun's


def shared_memory_of(size: str) -> list[str]:
    """A command that runs the following one with /dev/shm of this size."""
    return ["unshare", "--mount", "bash", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "-"]


@pytest.mark.skipif(subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
                    reason="needs the right to mount a file system")
def test_too_little_shared_memory_is_named_at_the_start(chat_json, tmp_path):
    """In a container it is 64 MB. Training hung there for ever, and SIGTERM did not end it."""
    flags = train_flags(tmp_path / "out", chat_json, "--workers", "2", "--micro-tokens", "100000")
    done = subprocess.run([*shared_memory_of("4m"), sys.executable, "train.py", *flags], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2
    assert re.search("error: /dev/shm on .* has 0.00 GB free, .*--shm-size=2g or --ipc=host, or give --workers 0\n$",
                     done.stderr)


def test_shared_memory_is_compared_with_what_all_processes_need(chat_json, tmp_path, monkeypatch):
    """Four workers with four micro-batches of 28 pictures each, on eight processes: more than a gigabyte."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    cfg = parse(["--stage", "finetune"])
    index = SimpleNamespace(image=np.ones(9))
    data = SimpleNamespace(image_config=ImageConfig(336, "pad", (0, 0, 0), 576), index=index)
    free = {"bytes": 2e9}
    monkeypatch.setattr(lib.plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    check_shared_memory(cfg, data)
    free["bytes"] = 1e9
    with pytest.raises(OSError, match="has 1.00 GB free, and the data workers take up to 1.37 GB: .*--shm-size=3g"):
        check_shared_memory(cfg, data)
    check_shared_memory(replace(cfg, workers=0), data)
    index.image[:] = 0                          # text needs little
    check_shared_memory(cfg, data)


def test_a_data_worker_that_hangs_is_noticed(monkeypatch):
    monkeypatch.setattr(lib.workers, "TIMEOUT", 1)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 3)
    with pytest.raises(RuntimeError) as hung:
        list(map_in_workers(time.sleep, [60], workers=1))
    said = explain_dead_worker(hung.value)
    assert all(words in said for words in ("timed out after 1 seconds", "--shm-size", "--ipc=host", "--workers 0"))


def test_a_rank_that_dies_ends_all_within_a_minute_and_is_named(chat_json, tmp_path):
    """Protects the hours that the others would wait for it. Process 0 says so; of it, torchrun's table would."""
    out = tmp_path / "out"
    process = start_train(train_flags(out, chat_json, "--epochs", "1000"), processes=2)
    wait_for(out / "metrics.jsonl")
    began = time.time()
    [doomed] = [pid for pid in children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(doomed, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - began < 60
    assert "on " + socket.gethostname() + " lost another one" in stderr, stderr[-3000:]
    assert re.search(rf"rank\s*:\s*\d.*\n.*\n?.*(exitcode|pid).*({doomed}|-9)", stderr), stderr[-3000:]


PARAGRAPH = ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 "
             "GiB is free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. See documentation.")


def test_out_of_memory_ends_with_one_line_and_the_flag_to_lower(chat_json, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError(PARAGRAPH)
    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(OSError) as refused:
        train_here(train_flags(tmp_path / "out", chat_json, "--recompute", "none"))
    said = str(refused.value)
    assert "\n" not in said and "--micro-tokens less than 300 or --recompute full" in said
    assert "Tried to allocate 2.50 GiB, total capacity of 79.10 GiB, 1.25 GiB is free" in said


def test_data_that_one_process_cannot_read_ends_all_with_its_name(chat_json, tmp_path):
    records = json.loads(chat_json.read_text())
    records[13]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    process = start_train(train_flags(tmp_path / "out", tmp_path / "bad.json"), processes=2)
    start = time.time()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - start < 60
    assert said_once("error: sample r13", stderr) and "missing.png" in stderr


def test_a_bad_sample_can_be_skipped_and_is_listed(chat_json, tmp_path, capsys):
    records = json.loads(chat_json.read_text())
    records[13]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    skip = ["--on-bad-sample", "skip", "--epochs", "2"]
    train_here(train_flags(tmp_path / "out", tmp_path / "bad.json", *skip), stop_after=7)
    (tmp_path / "bad.json").rename(tmp_path / "moved.json")
    train_here(train_flags(tmp_path / "out", tmp_path / "moved.json", *skip))
    assert len(metrics(tmp_path / "out")) == 12
    assert json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text())["sample"] == 13  # one line in two epochs
    assert capsys.readouterr().out.count("\nbad samples skipped: 1; ") == 2


def last_save(out: Path) -> int:
    """When the save that is being written was begun, in ns; 0 if there is none."""
    try:
        return max((part.stat().st_mtime_ns for part in out.glob(".writing_*")), default=0)
    except FileNotFoundError:                               # it has just been renamed
        return 0


def kill_and_resume(kills: int, processes: int, chat_json: Path, tmp_path: Path, seed: int) -> None:
    """Kill a run `kills` times, every second time inside a save; in the end it is as if nothing had been.

    With torchrun either one process is killed, and torchrun ends the others, or all are at once.
    """
    rng, out = random.Random(seed), tmp_path / "killed"
    more = ["--epochs", "100", "--max-steps", str(30 + 8 * kills), "--save-every", "3", "--dropout", "0.1"]
    train_whole = partial(run_train, processes=processes) if processes > 1 else train_here
    train_whole(train_flags(tmp_path / "whole", chat_json, *more))
    for i in range(kills):
        process = start_train(train_flags(out, chat_json, *more), processes)
        began, path = time.time_ns(), out / "metrics.jsonl"
        wait = rng.randrange(1, 8)                          # steps
        last = b""
        while wait if i % 2 else last_save(out) < began:    # what the kill before left is still there for a while
            assert process.poll() is None and time.time_ns() < began + 120e9, process.communicate()[1][-9000:]
            if path.exists() and path.stat().st_mtime_ns > began and path.read_bytes() != last:
                last, wait = path.read_bytes(), wait - 1
            time.sleep(0.002)                               # leaves the processor to the run
        ranks = children(process.pid) if processes > 1 else []
        doomed = [rng.choice(ranks)] if ranks and rng.random() < 0.5 else [process.pid, *ranks]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert "model_type" not in json.loads((out / "config.json").read_text())        # it was killed before it was done
    train_whole(train_flags(out, chat_json, *more))
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob(".writing_*"))


def test_three_kills_leave_no_trace(chat_json, tmp_path):
    """Protects guarantee 4 against power cuts and schedulers."""
    kill_and_resume(3, 1, chat_json, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_leave_no_trace(processes, chat_json, tmp_path):
    kill_and_resume(20, processes, chat_json, tmp_path, seed=processes)


@pytest.mark.parametrize("processes, workers, to",
                         [(1, 1, "launcher"), pytest.param(2, 0, "launcher", marks=pytest.mark.slow),
                          (2, 1, "one"), (2, 1, "group")])
def test_sigterm_saves_and_the_next_start_goes_on(processes, workers, to, chat_json, tmp_path):
    """Protects against losing work to a scheduler, whomever it signals: a group includes the data workers."""
    more, path = ["--epochs", "100", "--workers", str(workers)], tmp_path / "out" / "metrics.jsonl"
    process = start_train(train_flags(tmp_path / "out", chat_json, *more), processes)
    wait_for(path, lines=3)
    if to == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(children(process.pid)[-1] if to == "one" else process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert "stopped after step" in stdout, stderr[-3000:]
    assert process.returncode == (143 if processes == 1 else 1)
    assert stderr.count("SIGTERM: finishing this step, then saving; Ctrl-C ends it now, without\n") <= 1
    if to == "one":                             # torchrun lived on, to say it in one line
        assert said_once("stopped by SIGTERM", stderr) and "exitcode  : 143" in stderr
    [saved] = (tmp_path / "out").glob("step_*")
    read_checkpoint(saved)
    done = int(saved.name[5:])
    train_here(train_flags(tmp_path / "out", chat_json, *more), stop_after=done + 2)
    assert [m["step"] for m in metrics(tmp_path / "out")] == list(range(done + 2))


@pytest.mark.parametrize("number, name", [(signal.SIGHUP, "SIGHUP"), (signal.SIGINT, "SIGINT")])
def test_other_signals_save_as_well_and_a_closed_output_does_not_prevent_it(number, name, chat_json, tmp_path):
    """A dropped connection closes the terminal, and Ctrl-C ends a `tee` behind the run, before the next line."""
    out = tmp_path / "out"
    process = start_script("train.py", *train_flags(out, chat_json, "--epochs", "1000"))
    wait_for(out / "metrics.jsonl", lines=2)
    process.stdout.close()
    os.kill(process.pid, number)
    stderr = process.stderr.read()
    assert process.wait(timeout=120) == 128 + number
    assert [line for line in stderr.splitlines() if name in line] == [
        f"{name}: finishing this step, then saving; Ctrl-C{' again' * (name == 'SIGINT')} ends it now, without",
        f"stopped by {name}"]
    [saved] = out.glob("step_*")
    read_checkpoint(saved)


def test_a_signal_that_is_ignored_on_entry_stays_ignored():
    """nohup ignores SIGHUP, so that a run outlives its terminal."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        received = watch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_processes_whose_torchrun_was_killed_save_and_end(chat_json, tmp_path):
    """By kill -9, or by SIGUSR1, which torchrun does not handle unless told to. The processes trained on, unnoticed."""
    out = tmp_path / "out"
    process = start_script("train.py", *train_flags(out, chat_json, "--epochs", "1000"), processes=2,
                           start_new_session=True)
    wait_for(out / "metrics.jsonl", lines=2)
    process.kill()
    stdout, _ = process.communicate(timeout=60)             # they hold its other end
    assert "stopped after step" in stdout
    [saved] = out.glob("step_*")
    read_checkpoint(saved)


STAND_INS = {
    # Starts the command once for each node and hands signals on, as the real one does.
    "srun": 'trap \'kill -USR1 $nodes\' USR1\nfor node in $(seq $SLURM_NNODES); do "$@" & nodes="$nodes $!"; done\n'
            'wait $nodes; wait $nodes',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STAND_INS/requeued"; fi',
}


@pytest.mark.skipif("shutdown_timeout" not in Path(TORCHRUN).read_text(),
                    reason="this torchrun has no --shutdown-timeout")
def test_the_slurm_script_of_the_docs_saves_before_the_time_is_up_and_requeues(chat_json, tmp_path):
    """The script as it is printed, on two nodes that are both this machine."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (tmp_path / "train.sbatch").write_text(text.partition("```bash\n")[2].partition("```")[0])
    (tmp_path / "bin").mkdir()
    for name, code in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}/bin:{Path(sys.executable).parent}:$PATH\n")
    env = os.environ | {"VENV": str(tmp_path), "STAND_INS": str(tmp_path), "INTERFACE": "lo", "SLURM_NNODES": "2",
                        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": str(os.getpid())}
    out = tmp_path / "out"
    flags = train_flags(out, chat_json, "--epochs", "10000")
    job = subprocess.Popen(["bash", tmp_path / "train.sbatch", *flags], cwd=ROOT, env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(out / "metrics.jsonl", lines=2)
        job.send_signal(signal.SIGUSR1)                     # to the script alone: --signal=B:USR1@300
        said, _ = job.communicate(timeout=120)
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    assert job.returncode != 0 and "stopped after step" in said, said[-5000:]
    [saved] = out.glob("step_*")
    read_checkpoint(saved)
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


def kill_under_restarts(kills: int, chat_json: Path, tmp_path: Path, seed: int) -> None:
    """Kill one of two processes `kills` times, while they start or after some steps. torchrun starts them again, and in
    the end it is as if nothing had been.
    """
    rng, out = random.Random(seed), tmp_path / "killed"
    path, more = out / "metrics.jsonl", ["--epochs", "1000", "--max-steps", str(10 + 12 * kills), "--save-every", "2"]
    torchrun = [TORCHRUN, "--standalone", "--nproc_per_node=2", f"--max-restarts={kills}"]
    process = Fork(*torchrun, "train.py", *train_flags(out, chat_json, *more))
    try:
        killed: set[int] = set()
        for _ in range(kills):
            wait_until = time.time() + 120
            while len(ranks := set(children(process.pid)) - killed) < 2:
                assert process.poll() is None and time.time() < wait_until, "torchrun did not start the processes again"
                time.sleep(0.05)
            killed |= ranks
            if rng.random() < 0.5:
                time.sleep(3 * rng.random())
            else:
                began = path.stat().st_mtime_ns if path.exists() else 0
                while not path.exists() or path.stat().st_mtime_ns <= began or rng.random() < 0.8:
                    assert process.poll() is None and time.time() < wait_until, "no step since the last kill"
                    time.sleep(0.05)
            os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
        _, stderr = process.communicate(timeout=400)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        for rank in children(process.pid):
            os.kill(rank, signal.SIGKILL)
        raise
    assert process.returncode == 0, stderr[-5000:]
    run_train(train_flags(tmp_path / "whole", chat_json, *more), processes=2)
    assert_same_run(tmp_path / "whole", out)


def test_torchrun_starts_a_killed_run_again(chat_json, tmp_path):
    """The processes found each other's old addresses in the store of torchrun, and every second run died or hung."""
    kill_under_restarts(1, chat_json, tmp_path, seed=0)


@pytest.mark.slow
def test_twenty_kills_under_one_torchrun_leave_no_trace(chat_json, tmp_path):
    kill_under_restarts(20, chat_json, tmp_path, seed=1)
