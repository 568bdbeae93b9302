"""OpenAI's chat format: its json into a question, an answer into its json. No model, no sockets.

Follows https://platform.openai.com/docs/api-reference/chat as its clients use it. A field that cannot be obeyed is an
error that names it, as on OpenAI's own servers.
"""
import base64
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

# The fields that are read: their types, a test of the value, and what was expected. Each may be left out or null.
FIELDS = {
    "model": ({str}, lambda name: True, "a string"),
    "messages": ({list}, lambda messages: 1 <= len(messages) <= 1000, "an array of 1 to 1,000 messages"),
    "max_tokens": ({int}, lambda n: n >= 1, "an integer, 1 or more"),
    "max_completion_tokens": ({int}, lambda n: n >= 1, "an integer, 1 or more"),
    "temperature": ({int, float}, lambda t: 0 <= t <= 2, "a number from 0 to 2"),       # which NaN is not
    "top_p": ({int, float}, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "top_k": ({int}, lambda k: -1 <= k < 2**31, "an integer; 0 and -1: off"),           # vLLM's
    "seed": ({int}, lambda seed: -2**63 <= seed < 2**63, "an integer of 64 bits"),
    "stop": ({str, list}, lambda stop: len(texts := stop_strings(stop)) <= 4 and all(
        type(text) is str and text for text in texts), "a string or an array of up to 4, none empty"),
    "stream": ({bool}, lambda on: True, "true or false"),
    "stream_options": ({dict}, lambda options: True, "an object"),
    "logprobs": ({bool}, lambda on: True, "true or false"),
    "top_logprobs": ({int}, lambda n: 0 <= n <= 20, "an integer from 0 to 20"),
    "n": ({int}, lambda n: n == 1, "1: one answer comes"),
}
# Fields that change nothing in the answer of a server without accounts, tools or a cache to be named.
HARMLESS = {"user", "safety_identifier", "metadata", "service_tier", "parallel_tool_calls", "prediction",
            "prompt_cache_key", "prompt_cache_retention"}
# All other fields are refused, except with a value that asks for nothing: null, false, 0, empty, or one of these.
DEFAULTS = {"tool_choice": ["none", "auto"], "function_call": ["none", "auto"], "response_format": [{"type": "text"}],
            "modalities": [["text"]], "reasoning_effort": ["none"], "repetition_penalty": [1]}
SPEAKERS = ("user", "assistant", "system", "developer")
PART = '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}'
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(ValueError):
    """A request that is refused: an HTTP status, a sentence, the field at fault, and OpenAI's word for the fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@dataclass
class Request:
    """A chat completion as it was asked for."""
    turns: list[list[str]]          # question, answer, ..., question, in pieces: see read_messages
    pictures: list[bytes]           # files of pictures
    sampling: dict                  # max_new_tokens, temperature, top_k, top_p and logprobs of lib.chat.answer
    seed: int | None
    stop: list[str]                 # the answer ends before the first of them
    stream: bool
    include_usage: bool             # a last chunk that holds nothing but the usage

# ---------------------------------------------------------------------------------------------------
# Reading


def read_request(body: bytes, defaults: dict) -> Request:
    """Read the body of POST /v1/chat/completions. defaults: of lib.chat.answer, where the request has no value."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not json: {e}") from None
    param, problem = find_problem(fields)
    if not problem:
        param = "messages"
        turns, pictures, problem = read_messages(fields["messages"])
    if problem:
        raise RequestError(400, f"{param or 'the body'}: {problem}", param)
    given = {name: value for name, value in fields.items() if value is not None}
    # OpenAI has renamed max_tokens to max_completion_tokens; both are in use.
    max_tokens = given.get("max_completion_tokens", given.get("max_tokens", defaults["max_new_tokens"]))
    temperature = given.get("temperature", defaults["temperature"])
    return Request(
        turns=turns,
        pictures=pictures,
        sampling=defaults | {
            "max_new_tokens": max_tokens,
            "temperature": temperature if temperature >= 0.001 else 0.0,    # no division by almost nothing
            "top_p": max(given.get("top_p", defaults["top_p"]), 1e-6),      # 0: the likeliest token, as OpenAI has it
            "top_k": max(given.get("top_k", defaults["top_k"]), 0),
            "logprobs": given.get("top_logprobs", 0) if given.get("logprobs") else None,
        },
        seed=given.get("seed"),
        stop=stop_strings(given.get("stop", [])),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", {}).get("include_usage") is True,
    )


def stop_strings(stop: str | list) -> list:
    return [stop] if isinstance(stop, str) else stop


def find_problem(fields: Any) -> tuple[str | None, str | None]:
    """The first field that cannot be used, and why; (None, None) if all can."""
    if type(fields) is not dict:
        return None, "expected a json object"
    for name, value in ({"messages": []} | fields).items():
        if name in FIELDS:
            types, is_right, expected = FIELDS[name]
            if (value is not None or name == "messages") and not (type(value) in types and is_right(value)):
                return name, f"expected {expected}, found {json.dumps(value)[:40]}"
        elif value and name not in HARMLESS and value not in DEFAULTS.get(name, []):
            return name[:60], f"this server cannot do what it asks for, {json.dumps(value)[:40]}; leave it out"
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        return "top_logprobs", 'expected "logprobs": true with it'
    for i, message in enumerate(fields["messages"]):
        part, problem = message_problem(message)
        if problem:
            return f"messages[{i}]{part}", problem
    return None, None


def message_problem(message: Any) -> tuple[str, str | None]:
    """-> which part of a message is wrong, and what is wrong with it, None if nothing is."""
    if type(message) is not dict:
        return "", "expected an object"
    role = message.get("role")
    # null is an answer that failed, or one that was nothing but a refusal.
    if type(message.get("content")) not in (str, list, NoneType) or role != "assistant" and "content" not in message:
        return ".content", "expected a string or an array of parts"
    if role not in SPEAKERS:
        return ".role", f"expected one of {', '.join(SPEAKERS)}, found {json.dumps(role)[:40]}"
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            return f".{name}", "this model has no tools"
    for j, part in enumerate(parts_of(message)):
        text, url = read_part(part)
        if url is not None and url[:5].lower() != "data:":
            return f".content[{j}]", (f"begins with {url[:30]!r}; nothing here fetches an address, send the picture as "
                                      "data:...;base64")
        if text is None and not (url and url.partition(",")[0].lower().endswith(";base64")):
            return f".content[{j}]", f"expected {PART}"
    return "", None


def parts_of(message: dict) -> list:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_part(part: Any) -> tuple[str | None, str | None]:
    """-> text or None, the address of a picture or None. Both None: something else."""
    match part:
        case {"type": "text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
            return text, None
        case {"type": "image_url", "image_url": str(url) | {"url": str(url)}}:
            return None, url
    return None, None


def read_messages(messages: list) -> tuple[list[list[str]], list[bytes], str | None]:
    """OpenAI's messages, each valid by itself -> question, answer, ..., question; the pictures; what is wrong, if any.

    The model was trained with one fixed system sentence, and with turns that alternate. So a system message is part of
    the question that follows it (or, at the end, precedes it), messages of one side in a row are one turn, and before
    an answer that comes first stands an empty question. A turn is a list of pieces, with a picture between any two.
    Clients repeat a picture in every turn about it: it stays where it came first.
    """
    turns: list[list[str]] = []
    urls: list[str] = []
    problem = None
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces = [""]
        for text, url in map(read_part, parts_of(message)):
            if url in urls:
                continue
            if pieces != [""]:
                pieces[-1] += "\n"
            if url is None:
                pieces[-1] += text
            else:
                urls.append(url)
                pieces.append("")
        if is_answer and len(pieces) > 1:
            problem = "a picture in an assistant's message; expected it in a user's"
        if is_answer and not turns:
            turns = [[""]]
        if len(turns) % 2 == is_answer:
            turns.append(pieces)
        else:
            *before, last = turns[-1]
            joint = "\n" if turns[-1] != [""] and pieces != [""] else ""
            turns[-1] = [*before, last + joint + pieces[0], *pieces[1:]]
    try:
        pictures = [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]
    except ValueError as e:
        return turns, [], f"the picture is not base64: {e}"
    if len(turns) % 2 == 0:
        problem = "the last one must be the user's, with the question to answer"
    elif not "".join(turns[-1]).strip() and not pictures:
        problem = "the question is empty"
    return turns, pictures, problem

# ---------------------------------------------------------------------------------------------------
# Writing


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """An answer up to the first stop string, and whether there is one in it."""
    ends = [text.index(stop) for stop in stops if stop in text]
    return (text[:min(ends)], True) if ends else (text, False)


def until_stop(pieces: Iterable[str], stops: list[str]) -> Iterator[tuple[str, bool]]:
    """An answer's pieces up to the first stop string, and with each whether that has come. The last characters, in
    which a stop string may have begun, are held back."""
    hold = max(map(len, stops), default=1) - 1
    text = ""
    n_shown = 0
    for piece in pieces:
        text, stopped = cut_at_stop(text + piece, stops)
        end = len(text) if stopped else max(len(text) - hold, n_shown)
        yield text[n_shown:end], stopped
        if stopped:
            return
        n_shown = end
    yield text[n_shown:], False


class Reply:
    """One chat completion, whole or in chunks, which share an id."""

    def __init__(self, model: str, logprobs: bool):
        self.has_logprobs = logprobs
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def choice(self, kind: str, said: dict, tokens: list[dict], finish: str | None) -> dict:
        """tokens: lib.chat.describe_logprobs of those in `said`."""
        logprobs = {"content": tokens, "refusal": None} if self.has_logprobs else None
        return {"index": 0, kind: said, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, text: str, tokens: list[dict], finish: str, usage: dict) -> dict:
        choice = self.choice("message", {"role": "assistant", "content": text}, tokens, finish)
        return self.common | {"object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict, tokens: list[dict], finish: str | None = None) -> dict:
        choice = self.choice("delta", delta, tokens, finish)
        return self.common | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict) -> dict:
        return self.common | {"object": "chat.completion.chunk", "choices": [], "usage": usage}


def model_card(model: str, block_size: int, started: int) -> dict:
    """max_model_len is vLLM's name for how many positions a prompt and its answer may take together."""
    return {"id": model, "object": "model", "created": started, "owned_by": "local", "max_model_len": block_size}


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
