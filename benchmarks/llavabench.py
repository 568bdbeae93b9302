"""LLaVA-Bench (in the wild): 60 questions about 24 pictures; a judge rates our answer and GPT-4's side by side.

The score is the mean of our ratings over the mean of GPT-4's. --grades reads a review file of LLaVA's; --judge-url asks
a judge with this project's prompt.
"""
from argparse import Namespace
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.files import field, found_in, image_file, number_of, parsed, required_files
from benchmarks.judge import ask_judge, collect_grades
from benchmarks.scoring import Example, Grade, Graded, Score, Task, bootstrapped

JUDGE_ROLE = "You are a helpful and precise assistant for checking the quality of the answer."
RATING_INSTRUCTION = """Two assistants answered the question above, about an image that the context describes.
Rate helpfulness, relevance, accuracy and detail of each answer from 1 to 10, without regard to their order.
Write both ratings on the first line, assistant 1 first, with one space between them and nothing else; then explain."""


def read(folder: Path, options: Namespace) -> list[Example]:
    """The truth is the material for the judge: a caption that replaces the picture, and GPT-4's answer."""
    questions, context, answers, images = required_files(
        folder, "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images/")
    captions = dict(parsed(context, lambda row: (field(row, "image"), field(row, "caption"))))
    references = dict(parsed(answers, lambda row: (number_of(row), field(row, "text"))))

    def question(row: dict) -> Example:
        name = field(row, "image")
        number = number_of(row)
        truth = {"context": found_in(captions, name, context), "reference": found_in(references, number, answers)}
        return Example(number, image_file(images, name), field(row, "text"), truth, (field(row, "category"),))

    return parsed(questions, question)


def llavabench_pair(review: str) -> tuple[float, float]:
    """Reference and candidate score from a review's first line; (-1, -1) unless it has exactly two numbers."""
    try:
        first, second = review.split("\n")[0].replace(",", " ").split(" ")
        return float(first), float(second)
    except ValueError:
        return -1.0, -1.0


def ask_for_review(example: Example, text: str, options: Namespace) -> dict:
    sections = {
        "Context": example.truth["context"],
        "Question": example.prompt,
        "Assistant 1": example.truth["reference"],
        "Assistant 2": text,
    }
    prompt = "".join(f"[{name}]\n{value}\n\n" for name, value in sections.items()) + RATING_INSTRUCTION
    messages = [{"role": "system", "content": JUDGE_ROLE}, {"role": "user", "content": prompt}]
    content = ask_judge(options, messages, temperature=0.2, max_tokens=1024)
    return {"question_id": example.question_id, "category": f"llava_bench_{example.categories[0]}", "content": content,
            "tuple": llavabench_pair(content), "judge": options.judge_model}


def read_review(review: dict) -> Grade:
    """Of LLaVA's jsonl, one line per answer: question_id, category, content, tuple.

    raw: the ratings of reference and candidate. A failed review is not scored; upstream averages its -1 in.
    """
    reference, candidate = llavabench_pair(field(review, "content", blank=True))
    return Grade(candidate / 10, raw=(reference, candidate)) if reference > 0 else Grade(None, unparsed=True)


def relative_rating(sums: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...), in per cent. The three: sum of reference ratings, sum of candidate ratings, number of reviews.

    Upstream rounds both means to three decimals before it divides them.
    """
    reference = np.round(sums[..., 0] / sums[..., 2], 3)
    candidate = np.round(sums[..., 1] / sums[..., 2], 3)
    return 100 * candidate / np.maximum(reference, 1e-3)


def summarize(graded: Graded) -> Score:
    rows_of = defaultdict(list)
    for example, grade in graded:
        for kind in (*example.categories, "all"):
            rows_of[kind].append((*grade.raw, 1.0))
    numbers = {}
    for kind in [*sorted(rows_of.keys() - {"all"}), "all"]:
        sums = np.sum(rows_of[kind], axis=0)                                    # (3,)
        reference, candidate = 10 * sums[:2] / sums[2]
        numbers[kind] = float(relative_rating(sums))
        numbers[f"{kind} reference"] = float(reference)
        numbers[f"{kind} candidate"] = float(candidate)
    return bootstrapped(rows_of["all"], relative_rating, "questions", numbers)


TASK = Task(
    metric="rating relative to GPT-4's answers",
    read=read,
    judge=partial(collect_grades, "llavabench-{}-review.jsonl", "", ask_for_review, read_review),
    summarize=summarize,
    splits={"all": 60},
    source="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    folders=("llava-bench-in-the-wild",),
    files={"questions.jsonl": "", "context.jsonl": "", "answers_gpt4.jsonl": ""},
    published={"llava": 65.4},
    max_new_tokens=1024,
    paper_mode="crop",
    mipha_mode="squash",
)
