"""llama.cpp as one more side of tests/bench/generate.py: our decoder as a GGUF file, and two ways to run it.

Needs `pip install llama-cpp-python`. See docs/other-engines.md for models that are to be used, and not only timed.
"""
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

from lib.gguf import DECODER, decoder_fields, entries_of, write_gguf
from lib.save_weights import ToSave
from model import LLaVAConfig, Phi


def write_decoder(llm: Phi, path: Path, kind: str) -> None:
    """The decoder in fp32 -> a GGUF file without a tokenizer: ids in, ids out. kind: one of lib/gguf.py's types."""
    tensors = {f"llm.{name}": parameter.detach() for name, parameter in llm.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = ToSave(LLaVAConfig(llm=llm.config), None, tensors, shapes, {})
    no_text = {"tokenizer.ggml.model": "no_vocab", "phi2.vocab_size": llm.config.vocab_size}
    write_gguf(path, decoder_fields(llm.config, kind) | no_text, entries_of(model, DECODER, kind))


@llama_cpp.llama_log_callback
def say_nothing(level, text, user_data) -> None:
    """llama.cpp prints some hundred lines for each model that it loads."""


class LlamaCpp:
    """Our decoder in llama.cpp, on the CPU, with and without flash attention: which is faster differs by length."""

    def __init__(self, llm: Phi, kind: str, threads: int):
        llama_cpp.llama_log_set(say_nothing, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.gguf"
            write_decoder(llm, path, kind.lower())
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False           # the file is gone when the model is used
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp does not load our GGUF file in {kind}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 1024
        settings.n_batch = 1024
        settings.n_threads = threads
        settings.n_threads_batch = threads
        self.contexts = {}
        for flash in (False, True):
            settings.flash_attn_type = int(flash)
            self.contexts[flash] = llama_cpp.llama_init_from_model(self.model, settings)
            assert self.contexts[flash], "llama.cpp has no context for us"
        self.vocab_size = llm.config.vocab_size

    def forward(self, flash: bool, ids: list[int]) -> np.ndarray:
        """Read on -> the logits (V,) behind the last id."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(self.contexts[flash], llama_cpp.llama_batch_get_one(tokens, len(ids)))
        assert not failed, f"llama_decode returned {failed}"
        logits = llama_cpp.llama_get_logits_ith(self.contexts[flash], -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def time(self, flash: bool, prompt: list[int], n_tokens: int) -> tuple[float, float]:
        """Seconds that the prompt takes, and those of n_tokens greedy tokens behind it."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.contexts[flash]), True)
        start = time.perf_counter()
        token = int(self.forward(flash, prompt).argmax())
        first = time.perf_counter()
        for _ in range(n_tokens):
            token = int(self.forward(flash, [token]).argmax())
        return first - start, time.perf_counter() - first
