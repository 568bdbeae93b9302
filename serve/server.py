"""The page and the API that `python sample.py --serve` starts: HTTP, who may ask, start and stop.

    GET  /                       the page, serve/chat.html
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model's name
    POST /v1/chat/completions    a question, as OpenAI's clients send it

Python's own http.server reads the requests, serve/api.py knows OpenAI's json, serve/engine.py asks the model. A
connection carries one request and has a thread for it. Nothing that a client sends becomes a path of the file system
or an address to fetch.
"""
import base64
import hashlib
import hmac
import io
import ipaddress
import json
import os
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

from tokenizers import Tokenizer

from lib.common import visible
from serve import api
from serve.api import Reply, RequestError
from serve.engine import Engine, Job

MAX_BODY = 25_000_000               # bytes; base64 makes a picture a third larger than its file
MAX_CONNECTIONS = 64                # at a time, each with a thread; more are turned away
HEADER_SECONDS = 10                 # for a request's head to arrive
BODY_SECONDS = 60                   # and for its body
SEND_SECONDS = 30                   # for a client to take what it is sent
STOP_SECONDS = 8                    # for the running answer after Ctrl-C
PAGE = Path(__file__).with_name("chat.html")


def check_address(host: str, key: str | None) -> None:
    """Only this machine reaches a loopback address. Any other one needs a key. Raises ValueError."""
    if key is not None and not key.strip():
        raise ValueError("--api-key is empty: give a long random word, for example from `openssl rand -hex 16`")
    if not is_loopback(host) and key is None:
        raise ValueError(f"--host {host} opens the model to other machines: it needs --api-key KEY, or API_KEY in the "
                         "environment, where `ps` does not show it")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False                # a name


def content_policy(page: str) -> str:
    """The page may run the one script and the one style sheet in it, and may talk to this server only."""
    allowed = {}
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1)
        allowed[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


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
    """Listens, and gives each connection a thread, up to a limit."""
    daemon_threads = True
    request_queue_size = 128            # connections that the system holds until they are accepted

    def __init__(self, host: str, port: int, key: str | None, verbose: bool):
        """Takes the port; nothing is answered before `start`. Raises ValueError or OSError in one line."""
        check_address(host, key)
        self.host = host
        self.key = key and key.strip()
        self.verbose = verbose
        self.free_threads = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as e:
            raise OSError(f"--host {host} --port {port}: {e}; is another server running there?") from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)    # http.server's own asks the name service for the host's name

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}"

    def run(self, session, tok: Tokenizer, name: str, sampling: dict) -> None:
        """Answer until Ctrl-C or SIGTERM. name: the model's. sampling: as for lib.chat.answer, requests' defaults."""
        told_to_stop = threading.Event()

        def on_signal(number: int, frame) -> None:
            told_to_stop.set()
            signal.signal(number, signal.SIG_DFL)           # a second one ends the process at once

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        defaults = {"max_tokens": sampling["max_new_tokens"], "temperature": sampling["temperature"],
                    "top_p": sampling["top_p"]}
        self.start(Engine(session, tok, sampling["top_k"]), name, defaults)
        print(self.url, flush=True)
        told_to_stop.wait()
        print("stopping after the running answer; again to stop at once", file=sys.stderr, flush=True)
        self.stop()
        # Python would crash if it took itself apart under threads that still read, log, or are inside of a step.
        os._exit(0)

    def start(self, engine: Engine, name: str, defaults: dict) -> None:
        """Begin to answer, in threads of the server's own. defaults: max_tokens, temperature, top_p of requests."""
        self.engine = engine
        self.name = name
        self.defaults = defaults
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = content_policy(self.page)
        self.started = int(time.time())
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="connections", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing new, and give the running answer a few seconds to end and to reach its client."""
        self.shutdown()
        self.server_close()
        self.engine.stop(STOP_SECONDS)

    def process_request(self, request: socket.socket, client_address) -> None:
        """In place of socketserver's, which starts any number of threads."""
        if self.free_threads.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_threads.release()

    def handle_error(self, request: socket.socket, client_address) -> None:
        if not isinstance(sys.exception(), OSError):        # a client that went away is no news
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"    # for replies to unreadable requests: the default's have no status line
    disable_nagle_algorithm = True          # a stream's small pieces leave at once
    command = ""
    path = ""
    status = 0                              # of the reply; 0 until there is one
    streaming = False                       # whether the reply is a stream of events
    note = ""                               # for the log

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
        """A refused client may still be sending. To close the connection on it would reset it, and the client would
        never see why it was refused; so the rest is read and thrown away, for a while."""
        if self.status >= 400:
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.allow(2)
            for _ in range(2 * MAX_BODY // 65536):
                if not self.rfile.read1(65536):
                    break
        super().finish()

    def handle_expect_100(self) -> bool:
        """curl asks before it sends a large body. `read_body` says yes, after everything else has been checked."""
        return True

    def check_client(self) -> None:
        """ConnectionError if the client has closed the connection. Called at every step of an answer."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            # Nothing else that may come on this connection is read, so it can be thrown away here.
            left = bool(readable) and not self.connection.recv(4096)
        except ValueError:                  # closed by us
            left = True
        if left:
            raise ConnectionError("the client left")

    # ---- who may ask what

    def do_GET(self) -> None:
        try:
            reply = self.find_route()
            reply()
        except RequestError as e:
            self.send_problem(e.status, str(e), e.param, e.headers)
        except OSError:
            self.note += " (the client left)"
        except Exception:                   # out of memory, or a defect: it goes to the log, not to the client
            traceback.print_exc()
            self.send_problem(500, "the server failed; its log says how")
        self.log()

    do_POST = do_GET                        # http.server looks for these names

    def find_route(self) -> Callable[[], None]:
        """The method that replies to this request. RequestError: it may not be asked, or there is no such route."""
        self.check_host()
        routes = {
            "/": ("GET", self.send_page),
            "/health": ("GET", self.send_health),
            "/v1/models": ("GET", self.send_models),
            "/v1/chat/completions": ("POST", self.complete),
        }
        path = self.path.split("?")[0]
        if path not in routes:
            raise RequestError(404, f"there are only {', '.join(routes)}")
        method, reply = routes[path]
        if self.command != method:
            raise RequestError(405, f"{path}: use {method}", headers={"Allow": method})
        if path.startswith("/v1/"):         # the page asks its user for the key
            self.check_key()
        return reply

    def check_host(self) -> None:
        """Refuse requests that a foreign web page could make a browser on this machine send.

        Against DNS rebinding: an attacker's name that was turned to this address is still his name in the Host header,
        so apart from our own name only addresses are accepted. Against a form or a script of another site: browsers
        say in Origin where a request comes from.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1:
            raise RequestError(400, f"expected one Host header, found {len(hosts)}")
        host = hosts[0].strip().lower()
        name = re.sub(r":\d*$", "", host)
        if name not in ("localhost", self.server.host.lower()):
            try:
                ipaddress.ip_address(name.strip("[]"))
            except ValueError:
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
        """The request's body. RequestError: it is too large, of unknown length, or did not arrive."""
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

    # ---- a question

    def complete(self) -> None:
        """POST /v1/chat/completions."""
        engine = self.server.engine
        request = api.read_request(self.read_body(), self.server.defaults)
        try:
            job = engine.prepare(request)
        except ValueError as e:
            raise RequestError(400, str(e), "messages") from None
        self.connection.settimeout(SEND_SECONDS)
        reply = Reply(self.server.name)
        text = ""
        with engine.in_line(job):
            if request.stream:
                self.begin_stream(reply)
            self.wait_for_turn(job)
            for piece in engine.answer(job):
                self.note = f"{job.completion_tokens} tokens"
                self.check_client()
                text += piece
                if request.stream and piece:
                    self.send_event(reply.chunk({"content": piece}))
            self.send_end(reply, job, text)
        self.note += f", {job.finish}"
        if self.server.verbose:
            self.note += f", {request.turns[-1]!r}: {text!r}"

    def begin_stream(self, reply: Reply) -> None:
        """Answer as server-sent events: a chunk for each piece, the usage, [DONE]."""
        self.streaming = True
        self.send_head(200, "text/event-stream; charset=utf-8", {"X-Accel-Buffering": "no"})
        self.send_event(reply.chunk({"role": "assistant", "content": ""}))

    def wait_for_turn(self, job: Job) -> None:
        """Lines that begin with a colon are comments, which every client skips. Ours say how many questions are ahead:
        the page shows that, and a proxy in between sees that the connection is alive."""
        for ahead in self.server.engine.wait_for_turn(job):
            self.check_client()
            if self.streaming:
                self.wfile.write(f": ahead {ahead}\n\n".encode())
        if self.streaming:
            self.wfile.write(b": ahead 0\n\n")

    def send_end(self, reply: Reply, job: Job, text: str) -> None:
        """The last events of a stream; or all of an answer that was asked for in one piece."""
        used = api.usage(job.prompt_tokens, job.completion_tokens)
        if not self.streaming:
            self.send_json(200, reply.whole(text, job.finish, used))
            return
        for chunk in reply.last_chunks(job.finish, used, job.request.include_usage):
            self.send_event(chunk)
        self.wfile.write(b"data: [DONE]\n\n")

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

    def send_event(self, value: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def send_problem(self, status: int, message: str, param: str | None = None,
                     headers: dict[str, str] | None = None) -> None:
        error = api.error_object(status, message, param)
        try:
            if self.streaming:              # the status 200 is out already, so the error is an event
                self.send_event(error)
            else:
                self.send_json(status, error, headers)
        except OSError:
            self.note += " (the client left)"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server calls this for requests that it cannot read; its own pages are HTML."""
        self.send_problem(code, message or "the request cannot be read")
        self.log()

    # ---- the log: one line a request, without the question

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
        """http.server's own lines would show the client's whole first line."""
