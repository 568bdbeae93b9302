"""OpenAI's chat format: its json into a question, an answer into its json. No model, no sockets.

Follows https://platform.openai.com/docs/api-reference/chat as its clients use it. A field that cannot be obeyed is an
error that names it, as on OpenAI's own servers.
"""
import base64
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from types import NoneType
from typing import Any

# The fields that are read: their types, what is expected, and the ends of a number or of an array's length. Each may be
# left out or null.
FIELDS = {
    "model": ({str}, "a string"),
    "messages": ({list}, "an array of 1 to 1,000 messages", 1, 1000),
    "max_tokens": ({int}, "an integer, 1 or more", 1, inf),
    "max_completion_tokens": ({int}, "an integer, 1 or more", 1, inf),
    "temperature": ({int, float}, "a number from 0 to 2", 0, 2),            # which NaN is not
    "top_p": ({int, float}, "a number from 0 to 1", 0, 1),
    "top_k": ({int}, "an integer; 0 and -1: off", -1, 2**31 - 1),           # vLLM's
    "seed": ({int}, "an integer of 64 bits", -2**63, 2**63 - 1),
    "stop": ({list}, "a string or an array of up to 4, none empty", 0, 4),
    "stream": ({bool}, "true or false"),
    "stream_options": ({dict}, "an object"),
    "logprobs": ({bool}, "true or false"),
    "top_logprobs": ({int}, "an integer from 0 to 20", 0, 20),
    "n": ({int}, "1: one answer comes", 1, 1),
}
# Fields that change nothing in the answer of a server without accounts, tools or a cache to be named.
HARMLESS = {"user", "safety_identifier", "metadata", "service_tier", "parallel_tool_calls", "prediction",
            "prompt_cache_key", "prompt_cache_retention"}
# All other fields are refused, except with a value that asks for nothing: null, false, 0, empty, or one of these.
DEFAULTS = {"tool_choice": ["none", "auto"], "function_call": ["none", "auto"], "response_format": [{"type": "text"}],
            "modalities": [["text"]], "reasoning_effort": ["none"], "repetition_penalty": [1]}
SPEAKERS = ("user", "assistant", "system", "developer")
PART = '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}'


@dataclass
class RequestError(Exception):
    """A request that is refused: an HTTP status, a sentence, the field at fault, and OpenAI's word for the fault."""
    status: int
    message: str
    param: str | None = None
    code: str | None = None


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

    def choice(self, said: dict, tokens: list[dict], finish: str | None = None) -> dict:
        """An answer, or a piece of it, in the form of a reply. tokens: lib.chat.describe_logprobs of those in `said`"""
        logprobs = None if self.sampling["logprobs"] is None else {"content": tokens, "refusal": None}
        kind = "delta" if self.stream else "message"
        return {"index": 0, kind: said, "logprobs": logprobs, "finish_reason": finish}

# ---------------------------------------------------------------------------------------------------
# Reading


def read_request(body: bytearray, defaults: dict, max_pictures: int) -> Request:
    """Read the body of POST /v1/chat/completions. defaults: of lib.chat.answer, where the request has no value."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not json: {e}") from None
    if isinstance(fields, dict) and isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    param, problem = find_problem(fields)
    if not problem:
        turns, pictures, param, problem = read_messages(fields["messages"], max_pictures)
    if problem:
        raise RequestError(400, f"{param or 'the body'}: {problem}", param)
    given = defaults | {name: value for name, value in fields.items() if name in FIELDS and value is not None}
    return Request(
        turns=turns,
        pictures=pictures,
        sampling={
            # OpenAI has renamed max_tokens to max_completion_tokens; both are in use.
            "max_new_tokens": given.get("max_completion_tokens", given.get("max_tokens", given["max_new_tokens"])),
            "temperature": given["temperature"] if given["temperature"] >= 0.001 else 0.0,     # or it divides by 0
            "top_p": max(given["top_p"], 1e-6),     # 0: the likeliest token, as OpenAI has it
            "top_k": max(given["top_k"], 0),
            "logprobs": given.get("top_logprobs", 0) if given.get("logprobs") else None,
        },
        seed=given.get("seed"),
        stop=given.get("stop", []),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", {}).get("include_usage") is True,
    )


def find_problem(fields: Any) -> tuple[str | None, str | None]:
    """The first field that cannot be used, and why; (None, None) if all can. Does not look into the messages."""
    if type(fields) is not dict:
        return None, "expected a json object"
    for name, value in ({"messages": []} | fields).items():
        if name in FIELDS:
            types, expected, *ends = FIELDS[name]
            size = len(value) if type(value) is list else value
            is_right = type(value) in types and (not ends or ends[0] <= size <= ends[1])
            if name == "stop" and is_right:
                is_right = all(type(text) is str and text for text in value)
            if not is_right and (value is not None or name == "messages"):
                return name, f"expected {expected}, found {json.dumps(value)[:40]}"
        elif value and name not in HARMLESS and value not in DEFAULTS.get(name, []):
            return name[:60], f"this server cannot do what it asks for, {json.dumps(value)[:40]}; leave it out"
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        return "top_logprobs", 'expected "logprobs": true with it'
    return None, None


def read_messages(messages: list, max_pictures: int) -> tuple[list[list[str]], list[bytes], str, str | None]:
    """OpenAI's messages -> question, answer, ..., question; the pictures; what is at fault, and why, if anything is.

    The model was trained with one fixed system sentence, and with turns that alternate. So a system message is part of
    the question that follows it (or, at the end, precedes it), messages of one side in a row are one turn, and before
    an answer that comes first stands an empty question. A turn is a list of pieces, with a picture between any two.
    Clients repeat a picture in every turn about it: it stays where it came first.
    """
    turns: list[list[list[str]]] = []       # of each piece its parts, to be joined at the end: there may be many
    pictures: list[bytes] = []
    for i, message in enumerate(messages):
        name, problem = message_problem(message)
        if not problem:
            is_answer = message["role"] == "assistant"
            if is_answer and not turns:
                turns.append([[]])
            if len(turns) % 2 == is_answer:         # it is the other side's turn
                turns.append([[]])
            name, problem = add_content(message, turns[-1], pictures, max_pictures)
        if problem:
            return [], [], f"messages[{i}]{name}", problem
    joined = [["".join(piece) for piece in turn] for turn in turns]
    problem = None
    if len(turns) % 2 == 0:
        problem = "the last one must be the user's, with the question to answer"
    elif not "".join(joined[-1]).strip() and not pictures:
        problem = "the question is empty"
    return joined, pictures, "messages", problem


def message_problem(message: Any) -> tuple[str, str | None]:
    """-> which field of a message is wrong, and what is wrong with it, None if nothing is."""
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
    return "", None


def add_content(message: dict, turn: list[list[str]], pictures: list[bytes],
                max_pictures: int) -> tuple[str, str | None]:
    """Append a message's texts and new pictures. -> which part is wrong, and what is wrong with it, None if nothing."""
    content = message.get("content") or []
    for j, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        piece, problem = read_part(part)
        is_picture = isinstance(piece, bytes)
        is_known = piece in pictures
        if is_picture and message["role"] == "assistant":
            problem = "a picture in an assistant's message; expected it in a user's"
        elif is_picture and not is_known and len(pictures) == max_pictures:
            problem = f"one picture too many, expected at most {max_pictures}"
        if problem:
            return f".content[{j}]", problem
        if piece == "" or is_known:
            continue
        if turn != [[]]:
            turn[-1].append("\n")
        if is_picture:
            pictures.append(piece)
            turn.append([])
        else:
            turn[-1].append(piece)
    return "", None


def read_part(part: Any) -> tuple[str | bytes, str | None]:
    """-> a text, or the file of a picture; and what is wrong with it, None if nothing is."""
    try:
        match part:
            case {"type": "text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
                text.encode()                       # json can spell half a character
                return text, None
            case {"type": "image_url", "image_url": str(url) | {"url": str(url)}}:
                head, _, data = url.partition(",")
                if not head.lower().startswith("data:"):
                    return "", (f"begins with {url[:30]!r}; nothing here fetches an address, send the picture as "
                                "data:...;base64")
                if head.lower().endswith(";base64"):
                    return base64.b64decode(data, validate=True), None
    except ValueError as e:
        return "", f"not Unicode, or not base64: {e}"
    return "", f"expected {PART}"

# ---------------------------------------------------------------------------------------------------
# Writing


def until_stop(pieces: Iterable[str], stops: list[str]) -> Iterator[tuple[str, int, bool]]:
    """An answer up to the first stop string: text that is final, how many tokens begin in the answer so far, and
    whether a stop string has come. The last characters, in which one may have begun, are held back.

    pieces: one for each token, and what is left at the end.
    """
    hold = max(map(len, stops), default=1) - 1
    text = ""
    starts = []                     # where in the text each token begins
    n_shown = 0
    for piece in pieces:
        starts.append(len(text))
        text += piece
        places = [text.index(stop) for stop in stops if stop in text]
        end = min(places) if places else max(len(text) - hold, n_shown)
        yield text[n_shown:end], bisect_left(starts, end), bool(places)
        if places:
            return
        n_shown = end
    yield text[n_shown:], len(starts), False
