"""data.py: pixels, ids and labels equal the original's; the plan is a pure function; bad data is named and survived."""
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
from data import (EOT, IGNORE, IMAGE, IMAGE_ID, SYSTEM, Dataset, Index, Loader, Sample, collate, encode, encode_prompt,
                  eot_id, expand, load_image, load_tokenizer, mean_color, split_step, step_samples, steps_per_epoch)
from vision import CLIP_L_336, SIGLIP_SO400M_384, normalize

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEXT = json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))
PIXELS = load_file(GOLDEN / "pixel_values.safetensors")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def find_real_tokenizer() -> Path | None:
    """Phi-2's own is too big to commit. Where it is not found, its tests are skipped."""
    places = [os.environ.get("LLAVA_PHI_TOKENIZER"), ROOT / "checkpoints/phi-2", ROOT.parent / "shared/phi2-tokenizer"]
    return next((Path(p) for p in places if p and (Path(p) / "vocab.json").exists()), None)


REAL = find_real_tokenizer()
needs_real = pytest.mark.skipif(REAL is None, reason="no tokenizer of Phi-2: set LLAVA_PHI_TOKENIZER to its folder")


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(GOLDEN / "tiny-llava-phi")


@pytest.fixture(scope="module")
def toks(tiny):
    return {"tiny": tiny, "real": load_tokenizer(REAL) if REAL else None}


def talk(*said, **more) -> dict:
    """A record: question, answer, question, ..."""
    return {**more, "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]}


def supervised_text(ids, labels, tok) -> str:
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    return tok.decode([i for i in labels if i != IGNORE], skip_special_tokens=False)

# ---------------------------------------------------------------------------------------------------
# Picture


def normalised(image: torch.Tensor) -> torch.Tensor:
    return (image / 255 - MEAN) / STD


@pytest.mark.parametrize("key", sorted(PIXELS))
def test_pixels_equal_the_original(key):
    """Bit for bit what CLIPImageProcessor gave the original; big ones were stored as every seventh pixel."""
    name, mode, size, *sparse = key.split(".")
    path = next(p for p in (GOLDEN / "images").iterdir() if p.stem == name)
    ours = normalised(load_image(path, int(size), mode))
    assert torch.equal(ours[:, ::7, ::7] if sparse else ours, PIXELS[key])


MIPHA = load_file(ROOT / "tests/golden-mipha/pixel_values.safetensors")


@pytest.mark.parametrize("key", sorted(MIPHA))
def test_pixels_equal_mipha(key):
    """Bit for bit what SiglipImageProcessor gave Mipha, squashed, or padded with the colour of SigLIP's mean before."""
    name, mode, size, sparse = re.fullmatch(r"(.*?\.\w+)\.(squash|pad)\.(\d+)(?:\.(every7))?", key).groups("")
    siglip = SIGLIP_SO400M_384
    image = load_image(GOLDEN / "images" / name, int(size), mode, mean_color(siglip.mean))
    ours = normalize(image[None], siglip.mean, siglip.std)[0]
    assert torch.equal(ours[:, ::7, ::7] if sparse else ours, MIPHA[key])


def test_the_padding_colour_follows_the_mean():
    """The fraction is cut off, as in the original; without a colour, a picture is padded for CLIP."""
    assert mean_color(CLIP_L_336.mean) == data.PAD_COLOR == (122, 116, 104)
    assert mean_color(SIGLIP_SO400M_384.mean) == (127, 127, 127)
    strip = drawn(60, 20)
    assert load_image(strip, 28, "pad")[:, 0, 0].tolist() == [122, 116, 104]
    assert load_image(strip, 28, "pad", (1, 2, 3))[:, 0, 0].tolist() == [1, 2, 3]
    assert torch.equal(load_image(drawn(30, 30), 28, "squash"), load_image(drawn(30, 30), 28, "pad"))


def drawn(w: int, h: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    return Image.fromarray((np.stack([7 * x + 3 * y, 5 * x + 11 * y, 13 * x + 17 * y], -1) % 256).astype(np.uint8))


def drawn_as(mode: str, w: int, h: int) -> Image.Image:
    steps = {"I;16": ("L", "I", "I;16"), "PA": ("P", "PA")}        # Pillow does not convert to these at once
    image = drawn(w, h)
    for step in steps.get(mode, (mode,)):
        image = image.convert(step)
    return image


def test_pixels_of_a_formula():
    """Values the original gave on a picture anybody can draw (spec, section 2)."""
    crop, pad = (normalised(load_image(drawn(500, 333), 336, mode)) for mode in ("crop", "pad"))
    torch.testing.assert_close(crop[:, 168, 168], torch.tensor([1.142021, -1.752097, 1.250033]), atol=1e-6, rtol=0)
    torch.testing.assert_close(pad[:, 0, 0], torch.tensor([-0.011255, -0.011196, -0.001333]), atol=1e-6, rtol=0)
    tall = normalised(load_image(drawn(333, 500), 336, "pad"))
    torch.testing.assert_close(tall[:, 335, 100], torch.tensor([0.631076, 1.009332, 0.240408]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_pixels_equal_the_image_processor_of_transformers(mode):
    """Every mode that Pillow converts, and awkward shapes. Runs where transformers is installed."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    shapes = [(57, 99), (1, 50), (301, 7), (7, 301), (56, 56), (1000, 333), (90, 180), (60, 181)]
    modes = ("L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "YCbCr", "HSV", "PA")
    for pil_mode, w, h in [("RGB", *shape) for shape in shapes] + [(pil_mode, 80, 61) for pil_mode in modes]:
        image = drawn_as(pil_mode, w, h)
        rgb = image.convert("RGB")
        if mode == "pad" and w != h:
            square = Image.new("RGB", (max(w, h),) * 2, tuple(int(m * 255) for m in processor.image_mean))
            square.paste(rgb, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
            rgb = square
        theirs = processor(rgb, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(normalised(load_image(image, 56, mode)), theirs), (pil_mode, w, h)


def test_a_photo_lying_on_its_side_is_put_upright(tmp_path):
    """Phones store the turn in EXIF; annotators saw the picture upright. The original did not turn it."""
    image, exif = drawn(60, 40), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    ours = load_image(tmp_path / "turned.png", 28, "crop")
    assert torch.equal(ours, load_image(image.transpose(Image.Transpose.ROTATE_270), 28, "crop"))
    assert not torch.equal(ours, load_image(image, 28, "crop"))
    with open(tmp_path / "turned.png", "rb") as f:
        assert torch.equal(ours, load_image(f, 28, "crop"))


def test_a_picture_of_a_phone_with_two_frames(tmp_path):
    """MPO is a JPEG with a second picture inside; the list of allowed formats must not refuse it."""
    drawn(60, 40).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[drawn(60, 40)])
    assert load_image(tmp_path / "phone.jpg", 28, "pad").shape == (3, 28, 28)


def write_zoo_images(folder: Path) -> None:
    good = io.BytesIO()
    drawn(300, 200).save(good, "JPEG")
    (folder / "good.jpg").write_bytes(good.getvalue())
    (folder / "truncated.jpg").write_bytes(good.getvalue()[:-2000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("L", (1, 2000)).save(folder / "thin.png")
    Image.new("L", (1_000_000, 1)).save(folder / "strip.png")
    drawn(50, 40).save(folder / "gif.jpg", format="GIF")
    drawn(50, 40).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30).save(folder / "deep.png")
    drawn(50, 40).convert("RGBA").quantize(16).save(folder / "palette.png", transparency=0)
    (folder / "link.jpg").symlink_to(ROOT / "LICENSE")
    (folder / "inside.jpg").symlink_to(folder / "good.jpg")
    for path in (GOLDEN / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def zoo_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_zoo_images(folder)
    return folder


@pytest.mark.parametrize("name, problem", [
    ("truncated.jpg", "unreadable.*truncated"), ("empty.jpg", "unreadable"), ("page.jpg", "unreadable"),
    ("program.jpg", "unreadable"), ("folder.jpg", "unreadable"), ("bomb.png", "too large|bomb"),
    ("strip.png", "too large"), ("absent.jpg", "missing")])
def test_bad_pictures_are_named(zoo_images, name, problem):
    """One line with the file's name; a bomb is refused before it is decoded."""
    modes = ("crop", "pad") if name == "strip.png" else data.IMAGE_MODES        # squashed, a strip is harmless
    for mode in modes:
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){problem}") as e:
            load_image(zoo_images / name, 28, mode)
        assert name in str(e.value) and "\n" not in str(e.value)


def test_odd_but_good_pictures_open(zoo_images):
    for name in ("gif.jpg", "cmyk.jpg", "deep.png", "palette.png", "thin.png"):
        assert load_image(zoo_images / name, 28, "pad").shape == (3, 28, 28)
    assert load_image(zoo_images / "thin.png", 28, "crop").shape == (3, 28, 28)


def test_addresses_are_refused():
    with pytest.raises(ValueError, match="download it"):
        load_image("http://127.0.0.1/x.jpg", 28, "pad")

# ---------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("key", sorted(TEXT["samples"]))
def test_ids_and_labels_equal_the_original(key, toks):
    """The original's own output, with its off-by-one in the labels corrected, for both tokenizers."""
    which, stage, _ = key.split("/")
    if toks[which] is None:
        pytest.skip("Phi-2's tokenizer is not here")
    case = TEXT["samples"][key]
    ids, labels = encode(case["sample"], toks[which], "plain" if stage == "pretrain" else "v0")
    assert ids == case["input_ids"]
    assert labels == case["labels"]


def test_prompts_equal_the_original_and_begin_the_training_ids(toks):
    for case in TEXT["prompts"].values():
        for which, tok in toks.items():
            if tok:
                assert encode_prompt(case["turns"], tok, image=True) == case[f"input_ids_{which}"]
    tok, turns = toks["tiny"], ["What is this?", " A dog.", "", "\n\nno idea", "sure?", "\tyes"]
    ids, _ = encode(talk(IMAGE + "\n" + turns[0], *turns[1:], image="x"), tok, "v0")
    for n in (1, 3, 5):
        prompt = encode_prompt(turns[:n], tok, image=True)
        assert ids[:len(prompt)] == prompt
    with pytest.raises(ValueError, match="odd number"):
        encode_prompt(turns[:2], tok, image=False)


@needs_real
def test_tokenizer_without_tokenizer_json_is_the_same(tmp_path, toks):
    """The released LLaVA-Phi has vocab.json, merges.txt and added_tokens.json only."""
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).symlink_to(REAL / name)
    built = load_tokenizer(tmp_path)
    texts = [" " * n + "x" + "\t" * n + "y" + "\n" * n for n in range(45)]
    for text in texts + [EOT, IMAGE, "naïve 这是 🙂", "a" * 100, "1234 5678  "]:
        a, b = (t.encode(text, add_special_tokens=False) for t in (built, toks["real"]))
        assert a.ids == b.ids and a.offsets == b.offsets
    assert built.encode(" " * 40).ids == [50257, 50279]


def test_a_saved_image_token_is_dropped(tmp_path, tiny):
    """Our export adds an <image> token for transformers; read back, "<image>" in a text must stay text."""
    blob = json.loads((GOLDEN / "tiny-llava-phi" / "tokenizer.json").read_text())
    blob["added_tokens"].append({**blob["added_tokens"][0], "id": 444, "content": IMAGE})
    (tmp_path / "tokenizer.json").write_text(json.dumps(blob))
    text = f"a {IMAGE} and {EOT}"
    assert load_tokenizer(tmp_path).encode(text).ids == tiny.encode(text).ids
    assert eot_id(tiny) not in tiny.encode(text).ids


@pytest.mark.parametrize("files", [
    {}, {"tokenizer.json": "{"}, {"tokenizer.json": '{"added_tokens": []}'},
    {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "added_tokens.json": '{"  ": 7}'}])
def test_bad_tokenizers_are_named(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        load_tokenizer(tmp_path)


def random_text(rng: random.Random) -> str:
    pieces = ["word", " ", "  ", "\n", "\n\n", "\t", "12", "3.5", "é", "这是", "🙂", "def f(x):\n    return x", IMAGE, EOT,
              "ASSISTANT:", " ASSISTANT: ", "USER: ", "</s>", "'s", "...", "\u200b", "\r\n", "\x00", "A", ":", "  \n "]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("which, n", [("tiny", 300), ("real", 4000)])
def test_supervised_text_is_the_answers(which, n, toks):
    """Random conversations: what is supervised decodes to exactly the answers, each with its end of text; nothing else
    is, and the only image slot is the one in front. The family's usual bug shifts this by a token on some of them."""
    tok, rng = toks[which], random.Random(0)
    if tok is None:
        pytest.skip("Phi-2's tokenizer is not here")
    eot = eot_id(tok)
    for _ in range(n):
        turns = [random_text(rng) for _ in range(2 * rng.randint(1, 4))]
        image = rng.random() < 0.5
        record = talk(*turns, **({"image": "x.jpg"} if image else {}))
        if image:
            before = rng.random() < 0.5 or turns[0].strip().startswith(IMAGE)
            record["conversations"][0]["value"] = f"{IMAGE}\n{turns[0]}" if before else f"{turns[0]}\n{IMAGE}"
        ids, labels = encode(record, tok, "v0")
        want = [" " + a if a else "" for a in turns[1::2]]
        got, rest = [], []
        for i, label in zip(ids, labels):
            if label == eot:
                got.append(tok.decode(rest, skip_special_tokens=False))
                rest = []
            elif label != IGNORE:
                rest.append(label)
        assert got == want and rest == []
        assert ids.count(IMAGE_ID) == image and ids.count(eot) == len(want)
        assert all(label in (i, IGNORE) for i, label in zip(ids, labels))
        question = turns[0].strip() if image else turns[0]
        head = [i for i in ids[:labels.index(next(x for x in labels if x != IGNORE))] if i != IMAGE_ID]
        middle = ("\n" + question if question else "") if image else question
        assert tok.decode(head, skip_special_tokens=False) == f"{SYSTEM} USER: {middle} ASSISTANT:"


def test_tags_in_texts_stay_text(tiny):
    """A literal <image> or <|endoftext|> once moved everybody else's pictures in the batch, or ended a turn."""
    eot = eot_id(tiny)
    for record, slots in [(talk("hi", f"say {IMAGE}", f"what is {IMAGE}?", EOT), 0),
                          (talk(f"{IMAGE}\nhi", f"{IMAGE} {EOT}", f"{IMAGE} again", "yes", image="x"), 1),
                          (talk(f"{IMAGE}\n{IMAGE}\nhi", "yes", image="x"), 1), (talk("no tag", "yes", image="x"), 1),
                          (talk(f"the {IMAGE} element?\n{IMAGE}", "yes", image="x"), 1),
                          (talk(IMAGE, "yes", image="x"), 1)]:
        ids, labels = encode(record, tiny, "v0")
        assert ids.count(IMAGE_ID) == slots and ids.count(eot) == len(record["conversations"]) // 2
    kept = encode(talk(f"the {IMAGE} element?\n{IMAGE}", "yes", image="x"), tiny, "v0")[0]
    assert f"\nthe {IMAGE} element? ASSISTANT: yes" in tiny.decode([i for i in kept if i != IMAGE_ID])


def test_a_stray_tag_leaves_the_neighbours_alone(tiny):
    """In the LLaVA family a running counter hands out pictures per tag: one tag too many shifts everybody's pictures.
    Here the hidden states of the samples around such a record are what they are without it."""
    from model import LLaVAConfig, LLaVAPhi, Packed, PhiConfig
    from vision import VisionConfig
    torch.manual_seed(0)
    model = LLaVAPhi(LLaVAConfig(PhiConfig(512, 256, 2, 2, 32, 64, 8, dropout=0.0), VisionConfig(28, 14, 2, 2, 16, 32)))
    model.eval()
    images = [torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8) for _ in range(3)]

    def sample(record: dict, image: torch.Tensor) -> Sample:
        return Sample("", *expand(*encode(record, tiny, "v0"), 4, 256), image)

    first = sample(talk(f"{IMAGE}\none", "yes", image="x"), images[0])
    last = sample(talk(f"{IMAGE}\ntwo", "yes", image="x"), images[2])
    stray = sample(talk(f"{IMAGE}\nwhat is {IMAGE}?", f"a {IMAGE}", f"{IMAGE}?", "no", image="x"), images[1])

    def hidden(samples: list[Sample]) -> tuple[torch.Tensor, ...]:
        batch = collate(samples)
        h = model.llm(model.embed(batch.ids, batch.images, batch.slots), Packed(batch.lengths, batch.ids.device))
        return h.split(batch.lengths.tolist())

    with torch.no_grad():
        (a, _, c), (a_alone, c_alone) = hidden([first, stray, last]), hidden([first, last])
    torch.testing.assert_close(a, a_alone)
    torch.testing.assert_close(c, c_alone)


def test_an_empty_answer_teaches_the_end(tiny):
    ids, labels = encode(talk("say nothing", "", "and now", "yes"), tiny, "v0")
    assert supervised_text(ids, labels, tiny) == f"{EOT} yes{EOT}"


LONE = json.loads('"\\ud800"')
BAD_RECORDS = {
    "not a conversation": [1, "x", None, [], {"id": "a"}, {"conversations": "x"}, {"conversations": [1]},
                           {"conversations": [{"from": "human"}]},
                           {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}],
    "no answer": [talk(), talk("a question"), talk("a", "b", "c"), {"conversations": [{"from": "gpt", "value": "hi"}]}],
    "wrong speaker": [{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
                      {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]},
                      {"conversations": [{"value": "a"}, {"value": "b"}]}],
    "broken unicode": [talk("a" + LONE, "b"), talk("a", LONE)],
}


@pytest.mark.parametrize("problem, record", [(k, r) for k, rs in BAD_RECORDS.items() for r in rs])
def test_malformed_records_are_named(problem, record, tiny):
    for template in ("v0", "plain"):
        with pytest.raises(ValueError, match=problem):
            encode(record, tiny, template)


def test_plain_wants_a_caption(tiny):
    for record in (talk("a", "b"), talk(IMAGE, "b", "c", "d", image="x")):
        with pytest.raises(ValueError, match="not a caption"):
            encode(record, tiny, "plain")
    ids, labels = encode(talk(IMAGE, f"a {IMAGE}", image="x"), tiny, "plain")
    assert ids.count(IMAGE_ID) == 1 and supervised_text(ids, labels, tiny) == f"a {IMAGE}\n"


def test_expand_cuts_on_the_right_and_never_the_image():
    ids, labels = [1, 2, IMAGE_ID, 3, 4], [IGNORE, IGNORE, IGNORE, 3, 4]
    assert expand(ids, labels, 3, 100) == ([1, 2] + [IMAGE_ID] * 3 + [3, 4], [IGNORE] * 5 + [3, 4])
    assert expand(ids, labels, 3, 6) == ([1, 2] + [IMAGE_ID] * 3 + [3], [IGNORE] * 5 + [3])
    assert expand(ids, labels, 3, 5) == ([1, 2] + [IMAGE_ID] * 3, [IGNORE] * 5)
    assert expand([1, 2, 3], [1, 2, 3], 3, 2) == ([1, 2], [1, 2])
    with pytest.raises(ValueError, match="does not fit"):
        expand(ids, labels, 3, 4)
    assert expand(ids, None, 3, 7) == ([1, 2] + [IMAGE_ID] * 3 + [3, 4], None)
    with pytest.raises(ValueError, match="prompt too long"):
        expand(ids, None, 3, 6)


def test_very_long_repetitions_are_tokenised(tiny):
    """Long repetitions must not hang: the reading is linear."""
    for text in ("a" * 200_000, " " * 200_000, "这" * 200_000):
        ids, labels = encode(talk("q", text), tiny, "v0")
        assert supervised_text(ids, labels, tiny) == f" {text}{EOT}"


def test_collate_packs_and_shifts():
    """Positions, not padding: rows point at the token before each supervised one, never across two samples."""
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    batch = collate([Sample("a", [5, IMAGE_ID, IMAGE_ID, 6, 7], [IGNORE, IGNORE, IGNORE, 6, 7], image),
                     Sample("b", [8, 9], [8, 9], None),
                     Sample("c", [IMAGE_ID, IMAGE_ID, 4], [IGNORE, IGNORE, 4], image + 1)])
    assert batch.ids.tolist() == [5, 0, 0, 6, 7, 8, 9, 0, 0, 4]
    assert batch.lengths.tolist() == [5, 2, 3]
    assert batch.slots.tolist() == [1, 2, 7, 8]
    assert batch.rows.tolist() == [2, 3, 5, 8]
    assert batch.targets.tolist() == [6, 7, 9, 4]           # not 8: it opens a sample, nothing in that sample says it
    assert torch.equal(batch.images, torch.stack([image, image + 1])) and batch.images.dtype == torch.uint8
    empty = collate([Sample("", [3], [IGNORE], None)], image_size=2)
    assert empty.images.shape == (0, 3, 2, 2) and empty.rows.shape == empty.targets.shape == empty.slots.shape == (0,)
    assert all(x.dtype == torch.int64 for x in (*batch[:2], *batch[3:], *empty[:2], *empty[3:]))

# ---------------------------------------------------------------------------------------------------
# Plan


def fake_index(n: int, text_only: float = 0.1, seed: int = 0) -> Index:
    rng = np.random.default_rng(seed)
    image = (rng.random(n) >= text_only).astype(np.int32)
    length = (rng.lognormal(5.5, 0.6, n).astype(np.int32) + 40 + 576 * image).clip(max=2048)
    return Index(np.zeros((n, 2), np.int64), length, length // 4, image, np.zeros(n, np.int32))


def plan(index: Index, seed: int, group: str, global_batch: int):
    n = len(index.length)
    order = partial(data.epoch_order, seed, index, global_batch, group)
    return [step_samples(k, n, global_batch, order) for k in range(2 * steps_per_epoch(n, global_batch))]


@pytest.mark.parametrize("group", ["none", "modality_length"])
@pytest.mark.parametrize("n, text_only", [(1000, 0.1), (1000, 0.0), (1000, 1.0), (7, 0.5), (64, 0.5), (65, 0), (1, 0)])
def test_every_sample_once_per_epoch(group, n, text_only):
    """Also for data that is all pictures or all text, which made the original's grouping fail."""
    steps = plan(fake_index(n, text_only), 3, group, 32)
    half = len(steps) // 2
    assert all(sorted(sum(epoch, [])) == list(range(n)) for epoch in (steps[:half], steps[half:]))
    assert all(len(s) == 32 for s in steps[:half - 1])
    assert n < 64 or (steps[:half] != steps[half:] and steps != plan(fake_index(n, text_only), 4, group, 32))


def test_steps_of_the_two_stages():
    assert steps_per_epoch(558_128, 256) == 2181 and steps_per_epoch(665_298, 128) == 5198


def test_grouping_keeps_modalities_apart():
    index = fake_index(1000, 0.3)
    mixed = [len(set(index.image[ids].tolist())) == 2 for ids in plan(index, 0, "modality_length", 32)[:31]]
    assert sum(mixed) <= 2


def test_order_of_the_original():
    """group_by_modality_length of LLaVA-Phi for one seed, as the original gave it (spec, 4.2)."""
    torch.manual_seed(42)
    lengths = np.array([10, 5, -3, 8, -9, -2, 7, 6, -4, 12, 3, -1, 9, 11])
    assert data.modality_order(lengths, 2, 2, None, torch.Generator()) == [0, 10, 12, 7, 9, 6, 13, 3, 4, 5, 8, 2, 1, 11]


def test_split_is_fair_and_within_the_budget():
    """Every sample once; as many micro-batches on every rank; none above the budget or empty; ranks equally loaded; the
    same micro-batches for 1, 2 and 4 ranks when their number allows it."""
    index, same = fake_index(128 * 20), 0
    for k in range(20):
        length, image = (x[k * 128:(k + 1) * 128].tolist() for x in (index.length, index.image))
        sets = {}
        for world in (1, 2, 4, 8):
            ranks = split_step(length, image, world, 16384)
            assert len(ranks) == world and len({len(r) for r in ranks}) == 1
            micros = [m for r in ranks for m in r]
            assert sorted(sum(micros, [])) == list(range(128)) and all(micros)
            assert max(sum(length[i] for i in m) for m in micros) <= 16384
            loads = [sum(data.training_cost(length[i], image[i]) for m in r for i in m) for r in ranks]
            assert max(loads) < 1.1 * sum(loads) / world
            sets[world] = sorted(micros)
        same += sets[1] == sets[2] == sets[4] == sets[8]
    assert same > 0                                         # 7 or 8 micro-batches: 8 on all counts of ranks


def test_split_at_the_edges():
    assert split_step([5000], [1], 1, 1000) == [[[0]]]           # above the budget: alone
    assert sorted(sum(sum(split_step([5000, 10, 10], [1, 0, 0], 1, 1000), []), [])) == [0, 1, 2]
    assert sorted(split_step([10], [0], 2, 1000)) == [[[]], [[0]]]
    assert split_step([], [], 2, 1000) == [[[]], [[]]]

# ---------------------------------------------------------------------------------------------------
# Dataset and loader


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


def open_dataset(path: Path, tok, **more) -> Dataset:
    images = more.pop("images", GOLDEN / "images")
    return Dataset(path, images, tok, "v0", 28, "pad", 4, more.pop("block_size", 128), **more)


def loader(dataset: Dataset, **more) -> Loader:
    return Loader(dataset, **{**dict(global_batch=8, micro_tokens=300, rank=0, world=1, seed=1, steps=10), **more})


def same(a: list, b: list) -> bool:
    return all(x[:2] == y[:2] and len(x.batches) == len(y.batches)
               and all(torch.equal(t, u) for s, r in zip(x.batches, y.batches) for t, u in zip(s, r))
               for x, y in zip(a, b, strict=True))


def test_workers_change_nothing_and_resuming_is_exact(tmp_path, tiny):
    """The same tensors with 0 and 2 workers, from a list and from lines; from step 6 on, those of a whole run."""
    path = write_data(tmp_path)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(r) for r in json.loads(path.read_text())))
    whole = list(loader(open_dataset(path, tiny)))
    assert same(whole, list(loader(open_dataset(path, tiny), workers=2)))
    assert same(whole, list(loader(open_dataset(lines, tiny))))
    assert same(whole[6:], list(loader(open_dataset(path, tiny), start_step=6)))


def test_steps_are_the_same_samples_for_any_number_of_ranks(tmp_path, tiny):
    dataset = open_dataset(write_data(tmp_path), tiny)
    one = list(loader(dataset))
    for world in (2, 4, 16):
        ranks = [list(loader(dataset, rank=r, world=world)) for r in range(world)]
        for k, step in enumerate(one):
            assert all(rank[k].sample_ids == step.sample_ids for rank in ranks)
            assert len({len(rank[k].batches) for rank in ranks}) == 1
            targets = sorted(t for rank in ranks for b in rank[k].batches for t in b.targets.tolist())
            assert targets == sorted(t for b in step.batches for t in b.targets.tolist())
            images = sum(len(b.images) for rank in ranks for b in rank[k].batches)
            assert images == sum(len(b.images) for b in step.batches)


def test_resuming_reads_nothing_before_the_step(tmp_path, tiny, monkeypatch):
    """Step 5000 of 665,298 records, none of which exists: only the samples of that step are asked for."""
    dataset, asked = open_dataset(write_data(tmp_path), tiny), []
    dataset.index = fake_index(665_298)
    monkeypatch.setattr(dataset, "sample", lambda i: asked.append(i) or Sample("x", [1], [1], None))
    step = next(iter(loader(dataset, global_batch=128, micro_tokens=10**9, steps=5198, start_step=5000)))
    assert step.step == 5000 and sorted(asked) == sorted(step.sample_ids) and len(asked) == 128


def test_the_index_is_made_once_and_tied_to_its_data(tmp_path, tiny, monkeypatch):
    path, out = write_data(tmp_path), tmp_path / "out"
    made = open_dataset(path, tiny, cache_dir=out).index
    monkeypatch.setattr(Dataset, "make_index", lambda self: pytest.fail("made again"))
    for a, b in zip(made, open_dataset(path, tiny, cache_dir=out).index):
        assert np.array_equal(a, b)
    for change in (dict(block_size=99), dict(path=path)):
        path.write_text(path.read_text() + (" " if "path" in change else ""))
        with pytest.raises(pytest.fail.Exception):
            open_dataset(path, tiny, cache_dir=out, block_size=change.get("block_size", 128)).index
    assert {p.suffix for p in out.iterdir()} == {".npz", ".lock"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json", "out"]           # nothing beside the user's data


def test_lengths_are_those_of_the_samples(tmp_path, tiny):
    """The plan must budget what collate packs; and records larger than the window of the reader must be found."""
    path = write_data(tmp_path, t3=talk("é" * 3000, "x", id="long"))
    dataset = open_dataset(path, tiny)
    for i in range(len(dataset)):
        s = dataset.sample(i)
        assert len(s.ids) == len(s.labels) == dataset.index.length[i]
        assert (s.image is not None) == dataset.index.image[i]
        assert sum(label != IGNORE for label in s.labels) == dataset.index.supervised[i]
    assert dataset.index.cut[3] > 0 and dataset.index.supervised[3] == 0
    assert "1 cut at 128, 1 without anything to learn" in dataset.summary()


def test_the_reader_does_not_care_where_its_window_ends(tmp_path, tiny, monkeypatch):
    path = write_data(tmp_path)
    whole = open_dataset(path, tiny).index.ranges
    for width in (100, 377, 1000):
        monkeypatch.setattr(data, "BLOCK", width)
        assert np.array_equal(open_dataset(path, tiny).find_ranges(), whole)
        assert data.lines_of(path, whole[:, 0].tolist())[:3] == [2, 15, 29]
    assert [json.loads(path.read_bytes()[a:b])["id"] for a, b in whole] == [f"r{i}" for i in range(40)]


def kill_when_asked(dataset: Dataset, i: int):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_worker_ends_the_run(tmp_path, tiny, monkeypatch):
    """Killed by the system for memory, say: an error, never an endless wait."""
    dataset = open_dataset(write_data(tmp_path), tiny)
    monkeypatch.setattr(Dataset, "sample", kill_when_asked)
    with pytest.raises(RuntimeError, match="worker"):
        list(loader(dataset, workers=1))


def test_workers_outlive_the_signals_of_the_launcher(tmp_path, tiny):
    """torchrun sends SIGTERM to the whole group. Workers that died of it took the last checkpoint with them."""
    program = f"""if True:
        import sys, os, signal; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path; from data import load_tokenizer; from test_data import *
        signal.signal(signal.SIGTERM, lambda *a: print("asked", flush=True))
        dataset = open_dataset(Path({str(write_data(tmp_path))!r}), load_tokenizer(GOLDEN / "tiny-llava-phi"))
        steps = iter(loader(dataset, workers=2, steps=40))
        next(steps); os.killpg(0, signal.SIGTERM); print(len(list(steps)), flush=True)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                          start_new_session=True)
    assert done.stdout.split() == ["asked", "39"], done.stderr

# ---------------------------------------------------------------------------------------------------
# The bad-data zoo: every kind is named by the check, stops strict training, is survived by skip mode


def zoo(images: Path) -> dict[str, tuple[str, dict | list]]:
    """Name -> (what the check calls it, record)."""
    pictures = {
        "image unreadable": ["truncated.jpg", "empty.jpg", "page.jpg", "program.jpg", "folder.jpg", "bomb.png"],
        "image too large": ["strip.png"], "image missing": ["absent.jpg"], "image name": ["", ["a.jpg", "b.jpg"]],
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


def run_check(capsys, path: Path, images: Path, *more: str) -> tuple[int, str]:
    flags = "--max-length 300 --n-patches 4 --image-size 28 --workers 0".split()
    code = data.main(["check", "--data", str(path), "--images", str(images), "--tokenizer",
                      str(GOLDEN / "tiny-llava-phi"), *flags, *more])
    return code, capsys.readouterr().out


def test_the_check_names_every_animal_of_the_zoo(tmp_path, zoo_images, capsys):
    """And writes what is good, byte for byte, with the rejects beside it; what it wrote passes the check."""
    animals = list(zoo(zoo_images).values())
    names = ["good.jpg", "gif.jpg", "cmyk.jpg", "deep.png", "palette.png", "thin.png", "inside.jpg"]
    good = [talk(f"{IMAGE}\nwhat?", "this", id=name, image=name) for name in names] + [talk("é", "ü", id="text")]
    path, clean = tmp_path / "data.json", tmp_path / "clean.json"
    records = [good[0], *[record for _, record in animals], *good[1:]]
    lines = [json.dumps(record, ensure_ascii=record["id"] != "text") for record in records]
    path.write_text("[" + ",\n".join(lines) + "]", encoding="utf-8")
    code, out = run_check(capsys, path, zoo_images, "--write-clean", str(clean), "--show", "100")
    assert code == 1 and f"{len(animals)} bad" in out
    for i, (kind, record) in enumerate(animals):
        block = out[out.index(f"bad: {kind}"):].split("\n\n")[0]
        assert f"line {i + 2}, id {json.dumps(record['id'])[1:-1]} {kind}" in block, record
    rejects = map(json.loads, (tmp_path / "clean.rejects.jsonl").read_text().splitlines())
    assert [json.loads(r["record"]) for r in rejects] == [r for _, r in animals]
    assert json.loads(clean.read_text(encoding="utf-8")) == good
    code, out = run_check(capsys, clean, zoo_images, "--workers", "2")
    assert code == 0 and "0 bad" in out and "1 steps of 128 samples" in out
    code, out = run_check(capsys, path, zoo_images, "--decode", "header")
    assert code == 1 and f"{len(animals) - 1} bad" in out              # only the truncated picture has a good head


@pytest.mark.parametrize("name", sorted(zoo(Path())))
def test_strict_training_stops_at_it_and_skipping_survives_it(name, tmp_path, zoo_images, tiny):
    """Stops with the id, the line and the command; skipping puts in its place a sample that supervises nothing, so that
    the other samples' tensors are what they were, and lists it."""
    record = zoo(zoo_images)[name][1]
    path = write_data(tmp_path, t7=record)
    if name == "endless question":
        return                                              # learns nothing, harms nothing: counted in the index
    with pytest.raises(ValueError) as e:
        list(loader(open_dataset(path, tiny, images=zoo_images), steps=5))
    for part in (json.dumps(record["id"])[1:-1], "line", str(path), "python data.py check"):
        assert part in str(e.value)
    skipping = open_dataset(path, tiny, images=zoo_images, on_bad_sample="skip", cache_dir=tmp_path / "out")
    steps = list(loader(skipping, steps=5, micro_tokens=10**9))
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [b["sample"] for b in listed] == [7]
    nothing = Sample("", [eot_id(tiny)], [IGNORE], None)
    for step in steps:
        want = collate([nothing if i == 7 else skipping.sample(i) for i in step.sample_ids], 28)
        assert all(torch.equal(a, b) for a, b in zip(step.batches[0], want))


def test_bad_samples_listed_before_there_were_checksums_can_be_read(tmp_path):
    lines = [{"sample": 3, "data": "x.json", "problem": "?"}, {"checksum": "c", "sample": 3, "data": "x", "problem": "?"}]
    (tmp_path / data.BAD_SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    assert data.read_bad_samples(tmp_path) == {(None, 3), ("c", 3)} and data.read_bad_samples(tmp_path / "none") == set()


def test_skipping_gives_up_when_too_much_is_bad(tmp_path, tiny):
    path = write_data(tmp_path, **{f"t{i}": talk("q") for i in range(3, 15)})
    with pytest.raises(ValueError, match="1[12] bad samples, more than 10"):
        list(loader(open_dataset(path, tiny, on_bad_sample="skip", cache_dir=tmp_path / "out"), workers=1))


def test_a_bad_sample_in_a_worker_stops_the_run(tmp_path, tiny):
    path = write_data(tmp_path, t7=talk(f"{IMAGE}\nq", "a", id="the bad one", image="absent.jpg"))
    with pytest.raises(ValueError, match="the bad one.*image missing"):
        list(loader(open_dataset(path, tiny), workers=2))


def test_a_dataset_survives_the_way_to_a_spawned_worker(tmp_path, tiny):
    """Pickling a tokenizer forgets that special words in texts are text; systems that do not fork would train on it."""
    dataset = open_dataset(write_data(tmp_path, t1=talk(f"what is {EOT}?", f"{EOT} is text")), tiny)
    assert pickle.loads(pickle.dumps(dataset)).sample(1) == dataset.sample(1)
    assert dataset.sample(1).labels.count(eot_id(tiny)) == 1


def test_links_out_of_the_folder_can_be_allowed(zoo_images):
    assert data.image_path(zoo_images, "link.jpg", True).exists()
    with pytest.raises(ValueError, match="--follow-links"):
        data.image_path(zoo_images, "link.jpg", False)


DEEP = '{"id": "deep", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
GOOD = json.dumps(talk("q", "a", id="good"))


@pytest.mark.parametrize("text, problem", [
    (b"", "not LLaVA's json"), (b"<html>", "not LLaVA's json"), (b"[]", "no records"), (b"[1, 2]", "not LLaVA's json"),
    (b'{"a": 1}', "not LLaVA's json"), (b'[{"question": "a"}]', "not LLaVA's json"),
    (f"[{GOOD},\n]".encode(), "line 2"), (f"[{GOOD},\n{GOOD}".encode(), "line 2"),
    (f"[{GOOD}\n{GOOD}]".encode(), "line 1"),
    (f'[{GOOD},\n{{"id": NaN}}]'.encode(), "line 2.*NaN"), (f"[{GOOD},\n{DEEP}]".encode(), "line 2"),
    (f'{GOOD}\n{{"id": "b", \n{GOOD}'.encode(), "line 2, id b"),
    (GOOD.encode() + b'\n{"id": "latin", "x": "\xe9"}', "line 2, id latin not json"),
    (f'[{GOOD},\n{{"id": "latin", "x": "'.encode() + b'\xe9"}]', "line 2, id latin not json")])
def test_files_that_are_not_the_right_json(text, problem, tmp_path, tiny, capsys):
    """One clear line with the place, from the check and from training alike; never a traceback."""
    path = tmp_path / "x.json"
    path.write_bytes(text)
    code, out = run_check(capsys, path, tmp_path)
    assert code == 1 and re.search(problem, out), out
    with pytest.raises(ValueError, match=str(path)) as e:
        open_dataset(path, tiny).index
    assert "\n" not in str(e.value)


def test_the_check_without_a_tokenizer_and_with_mistaken_flags(tmp_path, monkeypatch, capsys):
    path, images = write_data(tmp_path), str(GOLDEN / "images")
    monkeypatch.chdir(tmp_path)
    assert data.main(["check", "--data", str(path), "--images", images, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "no lengths" in out and "0 bad" in out
    for bad in (["--images", "absent"], ["--images", images, "--tokenizer", str(tmp_path)],
                ["--images", images, "--write-clean", str(path)]):
        with pytest.raises((ValueError, OSError)):
            data.main(["check", "--data", str(path), "--workers", "0", *bad])
    command = [sys.executable, ROOT / "data.py", "check", "--data", "absent", "--images", images]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no data at absent") and done.stderr.count("\n") == 1
    assert json.loads(path.read_text())


def test_an_error_outside_the_workers_ends_the_process():
    """Protects against a hang at exit: workers ignore the signal that Python sends them then."""
    code = "import data\nx = data.parallel(abs, iter(int, 1), 2)\nnext(x)\nraise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and ended.stderr.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("args", [["data.py", "--help"], ["data.py", "check", "--bogus"], ["sample.py", "--help"],
                                  ["sample.py", "--top-p", "2"]])
def test_help_and_mistaken_flags_do_not_wait_for_torch(args):
    """Importing it takes seconds. The program runs in a process where that import is an error."""
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "--help" in args:
        assert done.returncode == 0 and "usage" in done.stdout and done.stderr == ""
    else:
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_check_takes_its_sizes_from_the_model(tmp_path, capsys):
    """So that nobody has to know how many patches a tower makes. What is given as a flag comes first."""
    flags = ["check", "--data", str(write_data(tmp_path)), "--images", str(GOLDEN / "images"), "--workers", "0"]
    tiny = str(GOLDEN / "tiny-llava-phi")
    for model in (["--model", tiny], ["--tokenizer", tiny]):
        assert data.main(flags + model) == 0
        assert "pictures of 28 pixels are 4 positions, samples have up to 2048" in capsys.readouterr().out
    assert data.main([*flags, "--model", str(ROOT / "demo/phi"), str(ROOT / "demo/clip")]) == 0
    by_model = capsys.readouterr().out
    assert "pictures of 56 pixels are 16 positions, samples have up to 512" in by_model
    assert data.main([*flags, "--tokenizer", str(ROOT / "demo/phi"), "--n-patches", "16", "--max-length", "512"]) == 0
    assert by_model.split("\n", 1)[1] == capsys.readouterr().out
    assert data.main([*flags, "--model", tiny, "--n-patches", "100"]) == 0
    assert "positions: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="found 3"):
        data.main([*flags, "--model", tiny, tiny, tiny])
    with pytest.raises(ValueError, match="--n-patches 0"):
        data.main([*flags, "--n-patches", "0"])
