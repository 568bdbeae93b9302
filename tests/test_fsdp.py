"""The path that eight GPUs take, on GPUs that are not there. tests/fake_fsdp.py says what that shows and what not."""
import pytest
from forks import run_forked

CASES = [
    "--stage pretrain --gather off --recompute none",
    "--stage finetune --gather off --recompute selective --freeze vision",
    "--stage finetune --gather on --recompute full",
    "--stage finetune --lora-r 64 --base-bits 4 --recompute full",
    "--stage sft",
]


@pytest.mark.parametrize("machines, cases", [
    ([], CASES),
    (["--nodes", "2"], ["--stage finetune --gather on --recompute none"]),
    (["--world", "1"], ["--stage finetune --gather on --recompute none"]),
])
def test_gpus_take_steps_without_mixed_devices_or_waits_or_other_collectives(machines, cases):
    """Protects the first command of the README. A process of its own, since it replaces parts of torch."""
    done = run_forked("tests/fake_fsdp.py", "--tiny", *machines, "--only", *cases)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == len(cases), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("machines", [[], ["--nodes", "2"], ["--world", "1"]])
def test_every_combination_of_flags_takes_steps_on_gpus(machines):
    done = run_forked("tests/fake_fsdp.py", "--tiny", *machines, timeout=3000)
    assert done.returncode == 0 and "\n0 failed, " in done.stdout, done.stdout + done.stderr[-3000:]
