"""The asking half of eval.py: questions in batches, pictures decoded ahead, each answer as it ends.

It is a separate file because it needs torch, which scoring does without. A question is a benchmarks.scoring.Example;
its `image` is a file, one in an archive, an encoded picture, any text for a blank one, a tuple of these, or None.
"""
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from data import ImageConfig, eot_id, load_tokenizer
from lib.archives import Member
from lib.chat import encode_chat, open_image
from lib.common import torchrun_env
from lib.device import check_gpu_count, choose_device, choose_dtype, torch_dtype, use_device
from lib.folders import open_weights, projector_warning
from lib.generate import Session
from lib.processes import join_group
from model import LLaVAConfig, LLaVAPhi

# ---------------------------------------------------------------------------------------------------
# Processes and devices


class Processes(NamedTuple):
    """Rank and world size under torchrun; (0, 1) without it."""
    rank: int
    world: int
    barrier: Callable[[], None]


def join_processes() -> Processes:
    here = torchrun_env()
    if here.world == 1:
        return Processes(0, 1, lambda: None)
    # The group carries barriers only, and the fastest process may wait at one for hours.
    join_group("gloo", timedelta(days=7))
    return Processes(here.rank, here.world, dist.barrier)


def own_device(asked: str | None) -> str:
    """--device, else the best available. Under torchrun each process gets its own GPU, made the current one."""
    here = torchrun_env()
    if asked in (None, "cuda") and here.local_rank < torch.cuda.device_count():
        use_device(f"cuda:{here.local_rank}")               # before anything is allocated on another GPU
    device = choose_device(asked)
    if device == "cuda":
        check_gpu_count()
        device = f"cuda:{here.local_rank}"
    use_device(device)
    return device


def own_dtype(asked: str | None, device: str) -> str:
    """--dtype, else fp32 on a CPU, where batching then changes no answer, and the usual rule on a GPU."""
    if asked is None and not device.startswith("cuda"):
        return "fp32"
    return choose_dtype(asked, device)

# ---------------------------------------------------------------------------------------------------
# Questions and answers


class Answer(NamedTuple):
    row: int                    # index of the question in the benchmark
    text: str
    truncated: bool             # cut at the token limit, or by a full context
    n_tokens: int               # the one that ended it included
    logprob: float              # mean over these


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
        size = self.config.vision.image_size
        prompts = {}
        for row in rows:
            example = examples[row]
            images = torch.empty(len(example.pictures), 3, size, size, dtype=torch.uint8)
            try:
                prompts[row] = encode_chat(self.config, self.tok, [example.prompt], images)
            except ValueError as e:
                raise ValueError(f"question {example.question_id!r}: {e}") from None
        return prompts

    def answers(self, examples: list, prompts: dict[int, list[int]], batches: list[list[int]], image_mode: str,
                max_new_tokens: int, exact: bool) -> Iterator[Answer]:
        """Yield greedy answers to the rows in `batches`, each as it ends. exact: no prefix caching across batches."""
        config = replace(self.config, image_mode=image_mode)
        session = self.session
        for rows, images in zip(batches, pictures_ahead(examples, batches, config)):
            if exact:
                session = Session(session.model)
            ids_of_prompts = [prompts[row] for row in rows]
            for i, ids in answer_batch(session, ids_of_prompts, images, max_new_tokens, eot_id(self.tok)):
                text = self.tok.decode(ids, skip_special_tokens=True).strip()
                logprobs = [scored.logprob for scored in session.scored[i]]
                yield Answer(rows[i], text, session.finish[i] != "stop", len(logprobs), round(fmean(logprobs), 3))


def answer_batch(session: Session, prompts: list[list[int]], images: list[Tensor], max_new_tokens: int,
                 eos_id: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (index in the batch, tokens of its answer), each as it ends."""
    tokens = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for column in session.generate(prompts, images, max_new_tokens=max_new_tokens, eos_id=eos_id, logprobs=0):
        for i in unfinished:
            if column[i] is not None:
                tokens[i].append(column[i])
            if session.finish[i]:
                yield i, tokens[i]
        unfinished = [i for i in unfinished if not session.finish[i]]
    for i in unfinished:
        yield i, tokens[i]


def open_picture(image: Path | Member | bytes | str | tuple | None, config: LLaVAConfig,
                 number: int | str = "") -> Tensor:
    """A question's N pictures -> uint8 (N, 3, S, S).

    number: the question_id, which is what an error names a picture by that is not a file.
    """
    if isinstance(image, tuple):
        return torch.cat([open_picture(picture, config, number) for picture in image])
    if isinstance(image, Member):
        image = image.open()
    elif isinstance(image, bytes):
        image = io.BytesIO(image)
    elif isinstance(image, str):
        size = config.vision.image_size
        image = Image.new("RGB", (size, size), ImageConfig.of(config.vision, config.image_mode).pad_color)
    try:
        return open_image(image, config)
    except ValueError as e:
        raise ValueError(str(e).replace("the given picture", f"the picture of question {number!r}")) from None


def pictures_ahead(examples: list, batches: list[list[int]], config: LLaVAConfig) -> Iterator[list[Tensor]]:
    """Yield the pictures of each batch, decoded in threads while earlier batches run.

    A picture that neighboring batches share is decoded once.
    """
    with ThreadPoolExecutor(4) as pool:
        decoding = {}
        for i, batch in enumerate(batches):
            upcoming = {examples[row].image: examples[row].question_id for rows in batches[i:i + 3] for row in rows}
            decoding = {image: job for image, job in decoding.items() if image in upcoming}    # forget finished ones
            for image, number in upcoming.items():
                if image not in decoding:
                    decoding[image] = pool.submit(open_picture, image, config, number)
            yield [decoding[examples[row].image].result() for row in batch]
