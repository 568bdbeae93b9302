"""
Score a model on thirteen benchmarks: generate answers (resumable, on any number of processes), then score them.

Prompts, token limits, parsing and metrics are those of the code behind the published numbers, quirks included: LLaVA's
and LLaVA-Phi's eval scripts, GT-Vision-Lab's VQA scorer, the scorers of POPE, MME, MMMU, MM-Vet, VLMEvalKit (MMBench).
Data lies under --root in the layout of LLaVA's playground/data/eval, folder names as they come.

$ python eval.py --task scienceqa                              # generate, score, report: out/eval/scienceqa
$ python eval.py --task pope,mme --model out/finetune          # several; --task paper is the paper's eight
$ torchrun --nproc_per_node=8 eval.py --task paper             # the same files, eight times as fast
$ python eval.py --task paper --check-data                     # is the data there and the right version? loads no model
$ python eval.py --task pope --score answers.jsonl             # no model, no GPU; LLaVA's own answers files work too
$ python eval.py --task pope --compare A.jsonl B.jsonl         # paired test and the list of flips
$ python eval.py --task jsonl --questions my.jsonl --images my_images
"""
import argparse
import ast
import base64
import csv
import hashlib
import html
import io
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
import unicodedata
import zipfile
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
# torch and the model are imported inside the functions that generate, so that scoring needs neither.

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = "blank"                     # stands for an image that is the padding grey everywhere


class Example(NamedTuple):
    """One question. Its row, the place in the task's list, is its identity: question_id repeats in some benchmarks."""
    question_id: int | str
    image: Path | bytes | str | None    # a file, an encoded picture, BLANK, or None for text only
    prompt: str                         # final wording, instruction included
    truth: object = None                # what the task's grader compares with; None: the truth is on a server
    labels: tuple[str, ...] = ()        # the sub-scores this question counts in
    info: dict = {}                     # what the task's summary or submission needs besides


class Mark(NamedTuple):
    """What one answer earned."""
    points: float | None                # 0 to 1; None: not scored
    parsed: str = ""
    unparsed: bool = False              # the official rule found no answer in the text, or had to fall back
    raw: tuple = ()


class Score(NamedTuple):
    """A headline number with its 95 % interval, and the numbers beside it."""
    value: float
    low: float
    high: float
    interval: str                       # the method
    others: dict[str, float]


Export = Callable[[list[Example], list[str], Path, Path], Path]


@dataclass(frozen=True)
class Task:
    metric: str                                         # what the headline number is
    read: Callable[[Path, Namespace], Iterable[Example]]
    grade: Callable[[Example, str], Mark] | None        # None: a judge does it
    summarise: Callable[[list[Example], list[Mark]], Score | None]
    splits: dict[str, int]                              # name -> official number of questions (0: any); default first
    get: str                                            # where the data comes from
    folders: tuple[str, ...] = ()                       # names of its folder under --root; none: the task's
    files: dict[str, str] = field(default_factory=dict)     # file -> start of the official sha256 ("": not known)
    published: tuple[float | None, ...] = (None,) * 4   # the models of PUBLISHED
    max_new_tokens: int = 128
    paper_mode: str = "pad"                             # image mode behind the published tables
    repeated_ids: bool = False                          # question_id names the image, not the question
    export: Export | None = None                        # writes the submission file
    judge: Callable[[list[Example], list[str], Namespace, Path], list[Mark]] | None = None

# ----------------------------------------------------------------------------------------------------
# Answer normalisation: pure functions, tested on literal strings

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                        "0 0 1 2 3 4 5 6 7 8 9 10".split()))
ARTICLES = {"a", "an", "the"}
# The 120 spellings that the VQA scorers repair: these, without one of the apostrophes. A test holds their checksum.
CONTRACTIONS = {form[:i] + form[i + 1:]: form for form in """
    'twas I'm I've ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'd you'll you're you've I'd've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
    y'all'd've 'ow's'at
    """.split() for i, letter in enumerate(form) if letter == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}     # the last one is theirs


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation_and_words(text: str, glue: str) -> str:
    """What both normalisers share. glue: commas between digits by which every mark vanishes instead of making room."""
    glued = re.search(glue, text)
    out = text
    for mark in PUNCTUATION:
        if mark in text:
            alone = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if alone or glued else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)                # 32: theirs passes a flag where the count goes
    words = [NUMBER_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 20)
def normalize_evalai(text: str) -> str:
    """The EvalAI processor (m4c): TextVQA, VizWiz, and every VQA submission."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _punctuation_and_words(one_line(text), r"\d,+\d")


@lru_cache(maxsize=1 << 20)
def normalize_vqa(text: str) -> str:
    """The official VQA scorer's own normaliser (2021 version)."""
    return _punctuation_and_words(one_line(text), r"\d,\d")


def soft_accuracy(answer: str, humans: list[str]) -> float:
    """Mean over the humans, each left out in turn, of min(1, matches among the others / 3)."""
    same = humans.count(answer)
    return (same * min(1, (same - 1) / 3) + (len(humans) - same) * min(1, same / 3)) / len(humans)


def vqa_accuracy(text: str, humans: list[str]) -> float:
    """The official VQA scorer on a submitted answer: with unanimous humans it compares raw strings."""
    text, humans = one_line(text), [one_line(human) for human in humans]
    if len(set(humans)) > 1:
        text, humans = normalize_vqa(text), [normalize_vqa(human) for human in humans]
    return soft_accuracy(text, humans)


def gqa_answer(text: str) -> str:
    return text.rstrip(".").lower()


def plain_answer(text: str) -> str:
    """For the shapes and for one's own questions: case, outer spaces and a final full stop do not count."""
    return text.strip().rstrip(".").strip().lower()


def mme_yes_no(text: str) -> str:
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def scienceqa_letter(text: str) -> str | None:
    if text[:1] in set("ABCDE") and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def mmbench_letter(text: str, options: dict[str, str]) -> str | None:
    """VLMEvalKit's extraction without a language model: a letter, "answer is X", or the text of exactly one option."""
    refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                "I'm sorry, but without the image provided", "Cannot determine the answer")
    if any(refusal in text for refusal in refusals):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    if said := re.search(rf"answer is \**([{''.join(options)}])\b", text, re.IGNORECASE):
        return said[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def mmmu_choice(text: str, options: dict[str, str]) -> str | None:
    """The letter mentioned last; None where the official code draws one at random."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    searches = [(text, {letter: form.format(letter) for letter in options}) for form in ("({})", " {} ")]
    if len(text.split()) > 5:
        searches.append((text.lower(), {letter: option.lower() for letter, option in options.items()}))
    for where, names in searches:
        places = {letter: where.rfind(name) for letter, name in names.items()}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.get)
    return None


def mmmu_value(text: str) -> list[float | str]:
    """A number rounded to two decimals; else the lower-cased text, a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


MMMU_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def mmmu_open(text: str) -> set[float | str]:
    """Every value an open answer may be read as: the shortest tail after a cue in each line, and all numbers in it."""
    text = text.strip().strip(".").lower()
    cues = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    lines, keys = text.split("\n"), []
    for i, line in enumerate(lines):
        if i == len(lines) - 1:
            cues.append("=")
        tail = ""
        for cue in cues:
            after = line.split(cue)[-1].strip()
            if cue in line and (not tail or len(after) < len(tail)):
                tail = after
        if tail and tail not in [*":,.!?;'"]:
            keys.append(tail)
    keys = keys or [text]
    numbers = [n for key in keys for pattern in MMMU_NUMBERS for n in re.findall(pattern, key)]
    return {value for part in keys + numbers for value in mmmu_value(part)}


def mmmu_open_correct(text: str, truth: str | list[str]) -> bool:
    truths = [value for t in ([truth] if isinstance(truth, str) else truth) for value in mmmu_value(t)]
    inside = lambda value: any(isinstance(t, str) and t in value for t in truths)
    return any(inside(value) if isinstance(value, str) else value in truths for value in mmmu_open(text))


def mmvet_grade(text: str) -> float | None:
    """The judge's number: everything before the first space, if it lies in [0, 1]."""
    try:
        grade = float(text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def llavabench_pair(review: str) -> tuple[float, float]:
    """Reference and candidate score in a review's first line; (-1, -1) where it does not hold exactly two numbers."""
    try:
        first, second = review.split("\n")[0].replace(",", " ").split(" ")
        return float(first), float(second)
    except ValueError:
        return -1.0, -1.0

# ----------------------------------------------------------------------------------------------------
# Graders: one answer -> what it earned


def grade_by(read: Callable[[str], str | None], nothing: str | None = None) -> Callable[[Example, str], Mark]:
    """A grader: right is when what `read` makes of the text is the truth. nothing: what it makes of unreadable text."""
    def grade(example: Example, text: str) -> Mark:
        answer = read(text)
        return Mark(float(answer == example.truth), answer or "", unparsed=answer == nothing)
    return grade


def grade_plain(example: Example, text: str) -> Mark:
    answer, truths = plain_answer(text), example.truth if isinstance(example.truth, list) else [example.truth]
    return Mark(float(answer in {plain_answer(str(truth)) for truth in truths}), answer)


def grade_vqav2(example: Example, text: str) -> Mark:
    answer = normalize_evalai(text)                 # what would be submitted
    return Mark(vqa_accuracy(answer, example.truth), answer)


def grade_textvqa(example: Example, text: str) -> Mark:
    """raw: what the official VQA scorer gives."""
    answer = normalize_evalai(text)
    points = soft_accuracy(answer, [normalize_evalai(human) for human in example.truth])
    return Mark(points, answer, raw=(vqa_accuracy(answer, example.truth),))


def grade_pope(example: Example, text: str) -> Mark:
    """Everything without a separate No, no or not before the first full stop is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    answer = "no" if {"No", "no", "not"} & set(words) else "yes"
    said = {"yes", "no", "not"} & set(re.findall(r"[a-z]+", text.lower()))
    return Mark(float(answer == example.truth), answer, unparsed=not said)


def grade_mmbench(example: Example, text: str) -> Mark:
    letter = mmbench_letter(text, example.info["options"])
    strict = float(text.strip() == example.truth)
    return Mark(float(letter == example.truth), letter or "", letter is None, (strict,))


def grade_seedbench(example: Example, text: str) -> Mark:
    return Mark(float(text == example.truth), text, text not in ("A", "B", "C", "D"))


def mmmu_read(example: Example, text: str) -> str | None:
    """What is submitted: the letter chosen, or all of an open answer."""
    return mmmu_choice(text, example.info["options"]) if example.info["options"] else text


def grade_mmmu(example: Example, text: str) -> Mark:
    if not example.info["options"]:
        return Mark(float(mmmu_open_correct(text, example.truth)), text)
    letter = mmmu_read(example, text)
    return Mark(float(letter is not None and letter in example.truth), letter or "", letter is None)

# ----------------------------------------------------------------------------------------------------
# Summaries: marks -> the number that papers report, its 95 % interval, and the numbers beside it


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def interval_of_mean(points: list[float]) -> tuple[float, float, str]:
    """In per cent: Wilson's interval where every answer is right or wrong, the normal one where answers earn parts."""
    n, p, z = len(points), mean(points), 1.96
    if set(points) <= {0.0, 1.0}:
        scale, half = 1 + z * z / n, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        middle, half, method = (p + z * z / (2 * n)) / scale, half / scale, "Wilson"
    else:
        middle, half, method = p, z * math.sqrt(mean([(x - p) ** 2 for x in points]) / n), "normal"
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half), method


def accuracy(examples: list[Example], marks: list[Mark], beside: dict[str, float] = {},
             only: str | None = None) -> Score | None:
    """Mean of the points, and of each label's; before these the numbers in `beside`.

    only: the headline is on the questions with this label, `all` beside it. None where --limit leaves no such question.
    """
    points, by_label = [mark.points for mark in marks], defaultdict(list)
    for example, mark in zip(examples, marks):
        for label in example.labels:
            by_label[label].append(mark.points)
    if only:
        beside, points = {"all": 100 * mean(points)}, by_label[only]
    if not points:
        return None
    others = beside | {label: 100 * mean(part) for label, part in sorted(by_label.items())}
    return Score(100 * mean(points), *interval_of_mean(points), others)


def ratio_of_sums(counts: list | np.ndarray, metric: Callable[[np.ndarray], np.ndarray], unit: str,
                  others: dict[str, float]) -> Score:
    """A metric of counts summed over the units that the bootstrap draws. counts: (units, ...); metric: (...) -> ().

    metric is also given the sums of all draws at once: (draws, ...) -> (draws).
    """
    counts, rng = np.array(counts, dtype=float), np.random.default_rng(0)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=1000)        # (draws, n)
    low, high = map(float, np.percentile(metric(np.tensordot(weights, counts, 1)), [2.5, 97.5]))
    return Score(float(metric(counts.sum(0))), low, high, f"bootstrap over {unit}, 1000 draws, seed 0", others)


def summarise_shapes(examples: list[Example], marks: list[Mark]) -> Score:
    """Sighted questions; the same questions about a blank image, and chance, beside them."""
    pairs = list(zip(examples, marks))
    seen, blank = [[p for p in pairs if (p[0].image == BLANK) == b] for b in (False, True)]
    chance, blind = mean([e.info["chance"] for e, _ in seen]), mean([m.points for _, m in blank])
    return accuracy(*zip(*seen), {"chance": 100 * chance, "blank image": 100 * blind})


def summarise_vizwiz(examples: list[Example], marks: list[Mark]) -> Score:
    return accuracy(examples, marks, {"official VQA scorer": 100 * mean([mark.raw[0] for mark in marks])})


def summarise_pope(examples: list[Example], marks: list[Mark]) -> Score:
    kinds = sorted({example.labels[0] for example in examples})
    images = defaultdict(lambda: np.zeros((len(kinds), 4)))             # tp, fp, fn, tn of each kind
    for example, mark in zip(examples, marks):
        cell = [("yes", 1), ("no", 0), ("yes", 0), ("no", 1)].index((example.truth, mark.points))
        images[example.image][kinds.index(example.labels[0]), cell] += 1

    def f1(sums: np.ndarray) -> np.ndarray:                             # (..., kinds, 4) -> (..., kinds)
        tp, fp, fn, _ = np.moveaxis(sums, -1, 0)
        return 2 * tp / np.maximum(2 * tp + fp + fn, 1)                 # 0 where nothing is labelled or called yes

    others, totals = {"accuracy": 100 * mean([mark.points for mark in marks])}, sum(images.values())
    for kind, kind_f1, (tp, fp, fn, tn) in zip(kinds, f1(totals), totals):
        n = tp + fp + fn + tn
        numbers = {"F1": kind_f1, "accuracy": (tp + tn) / n, "precision": tp / max(tp + fp, 1),
                   "recall": tp / max(tp + fn, 1), "yes ratio": (tp + fp) / n}
        others |= {f"{kind} {name}": float(100 * value) for name, value in numbers.items()}
    return ratio_of_sums(list(images.values()), lambda sums: 100 * f1(sums).mean(-1), "images", others)


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def summarise_mme(examples: list[Example], marks: list[Mark]) -> Score:
    """Perception: the sum over subtasks of accuracy + accuracy on whole images. Never perception + cognition."""
    subtasks = PERCEPTION + COGNITION
    images = defaultdict(list)
    for example, mark in zip(examples, marks):
        images[example.labels[0], example.image].append(mark.points)
    counts = np.zeros((len(images), len(subtasks), 4))      # right, questions, images all right, images
    for count, ((subtask, _), points) in zip(counts, images.items()):
        count[subtasks.index(subtask)] = sum(points), len(points), all(points), 1

    def subtask_scores(sums: np.ndarray) -> np.ndarray:     # (..., subtasks, 4) -> (..., subtasks)
        right, questions, whole, n = np.moveaxis(sums, -1, 0)
        return 100 * right / np.maximum(questions, 1) + 100 * whole / np.maximum(n, 1)

    scores = subtask_scores(counts.sum(0))
    perception = lambda sums: subtask_scores(sums)[..., :len(PERCEPTION)].sum(-1)
    others = {"cognition": float(scores[len(PERCEPTION):].sum())} | dict(zip(subtasks, map(float, scores)))
    return ratio_of_sums(counts, perception, "images", others)


def summarise_mmbench(examples: list[Example], marks: list[Mark]) -> Score:
    """Circular: a question counts if every rotation of its options is answered right."""
    rounds = defaultdict(list)
    for example, mark in zip(examples, marks):
        rounds[example.question_id % 1_000_000].append((example, mark))
    firsts = [pairs[0][0] for pairs in rounds.values()]
    circular = [Mark(float(all(m.points for _, m in pairs))) for pairs in rounds.values()]
    strict = [float(all(m.raw[0] for _, m in pairs)) for pairs in rounds.values()]
    single = [mark.points for example, mark in zip(examples, marks) if example.question_id < 1_000_000]
    return accuracy(firsts, circular, {"circular, bare letters only": 100 * mean(strict),
                                       "single pass": 100 * mean(single)})


def summarise_mmmu(examples: list[Example], marks: list[Mark]) -> Score:
    """Where no choice can be read the official code draws one at random (seed 42, in file order)."""
    rng, drawn = random.Random(42), []
    for example, mark in zip(examples, marks):
        if example.info["options"] and mark.unparsed:
            mark = mark._replace(points=float(rng.choice(list(example.info["options"])) in example.truth))
        drawn.append(mark)
    return accuracy(examples, drawn, {"unparsed = wrong": 100 * mean([mark.points for mark in marks])})


def summarise_mmvet(examples: list[Example], marks: list[Mark]) -> Score:
    runs = [100 * mean(grades) for grades in zip(*(mark.raw for mark in marks))]
    spread = {f"run {i}": run for i, run in enumerate(runs, 1)} | {"std over runs": float(np.std(runs))}
    return accuracy(examples, marks, spread if len(runs) > 1 else {})


def summarise_llavabench(examples: list[Example], marks: list[Mark]) -> Score:
    """Candidate's mean rating over the reference's. Failed reviews are left out (upstream averages their -1 in)."""
    def ratio(sums: np.ndarray) -> np.ndarray:
        reference, candidate = np.round(sums[..., 0] / sums[..., 2], 3), np.round(sums[..., 1] / sums[..., 2], 3)
        return 100 * candidate / np.maximum(reference, 1e-3)

    rows = [(example.labels[0], (*mark.raw, 1.0)) for example, mark in zip(examples, marks)]
    others = {}
    for kind in sorted({kind for kind, _ in rows}) + ["all"]:
        total = np.sum([row for k, row in rows if kind in (k, "all")], axis=0)
        reference, candidate = map(float, 10 * total[:2] / total[2])
        others |= {kind: float(ratio(total)), f"{kind} reference": reference, f"{kind} candidate": candidate}
    return ratio_of_sums([row for _, row in rows], ratio, "questions", others)

# ----------------------------------------------------------------------------------------------------
# Files


def read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from e


def read_jsonl(path: Path, torn: bool = False) -> list[dict]:
    """One object a line. torn: a last line that a killed run left unfinished is dropped."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: not a JSON object ({e})") from e
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, line {number}: expected an object, found {type(rows[-1]).__name__}")
    return rows


def to_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def to_jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_whole(path: Path, data: str | bytes) -> Path:
    """The file is either the old one or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
    part.replace(path)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def visible(text: str) -> str:
    """Control characters and direction marks written out, so that a model's text cannot act on a terminal or a page."""
    odd = lambda c: unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"
    return "".join(f"\\u{ord(c):04x}" if odd(c) else c for c in text)


def find(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def need(folder: Path, *names: str) -> Path:
    """The first of these that exists."""
    if found := find(folder, *names):
        return found
    others = "".join(f" (nor is there {name})" for name in names[1:])
    raise FileNotFoundError(f"{folder / names[0]} is missing{others}")


def inside(folder: Path, name: str) -> Path:
    """An image's path as a data file gives it; it cannot leave the folder."""
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or set(name) & set("\0\\:"):
        raise ValueError(f"image name {name!r} is not a plain path inside {folder}")
    return folder / name

# ----------------------------------------------------------------------------------------------------
# Readers: (folder of the task, options) -> questions, in the order of the official question file.
# Where LLaVA's eval.zip file is there it gives order and wording; without it both are rebuilt from the official files.


def lettered(choices: Iterable[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def read_llava(path: Path, images: Path) -> Iterator[Example]:
    """A question file of eval.zip whose truth is on a server."""
    for row in read_jsonl(path):
        yield Example(row["question_id"], inside(images, row["image"]), row["text"])


def read_shapes(folder: Path, options: Namespace) -> Iterator[Example]:
    """Each question twice: about its picture, and about a blank one."""
    for row in read_jsonl(need(folder, "questions.jsonl")):
        image, labels = inside(folder / "images", row["image"]), (row["category"],)
        example = Example(row["question_id"], image, row["text"], row["answer"], labels, {"chance": row["chance"]})
        yield example
        yield example._replace(question_id=f"{row['question_id']}/blank", image=BLANK)


def read_own(folder: Path, options: Namespace) -> Iterator[Example]:
    """--questions: jsonl with question_id, text, and perhaps image, answer (one or a list), category."""
    if not options.questions:
        raise ValueError("needs --questions FILE (jsonl: question_id, image, text, perhaps answer) and --images DIR")
    for i, row in enumerate(read_jsonl(need(Path(), options.questions))):
        if row.get("image") and not options.images:
            raise ValueError(f"{options.questions} names images: add --images DIR")
        image = inside(Path(options.images), row["image"]) if row.get("image") else None
        labels = (str(row["category"]),) if "category" in row else ()
        yield Example(row.get("question_id", i), image, row["text"], row.get("answer"), labels)


def read_vqav2(folder: Path, options: Namespace) -> Iterator[Example]:
    name, images = {"test-dev": ("test-dev2015", "test2015"), "val": ("val2014", "val2014")}[options.split]
    if options.split == "test-dev" and (ours := find(folder, "llava_vqav2_mscoco_test-dev2015.jsonl")):
        yield from read_llava(ours, folder / images)
        return
    questions, truths = need(folder, f"v2_OpenEnded_mscoco_{name}_questions.json"), {}
    if options.split == "val":
        annotations = read_json(need(folder, "v2_mscoco_val2014_annotations.json"))["annotations"]
        truths = {row["question_id"]: row for row in annotations}
    for row in read_json(questions)["questions"]:
        humans, labels = None, ()
        if truths:
            truth = truths[row["question_id"]]
            humans, labels = [answer["answer"] for answer in truth["answers"]], (truth["answer_type"],)
        image = folder / images / f"COCO_{images}_{row['image_id']:012d}.jpg"
        yield Example(row["question_id"], image, f"{row['question']}\n{SHORT}", humans, labels)


def read_gqa(folder: Path, options: Namespace) -> Iterator[Example]:
    name = "testdev_balanced_questions.json"
    for question_id, row in read_json(need(folder / "data", name, f"questions1.2/{name}", f"questions/{name}")).items():
        kind = row["types"]
        labels = ("open" if kind["structural"] == "query" else "binary",
                  f"structural {kind['structural']}", f"semantic {kind['semantic']}")
        image = inside(folder / "data/images", row["imageId"] + ".jpg")
        yield Example(question_id, image, f"{row['question']}\n{SHORT}", row["answer"], labels)


def read_vizwiz(folder: Path, options: Namespace) -> Iterator[Example]:
    images = folder / options.split
    if options.split == "test" and (ours := find(folder, "llava_test.jsonl")):
        yield from read_llava(ours, images)
        return
    for i, row in enumerate(read_json(need(folder, f"{options.split}.json", f"Annotations/{options.split}.json"))):
        prompt = f"{row['question'].capitalize()}\n{UNANSWERABLE}\n{SHORT}"
        humans = [answer["answer"] for answer in row["answers"]] if "answers" in row else None
        yield Example(i, inside(images, row["image"]), prompt, humans, (row["answer_type"],) if humans else ())


def read_scienceqa(folder: Path, options: Namespace) -> Iterator[Example]:
    problems, splits = read_json(need(folder, "problems.json")), read_json(need(folder, "pid_splits.json"))
    texts = dict.fromkeys(splits["test"])
    if ours := find(folder, "llava_test_CQM-A.json"):
        texts = {row["id"]: row["conversations"][0]["value"].replace("<image>", "").strip() for row in read_json(ours)}
    images = find(folder, "images/test", "test") or folder / "images/test"
    for pid, text in texts.items():
        problem, image = problems[pid], None
        if problem["image"]:
            image = inside(images, f"{pid}/{problem['image']}")
        elif options.img_only:
            continue
        context = ("TXT",) * bool(problem["hint"]) + ("IMG",) * bool(image) or ("NO",)
        subject = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}[problem["subject"]]
        grade = "G1-6" if int(problem["grade"].removeprefix("grade")) <= 6 else "G7-12"
        hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        rebuilt = f"{hint}{problem['question']}\n{lettered(problem['choices'])}".replace("  ", " ").strip()
        prompt, truth = f"{text or rebuilt}\n{LETTER}", LETTERS[problem["answer"]]
        # <image> in the saved prompt is how the official scorer tells which questions count
        info = {"saved": f"<image>\n{prompt}"} if image else {}
        yield Example(pid, image, prompt, truth, (subject, *context, grade), info)


def read_textvqa(folder: Path, options: Namespace) -> Iterator[Example]:
    official = read_json(need(folder, "TextVQA_0.5.1_val.json"))["data"]
    if ours := find(folder, "llava_textvqa_val_v051_ocr.jsonl"):
        rows = [(row["question_id"], row["text"].split("\n")) for row in read_jsonl(ours)]
    else:
        rosetta = read_json(need(folder, "TextVQA_Rosetta_OCR_v0.2_val.json"))["data"] if options.ocr else []
        tokens = {row["image_id"]: ", ".join(row["ocr_tokens"]) for row in rosetta}
        ocr = lambda row: f"Reference OCR token: {tokens.get(row['image_id'], '')}"
        rows = [(row["image_id"], [row["question"].capitalize(), ocr(row), SHORT]) for row in official]
    # asked twice about one picture: both are scored on the last one's answers, as in LLaVA's eval_textvqa.py
    humans = {(row["image_id"], row["question"].lower()): row["answers"] for row in official}
    for image_id, lines in rows:
        truth = humans.get((image_id, lines[0].lower()), [])
        if len(truth) != 10:
            raise ValueError(f"TextVQA_0.5.1_val.json has no ten answers to the question {lines[0]!r} about {image_id}")
        prompt = "\n".join(lines if options.ocr else [lines[0], lines[-1]])
        yield Example(image_id, inside(folder / "train_images", f"{image_id}.jpg"), prompt, truth)


POPE_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def read_pope(folder: Path, options: Namespace) -> Iterator[Example]:
    """Labels are joined by image and question: by position the 3,000 random rows of POPE's HEAD misalign in silence."""
    key = lambda row: (row["category"], row["image"], row["text"].split("\n")[0].replace("imange", "image"))
    labels, rows = {}, []
    for kind, offset in POPE_OFFSETS.items():
        for row in read_jsonl(need(folder, f"coco/coco_pope_{kind}.json")):
            question_id, text = row["question_id"] + offset, f"{row['text']}\n{SHORT}"
            rows.append({"question_id": question_id, "image": row["image"], "text": text, "category": kind})
            labels[key(rows[-1])] = row["label"]
    if ours := find(folder, "llava_pope_test.jsonl"):
        rows = read_jsonl(ours)
    for row in rows:
        kind, image = row["category"], inside(folder / "val2014", row["image"])
        if (label := labels.get(key(row))) is None:
            raise ValueError(f"question {row['question_id']} has no label in coco_pope_{kind}.json: another version?")
        yield Example(row["question_id"], image, row["text"], label, (kind,))


def read_mme(folder: Path, options: Namespace) -> list[Example]:
    """The release mixes two layouts: images and questions of a subtask in folders of their own, or side by side."""
    release = need(folder, "MME_Benchmark_release_version")
    release = find(release, "MME_Benchmark") or release
    official = {}                                               # (subtask, image's stem, question) -> example
    for subtask in PERCEPTION + COGNITION:
        images = find(release / subtask, "images") or release / subtask
        texts = find(release / subtask, "questions_answers_YN") or release / subtask
        image_of = {path.stem: path for path in sorted(images.glob("*")) if path.suffix != ".txt"}
        for path in sorted(texts.glob("*.txt")):
            image = image_of.get(path.stem, images / f"{path.stem}.jpg")
            for line in path.read_text(encoding="utf-8").splitlines():
                question, answer = line.strip().split("\t")
                question = question.replace("Please answer yes or no.", "").strip()
                official[subtask, path.stem, question] = Example(
                    f"{subtask}/{image.name}", image, f"{question}\n{SHORT}", answer.lower(), (subtask,))
    examples = list(official.values())
    if ours := find(folder, "llava_mme.jsonl"):
        examples = []
        for row in read_jsonl(ours):
            path, question = PurePosixPath(row["question_id"]), row["text"].removesuffix(SHORT).strip()
            if (example := official.get((path.parts[0], path.stem, question))) is None:
                where = release / path.parts[0]
                raise ValueError(f"no answer in {where} for the question {question!r} about {row['question_id']}")
            examples.append(example._replace(question_id=row["question_id"]))
    per_image = Counter(f"{example.labels[0]}/{example.image.stem}" for example in examples)
    if odd := [image for image, n in per_image.items() if n != 2]:
        raise ValueError(f"{len(odd)} images do not have two questions each, the first is {odd[0]}")
    return examples


MMBENCH_ABBREVIATIONS = {
    "coarse_perception": "CP", "logic_reasoning": "LR", "relation_reasoning": "RR", "attribute_reasoning": "AR",
    "finegrained_perception (instance-level)": "FP-S", "finegrained_perception (cross-instance)": "FP-C"}
MMBENCH_SHEET = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")      # as submitted


def read_mmbench(name: str, legacy: str, instruction: str, folder: Path, options: Namespace) -> Iterator[Example]:
    """The file holds the rotations as rows of their own, index = question + round * 1,000,000; none are made here."""
    split = {"split": options.split, "SPLIT": options.split.upper()}
    csv.field_size_limit(1 << 28)               # quoted cells may hold newlines and megabytes of base64
    with open(need(folder, name.format(**split), legacy.format(**split)), newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    cell = lambda row, name: "" if (row.get(name) or "").lower() in ("", "nan", "none") else row[name]
    pictures, decoded = {row["index"]: row["image"] for row in rows}, {}
    for row in rows:
        choices = dict(itertools.takewhile(lambda choice: choice[1], [(x, cell(row, x)) for x in "ABCD"]))
        lines = [cell(row, "hint"), row["question"], lettered(choices.values()), instruction]
        picture = pictures[row["image"]] if len(row["image"]) < 64 else row["image"]    # an index of another row
        if picture not in decoded:
            decoded[picture] = base64.b64decode(picture)
        parent, category = cell(row, "l2-category"), cell(row, "category")
        labels = tuple(filter(None, [MMBENCH_ABBREVIATIONS.get(parent, parent), category]))
        sheet = {x: cell(row, x) if x in "ABCD" else row[x] for x in MMBENCH_SHEET if x in row}
        yield Example(int(float(row["index"])), decoded[picture], "\n".join(filter(None, lines)),
                      cell(row, "answer") or None, labels, {"options": choices, "row": sheet})


def read_mmvet(folder: Path, options: Namespace) -> Iterator[Example]:
    for key, row in read_json(need(folder, "mm-vet.json")).items():
        labels = (*row["capability"], "set " + "+".join(sorted(row["capability"])))
        image = inside(folder / "images", row["imagename"])
        yield Example(int(key.removeprefix("v1_")), image, row["question"], row["answer"], labels)


def read_seedbench(folder: Path, options: Namespace) -> list[Example]:
    official = read_json(need(folder, "SEED-Bench.json"))
    types = {number: name for name, number in official["question_type"].items()}
    examples = {}
    for row in official["questions"]:
        number = row["question_id"]
        if row["data_type"] == "image":
            number, image = int(number), inside(folder / "SEED-Bench-image", row["data_id"])
        elif options.split == "image":
            continue
        else:
            image = folder / "SEED-Bench-video-image" / f"{row['question_type_id']}_{number}.png"
        choices = lettered(row[f"choice_{letter}"] for letter in "abcd")
        labels = (row["data_type"], types[row["question_type_id"]])
        examples[str(number)] = Example(number, image, f"{row['question']}\n{choices}\n{LETTER}", row["answer"], labels)
    if ours := find(folder, "llava-seed-bench.jsonl"):
        order = [str(row["question_id"]) for row in read_jsonl(ours)]
        return [examples[number] for number in order if number in examples]
    return list(examples.values())


def read_llavabench(folder: Path, options: Namespace) -> Iterator[Example]:
    contexts = {row["image"]: row["caption"] for row in read_jsonl(need(folder, "context.jsonl"))}
    references = {row["question_id"]: row["text"] for row in read_jsonl(need(folder, "answers_gpt4.jsonl"))}
    for row in read_jsonl(need(folder, "questions.jsonl")):
        truth = {"context": contexts[row["image"]], "reference": references[row["question_id"]]}
        image = inside(folder / "images", row["image"])
        yield Example(row["question_id"], image, row["text"], truth, (row["category"],))


MMMU_DOMAINS = {
    "Art & Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health & Medicine": """Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy
                            Public_Health""",
    "Humanities & Social Science": "History Literature Sociology Psychology",
    "Tech & Engineering": """Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power
                             Materials Mechanical_Engineering"""}


def read_mmmu(folder: Path, options: Namespace) -> Iterator[Example]:
    """The parquet rows as jsonl, image_1 the name of a file in images/. The other images are not used, as by LLaVA."""
    domains = {subject: domain for domain, subjects in MMMU_DOMAINS.items() for subject in subjects.split()}
    answers = read_json(path) if options.split == "val" and (path := find(folder, "answer_dict_val.json")) else {}
    for row in read_jsonl(need(folder, f"{options.split}.jsonl")):
        choices, prompt = {}, f"{row['question']}\n{SHORT}"
        if row["question_type"] == "multiple-choice":
            listed = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
            choices = dict(zip(LETTERS, listed))
            prompt = row["question"] + "\n" + "".join(f"({k}) {v}\n" for k, v in choices.items()) + f"\n{LETTER}"
        truth = answers[row["id"]]["ground_truth"] if row["id"] in answers else row["answer"]
        subject = row["id"].split("_", 1)[1].rsplit("_", 1)[0]
        yield Example(row["id"], inside(folder / "images", row["image_1"]), prompt,
                      None if truth in ("", "?") else truth, (domains[subject], subject), {"options": choices})

# ----------------------------------------------------------------------------------------------------
# Submission files: checked first, then written whole


def submission(name: str, entry: Callable[[Example, str], object], whole: Callable[[list], str] = json.dumps) -> Export:
    """A writer of one entry for each answer; whole: what makes a file of them."""
    def export(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
        return write_whole(out / name, whole([entry(example, text) for example, text in zip(examples, texts)]))
    return export


def as_object(pairs: list[tuple[str, str]]) -> str:
    return to_json(dict(pairs))


def export_vqav2(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """Every test2015 question, "" where only the server's other phases ask (so test-standard shows about 0)."""
    ours, official = "llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json"
    path = need(folder, ours, official)
    rows = read_jsonl(path) if path.name == ours else read_json(path)["questions"]
    answers = dict.fromkeys((row["question_id"] for row in rows), "")
    unknown = sum(example.question_id not in answers for example in examples)
    if unknown:
        raise ValueError(f"{path} lacks {unknown:,} of the answered questions: another version?")
    answers |= {example.question_id: normalize_evalai(text) for example, text in zip(examples, texts)}
    upload = [{"question_id": row["question_id"], "answer": answers[row["question_id"]]} for row in rows]
    return write_whole(out / "vqav2_test-dev2015.json", json.dumps(upload))


def export_mmbench(examples: list[Example], texts: list[str], folder: Path, out: Path) -> Path:
    """A sheet with the columns of the .tsv (answer only if it has one), index as a number, missing options empty."""
    columns = [name for name in MMBENCH_SHEET if name in examples[0].info["row"] or name == "prediction"]
    rows = [{**e.info["row"], "index": e.question_id, "prediction": text} for e, text in zip(examples, texts)]
    return write_xlsx(out / "mmbench.xlsx", [columns] + [[row[name] or "" for name in columns] for row in rows])


def write_xlsx(path: Path, table: list[list[int | str]]) -> Path:
    """One sheet of numbers and texts: the five parts that a workbook needs, empty texts as missing cells."""
    def cell(value: int | str, at: str) -> str:
        if isinstance(value, int):
            return f'<c r="{at}"><v>{value}</v></c>'
        # what a cell can hold: no control characters, at most 32,767 of the rest
        value = value.replace("\r\n", "\n").replace("\r", "\n")
        value = re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value)[:32767]
        value = html.escape(value, quote=False)
        return f'<c r="{at}" t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>' if value else ""

    rows = ["".join(cell(value, f"{LETTERS[column]}{r}") for column, value in enumerate(row))
            for r, row in enumerate(table, 1)]
    sheet = "".join(f'<row r="{r}">{row}</row>' for r, row in enumerate(rows, 1))
    schemas, types = "http://schemas.openxmlformats.org", "application/vnd.openxmlformats"
    main, rels = f"{schemas}/spreadsheetml/2006/main", f"{schemas}/package/2006/relationships"
    rel = f"{schemas}/officeDocument/2006/relationships"
    parts = {
        "[Content_Types].xml": f"""<Types xmlns="{schemas}/package/2006/content-types">
<Default Extension="rels" ContentType="{types}-package.relationships+xml"/>
<Override PartName="/xl/workbook.xml" ContentType="{types}-officedocument.spreadsheetml.sheet.main+xml"/>
<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{types}-officedocument.spreadsheetml.worksheet+xml"/>
</Types>""",
        "_rels/.rels": f"""<Relationships xmlns="{rels}">
<Relationship Id="rId1" Type="{rel}/officeDocument" Target="xl/workbook.xml"/></Relationships>""",
        "xl/workbook.xml": f"""<workbook xmlns="{main}" xmlns:r="{rel}">
<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>""",
        "xl/_rels/workbook.xml.rels": f"""<Relationships xmlns="{rels}">
<Relationship Id="rId1" Type="{rel}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>""",
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet}</sheetData></worksheet>'}
    packed, head = io.BytesIO(), '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    with zipfile.ZipFile(packed, "w") as z:
        for name, xml in parts.items():         # a fixed date: the same answers make the same file
            z.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), head + xml, zipfile.ZIP_DEFLATED)
    return write_whole(path, packed.getvalue())

# ----------------------------------------------------------------------------------------------------
# Judges: an existing grade or review file, or any OpenAI-compatible endpoint (--judge-url). Kept answer by answer.

MMVET_INSTRUCTION = """Rate how correct a prediction is: 0.0 (all wrong), 0.1, 0.2 and so on to 1.0 (all right).
<AND> in the ground truth: all of its parts must be there for 1.0. <OR>: any one of its parts is enough.
Reply with the number only.

question | ground truth | prediction | score
How many apples are there? | 3 | There are three apples. | 1.0
How many apples are there? | 3 | Four | 0.0
What are the two colors? | red <AND> blue | Red and green. | 0.5
Where is this? | Rome <OR> the Colosseum | It looks like the Colosseum. | 1.0
"""
LLAVABENCH_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
LLAVABENCH_INSTRUCTION = """Two assistants answered the question above, about an image that the context describes.
Rate helpfulness, relevance, accuracy and detail of each answer from 1 to 10, without regard to their order.
Write both ratings on the first line, assistant 1 first, with one space between them and nothing else; then explain."""


def ask_judge(options: Namespace, messages: list[dict], temperature: float, max_tokens: int) -> str:
    """One chat completion. ValueError: the endpoint failed; what is already graded is kept."""
    from urllib.request import Request, urlopen         # the only network access, to an address that the user gave
    body = {"model": options.judge_model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("JUDGE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = options.judge_url.rstrip("/") + "/chat/completions"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--judge-url {options.judge_url}: expected http:// or https://")
    try:
        with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=options.judge_timeout) as reply:
            return json.loads(reply.read(1 << 24))["choices"][0]["message"]["content"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"the judge at {url} failed ({e}); its grades so far are kept, run this again to go on") from e


def judged(name: str, keys: list, ask: Callable[[Example, str, Namespace], dict], examples: list[Example],
           texts: list[str], options: Namespace, out: Path) -> list[dict]:
    """What the judge says of each answer: read from --grades, or asked for and kept in a file of exactly these answers.

    name: of that file, {} for judge and answers: .jsonl holds a row for each question_id, .json an object by key.
    """
    if not options.grades and not options.judge_model:
        raise ValueError("--judge-url needs --judge-model NAME: scores of different judges do not compare")
    judge = re.sub(r"[^\w.-]", "_", options.judge_model or "")
    path = Path(options.grades or out / name.format(f"{judge}-{sha256(to_json(texts).encode())}"))
    as_rows, grades = name.endswith(".jsonl"), {}
    if path.exists() or options.grades:
        grades = {row["question_id"]: row for row in read_jsonl(path)} if as_rows else read_json(path)
    for key, example, text in zip(keys, examples, texts):
        if key not in grades:
            if not options.judge_url:
                raise ValueError(f"{path} has no grade for {key}: expected one for each of the {len(keys)} answers")
            grades[key] = ask(example, text, options)
            write_whole(path, to_jsonl(grades.values()) if as_rows else to_json(grades))
    return [grades[key] for key in keys]


def judge_mmvet(examples: list[Example], texts: list[str], options: Namespace, out: Path) -> list[Mark]:
    """Grades in the official *-grade-Nruns.json layout: {"v1_0": {"model": [], "content": [], "score": []}}."""
    keys = [f"v1_{example.question_id}" for example in examples]
    grades = judged("mm-vet-{}-grade-1runs.json", keys, grade_mmvet, examples, texts, options, out)
    scores = [tuple(map(float, grade["score"])) for grade in grades]
    if len(runs := set(map(len, scores))) != 1 or runs == {0}:
        raise ValueError(f"{options.grades}: graded {sorted(runs)} times, expected the same number for all answers")
    return [Mark(mean(of_runs), raw=of_runs) for of_runs in scores]


def grade_mmvet(example: Example, text: str, options: Namespace) -> dict[str, list]:
    """Up to five tries until the reply is a number in [0, 1], else 0."""
    truth = example.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    line = " | ".join([example.prompt, truth, text, ""]).replace("\n", "<br>")
    prompt, reply, grade = MMVET_INSTRUCTION + line, "", None
    for attempt in range(5):
        reply = ask_judge(options, [{"role": "user", "content": prompt}], 0.5 * attempt, 3).strip()
        if (grade := mmvet_grade(reply)) is not None:
            break
        prompt = MMVET_INSTRUCTION + line + "\nPredict the correctness of the answer (digit): "
    return {"model": [options.judge_model], "content": [reply], "score": [grade or 0.0]}


def judge_llavabench(examples: list[Example], texts: list[str], options: Namespace, out: Path) -> list[Mark]:
    """Reviews in LLaVA's jsonl, one line an answer: question_id, category, content, tuple."""
    keys = [example.question_id for example in examples]
    reviews = judged("llavabench-{}-review.jsonl", keys, review_llavabench, examples, texts, options, out)
    pairs = [llavabench_pair(review["content"]) for review in reviews]
    return [Mark(pair[1] / 10, raw=pair) if pair[0] > 0 else Mark(None, unparsed=True) for pair in pairs]


def review_llavabench(example: Example, text: str, options: Namespace) -> dict:
    parts = [("Context", example.truth["context"]), ("Question", example.prompt),
             ("Assistant 1", example.truth["reference"]), ("Assistant 2", text)]
    prompt = "".join(f"[{name}]\n{value}\n\n" for name, value in parts) + LLAVABENCH_INSTRUCTION
    messages = [{"role": "system", "content": LLAVABENCH_SYSTEM}, {"role": "user", "content": prompt}]
    content = ask_judge(options, messages, 0.2, 1024)
    return {"question_id": example.question_id, "category": f"llava_bench_{example.labels[0]}", "content": content,
            "tuple": llavabench_pair(content), "judge": options.judge_model}

# ----------------------------------------------------------------------------------------------------
# The tasks: everything about one is its row here and the functions named in it

EVAL_ZIP = "question files: LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"
COCO = "http://images.cocodataset.org/zips"
MMBENCH = "https://github.com/open-compass/MMBench (the legacy .tsv files)"
PAPER = ("vqav2", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmvet")
PUBLISHED = ("LLaVA-Phi-3B", "Mipha-3B", "LLaVA-1.5-7B", "TinyLLaVA *")     # *: CLIP-L/336 + Phi-2, base recipe

TASKS = {
    "vqav2": Task(
        "soft accuracy", read_vqav2, grade_vqav2, accuracy, {"test-dev": 107_394, "val": 214_354},
        f"{COCO}/test2015.zip (val: val2014.zip), https://visualqa.org/download.html; {EVAL_ZIP}",
        files={"llava_vqav2_mscoco_test-dev2015.jsonl": "6e6ab639404fa18c"},
        published=(71.4, 81.3, 78.5, 76.8), export=export_vqav2),
    "gqa": Task(
        "accuracy", read_gqa, grade_by(gqa_answer), accuracy, {"testdev": 12_578},
        "https://cs.stanford.edu/people/dorarad/gqa/download.html: images.zip and questions1.2.zip, both into gqa/data",
        files={"data/testdev_balanced_questions.json": "14039069c0b3c797",
               "data/questions1.2/testdev_balanced_questions.json": "14039069c0b3c797"},
        published=(None, 63.9, 62.0, 59.4),
        export=submission("testdev_balanced_predictions.json", lambda example, text: {
            "questionId": example.question_id, "prediction": gqa_answer(text)})),
    "vizwiz": Task(
        "soft accuracy", read_vizwiz, grade_textvqa, summarise_vizwiz, {"test": 8_000, "val": 4_319},
        f"https://vizwiz.org/tasks-and-datasets/vqa: Annotations.zip, test.zip (val.zip); {EVAL_ZIP}",
        files={"llava_test.jsonl": "25b71577dafc1e40", "val.json": ""}, published=(35.9, 45.7, 50.0, None),
        export=submission("vizwiz_test.json", lambda example, text: {
            "image": example.image.name, "answer": normalize_evalai(text)})),
    "scienceqa": Task(
        "accuracy on questions with an image",
        read_scienceqa, grade_by(scienceqa_letter), partial(accuracy, only="IMG"), {"test": 4_241},
        f"https://github.com/lupantech/ScienceQA: problems.json, pid_splits.json, images/test; {EVAL_ZIP}",
        files={"llava_test_CQM-A.json": "a2dc5ea9fba561b0", "pid_splits.json": "85c7820b9f136e57", "problems.json": ""},
        published=(68.4, 70.9, 66.8, 71.2), max_new_tokens=1024, paper_mode="crop"),
    "textvqa": Task(
        "soft accuracy", read_textvqa, grade_textvqa, accuracy, {"val": 5_000},
        f"https://textvqa.org/dataset: TextVQA_0.5.1_val.json, train_val_images.zip; {EVAL_ZIP}",
        files={"llava_textvqa_val_v051_ocr.jsonl": "9f60db6fb89e3692", "TextVQA_0.5.1_val.json": ""},
        published=(48.6, 56.6, 58.2, 53.4), repeated_ids=True),
    "pope": Task(
        "mean F1 of the three kinds", read_pope, grade_pope, summarise_pope, {"all": 8_910},
        f"{COCO}/val2014.zip; coco/ from https://github.com/AoiDragon/POPE/tree/e3e39262/output (HEAD has 3,000 random"
        f" questions, the published scores are on 2,910); {EVAL_ZIP}",
        files={"llava_pope_test.jsonl": "1d3b41f0dced74b4", "coco/coco_pope_adversarial.json": "1d8f0906a9b50c05",
               "coco/coco_pope_popular.json": "5b16653023bf4f64", "coco/coco_pope_random.json": "c16b65d2df6d70bb"},
        published=(85.0, 86.7, 85.9, 86.8)),
    "mme": Task(
        "perception (of 2,000)", read_mme, grade_by(mme_yes_no, nothing="other"), summarise_mme, {"all": 2_374},
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation:"
        f" MME_Benchmark_release_version; {EVAL_ZIP}", folders=("MME", "mme"),
        files={"llava_mme.jsonl": "9f67707cb72d2a71"}, published=(1335.1, 1488.9, 1510.7, 1448.6), repeated_ids=True),
    "mmbench": Task(
        "circular accuracy",
        partial(read_mmbench, "mmbench_{split}_20230712.tsv", "MMBench_{SPLIT}_EN_legacy.tsv", LETTER),
        grade_mmbench, summarise_mmbench, {"dev": 4_377, "test": 0}, MMBENCH, files={"mmbench_dev_20230712.tsv": ""},
        published=(59.8, 69.7, 64.3, None), max_new_tokens=1024, export=export_mmbench),
    "mmbench_cn": Task(
        "circular accuracy",
        partial(read_mmbench, "mmbench_{split}_cn_20231003.tsv", "MMBench_{SPLIT}_CN_legacy.tsv", LETTER_CN),
        grade_mmbench, summarise_mmbench, {"dev": 0, "test": 0}, MMBENCH, folders=("mmbench_cn", "mmbench"),
        files={"mmbench_dev_cn_20231003.tsv": ""},
        published=(None, None, 58.3, None), max_new_tokens=1024, export=export_mmbench),
    "mmvet": Task(
        "judge's score", read_mmvet, None, summarise_mmvet, {"test": 218},
        "https://github.com/yuweihao/MM-Vet/releases: mm-vet.zip", folders=("mm-vet", "mmvet", "mmvet/mm-vet"),
        files={"mm-vet.json": ""}, published=(28.9, 32.1, 31.1, 31.7), max_new_tokens=1024, paper_mode="crop",
        judge=judge_mmvet,
        export=submission("mm-vet.json", lambda example, text: (f"v1_{example.question_id}", text), as_object)),
    "seedbench": Task(
        "accuracy on images", read_seedbench, grade_seedbench, partial(accuracy, only="image"),
        {"image": 14_233, "all": 19_242},
        "https://huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench.json, SEED-Bench-image.zip",
        folders=("seed_bench",), files={"SEED-Bench.json": ""}, published=(None, None, 66.1, None),
        export=submission("seed_bench.jsonl", lambda example, text: {
            "question_id": str(example.question_id), "prediction": text}, to_jsonl)),
    "llavabench": Task(
        "rating relative to GPT-4's answers", read_llavabench, None, summarise_llavabench, {"all": 60},
        "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild", folders=("llava-bench-in-the-wild",),
        files={"questions.jsonl": "", "context.jsonl": "", "answers_gpt4.jsonl": ""},
        published=(None, None, 65.4, None), max_new_tokens=1024, paper_mode="crop", judge=judge_llavabench),
    "mmmu": Task(
        "accuracy", read_mmmu, grade_mmmu, summarise_mmmu, {"val": 900, "test": 10_500},
        "https://huggingface.co/datasets/MMMU/MMMU, rows of the parquet files as val.jsonl, image_1 a file in images/",
        files={"val.jsonl": "", "answer_dict_val.json": ""}, published=(None, 32.5, 35.5, 36.3),
        export=submission("mmmu.json", lambda example, text: (
            example.question_id, mmmu_read(example, text) or ""), as_object)),
    "shapes": Task("accuracy", read_shapes, grade_plain, summarise_shapes, {"all": 0}, "make demo, which draws it",
                   files={"questions.jsonl": ""}),
    "jsonl": Task("accuracy", read_own, grade_plain, accuracy, {"all": 0}, "--questions FILE --images DIR"),
}

# ----------------------------------------------------------------------------------------------------
# Data: loaded and checked before any model


class Data(NamedTuple):
    name: str
    task: Task
    split: str
    folder: Path
    examples: list[Example]

    def first(self, limit: int | None) -> "Data":
        return self._replace(examples=self.examples[:limit])


def load_data(name: str, args: Namespace) -> Data:
    """Raises ValueError or FileNotFoundError: what is missing or wrong, where it is expected, where to get it."""
    task = TASKS[name]
    split = args.split or next(iter(task.splits))
    if split not in task.splits:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(task.splits)}")
    folders = [Path(args.root) / folder for folder in task.folders or (name,)]
    folder = next((f for f in folders if find(f, *task.files)), next((f for f in folders if f.is_dir()), folders[0]))
    try:
        examples = list(task.read(folder, Namespace(**{**vars(args), "split": split})))
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name}: {e}. Get it: {task.get}") from e
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        problem = f"{folder} is not in the official format ({type(e).__name__}: {e})"
        raise ValueError(f"{name}: {problem}. Get it: {task.get}") from e
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e
    if not examples:
        raise ValueError(f"{name}: no questions in {folder}. Get them: {task.get}")
    number, times = Counter(example.question_id for example in examples).most_common(1)[0]
    if times > 1 and not task.repeated_ids:
        raise ValueError(f"{name}: question_id {number!r} occurs {times} times in {folder}, expected once")
    return Data(name, task, split, folder, examples)


def check_images(data: Data) -> None:
    paths = dict.fromkeys(example.image for example in data.examples if isinstance(example.image, Path))
    if missing := [path for path in paths if not path.is_file()]:
        problem = f"{len(missing):,} of {len(paths):,} images are missing, the first is {missing[0]}"
        raise FileNotFoundError(f"{data.name}: {problem}. Get them: {data.task.get}")


def versions_of(data: Data, args: Namespace) -> tuple[dict[str, str], list[str]]:
    """-> checksums of the files, and what is not official about them: another version, another number of questions."""
    files = {name: data.folder / name for name in data.task.files}
    checksums = {name: sha256(path.read_bytes()) for name, path in files.items() if path.is_file()}
    notes = [f"{files[name]} is another version: sha256 {found}, the official file {data.task.files[name]}"
             for name, found in checksums.items() if data.task.files[name] not in ("", found)]
    official = 2_017 if data.name == "scienceqa" and args.img_only else data.task.splits[data.split]
    if official and len(data.examples) != official:
        notes.append(f"{len(data.examples):,} questions, the official {data.split} set has {official:,}")
    return checksums, notes


def check_data(names: list[str], args: Namespace) -> None:
    """Print what is there and what is not. Raises ValueError when something is missing or not official."""
    bad = 0
    for name in names:
        try:
            data = load_data(name, args)
            check_images(data)
            problems = [f"{name}: {note}. Get it: {data.task.get}" for note in versions_of(data, args)[1]]
        except (ValueError, FileNotFoundError) as e:
            problems = [str(e)]
        bad += bool(problems)
        for line in problems or [f"{name}: {len(data.examples):,} questions and all their images are there"]:
            print(visible(line))
    if bad:
        raise ValueError(f"{bad} of {len(names)} tasks do not have the official data")

# ----------------------------------------------------------------------------------------------------
# Generation: answers.jsonl grows by a line per answer, in any order; when all are there it is put in order.
# Process 0 appends to answers.jsonl, process r to answers.r.jsonl, so that any number of them can go on after a kill.


class Brain(NamedTuple):
    """A loaded model and what it takes to ask it."""
    model: object               # model.LLaVAPhi
    tok: object                 # tokenizers.Tokenizer
    eot: int


def model_fingerprint(folder: Path) -> str:
    """Changes with any weight, with the config and with the tokenizer."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt"):
            with open(path, "rb") as f:
                total.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


def asking(data: Data, args: Namespace) -> dict:
    """Which questions, in which words. `score_file` takes these back from the settings beside a file of answers."""
    return {"task": data.name, "split": data.split, "ocr": args.ocr, "img_only": args.img_only}


def generation_settings(data: Data, model: str, model_mode: str, args: Namespace) -> dict:
    """All that an answer depends on. Processes and batch size are not in it: in fp32 they change nothing."""
    picture = lambda image: image.name if isinstance(image, Path) else image is not None
    questions = to_json([[e.question_id, e.prompt, picture(e.image)] for e in data.examples])
    mode = {"model": model_mode, "paper": data.task.paper_mode}.get(args.image_mode, args.image_mode)
    return {**asking(data, args), "model": model, "image_mode": mode, "dtype": args.dtype,
            "max_new_tokens": data.task.max_new_tokens, "questions": sha256(questions.encode())}


def begin(out: Path, settings: dict) -> None:
    """Raises ValueError when the folder holds answers made with other settings, or what is not this program's."""
    if not (out / "settings.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not empty and was not made by eval.py: give another --out")
        write_whole(out / "settings.json", to_json(settings))
    before = read_json(out / "settings.json")
    changed = [f"{key} was {before.get(key)!r}, now {settings.get(key)!r}" for key in {**before, **settings}
               if before.get(key) != settings.get(key)]
    if changed:
        raise ValueError(f"{out} holds results of other settings: {'; '.join(changed)}; give another --out")


def answered(out: Path, examples: list[Example]) -> dict[int, dict]:
    """Row -> answer, of every process of this or of a killed run."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        for line in read_jsonl(path, torn=True):
            row, number = line.get("row"), line.get("question_id")
            if not isinstance(row, int) or row >= len(examples) or examples[row].question_id != number:
                raise ValueError(f"{path} answers question {number!r} in row {row!r}, which is not this task's")
            answers[row] = line
    return answers


def plan(examples: list[Example], lengths: dict[int, int], rank: int, world: int, batch: int) -> list[list[int]]:
    """The rows (keys of lengths) for this process, in batches of like length, those about one picture together.

    Pictures are dealt to the processes in turn, in the order of the task, whatever is answered already.
    """
    pictures: dict[object, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        alone = example.image is None or example.image == BLANK     # these are dealt out too, 64 rows at a time
        pictures[(example.image, row // 64) if alone else example.image].append(row)
    mine = [[row for row in rows if row in lengths] for i, rows in enumerate(pictures.values()) if i % world == rank]
    mine = sorted(filter(None, mine), key=lambda rows: (max(lengths[row] for row in rows), rows[0]))
    flat = [row for rows in mine for row in sorted(rows, key=lengths.get)]
    return [flat[i:i + batch] for i in range(0, len(flat), batch)]


def load_brain(folder: Path, args: Namespace) -> Brain:
    import torch
    from data import eot_id, load_tokenizer
    from load_weights import load_model
    model = load_model(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], args.device)
    tok = load_tokenizer(folder)
    return Brain(model, tok, eot_id(tok))


def open_picture(image: Path | bytes | str | None, size: int, mode: str):
    """uint8 (1, 3, size, size), or (0, 3, size, size) for a question without a picture."""
    import torch
    from data import PAD_COLOR, load_image
    if image is None:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    if image == BLANK:
        return torch.tensor(PAD_COLOR, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, size, size)
    return load_image(io.BytesIO(image) if isinstance(image, bytes) else image, size, mode)[None]


def pictures_ahead(examples: list[Example], batches: list[list[int]], size: int, mode: str) -> Iterator[list]:
    """The pictures of each batch, decoded while the batches before it run.

    One picture is one tensor: by that the model knows which questions can share its work.
    """
    with ThreadPoolExecutor(4) as pool:
        ahead = {}
        for i, batch in enumerate(batches):
            soon = dict.fromkeys(examples[row].image for rows in batches[i:i + 3] for row in rows)
            ahead = {image: ahead.get(image) or pool.submit(open_picture, image, size, mode) for image in soon}
            yield [ahead[examples[row].image].result() for row in batch]


def encode_question(example: Example, brain: Brain) -> list[int]:
    from data import encode_prompt, expand
    config = brain.model.config
    ids = encode_prompt([example.prompt], brain.tok, image=example.image is not None)
    room = config.llm.block_size - config.vision.n_patches * (example.image is not None)
    if len(ids) >= room:
        raise ValueError(f"question {example.question_id!r} has {len(ids):,} tokens, the model room for {room - 1:,}")
    return expand(ids, None, config.vision.n_patches, config.llm.block_size)[0]


def ask(brain: Brain, prompts: list[list[int]], images: list, max_new_tokens: int,
        memory: list | None) -> Iterator[tuple[int, list[int]]]:
    """(place in the batch, tokens of its answer) as each answer ends. Greedy."""
    tokens, open_rows = [[] for _ in prompts], list(range(len(prompts)))
    for column in brain.model.generate(prompts, images, max_new_tokens=max_new_tokens, eos_id=brain.eot, memory=memory):
        for i in open_rows:
            if column[i] is None:
                yield i, tokens[i]
            else:
                tokens[i].append(column[i])
        open_rows = [i for i in open_rows if column[i] is not None]
    yield from ((i, tokens[i]) for i in open_rows)


def generate(data: Data, settings: dict, brain: Brain, todo: set[int], rank: int, world: int, args: Namespace,
             out: Path) -> None:
    """Answer the rows of `todo` that are this process's, appending each answer as it ends."""
    from tqdm import tqdm
    examples, config, most = data.examples, brain.model.config, settings["max_new_tokens"]
    prompts = {row: encode_question(examples[row], brain) for row in todo}
    batches = plan(examples, {row: len(ids) for row, ids in prompts.items()}, rank, world, args.batch)
    pictures = pictures_ahead(examples, batches, config.vision.image_size, settings["image_mode"])
    memory = None if args.exact else []                     # lets a batch go on with the last one's picture
    path = out / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
    written = path.read_bytes() if path.exists() else b""
    progress = tqdm(total=sum(map(len, batches)), desc=data.name, unit="q", disable=rank > 0)
    with open(path, "ab") as f, progress:
        f.truncate(written.rfind(b"\n") + 1)                # a line that a kill left unfinished
        for batch, images in zip(batches, pictures):
            for i, tokens in ask(brain, [prompts[row] for row in batch], images, most, memory):
                row, example = batch[i], examples[batch[i]]
                cut = len(tokens) >= most or len(prompts[row]) + len(tokens) >= config.llm.block_size
                text = brain.tok.decode(tokens, skip_special_tokens=True).strip()
                line = {"row": row, "question_id": example.question_id,
                        "prompt": example.info.get("saved", example.prompt), "text": text, "truncated": cut}
                f.write(json.dumps(line).encode() + b"\n")
                f.flush()
                progress.update()

# ----------------------------------------------------------------------------------------------------
# Scoring


def match_answers(path: Path, data: Data, args: Namespace) -> list[dict | None]:
    """The answer to each question, from our file (by row) or LLaVA's (in file order, else by question_id and prompt).

    Raises ValueError on answers that do not belong, are double or missing; --limit allows more, --allow-missing fewer.
    """
    answers, ids = read_jsonl(path), [str(example.question_id) for example in data.examples]
    for number, line in enumerate(answers, 1):
        if not isinstance(line.get("text"), str) or "question_id" not in line:
            raise ValueError(f"{path}, line {number}: expected question_id, prompt and text, found {', '.join(line)}")
    if all("row" in line for line in answers):
        places = [line["row"] for line in answers]
    elif [str(line["question_id"]) for line in answers][:len(ids) if args.limit else None] == ids:
        places = list(range(len(answers)))
    else:
        first_line = lambda prompt: prompt.removeprefix("<image>\n").split("\n")[0].lower()
        wording = first_line if data.task.repeated_ids else lambda prompt: ""
        rows = {(str(e.question_id), wording(e.prompt)): row for row, e in enumerate(data.examples)}
        places = [rows.get((str(line["question_id"]), wording(line.get("prompt", "")))) for line in answers]
    matched: list[dict | None] = [None] * len(ids)
    for number, (place, line) in enumerate(zip(places, answers), 1):
        known = isinstance(place, int) and 0 <= place < len(ids) and str(line["question_id"]) == ids[place]
        if not known and args.limit:
            continue
        if not known or matched[place]:
            problem = "answered a second time" if known else "not in this task (another split or version?)"
            raise ValueError(f"{path}, line {number}: question {line['question_id']!r} is {problem}")
        matched[place] = line
    if None in matched and not args.allow_missing:
        raise ValueError(f"{path}: {matched.count(None):,} of {len(ids):,} answers are missing, the first to question "
                         f"{ids[matched.index(None)]}; --allow-missing counts them as wrong")
    return matched


def mark_answers(data: Data, answers: list[dict | None], args: Namespace,
                 out: Path) -> tuple[list[Mark], Score | None]:
    """A missing answer counts as wrong, as in the official scorers that do not crash on it."""
    def mark(example: Example, answer: dict | None) -> Mark:
        if example.truth is None:
            return Mark(None)
        return data.task.grade(example, answer["text"]) if answer else Mark(0.0, "", True, (0.0,))

    if data.task.judge:
        marks = [Mark(None)] * len(answers)
        if args.grades or args.judge_url:
            marks = data.task.judge(data.examples, [answer["text"] if answer else "" for answer in answers], args, out)
    else:
        marks = [mark(example, answer) for example, answer in zip(data.examples, answers)]
    scored = [(example, mark) for example, mark in zip(data.examples, marks) if mark.points is not None]
    return marks, data.task.summarise(*zip(*scored)) if scored else None


def score(data: Data, answers: list[dict | None], args: Namespace, out: Path, settings: dict,
          run: dict | None = None) -> dict:
    """Mark, summarise, write result.json, report.html and the submission; nothing is written before all is known."""
    task, (marks, total) = data.task, mark_answers(data, answers, args, out)
    given, (checksums, notes) = [answer for answer in answers if answer], versions_of(data, args)
    texts = [answer["text"] for answer in given]
    # the words of the question; the last line may differ, LLaVA saves some prompts without it
    words = lambda prompt: prompt.removeprefix("<image>\n").split("\n")[:2]
    asked = [(answer.get("prompt", e.prompt), e.prompt) for e, answer in zip(data.examples, answers) if answer]
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:              # scoring alone does not load it
        versions["torch"] = sys.modules["torch"].__version__
    by_url = f"{args.judge_model}, asked in this project's words"
    judge = f"the grades in {Path(args.grades).name}" if args.grades else by_url
    result = {
        "task": data.name, "split": data.split, "metric": task.metric, "n": len(data.examples),
        "value": total.value if total else None, "interval": [total.low, total.high] if total else None,
        "interval_method": f"95 %, {total.interval}" if total else None, "numbers": total.others if total else {},
        "published": {name: value for name, value in zip(PUBLISHED, task.published) if value is not None},
        "unparsed": sum(mark.unparsed for mark in marks), "empty": texts.count(""),
        "truncated": sum(bool(answer.get("truncated")) for answer in given), "missing": answers.count(None),
        "other_prompts": sum(words(theirs) != words(ours) for theirs, ours in asked), "limit": args.limit,
        "judge": judge if task.judge and total else None, "submission": None, "settings": settings,
        "first_prompt": data.examples[0].prompt, "checksums": checksums, "notes": notes, "versions": versions,
        "run": run}
    published_split = data.split == next(iter(task.splits))
    if task.export and (total is None or published_split) and None not in answers and not args.limit:
        try:
            result["submission"] = task.export(data.examples, texts, data.folder, out).name
        except (ValueError, OSError) as e:
            notes.append(f"submission file not written: {e}")
    write_whole(out / "report.html", report(data, answers, marks, result))
    write_whole(out / "result.json", to_json(result))
    return result

# ----------------------------------------------------------------------------------------------------
# Report: a table on the screen, a page without scripts


def headline(result: dict) -> list[str]:
    """Score and interval."""
    if result["value"] is None:
        return ["not scored here", ""]
    low, high = result["interval"]
    return [f"{result['value']:.2f}", f"{low:.2f} to {high:.2f}"]


def result_table(result: dict) -> list[list[str]]:
    published = result["published"]
    table = [["", "here", "95 % interval", *published],
             [result["metric"], *headline(result), *map(str, published.values())]]
    return table + [[name, f"{value:.2f}"] + [""] * (len(table[0]) - 2) for name, value in result["numbers"].items()]


def remarks(result: dict) -> list[str]:
    lines = [f"{result['n']:,} questions: {result['unparsed']:,} without a readable answer, {result['empty']:,} empty, "
             f"{result['truncated']:,} cut at the token limit, {result['missing']:,} missing."]
    if "model" in (settings := result["settings"]):
        lines.append(f"Image mode {settings['image_mode']}, {settings['dtype']}, greedy, at most "
                     f"{settings['max_new_tokens']} new tokens.")
    if result["task"] == "textvqa":
        lines.append("OCR tokens were in the prompt." if settings["ocr"] else "No OCR tokens were in the prompt.")
    if result["value"] is None:
        lines.append("Not scored here: the truth is on a server, a judge is needed (--grades, --judge-url), or --limit "
                     "left none of the questions that count.")
    if result["judge"]:
        lines.append(f"Judged by {result['judge']}; another judge shifts this score by several points.")
    if result["other_prompts"]:
        lines.append(f"{result['other_prompts']:,} answers were made with another prompt than this task's.")
    if result["split"] == "val" and result["task"] in ("vqav2", "vizwiz"):
        lines.append("The published scores are on the test split; these images"
                     + (" (COCO) overlap LLaVA's training data." if result["task"] == "vqav2" else " are others."))
    if PUBLISHED[-1] in result["published"]:
        lines.append("* CLIP-L/336 and Phi-2 with TinyLLaVA-Factory's base recipe: this architecture, well trained.")
    if result["submission"]:
        lines.append(f"Submission file: {result['submission']}")
    return lines + [note[0].upper() + note[1:] for note in result["notes"]]


def print_table(table: list[list[str]]) -> None:
    table = [[visible(cell) for cell in row] for row in table]
    first, *others = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        print("  ".join(["", name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others))]).rstrip())


def print_result(result: dict, out: Path) -> None:
    print(f"\n{result['task']} ({result['split']})")
    print_table(result_table(result))
    for line in [*remarks(result), f"{out / 'result.json'}, {out / 'report.html'}"]:
        print(f"  {visible(line)}")


def thumbnail(image: Path | bytes | str | None) -> str:
    """A data URI of a small JPEG, decoded and encoded anew; "" where there is no picture to show."""
    from PIL import Image
    if image is None or image == BLANK:
        return ""
    source, small = io.BytesIO(image) if isinstance(image, bytes) else image, io.BytesIO()
    try:
        with Image.open(source, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as picture:
            if picture.width * picture.height > 89_000_000:
                return ""
            picture = picture.convert("RGB")
            picture.thumbnail((160, 160))
            picture.save(small, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}
td {{ white-space: pre-wrap }}
.scores td:not(:first-child), .scores th {{ text-align: right }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def html_table(rows: list[list[str]], style: str, pictures: list[str] | None = None) -> str:
    """A heading and rows of text, all of it escaped; pictures: data URIs that go in front of the rows."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = [html.escape(visible(text)) for text in row]
        if pictures is not None:
            cells.insert(0, f'<img src="{pictures[i - 1]}" alt="">' if i and pictures[i - 1] else "")
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n")
    return f'<table class="{style}">\n{"".join(lines)}</table>\n'


def report(data: Data, answers: list[dict | None], marks: list[Mark], result: dict, most: int = 60) -> str:
    """Score table, and up to `most` wrong answers spread evenly over the task."""
    wrong = [(example, answer["text"] if answer else "(missing)", mark)
             for example, answer, mark in zip(data.examples, answers, marks)
             if mark.points is not None and mark.points < 0.5 and example.image != BLANK]
    shown = wrong[::max(1, -(-len(wrong) // most))]
    rows = [["question_id", "question", "answer", "read as", "truth"]]
    for example, text, mark in shown:
        truth = example.truth if isinstance(example.truth, str) else json.dumps(example.truth, ensure_ascii=False)
        rows.append([str(example.question_id), example.prompt, text, mark.parsed, truth])
    body = html_table(result_table(result), "scores")
    body += "".join(f"<p>{html.escape(visible(line))}</p>\n" for line in remarks(result))
    body += f"<h2>Wrong answers: {len(wrong):,}, of which {len(shown):,} are shown</h2>\n"
    body += html_table(rows, "answers", [thumbnail(example.image) for example, _, _ in shown])
    return PAGE.format(title=html.escape(f"{data.name} ({data.split})"), body=body)

# ----------------------------------------------------------------------------------------------------
# Comparing two answers files


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of this many flips each way, if both ways were equally likely."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2 ** n)


def compare(data: Data, args: Namespace) -> None:
    """Print both scores, a paired test, and every question whose points differ."""
    if data.task.judge:
        raise ValueError(f"{data.name}: judged answers cannot be compared, grades belong to one answers file")
    sides = []
    for path in map(Path, args.compare):
        answers = match_answers(path, data, args)
        marks, total = mark_answers(data, answers, args, path.parent)
        if total is None:
            raise ValueError(f"{data.name}: answers cannot be compared without the truth, which is on a server")
        print(f"{path}: {data.task.metric} {total.value:.2f} ({total.low:.2f} to {total.high:.2f})")
        sides.append([(answer["text"] if answer else "", mark.points) for answer, mark in zip(answers, marks)])
    rows = [row for row in zip(data.examples, *sides) if row[1][1] is not None and row[0].image != BLANK]
    differences = [after - before for _, (_, before), (_, after) in rows]
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    values, rng = np.array(differences), np.random.default_rng(0)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(1000)])
    low, high = np.percentile(means, [2.5, 97.5])
    test, p = "paired bootstrap", min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    if {points for side in sides for _, points in side} <= {0.0, 1.0, None}:
        test, p = "McNemar's exact test", mcnemar(gained, lost)
    print(f"the second is better on {gained:,} of {len(rows):,} questions and worse on {lost:,}: "
          f"{100 * mean(differences):+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}), p = {p:.3g} ({test})")
    for (example, (before, _), (after, _)), difference in zip(rows, differences):
        if difference:
            word = "better" if difference > 0 else "worse "
            print(visible(f"{word}  question {example.question_id}  {before!r} -> {after!r}  truth {example.truth!r}"))

# ----------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = {"action": argparse.BooleanOptionalAction, "default": False}

    def add(name: str, text: str, **kind) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **kind)

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see python eval.py --help")

    parser.error = fail
    add("--task", f"one or several with commas: {', '.join(TASKS)}; paper: {', '.join(PAPER)}")
    add("--root", "folder of the benchmarks, in the layout of LLaVA's playground/data/eval", default="data/eval")
    add("--split", "another split than the one that the published score is on")
    add("--model", "model folder; None: out/finetune if it is there, else checkpoints/llava-phi")
    add("--out", "folder of answers and results, of several tasks a folder each; None: out/eval/TASK")
    add("--image-mode", "model: as it was trained; paper: as the published scores were made, which is crop for "
        "scienceqa, mmvet and llavabench, else pad", default="model", choices=("model", "paper", "pad", "crop"))
    add("--dtype", "fp32 or bf16; None: bf16 on a GPU, fp32 on a CPU")
    add("--device", "cpu or cuda; None: cuda where there is one")
    add("--batch", "questions answered at a time", type=int, default=16)
    add("--exact", "one question at a time and nothing shared between them, as official runs; changes nothing in fp32",
        **flag)
    add("--limit", "only the first N questions", type=int)
    add("--ocr", "textvqa: OCR tokens in the prompt, worth about 10 points", **flag | {"default": True})
    add("--img-only", "scienceqa: leave out the questions without an image", **flag)
    add("--questions", "jsonl: file of your own questions")
    add("--images", "jsonl: folder of their images")
    add("--check-data", "only look whether the data is there and official", **flag)
    add("--score", "only score this answers file, ours or LLaVA's; needs no model")
    add("--compare", "only compare two answers files", nargs=2, metavar=("A", "B"))
    add("--allow-missing", "count missing answers as wrong instead of stopping", **flag)
    add("--grades", "mmvet, llavabench: an existing grade or review file")
    add("--judge-url", "mmvet, llavabench: an OpenAI-compatible service; its key is read from JUDGE_API_KEY")
    add("--judge-model", "the judge's name")
    add("--judge-timeout", "seconds to wait for one reply of the judge", type=float, default=60.0)
    args = parser.parse_args(argv)
    args.batch = 1 if args.exact else args.batch
    if args.batch < 1 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--batch {args.batch} --limit {args.limit}: expected positive numbers")
    if args.dtype == "fp16":
        raise ValueError("--dtype fp16: Phi-2's attention overflows in fp16; use bf16 or fp32")
    args.dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, args.dtype)
    if args.dtype not in (None, "fp32", "bf16"):
        raise ValueError(f"--dtype {args.dtype}: expected fp32 or bf16")
    return args


def chosen_tasks(args: Namespace) -> list[str]:
    words = [word.strip() for word in (args.task or "").split(",")]
    names = [name for word in words for name in (PAPER if word == "paper" else [word])]
    if unknown := [name for name in names if name not in TASKS]:
        found = f"{unknown[0]} is unknown" if unknown[0] else "is missing"
        raise ValueError(f"--task {found}: expected one or several of {', '.join(TASKS)}, or paper")
    return list(dict.fromkeys(names))


def score_file(args: Namespace) -> None:
    """--score FILE: where settings lie beside the file they say which task it is and how it was asked."""
    path = Path(args.score)
    sidecar = path.parent / "settings.json"
    settings = read_json(sidecar) if sidecar.exists() else {}
    if settings and args.task in (None, settings.get("task")):
        args.task, args.split, args.ocr, args.img_only = map(settings.get, ("task", "split", "ocr", "img_only"))
    names = chosen_tasks(args)
    if len(names) > 1:
        raise ValueError(f"--score takes one task, these are {len(names)}")
    data = load_data(names[0], args).first(args.limit)
    out = Path(args.out) if args.out else path.parent if settings else Path("out/eval") / f"{data.name}-{path.stem}"
    answers = match_answers(path, data, args)
    settings = settings or {**asking(data, args), "scored": path.name}
    if out != path.parent:
        begin(out, settings)
    print_result(score(data, answers, args, out, settings), out)


def generate_and_score(args: Namespace) -> None:
    """Check all the data, then the model; answer what is not answered yet; score task by task."""
    tasks = [load_data(name, args) for name in chosen_tasks(args)]
    for data in tasks:
        check_images(data.first(args.limit))
    usual = [folder for folder in (Path("out/finetune"), Path("checkpoints/llava-phi")) if any(folder.glob("*model*"))]
    if not args.model and not usual:
        raise FileNotFoundError("no model: neither out/finetune nor checkpoints/llava-phi is there; train one, "
                                "give --model DIR, or run `hf download zxmonent/llava-phi --local-dir "
                                "checkpoints/llava-phi`")
    folder = Path(args.model) if args.model else usual[0]

    import torch
    import torch.distributed as dist
    from load_weights import load_config
    here = ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]
    args.device = args.device or ("cuda" if "cuda" in here else "cpu")
    if args.device.split(":")[0] not in here:
        raise ValueError(f"--device {args.device}: expected one of {', '.join(here)}")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    model, model_mode, brain, results = model_fingerprint(folder), load_config(folder).image_mode, None, []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets both
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))          # only barriers, perhaps for hours
    barrier = dist.barrier if world > 1 else lambda: None

    for data in tasks:
        out = Path(args.out or "out/eval") / (data.name if len(tasks) > 1 or not args.out else "")
        settings = generation_settings(data, model, model_mode, args)
        if rank == 0:
            begin(out, settings)
        barrier()
        started, todo = time.time(), set(range(len(data.examples[:args.limit]))) - answered(out, data.examples).keys()
        if todo:
            brain = brain or load_brain(folder, args)
            generate(data, settings, brain, todo, rank, world, args, out)
        barrier()
        if rank == 0:
            answers = answered(out, data.examples)
            write_whole(out / "answers.jsonl", to_jsonl(answers[row] for row in sorted(answers)))
            for path in out.glob("answers.*.jsonl"):
                path.unlink()
            run = {"device": args.device, "processes": world, "batch": args.batch, "exact": args.exact,
                   "questions": len(todo), "seconds": round(time.time() - started, 1)}
            data = data.first(args.limit)
            results.append(score(data, match_answers(out / "answers.jsonl", data, args), args, out, settings, run))
            print_result(results[-1], out)
    if len(results) > 1:        # a line for each task
        table = [["all tasks", "here", "95 % interval", *PUBLISHED]]
        for result in results:
            published = [str(result["published"].get(name, "")) for name in PUBLISHED]
            table.append([f"{result['task']} ({result['split']})", *headline(result), *published])
        print()
        print_table(table)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.check_data:
        check_data(chosen_tasks(args), args)
    elif args.compare:
        compare(load_data(chosen_tasks(args)[0], args).first(args.limit), args)
    elif args.score:
        score_file(args)
    else:
        generate_and_score(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
