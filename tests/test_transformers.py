"""The saved folder read by transformers: logits, prompt ids, pixels and greedy text equal ours.

Skipped where transformers is not installed:

$ python -m venv .hf && .hf/bin/pip install -r requirements.txt transformers jinja2
$ .hf/bin/python -m pytest tests/test_transformers.py
"""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, TINY_CLIP, TINY_MIPHA, TINY_MODEL, TINY_PHI, siglip_folder
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data import IMAGE_ID, ImageConfig, encode_prompt, expand, load_image, load_tokenizer
from lib.folders import saved_shapes
from lib.generate import Session
from lib.save_weights import phi_json, saved_pieces, tower_json, write_json, write_tokenizer
from load_weights import export, load_model, merge
from model import LLaVAConfig, LLaVAPhi, Packed, PhiConfig, init_weights
from vision import SIGLIP_SO400M_384, normalize

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

TURNS = (["What is this?"], ["What is this?", "It is a dog.", "What breed?"],
         ["How many?", "7", "Where?", " left\n", "Why  is it so?"])


@pytest.fixture(scope="module", params=[TINY_MODEL, TINY_MIPHA], ids=["clip", "siglip"])
def folder(request, tmp_path_factory) -> Path:
    """The tiny LLaVA-Phi, or Mipha, in the saved format, with a head bias that cannot be overlooked."""
    out = tmp_path_factory.mktemp("hf") / "model"
    export(request.param, out, None)
    return out


@pytest.fixture(scope="module")
def ours(folder: Path) -> LLaVAPhi:
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return load_theirs(folder)


def load_theirs(folder: Path):
    """As a user of transformers would."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(folder: Path):
    return transformers.AutoProcessor.from_pretrained(folder)


def messages(turns: list[str]) -> list[dict]:
    """Turns (user, assistant, user, ...) as transformers wants them, the picture in the first."""
    chat = []
    for i, text in enumerate(turns):
        chat.append({"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]})
    chat[0]["content"].insert(0, {"type": "image"})
    return chat


def pixels_of(model: LLaVAPhi, name: str) -> torch.Tensor:
    """Our picture (3, S, S) for this model, not normalized yet."""
    config = model.config
    return load_image(GOLDEN / "images" / name, ImageConfig.of(config.vision, config.image_mode))


def prompt_of(model: LLaVAPhi, turns: list[str], tok: Tokenizer) -> list[int]:
    """Our ids of a question about a picture, IMAGE_ID at every patch position."""
    config = model.config
    ids, _ = expand(encode_prompt(list(turns), tok, True), None, config.vision.n_patches, config.llm.block_size)
    return ids


def logits(model: LLaVAPhi, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    """(T, V) of one packed prompt."""
    row = torch.tensor(ids)
    slots = (row == IMAGE_ID).nonzero().flatten()
    x = model.embed(row.clamp_min(0), images, slots)
    return model.llm.lm_head(model.llm(x, Packed(torch.tensor([len(ids)]), x.device)))


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", ["photo.jpg", "tall.png"])
@torch.no_grad()
def test_everything_equals_ours(folder, ours, theirs, processor, turns, name):
    tokenizer = load_tokenizer(folder)
    picture = pixels_of(ours, name)
    prompt = prompt_of(ours, turns, tokenizer)

    text = processor.apply_chat_template(messages(turns), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.open(GOLDEN / "images" / name).convert("RGB"), text=text, return_tensors="pt")
    image_id = theirs.config.image_token_index
    assert [IMAGE_ID if i == image_id else i for i in inputs["input_ids"][0].tolist()] == prompt
    tower = ours.config.vision
    assert torch.equal(inputs["pixel_values"], normalize(picture[None], tower.mean, tower.std))

    torch.testing.assert_close(theirs(**inputs).logits[0], logits(ours, prompt, picture[None]), atol=1e-4, rtol=0)
    made = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
    end = tokenizer.token_to_id("<|endoftext|>")
    answer = [row[0] for row in Session(ours).generate([prompt], [picture[None]], max_new_tokens=24, eos_id=end)]
    assert made[:len(answer)] == answer and made[len(answer):] in ([], [end])
    assert processor.decode(made, skip_special_tokens=True) == tokenizer.decode(answer)


@torch.no_grad()
def test_the_head_bias_is_folded_without_loss(folder, ours, theirs, tmp_path):
    """transformers' logits are those of the model with its bias, which are far from those without one."""
    export(folder_before(ours), tmp_path / "kept", None, fold=False)
    kept = load_model(tmp_path / "kept")
    bias = kept.llm.lm_head.bias
    assert bias.abs().max() > 0.1 and not ours.llm.lm_head.bias.any()
    picture, prompt = pixels_of(kept, "photo.jpg")[None], prompt_of(kept, TURNS[1], load_tokenizer(folder))
    expected = logits(kept, prompt, picture)
    ids = torch.tensor([theirs.config.image_token_index if i == IMAGE_ID else i for i in prompt])
    pixels = normalize(picture, kept.config.vision.mean, kept.config.vision.std)
    made = theirs(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones_like(ids)[None]).logits[0]
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)
    assert (made - (expected - bias)).abs().max() > 0.1


def folder_before(model: LLaVAPhi) -> Path:
    return TINY_MODEL if model.config.vision.class_token else TINY_MIPHA


@pytest.mark.parametrize("turns", TURNS)
def test_the_chat_template_takes_content_in_every_form(processor, turns):
    """A string or a list, a system message in either, pictures before or behind the text, with and without a prompt."""
    def render(chat: list[dict]) -> str:
        return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    as_lists = messages(turns)
    as_strings = [{"role": message["role"], "content": text} for message, text in zip(as_lists, turns, strict=True)]
    as_strings[0]["content"] = "<image>\n" + turns[0]
    assert render(as_strings) == render(as_lists)
    as_lists[0]["content"].reverse()
    assert render(as_strings) == render(as_lists)
    system = {"role": "system", "content": "Be brief."}
    system_list = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert render([system, *as_strings]) == render([system_list, *as_lists])
    assert render([system, *as_strings]).startswith("Be brief. USER: <image>\n" + turns[0])
    # llama.cpp's form of a picture. Its server makes one text of both, llama-cpp-python two; the name is random.
    marker, text = "<__media_Xy1__>", {"type": "text", "text": turns[0]}
    for content in (marker + turns[0], [{"type": "text", "text": marker}, text]):
        as_strings[0]["content"] = content
        assert render(as_strings).replace(marker, "<image>") == render(as_lists)


def test_vllm_sees_that_content_may_be_a_list(processor):
    """It looks for a loop over message['content'] inside a loop over messages."""
    jinja2 = pytest.importorskip("jinja2")
    loops = list(jinja2.Environment().parse(processor.chat_template).find_all(jinja2.nodes.For))
    parts = [loop for loop in loops if isinstance(loop.iter, jinja2.nodes.Getitem) and loop.iter.node.name == "message"
             and loop.iter.arg.value == "content"]
    assert parts and any(getattr(loop.iter, "name", "") == "messages" for loop in loops)


def test_nothing_is_missing_or_unexpected_but_the_bias(folder):
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("lm_head.bias" in name for name in info["unexpected_keys"])


def test_pixels_of_two_bases(tmp_path):
    """Before stage 1 a model sees pictures as its tower's own processor makes them: CLIP's crops, SigLIP's squashes.
    An exported tower's is that of the model it comes from."""
    export(TINY_MIPHA, tmp_path / "parts", None, "parts")
    siglip = siglip_folder("vision only", tmp_path / "siglip")
    for vision, mode in ((TINY_CLIP, "crop"), (siglip, "squash"), (tmp_path / "parts" / "siglip", "pad")):
        out = tmp_path / mode
        merge(TINY_PHI, vision, out, 0, None)
        model, processor = load_model(out), transformers.AutoProcessor.from_pretrained(out)
        picture = Image.open(GOLDEN / "images" / "wide.png").convert("RGB")
        pixels = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
        tower = model.config.vision
        assert model.config.image_mode == mode
        assert torch.equal(pixels, normalize(pixels_of(model, "wide.png")[None], tower.mean, tower.std))


def test_parts_are_plain_folders(tmp_path):
    ours = load_model(TINY_MODEL)
    export(TINY_MODEL, tmp_path / "parts", None, "parts")
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "parts" / "clip")
    transformers.CLIPImageProcessor.from_pretrained(tmp_path / "parts" / "clip")
    phi = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "phi-2")
    clip, info = transformers.CLIPVisionModel.from_pretrained(tmp_path / "parts" / "clip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(1, 60)
    x = ours.llm(ours.llm.wte(ids), Packed(torch.tensor([59]), ids.device))
    torch.testing.assert_close(phi(ids[None]).logits[0], ours.llm.lm_head(x), atol=1e-4, rtol=0)
    image = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    theirs = clip(normalize(image), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(theirs, ours.vision(image), atol=1e-4, rtol=0)


def test_siglip_as_a_plain_folder(tmp_path):
    """What export --to parts writes, transformers reads as SiglipVisionModel, without its pooling head."""
    export(TINY_MIPHA, tmp_path / "parts", None, "parts")
    folder = tmp_path / "parts" / "siglip"
    theirs, info = transformers.SiglipVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load_model(TINY_MIPHA)
    pixels = normalize(pixels_of(ours, "photo.jpg")[None], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    features = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, ours.vision(pixels_of(ours, "photo.jpg")[None]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_siglip_as_transformers_saves_it(whole, tmp_path):
    """The whole SiglipModel with its text tower, as google publishes it, and the vision tower without a prefix."""
    vision = {"hidden_size": 36, "intermediate_size": 116, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 33, "patch_size": 14}
    if whole:
        text = {"hidden_size": 36, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 64}
        theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        tower = theirs.vision_model
    else:
        theirs = tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    theirs.eval().save_pretrained(tmp_path / "siglip")
    merge(TINY_PHI, tmp_path / "siglip", tmp_path / "base", 0, None)
    ours = load_model(tmp_path / "base")
    picture = pixels_of(ours, "photo.jpg")[None]
    pixels = normalize(picture, ours.config.vision.mean, ours.config.vision.std)
    features = tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, ours.vision(picture), atol=1e-4, rtol=0)


@torch.no_grad()
def test_mipha_at_full_width(tmp_path):
    """Two layers of random weights at the published widths: 1152 and 2560, 384 pixels, 729 patches, 16 heads of 72."""
    tower = replace(SIGLIP_SO400M_384, n_layer=3)           # two of them are computed
    tokenizer = load_tokenizer(TINY_MIPHA)
    config = LLaVAConfig(llm=PhiConfig(vocab_size=512, n_layer=2), vision=tower)
    model = LLaVAPhi(config)
    init_weights(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or name.endswith(".pos"):
            torch.nn.init.normal_(parameter, std=0.02)      # zeros would hide a bias that is dropped
    save_at_full_width(tmp_path / "source", model, tokenizer)
    export(tmp_path / "source", tmp_path / "model", None)
    ours, theirs = load_model(tmp_path / "model"), load_theirs(tmp_path / "model")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    picture = pixels_of(ours, "photo.jpg")
    turns = ["What is this?"]
    prompt = prompt_of(ours, turns, tokenizer)
    text = processor.apply_chat_template(messages(turns), add_generation_prompt=True, tokenize=False)
    image = Image.open(GOLDEN / "images" / "photo.jpg").convert("RGB")
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert tower.n_patches == 729
    assert torch.equal(inputs["pixel_values"], normalize(picture[None], tower.mean, tower.std))
    torch.testing.assert_close(theirs(**inputs).logits[0], logits(ours, prompt, picture[None]), atol=1e-4, rtol=0)


def save_at_full_width(folder: Path, model: LLaVAPhi, tokenizer) -> None:
    """A Mipha folder with these weights; what the model does not hold (the last layer, the pooling head) is zero."""
    folder.mkdir()
    parameters, tensors = dict(model.named_parameters()), {}
    for name, shape in saved_shapes(model).items():
        tensor = parameters[name].detach() if name in parameters else torch.zeros(shape)
        tensors |= saved_pieces(name, tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text, vision = phi_json(model.config.llm, 0, "float32"), tower_json(model.config.vision)
    write_json(folder / "config.json", {"image_aspect_ratio": "pad", "text_config": text, "vision_config": vision})
    write_tokenizer(folder, tokenizer, image=False)
