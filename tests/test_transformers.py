"""The saved folder read by transformers: logits, prompt ids, pixels and greedy text equal ours. Skipped where it is not installed.

$ python -m venv .hf && .hf/bin/pip install -r requirements.txt transformers jinja2
$ .hf/bin/python -m pytest tests/test_transformers.py
"""
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import expand, encode_prompt, load_image, load_tokenizer
from load_weights import export, load_model, merge
from model import IMAGE_ID, Layout, LLaVAPhi
from vision import normalize

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent / "golden"
TURNS = (["What is this?"], ["What is this?", "It is a dog.", "What breed?"], ["How many?", "7", "Where?", " left\n", "Why  is it so?"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny LLaVA-Phi in the saved format, with a head bias that cannot be overlooked."""
    out = tmp_path_factory.mktemp("hf") / "model"
    export(GOLDEN / "tiny-llava-phi", out, None)
    return out


@pytest.fixture(scope="module")
def ours(folder: Path) -> LLaVAPhi:
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    spec = importlib.util.spec_from_file_location("load_hf", folder / "load_hf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(folder: Path):
    return transformers.AutoProcessor.from_pretrained(folder)


def messages(turns: list[str]) -> list[dict]:
    """Turns (user, assistant, user, ...) as transformers wants them, the picture in the first."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(turns)]
    chat[0]["content"].insert(0, {"type": "image"})
    return chat


def logits(model: LLaVAPhi, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    """(T, V) of one packed prompt."""
    row = torch.tensor(ids)
    slots = (row == IMAGE_ID).nonzero().flatten()
    x = model.embed(row.clamp_min(0), images, slots)
    return model.llm.lm_head(model.llm(x, Layout(torch.tensor([len(ids)]), x.device)))


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", ["photo.jpg", "tall.png"])
@torch.no_grad()
def test_everything_equals_ours(folder, ours, theirs, processor, turns, name):
    tokenizer = load_tokenizer(folder)
    picture = load_image(GOLDEN / "images" / name, 28, "pad")
    prompt, _ = expand(encode_prompt(list(turns), tokenizer, True), None, ours.config.vision.n_patches, ours.config.llm.block_size)

    text = processor.apply_chat_template(messages(turns), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.open(GOLDEN / "images" / name).convert("RGB"), text=text, return_tensors="pt")
    image_id = theirs.config.image_token_index
    assert [IMAGE_ID if i == image_id else i for i in inputs["input_ids"][0].tolist()] == prompt
    assert torch.equal(inputs["pixel_values"], normalize(picture[None]))

    torch.testing.assert_close(theirs(**inputs).logits[0], logits(ours, prompt, picture[None]), atol=1e-4, rtol=0)
    made = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
    end = tokenizer.token_to_id("<|endoftext|>")
    answer = [row[0] for row in ours.generate([prompt], [picture[None]], max_new_tokens=24, eos_id=end)]
    assert made[:len(answer)] == answer and made[len(answer):] in ([], [end])
    assert processor.decode(made, skip_special_tokens=True) == tokenizer.decode(answer)


def test_the_head_bias_is_what_load_hf_is_for(folder, ours, theirs):
    assert theirs.get_output_embeddings().bias.abs().max() > 0
    assert torch.equal(theirs.get_output_embeddings().bias, ours.llm.lm_head.bias)


def test_nothing_is_missing_or_unexpected_but_the_bias(folder):
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("lm_head.bias" in name for name in info["unexpected_keys"])


def test_crop_mode_pixels(tmp_path):
    merge(GOLDEN / "tiny-phi", GOLDEN / "tiny-clip", tmp_path / "base", 0, None)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "base")
    picture = Image.open(GOLDEN / "images" / "wide.png").convert("RGB")
    pixels = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, normalize(load_image(GOLDEN / "images" / "wide.png", 28, "crop")[None]))


def test_parts_are_plain_folders(tmp_path, ours):
    from load_weights import export_parts
    export_parts(GOLDEN / "tiny-llava-phi", tmp_path / "parts", None)
    phi = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "phi-2")
    clip = transformers.CLIPVisionModel.from_pretrained(tmp_path / "parts" / "clip")
    ids = torch.arange(1, 60)
    x = ours.llm(ours.llm.wte(ids), Layout(torch.tensor([59]), ids.device))
    torch.testing.assert_close(phi(ids[None]).logits[0], ours.llm.lm_head(x), atol=1e-4, rtol=0)
    image = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    theirs = clip(normalize(image), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(theirs, ours.vision(image), atol=1e-4, rtol=0)
