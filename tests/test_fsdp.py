"""The path that eight GPUs take, on GPUs that are not there. tests/fake_fsdp.py says what that shows and what not."""
import pytest
from helpers import run_script

CASES = [
    "--stage pretrain --gather off --recompute none",
    "--stage finetune --gather off --recompute selective",
    "--stage finetune --gather on --recompute full",
    "--stage finetune --lora-r 64 --base-bits 4 --recompute full",
    "--stage finetune --freeze vision",
    "--stage sft",
]


@pytest.mark.parametrize("machines, cases", [
    ([], CASES),
    (["--nodes", "2"], ["--stage finetune --gather on --recompute none"]),
    (["--world", "1"],
     ["--stage finetune --gather on --recompute none", "--stage pretrain --gather off --recompute none"]),
])
def test_gpus_take_steps_without_mixed_devices_or_waits_or_other_collectives(machines, cases):
    """Protects the first command of the README. A process of its own, since it replaces parts of torch."""
    done = run_script("tests/fake_fsdp.py", "--tiny", *machines, "--only", *cases)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == len(cases), done.stdout
