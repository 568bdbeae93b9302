"""data.py's first half: pixels, ids and labels equal the original's; whatever is bad is refused by name."""
import json
import os
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT, pattern, talk
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from zoo import BAD_RECORDS

from data import (EOT, IGNORE, IMAGE, IMAGE_ID, SYSTEM, ImageConfig, Sample, collate, encode, encode_prompt, eot_id,
                  expand, load_image, load_tokenizer, open_rgb)
from lib.archives import Pictures
from lib.recipes import IMAGE_MODES
from vision import CLIP_L_336, SIGLIP_SO400M_384, normalize

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
def tiny(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture(scope="module")
def toks(tiny):
    return {"tiny": tiny, "real": load_tokenizer(REAL) if REAL else None}


def for_clip(size: int, mode: str) -> ImageConfig:
    return ImageConfig.of(CLIP_L_336, mode)._replace(size=size)


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
    ours = normalised(load_image(path, for_clip(int(size), mode)))
    assert torch.equal(ours[:, ::7, ::7] if sparse else ours, PIXELS[key])


MIPHA = load_file(ROOT / "tests/golden-mipha/pixel_values.safetensors")


@pytest.mark.parametrize("key", sorted(MIPHA))
def test_pixels_equal_mipha(key):
    """Bit for bit what SiglipImageProcessor gave Mipha, squashed, or padded with the colour of SigLIP's mean before."""
    name, mode, size, sparse = re.fullmatch(r"(.*?\.\w+)\.(squash|pad)\.(\d+)(?:\.(every7))?", key).groups("")
    siglip = SIGLIP_SO400M_384
    image = load_image(GOLDEN / "images" / name, ImageConfig.of(siglip, mode)._replace(size=int(size)))
    ours = normalize(image[None], siglip.mean, siglip.std)[0]
    assert torch.equal(ours[:, ::7, ::7] if sparse else ours, MIPHA[key])


def test_the_padding_color_follows_the_mean():
    """The fraction is cut off, as in the original."""
    assert for_clip(28, "pad").pad_color == (122, 116, 104)
    assert ImageConfig.of(SIGLIP_SO400M_384, "pad").pad_color == (127, 127, 127)
    strip = pattern(60, 20)
    assert load_image(strip, for_clip(28, "pad"))[:, 0, 0].tolist() == [122, 116, 104]
    assert load_image(strip, for_clip(28, "pad")._replace(pad_color=(1, 2, 3)))[:, 0, 0].tolist() == [1, 2, 3]
    square = pattern(30, 30)
    assert torch.equal(load_image(square, for_clip(28, "squash")), load_image(square, for_clip(28, "pad")))


def drawn_as(mode: str, w: int, h: int) -> Image.Image:
    steps = {"I;16": ("L", "I", "I;16"), "PA": ("P", "PA")}        # Pillow does not convert to these at once
    image = pattern(w, h)
    for step in steps.get(mode, (mode,)):
        image = image.convert(step)
    return image


def test_pixels_of_a_formula():
    """Values the original gave on a picture anybody can draw (spec, section 2)."""
    crop, pad = (normalised(load_image(pattern(500, 333), for_clip(336, mode))) for mode in ("crop", "pad"))
    torch.testing.assert_close(crop[:, 168, 168], torch.tensor([1.142021, -1.752097, 1.250033]), atol=1e-6, rtol=0)
    torch.testing.assert_close(pad[:, 0, 0], torch.tensor([-0.011255, -0.011196, -0.001333]), atol=1e-6, rtol=0)
    tall = normalised(load_image(pattern(333, 500), for_clip(336, "pad")))
    torch.testing.assert_close(tall[:, 335, 100], torch.tensor([0.631076, 1.009332, 0.240408]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_pixels_equal_the_image_processor_of_transformers(mode):
    """Every mode that Pillow converts, and awkward shapes. Runs where transformers is installed."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    shapes = [(57, 99), (1, 50), (301, 7), (7, 301), (56, 56), (1000, 333), (90, 180), (60, 181)]
    modes = ("L", "LA", "P", "RGBA", "CMYK", "1", "I", "F", "YCbCr", "HSV", "PA")
    for pil_mode, w, h in [("RGB", *shape) for shape in shapes] + [(pil_mode, 80, 61) for pil_mode in modes]:
        image = drawn_as(pil_mode, w, h)
        rgb = image.convert("RGB")
        if mode == "pad" and w != h:
            square = Image.new("RGB", (max(w, h),) * 2, tuple(int(m * 255) for m in processor.image_mean))
            square.paste(rgb, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
            rgb = square
        theirs = processor(rgb, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(normalised(load_image(image, for_clip(56, mode))), theirs), (pil_mode, w, h)


@pytest.mark.parametrize("tag, kind", [(0x011a, 2), (0x011a, 7), (0x010e, 5), (0x0213, 10), (0x0132, 12), (0x8298, 5)])
def test_a_photo_is_turned_by_its_orientation_alone(tag, kind, tmp_path):
    """Another tag whose value is of the wrong type once made a good photo unreadable."""
    image = pattern(60, 40)
    for orientation in range(10):
        exif = struct.pack("<4sIHHHIHHHHIII", b"II*\0", 8, 2, 0x0112, 3, 1, orientation, 0, tag, kind, 1, 38, 0)
        image.save(tmp_path / "odd.png", exif=exif + b"abcdefgh")
        image.getexif()[0x0112] = orientation
        want = load_image(ImageOps.exif_transpose(image), for_clip(28, "crop"))
        assert torch.equal(load_image(tmp_path / "odd.png", for_clip(28, "crop")), want), orientation


@pytest.mark.parametrize("mode, largest, white", [
    ("I;16", 60_000, 65535), ("I;16", 200, 65535), ("I", 60_000, 65535), ("I", 200, 255), ("I", 1, 255),
    ("I", 10**6, 10**6), ("F", 0.9, 1), ("F", 254.5, 255), ("F", 60_000, 65535), ("F", 1e9, 1e9), ("F", 0, 1)])
def test_deep_pictures_are_scaled_to_8_bits(mode, largest, white):
    """Pillow clips at 255, so that a 16-bit scan or a depth map became white."""
    values = np.linspace(0, largest, 30 * 20).reshape(20, 30)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    deep = Image.fromarray(values.astype(kind))
    assert deep.mode == mode
    want = np.rint(values.astype(kind) * (255 / white)).astype(int)
    pixels = np.asarray(open_rgb(deep, 28, "pad")).astype(int)
    assert pixels.shape == (20, 30, 3) and (pixels == want[..., None]).all()


def test_odd_values_of_floating_point_pictures():
    values = np.array([[np.nan, -5, 0.5, 1]], dtype=np.float32)
    assert np.asarray(open_rgb(Image.fromarray(values), 28, "squash"))[0, :, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_a_png_with_a_megabyte_of_text_is_read(kind, tmp_path):
    """Editors put their history and whole color profiles into a file. Pillow's limit is for bombs."""
    info = PngImagePlugin.PngInfo()
    if kind == "text":
        info.add_text("history", "edited " * 500_000, zip=True)
        info.add_itxt("XML:com.adobe.xmp", "<x/> " * 500_000, zip=True)
    more = {"icc_profile": random.Random(0).randbytes(1_500_000)} if kind == "profile" else {}
    pattern(60, 40).save(tmp_path / "x.png", pnginfo=info, **more)
    assert torch.equal(load_image(tmp_path / "x.png", for_clip(28, "pad")),
                       load_image(pattern(60, 40), for_clip(28, "pad")))


def test_a_photo_lying_on_its_side_is_put_upright(tmp_path):
    """Phones store the turn in EXIF; annotators saw the picture upright. The original did not turn it."""
    image, exif = pattern(60, 40), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    ours = load_image(tmp_path / "turned.png", for_clip(28, "crop"))
    assert torch.equal(ours, load_image(image.transpose(Image.Transpose.ROTATE_270), for_clip(28, "crop")))
    assert not torch.equal(ours, load_image(image, for_clip(28, "crop")))
    with open(tmp_path / "turned.png", "rb") as f:
        assert torch.equal(ours, load_image(f, for_clip(28, "crop")))


def test_a_picture_of_a_phone_with_two_frames(tmp_path):
    """MPO is a JPEG with a second picture inside; the list of allowed formats must not refuse it."""
    pattern(60, 40).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[pattern(60, 40)])
    assert load_image(tmp_path / "phone.jpg", for_clip(28, "pad")).shape == (3, 28, 28)


@pytest.mark.parametrize("name, problem", [
    ("truncated.jpg", "unreadable.*truncated"), ("empty.jpg", "unreadable"), ("page.jpg", "unreadable"),
    ("program.jpg", "unreadable"), ("folder.jpg", "unreadable"), ("bomb.png", "too large|bomb"),
    ("strip.png", "too large"), ("absent.jpg", "missing")])
def test_bad_pictures_are_named(zoo_images, name, problem):
    """One line with the file's name; a bomb is refused before it is decoded."""
    modes = ("crop", "pad") if name == "strip.png" else IMAGE_MODES        # squashed, a strip is harmless
    for mode in modes:
        with pytest.raises(ValueError, match=f"(?s){problem}") as e:
            load_image(zoo_images / name, for_clip(28, mode))
        assert name in str(e.value) and "\n" not in str(e.value)


def test_a_name_of_several_lines_is_one_line(tmp_path):
    """What a record calls a picture may be anything; an error stays one line, and moves no cursor."""
    name = "what?\n\x1b[2J<image>.jpg"
    (tmp_path / name).write_text("no picture")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(name, "no picture")
    for source in (tmp_path / name, tmp_path / "absent" / name):
        with pytest.raises((ValueError, OSError), match="what") as e:
            load_image(source, for_clip(28, "pad"))
        assert not set(str(e.value)) & set("\n\x1b")
    with pytest.raises(ValueError, match="what") as e:
        Pictures([tmp_path / "x.zip"]).open(name)
    assert not set(str(e.value)) & set("\n\x1b")


def test_odd_but_good_pictures_open(zoo_images):
    for name in ("gif.jpg", "cmyk.jpg", "deep.png", "palette.png", "thin.png"):
        assert load_image(zoo_images / name, for_clip(28, "pad")).shape == (3, 28, 28)
    assert load_image(zoo_images / "thin.png", for_clip(28, "crop")).shape == (3, 28, 28)


def test_addresses_are_refused():
    with pytest.raises(ValueError, match="download it"):
        load_image("http://127.0.0.1/x.jpg", for_clip(28, "pad"))

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


@pytest.mark.parametrize("question", [
    f"{IMAGE}\nWhat?", f"{IMAGE} What?", f"{IMAGE}What?", f"What?\n{IMAGE}", f" \n{IMAGE}\n What? ", f"What? {IMAGE} ",
    f"What is {IMAGE} here?", f"{IMAGE}\n{IMAGE}\nWhat?", f"{IMAGE}What?{IMAGE}", "What?", " What?", "What?\n", IMAGE])
def test_a_tag_in_a_question_is_read_alike_in_training_and_in_a_prompt(tiny, question):
    for image in ("x.jpg", None):
        ids, labels = encode(talk(question, "yes", image=image), tiny, "v0")
        asked = ids[:next(i for i, label in enumerate(labels) if label != IGNORE)]
        assert encode_prompt([question], tiny, image=image is not None) == asked


def test_an_answer_that_is_no_text_is_shown(tiny):
    """The message showed the beginning of the record, which ends before the answer in question."""
    for value in (5, None, ["a"]):
        record = talk("What is in this picture, and what would you say about it to somebody who cannot see?" * 3, "yes")
        record["conversations"][1]["value"] = value
        with pytest.raises(ValueError, match=re.escape(f"'value': {value!r}")):
            encode(record, tiny, "v0")
    for record in ({"value": "x"}, {"conversations": None}, {"conversations": [None]}, {"conversations": "x"}, []):
        with pytest.raises(ValueError, match="not a conversation"):
            encode(record, tiny, "v0")


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


def gpt2_like(folder: Path, n: int = 50256) -> dict[str, int]:
    """vocab.json and merges.txt with GPT-2's number of tokens -> Phi-2's added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"word{i}" for i in range(n - len(alphabet))] + [EOT]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    runs = [" " * i for i in range(31, 1, -1)] + ["\t" * i for i in range(9, 1, -1)]
    return {run: n + 1 + i for i, run in enumerate(runs)}


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "both"])
def test_added_tokens_stand_in_either_file(where, tmp_path):
    """Newer folders have them in tokenizer_config.json only. Without them every indent would get other ids."""
    added = gpt2_like(tmp_path)
    if where != "tokenizer_config.json":
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if where != "added_tokens.json":
        decoder = {str(i): {"content": text, "normalized": True, "special": False} for text, i in added.items()}
        decoder |= {"50256": {"content": EOT, "special": True}, "50295": {"content": IMAGE, "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tok = load_tokenizer(tmp_path)
    assert tok.encode(" " * 40 + "\t" * 9).ids == [50257, 50279, 50287]
    assert tok.token_to_id(IMAGE) is None and eot_id(tok) == 50256


@pytest.mark.parametrize("lacks", [None, " " * 2, "\t" * 2, "\t" * 9], ids=repr)
@pytest.mark.parametrize("form", ["older", "tokenizer.json"])
def test_a_vocabulary_without_phis_added_tokens_is_refused(lacks, form, tmp_path):
    added = gpt2_like(tmp_path)
    kept = [text for text in added if lacks and text != lacks]
    (tmp_path / "added_tokens.json").write_text(json.dumps({text: 50257 + i for i, text in enumerate(kept)}))
    if form == "tokenizer.json":
        tok = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
        tok.add_tokens(kept)
        tok.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="GPT-2's, without Phi-2's tokens for runs of spaces and tabs"):
        load_tokenizer(tmp_path)


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
    {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "added_tokens.json": '{"  ": 7}'},
    {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "added_tokens.json": '["  "]'},
    {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "tokenizer_config.json": '{"added_tokens_decoder": [1]}'},
    {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'}])
def test_bad_tokenizers_are_named(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def random_text(rng: random.Random) -> str:
    pieces = ["word", " ", "  ", "\n", "\n\n", "\t", "12", "3.5", "é", "这是", "🙂", "def f(x):\n    return x",
              IMAGE, EOT, "ASSISTANT:", " ASSISTANT: ", "USER: ", "</s>", "'s", "...", "\u200b",
              "\r\n", "\x00", "A", ":", "  \n "]
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
        x = model.embed(batch.ids, batch.images, batch.image_positions)
        h = model.llm(x, Packed(batch.lengths, batch.ids.device))
        return h.split(batch.lengths.tolist())

    with torch.no_grad():
        (a, _, c), (a_alone, c_alone) = hidden([first, stray, last]), hidden([first, last])
    torch.testing.assert_close(a, a_alone)
    torch.testing.assert_close(c, c_alone)


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios", "pictures", "image_path", "Image", "media",
                                 "img"])
def test_media_that_is_not_read_is_never_trained_as_text(key, tiny):
    """In the record or in a turn. What only describes a picture, or holds nothing, is no medium."""
    record = talk("what is this?", "a dog")
    for bad in (record | {key: "x.mp4"}, {"conversations": [record["conversations"][0] | {key: ["x"]},
                                                            record["conversations"][1]]}):
        for template in ("v0", "plain"):
            with pytest.raises(ValueError, match=f"media not read: .*'{key}'"):
                encode(bad, tiny, template)
    fine = record | {key: None, "image_id": 7, "image_size": [3, 4], "video_title": "", "source": "video", "audio": []}
    assert encode(fine, tiny, "v0") == encode(record, tiny, "v0")


def test_an_empty_answer_teaches_the_end(tiny):
    ids, labels = encode(talk("say nothing", "", "and now", "yes"), tiny, "v0")
    assert supervised_text(ids, labels, tiny) == f"{EOT} yes{EOT}"


@pytest.mark.parametrize("problem, record", [(k, r) for k, rs in BAD_RECORDS.items() for r in rs])
def test_malformed_records_are_named(problem, record, tiny):
    with pytest.raises(ValueError, match=problem):
        encode(record, tiny, "v0")


@pytest.mark.parametrize("problem, record", [(k, r) for k, rs in BAD_RECORDS.items() for r in rs])
def test_malformed_captions_are_named(problem, record, tiny):
    with pytest.raises(ValueError, match=problem + "|not a caption"):
        encode(record, tiny, "plain")


def test_half_a_character_is_named(tiny):
    """A terminal can send a lone surrogate; the tokenizer would only say that it wants a string."""
    half = json.loads('"\\ud800"')
    with pytest.raises(ValueError, match="broken unicode"):
        encode(talk(IMAGE, f"a dog {half}", image="x"), tiny, "plain")
    with pytest.raises(ValueError, match="broken unicode"):
        encode_prompt([f"what {half}?"], tiny, image=True)


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
    assert batch.image_positions.tolist() == [1, 2, 7, 8]
    assert batch.loss_positions.tolist() == [2, 3, 5, 8]
    assert batch.targets.tolist() == [6, 7, 9, 4]           # not 8: it opens a sample, nothing in that sample says it
    assert torch.equal(batch.images, torch.stack([image, image + 1])) and batch.images.dtype == torch.uint8
    empty = collate([Sample("", [3], [IGNORE], None)], image_size=2)
    assert empty.images.shape == (0, 3, 2, 2)
    assert empty.loss_positions.shape == empty.targets.shape == empty.image_positions.shape == (0,)
    numbers = [x for b in (batch, empty) for name, x in b._asdict().items() if name not in ("images", "split")]
    assert all(x.dtype == torch.int64 for x in numbers)
