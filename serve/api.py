"""OpenAI's chat format: its json into a question, an answer into its json. No model, no sockets.

Follows https://platform.openai.com/docs/api-reference/chat as its clients use it. Unknown fields are ignored, as
OpenAI's own servers do; a known field that cannot be used is an error that names it.
"""
import base64
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from lib.chat import MAX_CHARACTERS

# The fields that are read: their types, a test of the value, and what was expected. Each may be left out or null.
FIELDS = {
    "model": ({str}, lambda name: True, "a string"),
    "messages": ({list}, lambda messages: 1 <= len(messages) <= 1000, "an array of 1 to 1,000 messages"),
    "max_tokens": ({int}, lambda n: n >= 1, "an integer, 1 or more"),
    "max_completion_tokens": ({int}, lambda n: n >= 1, "an integer, 1 or more"),
    "temperature": ({int, float}, lambda t: 0 <= t <= 2, "a number from 0 to 2"),       # which NaN is not
    "top_p": ({int, float}, lambda p: 1e-6 <= p <= 1, "a number from 0.000001 to 1"),
    "seed": ({int}, lambda seed: -2**63 <= seed < 2**63, "an integer of 64 bits"),
    "stop": ({str, list}, lambda stop: are_stops(stop_strings(stop)), "a string or an array of up to 4, none empty"),
    "stream": ({bool}, lambda on: True, "true or false"),
    "stream_options": ({dict}, lambda options: True, "an object"),
    "n": ({int}, lambda n: n == 1, "1: one answer comes"),
}
PART = '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}'
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(ValueError):
    """A request that is refused: an HTTP status, a sentence, and the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass
class Request:
    """A chat completion as it was asked for."""
    turns: list[str]                # question, answer, ..., question
    picture: bytes | None           # a picture file
    sampling: dict                  # max_new_tokens, temperature, top_k and top_p of lib.chat.answer
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
    if problem:
        raise RequestError(400, f"{param or 'the body'}: {problem}", param)
    given = {name: value for name, value in fields.items() if value is not None}
    turns, urls = read_messages(given["messages"])
    try:
        picture = base64.b64decode(urls[0].partition(",")[2], validate=True) if urls else None
    except ValueError as e:
        raise RequestError(400, f"messages: the picture is not base64: {e}", "messages") from None
    # OpenAI has renamed max_tokens to max_completion_tokens; both are in use.
    max_tokens = given.get("max_completion_tokens", given.get("max_tokens", defaults["max_new_tokens"]))
    temperature = given.get("temperature", defaults["temperature"])
    return Request(
        turns=turns,
        picture=picture,
        sampling=defaults | {
            "max_new_tokens": max_tokens,
            "temperature": temperature if temperature >= 0.001 else 0.0,    # no division by almost nothing
            "top_p": given.get("top_p", defaults["top_p"]),
        },
        seed=given.get("seed"),
        stop=stop_strings(given.get("stop", [])),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", {}).get("include_usage") is True,
    )


def stop_strings(stop: str | list) -> list:
    return [stop] if isinstance(stop, str) else stop


def are_stops(stops: list) -> bool:
    return len(stops) <= 4 and all(isinstance(text, str) and text for text in stops)


def find_problem(fields: Any) -> tuple[str | None, str | None]:
    """The first field that cannot be used, and why; (None, None) if all can."""
    if type(fields) is not dict:
        return None, "expected a json object"
    for name, (types, is_right, expected) in FIELDS.items():
        value = fields.get(name)
        if value is not None and not (type(value) in types and is_right(value)):
            return name, f"expected {expected}, found {json.dumps(value)[:40]}"
    messages = fields.get("messages") or []
    first = n_instructions(messages)
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if type(message) is not dict:
            return name, "expected an object"
        if type(message.get("content")) not in (str, list):
            return f"{name}.content", "expected a string or an array of parts"
        for j, part in enumerate(parts_of(message)):
            if problem := part_problem(part):
                return f"{name}.content[{j}]", problem
        if i >= first and message.get("role") != ("user", "assistant")[(i - first) % 2]:
            return f"{name}.role", "system messages come first, then user and assistant take turns"
    if (len(messages) - first) % 2 == 0:
        return "messages", "the last one must be the user's, with the question to answer"
    turns, urls = read_messages(messages)
    if len(urls) > 1:
        return "messages", f"{len(urls)} pictures, but the model sees one in a conversation: start a new one"
    if (n := sum(map(len, turns))) > MAX_CHARACTERS:
        return "messages", f"{n:,} characters, expected at most {MAX_CHARACTERS:,}"
    return None, None


def part_problem(part: Any) -> str | None:
    match part:
        case {"type": "text", "text": str()}:
            return None
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            if not url.lower().startswith("data:"):
                return f"begins with {url[:30]!r}; nothing here fetches an address, send the picture as data:...;base64"
            if url.partition(",")[0].lower().endswith(";base64"):
                return None
    return f"expected {PART}"


def n_instructions(messages: list) -> int:
    """How many system messages there are before the first question."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    return next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))


def parts_of(message: dict) -> list:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_messages(messages: list) -> tuple[list[str], list[str]]:
    """OpenAI's messages, which are right -> question, answer, ..., question, and the pictures' addresses.

    The model was trained with one fixed system sentence, so system messages go in front of the first question. It was
    also trained with the picture at the very beginning, and sees it there wherever in the conversation it came.
    """
    texts = ["\n".join(part["text"] for part in parts_of(message) if part["type"] == "text") for message in messages]
    urls = [part["image_url"]["url"] for message in messages for part in parts_of(message) if part["type"] != "text"]
    first = n_instructions(messages)
    return ["\n".join(texts[:first + 1]), *texts[first + 1:]], urls

# ---------------------------------------------------------------------------------------------------
# Writing


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """An answer up to the first stop string, and whether there is one in it."""
    ends = [text.index(stop) for stop in stops if stop in text]
    return (text[:min(ends)], True) if ends else (text, False)


class Reply:
    """One chat completion, whole or in chunks, which share an id."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, usage: dict) -> dict:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self.common | {"object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self.common | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict) -> dict:
        return self.common | {"object": "chat.completion.chunk", "choices": [], "usage": usage}


def model_list(model: str, block_size: int, started: int) -> dict:
    """max_model_len is vLLM's name for how many positions a prompt and its answer may take together."""
    card = {"id": model, "object": "model", "created": started, "owned_by": "local", "max_model_len": block_size}
    return {"object": "list", "data": [card]}


def error_object(status: int, message: str, param: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
