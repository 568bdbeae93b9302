"""Shared by all benchmarks: their types, the two VQA normalizers, and the statistics of a score.

Everything is plain Python and numpy and works on text, so that answers can be scored without torch or a model.
"""
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.archives import Member

# The instructions that LLaVA appends to a question, word for word: models were trained on exactly these strings.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = "blank"                     # stands for an image filled with the padding color

# Models whose published scores are shown next to our own: the key in `Task.published` and the heading of the column.
PUBLISHED_MODELS = {
    "llava_phi": "LLaVA-Phi-3B",
    "mipha": "Mipha-3B",
    "llava": "LLaVA-1.5-7B",
    "tinyllava": "TinyLLaVA *",     # *: CLIP-L/336 + Phi-2 with TinyLLaVA-Factory's base recipe
}


def published_columns(reference: str | None) -> dict[str, str]:
    """PUBLISHED_MODELS, with the model to compare with (`reference`, if known) first."""
    first = {reference: PUBLISHED_MODELS[reference]} if reference else {}
    return first | PUBLISHED_MODELS

# ---------------------------------------------------------------------------------------------------
# Types


class Example(NamedTuple):
    """One question. It is identified by its row in the benchmark: question_id repeats in some of them."""
    question_id: int | str
    # A file, one in an archive, an encoded picture, BLANK, a tuple of several, or None for text only.
    image: Path | Member | bytes | str | tuple | None
    prompt: str                         # final wording, instruction included
    truth: object = None                # what the grader compares with; None: the truth is on a server
    categories: tuple[str, ...] = ()    # the sub-scores that this question counts in
    info: dict = {}                     # whatever else the benchmark's summary or submission needs

    @property
    def pictures(self) -> tuple:
        """Its pictures one by one."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)


class Grade(NamedTuple):
    """The grade of one answer."""
    score: float | None                 # 0 to 1; None: not scored
    parsed: str = ""                    # how the grader read the answer
    unparsed: bool = False              # the official rule found no answer in the text, or had to fall back
    raw: tuple[float, ...] = ()         # further numbers for the benchmark's summary


class Score(NamedTuple):
    """A headline number with its 95 % interval, and the sub-scores; without a value where nothing is scored. The names
    are those in result.json."""
    value: float | None = None
    interval: tuple[float, float] | None = None
    interval_method: str | None = None
    numbers: dict[str, float] = {}                      # the sub-scores
    intervals: dict[str, tuple[float, float]] = {}      # those of some of them


Answered = list[tuple[Example, str]]            # questions with the text of their answers
Graded = list[tuple[Example, Grade]]            # and with their grades

# ---------------------------------------------------------------------------------------------------
# The two VQA normalizers
#
# TextVQA, VizWiz and every VQA submission use the EvalAI processor of the M4C code; the VQA server scores with its own.
# They differ in small ways that decide whole points, so both follow the official code to the letter, slips included.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
                "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}

# The misspellings that the VQA scorers repair: each of these forms with one apostrophe left out. Those with a capital
# I never apply, because texts are lower-cased first, and "somebody'd" loses its apostrophe, both as in the official
# table. A test checks its checksum.
CONTRACTED = """
    'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
CONTRACTIONS = {form[:i] + form[i + 1:]: form for form in CONTRACTED for i in range(len(form)) if form[i] == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize(text: str, digit_comma: str) -> str:
    """The steps of both normalizers: punctuation, periods, number words, articles, contractions.

    A punctuation mark becomes a space, but disappears next to a space. A comma between digits
    (the pattern `digit_comma`) makes *every* mark of the text disappear, not only the comma: "1,000 a-b" -> "1000 ab".
    """
    has_digit_comma = re.search(digit_comma, text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark not in text:
            continue
        next_to_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if next_to_space or has_digit_comma else " ")
    # Only the first 32 periods go: the official code passes a regex flag where the count belongs, and the flag is 32.
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    words = []
    for word in result.lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


# The ten people who answer a question mostly agree, so the same strings are normalized repeatedly.
@lru_cache(maxsize=1 << 20)
def normalize_evalai(text: str) -> str:
    """The EvalAI processor (m4c): TextVQA, VizWiz, and every VQA submission."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalize(one_line(text), r"\d,+\d")


@lru_cache(maxsize=1 << 20)
def normalize_vqa(text: str) -> str:
    """The official VQA scorer's own normalizer (2021 version)."""
    return _normalize(one_line(text), r"\d,\d")


def soft_accuracy(answer: str, humans: list[str]) -> float:
    """Mean over the humans, each left out in turn, of min(1, matches among the others / 3)."""
    same = humans.count(answer)
    different = len(humans) - same
    # Leaving out somebody who agrees lowers the count of matches by one; leaving out anybody else does not.
    total = same * min(1, (same - 1) / 3) + different * min(1, same / 3)
    return total / len(humans)


def evalai_accuracy(text: str, humans: list[str]) -> float:
    """Soft accuracy as TextVQA's scorer computes it: both sides go through the EvalAI processor."""
    return soft_accuracy(normalize_evalai(text), [normalize_evalai(human) for human in humans])


def vqa_accuracy(text: str, humans: list[str]) -> float:
    """The official VQA scorer on a submitted answer: with unanimous humans it compares raw strings."""
    text = one_line(text)
    humans = [one_line(human) for human in humans]
    if len(set(humans)) > 1:
        text = normalize_vqa(text)
        humans = [normalize_vqa(human) for human in humans]
    return soft_accuracy(text, humans)


def plain_answer(text: str) -> str:
    """Ignores case, surrounding spaces and a final period. For the shapes and for your own questions."""
    return text.strip().rstrip(".").strip().lower()


def grade_plain(example: Example, text: str) -> Grade:
    """Right if the answer is the truth, or one of several truths."""
    answer = plain_answer(text)
    truths = example.truth if isinstance(example.truth, list) else [example.truth]
    right = answer in [plain_answer(str(truth)) for truth in truths]
    return Grade(float(right), answer)

# ---------------------------------------------------------------------------------------------------
# Statistics: grades -> the number that papers report, its 95 % interval, and the sub-scores


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def interval_of_mean(scores: list[float]) -> tuple[tuple[float, float], str]:
    """-> low and high in per cent, and the method.

    Wilson's interval where every answer is right or wrong (it stays inside 0 to 100 and is not empty when all are
    right); the normal one where answers earn parts of a point.
    """
    n = len(scores)
    p = mean(scores)
    z = 1.96
    if set(scores) <= {0.0, 1.0}:
        scale = 1 + z * z / n
        middle = (p + z * z / (2 * n)) / scale
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
        method = "95 %, Wilson"
    else:
        variance = mean([(x - p) ** 2 for x in scores])
        middle = p
        half = z * math.sqrt(variance / n)
        method = "95 %, normal"
    return (100 * max(0.0, middle - half), 100 * min(1.0, middle + half)), method


def accuracy(graded: Graded, numbers: dict[str, float] = {}, only: str = "") -> Score:
    """Mean score in per cent, with the mean of each category as sub-scores.

    numbers: further ones, shown before those of the categories. only: the headline is on the questions of this
    category, of which --limit may leave none, and the mean over all of them becomes a sub-score.
    """
    scores = [grade.score for _, grade in graded]
    by_category = defaultdict(list)
    for example, grade in graded:
        for category in example.categories:
            by_category[category].append(grade.score)
    if only:
        numbers = numbers | {"all": 100 * mean(scores)}
        scores = by_category[only]
    if not scores:
        return Score()
    of_categories = {category: 100 * mean(by_category[category]) for category in sorted(by_category)}
    return Score(100 * mean(scores), *interval_of_mean(scores), numbers | of_categories)


def calibration(answers: list[dict], graded: Graded) -> dict | None:
    """Are confident answers right? None if no scored answer has "logprob", the mean over its "tokens".

    An answer's confidence is its probability as a whole. -> the expected calibration error over tenths of confidence,
    and a row for each tenth; one more for questions that are unanswerable (VizWiz has them).
    """
    rows = defaultdict(list)
    for answer, (example, grade) in zip(answers, graded):
        logprob, n = answer.get("logprob"), answer.get("tokens")
        is_known = type(logprob) is float and -1e9 < logprob <= 0 and type(n) is int and 0 < n < 1e6
        if grade.score is None or example.image == BLANK or not is_known:
            continue
        confidence = math.exp(logprob * n)
        tenth = min(int(10 * confidence), 9)
        rows[f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"].append((confidence, grade.score))
        if "unanswerable" in example.categories:
            rows["unanswerable"].append((confidence, grade.score))
    table = []
    for name, pairs in sorted(rows.items()):
        confidences, scores = zip(*pairs)
        table.append({"confidence": name, "n": len(pairs), "mean": mean(confidences), "accuracy": mean(scores)})
    tenths = [row for row in table if row["confidence"] != "unanswerable"]
    errors = [row["n"] * abs(row["mean"] - row["accuracy"]) for row in tenths]
    return {"error": sum(errors) / sum(row["n"] for row in tenths), "table": table} if table else None


def bootstrapped(counts: list | np.ndarray, metric: Callable[[np.ndarray], np.ndarray], unit: str,
                 numbers: dict[str, float]) -> Score:
    """Score of a metric that is computed from summed counts, such as F1, with a bootstrap interval.

    counts: (units, ...), what each unit adds to the sums. The units are resampled, so they must be independent: images,
    where several questions are about one image.
    metric: (..., counts of all units summed) -> (...); it is called with the sums of all 1000 draws at once.
    """
    counts = np.array(counts, dtype=float)
    rng = np.random.default_rng(0)
    n = len(counts)
    # How often each unit occurs in n draws with replacement is a multinomial sample.
    times_drawn = rng.multinomial(n, np.full(n, 1 / n), size=1000)                  # (draws, units)
    of_draws = metric(np.tensordot(times_drawn, counts, 1))                         # (draws,)
    interval = tuple(np.percentile(of_draws, [2.5, 97.5]).tolist())
    method = f"95 %, bootstrap over {unit}, 1000 draws, seed 0"
    return Score(float(metric(counts.sum(0))), interval, method, numbers)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of these flips, under the hypothesis that both directions are equally likely."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def paired_test(before: list[float], after: list[float]) -> tuple[float, float, float, str]:
    """Do two sets of answers differ? Returns the 95 % interval of the mean difference, p and the name of the test.

    McNemar's test where answers are right or wrong; where they earn parts of a point, a bootstrap over the questions,
    each drawn with both answers.
    """
    differences = np.array(after) - np.array(before)                            # (questions,)
    n = len(differences)
    rng = np.random.default_rng(0)
    means = np.array([differences[rng.integers(n, size=n)].mean() for _ in range(1000)])
    low, high = np.percentile(means, [2.5, 97.5])
    if set(before + after) <= {0.0, 1.0}:
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
        return low, high, p, "McNemar's exact test"
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return low, high, min(1.0, p), "paired bootstrap"

# ---------------------------------------------------------------------------------------------------
# A benchmark


class Task(NamedTuple):
    """A benchmark as eval.py sees it. Each benchmark's file ends with its own."""
    read: Callable                      # (folder, options) -> iterable of Example, in the official order
    splits: dict[str, int]              # name -> official number of questions (0: any); the default is the first
    source: str                         # where the data comes from
    metric: str = "accuracy"            # name of the headline number
    summarize: Callable = accuracy      # (Graded) -> Score
    grade: Callable | None = None       # (Example, text of the answer) -> Grade; None: a judge grades
    judge: Callable | None = None       # (Answered, options, folder of the results) -> Graded
    submission: Callable | None = None  # (Answered, data folder) -> content of the file for the benchmark's server
    submission_name: str = ""
    folders: tuple[str, ...] = ()       # names of its folder under --root; none: the task's name
    files: dict[str, str] = {}          # file -> start of the official sha256 ("": not known)
    published: dict[str, float] = {}    # key of PUBLISHED_MODELS -> score
    max_new_tokens: int = 128
    paper_mode: str = "pad"             # image mode behind LLaVA-Phi's and LLaVA-1.5's scores
    mipha_mode: str = "pad"             # and behind Mipha's
    repeated_ids: bool = False          # question_id names the image, not the question
    images_only: int = 0                # official number of questions with --img-only
    blank: bool = False                 # asked again about a blank picture, also without --blank
    ocr_notes: dict[bool, str] = {}     # --ocr or --no-ocr -> a remark on it, for the report
    split_notes: dict[str, str] = {}    # split -> a remark on its score, for the report

# ---------------------------------------------------------------------------------------------------
# Questions that are asked again about a blank picture


def asked_again(examples: list[Example]) -> Iterator[Example]:
    """Each question, and after one about a picture the same about a blank one."""
    for example in examples:
        yield example
        if example.image is not None:
            yield example._replace(question_id=f"{example.question_id}/blank", image=BLANK)


def summarize_twice(task: Task, graded: Graded) -> Score:
    """The benchmark's score over all answers that are graded.

    Where questions are asked again about a blank picture, that score is one of the sub-scores. It takes the answers to
    questions without a picture as they are.
    """
    seen = []
    unseen = []
    for example, grade in graded:
        if example.image == BLANK:
            unseen[-1] = unseen[-1][0], grade
        else:
            seen.append((example, grade))
            unseen.append((example, grade))
    score = summarize_scored(task, seen)
    blank = summarize_scored(task, unseen if len(graded) > len(seen) else [])
    if score.value is None or blank.value is None:
        return score
    return score._replace(numbers={"blank image": blank.value} | score.numbers,
                          intervals={"blank image": blank.interval})


def summarize_scored(task: Task, graded: Graded) -> Score:
    scored = [(example, grade) for example, grade in graded if grade.score is not None]
    return task.summarize(scored) if scored else Score()
