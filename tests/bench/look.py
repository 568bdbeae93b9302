"""Does the demo's model look at the shape that it is asked about? And which answers do choices get, ranked both ways?

Each question is about one shape of a held-out scene, which lies in a quarter of the picture, on 4 of its 16 patches: a
map that knows nothing has 25 % there. Only questions that the model answers correctly count for the maps.

$ python tests/bench/look.py --model out/demo/finetune
"""
import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from data import eot_id, load_tokenizer, tokenize
from demo.shapes import COLORS, NAMES, QUARTERS, SHAPE_KINDS, Shape, draw_scene, paint, question_of
from lib.chat import encode_chat, open_image, rank
from lib.generate import Session
from lib.look import shares
from load_weights import load_model
from model import LLaVAPhi

CHOICES = {"colour": [*COLORS], "shape": [*SHAPE_KINDS], "place": [*QUARTERS], "thing": NAMES}


def questions(n: int, config) -> Iterator[tuple[str, Shape, str, str, Tensor]]:
    """Kind, shape, question, answer and picture, for up to four questions about one shape of each of n scenes."""
    rng = random.Random("look")
    for _ in range(n):
        scene = draw_scene(rng, held_out=True)
        image = open_image(paint(scene, rng), config)
        shape = rng.choice(scene)
        for kind in CHOICES:
            if turn := question_of(kind, scene, shape, rng):
                yield kind, shape, *turn, image


def on_the_shape(maps: list, shape: Shape) -> float:
    """The share of the picture's mass in the shape's quarter, averaged over the tokens."""
    rows, columns = (slice(2 * half, 2 * half + 2) for half in (shape.row, shape.column))
    return fmean((grid[rows, columns].sum() / grid.sum()).item() for grid in map(torch.tensor, maps))


def measure(model: LLaVAPhi, tok, n: int, layers: range) -> tuple[dict[str, dict[str, float]], int, int]:
    """-> kind of map -> kind of question -> mean share; the numbers of questions, and of those answered correctly."""
    found: dict[str, dict[str, list[float]]] = {}
    asked = right = 0
    for kind, shape, question, answer, image in questions(n, model.config):
        asked += 1
        prompt = encode_chat(model.config, tok, [question], image)
        ids = tokenize(f" {answer}", tok).ids
        columns = Session(model).generate([prompt], [image], max_new_tokens=9, eos_id=eot_id(tok))
        if [column[0] for column in columns] != ids:
            continue
        right += 1
        for layer in layers:
            attention, gradient = shares(model, prompt, image, ids, layer)
            for name, maps in ((f"attention of layer {layer}", attention), ("gradient", gradient)):
                found.setdefault(name, {}).setdefault(kind, []).append(on_the_shape(maps, shape))
    means = {name: {kind: fmean(values) for kind, values in kinds.items()} |
             {"all": fmean(value for values in kinds.values() for value in values)} for name, kinds in found.items()}
    return means, asked, right


def compare_orders(model: LLaVAPhi, tok, n: int) -> None:
    right = {"sum": 0, "mean": 0}
    asked = 0
    for kind, _, question, answer, image in questions(n, model.config):
        ranked = rank(model, tok, question, image, CHOICES[kind])
        asked += 1
        for order in right:
            right[order] += max(ranked, key=lambda row: row[order])["choice"] == answer
    print(f"the best of the possible answers is right in {right['sum']} of {asked} questions by sum, "
          f"{right['mean']} by mean")


def time_choices(model: LLaVAPhi, tok) -> None:
    [(_, _, question, _, image)] = [*questions(1, model.config)][-1:]
    seconds = {}
    for n in (2, 10):
        rounds = []
        for _ in range(30):
            began = time.perf_counter()
            rank(model, tok, question, image, NAMES[:n])
            rounds.append(time.perf_counter() - began)
        seconds[n] = sorted(rounds)[15]
    print(f"two choices {1e3 * seconds[2]:.1f} ms, ten {1e3 * seconds[10]:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="out/demo/finetune")
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args()
    model, tok = load_model(Path(args.model)), load_tokenizer(Path(args.model))
    means, asked, right = measure(model, tok, args.scenes, range(model.config.llm.n_layer))
    print(f"{right} of {asked} questions answered correctly; share on the shape, chance 0.250:")
    for name, kinds in means.items():
        print(f"{name:24}", *(f"{kind} {share:.3f}" for kind, share in kinds.items()))
    compare_orders(model, tok, args.scenes)
    time_choices(model, tok)
