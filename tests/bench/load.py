"""Seconds and memory of loading a saved model, next to transformers on the same folder and a plain read of its files.

The plain read comes twice: into one small buffer (the speed of the disk), and into fresh memory of the files' size
(with the kernel's page faults, which every model pays for that is not a mapped file).

Memory is the peak of RssAnon, watched from outside every few milliseconds: what the kernel cannot take back. Pages of
mapped files come and go and are not counted. Each measurement is a fresh process. --drop asks the kernel to forget the
files first, so that they come from the disk.

    cd checkpoints/random
    python ../../tests/bench/make_checkpoints.py --out . --tokenizer ../phi-2
    python ../../load_weights.py merge --llm phi-2 --vision clip --out base
    python ../../tests/bench/load.py --model base --drop
"""
import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from lib.common import Parser, dtype_name, run_command
from lib.folders import meta_model, open_weights

# What a measured process runs: imports, START, the loading itself, END.
IMPORTS = """
import json, mmap, sys, time, torch
from pathlib import Path
from lib.common import torch_dtype
folder, dtype = Path(sys.argv[1]), torch_dtype(sys.argv[2])
"""
START = """
print("start", flush=True)
start = time.time()
"""
END = """
print(time.time() - start)
"""
READ = """
for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
"""
# Without this, a weight that is only mapped would count as loaded. load_model copies every weight.
TOUCH = """
for p in model.parameters(): p.data.view(torch.uint8).flatten()[::4096].sum()
"""
WAYS = {
    "read, forget": START + "buffer = memoryview(bytearray(1 << 26))" + READ + "            pass" + END,
    "read, keep": START + "buffer = memoryview(mmap.mmap(-1, sum(p.stat().st_size for p in folder.iterdir())))"
                  + READ + "            buffer = buffer[n:]" + END,
    "load_model": "from load_weights import load_model" + START + "model = load_model(folder, dtype)" + END,
    "transformers": "from transformers import LlavaForConditionalGeneration" + START
                    + "model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype)" + TOUCH + END,
}


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache; needs no rights, works on clean pages."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous(pid: int) -> int:
    """Bytes of a process that belong to no file; 0 when it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(code: str, folder: Path, dtype: str) -> tuple[float, int, int]:
    """Run it -> seconds, bytes of anonymous memory before, and at the peak."""
    command = [sys.executable, "-c", IMPORTS + code, str(folder.resolve()), dtype]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if line.strip() != "start":
        raise ValueError(process.stderr.read().strip().splitlines()[-1])
    before = peak = anonymous(process.pid)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise ValueError(process.stderr.read().strip().splitlines()[-1])
    return float(process.stdout.read()), before, peak


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/random/base"), help="a saved model")
    parser.add_argument("--dtype", default="bf16", type=dtype_name, help="of the loaded model: bf16 or fp32")
    parser.add_argument("--drop", action=argparse.BooleanOptionalAction, default=False,
                        help="measure with the files out of the page cache")
    parser.add_argument("--repeat", type=int, default=2, help="how many times each way is measured")
    args = parser.parse_args()
    parameters = sum(p.numel() for p in meta_model(open_weights(args.model).config).parameters())
    weights = parameters * {"bf16": 2, "fp32": 4}[args.dtype]
    size = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print(f"{args.model}: {size / 1e9:.2f} GB of files, {weights / 1e9:.2f} GB of {args.dtype} weights in the model")
    for way in [*WAYS] * args.repeat:
        if way == "transformers" and importlib.util.find_spec("transformers") is None:
            print(f"{way:14} not installed")
            continue
        if args.drop:
            forget(args.model)
        try:
            seconds, before, peak = measure(WAYS[way], args.model, args.dtype)
        except ValueError as e:
            print(f"{way:14} failed: {e}")
            continue
        print(f"{way:14} {seconds:6.1f} s, {peak / 1e9:5.2f} GB at the peak, {before / 1e9:.2f} GB before loading: "
              f"{(peak - before) / weights:.3f} times the weights")


if __name__ == "__main__":
    sys.exit(run_command(main))
