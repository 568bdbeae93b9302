"""
Questions per second of eval.py against a batch-1 loop of transformers, on the same random weights; and of scoring.

$ python tests/bench/eval.py                 # needs transformers 5 as well; about twenty minutes on a CPU
$ python tests/bench/eval.py --only tiny --threads 1

tiny: the model of generate.py, where overhead is most of the time. small: tower 4 x 256 at 336 pixels, decoder 4 x 320,
so that a prompt is mostly picture, as in the real one, and arithmetic is most of the time. wide: the real widths, with
2 decoder and 3 tower layers. Every answer is 3 tokens, about what the benchmarks' are. Both sides decode the pictures,
tokenize and detokenize; transformers is asked question by question, as the benchmarks' own scripts do. First the
answers must agree in fp32; then all ways take turns.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

import torch
from generate import TINY, WIDE, make_ours, make_theirs
from PIL import Image
from tqdm import tqdm

import eval as ev
from benchmarks import textvqa
from benchmarks.files import read_answers
from benchmarks.scoring import SHORT, Example, accuracy
from data import IMAGE_ID, ImageConfig, load_image, load_tokenizer
from lib.asking import Model
from lib.generate import Session
from lib.quant import prepack_linears, quantize_linears
from model import LLaVAConfig, LLaVAPhi, PhiConfig
from vision import VisionConfig, normalize

SMALL = LLaVAConfig(PhiConfig(vocab_size=512, n_layer=4, n_head=4, n_embd=320, n_inner=1280, dropout=0.0),
                    VisionConfig(n_layer=4, n_head=4, n_embd=256, n_inner=1024))
MODELS = {"tiny": TINY, "small": SMALL, "wide": WIDE}
TOKENS = 3
TOKENIZER = ROOT / "tests/golden/tiny-llava-phi"


def questions_on(folder: Path, n: int, per_image: int) -> list[Example]:
    """n questions in POPE's words on n / per_image photographs of 640 x 480."""
    examples = []
    for i in range(n):
        path = folder / f"{i // per_image}.jpg"
        if not path.exists():
            Image.effect_noise((640, 480), 80 + i).convert("RGB").save(path, quality=90)
        examples.append(Example(i, path, f"Is there a {'red ' * (i % 5)}thing {i} in the image?\n{SHORT}", "yes"))
    return examples


class Endless(Session):
    """No token ends an answer: both sides write TOKENS of them."""

    def generate(self, prompts: list, images: list, *, eos_id: int, **sampling):
        return super().generate(prompts, images, eos_id=-1, **sampling)


def to_ask(model: LLaVAPhi) -> Model:
    """As eval.py asks it, around a model in memory."""
    asked = Model(TOKENIZER, lambda *arithmetic: model, "fp32", "cpu", bits=16)
    asked.config = model.config
    asked.session = Endless(model)
    return asked


def ask_ours(asked: Model, examples: list[Example], batch: int) -> list[str]:
    """eval.py's own loop, with its file of answers."""
    prompts = asked.encode(examples, range(len(examples)))
    batches = ev.plan_batches(examples, prompts, 0, 1, batch)
    asked.session = Endless(asked.session.model)            # nothing is known from the last round
    answers = asked.answers(examples, prompts, batches, {"image_mode": "pad", "max_new_tokens": TOKENS}, exact=False)
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "answers.jsonl"
        ev.write_answers(path, answers, tqdm(disable=True))
        return [answer["text"] for answer in read_answers(path, examples, ev.TASKS["pope"])]


def ask_theirs(theirs, asked: Model, examples: list[Example]) -> list[str]:
    """One question after the other, the pixels the same."""
    texts = []
    for example in examples:
        image = load_image(example.image, ImageConfig.of(asked.config.vision, "pad"))
        pixels = normalize(image[None]).to(theirs.dtype)
        ids = torch.tensor(list(asked.encode([example], [0]).values()))
        ids[ids == IMAGE_ID] = theirs.config.image_token_index
        out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                              max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0)
        texts.append(asked.tok.decode(out[0, ids.size(1):].tolist(), skip_special_tokens=True).strip())
    return texts


def rates(ways: dict, n: int, repeats: int) -> dict[str, float]:
    """Questions per second of each way, the median of rounds in which all take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, ask in ways.items():
            start = time.perf_counter()
            ask()
            seconds[name].append(time.perf_counter() - start)
    return {name: n / statistics.median(times) for name, times in seconds.items()}


def bench_generation(name: str, questions: int, repeats: int) -> None:
    ours = make_ours(MODELS[name])
    theirs = {"fp32": make_theirs(ours)}
    theirs["bf16"] = deepcopy(theirs["fp32"]).bfloat16()
    models = {"fp32": ours, "bf16": deepcopy(ours).bfloat16(), "8 bits": deepcopy(ours)}
    quantize_linears(models["8 bits"], 8)
    tok = load_tokenizer(TOKENIZER)
    asked = {}
    for kind, model in models.items():
        prepack_linears(model)                             # as load_model does
        asked[kind] = to_ask(model)
    assert tok.get_vocab_size() < ours.config.llm.vocab_size, f"{tok.get_vocab_size()} ids do not fit the model"
    for per_image in (1, 16):
        with tempfile.TemporaryDirectory() as folder:
            examples = questions_on(Path(folder), questions, per_image)
            first = examples[:per_image]
            ours_say = ask_ours(asked["fp32"], first, 16)
            theirs_say = ask_theirs(theirs["fp32"], asked["fp32"], first)
            same = sum(a == b for a, b in zip(ours_say, theirs_say))
            assert same == len(first), f"{len(first) - same} of {len(first)} answers differ"
            ways = {f"transformers {kind}, one by one": partial(ask_theirs, model, asked["fp32"], examples)
                    for kind, model in theirs.items()}
            ways["eval.py --batch 1"] = partial(ask_ours, asked["fp32"], examples, 1)
            ways["eval.py"] = partial(ask_ours, asked["fp32"], examples, 16)
            ways["eval.py --dtype bf16"] = partial(ask_ours, asked["bf16"], examples, 16)
            ways["eval.py --bits 8"] = partial(ask_ours, asked["8 bits"], examples, 16)
            found = rates(ways, questions, repeats)
            loop = found["transformers fp32, one by one"]
            for way, each in found.items():
                print(f"{name:5}  {per_image:2} questions an image  {way:30}  {each:7.2f} questions/s "
                      f"{each / loop:6.2f} times", flush=True)


def bench_scoring(n: int = 100_000) -> None:
    humans = [[f"the answer {(i + j % 3) % 30_000}" for j in range(10)] for i in range(n)]
    examples = [Example(i, None, "", answers) for i, answers in enumerate(humans)]
    start = time.perf_counter()
    grades = [textvqa.grade_answer(example, f"Answer {example.question_id % 30_000}.") for example in examples]
    score = accuracy(list(zip(examples, grades)))
    seconds = time.perf_counter() - start
    print(f"scoring {n:,} TextVQA answers: {seconds:.1f} s ({score.value:.1f} {score.interval_method})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("$")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", choices=[*MODELS], help="one of the models")
    parser.add_argument("--questions", type=int, default=64, help="a multiple of 16; wide gets 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, fp32, {args.questions} questions")
    bench_scoring()
    with torch.inference_mode():
        for name in [args.only] if args.only else MODELS:
            bench_generation(name, 16 if name == "wide" else args.questions, args.repeats)


if __name__ == "__main__":
    main()
