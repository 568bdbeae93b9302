"""The benchmarks' scorers against the official results (tests/eval_vectors), and each of them on tiny data."""
import hashlib
import json
import math
import random
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import ROOT
from tiny_benchmarks import CASES, evaluate, llava_file, make_mme, make_textvqa, mmbench_rows, prepare, write

import eval as ev
from benchmarks import (gqa, llavabench, mmbench, mme, mmmu, mmvet, pope, scienceqa, scoring, seedbench, textvqa,
                        vizwiz, vqav2)
from benchmarks.scoring import BLANK, Example, Grade, calibration
from lib.common import plural


def vectors(task: str, key: str = "vectors") -> list[dict]:
    return json.loads((ROOT / f"tests/eval_vectors/{task}.json").read_text())[key]


def same(cases: list[tuple]) -> None:
    """(found, official, the case): all wrong ones are shown at once."""
    assert not [case for case in cases if case[0] != case[1]]

# ---------------------------------------------------------------------------------------------------
# Normalizers and parsers


def test_contraction_table_checksum():
    table = "".join(f"{key}\t{value}\n" for key, value in sorted(scoring.CONTRACTIONS.items()))
    assert len(scoring.CONTRACTIONS) == 120
    digest = hashlib.sha256(table.encode()).hexdigest()
    assert digest == "f7e93e52d4cd2e370d30e576bfe54d4437e95fd593cec197817e9e388c46659f"


def test_vqa_normalizers():
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
            submitted = scoring.normalize_evalai(text)
            assert percent(scoring.vqa_accuracy(submitted, humans)) == v["score_vqa2021_after_evalai"], v


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
        score = pope.summarize([(e, pope.grade_answer(e, text)) for e, text in zip(examples, v["texts"])])
        official = {"F1": v["f1"] or 0, "precision": v["precision"] or 0, "recall": v["recall"] or 0,
                    "yes ratio": v["yes_ratio"],
                    "accuracy": (v["TP"] + v["TN"]) / len(v["texts"])}
        for name, value in official.items():
            assert score.numbers[f"random {name}"] == pytest.approx(100 * value), (name, v)
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
        score = mme.summarize([(e, mme.grade_answer(e, row[-1])) for e, row in zip(examples, rows)])
        expected = v["expected"]
        assert score.value == pytest.approx(expected["Perception"]["total"], rel=1e-12)
        assert score.numbers["cognition"] == pytest.approx(expected["Cognition"]["total"], rel=1e-12)
        for subtask, value in (expected["Perception"]["tasks"] | expected["Cognition"]["tasks"]).items():
            assert score.numbers[subtask] == pytest.approx(value, rel=1e-12)


def test_scienceqa():
    same([(scienceqa.scienceqa_letter(v["text"]) or "FAILED", v["parsed"], v) for v in vectors("scienceqa")])
    for v in vectors("scienceqa"):
        truth = scoring.LETTERS[v["answer_index"]]
        grade = scienceqa.grade_answer(scoring.Example(0, None, "", truth), v["text"])
        assert (grade.score == 1) == v["correct"], v
    same([(scienceqa.scienceqa_letter(text), letter) for text, letter in [
        ("b", None), ("", None), (" B", None), ("The answer is Because.", "B"),
        ("The answer is A. The answer is B.", None), ("F", None)]])


def test_mmbench():
    same([(mmbench.mmbench_letter(v["prediction"], v["choices"]), v["inferred"], v)
          for v in vectors("mmbench", "can_infer_vectors")])
    for v in vectors("mmbench", "can_infer_vectors"):
        example = scoring.Example(0, None, "", "B", info={"options": v["choices"]})
        strict = mmbench.grade_answer(example, v["prediction"]).raw[0]
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
    texts = ["A", "A.", "A", "B", "A"]
    score = mmbench.summarize([(e, mmbench.grade_answer(e, text)) for e, text in zip(examples, texts)])
    assert score.value == pytest.approx(200 / 3)            # 1 and 3; one round of 2 is wrong
    assert score.numbers["circular, bare letters only"] == pytest.approx(100 / 3)        # "A." is not a bare letter
    assert score.numbers["single pass"] == 100
    assert (score.numbers["CP"], score.numbers["LR"]) == (100, 50)


def test_seedbench():
    grade = lambda v: seedbench.grade_answer(scoring.Example(0, None, "", v["answer"]), v["prediction"]).score
    same([(grade(v) == 1, v["correct_llava"], v) for v in vectors("seedbench")])


def test_mmmu():
    same([(mmmu.mmmu_choice(v["response"], v["index2ans"]), v["parsed"], v)
          for v in vectors("mmmu", "mc_parse_vectors")])
    same([(sorted(map(str, mmmu.mmmu_open(v["response"]))), v["parsed_sorted"], v)
          for v in vectors("mmmu", "open_vectors")])
    same([(mmmu.mmmu_open_correct(v["response"], v["answer"]), v["correct"], v)
          for v in vectors("mmmu", "open_vectors")])
    # an empty tail is the shortest, and no key
    assert mmmu.mmmu_open("it is abc therefore \nx") == {"it is abc therefore \nx"}
    for v in vectors("mmmu", "mc_eval_vectors"):
        example = scoring.Example(0, None, "", v["gold"], info={"options": dict.fromkeys("ABCD", "?")})
        assert (mmmu.grade_answer(example, v["pred"]).score == 1) == v["correct"], v


def test_mmmu_draws_like_the_official_code():
    """Unparsed choices take random.choice after random.seed(42), one draw each, in file order."""
    rng = random.Random(42)
    drawn = [rng.choice(list("ABCD")) for _ in range(8)]
    examples = [scoring.Example(i, None, "", letter, ("Science", "Math"), {"options": dict.fromkeys("ABCD", "?")})
                for i, letter in enumerate(drawn)]
    score = mmmu.summarize([(e, mmmu.grade_answer(e, "no idea")) for e in examples])
    assert (score.value, score.numbers["unparsed = wrong"]) == (100, 0)


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


def test_calibration_by_hand():
    """Tenths of confidence, the error as their weighted mean; blank pictures and answers without a number left out."""
    example = lambda *categories, image="x.png": Example(1, image, "?", "a", categories)
    rows = [(example(), -0.05, 1.0), (example(), -0.02, 0.0), (example("unanswerable"), 0.0, 1.0),
            (example(image=BLANK), -0.05, 0.0), (example("unanswerable"), math.log(0.25), 0.0),
            (example(), None, 1.0), (example(), float("nan"), 1.0), (example(), 0.5, 1.0), (example(), True, 1.0),
            (example(), -0.1, None), (example(), -0.1, 1.0)]
    examples, logprobs, scores = zip(*rows)
    answers = [{"text": "", "logprob": logprob and logprob / 2, "tokens": 2} for logprob in logprobs[:-1]] + [{}]
    found = calibration(answers, list(zip(examples, map(Grade, scores))))
    high = (math.exp(-0.05) + math.exp(-0.02) + 1) / 3
    assert [(row["confidence"], row["n"]) for row in found["table"]] == [
        ("0.2 to 0.3", 1), ("0.9 to 1.0", 3), ("unanswerable", 2)]
    assert [row["mean"] for row in found["table"]] == pytest.approx([0.25, high, 0.625])
    assert [row["accuracy"] for row in found["table"]] == pytest.approx([0, 2 / 3, 0.5])
    assert found["error"] == pytest.approx((0.25 + 3 * (high - 2 / 3)) / 4)
    for older in ({"text": "a"}, {"text": "a", "logprob": -0.1}, {"text": "a", "logprob": -0.1, "tokens": "1"}):
        assert calibration([older], [(examples[0], Grade(1.0))]) is None


def test_intervals():
    # Wilson, as tabulated
    assert scoring.interval_of_mean([1.0] * 8 + [0.0] * 2)[0] == pytest.approx((49.016, 94.332), abs=1e-3)
    assert scoring.interval_of_mean([0.5, 0.6, 0.4, 0.5])[1] == "95 %, normal"
    (low, high), _ = scoring.interval_of_mean([1.0] * 4)
    assert 0 < low < high <= 100.0001
    assert scoring.mcnemar(1, 7) == pytest.approx(2 * 9 / 256)
    assert scoring.mcnemar(3, 3) == scoring.mcnemar(0, 0) == 1

# ---------------------------------------------------------------------------------------------------
# From official files and an answers file to a score


@pytest.mark.parametrize("name", CASES)
def test_score_file_of_each_task(name, tmp_path, capsys):
    """From official files and an answers file to result.json, the report and the submission."""
    case, (flags, data) = CASES[name], prepare(name, tmp_path / "eval")
    for row, prompt in case.prompts.items():
        assert data.examples[row].prompt == prompt
    path = llava_file(tmp_path / "theirs.jsonl", data, case.answers)
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out")])
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
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "again")])
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


def test_textvqa_needs_ten_answers(tmp_path):
    """With another number the official soft accuracy would be another measure."""
    make_textvqa(tmp_path)
    path = tmp_path / "textvqa/TextVQA_0.5.1_val.json"
    official = json.loads(path.read_text())
    official["data"][0]["answers"].pop()
    write(path, official)
    with pytest.raises(ValueError, match="TextVQA_0.5.1_val.json has 9 answers to the question .*, expected ten"):
        ev.load_data("textvqa", ev.parse(["--root", str(tmp_path)]))


def test_mme_in_a_folder_more(tmp_path):
    """The release as the archive unpacks it: its images are found too."""
    release = tmp_path / "MME/MME_Benchmark_release_version"
    make_mme(tmp_path / "flat")
    release.mkdir(parents=True)
    (tmp_path / "flat/MME/MME_Benchmark_release_version").rename(release / "MME_Benchmark")
    data = ev.load_data("mme", ev.parse(["--root", str(tmp_path)]), pictures=True)
    assert len(data.examples) == 4

# ---------------------------------------------------------------------------------------------------
# Official files that are broken, or came through an editor, a table or another system


def changed_json(path: Path, *keys, **fields) -> None:
    """Change fields of the object at `keys`, of which the first is the line in a jsonl; ... removes a field."""
    lines = path.suffix == ".jsonl" or "coco_pope" in path.name
    whole = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    row = whole
    for key in keys:
        row = row[key]
    row.update(fields)
    for name in [name for name, value in fields.items() if value is ...]:
        del row[name]
    write(path, whole)


BROKEN = [                              # task, file, where the change is, the change, what the line says
    ("gqa", "gqa/data/testdev_balanced_questions.json", ["202"],
     {"question": None}, "questions.json, question 202: question is None, expected a text"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", ["202"],
     {"types": ...}, "question 202: .*'types' is missing"),
    ("vqav2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", [1],
     {"text": float("nan")}, "jsonl, line 2: text is nan"),
    ("vqav2-val", "vqav2/v2_mscoco_val2014_annotations.json", ["annotations", 1],
     {"answers": "['yes']"}, r"annotations.json, row 2: answers is .\['yes'\]., expected a list"),
    ("vqav2-val", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", ["questions", 1],
     {"question_id": 72}, "questions.json, row 2: .*annotations.json has no 72"),
    ("vizwiz", "vizwiz/Annotations/test.json", [0],
     {"question": 5}, "test.json, row 1: question is 5"),
    ("vizwiz-val", "vizwiz/val.json", [0],
     {"answers": [{"answer": None}]}, "val.json, row 1: answers\\[0\\] is None"),
    ("scienceqa", "scienceqa/problems.json", ["6"],
     {"answer": 2}, "question 6: answer is 2, expected one of 0, 1"),
    ("scienceqa", "scienceqa/problems.json", ["6"],
     {"answer": -1}, "question 6: answer is -1, expected one of 0, 1"),
    ("scienceqa", "scienceqa/problems.json", ["6"],
     {"choices": []}, "question 6"),
    ("scienceqa", "scienceqa/pid_splits.json", [],
     {"test": ["5", "7"]}, "problems.json, question 7"),
    ("textvqa", "textvqa/TextVQA_0.5.1_val.json", ["data", 2],
     {"answers": "['stop']"}, "row 3: answers is"),
    ("pope", "pope/coco/coco_pope_popular.json", [1],
     {"label": "maybe"}, "line 2: label is 'maybe', expected one of yes"),
    ("mmvet", "mm-vet/mm-vet.json", ["v1_1"],
     {"capability": "rec"}, "question v1_1: capability is 'rec'"),
    ("seedbench", "seed_bench/SEED-Bench.json", ["questions", 1],
     {"answer": "E"}, "row 2: answer is 'E', expected one"),
    ("seedbench", "seed_bench/SEED-Bench.json", ["questions", 1],
     {"choice_c": ...}, "row 2: .*'choice_c' is missing"),
    ("llavabench", "llava-bench-in-the-wild/questions.jsonl", [1],
     {"image": "002.jpg"}, "line 2: .*context.jsonl has no 002.jpg"),
    ("mmmu", "mmmu/val.jsonl", [0],
     {"options": "['apple', "}, "val.jsonl, line 1"),
    ("mmmu", "mmmu/val.jsonl", [0],
     {"options": 5}, "val.jsonl, line 1"),
    ("mmmu", "mmmu/val.jsonl", [0],
     {"options": "[[1], [2]]"}, "val.jsonl, line 1"),
    ("mmmu", "mmmu/val.jsonl", [0],
     {"answer": "C"}, r"line 1: answer\[0\] is 'C', expected one of A, B"),
    ("shapes", "shapes/questions.jsonl", [1],
     {"chance": "half"}, "line 2: chance is 'half', expected a whole number or"),
]


@pytest.mark.parametrize("name, file, keys, fields, message", BROKEN)
def test_a_broken_row_is_named_before_anything_is_asked(name, file, keys, fields, message, tmp_path):
    flags, _ = prepare(name, tmp_path)
    changed_json(tmp_path / file, *keys, **fields)
    with pytest.raises(ValueError, match=message) as error:
        ev.load_data(name.split("-")[0], ev.parse(flags))
    assert "\n" not in str(error.value) and str(tmp_path / file)[:-20] in str(error.value)


def test_mme_files_of_other_systems(tmp_path):
    """Blank lines, line ends of Windows, a byte order mark, spaces for the tab and a Mac's ._ files change nothing."""
    flags, data = prepare("mme", tmp_path)
    path = tmp_path / "MME/MME_Benchmark_release_version/OCR/2.txt"
    good = path.read_text()
    path.with_name("._2.txt").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    path.with_name("._2.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for text in (good.replace("\n", "\r\n"), "\n" + good + "  \n\n", good.replace("\t", "    "), "\ufeff" + good,
                 good.replace("\tYes", " yes "), good.rstrip()):
        path.write_text(text, newline="")
        assert ev.load_data("mme", ev.parse(flags)).examples == data.examples
    for content, message in [(b"Is it?\n", "2.txt, line 1: expected a question, a tab, and Yes or No, found 'Is it"),
                             (good.encode() + b"Is it? Please answer yes or no.\n", "2.txt, line 3: expected"),
                             (good.encode() + b"Is it? Please answer yes or no\n", "2.txt, line 3: expected"),
                             (b"\n\nUn caf\xe9?\tYes\n", "2.txt, line 3: 'utf-8' codec can't decode byte 0xe9")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ev.load_data("mme", ev.parse(flags))


def test_mmbench_tables_of_other_systems(tmp_path):
    flags, data = prepare("mmbench", tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    good = path.read_text()
    for text in ("\ufeff" + good, good.replace("\n", "\r\n").replace("?\r\n", "?\n"), good + "\n\n", good.rstrip()):
        path.write_text(text, newline="")
        assert ev.load_data("mmbench", ev.parse(flags)).examples == data.examples
    last = good.rstrip().rsplit("\n", 1)[1]
    cells = last.split("\t")
    for row, message in [(last[:9], "row 3: zip"), (last[:60], "row 3"), (last + "\tx", "row 3"),
                         (last.replace("\t", "    "), "row 3"), ("nan" + last[1:], "row 3: could not convert"),
                         (last.replace("Second?", "nan"), "row 3: question is '', expected a text"),
                         (last.replace("\tx\t", "\tnan\t", 1), "row 3: A is '', expected a text"),
                         ("\t".join([*cells[:7], "E", *cells[8:]]), "row 3: answer is 'E', expected one of A, B"),
                         (last.replace(cells[9], "999"), "row 3: .*'999' is missing"),
                         (last.replace(cells[9], cells[9][:101]), "row 3: .*padded|row 3: .*base64"),
                         (last.replace(cells[9], "A" * 100), "row 3: .*cannot identify")]:
        path.write_text(good.replace(last, row))
        with pytest.raises(ValueError, match=message):
            ev.load_data("mmbench", ev.parse(flags))
    path.write_bytes(good.encode().replace(b"Second", b"S\xe4cond"))
    with pytest.raises(ValueError, match="tsv: 'utf-8' codec can't decode byte 0xe4"):
        ev.load_data("mmbench", ev.parse(flags))
    path.write_text(good.replace("\t", "    "))
    with pytest.raises(ValueError, match="tsv, row 1: .* is missing"):
        ev.load_data("mmbench", ev.parse(flags))


def test_mmbench_cn_is_read_from_either_folder(tmp_path):
    """Beside the English file, as docs/data.md says, or in a folder of its own; without it the message names the
    documented one."""
    flags = ["--root", str(tmp_path)]
    with pytest.raises(ValueError, match=f"{tmp_path}/mmbench lacks mmbench_dev_cn_20231003.tsv or MMBench_DEV_CN"):
        ev.load_data("mmbench_cn", ev.parse(flags))
    for folder, name in (("mmbench_cn", "MMBench_DEV_CN_legacy.tsv"), ("mmbench", "mmbench_dev_cn_20231003.tsv")):
        mmbench_rows(tmp_path / "mmbench", "mmbench_dev_20230712.tsv")
        mmbench_rows(tmp_path / folder, name)
        assert ev.load_data("mmbench_cn", ev.parse(flags)).folder == tmp_path / folder


def test_mmmu_reads_lists_that_are_written_as_text(tmp_path):
    """Three open questions of the parquet files have several right answers, as Python's source of a list."""
    flags, _ = prepare("mmmu", tmp_path)
    changed_json(tmp_path / "mmmu/val.jsonl", 1, answer="['24/7', '3.429']")
    example = ev.load_data("mmmu", ev.parse(flags)).examples[1]
    grades = [mmmu.grade_answer(example, text).score for text in ("24/7", "It is 3.429.", "3.43", "7")]
    assert grades == [1, 1, 1, 0]
    changed_json(tmp_path / "mmmu/val.jsonl", 1, answer="[1, 2]")
    assert ev.load_data("mmmu", ev.parse(flags)).examples[1].truth == "[1, 2]"
    changed_json(tmp_path / "mmmu/val.jsonl", 0, options="[3, 4.5]", answer="['A', 'B']")
    example = ev.load_data("mmmu", ev.parse(flags)).examples[0]
    assert example.prompt.startswith("See <image 1>?\n(A) 3\n(B) 4.5\n")
    assert mmmu.grade_answer(example, "one of them is surely 4.5 I would say").score == 1


@pytest.mark.parametrize("benchmark", [gqa, mmbench, mme, mmmu, pope, scienceqa, seedbench, textvqa, vizwiz, vqav2])
def test_every_grader_takes_a_question_without_options(benchmark):
    truth = ["A"] * 10 if benchmark in (textvqa, vizwiz, vqav2) else "A"
    for info in ({}, {"options": {}}):
        for text in ("", "A", "the answer is A", "x" * 1000):
            assert 0 <= benchmark.grade_answer(scoring.Example(0, None, "", truth, info=info), text).score <= 1

# ---------------------------------------------------------------------------------------------------
# Submissions, judges, reports


def submission(name: str, tmp_path: Path, answers: list[str]) -> Path:
    flags, data = prepare(name, tmp_path / "eval")
    evaluate([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, answers)), "--out", str(tmp_path / "out")])
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
    """A sheet as mmbench.py makes it, strictly by the standard's names."""
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


def test_shapes_say_how_many_questions_were_asked_twice(tmp_path, capsys):
    """Each is asked a second time about a blank picture, which is no further question: not in n, not for --limit."""
    flags, data = prepare("shapes", tmp_path / "eval")
    path = llava_file(tmp_path / "a.jsonl", data, CASES["shapes"].answers)
    for limit, n in (("1", 1), ("2", 2), ("9", 2)):
        evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--limit", limit])
        result = json.loads((tmp_path / "out/result.json").read_text())
        assert (result["n"], result["blank"]) == (n, n)
        assert f"{plural(n, 'question')}, {n} of them asked again about a blank picture" in capsys.readouterr().out
        assert "asked again" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name != "shapes"])
def test_every_benchmark_can_be_asked_again_about_blank_pictures(name, tmp_path, capsys):
    """The same answers without a picture give the same score, as a row with an interval, and the same submission."""
    case, (flags, data) = CASES[name], prepare(name, tmp_path / "eval")
    again = ev.load_data(data.name, ev.parse([*flags, "--blank"]))
    pictures = sum(example.image is not None for example in data.examples)
    assert len(again.examples) == len(data.examples) + pictures
    given, answers = iter(case.answers), []
    for example in again.examples:
        answers.append(answers[-1] if example.image == scoring.BLANK else next(given))
    for out, asked, texts, more in (("once", data, case.answers, []), ("twice", again, answers, ["--blank"])):
        path = llava_file(tmp_path / f"{out}.jsonl", asked, texts)
        evaluate([*flags, *more, "--score", str(path), "--out", str(tmp_path / out)])
    result, once = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("twice", "once"))
    assert (result["n"], result["blank"]) == (len(data.examples), pictures) and result["notes"] == once["notes"]
    if case.submission:
        assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == sorted(
            path.name for path in (tmp_path / "once").iterdir())
        if not case.submission.endswith("xlsx"):                    # which carries the time
            files = [tmp_path / folder / case.submission for folder in ("once", "twice")]
            assert files[0].read_text() == files[1].read_text()
    if case.value is not None:
        assert result["value"] == once["value"] == pytest.approx(result["numbers"]["blank image"])
        row = capsys.readouterr().out.rpartition("blank image")[2].partition("\n")[0]
        assert " to ".join(f"{end:.2f}" for end in result["intervals"]["blank image"]) in row


def test_nothing_is_submitted_for_a_part(tmp_path):
    flags, data = prepare("vizwiz", tmp_path / "eval")
    path = llava_file(tmp_path / "a.jsonl", data, ["x"])
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--limit", "1"])
    assert not (tmp_path / "out/vizwiz_test.json").exists()
