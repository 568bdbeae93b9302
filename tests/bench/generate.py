"""Generation speed side by side with transformers and llama.cpp, on the same random weights, on a CPU.

$ python tests/bench/generate.py                 # needs transformers 5 beside requirements.txt; about ten minutes
$ python tests/bench/generate.py --only C1 --threads 1

C1: tiny (decoder 4 x 128, tower 4 x 64), 76-token prompt. C2: full width, 2 decoder and 3 tower layers, 636 tokens.
C3: 32 questions on 4 pictures, 8 a batch, the C2 model. C4: the C2 model's decoder alone, 640 tokens read and 32
written; beside llama.cpp too where `pip install llama-cpp-python` was run.

Each engine is a process of its own, since llama.cpp built for one processor may crash on another, and so that none
suffers from another's threads or allocator. They take turns, so a busy moment of the machine hits all of them; in fp32
their answers must agree.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PhiConfig as TheirPhiConfig

from data import IMAGE_ID
from lib.device import has_bf16
from lib.generate import Session
from lib.quant import prepack_linears, quantize_linears
from model import LLaVAConfig, LLaVAPhi, PhiConfig, init_weights
from vision import VisionConfig, normalize

TINY = LLaVAConfig(PhiConfig(vocab_size=512, n_layer=4, n_head=4, n_embd=128, n_inner=512, rotary_dim=12, dropout=0.0),
                   VisionConfig(image_size=56, n_layer=4, n_head=4, n_embd=64, n_inner=256))
WIDE = LLaVAConfig(PhiConfig(n_layer=2, dropout=0.0), VisionConfig(n_layer=4))       # of 4 tower layers 3 are used


def make_ours(config: LLaVAConfig) -> LLaVAPhi:
    model = LLaVAPhi(config).eval().requires_grad_(False)
    init_weights(model, torch.Generator().manual_seed(0))
    return model


def their_name(name: str) -> list[str]:
    """Our parameter -> the one or three of theirs that lie in it."""
    tower = name.startswith("vision.")
    for a, b in (
        ("llm.wte", "model.language_model.embed_tokens"), ("llm.ln_f", "model.language_model.final_layernorm"),
        ("llm.lm_head", "lm_head"), ("llm.h.", "model.language_model.layers."), (".ln.", ".input_layernorm."),
        (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.fc.", ".mlp.fc1."),
        (".mlp.proj.", ".mlp.fc2."), (".attn.qkv.", ".self_attn.qkv_proj."),
        (".attn.proj.", ".self_attn.out_proj." if tower else ".self_attn.dense."),
        ("projector.fc", "model.multi_modal_projector.linear_1"),
        ("projector.proj", "model.multi_modal_projector.linear_2"),
        ("vision.h.", "model.vision_tower.encoder.layers."), ("vision.ln_pre.", "model.vision_tower.pre_layrnorm."),
        ("vision.patch.", "model.vision_tower.embeddings.patch_embedding."),
        ("vision.cls", "model.vision_tower.embeddings.class_embedding"),
        ("vision.pos", "model.vision_tower.embeddings.position_embedding.weight"),
    ):
        name = name.replace(a, b)
    return [name.replace("qkv_proj", f"{x}_proj") for x in "qkv"] if "qkv_proj" in name else [name]


def make_theirs(ours: LLaVAPhi) -> LlavaForConditionalGeneration:
    llm, vision = ours.config.llm, ours.config.vision
    text = TheirPhiConfig(
        vocab_size=llm.vocab_size, hidden_size=llm.n_embd, intermediate_size=llm.n_inner, num_hidden_layers=llm.n_layer,
        num_attention_heads=llm.n_head, max_position_embeddings=llm.block_size, partial_rotary_factor=0.4,
        rope_theta=llm.rope_base, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tower = CLIPVisionConfig(
        hidden_size=vision.n_embd, intermediate_size=vision.n_inner, num_hidden_layers=vision.n_layer,
        num_attention_heads=vision.n_head, image_size=vision.image_size, patch_size=vision.patch_size)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=llm.vocab_size - 1,
                         vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False)
    theirs = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    state = theirs.state_dict()
    for name, p in ours.named_parameters():
        if name != "llm.lm_head.bias":                      # transformers has none; in fresh weights it is zero
            pieces = their_name(name)
            for piece, part in zip(pieces, p.chunk(len(pieces))):
                state[piece].copy_(part)
    return theirs


def prompts_of(config: LLaVAConfig, n: int, n_images: int) -> tuple[list[list[int]], list[Tensor]]:
    """n questions: 20 tokens, the picture, 40 tokens, on n_images pictures."""
    g = torch.Generator().manual_seed(1)
    S, V = config.vision.image_size, config.llm.vocab_size
    pictures = [torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, generator=g) for _ in range(n_images)]
    head = torch.randint(1, V - 1, (20,), generator=g).tolist() + [IMAGE_ID] * config.vision.n_patches
    questions = [head + torch.randint(1, V - 1, (40,), generator=g).tolist() for _ in range(n)]
    return questions, [pictures[i * n_images // n] for i in range(n)]


def ask_ours(model: LLaVAPhi, prompts: list[list[int]], images: list[Tensor], n: int) -> list[list[int]]:
    return [list(row) for row in zip(*Session(model).generate(prompts, images, max_new_tokens=n, eos_id=-1))]


def ask_theirs(model: nn.Module, prompts: list[list[int]], images: list[Tensor], n: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    ids[ids == IMAGE_ID] = model.config.image_token_id
    pixels = normalize(torch.cat(images)).to(model.dtype)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=n,
                         min_new_tokens=n, do_sample=False)
    return out[:, ids.size(1):].tolist()


def time_ours(model: LLaVAPhi, prompt: list[int], n_tokens: int) -> tuple[float, float]:
    """Seconds that the prompt takes, and those of n_tokens greedy tokens behind it."""
    size = model.config.vision.image_size
    no_image = torch.zeros(0, 3, size, size, dtype=torch.uint8)
    start = time.perf_counter()
    columns = Session(model).generate([prompt], [no_image], max_new_tokens=n_tokens + 1, eos_id=-1)
    next(columns)                                           # it comes out of the prompt's own forward pass
    first = time.perf_counter()
    for _ in columns:
        pass
    return first - start, time.perf_counter() - first


@torch.inference_mode()
def time_theirs(model: nn.Module, prompt: list[int], n_tokens: int) -> tuple[float, float]:
    """The same of transformers, in a loop of our own: its generate() would add what it does besides the model."""
    start = time.perf_counter()
    ids = torch.tensor([prompt])
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    first = time.perf_counter()
    for _ in range(n_tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return first - start, time.perf_counter() - first


# ---------------------------------------------------------------------------------------------------
# One engine, in a process of its own: it makes its model, then runs the case once for each line that it reads


def make_engine(name: str, config: LLaVAConfig) -> nn.Module:
    """One of ENGINES but llama.cpp's."""
    whose, kind = name.split(" ", 1)
    ours = make_ours(config)
    if whose == "transformers":
        return make_theirs(ours).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "bf16" or kind == "4 bits" and has_bf16("cpu"):
        ours = ours.bfloat16()                              # around 4 bits, what sample.py chooses on this machine
    if kind.endswith("bits"):
        quantize_linears(ours, int(kind[0]))
    prepack_linears(ours)                                   # as load_model does
    return ours


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_prompt(name: str, config: LLaVAConfig) -> tuple[list, Callable[[], list[float]]]:
    """The first ids, for comparison, and a function -> seconds of the first token, and of 17."""
    model, (prompts, images) = make_engine(name, config), prompts_of(config, 1, 1)
    ask = ask_theirs if name.startswith("transformers") else ask_ours

    def first_and_seventeen() -> list[float]:
        return [seconds_of(lambda n=n: ask(model, prompts, images, n)) for n in (1, 17)]

    return ask(model, prompts, images, 4), first_and_seventeen


def many_questions(name: str, config: LLaVAConfig) -> tuple[list, Callable[[], list[float]]]:
    """The first ids, and a function -> seconds of a question."""
    model, (prompts, images) = make_engine(name, config), prompts_of(config, 32, 4)
    ask = ask_theirs if name.startswith("transformers") else ask_ours

    def all_of_them() -> None:
        for i in range(0, 32, 8):
            ask(model, prompts[i:i + 8], images[i:i + 8], 8)

    return ask(model, prompts[:1], images[:1], 4), lambda: [seconds_of(all_of_them) / 32]


def decoder_alone(name: str, config: LLaVAConfig, flash: bool = False) -> tuple[list, Callable[[], list[float]]]:
    """Nothing to compare, and a function -> seconds of 640 tokens read, and of 32 written behind them."""
    prompt = torch.randint(1, config.llm.vocab_size - 1, (640,), generator=torch.Generator().manual_seed(1)).tolist()
    if name.startswith("llama.cpp"):
        from tests.bench.llama import LlamaCpp

        engine = LlamaCpp(make_ours(config).llm, name.split()[1], torch.get_num_threads())
        return [], lambda: [*map(min, zip(*(engine.time(flash, prompt, 32) for flash in (False, True))))]
    model = make_engine(name, config)
    timer = time_theirs if name.startswith("transformers") else time_ours
    return [], lambda: list(timer(model, prompt, 32))


CASES = {       # name -> its title, the model, what runs it, and the numbers that it prints
    "C1": ("tiny model, one picture and question", TINY, one_prompt, ("first token, ms", "further token, ms")),
    "C2": ("full width, one picture and question", WIDE, one_prompt, ("first token, ms", "further token, ms")),
    "C3": ("32 questions on 4 pictures, 8 tokens each", WIDE, many_questions, ("a question, ms",)),
    "C4": ("full width, decoder alone", WIDE, decoder_alone, ("read, tokens/s", "written, tokens/s")),
}
ENGINES = ("ours fp32", "ours bf16", "ours 8 bits", "ours 4 bits", "transformers fp32", "transformers bf16",
           "llama.cpp F16", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")


def be_an_engine(case: str, name: str) -> None:
    torch.set_grad_enabled(False)
    _, config, make, _ = CASES[case]
    ids, run = make(name, config)
    print(json.dumps(ids), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)

# ---------------------------------------------------------------------------------------------------
# All engines in turn


class Engine:
    """A process that runs one case. `problem` says how it ended, if it did."""

    def __init__(self, case: str, name: str, threads: int):
        command = [sys.executable, __file__, "--only", case, "--engine", name, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.name = name
        self.problem = ""
        self.times: list[list[float]] = []
        self.ids = self.answer()

    def answer(self) -> list | None:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        last = self.process.stderr.read().strip().splitlines()[-1:]
        self.problem = f"ended by signal {-code}" if code < 0 else " ".join(last)
        return None

    def run(self) -> None:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        times = self.answer()
        if times:
            self.times.append(times)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(case: str, threads: int, rounds: int) -> None:
    """One table: medians, and the best of all rounds."""
    title, _, _, columns = CASES[case]
    names = [name for name in ENGINES if (case == "C4" or not name.startswith("llama"))
             and not (case == "C1" and name == "ours 4 bits" and TINY.llm.n_embd % 32)]
    engines = [Engine(case, name, threads) for name in names]
    fp32 = [engine.ids for engine in engines if engine.name.endswith("fp32") and not engine.problem]
    assert all(ids == fp32[0] for ids in fp32), f"{case}: the answers differ in fp32"
    for number in range(rounds + 1):
        for engine in engines:
            if not engine.problem:
                engine.run()
            if number == 0:
                engine.times.clear()                        # the first round warms up
    print(f"\n{case}: {title}; median, best of {rounds} rounds\n  {'':20}" + "".join(f"{c:>26}" for c in columns))
    for engine in engines:
        cells = [f"{engine.problem:>26}"] if engine.problem else [
            f"{statistics.median(values):>16,.2f}{best:>10,.2f}" for values, best in shown(case, engine.times)]
        print(f"  {engine.name:20}" + "".join(cells), flush=True)
        engine.stop()


def shown(case: str, times: list[list[float]]) -> list[tuple[list[float], float]]:
    """Per column all rounds in its unit, and the best of them."""
    columns = [list(column) for column in zip(*times)]
    if case == "C4":
        rates = [[tokens / t for t in column] for tokens, column in zip((640, 32), columns)]
        return [(rate, max(rate)) for rate in rates]
    if case != "C3":                                        # 17 tokens less the first, by 16
        columns[1] = [(many - first) / 16 for first, many in zip(*columns)]
    in_ms = [[1e3 * t for t in column] for column in columns]
    return [(column, min(column)) for column in in_ms]


def processor() -> str:
    """The processor's name and the instructions that decide the speed of bf16 and 8 bits."""
    path = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    marks = [flag for flag in ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2")
             if flag in lines.get("flags", "").split()]
    return f"{lines.get('model name', platform.processor())} ({', '.join(marks)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine", choices=ENGINES, help="used by the program itself: be one engine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.engine:
        be_an_engine(args.only, args.engine)
        return
    try:
        from importlib.metadata import version
        llama = version("llama-cpp-python")
    except ImportError:
        llama = "not installed"
    print(f"{processor()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n"
          f"torch {torch.__version__}, transformers {transformers.__version__} (sdpa), llama-cpp-python {llama}")
    for case in [args.only] if args.only else CASES:
        compare(case, args.threads, 4 * args.rounds if case == "C1" else args.rounds)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
