"""`python data.py show`: what the page calls learned is what training learns, and no record acts on the page."""
import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDEN, TINY_MODEL, talk
from PIL import Image

import data
import lib.show
from data import SYSTEM, ImageConfig, load_image
from lib.recipes import parse_data

SIZES = "--n-patches 4 --image-size 28 --max-length 300".split()


class Page(HTMLParser):
    """A page's samples: for each, the (class, text) of its tokens, its pictures, and all its text."""

    def __init__(self, text: str):
        super().__init__()
        self.samples, self.tags, self.kind = [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        if tag == "div" and attrs.get("class") == "sample":
            self.samples.append({"tokens": [], "pictures": [], "text": ""})
        elif tag == "span" and self.samples:
            self.kind = attrs["class"]
            self.samples[-1]["tokens"].append([self.kind, ""])
        elif tag == "img":
            png = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
            self.samples[-1]["pictures"].append(np.asarray(Image.open(io.BytesIO(png))))

    def handle_endtag(self, tag):
        self.kind = None if tag == "span" else self.kind

    def handle_data(self, text):
        if self.samples:
            self.samples[-1]["text"] += text
            if self.kind is not None:
                self.samples[-1]["tokens"][-1][1] += text


def show(tmp_path: Path, records: list[dict], *more: str) -> Page:
    path, out = tmp_path / "data.json", tmp_path / "show.html"
    path.write_text(json.dumps(records))
    data.main(parse_data(["show", "--data", str(path), "--images", str(GOLDEN / "images"), "--out", str(out),
                          "--tokenizer", str(TINY_MODEL), *SIZES, *more]))
    return Page(out.read_text())


def text_of(sample: dict, *kinds: str) -> str:
    return "".join(text for kind, text in sample["tokens"] if kind in kinds).replace("\u21b5\n", "\n")


QUESTION, ANSWER = "What is <|endoftext|> USER: <b>here</b>?", "Zwölf\n\nÄpfel 🍎, 日本 ASSISTANT:"


def test_learned_are_the_answers_and_their_ends(tmp_path):
    """Whatever is written in them, and the template's words are only those that the template wrote."""
    record = talk(f"<image>\n{QUESTION}", ANSWER, "And <image>?", "", id="a", image="photo.jpg")
    [sample] = show(tmp_path, [record]).samples
    assert text_of(sample, "learned") == f" {ANSWER}<|endoftext|><|endoftext|>"
    assert text_of(sample, "") == f"\n{QUESTION} And <image>?"
    assert text_of(sample, "template") == f"{SYSTEM} USER:  ASSISTANT:USER: ASSISTANT:"
    assert text_of(sample, "image") == "image 1: 4 positions" and text_of(sample, "cut") == ""
    assert "note: empty answer" in sample["text"] and "note: <image> that stays text" in sample["text"]


def test_the_page_shows_what_collate_returns(tmp_path, monkeypatch):
    """So labels that are shifted by one, the fault that people look for, would be seen."""
    real = data.collate

    def shifted(samples):
        batch = real(samples)
        return batch._replace(loss_positions=batch.loss_positions - 1)

    monkeypatch.setattr(lib.show, "collate", shifted)
    [sample] = show(tmp_path, [talk("Color?", "red")]).samples
    assert text_of(sample, "learned") == ": red"


def test_a_picture_is_the_one_that_the_model_gets(tmp_path):
    records = [talk("<image>\n<image>\nWider?", "No.", images=["wide.png", "tall.png"])]
    for mode in ("crop", "pad", "squash"):
        [sample] = show(tmp_path, records, "--image-mode", mode).samples
        config = ImageConfig(28, mode, (122, 116, 104), 4)
        for shown, name in zip(sample["pictures"], records[0]["images"], strict=True):
            assert np.array_equal(shown, load_image(GOLDEN / "images" / name, config).permute(1, 2, 0).numpy())
        assert text_of(sample, "image") == "image 1: 4 positionsimage 2: 4 positions"


def test_what_is_cut_is_struck_out(tmp_path):
    [sample] = show(tmp_path, [talk("Count.", "one two three four", id="c")], "--max-length", "46").samples
    learned, cut = text_of(sample, "learned"), text_of(sample, "cut")
    assert learned + cut == " one two three four<|endoftext|>" and learned and cut
    assert "46 positions" in sample["text"]


def test_a_caption_has_no_template(tmp_path):
    [sample] = show(tmp_path, [talk("<image>\nDescribe.", "A cat.", image="photo.jpg")], "--stage", "pretrain").samples
    assert [kind for kind, _ in sample["tokens"][:1]] == ["image"] and text_of(sample, "learned") == "A cat.\n"
    assert text_of(sample, "template", "", "cut") == ""


def test_a_bad_sample_is_shown_with_its_problem(tmp_path):
    bad = {
        "media not read": talk("q", "a", video="v.mp4"),
        "image outside the folder": talk("q", "a", image="../x.jpg"),
        "not a conversation": {"id": "<script>alert(1)</script>"},
        "nothing to learn: no answer in the first 60 positions": talk("Why? " * 30, "a"),
        "image does not fit": talk("<image>\nq\n" * 9, "a", images=["photo.jpg"] * 9),
    }
    page = show(tmp_path, list(bad.values()), "--max-length", "60")
    assert all(problem in sample["text"] for problem, sample in zip(bad, page.samples, strict=True))
    assert "script" not in page.tags


def test_which_samples(tmp_path):
    records = [talk(f"Question {i}?", "yes", id=i) for i in range(100)]
    texts = [sample["text"] for sample in show(tmp_path, records, "--n", "3").samples]
    assert [text.split(",")[0] for text in texts] == ["0", "49", "99"]
    texts = [sample["text"] for sample in show(tmp_path, records, "--ids", "98", "7").samples]
    assert [text.split(",")[0] for text in texts] == ["7", "98"]
    with pytest.raises(ValueError, match="no record with the id 100, x in .*data.json"):
        show(tmp_path, records, "--ids", "x", "7", "100")
