"""The page and the API over real loopback sockets: the terminal's answers, one after the other, and for nobody else.

The golden tiny model answers. Its greedy answers run on for hundreds of tokens, which is what the tests of stopping,
waiting and leaving need.
"""
import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import random
import signal
import socket
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from forks import Fork
from helpers import GOLDEN, GOLDEN_ANSWER, TINY_MODEL, all_logits, plain_answer
from PIL import Image

import sample
import serve.server
from benchmarks.judge import ask_judge
from data import eot_id
from lib.chat import answer, encode_chat, open_image
from lib.generate import Session
from serve.api import until_stop
from serve.server import MAX_WAITING, Server

PHOTO = GOLDEN / "images/photo.jpg"
DEFAULTS = {"max_new_tokens": 16, "temperature": 0.0, "top_k": 0, "top_p": 1.0}


@contextlib.contextmanager
def running(tiny_model, tiny_tokenizer, host="127.0.0.1", key=None, verbose=False):
    server = Server(host, 0, key, verbose)
    server.start(Session(tiny_model), tiny_tokenizer, "tiny", DEFAULTS)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tiny_model, tiny_tokenizer):
    with running(tiny_model, tiny_tokenizer) as server:
        yield server


@pytest.fixture
def towers(tiny_model):
    """How many pictures went through the vision tower."""
    seen = []
    handle = tiny_model.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    yield seen
    handle.remove()


def data_url(path: Path | bytes) -> str:
    data = path if isinstance(path, bytes) else path.read_bytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def user(text: str, picture=None) -> dict:
    parts = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
    return {"role": "user", "content": parts}


def said(text) -> dict:
    return {"role": "assistant", "content": text}


def request(server, method, path, body=None, headers=None) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        end = connection.sock.dup()
        response = connection.getresponse()
        reply = response.read()
        with contextlib.closing(end):
            end.recv(1)                 # the server closes after it has written its log, which so belongs to this test
        return response.status, reply, dict(response.headers)
    finally:
        connection.close()


def ask(server, messages, headers=None, **fields) -> tuple[int, dict]:
    body = json.dumps({"messages": messages} | fields)
    status, reply, _ = request(server, "POST", "/v1/chat/completions", body, headers)
    return status, json.loads(reply)


def text_of(server, messages, **fields) -> str:
    status, reply = ask(server, messages, **fields)
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]


def events(body: bytes) -> list[dict]:
    """The data of a stream; its last line must be [DONE]."""
    lines = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def streamed(server, messages, **fields) -> list[dict]:
    body = json.dumps({"messages": messages, "stream": True, "stream_options": {"include_usage": True}} | fields)
    status, reply, headers = request(server, "POST", "/v1/chat/completions", body)
    assert status == 200, reply
    assert headers["Content-Type"].startswith("text/event-stream")
    return events(reply)


def raw(server, data: bytes, seconds: float = 20) -> bytes:
    """Send bytes as they are, and read until the server closes the connection."""
    with socket.create_connection(server.server_address[:2], timeout=seconds) as connection:
        connection.sendall(data)
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
        return reply


def start_long_answer(server, text="Tell me all.", stream=True) -> socket.socket:
    """A question whose answer takes seconds, in a connection that the test can close. Returns when tokens come in."""
    body = json.dumps({"messages": [user(text)], "max_tokens": 2000, "stream": stream}).encode()
    connection = socket.create_connection(server.server_address[:2], timeout=60)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                       % (len(body), body))
    if stream:
        reply = b""
        while reply.count(b"data: ") < 3:
            reply += connection.recv(4096)
    return connection


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------
# The same answers


def test_the_answer_is_the_terminals(server):
    status, reply = ask(server, [user("What is this?", PHOTO)], max_tokens=24, temperature=0)
    assert status == 200
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": GOLDEN_ANSWER}
    assert choice["finish_reason"] == "length" and reply["model"] == "tiny"
    assert reply["usage"]["completion_tokens"] == 24
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + 24


def test_streamed_is_whole(server):
    """In several pieces, none of which ends within a character, with the usage at the end."""
    chunks = streamed(server, [user("What is this?", PHOTO)], max_tokens=24)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(pieces) == GOLDEN_ANSWER and sum(map(bool, pieces)) > 5
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length" and chunks[-1]["usage"]["completion_tokens"] == 24
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(server):
    """Clients that did not ask for it would stumble over a chunk without choices."""
    with_usage = streamed(server, [user("Who?")], max_tokens=3)
    assert with_usage[-1]["choices"] == [] and with_usage[-1]["usage"]["completion_tokens"] == 3
    without = streamed(server, [user("Who?")], max_tokens=3, stream_options=None)
    assert without[-1]["choices"][0]["finish_reason"] == "length" and len(without) == len(with_usage) - 1


def test_two_turns_about_a_picture_run_the_tower_once(server, tiny_model, tiny_tokenizer, towers):
    picture = Image.new("RGB", (40, 30), (9, 99, 199))
    file = io.BytesIO()
    picture.save(file, "PNG")
    chat = [user("What is this?", file.getvalue())]
    first = text_of(server, chat)
    chat += [said(first), user("Why?")]
    second = text_of(server, chat)
    assert sum(towers) == 1
    turns = ["What is this?", first, "Why?"]
    alone = answer(Session(tiny_model), tiny_tokenizer, [turns], [picture], max_new_tokens=16)
    assert second == "".join(piece for (piece,) in alone)


def test_several_pictures_stay_where_they_were_sent(server, tiny_model, tiny_tokenizer):
    """Two in one question and another in the next: each in its place, and a picture that is repeated only once."""
    tall, wide = GOLDEN / "images/tall.png", GOLDEN / "images/wide.png"
    both = user("Which is older?", PHOTO)
    both["content"].append(user("", tall)["content"][0])
    chat = [both, said("The first."), user("And this?", wide), said("No."), user("Why?", PHOTO)]
    turns = [["", "\nWhich is older?\n", ""], "The first.", ["", "\nAnd this?"], "No.", "Why?"]
    alone = answer(Session(tiny_model), tiny_tokenizer, [turns], [[PHOTO, tall, wide]], max_new_tokens=16)
    assert text_of(server, chat) == "".join(piece for (piece,) in alone)


def test_more_pictures_than_positions_are_refused_before_they_are_decoded(server, monkeypatch):
    monkeypatch.setattr("serve.server.open_image", None)
    pictures = [{"type": "image_url", "image_url": data_url(bytes([i % 256, i // 256]))} for i in range(600)]
    status, reply = ask(server, [{"role": "user", "content": pictures}])
    assert status == 400 and "one picture too many, expected at most" in reply["error"]["message"]


def test_sixteen_clients_at_once_get_what_they_get_alone(server):
    chats = [[user(f"What is number {i}?", PHOTO if i % 2 else None)] for i in range(16)]
    alone = [text_of(server, chat, max_tokens=8 + i % 3) for i, chat in enumerate(chats)]
    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(lambda i: text_of(server, chats[i], max_tokens=8 + i % 3, stream=False), range(16)))
    assert at_once == alone


def test_the_same_seed_gives_the_same_text(server):
    texts = [text_of(server, [user("Why?")], temperature=1, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_system_message_goes_before_the_question(server):
    with_system = [{"role": "system", "content": "Be brief."}, user("Why?")]
    assert text_of(server, with_system) == text_of(server, [user("Be brief.\nWhy?")])


# ---------------------------------------------------------------------------------------------------
# Where an answer ends


@pytest.mark.parametrize("stop", [
    " tab-", ["nowhere", " tab-", "- tab"], "or!", "s", "squares- tab- tab- tab-", "\ufffd"])
def test_an_answer_ends_before_a_stop_string(server, stop):
    stops = [stop] if isinstance(stop, str) else stop
    expected = GOLDEN_ANSWER[:min(GOLDEN_ANSWER.index(text) for text in stops if text in GOLDEN_ANSWER)]
    status, reply = ask(server, [user("What is this?", PHOTO)], max_tokens=24, stop=stop)
    assert reply["choices"][0]["message"]["content"] == expected
    assert reply["choices"][0]["finish_reason"] == "stop"
    chunks = streamed(server, [user("What is this?", PHOTO)], max_tokens=24, stop=stop)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == expected


@pytest.mark.parametrize("stop", [[], " tab-", "or!", "ares- t", "\ufffd", "never"])
def test_logprobs_are_of_the_tokens_of_the_text(server, tiny_model, tiny_tokenizer, stop):
    """Streamed and whole, each token once, none beyond a stop string, and each with the teacher-forced number."""
    fields = {"max_tokens": 24, "stop": stop, "logprobs": True, "top_logprobs": 2}
    choice = ask(server, [user("What is this?", PHOTO)], **fields)[1]["choices"][0]
    text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
    chunks = streamed(server, [user("What is this?", PHOTO)], **fields)[:-1]
    in_chunks = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["content"]]
    assert [token["bytes"] for token in in_chunks] == [token["bytes"] for token in tokens]
    said = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace").strip()
    before_last = b"".join(bytes(token["bytes"]) for token in tokens[:-1]).decode(errors="replace").strip()
    assert said.startswith(text) and (not tokens or len(before_last) <= len(text))
    assert stop or (len(tokens) == 24 and said == text)
    images = open_image(PHOTO, tiny_model.config)
    prompt = encode_chat(tiny_model.config, tiny_tokenizer, ["What is this?"], images)
    ids = plain_answer(tiny_model, prompt, images, 24, -1)[:len(tokens)]
    expected = all_logits(tiny_model, [prompt + ids], images)[len(prompt) - 1:].log_softmax(-1)
    for token, row, i in zip(tokens, expected, ids):
        assert token["logprob"] == pytest.approx(row[i].item(), abs=1e-5)
        assert [other["logprob"] for other in token["top_logprobs"]] == pytest.approx(row.topk(2)[0].tolist(), abs=1e-5)


def test_half_a_stop_string_at_the_end_is_text(server):
    reply = text_of(server, [user("What is this?", PHOTO)], max_tokens=24, stop=["squares and more", "es!"])
    assert reply == GOLDEN_ANSWER


def test_the_first_of_several_stop_strings_counts():
    """The third token, which holds the stop string, is not of the text."""
    pieces = list(until_stop(["", "a", "bcd", "e"], ["cd", "bcd", "x"]))
    assert pieces == [("", 0, False), ("", 0, False), ("a", 2, True)]
    assert list(until_stop(["ab", "cd"], ["x"])) == [("ab", 1, False), ("cd", 2, False), ("", 2, False)]
    assert list(until_stop([""], [])) == [("", 0, False), ("", 1, False)]


def test_the_models_own_end_is_a_stop(tiny_model, tiny_tokenizer):
    """The golden model never ends by itself, so a copy of it gets to like the end token."""
    model = deepcopy(tiny_model)
    model.llm.lm_head.bias.data[eot_id(tiny_tokenizer)] += 1000
    with running(model, tiny_tokenizer) as server:
        status, reply = ask(server, [user("Who?")])
        assert reply["choices"][0] == {"index": 0, "message": said(""), "logprobs": None, "finish_reason": "stop"}
        assert reply["usage"]["completion_tokens"] == 0


def test_a_full_context_is_an_end_and_a_fuller_one_an_error(server):
    status, reply = ask(server, [user("a " * 1000)], max_tokens=10**9)
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 2048
    status, reply = ask(server, [user("a " * 3000)])
    assert status == 400 and "the model has 2048" in reply["error"]["message"]


# ---------------------------------------------------------------------------------------------------
# The GPU


class Touched(Exception):
    pass


def test_the_thread_that_answers_makes_the_models_gpu_the_current_one_first(monkeypatch):
    """Every new thread starts on cuda:0, where events would be recorded on a stream that nothing runs on."""
    current = []

    def touch(device):
        raise Touched

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(torch, "Generator", touch)
    server = Server("127.0.0.1", 0, None, False)
    server.session = Namespace(model=Namespace(device=torch.device("cuda:1")))
    with contextlib.closing(server.socket), pytest.raises(Touched):
        server.ask(request=None, clock=None)
    assert current == ["cuda:1"]


# ---------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("fields, param", [
    ({"messages": "hello"}, "messages"), ({"messages": []}, "messages"), ({"messages": None}, "messages"),
    ({"messages": [7]}, "messages[0]"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"), ({"messages": [[]]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, user("b")]},
     "messages[1].tool_calls"),
    ({"messages": [user("a"), said("b")]}, "messages"),
    ({"messages": [user("a"), said("b")] * 501 + [user("c")]}, "messages"),
    ({"messages": [user("  ")]}, "messages"), ({"messages": [user("a" * 32_001)]}, "messages"),
    ({"messages": [user("a" * 20_000), said("b" * 20_000), user("c")]}, "messages"),
    ({"messages": [user("x"), {"role": "assistant", "content": user("y", PHOTO)["content"]}, user("z")]},
     "messages[1].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
     "messages[0].content[0]"),
    ({"messages": [user("x", b"no picture")]}, "messages"), ({"messages": [{}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": ["text"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\udcff"}]}, "messages[0].content[0]"),
    ({"messages": [user("\ud800"), said("b"), user("c")]}, "messages[0].content[0]"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"), ({"temperature": 10**400}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"temperature": [1]}, "temperature"),
    ({"top_p": -0.1}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"), ({"top_k": 10**30}, "top_k"), ({"seed": "x"}, "seed"), ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"), ({"stop": 5}, "stop"), ({"stop": ["a", 5]}, "stop"), ({"stop": ["a"] * 5}, "stop"),
    ({"stream": "yes"}, "stream"), ({"stream_options": 1}, "stream_options"), ({"model": 5}, "model"), ({"n": 2}, "n"),
])
def test_a_wrong_field_is_named(server, fields, param):
    status, reply = ask(server, **({"messages": [user("Who?")]} | fields))
    assert status == 400 and reply["error"]["param"] == param
    assert reply["error"]["type"] == "invalid_request_error" and reply["error"]["message"]


@pytest.mark.parametrize("url, message", [
    ("https://example.org/cat.jpg", "nothing here fetches"), ("http://127.0.0.1/x", "nothing here fetches"),
    ("file:///etc/passwd", "nothing here fetches"), ("/etc/passwd", "nothing here fetches"),
    ("", "nothing here fetches"),
    ("DATA:IMAGE/PNG,abc", "base64"),
    ("data:image/png,abc", "base64"), ("data:image/png;base64", "unreadable"), ("data:;base64,@@@@", "not base64"),
    ("data:image/png;base64,", "unreadable"), ("data:image/png;base64,aGVsbG8=", "unreadable"),
    (5, "expected"), (None, "expected"),
])
def test_only_a_picture_itself_is_a_picture(server, url, message):
    for image_url in ({"url": url}, url):               # OpenAI's form, and one that many clients send
        content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": image_url}]
        status, reply = ask(server, [{"role": "user", "content": content}])
        assert status == 400 and message in reply["error"]["message"]


def test_a_picture_that_unpacks_to_too_much_is_refused(server):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    status, reply = ask(server, [user("?", bomb.getvalue())])
    assert status == 400 and "exceeds limit" in reply["error"]["message"]
    strip = io.BytesIO()
    Image.new("1", (60_000, 1)).save(strip, "PNG")
    status, reply = ask(server, [user("?", strip.getvalue())])
    assert status == 400 and "too large" in reply["error"]["message"]


def test_null_and_what_asks_for_nothing_are_taken(server):
    """Clients fill in whole forms: a field that cannot be obeyed is no fault as long as it asks for nothing."""
    plain = text_of(server, [user("Who?")])
    assert text_of(server, [user("Who?")], user="me", logit_bias={}, temperature=None, stop=None, seed=None,
                   stream=None, model="gpt-4o") == plain
    assert text_of(server, [user("Who?")], tools=[], tool_choice="none", functions=None, function_call="auto",
                   response_format={"type": "text"}, logprobs=False, top_logprobs=0, presence_penalty=0,
                   frequency_penalty=0.0, n=1, modalities=["text"], parallel_tool_calls=True, store=False,
                   metadata={"a": "b"}, service_tier="auto", top_k=-1, min_p=0, repetition_penalty=1.0,
                   max_new_tokens=0) == plain


@pytest.mark.parametrize("field, value", [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}), ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    ("response_format", "json"), ("logprobs", 3), ("top_logprobs", 3), ("top_logprobs", 21),
    ("logit_bias", {"50256": -100}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -1), ("modalities", ["text", "audio"]), ("audio", {"voice": "alloy", "format": "wav"}),
    ("web_search_options", {"user_location": None}), ("reasoning_effort", "high"), ("store", True), ("min_p", 0.1),
    ("repetition_penalty", 1.2), ("guided_json", {"type": "object"}), ("ignore_eos", True), ("max_token", 5),
])
def test_a_field_that_cannot_be_obeyed_is_refused_by_name(server, field, value):
    """An answer that ignores it would look like one that obeys."""
    status, reply = ask(server, [user("Who?")], **{field: value})
    assert status == 400 and reply["error"]["param"] == field and reply["error"]["message"].startswith(f"{field}: ")


def test_top_p_0_and_top_k_1_are_greedy(server):
    plain = text_of(server, [user("Who?")])
    for sampling in ({"top_p": 0}, {"top_p": 0.0}, {"top_k": 1}):
        assert text_of(server, [user("Who?")], temperature=2, seed=1, **sampling) == plain
    assert text_of(server, [user("Who?")], temperature=2, seed=1) != plain


SYSTEM = {"role": "system", "content": "Be brief."}
PICTURE_PART = {"type": "image_url", "image_url": {"url": data_url(PHOTO)}}


def parts(*content) -> dict:
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize("sent, taken", [
    ([user("Who?"), user("Why?")], [user("Who?\nWhy?")]),
    ([user("a"), said("b"), said("c"), user("d")], [user("a"), said("b\nc"), user("d")]),
    ([user("a"), said(None), user("b")], [user("a"), said(""), user("b")]),
    ([user("a"), {"role": "assistant"}, user("b")], [user("a"), said(""), user("b")]),
    ([user("a"), said([]), user("b")], [user("a"), said(""), user("b")]),
    ([{"role": "user", "content": None}, user("b")], [user("b")]),
    ([{"role": "system", "content": None}, user("b")], [user("b")]),
    ([user("a"), said("b") | {"refusal": None, "tool_calls": None, "audio": None, "annotations": []}, user("c")],
     [user("a"), said("b"), user("c")]),
    ([user("a"), said([{"type": "refusal", "refusal": "no"}]), user("c")], [user("a"), said("no"), user("c")]),
    ([user("a"), said("b"), SYSTEM, user("c")], [user("a"), said("b"), user("Be brief.\nc")]),
    ([user("a"), SYSTEM, said("b"), user("c")], [user("a\nBe brief."), said("b"), user("c")]),
    ([user("a"), SYSTEM], [user("a\nBe brief.")]),
    ([user("a"), said("b"), SYSTEM], [user("a"), said("b"), user("Be brief.")]),
    ([SYSTEM, SYSTEM, user("a")], [user("Be brief.\nBe brief.\na")]),
    ([SYSTEM | {"role": "developer"}], [user("Be brief.")]),
    ([SYSTEM, said("Hello."), user("a")], [user("Be brief."), said("Hello."), user("a")]),
    ([parts(PICTURE_PART)], [user("", PHOTO)]),
    ([parts(PICTURE_PART), user("Who?")], [user("Who?", PHOTO)]),
    ([parts({"type": "text", "text": "Who?"}, PICTURE_PART)], [user("Who?", PHOTO)]),
    ([parts(PICTURE_PART | {"image_url": data_url(PHOTO)}), user("Who?")], [user("Who?", PHOTO)]),
    ([parts(PICTURE_PART | {"image_url": {"url": data_url(PHOTO), "detail": "high"}}), user("Who?")],
     [user("Who?", PHOTO)]),
    ([user("a", PHOTO), said("b"), user("c", PHOTO)], [user("a", PHOTO), said("b"), user("c")]),
    ([parts(PICTURE_PART, PICTURE_PART), user("a")], [user("a", PHOTO)]),
    ([user("a", PHOTO), said("b"), parts(PICTURE_PART)], [user("a", PHOTO), said("b"), user("")]),
    ([user("a") | {"name": "me"}], [user("a")]),
])
def test_histories_that_clients_send(server, sent, taken):
    """Each is what follows from it in the form that the model was trained on: turns that alternate, one picture."""
    assert text_of(server, sent, max_tokens=8) == text_of(server, taken, max_tokens=8)


def test_a_picture_without_text_is_shown_to_the_model(server, towers):
    picture = io.BytesIO()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(picture, "PNG")
    assert text_of(server, [user("", picture.getvalue())]) and sum(towers) == 1


def test_a_chat_too_long_has_openais_code(server):
    """Clients that shorten their history by themselves look for it."""
    for long in ([user("a " * 3000)], [user("a" * 40_000)], [user("a " * 900), said("b " * 900), user("c " * 900)]):
        status, reply = ask(server, long)
        assert status == 400 and reply["error"]["code"] == "context_length_exceeded"
    for short in ([user("  ")], [user("x", b"no picture")], [user("\ud800")], [user("a", PHOTO), user("b", b"GIF89a")]):
        status, reply = ask(server, short)
        assert status == 400 and reply["error"]["code"] is None


def test_malformed_json_by_the_hundred(server):
    """Cut, garbled and absurd bodies: each is answered with an error object, and the server goes on."""
    good = json.dumps({"messages": [user("What is this?", b"\xff\xd8" + bytes(300))], "max_tokens": 4}).encode()
    rng = random.Random(0)
    bodies = [b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"\x00" * 50, b"[" * 100_000, b'{"a":' * 50_000,
              b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", b"9" * 10_000, b"NaN"]
    bodies += [good[:rng.randrange(len(good))] for _ in range(100)]
    for _ in range(200):
        garbled = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            garbled[rng.randrange(len(garbled))] = rng.randrange(256)
        bodies.append(bytes(garbled))
    for body in bodies:
        status, reply, _ = request(server, "POST", "/v1/chat/completions", body)
        assert status == 400 and json.loads(reply)["error"]["message"], body[:80]
    assert text_of(server, [user("Who?")])


# ---------------------------------------------------------------------------------------------------
# Several users


def test_a_client_that_goes_away_stops_its_answer(tiny_model, server):
    """Counted in steps of the model after the connection was closed: at most two, one of which may be under way."""
    for stream in (True, False):
        steps = []
        handle = tiny_model.llm.register_forward_hook(lambda *_: (steps.append(1), time.sleep(0.05)) and None)
        connection = start_long_answer(server, stream=stream)
        wait_until(lambda: len(steps) > 3)
        connection.close()
        before = len(steps)
        wait_until(lambda: not server.line)
        handle.remove()
        assert len(steps) - before <= 2


def test_a_full_line_says_when_to_come_back(tiny_model, tiny_tokenizer):
    with running(tiny_model, tiny_tokenizer) as server:
        connections = [start_long_answer(server)]
        for i in range(MAX_WAITING):
            connections.append(start_long_answer(server, f"{i}?", stream=False))
        wait_until(lambda: len(server.line) == 1 + MAX_WAITING)
        body = json.dumps({"messages": [user("Me too?")]})
        status, reply, headers = request(server, "POST", "/v1/chat/completions", body)
        assert status == 429 and int(headers["Retry-After"]) > 0
        assert json.loads(reply)["error"]["type"] == "rate_limit_error"
        connections[5].close()                          # whoever leaves makes room
        wait_until(lambda: len(server.line) == MAX_WAITING)
        connections.append(start_long_answer(server, "And me?", stream=False))
        wait_until(lambda: len(server.line) == 1 + MAX_WAITING)
        for connection in connections:
            connection.close()
        wait_until(lambda: not server.line)
        assert text_of(server, [user("Who?")])


def test_a_failing_model_fails_one_answer(tiny_model, tiny_tokenizer, capfd):
    def fail(*_):
        raise RuntimeError("out of memory")

    with running(tiny_model, tiny_tokenizer) as server:
        handle = tiny_model.llm.register_forward_hook(fail)
        status, reply = ask(server, [user("Who?")])
        body = json.dumps({"messages": [user("?")], "stream": True})
        _, chunk, _ = request(server, "POST", "/v1/chat/completions", body)
        handle.remove()
        assert status == 500 and reply["error"]["type"] == "server_error" and "out of memory" not in str(reply)
        assert b'data: {"error"' in chunk
        assert text_of(server, [user("Who?")])
    assert "out of memory" in capfd.readouterr().err


def test_memory_does_not_grow(server):
    """1,000 requests, one in ten of them with a picture that was never seen before. What stays is bounded by number."""
    def one(i: int) -> None:
        picture = None
        if i % 10 == 0:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (i % 256, i // 256, 7)).save(file, "PNG")
            picture = file.getvalue()
        assert text_of(server, [user(f"What is {i}?", picture)], max_tokens=2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
        before = resident()
        list(pool.map(one, range(200, 1200)))
    assert resident() - before < 60e6
    wait_until(lambda: threading.active_count() < 10)


# ---------------------------------------------------------------------------------------------------
# Nobody gets in


def test_a_foreign_name_is_no_host(server):
    """DNS rebinding: the page of evil.example, whose name now leads here, is still told apart by its name."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "localhost@evil"):
        status, reply, _ = request(server, "GET", "/", headers={"Host": host})
        assert status == 403 and b"error" in reply, host
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"):
        assert request(server, "GET", "/health", headers={"Host": host})[0] == 200, host
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n", b"Host: localhost\r\nHost: localhost\r\n"):
        assert raw(server, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").startswith(b"HTTP/1.1 403")


def test_another_site_cannot_ask(server):
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        status, reply = ask(server, [user("Who?")], headers={"Origin": origin})
        assert status == 403, origin
    port = server.server_address[1]
    status, reply, headers = request(server, "GET", "/v1/models", headers={"Origin": f"http://127.0.0.1:{port}"})
    assert status == 200 and not any("access-control" in name.lower() for name in headers)
    assert request(server, "OPTIONS", "/v1/chat/completions")[0] == 501


# What Caddy 2.6 and nginx 1.22 (with its own Host, and with the client's passed on) make of a browser's request.
PROXIES = {
    "caddy": "HTTP/1.1\r\nHost: chat.example.org\r\nX-Forwarded-For: 203.0.113.9\r\n"
             "X-Forwarded-Host: chat.example.org\r\nX-Forwarded-Proto: https\r\n",
    "nginx": "HTTP/1.0\r\nHost: 127.0.0.1:8000\r\nConnection: close\r\n",
    "nginx, host passed on": "HTTP/1.0\r\nHost: chat.example.org\r\nX-Forwarded-For: 203.0.113.9\r\n"
                             "Connection: close\r\n",
    "no proxy, but a name": "HTTP/1.1\r\nHost: gpu01:8000\r\n",
}


@pytest.mark.parametrize("proxy", PROXIES)
def test_behind_a_proxy(tiny_model, tiny_tokenizer, proxy):
    """With a key neither Host nor Origin protects anything, and a proxy's are none that a server can know."""
    head = PROXIES[proxy].encode() + b"Origin: https://chat.example.org\r\n"
    body = json.dumps({"messages": [user("Who?")], "max_tokens": 3, "stream": True}).encode()
    with running(tiny_model, tiny_tokenizer, key="k") as server:
        assert b"<!doctype html>" in raw(server, b"GET / " + head + b"\r\n")
        head += b"Authorization: Bearer k\r\n"
        assert b'"tiny"' in raw(server, b"GET /v1/models " + head + b"\r\n")
        question = b"POST /v1/chat/completions " + head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        assert b"data: [DONE]" in raw(server, question)
        assert raw(server, question.replace(b"Bearer k", b"Bearer x")).startswith(b"HTTP/1.1 401")


def test_without_a_key_a_proxy_hears_what_to_do(server):
    for headers in ({"Host": "chat.example.org"}, {"Origin": "https://chat.example.org"}):
        status, reply, _ = request(server, "GET", "/", headers=headers)
        assert status == 403 and "--api-key" in json.loads(reply)["error"]["message"]


def test_the_key(tiny_model, tiny_tokenizer):
    with running(tiny_model, tiny_tokenizer, key="s3cret \u00fc") as server:
        for header in (None, "Bearer", "Bearer wrong", "Basic s3cret", "s3cret \u00fc", "Bearer s3cret"):
            headers = {"Authorization": header.encode()} if header else {}
            status, reply = ask(server, [user("Who?")], headers=headers)
            assert status == 401 and reply["error"]["type"] == "authentication_error", header
            assert request(server, "GET", "/v1/models", headers=headers)[0] == 401
        assert "s3cret" not in json.dumps(reply)
        assert ask(server, [user("Who?")], headers={"Authorization": "Bearer s3cret \u00fc".encode()})[0] == 200
        assert request(server, "GET", "/")[0] == 200 and request(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize("host, key, message", [
    ("0.0.0.0", None, "--api-key"), ("192.168.1.5", None, "API_KEY"), ("example.org", None, "--api-key"),
    ("::", None, "--api-key"), ("127.0.0.1", "", "empty"), ("0.0.0.0", " ", "empty"),
])
def test_another_address_needs_a_key(host, key, message):
    with pytest.raises(ValueError, match=message):
        Server(host, 0, key, False)


def test_mistakes_on_the_command_line_are_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args, message in ((["--host", "0.0.0.0"], "--api-key"), (["--port", port], port),
                              (["--port", "99999"], "99999"),
                              (["--prompt", "x"], "--prompt"), (["--image", "x.jpg"], "--image")):
            with pytest.raises((ValueError, OSError), match=message) as error:
                sample.main(sample.parse(["--model", str(TINY_MODEL), "--serve", *args]))
            assert "\n" not in str(error.value)


def test_no_path_reaches_the_file_system(server):
    for path in ("/chat.html", "/../sample.py", "/..%2fsample.py", "//etc/passwd", "/examples/../server.py", "/v1",
                 "/etc/passwd", "http://localhost/health", "*", "/health/", "/%2e%2e/", "/health%00"):
        reply = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert reply.startswith(b"HTTP/1.1 404") and b"import " not in reply, path


def test_methods(server):
    status, reply, _ = request(server, "GET", "/v1/chat/completions")
    assert status == 404 and "POST /v1/chat/completions" in json.loads(reply)["error"]["message"]
    assert request(server, "POST", "/health", "x")[0] == 404
    for method in ("PUT", "DELETE", "TRACE", "PRI", "X" * 100):
        assert request(server, method, "/v1/models")[0] == 501
    assert json.loads(request(server, "GET", "/health")[1]) == {"status": "ok"}
    models = json.loads(request(server, "GET", "/v1/models?x=1")[1])
    assert models["object"] == "list" and models["data"][0]["id"] == "tiny"
    assert json.loads(request(server, "GET", "/v1/models/tiny")[1]) == models["data"][0]
    assert json.loads(request(server, "GET", "/v1/models/%74iny?x=1")[1]) == models["data"][0]
    for other in ("other", "tiny/", "", "tin", "%2e%2e", "%ff"):
        status, reply, _ = request(server, "GET", f"/v1/models/{other}")
        error = json.loads(reply)["error"]
        assert status == 404 and error["code"] == "model_not_found" and error["param"] == "model", other


def test_head_is_get_without_the_body(server):
    """Health checks and `curl -I` ask so."""
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny", "/nowhere", "/v1/chat/completions"):
        status, page, headers = request(server, "GET", path)
        head_status, nothing, head_headers = request(server, "HEAD", path)
        assert (head_status, nothing) == (status, b"")
        assert head_headers | {"Date": ""} == headers | {"Date": ""} and int(headers["Content-Length"]) == len(page)


def test_the_body_is_limited_and_counted(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    for lines, status in [
        (b"", b"411"), (b"Transfer-Encoding: gzip, chunked\r\n", b"411"),
        (b"Transfer-Encoding: identity\r\n", b"411"), (b"Transfer-Encoding: \r\n", b"411"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"411"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"411"),
        (b"Content-Length: 5\r\nContent-Length: 5\r\n", b"411"),
        (b"Content-Length: 5\r\nContent-Length: 50\r\n", b"411"),
        (b"Content-Length: -1\r\n", b"411"), (b"Content-Length: +5\r\n", b"411"), (b"Content-Length: 0x5\r\n", b"411"),
        (b"Content-Length: 1_0\r\n", b"411"), (b"Content-Length: \xb2\r\n", b"411"),
        (b"Content-Length: 5, 5\r\n", b"411"),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", b"411"), (b"Content-Length: 25000001\r\n", b"413"),
    ]:
        reply = raw(server, head + lines + b"\r\n" + (b"hello" if status != b"413" else b""))
        assert reply.split()[1] == status and b'"error"' in reply, lines


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def test_a_chunked_body(server):
    """So send .NET, clients with a stream as their body, and proxies for clients that speak HTTP/2."""
    messages = [user("What is this?", PHOTO)]
    body = json.dumps({"messages": messages, "max_tokens": 3}).encode()
    expected = json.dumps(text_of(server, messages, max_tokens=3)).encode()
    thousands = [body[i:i + 1000] for i in range(0, len(body), 1000)]
    for data in (chunked(body), chunked(body[:1], body[1:9], body[9:]), chunked(*thousands),
                 chunked(body, end=b"000;ext=1\r\nTrailer: x\r\nAnother: y\r\n\r\n")):
        reply = raw(server, data)
        assert reply.startswith(b"HTTP/1.1 200") and expected in reply
    assert request(server, "POST", "/v1/chat/completions", iter(thousands))[0] == 200       # http.client's own


def test_a_chunked_body_is_limited_too(server, monkeypatch):
    for end in (b"zz\r\n", b"-1\r\n", b"0x1\r\n", b"+1\r\n", b"1_0\r\n", b"\r\n", b"1\n", b"1" * 2000, b"0\r\n\r\n"):
        reply = raw(server, chunked(b"{", end=end))
        assert reply.startswith(b"HTTP/1.1 400") and b'"error"' in reply, end
    assert raw(server, chunked(b"{", end=b"fffffff\r\n")).startswith(b"HTTP/1.1 413")
    status, reply, _ = request(server, "POST", "/v1/chat/completions", iter([b" " * 1_000_000] * 30))
    assert status == 413 and "smaller picture" in json.loads(reply)["error"]["message"]
    monkeypatch.setattr(serve.server, "BODY_SECONDS", 0.3)
    for end in (b"", b"5", b"5\r\nab", b"0\r\n"):
        assert raw(server, chunked(b"{", end=end)).split()[1] == b"408", end


def test_who_is_refused_while_sending_reads_why(server):
    """30 MB that are refused at once: the connection stays open long enough for the client to hear of it."""
    status, reply, _ = request(server, "POST", "/v1/chat/completions", b" " * 30_000_000)
    assert status == 413 and "smaller picture" in json.loads(reply)["error"]["message"]


def test_curl_may_ask_before_it_sends(server):
    body = json.dumps({"messages": [user("Who?")], "max_tokens": 2}).encode()
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_slow_and_half_sent_requests_end(server, monkeypatch, capfd):
    """A byte now and then must not keep a connection open for ever."""
    monkeypatch.setattr(serve.server, "REFUSED_SECONDS", 0.3)
    monkeypatch.setattr(serve.server, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(serve.server, "BODY_SECONDS", 0.4)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
    for start, status in ((b"", b""), (b"GET / HT", b""), (b"GET / HTTP/1.1\r\nHost: loc", b""), (head, b"408"),
                          (head + b'{"mess', b"408")):
        began = time.monotonic()
        with socket.create_connection(server.server_address[:2], timeout=20) as connection:
            connection.sendall(start)
            reply = b""
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    connection.settimeout(0.1)
                    with contextlib.suppress(TimeoutError):
                        piece = connection.recv(4096)
                        reply += piece
                        if not piece:
                            break
                    connection.sendall(b"x")
        assert time.monotonic() - began < 8
        assert status in reply and (status or not reply)
    assert "timed out" not in capfd.readouterr().err                    # browsers open connections in advance
    reply = raw(server, head[:-4] + b"\r\nX: y\r\n\r\n" + b"short")      # the connection stays open: 408
    assert reply.split()[1] == b"408"


@pytest.mark.parametrize("start", [
    chunked(b"{", end=b"0\r\n"),                                # headers behind the body, without end
    b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",      # what is thrown away after a refusal
])
def test_who_sends_without_end_is_cut_off(server, monkeypatch, start):
    monkeypatch.setattr(serve.server, "REFUSED_SECONDS", 0.3)
    monkeypatch.setattr(serve.server, "BODY_SECONDS", 0.3)
    began = time.monotonic()
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:
                connection.sendall(b"X: y\r\n" * 1000)
    assert time.monotonic() - began < 5
    assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_request_that_stops_short(server):
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
        assert reply.startswith(b"HTTP/1.1 408") and b"500 bytes did not all arrive" in reply


def test_odd_heads(server):
    for data, status in [
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"505"), (b"GET / FTP\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"), (b"\x00\x00\x00 \x00 HTTP/1.1\r\n\r\n", b"501"),
        (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"), (b"GET / \x00 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: local\x00host\r\n\r\n", b"403"),
    ]:
        reply = raw(server, data)
        assert reply.startswith(b"HTTP/1.1 " + status) and b'"error"' in reply, data[:40]
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, two + two).count(b"HTTP/1.1") == 1          # nothing is read behind the first request


def test_one_connection_too_many_reads_why(tiny_model, tiny_tokenizer, monkeypatch):
    """Its 503 comes whole, also when it is sending a picture, and nobody else waits meanwhile."""
    with running(tiny_model, tiny_tokenizer) as server:
        monkeypatch.setattr(serve.server, "MAX_CONNECTIONS", threading.active_count() + 2)
        with contextlib.ExitStack() as idle:
            for _ in range(3):
                idle.enter_context(socket.create_connection(server.server_address[:2])).sendall(b"GET / HT")
            wait_until(lambda: threading.active_count() > serve.server.MAX_CONNECTIONS)
            for size in (10, 5_000_000):
                for _ in range(10):
                    status, reply, headers = request(server, "POST", "/v1/chat/completions", b"x" * size)
                    assert status == 503 and int(headers["Retry-After"]) > 0
                    assert json.loads(reply)["error"]["type"] == "server_error"
            with socket.create_connection(server.server_address[:2]):
                began = time.monotonic()
                assert request(server, "GET", "/health")[0] == 503 and time.monotonic() - began < 1.5
        wait_until(lambda: request(server, "GET", "/health")[0] == 200)


def test_who_came_in_time_is_served_however_many_come_after(tiny_model, tiny_tokenizer, monkeypatch):
    with running(tiny_model, tiny_tokenizer) as server:
        with contextlib.ExitStack() as stack:
            connect = lambda: stack.enter_context(socket.create_connection(server.server_address[:2], timeout=20))
            n_threads = threading.active_count()
            monkeypatch.setattr(serve.server, "MAX_CONNECTIONS", n_threads + 2)
            connections = []
            for n in range(1, 6):
                connections.append(connect())
                wait_until(lambda: threading.active_count() == n_threads + n)
                time.sleep(0.05)        # for the thread to look around
            statuses = []
            for connection in connections:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                statuses.append(connection.recv(4096).split()[1])
        assert statuses == [b"200", b"200", b"503", b"503", b"503"]


def test_far_too_many_connections_are_closed(tiny_model, tiny_tokenizer, monkeypatch):
    with running(tiny_model, tiny_tokenizer) as server:
        monkeypatch.setattr(serve.server, "MAX_CONNECTIONS", 0)
        assert raw(server, b"") == b""


def test_the_page_may_talk_to_this_server_alone(server):
    status, page, headers = request(server, "GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    for word in (b"http://", b"https://", b"innerHTML", b"@import", b"url("):
        assert word not in page.replace(b"https only", b""), word


def test_the_log_has_no_prompts(tiny_model, tiny_tokenizer, capfd):
    with running(tiny_model, tiny_tokenizer) as server:
        text_of(server, [user("a very private question")])
        request(server, "GET", "/secret?token=abc")
        request(server, "GET", "/x\u001b[31m".replace("\u001b", "%1b"))
        raw(server, b"GET /\x1b]0;title\x07 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    err = capfd.readouterr().err
    assert "POST /v1/chat/completions 200" in err and "16 tokens" in err
    assert "private" not in err and "abc" not in err and "\x1b" not in err
    with running(tiny_model, tiny_tokenizer, verbose=True) as server:
        text = text_of(server, [user("a less private question")])
    err = capfd.readouterr().err
    assert "a less private question" in err and text.split()[0] in err


# ---------------------------------------------------------------------------------------------------
# Start and end


def start_process(**environment) -> tuple[Fork, str]:
    process = Fork("sample.py", "--model", TINY_MODEL, "--serve", "--port", "0", **environment)
    printed = Path(process.output.name, "stdout")
    wait_until(lambda: printed.read_text().endswith("\n"), seconds=60)
    return process, printed.read_text().strip()


def post_process(connection: http.client.HTTPConnection, key: str, **fields) -> http.client.HTTPResponse:
    body = json.dumps({"messages": [user("Who?")]} | fields)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
    return connection.getresponse()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_running_answer(number):
    """Also that the key is read from the environment, where other users of the machine cannot see it."""
    process, url = start_process(API_KEY="k")
    try:
        assert url.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        assert post_process(connection, "wrong").status == 401
        response = post_process(connection, "k", stream=True, max_tokens=400, stream_options={"include_usage": True})
        response.read(1)
        os.kill(process.pid, number)
        began = time.monotonic()
        chunks = events(b"d" + response.read())
        assert chunks[-1]["usage"]["completion_tokens"] == 400
        assert process.wait(20) == 0 and time.monotonic() - began < 10
        assert "Traceback" not in process.communicate()[1]
    finally:
        process.kill()


def test_the_end_does_not_wait_for_an_endless_answer(tiny_model, tiny_tokenizer, monkeypatch):
    """The process ends after `stop`, and the answer with it. Whoever waits for a turn hears of it."""
    monkeypatch.setattr(serve.server, "STOP_SECONDS", 0.3)
    with running(tiny_model, tiny_tokenizer) as server:
        handle = tiny_model.llm.register_forward_hook(lambda *_: time.sleep(0.02))
        connection = start_long_answer(server)
        waiting = start_long_answer(server, "Next?", stream=False)
        wait_until(lambda: len(server.line) == 2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 3
        assert waiting.recv(4096).startswith(b"HTTP/1.1 503")
        connection.close()
        wait_until(lambda: not server.line)
        handle.remove()


# ---------------------------------------------------------------------------------------------------
# Other programs


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="the openai client is not installed")
def test_the_official_client(tiny_model, tiny_tokenizer):
    import openai
    with running(tiny_model, tiny_tokenizer, key="k") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        assert [card.id for card in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        messages = [user("What is this?", PHOTO)]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
        assert whole.choices[0].message.content == GOLDEN_ANSWER and whole.usage.completion_tokens == 24
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, stream=True,
                                                     stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == GOLDEN_ANSWER and chunks[-1].usage.completion_tokens == 24
        more = {"model": "tiny", "messages": messages, "max_tokens": 3, "logprobs": True, "top_logprobs": 5}
        tokens = client.chat.completions.create(**more).choices[0].logprobs.content
        assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob and len(tokens[2].top_logprobs) == 5
        chunks = client.chat.completions.create(**more, stream=True)
        in_chunks = [token.token for chunk in chunks for token in chunk.choices[0].logprobs.content]
        assert in_chunks == [token.token for token in tokens]
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=messages, temperature=3)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x").models.list()


def test_the_judge_of_the_benchmarks_can_be_this_server(server):
    """eval.py's client for --judge-url speaks the same format."""
    options = Namespace(judge_url=f"{server.url}/v1", judge_model="tiny", judge_timeout=60)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert ask_judge(options, messages, 0.0, 5) == text_of(server, messages, max_tokens=5)
