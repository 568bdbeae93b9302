"""sample.py as a person uses it: the golden answer, streaming, odd files, a chat, a pipe, errors of one line."""
import io
import json
import os
import pty
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from forks import run_forked
from helpers import GOLDEN, GOLDEN_ANSWER, ROOT, TINY_MODEL, run_script

import sample
from lib.chat import Clock, TextStream, answer, ask, open_image, rank
from lib.common import run_command, without_control
from lib.generate import Session
from lib.look import look

PHOTO = GOLDEN / "images/photo.jpg"
PUBLISHED = 3_100_000_000         # parameters of the published model


def main(capsys, *args) -> tuple[str, str]:
    """In this process: stdout, stderr."""
    sample.main(sample.parse(["--model", str(TINY_MODEL), *map(str, args)]))
    return capsys.readouterr()


def chat(monkeypatch, capsys, lines: list[str], *args) -> tuple[list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, err = main(capsys, *args)
    return out.splitlines(), err


def test_the_golden_answer_on_the_command_line():
    ask = ("--prompt", "What is this?", "--temperature", 0, "--max-new-tokens", 24)
    done = run_forked("sample.py", "--model", TINY_MODEL, "--image", PHOTO, *ask)
    assert (done.stdout, done.returncode) == (GOLDEN_ANSWER + "\n", 0)
    assert done.stderr.count("\n") == 1 and "cpu" in done.stderr and "fp32" in done.stderr


# ---------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_whole(tiny_tokenizer, seed):
    """Random ids, specials and broken UTF-8 among them; and no piece ever ends within a character."""
    rng = random.Random(seed)
    ids = [rng.randrange(300 if seed % 2 else 500) for _ in range(40)]
    ids += tiny_tokenizer.encode("a \u65e5\u672c\u8a9e \U0001f642\n\n x  ").ids + [0] * (seed % 3)
    text = TextStream(tiny_tokenizer)
    pieces = [text.add(i) for i in [*ids, None]]
    assert "".join(pieces) == tiny_tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_character_appears_when_it_is_complete(tiny_tokenizer):
    text = TextStream(tiny_tokenizer)
    pieces = [text.add(i) for i in tiny_tokenizer.encode("x\u65e5y").ids]
    assert [p for p in pieces if p] == ["x", "\u65e5", "y"]


def test_choices_and_logprobs_on_the_command_line(capsys, tiny_model, tiny_tokenizer):
    """The numbers of rank, best first, as text and as json, about each picture; logprobs of exactly the answer."""
    expected = rank(tiny_model, tiny_tokenizer, "What is this?", PHOTO, ["cat", "dog", "none of them"])
    asked = ["--image", str(PHOTO), str(GOLDEN / "images/square.png"), "--prompt", "What is this?"]
    lines = main(capsys, *asked, "--choices", "cat,dog, none of them")[0].splitlines()
    assert len(lines) == 6 and f"{expected[0]['p_sum']:.2%}  {expected[0]['choice']}  (log" in lines[0]
    lines = main(capsys, *asked, "--choices", "cat,dog,none of them", "--json")[0].splitlines()
    first, second = map(json.loads, lines)
    assert first["choices"] == expected and second["image"].endswith("square.png")
    [line, _] = main(capsys, *asked, "--json", "--logprobs", "5", "--max-new-tokens", "6")[0].splitlines()
    told = json.loads(line)
    text = b"".join(bytes(token["bytes"]) for token in told["logprobs"]).decode(errors="replace").strip()
    assert text == told["answer"] and [len(token["top_logprobs"]) for token in told["logprobs"]] == [5] * 6


def test_control_characters_do_not_reach_the_terminal():
    assert without_control("a\x1b[31mb\x07\r\x9b\u202e\tc\nd") == "a[31mb\tc\nd"
    harmless = "\u65e5\U0001f468\u200d\U0001f469 caf\u00e9"
    assert without_control(harmless) == harmless

# ---------------------------------------------------------------------------------------------------
# One question


def test_several_pictures_are_asked_in_one_batch_as_if_alone(capsys):
    pictures = [GOLDEN / "images" / name for name in ("photo.jpg", "alpha.png", "tall.png")]
    ask = ("--prompt", "What is this?", "--max-new-tokens", 8)
    alone = [main(capsys, "--image", picture, *ask)[0].strip() for picture in pictures]
    out, _ = main(capsys, "--image", pictures[0], pictures[1], "--image", pictures[2], "--json", *ask)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["answer"] for line in lines] == alone
    assert [line["image"] for line in lines] == [str(picture) for picture in pictures]


def test_one_question_about_several_pictures_together(monkeypatch, capsys, tiny_model, tiny_tokenizer):
    """On the command line, as json, and in a chat."""
    wide = GOLDEN / "images/wide.png"
    [want] = ask(tiny_model, tiny_tokenizer, "Which?", [[str(PHOTO), wide]], max_new_tokens=5)
    flags = ["--image", PHOTO, wide, "--together", "--max-new-tokens", 5]
    assert main(capsys, *flags, "--prompt", "Which?")[0] == want + "\n"
    assert json.loads(main(capsys, *flags, "--prompt", "Which?", "--json")[0]) == {
        "image": [str(PHOTO), str(wide)], "prompt": "Which?", "answer": want}
    assert chat(monkeypatch, capsys, ["Which?"], *flags)[0] == [want]


def test_stdin_brings_the_picture_or_the_question(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PHOTO.read_bytes())))
    out, _ = main(capsys, "--image", "-", "--prompt", "What is this?", "--max-new-tokens", 24)
    assert out == GOLDEN_ANSWER + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?"))
    out, _ = main(capsys, "--image", PHOTO, "--prompt", "-", "--max-new-tokens", 24)
    assert out == GOLDEN_ANSWER + "\n"


def test_same_seed_same_text(capsys):
    ask = ("--image", PHOTO, "--prompt", "Why?", "--temperature", 1, "--max-new-tokens", 8)
    texts = [main(capsys, *ask, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_verbose_speaks_on_stderr_only(capsys):
    out, err = main(capsys, "--prompt", "Who?", "--max-new-tokens", 3, "--verbose", "--bits", 8)
    assert "3 tokens" in err and "tokens/s" in err and "GB" in err and "int8" in err
    assert out.count("\n") == 1


@pytest.mark.parametrize("written", ["{}", " {} ", "'{}'", '"{}"', "file://{quoted}", "{escaped}"])
def test_a_path_as_it_is_pasted(tmp_path, tiny_model, written):
    path = tmp_path / "my photo (1).jpg"
    path.write_bytes(PHOTO.read_bytes())
    escaped = str(path).replace(" ", r"\ ").replace("(", r"\(")
    text = written.format(path, quoted=str(path).replace(" ", "%20"), escaped=escaped)
    assert torch.equal(open_image(text, tiny_model.config), open_image(PHOTO, tiny_model.config))


@pytest.mark.parametrize("args, message", [
    (["--image", "https://example.org/x.jpg", "--prompt", "?"], "download it"),
    (["--image", "nowhere.jpg", "--prompt", "?"], "nowhere.jpg"),
    (["--image", "sample.py", "--prompt", "?"], "sample.py"),
    (["--prompt", " "], "empty"),
    (["--prompt", "a " * 3000], "the model has 2048"),
    (["--prompt", "a" * 32001], "32,001 characters"),
    (["--prompt", "a\udcff"], "broken unicode"),
    (["--prompt", "?", "--dtype", "fp16"], "overflow"),
    (["--prompt", "?", "--dtype", "int3"], "fp32 or bf16"),
    (["--prompt", "?", "--cuda-graph"], "CUDA"),
    (["--prompt", "?", "--temperature", "-1"], "--temperature"),
    (["--prompt", "?", "--bogus"], "--bogus"),
    (["--image", "a.jpg", "b.jpg"], "--prompt"),
    (["--image", "-"], "--prompt"), (["--together", "--prompt", "?"], "--together is about"),
    (["--image", str(PHOTO), str(PHOTO), "--together", "--prompt", "<image>?"], "found 1 for 2"),
    (["--choices", "a,b"], "--choices: give one at a time, with --prompt"),
    (["--prompt", "?", "--choices", "a, ,b"], "none empty and no two alike"),
    (["--prompt", "?", "--choices", "a"], "two or more choices"),
    (["--prompt", "?", "--choices", "a,b", "--look", "x.html"], "one at a time"),
    (["--prompt", "?", "--logprobs", "5"], "--logprobs with --json"),
    (["--prompt", "?", "--choices", "a,b", "--top-k", "5", "--seed", "1"], "nothing: leave out --top-k, --seed"),
    (["--prompt", "?", "--look-layer", "0"], "--look-layer is a layer for --look FILE"),
    (["--prompt", "?", "--look", "x.html"], "--look takes one picture"),
    (["--prompt", "?", "--look", "x.html", "--image", str(PHOTO), "--bits", "8"], "--bits 16"),
    (["--prompt", "?", "--look", "x.html", "--image", str(PHOTO), "--look-layer", "9"], "a layer from 0 to 1"),
])
def test_what_cannot_be_is_one_line(args, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        sample.main(sample.parse(["--model", str(TINY_MODEL), *args]))
    assert "\n" not in str(error.value)


def test_nothing_downloaded_is_one_helpful_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(sample.main, sample.parse(["--image", "x.jpg"])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi" in err


def test_help_and_mistakes_are_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    without_torch = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_script("sample.py", "--help", env=without_torch)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout and "(default: 256)" in done.stdout
    done = run_script("sample.py", "--bogus", env=without_torch)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} sample.py --model {TINY_MODEL} --prompt x --max-new-tokens 60 | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout) == 1 and "rror" not in done.stderr

# ---------------------------------------------------------------------------------------------------
# A chat


def test_each_turn_equals_the_whole_chat_asked_anew(monkeypatch, capsys, tiny_model, tiny_tokenizer):
    questions = ["What is this?", "Why?", "Where?"]
    lines, _ = chat(monkeypatch, capsys, ["", *questions], "--image", PHOTO, "--max-new-tokens", 6)
    turns = []
    for question, said in zip(questions, lines, strict=True):
        pieces = answer(Session(tiny_model), tiny_tokenizer, [[*turns, question]], [PHOTO], Clock(), max_new_tokens=6)
        assert said == "".join(piece for (piece,) in pieces)
        turns += [question, said]


def test_commands_and_mistakes_keep_the_chat_going(monkeypatch, capsys, tmp_path):
    lines, err = chat(monkeypatch, capsys, [
        "hello", f"/image '{PHOTO}'", "What is this?", "/image nowhere.jpg", "/nonsense", "a " * 3000,
        f"/save {tmp_path}/c.json", f"/save {tmp_path}/c.json", "/image", "/reset", "What is this?"],
        "--max-new-tokens", 6)
    assert len(lines) == 3 and lines[1] == lines[2]
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved["turns"] == ["What is this?", lines[1]] and "photo.jpg" in saved["image"]
    for part in ("nowhere.jpg", "/nonsense is unknown; the commands are:\n/image ", "the model has 2048",
                 f"[about '{PHOTO}' from here on]", f"[saved to {tmp_path}/c.json]", "/image needs a path",
                 "c.json is there already: give another name", f"[starting over, about '{PHOTO}']", "--max-new-tokens"):
        assert part in err


def test_a_terminal_takes_a_paste_as_one_question_and_completes_paths(tmp_path):
    """A process with a terminal of its own, because pasted lines, the Tab key and Ctrl-D exist only there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "sample.py", "--model", str(TINY_MODEL), "--max-new-tokens", "2"])
    (tmp_path / "my photo.jpg").symlink_to(PHOTO)
    shown = b""
    for typed in ("", "one\n\ttwo\nthree\n", f"/save {tmp_path}/c.json\n", f"/im\t{tmp_path}/my\t\n", "\x04"):
        os.write(terminal, typed.encode())
        seen = b""
        while not seen.endswith(b"> "):
            try:
                seen += os.read(terminal, 1000)
            except OSError:                             # the program has left
                break
        shown += seen
    os.waitpid(pid, 0)
    assert json.loads((tmp_path / "c.json").read_text())["turns"][0] == "one\n\ttwo\nthree"
    assert f"[about {tmp_path}/my photo.jpg from here on]".encode() in shown
    assert shown.endswith(b"> \r\n")


def test_a_full_context_says_so(monkeypatch, capsys):
    _, err = chat(monkeypatch, capsys, ["a " * 1000], "--max-new-tokens", 2000)
    assert "2048 positions are full: /reset" in err


def test_ctrl_c_stops_the_answer_and_twice_leaves(monkeypatch, capsys, tiny_model, tiny_tokenizer):
    no_image = open_image(None, tiny_model.config)
    it = sample.Chat(Session(tiny_model), tiny_tokenizer, no_image, None, {"max_new_tokens": 20})
    shown, lines = [], iter(["Who?", "And?", KeyboardInterrupt, "Well?", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def read_line():
        if (line := next(lines)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def show(text, end=""):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "read_line", read_line)
    monkeypatch.setattr(sample, "print_answer", show)
    it.run()
    assert it.turns[0::2] == ["Who?", "And?", "Well?"] and it.turns[1] == "".join(shown[:3])
    assert next(lines) == "never"
    assert "[stopped]" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# In Python


def test_the_readme_lines_for_a_notebook(tmp_path, monkeypatch, capsys, tiny_model, tiny_tokenizer):
    """Exactly the lines that the README shows, where the golden model lies in the place of the published one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"## In Python\n.*?```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/llava-phi").symlink_to(TINY_MODEL)
    (tmp_path / "cat.jpg").symlink_to(PHOTO)
    (tmp_path / "dog.jpg").symlink_to(GOLDEN / "images/square.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["text"].startswith(GOLDEN_ANSWER)
    assert names["texts"][0] == ask(tiny_model, tiny_tokenizer, "What is this?", [PHOTO], max_new_tokens=32)[0]
    assert names["texts"][1] and names["texts"][1] != names["texts"][0]
    turns = ["What is this?", names["text"], "Why do you think so?"]
    [last] = ["".join(pieces) for pieces in zip(*answer(Session(tiny_model), tiny_tokenizer, [turns], [PHOTO]))]
    assert capsys.readouterr().out == last
    choices = ["a cat", "a dog", "none of them"]
    assert names["ranked"] == rank(tiny_model, tiny_tokenizer, "What is this?", PHOTO, choices)
    assert names["maps"] == look(tiny_model, tiny_tokenizer, "What is this?", PHOTO, max_new_tokens=4)
    assert len(names["maps"]) == 4 and np.shape(names["maps"][0]["gradient"]) == (2, 2)


def test_a_picture_that_is_in_no_list_and_no_picture_at_all(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="expected a list of pictures, found 'cat.jpg': put it in brackets"):
        ask(tiny_model, tiny_tokenizer, "What is this?", "cat.jpg")
    assert ask(tiny_model, tiny_tokenizer, "What is this?", []) == []


# ---------------------------------------------------------------------------------------------------
# Which arithmetic


@pytest.mark.parametrize("has_bf16, free, bits, expected", [
    (True, 16e9, 16, ("bf16", "cpu in bf16")),
    (False, 16e9, 16, ("fp32", "cpu in fp32")),
    (False, 8e9, 16, ("bf16", "cpu in bf16, since fp32 does not fit into memory")),
    (True, 16e9, 4, ("bf16", "cpu in bf16")),
    (True, 16e9, 8, ("fp32", "cpu in fp32")),               # its products are in int8 anyway
])
def test_the_dtype_of_the_published_model_on_a_cpu(monkeypatch, has_bf16, free, bits, expected):
    monkeypatch.setattr(sample, "has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(sample, "free_memory", lambda device: free)
    assert sample.choose_dtype(PUBLISHED, None, "cpu", bits) == expected
    assert sample.choose_dtype(PUBLISHED, "fp32", "cpu", bits) == ("fp32", "cpu in fp32")


def test_a_gpu_that_only_emulates_bf16_answers_in_fp32(monkeypatch):
    for emulates, dtype in ((True, "fp32"), (False, "bf16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulates)
        assert sample.choose_dtype(PUBLISHED, None, "cuda", 16) == (dtype, f"cuda in {dtype}")


def test_a_small_model_says_the_same_on_every_machine(monkeypatch):
    monkeypatch.setattr(sample, "has_bf16", lambda device: True)
    assert sample.choose_dtype(50_000_000, None, "cpu", 16) == ("fp32", "cpu in fp32")


def test_bits_are_refused_in_one_line(capsys):
    assert run_command(sample.main, sample.parse(["--model", str(TINY_MODEL), "--prompt", "Who?", "--bits", "4"])) == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert problem.startswith("error: 4 bits") and "take more bits" in problem
