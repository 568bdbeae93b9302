"""
The scorers against the official results (tests/eval_vectors), and every task end to end on tiny data in its official layout.

$ python -m pytest tests/test_eval.py
"""
import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

import eval as ev

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/golden/tiny-llava-phi"


def vectors(task: str, key: str = "vectors") -> list[dict]:
    return json.loads((ROOT / f"tests/eval_vectors/{task}.json").read_text())[key]


def same(cases: list[tuple]) -> None:
    """(found, official, the case): all wrong ones are shown at once."""
    assert not [case for case in cases if case[0] != case[1]]

# ----------------------------------------------------------------------------------------------------
# Normalisers and parsers


def test_contraction_table_checksum():
    table = "".join(f"{key}\t{value}\n" for key, value in sorted(ev.CONTRACTIONS.items()))
    assert len(ev.CONTRACTIONS) == 120
    assert hashlib.sha256(table.encode()).hexdigest() == "f7e93e52d4cd2e370d30e576bfe54d4437e95fd593cec197817e9e388c46659f"


def test_vqa_normalisers():
    same([(ev.normalize_evalai(v["in"]), v["out"], v) for v in vectors("textvqa", "normalisation")])
    same([(ev.normalize_evalai(v["in"]), v["evalai_processor"], v) for v in vectors("vqav2", "normalisation")])
    same([(ev.normalize_vqa(v["in"]), v["vqa_official_norm"], v) for v in vectors("vqav2", "normalisation")])
    same([(ev.normalize_evalai(v["text"]), v["submitted_answer"], v) for v in vectors("vizwiz", "submission")])


@pytest.mark.parametrize("task", ["vqav2", "vizwiz", "textvqa"])
def test_vqa_scores(task):
    percent = lambda x: round(100 * x, 9)
    for v in vectors(task):
        text, humans = v["prediction"], v["gt_answers"]
        assert percent(ev.textvqa_accuracy(text, humans)) == v.get("score_m4c", v.get("score")), v
        if task != "textvqa":
            assert percent(ev.vqa_accuracy(text, humans)) == v["score_vqa2021_raw"], v
            assert percent(ev.vqa_accuracy(ev.normalize_evalai(text), humans)) == v["score_vqa2021_after_evalai"], v


def test_soft_accuracy_of_matches():
    assert [round(ev.soft_accuracy("a", ["a"] * m + ["b"] * (10 - m)), 9) for m in range(11)] == [0, 0.3, 0.6, 0.9] + [1] * 7


def test_gqa():
    same([(ev.gqa_answer(v["text"]), v["submitted"], v) for v in vectors("gqa")])
    same([(ev.gqa_answer(v["text"]) == v["answer"], v["correct"], v) for v in vectors("gqa")])
    same([(ev.gqa_answer(text), answer) for text, answer in [
        ("Yes.", "yes"), ("Yes. ", "yes. "), ("a.b.", "a.b"), ("", ""), ("...", ""), (".x", ".x"), ("TWO", "two"), (" no", " no")]])


def test_pope():
    same([(ev.pope_yes_no(v["text"]), v["pred"], v) for v in vectors("pope", "parse_vectors")])
    for v in vectors("pope", "set_vectors"):
        examples = [ev.Example(i, Path(str(i)), "", label, ("random",)) for i, label in enumerate(v["labels"])]
        score = ev.summarise_pope(examples, [ev.grade_pope(e, text) for e, text in zip(examples, v["texts"])])
        official = {"F1": v["f1"] or 0, "precision": v["precision"] or 0, "recall": v["recall"] or 0, "yes ratio": v["yes_ratio"],
                    "accuracy": (v["TP"] + v["TN"]) / len(v["texts"])}
        for name, value in official.items():
            assert score.others[f"random {name}"] == pytest.approx(100 * value), (name, v)
        assert score.value == pytest.approx(100 * (v["f1"] or 0))


def test_pope_counts_what_the_rule_cannot_read():
    unread = lambda text: ev.grade_pope(ev.Example(0, None, "", "yes"), text).unparsed
    assert [unread(text) for text in ("Yes", "no.", "NO!", "", "maybe", "isn't", "Not really")] == [False] * 3 + [True] * 3 + [False]


def test_mme():
    same([(ev.mme_yes_no(v["text"]), v["parsed"], v) for v in vectors("mme", "parse_vectors")])
    for v in vectors("mme", "set_vectors"):
        rows = [(subtask, *row) for subtask, lines in v["answers"].items() for row in lines]
        examples = [ev.Example(image, Path(image), question, truth.lower(), (subtask,)) for subtask, image, question, truth, _ in rows]
        score = ev.summarise_mme(examples, [ev.grade_mme(e, row[-1]) for e, row in zip(examples, rows)])
        expected = v["expected"]
        assert score.value == pytest.approx(expected["Perception"]["total"], rel=1e-12)
        assert score.others["cognition"] == pytest.approx(expected["Cognition"]["total"], rel=1e-12)
        for subtask, value in (expected["Perception"]["tasks"] | expected["Cognition"]["tasks"]).items():
            assert score.others[subtask] == pytest.approx(value, rel=1e-12)


def test_scienceqa():
    same([(ev.scienceqa_letter(v["text"]) or "FAILED", v["parsed"], v) for v in vectors("scienceqa")])
    for v in vectors("scienceqa"):
        truth = ev.LETTERS[v["answer_index"]]
        assert (ev.grade_scienceqa(ev.Example(0, None, "", truth), v["text"]).points == 1) == v["correct"], v
    same([(ev.scienceqa_letter(text), letter) for text, letter in [
        ("b", None), ("", None), (" B", None), ("The answer is Because.", "B"), ("The answer is A. The answer is B.", None), ("F", None)]])


def test_mmbench():
    same([(ev.mmbench_letter(v["prediction"], v["choices"]), v["inferred"], v) for v in vectors("mmbench", "can_infer_vectors")])
    for v in vectors("mmbench", "can_infer_vectors"):
        strict = ev.grade_mmbench(ev.Example(0, None, "", "B", info={"options": v["choices"]}), v["prediction"]).raw[0]
        assert strict == (v["strip_equals_letter"] == "B")
    animals = dict(zip("ABCD", ["teddy bear", "rabbit", "cat", "dog"]))
    assert ev.mmbench_letter("A dog is sitting on the green grass", animals) == "D"
    assert ev.mmbench_letter("I am rather sure that the answer is **c** and that it is so for every reader of the text", animals) == "C"


def test_mmbench_circular():
    options = {"A": "x", "B": "y"}
    example = lambda index, label: ev.Example(index, None, "", "A", (label,), {"options": options})
    examples = [example(1, "CP"), example(1_000_001, "CP"), example(2, "LR"), example(1_000_002, "LR"), example(3, "LR")]
    score = ev.summarise_mmbench(examples, [ev.grade_mmbench(e, text) for e, text in zip(examples, ["A", "A.", "A", "B", "A"])])
    assert score.value == pytest.approx(200 / 3)            # 1 and 3; one round of 2 is wrong
    assert score.others["circular, bare letters only"] == pytest.approx(100 / 3)        # "A." is not a bare letter
    assert score.others["single pass"] == 100
    assert (score.others["CP"], score.others["LR"]) == (100, 50)


def test_seedbench():
    grade = lambda v: ev.grade_seedbench(ev.Example(0, None, "", v["answer"]), v["prediction"]).points
    same([(grade(v) == 1, v["correct_llava"], v) for v in vectors("seedbench")])


def test_mmmu():
    same([(ev.mmmu_choice(v["response"], v["index2ans"]), v["parsed"], v) for v in vectors("mmmu", "mc_parse_vectors")])
    same([(sorted(map(str, ev.mmmu_open(v["response"]))), v["parsed_sorted"], v) for v in vectors("mmmu", "open_vectors")])
    same([(ev.mmmu_open_correct(v["response"], v["answer"]), v["correct"], v) for v in vectors("mmmu", "open_vectors")])
    for v in vectors("mmmu", "mc_eval_vectors"):
        example = ev.Example(0, None, "", v["gold"], info={"options": dict.fromkeys("ABCD", "?")})
        assert (ev.grade_mmmu(example, v["pred"]).points == 1) == v["correct"], v


def test_mmmu_draws_like_the_official_code():
    """Unparsed choices take random.choice after random.seed(42), one draw each, in file order."""
    import random
    rng = random.Random(42)
    drawn = [rng.choice(list("ABCD")) for _ in range(8)]
    examples = [ev.Example(i, None, "", letter, ("Science", "Math"), {"options": dict.fromkeys("ABCD", "?")}) for i, letter in enumerate(drawn)]
    score = ev.summarise_mmmu(examples, [ev.grade_mmmu(e, "no idea") for e in examples])
    assert (score.value, score.others["unparsed = wrong"]) == (100, 0)


def test_judges_numbers():
    same([(ev.mmvet_grade(v["content"]), v["score"], v) for v in vectors("mmvet", "judge_score_parse")])
    same([(ev.llavabench_pair(v["review"]), tuple(v["tuple"]), v) for v in vectors("llava-bench-in-the-wild", "parse_vectors")])
    same([(ev.mmvet_grade(text), grade) for text, grade in [
        ("0", 0), ("1.0 because", 1), ("1.1", None), ("nan", None), ("", None), ("inf", None), ("0.7\n", 0.7), (".3", 0.3), ("one", None)]])
    same([(ev.llavabench_pair(text), pair) for text, pair in [
        ("8,9", (8, 9)), ("8.5 9", (8.5, 9)), ("8 9 ", (-1, -1)), (" 8 9", (-1, -1)), ("8\t9", (-1, -1)), ("a b", (-1, -1)), ("8 9 10", (-1, -1))]])


def test_plain_answers():
    same([(ev.plain_answer(text), answer) for text, answer in [
        ("Red", "red"), ("red.", "red"), (" red \n", "red"), ("RED...", "red"), ("", ""), (".", ""), ("two red", "two red"), ("3", "3"),
        ("3.5", "3.5"), ("no .", "no"), ("a, b", "a, b"), ("Ü.", "ü")]])


def test_intervals():
    assert ev.interval_of_mean([1.0] * 8 + [0.0] * 2)[:2] == pytest.approx((49.016, 94.332), abs=1e-3)     # Wilson, as tabulated
    assert ev.interval_of_mean([0.5, 0.6, 0.4, 0.5])[2] == "normal"
    low, high, _ = ev.interval_of_mean([1.0] * 4)
    assert 0 < low < high <= 100.0001
    assert ev.mcnemar(1, 7) == pytest.approx(2 * 9 / 256) and ev.mcnemar(3, 3) == 1 and ev.mcnemar(0, 0) == 1
