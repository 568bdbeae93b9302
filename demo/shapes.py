"""The demo's world: pictures of one to three colored shapes, captions, and questions whose answers the scene decides.

Since every scene is known exactly, so is every answer, and what the trained model says about unseen pictures can be
scored without a human. Training and held-out pictures never show the same scene: a quarter of all scenes, chosen by a
checksum, is kept out of all training.

$ python -m demo.shapes --out out/demo/data     # pretrain.json finetune.json heldout_captions.json images/ shapes/
"""
import json
import random
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib.common import Parser, parse_or_exit, run_command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="-m demo.shapes", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo/data"), help="output folder")
    add("--pretrain", type=int, default=3000, help="captioned pictures")
    add("--finetune", type=int, default=12000, help="conversations")
    add("--heldout", type=int, default=100, help="held-out pictures")
    add("--seed", type=int, default=0, help="random seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)

from PIL import Image, ImageDraw

SIZE = 56                                           # pixels per side: 4 x 4 patches of 14, so a quarter is 2 x 2
COLORS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (52, 90, 220),
    "yellow": (241, 196, 15),
}
SHAPE_KINDS = ("circle", "square", "triangle")
NAMES = [f"{color} {kind}" for color in COLORS for kind in SHAPE_KINDS]
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three")
MOST_TURNS = 8                                      # questions in a conversation of stage 2


class Shape(NamedTuple):
    quarter: int                                    # of the picture: an index of QUARTERS
    color: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def column(self) -> int:
        return self.quarter % 2                     # 0 left, 1 right

    @property
    def row(self) -> int:
        return self.quarter // 2                    # 0 top, 1 bottom


Scene = tuple[Shape, ...]                           # at most one shape per quarter, in reading order


def is_held_out(scene: Scene) -> bool:
    """One scene in four, chosen by a checksum, so that no learnable rule tells held-out scenes apart."""
    return zlib.crc32(caption(scene).encode()) % 4 == 0


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """One to three shapes, each count equally likely; no two alike, so that a name always means one shape."""
    while True:
        n = rng.choice((1, 2, 3))
        quarters = sorted(rng.sample(range(4), n))
        scene = tuple(Shape(quarter, rng.choice(list(COLORS)), rng.choice(SHAPE_KINDS)) for quarter in quarters)
        all_differ = len({shape.name for shape in scene}) == n
        if all_differ and is_held_out(scene) == held_out:
            return scene


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene on a dark ground. Size, exact position and shade of each shape vary, so pixels cannot be memorized."""
    scale = 4                                       # supersampled, for smooth edges
    ground = rng.randint(20, 60)
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (ground, ground, ground + 8))
    pen = ImageDraw.Draw(image)
    for shape in scene:
        r = rng.uniform(8, 11)                      # half the size, in pixels
        x = 28 * shape.column + rng.uniform(r + 1, 27 - r)
        y = 28 * shape.row + rng.uniform(r + 1, 27 - r)
        left, top, right, bottom = scale * (x - r), scale * (y - r), scale * (x + r), scale * (y + r)
        fill = tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in COLORS[shape.color])
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill)
        elif shape.kind == "square":
            pen.rectangle((left, top, right, bottom), fill)
        else:
            pen.polygon([(scale * x, top), (right, bottom), (left, bottom)], fill)
    return image.reduce(scale)


def caption(scene: Scene) -> str:
    return ", ".join(f"a {shape.name} at the {QUARTERS[shape.quarter]}" for shape in scene)

# ---------------------------------------------------------------------------------------------------
# Questions. Each is about one shape of the scene. The demo's committed bases and published accuracies belong to these
# very texts, British spelling included.


Exchange = tuple[str, str]                          # question, answer
QUESTION_KINDS = {                                  # kind -> how many answers are possible: chance is 1 / that
    "colour": len(COLORS),
    "shape": len(SHAPE_KINDS),
    "place": len(QUARTERS),
    "thing": len(NAMES),
    "count": len(NUMBERS),
    "presence": 2,
    "relation": 2,
}


def question_of(kind: str, scene: Scene, shape: Shape, rng: random.Random) -> Exchange | None:
    """A question of this kind, or None if it has no single answer here.

    "What colour is the circle?" presumes that there is one circle.
    """
    match kind:
        case "colour" if [s.kind for s in scene].count(shape.kind) == 1:
            return f"What colour is the {shape.kind}?", shape.color
        case "shape" if [s.color for s in scene].count(shape.color) == 1:
            return f"What shape is {shape.color}?", shape.kind
        case "place":
            return f"Where is the {shape.name}?", QUARTERS[shape.quarter]
        case "thing":
            return f"What is at the {QUARTERS[shape.quarter]}?", shape.name
        case "count":
            return "How many shapes are there?", NUMBERS[len(scene) - 1]
        case "presence":
            return is_there(scene, shape, rng)
        case "relation" if len(scene) > 1:
            return is_beside(scene, shape, rng)
    return None


def is_there(scene: Scene, shape: Shape, rng: random.Random) -> Exchange:
    """Yes and no are equally likely. A no asks for something that shares its color or its kind with the shape.

    Something unlike everything in the picture would be too easy: seeing color or kind alone would do.
    """
    if rng.random() < 0.5:
        return f"Is there a {shape.name}?", "yes"
    present = {s.name for s in scene}
    similar = [name for name in NAMES if name not in present and (shape.color in name) != (shape.kind in name)]
    return f"Is there a {rng.choice(similar)}?", "no"


def is_beside(scene: Scene, shape: Shape, rng: random.Random) -> Exchange:
    """The shape and another one, in a direction in which they differ."""
    other = rng.choice([s for s in scene if s != shape])
    a, b = rng.sample([shape, other], 2)
    distances = {                                   # negative where the sentence "a is ... b" is true
        "left of": a.column - b.column,
        "right of": b.column - a.column,
        "above": a.row - b.row,
        "below": b.row - a.row,
    }
    relation, distance = rng.choice([item for item in distances.items() if item[1] != 0])
    return f"Is the {a.name} {relation} the {b.name}?", "yes" if distance < 0 else "no"


def any_question(scene: Scene, shape: Shape, rng: random.Random) -> Exchange:
    """A question of any kind but the count."""
    turn = None
    while turn is None:
        turn = question_of(rng.choice([kind for kind in QUESTION_KINDS if kind != "count"]), scene, shape, rng)
    return turn


def described(scene: Scene, rng: random.Random) -> list[Exchange]:
    return [("Describe the picture.", caption(scene))]


def converse(scene: Scene, rng: random.Random) -> list[Exchange]:
    """Questions and answers about one picture: how many shapes, and one about each that no earlier turn has given away.

    So no answer follows from earlier turns without looking at the picture. One conversation in eight asks for the
    caption instead.
    """
    if rng.random() < 1 / 8:
        return described(scene, rng)
    turns = []
    told = []                                       # shapes whose color and kind an earlier turn says
    for shape in rng.sample(scene, len(scene)):
        if shape in told:
            continue
        question, answer = any_question(scene, shape, rng)
        while any(old.name in question for old in told):
            question, answer = any_question(scene, shape, rng)
        turns.append((question, answer))
        told += [s for s in scene if s == shape or s.name in question]
    # The count comes first or second: once all shapes have been discussed, it follows without looking.
    turns.insert(rng.randrange(2), question_of("count", scene, scene[0], rng))
    return turns


def chat(scene: Scene, rng: random.Random) -> list[Exchange]:
    """A conversation that goes on, with other questions of any kind at any place, up to eight in all.

    People also ask about what an earlier answer has told them. Without such turns the model breaks off after the
    fourth question, the longest conversation of the language model's own training.
    """
    turns = converse(scene, rng)
    n = rng.randint(len(turns), MOST_TURNS)
    while len(turns) < n:
        turn = question_of(rng.choice(list(QUESTION_KINDS)), scene, rng.choice(scene), rng)
        if turn and turn[0] not in dict(turns):
            turns.insert(rng.randint(0, len(turns)), turn)
    return turns

# ---------------------------------------------------------------------------------------------------
# Files, in LLaVA's format. The training data is drawn from one generator, so the order of the calls below belongs to
# the format too: the same seed has to give the same files. The benchmark has its own, so that it stays the same when
# the training data changes.


def to_conversation(turns: list[Exchange]) -> list[dict]:
    said = []
    for question, answer in turns:
        said.append({"from": "human", "value": question})
        said.append({"from": "gpt", "value": answer})
    return said


def paint_to(path: Path, scene: Scene, rng: random.Random) -> None:
    paint(scene, rng).save(path, compress_level=1)  # a third larger than at the best compression, but much faster


def write_records(path: Path, stem: str, n: int, held_out: bool, turns_of: Callable, rng: random.Random) -> None:
    """Paint n pictures into images/ next to the file, which gets a record about each: turns_of(scene, rng)."""
    scenes = [draw_scene(rng, held_out) for _ in range(n)]
    records = []
    for i, scene in enumerate(scenes):
        image = f"{stem}{i:05d}.png"
        paint_to(path.parent / "images" / image, scene, rng)
        said = to_conversation(turns_of(scene, rng))
        said[0]["value"] = "<image>\n" + said[0]["value"]
        records.append({"id": f"{stem}{i:05d}", "image": image, "conversations": said})
    path.write_text(json.dumps(records))


def write_questions(path: Path, n: int, rng: random.Random) -> None:
    """Paint n held-out pictures into images/ next to the file; write a question of every kind that has an answer there.
    """
    rows = []
    for i in range(n):
        scene = draw_scene(rng, held_out=True)
        name = f"{i:05d}"
        paint_to(path.parent / "images" / f"{name}.png", scene, rng)
        for kind, n_answers in QUESTION_KINDS.items():
            turns = [question_of(kind, scene, shape, rng) for shape in rng.sample(scene, len(scene))]
            if any(turns):
                question, answer = next(filter(None, turns))
                row = {"question_id": f"{name}-{kind}", "image": f"{name}.png", "text": question, "answer": answer,
                       "category": kind, "chance": 1 / n_answers}
                rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def write_data(out: Path, n_pretrain: int, n_finetune: int, n_heldout: int, seed: int) -> None:
    """Write the data of both stages and the benchmark "shapes". They depend on the sizes and the seed alone."""
    for folder in (out, out / "shapes"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    write_records(out / "pretrain.json", "caption", n_pretrain, False, described, rng)
    write_records(out / "heldout_captions.json", "heldout", 2 * n_heldout, True, described, rng)
    write_records(out / "finetune.json", "chat", n_finetune, False, chat, rng)
    write_questions(out / "shapes" / "questions.jsonl", n_heldout, random.Random(f"shapes {seed}"))


def main(args: Namespace) -> None:
    write_data(args.out, args.pretrain, args.finetune, args.heldout, args.seed)
    print(f"{args.out}: {args.pretrain} captions, {args.finetune} conversations, {args.heldout} held-out pictures")


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
