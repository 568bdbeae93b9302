"""The one way to ask a model: the terminal, the server, the benchmarks and a notebook all use it."""
import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from data import ImageConfig, encode_prompt, eot_id, expand, load_image, tokenize
from lib.device import peak_memory
from lib.generate import Scored, Session
from model import LLaVAConfig, LLaVAPhi

MAX_CHARACTERS = 32_000         # in a prompt, refused before it is tokenized; 2,048 positions hold about 8,000

Picture = str | Path | BinaryIO | Image.Image | None    # None: a question without a picture
Turn = str | list[str]          # a list: a question in pieces, between any two of which there is a picture


class TextStream:
    """Detokenize an answer while it is generated: token ids in, text out as soon as it is final.

    The pieces add up to `tok.decode(ids, skip_special_tokens=True).strip()`. Two things delay a piece: a character
    whose UTF-8 bytes are spread over several tokens (an emoji, most Chinese) waits until it is complete, and whitespace
    waits for the next word, because at the end of an answer it would have to be stripped.
    """

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = ""               # the decoder's output so far, not yet stripped
        self.n_shown = 0                # characters of `decoded.strip()` already returned

    def add(self, token: int | None) -> str:
        """Add the next token, or None at the end; return the text that it makes final, often none.

        At the end, incomplete UTF-8 bytes become U+FFFD.
        """
        if token is None:
            self.decoded = self.tok.decode(self.ids, skip_special_tokens=True)
        else:
            self.ids.append(token)
            self.decoded += self.decoder.step(self.tok, token) or ""
        text = self.decoded.strip()
        piece = text[self.n_shown:]
        self.n_shown = len(text)
        return piece


class Clock:
    """Measures time to first token and tokens per second."""

    def __init__(self):
        self.start = time.perf_counter()
        self.first = 0.0                # seconds from the start to the first token
        self.last = 0.0                 # seconds from the start to the latest one
        self.steps = 0

    def tick(self) -> None:
        """Record one step of `Session.generate`: a token of every chat in the batch that has not ended."""
        self.last = time.perf_counter() - self.start
        self.steps += 1
        if self.steps == 1:
            self.first = self.last

    def __str__(self) -> str:
        # Tokens per second of one chat after the first token, which waits for the prefill.
        rate = (self.steps - 1) / (self.last - self.first) if self.steps > 1 else 0.0
        device = "cuda" if torch.cuda.is_available() else "cpu"         # the current GPU
        return (f"first token {self.first:.2f} s | {self.steps} tokens | {rate:.1f} tokens/s | "
                f"peak memory {peak_memory(device) / 1e9:.1f} GB")


def encode_chat(config: LLaVAConfig, tok: Tokenizer, turns: list[Turn], images: Tensor, room: int = 1) -> list[int]:
    """Question, answer, ..., question about images (N, 3, S, S) -> prompt ids, image positions expanded.

    room: positions that the answer takes at least. Raises ValueError if there is neither a question nor a picture, or
    if the chat is too long.
    """
    if not "".join(turns[-1]).strip() and not len(images):
        raise ValueError("the question is empty")
    n_characters = sum(len("".join(turn)) for turn in turns)
    if n_characters > MAX_CHARACTERS:
        raise ValueError(f"the prompt has {n_characters:,} characters, expected at most {MAX_CHARACTERS:,}")
    limit = config.llm.block_size
    ids, _ = expand(encode_prompt(turns, tok, image=len(images)), None, config.vision.n_patches, limit)
    if len(ids) + room > limit:
        raise ValueError(f"the prompt takes {len(ids):,} of the model's {limit:,} positions, which leaves "
                         f"{limit - len(ids):,} for an answer that takes at least {room:,}")
    return ids


def answer(session: Session, tok: Tokenizer, chats: list[list[Turn]], images: list[Tensor | Picture | list[Picture]],
           clock: Clock | None = None, *, max_new_tokens: int = 256, **sampling) -> Iterator[list[str]]:
    """Answer the last question of every chat, in one batch. Yields the new text of each answer after every step.

    chats: for each, question, answer, question, ..., question. images: for each chat one, or a list, in any form that
    `open_image` accepts; they are the whole chat's, so one that later questions are about again is given once. Several
    are where the questions have "<image>", or between the pieces of a question that is a list (`pieces_of` makes them
    from a message of OpenAI's form), or else in front. session: keeps the KV cache, so that the next turn, or another
    question about the same picture, computes only its new tokens; its `finish` says why each answer ended. clock:
    measures speed. sampling: temperature, top_k, top_p and generator (the seed) of `Session.generate`.

    A chat's answer is its pieces joined. The caller may stop iterating at any time.
    Raises ValueError if a question cannot be asked or leaves no room for an answer.
    """
    config = session.model.config
    images = [open_image(image, config) for image in images]
    prompts = [encode_chat(config, tok, turns, image) for turns, image in zip(chats, images, strict=True)]
    if not prompts:
        return
    texts = [TextStream(tok) for _ in chats]
    for column in session.generate(prompts, images, max_new_tokens=max_new_tokens, eos_id=eot_id(tok), **sampling):
        if clock:
            clock.tick()
        yield [text.add(token) for text, token in zip(texts, column)]
    yield [text.add(None) for text in texts]


def ask(model: LLaVAPhi, tok: Tokenizer, question: str, images: list[Tensor | Picture], **options) -> list[str]:
    """Ask the same question about every picture, in one batch; return the answers. See `answer` for images and options.

    Raises ValueError if `images` is not a list, and what `answer` raises.
    """
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"expected a list of pictures, found {images!r}: put it in brackets")
    texts = [""] * len(images)
    for pieces in answer(Session(model), tok, [[question]] * len(images), images, **options):
        texts = [text + piece for text, piece in zip(texts, pieces)]
    return texts


def rank(model: LLaVAPhi | Session, tok: Tokenizer, question: str, image: Tensor | Picture | list[Picture],
         choices: list[str]) -> list[dict]:
    """How likely each choice is as the answer to a question about a picture, best first.

    For each: "tokens" and "logprobs", the end of the answer included, as in training; their "sum" and "mean"; and the
    probabilities among the choices by both, "p_sum" and "p_mean". The order is by sum, which is the probability that
    the model gives this very answer; the mean suits choices of very different lengths, of which the sum prefers the
    short. Raises ValueError for choices that are empty, repeated or too long.
    """
    session = model if isinstance(model, Session) else Session(model)
    config = session.model.config
    choices = check_choices(choices)
    images = open_image(image, config)
    answers = [[*tokenize(f" {choice}", tok).ids, eot_id(tok)] for choice in choices]
    longest = max(map(len, answers))
    prompt = encode_chat(config, tok, [question], images, room=longest - 1)     # an answer's last token is not read
    ranked = []
    for choice, ids, logprobs in zip(choices, answers, session.score(prompt, images, answers)):
        ranked.append({"choice": choice, "tokens": [token_text(tok, token) for token in ids], "logprobs": logprobs,
                       "sum": math.fsum(logprobs), "mean": fmean(logprobs)})
    for kind in ("sum", "mean"):
        odds = torch.tensor([row[kind] for row in ranked], dtype=torch.float64).softmax(0)
        for row, p in zip(ranked, odds.tolist()):
            row[f"p_{kind}"] = p
    return sorted(ranked, key=lambda row: -row["sum"])


def check_choices(choices: str | list[str]) -> list[str]:
    """choices: a list; or "cat,dog,none of them", or a file with one on each line."""
    if isinstance(choices, str) and os.path.isfile(choices):
        choices = re.findall(r".*\S.*", Path(choices).read_text(encoding="utf-8-sig"))
    elif isinstance(choices, str):
        choices = choices.split(",")
    choices = [choice.strip() for choice in choices]
    if not all(choices) or len(set(choices)) < max(len(choices), 2):
        raise ValueError(f"expected two or more choices, none empty and no two alike, found {', '.join(choices)!r}")
    return choices


# GPT-2 spells each byte as a character: printable ones as themselves, the others in order from U+0100 on.
SPELLED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = dict(zip(map(chr, [*SPELLED, *range(256, 324)]), [*SPELLED, *sorted({*range(256)} - {*SPELLED})]))


def token_bytes(tok: Tokenizer, token: int) -> bytes:
    spelled = tok.id_to_token(token) or ""              # None: an id that the tokenizer does not use
    # Phi-2's runs of spaces are spelled as they are.
    return bytes(map(BYTE_OF.get, spelled)) if set(spelled) <= BYTE_OF.keys() else spelled.encode()


def token_text(tok: Tokenizer, token: int) -> str:
    return token_bytes(tok, token).decode(errors="replace")     # a token may hold a part of a character


def describe_logprobs(tok: Tokenizer, scored: list[Scored]) -> list[dict]:
    """An answer's tokens in the form of OpenAI's logprobs, without the one that ends it."""
    def entry(token: int, logprob: float) -> dict:
        return {"token": token_text(tok, token), "logprob": logprob, "bytes": list(token_bytes(tok, token))}
    return [entry(token, logprob) | {"top_logprobs": [entry(*other) for other in likeliest]}
            for token, logprob, likeliest in scored if token != eot_id(tok)]


def open_image(source: Picture | Tensor | list[Picture], config: LLaVAConfig) -> Tensor:
    """Load a picture as uint8 (1, 3, S, S), preprocessed as the model expects. None -> (0, 3, S, S).

    source: a path, also as pasted or dragged into a terminal; "-" for stdin; or a Pillow image. A list of N becomes
    (N, 3, S, S). A tensor is returned unchanged. Raises ValueError, which names the file.
    """
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(source, list):
        return torch.cat([open_image(picture, config) for picture in (None, *source)])
    size = config.vision.image_size
    if source is None:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return load_image(picture_file(source), ImageConfig.of(config.vision, config.image_mode))[None]


def picture_file(source: Picture) -> Path | BinaryIO | Image.Image:
    if source == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    return pasted_path(source) if isinstance(source, str) else source


def pasted_path(text: str) -> Path:
    """'/my/cat.jpg', "~/cat.jpg", file:///my/cat.jpg or /my\\ cat.jpg, as terminals and file managers write them."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif re.match(r"[a-z]+://|data:", text, re.IGNORECASE):
        raise ValueError(f"{text[:80]} is a URL, and nothing here uses the network: download it and give the file")
    path = Path(text).expanduser()
    unescaped = Path(re.sub(r"\\(.)", r"\1", text)).expanduser()
    if unescaped.exists() and not path.exists():
        return unescaped                # a backslash is also a legal character of a file name, hence the check
    return path
