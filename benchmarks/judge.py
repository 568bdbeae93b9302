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
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener, getproxies

from benchmarks.files import number_of, parsed, read_official_json, reading, short_sha256, to_json, to_jsonl
from benchmarks.scoring import Answered, Example, Grade, Graded
from lib.common import visible, write_whole

MAX_REPLY = 1 << 24         # bytes
DEFAULT_PORTS = {"http": 80, "https": 443}


def ask_judge(options: Namespace, messages: list[dict], temperature: float, max_tokens: int) -> str:
    """Request one chat completion; return the text of the reply. Raises ValueError if the judge fails.

    No other code of this project connects to a server, and this one connects only to the address that the user gave.
    The key, from the environment variable JUDGE_API_KEY, is sent to that address alone.
    """
    url = options.judge_url.rstrip("/") + "/chat/completions"
    body = {"model": options.judge_model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    key = judge_key()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # A proxy sees what passes through it, unless that is encrypted: plain http goes straight to the judge.
    proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}
    opener = build_opener(SameOriginRedirects(), ProxyHandler(proxies))
    try:
        with opener.open(Request(url, json.dumps(body).encode(), headers), timeout=options.judge_timeout) as reply:
            return json.loads(reply.read(MAX_REPLY))["choices"][0]["message"]["content"]
    except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as e:
        # The message can come from the server, which knows the key.
        problem = visible(str(e).replace(key, "(the key)") if key else str(e))
        raise ValueError(f"the judge at {url} failed ({problem}); the grades so far are saved: run this again to "
                         "continue") from None


def judge_key() -> str:
    return os.environ.get("JUDGE_API_KEY", "").strip()


def judge_problem(options: Namespace) -> str:
    """What is wrong with the flags of the judge; "" if nothing is. The address is not repeated, as it may contain a
    password, nor is the key, which http.client would quote."""
    if not options.judge_model:
        return "--judge-url needs --judge-model NAME: scores of different judges are not comparable"
    if not re.fullmatch("[!-~]*", judge_key()):
        return "JUDGE_API_KEY holds spaces, line breaks or characters outside ASCII: is it a key?"
    try:
        parts = urlsplit(options.judge_url)
        parts.port                      # raises ValueError if it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.username or parts.password:
        return ("--judge-url: expected http://HOST or https://HOST, optionally with a port and a path; "
                "a key belongs in JUDGE_API_KEY")
    return ""


def origin_of(address: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what makes two addresses the same server."""
    url = urlsplit(address)
    return url.scheme, url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)


class SameOriginRedirects(HTTPRedirectHandler):
    """Follows a redirect only on the judge's own server: urllib would send the key along to any other."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme, host, port = origin_of(newurl)
        if (scheme, host, port) != origin_of(req.full_url):
            raise ValueError(f"it redirects to another server, {scheme}://{host}, which must not see the key; if that "
                             "one is the judge, give its address")
        # urllib would turn the POST into a GET without a body.
        return Request(newurl, req.data, dict(req.header_items()), method="POST")


def collect_grades(file_name: str, prefix: str, ask: Callable[[Example, str, Namespace], dict],
                   read_grade: Callable[[dict], Grade], answered: Answered, options: Namespace, out: Path) -> Graded:
    """The judge's grade of each answer: read from --grades, or requested with `ask` and saved in `out`.

    file_name: where they are saved, by question_id behind this prefix as one json object, or as a line for each if it
    ends in .jsonl; {} becomes the judge's name and a checksum of the answers, which keeps the grades of one set of
    answers from being taken for another's.
    """
    as_rows = file_name.endswith(".jsonl")
    judge = re.sub(r"[^\w.-]", "_", options.judge_model or "")
    answers = to_json([text for _, text in answered])
    path = Path(options.grades or out / file_name.format(f"{judge}-{short_sha256(answers.encode())}"))
    if not options.grades and not path.exists():
        saved = {}
    elif as_rows:
        saved = dict(parsed(path, lambda row: (str(number_of(row)), row)))
    else:
        saved = read_official_json(path, dict)
    graded = []
    for example, text in answered:
        key = f"{prefix}{example.question_id}"
        if key not in saved:
            problem = f"{path} has no grade for {key}: expected one for each of the {len(answered)} answers"
            if options.judge_url:
                problem = judge_problem(options)
            if problem:
                raise ValueError(problem)
            saved[key] = ask(example, text, options)
            write_whole(path, to_jsonl(saved.values()) if as_rows else to_json(saved))
        with reading(f"{path}, the grade of {key}"):
            graded.append((example, read_grade(saved[key])))
    return graded
