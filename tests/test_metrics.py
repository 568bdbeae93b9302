"""What a run writes down about itself, its curves, and the memory that it plans with."""
import json
import math
import re
from pathlib import Path

import pytest
import torch

from lib.device import free_in_container, free_memory, memory_of, peak_memory
from lib.metrics import forget_later_steps, mfu, peak_flops, progress_line
from lib.plot import figure, plot, read_curves, scale
from lib.recipes import parse
from train import main


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 4090", 165.2),
])
def test_a_card_has_the_peak_of_its_own_datasheet(name, tflops):
    """Protects MFU from a name that begins another one: an L40S is twice an L40, an H100 on PCIe three quarters."""
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "NVIDIA GB200", "Tesla V100-SXM2-32GB", "AMD Instinct MI300X",
])
def test_where_no_datasheet_is_known_there_is_no_mfu(name, monkeypatch):
    assert peak_flops(name) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert mfu(1e14, torch.device("cuda", 0)) is None and mfu(1e14, torch.device("cpu")) is None


def test_the_line_of_a_step_has_mfu_where_it_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    record = dict(step=0, loss=1.0, grad_norm=1.0, lr=1.0, seconds=1.0, tokens_per_second=9870.0, memory_gb=1.0,
                  skipped=False)
    known = record | {"mfu": mfu(989e12 / 2, torch.device("cuda", 0))}
    assert "9,870 tok/s | mfu 50.0 % | 1.0 GB" in progress_line(known, 1, 0)
    assert "9,870 tok/s | 1.0 GB" in progress_line(record | {"mfu": None}, 1, 0)


def test_going_on_from_a_checkpoint_forgets_what_came_after_it(tmp_path):
    """A validation after k steps carries step k, and so does the training step that follows it."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "val_loss": 3.0}, {"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0},
             {"step": 2, "val_loss": 1.5}, {"step": 2, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    forget_later_steps(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:4]
    forget_later_steps(path, 2, again=True)                         # the run resumes at its end and validates again
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    forget_later_steps(path, 0)
    assert path.read_text() == ""


def test_broken_lines_of_a_log_do_not_keep_a_run_from_going_on(tmp_path, capfd):
    """A power failure leaves zeros, a full disk half a line with the next one behind it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\0\0\n{"step": 1, "lo{"step": 1}\n[1]\n{"step": 1}\n{"loss": 1}\n')
    forget_later_steps(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    assert f"warning: {path} has broken lines, which are dropped" in capfd.readouterr().err


def test_a_training_process_plans_with_what_is_free_on_its_gpu(monkeypatch):
    """Somebody else may be on the card, and the allocator loses some of the rest: 0.92 of 60 GB free, of 80."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10 ** 9, 80 * 10 ** 9))
    assert free_memory(torch.device("cuda", 1)) == 60e9
    assert memory_of(torch.device("cuda", 1)) == pytest.approx(0.92 * 60e9)


def test_the_processes_of_a_machine_without_gpus_share_its_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = memory_of(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_of(torch.device("cpu")) == alone / 4
    assert 0 < free_memory("cpu") <= alone and 0 < peak_memory("cpu") <= alone


def write_run(folder: Path, losses: list[float], **more) -> Path:
    """An --out folder with the metrics of a run; its third step was skipped, and it was killed while writing."""
    folder.mkdir()
    rows = [{"step": 0, "val_loss": losses[0] + 0.5, "val_loss_blank": losses[0] + 0.6}]
    rows += [{"step": i, "loss": loss, "grad_norm": 2 * loss, "lr": 1e-3 / (i + 1), "skipped": i == 2} | more
             for i, loss in enumerate(losses)]
    rows += [{"step": len(losses), "val_loss": losses[-1] + 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    return folder


def test_each_run_has_its_column_of_curves(tmp_path, capsys):
    runs = [write_run(tmp_path / "one", [3.0, 2.0, 9.0, 1.0]), write_run(tmp_path / "<two>", [1.0] * 5)]
    main(parse(["--plot", *map(str, runs), "--plot-to", str(tmp_path / "page.html")]))
    page = (tmp_path / "page.html").read_text()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n" and not (runs[0] / "loss.html").exists()
    assert page.count("<svg") == 2 and "&lt;two&gt;" in page and "<script" not in page and 'name="viewport"' in page
    for title in ("loss per token (nats)", "training loss", "validation loss", "gradient norm", "learning rate",
                  "step"):
        assert page.count(f">{title}</text>") == 2
    assert read_curves(runs[0]) == {"loss": [(1, 3.0), (2, 2.0), (4, 1.0)], "val_loss": [(0, 3.5), (4, 1.5)],
                                    "val_loss_blank": [(0, 3.6)],
                                    "grad_norm": [(1, 6.0), (2, 4.0), (4, 2.0)],
                                    "lr": [(1, 1e-3), (2, 5e-4), (4, 2.5e-4)]}
    with pytest.raises(FileNotFoundError, match="not there; --plot and --against take --out folders"):
        plot([tmp_path], tmp_path / "loss.html")


@pytest.mark.parametrize("n", [1, 2, 7, 47, 188, 1000, 5198, 123_456])
def test_steps_are_marked_at_round_numbers_within_the_picture(n):
    svg = figure({"loss": [(1, 2.0), (n, 1.0)], "val_loss": [], "val_loss_blank": [], "grad_norm": [], "lr": []})
    labels = re.findall(r'<text x="([\d.]+)" y="460.0" text-anchor="middle">([\d,]+)</text>', svg)
    steps = [int(label.replace(",", "")) for _, label in labels]
    assert steps[0] == 0 and 2 <= len(steps) <= 7 and 2 * steps[-1] >= n
    assert str(steps[1]).rstrip("0") in ("1", "2", "5") and steps == list(range(0, n + 1, steps[1]))
    assert all(float(x) + 3.5 * len(label) <= 470 for x, label in labels)          # the width of a digit is 7


def test_one_spike_does_not_flatten_the_rest():
    """It is cut off, marked, and its value is written next to the mark."""
    losses = [2.0, 1.5] + [1.0] * 100
    assert max(scale([losses], 6)) == 2.0
    losses[50] = 1000.0
    assert max(scale([losses], 6)) == 2.0
    svg = figure({"loss": [*enumerate(losses, 1)], "val_loss": [], "val_loss_blank": [], "grad_norm": [], "lr": []})
    assert svg.count("\u25b4") == 1 and ">1000</text>" in svg
    for path in re.findall(r'points="([^"]*)"', svg):
        assert all(0 < float(point.split(",")[1]) < 500 for point in path.split())


@pytest.mark.parametrize("values, marks", [
    ([0.03, 1.78], [0.0, 0.5, 1.0, 1.5, 2.0]), ([0.91, 1.02], [0.90, 0.95, 1.00, 1.05]), ([15.2], [15, 20]),
    ([0.0, 2e-5], [0.0, 5e-6, 1e-5, 1.5e-5, 2e-5]), ([1.0] * 9, [1.0, 1.5]), ([0.0], [0.0, 0.5]), ([], [0.0, 0.5]),
])
def test_axes_have_round_ends(values, marks):
    assert scale([values], 4) == pytest.approx(marks)


def test_a_containers_limit_counts_as_much_as_the_machines_memory(tmp_path):
    """MemAvailable is the host's: without the limit, saving a checkpoint would be killed instead of refused."""
    assert free_in_container(tmp_path) == math.inf                      # no cgroup of version 2
    for name, text in (("memory.max", "max\n"), ("memory.current", "700\n"),
                       ("memory.stat", "anon 500\ninactive_file 200\nactive_file 0\n")):
        (tmp_path / name).write_text(text)
    assert free_in_container(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_in_container(tmp_path) == 1000 - 700 + 200
