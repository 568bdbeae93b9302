"""The judge: a language model behind an OpenAI-compatible address that grades free answers, or a file of its grades.

MM-Vet and LLaVA-Bench need one. Every grade is kept as it arrives, so that a run that is stopped, or whose judge fails,
goes on where it was and nothing is paid for twice.
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

from benchmarks.files import short_sha256, to_json, to_jsonl
from benchmarks.scoring import Example
from lib.common import read_json, read_jsonl, visible, write_whole

MAX_REPLY = 1 << 24         # bytes
DEFAULT_PORTS = {"http": 80, "https": 443}


def ask_judge(options: Namespace, messages: list[dict], temperature: float, max_tokens: int) -> str:
    """One chat completion -> the text of the reply. ValueError if the judge fails.

    This is the project's only access to a network, and it goes to an address that the user gave. The key, which the
    environment variable JUDGE_API_KEY holds, goes to that address alone.
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
        # The words of an error can be the server's own, and it knows the key.
        problem = visible(str(e).replace(key, "(the key)") if key else str(e))
        raise ValueError(f"the judge at {url} failed ({problem}); its grades so far are kept, run this again to go "
                         "on") from None


def check_judge_url(url: str) -> SplitResult:
    """ValueError unless it is a plain http or https address. A password in it is not repeated in the message."""
    try:
        parts = urlsplit(url)
        parts.port                      # raises ValueError if it is no number
    except ValueError as e:
        raise ValueError(f"--judge-url: {e}") from None
    if parts.username or parts.password:
        raise ValueError("--judge-url: has a user name or password in it; the key belongs into JUDGE_API_KEY")
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"--judge-url {url}: expected http://HOST or https://HOST, perhaps with a port and a path")
    return parts


def judge_key() -> str:
    """JUDGE_API_KEY, checked here because http.client repeats in its error message a header that it refuses."""
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
        # urllib would turn the question into a request without content.
        return Request(newurl, req.data, dict(req.header_items()), method="POST")


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
