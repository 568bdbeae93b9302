"""
The scorers against the official results (tests/eval_vectors), and every task end to end on tiny data.

$ python -m pytest tests/test_eval.py
"""
import base64
import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import eval as ev
from benchmarks import gqa, llavabench, mmbench, mme, mmmu, mmvet, pope, scienceqa, scoring, seedbench, textvqa, vizwiz
from lib.common import LOCK
from lib.folders import open_weights
from vision import VisionConfig

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
    table = "".join(f"{key}\t{value}\n" for key, value in sorted(scoring.CONTRACTIONS.items()))
    assert len(scoring.CONTRACTIONS) == 120
    digest = hashlib.sha256(table.encode()).hexdigest()
    assert digest == "f7e93e52d4cd2e370d30e576bfe54d4437e95fd593cec197817e9e388c46659f"


def test_vqa_normalisers():
    same([(scoring.normalize_evalai(v["in"]), v["out"], v) for v in vectors("textvqa", "normalisation")])
    same([(scoring.normalize_evalai(v["in"]), v["evalai_processor"], v) for v in vectors("vqav2", "normalisation")])
    same([(scoring.normalize_vqa(v["in"]), v["vqa_official_norm"], v) for v in vectors("vqav2", "normalisation")])
    same([(scoring.normalize_evalai(v["text"]), v["submitted_answer"], v) for v in vectors("vizwiz", "submission")])


@pytest.mark.parametrize("task", ["vqav2", "vizwiz", "textvqa"])
def test_vqa_scores(task):
    percent = lambda x: round(100 * x, 9)
    for v in vectors(task):
        text, humans = v["prediction"], v["gt_answers"]
        grade = textvqa.grade_answer(scoring.Example(0, None, "", humans), text)
        assert percent(grade.score) == v.get("score_m4c", v.get("score")), v
        if task != "textvqa":
            assert percent(scoring.vqa_accuracy(text, humans)) == v["score_vqa2021_raw"], v
            assert percent(scoring.vqa_accuracy(scoring.normalize_evalai(text), humans)) == v["score_vqa2021_after_evalai"], v


def test_soft_accuracy_of_matches():
    of_matches = [scoring.soft_accuracy("a", ["a"] * m + ["b"] * (10 - m)) for m in range(11)]
    assert [round(accuracy, 9) for accuracy in of_matches] == [0, 0.3, 0.6, 0.9] + [1] * 7


def test_gqa():
    same([(gqa.gqa_answer(v["text"]), v["submitted"], v) for v in vectors("gqa")])
    same([(gqa.gqa_answer(v["text"]) == v["answer"], v["correct"], v) for v in vectors("gqa")])
    same([(gqa.gqa_answer(text), answer) for text, answer in [
        ("Yes.", "yes"), ("Yes. ", "yes. "), ("a.b.", "a.b"), ("", ""), ("...", ""), (".x", ".x"), ("TWO", "two"),
        (" no", " no")]])


def test_pope():
    said = lambda text: pope.grade_answer(scoring.Example(0, None, "", "yes"), text).parsed
    same([(said(v["text"]), v["pred"], v) for v in vectors("pope", "parse_vectors")])
    for v in vectors("pope", "set_vectors"):
        examples = [scoring.Example(i, Path(str(i)), "", label, ("random",)) for i, label in enumerate(v["labels"])]
        score = pope.summarize(examples, [pope.grade_answer(e, text) for e, text in zip(examples, v["texts"])])
        official = {"F1": v["f1"] or 0, "precision": v["precision"] or 0, "recall": v["recall"] or 0,
                    "yes ratio": v["yes_ratio"],
                    "accuracy": (v["TP"] + v["TN"]) / len(v["texts"])}
        for name, value in official.items():
            assert score.subscores[f"random {name}"] == pytest.approx(100 * value), (name, v)
        assert score.value == pytest.approx(100 * (v["f1"] or 0))


def test_pope_counts_what_the_rule_cannot_read():
    unread = lambda text: pope.grade_answer(scoring.Example(0, None, "", "yes"), text).unparsed
    assert not any(map(unread, ("Yes", "no.", "NO!", "Not really")))
    assert all(map(unread, ("", "maybe", "isn't")))


def test_mme():
    same([(mme.mme_yes_no(v["text"]), v["parsed"], v) for v in vectors("mme", "parse_vectors")])
    for v in vectors("mme", "set_vectors"):
        rows = [(subtask, *row) for subtask, lines in v["answers"].items() for row in lines]
        examples = [scoring.Example(image, Path(image), question, truth.lower(), (subtask,))
                    for subtask, image, question, truth, _ in rows]
        score = mme.summarize(examples, [ev.TASKS["mme"].grade(e, row[-1]) for e, row in zip(examples, rows)])
        expected = v["expected"]
        assert score.value == pytest.approx(expected["Perception"]["total"], rel=1e-12)
        assert score.subscores["cognition"] == pytest.approx(expected["Cognition"]["total"], rel=1e-12)
        for subtask, value in (expected["Perception"]["tasks"] | expected["Cognition"]["tasks"]).items():
            assert score.subscores[subtask] == pytest.approx(value, rel=1e-12)


def test_scienceqa():
    same([(scienceqa.scienceqa_letter(v["text"]) or "FAILED", v["parsed"], v) for v in vectors("scienceqa")])
    for v in vectors("scienceqa"):
        truth = scoring.LETTERS[v["answer_index"]]
        assert (ev.TASKS["scienceqa"].grade(scoring.Example(0, None, "", truth), v["text"]).score == 1) == v["correct"], v
    same([(scienceqa.scienceqa_letter(text), letter) for text, letter in [
        ("b", None), ("", None), (" B", None), ("The answer is Because.", "B"),
        ("The answer is A. The answer is B.", None), ("F", None)]])


def test_mmbench():
    same([(mmbench.mmbench_letter(v["prediction"], v["choices"]), v["inferred"], v)
          for v in vectors("mmbench", "can_infer_vectors")])
    for v in vectors("mmbench", "can_infer_vectors"):
        strict = mmbench.grade_answer(scoring.Example(0, None, "", "B", info={"options": v["choices"]}), v["prediction"]).raw[0]
        assert strict == (v["strip_equals_letter"] == "B")
    animals = dict(zip("ABCD", ["teddy bear", "rabbit", "cat", "dog"]))
    assert mmbench.mmbench_letter("A dog is sitting on the green grass", animals) == "D"
    assert mmbench.mmbench_letter("I am rather sure that the answer is **c** and that it is so for all readers",
                             animals) == "C"


def test_mmbench_circular():
    options = {"A": "x", "B": "y"}
    example = lambda index, label: scoring.Example(index, None, "", "A", (label,), {"options": options})
    examples = [example(1, "CP"), example(1_000_001, "CP"), example(2, "LR"), example(1_000_002, "LR"),
                example(3, "LR")]
    score = mmbench.summarize(examples,
                                 [mmbench.grade_answer(e, text) for e, text in zip(examples, ["A", "A.", "A", "B", "A"])])
    assert score.value == pytest.approx(200 / 3)            # 1 and 3; one round of 2 is wrong
    assert score.subscores["circular, bare letters only"] == pytest.approx(100 / 3)        # "A." is not a bare letter
    assert score.subscores["single pass"] == 100
    assert (score.subscores["CP"], score.subscores["LR"]) == (100, 50)


def test_seedbench():
    grade = lambda v: seedbench.grade_answer(scoring.Example(0, None, "", v["answer"]), v["prediction"]).score
    same([(grade(v) == 1, v["correct_llava"], v) for v in vectors("seedbench")])


def test_mmmu():
    same([(mmmu.mmmu_choice(v["response"], v["index2ans"]), v["parsed"], v) for v in vectors("mmmu", "mc_parse_vectors")])
    same([(sorted(map(str, mmmu.mmmu_open(v["response"]))), v["parsed_sorted"], v)
          for v in vectors("mmmu", "open_vectors")])
    same([(mmmu.mmmu_open_correct(v["response"], v["answer"]), v["correct"], v) for v in vectors("mmmu", "open_vectors")])
    # an empty tail is the shortest, and no key
    assert mmmu.mmmu_open("it is abc therefore \nx") == {"it is abc therefore \nx"}
    for v in vectors("mmmu", "mc_eval_vectors"):
        example = scoring.Example(0, None, "", v["gold"], info={"options": dict.fromkeys("ABCD", "?")})
        assert (mmmu.grade_answer(example, v["pred"]).score == 1) == v["correct"], v


def test_mmmu_draws_like_the_official_code():
    """Unparsed choices take random.choice after random.seed(42), one draw each, in file order."""
    import random
    rng = random.Random(42)
    drawn = [rng.choice(list("ABCD")) for _ in range(8)]
    examples = [scoring.Example(i, None, "", letter, ("Science", "Math"), {"options": dict.fromkeys("ABCD", "?")})
                for i, letter in enumerate(drawn)]
    score = mmmu.summarize(examples, [mmmu.grade_answer(e, "no idea") for e in examples])
    assert (score.value, score.subscores["unparsed = wrong"]) == (100, 0)


def test_judges_numbers():
    same([(mmvet.mmvet_grade(v["content"]), v["score"], v) for v in vectors("mmvet", "judge_score_parse")])
    same([(llavabench.llavabench_pair(v["review"]), tuple(v["tuple"]), v)
          for v in vectors("llava-bench-in-the-wild", "parse_vectors")])
    same([(mmvet.mmvet_grade(text), grade) for text, grade in [
        ("0", 0), ("1.0 because", 1), ("1.1", None), ("nan", None), ("", None), ("inf", None), ("0.7\n", 0.7),
        (".3", 0.3), ("one", None)]])
    same([(llavabench.llavabench_pair(text), pair) for text, pair in [
        ("8,9", (8, 9)), ("8.5 9", (8.5, 9)), ("8 9 ", (-1, -1)), (" 8 9", (-1, -1)), ("8\t9", (-1, -1)),
        ("a b", (-1, -1)), ("8 9 10", (-1, -1))]])


def test_plain_answers():
    same([(scoring.plain_answer(text), answer) for text, answer in [
        ("Red", "red"), ("red.", "red"), (" red \n", "red"), ("RED...", "red"), ("", ""), (".", ""),
        ("two red", "two red"), ("3", "3"),
        ("3.5", "3.5"), ("no .", "no"), ("a, b", "a, b"), ("Ü.", "ü")]])


def test_intervals():
    # Wilson, as tabulated
    assert scoring.interval_of_mean([1.0] * 8 + [0.0] * 2)[:2] == pytest.approx((49.016, 94.332), abs=1e-3)
    assert scoring.interval_of_mean([0.5, 0.6, 0.4, 0.5])[2] == "normal"
    low, high, _ = scoring.interval_of_mean([1.0] * 4)
    assert 0 < low < high <= 100.0001
    assert scoring.mcnemar(1, 7) == pytest.approx(2 * 9 / 256) and scoring.mcnemar(3, 3) == 1 and scoring.mcnemar(0, 0) == 1

# ----------------------------------------------------------------------------------------------------
# Tiny data in the official layouts


def picture(path: Path, color: tuple[int, int, int] = (200, 60, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), color).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or isinstance(value, list) and "coco_pope" in path.name:
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def make_vqav2(root: Path) -> None:
    names = [picture(root / f"vqav2/test2015/COCO_test2015_{i:012d}.jpg").name for i in (1, 2)]
    rows = [{"question_id": 10 * i, "image": name, "text": f"Is it red?\n{scoring.SHORT}", "category": "default"}
            for i, name in enumerate(names, 1)]
    write(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    write(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows + [{**rows[0], "question_id": 30}])


def make_vqav2_val(root: Path) -> None:
    picture(root / "vqav2/val2014/COCO_val2014_000000000007.jpg")
    questions = [{"image_id": 7, "question": "How many?", "question_id": 70},
                 {"image_id": 7, "question": "Is it red?", "question_id": 71}]
    humans = [["2"] * 3 + ["3"] * 7, ["yes"] * 10]
    write(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": q["question_id"], "answer_type": kind,
         "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)]}
        for q, answers, kind in zip(questions, humans, ["number", "yes/no"])]})


def make_gqa(root: Path) -> None:
    picture(root / "gqa/data/images/n1.jpg")
    row = {"imageId": "n1", "types": {"structural": "verify", "semantic": "attr"}, "isBalanced": True}
    write(root / "gqa/data/testdev_balanced_questions.json", {
        "201": {**row, "question": "Is it foggy?", "answer": "yes"},
        "202": {**row, "question": "Is it wet?", "answer": "no"},
        "203": {**row, "question": "What is it?", "answer": "car",
                "types": {"structural": "query", "semantic": "obj"}}})


def make_vizwiz(root: Path) -> None:
    picture(root / "vizwiz/test/VizWiz_test_00000000.jpg")
    write(root / "vizwiz/Annotations/test.json",
          [{"image": "VizWiz_test_00000000.jpg", "question": "what COLOR is it?"}])


def make_vizwiz_val(root: Path) -> None:
    picture(root / "vizwiz/val/VizWiz_val_00000000.jpg")
    answers = [{"answer": "Black", "answer_confidence": "yes"}] * 10
    write(root / "vizwiz/val.json", [{"image": "VizWiz_val_00000000.jpg", "question": "color?", "answers": answers,
                                      "answer_type": "other",
                                      "answerable": 1}])


def make_scienceqa(root: Path) -> None:
    picture(root / "scienceqa/images/test/5/image.png")
    problem = {"question": "Which is  it?", "choices": ["one", "two"], "answer": 1, "hint": "", "image": None,
               "subject": "natural science", "grade": "grade3"}
    write(root / "scienceqa/problems.json", {"5": {**problem, "image": "image.png", "hint": "Look."}, "6": problem,
                                             "8": {**problem, "subject": "language science", "grade": "grade8"}})
    write(root / "scienceqa/pid_splits.json", {"test": ["5", "6", "8"]})


def make_textvqa(root: Path) -> None:
    """Two questions about one picture, so that question_id repeats; no OCR tokens for the second picture."""
    for name in ("aa", "bb"):
        picture(root / f"textvqa/train_images/{name}.jpg")
    rows = [("aa", "What BRAND is it?", "acme"), ("aa", "what year?", "1999"), ("bb", "what word?", "stop")]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [
        {"question": q, "question_id": i, "image_id": image, "answers": [answer] * 10}
        for i, (image, q, answer) in enumerate(rows)]})
    tokens = {"aa": "ACME, 1999", "bb": ""}
    write(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": image, "image": f"{image}.jpg",
         "text": f"{q.capitalize()}\nReference OCR token: {tokens[image]}\n{scoring.SHORT}"}
        for image, q, _ in rows])


def make_pope(root: Path, kinds: tuple[str, ...] = ("adversarial", "popular", "random")) -> None:
    name = picture(root / "pope/val2014/COCO_val2014_000000310196.jpg").name
    rows = []
    for kind in kinds:
        labels = [{"question_id": i, "image": name, "text": f"Is there a {thing} in the image?", "label": label}
                  for i, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], 1)]
        # HEAD has another order
        write(root / f"pope/coco/coco_pope_{kind}.json", labels[::-1] if kind == "random" else labels)
        rows += [{"question_id": r["question_id"] + pope.OFFSETS[kind], "image": name, "category": kind,
                  "text": r["text"].replace("image?", "imange?" if kind == "popular" else "image?") + f"\n{scoring.SHORT}"}
                  for r in labels]
    write(root / "pope/llava_pope_test.jsonl", rows)


def make_mme(root: Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    picture(release / "artwork/images/1.jpg")
    picture(release / "OCR/2.png")
    write(release / "artwork/questions_answers_YN/1.txt",
          "Is it old?  Please answer yes or no.\tYes\nIs it new? Please answer yes or no.\tNo\n")
    write(release / "OCR/2.txt", "".join(f'Is it "{animal}"? Please answer yes or no.\t{answer}\n'
                                         for animal, answer in [("cat", "Yes"), ("dog", "No")]))


def mmbench_rows(folder: Path, name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (0, 0, 255)).save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split"]
    same = {"C": "", "D": "nan", "category": "object", "source": "x", "l2-category": "coarse_perception",
            "comment": "", "split": "dev"}
    first = {**same, "question": 'Which "one"?\nSay.', "hint": "Look"}
    table = [{**first, "index": "5", "A": "cat", "B": "dog", "answer": "A", "image": image},
             # an image given by another row's index
             {**first, "index": "1000005", "A": "dog", "B": "cat", "answer": "B", "image": "5"},
             {**same, "index": "6", "question": "Second?", "hint": "nan", "A": "x", "B": "y", "answer": "B",
              "image": image}]
    rows = [columns] + [[row[column] for column in columns] for row in table]
    quote = lambda cell: '"' + cell.replace('"', '""') + '"' if set(cell) & set('"\n\t') else cell
    write(folder / name, "".join("\t".join(map(quote, row)) + "\n" for row in rows))


def make_mmvet(root: Path) -> None:
    picture(root / "mm-vet/images/v1_0.png")
    row = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"],
           "imagesource": "here"}
    write(root / "mm-vet/mm-vet.json", {"v1_0": row, "v1_1": {**row, "question": "What is y?", "capability": ["rec"]}})


def make_seedbench(root: Path) -> None:
    (root / "seed_bench/SEED-Bench-image").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(root / "seed_bench/SEED-Bench-image/14_29", "JPEG")
    row = {"answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
           "data_type": "image", "data_id": "14_29",
           "question": "How many?", "question_type_id": 5}
    write(root / "seed_bench/SEED-Bench.json", {"question_type": {"Instances Counting": 5, "Action": 10}, "questions": [
        {**row, "question_id": "101"}, {**row, "question_id": "102", "answer": "B"},
        {**row, "question_id": "v9", "data_type": "video", "data_id": "clip", "question_type_id": 10}]})


def make_llavabench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    picture(folder / "images/001.jpg")
    write(folder / "questions.jsonl",
          [{"question_id": i, "image": "001.jpg", "category": kind, "text": f"Question {i}?"}
                                       for i, kind in enumerate(["conv", "detail"])])
    write(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A red picture."}])
    write(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"Reference {i}"} for i in range(2)])


def make_mmmu(root: Path) -> None:
    picture(root / "mmmu/images/a.png")
    row = {"image_1": "a.png", "question": "See <image 1>?", "options": "['apple', 'it\\'s']", "answer": "B",
           "question_type": "multiple-choice"}
    write(root / "mmmu/val.jsonl", [{**row, "id": "validation_Accounting_1"},
                                    {**row, "id": "validation_Art_Theory_2", "question_type": "open", "options": "[]",
                                     "answer": "12"}])


def make_shapes(root: Path) -> None:
    picture(root / "shapes/images/0.png")
    row = {"image": "0.png", "text": "Which colour?", "category": "colour", "chance": 0.25}
    write(root / "shapes/questions.jsonl", [{**row, "question_id": 0, "answer": "red"},
                                            {**row, "question_id": 1, "text": "How many?", "answer": "1",
                                             "category": "count", "chance": 0.5}])


class Case:
    """A task on tiny data: what makes it, answers in the order of its rows, and the headline they earn (by hand)."""
    def __init__(self, make, answers, value, *flags, prompts=(), numbers=None, submission=None):
        self.make, self.answers, self.value, self.flags = make, answers, value, flags
        self.prompts, self.numbers, self.submission = dict(prompts), numbers or {}, submission


CASES = {
    "vqav2": Case(make_vqav2, ["Yes.", "a girl's hat"], None, prompts={0: f"Is it red?\n{scoring.SHORT}"},
                  submission="vqav2_test-dev2015.json"),
    "vqav2-val": Case(make_vqav2_val, ["two", "Yes"], 95.0, "--split", "val", numbers={"number": 90, "yes/no": 100}),
    "gqa": Case(make_gqa, ["Yes", "no ", "Car."], 200 / 3, numbers={"binary": 50, "open": 100},
                prompts={0: f"Is it foggy?\n{scoring.SHORT}"},
                submission="testdev_balanced_predictions.json"),
    "vizwiz": Case(make_vizwiz, ["A Black cat"], None,
                   prompts={0: f"What color is it?\n{vizwiz.UNANSWERABLE}\n{scoring.SHORT}"}, submission="vizwiz_test.json"),
    "vizwiz-val": Case(make_vizwiz_val, ["Black"], 100.0, "--split", "val", numbers={"official VQA scorer": 0}),
    "scienceqa": Case(make_scienceqa, ["B", "A", "The answer is B."], 100.0,
                      numbers={"all": 200 / 3, "NO": 50, "G7-12": 100},
                      prompts={0: f"Context: Look.\nWhich is it?\nA. one\nB. two\n{scoring.LETTER}",
                               1: f"Which is it?\nA. one\nB. two\n{scoring.LETTER}"}),
    "textvqa": Case(make_textvqa, ["Acme", "2000", "the stop"], 200 / 3,
                    prompts={0: f"What brand is it?\nReference OCR token: ACME, 1999\n{scoring.SHORT}",
                             2: f"What word?\nReference OCR token: \n{scoring.SHORT}"}),
    "textvqa-no-ocr": Case(make_textvqa, ["Acme", "1999", ""], 200 / 3, "--no-ocr",
                           prompts={0: f"What brand is it?\n{scoring.SHORT}"}),
    "pope": Case(make_pope, ["Yes", "No", "No", "no", "Yes", "Yes"], 100 * (1 + 0 + 2 / 3) / 3,
                 numbers={"accuracy": 400 / 6, "popular F1": 0},
                 prompts={0: f"Is there a dog in the image?\n{scoring.SHORT}"}),
    "mme": Case(make_mme, ["Yes", "No", "No", "no"], 200 + 50, numbers={"artwork": 200, "OCR": 50, "cognition": 0},
                prompts={0: f"Is it old?\n{scoring.SHORT}"}),
    "mmbench": Case(lambda root: mmbench_rows(root / "mmbench", "mmbench_dev_20230712.tsv"), ["A", "B", "A"], 50.0,
                    numbers={"single pass": 50, "CP": 50}, submission="mmbench.xlsx",
                    prompts={0: f'Look\nWhich "one"?\nSay.\nA. cat\nB. dog\n{scoring.LETTER}',
                             2: f"Second?\nA. x\nB. y\n{scoring.LETTER}"}),
    "mmbench_cn": Case(lambda root: mmbench_rows(root / "mmbench", "mmbench_dev_cn_20231003.tsv"), ["A", "A", "B"],
                       50.0,
                       prompts={2: f"Second?\nA. x\nB. y\n{mmbench.LETTER_CN}"}, submission="mmbench.xlsx"),
    "mmvet": Case(make_mmvet, ["-1", "no idea"], None, prompts={0: "What is x?"}, submission="mm-vet.json"),
    "seedbench": Case(make_seedbench, ["A", "b"], 50.0, numbers={"Instances Counting": 50},
                      submission="seed_bench.jsonl",
                      prompts={0: f"How many?\nA. One\nB. Two\nC. Three\nD. Four\n{scoring.LETTER}"}),
    "llavabench": Case(make_llavabench, ["x", "y"], None, prompts={0: "Question 0?"}),
    "mmmu": Case(make_mmmu, ["(B)", "it is 12.0"], 100.0, numbers={"Business": 100, "Art_Theory": 100},
                 submission="mmmu.json",
                 prompts={0: f"See <image 1>?\n(A) apple\n(B) it's\n\n{scoring.LETTER}", 1: f"See <image 1>?\n{scoring.SHORT}"}),
    "shapes": Case(make_shapes, ["Red.", "red", "2", "1"], 50.0,
                   numbers={"chance": 37.5, "blank image": 100, "colour": 100, "count": 0}),
}


def prepare(name: str, root: Path) -> tuple[list[str], ev.Data]:
    """-> flags of the task, and its data."""
    case = CASES[name]
    case.make(root)
    flags = ["--task", name.split("-")[0], "--root", str(root), *case.flags]
    return flags, ev.load_data(name.split("-")[0], ev.parse(flags))


def llava_file(path: Path, data: ev.Data, answers: list[str]) -> Path:
    """As LLaVA's scripts write it: no rows, other fields besides."""
    write(path, [{"question_id": e.question_id, "prompt": e.info.get("saved", e.prompt), "text": text,
                  "answer_id": "x", "model_id": "m", "metadata": {}}
                 for e, text in zip(data.examples, answers)])
    return path


@pytest.mark.parametrize("name", CASES)
def test_score_file_of_each_task(name, tmp_path, capsys):
    """From official files and an answers file to result.json, the report and the submission."""
    case, (flags, data) = CASES[name], prepare(name, tmp_path / "eval")
    for row, prompt in case.prompts.items():
        assert data.examples[row].prompt == prompt
    path = llava_file(tmp_path / "theirs.jsonl", data, case.answers)
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["value"] is None) == (case.value is None)
    if case.value is not None:
        assert result["value"] == pytest.approx(case.value)
        low, high = result["interval"]
        assert low - 1e-9 <= result["value"] <= high + 1e-9
    for key, value in case.numbers.items():
        assert result["numbers"][key] == pytest.approx(value), key
    assert result["submission"] == case.submission
    assert case.submission is None or (tmp_path / "out" / case.submission).exists()
    assert "<script" not in (tmp_path / "out/report.html").read_text()
    assert data.task.metric in capsys.readouterr().out or case.value is None
    # joined by id, not by place
    write(path, json.loads("[" + ",".join(reversed(path.read_text().splitlines())) + "]"))
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again/result.json").read_text()) == result


def test_rebuilt_questions_equal_llavas(tmp_path):
    """Without eval.zip the official files alone give the same rows."""
    for name, extra in {"pope": "pope/llava_pope_test.jsonl", "textvqa": "textvqa/llava_textvqa_val_v051_ocr.jsonl",
                        "vqav2": None}.items():
        flags, data = prepare(name, tmp_path)
        if name == "vqav2":
            (tmp_path / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl").unlink()
            write(tmp_path / "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json",
                  {"questions": [{"image_id": i, "question": "Is it red?", "question_id": 10 * i} for i in (1, 2)]})
        else:
            (tmp_path / extra).unlink()
            write(tmp_path / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json",
                  {"data": [{"image_id": "aa", "ocr_tokens": ["ACME", "1999"]}, {"image_id": "bb", "ocr_tokens": []}]})
        key = lambda e: (str(e.question_id), e.prompt.replace("imange", "image"), e.image, e.truth, e.categories)
        assert sorted(map(key, ev.load_data(name, ev.parse(flags)).examples)) == sorted(map(key, data.examples))


def test_llavas_question_files_decide_order_and_wording(tmp_path):
    flags, data = prepare("scienceqa", tmp_path)
    write(tmp_path / "scienceqa/llava_test_CQM-A.json", [
        {"id": pid, "conversations": [{"from": "human", "value": "<image>\n" * (pid == "5") + f"Wording {pid}"},
                                      {"from": "gpt", "value": "B"}]}
        for pid in ("8", "5")])
    examples = ev.load_data("scienceqa", ev.parse(flags)).examples
    assert [e.question_id for e in examples] == ["8", "5"] and examples[1].prompt == f"Wording 5\n{scoring.LETTER}"
    # how the official scorer finds the IMG questions
    assert examples[1].info["saved"].startswith("<image>\nWording 5")
    assert len(ev.load_data("scienceqa", ev.parse([*flags, "--img-only"])).examples) == 1
    write(tmp_path / "MME/llava_mme.jsonl", [{"question_id": f"{image}", "image": image,
                                              "category": image.split("/")[0], "text": f"{q}\n{scoring.SHORT}"}
          for image, q in [("OCR/2.png", 'Is it "dog"?'), ("OCR/2.png", 'Is it "cat"?')]])
    flags, data = prepare("mme", tmp_path)
    assert [(e.truth, e.image.name) for e in data.examples] == [("no", "2.png"), ("yes", "2.png")]
    flags, data = prepare("seedbench", tmp_path)
    write(tmp_path / "seed_bench/llava-seed-bench.jsonl",
          [{"question_id": i, "image": "x", "text": "x"} for i in ("v9", 102, 101)])
    ids = lambda *more: [e.question_id for e in ev.load_data("seedbench", ev.parse([*flags, *more])).examples]
    assert ids() == [102, 101] and ids("--split", "all") == ["v9", 102, 101]


def test_a_question_asked_twice_about_a_picture(tmp_path):
    """LLaVA's TextVQA scorer keeps the answers that come last, for both."""
    make_textvqa(tmp_path)
    rows = [{"question": q, "question_id": i, "image_id": "aa", "answers": [answer] * 10}
            for i, (q, answer) in enumerate([("What brand?", "acme"), ("what BRAND?", "cola")])]
    write(tmp_path / "textvqa/TextVQA_0.5.1_val.json", {"data": rows})
    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").unlink()
    data = ev.load_data("textvqa", ev.parse(["--root", str(tmp_path), "--no-ocr"]))
    assert [e.truth[0] for e in data.examples] == ["cola", "cola"]


def test_mme_in_a_folder_more(tmp_path):
    """The release as the archive unpacks it: its images are found too."""
    release = tmp_path / "MME/MME_Benchmark_release_version"
    make_mme(tmp_path / "flat")
    release.mkdir(parents=True)
    (tmp_path / "flat/MME/MME_Benchmark_release_version").rename(release / "MME_Benchmark")
    data = ev.load_data("mme", ev.parse(["--root", str(tmp_path)]))
    assert len(data.examples) == 4
    ev.check_images(data)


# ----------------------------------------------------------------------------------------------------
# Submissions, judges, reports


def submission(name: str, tmp_path: Path, answers: list[str]) -> Path:
    flags, data = prepare(name, tmp_path / "eval")
    ev.main([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, answers)), "--out", str(tmp_path / "out")])
    return tmp_path / "out" / CASES[name].submission


def test_submission_files(tmp_path):
    read = lambda name, answers: json.loads(submission(name, tmp_path / name, answers).read_text())
    assert read("vqav2", ["Yes.", "girl's hat"]) == [{"question_id": 10, "answer": "yes"},
                                                     {"question_id": 20, "answer": "girl 's hat"},
                                                     {"question_id": 30, "answer": ""}]
    assert read("vizwiz", ["Two"]) == [{"image": "VizWiz_test_00000000.jpg", "answer": "2"}]
    assert read("mmvet", ["-1 and -5", "é"]) == {"v1_0": "-1 and -5", "v1_1": "é"}
    assert read("gqa", ["Yes.", "no", "Car"])[0] == {"questionId": "201", "prediction": "yes"}
    lines = submission("seedbench", tmp_path / "seed", ["A", "B"]).read_text().splitlines()
    assert lines[0] == '{"question_id": "101", "prediction": "A"}'


def read_xlsx(path: Path) -> list[list[int | str]]:
    """A sheet as write_xlsx makes it, strictly by the standard's names."""
    with zipfile.ZipFile(path) as z:
        sheet = ElementTree.fromstring(z.read("xl/worksheets/sheet1.xml"))
    table, ns = [], {"s": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    for row in sheet.iterfind(".//s:row", ns):
        cells = {c.get("r")[0]: c for c in row}
        table.append([""] * (len(table[0]) if table else len(cells)))
        for letter, c in cells.items():
            number, text = c.find("s:v", ns), c.find(".//s:t", ns)
            table[-1][scoring.LETTERS.index(letter)] = text.text if number is None else int(number.text)
    return table


def test_mmbench_xlsx(tmp_path):
    hostile = "B <b>&amp; \"x\"\x00\x1b\n  tail \u202e" + "y" * 40_000
    path = submission("mmbench", tmp_path, ["A", hostile, ""])
    table = read_xlsx(path)
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[1] == [5, 'Which "one"?\nSay.', "cat", "dog", "", "", "A", "A", "dev"]
    assert table[2][6].startswith("B <b>&amp; \"x\"\n  tail \u202e") and len(table[2][6]) == 32_767
    openpyxl = pytest.importorskip("openpyxl", reason="not a package of this project")
    rows = [[cell for cell in row] for row in openpyxl.load_workbook(path).active.iter_rows(values_only=True)]
    assert rows[1][0] == 5 and rows[1][4] is None and rows[1][6] == "A"


def test_nothing_is_submitted_for_a_part(tmp_path):
    flags, data = prepare("vizwiz", tmp_path / "eval")
    path = llava_file(tmp_path / "a.jsonl", data, ["x"])
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--limit", "1"])
    assert not (tmp_path / "out/vizwiz_test.json").exists()


def test_grade_files(tmp_path, capsys):
    """MM-Vet's official grade file, three runs; LLaVA's review file, one of its reviews failed."""
    flags, data = prepare("mmvet", tmp_path / "eval")
    path = llava_file(tmp_path / "a.jsonl", data, ["x", "y"])
    write(tmp_path / "grades.json", {"v1_0": {"model": [], "content": [], "score": [1.0, 0.5, 0.6]},
                                     "v1_1": {"model": [], "content": [], "score": [0.0, 0.5, 0.4]}})
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--grades", str(tmp_path / "grades.json")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == pytest.approx(50) and result["judge"] == "the grades in grades.json"
    numbers = result["numbers"]
    assert (numbers["run 1"], numbers["set math+ocr"], numbers["rec"]) == pytest.approx((50, 70, 30))
    write(tmp_path / "grades.json", {"v1_0": {"score": [1.0]}})
    with pytest.raises(ValueError, match="no grade for v1_1"):
        ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--grades",
                 str(tmp_path / "grades.json")])

    flags, data = prepare("llavabench", tmp_path / "eval")
    path = llava_file(tmp_path / "b.jsonl", data, ["x", "y"])
    write(tmp_path / "review.jsonl", [{"question_id": 0, "category": "llava_bench_conv", "content": "8 6\nFine.",
                                       "tuple": [8.0, 6.0]},
                                      {"question_id": 1, "category": "llava_bench_detail", "content": "8, 9\n",
                                       "tuple": [-1, -1]}])
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out2"), "--grades", str(tmp_path / "review.jsonl")])
    result = json.loads((tmp_path / "out2/result.json").read_text())
    assert result["value"] == 75 and result["numbers"]["conv reference"] == 80 and result["unparsed"] == 1


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that says what the test put in `replies`; None: it never answers."""
    replies: list = []
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        reply = self.replies.pop(0)
        if reply is None:
            threading.Event().wait(1.0)
            return
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Judge.replies, Judge.asked = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ["--judge-url", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "some/judge",
           "--judge-timeout", "0.3"]
    server.shutdown()
    server.server_close()


def test_judge_is_cached_and_may_time_out(tmp_path, judge, capsys):
    flags, data = prepare("mmvet", tmp_path / "eval")
    score = [*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge]
    Judge.replies[:] = ["0.5", None]
    with pytest.raises(ValueError, match="judge at .* failed .*timed out"):
        ev.main(score)
    assert not (tmp_path / "out/result.json").exists()
    Judge.replies[:] = ["five", "1.0"]                      # the first grade is kept; the second needs two tries
    ev.main(score)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == 75 and result["judge"].startswith("some/judge") and len(Judge.asked) == 4
    assert Judge.asked[-1]["temperature"] == 0.5 and Judge.asked[0]["temperature"] == 0
    ev.main(score)                                          # all from the cache
    assert len(Judge.asked) == 4
    with pytest.raises(ValueError, match="--judge-model"):
        ev.main([*score[:-6], "--judge-url", "http://x"])


def test_llavabench_judge(tmp_path, judge):
    flags, data = prepare("llavabench", tmp_path / "eval")
    Judge.replies[:] = ["8 6\nok", "10 9\nok"]
    ev.main([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge])
    assert json.loads((tmp_path / "out/result.json").read_text())["value"] == pytest.approx(100 * 7.5 / 9)
    assert "A red picture." in Judge.asked[0]["messages"][1]["content"]


class Redirecting(BaseHTTPRequestHandler):
    """Sends every question on to `target`, and keeps the headers of all that it was sent itself."""
    target = ""
    status = 302
    seen: list = []

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append(dict(self.headers))
        self.send_response(self.status)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_judges_key_goes_to_the_judge_only(status, tmp_path, monkeypatch, capsys):
    """A judge that redirects to another server: that one gets neither the key nor the question."""
    servers = []
    handlers = []
    for _ in range(2):
        handlers.append(type("Handler", (Redirecting,), {"seen": [], "status": status}))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handlers[-1]))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    other = f"http://127.0.0.1:{servers[1].server_port}/v1/chat/completions"
    handlers[0].target = other
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret-0123\n")
    flags, data = prepare("mmvet", tmp_path / "eval")
    score = [*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), "--judge-model", "j", "--judge-timeout", "5", "--judge-url"]
    with pytest.raises(ValueError, match="redirects to another server, http://127.0.0.1") as problem:
        ev.main([*score, f"http://127.0.0.1:{servers[0].server_port}/v1"])
    assert handlers[0].seen[0]["Authorization"] == "Bearer sk-secret-0123" and handlers[1].seen == []
    # The same for what is no web server at all, and for an address of another scheme.
    for target in ("ftp://127.0.0.1/x", "file:///etc/passwd", "https://127.0.0.1:1/x", "//127.0.0.1:1/x"):
        handlers[0].target = target
        with pytest.raises(ValueError, match="the judge at .* failed") as problem:
            ev.main([*score, f"http://127.0.0.1:{servers[0].server_port}/v1"])
        assert "sk-secret" not in str(problem.value)
    for url in ("file:///etc/passwd", "ftp://127.0.0.1", "127.0.0.1:80", "http://", "http://x:y", "http://me:pw@x"):
        with pytest.raises(ValueError, match="--judge-url") as problem:
            ev.main([*score, url])
        assert "pw" not in str(problem.value)
    printed = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "sk-secret" not in printed.out + printed.err and b"sk-secret" not in files
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_judge_may_redirect_to_itself(tmp_path, judge, monkeypatch):
    """An added slash is common; the question must arrive whole, as a POST."""
    honest = Judge.do_POST

    def do_POST(self):
        if not self.path.endswith("/"):
            return Redirecting.do_POST(self)
        return honest(self)

    for name, value in {"target": "/v1/chat/completions/", "status": 307, "seen": [], "do_POST": do_POST}.items():
        monkeypatch.setattr(Judge, name, value, raising=False)
    flags, data = prepare("mmvet", tmp_path / "eval")
    Judge.replies[:] = ["0.5", "1.0"]
    ev.main([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge])
    assert json.loads((tmp_path / "out/result.json").read_text())["value"] == 75
    assert "What is x?" in Judge.asked[0]["messages"][0]["content"]


def test_an_unusable_key_is_not_repeated(tmp_path, judge, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret\nsecond line")
    flags, data = prepare("mmvet", tmp_path / "eval")
    with pytest.raises(ValueError, match="JUDGE_API_KEY holds") as problem:
        ev.main([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
                 str(tmp_path / "out"), *judge])
    assert "secret" not in str(problem.value) and Judge.asked == []


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
        ev.main([*flags, "--score", str(path), "--out", str(root / "out")])
        pages.append((root / "out/report.html").read_text())
    plain, odd = map(Elements, pages)
    assert odd.found == plain.found and odd.attributes == plain.attributes
    assert "img" in plain.found and "script" not in odd.found and "default-src 'none'" in pages[1]
    assert not set(pages[1]) & set("\u202e\x00\x1b") and "\\u202e" in pages[1]
    assert not set(capsys.readouterr().out) & set("\u202e\x00\x1b")

# ----------------------------------------------------------------------------------------------------
# Bad data: one line, exit code 2, nothing overwritten


def test_bad_data_is_one_clear_message(tmp_path):
    flags, data = prepare("pope", tmp_path / "eval")
    score = lambda rows, *more: (write(tmp_path / "a.jsonl", rows),
                                 ev.main([*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"),
                                          *more]))
    rows = [{"question_id": e.question_id, "prompt": e.prompt, "text": "no"} for e in data.examples]
    score(rows)
    before = (tmp_path / "out/result.json").read_bytes()
    for bad, message in [
            (rows[:-1], "1 of 6 answers are missing"), (rows + rows[:1], "question 1"),
            (rows[:5] + rows[:1], "question 1 is answered a second time"),
            (rows[:5] + [{**rows[5], "question_id": 7}], "question 7 is not in this task"),
            (rows[:5] + [{"question_id": 7}], "expected question_id, prompt and text")]:
        with pytest.raises(ValueError, match=message):
            score(bad)
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "no"}\n{"question_id": ')
    with pytest.raises(ValueError, match="a.jsonl, line 2"):
        ev.main([*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
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
        ev.main([*check, "pope,gqa,textvqa,scienceqa"])
    out = capsys.readouterr().out
    assert "pope: 1 of 1 images are missing" in out and "val2014.zip" in out and "not a json object" in out
    assert "textvqa: 3 questions, the official val set has 5,000" in out and "official file 9f60db6fb89e3692" in out
    ev.main([*check, "shapes"])
    assert "shapes: 4 questions and all their images are there" in capsys.readouterr().out
    write(root / "pope/coco/coco_pope_random.json",
          [{"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "yes"}])
    with pytest.raises(ValueError, match="no label in coco_pope_random.json"):
        ev.load_data("pope", ev.parse(["--root", str(root)]))
    write(root / "shapes/questions.jsonl",
          [{"question_id": 1, "image": "../x.png", "text": "", "answer": "", "category": "", "chance": 1}])
    with pytest.raises(ValueError, match="not a plain path"):
        ev.load_data("shapes", ev.parse(["--root", str(root)]))
    (root / "MME/MME_Benchmark_release_version/OCR/2.txt").write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(ValueError, match="do not have two questions each"):
        ev.load_data("mme", ev.parse(["--root", str(root)]))
    write(root / "gqa/data/testdev_balanced_questions.json", {"1": {"question": "x"}})
    with pytest.raises(ValueError, match="not in the official format"):
        ev.load_data("gqa", ev.parse(["--root", str(root)]))


def run(*args: str, **kind) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *args], capture_output=True, text=True, timeout=100,
                          **kind)


def test_from_the_command_line(tmp_path):
    """Nothing downloaded: one helpful line. --score: no torch."""
    done = run("--task", "scienceqa", "--root", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: scienceqa: ") and "problems.json is missing" in done.stderr
    assert "github.com/lupantech" in done.stderr
    done = run("--task", "nonsense")
    assert done.returncode == 2 and "unknown" in done.stderr and done.stderr.count("\n") == 1
    flags, data = prepare("pope", tmp_path / "eval")
    llava_file(tmp_path / "a.jsonl", data, ["yes"] * 6)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/torch.py").write_text("raise RuntimeError('torch was imported')")
    done = run(*flags, "--score", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"),
               env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")})
    assert done.returncode == 0, done.stderr
    assert "66.67" in done.stdout


def test_own_questions(tmp_path):
    write(tmp_path / "q.jsonl", [{"question_id": "a", "text": "What?", "image": "x.png", "answer": ["red", "crimson"],
                                  "category": "colour"},
                                 {"question_id": "b", "text": "Who?", "answer": "me"},
                                 {"question_id": "c", "text": "Why?"}])
    picture(tmp_path / "images/x.png")
    flags = ["--task", "jsonl", "--questions", str(tmp_path / "q.jsonl"), "--images", str(tmp_path / "images")]
    path = llava_file(tmp_path / "a.jsonl", ev.load_data("jsonl", ev.parse(flags)), ["Crimson.", "you", "because"])
    ev.main([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == 50 and result["numbers"] == {"colour": 100}
    write(tmp_path / "q.jsonl", [{"question_id": "a", "text": "What?"}] * 2)
    with pytest.raises(ValueError, match="question_id 'a' occurs 2 times"):
        ev.load_data("jsonl", ev.parse(flags))


def test_compare(tmp_path, capsys):
    flags, data = prepare("pope", tmp_path / "eval")
    a, b = (llava_file(tmp_path / name, data, answers)
            for name, answers in [("a.jsonl", ["Yes", "No"] * 3), ("b.jsonl", ["No \x1b", "Yes"] + ["Yes", "No"] * 2)])
    ev.main([*flags, "--compare", str(a), str(b)])
    out = capsys.readouterr().out
    assert "better on 0 of 6 questions and worse on 2" in out and "p = 0.5 (McNemar" in out
    assert out.count("worse   question") == 2 and "\x1b" not in out
    flags, data = prepare("textvqa", tmp_path / "eval")
    a, b = (llava_file(tmp_path / name, data, answers)
            for name, answers in [("a.jsonl", ["x", "y", "z"]), ("b.jsonl", ["acme", "1999", "stop"])])
    ev.main([*flags, "--compare", str(a), str(b)])
    assert "better on 3 of 3" in capsys.readouterr().out

# ----------------------------------------------------------------------------------------------------
# Generation, with the tiny golden model (random weights: its answers are noise and never end by themselves)


@pytest.fixture
def short(monkeypatch):
    """At most 12 new tokens."""
    monkeypatch.setattr(ev, "TASKS", {name: dataclasses.replace(task, max_new_tokens=12)
                                      for name, task in ev.TASKS.items()})


def many_shapes(root: Path, pictures: int = 5, questions: int = 3) -> list[str]:
    rows = []
    for i in range(pictures):
        picture(root / f"shapes/images/{i}.png", (50 * i, 90, 200 - 30 * i))
        rows += [{"question_id": f"{i}.{j}", "image": f"{i}.png", "text": "How many" + " red" * (i * j) + "?",
                  "answer": "2", "category": "count",
                  "chance": 0.2} for j in range(questions)]
    write(root / "shapes/questions.jsonl", rows)
    return ["--task", "shapes", "--root", str(root), "--model", str(MODEL), "--device", "cpu"]


@pytest.mark.parametrize("name", CASES)
def test_generate_each_task(name, tmp_path, short):
    """From official files to answers, result and report; its own answers file scores the same again."""
    flags, data = prepare(name, tmp_path / "eval")
    out = tmp_path / "out"
    ev.main([*flags, "--model", str(MODEL), "--device", "cpu", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(line["row"], line["question_id"]) for line in lines] == [(row, e.question_id)
                                                                      for row, e in enumerate(data.examples)]
    assert all({"prompt", "text", "truncated"} <= line.keys() for line in lines)
    result = json.loads((out / "result.json").read_text())
    assert result["truncated"] == sum(line["truncated"] for line in lines) > 0
    settings = result["settings"]
    assert (result["run"]["batch"], settings["dtype"], settings["image_mode"]) == (16, "fp32", "pad")
    # the task is known from the settings beside it
    ev.main(["--root", str(tmp_path / "eval"), "--score", str(out / "answers.jsonl")])
    again = json.loads((out / "result.json").read_text())
    assert {**again, "run": 0, "versions": 0} == {**result, "run": 0, "versions": 0}


def test_answers_in_8_bits_say_so(tmp_path, short, capsys):
    """The report names the arithmetic, and answers of another are not mixed with them. 4 bits are refused before any."""
    flags = [*many_shapes(tmp_path), "--out", str(tmp_path / "out")]
    ev.main([*flags, "--bits", "8"])
    printed = capsys.readouterr()
    assert "Image mode pad, fp32, weights in 8 bits, greedy" in printed.out and "would be" not in printed.err
    with pytest.raises(ValueError, match="bits"):
        ev.main(flags)
    with pytest.raises(ValueError, match="take 8 bits"):
        ev.main([*flags[:-1], str(tmp_path / "out4"), "--bits", "4"])
    assert not list((tmp_path / "out4").glob("answers*"))


def test_answers_are_sample_pys(tmp_path):
    """The golden prompt's greedy text, by way of a benchmark."""
    golden = json.loads((ROOT / "tests/golden/text.json").read_text())["prompts"]["one"]
    write(tmp_path / "q.jsonl", [{"question_id": 1, "text": golden["turns"][0]}])
    args = ev.parse(["--device", "cpu", "--dtype", "fp32"])
    loaded = ev.load(open_weights(MODEL), args)
    from data import IMAGE_ID
    ids = ev.encode_question(scoring.Example(1, ev.BLANK, golden["turns"][0]), loaded)
    assert [i for i in ids if i != IMAGE_ID] == [i for i in golden["input_ids_tiny"] if i != -200]
    assert ids.count(IMAGE_ID) == loaded.model.config.vision.n_patches


def test_batch_size_and_processes_change_nothing(tmp_path, short):
    flags = many_shapes(tmp_path)
    outs = {name: tmp_path / name for name in ("b16", "b1", "b4", "exact", "two")}
    ev.main([*flags, "--out", str(outs["b16"])])
    ev.main([*flags, "--out", str(outs["b1"]), "--batch", "1"])
    ev.main([*flags, "--out", str(outs["b4"]), "--batch", "4"])
    ev.main([*flags, "--out", str(outs["exact"]), "--exact"])
    (tmp_path / "two.py").write_text("import dataclasses, eval\n"
        "eval.TASKS['shapes'] = dataclasses.replace(eval.TASKS['shapes'], max_new_tokens=12)\n"
        f"eval.main({[*flags, '--out', str(outs['two'])]})")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(tmp_path / "two.py")],
                          capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    files = {name: (out / "answers.jsonl").read_bytes() for name, out in outs.items()}
    assert len(files["b16"].splitlines()) == 30 and len(set(files.values())) == 1
    assert sorted(p.name for p in outs["two"].iterdir()) == ["answers.jsonl", "report.html", "result.json",
                                                             "settings.json"]


class Killed(Exception):
    pass


def test_killed_run_continues(tmp_path, short, monkeypatch):
    """Stopped after any number of answers, with a torn line, continued: the same file, nothing asked twice."""
    flags = many_shapes(tmp_path, pictures=3)
    ev.main([*flags, "--out", str(tmp_path / "whole")])
    whole = (tmp_path / "whole/answers.jsonl").read_bytes()
    honest = ev.ask
    for stop in (1, 7, 17):
        out, asked = tmp_path / f"killed{stop}", []

        def counting(*args, limit=stop):
            for answer in honest(*args):
                if len(asked) == limit:
                    raise Killed
                asked.append(answer)
                yield answer

        monkeypatch.setattr(ev, "ask", counting)
        with pytest.raises(Killed):
            ev.main([*flags, "--out", str(out), "--batch", "4"])
        assert len((out / "answers.jsonl").read_text().splitlines()) == stop          # flushed answer by answer
        with open(out / "answers.jsonl", "a") as f:
            f.write('{"row": 3, "question_id": "1')
        monkeypatch.setattr(ev, "ask", lambda *args: counting(*args, limit=1000))
        ev.main([*flags, "--out", str(out), "--batch", "16"])
        assert (out / "answers.jsonl").read_bytes() == whole and len(asked) == 18
        monkeypatch.setattr(ev, "load", None)             # all there: not even a model is loaded
        ev.main([*flags, "--out", str(out)])
        monkeypatch.undo()
        monkeypatch.setattr(ev, "TASKS",
                            {name: dataclasses.replace(task, max_new_tokens=12) for name, task in ev.TASKS.items()})


def test_kill_9(tmp_path):
    """A real kill in the middle of a real run."""
    flags = [*many_shapes(tmp_path), "--batch", "2"]
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *flags, "--out", str(out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "answers.jsonl").exists()
                                          and (out / "answers.jsonl").read_bytes().count(b"\n") > 3):
        threading.Event().wait(0.01)
    process.kill()
    process.wait()
    ev.main([*flags, "--out", str(out)])
    ev.main([*flags, "--out", str(tmp_path / "whole")])
    assert (out / "answers.jsonl").read_bytes() == (tmp_path / "whole/answers.jsonl").read_bytes()


def test_one_run_per_folder(tmp_path):
    """A second run in the folder ends at once, in one line that names the first; after a kill the folder is free."""
    flags = [*many_shapes(tmp_path), "--batch", "1"]
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *flags, "--out", str(out)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out / "answers.jsonl").exists():
        threading.Event().wait(0.01)
    first.send_signal(signal.SIGSTOP)                   # it must not end before the second has tried
    second = run(*flags, "--out", str(out))
    scored = run(*flags, "--score", str(out / "answers.jsonl"), "--allow-missing")
    first.kill()
    first.wait()
    for done in (second, scored):
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"is in use by process {first.pid} on" in done.stderr
    ev.main([*flags, "--out", str(out), "--limit", "2"])
    assert not (out / LOCK).exists()


def test_other_settings_are_refused(tmp_path, short):
    flags, out = many_shapes(tmp_path, pictures=1, questions=1), str(tmp_path / "out")
    ev.main([*flags, "--out", out])
    before = (tmp_path / "out/answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match="image_mode was 'pad', now 'crop'"):
        ev.main([*flags, "--out", out, "--image-mode", "crop"])
    with pytest.raises(ValueError, match="dtype was 'fp32', now 'bf16'"):
        ev.main([*flags, "--out", out, "--dtype", "bf16"])
    with pytest.raises(ValueError, match="fp16: expected fp32 or bf16; .* overflow in fp16"):
        ev.main([*flags, "--out", out, "--dtype", "fp16"])
    write(tmp_path / "foreign/notes.txt", "mine")
    with pytest.raises(ValueError, match="not made by eval.py"):
        ev.main([*flags, "--out", str(tmp_path / "foreign")])
    write(tmp_path / "out/settings.json",
          {**json.loads((tmp_path / "out/settings.json").read_text()), "model": "another"})
    with pytest.raises(ValueError, match="model was 'another'"):
        ev.main([*flags, "--out", out])
    assert (tmp_path / "out/answers.jsonl").read_bytes() == before


def test_one_picture_runs_the_tower_once(tmp_path, short, monkeypatch):
    """POPE asks many questions about a picture; also where they do not fit one batch."""
    import vision
    make_pope(tmp_path)
    seen, forward = [], vision.VisionTower.forward
    monkeypatch.setattr(vision.VisionTower, "forward", lambda self, images: seen.append(len(images))
                        or forward(self, images))
    for batch in ("16", "4"):
        seen.clear()
        ev.main(["--task", "pope", "--root", str(tmp_path), "--model", str(MODEL), "--device", "cpu", "--out",
                 str(tmp_path / batch), "--batch", batch])
        assert sum(seen) == 1


def test_bad_images_and_models(tmp_path, short, monkeypatch):
    flags = many_shapes(tmp_path, pictures=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model: neither out/finetune"):
        ev.main(flags[:4])
    (tmp_path / "shapes/images/1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="1.png"):
        ev.main([*flags, "--out", str(tmp_path / "out")])
    (tmp_path / "shapes/images/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images are missing"):
        ev.main([*flags, "--out", str(tmp_path / "out2")])
    assert not (tmp_path / "out2").exists()


def test_several_tasks_share_a_model_and_end_in_one_table(tmp_path, short, capsys, monkeypatch):
    flags = many_shapes(tmp_path, pictures=1)
    make_scienceqa(tmp_path)
    loads, load = [], ev.load
    monkeypatch.setattr(ev, "load", lambda *args: loads.append(1) or load(*args))
    ev.main(["--task", "shapes,scienceqa", *flags[2:], "--out", str(tmp_path / "out"), "--limit", "2"])
    table = capsys.readouterr().out.split("all tasks")[1]
    assert "shapes (all)" in table and "scienceqa (test)" in table and "68.4" in table and loads == [1]
    assert json.loads((tmp_path / "out/scienceqa/result.json").read_text())["limit"] == 2
    assert ev.chosen_tasks(ev.parse(["--task", "paper,gqa"])) == [*ev.PAPER, "gqa"]


# ----------------------------------------------------------------------------------------------------
# GPUs


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says it has two GPUs -> what the program then asks of them, in order."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"current {device}"))
    monkeypatch.setattr(ev, "choose_device", lambda device: asked.append("touch one") or "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    return asked


def test_a_process_makes_its_gpu_the_current_one_before_it_touches_any(monkeypatch, two_gpus):
    """Events are recorded on the current GPU: without this, processes 1 to 7 would read answers before they are there."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = ev.parse(["--task", "pope"])
    ev.choose_arithmetic(args)
    assert args.device == "cuda:1" and two_gpus[:2] == ["current cuda:1", "touch one"]


def test_a_gpu_without_bf16_computes_in_fp32(two_gpus):
    """A T4 or V100 emulates bf16, many times slower."""
    args = ev.parse(["--task", "pope"])
    ev.choose_arithmetic(args)
    assert (args.device, args.dtype) == ("cuda:0", "fp32")


def test_more_processes_than_gpus_is_one_line(monkeypatch, two_gpus):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs: give torchrun one for each"):
        ev.choose_arithmetic(ev.parse(["--task", "pope"]))


# ----------------------------------------------------------------------------------------------------
# Mipha


def mipha_config():
    from model import LLaVAConfig
    from vision import SIGLIP_SO400M_384
    return LLaVAConfig(vision=SIGLIP_SO400M_384)


def test_paper_mode_is_the_one_behind_each_models_own_table(tmp_path):
    """LLaVA-Phi's scripts crop for three benchmarks. Mipha's pad ScienceQA, and give MM-Vet's pictures to SigLIP's
    processor as they are, which squashes them."""
    from model import LLaVAConfig
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
    for config, color in [(mipha_config().vision, [127, 127, 127]), (VisionConfig(), [122, 116, 104])]:
        blank = ev.open_picture(scoring.BLANK, config, "pad")
        assert blank.shape == (1, 3, config.image_size, config.image_size)
        assert blank[0, :, 5, 7].tolist() == color
        padded = ev.open_picture(wide, config, "pad")
        assert padded[0, :, 0, 0].tolist() == color and padded[0, :, config.image_size // 2, 5].tolist() == [255, 0, 0]


def test_mipha_is_asked_like_llava_phi(tmp_path, short, capsys):
    """End to end with a tiny SigLIP tower, a question about a blank picture included; batches change nothing."""
    flags = many_shapes(tmp_path, pictures=2)
    flags[flags.index(str(MODEL))] = str(ROOT / "tests/golden-mipha/tiny-mipha")
    for batch in ("1", "16"):
        ev.main([*flags, "--out", str(tmp_path / batch), "--batch", batch])
    settings = json.loads((tmp_path / "1/settings.json").read_text())
    assert (settings["reference"], settings["image_mode"]) == ("mipha", "pad")
    answers = (tmp_path / "1/answers.jsonl").read_bytes()
    assert answers == (tmp_path / "16/answers.jsonl").read_bytes() and answers.count(b"\n") == 12


def test_a_mipha_models_score_stands_beside_miphas(tmp_path, capsys):
    """The column of one's own kind comes first, also when answers are scored again later."""
    flags, data = prepare("pope", tmp_path / "eval")
    out = tmp_path / "out"
    settings = ev.generation_settings(data, "x", mipha_config(), ev.parse([*flags, "--dtype", "fp32"]))
    with ev.begin(out, settings):
        pass
    path = llava_file(out / "answers.jsonl", data, ["Yes"] * 6)
    ev.main([*flags, "--score", str(path)])
    printed = capsys.readouterr().out
    assert list(json.loads((out / "result.json").read_text())["published"])[0] == "Mipha-3B"
    assert printed.index("Mipha-3B") < printed.index("LLaVA-Phi-3B") and "compare with is Mipha-3B's" in printed
    assert "LLaVA-Phi's architecture, well trained" in printed
