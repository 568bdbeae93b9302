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
import ipaddress
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
from bisect import bisect_left
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import unquote

import torch
from tokenizers import Tokenizer

from lib.chat import Clock, answer, describe_logprobs, encode_chat, open_image
from lib.common import visible
from lib.device import use_device
from serve import api
from serve.api import Reply, Request, RequestError

MAX_BODY = 25_000_000               # bytes; base64 makes a picture a third larger than its file
MAX_CONNECTIONS = 64                # at a time: threads, of which two are the server's own; the next ones hear 503
MAX_REFUSED = 64                    # at a time, in threads of their own; even more are closed at once
MAX_WAITING = 32                    # questions; the next one is told to come back later
HEADER_SECONDS = 10                 # for a request's head to arrive
BODY_SECONDS = 60                   # and for its body
SEND_SECONDS = 30                   # for a client to take what it is sent
STOP_SECONDS = 8                    # for the running answer after Ctrl-C
PAGE = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
HEADERS = {"Connection": "close", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}}


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None                 # a name


def content_policy() -> str:
    """The page may run the one script and the one style sheet in it, and may talk to this server only."""
    script, style = (base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1].encode())
                                      .digest()).decode() for tag in ("script", "style"))
    return (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


POLICY = content_policy()


class TimedReader(io.RawIOBase):
    """Reads a socket until a deadline. A socket's own timeout starts anew with every byte that a slow client sends."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.deadline = time.monotonic() + seconds

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
        if key is not None and not key.strip():
            raise ValueError("--api-key is empty: give a long random word, for example from `openssl rand -hex 16`")
        address = ip_address(host)
        if key is None and host != "localhost" and not (address and address.is_loopback):
            raise ValueError(f"--host {host} opens the model to other machines: it needs --api-key KEY, or API_KEY in "
                             "the environment, where `ps` does not show it")
        self.host = host
        self.key = key and key.strip()
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
        self.model = session.model
        self.tok = tok
        self.name = name
        self.sampling = sampling
        self.card = api.model_card(name, session.model.config.llm.block_size, int(time.time()))
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

    def process_request(self, request: socket.socket, client_address) -> None:
        """In place of socketserver's, which starts any number of threads."""
        if threading.active_count() <= MAX_CONNECTIONS + MAX_REFUSED:
            super().process_request(request, client_address)
        else:
            request.close()

    @contextlib.contextmanager
    def turn(self, check_client: Callable[[], None]) -> Iterator[None]:
        """Wait for the model. Questions take turns in the order in which they came; a client that leaves gives up its
        place. RequestError: too many wait already, or the server stops."""
        place = object()
        with self.changed:
            if len(self.line) > MAX_WAITING:
                raise RequestError(429, f"{MAX_WAITING} questions are waiting already: try again later")
            self.line.append(place)
        try:
            with self.changed:
                while self.line[0] is not place and not self.stopping:
                    check_client()
                    self.changed.wait(0.5)
                if self.stopping:
                    raise RequestError(503, "the server is about to stop")
            yield
        finally:
            with self.changed:
                self.line.remove(place)
                self.changed.notify_all()

    def prepare(self, request: Request) -> tuple[torch.Tensor, int]:
        """-> the pictures (N, 3, S, S), the number of tokens in the prompt. RequestError: this cannot be asked."""
        config = self.model.config
        most = config.llm.block_size // config.vision.n_patches
        code = None
        try:
            "".join(map("".join, request.turns)).encode()       # half a character, which json can spell, fails here
            if len(request.pictures) > most:    # before they are decoded
                raise ValueError(f"{len(request.pictures)} pictures, expected at most {most}")
            images = open_image([io.BytesIO(picture) for picture in request.pictures], config)
            code = "context_length_exceeded"    # the only thing that can be wrong from here on
            return images, len(encode_chat(config, self.tok, request.turns, images))
        except ValueError as e:
            raise RequestError(400, str(e), "messages", code) from None

    def answer(self, request: Request, image: torch.Tensor, clock: Clock) -> Iterator[str]:
        """The answer, piece by piece. The caller may stop at any piece; `new_logprobs` then knows of its tokens."""
        device = self.model.device
        use_device(device)                      # every new thread begins on cuda:0
        seed = secrets.randbits(63) if request.seed is None else request.seed
        generator = torch.Generator(device).manual_seed(seed)
        self.starts = []
        self.n_told = 0
        length = 0
        for [piece] in answer(self.session, self.tok, [request.turns], [image], clock, generator=generator,
                              **request.sampling):
            self.starts.append(length)          # where a token begins in the text; the last piece has none
            length += len(piece)
            yield piece

    def new_logprobs(self, end: float) -> list[dict]:
        """Logprobs of the tokens that begin before this place in the answer, and that no earlier call had."""
        n = bisect_left(self.starts, end)
        n_told, self.n_told = self.n_told, n
        return describe_logprobs(self.tok, self.session.scored[0][n_told:n])


class Handler(BaseHTTPRequestHandler):
    """One connection, one request: no second request can hide behind the body of the first."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"    # for replies to unreadable requests: the default's have no status line
    server_version = "LLaVA-Phi"
    sys_version = ""
    disable_nagle_algorithm = True          # a stream's small pieces leave at once
    raw_requestline = b""                   # these are http.server's, for replies before a request was read
    requestline = request_version = command = path = ""
    status = 0                              # of the reply; 0 until there is one
    note = ""                               # for the log

    def setup(self) -> None:
        super().setup()
        self.began = time.monotonic()
        self.reader = TimedReader(self.connection, HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.reader)

    def handle(self) -> None:
        """In place of http.server's, which would go on with the next request.

        A refused client may still be sending. To close the connection on it would reset it, and the client would never
        see why it was refused; so the rest is read and thrown away, for a while.
        """
        with contextlib.suppress(OSError):      # a client that went away is no news
            if threading.active_count() > MAX_CONNECTIONS + 1:          # this one included
                self.send_error(503, "too many connections: try again later")
            else:
                self.handle_one_request()
            if self.raw_requestline or self.status:
                self.log()
            if self.status >= 400:
                self.connection.shutdown(socket.SHUT_WR)
                self.reader.deadline = time.monotonic() + 2
                while self.rfile.read1(65536):
                    pass                        # until the client closes its side, or TimeoutError

    def check_client(self) -> None:
        """ConnectionError if the client has closed the connection. Called at every step of an answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        # Nothing else that may come on this connection is read, so it can be thrown away here.
        if readable and not self.connection.recv(4096):
            raise ConnectionError("the client left")

    # ---- who may ask what

    def do_GET(self) -> None:
        try:
            self.reply()
        except RequestError as e:
            self.send_error(e.status, str(e), param=e.param, code=e.code)
        except OSError:
            self.note += " (the client left)"
        except Exception:                   # out of memory, or a defect: it goes to the log, not to the client
            traceback.print_exc()
            self.send_error(500, "the server failed; its log says how")

    do_POST = do_HEAD = do_GET              # http.server looks for these names

    def reply(self) -> None:
        """RequestError: this may not be asked, or there is no such route."""
        card = self.server.card
        path = self.path.split("?")[0]
        if self.server.key is None:
            self.check_site()
        elif path.startswith("/v1/"):
            self.check_key()                # which the page asks its user for
        match "GET" if self.command == "HEAD" else self.command, path:
            case "GET", "/":
                self.send(200, PAGE, "text/html; charset=utf-8", {"Content-Security-Policy": POLICY})
            case "GET", "/health":
                self.send(200, json.dumps({"status": "ok"}))
            case "GET", "/v1/models":
                self.send(200, json.dumps({"object": "list", "data": [card]}))
            case "GET", _ if unquote(path) == f"/v1/models/{card['id']}":
                self.send(200, json.dumps(card))
            case "GET", _ if path.startswith("/v1/models/"):
                raise RequestError(404, f"the only model here is {card['id']}", "model", "model_not_found")
            case "POST", "/v1/chat/completions":
                self.complete()
            case _:
                raise RequestError(404, "there are only GET /, GET /health, GET /v1/models, GET /v1/models/NAME, "
                                        "POST /v1/chat/completions")

    def check_site(self) -> None:
        """Refuse requests that a foreign web page could make a browser on this machine send. A server with a key does
        without, since no such page knows the key, and so answers under every name and behind every proxy.

        Against DNS rebinding: an attacker's name that was turned to this address is still his name in the Host header,
        so apart from our own name only addresses are accepted. Against a form or a script of another site: browsers
        say in Origin where a request comes from.
        """
        host = ", ".join(self.headers.get_all("Host", [])).strip().lower()
        name = re.sub(r":\d*$", "", host)
        if name not in ("localhost", self.server.host.lower()) and not ip_address(name.strip("[]")):
            raise RequestError(403, f"Host {visible(host[:60])}: use the address that the server has printed; another "
                                    "name or a proxy needs a server that was started with --api-key")
        if self.headers.get("Origin", f"http://{host}").strip().lower() not in (f"http://{host}", f"https://{host}"):
            raise RequestError(403, "this request comes from another web site, or through a proxy, which needs a "
                                    "server that was started with --api-key")

    def check_key(self) -> None:
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        # Python reads headers as latin-1; that gives back the client's bytes. compare_digest takes as long for a key
        # that is almost right as for one that is all wrong.
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.server.key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError(401, "this server needs its API key: Authorization: Bearer KEY", None, "invalid_api_key")

    # ---- a question

    def read_body(self) -> bytes:
        """The request's body. RequestError: it is too large, of unknown length, or did not arrive."""
        length = ", ".join(self.headers.get_all("Content-Length", [])).strip()
        encoding = ", ".join(self.headers.get_all("Transfer-Encoding", [])).strip().lower()
        if not re.fullmatch("[0-9]{1,20};|;chunked", f"{length};{encoding}"):
            raise RequestError(411, "expected either one Content-Length with a number, or Transfer-Encoding: chunked")
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
        return bytes(body)

    def chunk_sizes(self) -> Iterator[int]:
        """A chunked body, as .NET and some proxies send it: each piece has its length in front, the last one none."""
        while True:
            line = self.rfile.readline(1000)
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}[ \t]*(;[^\n]*)?\r\n", line):
                raise RequestError(400, f"the chunked body has {line[:20]} where the length of a chunk was expected")
            if not (size := int(re.match(rb"\w+", line)[0], 16)):
                break
            yield size
            self.rfile.readline(2)              # the end of the line
        while self.rfile.readline(1000).strip():
            pass                                # headers behind the body, down to an empty line

    def complete(self) -> None:
        """POST /v1/chat/completions."""
        server = self.server
        request = api.read_request(self.read_body(), server.sampling)
        self.connection.settimeout(SEND_SECONDS)
        reply = Reply(server.name, request.sampling["logprobs"] is not None)
        clock = Clock()
        with server.turn(self.check_client):
            image, n_prompt = server.prepare(request)
            if request.stream:              # server-sent events: the pieces, then why the answer ended, then [DONE]
                self.send(200, None, "text/event-stream; charset=utf-8", {"X-Accel-Buffering": "no"})
                self.send_event(reply.chunk({"role": "assistant", "content": ""}, []))
            text = ""
            for piece, stopped in api.until_stop(server.answer(request, image, clock), request.stop):
                self.check_client()
                text += piece
                if request.stream and piece:
                    self.send_event(reply.chunk({"content": piece}, server.new_logprobs(len(text))))
            finish = "stop" if stopped or server.session.finish == ["stop"] else "length"
            usage = {"prompt_tokens": n_prompt, "completion_tokens": clock.steps,
                     "total_tokens": n_prompt + clock.steps}
            tokens = server.new_logprobs(len(text) if stopped else float("inf"))
            if not request.stream:
                self.send(200, json.dumps(reply.whole(text, tokens, finish, usage)))
            else:
                self.send_event(reply.chunk({}, tokens, finish))
                if request.include_usage:
                    self.send_event(reply.usage_chunk(usage))
                self.wfile.write(b"data: [DONE]\n\n")
        self.note = f"{clock.steps} {'token' if clock.steps == 1 else 'tokens'}, {finish}"
        if server.verbose:
            self.note += f", {request.turns[-1]!r}: {text!r}"

    # ---- replies

    def send(self, status: int, text: str | None, kind: str = "application/json",
             headers: dict[str, str] | None = None) -> None:
        """A whole reply; without a text only its head, which the events of a stream follow."""
        self.status = status
        self.send_response(status)
        body = (text or "").encode()
        length = {} if text is None else {"Content-Length": str(len(body))}
        for name, value in (HEADERS | {"Content-Type": kind} | length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_event(self, value: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def send_error(self, status: int, message: str | None = None, explain: str | None = None,
                   param: str | None = None, code: str | None = None) -> None:
        """http.server, whose own pages are HTML, calls this too, for requests that it cannot read."""
        error = api.error_object(status, message or "the request cannot be read", param, code)
        with contextlib.suppress(OSError):
            if self.status:                 # 200 is out already, so the error is an event of the stream
                self.send_event(error)
            else:
                self.send(status, json.dumps(error), headers=ERROR_HEADERS.get(status))

    # ---- the log: one line a request, without the question

    def log(self) -> None:
        seconds = time.monotonic() - self.began
        path = self.path.split("?")[0][:60]
        line = (f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {self.command or ''} {path} {self.status} "
                f"{seconds:.2f} s {self.note}")
        print(visible(line.strip()), file=sys.stderr, flush=True)

    def log_message(self, *args) -> None:
        """http.server's own lines would show the client's whole first line."""
