"""The asking half of eval.py: questions in batches, pictures decoded ahead, each answer as it ends.

It is a separate file because it needs torch, which scoring does without. A question is a benchmarks.scoring.Example;
its `pictures` are files, members of archives, encoded pictures, and any text for a blank one.
"""
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from data import ImageConfig, eot_id, load_tokenizer
from lib.archives import Member
from lib.chat import encode_chat, open_image
from lib.common import torchrun_env
from lib.device import check_gpu_count, choose_device, has_bf16, torch_dtype
from lib.folders import open_weights, projector_warning
from lib.generate import Session
from lib.processes import join_group
from model import LLaVAConfig, LLaVAPhi

# ---------------------------------------------------------------------------------------------------
# Processes and devices


def join_processes() -> Callable[[], None]:
    """Join the processes that torchrun started -> the barrier at which they wait for each other."""
    if torchrun_env().world == 1:
        return lambda: None
    # The group carries barriers only, and the fastest process may wait at one for hours.
    join_group("gloo", timedelta(days=7))
    return dist.barrier


def own_device(asked: str | None) -> str:
    """--device, else the best available. Under torchrun each process gets its own GPU, made the current one."""
    here = torchrun_env()
    if asked in (None, "cuda") and here.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(f"cuda:{here.local_rank}")    # before anything is allocated on another GPU
    device = choose_device(asked)
    if device == "cuda":
        check_gpu_count()
        device = f"cuda:{here.local_rank}"
    return device


def own_dtype(asked: str | None, device: str) -> str:
    """--dtype, else fp32 on a CPU, where batching then changes no answer, and the usual rule on a GPU."""
    return asked or ("bf16" if device.startswith("cuda") and has_bf16(device) else "fp32")

# ---------------------------------------------------------------------------------------------------
# Questions and answers


class Model:
    """The model under test. Its weights are loaded once, by the first task that has questions to ask."""

    def __init__(self, folder: Path, load_model: Callable[..., LLaVAPhi], dtype: str, device: str, bits: int):
        """load_model: load_weights.load_model, passed in because lib/ never imports a script."""
        self.source = open_weights(folder)
        self.config = self.source.config
        self.tok = load_tokenizer(folder)
        self.load_model = partial(load_model, self.source, torch_dtype(dtype), device, bits)
        self.session: Session | None = None

    def load(self) -> None:
        if self.session is None:
            warning = projector_warning(self.source)
            if warning and torchrun_env().rank == 0:
                print(f"warning: {warning}", file=sys.stderr)
            self.session = Session(self.load_model())

    def encode(self, examples: list, rows: Iterable[int]) -> dict[int, list[int]]:
        """Row -> prompt ids, image positions expanded. Raises ValueError for a prompt too long to be answered."""
        prompts = {}
        for row in rows:
            example = examples[row]
            try:                                    # of the pictures only the number matters here
                prompts[row] = encode_chat(self.config, self.tok, [example.prompt], example.pictures)
            except ValueError as e:
                raise ValueError(f"question {example.question_id!r}: {e}") from None
        return prompts

    def answers(self, examples: list, prompts: dict[int, list[int]], batches: list[list[int]], settings: dict,
                exact: bool) -> Iterator[dict]:
        """Yield greedy answers to the rows in `batches`, lines of answers.jsonl, each as it ends.

        "truncated": cut at the token limit, or by a full context. "tokens": how many, the one that ended it included,
        over which "logprob" is the mean. settings: image_mode and max_new_tokens. exact: no prefix caching across
        batches.
        """
        config = replace(self.config, image_mode=settings["image_mode"])
        session = self.session
        for rows, images in zip(batches, pictures_ahead(examples, batches, config)):
            if exact:
                session = Session(session.model)
            steps = session.generate([prompts[row] for row in rows], images, eos_id=eot_id(self.tok), logprobs=0,
                                     max_new_tokens=settings["max_new_tokens"])
            for i in ended(session, steps):
                example = examples[rows[i]]
                tokens = session.scored[i]
                text = self.tok.decode([token.token for token in tokens], skip_special_tokens=True)
                yield {"row": rows[i], "question_id": example.question_id,
                       "prompt": example.info.get("saved", example.prompt), "text": text.strip(),
                       "truncated": session.finish[i] != "stop", "tokens": len(tokens),
                       "logprob": round(fmean(token.logprob for token in tokens), 3)}


def ended(session: Session, steps: Iterable) -> Iterator[int]:
    """Generate; yield the index of each answer as it ends."""
    told = set()
    for _ in chain(steps, [None]):          # the last step may have ended the last answers without a token
        new = {i for i, reason in enumerate(session.finish) if reason} - told
        yield from sorted(new)
        told |= new


def open_pictures(example, config: LLaVAConfig) -> Tensor:
    """A question's N pictures -> uint8 (N, 3, S, S)."""
    size = config.vision.image_size
    sources = []
    for picture in example.pictures:
        if isinstance(picture, Member):
            picture = picture.open()
        elif isinstance(picture, bytes):
            picture = io.BytesIO(picture)
        elif isinstance(picture, str):
            picture = Image.new("RGB", (size, size), ImageConfig.of(config.vision, config.image_mode).pad_color)
        sources.append(picture)
    try:
        return open_image(sources, config)
    except ValueError as e:                 # which calls a picture by the name of its file, if it has one
        problem = str(e).replace("the given picture", f"the picture of question {example.question_id!r}")
        raise ValueError(problem) from None


def pictures_ahead(examples: list, batches: list[list[int]], config: LLaVAConfig) -> Iterator[list[Tensor]]:
    """Yield the pictures of each batch, decoded in threads while earlier batches run.

    Those that neighboring batches share are decoded once.
    """
    with ThreadPoolExecutor(4) as pool:
        decoding = {}
        for i, batch in enumerate(batches):
            upcoming = {examples[row].pictures: examples[row] for rows in batches[i:i + 3] for row in rows}
            decoding = {pictures: decoding.get(pictures) or pool.submit(open_pictures, example, config)
                        for pictures, example in upcoming.items()}          # those of earlier batches are forgotten
            yield [decoding[examples[row].pictures].result() for row in batch]
