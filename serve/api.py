"""OpenAI's chat format: its json into a question, an answer into its json. No model, no sockets.

Follows https://platform.openai.com/docs/api-reference/chat as its clients use it. Unknown fields are ignored, as
OpenAI's own servers do; a known field of the wrong type is an error that names it.
"""
import base64
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from lib.chat import MAX_CHARACTERS

MAX_MESSAGES = 1000                 # each takes several positions, however short it is
MAX_STOPS = 4
JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
              float: "a number", type(None): "null"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(ValueError):
    """A request that is refused: an HTTP status, a sentence, and the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers or {}


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
    """Read the body of POST /v1/chat/completions. defaults: max_tokens, temperature and top_p where it has none."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not json: {e}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body: expected a json object, found {JSON_NAMES[type(fields)]}")
    read_field(fields, "model", str, "")        # one model runs here; the reply says which, whatever was asked for
    turns, picture = read_messages(read_field(fields, "messages", list, []))
    # OpenAI has renamed max_tokens to max_completion_tokens; both are in use.
    max_tokens = read_number(fields, "max_tokens", int, defaults["max_tokens"], 1)
    max_tokens = read_number(fields, "max_completion_tokens", int, max_tokens, 1)
    read_number(fields, "n", int, 1, 1, 1)      # several answers at once: refused, because one would come
    stream_options = read_field(fields, "stream_options", dict, {})
    temperature = read_number(fields, "temperature", float, defaults["temperature"], 0, 2)
    return Request(
        turns=turns,
        picture=picture,
        max_tokens=max_tokens,
        temperature=temperature if temperature >= 0.001 else 0.0,   # the same tokens, and no division by almost nothing
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
    is_right = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool) and kind is not bool:        # to Python, true is an integer
        is_right = False
    if not is_right:
        raise RequestError(400, f"{name}: expected {JSON_NAMES[kind]}, found {JSON_NAMES[type(value)]}", name)
    return value


def read_number(fields: dict, name: str, kind: type, default: Any, least: float, most: float = float("inf")) -> Any:
    """A number within bounds. NaN, which Python's json reads, is within none."""
    value = read_field(fields, name, kind, default)
    if value is not None and not least <= value <= most:
        raise RequestError(400, f"{name}: expected a number from {least:g} to {most:g}, found {str(value)[:40]}", name)
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
    if n_characters > MAX_CHARACTERS:
        raise RequestError(400, f"messages: {n_characters:,} characters, expected at most {MAX_CHARACTERS:,}",
                           "messages")
    return turns, pictures[0] if pictures else None


def read_content(content: Any, name: str, pictures: list[bytes]) -> str:
    """A message's content: text, or an array of parts. Pictures are appended to `pictures`, the text is returned."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{name}: expected a string or an array of parts, found {JSON_NAMES[type(content)]}",
                           name)
    texts = []
    for number, part in enumerate(content):
        where = f"{name}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            pictures.append(read_picture(part.get("image_url"), f"{where}.image_url"))
        else:
            raise RequestError(400, f'{where}: expected {{"type": "text", "text": "..."}} or '
                                    '{"type": "image_url", "image_url": {"url": "data:..."}}', where)
    return "\n".join(texts)


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
    except ValueError as e:
        raise RequestError(400, f"{name}.url: not base64: {e}", name) from None

# ---------------------------------------------------------------------------------------------------
# Writing


class StopStrings:
    """Lets an answer's text through up to the first stop string. A possible beginning of one is held back."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The model's next piece -> the text that can be sent."""
        text = self.held + piece
        cuts = [text.index(stop) for stop in self.stops if stop in text]
        if cuts:
            self.found = True
            return text[:min(cuts)]
        n_certain = len(text) - longest_beginning(text, self.stops)
        self.held = text[n_certain:]
        return text[:n_certain]


def longest_beginning(text: str, stops: list[str]) -> int:
    """The number of characters at the end of `text` that could begin a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class Reply:
    """One chat completion, whole or in chunks, which share an id."""

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
        """The usage always comes at the end: in a chunk without choices for clients that asked for it, and next to the
        finish reason for the others, which would stumble over such a chunk."""
        chunk = self.chunk({}, finish)
        if include_usage:
            return [chunk, self.common | {"object": "chat.completion.chunk", "choices": [], "usage": used}]
        return [chunk | {"usage": used}]


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    """prompt_tokens counts each of the picture's patches."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}


def model_list(model: str, block_size: int, started: int) -> dict:
    """max_model_len is vLLM's name for how many positions a prompt and its answer may take together."""
    card = {"id": model, "object": "model", "created": started, "owned_by": "local", "max_model_len": block_size}
    return {"object": "list", "data": [card]}


def error_object(status: int, message: str, param: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
