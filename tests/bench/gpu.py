"""All that one wants to know about the speed on one GPU, in one command of nine minutes at most.

$ python tests/bench/gpu.py                          # everything; writes out/gpu/gpu.json and gpu.md
$ python tests/bench/gpu.py --parts a,c --minutes 4
$ python tests/bench/gpu.py --dry                    # the same on a CPU with a tiny model; the numbers mean nothing

Nothing is downloaded: the model has its published size and random weights that are drawn on the device, and samples
have the lengths of LLaVA's 665K mix. The parts, what matters most first:
  a  a training step of both stages: eager and compiled, what is recomputed, tokens in a micro-batch; then the recipe's
     own step (256 and 128 samples) with the best of them
  b  where the time of that step goes, by family of kernels
  c  decoding at batch 1, 16 and 64, eager and captured as a CUDA graph; time to the first token
  d  questions a second, with one and with 16 questions a picture, next to a loop over single questions
  e  transformers' LlavaForConditionalGeneration on the same shapes, if it is installed
  f  loading a saved model to the GPU
Both files are written after every row, so a run that is cut short keeps what it has. A configuration that runs out of
memory is a row that says so. A part that no longer fits into --minutes is left out, and a note says so.

MFU counts what the step's maths needs, without recomputation, against 989 TFLOP/s (datasheet of an H100 or H200, dense
bf16) and against 790 (what a large matrix product was seen to reach on an H200).
"""
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lib.common import Parser, run_command

# What share of the minutes a part may use up. Time that one part leaves over is there for the parts behind it.
SHARES = {"a": 0.48, "b": 0.06, "c": 0.14, "d": 0.12, "e": 0.14, "f": 0.06}
DATASHEET, MATMUL = 989e12, 790e12          # FLOP/s in bf16, see above
BANDWIDTH = 4.3e12                          # bytes/s that a large copy was seen to move on an H200, reads and writes


def parse(argv: list[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", default=",".join(SHARES), help="which parts, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting new things after this time")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU: does every part run?")
    args = parser.parse_args(argv)
    args.parts = [part.strip() for part in args.parts.split(",")]
    for part in args.parts:
        if part not in SHARES:
            raise ValueError(f"--parts {part}: expected some of {', '.join(SHARES)}")
    return args


if __name__ == "__main__":                  # a mistake in a flag is answered before torch is imported
    exit_code = run_command(lambda: parse() and None)
    if exit_code:
        sys.exit(exit_code)

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lib import plan
import train
from data import IGNORE, IMAGE_ID, Sample, Step, collate
from lib.folders import blueprint
from lib.generate import Session
from lib.layouts import to_saved
from lib.save_weights import clip_json, phi_json
from load_weights import load_model
from model import LLaVAConfig, LLaVAPhi, PhiConfig
from vision import VisionConfig

TINY = LLaVAConfig(
    llm=PhiConfig(vocab_size=512, block_size=512, n_layer=2, n_head=2, n_embd=160, n_inner=320),
    vision=VisionConfig(image_size=56, n_layer=3, n_head=2, n_embd=64, n_inner=128),
)

# ---------------------------------------------------------------------------------------------------
# The run: its clock, its device, its results


class Bench:
    """What all parts share. `rows` and `notes` are what ends up in the two files."""

    def __init__(self, args):
        self.args = args
        self.dry = args.dry
        self.device = torch.device("cpu" if args.dry else "cuda")
        self.dtype = torch.float32 if args.dry else torch.bfloat16
        self.config = TINY if args.dry else LLaVAConfig()
        self.began = time.perf_counter()
        self.deadline = self.began              # of the part that runs now
        self.machine = describe_machine(self)
        self.rows: dict[str, list[dict]] = {}
        self.notes: list[str] = []

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def has_time(self, seconds: float = 0) -> bool:
        """Whether something that takes so long may still begin in this part. A dry run leaves nothing out."""
        return self.dry or time.perf_counter() + seconds < self.deadline

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(self, part: str, row: dict) -> None:
        self.rows.setdefault(part, []).append(row)
        print(f"{self.spent():5.0f} s  {part}  " + "  ".join(f"{k} {show(v)}" for k, v in row.items()), flush=True)
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"{self.spent():5.0f} s  {text}", flush=True)
        self.write()

    def write(self) -> None:
        # Without forcing the files to the disk: a process that is killed loses nothing that it has written, and the
        # minutes are for the GPU.
        results = {"machine": self.machine, "parts": self.rows, "notes": self.notes}
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        (self.args.out / "gpu.md").write_text(markdown(results))


def describe_machine(bench: Bench) -> dict:
    """What a number needs beside it to mean something, and what this very GPU can do at most."""
    machine = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dry": bench.dry,
    }
    if bench.dry:
        return machine | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    machine["device"] = properties.name
    machine["memory_gb"] = properties.total_memory / 1e9
    machine["cuda"] = torch.version.cuda
    # Random numbers: on zeros a GPU draws less power and clocks higher, which no real work does.
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    machine["matmul_tflops"] = 2 * 8192 ** 3 / seconds_of(lambda: a @ a, bench) / 1e12
    source = torch.zeros(2 ** 30, device="cuda")
    target = torch.empty_like(source)
    machine["copy_tb_s"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), bench) / 1e12
    return machine


def seconds_of(work: Callable[[], object], bench: Bench, repeats: int = 10, warmups: int = 3) -> float:
    """Median time of a piece of work, with the queue of the device empty before and after each.

    The host's clock is enough: everything that is measured here takes milliseconds.
    """
    if bench.dry:
        repeats, warmups = 1, 0
    times = []
    for i in range(warmups + repeats):
        bench.sync()
        start = time.perf_counter()
        work()
        bench.sync()
        if i >= warmups:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(results: dict) -> str:
    """One table a part; its columns are the keys of its rows, in the order in which they first come."""
    machine = [f"{key} {show(value)}" for key, value in results["machine"].items()]
    text = ["# Speed on one GPU", "", ", ".join(machine), ""]
    for part, rows in results["parts"].items():
        # A dict keeps the order of its keys and drops those that are there already.
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text.append(f"## Part {part}\n")
        text.append("| " + " | ".join(columns) + " |")
        text.append("|" + "---|" * len(columns))
        for row in rows:
            cells = [show(row.get(key, "")) for key in columns]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    text.append("## Notes\n")
    for note in results["notes"]:
        text.append(f"- {note}")
    return "\n".join(text) + "\n"


def free(bench: Bench) -> None:
    """Give memory back: what an exception's traceback or a cycle still held, then the allocator's cache."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(bench: Bench, part: str, row: dict, work: Callable[[], dict]) -> dict | None:
    """Add `row` with what `work` measures -> the row. One that fails says why, and the campaign goes on."""
    try:
        done = row | work()
    except torch.OutOfMemoryError:
        done = row | {"failed": "out of memory"}
    except Exception as e:                      # whatever it is: the other configurations are worth their minutes
        reason = (str(e).strip().splitlines() or [""])[0]
        done = row | {"failed": f"{type(e).__name__}: {reason[:160]}"}
    bench.add(part, done)
    return None if "failed" in done else done

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
CAPTION = 21                                    # words of a stage-1 sample behind its picture


class Draw:
    """Samples of either stage, one after the other, the same for every configuration.

    The words and the one picture are random. No kernel's time depends on what they are, only on how many there are.
    """

    def __init__(self, bench: Bench, stage: str):
        self.config, self.stage = bench.config, stage
        self.random = np.random.default_rng(0)
        S = self.config.vision.image_size
        self.image = torch.randint(0, 256, (3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        counts = np.array([source[0] for source in MIX.values()])
        self.shares = counts / counts.sum()

    def sample(self, most: int) -> Sample:
        """The next sample, of at most so many tokens."""
        text, share, with_image = CAPTION, 1.0, True
        if self.stage == "finetune":
            source = list(MIX.values())[self.random.choice(len(MIX), p=self.shares)]
            _, mean, spread, with_image, share = source
            # Log-normal with the mean that the table gives.
            text = int(self.random.lognormal(np.log(mean) - spread ** 2 / 2, spread))
        patches = self.config.vision.n_patches if with_image else 0
        if patches > most - 2:                  # no room for a picture: the end of a micro-batch
            patches, with_image = 0, False
        # Longer ones are cut, as in training. One word to be seen and one to be predicted is the least.
        text = max(2, min(text, self.config.llm.block_size - patches, most - patches))
        # The last id is left out: it stands for a patch in the comparison with transformers.
        ids = [IMAGE_ID] * patches + self.random.integers(1, self.config.llm.vocab_size - 1, text).tolist()
        supervised = max(1, int(share * text))
        labels = [IGNORE] * (len(ids) - supervised) + ids[len(ids) - supervised:]
        return Sample("", ids, labels, self.image if with_image else None)

    def samples(self, tokens: int) -> list[Sample]:
        """As many as fill a micro-batch of so many tokens; the last is cut to fit."""
        drawn, room = [], tokens
        while room >= 2:
            drawn.append(self.sample(room))
            room -= len(drawn[-1].ids)
        return drawn


def draw_weights(model: nn.Module) -> None:
    """Weights as they start, drawn where they lie. Under FSDP on one process, the share of a tensor is all of it."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        with torch.no_grad():
            if parameter.dim() > 1:
                local.normal_(std=0.02)
            else:
                local.fill_(1.0 if ".ln" in name and name.endswith("weight") else 0.0)


def make_model(bench: Bench) -> LLaVAPhi:
    """For answering: all weights in bf16, nothing trained."""
    with torch.device("meta"):
        model = LLaVAPhi(bench.config).to(bench.dtype)
    model = model.to_empty(device=bench.device).eval().requires_grad_(False)
    draw_weights(model)
    return model

# ---------------------------------------------------------------------------------------------------
# a, b: training


class Trainer:
    """A stage's model and optimizer as train.py makes them, reused for one configuration after the other."""

    def __init__(self, bench: Bench, stage: str, mesh):
        self.bench, self.stage, self.mesh = bench, stage, mesh
        flags = ["--stage", stage, "--recompute", "none", "--no-compile", "--dtype", "fp32" if bench.dry else "bf16"]
        self.cfg = train.parse(flags)
        self.model = self.optimizer = None
        self.compiled = False

    def prepare(self, compiled: bool, recompute: str) -> None:
        """Bring the model into a configuration; make it first if there is none, or if the last attempt broke it."""
        if self.model is None:
            # The model is made by train.py's own code, except that its weights are drawn and not read.
            train.read_weights = lambda model, cfg, config: draw_weights(model)
            self.model = train.build(self.cfg, self.bench.config, self.mesh, self.bench.device)
            self.optimizer = train.make_optimizer(self.model, self.cfg)
            self.compiled = False
        if compiled and not self.compiled:
            train.compile_blocks(self.model, self.bench.device)
        if not compiled and self.compiled:
            for module in self.model.modules():
                module.__dict__.pop("forward", None)        # what compile_blocks put there
        self.compiled = compiled
        self.model.llm.recompute = recompute
        self.model.vision.recompute = recompute != "none"

    def drop(self) -> None:
        """Make room. Also after a failure: a backward pass that broke off leaves gradients behind, and maybe worse."""
        self.model = self.optimizer = None
        free(self.bench)

    def step(self, batches: list) -> Callable[[], object]:
        """A step of train.py on these micro-batches, ready to be called again and again.

        The learning rate is the recipe's peak. With random words and a fresh optimizer the loss means nothing, but it
        stays finite, and a step whose gradient is not finite would skip the optimizer and be too fast.
        """
        if self.bench.device.type == "cuda":                # as the loader hands them over
            batches = [type(batch)(*(x.pin_memory() for x in batch)) for batch in batches]
        step = Step(0, [], batches)
        supervised = sum(len(batch.targets) for batch in batches)
        return partial(train.train_step, self.model, self.optimizer, step, self.cfg, supervised, 1.0,
                       self.bench.device)


# FLOPs are train.py's count, the same that its own MFU is from.


def flops_of(bench: Bench, trainer: Trainer, samples: list[Sample]) -> float:
    lengths = np.array([len(s.ids) for s in samples], dtype=float)
    supervised = sum(len(s.labels) - s.labels.count(IGNORE) for s in samples)
    images = sum(s.image is not None for s in samples)
    parts = train.trained_parts(trainer.model)
    return plan.step_flops(bench.config, parts, lengths.sum(), (lengths ** 2).sum(), images, supervised)


def measure_step(bench: Bench, trainer: Trainer, samples: list[Sample], budget: int, repeats: int) -> dict:
    """Time of a step on these samples, in micro-batches of at most `budget` tokens, with everything that belongs to it.

    The first step is apart: it makes AdamW's moments, and compiles. Peak memory is that of the steps behind it.
    """
    step = trainer.step(micro_batches(bench, samples, budget))
    first = seconds_of(step, bench, repeats=1, warmups=0)
    free(bench)                                 # forget the first step's peak, with all that the compiler needed
    seconds = seconds_of(step, bench, repeats, warmups=1)
    rate = flops_of(bench, trainer, samples) / seconds
    tokens = sum(len(s.ids) for s in samples)
    result = {
        "samples": len(samples),
        "tokens": tokens,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,       # there is no padding, so all of them count
        "mfu_989_%": 100 * rate / DATASHEET,
        "mfu_790_%": 100 * rate / MATMUL,
        "first_step_s": first,
    }
    if bench.device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def micro_batches(bench: Bench, samples: list[Sample], budget: int) -> list:
    """Fill one micro-batch after the other.

    train.py's own planner evens them out as well, which for one process changes little.
    """
    filled = [[]]
    room = budget
    for sample in samples:
        if len(sample.ids) > room and filled[-1]:
            filled.append([])
            room = budget
        filled[-1].append(sample)
        room -= len(sample.ids)
    return [collate(chosen, bench.config.vision.image_size) for chosen in filled]


def planned_gb(trainer: Trainer, recompute: str, tokens: int) -> float:
    """What --plan says a micro-batch of so many tokens takes, without the part that is for the allocator."""
    always, per_token = plan.memory_plan(trainer.cfg, trainer.model, 1)
    return (sum(always.values()) - always["workspace"] + per_token[recompute] * tokens) / 1e9


def configurations(bench: Bench) -> Iterator[tuple[bool, str, int]]:
    """(compiled, recompute, tokens), the most likely winners first, so that a short run has them."""
    sizes = [16] if bench.dry else [16, 24, 8, 32]
    for compiled, recompute in ((True, "none"), (False, "none"), (False, "selective"), (True, "full"), (False, "full")):
        # --compile refuses selective recomputation: it does that by itself.
        for thousands in sizes:
            yield compiled, recompute, 16 * thousands if bench.dry else 1024 * thousands


def part_a(bench: Bench, trainers: dict[str, Trainer]) -> None:
    """The grid with one micro-batch a step, so with AdamW after each; then the recipe's step at its best point."""
    # A quarter of the time is kept for the recipe's own steps, which are the numbers that are quoted.
    grid_ends = bench.deadline - 0.25 * (bench.deadline - time.perf_counter())
    best: dict[str, dict] = {}
    left_out = 0
    # One stage after the other: two models do not fit beside each other with all that training adds to them.
    for stage, trainer in trainers.items():
        stage_ends = time.perf_counter() + (grid_ends - time.perf_counter()) / (2 if stage == "finetune" else 1)
        for compiled, recompute, tokens in configurations(bench):
            if time.perf_counter() > stage_ends and not bench.dry:
                left_out += 1
                continue
            row = {"stage": stage, "mode": "compile" if compiled else "eager", "recompute": recompute, "budget": tokens}
            done = attempt(bench, "a", row, partial(measure_grid_point, bench, trainer, row))
            if done is None:
                trainer.drop()
            elif done["mfu_989_%"] > best.get(stage, {"mfu_989_%": 0})["mfu_989_%"]:
                best[stage] = done
        if stage in best:
            row = {"stage": stage + ", the recipe's step"}
            attempt(bench, "a", row, partial(recipe_step, bench, trainer, best[stage]))
            if "b" in bench.args.parts:
                attempt(bench, "b", {"stage": stage}, partial(part_b, bench, trainer, best[stage]))
        trainer.drop()
    if left_out:
        bench.note(f"part a: {left_out} configurations of its grid were left out, the time was up")


def measure_grid_point(bench: Bench, trainer: Trainer, row: dict) -> dict:
    trainer.prepare(row["mode"] == "compile", row["recompute"])
    planned = planned_gb(trainer, row["recompute"], row["budget"])
    # The plan may be wrong by some per cent, and whether it is, is worth finding out; beyond that it saves the time.
    if planned > 1.15 * bench.machine.get("memory_gb", planned):
        return {"plan_gb": planned, "failed": "left out: the plan says that it does not fit"}
    samples = Draw(bench, trainer.stage).samples(row["budget"])
    return measure_step(bench, trainer, samples, row["budget"], repeats=3) | {"plan_gb": planned}


def recipe_step(bench: Bench, trainer: Trainer, best: dict) -> dict:
    """The published global batch in micro-batches of the best size -> also how long the whole stage would take."""
    trainer.prepare(best["mode"] == "compile", best["recompute"])
    draw = Draw(bench, trainer.stage)
    n = 6 if bench.dry else trainer.cfg.global_batch
    samples = [draw.sample(bench.config.llm.block_size) for _ in range(n)]
    measured = measure_step(bench, trainer, samples, best["budget"], repeats=2)
    published = plan.PUBLISHED[trainer.stage][0]
    hours = published / trainer.cfg.global_batch * measured["step_ms"] / 3.6e6
    how = {key: best[key] for key in ("mode", "recompute", "budget")}
    return how | measured | {"hours": hours}


# Names of kernels (and, on a CPU, of operators) -> family, the first that matches.
FAMILIES = {
    "optimizer": ("adam", "lerp"),
    "attention": ("flash", "fmha", "attention", "attn", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitk", "::mm", "::addmm", "convolution"),
    "communication": ("nccl",),
    "copies": ("memcpy", "memset", "copy", "catarray", "::cat"),
}


def family_of(kernel: str) -> str:
    lowered = kernel.lower()
    for family, marks in FAMILIES.items():
        if any(mark in lowered for mark in marks):
            return family
    return "elementwise and norms"


def part_b(bench: Bench, trainer: Trainer, best: dict) -> dict:
    """Milliseconds of a step with one micro-batch, by family of kernels; idle is when the device had nothing to do."""
    trainer.prepare(best["mode"] == "compile", best["recompute"])
    samples = Draw(bench, trainer.stage).samples(best["budget"])
    step = trainer.step([collate(samples, bench.config.vision.image_size)])
    step()
    cuda = bench.device.type == "cuda"
    bench.sync()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as prof:
        start = time.perf_counter()
        step()
        bench.sync()
        wall = 1e3 * (time.perf_counter() - start)
    # Everything runs in one stream, so kernels do not overlap and their times can be added up.
    times = dict.fromkeys([*FAMILIES, "elementwise and norms"], 0.0)
    slowest: dict[str, float] = {}
    for event in prof.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        # Ranges that the optimizer marks appear on the device's time line too; they are no kernels.
        if cuda != on_device or event.is_user_annotation:
            continue
        ms = (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / 1e3
        times[family_of(event.name)] += ms
        slowest[event.name] = slowest.get(event.name, 0.0) + ms
    top = sorted(slowest, key=slowest.get, reverse=True)[:8]
    bench.note(f"part b, {trainer.stage}, slowest kernels: " + "; ".join(f"{k[:70]} {slowest[k]:.1f} ms" for k in top))
    row = {"mode": best["mode"], "recompute": best["recompute"], "budget": best["budget"], "step_ms": wall}
    row |= {f"{family}_ms": ms for family, ms in times.items()}
    return row | {"idle_ms": wall - sum(times.values())}

# ---------------------------------------------------------------------------------------------------
# c, d: answering


def questions(bench: Bench, n: int, a_picture: int) -> tuple[list[list[int]], list[Tensor]]:
    """n prompts of 35 tokens, a picture, 40 tokens; every `a_picture` of them are about the same picture."""
    g = torch.Generator().manual_seed(1)
    S, V = bench.config.vision.image_size, bench.config.llm.vocab_size
    head = torch.randint(1, V - 1, (35,), generator=g).tolist() + [IMAGE_ID] * bench.config.vision.n_patches
    prompts, pictures = [], []
    for i in range(n):
        if i % a_picture == 0:
            picture = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, generator=g)
        prompts.append(head + torch.randint(1, V - 1, (40,), generator=g).tolist())
        pictures.append(picture)
    return prompts, pictures


def decode(bench: Bench, model: LLaVAPhi, batch: int, captured: bool) -> dict:
    """128 tokens behind a prompt with a picture. The time of a token is the median, so without the graph's capture."""
    prompts, pictures = questions(bench, batch, 1)
    n = 12 if bench.dry else 128
    ends = []
    for attempts in range(1 if bench.dry else 2):           # the first is a warm-up
        ends.clear()
        bench.sync()
        start = time.perf_counter()
        for _ in Session(model, captured).generate(prompts, pictures, max_new_tokens=n, eos_id=-1):
            ends.append(time.perf_counter() - start)
    token = statistics.median(b - a for a, b in zip(ends, ends[1:]))
    # What a step has to read: every weight but the embedding's other rows, and the keys and values so far.
    llm = bench.config.llm
    weights = sum(p.numel() for p in model.llm.parameters()) - model.llm.wte.weight.numel()
    mean_length = len(prompts[0]) + n // 2
    cached = 2 * llm.n_layer * llm.n_embd * batch * mean_length
    moved = bench.dtype.itemsize * (weights + cached)
    return {
        "first_token_ms": 1e3 * ends[0],
        "token_ms": 1e3 * token,
        "tokens_per_s": batch / token,
        "tokens_per_s_with_start": batch * n / ends[-1],
        "bandwidth_%": 100 * moved / token / BANDWIDTH,
    }


def part_c(bench: Bench, model: LLaVAPhi) -> None:
    # Captured first: it is what a user of --compile gets, and the eager numbers are only there to compare.
    for batch in (1, 16, 64):
        for captured in (True, False):
            if not bench.has_time(8):
                bench.note(f"part c: batch {batch} left out, the time was up")
                continue
            row = {"batch": batch, "mode": "captured" if captured else "eager"}
            attempt(bench, "c", row, partial(decode, bench, model, batch, captured))
            free(bench)


def answer_all(bench: Bench, model: LLaVAPhi, prompts: list, pictures: list, batch: int, cuda_graph: bool) -> None:
    """Eight tokens each, as the short answers of a benchmark are."""
    for i in range(0, len(prompts), batch):
        chosen = slice(i, i + batch)
        for _ in Session(model, cuda_graph).generate(prompts[chosen], pictures[chosen], max_new_tokens=8, eos_id=-1):
            pass


def rate(bench: Bench, model: LLaVAPhi, n: int, a_picture: int, batch: int, cuda_graph: bool) -> dict:
    """Questions that are all there from the start, answered `batch` at a time."""
    prompts, pictures = questions(bench, n, a_picture)
    answer_all(bench, model, prompts[:batch], pictures[:batch], batch, cuda_graph)       # warm-up
    seconds = seconds_of(lambda: answer_all(bench, model, prompts, pictures, batch, cuda_graph), bench, 1, 0)
    return {"questions": n, "questions_per_s": n / seconds}


def part_d(bench: Bench, model: LLaVAPhi) -> None:
    # What 16 questions have in common, everything up to the end of the picture, is computed once for all of them.
    n = 8 if bench.dry else 512
    batch = 4 if bench.dry else 64
    for name, count, a_picture, size, cuda_graph in (
            ("a loop over single questions", n // 8, 1, 1, False),
            ("a picture each, in batches", n // 2, 1, batch, False),
            ("16 a picture, in batches", n, 16, batch, False),
            ("a picture each, captured", n // 2, 1, batch, True)):
        if not bench.has_time(10):
            bench.note(f"part d: {name} left out, the time was up")
            continue
        row = {"what": name, "batch": size}
        attempt(bench, "d", row, partial(rate, bench, model, count, a_picture, size, cuda_graph))
        free(bench)

# ---------------------------------------------------------------------------------------------------
# e: transformers


def peer_config(config: LLaVAConfig):
    """The same shapes in transformers' words. It builds all 24 layers of the tower and runs them; we stop at 23."""
    from transformers import CLIPVisionConfig, LlavaConfig
    from transformers import PhiConfig as TheirPhiConfig
    llm, vision = config.llm, config.vision
    text = TheirPhiConfig(
        vocab_size=llm.vocab_size, hidden_size=llm.n_embd, intermediate_size=llm.n_inner, num_hidden_layers=llm.n_layer,
        num_attention_heads=llm.n_head, max_position_embeddings=llm.block_size, partial_rotary_factor=0.4,
        tie_word_embeddings=False, resid_pdrop=llm.dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tower = CLIPVisionConfig(
        hidden_size=vision.n_embd, intermediate_size=vision.n_inner, num_hidden_layers=vision.n_layer,
        num_attention_heads=vision.n_head, image_size=vision.image_size, patch_size=vision.patch_size)
    return LlavaConfig(vision_config=tower, text_config=text, image_token_index=llm.vocab_size - 1,
                       vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False)


def make_peer(bench: Bench):
    """All of it in bf16, the optimizer's state as well: less memory traffic than our fp32 masters, to its advantage."""
    from transformers import LlavaForConditionalGeneration
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            return LlavaForConditionalGeneration(peer_config(bench.config))
    finally:
        torch.set_default_dtype(torch.float32)


def padded(bench: Bench, samples: list[Sample]) -> dict[str, Tensor]:
    """Padded on the right to the longest. No attention mask: causality hides the padding, and sdpa stays fast."""
    longest = max(len(s.ids) for s in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        ids[row, :len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, :len(sample.ids)] = torch.tensor(sample.labels)
    ids[ids == IMAGE_ID] = bench.config.llm.vocab_size - 1
    images = [s.image for s in samples if s.image is not None]
    batch = {"input_ids": ids, "labels": labels}
    if images:                                  # their processor has normalised these before the clock starts
        batch["pixel_values"] = (torch.stack(images).float() / 127.5 - 1).to(bench.dtype)
    return {name: x.to(bench.device) for name, x in batch.items()}


def peer_train(bench: Bench, model: nn.Module, optimizer, samples: list[Sample], pieces: int, recompute: bool) -> dict:
    """A step on 16 samples: as one padded batch, or sorted by length and cut into pieces that need little padding."""
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    ordered = sorted(samples, key=lambda s: len(s.ids)) if pieces > 1 else samples
    size = -(-len(ordered) // pieces)
    batches = [padded(bench, ordered[i:i + size]) for i in range(0, len(ordered), size)]

    def step() -> None:
        for batch in batches:
            (model(**batch, use_cache=False).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    seconds = seconds_of(step, bench, repeats=3, warmups=2)
    tokens = sum(len(s.ids) for s in samples)
    with_padding = sum(batch["input_ids"].numel() for batch in batches)
    result = {"tokens": tokens, "padding_%": 100 * (1 - tokens / with_padding), "step_ms": 1e3 * seconds,
              "tokens_per_s": tokens / seconds}
    if bench.device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def peer_generate(bench: Bench, model: nn.Module, batch: int, n: int) -> dict:
    """Its time for n tokens minus that for one, so that what is left is decoding alone."""
    model.eval()
    prompts, pictures = questions(bench, batch, 1)
    ids = torch.tensor(prompts, device=bench.device)
    ids[ids == IMAGE_ID] = model.config.image_token_id
    pixels = (torch.cat(pictures).float() / 127.5 - 1).to(bench.device, bench.dtype)

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                           max_new_tokens=tokens, min_new_tokens=tokens)
    # Their generate() has no stream of columns to put a clock to.
    one = seconds_of(partial(generate, 1), bench, repeats=2, warmups=1)
    many = seconds_of(partial(generate, n), bench, repeats=1, warmups=0)
    token = (many - one) / (n - 1)
    return {"first_token_ms": 1e3 * one, "token_ms": 1e3 * token, "tokens_per_s": batch / token}


def part_e(bench: Bench, _) -> None:
    if importlib.util.find_spec("transformers") is None:
        bench.note("part e: transformers is not installed")
        return
    import transformers
    bench.note(f"part e: transformers {transformers.__version__}, sdpa, everything in bf16; flash-attn is not used")
    model = make_peer(bench)
    for batch in (1, 16):
        if bench.has_time(12):
            attempt(bench, "e", {"what": f"generate, batch {batch}"},
                    partial(peer_generate, bench, model, batch, 4 if bench.dry else 48))
    draw = Draw(bench, "finetune")
    samples = [draw.sample(bench.config.llm.block_size) for _ in range(4 if bench.dry else 16)]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5, (0.9, 0.98), eps=1e-7, fused=True)
    for name, pieces, recompute in (("LLaVA's recipe: 16 padded, recomputed", 1, True),
                                    ("sorted, in four pieces, nothing recomputed", 4, False)):
        if bench.has_time(8):
            free(bench)
            attempt(bench, "e", {"what": f"stage-2 step, {name}"},
                    partial(peer_train, bench, model, optimizer, samples, pieces, recompute))
            optimizer.zero_grad()
        else:
            bench.note(f"part e: {name} left out, the time was up")

# ---------------------------------------------------------------------------------------------------
# f: loading


def write_model(bench: Bench, folder: Path) -> int:
    """A model in the saved format, without its tokenizer -> its bytes."""
    tensors = {}
    for name, (rows, *rest) in blueprint(bench.config).items():
        pieces = to_saved(name)                 # q, k and v are saved apart
        for piece in pieces:
            # Zeros: what the numbers are changes nothing about how fast they are read.
            tensors[piece] = torch.zeros(rows // len(pieces), *rest, dtype=bench.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = phi_json(bench.config.llm, 0, "bfloat16")
    settings = {"model_type": "llava", "text_config": text, "vision_config": clip_json(bench.config.vision),
                "vision_feature_layer": bench.config.vision.feature_layer}
    (folder / "config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in tensors.values())


def part_f(bench: Bench, _) -> None:
    with tempfile.TemporaryDirectory(dir=bench.args.out) as folder:
        size = write_model(bench, Path(folder))

        def load() -> dict:
            start = time.perf_counter()
            model = load_model(Path(folder), bench.dtype, bench.device)
            bench.sync()
            seconds = time.perf_counter() - start
            assert next(model.parameters()).device.type == bench.device.type
            return {"file_gb": size / 1e9, "seconds": seconds, "gb_per_s": size / 1e9 / seconds}
        for attempts in ("first", "second"):
            attempt(bench, "f", {"what": f"load_model, {attempts} time, the file in the page cache"}, load)
            free(bench)

# ---------------------------------------------------------------------------------------------------
# What the numbers mean


def limits(bench: Bench) -> Iterator[str]:
    """For each part a sentence on what holds its best number back, from the numbers themselves."""
    matmul = bench.machine.get("matmul_tflops")
    if matmul:
        yield (f"this GPU reaches {matmul:.0f} TFLOP/s in a large matrix product and copies at "
               f"{bench.machine['copy_tb_s']:.2f} TB/s: those are the ceilings of training and of decoding")
    for row in bench.rows.get("b", []):
        if "failed" in row:
            continue
        families = {k.removesuffix("_ms"): v for k, v in row.items() if k.endswith("_ms") and k != "step_ms"}
        ordered = sorted(families, key=families.get, reverse=True)
        shares = ", ".join(f"{name} {100 * families[name] / row['step_ms']:.0f} %" for name in ordered)
        yield f"{row['stage']}: of a step of {row['step_ms']:.0f} ms: {shares}"
    recipe = [row for row in bench.rows.get("a", []) if "hours" in row]
    for row in recipe:
        yield (f"{row['stage']}: {row['mfu_989_%']:.1f} % of 989 TFLOP/s, {row['mfu_790_%']:.1f} % of 790; "
               f"{row['hours']:.2f} hours for the published data")
    if len(recipe) == 2:
        yield f"both stages: {sum(row['hours'] for row in recipe):.2f} hours on this GPU"
    for row in bench.rows.get("c", []):
        if "failed" not in row:
            limit = "memory bandwidth" if row["bandwidth_%"] > 50 else "kernel launches and small kernels"
            yield (f"decoding at batch {row['batch']}, {row['mode']}: {row['tokens_per_s']:,.0f} tokens/s, "
                   f"{row['bandwidth_%']:.0f} % of {BANDWIDTH / 1e12} TB/s: limited by {limit}")
    rates = {row["what"]: row["questions_per_s"] for row in bench.rows.get("d", []) if "failed" not in row}
    single = rates.pop("a loop over single questions", None)
    for what, questions_per_s in rates.items():
        if single:
            yield f"questions, {what}: {questions_per_s:.0f} a second, {questions_per_s / single:.1f} times the loop"
    steps = [row["tokens_per_s"] for row in bench.rows.get("e", []) if "padding_%" in row]
    ours = [row["tokens_per_s"] for row in recipe if row["stage"].startswith("finetune")]
    if steps and ours:
        yield f"a stage-2 step here is {ours[0] / max(steps):.2f} times transformers' best, in tokens a second"


def run_part(bench: Bench, part: str, work: Callable[[], None]) -> None:
    """One part within its share of the time; what goes wrong in it is noted and ends no other."""
    order = list(SHARES)
    later = sum(SHARES[name] for name in bench.args.parts if order.index(name) > order.index(part))
    total = later + SHARES[part]
    left = 60 * bench.args.minutes - bench.spent()
    if left < 20 and not bench.dry:             # the shortest part, loading, takes about as long
        bench.note(f"part {part} left out, the time was up")
        return
    bench.deadline = time.perf_counter() + left * SHARES[part] / total
    try:
        work()
    except Exception as e:
        bench.note(f"part {part} broke off: {type(e).__name__}: {str(e).strip()[:300]}")
    free(bench)


def main(argv: list[str] | None = None) -> None:
    """The parts, one after the other, each with a model of its own: two would not fit beside what training needs."""
    args = parse(argv)
    if not args.dry and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; --dry walks through the parts on a CPU")
    if args.dry:
        # What a dry run compiles only has to be traced. Turning it into machine code would take most of a minute.
        torch.compile = partial(torch.compile, backend="aot_eager")
        torch.set_num_threads(1)
    bench = Bench(args)
    bench.write()
    if "a" in args.parts or "b" in args.parts:
        mesh, _ = train.setup() if not args.dry else on_cpu(train.setup)
        trainers = {stage: Trainer(bench, stage, mesh) for stage in ("finetune", "pretrain")}
        run_part(bench, "a" if "a" in args.parts else "b", lambda: part_a(bench, trainers))
        dist.destroy_process_group()
    if "c" in args.parts or "d" in args.parts:
        model = make_model(bench)
        for part, work in (("c", part_c), ("d", part_d)):
            if part in args.parts:
                run_part(bench, part, partial(work, bench, model))
        del model
        free(bench)
    for part, work in (("e", part_e), ("f", part_f)):
        if part in args.parts:
            run_part(bench, part, partial(work, bench, None))
    for sentence in limits(bench):
        bench.note(sentence)
    print(f"wrote {args.out / 'gpu.json'} and {args.out / 'gpu.md'} after {bench.spent():.0f} s")


def on_cpu(work: Callable):
    """Run something that would choose a GPU if there were one, for --dry."""
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        return work()
    finally:
        torch.cuda.is_available = available


if __name__ == "__main__":
    exit_code = run_command(main)
    sys.stdout.flush()
    os._exit(exit_code)                     # as train.py ends: gloo's threads may still be letting go of tensors
