"""The demo's world: pictures of one to three coloured shapes, captions, and questions whose answers the scene decides.

A scene is a tuple of Shapes, at most one per quarter of a 56-pixel picture. Training and held-out pictures never show
the same scene: a quarter of all scenes, picked by a checksum, is kept out of all training.

$ python -m demo.shapes --out out/demo/data     # pretrain.json finetune.json heldout_captions.json images/ shapes/
"""
import argparse
import json
import random
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 56                                           # pixels per side
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (52, 90, 220), "yellow": (241, 196, 15)}
KINDS = ("circle", "square", "triangle")
NAMES = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three")


class Shape(NamedTuple):
    place: int                                      # which quarter: an index of PLACES
    colour: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


Scene = tuple[Shape, ...]                           # in reading order


def is_held_out(scene: Scene) -> bool:
    """One scene in four, by a checksum: what training lacks follows no rule that a model could learn instead."""
    return zlib.crc32(caption(scene).encode()) % 4 == 0


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """One to three shapes, each number as often; no two alike."""
    while True:
        places = sorted(rng.sample(range(4), rng.choice((1, 2, 3))))
        scene = tuple(Shape(place, rng.choice(list(COLOURS)), rng.choice(KINDS)) for place in places)
        if len({shape.name for shape in scene}) == len(scene) and is_held_out(scene) == held_out:
            return scene


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene on a dark ground; size, exact position and shade of each shape vary. Drawn larger: smooth edges."""
    scale, ground = 4, rng.randint(20, 60)
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (ground, ground, ground + 8))
    pen = ImageDraw.Draw(image)
    for shape in scene:
        r = rng.uniform(8, 11)                      # half the size, in pixels
        x, y = (28 * cell + rng.uniform(r + 1, 27 - r) for cell in (shape.place % 2, shape.place // 2))
        box = [scale * v for v in (x - r, y - r, x + r, y + r)]
        fill = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[shape.colour])
        if shape.kind == "circle":
            pen.ellipse(box, fill)
        elif shape.kind == "square":
            pen.rectangle(box, fill)
        else:
            pen.polygon([(scale * x, box[1]), (box[2], box[3]), (box[0], box[3])], fill)
    return image.reduce(scale)


def caption(scene: Scene) -> str:
    return ", ".join(f"a {shape.name} at the {PLACES[shape.place]}" for shape in scene)

# ---------------------------------------------------------------------------------------------------
# Questions. Each maker asks about one shape of the scene -> (question, answer, number of possible answers), or None if
# the scene leaves no such question open.


Made = tuple[str, str, int] | None


def colour_of(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    alone = [s.kind for s in scene].count(shape.kind) == 1
    return (f"What colour is the {shape.kind}?", shape.colour, len(COLOURS)) if alone else None


def kind_of(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    alone = [s.colour for s in scene].count(shape.colour) == 1
    return (f"What shape is {shape.colour}?", shape.kind, len(KINDS)) if alone else None


def place_of(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    return f"Where is the {shape.name}?", PLACES[shape.place], len(PLACES)


def thing_at(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    return f"What is at the {PLACES[shape.place]}?", shape.name, len(NAMES)


def how_many(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    return "How many shapes are there?", NUMBERS[len(scene) - 1], len(NUMBERS)


def is_there(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    """Yes as often as no; a no asks for something that shares its colour or its kind with the shape."""
    if rng.random() < 0.5:
        return f"Is there a {shape.name}?", "yes", 2
    near = [name for name in NAMES if (name.split()[0] == shape.colour) != (name.split()[1] == shape.kind)]
    return f"Is there a {rng.choice([name for name in near if name not in {s.name for s in scene}])}?", "no", 2


def is_beside(scene: Scene, shape: Shape, rng: random.Random) -> Made:
    """The shape and another one, in a direction in which they differ."""
    if len(scene) == 1:
        return None
    a, b = rng.sample([shape, rng.choice([s for s in scene if s != shape])], 2)
    (ax, ay), (bx, by) = ((s.place % 2, s.place // 2) for s in (a, b))
    sides = {"left of": ax - bx, "right of": bx - ax, "above": ay - by, "below": by - ay}
    side, before = rng.choice([item for item in sides.items() if item[1]])
    return f"Is the {a.name} {side} the {b.name}?", "yes" if before < 0 else "no", 2


QUESTIONS = {"colour": colour_of, "shape": kind_of, "place": place_of, "thing": thing_at, "count": how_many,
             "presence": is_there, "relation": is_beside}


def ask(scene: Scene, shape: Shape, rng: random.Random) -> tuple[str, str]:
    """A question about this shape of any kind but the count, and its answer."""
    while True:
        category = rng.choice([name for name in QUESTIONS if name != "count"])
        if made := QUESTIONS[category](scene, shape, rng):
            return made[:2]


def converse(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about one picture: how many shapes, and one about each that no earlier turn has given away.

    So answers do not follow from what was said before: whoever wants to know has to look. One conversation in eight
    asks for the caption instead.
    """
    if rng.random() < 1 / 8:
        return [("Describe the picture.", caption(scene))]
    turns, told = [], []
    for shape in rng.sample(scene, len(scene)):
        if shape not in told:
            turns.append(ask(scene, shape, rng))
            while any(old.name in turns[-1][0] for old in told):
                turns[-1] = ask(scene, shape, rng)
            told += [s for s in scene if s == shape or s.name in turns[-1][0]]
    turns.insert(rng.randrange(2), how_many(scene, scene[0], rng)[:2])      # early: of three that are told, all know
    return turns

# ---------------------------------------------------------------------------------------------------
# Files, in LLaVA's format


def record(name: str, turns: list[tuple[str, str]]) -> dict:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": name, "image": f"{name}.png", "conversations": said}


def write_data(out: Path, n_pretrain: int, n_finetune: int, n_heldout: int, seed: int) -> None:
    rng = random.Random(seed)
    for folder in ("images", "shapes/images"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    def picture(scene: Scene, name: str, folder: str = "images") -> str:
        paint(scene, rng).save(out / folder / f"{name}.png", compress_level=1)
        return name

    def captions(n: int, held_out: bool, stem: str) -> list[dict]:
        scenes = [draw_scene(rng, held_out) for _ in range(n)]
        return [record(picture(scene, f"{stem}{i:05d}"), [("Describe the picture.", caption(scene))])
                for i, scene in enumerate(scenes)]

    (out / "pretrain.json").write_text(json.dumps(captions(n_pretrain, False, "caption")))
    (out / "heldout_captions.json").write_text(json.dumps(captions(2 * n_heldout, True, "heldout")))
    scenes = [draw_scene(rng, False) for _ in range(n_finetune)]
    chats = [record(picture(scene, f"chat{i:05d}"), converse(scene, rng)) for i, scene in enumerate(scenes)]
    (out / "finetune.json").write_text(json.dumps(chats))
    with open(out / "shapes" / "questions.jsonl", "w") as f:
        for i in range(n_heldout):                  # a question of every kind that the scene has an answer to
            scene = draw_scene(rng, True)
            name = picture(scene, f"{i:05d}", "shapes/images")
            for category, maker in QUESTIONS.items():
                made = [maker(scene, shape, rng) for shape in rng.sample(scene, len(scene))]
                for question, answer, n in [m for m in made if m][:1]:
                    row = {"question_id": f"{name}-{category}", "image": f"{name}.png", "text": question,
                           "answer": answer, "category": category, "chance": 1 / n}
                    f.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo/data"), help="default: %(default)s")
    parser.add_argument("--pretrain", type=int, default=3000, help="captioned pictures (default: %(default)s)")
    parser.add_argument("--finetune", type=int, default=16000, help="conversations (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=100, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    write_data(args.out, args.pretrain, args.finetune, args.heldout, args.seed)
    print(f"{args.out}: {args.pretrain} captions, {args.finetune} conversations, {args.heldout} held-out pictures")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
