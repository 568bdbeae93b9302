"""The line of questions, and the one thread that owns the model. It knows nothing of HTTP or json.

Questions are answered in the order in which they came. Whatever waits when the model becomes free and asks for the same
kind of answer runs together as one batch: where memory is slower than arithmetic, reading the weights is most of a
step, and a batch reads them once for everybody. In fp32, greedy answers do not change by it (with --bits 4 one in some
hundreds does). Answers that are drawn at random run alone, so that a seed gives the same text whoever else is there. A
question that comes while a batch runs waits for its end.
"""
import hashlib
import io
import queue
import threading
import traceback
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lib.chat import Clock, answer, encode_chat, free_memory, open_image
from lib.common import use_device
from lib.generate import KVCache, Session
from model import LLaVAConfig, LLaVAPhi
from serve.api import Busy, Request

MAX_WAITING = 32                    # questions in the line; the next one is told to come back later
MAX_BATCH = 8                       # questions answered together
MAX_KEY_VALUE_BYTES = 4 << 30       # of a batch; less where memory is short
KEPT_PICTURES = 16                  # decoded pictures remembered, 0.3 MB each


class Question:
    """One conversation that waits for its next answer, and that answer as it comes.

    `pieces` is how the model's thread talks to the thread of the connection: text, text, ..., and None at the end.
    `finish` then says why it ended: "stop" (the model, or a stop string), "length", "left" (nobody listens any more),
    or "error", with a sentence in `error`.
    """

    def __init__(self, request: Request, image: Tensor, client_left: Callable[[], bool]):
        self.request = request
        self.image = image                  # (0 or 1, 3, S, S) uint8
        self.client_left = client_left
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.finish: str | None = None
        self.error = ""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.held = ""                      # text that may be the beginning of a stop string

    def end(self, finish: str, error: str = "") -> None:
        """The answer is over. Only the first reason counts."""
        if self.finish is None:
            self.finish = finish
            self.error = error
            self.pieces.put(None)

    def add(self, piece: str) -> None:
        """Pass on what the model said, up to a stop string. Half a stop string is held until it is decided."""
        text = self.held + piece
        cuts = [text.index(stop) for stop in self.request.stop if stop in text]
        if cuts:
            self.pieces.put(text[:min(cuts)])
            self.end("stop")
            return
        n_certain = len(text) - longest_beginning(text, self.request.stop)
        self.held = text[n_certain:]
        if n_certain:
            self.pieces.put(text[:n_certain])

    def flush(self) -> None:
        """No more text will come, so what was held is no stop string."""
        if self.finish is None and self.held:
            self.pieces.put(self.held)

    def runs_with(self, other: "Question") -> bool:
        """Whether one call of the model can answer both."""
        greedy = self.request.temperature == 0 and other.request.temperature == 0
        return greedy and self.request.max_tokens == other.request.max_tokens


def longest_beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:n]):
                longest = max(longest, n)
    return longest


class Pictures:
    """Bytes of a picture file -> tensor. The same bytes give the same tensor object.

    By that identity the model recognises a picture that it has computed before: an API client sends the picture again
    with every turn of a conversation.
    """

    def __init__(self, config: LLaVAConfig):
        self.config = config
        self.none = open_image(None, config)
        self.lock = threading.Lock()    # one decoding at a time: a large picture takes 300 MB while it is decoded
        self.known: dict[bytes, Tensor] = {}

    def get(self, data: bytes | None) -> Tensor:
        """-> (1, 3, S, S), or (0, 3, S, S) without a picture. ValueError says what is wrong with it."""
        if data is None:
            return self.none
        digest = hashlib.sha256(data).digest()
        with self.lock:
            image = self.known.pop(digest, None)
            if image is None:
                image = open_image(io.BytesIO(data), self.config)
            self.known[digest] = image                      # the newest is last
            if len(self.known) > KEPT_PICTURES:
                self.known.pop(next(iter(self.known)))
        return image


def key_value_limit(device: torch.device) -> int:
    """How many bytes a batch's keys and values may take: MAX_KEY_VALUE_BYTES, or a sixth of what is free now.

    A single conversation is always admitted.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return min(MAX_KEY_VALUE_BYTES, free // 6)


def position_bytes(model: LLaVAPhi) -> float:
    """What the keys and values of one position take."""
    cache = KVCache(model.llm, [[]], 1)
    return (cache.k.nbytes + cache.v.nbytes) / cache.k.size(3)


class Engine:
    """The line, and the thread that answers it."""

    def __init__(self, model: LLaVAPhi, tok: Tokenizer, top_k: int = 0, cuda_graph: bool = False):
        self.model = model
        self.tok = tok
        self.top_k = top_k                                  # the same for all requests
        self.session = Session(model, cuda_graph)           # remembers the last conversation
        self.pictures = Pictures(model.config)
        self.changed = threading.Condition()                # guards the line and `stopping`
        self.waiting: list[Question] = []
        self.running: list[Question] = []
        self.stopping = False
        self.key_value_limit = key_value_limit(model.device)
        self.max_positions = int(self.key_value_limit / position_bytes(model))      # of a batch, in all
        self.thread = threading.Thread(target=self.run, name="model", daemon=True)
        self.thread.start()

    # ---- called by the threads of the connections

    def ask(self, request: Request, client_left: Callable[[], bool]) -> Question:
        """Put a question at the end of the line. ValueError: it cannot be asked. Busy: the line is full."""
        image = self.pictures.get(request.picture)
        request.picture = None              # up to 18 MB, which would otherwise wait in the line too
        block_size = self.model.config.llm.block_size
        request.max_tokens = min(request.max_tokens, block_size)
        question = Question(request, image, client_left)
        question.prompt_tokens = len(encode_chat(self.model.config, self.tok, request.turns, image))
        if question.prompt_tokens >= block_size:
            raise ValueError(f"the conversation takes {question.prompt_tokens} of the model's {block_size} positions, "
                             "none is left for an answer: start a new one")
        with self.changed:
            self.drop_those_who_left()
            if self.stopping:
                raise Busy("the server is about to stop")
            if len(self.waiting) >= MAX_WAITING:
                raise Busy(f"{len(self.waiting)} questions are waiting already, try again later")
            self.waiting.append(question)
            self.changed.notify_all()
        return question

    def ahead_of(self, question: Question) -> int:
        """How many others are answered before this one, those that run now included; 0 when its own turn has come."""
        with self.changed:
            if question not in self.waiting:
                return 0
            return len(self.running) + self.waiting.index(question)

    def stop(self, seconds: float) -> None:
        """Refuse what waits, let the running answers end, and after so many seconds cut them."""
        with self.changed:
            self.stopping = True
            for question in self.waiting:
                question.end("error", "the server is about to stop")
            self.waiting = []
            self.changed.notify_all()
        self.thread.join(seconds)
        for question in self.running:
            question.end("error", "the server was stopped")

    def drop_those_who_left(self) -> None:
        """Make room in the line. Called with the lock held."""
        for question in self.waiting:
            if question.client_left():
                question.end("left")
        self.waiting = [question for question in self.waiting if question.finish is None]

    # ---- the model's thread

    def run(self) -> None:
        """Answer batch after batch until the server stops."""
        use_device(self.model.device)
        while True:
            with self.changed:
                while not self.waiting and not self.stopping:
                    self.changed.wait()
                if self.stopping:
                    return
                self.running = self.next_batch()
            try:
                if self.running:
                    self.answer_batch(self.running)
            except Exception:               # out of memory, or a defect: these questions fail, the server goes on
                traceback.print_exc()
                for question in self.running:
                    question.end("error", "the model failed; the server's log says how")
            self.running = []

    def next_batch(self) -> list[Question]:
        """Take the first of the line, and those behind it that can run with it."""
        self.drop_those_who_left()
        batch = []
        others = []
        for question in self.waiting:
            if not batch or (question.runs_with(batch[0]) and self.has_room_for([*batch, question])):
                batch.append(question)
            else:
                others.append(question)
        self.waiting = others
        return batch

    def has_room_for(self, batch: list[Question]) -> bool:
        """Whether so many may run together. In memory every conversation is as long as the longest may become."""
        longest = max(question.prompt_tokens + question.request.max_tokens for question in batch)
        positions = -(-min(longest, self.model.config.llm.block_size) // 16) * 16       # as KVCache rounds them up
        return len(batch) <= MAX_BATCH and len(batch) * positions <= self.max_positions

    def answer_batch(self, batch: list[Question]) -> None:
        """Run the model for these questions until the last of them is answered, or nobody listens any more."""
        settings = batch[0].request         # the others ask for the same
        generator = torch.Generator(self.model.device)
        if settings.seed is None:
            generator.seed()
        else:
            generator.manual_seed(settings.seed)
        clock = Clock()
        chats = [question.request.turns for question in batch]
        images = [question.image for question in batch]
        steps = answer(
            self.session, self.tok, chats, images, clock, max_new_tokens=settings.max_tokens,
            temperature=settings.temperature, top_k=self.top_k, top_p=settings.top_p, generator=generator)
        for pieces in steps:
            for question, piece, tokens, finish in zip(batch, pieces, clock.tokens, self.session.finish):
                self.pass_on(question, piece, tokens, finish if tokens < clock.steps else "")
            if all(question.finish for question in batch):
                break
        for question, finish in zip(batch, self.session.finish):
            self.pass_on(question, "", question.completion_tokens, finish)

    def pass_on(self, question: Question, piece: str, tokens: int, finish: str) -> None:
        """One step's text for one question. finish: why this answer has ended, "" while it goes on."""
        if question.finish is not None:
            return
        if question.client_left():
            question.end("left")
            return
        question.completion_tokens = tokens
        question.add(piece)
        if finish and question.finish is None:
            question.flush()
            question.end("stop" if finish == "stop" else "length")
