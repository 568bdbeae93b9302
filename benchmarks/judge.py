"""The judge: a language model behind an OpenAI-compatible API that grades free-form answers, or a file of its grades.

MM-Vet and LLaVA-Bench need one. Every grade is saved as it arrives, so that an interrupted run, or one whose judge
fails, resumes where it stopped and nothing is paid for twice.
"""
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener, getproxies

from benchmarks.files import number_of, reading, short_sha256, to_json, to_jsonl
from benchmarks.scoring import Example
from lib.common import jsonl_rows, read_json, visible, write_whole

MAX_REPLY = 1 << 24         # bytes
DEFAULT_PORTS = {"http": 80, "https": 443}


def ask_judge(options: Namespace, messages: list[dict], temperature: float, max_tokens: int) -> str:
    """Request one chat completion; return the text of the reply. Raises ValueError if the judge fails.

    No other code of this project connects to a server, and this one connects only to the address that the user gave.
    The key, from the environment variable JUDGE_API_KEY, is sent to that address alone.
    """
    url = options.judge_url.rstrip("/") + "/chat/completions"
    origin = origin_of(check_judge_url(url))
    body = {"model": options.judge_model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    key = judge_key()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # A proxy sees what passes through it, unless that is encrypted: plain http goes straight to the judge.
    proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}
    opener = build_opener(SameOriginRedirects(origin), ProxyHandler(proxies))
    request = Request(url, json.dumps(body).encode(), headers)
    try:
        with opener.open(request, timeout=options.judge_timeout) as reply:
            return json.loads(reply.read(MAX_REPLY))["choices"][0]["message"]["content"]
    except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as e:
        # The message can come from the server, which knows the key.
        problem = visible(str(e).replace(key, "(the key)") if key else str(e))
        raise ValueError(f"the judge at {url} failed ({problem}); the grades so far are saved: run this again to "
                         "continue") from None


def check_judge_url(url: str) -> SplitResult:
    """Raise ValueError unless it is a plain http or https URL. The message omits it, as it may contain a password."""
    try:
        parts = urlsplit(url)
        parts.port                      # raises ValueError if it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.username or parts.password:
        raise ValueError("--judge-url: expected http://HOST or https://HOST, optionally with a port and a path; "
                         "a key belongs in JUDGE_API_KEY")
    return parts


def judge_key() -> str:
    """JUDGE_API_KEY, checked here because http.client quotes an invalid header in its error message."""
    key = os.environ.get("JUDGE_API_KEY", "").strip()
    if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        raise ValueError("JUDGE_API_KEY holds spaces, line breaks or characters outside ASCII: is it a key?")
    return key


def origin_of(url: SplitResult) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what makes two addresses the same server."""
    return url.scheme, url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)


class SameOriginRedirects(HTTPRedirectHandler):
    """Follows a redirect only on the judge's own server: urllib would send the key along to any other."""

    def __init__(self, origin: tuple[str, str | None, int | None]):
        self.origin = origin

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        target = urlsplit(newurl)
        if origin_of(target) != self.origin:
            raise ValueError(f"it redirects to another server, {target.scheme}://{target.hostname}, which must not see "
                             "the key; if that one is the judge, give its address")
        # urllib would turn the POST into a GET without a body.
        return Request(newurl, req.data, dict(req.header_items()), method="POST")


def read_grades(path: Path, as_rows: bool) -> dict:
    """Grades by key. as_rows: the file has one json object per line, with a question_id; else it is one json object."""
    if as_rows:
        grades = {}
        for where, row in jsonl_rows(path):
            with reading(where):
                grades[number_of(row)] = row
        return grades
    return read_json(path, limit=1 << 32)


def collect_grades(file_name: str, keys: list, ask: Callable[[Example, str, Namespace], dict],
                   examples: list[Example], texts: list[str], options: Namespace, out: Path) -> list[dict]:
    """The judge's grade of each answer: read from --grades, or requested with `ask` and saved in `out`.

    file_name: where they are saved; {} becomes the judge's name and a checksum of the answers, which keeps the grades
    of one set of answers from being taken for another's. keys: the answers' keys in that file.
    """
    if not options.grades and not options.judge_model:
        raise ValueError("--judge-url needs --judge-model NAME: scores of different judges are not comparable")
    as_rows = file_name.endswith(".jsonl")
    if options.grades:
        path = Path(options.grades)
        grades = read_grades(path, as_rows)
    else:
        judge = re.sub(r"[^\w.-]", "_", options.judge_model)
        path = out / file_name.format(f"{judge}-{short_sha256(to_json(texts).encode())}")
        grades = read_grades(path, as_rows) if path.exists() else {}
    for key, example, text in zip(keys, examples, texts):
        if key in grades:
            continue
        if not options.judge_url:
            raise ValueError(f"{path} has no grade for {key}: expected one for each of the {len(keys)} answers")
        grades[key] = ask(example, text, options)
        write_whole(path, to_jsonl(grades.values()) if as_rows else to_json(grades))
    return [grades[key] for key in keys]
