"""How fast the GPUs of this machine run the program, in one command of nine minutes at most.

$ python tests/bench/gpu.py                                    # one GPU; writes out/gpu/gpu.json and gpu.md
$ python tests/bench/gpu.py --parts a,c --minutes 4
$ torchrun --nproc_per_node=8 tests/bench/gpu.py --parts a     # training on eight GPUs: FSDP over NCCL, each --gather
$ python tests/bench/gpu.py --dry                              # a tiny model on the CPU: does every part run?

Nothing is downloaded. The model has its published size and random weights, and samples have the lengths of LLaVA's 665K
mix. The parts, the most important first:
  a  a training step of both stages, of LoRA and of QLoRA: first as train.py would choose by itself, then what differs
     from that; at last the recipe's own step (256 and 128 samples) with the best of them
  b  the kernels of that step, and how long the GPU had nothing to do
  c  decoding at batch 1, 16 and 64, eager and captured as a CUDA graph; time to the first token
  d  eval.py as a whole, pictures decoded: questions a second with 1 and with 16 questions a picture
Both files are written after every row, so a run that is cut short keeps what it has. What does not fit into the card by
plan is not tried. A row that failed says why, and the exit code is then 1. Other files of this folder measure loading
(load.py) and transformers on the same GPU (gpu_transformers.py).

The first hour on a machine with GPUs, in this order, each step only when the one before it was right:
  1. python -m pytest tests/test_cuda.py
  2. Two GPUs against one. `make demo` leaves its data and models in out/demo. With
       FLAGS="--stage finetune --model out/demo/pretrain --data out/demo/data/finetune.json
              --images out/demo/data/images --dtype fp32 --max-steps 20 --global-batch 32 --micro-tokens 2048"
     CUDA_VISIBLE_DEVICES=0 python train.py $FLAGS --out out/gpu/one
     torchrun --nproc_per_node=2 train.py $FLAGS --out out/gpu/two
     the losses in the two metrics.jsonl agree to four digits. With
       FLAGS="--task shapes --root out/demo/data --model out/demo/finetune --dtype fp32"
     CUDA_VISIBLE_DEVICES=0 python eval.py $FLAGS --out out/gpu/eval-one
     torchrun --nproc_per_node=2 eval.py $FLAGS --out out/gpu/eval-two
     cmp out/gpu/eval-one/answers.jsonl out/gpu/eval-two/answers.jsonl
  3. One rank out of memory. Fill the second GPU from another terminal,
       python -c 'import torch; n = torch.cuda.mem_get_info(1)[0]; x = torch.empty(n - 2 ** 30, dtype=torch.uint8,
                  device="cuda:1"); input()'
     and train on both as above, with --micro-tokens 100000 --global-batch 2048: all processes end within a minute, with
     one line that says what was asked for and what was free.
  4. This file on one GPU, then with torchrun on all of them.
"""
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))             # train and data are ours, not those of this folder

from lib.common import Parser, parse_or_exit, run_command, torchrun_env

# The share of the minutes after which a part begins nothing new; what it leaves is there for the parts behind it.
SHARES = {"a": 0.55, "b": 0.05, "c": 0.2, "d": 0.2}

RUNS = {                    # what part a trains -> train.py's flags for it
    "finetune": ["--stage", "finetune"],
    "pretrain": ["--stage", "pretrain"],
    "lora": ["--stage", "finetune", "--lora-r", "64"],
    "qlora": ["--stage", "finetune", "--lora-r", "64", "--base-bits", "4"],
}


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", help="which parts, separated by commas; none: all of them")
    parser.add_argument("--runs", default=",".join(RUNS), help="what part a trains")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop beginning new things after this time")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; the numbers mean nothing")
    args = parser.parse_args(argv)
    args.parts = [part.strip() for part in (args.parts or ",".join(SHARES)).split(",")]
    for part in args.parts:
        if part not in SHARES:
            raise ValueError(f"--parts {part}: expected some of {', '.join(SHARES)}")
    args.runs = [run.strip() for run in args.runs.split(",")]
    for run in args.runs:
        if run not in RUNS:
            raise ValueError(f"--runs {run}: expected some of {', '.join(RUNS)}")
    if "b" in args.parts and "a" not in args.parts:
        raise ValueError("--parts b profiles the best step that part a finds: give --parts a,b")
    if torchrun_env().world > 1 and args.parts != ["a"]:
        raise ValueError("several processes measure training, and nothing else: give --parts a")
    return args


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)
    if ARGS.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import train
from data import IGNORE, IMAGE_ID, Sample, Step, collate, load_tokenizer
from lib import plan
from lib.device import memory_of, peak_memory
from lib.flops import PUBLISHED, step_flops
from lib.folders import meta_model, saved_shapes
from lib.generate import Session
from lib.layouts import to_saved
from lib.metrics import mfu
from lib.processes import on_every_process
from lib.recipes import parse as parse_recipe
from lib.recipes import replace
from lib.save_weights import phi_json, tower_json, write_tokenizer
from lib.schedule import split_step
from model import LLaVAConfig, LLaVAPhi, PhiConfig, trained_parts
from vision import VisionConfig

TINY = LLaVAConfig(
    llm=PhiConfig(vocab_size=520, block_size=512, n_layer=2, n_head=2, n_embd=160, n_inner=320),
    vision=VisionConfig(image_size=56, n_layer=3, n_head=2, n_embd=64, n_inner=128),
)

# ---------------------------------------------------------------------------------------------------
# The campaign: its processes, its time, its rows


class Bench:
    """What all parts share: the processes, the minutes that are left, and what ends up in the two files."""

    def __init__(self, args: Namespace):
        self.args, self.dry = args, args.dry
        self.began = self.deadline = time.perf_counter()
        self.mesh, self.device = train.setup()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.config = TINY if args.dry else LLaVAConfig()
        self.dtype = torch.float32 if args.dry else torch.bfloat16
        self.shards = self.mesh.size(-1)
        memories = on_every_process(lambda: memory_of(self.device))
        self.memory = min(memories)             # all have to choose the same configurations
        self.machine: dict = {}
        self.rows: dict[str, list[dict]] = {}

    def has_time(self) -> bool:
        """May something new begin before the deadline? Process 0 decides for all; a dry run leaves nothing out."""
        left = torch.tensor(self.deadline - time.perf_counter())
        dist.broadcast(left, 0)
        return self.dry or left > 0

    def attempt(self, part: str, row: dict, measure: Callable[[], dict]) -> dict | None:
        """Add `row` with what `measure` finds -> the row, or None if it failed or was left out, which it then says."""
        found = {"left out": "the time was up"}
        if self.has_time():
            try:
                found = measure()
            except Exception as e:              # whatever it is: the other rows are worth their minutes
                if self.world > 1:
                    raise                       # the other processes wait for this one; torchrun ends them
                found = {"failed": f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"}
            gc.collect()                        # frees what an exception's traceback held
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self.add(part, row | found)
        return None if "failed" in found or "left out" in found else row | found

    def add(self, part: str, row: dict) -> None:
        """Write a row to the screen and to both files."""
        self.rows.setdefault(part, []).append(row)
        if self.rank > 0:
            return
        text = "  ".join(f"{key} {show(value)}" for key, value in row.items())
        print(f"{time.perf_counter() - self.began:5.0f} s  {part}  {text}", flush=True)
        results = {"machine": self.machine, "parts": self.rows}
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        (self.args.out / "gpu.md").write_text(markdown(results))


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(results: dict) -> str:
    """One table a part, with the keys of its rows as columns."""
    machine = [f"{key} {show(value)}" for key, value in results["machine"].items()]
    text = ["# Speed on GPUs", "", ", ".join(machine), ""]
    for part, rows in results["parts"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text += [f"## Part {part}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            text.append("| " + " | ".join(show(row.get(key, "")) for key in columns) + " |")
        text.append("")
    return "\n".join(text)


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Mean over some calls behind two warm-ups, with the GPU's queue empty before and after."""
    return Timer("work()", globals={"work": work}).timeit(repeats).mean


def describe_machine(bench: Bench) -> dict:
    """What a number needs beside it to mean something, and what this very GPU can do at most."""
    machine = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version(),
               "processes": bench.world, "device": bench.device.type}
    if bench.dry:
        return machine | {"matmul_tflops": 1.0, "copy_tb_s": 1.0}
    properties = torch.cuda.get_device_properties(bench.device)
    # Random numbers: on zeros a GPU draws less power and clocks higher, which no real work does.
    a = torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16)
    source = torch.randn(2 ** 29, device=bench.device)
    target = torch.empty_like(source)
    return machine | {
        "device": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "matmul_tflops": 2 * 8192 ** 3 / seconds_of(lambda: a @ a, 20) / 1e12,
        "copy_tb_s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 20) / 1e12,
    }

# ---------------------------------------------------------------------------------------------------
# Random samples and weights

# LLaVA's 665K mix: samples, mean text tokens, spread of their logarithm, with a picture?, share that is supervised.
# Estimates from the published counts of each source; `python data.py check` measures them on the real file.
MIX = {
    "LLaVA-Instruct": (157_712, 275, 0.45, True, 0.62),
    "ShareGPT": (40_688, 1200, 0.55, False, 0.72),
    "VQAv2": (82_783, 150, 0.30, True, 0.09),
    "GQA": (72_140, 310, 0.40, True, 0.08),
    "OKVQA": (8_998, 75, 0.10, True, 0.06),
    "OCR-VQA": (80_000, 180, 0.35, True, 0.25),
    "A-OKVQA": (66_160, 105, 0.12, True, 0.04),
    "TextCaps": (21_953, 130, 0.35, True, 0.15),
    "RefCOCO": (48_447, 300, 0.45, True, 0.40),
    "VG": (86_417, 480, 0.35, True, 0.35),
}
CAPTION = (558_128, 21, 0.0, True, 1.0)         # a stage-1 sample


def draw_samples(config: LLaVAConfig, stage: str) -> Iterator[Sample]:
    """Samples of a stage without end, the same ones every time.

    Words and picture are random: no kernel's time depends on what they are, only on how many there are.
    """
    random = np.random.default_rng(0)
    S, P = config.vision.image_size, config.vision.n_patches
    image = torch.randint(0, 256, (3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sources = list(MIX.values()) if stage == "finetune" else [CAPTION]
    counts = np.array([source[0] for source in sources])
    while True:
        _, mean, spread, with_image, share = sources[random.choice(len(sources), p=counts / counts.sum())]
        patches = P if with_image else 0
        text = int(random.lognormal(np.log(mean) - spread ** 2 / 2, spread))
        text = max(2, min(text, config.llm.block_size - patches))               # longer ones are cut, as in training
        ids = [IMAGE_ID] * patches + random.integers(1, config.llm.vocab_size, text).tolist()
        supervised = max(1, int(share * text))
        labels = [IGNORE] * (len(ids) - supervised) + ids[len(ids) - supervised:]
        yield Sample("", ids, labels, image if with_image else None)


def fill(samples: Iterator[Sample], tokens: int) -> list[Sample]:
    """As many samples as a micro-batch of so many tokens holds. The last one loses what is over, from its end."""
    filled, room = [], tokens
    for sample in samples:
        if sample.image is not None and room < sample.ids.count(IMAGE_ID) + 2:
            return filled
        filled.append(sample._replace(ids=sample.ids[:room], labels=sample.labels[:room]))
        room -= len(filled[-1].ids)
        if room < 2:
            return filled


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Weights as they start, drawn where they lie; of a sharded one, this process's share."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not tensor.is_floating_point():
            tensor.random_(0, 256)                          # two weights of 4 bits
        elif tensor.dim() > 1:
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(1.0 if ".ln" in name and name.endswith("weight") else 0.0)


def make_model(bench: Bench) -> LLaVAPhi:
    """For answering: all weights in bf16, nothing trained."""
    with torch.device("meta"):
        model = LLaVAPhi(bench.config).to(bench.dtype)
    model = model.to_empty(device=bench.device).eval().requires_grad_(False)
    draw_weights(model)
    return model

# ---------------------------------------------------------------------------------------------------
# a, b: training

MICRO_TOKENS = (16384, 24576, 8192, 4096, 2048)


def configurations(bench: Bench, flags: list[str]) -> list[Namespace]:
    """Settings that fit into the card by plan: first what train.py would choose, last what differs most from it."""
    base = parse_recipe([*flags, "--dtype", "fp32" if bench.dry else "bf16"])
    model = train.build_on_meta(base, bench.config)
    fitting = []
    for micro_tokens in MICRO_TOKENS:
        cfg = replace(base, micro_tokens=micro_tokens // 64 if bench.dry else micro_tokens)
        chosen = plan.choose_recompute(cfg, model, bench.shards, bench.memory)
        for recompute in dict.fromkeys([chosen, *plan.RECOMPUTE_MODES]):
            for gather in ("on", "off") if bench.world > 1 else ("off",):
                if plan.fits(cfg, model, bench.shards, bench.memory, recompute, gather):
                    fitting.append(replace(cfg, recompute=recompute, gather=gather))
                    if recompute != "selective" and cfg.base_bits == 16:        # what --compile refuses
                        fitting.append(replace(fitting[-1], compile=True))

    def distance(cfg: Namespace) -> int:
        return sum(vars(cfg)[name] != value for name, value in vars(fitting[0]).items())
    return sorted(fitting, key=distance)


class Training:
    """A model and an optimizer as train.py makes them, with drawn weights, and its step on some micro-batches."""

    def __init__(self, bench: Bench, cfg: Namespace):
        self.bench, self.cfg = bench, cfg
        with patch.object(train, "read_weights", lambda model, source, cfg: draw_weights(model)):
            self.model = train.build(cfg, bench.config, None, bench.mesh, bench.device)
        self.optimizer = train.make_optimizer(self.model, cfg)

    def step(self, batches: list, supervised: int) -> None:
        """At the recipe's peak learning rate: with random words the loss means nothing, but it stays finite."""
        step = Step(0, [], batches)
        loss, norm, skipped = train.train_step(self.model, self.optimizer, step, self.cfg, supervised, 1.0,
                                               self.bench.device)
        if skipped:                             # the optimizer did nothing, so the step was too fast
            raise ValueError(f"the step was skipped: loss {loss}, gradient norm {norm}")

    def measure(self, samples: list[Sample], ranks: list[list[list[int]]]) -> dict:
        """The time of a step on these samples; ranks: of each process, the samples of each micro-batch."""
        bench = self.bench
        batches = [collate([samples[i] for i in micro], bench.config.vision.image_size) for micro in ranks[bench.rank]]
        if bench.device.type == "cuda":                     # as the loader hands them over
            batches = [type(batch)(*(x.pin_memory() for x in batch[:6])) for batch in batches]
        lengths = np.array([len(sample.ids) for sample in samples], dtype=float)
        supervised = sum(len(sample.labels) - sample.labels.count(IGNORE) for sample in samples)
        images = sum(sample.image is not None for sample in samples)
        work = partial(self.step, batches, supervised)
        start = time.perf_counter()
        work()
        first = time.perf_counter() - start
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()            # forget what the compiler needed
        seconds = seconds_of(work)
        flops = step_flops(bench.config, trained_parts(self.model), lengths.sum(), (lengths ** 2).sum(), images,
                                supervised) / seconds / bench.world
        peak_share = mfu(flops, bench.device)
        return {
            "tokens": int(lengths.sum()),
            "micro_batches": len(batches),
            "step_ms": 1e3 * seconds,
            "tokens_per_s": lengths.sum() / seconds,
            "mfu_%": "unknown" if peak_share is None else 100 * peak_share,
            "of_matmul_%": 100 * flops / bench.machine["matmul_tflops"] / 1e12,
            "first_step_s": first,
            "peak_gb": peak_memory(bench.device) / 1e9,
            "planned_gb": planned_bytes(self.cfg, self.model, bench.shards) / 1e9,
        }


def planned_bytes(cfg: Namespace, model: LLaVAPhi, shards: int) -> float:
    return sum(plan.memory_plan(cfg, model, shards, cfg.recompute, cfg.gather).values())


def measure_configuration(bench: Bench, cfg: Namespace) -> dict:
    """Two full micro-batches on each process: --gather changes nothing about a single one."""
    draws = draw_samples(bench.config, cfg.stage)
    micro_batches = [fill(draws, cfg.micro_tokens) for _ in range(2 * bench.world)]
    samples = [sample for micro in micro_batches for sample in micro]
    ends = np.cumsum([len(micro) for micro in micro_batches])
    positions = [list(range(end - len(micro), end)) for end, micro in zip(ends, micro_batches)]
    return Training(bench, cfg).measure(samples, [positions[rank::bench.world] for rank in range(bench.world)])


def measure_recipe(bench: Bench, cfg: Namespace) -> dict:
    """The published global batch, split as the loader does -> also how long the whole stage would take."""
    draws = draw_samples(bench.config, cfg.stage)
    samples = [next(draws) for _ in range(6 if bench.dry else cfg.global_batch)]
    lengths = [len(sample.ids) for sample in samples]
    images = [sample.image is not None for sample in samples]
    found = Training(bench, cfg).measure(samples, split_step(lengths, images, bench.world, cfg.micro_tokens))
    steps = PUBLISHED[cfg.stage][0] / len(samples)
    return found | {"hours": steps * found["step_ms"] / 3.6e6}


def columns_of(name: str, cfg: Namespace) -> dict:
    return {"run": name, "compile": cfg.compile, "recompute": cfg.recompute, "gather": cfg.gather,
            "micro_tokens": cfg.micro_tokens}


def part_a(bench: Bench) -> None:
    """Every run gets an equal share of the time, and of that the recipe's step and its profile get a quarter."""
    part_ends = bench.deadline
    for k, name in enumerate(bench.args.runs):
        now = time.perf_counter()
        share = (part_ends - now) / (len(bench.args.runs) - k)
        fitting = configurations(bench, RUNS[name])
        if not fitting:
            bench.add("a", {"run": name, "left out": "the plan puts every configuration above this card's memory"})
            continue
        rates = {}
        for i, cfg in enumerate(fitting[:3] if bench.dry else fitting):
            bench.deadline = now + 0.75 * share
            if row := bench.attempt("a", columns_of(name, cfg), partial(measure_configuration, bench, cfg)):
                rates[i] = row["tokens_per_s"]
        if rates:
            best = fitting[max(rates, key=rates.get)]
            bench.deadline = now + share
            bench.attempt("a", columns_of(f"{name}, the recipe's step", best), partial(measure_recipe, bench, best))
            if "b" in bench.args.parts:
                bench.attempt("b", {"run": name}, partial(profile_step, bench, best))


def profile_step(bench: Bench, cfg: Namespace) -> dict:
    """The slowest kernels of a step with one micro-batch, and the time in which the GPU had none to run."""
    batch = collate(fill(draw_samples(bench.config, cfg.stage), cfg.micro_tokens), bench.config.vision.image_size)
    step = partial(Training(bench, cfg).step, [batch], len(batch.targets))
    wall = seconds_of(step)
    on_gpu = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        step()
    # Everything runs in one stream, so kernels do not overlap and their times can be added up.
    shares = {}
    for event in profiled.key_averages():
        if on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA) and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            shares[event.key] = 100 * microseconds / 1e6 / wall
    slowest = sorted(shares, key=shares.get, reverse=True)[:12]
    return {
        "step_ms": 1e3 * wall,
        "idle_%": max(0.0, 100 - sum(shares.values())),
        "slowest kernels": "; ".join(f"{kernel[:70]} {shares[kernel]:.1f} %" for kernel in slowest),
    }

# ---------------------------------------------------------------------------------------------------
# c: decoding


def questions(bench: Bench, n: int) -> tuple[list[list[int]], list[Tensor]]:
    """n prompts of 35 tokens, a picture of its own, 40 tokens."""
    g = torch.Generator().manual_seed(1)
    S, V = bench.config.vision.image_size, bench.config.llm.vocab_size
    head = torch.randint(1, V - 1, (35,), generator=g).tolist() + [IMAGE_ID] * bench.config.vision.n_patches
    prompts = [head + torch.randint(1, V - 1, (40,), generator=g).tolist() for _ in range(n)]
    return prompts, [torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, generator=g) for _ in range(n)]


def decode(bench: Bench, model: LLaVAPhi, batch: int, captured: bool) -> dict:
    """128 tokens behind a prompt with a picture. A token's time is the median, so without the graph's capture."""
    prompts, pictures = questions(bench, batch)
    n = 12 if bench.dry else 128
    for _ in range(2):                                      # the first time is a warm-up
        ends = []
        start = time.perf_counter()
        for _ in Session(model, captured).generate(prompts, pictures, max_new_tokens=n, eos_id=-1):
            ends.append(time.perf_counter() - start)
    token = statistics.median(b - a for a, b in zip(ends, ends[1:]))
    # A step reads every weight but the embedding's other rows, and the keys and values so far.
    llm = bench.config.llm
    weights = sum(p.numel() for p in model.llm.parameters()) - model.llm.wte.weight.numel()
    cached = 2 * llm.n_layer * llm.n_embd * batch * (len(prompts[0]) + n // 2)
    read = bench.dtype.itemsize * (weights + cached)
    return {
        "first_token_ms": 1e3 * ends[0],
        "token_ms": 1e3 * token,
        "tokens_per_s": batch / token,
        "of_copy_bandwidth_%": 100 * read / token / bench.machine["copy_tb_s"] / 1e12,
    }


def part_c(bench: Bench) -> None:
    model = make_model(bench)
    for batch in (1, 16, 64):
        for captured in (True, False):
            row = {"batch": batch, "mode": "captured" if captured else "eager"}
            bench.attempt("c", row, partial(decode, bench, model, batch, captured))

# ---------------------------------------------------------------------------------------------------
# d: eval.py


def write_model(bench: Bench, folder: Path) -> None:
    """A model in the saved format whose every answer ends with its first token."""
    tokenizer = load_tokenizer(ROOT / "tests/golden/tiny-llava-phi")
    eos = tokenizer.token_to_id("<|endoftext|>")
    tensors = {}
    for name, (rows, *rest) in saved_shapes(meta_model(bench.config)).items():
        pieces = to_saved(name)                             # q, k and v are saved apart
        for piece in pieces:
            shape = (rows // len(pieces), *rest)
            tensors[piece] = torch.empty(shape, device=bench.device).normal_(std=0.02).to("cpu", torch.bfloat16)
    tensors[to_saved("llm.lm_head.bias")[0]][eos] = 1000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"model_type": "llava", "text_config": phi_json(bench.config.llm, eos, "bfloat16"),
                "vision_config": tower_json(bench.config.vision),
                "vision_feature_layer": bench.config.vision.feature_layer}
    (folder / "config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, tokenizer, image=True)


def write_questions(folder: Path, n: int, a_picture: int) -> Path:
    """n questions on n / a_picture photographs of 640 x 480."""
    lines = []
    for i in range(n):
        name = f"{i // a_picture}.jpg"
        if not (folder / name).exists():
            Image.effect_noise((640, 480), 80 + i % 50).convert("RGB").save(folder / name, quality=90)
        lines.append({"question_id": i, "image": name, "text": f"Is thing {i} in the image? Answer yes or no."})
    path = folder / f"{a_picture}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_eval(bench: Bench, folder: Path, file: Path, limit: int, batch: int) -> float:
    """Seconds of the whole process for the first `limit` questions of a file."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "eval.py", "--task", "jsonl", "--questions", file, "--images", folder,
                   "--model", folder, "--batch", batch, "--limit", limit, "--out", out]
        start = time.perf_counter()
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        return time.perf_counter() - start


def measure_eval(bench: Bench, folder: Path, file: Path, batch: int) -> dict:
    """Two runs, so that what a start and the loading take can be told from what the questions take."""
    few, many = (4, 8) if bench.dry else (64, 512 if batch > 1 else 192)
    short, long = (run_eval(bench, folder, file, limit, batch) for limit in (few, many))
    rate = (many - few) / (long - short)
    return {"questions": many, "seconds": long, "questions_per_s": rate, "start_s": short - few / rate}


def part_d(bench: Bench) -> None:
    """Answers of one token: this is about pictures, prompts and everything around the model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(bench, folder)
        for a_picture in (1, 16):
            file = write_questions(folder, 16 if bench.dry else 512, a_picture)
            for batch in (4,) if bench.dry else (1, 16, 64):
                row = {"questions_a_picture": a_picture, "batch": batch}
                bench.attempt("d", row, partial(measure_eval, bench, folder, file, batch))

# ---------------------------------------------------------------------------------------------------


def main(args: Namespace) -> int:
    """The parts, one after the other, each with a model of its own -> 1 if any row failed."""
    if args.dry:
        torch.set_num_threads(1)
        torch.compile = partial(torch.compile, backend="aot_eager")     # traced, but no C++ compiler to wait for
    elif not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; --dry walks through the parts on a CPU")
    train.print0 = lambda text: None            # what it says of each model is in the rows
    bench = Bench(args)
    bench.machine = describe_machine(bench)
    parts = {"a": part_a, "c": part_c, "d": part_d}
    total = sum(SHARES[part] for part in args.parts)
    spent = 0.0
    for part in (part for part in parts if part in args.parts):
        spent += SHARES[part] + (SHARES["b"] if part == "a" and "b" in args.parts else 0)
        bench.deadline = bench.began + 60 * args.minutes * spent / total
        parts[part](bench)
    dist.destroy_process_group()
    return int(any("failed" in row for rows in bench.rows.values() for row in rows))


if __name__ == "__main__":
    exit_code = run_command(main, ARGS)
    sys.stdout.flush()
    os._exit(exit_code)                     # as train.py ends: gloo's threads may still be letting go of tensors
