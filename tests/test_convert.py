"""`python data.py convert`: rows in the forms that public sets document become records that train like their originals.

Skipped where pyarrow is not installed: nothing else needs it.
"""
import importlib.util
import json
import re
import zipfile
from pathlib import Path

import pytest
from helpers import GOLDEN, TINY_MODEL, metrics, talk, train_flags
from training import train_here

import data
import lib.convert
from data import Dataset, ImageConfig, load_tokenizer
from lib.recipes import parse_data

if importlib.util.find_spec("pyarrow"):
    import pyarrow
    import pyarrow.parquet

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def convert(out: Path, *files: Path) -> int:
    return data.main(parse_data(["convert", "--data", *map(str, files), "--out", str(out)]))


def write(path: Path, rows: list[dict], group: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def picture(name: str, path: str | None = None) -> dict:
    """As the datasets library embeds one."""
    return {"bytes": (GOLDEN / "images" / name).read_bytes(), "path": path or name}


def pairs(record: dict) -> list[tuple[str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return [*zip(said[::2], said[1::2])]


def names(record: dict) -> list[str]:
    return [record["image"]] if "image" in record else []

# The columns and types of the sets' own cards. What is None is how the datasets library fills up a row.


def cauldron(record: dict) -> dict:
    """HuggingFaceM4/the_cauldron."""
    return {"images": [picture(name) for name in names(record)],
            "texts": [{"user": q, "assistant": a, "source": "VQAv2"} for q, a in pairs(record)]}


def fine_vision(record: dict) -> dict:
    """HuggingFaceM4/FineVision: each turn also has ratings."""
    ratings = {"relevance_ratings": [5] * len(pairs(record)), "relevance_min": 5, "image_correspondence_min": None}
    return {"images": [picture(name) for name in names(record)], "source": "a", **ratings,
            "texts": [{"user": q, "assistant": a} for q, a in pairs(record)]}


def one_vision(record: dict) -> dict:
    """lmms-lab/LLaVA-OneVision-Data and LLaVA-NeXT-Data."""
    return {"id": record["id"], "image": picture(record["image"]) if "image" in record else None,
            "conversations": record["conversations"], "data_source": "a"}


def vsft(record: dict) -> dict:
    """HuggingFaceH4/llava-instruct-mix-vsft: OpenAI's messages, with the pictures in a column of their own."""
    messages = []
    for i, (question, answer) in enumerate(pairs(record)):
        place = [{"index": 0, "text": None, "type": "image"}] * (i == 0 and "image" in record)
        messages += [{"role": "user", "content": [*place, {"index": None, "text": question, "type": "text"}]},
                     {"role": "assistant", "content": [{"index": None, "text": answer, "type": "text"}]}]
    return {"messages": messages, "images": [picture(name) for name in names(record)]}


FORMS = (cauldron, fine_vision, one_vision, vsft)


def samples(path: Path, images: Path) -> list:
    dataset = Dataset(path, images, load_tokenizer(TINY_MODEL), "v0", ImageConfig(28, "pad", (122, 116, 104), 4), 300)
    found = [dataset.sample(i) for i in range(len(dataset))]
    return [(s.ids, s.labels, None if s.image is None else s.image.tolist()) for s in found]


@needs_pyarrow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_the_same_samples(tmp_path, chat_json, form, capsys):
    records = json.loads(chat_json.read_text())
    files = [write(tmp_path / f"{i}.parquet", [form(record) for record in records[i::2]]) for i in range(2)]
    assert convert(tmp_path / "out", *files) == 0
    assert "24 rows: 24 records" in capsys.readouterr().out
    converted = samples(tmp_path / "out" / "records.jsonl", tmp_path / "out" / "images.zip")
    loose = samples(chat_json, GOLDEN / "images")
    assert converted == loose[::2] + loose[1::2]
    with zipfile.ZipFile(tmp_path / "out" / "images.zip") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == sum("image" in record for record in records)


@needs_pyarrow
def test_a_run_on_what_was_converted_has_the_same_metrics(tmp_path, chat_json):
    """Number for number over ten steps, as from the loose files."""
    rows = [one_vision(record) for record in json.loads(chat_json.read_text())]
    convert(tmp_path / "data", write(tmp_path / "a.parquet", rows))
    train_here(train_flags(tmp_path / "loose", chat_json, "--max-steps", "10"))
    flags = train_flags(tmp_path / "parquet", tmp_path / "data" / "records.jsonl", "--max-steps", "10")
    flags[flags.index("--images") + 1] = str(tmp_path / "data" / "images.zip")
    train_here(flags)
    assert metrics(tmp_path / "parquet") == metrics(tmp_path / "loose")


@needs_pyarrow
def test_pictures_of_texts_go_in_front_of_the_first_question(tmp_path):
    """All of them, and an <image> that somebody wrote there stays text."""
    row = {"images": [picture("wide.png"), picture("tall.png")], "texts": [{"user": "<image>?", "assistant": "Yes."}]}
    convert(tmp_path / "out", write(tmp_path / "a.parquet", [row]))
    wanted = tmp_path / "b.json"
    question = [{"type": "image", "image": "wide.png"}, {"type": "image", "image": "tall.png"},
                {"type": "text", "text": "<image>?"}]
    wanted.write_text(json.dumps([{"messages": [{"role": "user", "content": question},
                                                {"role": "assistant", "content": "Yes."}]}]))
    converted = samples(tmp_path / "out" / "records.jsonl", tmp_path / "out" / "images.zip")
    assert converted == samples(wanted, GOLDEN / "images")


@needs_pyarrow
def test_bad_rows_are_listed_and_the_rest_is_converted(tmp_path, capsys):
    good = {"images": [picture("photo.jpg")], "video": None, "image_path": "train/1.jpg",
            "texts": [{"user": "q", "assistant": "a"}]}
    bad = {
        "not a conversation: expected": good | {"texts": []},
        "not a conversation": good | {"texts": [{"user": "q", "assistant": None}]},
        "image unreadable": good | {"images": [{"bytes": b"junk", "path": "a.jpg"}]},
        "image without its bytes": good | {"images": [{"bytes": None, "path": "a.jpg"}]},
        "media not read": good | {"video": "a.mp4"},
        "image places": good | {"images": [{"bytes": None, "path": None}]},
    }
    files = [write(tmp_path / "a.parquet", [good]), write(tmp_path / "b.parquet", [good, *bad.values(), good])]
    assert convert(tmp_path / "out", *files) == 1
    out = capsys.readouterr().out
    assert "9 rows: 3 records" in out and "6 bad rows, listed in" in out
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in listed] == [(str(files[1]), 1 + i) for i in range(6)]
    for row, kind in zip(listed, bad, strict=True):
        assert kind in row["problem"]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["0", "1", "8"]


@needs_pyarrow
def test_text_that_is_not_utf8_spoils_only_its_row(tmp_path):
    table = pyarrow.Table.from_pylist([{"texts": [{"user": "q", "assistant": answer}]} for answer in "a#c"])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"\1\0\0\0#", b"\1\0\0\0\xff"))
    assert convert(tmp_path / "out", path) == 1
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 2


@needs_pyarrow
def test_a_killed_conversion_goes_on(tmp_path, chat_json, monkeypatch):
    """Wherever it was stopped, the output is that of a conversion in one go."""
    records = json.loads(chat_json.read_text())
    files = [write(tmp_path / f"{i}.parquet", [cauldron(record) for record in records[i::2]]) for i in range(2)]
    convert(tmp_path / "whole", *files)
    real = lib.convert.write_member
    for stop in (0, 1, 5, 9, 17):
        out, calls = tmp_path / f"stopped_{stop}", []

        def write_some(file, name, data):
            calls.append(name)
            real(file, name, data[:10] if len(calls) > stop else data)
            file.flush()
            if len(calls) > stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(lib.convert, "write_member", write_some)
        with pytest.raises(KeyboardInterrupt):
            convert(out, *files)
        monkeypatch.setattr(lib.convert, "write_member", real)
        assert convert(out, *files) == 0
        for name in ("records.jsonl", "images.zip", "bad_rows.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@needs_pyarrow
def test_what_is_done_is_not_done_again_and_other_files_are_refused(tmp_path, chat_json, monkeypatch):
    a, b = (write(tmp_path / f"{name}.parquet", [cauldron(talk("q", name))]) for name in "ab")
    convert(tmp_path / "out", a)
    monkeypatch.setattr(lib.convert, "convert_row", None)
    assert convert(tmp_path / "out", a) == 0
    with pytest.raises(ValueError, match="holds something else"):
        convert(tmp_path / "out", a, b)
    (tmp_path / "out" / "images.zip").unlink()
    with pytest.raises(ValueError, match="holds something else"):
        convert(tmp_path / "out", a)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.zip").write_bytes(b"precious")
    with pytest.raises(ValueError, match="choose another folder"):
        convert(tmp_path / "mine", a)
    assert (tmp_path / "mine" / "images.zip").read_bytes() == b"precious"


@needs_pyarrow
def test_files_that_are_not_such_parquet_files(tmp_path):
    whole = write(tmp_path / "a.parquet", [cauldron(talk("q", "a"))]).read_bytes()
    words = write(tmp_path / "words.parquet", [{"text": "a", "image": picture("photo.jpg")}])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole[:-20])
    for path, problem in ((cut, "not a parquet file, or is cut short"), (tmp_path / "a.jsonl", "not a parquet file"),
                          (words, "has the columns text, image; expected one of")):
        path.touch()
        with pytest.raises(ValueError, match=re.escape(problem)) as e:
            convert(tmp_path / "out", path)
        assert "\n" not in str(e.value)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.convert, "parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="pip install pyarrow"):
        convert(tmp_path / "out", tmp_path / "a.parquet")
