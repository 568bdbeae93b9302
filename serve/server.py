"""The page and the API that `python sample.py --serve` starts: HTTP, who may ask what, how it starts and how it ends.

    GET  /                       the page, serve/chat.html
    GET  /examples               pictures to try on the page
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model's name
    POST /v1/chat/completions    a question, as OpenAI's clients send it

Python's own http.server reads the requests; serve/api.py knows OpenAI's json, serve/engine.py runs the model. A
connection carries one request and has a thread for it. Nothing that a client sends becomes a path of the file system
or an address to fetch.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import ipaddress
import json
import os
import queue
import random
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from lib.common import visible
from serve import api
from serve.api import Busy, Reply, RequestError

if TYPE_CHECKING:                   # both import torch, which takes seconds: a mistake in a flag need not wait for it
    from tokenizers import Tokenizer

    from model import LLaVAPhi
    from serve.engine import Engine, Question

MAX_BODY = 25_000_000               # bytes; base64 makes a picture a third larger than its file
MAX_CONNECTIONS = 64                # at a time, each with a thread; more are turned away
HEADER_SECONDS = 10                 # within which a request's head has to be here
BODY_SECONDS = 60                   # and its body
SEND_SECONDS = 30                   # within which a client has to take what it is sent
BEAT_SECONDS = 0.5                  # a stream says that often how it stands, while there is nothing else to say
STOP_SECONDS = 8                    # running answers may take that long after Ctrl-C
OPEN_PATHS = ("/", "/health")       # need no key; the page asks its user for it
PAGE = Path(__file__).with_name("chat.html")


def check_address(host: str, key: str | None) -> None:
    """Only this machine reaches a loopback address. Whoever opens another one has to set a key. Raises ValueError."""
    if key is not None and not key.strip():
        raise ValueError("--api-key is empty: give a long random word, for example from `openssl rand -hex 16`")
    if not is_loopback(host) and key is None:
        raise ValueError(f"--host {host} opens the model to other machines: it needs --api-key KEY, or API_KEY in the "
                         "environment, where `ps` does not show it")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False                # a name


def content_policy(page: str) -> str:
    """The page may run the one script and the one style sheet that are in it, and may talk to this server alone."""
    allowed = {}
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1)
        allowed[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def demo_examples(image_size: int) -> list[dict]:
    """If this looks like the demo's model: pictures of its kind that no training has shown it, as data: URLs."""
    from demo import shapes

    if image_size != shapes.SIZE:
        return []
    rng = random.Random(0)
    examples = []
    for _ in range(4):
        scene = shapes.draw_scene(rng, held_out=True)
        question, _ = shapes.ask(scene, scene[0], rng)
        file = io.BytesIO()
        shapes.paint(scene, rng).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        examples.append({"name": shapes.caption(scene), "question": question, "url": url})
    return examples


class TimedReader(io.RawIOBase):
    """Reads a socket until a deadline. A socket's own timeout starts anew with every byte that a slow client sends."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(seconds)
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """Listens, gives each connection a thread up to a limit, and knows how many answers are on their way."""
    daemon_threads = True
    request_queue_size = 128            # connections that the system holds until they are accepted

    def __init__(self, host: str, port: int, key: str | None, verbose: bool):
        """Takes the port; nothing is answered before `start`. Raises ValueError or OSError in one line."""
        check_address(host, key)
        self.host = host
        self.key = key and key.strip()
        self.verbose = verbose
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.n_answering = 0                        # requests between their question and the end of their reply
        self.changed = threading.Condition()        # guards it
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as e:
            raise OSError(f"--host {host} --port {port}: {e}; is another server running there?") from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)    # http.server's own asks the name service what the host is called

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}"

    def run(self, model: LLaVAPhi, tok: Tokenizer, name: str, options: dict, cuda_graph: bool = False) -> None:
        """Answer until Ctrl-C or SIGTERM. name: what the model is called; options: of `lib.chat.answer`, of which
        requests can set their own max_new_tokens, temperature and top_p."""
        from serve.engine import Engine

        told_to_stop = threading.Event()

        def on_signal(number: int, frame) -> None:
            told_to_stop.set()
            signal.signal(number, signal.SIG_DFL)           # a second one ends the process at once

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        self.start(Engine(model, tok, options["top_k"], cuda_graph), name, options)
        print(self.url, flush=True)
        told_to_stop.wait()
        print("stopping after the running answers; again to stop at once", file=sys.stderr, flush=True)
        self.stop()
        # What is left now are threads that wait for a client, or are in the middle of a step that takes long. Python
        # would crash if it took itself apart under them.
        sys.stderr.flush()
        os._exit(0)

    def start(self, engine: Engine, name: str, options: dict) -> None:
        """Begin to answer, in threads of the server's own."""
        self.engine = engine
        self.name = name
        self.defaults = {"max_tokens": options["max_new_tokens"], "temperature": options["temperature"],
                         "top_p": options["top_p"]}
        self.examples = demo_examples(engine.model.config.vision.image_size)
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = content_policy(self.page)
        self.started = int(time.time())
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="connections", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing new, let the running answers end and reach their clients, all of it within ten seconds."""
        self.shutdown()
        self.server_close()
        self.engine.stop(STOP_SECONDS)
        with self.changed:
            self.changed.wait_for(self.is_idle, timeout=1)

    def is_idle(self) -> bool:
        return self.n_answering == 0

    @contextlib.contextmanager
    def answer_on_its_way(self):
        """`stop` waits for what is inside."""
        with self.changed:
            self.n_answering += 1
        try:
            yield
        finally:
            with self.changed:
                self.n_answering -= 1
                self.changed.notify_all()

    def process_request(self, request: socket.socket, client_address) -> None:
        """In place of socketserver's, which starts any number of threads."""
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: socket.socket, client_address) -> None:
        if not isinstance(sys.exception(), OSError):        # a client that went away is no news
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"        # of a reply to what cannot be read: the default's has no status line
    disable_nagle_algorithm = True      # a stream's small pieces leave at once
    command = ""
    path = ""
    status = 0                          # of the reply, 0 as long as there is none
    note = ""                           # for the log

    # ---- the connection

    def setup(self) -> None:
        super().setup()
        self.reader = TimedReader(self.connection, HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.reader)

    def handle(self) -> None:
        """In place of http.server's, which reads further requests from the same connection. One is all that a client
        gets: no second request can hide behind the body of the first."""
        self.began = time.monotonic()
        self.handle_one_request()

    def finish(self) -> None:
        if self.status >= 400:
            self.read_the_rest()
        super().finish()

    def read_the_rest(self) -> None:
        """Throw away what a refused client is still sending, for a while. To close the connection on it would reset
        the connection, and the client would never see why it was refused."""
        self.connection.shutdown(socket.SHUT_WR)
        self.reader.allow(2)
        for _ in range(2 * MAX_BODY // 65536):
            if not self.rfile.read1(65536):
                return

    def handle_expect_100(self) -> bool:
        """curl asks before it sends a large body. `read_body` says yes, after everything else has been checked."""
        return True

    def client_left(self) -> bool:
        """Whether the client has closed the connection. The model's thread asks at every step."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            # Whatever else may come on this connection is not read, so it can be thrown away here.
            return bool(readable) and not self.connection.recv(4096)
        except (OSError, ValueError):   # reset by the client; ValueError: closed by us
            return True

    # ---- who may ask what

    def do_GET(self) -> None:
        try:
            reply = self.find_route()
            reply()
        except RequestError as e:
            self.send_problem(e.status, str(e), e.param, e.headers)
        except OSError:
            self.note = "the client left"
        except Exception:               # a defect of ours: it goes to the log, not to the client
            traceback.print_exc()
            if not self.status:
                self.send_problem(500, "a defect of the server; its log says more")
        self.log()

    do_POST = do_GET                    # http.server looks for these names

    def find_route(self) -> Callable[[], None]:
        """The method that replies to this request. RequestError: it may not be asked, or there is no such thing."""
        self.check_host()
        routes = {
            "/": ("GET", self.send_page),
            "/health": ("GET", self.send_health),
            "/examples": ("GET", self.send_examples),
            "/v1/models": ("GET", self.send_models),
            "/v1/chat/completions": ("POST", self.complete),
        }
        path = self.path.split("?")[0]
        if path not in routes:
            raise RequestError(404, f"there are only {', '.join(routes)}")
        method, reply = routes[path]
        if self.command != method:
            raise RequestError(405, f"{path}: use {method}", headers={"Allow": method})
        if path not in OPEN_PATHS:
            self.check_key()
        return reply

    def check_host(self) -> None:
        """Refuse what a foreign web page could make a browser on this machine send.

        Against DNS rebinding: an attacker's name that was turned to this address is still his name in the Host header,
        so apart from our own name only addresses are accepted. Against a form or a script of another site: browsers
        say in Origin where a request comes from.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1:
            raise RequestError(400, f"expected one Host header, found {len(hosts)}")
        host = hosts[0].strip().lower()
        name = re.sub(r":\d*$", "", host)
        is_ours = name in ("localhost", self.server.host.lower())
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            if not is_ours:
                raise RequestError(403, f"Host {visible(host[:60])}: use the address that the server has printed, or "
                                        "start it with that --host") from None
        origin = self.headers.get("Origin")
        if origin is not None and origin.strip().lower() not in (f"http://{host}", f"https://{host}"):
            raise RequestError(403, "this request comes from another web site")

    def check_key(self) -> None:
        if self.server.key is None:
            return
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        # Python reads headers as latin-1; that gives back the client's bytes. compare_digest takes as long for a key
        # that is almost right as for one that is all wrong.
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.server.key.encode())
        if scheme.lower() != "bearer" or not is_right:
            message = "wrong API key" if key else "this server needs its API key: Authorization: Bearer KEY"
            raise RequestError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def read_body(self) -> bytes:
        """The request's body. Raises RequestError; TimeoutError, if it does not come."""
        if "Transfer-Encoding" in self.headers:
            raise RequestError(411, "Transfer-Encoding is not supported: send the body with a Content-Length")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,20}", lengths[0].strip()):
            raise RequestError(411 if not lengths else 400, "expected one Content-Length header with a number")
        length = int(lengths[0])
        if length > MAX_BODY:
            raise RequestError(413, f"the request has {length:,} bytes, expected at most {MAX_BODY:,}: "
                                    "send a smaller picture")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self.reader.allow(BODY_SECONDS)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise RequestError(408, f"the request's body did not come within {BODY_SECONDS} seconds") from None
        if len(body) < length:
            raise RequestError(400, f"the connection ended after {len(body):,} of {length:,} bytes")
        return body

    # ---- the small routes

    def send_page(self) -> None:
        self.send_body(200, self.server.page.encode(), "text/html; charset=utf-8",
                       {"Content-Security-Policy": self.server.policy})

    def send_health(self) -> None:
        self.send_json(200, {"status": "ok"})

    def send_models(self) -> None:
        block_size = self.server.engine.model.config.llm.block_size
        self.send_json(200, api.model_list(self.server.name, block_size, self.server.started))

    def send_examples(self) -> None:
        self.send_json(200, {"examples": self.server.examples})

    # ---- a question

    def complete(self) -> None:
        """POST /v1/chat/completions."""
        engine = self.server.engine
        request = api.read_request(self.read_body(), self.server.defaults)
        self.connection.settimeout(SEND_SECONDS)
        with self.server.answer_on_its_way():
            try:
                question = engine.ask(request, self.client_left)
            except Busy as e:
                raise RequestError(503 if engine.stopping else 429, str(e), headers={"Retry-After": "5"}) from None
            except ValueError as e:
                raise RequestError(400, str(e), "messages") from None
            try:
                send = self.stream if request.stream else self.send_whole
                text = send(Reply(self.server.name), question)
            finally:
                question.end("left")        # where sending has failed; does nothing to an answer that is complete
        self.note = f"{question.completion_tokens} tokens, {question.finish}"
        if self.server.verbose:
            self.note += f", {request.turns[-1]!r}: {text!r}"

    def send_whole(self, reply: Reply, question: Question) -> str:
        """Collect the answer and send it in one piece. -> its text"""
        text = ""
        while (piece := question.pieces.get()) is not None:
            text += piece
        if question.finish == "error":
            raise RequestError(503 if self.server.engine.stopping else 500, question.error)
        if question.finish == "left":
            raise ConnectionError("the client left")
        used = api.usage(question.prompt_tokens, question.completion_tokens)
        self.send_json(200, reply.whole(text, question.finish, used))
        return text

    def stream(self, reply: Reply, question: Question) -> str:
        """Send the answer as it comes, as server-sent events: a chunk for each piece, the usage, [DONE]. -> its text

        Lines that begin with a colon are comments, which every client skips. Ours say how many questions are still
        ahead; the page shows that, and a proxy in between sees that the connection is alive.
        """
        self.send_head(200, "text/event-stream; charset=utf-8", {"X-Accel-Buffering": "no"})
        self.send_event(reply.chunk({"role": "assistant", "content": ""}))
        text = ""
        while True:
            try:
                piece = question.pieces.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                self.wfile.write(f": ahead {self.server.engine.ahead_of(question)}\n\n".encode())
                continue
            if piece is None:
                break
            text += piece
            self.send_event(reply.chunk({"content": piece}))
        if question.finish == "error":      # the status 200 is out already, so the error is an event
            self.send_event(api.error_object(500, question.error))
            return text
        if question.finish == "left":
            raise ConnectionError("the client left")
        used = api.usage(question.prompt_tokens, question.completion_tokens)
        for chunk in reply.last_chunks(question.finish, used, question.request.include_usage):
            self.send_event(chunk)
        self.wfile.write(b"data: [DONE]\n\n")
        return text

    def send_event(self, chunk: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    # ---- replies

    def send_head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        common = {"Content-Type": kind, "Connection": "close", "Cache-Control": "no-store",
                  "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                  "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in (common | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_head(status, kind, {"Content-Length": str(len(body))} | headers)
        self.wfile.write(body)

    def send_json(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        self.send_body(status, json.dumps(value).encode(), "application/json", headers or {})

    def send_problem(self, status: int, message: str, param: str | None = None,
                     headers: dict[str, str] | None = None) -> None:
        try:
            self.send_json(status, api.error_object(status, message, param), headers)
        except OSError:
            self.note = "the client left"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server calls this for requests that it cannot read; its own pages are HTML."""
        self.send_problem(code, message or "the request cannot be read")
        self.log()

    # ---- the log: one line a request, without what was asked

    def log(self) -> None:
        seconds = time.monotonic() - self.began
        path = self.path.split("?")[0][:60]
        who = f"{time.strftime('%H:%M:%S')} {self.client_address[0]}"
        line = f"{who} {self.command} {path} {self.status} {seconds:.2f} s {self.note}"
        print(visible(line.strip()), file=sys.stderr, flush=True)

    def version_string(self) -> str:
        """For the Server header, in place of Python's version."""
        return "LLaVA-Phi"

    def log_message(self, *args) -> None:
        """http.server's own lines would show all that a client puts into its first line."""
