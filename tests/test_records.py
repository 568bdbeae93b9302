"""Records in every form that people have: the same conversation is the same sample, and the same training run."""
import base64
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, IMAGES, conversations, metrics, talk, train_flags
from training import train_here
from zoo import open_dataset

from data import EOT, IGNORE, IMAGE, IMAGE_ID, SYSTEM, encode, encode_prompt, expand
from lib.records import NOTES, conversation_of

PHOTO = "photo.jpg"


def messages(*said: str | list, **more) -> dict:
    """A record of OpenAI's form: question, answer, ..."""
    return more | {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def picture(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": name}}


FORMS = {
    "llava": talk(f"{IMAGE}\nWhat is this?", "A dog.", "Sure?", "Yes.", image=PHOTO),
    "llava, tag at the end": talk(f"What is this?\n{IMAGE}", "A dog.", "Sure?", "Yes.", image=PHOTO),
    "images": talk(f"{IMAGE}\nWhat is this?", "A dog.", "Sure?", "Yes.", images=[PHOTO], image=None),
    "image and images": talk(f"{IMAGE}What is this?", "A dog.", "Sure?", "Yes.", images=[PHOTO], image=PHOTO),
    "images of objects": talk("What is this?", "A dog.", "Sure?", "Yes.", images=[{"path": PHOTO, "bytes": None}]),
    "sharegpt": {"images": [PHOTO], "conversations": [
        {"from": role, "value": value} for role, value in (
            ("gpt", "Hello!"), ("user", f"{IMAGE}\nWhat is this?"), ("assistant", "A dog."), ("human", "Sure?"),
            ("gpt", "Yes."))]},
    "messages with images": messages(f"{IMAGE}What is this?", "A dog.", "Sure?", "Yes.", images=[PHOTO]),
    "parts with url": messages([picture(PHOTO), text("What is this?")], "A dog.", "Sure?", "Yes."),
    "parts with path": messages([{"type": "image", "path": PHOTO, "text": None}, text("What is this?")],
                                [text("A dog.")], [text("Sure?")], [text("Yes.")]),
    "parts, picture last": messages([text("What is this?"), {"type": "image", "image": PHOTO}], "A dog.", "Sure?",
                                    "Yes."),
    "parts without names": messages([{"type": "image"}, text("What is this?")], "A dog.", "Sure?", "Yes.",
                                    images=PHOTO),
    "url as a string": messages([{"type": "image_url", "image_url": PHOTO}, text("What is this?")], "A dog.", "Sure?",
                                "Yes."),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_conversation_in_any_form_is_the_same_sample(form, tiny_tokenizer):
    assert conversation_of(FORMS[form]).images == [PHOTO]
    assert encode(FORMS[form], tiny_tokenizer, "v0") == encode(FORMS["llava"], tiny_tokenizer, "v0")


# As their own documentation writes them: OpenAI's guide to vision fine-tuning, ms-swift's to custom data sets,
# torchtune's ShareGPTToMessages, LLaMA-Factory's README of its data, TRL's data sets with vision.
PUBLIC = {
    "openai": ({"messages": [
        {"role": "system", "content": "You identify works of art."},
        {"role": "user", "content": "Describe this."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PHOTO, "detail": "low"}}]},
        {"role": "assistant", "content": "A dog."}]},
        ("(picture)\nYou identify works of art.\nDescribe this.", "A dog.")),
    "ms-swift": ({"messages": [
        {"role": "user", "content": "<image><image>What differs?"}, {"role": "assistant", "content": "The color."}],
        "images": [PHOTO, "wide.png"]}, ("(picture)(picture)What differs?", "The color.")),
    "torchtune": ({"image": PHOTO, "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."}]}, ("(picture)\nBe brief.\nWhat is it?", "A dog.")),
    "llama-factory": ({"conversations": [
        {"from": "human", "value": "<image>Who is that?"}, {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}], "system": "Be brief.", "tools": "",
        "images": [PHOTO]}, ("(picture)\nBe brief.\nWho is that?", "A dog.", "Sure?", "Yes.")),
    "trl": ({"images": [{"bytes": None, "path": PHOTO}], "messages": [
        {"role": "user", "content": [{"index": 0, "text": None, "type": "image"},
                                     {"index": None, "text": "What is it?", "type": "text"}]},
        {"role": "assistant", "content": [{"index": None, "text": "A dog.", "type": "text"}]}]},
        ("(picture)\nWhat is it?", "A dog.")),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_forms_that_others_document(name, tmp_path, tiny_tokenizer):
    record, want = PUBLIC[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    sample = open_dataset(path, tiny_tokenizer).sample(0)
    assert decoded(encode(record, tiny_tokenizer, "v0")[0], tiny_tokenizer) == v0(*want)
    assert sample.image.shape == ((2, 3, 28, 28) if want[0].count("(picture)") == 2 else (3, 28, 28))


def decoded(ids: list[int], tok) -> str:
    """The text of a sample, with (picture) for each image slot."""
    parts, run = [], []
    for i in [*ids, IMAGE_ID]:
        if i == IMAGE_ID:
            parts.append(tok.decode(run, skip_special_tokens=False))
            run = []
        else:
            run.append(i)
    return "(picture)".join(parts)


def v0(*said: str) -> str:
    pairs = [f"USER: {q} ASSISTANT:" + (f" {a}" if a else "") + EOT for q, a in zip(said[::2], said[1::2])]
    return f"{SYSTEM} " + "".join(pairs)


@pytest.mark.parametrize("said, want", [
    # The original: in every turn with a tag the tags are taken out, the text is stripped, and the tag goes in front.
    ((f"{IMAGE}\nq", "a", "r", "b"), ("(picture)\nq", "a", "r", "b")),
    (("q", "a", f"{IMAGE}\nr", "b"), ("q", "a", "(picture)\nr", "b")),
    (("q", "a", f" r \n{IMAGE} ", "b"), ("q", "a", "(picture)\nr", "b")),
    (("q", "a", IMAGE, "b"), ("q", "a", "(picture)", "b")),
    (("q", "a", f"see {IMAGE} here", "b"), ("q", "a", "(picture)\nsee  here", "b")),
    ((f"see {IMAGE} here", "a", f"r\n{IMAGE}", "b"), (f"see {IMAGE} here", "a", "(picture)\nr", "b")),
    # Texts that its rule would lose: they are what somebody wrote.
    (("q", f"{IMAGE} a", "r", "b"), ("(picture)\nq", f"{IMAGE} a", "r", "b")),
    ((f"x {IMAGE} y {IMAGE} z", "a"), (f"(picture)\nx {IMAGE} y {IMAGE} z", "a")),
])
def test_one_picture_is_in_front_of_its_own_question(said, want, tiny_tokenizer):
    """The original's rule; once, the picture went in front of the first question wherever its tag was."""
    ids, labels = encode(talk(*said, image=PHOTO), tiny_tokenizer, "v0")
    assert decoded(ids, tiny_tokenizer) == v0(*want)
    assert len(ids) == len(labels) and all(label in (i, IGNORE) for i, label in zip(ids, labels))
    answers = [i for i, label in zip(ids, labels) if label != IGNORE]
    assert tiny_tokenizer.decode(answers, skip_special_tokens=False) == "".join(f" {a}{EOT}" for a in want[1::2])


def test_a_prompt_obeys_the_rule_of_training(tiny_tokenizer):
    """A tag that somebody types with a picture is its place; without a picture it is text."""
    for said in (["q", "a", f"{IMAGE}\nr"], [f"q {IMAGE}", "a", "r"], [f"see {IMAGE} here"], ["q", "a", "r"],
                 ["", "a", "r"]):
        ids, _ = encode(talk(*said, "b", image=PHOTO), tiny_tokenizer, "v0")
        prompt = encode_prompt(said, tiny_tokenizer, True)
        assert ids[:len(prompt)] == prompt
        assert IMAGE_ID not in encode_prompt(said, tiny_tokenizer, False)
        more, n = [*said, f"b {IMAGE}", f"{IMAGE} {IMAGE}?"], 2 + (IMAGE in "".join(said))
        several, _ = encode(talk(*more, "c", images=["x"] * n), tiny_tokenizer, "v0")
        prompt = encode_prompt(more, tiny_tokenizer, n)
        assert several[:len(prompt)] == prompt


@pytest.mark.parametrize("record, want", [
    (talk(f"{IMAGE} and {IMAGE}\nsame?", "no", images=["a", "b"]), ("(picture) and (picture)\nsame?", "no")),
    (talk(f"first {IMAGE}", "a", f"now {IMAGE} ", "b", image=["a", "b"]),
     ("first (picture)", "a", "now (picture) ", "b")),
    (messages([picture("a"), picture("b"), text("same?")], "no"), ("(picture)\n(picture)\nsame?", "no")),
    (messages([text(f"a {IMAGE}"), picture("a")], "yes", [text("and"), picture("b"), text("?")], "no"),
     (f"a {IMAGE}\n(picture)", "yes", "and\n(picture)\n?", "no")),
])
def test_several_pictures_stay_where_they_stand(record, want, tiny_tokenizer):
    ids, _ = encode(record, tiny_tokenizer, "v0")
    assert decoded(ids, tiny_tokenizer) == v0(*want)
    assert conversation_of(record).images == ["a", "b"]


def test_a_text_without_pictures_keeps_its_tags(tiny_tokenizer):
    ids, _ = encode(messages(f"{IMAGE} q", "a"), tiny_tokenizer, "v0")
    assert decoded(ids, tiny_tokenizer) == v0(f"{IMAGE} q", "a")


@pytest.mark.parametrize("record, want", [
    ({"messages": [{"role": "system", "content": "Be brief."}, *messages("q", "a")["messages"]]},
     ("Be brief.\nq", "a")),
    (messages("q", "a", system="Be brief."), ("Be brief.\nq", "a")),
    ({"image": PHOTO, "conversations": [{"from": "system", "value": "Be brief."},
                                        *talk(f"{IMAGE}\nq", "a")["conversations"]]}, ("(picture)\nBe brief.\nq", "a")),
    ({"image": PHOTO, "conversations": [{"from": "system", "value": "Be brief."},
                                        *talk("q", "a", f"{IMAGE}\nr", "b")["conversations"]]},
     ("Be brief.\nq", "a", "(picture)\nr", "b")),
    ({"messages": [{"role": "developer", "content": "Be brief."},
                   *messages([picture("a"), picture("b"), text("q")], "a")["messages"]]},
     ("Be brief.\n(picture)\n(picture)\nq", "a")),
])
def test_a_system_prompt_goes_in_front_of_the_first_question(record, want, tiny_tokenizer):
    ids, _ = encode(record, tiny_tokenizer, "v0")
    assert decoded(ids, tiny_tokenizer) == v0(*want)


@pytest.mark.parametrize("record, problem", [
    (talk("q", "a", images=["a", "b"]), "image places: .* found 0 for 2"),
    (talk(f"{IMAGE} {IMAGE} {IMAGE}", "a", images=["a", "b"]), "image places: .* found 3 for 2"),
    (talk(f"{IMAGE} q", IMAGE, images=["a", "b"]), "image places: .* found 1 for 2"),
    (messages([{"type": "image"}, text("q")], "a"), "image places: 1 pictures in the messages have no name"),
    (messages([picture("a"), text("q")], "a", images=["b"]), "image places: 0 pictures .* the record names 1"),
    (messages([picture("a"), {"type": "image"}, text("q")], "a", images=["b", "c"]), "image places: 1 pictures"),
    (messages("q", [picture("a"), text("a")]), "image places: a picture in the words of assistant"),
    (talk("q", "a", image="a", images=["b"]), "image name: expected a path"),
    (talk("q", "a", images=[3]), "image name: expected a path"),
    (talk("q", "a", images=[{"bytes": "abc"}]), "image name: expected a path"),
    (messages([{"type": "video", "video": "x"}, text("q")], "a"), "media not read: a part of type 'video'"),
    (messages([{"type": "input_audio"}, text("q")], "a"), "media not read: a part of type 'input_audio'"),
    (messages("q", None), "not a conversation"), (messages([], "a"), "not a conversation"),
    (messages([text(3)], "a"), "not a conversation"), (messages(["q"], "a"), "not a conversation"),
    (messages("q", "a", "r"), "no answer"), ({"messages": []}, "no answer"),
    ({"messages": [{"role": "user", "content": "q", "images": ["x"]}, {"role": "assistant", "content": "a"}]},
     "media not read: the record has 'images'"),
    ({"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]},
     "wrong speaker: .*'tool'"),
])
def test_what_is_not_read_is_named(record, problem, tiny_tokenizer):
    for template in ("v0", "plain"):
        with pytest.raises(ValueError, match=problem):
            encode(record, tiny_tokenizer, template)


def test_positions_of_several_pictures_are_counted(tiny_tokenizer, tmp_path):
    """A picture that would be cut makes the sample bad; two whole ones and all text fit, as at the published sizes."""
    ids = [1, IMAGE_ID, 2, IMAGE_ID, 3, 4]
    assert expand(ids, None, 3, 10) == ([1, *[IMAGE_ID] * 3, 2, *[IMAGE_ID] * 3, 3, 4], None)
    assert expand(ids, ids, 3, 8)[0] == [1, *[IMAGE_ID] * 3, 2, *[IMAGE_ID] * 3]
    with pytest.raises(ValueError, match="image does not fit: the last one ends at position 8 of 7"):
        expand(ids, ids, 3, 7)
    record = messages([picture("wide.png"), picture("tall.png"), text("same?")], "no")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(talk("q", "a")))
    dataset = open_dataset(path, tiny_tokenizer)
    assert dataset.index.image.tolist() == [2, 0]
    sample = dataset.sample(0)
    assert sample.image.shape == (2, 3, 28, 28) and sample.ids.count(IMAGE_ID) == 8
    assert len(sample.ids) == dataset.index.length[0] == 8 + len(encode(record, tiny_tokenizer, "v0")[0]) - 2
    for i, name in enumerate(("wide.png", "tall.png")):
        alone = tmp_path / f"{i}.jsonl"
        alone.write_text(json.dumps(talk("q", "a", image=name)))
        assert torch.equal(open_dataset(alone, tiny_tokenizer).sample(0).image, sample.image[i])


@pytest.mark.parametrize("record, notes", [
    (talk(f"{IMAGE}\nq", "a", image="x"), []), (talk("q", "a"), []), (talk("q", "a", f"{IMAGE}r", "b", image="x"), []),
    (talk(f"q {IMAGE} r", "b", image="x"), []), (talk(f"{IMAGE} {IMAGE}", "b", image=["x", "y"]), []),
    (messages([picture("x"), text("q")], "a"), []),
    (talk("q", "", image="x"), [0, 1]), (talk(f"{IMAGE} q", f"{IMAGE}", image="x"), [2]), (talk(IMAGE, "a"), [2]),
    (messages([picture("x"), text(IMAGE)], "a"), [2]), (talk("q", "a", image="x", system=IMAGE), [1, 2]),
    (talk("q" * 100_001, "a"), [3])])
def test_notes(record, notes):
    assert [bit for bit in range(len(NOTES)) if conversation_of(record).notes >> bit & 1] == notes


# ---------------------------------------------------------------------------------------------------
# Training


def as_messages(record: dict) -> dict:
    said = [turn["value"].removeprefix(f"{IMAGE}\n") for turn in record["conversations"]]
    first = [picture(record["image"]), text(said[0])] if "image" in record else said[0]
    return messages(first, *said[1:], id=record["id"])


def as_images_list(record: dict) -> dict:
    said = [turn["value"] for turn in record["conversations"]]
    return messages(*said, id=record["id"], images=[record["image"]] if "image" in record else [])


def as_data_address(record: dict) -> dict:
    if "image" not in record:
        return record
    raw = (GOLDEN / "images" / record["image"]).read_bytes()
    return record | {"image": "data:image/x;base64," + base64.b64encode(raw).decode()}


def write_archive(path: Path) -> Path:
    images = [GOLDEN / "images" / name for name in IMAGES]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for image in images[:4]:
                file.write(image, image.name)
            file.compression = zipfile.ZIP_STORED
            for image in images[4:]:
                file.write(image, image.name)
    else:
        with tarfile.open(path, "w") as file:
            for image in images:
                file.add(image, image.name)
    return path


def test_every_form_and_every_place_gives_the_same_run(tmp_path):
    """Ten steps, number for number: LLaVA's json, messages, a list of images, pictures in the records; from a folder, a
    zip and a tar, with data workers, too."""
    runs = {"llava": (dict, GOLDEN / "images"), "messages": (as_messages, GOLDEN / "images"),
            "images-list": (as_images_list, tmp_path / "x.zip"), "addresses": (as_data_address, tmp_path),
            "zip": (dict, tmp_path / "x.zip"), "tar": (as_messages, tmp_path / "x.tar")}
    for name in ("x.zip", "x.tar"):
        write_archive(tmp_path / name)
    for name, (form, images) in runs.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([form(record) for record in conversations()]))
        workers = ["--workers", "1"] if name == "zip" else []
        train_here(train_flags(tmp_path / f"out {name}", path, "--images", str(images), "--max-steps", "10",
                               "--epochs", "2", *workers))
    first = metrics(tmp_path / "out llava")
    assert len(first) == 10 and sum(line["images"] for line in first) > 20
    for name in runs:
        assert metrics(tmp_path / f"out {name}") == first, name


def test_training_says_what_the_check_says(tmp_path, capsys):
    """Counts of every note, a line each; a run that could learn nothing does not begin."""
    path = tmp_path / "data.json"
    records = [talk("q", "", id="a"), talk(IMAGE, "a", id="b"), talk(IMAGE, "b", id="c"),
               talk("q", "word " * 3000, id="d"), talk("why " * 3000, "because", id="e"),
               talk("q", "a", image=PHOTO, id="f")]
    path.write_text(json.dumps(records))
    train_here(train_flags(tmp_path / "out", path, "--max-steps", "1"))
    out = capsys.readouterr().out
    for line in ("6 samples, 1 with an image", "2 cut at 2048, 1 without anything to learn",
                 "note: 1 sample: empty answer", "note: 2 samples: <image> that stays text",
                 "note: 1 sample: no <image> where a question begins or ends"):
        assert line in out, out
    path.write_text(json.dumps(records[4:5]))
    with pytest.raises(ValueError, match="nothing to learn in its 1 sample; python data.py check"):
        train_here(train_flags(tmp_path / "nothing", path, "--max-steps", "1"))
