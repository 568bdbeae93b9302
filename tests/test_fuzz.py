"""Files and requests from strangers, mutated by the thousand from fixed seeds. `make fuzz` runs these campaigns.

Whatever arrives, the answer is a result, or one line of error and exit code 2 (over HTTP: a status of 4xx). Never a
traceback, a hang or a memory that runs full: a case may take 5 seconds of processor time, and a campaign so many more
bytes than it began with.
A failure names campaign, seed and number of the case, and gives the same case when it is run again.
"""
import base64
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_weights_command, pattern, talk
from PIL import Image, PngImagePlugin
from tiny_benchmarks import CASES, evaluate, llava_file, prepare
from training import train_here
from zoo import projector_file

import data
import eval as ev
import load_weights
import serve.server
from data import Dataset, ImageConfig, Loader, load_image, load_tokenizer
from lib.archives import Pictures
from lib.common import remove, run_command
from lib.generate import Session
from lib.pictures import open_rgb
from lib.recipes import parse_data
from lib.records import parse_record
from serve.server import Server

GOLDEN = ROOT / "tests/golden"
TINY = GOLDEN / "tiny-llava-phi"
CPU_SECONDS = 5
WALL_SECONDS = 60               # for what waits without computing; other programs may keep this machine busy

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(TINY)

# ---------------------------------------------------------------------------------------------------
# Running a case


class Hang(BaseException):
    """Not an Exception: no handler in the program may take it for a bad file."""


def stop(number, frame):
    raise Hang(f"more than {CPU_SECONDS} s of processor time, or {WALL_SECONDS} s in all")


def peak_memory() -> int:
    """Bytes that this process had at most since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> int:
    """Begin a new count -> bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def outcome(case: Callable[[], object]) -> str:
    """Run a case as a command would -> "fine" or "refused". Anything else is raised, with what was printed."""
    stderr = io.StringIO()
    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            code = run_command(lambda: case() and 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if code == 0:
        return "fine"
    error, *more = stderr.getvalue().splitlines()
    assert code == 2 and error.startswith("error: "), f"code {code}: {stderr.getvalue()!r}"
    # A list may follow the line: train.py names every setting that differs from a checkpoint's.
    assert all(line.startswith("  ") for line in more), f"more than one line: {stderr.getvalue()!r}"
    return "refused"


def campaign(name: str, n: int, memory: int, make_case: Callable[[random.Random], Callable[[], object]],
             capsys) -> Counter:
    """n cases, each from a seed of its own. AssertionError lists the first of those that went wrong."""
    begin = reset_peak()
    counts = Counter()
    failures = []
    for i in range(n):
        case = make_case(random.Random(f"{name} {i}"))
        try:
            counts[outcome(case)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as e:          # torch's CheckpointException is no Exception either
            failures.append(f"case {i}: {type(e).__name__}: {str(e)[:300]}")
    grown = peak_memory() - begin
    with capsys.disabled():
        print(f"\n{name}: {n:,} cases, {counts['fine']:,} fine, {counts['refused']:,} refused, "
              f"{len(failures)} wrong, {grown / 1e6:.0f} MB")
    assert not failures, f"{name}: {len(failures)} of {n} cases went wrong:\n" + "\n".join(failures[:20])
    assert grown < memory, f"{name}: memory grew by {grown:,} bytes, at most {memory:,} were expected"
    return counts

# ---------------------------------------------------------------------------------------------------
# Mutations


ODD_NUMBERS = (0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff)


def mutate_bytes(good: bytes, rng: random.Random) -> bytes:
    """One to eight changes of the kinds that disks, networks and attackers make."""
    changed = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            break
        # Headers decide the most and are short, so half of the changes go to the beginning.
        start = rng.randrange(min(len(changed), 256) if rng.random() < 0.5 else len(changed))
        length = rng.choice((1, 4, 16, 1000))
        kind = rng.randrange(7)
        if kind == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[start] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 2:
            order = rng.choice("<>")
            changed[start:start + 4] = struct.pack(order + "I", rng.choice(ODD_NUMBERS))
        elif kind == 3:
            del changed[start:]
        elif kind == 4:
            del changed[start:start + length]
        elif kind == 5:
            changed[start:start] = changed[start:start + length]
        else:
            changed[start:start + length] = rng.randbytes(length)
    return bytes(changed)


ODD_VALUES = (None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e308, 2**31, 2**63, 10**30, "", "x", "\ud800", "\0",
              "9" * 5000, "../../x", "/etc/passwd", "<image>", "<|endoftext|>", [], {}, [[]], [None], {"": {}},
              [0] * 1000, float("nan"), float("inf"))


def places_in(value) -> list[tuple]:
    """(container, key) of everything inside a json value."""
    found = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    elif isinstance(value, list):
        found += [(value, i) for i in range(len(value))]
    for container, key in list(found):
        found += places_in(container[key])
    return found


def mutate_json(good, rng: random.Random):
    """One to four changes of values, names or structure; the result is valid json but for a NaN."""
    value = copy.deepcopy(good)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = places_in(value)
        if not places:
            return rng.choice(ODD_VALUES)
        container, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container[key], int):
            container[key] = container[key] * rng.choice((-1, 0, 2, 3, 1000, 10**9)) + rng.choice((-1, 0, 1))
        elif kind == 2 and isinstance(container, dict):
            container[key + rng.choice(("x", " ", "\0", ".weight"))] = container.pop(key)
        elif kind == 3:
            other, its_key = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):         # a change before this one may have removed it
                container[key] = copy.deepcopy(other[its_key])
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def to_json(value) -> bytes:
    return json.dumps(value).encode()

# ---------------------------------------------------------------------------------------------------
# Pictures


def test_pictures(capsys):
    """Every format and some odd kinds of each, opened in all three ways."""
    seeds = [path.read_bytes() for path in sorted((GOLDEN / "images").iterdir()) if path.stat().st_size < 100_000]
    for form, pil_mode in (("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("JPEG", "CMYK"), ("PNG", "I;16"),
                           ("PNG", "LA"), ("BMP", "1"), ("MPO", "RGB"), ("TIFF", "RGB")):
        image = pattern(60, 40)
        image = image.convert("L").convert("I").convert(pil_mode) if pil_mode == "I;16" else image.convert(pil_mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        image.save(file, form, **({} if form == "BMP" else {"exif": exif}))
        seeds.append(file.getvalue())

    def make_case(rng: random.Random) -> Callable:
        picture = mutate_bytes(rng.choice(seeds), rng)
        mode = rng.choice(data.IMAGE_MODES)

        def case() -> None:
            image = load_image(io.BytesIO(picture), ImageConfig(28, mode, (122, 116, 104), 4))
            assert image.shape == (3, 28, 28) and image.dtype == torch.uint8
        return case

    counts = campaign("pictures", 6000, 1_200_000_000, make_case, capsys)
    assert min(counts["fine"], counts["refused"]) > 500



@pytest.mark.filterwarnings("ignore")
def test_exif(capsys):
    """Good pixels behind mutated EXIF data, as an EXIF chunk or an old raw profile: always read, the right way up."""
    image = pattern(60, 40)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010e: "a photo", 0x011a: 72.0, 0x0132: "2026:01:01 00:00:00", 0x0213: 1})
    exif.get_ifd(0x8769).update({0x829a: 0.01, 0x9286: b"ASCII\0\0\0x", 0xa002: 60})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    good = exif.tobytes()
    turns = [None, *Image.Transpose]
    possible = [load_image(image if turn is None else image.transpose(turn), ImageConfig(28, "pad", (0, 0, 0), 4))
                for turn in turns]

    def make_case(rng: random.Random) -> Callable:
        mutated = mutate_bytes(good, rng)
        form = rng.choice(("PNG", "JPEG", "WEBP", "MPO"))
        file = io.BytesIO()
        if form == "PNG" and rng.random() < 0.5:
            raw = rng.choice((mutated.hex(), mutate_bytes(mutated.hex().encode(), rng).decode("latin-1")))
            info = PngImagePlugin.PngInfo()
            info.add_text("Raw profile type exif", f"\nexif\n{len(mutated):8}\n{raw}", zip=rng.random() < 0.5)
            image.save(file, form, pnginfo=info)
        else:
            image.save(file, form, exif=mutated[:65_000], **({"lossless": True} if form == "WEBP" else {}))

        def case() -> None:
            pixels = load_image(io.BytesIO(file.getvalue()), ImageConfig(28, "pad", (0, 0, 0), 4))
            if form in ("PNG", "WEBP"):
                assert any(torch.equal(pixels, other) for other in possible)
        return case

    counts = campaign("exif", 6000, 300_000_000, make_case, capsys)
    assert counts["refused"] == 0

# ---------------------------------------------------------------------------------------------------
# Records


RECORDS = [
    talk("<image>\nwhat is this?", "a dog", "sure?", "yes", id="a", image="photo.jpg"),
    talk("<image>", "a caption", id="b", image="square.png"),
    talk("who wrote Faust?", "Goethe", id=7),
    {"id": "c", "image": "tall.png", "conversations": [{"from": "gpt", "value": "hello"},
                                                       {"from": "human", "value": "what?\n<image>"},
                                                       {"from": "gpt", "value": "this"}]},
    {"id": "d", "system": "Be brief.", "images": ["photo.jpg", {"path": "wide.png"}], "messages": [
        {"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "this"}]},
    {"id": "e", "images": ["photo.jpg"], "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "tall.png"}}, {"type": "image"},
                                     {"type": "text", "text": "same?"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,iVBORw0KGgo="}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]},
]


def test_records_by_value(tok, capsys):
    """Single records: encoded, or refused with words, for both stages."""
    def make_case(rng: random.Random) -> Callable:
        record = mutate_json(rng.choice(RECORDS), rng)
        template = rng.choice(("v0", "plain"))

        def case() -> None:
            ids, labels = data.encode(record, tok, template)
            ids, labels = data.expand(ids, labels, 4, 128)
            assert len(ids) == len(labels)
            assert ids.count(data.IMAGE_ID) == 4 * len(data.conversation_of(record).images)
        return case

    campaign("records", 6000, 200_000_000, make_case, capsys)


def test_data_files(tmp_path, tok, capsys):
    """Whole files: the check names what is bad, and a training run stops at it with one line or survives it."""
    good = [record for _ in range(3) for record in RECORDS]
    path = tmp_path / "data.json"

    def make_case(rng: random.Random) -> Callable:
        if rng.random() < 0.5:
            content = mutate_bytes(to_json(good), rng)
        else:
            content = b"\n".join(to_json(record) for record in mutate_json(good, rng) or [{}])
        on_bad_sample = rng.choice(("stop", "skip"))

        def case() -> None:
            path.write_bytes(content)
            args = parse_data(["check", "--data", str(path), "--images", str(GOLDEN / "images"), "--tokenizer",
                                str(TINY), "--workers", "0", "--decode", "header"])
            assert data.main(args) in (0, 1)
            dataset = Dataset(path, GOLDEN / "images", tok, "v0", ImageConfig(28, "pad", (122, 116, 104), 4), 128,
                              on_bad_sample=on_bad_sample)
            for _ in Loader(dataset, global_batch=4, micro_tokens=300, rank=0, world=1, seed=1, steps=3):
                pass
        return case

    campaign("data files", 600, 300_000_000, make_case, capsys)



def test_archives(tmp_path, capsys):
    """Zips and tars with changed bytes: members are read, or refused with words, and no memory runs full."""
    photo = (GOLDEN / "images/photo.jpg").read_bytes()[:3000]
    names = ["a.jpg", "folder/b.jpg", "é" * 60 + "/" + "x" * 80 + ".jpg"]
    seeds = []
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "seed", "w", packed) as file:
            for name in names:
                with file.open(name, "w", force_zip64=packed == zipfile.ZIP_STORED) as member:
                    member.write(photo)
        seeds.append((tmp_path / "seed").read_bytes())
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "seed", "w", format=form) as file:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(photo)
                file.addfile(member, io.BytesIO(photo))
        seeds.append((tmp_path / "seed").read_bytes()[:20_000])
    path = tmp_path / "archive"

    def make_case(rng: random.Random) -> Callable:
        content = bytearray(rng.choice(seeds))
        # Pictures are most of the bytes and none of the structure: change headers and directories more often.
        found = [content.rfind(sign) for sign in (b"PK\1\2", b"PK\5\6", b"PK\3\4", b"ustar")]
        at = rng.choice([at for at in found if at > 0])
        begin, end = (0, len(content)) if rng.random() < 0.3 else (max(0, at - 257), at + 600)
        content[begin:end] = mutate_bytes(bytes(content[begin:end]), rng)

        def case() -> None:
            path.write_bytes(content)
            pictures = Pictures([path])
            for name in names:
                assert len(pictures.open(name).read()) <= 1 << 28
        return case

    counts = campaign("archives", 4000, 700_000_000, make_case, capsys)
    assert min(counts["fine"], counts["refused"]) > 300


def test_parquet_rows(tmp_path, capsys):
    """Changed rows: each is converted into a record that can be read, or listed as bad."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = {"bytes": (GOLDEN / "images/tiny.png").read_bytes(), "path": "a.png"}
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    rows = [
        {"images": [picture, picture], "texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}]},
        {"id": "1", "image": picture} | talk("<image>\nq", "a", "r", "b"),
        {"images": [picture], "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": [
            {"type": "text", "text": "That."}]}]},
    ]
    path, out = tmp_path / "a.parquet", tmp_path / "out"

    def make_case(rng: random.Random) -> Callable:
        row = mutate_json(rng.choice(rows), rng)

        def case() -> None:
            try:
                parquet.write_table(pyarrow.Table.from_pylist([row]), path)
            except Exception as e:          # not a row that parquet can hold
                raise ValueError(str(e)) from e
            remove(out)
            bad = data.main(parse_data(["convert", "--data", str(path), "--out", str(out)]))
            lines = [(out / name).read_bytes().splitlines() for name in ("records.jsonl", "bad_rows.jsonl")]
            assert [len(found) for found in lines] == [1 - bad, bad]
            pictures = Pictures([out / "images.zip"])
            for line in lines[0]:
                for name in data.conversation_of(parse_record(line)).images:
                    open_rgb(pictures.open(name), 28, "pad", decode=False)
        return case

    counts = campaign("parquet rows", 1500, 500_000_000, make_case, capsys)
    assert counts["fine"] > 500

# ---------------------------------------------------------------------------------------------------
# Benchmarks


def mutate_data_file(path: Path, rng: random.Random) -> bytes:
    """Bytes, values of json, or what editors, tables and other systems do to a text file."""
    good = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(good, rng)
    if kind == 1 and path.suffix == ".json" and b"\n{" not in good:
        return to_json(mutate_json(json.loads(good), rng))
    if kind == 1 and good.startswith(b"{"):
        lines = good.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = to_json(mutate_json(json.loads(lines[i]), rng))
        return b"\n".join(lines)
    text = good.decode()
    change = rng.choice((
        lambda: text.encode("utf-8-sig"), lambda: (text + "\u00e9").encode("latin-1"), lambda: text.encode("utf-16"),
        lambda: text.replace("\n", "\r\n").encode(), lambda: text.replace("\t", "    ").encode(),
        lambda: text.replace("\n", "\n\n").encode(), lambda: text[:rng.randrange(len(text))].encode(),
        lambda: text.replace("\t", "\tnan", rng.randrange(1, 30)).encode(), lambda: text.replace('"', "'").encode(),
        lambda: b"".join(rng.sample(good.splitlines(True), len(good.splitlines()))), lambda: good + good, lambda: b""))
    return change()


GRADES = {
    "mmvet": (".json", json.dumps({f"v1_{i}": {"model": ["j"], "content": ["0.5"], "score": [0.5]} for i in range(2)})),
    "llavabench": (".jsonl", "".join(json.dumps({"question_id": i, "content": "8 6\nGood."}) + "\n" for i in range(2))),
}


def test_benchmark_files(tmp_path, capsys):
    """The official files and those of answers: scored, or refused with one line before anything is asked."""
    tasks = []
    for name in CASES:
        flags, questions = prepare(name, tmp_path / name)
        answers = llava_file(tmp_path / name / "answers.jsonl", questions, CASES[name].answers)
        flags = [*flags, "--score", str(answers), "--out", str(tmp_path / name / "out")]
        ours = [answers]
        if name in GRADES:
            ours.append(tmp_path / name / f"grades{GRADES[name][0]}")
            ours[1].write_text(GRADES[name][1])
            flags += ["--grades", str(ours[1])]
        files = [path for path in (tmp_path / name).rglob("*") if path.suffix in (".json", ".jsonl", ".tsv", ".txt")]
        tasks.append((flags, ours, files))
    mutated = None

    def make_case(rng: random.Random) -> Callable:
        nonlocal mutated
        if mutated:
            mutated[0].write_bytes(mutated[1])
        flags, ours, files = rng.choice(tasks)
        target = rng.choice(files)
        mutated = target, target.read_bytes()
        target.write_bytes(mutate_data_file(target, rng))

        def case() -> None:
            args = ev.parse(flags)
            if target in ours:                  # what comes after the answers
                evaluate(flags)
                return
            try:
                questions = ev.load_data(args.task, args)
            except ValueError as e:
                assert str(tmp_path) in str(e), f"names no file: {e}"
                raise
            texts = [""] * len(questions.examples)
            try:
                path = llava_file(ours[0].with_name("mutated.jsonl"), questions, texts)
                evaluate([*flags, "--score", str(path), "--out", str(ours[0].with_name("out of mutated"))])
            except ValueError as e:
                if "no grade for" in str(e):    # a question that the mutated file has under another id
                    return
                raise AssertionError(f"refused after the answers were made: {e}") from e
        return case

    campaign("benchmark files", 4000, 300_000_000, make_case, capsys)

# ---------------------------------------------------------------------------------------------------
# Models


def mutate_safetensors(good: bytes, rng: random.Random) -> bytes:
    """The length in front, the bytes of the header, or the json in it: names, types, shapes, positions."""
    (length,) = struct.unpack("<Q", good[:8])
    header = good[8:8 + length]
    body = good[8 + length:]
    kind = rng.randrange(4)
    if kind == 0:
        return struct.pack("<Q", rng.choice((*ODD_NUMBERS, length - 1, length + 1, 2**63))) + header + body
    if kind == 1:
        header = mutate_bytes(header, rng)
    elif kind == 2:
        header = to_json(mutate_json(json.loads(header), rng))
    else:
        body = mutate_bytes(body, rng)
    return struct.pack("<Q", len(header)) + header + body


def copy_model(source: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(source, out))


def test_model_folders(tmp_path, capsys):
    """Weights in both formats, config and tokenizer: loaded, or refused with words, and inspected."""
    folders = {"safetensors": TINY, "bin": tmp_path / "bin"}
    copy_model(TINY, folders["bin"])
    [weights] = folders["bin"].glob("*.safetensors")
    from safetensors.torch import load_file
    torch.save(load_file(weights), folders["bin"] / "pytorch_model.bin")
    weights.unlink()
    for other in folders["bin"].glob("*.index.json"):
        other.unlink()

    def make_case(rng: random.Random) -> Callable:
        folder = copy_model(folders[rng.choice(("safetensors", "safetensors", "bin"))], tmp_path / "model")
        [weights] = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        texts = [folder / f"{name}.json" for name in ("config", "tokenizer", "preprocessor_config")]
        target = rng.choice((weights, weights, *texts))
        content = target.read_bytes()
        if target.suffix == ".safetensors":
            content = mutate_safetensors(content, rng)
        elif target.suffix == ".json" and rng.random() < 0.8:
            content = to_json(mutate_json(json.loads(content), rng))
        else:
            content = mutate_bytes(content, rng)
        target.write_bytes(content)

        def case() -> None:
            load_tokenizer(folder)
            load_weights.load_model(folder)
            load_weights_command(["inspect", str(folder)])
        return case

    campaign("model folders", 2000, 300_000_000, make_case, capsys)

def mutate_archive(good: bytes, rng: random.Random) -> bytes:
    """An archive of torch.save: change a record's bytes (mostly the pickle's), its name, or which records there are."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    method = zipfile.ZIP_STORED
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = pickled if rng.random() < 0.6 else rng.choice([*records])
        kind = rng.randrange(8)
        if name not in records:
            continue
        if kind < 3:
            records[name] = mutate_bytes(records[name], rng)
        elif kind == 3:
            changed = bytearray(records[name])
            for place in rng.sample(range(len(changed)), min(len(changed), rng.choice((1, 2, 8)))):
                changed[place] = rng.choice(b"K\x00\x01J\xffM(t)R.q\x85\x86\x87X}]e")        # opcodes of a pickle
            records[name] = bytes(changed)
        elif kind == 4:
            del records[name]
        elif kind == 5:
            records[name + rng.choice(("x", "/", ".pkl", "\ud83d", "/../x"))] = records.pop(name)
        elif kind == 6:
            records[rng.choice([*records])] = records[name]
        else:
            method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name.encode("utf-8", "replace").decode(), content)
    return mutate_bytes(file.getvalue(), rng) if rng.random() < 0.1 else file.getvalue()


def test_archives_of_torch_save(tmp_path, capsys):
    """A pytorch_model.bin of a stranger, and a projector: loaded, merged and inspected, or refused with words."""
    tower, phi = copy_model(GOLDEN / "tiny-clip", tmp_path / "clip"), GOLDEN / "tiny-phi"
    projector = projector_file(tmp_path / "stage 1")
    good = {path: path.read_bytes() for path in (tower / "pytorch_model.bin", projector)}

    def make_case(rng: random.Random) -> Callable:
        for path, content in good.items():
            path.write_bytes(content)
        target = rng.choice([*good])
        target.write_bytes(mutate_archive(good[target], rng))
        out = tmp_path / f"merged {rng.random()}"

        def case() -> None:
            load_weights_command(["inspect", str(target.parent)])
            try:
                load_weights_command(["merge", "--llm", str(phi), "--vision", str(tower), "--projector", str(projector),
                                      "--out", str(out)])
            finally:
                shutil.rmtree(out, ignore_errors=True)
        return case

    counts = campaign("archives of torch.save", 2000, 300_000_000, make_case, capsys)
    assert min(counts["fine"], counts["refused"]) > 200

# ---------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints(tmp_path, capsys):
    """A run that is to go on from a damaged checkpoint goes on from an intact one, or says why it does not."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS[:3] * 4))
    out = tmp_path / "out"
    args = ["--stage", "finetune", "--model", str(TINY), "--data", str(path), "--images", str(GOLDEN / "images"),
            "--out", str(out), "--dtype", "fp32", "--workers", "0", "--global-batch", "4", "--save-every", "1",
            "--max-steps", "3"]
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(args, stop_after=2)
        load_weights_command(["export", "--model", str(out / "step_000002"), "--out", str(tmp_path / "exported")])
    intact = shutil.copytree(out, tmp_path / "intact")

    def make_case(rng: random.Random) -> Callable:
        shutil.rmtree(out)
        shutil.copytree(intact, out)
        newest = max(out.glob("step_*"))
        target = rng.choice([*newest.iterdir(), newest / "checkpoint.json", out / "config.json"])
        content = target.read_bytes()
        if target.suffix == ".json" and rng.random() < 0.7:
            target.write_bytes(to_json(mutate_json(json.loads(content), rng)))
        elif target.suffix == ".safetensors" and rng.random() < 0.5:
            target.write_bytes(mutate_safetensors(content, rng))
        else:
            target.write_bytes(mutate_bytes(content, rng))
        if rng.random() < 0.5:
            return lambda: train_here(args)
        exported = tmp_path / f"exported {rng.random()}"
        return lambda: load_weights_command(["export", "--model", str(newest), "--out", str(exported)])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        campaign("checkpoints", 150, 300_000_000, make_case, capsys)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

# ---------------------------------------------------------------------------------------------------
# Requests


@pytest.fixture
def server(tok, monkeypatch):
    """A server on a port of its own; its log, which is on stderr, is not what these campaigns look at."""
    monkeypatch.setattr(serve.server.Handler, "log", lambda self: None)
    server = Server("127.0.0.1", 0, None, False)
    defaults = {"max_new_tokens": 4, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    server.start(Session(load_weights.load_model(TINY)), tok, "tiny", defaults)
    yield server
    server.stop()


PICTURE = "data:image/jpeg;base64," + base64.b64encode((GOLDEN / "images/square.png").read_bytes()).decode()
REQUESTS = [
    {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 4, "temperature": 0.5,
     "top_p": 0.9, "seed": 3, "stop": ["x"]},
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A square."}, {"role": "user", "content": "Sure?"}],
     "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 3},
]


def exchange(server, request: bytes, end: bool = False) -> bytes:
    """Send a request -> all that comes back. end: also say that nothing more will come, as clients do that leave."""
    reply = b""
    with socket.create_connection(server.server_address[:2], timeout=WALL_SECONDS) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):      # it may be refused before it is all there
            connection.sendall(request)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                reply += piece
    return reply


def post(body: bytes) -> bytes:
    return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)) + body


def test_request_bodies(server, capsys):
    """Well-formed HTTP around a body that is not: a completion, or OpenAI's error object and a status of 4xx."""
    def make_case(rng: random.Random) -> Callable:
        fields = rng.choice(REQUESTS)
        if rng.random() < 0.3:
            body = mutate_bytes(to_json(fields), rng)
        else:
            fields = mutate_json(fields, rng)
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(fields, dict) and isinstance(fields.get(name), int):
                    fields[name] = min(fields[name], 8)         # a long answer is right, but takes long
            body = to_json(fields)

        def case() -> None:
            head, _, content = exchange(server, post(body)).partition(b"\r\n\r\n")
            status = int(head.split()[1])
            if status == 200:
                assert b'"choices"' in content
                return
            error = json.loads(content)["error"]
            assert 400 <= status < 500 and error["message"], f"{status}: {content!r}"
            raise ValueError(error["message"])
        return case

    counts = campaign("request bodies", 3000, 300_000_000, make_case, capsys)
    assert counts["fine"] > 100


GOOD_CONTENTS = (None, "", " ", "What?", [], [{"type": "text", "text": "What?"}],
                 [{"type": "refusal", "refusal": "No."}], [{"type": "image_url", "image_url": PICTURE}],
                 [{"type": "image_url", "image_url": {"url": PICTURE}}],
                 [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": PICTURE}])
BAD_CONTENTS = (["What?"], [{"type": "text"}], [{"type": "image_url", "image_url": {"url": PICTURE[:200]}}],
                [{"type": "image_url", "image_url": {}}], {"type": "text"}, 7, [None])


def odd_history(rng: random.Random) -> list[dict]:
    """Messages in any order, of any speaker, with contents that clients send and some that none should."""
    messages = []
    for _ in range(rng.choice((1, 1, 2, 3, 4, 8))):
        role = rng.choice(("user", "user", "user", "assistant", "assistant", "system", "developer"))
        message = {"role": role, "content": rng.choice(GOOD_CONTENTS if rng.random() < 0.95 else BAD_CONTENTS)}
        if rng.random() < 0.1:
            message[rng.choice(("role", "name", "tool_calls", "refusal", "audio"))] = rng.choice(ODD_VALUES)
        if rng.random() < 0.05:
            del message[rng.choice(sorted(message))]
        messages.append(message)
    return messages


def chunks_of(body: bytes, rng: random.Random) -> bytes:
    """The same request with its body in chunks, now and then of a wrong length."""
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    while body:
        piece, body = body[:(n := rng.choice((1, 100, 5000)))], body[n:]
        size = len(piece) if rng.random() < 0.99 else rng.choice((0, len(piece) + 1, 10**9))
        request += b"%x\r\n%s\r\n" % (size, piece)
    return request + rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"0\r\n"))


def test_chat_histories(server, capsys, monkeypatch):
    """A history is answered, or refused with the name of what is wrong in it; also when its body comes in chunks."""
    monkeypatch.setattr(serve.server, "BODY_SECONDS", 0.3)              # what is cut short is not waited for

    def make_case(rng: random.Random) -> Callable:
        fields = {"messages": odd_history(rng), "max_tokens": 2}
        if rng.random() < 0.3:
            fields[rng.choice(("tools", "response_format", "top_p", "n", "logprobs", "x"))] = rng.choice(ODD_VALUES)
        body = to_json(fields)
        request = chunks_of(body, rng) if rng.random() < 0.3 else post(body)

        def case() -> None:
            head, _, content = exchange(server, request).partition(b"\r\n\r\n")
            status = int(head.split()[1])
            if status == 200:
                assert json.loads(content)["usage"]["completion_tokens"] <= 2
                return
            error = json.loads(content)["error"]
            assert 400 <= status < 500 and error["message"], f"{status}: {content!r}"
            assert error["param"] or b"chunked" in request, content         # which may have been cut short
            raise ValueError(error["message"])
        return case

    counts = campaign("chat histories", 3000, 300_000_000, make_case, capsys)
    assert min(counts["fine"], counts["refused"]) > 500


def test_raw_requests(server, capsys):
    """Bytes that need not be HTTP. Whatever comes back is a status line, and never 500; the server goes on."""
    def make_case(rng: random.Random) -> Callable:
        request = mutate_bytes(post(to_json(rng.choice(REQUESTS))), rng)

        def case() -> None:
            reply = exchange(server, request, end=True)         # or the server would wait for what was cut off
            if not reply:
                raise ValueError("closed without a reply")
            assert reply.startswith(b"HTTP/1."), reply[:200]
            status = int(reply.split()[1])
            assert status == 200 or 400 <= status < 600 and status != 500, reply[:400]
            if status != 200:
                raise ValueError(f"status {status}")
        return case

    campaign("raw requests", 2000, 300_000_000, make_case, capsys)
    assert exchange(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")
