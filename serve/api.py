"""OpenAI's chat format: its json into a question, an answer into its json. No torch, no sockets.

Follows https://platform.openai.com/docs/api-reference/chat as its clients use it. Fields that are not known here are
ignored, as OpenAI's own servers do with fields of the past; a known field of the wrong type is an error that names it.
"""
import base64
import binascii
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 32_000                   # characters of a whole conversation; 2,048 positions hold about 8,000
MAX_MESSAGES = 1000                  # each takes several positions, however short it is
MAX_STOPS = 4
JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
              float: "a number", type(None): "null"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(ValueError):
    """What the client did wrong, or why it has to wait: an HTTP status, a sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers or {}


class Busy(Exception):
    """The line is full, or the server is about to stop."""


@dataclass
class Request:
    """A chat completion as it was asked for."""
    turns: list[str]                # question, answer, ..., question
    picture: bytes | None           # a picture file
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    stream: bool
    include_usage: bool             # a last chunk that holds nothing but the usage

# ---------------------------------------------------------------------------------------------------
# Reading


def read_request(body: bytes, defaults: dict[str, float]) -> Request:
    """The body of POST /v1/chat/completions. defaults: max_tokens, temperature and top_p of requests that do not say.

    Raises RequestError.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not json: {e}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body: expected a json object, found {JSON_NAMES[type(fields)]}")
    read_field(fields, "model", str, "")        # one model runs here; the reply says which, whatever was asked for
    turns, picture = read_messages(read_field(fields, "messages", list, []))
    # OpenAI has renamed max_tokens to max_completion_tokens; clients of both ages are about.
    max_tokens = read_number(fields, "max_tokens", int, defaults["max_tokens"], 1, None)
    max_tokens = read_number(fields, "max_completion_tokens", int, max_tokens, 1, None)
    read_number(fields, "n", int, 1, 1, 1)      # several answers at once: refused, because one would come
    stream_options = read_field(fields, "stream_options", dict, {})
    temperature = read_number(fields, "temperature", float, defaults["temperature"], 0, 2)
    if temperature < 0.001:
        temperature = 0.0       # the same choice of tokens, and no division by almost nothing
    return Request(
        turns=turns,
        picture=picture,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=read_number(fields, "top_p", float, defaults["top_p"], 1e-6, 1),
        seed=read_number(fields, "seed", int, None, -2**63, 2**63 - 1),
        stop=read_stop(fields.get("stop")),
        stream=read_field(fields, "stream", bool, False),
        include_usage=read_field(stream_options, "include_usage", bool, False),
    )


def read_field(fields: dict, name: str, kind: type, default: Any) -> Any:
    """A field's value; null counts as left out. RequestError if it is not of this kind."""
    value = fields.get(name)
    if value is None:
        return default
    is_right = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if isinstance(value, bool) and kind is not bool:        # to Python, true is an integer
        is_right = False
    if not is_right:
        raise RequestError(400, f"{name}: expected {JSON_NAMES[kind]}, found {JSON_NAMES[type(value)]}", name)
    return value


def read_number(fields: dict, name: str, kind: type, default: Any, least: float, most: float | None) -> Any:
    """A number within bounds; none means no upper bound. NaN, which Python's json reads, is within none."""
    value = read_field(fields, name, kind, default)
    if value is None:
        return None
    if not value >= least or (most is not None and not value <= most):
        if most is None:
            bounds = f"at least {least:g}"
        else:
            bounds = f"{least:g}" if least == most else f"a number from {least:g} to {most:g}"
        raise RequestError(400, f"{name}: expected {bounds}, found {str(value)[:40]}", name)
    return value


def read_stop(stop: Any) -> list[str]:
    """A string, or a list of up to four: the answer ends before the first of them."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    is_right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_right or not all(isinstance(text, str) and text for text in stops):
        raise RequestError(400, f"stop: expected a string or an array of up to {MAX_STOPS}, none of them empty", "stop")
    return stops


def read_messages(messages: list) -> tuple[list[str], bytes | None]:
    """OpenAI's messages -> question, answer, ..., question, and the picture's file if there is one.

    The model was trained with one fixed system sentence, so a system message goes in front of the first question. It
    was also trained with the picture at the very beginning, and sees it there wherever in the conversation it came.
    """
    if len(messages) > MAX_MESSAGES:
        raise RequestError(400, f"messages: {len(messages):,} of them, expected at most {MAX_MESSAGES:,}", "messages")
    instructions = []
    turns = []
    pictures = []
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(400, f"{name}: expected an object, found {JSON_NAMES[type(message)]}", name)
        role = message.get("role")
        text = read_content(message.get("content"), f"{name}.content", pictures)
        if role in ("system", "developer") and not turns:
            instructions.append(text)
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise RequestError(400, f"{name}.role: expected {expected!r}, found {str(role)[:40]!r}: user and assistant "
                                    "take turns, and a system message comes before them", f"{name}.role")
        turns.append(text)
    if len(turns) % 2 == 0:
        raise RequestError(400, "messages: the last one must be the user's, with the question to answer", "messages")
    if len(pictures) > 1:
        raise RequestError(400, f"messages: {len(pictures)} pictures, but the model sees one in a conversation: "
                                "start a new one, or leave the others out", "messages")
    turns[0] = "\n".join([*instructions, turns[0]])
    n_characters = sum(len(text) for text in turns)
    if n_characters > MAX_TEXT:
        raise RequestError(400, f"messages: {n_characters:,} characters, expected at most {MAX_TEXT:,}", "messages")
    return turns, pictures[0] if pictures else None


def read_content(content: Any, name: str, pictures: list[bytes]) -> str:
    """A message's content: text, or an array of parts. Pictures are appended to `pictures`, the text is returned."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(400, f"{name}: expected a string or an array of parts, "
                                f"found {JSON_NAMES[type(content)]}", name)
    texts = []
    for number, part in enumerate(content):
        where = f"{name}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(check_unicode(part["text"], where))
        elif kind == "image_url":
            pictures.append(read_picture(part.get("image_url"), f"{where}.image_url"))
        else:
            raise RequestError(400, f'{where}: expected {{"type": "text", "text": "..."}} or '
                                    '{"type": "image_url", "image_url": {"url": "data:..."}}', where)
    return "\n".join(texts)


def check_unicode(text: str, name: str) -> str:
    """Json can spell half of a surrogate pair, which is no character and cannot be tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"{name}: holds half of a character (a lone surrogate)", name) from None
    return text


def read_picture(image_url: Any, name: str) -> bytes:
    """{"url": "data:image/png;base64,..."} -> the file's bytes, which say themselves what kind of picture they are."""
    url = image_url.get("url") if isinstance(image_url, dict) else None
    if not isinstance(url, str):
        raise RequestError(400, f'{name}: expected {{"url": "data:image/...;base64,..."}}', name)
    header, comma, data = url.partition(",")
    if not header.lower().startswith("data:"):
        raise RequestError(400, f"{name}.url: begins with {url[:30]!r}; nothing here fetches an address, send the "
                                "picture itself as data:image/...;base64,...", name)
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError(400, f"{name}.url: expected data:image/...;base64,...", name)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as e:
        raise RequestError(400, f"{name}.url: not base64: {e}", name) from None

# ---------------------------------------------------------------------------------------------------
# Writing


def error_object(status: int, message: str, param: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def model_list(model: str, block_size: int, started: int) -> dict:
    """max_model_len is vLLM's name for how many positions a prompt and its answer may take together."""
    card = {"id": model, "object": "model", "created": started, "owned_by": "local", "max_model_len": block_size}
    return {"object": "list", "data": [card]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    """prompt_tokens counts each of the picture's patches."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}


class Reply:
    """What all pieces of one reply have in common."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, used: dict) -> dict:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self.common | {"object": "chat.completion", "choices": [choice], "usage": used}

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self.common | {"object": "chat.completion.chunk", "choices": [choice]}

    def last_chunks(self, finish: str, used: dict, include_usage: bool) -> list[dict]:
        """The usage always comes at the end. A client that asked for it expects a chunk without choices for it; others
        would stumble over that one and find it beside the finish reason."""
        chunk = self.chunk({}, finish)
        if include_usage:
            return [chunk, self.common | {"object": "chat.completion.chunk", "choices": [], "usage": used}]
        return [chunk | {"usage": used}]
