"""One model, one question at a time: the line in which questions wait, and the session that answers them.

It knows nothing of HTTP or json. Each question is asked by the thread of its connection. Threads take turns in the
order in which they came, and the session's KV cache makes the next turn of the same conversation cheap.
"""
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lib.chat import Clock, answer, encode_chat, open_image
from lib.common import use_device
from serve.api import Request, RequestError, StopStrings

MAX_WAITING = 32                # questions in the line; the next one is told to come back later
BEAT_SECONDS = 0.5              # how often a waiting question learns its place
LATER = {"Retry-After": "5"}    # seconds


@dataclass(eq=False)
class Job:
    """A question in the line, and the facts about its answer."""
    request: Request
    image: Tensor               # (0 or 1, 3, S, S) uint8
    prompt_tokens: int
    completion_tokens: int = 0
    finish: str = ""            # "stop" or "length" when the answer is complete


class Engine:
    """The line, and the session (lib.generate.Session) that answers its first question."""

    def __init__(self, session, tok: Tokenizer, top_k: int = 0):
        self.session = session
        self.model = session.model
        self.tok = tok
        self.top_k = top_k                      # no field of OpenAI's, so it is the same for all requests
        self.decoding = threading.Lock()        # a large picture takes 300 MB while it is decoded: one at a time
        self.changed = threading.Condition()    # guards what follows
        self.line: list[Job] = []               # the first one is being answered
        self.stopping = False                   # whoever still waits is refused
        self.cut = False                        # even the running answer ends now

    def prepare(self, request: Request) -> Job:
        """Decode the picture and count the prompt's tokens. ValueError: this cannot be asked."""
        config = self.model.config
        with self.decoding:
            image = open_image(None if request.picture is None else io.BytesIO(request.picture), config)
        request.picture = None                  # up to 18 MB that need not wait in the line
        "".join(request.turns).encode()         # half a character, which json can spell, raises a ValueError here
        n_prompt = len(encode_chat(config, self.tok, request.turns, image))
        if n_prompt >= config.llm.block_size:
            raise ValueError(f"the conversation takes {n_prompt} of the model's {config.llm.block_size} positions, "
                             "which leaves none for an answer: start a new one")
        return Job(request, image, n_prompt)

    @contextlib.contextmanager
    def in_line(self, job: Job) -> Iterator[None]:
        """Hold a place in the line, at its end first. RequestError: the line is full or closed."""
        with self.changed:
            if self.stopping:
                raise RequestError(503, "the server is about to stop", headers=LATER)
            if len(self.line) > MAX_WAITING:
                raise RequestError(429, f"{MAX_WAITING} questions are waiting already: try again later",
                                   headers=LATER)
            self.line.append(job)
        try:
            yield
        finally:
            with self.changed:
                self.line.remove(job)
                self.changed.notify_all()

    def wait_for_turn(self, job: Job) -> Iterator[int]:
        """Until it is this job's turn, yield how many are ahead of it, at once and then with every beat."""
        while (ahead := self.line.index(job)) > 0 and not self.stopping:
            yield ahead
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.line[0] is job, BEAT_SECONDS)
        if self.stopping:
            raise RequestError(503, "the server is about to stop", headers=LATER)

    def answer(self, job: Job) -> Iterator[str]:
        """Write the answer of the job whose turn it is, piece by piece. The caller may stop at any piece."""
        use_device(self.model.device)           # every new thread begins on cuda:0
        request = job.request
        generator = torch.Generator(self.model.device)
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        clock = Clock()
        stops = StopStrings(request.stop)
        steps = answer(self.session, self.tok, [request.turns], [job.image], clock, max_new_tokens=request.max_tokens,
                       temperature=request.temperature, top_k=self.top_k, top_p=request.top_p, generator=generator)
        for [piece] in steps:
            job.completion_tokens = clock.steps
            if self.cut:
                raise RequestError(503, "the server was stopped", headers=LATER)
            yield stops.add(piece)
            if stops.found:
                job.finish = "stop"
                return
        yield stops.held                        # no more text will come, so what was held is not a stop string
        job.finish = "stop" if self.session.finish == ["stop"] else "length"

    def stop(self, seconds: float) -> None:
        """Refuse those who wait, let the running answer go on for a while, then cut it."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
            self.cut = not self.changed.wait_for(lambda: not self.line, seconds)
            self.changed.wait_for(lambda: not self.line, seconds)
