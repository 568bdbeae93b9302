"""Data as strangers have it: good records over the goldens' pictures, and every kind of bad record and picture."""
import io
import json
import random
from pathlib import Path

import numpy as np
from helpers import GOLDEN, ROOT, pattern, talk
from PIL import Image
from tokenizers import Tokenizer

from data import IMAGE, Dataset, ImageConfig
from vision import CLIP_L_336

TINY_IMAGES = ImageConfig.of(CLIP_L_336, "pad")._replace(size=28, n_patches=4)


def write_data(folder: Path, n: int = 40, **change) -> Path:
    """n records over the golden pictures, every fifth of text only. change: number -> record in its place."""
    rng, names = random.Random(1), sorted(p.name for p in (GOLDEN / "images").iterdir())
    records = [talk(f"{IMAGE}\nwhat é {i}?" if i % 5 else f"tell {i}", "word " * rng.randint(1, 40), id=f"r{i}",
                    **({"image": names[i % len(names)]} if i % 5 else {})) for i in range(n)]
    for i, record in change.items():
        records[int(i[1:])] = record
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    return path


def open_dataset(path: Path, tok: Tokenizer, images: Path = GOLDEN / "images", block_size: int = 128,
                 **more) -> Dataset:
    return Dataset(path, images, tok, "v0", TINY_IMAGES, block_size, **more)


def write_zoo_images(folder: Path) -> None:
    good = io.BytesIO()
    pattern(300, 200).save(good, "JPEG")
    (folder / "good.jpg").write_bytes(good.getvalue())
    (folder / "truncated.jpg").write_bytes(good.getvalue()[:-2000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("L", (1, 2000)).save(folder / "thin.png")
    Image.new("L", (1_000_000, 1)).save(folder / "strip.png")
    pattern(50, 40).save(folder / "gif.jpg", format="GIF")
    pattern(50, 40).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30).save(folder / "deep.png")
    pattern(50, 40).convert("RGBA").quantize(16).save(folder / "palette.png", transparency=0)
    (folder / "link.jpg").symlink_to(ROOT / "LICENSE")
    (folder / "inside.jpg").symlink_to(folder / "good.jpg")
    for path in (GOLDEN / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


LONE = json.loads('"\\ud800"')
BAD_RECORDS = {
    "not a conversation": [1, "x", None, [], {"id": "a"}, {"conversations": "x"}, {"conversations": [1]},
                           {"conversations": [{"from": "human"}]},
                           {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                           {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}],
    "no answer": [talk(), talk("a question"), talk("a", "b", "c"), {"conversations": [{"from": "gpt", "value": "hi"}]},
                  {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]}],
    "wrong speaker": [{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
                      {"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]},
                      {"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]},
                      {"conversations": [{"value": "a"}, {"value": "b"}]}],
    "broken unicode": [talk("a" + LONE, "b"), talk("a", LONE), talk("a", "b", "c" + LONE, "d")],
}


def zoo(images: Path) -> dict[str, tuple[str, dict | list]]:
    """Name -> (what the check calls it, record)."""
    pictures = {
        "image unreadable": ["truncated.jpg", "empty.jpg", "page.jpg", "program.jpg", "folder.jpg", "bomb.png"],
        "image too large": ["strip.png"], "image missing": ["absent.jpg"], "image name": ["", ["a.jpg", 3]], "image places": [["a.jpg", "b.jpg"]],
        "image outside the folder": ["/etc/passwd", "../../x.jpg", "a/../../b.jpg", "C:\\x.jpg", "a\0b", "link.jpg"],
        "image is an address": ["http://127.0.0.1/x.jpg", "file:///etc/passwd", "data:image/png;base64,xx"]}
    found = {f"image {name!r}": (kind, talk(f"{IMAGE}\nq", "a", id=f"zoo {name}", image=name))
             for kind, names in pictures.items() for name in names}
    found["endless question"] = ("nothing to learn", talk("why " * 400, "because", id="zoo endless"))
    for kind, records in BAD_RECORDS.items():
        for i, record in enumerate(records):
            if isinstance(record, dict):
                found[f"{kind} {i}"] = (kind, {"id": f"zoo {kind} {i}", **record})
    return found
