"""The page and the API that `python sample.py --serve` starts: HTTP, who may ask, start and stop.

    GET  /                       the page, serve/chat.html
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model's name; /v1/models/NAME says the same of that one
    POST /v1/chat/completions    a question, as OpenAI's clients send it

Python's own http.server reads the requests, serve/api.py knows OpenAI's json, lib/chat.py asks the model, one question
at a time. A connection carries one request and has a thread for it. Nothing that a client sends becomes a path of the
file system or an address to fetch.
"""
import base64
import contextlib
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import unquote

import torch
from tokenizers import Tokenizer

from lib.chat import Clock, answer, describe_logprobs, encode_chat, open_image
from lib.common import plural, visible
from serve.api import Request, RequestError, read_request, until_stop

MAX_BODY = 25_000_000               # bytes; base64 makes a picture a third larger than its file
MAX_CONNECTIONS = 64                # threads, of which two are the server's own; as many again hear 503
MAX_WAITING = 32                    # questions; the next one is told to come back later
HEADER_SECONDS = 10                 # for a request's head to arrive
BODY_SECONDS = 60                   # and for its body
SEND_SECONDS = 30                   # for a client to take what it is sent
REFUSED_SECONDS = 2                 # for a refused client to stop sending
STOP_SECONDS = 8                    # for the running answer after Ctrl-C
LOOPBACK = r"localhost|127(\.[0-9]+){3}|::1"
PAGE = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
PAGE_CHECKSUMS = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                  for text in re.findall(r"(?s)<(?:style|script)>(.*?)</", PAGE)]
HEADERS = {
    "Connection": "close", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
    "X-Accel-Buffering": "no",      # nginx passes on a stream's pieces as they come
    # The page may use the one style sheet and the one script in it, and may talk to this server only.
    "Content-Security-Policy": "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
                               .format(*PAGE_CHECKSUMS),
}
ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class TimedReader(io.RawIOBase):
    """Reads a socket until a deadline. A socket's own timeout starts anew with every byte that a slow client sends."""
    connection: socket.socket
    deadline: float                 # of time.monotonic

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError              # also for a client that sends without a pause
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Server(ThreadingTCPServer):
    """Listens, gives each connection a thread, and lets one of them at a time use the model."""
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128            # connections that the system holds until they are accepted

    def __init__(self, host: str, port: int, key: str | None, verbose: bool):
        """Takes the port; nothing is answered before `start`. Raises ValueError or OSError in one line."""
        self.host = host
        self.key = key and key.strip()
        if not self.key and (key is not None or not re.fullmatch(LOOPBACK, host)):
            found = f"--host {host} opens the model to other machines" if key is None else "--api-key is empty"
            raise ValueError(f"{found}: give a long random word, for example from `openssl rand -hex 16`, as --api-key "
                             "or as API_KEY in the environment, where `ps` does not show it")
        self.verbose = verbose
        self.changed = threading.Condition()    # guards `line` and `stopping`
        self.line: list[object] = []            # questions; the first one is being answered
        self.stopping = False                   # whoever still waits is refused
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as e:
            raise OSError(f"--host {host} --port {port}: {e}; is another server running there?") from None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}"

    def run(self, session, tok: Tokenizer, name: str, sampling: dict) -> None:
        """Answer until Ctrl-C or SIGTERM. name: the model's. sampling: of lib.chat.answer, where a request has none."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
        self.start(session, tok, name, sampling)
        print(self.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("stopping after the running answer; again to stop at once", file=sys.stderr, flush=True)
        self.stop()
        # Python would crash if it took itself apart under threads that still read, log, or are inside of a step.
        os._exit(0)

    def start(self, session, tok: Tokenizer, name: str, sampling: dict) -> None:
        """Begin to answer, in threads of the server's own."""
        self.session = session              # its KV cache makes the next turn of a conversation cheap
        self.tok = tok
        self.name = name
        self.sampling = sampling
        # max_model_len is vLLM's name for how many positions a prompt and its answer may take together.
        card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local",
                "max_model_len": session.model.config.llm.block_size}
        self.pages = {"/": PAGE, "/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [card]},
                      f"/v1/models/{name}": card}
        self.max_pictures = session.model.config.llm.block_size // session.model.config.vision.n_patches
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="connections", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing new, refuse who waits, and give the running answer a few seconds to reach its client."""
        self.shutdown()
        self.server_close()
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.line, STOP_SECONDS)

    def verify_request(self, request: socket.socket, client_address) -> bool:
        """Whether a connection gets a thread; socketserver, which starts any number of them, closes it if not."""
        return threading.active_count() < 2 * MAX_CONNECTIONS

    def ask(self, request: Request, clock: Clock) -> tuple[Iterator[str], int]:
        """-> the answer, piece by piece, and the number of tokens in the prompt. RequestError: this cannot be asked."""
        model = self.session.model
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)     # every new thread begins on cuda:0
        generator = torch.Generator(model.device)
        generator.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        code = None
        try:
            images = open_image([io.BytesIO(picture) for picture in request.pictures], model.config)
            code = "context_length_exceeded"    # the only thing that can be wrong from here on
            prompt = encode_chat(model.config, self.tok, request.turns, images)
        except ValueError as e:
            raise RequestError(400, str(e), "messages", code) from None
        columns = answer(self.session, self.tok, [request.turns], [images], clock, generator=generator,
                         **request.sampling)
        return (piece for [piece] in columns), len(prompt)


class Handler(BaseHTTPRequestHandler):
    """One connection, one request: no second request can hide behind the body of the first."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"    # for replies to unreadable requests: the default's have no status line
    disable_nagle_algorithm = True          # a stream's small pieces leave at once
    raw_requestline = b""                   # http.server's, where no request came
    path = ""                               # and where it cannot be read
    status = 0                              # of the reply; 0 until there is one
    note = ""                               # for the log

    def handle(self) -> None:
        """In place of http.server's, which would go on with the next request.

        A refused client may still be sending. To close the connection on it would reset it, and the client would never
        see why it was refused; so the rest is read and thrown away, for a while.
        """
        self.began = time.monotonic()
        self.is_one_too_many = threading.active_count() > MAX_CONNECTIONS       # this one included
        self.reader = TimedReader(self.connection, self.began + HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.reader)
        with contextlib.suppress(OSError):      # a client that went away is no news
            self.handle_one_request()
            if self.raw_requestline:
                self.log()
            if self.status >= 400:
                self.connection.shutdown(socket.SHUT_WR)
                self.reader.deadline = time.monotonic() + REFUSED_SECONDS
                while self.rfile.read1(65536):
                    pass                        # until the client closes its side, or TimeoutError

    def log(self) -> None:
        """One line a request, without the question."""
        path = self.path.split("?")[0][:60]
        line = (f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {self.command or ''} {path} {self.status} "
                f"{time.monotonic() - self.began:.2f} s {self.note}")
        print(visible(line.strip()), file=sys.stderr, flush=True)

    def log_message(self, *args) -> None:
        """Nothing of http.server's own: browsers open connections that they do not use."""

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        try:
            problem = self.find_problem(path)
            if problem:
                raise problem
            if self.command == "POST":
                self.complete()
            else:
                self.send(200, self.server.pages[path])
        except RequestError as e:
            self.send_error(e.status, e.message, param=e.param, code=e.code)
        except OSError:
            self.note += " (the client left)"
        except Exception:                   # out of memory, or a defect: it goes to the log, not to the client
            traceback.print_exc()
            self.send_error(500, "the server failed; its log says how")

    do_POST = do_HEAD = do_GET              # http.server looks for these names

    def find_problem(self, path: str) -> RequestError | None:
        """Why this request is refused before its body is read, None if it is not."""
        is_question = self.command == "POST" and path == "/v1/chat/completions"
        is_page = self.command != "POST" and path in self.server.pages
        lengths = [", ".join(self.headers.get_all(name, [])).strip()
                   for name in ("Content-Length", "Transfer-Encoding")]
        if self.is_one_too_many:
            return RequestError(503, "too many connections: try again later")
        if problem := self.sender_problem(path):
            return problem
        if not is_question and not is_page:
            known = ", ".join(f"GET {page}" for page in self.server.pages)
            about_model = ("model", "model_not_found") if path.startswith("/v1/models/") else ()
            return RequestError(404, f"there are only {known}, POST /v1/chat/completions", *about_model)
        if is_question and not re.fullmatch("(?i)[0-9]{1,20};|;chunked", ";".join(lengths)):
            return RequestError(411, "expected either one Content-Length with a number, or Transfer-Encoding: chunked")
        return None

    def sender_problem(self, path: str) -> RequestError | None:
        """Why the sender of this request gets no answer, None if nothing speaks against it.

        Without a key, a foreign web page could make a browser on this machine send requests. Against DNS rebinding: an
        attacker's name that was turned to this address is still his name in the Host header, so apart from our own name
        only addresses are accepted. Against a form or a script of another site: browsers say in Origin where a request
        comes from. No such page knows a key, so a server that has one answers under every name and behind every proxy.
        """
        key = self.server.key
        if key is None:
            host = ", ".join(self.headers.get_all("Host", [])).strip()
            own_name = re.escape(self.server.host)
            if not re.fullmatch(rf"(?i)(localhost|{own_name}|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]*)?", host):
                return RequestError(403, f"Host {visible(host[:60])}: use the address that the server has printed; "
                                         "another name or a proxy needs a server that was started with --api-key")
            origin = self.headers.get("Origin", f"http://{host}").strip()
            if not re.fullmatch(f"(?i)https?://{re.escape(host)}", origin):
                return RequestError(403, "this request comes from another web site, or through a proxy, which needs a "
                                         "server that was started with --api-key")
        elif path.startswith("/v1/"):           # the page itself asks its user for the key
            scheme, _, word = self.headers.get("Authorization", "").partition(" ")
            # Python reads headers as latin-1; that gives back the client's bytes. compare_digest takes as long for a
            # key that is almost right as for one that is all wrong.
            is_right = hmac.compare_digest(word.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not is_right:
                return RequestError(401, "this server needs its API key: Authorization: Bearer KEY", None,
                                    "invalid_api_key")
        return None

    # ---- a question

    def read_body(self) -> bytearray:
        """The request's body. RequestError: it is too large, or did not arrive."""
        length = self.headers.get("Content-Length")
        self.reader.deadline = time.monotonic() + BODY_SECONDS
        body = bytearray()
        try:
            for size in [int(length)] if length else self.chunk_sizes():
                if len(body) + size > MAX_BODY:
                    raise RequestError(413, f"the request has more than {MAX_BODY:,} bytes: send a smaller picture")
                piece = self.rfile.read(size)
                if len(piece) < size:
                    raise TimeoutError          # the client has left, or will send no more
                body += piece
        except TimeoutError:
            raise RequestError(408, f"the request's {length or 'announced'} bytes did not all arrive within "
                                    f"{BODY_SECONDS} seconds") from None
        return body

    def chunk_sizes(self) -> Iterator[int]:
        """A chunked body, as .NET and some proxies send it: each piece has its length in front, the last one none."""
        while True:
            line = self.rfile.readline(1000)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\n]*)?\r\n", line)
            if not match:
                raise RequestError(400, f"the chunked body has {line[:20]} where the length of a chunk was expected")
            if not (size := int(match[1], 16)):
                break
            yield size
            self.rfile.readline(2)              # the end of the line
        while self.rfile.readline(1000).strip():
            pass                                # headers behind the body, down to an empty line

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the model. Questions take turns in the order in which they came; a client that leaves gives up its
        place. RequestError: too many wait already, or the server stops."""
        server = self.server
        place = object()
        with server.changed:
            if len(server.line) > MAX_WAITING:
                raise RequestError(429, f"{MAX_WAITING} questions are waiting already: try again later")
            server.line.append(place)
        try:
            with server.changed:
                while server.line[0] is not place and not server.stopping:
                    self.check_client()
                    server.changed.wait(0.5)
                if server.stopping:
                    raise RequestError(503, "the server is about to stop")
            yield
        finally:
            with server.changed:
                server.line.remove(place)
                server.changed.notify_all()

    def complete(self) -> None:
        """POST /v1/chat/completions."""
        server = self.server
        request = read_request(self.read_body(), server.sampling, server.max_pictures)
        self.connection.settimeout(SEND_SECONDS)
        clock = Clock()
        reply = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": server.name,
                 "object": "chat.completion.chunk" if request.stream else "chat.completion"}
        with self.turn():
            pieces, n_prompt = server.ask(request, clock)
            if request.stream:              # server-sent events: the pieces, then why the answer ended, then [DONE]
                self.send(200, None)
                self.send_event(reply | {"choices": [request.choice({"role": "assistant", "content": ""}, [])]})
            text = ""
            tokens = []
            for piece, n_tokens, stopped in until_stop(pieces, request.stop):
                self.check_client()
                new_tokens = describe_logprobs(server.tok, server.session.scored[0][len(tokens):n_tokens])
                text += piece
                tokens += new_tokens
                if request.stream and (piece or new_tokens):
                    self.send_event(reply | {"choices": [request.choice({"content": piece}, new_tokens)]})
            finish = "stop" if stopped or server.session.finish == ["stop"] else "length"
            usage = {"prompt_tokens": n_prompt, "completion_tokens": clock.steps,
                     "total_tokens": n_prompt + clock.steps}
            if not request.stream:
                choice = request.choice({"role": "assistant", "content": text}, tokens, finish)
                self.send(200, reply | {"choices": [choice], "usage": usage})
            else:
                self.send_event(reply | {"choices": [request.choice({}, [], finish)]})
                if request.include_usage:
                    self.send_event(reply | {"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")
        self.note = f"{plural(clock.steps, 'token')}, {finish}"
        if server.verbose:
            self.note += f", {request.turns[-1]!r}: {text!r}"

    def check_client(self) -> None:
        """ConnectionError if the client has closed the connection. Called at every step of an answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        # Nothing else that may come on this connection is read, so it can be thrown away here.
        if readable and not self.connection.recv(4096):
            raise ConnectionError("the client left")

    # ---- replies

    def send(self, status: int, content: dict | str | None) -> None:
        """A whole reply, json or the page; None: only the head of a stream, which its events follow."""
        self.status = status
        self.send_response_only(status)         # without the versions of Python and http.server
        headers = HEADERS | ERROR_HEADERS.get(status, {}) | {"Date": self.date_time_string()}
        if content is None:
            headers["Content-Type"] = "text/event-stream; charset=utf-8"
            body = b""
        else:
            headers["Content-Type"] = "text/html; charset=utf-8" if isinstance(content, str) else "application/json"
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            headers["Content-Length"] = len(body)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_event(self, value: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def send_error(self, status: int, message: str | None = None, explain: str | None = None,
                   param: str | None = None, code: str | None = None) -> None:
        """http.server, whose own pages are HTML, calls this too, for requests that it cannot read."""
        kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": message or "the request cannot be read", "type": kind, "param": param, "code": code}
        with contextlib.suppress(OSError):
            if self.status:                 # 200 is out already, so the error is an event of the stream
                self.send_event({"error": error})
            else:
                self.send(status, {"error": error})
