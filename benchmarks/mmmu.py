"""MMMU: college questions in 30 subjects, most of them multiple choice; val has 900.

Only the first image of a question is shown, as LLaVA does; a literal <image 1> stays in the text.
The optional answer_dict_val.json of the MMMU repository gives some answers in several spellings. test is for the EvalAI
server (2179).
"""
import ast
import random
import re
from argparse import Namespace
from pathlib import Path

from benchmarks.files import (each, field, first_existing, image_file, parsed, read_official_json, required_files,
                              to_json)
from benchmarks.scoring import LETTER, LETTERS, SHORT, Answered, Example, Grade, Graded, Score, Task, accuracy, mean

DOMAINS = {
    "Art & Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health & Medicine": """Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy
                            Public_Health""",
    "Humanities & Social Science": "History Literature Sociology Psychology",
    "Tech & Engineering": """Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power
                             Materials Mechanical_Engineering""",
}
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}


def read(folder: Path, options: Namespace) -> list[Example]:
    answer_file = first_existing(folder, f"answer_dict_{options.split}.json")
    answers = read_official_json(answer_file, dict) if answer_file else {}
    path, images = required_files(folder, f"{options.split}.jsonl", "images/")
    return parsed(path, lambda row: mmmu_question(row, images, answers))


def mmmu_question(row: dict, images: Path, answers: dict) -> Example:
    """answers: those that have several spellings, by id."""
    number = field(row, "id")
    choices = {}
    prompt = f"{field(row, 'question')}\n{SHORT}"
    if row["question_type"] == "multiple-choice":
        choices = dict(zip(LETTERS, listed("options", row["options"])))
        lines = "".join(f"({letter}) {choice}\n" for letter, choice in choices.items())
        prompt = f"{row['question']}\n{lines}\n{LETTER}"
    truth = answers[number]["ground_truth"] if number in answers else row["answer"]
    if not isinstance(truth, str) or re.fullmatch(r"\[['\"].*['\"]\]", truth):
        truth = listed("answer", truth)                         # but "[1, 2]" is an interval
    if truth in ("", "?"):                                      # test has no answers
        truth = None
    elif choices:
        truth = each("answer", truth if isinstance(truth, list) else [truth], among=list(choices))
    subject = number.split("_", 1)[1].rsplit("_", 1)[0]         # "validation_Art_Theory_2" -> "Art_Theory"
    return Example(number, image_file(images, field(row, "image_1")), prompt, truth, (DOMAIN_OF[subject], subject),
                   {"options": choices})


def listed(name: str, value: object) -> list[str]:
    """A list of texts. The parquet files store it as its Python source, such as "['24/7', '3.429']"."""
    if isinstance(value, str):
        value = ast.literal_eval(value)
    return list(map(str, each(name, value, str, int, float, blank=True)))

# ---------------------------------------------------------------------------------------------------
# Reading an answer, by the rules of MMMU's own eval_utils.py


def mmmu_choice(text: str, options: dict[str, str]) -> str | None:
    """The letter mentioned last; None where the official code draws one at random.

    It looks for "(B)", then for a separate "B", then, in longer answers, for the text of an option.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    searches = [(text, {letter: f"({letter})" for letter in options}),
                (text, {letter: f" {letter} " for letter in options})]
    if len(text.split()) > 5:
        searches.append((text.lower(), {letter: option.lower() for letter, option in options.items()}))
    for searched, forms in searches:
        position = {letter: searched.rfind(form) for letter, form in forms.items()}
        if max(position.values(), default=-1) >= 0:
            return max(position, key=position.get)
    return None


def mmmu_value(text: str) -> list[float | str]:
    """A number, rounded to two decimals; else the lower-cased text, a single letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # A lone letter would be found in almost any text.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


NUMBER_PATTERNS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",                                # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                             # 1.5e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",     # 12, 1.5, .5
)
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def key_phrases(text: str) -> list[str]:
    """The shortest text after a cue in each line; the whole text if no line has a cue."""
    lines = text.split("\n")
    phrases = []
    for i, line in enumerate(lines):
        cues = CUES + ("=",) if i == len(lines) - 1 else CUES       # "=" is a cue in the last line only
        shortest = ""
        for cue in cues:
            tail = line.split(cue)[-1].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in [*":,.!?;'"]:
            phrases.append(shortest)
    return phrases or [text]


def mmmu_open(text: str) -> set[float | str]:
    """Every value an open answer may be read as: its key phrases, and all numbers in them."""
    phrases = key_phrases(text.strip().strip(".").lower())
    numbers = []
    for phrase in phrases:
        for pattern in NUMBER_PATTERNS:
            numbers += re.findall(pattern, phrase)
    values = set()
    for part in phrases + numbers:
        values.update(mmmu_value(part))
    return values


def mmmu_open_correct(text: str, truth: str | list[str]) -> bool:
    """Right if a number in the answer equals a truth, or a phrase of the answer contains one."""
    for spelling in [truth] if isinstance(truth, str) else truth:
        for right in mmmu_value(spelling):
            for value in mmmu_open(text):
                contains = isinstance(right, str) and isinstance(value, str) and right in value
                if contains or right == value:
                    return True
    return False


def grade_answer(example: Example, text: str) -> Grade:
    options = example.info.get("options")
    if not options:
        return Grade(float(mmmu_open_correct(text, example.truth)), text)
    letter = mmmu_choice(text, options)
    right = letter is not None and letter in example.truth
    return Grade(float(right), letter or "", unparsed=letter is None)


def summarize(graded: Graded) -> Score:
    """Where no choice can be read the official code draws one at random (seed 42, in file order)."""
    rng = random.Random(42)
    drawn = []
    for example, grade in graded:
        options = example.info.get("options")
        if options and grade.unparsed:
            grade = Grade(float(rng.choice(list(options)) in example.truth))
        drawn.append((example, grade))
    as_wrong = 100 * mean([grade.score for _, grade in graded])
    return accuracy(drawn, {"unparsed = wrong": as_wrong})


def submission(answered: Answered, folder: Path) -> str:
    """The chosen letter, or the whole open answer."""
    answers = {}
    for example, text in answered:
        options = example.info.get("options")
        answers[example.question_id] = (mmmu_choice(text, options) or "") if options else text
    return to_json(answers)


TASK = Task(
    read=read,
    grade=grade_answer,
    summarize=summarize,
    submission=submission,
    submission_name="mmmu.json",
    splits={"val": 900, "test": 10_500},
    source="https://huggingface.co/datasets/MMMU/MMMU, rows of the parquet files as val.jsonl, image_1 a file in "
           "images/",
    files={"val.jsonl": "", "answer_dict_val.json": ""},
    published={"mipha": 32.5, "llava": 35.5, "tinyllava": 36.3},
)
