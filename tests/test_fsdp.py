"""The path that eight GPUs take, on GPUs that are not there. tests/fake_fsdp.py says what that shows and what not."""
import subprocess
import sys

from conftest import ROOT

CASES = [
    "--stage pretrain --gather off --recompute none",
    "--stage finetune --gather off --recompute selective",
    "--stage finetune --gather on --recompute full",
    "--stage finetune --lora-r 64 --base-bits 4 --recompute full",
    "--stage finetune --freeze vision",
    "--stage sft",
]


def test_eight_gpus_take_a_step_without_mixed_devices_or_waits_or_other_collectives():
    """Protects the first command of the README. A process of its own, since it replaces parts of torch."""
    done = subprocess.run([sys.executable, "tests/fake_fsdp.py", "--tiny", "--only", *CASES], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == len(CASES), done.stdout
