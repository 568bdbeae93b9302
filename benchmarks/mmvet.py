"""MM-Vet: 218 open questions that need several abilities at once, graded from 0 to 1 by a language model.

The published scores are GPT-4's grades. The submission file goes to the official notebook or to the Hugging Face space
whyu/MM-Vet_Evaluator; --grades reads the file that they return. --judge-url asks a judge of your choice, with this
project's prompt: another judge shifts the score by several points.
"""
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.files import field, image_file, read_official_json, reading, required_files, texts_of, to_json
from benchmarks.judge import ask_judge, collect_grades
from benchmarks.scoring import Answered, Example, Grade, Graded, Score, Task, accuracy, mean

GRADING_INSTRUCTION = """Rate how correct a prediction is: 0.0 (all wrong), 0.1, 0.2 and so on to 1.0 (all right).
<AND> in the ground truth: all of its parts must be there for 1.0. <OR>: any one of its parts is enough.
Reply with the number only.

question | ground truth | prediction | score
How many apples are there? | 3 | There are three apples. | 1.0
How many apples are there? | 3 | Four | 0.0
What are the two colors? | red <AND> blue | Red and green. | 0.5
Where is this? | Rome <OR> the Colosseum | It looks like the Colosseum. | 1.0
"""
TRIES = 5


def read(folder: Path, options: Namespace) -> Iterator[Example]:
    """The bare question, no instruction. Sub-scores: each ability, and each set of abilities, as in the paper."""
    path, images = required_files(folder, "mm-vet.json", "images/")
    for key, row in read_official_json(path, dict).items():
        with reading(f"{path}, question {key}"):
            abilities = texts_of(row, "capability")
            categories = (*abilities, "set " + "+".join(sorted(abilities)))
            image = image_file(images, field(row, "imagename"))
            yield Example(int(key.removeprefix("v1_")), image, field(row, "question"), field(row, "answer"), categories)


def mmvet_grade(text: str) -> float | None:
    """The judge's number: everything before the first space, if it lies in [0, 1]."""
    try:
        grade = float(text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def ask_for_grade(example: Example, text: str, options: Namespace) -> dict[str, list]:
    """Up to five tries, each at a higher temperature, until the reply is a number in [0, 1]; else 0."""
    truth = example.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    table_row = " | ".join([example.prompt, truth, text, ""]).replace("\n", "<br>")
    prompt = GRADING_INSTRUCTION + table_row
    for attempt in range(TRIES):
        messages = [{"role": "user", "content": prompt}]
        reply = ask_judge(options, messages, temperature=0.5 * attempt, max_tokens=3).strip()
        grade = mmvet_grade(reply)
        if grade is not None:
            break
        prompt = GRADING_INSTRUCTION + table_row + "\nPredict the correctness of the answer (digit): "
    return {"model": [options.judge_model], "content": [reply], "score": [grade or 0.0]}


def read_runs(grade: dict) -> Grade:
    """Of the official *-grade-Nruns.json: {"v1_0": {"model": [], "content": [], "score": []}}.

    A file may hold several runs of the judge; an answer's score is their mean, and raw has the grade of each.
    """
    scores = tuple(map(float, field(grade, "score", list)))
    return Grade(mean(scores), raw=scores)


def summarize(graded: Graded) -> Score:
    """The mean; if the judge graded several times, the score of each run and their standard deviation as sub-scores."""
    times = {len(grade.raw) for _, grade in graded}
    if len(times) > 1:
        raise ValueError(f"--grades: graded {sorted(times)} times, expected the same number for all answers")
    runs = [100 * mean(of_run) for of_run in zip(*(grade.raw for _, grade in graded))]
    numbers = {}
    if len(runs) > 1:
        numbers = {f"run {i}": score for i, score in enumerate(runs, 1)}
        numbers["std over runs"] = float(np.std(runs))
    return accuracy(graded, numbers)


def submission(answered: Answered, folder: Path) -> str:
    """{"v1_0": answer, ...}, as the official notebook and the space read it."""
    return to_json({f"v1_{example.question_id}": text for example, text in answered})


TASK = Task(
    metric="judge's score",
    read=read,
    judge=partial(collect_grades, "mm-vet-{}-grade-1runs.json", "v1_", ask_for_grade, read_runs),
    summarize=summarize,
    submission=submission,
    submission_name="mm-vet.json",
    splits={"test": 218},
    source="https://github.com/yuweihao/MM-Vet/releases: mm-vet.zip",
    folders=("mm-vet", "mmvet", "mmvet/mm-vet"),
    files={"mm-vet.json": ""},
    published={"llava_phi": 28.9, "mipha": 32.1, "llava": 31.1, "tinyllava": 31.7},
    max_new_tokens=1024,
    paper_mode="crop",
    mipha_mode="squash",
)
