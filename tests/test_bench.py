"""The benchmarks, most of which need packages that are not here, and the campaign for a machine with GPUs, on a CPU.

Whoever has one for an hour must not find a slip in it.
"""
import ast
import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
from bench import gpu
from forks import run_forked
from helpers import ROOT

from lib import plan
from model import LLaVAConfig


def defined_in(module: str) -> set[str]:
    """The names at the top of a module of ours, without importing a benchmark, which may need other packages."""
    if module.startswith("lib.") or (ROOT / f"{module}.py").exists():      # train is train.py, not tests/bench/train.py
        return set(dir(importlib.import_module(module)))
    path = ROOT / "tests/bench" / f"{module}.py"
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
        names.add(getattr(node, "name", None))
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "tests/bench").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_from_us_is_there(path: Path):
    ours = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in ROOT.glob("*.py")}
    ours |= {f"lib.{file.stem}" for file in (ROOT / "lib").glob("*.py")}
    ours |= {file.stem for file in (ROOT / "tests/bench").glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ours:
            missing = {alias.name for alias in node.names} - defined_in(node.module)
            assert not missing, f"{node.module} has no {missing}"


def card(gigabytes: float, processes: int = 1) -> Namespace:
    """What gpu.configurations asks of a Bench."""
    return Namespace(dry=False, memory=gigabytes * 1e9, world=processes, shards=processes, config=LLaVAConfig())


@pytest.mark.parametrize("gigabytes, run", [(80, "pretrain"), (80, "finetune"), (22, "lora"), (22, "qlora")])
def test_first_comes_what_train_would_choose_and_nothing_is_planned_above_the_card(gigabytes, run):
    bench = card(gigabytes)
    tried = gpu.configurations(bench, gpu.RUNS[run])
    model = gpu.train.build_on_meta(tried[0], bench.config)
    assert tried[0].recompute == plan.choose_recompute(tried[0], model, 1, bench.memory)
    assert tried[0].micro_tokens == gpu.MICRO_TOKENS[0] and not tried[0].compile
    assert all(gpu.planned_bytes(cfg, model, 1) <= bench.memory for cfg in tried)
    assert len({str(cfg) for cfg in tried}) == len(tried)


def test_a_card_of_24_gb_gets_lora_and_qlora_and_no_full_finetuning():
    bench = card(22)
    assert not gpu.configurations(bench, gpu.RUNS["finetune"])
    assert gpu.configurations(bench, gpu.RUNS["lora"]) and gpu.configurations(bench, gpu.RUNS["qlora"])


def test_several_gpus_try_each_gather():
    tried = gpu.configurations(card(80, processes=8), gpu.RUNS["finetune"])
    assert {cfg.gather for cfg in tried} == {"on", "off"}


def test_a_skipped_step_is_an_error(monkeypatch):
    """The optimizer did nothing in it: its time would be too good."""
    training = gpu.Training.__new__(gpu.Training)
    training.bench = training.cfg = training.model = training.optimizer = Namespace(device="cpu")
    monkeypatch.setattr(gpu.train, "train_step", lambda *args: (float("nan"), 1.0, True))
    with pytest.raises(ValueError, match="skipped: loss nan"):
        training.step([], 1)


@pytest.mark.parametrize("flags, message", [
    (["--parts", "a,x"], "--parts x: expected some of a, b, c, d"),
    (["--parts", "b"], "give --parts a,b"),
    (["--runs", "sft"], "--runs sft: expected some of finetune, pretrain, lora, qlora"),
    (["--part", "a"], "unrecognized arguments")])
def test_a_mistake_in_a_flag_is_one_line(flags, message):
    with pytest.raises(ValueError, match=message):
        gpu.parse(flags)


def test_several_processes_measure_training_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give --parts a"):
        gpu.parse([])


def test_two_processes_measure_training_with_each_gather(tmp_path):
    """On GPUs the same lines run FSDP over NCCL. Process 0 alone writes."""
    flags = ["--dry", "--parts", "a", "--runs", "pretrain", "--out", tmp_path]
    done = run_forked("tests/bench/gpu.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = found["parts"]["a"]
    assert found["machine"]["processes"] == 2
    assert {row["gather"] for row in rows} == {"on", "off"} and all(row["step_ms"] > 0 for row in rows)
    assert done.stdout.count("the recipe's step") == 1


@pytest.mark.slow
def test_the_campaign_walks_through_every_part_on_a_cpu(tmp_path):
    done = run_forked("tests/bench/gpu.py", "--dry", "--out", tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "gpu.md").read_text()
    assert "failed" not in table and "left out" not in table
    for part in "abcd":
        assert f"## Part {part}" in table
