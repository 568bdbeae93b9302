"""Peak memory and seconds of loading a saved model, next to transformers on the same folder and to a plain read of its files.

The plain read comes twice: into one small buffer (what the disk can do), and into fresh memory of the files' size (what
the disk and the kernel's page faults can do; every model that is not a mapped file pays for both).

Each measurement is a fresh process. --drop asks the kernel to forget the files first, so that they come from the disk.

$ python tests/bench/make_checkpoints.py --tokenizer checkpoints/phi-2
$ python load_weights.py merge --llm checkpoints/random/phi-2 --vision checkpoints/random/clip --out checkpoints/random/base
$ python tests/bench/load.py --model checkpoints/random/base --drop
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROLOGUE = """
import json, re, sys, time
from pathlib import Path
folder, dtype = Path(sys.argv[1]), sys.argv[2]
def memory(what):       # bytes: VmRSS now, VmHWM at the most. Of this program only, unlike getrusage, which remembers its parent
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
"""
START = "\nbefore, start = memory('VmRSS'), time.time()\n"
EPILOGUE = "\nprint(json.dumps([time.time() - start, before, memory('VmHWM')]))"
READ = """
for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer): buffer = {}"""
TOUCH = "\nfor p in model.parameters(): p.data.view(torch.uint8).flatten()[::4096].sum()"    # a mapped weight is not yet a loaded one
WAYS = {
    "read, forget": START + "buffer = memoryview(bytearray(1 << 26))" + READ.format("buffer"),
    "read, keep": "import mmap" + START + "size = sum(p.stat().st_size for p in folder.iterdir())\nbuffer = memoryview(mmap.mmap(-1, size))"
                  + READ.format("buffer[n:]"),
    "load_model": "import torch; from load_weights import load_model" + START + "model = load_model(folder, getattr(torch, dtype))" + TOUCH,
    "transformers": "import torch; from transformers import LlavaForConditionalGeneration" + START
                    + "model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=getattr(torch, dtype))" + TOUCH,
}


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache; needs no rights, works on clean pages."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/random/base"), help="a saved model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--drop", action=argparse.BooleanOptionalAction, default=False, help="measure with the files out of the page cache")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from load_weights import load_config, meta_model
    parameters = sum(p.numel() for p in meta_model(load_config(args.model)).parameters())
    weights = parameters * {"bfloat16": 2, "float32": 4}[args.dtype]
    size = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print(f"{args.model}: {size / 1e9:.2f} GB of files, {weights / 1e9:.2f} GB of {args.dtype} weights in the model")
    for way, code in list(WAYS.items()) * args.repeat:
        if way == "transformers" and importlib.util.find_spec("transformers") is None:
            print(f"{way:14} not installed")
            continue
        if args.drop:
            forget(args.model)
        done = subprocess.run([sys.executable, "-c", PROLOGUE + code + EPILOGUE, str(args.model.resolve()), args.dtype], cwd=ROOT,
                              capture_output=True, text=True)
        if done.returncode:
            print(f"{way:14} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        seconds, before, peak = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:14} {seconds:6.1f} s, peak {peak / 1e9:5.2f} GB, of which {before / 1e9:.2f} GB before loading; "
              f"{(peak - before) / weights:.3f} times the weights")


if __name__ == "__main__":
    main()
