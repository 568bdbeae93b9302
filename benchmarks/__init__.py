"""The benchmarks: one file each, which says what it asks, reads its files, grades answers and computes its score.

docs/data.md says where the files come from and where they go.
To add one, write such a file (gqa.py is a short one to start from) and add a line to the table below.
"""
import argparse

from benchmarks import (gqa, llavabench, mmbench, mme, mmmu, mmvet, own_questions, pope, scienceqa, seedbench, shapes,
                        textvqa, vizwiz, vqav2)
from lib.common import at_least

TASKS = {                           # the name on the command line -> the benchmark
    "vqav2": vqav2.TASK,
    "gqa": gqa.TASK,
    "vizwiz": vizwiz.TASK,
    "scienceqa": scienceqa.TASK,
    "textvqa": textvqa.TASK,
    "pope": pope.TASK,
    "mme": mme.TASK,
    "mmbench": mmbench.TASK,
    "mmbench_cn": mmbench.TASK_CN,
    "mmvet": mmvet.TASK,
    "seedbench": seedbench.TASK,
    "llavabench": llavabench.TASK,
    "mmmu": mmmu.TASK,
    "shapes": shapes.TASK,
    "jsonl": own_questions.TASK,
}

# The eight of LLaVA-Phi's paper, which `--task paper` stands for.
PAPER = ("vqav2", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmvet")

# ---------------------------------------------------------------------------------------------------
# Flags that only some of the benchmarks read

QUESTION_FLAGS = ("ocr", "img_only")        # these change the questions, so they are saved with the answers


def add_benchmark_flags(parser: argparse.ArgumentParser) -> None:
    on_or_off = argparse.BooleanOptionalAction
    judged = ", ".join(name for name, task in TASKS.items() if task.judge)
    add = parser.add_argument
    add("--ocr", action=on_or_off, default=True, help="textvqa: OCR tokens in the prompt, worth about 10 points")
    add("--img-only", action=on_or_off, default=False, help="scienceqa: leave out the questions without an image")
    add("--questions", help="jsonl: file of your own questions, one json object a line, of which only text must be "
                            f"given: {own_questions.EXAMPLE}")
    add("--images", nargs="+", help="jsonl: folder of their images, or .zip or .tar archives")
    add("--grades", help=f"{judged}: an existing grade or review file")
    add("--judge-url", help=f"{judged}: an OpenAI-compatible service; its key is read from JUDGE_API_KEY")
    add("--judge-model", help="name of the judge's model")
    add("--judge-timeout", type=at_least(0.001), default=60.0, help="seconds to wait for one reply of the judge")
