"""The judge: a language model behind an OpenAI-compatible address that grades free answers, or a file of its grades.

MM-Vet and LLaVA-Bench need one. Every grade is kept as it arrives, so that a run that is stopped, or whose judge fails,
goes on where it was and nothing is paid for twice.
"""
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.files import checksum, to_json, to_jsonl
from benchmarks.scoring import Example
from common import read_json, read_jsonl, write_whole

MAX_REPLY = 1 << 24         # bytes


def ask_judge(options: Namespace, messages: list[dict], temperature: float, max_tokens: int) -> str:
    """One chat completion -> the text of the reply. ValueError if the judge fails.

    This is the project's only access to a network, and it goes to an address that the user gave.
    """
    url = options.judge_url.rstrip("/") + "/chat/completions"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--judge-url {options.judge_url}: expected http:// or https://")
    body = {"model": options.judge_model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("JUDGE_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = Request(url, json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=options.judge_timeout) as reply:
            return json.loads(reply.read(MAX_REPLY))["choices"][0]["message"]["content"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"the judge at {url} failed ({e}); its grades so far are kept, run this again to go on") from e


def read_grades(path: Path, as_rows: bool) -> dict:
    """Grades by key. as_rows: a json object a line, with its question_id; else one object of all."""
    if as_rows:
        return {row["question_id"]: row for row in read_jsonl(path)}
    return read_json(path, limit=1 << 32)


def collect_grades(file_name: str, keys: list, ask: Callable[[Example, str, Namespace], dict],
                   examples: list[Example], texts: list[str], options: Namespace, out: Path) -> list[dict]:
    """The judge's grade of each answer: read from --grades, or asked for with `ask` and kept in `out`.

    file_name: where they are kept, with {} for the judge's name and the checksum of the answers. The checksum keeps the
    grades of one set of answers from being taken for another's. keys: the answers' keys in that file.
    """
    if not options.grades and not options.judge_model:
        raise ValueError("--judge-url needs --judge-model NAME: scores of different judges do not compare")
    as_rows = file_name.endswith(".jsonl")
    if options.grades:
        path = Path(options.grades)
        grades = read_grades(path, as_rows)
    else:
        judge = re.sub(r"[^\w.-]", "_", options.judge_model)
        path = out / file_name.format(f"{judge}-{checksum(to_json(texts).encode())}")
        grades = read_grades(path, as_rows) if path.exists() else {}
    for key, example, text in zip(keys, examples, texts):
        if key in grades:
            continue
        if not options.judge_url:
            raise ValueError(f"{path} has no grade for {key}: expected one for each of the {len(keys)} answers")
        grades[key] = ask(example, text, options)
        write_whole(path, to_jsonl(grades.values()) if as_rows else to_json(grades))
    return [grades[key] for key in keys]
