"""`python data.py check` names every kind of bad record and picture, and what it writes as clean is clean."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN, ROOT, TINY_MIPHA, TINY_PHI, talk
from zoo import open_dataset, write_data, zoo

import data
from data import IMAGE
from lib.common import run_command
from lib.recipes import parse_data


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return tiny_tokenizer


def check(flags: list) -> int:
    return data.main(parse_data([str(flag) for flag in flags]))


def run_check(capsys, path: Path, images: Path, *more: str) -> tuple[int, str]:
    flags = "--max-length 300 --n-patches 4 --image-size 28 --workers 0".split()
    code = check(["check", "--data", str(path), "--images", str(images), "--tokenizer",
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
    assert code == 0 and "0 bad" in out and "1 step of 128 samples" in out
    code, out = run_check(capsys, path, zoo_images, "--decode", "header")
    assert code == 1 and f"{len(animals) - 1} bad" in out              # only the truncated picture has a good head


def test_names_that_are_not_utf8_do_not_end_the_check(tmp_path, capsys):
    """Old archives hold latin-1 names. Whatever is printed of them, lengths and --write-clean still come."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "x.jpg").write_bytes((GOLDEN / "images/photo.jpg").read_bytes())
    records = [talk(f"{IMAGE}\nq", "a", id=f"\x1b[31m {i}", image=f"{folder.name}/{name}")
               for i, name in enumerate(("x.jpg", "absent\udce9.jpg"))]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    code, out = run_check(capsys, path, tmp_path, "--write-clean", str(tmp_path / "clean.json"))
    assert code == 1 and "caf\\udce9 1" in out and "absent\\udce9.jpg" in out and "\x1b" not in out
    assert "positions: " in out and len(json.loads((tmp_path / "clean.json").read_text())) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_is_printed_may_hold_any_character(encoding):
    """A name with half a character, or a terminal that is not UTF-8, must not end a command that has done its work."""
    code = ("import sys; from lib.common import run_command; "
            "sys.exit(run_command(lambda: print('a\\udce9 \u4e2d')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding})
    want = {"utf-8": b"a\\udce9 \xe4\xb8\xad\n", "latin-1": b"a\\udce9 \\u4e2d\n"}
    assert (done.returncode, done.stdout, done.stderr) == (0, want[encoding], b"")


@pytest.mark.parametrize("closed, code, stderr", [("<&-", 0, ""), (">&-", 0, ""), ("<&- >&-", 0, "")])
def test_closed_streams(closed, code, stderr):
    """As under some schedulers and services: what is printed goes nowhere, and there is no input. No traceback."""
    program = ("import sys; from lib.common import run_command; "
               "sys.exit(run_command(lambda: (print('done'), sys.stdout.flush(), sys.stdin.readline(), "
               "sys.stdin.isatty()) and 0))")
    done = subprocess.run(["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_what_is_written_as_clean_has_no_byte_order_mark(tmp_path, capsys):
    path, clean = tmp_path / "data.jsonl", tmp_path / "clean.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(json.dumps(talk("q", "a", id=i)).encode() for i in range(3)))
    assert run_check(capsys, path, tmp_path, "--write-clean", str(clean))[0] == 0
    assert [record["id"] for record in json.loads(clean.read_text())] == [0, 1, 2]


DEEP = '{"id": "deep", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
GOOD = json.dumps(talk("q", "a", id="good"))


@pytest.mark.parametrize("text, problem", [
    (b"", "not LLaVA's json"), (b"<html>", "not LLaVA's json"), (b"[]", "no records"), (b"[1, 2]", "not LLaVA's json"),
    (b'{"a": 1}', "not LLaVA's json"), (b'[{"question": "a"}]', "not LLaVA's json"),
    (f"[{GOOD},\n]".encode(), "line 2"), (f"[{GOOD},\n{GOOD}".encode(), "line 2"),
    (f"[{GOOD}\n{GOOD}]".encode(), "line 1"), (f"[{GOOD}]\n\n[{GOOD}]".encode(), "line 3.*after the end of the list"),
    (f"[{GOOD}]\n,{GOOD}".encode(), "line 2.*after the end"), (f"[]\n[{GOOD}]".encode(), "line 2.*after the end"),
    (f"[{GOOD}]x".encode(), "line 1.*after the end"),
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
    assert check(["check", "--data", str(path), "--images", images, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "no lengths: there is no tokenizer at checkpoints/phi-2; --model FOLDER" in out and "0 bad" in out
    for bad in (["--images", "absent"], ["--images", images, "--tokenizer", str(tmp_path)],
                ["--images", images, "--write-clean", str(path)]):
        with pytest.raises((ValueError, OSError)):
            check(["check", "--data", str(path), "--workers", "0", *bad])
    capsys.readouterr()
    assert run_command(data.main, parse_data(["check", "--data", "absent", "--images", images])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "no data at absent (--data)" in err and err.count("\n") == 1
    assert json.loads(path.read_text())


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


def test_the_check_without_a_model_takes_the_recipes_sizes(tmp_path, capsys):
    """A picture takes 729 positions in Mipha and 576 in LLaVA-Phi. A model of the other recipe is mentioned."""
    path = write_data(tmp_path, 2)
    longest = {}
    flags = ["check", "--data", path, "--images", GOLDEN / "images", "--workers", "0"]
    for recipe in ("llava-phi", "mipha"):
        check([*flags, "--tokenizer", TINY_PHI, "--recipe", recipe])
        out = capsys.readouterr().out
        longest[recipe] = int(re.search(r"100 % have up to ([\d,]+)", out)[1].replace(",", ""))
        check([*flags, "--model", TINY_MIPHA, "--recipe", recipe])
        assert ("--recipe llava-phi, not --recipe mipha" in capsys.readouterr().out) == (recipe == "llava-phi")
    assert longest["mipha"] - longest["llava-phi"] == 729 - 576


def test_the_check_takes_its_sizes_from_the_model(tmp_path, capsys):
    """So that nobody has to know how many patches a tower makes. What is given as a flag comes first."""
    flags = ["check", "--data", str(write_data(tmp_path)), "--images", str(GOLDEN / "images"), "--workers", "0"]
    tiny = str(GOLDEN / "tiny-llava-phi")
    for model in (["--model", tiny], ["--tokenizer", tiny]):
        assert check(flags + model) == 0
        assert "pictures of 28 pixels are 4 positions, samples have up to 2048" in capsys.readouterr().out
    assert check([*flags, "--model", str(ROOT / "demo/phi"), str(ROOT / "demo/clip")]) == 0
    by_model = capsys.readouterr().out
    assert "pictures of 56 pixels are 16 positions, samples have up to 512" in by_model
    assert check([*flags, "--tokenizer", str(ROOT / "demo/phi"), "--n-patches", "16", "--max-length", "512"]) == 0
    assert by_model.split("\n", 1)[1] == capsys.readouterr().out
    assert check([*flags, "--model", tiny, "--n-patches", "100"]) == 0
    assert "positions: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="found 3"):
        check([*flags, "--model", tiny, tiny, tiny])
    with pytest.raises(ValueError, match="--n-patches: expected a whole number of at least 1"):
        check([*flags, "--n-patches", "0"])
