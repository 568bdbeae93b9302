"""What every command leans on: files written whole or not at all; which process, device and dtype it is run with."""
import argparse
import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, hear_signals

from lib.common import plural, print_last, read_jsonl, replacing, run_command, torchrun_env, write_whole
from lib.device import choose_device, cpu_warning, has_bf16, unused_gpu


def test_a_process_that_torchrun_did_not_start_is_the_only_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_env() == (0, 1, 0, 1)
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    here = torchrun_env()
    assert (here.rank, here.world, here.local_rank, here.local_world) == (11, 16, 3, 8)


@pytest.fixture
def card(monkeypatch):
    """A CUDA card that is not there, of a given name, compute capability and build of torch."""
    def pretend(name: str, capability: tuple[int, int], built_for: str) -> None:
        real = torch.empty
        stubs = dict(is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda i: name,
                     get_device_capability=lambda i: capability, get_arch_list=lambda: built_for.split(),
                     is_bf16_supported=lambda including_emulation=True: including_emulation or capability >= (8, 0))
        for function, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, function, stub)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "empty", lambda *size, device: real(*size))
    return pretend


CUDA_13 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.mark.parametrize("name, capability, built_for", [
    ("Tesla T4", (7, 5), CUDA_13), ("NVIDIA L4", (8, 9), CUDA_13), ("NVIDIA H200", (9, 0), CUDA_13),
    ("Tesla V100", (7, 0), "sm_70 sm_80"), ("A later one", (13, 0), CUDA_13 + " compute_120"),
])
def test_a_card_with_kernels_is_taken(name, capability, built_for, card, capsys, monkeypatch):
    """Kernels run on later cards of the same major version, and PTX on all later ones."""
    card(name, capability, built_for)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device(None) == "cuda" and choose_device("cuda:0") == "cuda:0"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, capability", [("Tesla V100", (7, 0)), ("A later one", (13, 0))])
def test_a_card_without_kernels_leaves_the_work_to_the_cpu_and_says_so(name, capability, card, capsys):
    card(name, capability, CUDA_13)
    assert choose_device(None) == "cpu"
    said = capsys.readouterr().err
    assert said.startswith(f"{name} has compute capability {capability[0]}.0") and "kernels for sm_75" in said
    assert said.endswith("computing on the cpu\n") and said.count("\n") == 1
    with pytest.raises(ValueError, match=f"--device cuda: .* offer cpu; {name} has compute capability"):
        choose_device("cuda")


def test_the_gpu_that_was_asked_for_is_the_current_one(card, monkeypatch):
    """Events and memory statistics are the current GPU's: without this, --device cuda:1 would answer with stale ids."""
    card("NVIDIA L4", (8, 9), CUDA_13)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == "cuda:1" and current == ["cuda:1"]
    assert choose_device(None) == "cuda" and choose_device("cpu") == "cpu" and len(current) == 1


def test_bf16_need_not_be_emulated(card, monkeypatch):
    card("Tesla T4", (7, 5), CUDA_13)
    assert not has_bf16("cuda:0")
    card("NVIDIA A100", (8, 0), CUDA_13)
    assert has_bf16("cuda:0")
    for capability, expected in (("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx512_f", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "some", capability: True})
        assert has_bf16("cpu") == expected

def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "note.txt"
    for text in ("first", "second \ud83d"):                     # half a surrogate pair, as a model may produce it
        assert write_whole(path, text) == path
    assert path.read_text() == "second \\ud83d" and os.listdir(path.parent) == ["note.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("a", "b"):
        with replacing(tmp_path / "model") as part:
            (part / "sub").mkdir(parents=True)
            (part / "sub" / name).write_text(name)
            assert not (tmp_path / "model" / "sub" / name).exists()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model" / "sub") == ["b"]


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_after_a_failure_the_old_content_is_there_and_nothing_else(failure, tmp_path):
    write_whole(tmp_path / "note.txt", "old")
    with pytest.raises(type(failure)):
        with replacing(tmp_path / "note.txt") as part:
            part.write_text("half of the n")
            raise failure
    assert os.listdir(tmp_path) == ["note.txt"] and (tmp_path / "note.txt").read_text() == "old"


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".writing_model" / "sub").mkdir(parents=True)
    with replacing(tmp_path / "model") as part:
        part.mkdir()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == []


@pytest.mark.parametrize("line", ["[1]", "7", "{", "<html>", "[" * 100_000])
def test_a_line_that_is_no_json_object_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not a json object, begins with "):
        read_jsonl(path)
    path.write_text('{"a": 1}\n' + line)
    assert read_jsonl(path, torn=True) == [{"a": 1}]        # as a killed process may leave its last line

# ---------------------------------------------------------------------------------------------------
# Outside the virtual environment

def run_with(change: str, *script: str) -> subprocess.CompletedProcess:
    """A script in a process whose Python was changed first."""
    code = f"import runpy, sys; {change}; sys.argv = {list(script)}; sys.path.insert(0, '.')\n" \
           f"runpy.run_path({script[0]!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=hear_signals)


@pytest.mark.parametrize("script, package", [
    (["train.py"], "numpy"), (["eval.py"], "tqdm"), (["sample.py"], "torch"),
    (["data.py", "check", "--data", "x", "--images", "y"], "numpy"), (["load_weights.py", "inspect", "x"], "torch"),
])
def test_a_missing_package_is_one_line(script, package):
    """It was a traceback, for everybody who had not activated the virtual environment."""
    done = run_with(f"sys.modules[{package!r}] = None", *script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: the package {package} is not installed for {sys.executable}")
    assert "source .venv/bin/activate" in done.stderr and "make demo" in done.stderr


def test_a_torch_that_is_too_old_is_one_line():
    """2.7 has no HuggingFaceStorageWriter; this one has nothing, and is imported faster."""
    done = run_with("import types; sys.modules['torch'] = types.ModuleType('torch')", "load_weights.py", "inspect", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: the package torch is too old for" in done.stderr and "requirements.txt" in done.stderr


@pytest.mark.parametrize("script", ["train.py", "data.py", "eval.py", "sample.py", "load_weights.py"])
def test_an_old_python_is_one_line(script):
    """Python 3.9 can read these files, up to the first annotation with a bar."""
    done = run_with("sys.version_info = (3, 9, 18); sys.version = '3.9.18 (main)'", script, "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: Python 3.9.18 is too old, 3.11 or newer is needed: activate")


@pytest.mark.parametrize("script", ["train.py", "data.py", "eval.py", "sample.py", "load_weights.py", "lib/common.py"])
def test_an_old_python_can_parse_what_says_so(script):
    ast.parse((ROOT / script).read_text(), feature_version=(3, 9))


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_packages_are_imported_is_no_traceback(script):
    """Which takes seconds, and ends with what a shell calls exit code 130."""
    change = ("import builtins, signal; real = builtins.__import__; "
              "builtins.__import__ = lambda name, *a: signal.raise_signal(signal.SIGINT) if name == 'torch' "
              "else real(name, *a)")
    done = run_with(change, script, *(["--prompt", "x"] if script == "sample.py" else []))
    assert done.returncode == -signal.SIGINT and done.stderr == done.stdout == ""


def test_a_defect_keeps_its_traceback():
    done = run_with("sys.modules['fractions'] = None; import lib.common; import fractions", "train.py")
    assert done.returncode == 1 and "Traceback" in done.stderr and "make demo" not in done.stderr

# ---------------------------------------------------------------------------------------------------
# The last line


@pytest.mark.parametrize("restart, to_torchrun", [("0", False), ("3", True)])
def test_torchruns_table_ends_with_the_last_line_unless_it_restarts(restart, to_torchrun, monkeypatch, tmp_path,
                                                                    capsys):
    for name, value in (("ERROR_FILE", tmp_path / "error.json"), ("RESTART_COUNT", restart), ("MAX_RESTARTS", "3")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
    print_last("error: a reason")
    if to_torchrun:
        assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: a reason"
    assert capsys.readouterr().err == ("" if to_torchrun else "error: a reason\n")

# ---------------------------------------------------------------------------------------------------
# A GPU that torch cannot use


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine with an NVIDIA GPU, whose driver this torch cannot use."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_gpu_that_torch_cannot_use_is_named(driver, monkeypatch, tmp_path_factory):
    assert "has an NVIDIA GPU that torch" in unused_gpu(driver) and "nvidia-smi" in unused_gpu(driver)
    assert unused_gpu(tmp_path_factory.mktemp("dev")) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert unused_gpu(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")              # hidden on purpose
    assert unused_gpu(driver) == ""


def test_computing_on_the_cpu_next_to_a_gpu_is_said_unless_it_was_asked_for(driver, monkeypatch, capsys):
    monkeypatch.setattr("lib.device.unused_gpu", lambda: unused_gpu(driver))
    assert choose_device("cpu") == "cpu" and capsys.readouterr().err == ""
    assert choose_device(None) == "cpu"
    assert "has an NVIDIA GPU" in (line := capsys.readouterr().err) and line.endswith("; computing on the cpu\n")


def test_training_on_a_cpu_is_loud_where_it_is_hopeless(driver, monkeypatch):
    cpu = torch.device("cpu")
    assert cpu_warning("auto", cpu, 1_000_000) == "" and cpu_warning("auto", torch.device("cuda"), 3_000_000_000) == ""
    said = cpu_warning("auto", cpu, 3_000_000_000)
    assert said.startswith("WARNING: 3.0B parameters would train on the CPU") and "--device cpu" in said
    assert "finds no GPU here" in said and "\n" not in said
    monkeypatch.setattr("lib.device.unused_gpu", lambda: unused_gpu(driver))
    assert "has an NVIDIA GPU" in cpu_warning("auto", cpu, 1_000_000)
    assert "has an NVIDIA GPU" in cpu_warning("auto", cpu, 3_000_000_000)
    assert cpu_warning("cpu", cpu, 3_000_000_000) == ""         # insisted

@pytest.mark.parametrize("path, flag", [
    ("/there/out/.in_use", "--out /there/out"), ("/there/out", "--out /there/out"),
    ("/there", "--val-data /there/x/val.json"), ("/there/x", "--val-data /there/x/val.json"),
    ("b.jpg", "--image b.jpg"), ("pictures/1/2.jpg", "--images pictures"),
])
def test_an_error_about_a_path_names_the_flag_that_led_there(path, flag, capsys):
    """Permission denied, not a directory, no space left: the path may be a folder above, or a file within."""
    def main(args):
        raise PermissionError(13, "Permission denied", path)

    args = argparse.Namespace(stage="pretrain", steps=3, llm="", keep=None, out="/there/out", images=Path("pictures"),
                              image=["a.jpg", "b.jpg"], val_data="/there/x/val.json")
    assert run_command(main, args) == 2
    assert capsys.readouterr().err == f"error: [Errno 13] Permission denied: '{path}' ({flag})\n"


def test_an_error_that_no_flag_led_to_stays_as_it_is(capsys):
    assert run_command(open, "/nowhere/at/all") == 2
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: '/nowhere/at/all'\n"


def test_one_is_singular():
    assert [plural(n, "step") for n in (0, 1, 2, 2000)] == ["0 steps", "1 step", "2 steps", "2,000 steps"]
