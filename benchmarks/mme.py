"""MME: two yes/no questions about each of 1,187 images, one with the answer yes and one with no; 14 subtasks.

A subtask's score is its accuracy plus the share of images with both questions right, each up to 100. Papers report
perception, the sum over ten subtasks (at most 2,000); cognition is a sub-score. Nobody reports their sum.
"""
import re
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from benchmarks.files import EVAL_ZIP, field, first_existing, found_in, parsed, reading, required_files
from benchmarks.scoring import SHORT, Example, Grade, Graded, Score, Task, bootstrapped

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION


def read(folder: Path, options: Namespace) -> list[Example]:
    """Truths come from the release, order and wording from LLaVA's file if present."""
    [release] = required_files(folder, "MME_Benchmark_release_version/MME_Benchmark or MME_Benchmark_release_version")
    official = {}                               # (subtask, image stem, question) -> example
    for subtask in SUBTASKS:
        for image, question, answer in read_subtask(release / subtask):
            official[subtask, image.stem, question] = Example(
                f"{subtask}/{image.name}", image, f"{question}\n{SHORT}", answer.lower(), (subtask,))
    examples = list(official.values())
    llava_file = first_existing(folder, "llava_mme.jsonl")
    if llava_file:
        examples = parsed(llava_file, lambda row: llavas_question(row, official, release))
    odd = [image for image, n in Counter(example.image for example in examples).items() if n != 2]
    if odd:
        raise ValueError(f"{len(odd)} images do not have two questions each, the first is {odd[0]}")
    return examples


def read_subtask(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield (image, question, "Yes" or "No").

    The release mixes two layouts: images and questions in separate folders, or side by side.
    """
    images = first_existing(folder, "images") or folder
    texts = first_existing(folder, "questions_answers_YN") or folder
    image_of = {path.stem: path for path in sorted(images.glob("*")) if path.suffix != ".txt"}
    for path in sorted(texts.glob("[!.]*.txt")):            # a Mac leaves a ._ file next to each that it copies
        image = image_of.get(path.stem, images / f"{path.stem}.jpg")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line.strip():
                with reading(f"{path}, line {number}"):
                    yield image, *question_and_answer(line.decode("utf-8-sig"))


def question_and_answer(line: str) -> tuple[str, str]:
    """The release has a tab between the two; editors make spaces of it."""
    found = re.fullmatch(r"(.*\S)(?<!\bor)\s+(yes|no)", line.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"expected a question, a tab, and Yes or No, found {line[:80]!r}")
    return found[1].replace("Please answer yes or no.", "").strip(), found[2]


def llavas_question(row: dict, official: dict, release: Path) -> Example:
    """official: (subtask, image stem, question) -> example. File extensions differ between releases."""
    image = PurePosixPath(field(row, "question_id"))
    question = field(row, "text").removesuffix(SHORT).strip()
    example = found_in(official, (image.parts[0], image.stem, question), release)
    return example._replace(question_id=row["question_id"])


def mme_yes_no(text: str) -> str:
    """The official rule looks at four characters only: "know" is a no, "**Yes**" is neither."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    if "no" in start:
        return "no"
    return "other"


def grade_answer(example: Example, text: str) -> Grade:
    answer = mme_yes_no(text)
    return Grade(float(answer == example.truth), answer, unparsed=answer == "other")


def subtask_scores(counts: np.ndarray) -> np.ndarray:
    """(..., subtasks, 4) -> (..., subtasks). The four: right, questions, images all right, images."""
    right, questions, images_right, images = np.moveaxis(counts, -1, 0)         # each (..., subtasks)
    return 100 * right / np.maximum(questions, 1) + 100 * images_right / np.maximum(images, 1)


def perception(counts: np.ndarray) -> np.ndarray:
    """(..., subtasks, 4) -> (...), the headline."""
    return subtask_scores(counts)[..., :len(PERCEPTION)].sum(-1)


def summarize(graded: Graded) -> Score:
    """The bootstrap resamples images, because the two questions about one image are not independent."""
    scores_of_image = defaultdict(list)
    for example, grade in graded:
        scores_of_image[example.categories[0], example.image].append(grade.score)
    counts = np.zeros((len(scores_of_image), len(SUBTASKS), 4))
    for i, ((subtask, _), right) in enumerate(scores_of_image.items()):
        counts[i, SUBTASKS.index(subtask)] = sum(right), len(right), all(right), 1
    scores = subtask_scores(counts.sum(0))                                      # (subtasks,)
    cognition = float(scores[len(PERCEPTION):].sum())
    numbers = {"cognition": cognition} | dict(zip(SUBTASKS, scores.tolist()))
    return bootstrapped(counts, perception, "images", numbers)


TASK = Task(
    metric="perception (of 2,000)",
    read=read,
    grade=grade_answer,
    summarize=summarize,
    splits={"all": 2_374},
    source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation:"
           f" MME_Benchmark_release_version; {EVAL_ZIP}",
    folders=("MME", "mme"),
    files={"llava_mme.jsonl": "9f67707cb72d2a71"},
    published={"llava_phi": 1335.1, "mipha": 1488.9, "llava": 1510.7, "tinyllava": 1448.6},
    repeated_ids=True,
)
