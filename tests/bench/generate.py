"""Generation speed side by side with transformers, in one process, on the same random weights. CPU.

$ python tests/bench/generate.py                 # needs transformers 5 beside requirements.txt; about ten minutes
$ python tests/bench/generate.py --only C1 --threads 1

C1: tiny (decoder 4 x 128, tower 4 x 64), 76-token prompt. C2: full width, 2 decoder and 3 tower layers, 636 tokens.
C3: 32 questions on 4 pictures, 8 a batch, the C2 model. First the logits must agree; then both sides take turns.
C4: the C2 model's decoder alone, 640 tokens read and 32 written; beside llama.cpp too where `pip install gguf
llama-cpp-python` was run.
"""
import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PhiConfig as TheirPhiConfig

from data import IMAGE_ID
from lib.common import choose_dtype
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


def take_turns(sides: dict[str, Callable[[], object]], repeats: int, warmups: int = 3) -> dict[str, list[float]]:
    """Seconds of every repetition; side after side, so that a busy moment of the machine hits all of them."""
    times = {name: [] for name in sides}
    for i in range(warmups + repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name] += [time.perf_counter() - start] if i >= warmups else []
    return times


def report(title: str, times: dict[str, list[float]], unit: float = 1e3, label: str = "ms") -> None:
    print(f"\n{title}, {label}: median, minimum, quartiles; speed-up over transformers' best (medians, minima)")
    peers = [t for name, t in times.items() if name.startswith("transformers")]
    usual, best = min(map(statistics.median, peers)), min(map(min, peers))
    for name, t in times.items():
        low, middle, high = statistics.quantiles(t, n=4)
        print(f"  {name:20}{middle * unit:10.2f}{min(t) * unit:10.2f}   {low * unit:.2f} .. {high * unit:.2f}   "
              f"x{usual / middle:.2f}  x{best / min(t):.2f}", flush=True)


def make_models(config: LLaVAConfig) -> dict[str, nn.Module]:
    """The same weights on both sides, in every type; in fp32 they must say the same."""
    ours = make_ours(config)
    theirs = make_theirs(ours)
    prompts, images = prompts_of(config, 1, 1)
    assert ask_ours(ours, prompts, images, 4) == ask_theirs(theirs, prompts, images, 4), "they differ in fp32"
    models = {"ours fp32": ours, "transformers fp32": theirs, "ours bf16": deepcopy(ours).bfloat16(),
              "transformers bf16": deepcopy(theirs).bfloat16(), "ours int8": deepcopy(ours)}
    quantize_linears(models["ours int8"], 8)
    if all(width % 32 == 0 for width in (config.llm.n_embd, config.llm.n_inner)):
        # The same arithmetic around the packed products as sample.py chooses on this machine.
        base = models[f"ours {choose_dtype(None, 'cpu')}"]
        models["ours 4 bits"] = deepcopy(base)
        quantize_linears(models["ours 4 bits"], 4)
    for name, model in models.items():
        if name.startswith("ours"):
            prepack_linears(model)                             # as load_model does
    return models


def asker(name: str) -> Callable[..., list[list[int]]]:
    return ask_theirs if name.startswith("transformers") else ask_ours


def one_prompt(title: str, config: LLaVAConfig, repeats: int) -> None:
    """Time to the first token, and time per further token (17 tokens less 1, by 16)."""
    models, (prompts, images) = make_models(config), prompts_of(config, 1, 1)
    first = take_turns({k: lambda k=k, m=m: asker(k)(m, prompts, images, 1) for k, m in models.items()}, repeats)
    report(f"{title}, first token", first)
    many = take_turns({k: lambda k=k, m=m: asker(k)(m, prompts, images, 17) for k, m in models.items()}, repeats)
    usual = {name: statistics.median(times) for name, times in first.items()}
    report(f"{title}, each further token", {name: [(t - usual[name]) / 16 for t in many[name]] for name in models})


def many_questions(repeats: int) -> None:
    models, (prompts, images) = make_models(WIDE), prompts_of(WIDE, 32, 4)

    def all_of(name: str) -> None:
        for i in range(0, 32, 8):
            asker(name)(models[name], prompts[i:i + 8], images[i:i + 8], 8)

    times = take_turns({name: lambda name=name: all_of(name) for name in models}, repeats, warmups=1)
    report("C3, a question of 32 on 4 pictures, 8 tokens each", times, 1e3 / 32)


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


def other_engines(threads: int, repeats: int) -> None:
    """Tokens a second, read and written, of every dtype here and elsewhere."""
    models = make_models(WIDE)
    ours = make_ours(WIDE)                                  # once more: prepacked weights cannot be written to a file
    prompt = torch.randint(1, WIDE.llm.vocab_size - 1, (640,), generator=torch.Generator().manual_seed(1)).tolist()
    sides = {}
    for name, model in models.items():
        timer = time_theirs if name.startswith("transformers") else time_ours
        sides[name] = partial(timer, model)
    try:
        from tests.bench.llama import LlamaCpp
    except ImportError as e:
        print(f"no rows of llama.cpp: {e}")
    else:
        for kind in ("F16", "BF16", "Q8_0", "Q4_0"):
            engine = LlamaCpp(ours.llm, kind, threads)
            sides[f"llama.cpp {kind}"] = partial(engine.time, False)
            sides[f"llama.cpp {kind} flash"] = partial(engine.time, True)

    reading = {name: [] for name in sides}
    writing = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            seconds = side(prompt, 32)
            if repeat > 0:                                  # the first round warms up
                reading[name].append(seconds[0])
                writing[name].append(seconds[1])
    print("\nC4, tokens a second: read, written (by medians); the same by minima")
    for name in sides:
        medians = (640 / statistics.median(reading[name]), 32 / statistics.median(writing[name]))
        minima = (640 / min(reading[name]), 32 / min(writing[name]))
        print(f"  {name:24}{medians[0]:10.0f}{medians[1]:10.1f}{minima[0]:12.0f}{minima[1]:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("C1", "C2", "C3", "C4"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, sdpa, "
          f"load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    if args.only in (None, "C1"):
        one_prompt("C1", TINY, 4 * args.repeats)
    if args.only in (None, "C2"):
        one_prompt("C2", WIDE, args.repeats)
    if args.only in (None, "C3"):
        many_questions(max(3, args.repeats // 3))
    if args.only in (None, "C4"):
        other_engines(args.threads, max(3, args.repeats // 3))
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
