"""The demo's data: answers that the picture bears out, sets that do not overlap, LLaVA's format, bases that load."""
import itertools
import json
import random
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import ROOT, contents

from data import encode, load_tokenizer
from demo import run
from demo.pretrain_bases import in_words
from demo.shapes import (COLORS, NAMES, QUARTERS, QUESTION_KINDS, Shape, caption, chat, converse, draw_scene,
                         is_held_out, paint, question_of, write_data)
from lib.folders import open_weights
from load_weights import load_into
from model import LLaVAPhi, init_weights

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SIDE = {"left": "left", "right": "right", "above": "top", "below": "bottom"}


def answer_by_hand(scene, question: str) -> str | None:
    """The answer again, from the words of the question alone; None if it presumes something that is not so."""
    things, words = {s.name: QUARTERS[s.quarter] for s in scene}, question.rstrip("?").split()
    only = lambda found: found[0] if len(found) == 1 else None
    if question.startswith("How many"):
        return ["zero", "one", "two", "three"][len(things)]
    if question.startswith("What colour"):
        return only([name.split()[0] for name in things if name.endswith(words[-1])])
    if question.startswith("What shape"):
        return only([name.split()[1] for name in things if name.startswith(words[-1])])
    if question.startswith("Where"):
        return things.get(" ".join(words[-2:]))
    if question.startswith("What is at"):
        return only([name for name, place in things.items() if place == " ".join(words[-2:])])
    if question.startswith("Is there"):
        return "yes" if " ".join(words[-2:]) in things else "no"
    a, b = things.get(" ".join(words[2:4])), things.get(" ".join(words[-2:]))
    first, second = SIDE[words[4]], SIDE[OPPOSITE[words[4]]]
    if a is None or b is None or {first, second} - {*a.split(), *b.split()}:
        return None
    return "yes" if first in a and second in b else "no"


def all_scenes() -> list:
    return [tuple(Shape(place, *name.split()) for place, name in zip(places, names))
            for n in (1, 2, 3)
            for places in itertools.combinations(range(4), n) for names in itertools.permutations(NAMES, n)]


def questions(rng: random.Random, held_out: bool, n: int):
    for _ in range(n):
        scene = draw_scene(rng, held_out)
        for kind in QUESTION_KINDS:
            if made := question_of(kind, scene, rng.choice(scene), rng):
                yield scene, kind, *made, QUESTION_KINDS[kind]


def test_every_answer_follows_from_the_scene():
    for scene, _, question, answer, _ in questions(random.Random(3), False, 500):
        assert answer == answer_by_hand(scene, question), (caption(scene), question)


def test_the_question_alone_says_little_about_the_answer():
    """Protects the comparison with a blank image: no kind of question has an answer that is right most of the time."""
    answers = {}
    for _, category, _, answer, n in questions(random.Random(4), True, 3000):
        answers.setdefault((category, n), Counter())[answer] += 1
    for (category, n), counter in answers.items():
        assert len(counter) == n and max(counter.values()) / counter.total() < 1.5 / n + 0.02, (category, counter)


def test_answers_do_not_follow_from_the_turns_before():
    """Protects against conversations that teach to read the text instead of the picture.

    After each turn some scene fits all that was said and has another answer to the next question. Two answers in a
    thousand are not so: "the square is yellow" settles "Is there a green square?".
    """
    rng, scenes, settled = random.Random(5), all_scenes(), []
    for _ in range(600):
        turns = converse(draw_scene(rng, False), rng)
        for i, (question, answer) in enumerate(turns if turns[0][0] != "Describe the picture." else []):
            fits = lambda s: all(answer_by_hand(s, q) == a for q, a in turns[:i])
            settled.append(not any(answer_by_hand(s, question) not in (None, answer) and fits(s) for s in scenes))
    assert np.mean(settled) < 0.01, f"{np.mean(settled):.1%} of the answers follow from what was said before"


def test_chats_have_up_to_eight_questions_of_any_kind_at_any_place():
    """Protects a long chat: where all conversations of the training end after four questions, the fifth fails."""
    rng, lengths, places = random.Random(6), Counter(), Counter()
    for _ in range(2000):
        scene = draw_scene(rng, False)
        turns = chat(scene, rng)
        lengths[len(turns)] += 1
        for i, (question, answer) in enumerate(turns):
            assert answer == (caption(scene) if question.startswith("Describe") else answer_by_hand(scene, question))
            places[question.split()[0] + " " + (answer if answer in ("yes", "no") else ""), i] += 1
    assert min(lengths[n] for n in range(2, 9)) > 100, lengths
    for kind in ("How ", "Is yes", "Is no", "What ", "Where ", "Describe "):
        assert all(places[kind, i] for i in range(8)), (kind, places)


def test_held_out_scenes_are_in_no_training_picture(tmp_path):
    write_data(tmp_path, n_pretrain=40, n_finetune=40, n_heldout=20, seed=5)
    rng = random.Random(6)
    assert all(is_held_out(draw_scene(rng, held_out)) == held_out for held_out in (False, True) for _ in range(300))
    said = lambda name: {r["conversations"][1]["value"] for r in json.loads((tmp_path / name).read_text())}
    assert not said("pretrain.json") & said("heldout_captions.json")
    pixels = lambda folder, stem: {path.read_bytes() for path in (tmp_path / folder).glob(stem + "*")}
    assert not pixels("images", "c") & (pixels("shapes/images", "") | pixels("images", "heldout"))


def test_the_same_seed_draws_the_same_files_in_llavas_format(tmp_path):
    for name in ("a", "b"):
        write_data(tmp_path / name, n_pretrain=5, n_finetune=5, n_heldout=3, seed=7)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 20
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    tok = load_tokenizer(ROOT / "demo" / "phi")
    for name, template in (("pretrain.json", "plain"), ("finetune.json", "v0")):
        for record in json.loads((tmp_path / "a" / name).read_text()):
            ids, labels = encode(record, tok, template)
            assert len(ids) == len(labels) and (tmp_path / "a" / "images" / record["image"]).is_file()


def test_the_benchmark_does_not_depend_on_the_training_data(tmp_path):
    """Protects the published accuracies from a change of the training data's size."""
    for name, n in (("a", 3), ("b", 4)):
        write_data(tmp_path / name, n_pretrain=n, n_finetune=n, n_heldout=2, seed=7)
    a, b = (contents(tmp_path / name / "shapes") for name in ("a", "b"))
    assert a == b and len(a) == 3


def test_a_picture_shows_its_colors_where_the_scene_says():
    rng = random.Random(8)
    for _ in range(50):
        scene = draw_scene(rng, False)
        pixels = np.asarray(paint(scene, rng)).astype(int)
        for place in range(4):
            top, left = 28 * (place // 2), 28 * (place % 2)
            quarter = pixels[top:top + 28, left:left + 28].reshape(-1, 3)
            bright, there = quarter[quarter.max(1) > 120], [s for s in scene if s.quarter == place]
            assert (len(bright) > 40) == bool(there)
            if there:
                nearest = min(COLORS, key=lambda c: np.abs(np.median(bright, 0) - COLORS[c]).sum())
                assert nearest == there[0].color


def test_a_patch_is_one_token():
    """The demo's language model reads a picture as 16 words, in the places of its 16 patches."""
    tok = load_tokenizer(ROOT / "demo" / "phi")
    for scene in all_scenes()[:len(NAMES) * 4]:                         # those of one shape
        assert len(tok.encode(" " + in_words(scene), add_special_tokens=False).ids) == 16


def test_the_committed_bases_load_in_the_official_layouts():
    folders = [ROOT / "demo" / "phi", ROOT / "demo" / "clip"]
    bases = open_weights(*folders)
    model = LLaVAPhi(bases.config)
    init_weights(model, torch.Generator().manual_seed(0))
    load_into(model, bases, allow_missing=("projector.",))
    assert sum(p.numel() for p in model.parameters()) < 3e6
    assert all(file.stat().st_size < 3e6 for folder in folders for file in folder.iterdir())


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """What the demo has written before its report, with answers of which every other one is right."""
    monkeypatch.setattr(run, "OUT", tmp_path)
    monkeypatch.setattr(run, "DATA", tmp_path / "data")
    write_data(tmp_path / "data", n_pretrain=1, n_finetune=1, n_heldout=9, seed=9)
    for stage in ("pretrain", "finetune"):
        (tmp_path / stage).mkdir()
        lines = [{"step": 0, "val_loss": 2.0}, {"step": 0, "loss": 2.0, "skipped": False},
                 {"step": 1, "loss": 1.0, "skipped": False}, {"step": 2, "val_loss": 1.0, "val_loss_blank": 1.5}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "eval").mkdir()
    result = {"value": 50.0, "numbers": {"chance": 30.0, "blank image": 31.0, "place": 70.0}}
    (tmp_path / "eval" / "result.json").write_text(json.dumps(result))
    rows = run.read_jsonl(tmp_path / "data" / "shapes" / "questions.jsonl")
    texts = [row["answer"] if i % 2 else "<script>alert(1)</script>" for i, row in enumerate(rows)]
    (tmp_path / "eval" / "answers.jsonl").write_text("".join(
        json.dumps({"question_id": row["question_id"], "text": text}) + "\n" for row, text in zip(rows, texts)))
    (tmp_path / "chat_answers.txt").write_text("\n".join(texts) + "\n")
    return tmp_path


def test_the_report_shows_text_as_text(finished):
    """Protects against a model's answer becoming markup; wrong answers are marked, the chats and both stages shown."""
    page = run.report().read_text()
    assert "<script" not in page and page.count('<b class="wrong">&lt;script&gt;') > 5
    for mark in ('<polygon class="band"', "the reference's band", ">blank pictures<"):
        assert page.count(mark) == 2, mark
    assert page.count("<svg") == 2 and "✗ (really " in page and page.count(" ✓</b>") > 5
    assert 'class="cards chat"' in page


def test_the_demo_fails_where_its_chats_do(finished, capsys):
    in_chat, alone = map(run.share_right, run.read_chats_and_alone())
    assert alone == in_chat and len(alone) == 8 and 45 < alone[-1] < 55
    run.compare_chats(alone, [share + 4 for share in alone])
    assert "all questions about a picture" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the chats fail: .* expected at most 5 points fewer than alone"):
        run.compare_chats(alone, [share + 6 for share in alone])


def test_an_interrupted_demo_goes_on(finished, monkeypatch, capsys):
    """With all its files, where the program is the same and the report is not there yet; else it begins anew."""
    began = lambda: run.clear_or_go_on() or not (finished / "pretrain").exists()
    assert began()
    (finished / "pretrain").mkdir()
    assert not began() and "going on with the interrupted demo" in capsys.readouterr().out
    monkeypatch.setattr(run, "program_checksum", lambda: "another program's")
    assert began()
    (finished / "pretrain").mkdir()
    (finished / "report.html").touch()
    assert began() and not (finished / "report.html").exists()


def test_ctrl_c_lets_a_step_save_what_it_has(tmp_path, monkeypatch):
    """Ctrl-C reaches the demo and its step at once; the demo must not end before the step has saved."""
    saving = "import pathlib, time; time.sleep(1); pathlib.Path('saved').touch()"
    monkeypatch.chdir(tmp_path)
    wait, interrupted = subprocess.Popen.wait, []

    def interrupt_once(process, timeout=None):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        run.run_step("-c", saving)
    assert (tmp_path / "saved").exists()
