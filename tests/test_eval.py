"""eval.py end to end on tiny data: reports, bad data, generation, kills, several processes and GPUs."""
import dataclasses
import json
import os
import signal
import tarfile
import threading
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from forks import Fork, run_forked
from helpers import GOLDEN, TINY_MIPHA, TINY_MODEL, all_logits, contents, plain_answer, run_script
from tiny_benchmarks import CASES, evaluate, llava_file, make_pope, make_scienceqa, make_shapes, picture, prepare, write

import eval as ev
import load_weights
import vision
from benchmarks import scoring
from data import IMAGE_ID, eot_id, load_tokenizer
from lib import asking
from lib.chat import ask, encode_chat, open_image
from lib.common import LOCK, run_command
from model import LLaVAConfig
from vision import SIGLIP_SO400M_384

# ---------------------------------------------------------------------------------------------------
# The report


class Elements(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_report_escapes_everything(tmp_path, capsys):
    hostile = '<script>alert(1)</script>"><img src=x onerror=y></td></table>\u202e\x00\x1b[2J&amp; "onload=z'
    pages = []
    for answer in ("plain", hostile):
        root = tmp_path / answer[:3].strip("<")
        make_shapes(root)
        write(root / "shapes/questions.jsonl",
              [{"question_id": answer, "image": "0.png", "text": answer, "answer": "red" + answer, "category": answer,
                                                 "chance": 0.1}])
        flags = ["--task", "shapes", "--root", str(root)]
        path = llava_file(root / "a.jsonl", ev.load_data("shapes", ev.parse(flags)), [answer, answer])
        evaluate([*flags, "--score", str(path), "--out", str(root / "out")])
        pages.append((root / "out/report.html").read_text())
    plain, odd = map(Elements, pages)
    assert odd.found == plain.found and odd.attributes == plain.attributes
    assert "img" in plain.found and "script" not in odd.found and "default-src 'none'" in pages[1]
    assert not set(pages[1]) & set("\u202e\x00\x1b") and "\\u202e" in pages[1]
    assert not set(capsys.readouterr().out) & set("\u202e\x00\x1b")

# ---------------------------------------------------------------------------------------------------
# Bad data: one line, exit code 2, nothing overwritten


def test_bad_data_is_one_clear_message(tmp_path):
    flags, data = prepare("pope", tmp_path / "eval")
    score = lambda rows, *more: (write(tmp_path / "a.jsonl", rows),
                                 evaluate([*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"),
                                          *more]))
    rows = [{"question_id": e.question_id, "prompt": e.prompt, "text": "no"} for e in data.examples]
    score(rows)
    before = (tmp_path / "out/result.json").read_bytes()
    for bad, message in [
            (rows[:-1], "1 of 6 answers are missing"), (rows + rows[:1], "question 1"),
            (rows[:5] + rows[:1], "question 1 is answered a second time"),
            (rows[:5] + [{**rows[5], "question_id": 7}], "question 7 is not in this task"),
            (rows[:5] + [{"question_id": 7}], "line 6: .*'text' is missing")]:
        with pytest.raises(ValueError, match=message):
            score(bad)
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "no"}\n{"question_id": ')
    with pytest.raises(ValueError, match="a.jsonl, line 2"):
        evaluate([*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/result.json").read_bytes() == before
    score(rows[:-1], "--allow-missing")
    assert json.loads((tmp_path / "out/result.json").read_text())["missing"] == 1
    score(rows, "--limit", "2")
    assert json.loads((tmp_path / "out/result.json").read_text())["n"] == 2


def test_check_data_names_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "eval"
    for name in CASES:
        CASES[name].make(root)
    check = ["--root", str(root), "--check-data", "--task"]
    (root / "pope/val2014/COCO_val2014_000000310196.jpg").unlink()
    (root / "gqa/data/testdev_balanced_questions.json").write_text("[1")
    (root / "mme").mkdir()
    with pytest.raises(ValueError, match="4 of 4 tasks"):
        evaluate([*check, "pope,gqa,textvqa,scienceqa"])
    out = capsys.readouterr().out
    assert "pope: 1 of 1 images are missing" in out and "val2014.zip" in out and "not a json" in out
    assert "textvqa: 3 questions, the official val set has 5,000" in out and "official file 9f60db6fb89e3692" in out
    evaluate([*check, "shapes"])
    assert "shapes: 4 questions and all images are there" in capsys.readouterr().out
    write(root / "pope/coco/coco_pope_random.json",
          [{"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "yes"}])
    with pytest.raises(ValueError, match="pope/coco has no .'random', 'COCO_val2014"):
        ev.load_data("pope", ev.parse(["--root", str(root)]))
    write(root / "shapes/questions.jsonl",
          [{"question_id": 1, "image": "../x.png", "text": "", "answer": "", "category": "", "chance": 1}])
    with pytest.raises(ValueError, match="outside the folder"):
        ev.load_data("shapes", ev.parse(["--root", str(root)]))
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(ValueError, match="do not have two questions each"):
        ev.load_data("mme", ev.parse(["--root", str(root)]))
    write(root / "gqa/data/testdev_balanced_questions.json", {"1": {"question": "x"}})
    with pytest.raises(ValueError, match="question 1: not in the expected format: .types. is missing"):
        ev.load_data("gqa", ev.parse(["--root", str(root)]))


def test_check_data_lists_everything_that_is_missing(tmp_path, capsys):
    """For every task that was named, all its files and the folder of its pictures, with where to get them."""
    (tmp_path / "pope/coco").mkdir(parents=True)
    (tmp_path / "pope/coco/coco_pope_random.json").touch()
    with pytest.raises(ValueError, match="13 of 13 tasks"):
        evaluate(["--root", str(tmp_path), "--check-data", "--task", ",".join(name for name in ev.TASKS
                                                                              if name not in ("jsonl", "shapes"))])
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(":")[0]: line.replace(str(tmp_path), "") for line in lines}
    assert len(found) == len(lines) == 13 and all(" lacks " in line and "Get it: " in line for line in lines)
    assert "/scienceqa lacks problems.json, pid_splits.json, images/test/ or test/. " in found["scienceqa"]
    assert "/pope lacks coco/coco_pope_adversarial.json, coco/coco_pope_popular.json, val2014/. " in found["pope"]
    assert "context.jsonl, answers_gpt4.jsonl, images/. " in found["llavabench"]
    assert "TextVQA_0.5.1_val.json, train_images/" in found["textvqa"]


def test_from_the_command_line(tmp_path, capsys):
    """Nothing downloaded: one helpful line. --score: no torch."""
    assert run_command(evaluate, ["--task", "scienceqa", "--root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: scienceqa: ")
    assert "lacks problems.json" in err and "github.com/lupantech" in err
    assert run_command(evaluate, ["--task", "nonsense"]) == 2
    err = capsys.readouterr().err
    assert "--task nonsense: expected one or more of vqav2, " in err and err.count("\n") == 1
    flags, data = prepare("pope", tmp_path / "eval")
    llava_file(tmp_path / "a.jsonl", data, ["yes"] * 6)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/torch.py").write_text("raise RuntimeError('torch was imported')")
    done = run_script("eval.py", *flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"),
               env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")})
    assert done.returncode == 0, done.stderr
    assert "66.67" in done.stdout
    for args, message in ((["--help"], "(default: 16)"), ([*flags, "--check-data"], "the official all set has 8,910")):
        assert message in run_script("eval.py", *args, env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")}).stdout


@pytest.mark.parametrize("flag, value", [("--limit", "0"), ("--batch", "0"), ("--judge-timeout", "0"),
                                         ("--judge-timeout", "-1"), ("--judge-timeout", "nan")])
def test_numbers_that_would_do_nothing_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"{flag}: expected a .*number of at least"):
        ev.parse(["--task", "pope", flag, value])


def test_own_questions(tmp_path, capsys):
    write(tmp_path / "q.jsonl", [{"question_id": "a", "text": "What?", "image": "x.png", "answer": ["red", "crimson"],
                                  "category": "colour"},
                                 {"question_id": "b", "text": "Who?", "answer": "me"},
                                 {"question_id": "c", "text": "Why?"}])
    picture(tmp_path / "images/x.png")
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl"), "--images", str(tmp_path / "images")]
    path = llava_file(tmp_path / "a.jsonl", ev.load_data("jsonl", ev.parse(flags)), ["Crimson.", "you", "because"])
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == 50 and result["numbers"] == {"colour": 100}
    assert "  a: What? -> Crimson.\n  b: Who? -> you\n  c: Why? -> because\n" in capsys.readouterr().out
    write(tmp_path / "q.jsonl", [{"question_id": "a", "text": "What?"}] * 2)
    with pytest.raises(ValueError, match="question_id 'a' occurs 2 times"):
        ev.load_data("jsonl", ev.parse(flags))
    for line, message in [
            ({"question_id": "b"}, "q.jsonl, line 3: .*'text' is missing"),
            ({"text": 5}, "line 3: text is 5, expected a text"),
            ({"text": "x", "answer": {}}, "line 3: answer is {}"),
            ({"text": "x", "answer": ["x", ["y"]]}, r"line 3: answer\[1\] is"),
            ({"text": "x", "images": ["x.png", 5]}, r"line 3: images\[1\] is 5"),
            ({"text": "x", "question_id": [1]}, "line 3: question_id is"),
            ({"text": "x", "image": "a\\b.png"}, "line 3: .*expected a path with /"),
            ({"text": "x", "answer": True}, "line 3: answer is True"), ([], "line 3: not a json object")]:
        (tmp_path / "q.jsonl").write_text('{"text": "What?"}\n\n' + json.dumps(line))
        with pytest.raises(ValueError, match=message):
            ev.load_data("jsonl", ev.parse(flags))
    with pytest.raises(ValueError, match='with a line like {"text": '):
        ev.load_data("jsonl", ev.parse(["--task", "jsonl"]))


def test_own_questions_from_a_table_and_without_answers(tmp_path, capsys):
    """Empty cells of a table become null or NaN: a question without a picture or an answer. All answers are shown."""
    empty = {"image": None, "answer": float("nan"), "category": ""}
    write(tmp_path / "q.jsonl", [{"question_id": i, "text": f"<image>\nQuestion {i}?", **empty} for i in range(23)])
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl")]
    data = ev.load_data("jsonl", ev.parse(flags))
    assert {(e.image, e.truth, e.categories) for e in data.examples} == {(None, None, ())}
    path = llava_file(tmp_path / "a.jsonl", data, [f"text {i}" for i in range(23)])
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "  19: Question 19? -> text 19\n  and 3 more" in printed and "the questions come without answers" in printed
    assert "another prompt" not in printed
    page = (tmp_path / "out/report.html").read_text()
    assert "Answers: 23, of which 23 are shown" in page and "text 22" in page


def test_no_picture_of_an_own_question_is_lost(tmp_path, capsys):
    """What is under image and under images is asked about together; a field that nobody reads is named, once."""
    for name in ("x.png", "y.png"):
        picture(tmp_path / "images" / name)
    write(tmp_path / "q.jsonl", [{"text": "Same?", "image": "x.png", "images": ["y.png", "x.png"]},
                                 {"text": "What?", "img": "x.png", "picture": None}, {"text": "Why?", "img": "y.png"}])
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl"), "--images", str(tmp_path / "images")]
    first, second, _ = ev.load_data("jsonl", ev.parse(flags)).examples
    assert [path.name for path in first.pictures] == ["x.png", "y.png", "x.png"] and second.image is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "q.jsonl: img, picture is not read; the fields are question_id, text, image" in err


def test_another_programs_settings_beside_the_answers_are_not_ours(tmp_path):
    flags, data = prepare("textvqa", tmp_path / "eval")
    path = llava_file(tmp_path / "theirs/a.jsonl", data, ["x"] * 3)
    for settings in ({"editor.fontSize": 12}, {"task": 5}, {"task": ["textvqa"]}):
        write(path.with_name("settings.json"), settings)
        evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
        assert json.loads((tmp_path / "out/result.json").read_text())["settings"]["task"] == "textvqa"


def test_a_prompt_is_the_same_with_and_without_the_tag(tmp_path, capsys):
    """LLaVA's scripts save some prompts with it and some without: neither is another prompt."""
    texts = ["<image>\nA?\nb", "A?\nb"]
    write(tmp_path / "q.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl")]
    for prompt in ("<image>\nA?\nb", "A?\nb", "A?\nb\n<image>"):
        write(tmp_path / "a.jsonl", [{"question_id": i, "prompt": prompt, "text": "x"} for i in range(2)])
        evaluate([*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
        assert "another prompt" not in capsys.readouterr().out


def test_own_questions_about_several_pictures_and_from_archives(tmp_path, capsys):
    """The same answers and report from a folder, a zip and a tar; a question about two pictures is asked about both."""
    for name, color in (("x.png", "red"), ("y.png", "blue")):
        picture(tmp_path / "images" / name, color)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, tarfile.open(tmp_path / "x.tar", "w") as tape:
        for name in ("x.png", "y.png"):
            archive.write(tmp_path / "images" / name, name)
            tape.add(tmp_path / "images" / name, name)
    both = ["x.png", "y.png"]
    write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Which is red?", "image": both, "answer": "no"},
                                 {"question_id": 2, "text": "Is <image> like <image>?", "images": ["y.png", "x.png"]},
                                 {"question_id": 3, "text": "<image>\nColor?", "image": "x.png", "answer": "no"}])
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl"), "--model", str(TINY_MODEL), "--device", "cpu"]
    for place in ("images", "x.zip", "x.tar"):
        evaluate([*flags, "--images", str(tmp_path / place), "--out", str(tmp_path / f"out {place}")])
    answers, page = ((tmp_path / "out images" / name).read_text() for name in ("answers.jsonl", "report.html"))
    assert page.count("<img ") == 3 and "another prompt" not in page
    for place in ("x.zip", "x.tar"):
        assert (tmp_path / f"out {place}/answers.jsonl").read_text() == answers
        assert (tmp_path / f"out {place}/report.html").read_text().count("<img ") == 3
    model = load_weights.load_model(TINY_MODEL)
    [want] = ask(model, load_tokenizer(TINY_MODEL), "Which is red?", [[tmp_path / "images" / name for name in both]],
                 max_new_tokens=128)
    assert json.loads(answers.splitlines()[0])["text"] == want
    missing = (["--images", str(tmp_path / "x.tar")], "image missing: 'z.png' is not in")
    for images, problem in (missing, ([], "not given")):
        write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Which?", "image": "z.png"}])
        with pytest.raises(ValueError, match=problem):
            ev.load_data("jsonl", ev.parse([*flags, *images]))


def test_compare(tmp_path, capsys):
    flags, data = prepare("pope", tmp_path / "eval")
    a, b = (llava_file(tmp_path / name, data, answers)
            for name, answers in [("a.jsonl", ["Yes", "No"] * 3), ("b.jsonl", ["No \x1b", "Yes"] + ["Yes", "No"] * 2)])
    evaluate([*flags, "--compare", str(a), str(b)])
    out = capsys.readouterr().out
    assert "better on 0 of 6 questions and worse on 2" in out and "p = 0.5 (McNemar" in out
    assert out.count("worse   question") == 2 and "\x1b" not in out
    flags, data = prepare("textvqa", tmp_path / "eval")
    a, b = (llava_file(tmp_path / name, data, answers)
            for name, answers in [("a.jsonl", ["x", "y", "z"]), ("b.jsonl", ["acme", "1999", "stop"])])
    evaluate([*flags, "--compare", str(a), str(b)])
    assert "better on 3 of 3" in capsys.readouterr().out

# ---------------------------------------------------------------------------------------------------
# Generation, with the tiny golden model (random weights: its answers are noise and never end by themselves)


@pytest.fixture
def short(monkeypatch):
    """At most 12 new tokens."""
    monkeypatch.setattr(ev, "TASKS", {name: task._replace(max_new_tokens=12) for name, task in ev.TASKS.items()})


def many_shapes(root: Path, pictures: int = 5, questions: int = 3) -> list[str]:
    rows = []
    for i in range(pictures):
        picture(root / f"shapes/images/{i}.png", (50 * i, 90, 200 - 30 * i))
        rows += [{"question_id": f"{i}.{j}", "image": f"{i}.png", "text": "How many" + " red" * (i * j) + "?",
                  "answer": "2", "category": "count",
                  "chance": 0.2} for j in range(questions)]
    write(root / "shapes/questions.jsonl", rows)
    return ["--task", "shapes", "--root", str(root), "--model", str(TINY_MODEL), "--device", "cpu"]


@pytest.mark.parametrize("name", CASES)
def test_generate_each_task(name, tmp_path, short, capsys):
    """From official files to answers, result and report; its own answers file scores the same again."""
    flags, data = prepare(name, tmp_path / "eval")
    out = tmp_path / "out"
    evaluate([*flags, "--model", str(TINY_MODEL), "--device", "cpu", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(line["row"], line["question_id"]) for line in lines] == [(row, e.question_id)
                                                                      for row, e in enumerate(data.examples)]
    assert all({"prompt", "text", "truncated", "logprob"} <= line.keys() for line in lines)
    result = json.loads((out / "result.json").read_text())
    assert result["truncated"] == sum(line["truncated"] for line in lines) > 0
    assert (f"--scores {out}" in capsys.readouterr().out) == (result["value"] is not None)
    settings = result["settings"]
    assert (result["run"]["batch"], settings["dtype"], settings["image_mode"]) == (16, "fp32", "pad")
    # settings.json in the same folder says which task it is
    evaluate(["--root", str(tmp_path / "eval"), "--score", str(out / "answers.jsonl")])
    again = json.loads((out / "result.json").read_text())
    assert {**again, "versions": 0} == {**result, "versions": 0}
    page = (out / "report.html").read_text()
    scored_here = result["value"] is not None and not data.task.judge
    assert bool(result["calibration"]) == ("Accuracy by confidence" in page) == scored_here


def test_an_answers_logprob_is_the_teacher_forced_mean(tmp_path, short):
    """Its last token included, which is the end of text or the one at the limit."""
    evaluate([*many_shapes(tmp_path, 2), "--out", str(tmp_path / "out")])
    model, tok = load_weights.load_model(TINY_MODEL), load_tokenizer(TINY_MODEL)
    for line in map(json.loads, (tmp_path / "out/answers.jsonl").read_text().splitlines()[::2]):
        images = open_image(tmp_path / f"shapes/images/{line['question_id'].split('.')[0]}.png", model.config)
        prompt = encode_chat(model.config, tok, [line["prompt"]], images)
        said = plain_answer(model, prompt, images, 12, eot_id(tok))
        said += [eot_id(tok)] * (len(said) < 12)
        expected = all_logits(model, [prompt + said], images)[len(prompt) - 1:-1].log_softmax(-1)
        assert line["logprob"] == pytest.approx(expected.gather(1, torch.tensor(said)[:, None]).mean().item(), abs=6e-4)


def test_answers_in_8_bits_say_so(tmp_path, short, capsys):
    """The report names the arithmetic, and answers of another are not mixed with them. 4 bits are refused at once."""
    flags = [*many_shapes(tmp_path), "--out", str(tmp_path / "out")]
    evaluate([*flags, "--bits", "8"])
    printed = capsys.readouterr()
    assert "Image mode pad, fp32, weights in 8 bits, greedy" in printed.out and "would be" not in printed.err
    with pytest.raises(ValueError, match="bits"):
        evaluate(flags)
    with pytest.raises(ValueError, match="take more bits"):
        evaluate([*flags[:-1], str(tmp_path / "out4"), "--bits", "4"])
    assert not list((tmp_path / "out4").glob("answers*"))


def test_questions_are_encoded_like_sample_pys():
    """The golden prompt's ids, by way of a benchmark."""
    golden = json.loads((GOLDEN / "text.json").read_text())["prompts"]["one"]
    model = asking.Model(TINY_MODEL, load_weights.load_model, "fp32", "cpu", bits=16)
    [ids] = model.encode([scoring.Example(1, ev.BLANK, golden["turns"][0])], [0]).values()
    assert [i for i in ids if i != IMAGE_ID] == [i for i in golden["input_ids_tiny"] if i != -200]
    assert ids.count(IMAGE_ID) == model.config.vision.n_patches
    with pytest.raises(ValueError, match="question 1.* the model has 2048"):
        model.encode([scoring.Example(1, None, "a " * 3000)], [0])


def test_batch_size_and_processes_change_nothing(tmp_path, short):
    flags = many_shapes(tmp_path)
    outs = {name: tmp_path / name for name in ("b16", "b1", "b4", "exact", "two")}
    evaluate([*flags, "--out", str(outs["b16"])])
    evaluate([*flags, "--out", str(outs["b1"]), "--batch", "1"])
    evaluate([*flags, "--out", str(outs["b4"]), "--batch", "4"])
    evaluate([*flags, "--out", str(outs["exact"]), "--exact"])
    (tmp_path / "two.py").write_text("import eval\n"
        "eval.TASKS['shapes'] = eval.TASKS['shapes']._replace(max_new_tokens=12)\n"
        f"eval.main(eval.parse({[*flags, '--out', str(outs['two'])]}))")
    done = run_forked(tmp_path / "two.py", processes=2)
    assert done.returncode == 0, done.stderr
    files = {name: [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
             for name, out in outs.items()}
    logprobs = torch.tensor([[line.pop("logprob") for line in lines] for lines in files.values()])
    assert (logprobs - logprobs[0]).abs().max() < 0.0015        # rounded to a thousandth
    assert len(files["b16"]) == 30 and all(lines == files["b16"] for lines in files.values())
    assert sorted(p.name for p in outs["two"].iterdir()) == ["answers.jsonl", "report.html", "result.json",
                                                             "settings.json"]


class Killed(Exception):
    pass


def test_killed_run_continues(tmp_path, short, monkeypatch):
    """Stopped after any number of answers, with a torn line, continued: the same file, nothing asked twice."""
    flags = many_shapes(tmp_path, pictures=3)
    evaluate([*flags, "--out", str(tmp_path / "whole")])
    whole = (tmp_path / "whole/answers.jsonl").read_bytes()
    honest = asking.Model.answers
    for stop in (1, 7, 17):
        out, asked = tmp_path / f"killed{stop}", []

        def counting(*args, limit=stop):
            for answer in honest(*args):
                if len(asked) == limit:
                    raise Killed
                asked.append(answer)
                yield answer

        monkeypatch.setattr(asking.Model, "answers", counting)
        with pytest.raises(Killed):
            evaluate([*flags, "--out", str(out), "--batch", "4"])
        assert len((out / "answers.jsonl").read_text().splitlines()) == stop          # flushed answer by answer
        with open(out / "answers.jsonl", "a") as f:
            f.write('{"row": 3, "question_id": "1')
        monkeypatch.setattr(asking.Model, "answers", lambda *args: counting(*args, limit=1000))
        evaluate([*flags, "--out", str(out), "--batch", "16"])
        assert (out / "answers.jsonl").read_bytes() == whole and len(asked) == 18
    monkeypatch.setattr(load_weights, "load_model", lambda *args, **kind: pytest.fail("all is there, nothing to load"))
    run = json.loads((out / "result.json").read_text())["run"]
    for again in (["--out", str(out)], ["--score", str(out / "answers.jsonl")]):
        evaluate([*flags, *again])              # how the answers were made stays in the result
        assert json.loads((out / "result.json").read_text())["run"] == run and run["questions"] == 1


def test_kill_9(tmp_path):
    """A real kill in the middle of a real run."""
    flags = [*many_shapes(tmp_path, pictures=3, questions=2), "--batch", "2"]
    out = tmp_path / "out"
    process = Fork("eval.py", *flags, "--out", out)
    while process.poll() is None and not ((out / "answers.jsonl").exists()
                                          and (out / "answers.jsonl").read_bytes().count(b"\n") > 3):
        threading.Event().wait(0.01)
    process.kill()
    process.wait()
    evaluate([*flags, "--out", str(out)])
    evaluate([*flags, "--out", str(tmp_path / "whole")])
    assert (out / "answers.jsonl").read_bytes() == (tmp_path / "whole/answers.jsonl").read_bytes()


def test_one_run_per_folder(tmp_path):
    """A second run in the folder ends at once, in one line that names the first; after a kill the folder is free."""
    flags = [*many_shapes(tmp_path), "--batch", "1"]
    out = tmp_path / "out"
    first = Fork("eval.py", *flags, "--out", out)
    while first.poll() is None and not (out / "answers.jsonl").exists():
        threading.Event().wait(0.01)
    os.kill(first.pid, signal.SIGSTOP)                  # it must not end before the second has tried
    second = run_forked("eval.py", *flags, "--out", out)
    scored = run_forked("eval.py", *flags, "--score", out / "answers.jsonl", "--allow-missing")
    first.kill()
    first.wait()
    for done in (second, scored):
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"is in use by process {first.pid} on" in done.stderr
    evaluate([*flags, "--out", str(out), "--limit", "2"])
    assert not (out / LOCK).exists()


def test_a_limit_does_not_replace_the_result_of_more_questions(tmp_path, short):
    """Nor does it when just scoring; a run without the limit, or with a higher one, goes on from there."""
    flags, out = many_shapes(tmp_path), tmp_path / "out"
    for limit in ("2", "4"):
        evaluate([*flags, "--out", str(out), "--limit", limit])
        assert json.loads((out / "result.json").read_text())["n"] == int(limit)
    before = contents(out)
    with pytest.raises(ValueError, match="limit was 4, now 3, which would replace the result; give another --out"):
        evaluate([*flags, "--out", str(out), "--limit", "3"])
    assert contents(out) == before
    evaluate([*flags, "--out", str(out)])
    before = contents(out)
    for more in (["--out", str(out)], ["--score", str(out / "answers.jsonl")]):
        with pytest.raises(ValueError, match="limit was none, now 3, which would replace the result"):
            evaluate([*flags, *more, "--limit", "3"])
    assert contents(out) == before
    evaluate(["--score", str(out / "answers.jsonl"), *flags])
    evaluate([*flags, "--out", str(tmp_path / "beside"), "--limit", "3"])


def test_other_settings_are_refused(tmp_path, short):
    flags, out = many_shapes(tmp_path, pictures=1, questions=1), str(tmp_path / "out")
    evaluate([*flags, "--out", out])
    before = (tmp_path / "out/answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match="image_mode was 'pad', now 'crop'"):
        evaluate([*flags, "--out", out, "--image-mode", "crop"])
    with pytest.raises(ValueError, match="dtype was 'fp32', now 'bf16'"):
        evaluate([*flags, "--out", out, "--dtype", "bf16"])
    with pytest.raises(ValueError, match="fp16: expected fp32 or bf16; .* overflow in fp16"):
        evaluate([*flags, "--out", out, "--dtype", "fp16"])
    write(tmp_path / "foreign/notes.txt", "mine")
    with pytest.raises(ValueError, match="not made by eval.py"):
        evaluate([*flags, "--out", str(tmp_path / "foreign")])
    write(tmp_path / "out/settings.json",
          {**json.loads((tmp_path / "out/settings.json").read_text()), "model": "another"})
    with pytest.raises(ValueError, match="model was 'another'"):
        evaluate([*flags, "--out", out])
    assert (tmp_path / "out/answers.jsonl").read_bytes() == before


def test_one_picture_runs_the_tower_once(tmp_path, short, monkeypatch):
    """POPE asks many questions about a picture; also where they do not fit one batch."""
    make_pope(tmp_path)
    seen, forward = [], vision.VisionTower.forward
    monkeypatch.setattr(vision.VisionTower, "forward", lambda self, images: seen.append(len(images))
                        or forward(self, images))
    for batch in ("16", "4"):
        seen.clear()
        evaluate(["--task", "pope", "--root", str(tmp_path), "--model", str(TINY_MODEL), "--device", "cpu", "--out",
                 str(tmp_path / batch), "--batch", batch])
        assert sum(seen) == 1


def test_bad_images_and_models(tmp_path, short, monkeypatch):
    flags = many_shapes(tmp_path, pictures=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model: neither out/finetune"):
        evaluate(flags[:4])
    with pytest.raises(ValueError, match="image unreadable: the picture of question 'q7'"):
        asking.open_pictures(scoring.Example("q7", b"<html>", "?"), LLaVAConfig())
    (tmp_path / "shapes/images/1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="1.png"):
        evaluate([*flags, "--out", str(tmp_path / "out")])
    (tmp_path / "shapes/images/1.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 images are missing, the first is .* Get them: run `make demo`"):
        evaluate([*flags, "--out", str(tmp_path / "out2")])
    assert not (tmp_path / "out2").exists()


def test_several_tasks_share_a_model_and_end_in_one_table(tmp_path, short, capsys, monkeypatch):
    flags = many_shapes(tmp_path, pictures=1)
    make_scienceqa(tmp_path)
    loads, load = [], load_weights.load_model
    monkeypatch.setattr(load_weights, "load_model", lambda *args, **kind: loads.append(1) or load(*args, **kind))
    evaluate(["--task", "shapes,scienceqa", *flags[2:], "--out", str(tmp_path / "out"), "--limit", "2"])
    table = capsys.readouterr().out.split("all tasks")[1]
    assert "shapes (all)" in table and "scienceqa (test)" in table and "68.4" in table and loads == [1]
    assert json.loads((tmp_path / "out/scienceqa/result.json").read_text())["limit"] == 2
    assert ev.chosen_tasks(ev.parse(["--task", "paper,gqa"])) == [*ev.PAPER, "gqa"]


# ---------------------------------------------------------------------------------------------------
# GPUs


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says it has two GPUs -> what the program then asks of them, in order."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"current {device}"))
    monkeypatch.setattr(asking, "choose_device", lambda device: asked.append("touch one") or "cuda")
    return asked


def test_a_process_makes_its_gpu_the_current_one_before_it_touches_any(monkeypatch, two_gpus):
    """Events are recorded on the current GPU: without this, processes 1 to 7 would read stale ids."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert asking.own_device(None) == "cuda:1"
    assert two_gpus[:2] == ["current cuda:1", "touch one"]


def test_more_processes_than_gpus_is_one_line(monkeypatch, two_gpus):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs: give torchrun one for each"):
        asking.own_device(None)


class Loading(Exception):
    pass


@pytest.mark.parametrize("device, has_bf16, dtype", [
    ("cuda:0", False, torch.float32), ("cuda:0", True, torch.bfloat16), ("cpu", True, torch.float32)])
def test_bf16_is_for_gpus_that_have_it(tmp_path, monkeypatch, device, has_bf16, dtype):
    """A T4 or V100 emulates it, many times slower; on a CPU fp32 keeps answers independent of the batch."""
    def load(source, dtype, device, bits):
        raise Loading(dtype)

    monkeypatch.setattr(asking, "has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(asking, "own_device", lambda asked: device)
    monkeypatch.setattr(load_weights, "load_model", load)
    with pytest.raises(Loading) as loading:
        evaluate([*many_shapes(tmp_path, pictures=1), "--out", str(tmp_path / "out")])
    assert loading.value.args == (dtype,)


# ---------------------------------------------------------------------------------------------------
# Mipha


def mipha_config():
    return LLaVAConfig(vision=SIGLIP_SO400M_384)


def test_paper_mode_is_the_one_behind_each_models_own_table(tmp_path):
    """LLaVA-Phi's scripts crop for three benchmarks. Mipha's pad ScienceQA, and give MM-Vet's pictures to SigLIP's
    processor as they are, which squashes them."""
    modes = {}
    for name in ("scienceqa", "mmvet", "llavabench", "pope", "mmmu"):
        flags, data = prepare(name, tmp_path / name)
        args = ev.parse([*flags, "--image-mode", "paper"])
        modes[name] = [ev.generation_settings(data, "x", config, args)["image_mode"]
                       for config in (LLaVAConfig(), mipha_config())]
    assert modes == {"scienceqa": ["crop", "pad"], "mmvet": ["crop", "squash"], "llavabench": ["crop", "squash"],
                     "pope": ["pad", "pad"], "mmmu": ["pad", "pad"]}


def test_padding_and_blank_pictures_have_the_towers_colour(tmp_path):
    wide = picture(tmp_path / "wide.png", (255, 0, 0))
    for config, color in [(mipha_config(), [127, 127, 127]), (LLaVAConfig(), [122, 116, 104])]:
        config = dataclasses.replace(config, image_mode="pad")
        size = config.vision.image_size
        blank = asking.open_pictures(scoring.Example(1, scoring.BLANK, "?"), config)
        assert blank.shape == (1, 3, size, size)
        assert blank[0, :, 5, 7].tolist() == color
        padded = asking.open_pictures(scoring.Example(1, wide, "?"), config)
        assert padded[0, :, 0, 0].tolist() == color and padded[0, :, size // 2, 5].tolist() == [255, 0, 0]


def test_mipha_is_asked_like_llava_phi(tmp_path, short, capsys):
    """End to end with a tiny SigLIP tower, a question about a blank picture included; batches change nothing."""
    flags = many_shapes(tmp_path, pictures=2)
    flags[flags.index(str(TINY_MODEL))] = str(TINY_MIPHA)
    for batch in ("1", "16"):
        evaluate([*flags, "--out", str(tmp_path / batch), "--batch", batch])
    settings = json.loads((tmp_path / "1/settings.json").read_text())
    assert (settings["reference"], settings["image_mode"]) == ("mipha", "pad")
    answers = (tmp_path / "1/answers.jsonl").read_bytes()
    assert answers == (tmp_path / "16/answers.jsonl").read_bytes() and answers.count(b"\n") == 12


def test_a_mipha_models_score_is_compared_with_miphas(tmp_path, capsys):
    """The column of one's own kind comes first, also when answers are scored again later."""
    flags, data = prepare("pope", tmp_path / "eval")
    out = tmp_path / "out"
    settings = ev.generation_settings(data, "x", mipha_config(), ev.parse([*flags, "--dtype", "fp32"]))
    with ev.begin(out, settings):
        pass
    path = llava_file(out / "answers.jsonl", data, ["Yes"] * 6)
    evaluate([*flags, "--score", str(path)])
    printed = capsys.readouterr().out
    assert list(json.loads((out / "result.json").read_text())["published"])[0] == "Mipha-3B"
    assert printed.index("Mipha-3B") < printed.index("LLaVA-Phi-3B") and "compare with is Mipha-3B's" in printed
    assert "LLaVA-Phi's architecture, well trained" in printed
