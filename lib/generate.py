"""A session with a model: it answers prompts, and what it computed for one prompt is not computed again for the next."""
import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from model import LLaVAPhi, Prefix


class Session:
    """A model that remembers its last prompts: their keys and values, and those of the answers."""

    def __init__(self, model: LLaVAPhi, cuda_graph: bool = False):
        self.model = model
        self.cuda_graph = cuda_graph
        self.finish: list[str] = []             # why each answer of the last call ended, "" while it is being written
        self.memory: list[Prefix] = []
        self.pictures: dict[bytes, Tensor] = {}

    def generate(self, prompts: list[list[int]], images: list[Tensor], *, max_new_tokens: int, eos_id: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 generator: torch.Generator | None = None) -> Iterator[list[int | None]]:
        """Yield one column per step: the next id of each answer, or None where that answer has ended.

        Afterwards `finish` says for each answer why it ended: "stop" (eos_id), "length" (max_new_tokens) or "context"
        (the model's positions are full). The caller may stop iterating at any time.
        """
        limit = self.model.config.llm.block_size
        lengths = [len(prompt) for prompt in prompts]
        self.finish = [""] * len(prompts)
        columns = self.model.generate(
            prompts, self.known(images), max_new_tokens=max_new_tokens, eos_id=eos_id, temperature=temperature,
            top_k=top_k, top_p=top_p, generator=generator, memory=self.memory, fast=self.cuda_graph)
        with contextlib.closing(columns):
            for n, column in enumerate(columns, 1):
                for i, token in enumerate(column):
                    if token is None:
                        self.finish[i] = self.finish[i] or "stop"
                    elif lengths[i] + n >= limit:
                        self.finish[i] = "context"
                    elif n == max_new_tokens:
                        self.finish[i] = "length"
                yield column
        self.finish = [reason or "stop" for reason in self.finish]

    def known(self, images: list[Tensor]) -> list[Tensor]:
        """The same pixels as the very tensors of the last call, by which the model recognizes a picture."""
        digests = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in images]
        self.pictures = {digest: self.pictures.get(digest, image) for digest, image in zip(digests, images)}
        return [self.pictures[digest] for digest in digests]
