"""Asking a model through lib/chat.py: pieces that add up, pictures in any form, sessions that recognize them."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import GOLDEN_ANSWER, expanded, pack, plain_answer
from PIL import Image

from data import IGNORE, encode, encode_turns, eot_id, expand
from lib.chat import Clock, answer, ask, check_choices, encode_chat, open_image, rank, token_bytes
from lib.generate import Session
from lib.records import pieces_of


@pytest.fixture
def towers(tiny_model):
    """How many pictures each call of the tower sees, from now on."""
    calls = []
    hook = tiny_model.vision.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


def text_of(session: Session, tok, turns: list[str], image, **options) -> str:
    return "".join(piece for [piece] in answer(session, tok, [turns], [image], **options))


def test_an_answer_is_the_sum_of_its_pieces(tiny_model, tiny_tokenizer, photo):
    session, clock = Session(tiny_model), Clock()
    said = text_of(session, tiny_tokenizer, ["What is this?"], photo, clock=clock, max_new_tokens=24)
    assert said == GOLDEN_ANSWER
    assert clock.steps == 24 and session.finish == ["length"]


def test_a_picture_opened_again_is_recognized(tiny_model, tiny_tokenizer, photo, towers):
    """As a path, and decoded again for the next turn: the tower runs once, the answer is that of a new session."""
    session = Session(tiny_model)
    first = text_of(session, tiny_tokenizer, ["What is this?"], photo, max_new_tokens=8)
    turns = ["What is this?", first, "Why?"]
    second = text_of(session, tiny_tokenizer, turns, Image.open(photo), max_new_tokens=8)
    assert towers == [1, 0]
    assert second == text_of(Session(tiny_model), tiny_tokenizer, turns, photo, max_new_tokens=8)


def test_an_answer_that_nobody_waits_for_leaves_the_session_usable(tiny_model, tiny_tokenizer, photo):
    session = Session(tiny_model)
    pieces = answer(session, tiny_tokenizer, [["What is this?"]], [photo], max_new_tokens=24)
    next(pieces)
    assert session.finish == [""]
    assert text_of(session, tiny_tokenizer, ["What is this?"], photo, max_new_tokens=24) == GOLDEN_ANSWER


def test_asking_about_several_pictures_is_asking_about_each(tiny_model, tiny_tokenizer, photo):
    pictures = [photo, Image.new("RGB", (40, 30), (9, 99, 199)), None]
    together = ask(tiny_model, tiny_tokenizer, "What is this?", pictures, max_new_tokens=8)
    apart = [ask(tiny_model, tiny_tokenizer, "What is this?", [picture], max_new_tokens=8)[0] for picture in pictures]
    assert together == apart
    with pytest.raises(ValueError, match="put it in brackets"):
        ask(tiny_model, tiny_tokenizer, "What is this?", photo)


@pytest.mark.parametrize("question", [
    "Which is older?", "<image>\n<image>\nWhich is older?", ["", "\n", "\nWhich is older?"],
    pieces_of([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is older?"}])[0]])
def test_several_pictures_in_one_question(question, tiny_model, tiny_tokenizer, photo):
    """However their places are written, the answer is that of the model without a cache, on the ids of training."""
    other = Image.new("RGB", (40, 30), (9, 99, 199))
    record = {"images": ["a", "b"], "messages": [{"role": "user", "content": "<image>\n<image>\nWhich is older?"},
                                                 {"role": "assistant", "content": "x"}]}
    ids, labels = encode(record, tiny_tokenizer, "v0")
    prompt = expanded([i for i, label in zip(ids, labels) if label == IGNORE])
    images = open_image([photo, other], tiny_model.config)
    want = plain_answer(tiny_model, prompt, images, 8, eot_id(tiny_tokenizer))
    session = Session(tiny_model)
    said = text_of(session, tiny_tokenizer, [question], [photo, other], max_new_tokens=8)
    assert said == tiny_tokenizer.decode(want, skip_special_tokens=True).strip()
    assert said == ask(tiny_model, tiny_tokenizer, question, [[photo, other]], max_new_tokens=8)[0]
    later = [question, said, "And now?"]
    assert (text_of(session, tiny_tokenizer, later, images, max_new_tokens=8)
            == text_of(Session(tiny_model), tiny_tokenizer, later, images, max_new_tokens=8))


def test_places_and_pictures_must_agree(tiny_model, tiny_tokenizer, photo):
    for question, images in (("<image>?", [photo, photo]), (["a", "b", "c"], [photo]), (["a", "b"], None)):
        with pytest.raises(ValueError, match="image places: expected as many"):
            text_of(Session(tiny_model), tiny_tokenizer, [question], images)


def test_a_prompt_that_fills_the_context_is_refused_before_any_generation(tiny_model, tiny_tokenizer):
    """The benchmarks and the server rely on it: whatever encode_chat returns leaves room for an answer."""
    config = tiny_model.config
    no_picture = open_image(None, config)
    n = len(encode_chat(config, tiny_tokenizer, ["Why?"], no_picture))
    one_left, none_left = (replace(config, llm=replace(config.llm, block_size=size)) for size in (n + 1, n))
    assert len(encode_chat(one_left, tiny_tokenizer, ["Why?"], no_picture)) == n
    with pytest.raises(ValueError, match=f"{n} of the model's {n} positions, which leaves 0"):
        encode_chat(none_left, tiny_tokenizer, ["Why?"], no_picture)


def test_pictures_are_uint8_of_the_models_size(tiny_model, photo):
    size = tiny_model.config.vision.image_size
    assert open_image(None, tiny_model.config).shape == (0, 3, size, size)
    opened = open_image(str(photo), tiny_model.config)
    assert opened.shape == (1, 3, size, size) and opened.dtype == torch.uint8
    assert open_image(opened, tiny_model.config) is opened


# ---------------------------------------------------------------------------------------------------
# How likely is an answer?


@pytest.mark.parametrize("picture", [True, False])
def test_ranked_choices_are_training_losses(tiny_model, tiny_tokenizer, photo, picture):
    """The sum is the loss that training would report for a conversation with this answer, its end included."""
    choices = ["cat", "a big dog, or two", "none of them", "3", "(b)", "é 猫", "Paris "]
    ranked = rank(tiny_model, tiny_tokenizer, "What is this?", photo if picture else None, choices)
    assert sorted(row["choice"] for row in ranked) == sorted(map(str.strip, choices))
    images = open_image(photo if picture else None, tiny_model.config)
    for row in ranked:
        turns = [["", "\nWhat is this?"] if picture else ["What is this?"], [row["choice"]]]
        ids, labels = expand(*encode_turns(turns, tiny_tokenizer), tiny_model.config.vision.n_patches, 2048)
        supervised = [i for i, label in enumerate(labels) if label != IGNORE]
        packed, lengths, image_positions = pack([ids])
        loss = tiny_model(packed, lengths, images, image_positions, torch.tensor(supervised) - 1,
                          torch.tensor([labels[i] for i in supervised]))
        assert len(row["tokens"]) == len(row["logprobs"]) == len(supervised)
        assert abs(row["sum"] + loss.item()) < 1e-5 * len(supervised)
        assert row["mean"] == pytest.approx(row["sum"] / len(supervised))
        assert row["tokens"][-1] == "<|endoftext|>"
    for kind in ("sum", "mean"):
        odds = [math.exp(row[kind]) for row in ranked]
        assert [row[f"p_{kind}"] for row in ranked] == pytest.approx([odd / sum(odds) for odd in odds])
    assert [row["sum"] for row in ranked] == sorted((row["sum"] for row in ranked), reverse=True)


@pytest.mark.parametrize("choices", [[], ["cat"], ["cat", " "], ["cat", "dog", " cat"]])
def test_choices_that_cannot_be_told_apart_are_refused(tiny_model, tiny_tokenizer, choices):
    with pytest.raises(ValueError, match="two or more choices, none empty and no two alike"):
        rank(tiny_model, tiny_tokenizer, "What is this?", None, choices)


def test_a_choice_must_fit_behind_the_prompt(tiny_model, tiny_tokenizer):
    """Its last token takes no position, since nothing is computed after it."""
    n = len(encode_chat(tiny_model.config, tiny_tokenizer, ["Why?"], open_image(None, tiny_model.config)))
    longest = len(tiny_tokenizer.encode(" none of them").ids)       # without the token that ends it
    model = copy.copy(tiny_model)
    for room in (longest, longest - 1):
        model.config = replace(tiny_model.config, llm=replace(tiny_model.config.llm, block_size=n + room))
        if room == longest:
            expected = rank(tiny_model, tiny_tokenizer, "Why?", None, ["cat", "none of them"])
            assert rank(model, tiny_tokenizer, "Why?", None, ["cat", "none of them"]) == expected
        else:
            with pytest.raises(ValueError, match=f"leaves {room} for an answer that takes at least {longest}"):
                rank(model, tiny_tokenizer, "Why?", None, ["cat", "none of them"])


def test_choices_come_from_a_list_or_a_file(tmp_path):
    (tmp_path / "choices.txt").write_text("red, or so\n\nblue\r\n", encoding="utf-8")
    assert check_choices(str(tmp_path / "choices.txt")) == ["red, or so", "blue"]
    assert check_choices("cat,dog,none of them") == ["cat", "dog", "none of them"]
    assert check_choices("long " * 1000 + ",x")[1] == "x"    # longer than any file's name may be


def test_the_bytes_of_tokens_add_up_to_the_text(tiny_tokenizer):
    """Also where a token holds half a character, or is one of Phi-2's runs of spaces."""
    text = "a cat's 猫 🐈\n\tx\x00é    if  x\u00ad"
    ids = tiny_tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(tiny_tokenizer, i) for i in ids).decode() == text
    assert token_bytes(tiny_tokenizer, 10 ** 6) == b""
