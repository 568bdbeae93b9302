"""llama.cpp as one more side of tests/bench/generate.py: our decoder as a GGUF file, and two ways to run it.

Needs `pip install gguf llama-cpp-python`. See docs/other-engines.md for models that are to be used, and not only timed.
"""
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from model import Phi

TENSORS = {         # our module -> llama.cpp's; {} is the layer
    "wte": "token_embd",
    "h.{}.ln": "blk.{}.attn_norm",
    "h.{}.attn.qkv": "blk.{}.attn_qkv",
    "h.{}.attn.proj": "blk.{}.attn_output",
    "h.{}.mlp.fc": "blk.{}.ffn_up",
    "h.{}.mlp.proj": "blk.{}.ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}


def write_gguf(llm: Phi, path: Path, kind: str) -> None:
    """The decoder in fp32 -> a GGUF file. kind: how its matrices are stored: F16, BF16, Q8_0 or Q4_0."""
    config = llm.config
    writer = GGUFWriter(path, "phi2")
    writer.add_tokenizer_model("no_vocab")      # ids in, ids out: there is no text in this measurement
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_eps(config.eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    for name, parameter in llm.named_parameters():
        module, leaf = name.rsplit(".", 1)
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        pattern = module.replace(f".{layer}.", ".{}.") if layer else module
        values = parameter.detach().numpy()
        stored_as = GGMLQuantizationType.F32    # biases and norms, as llama.cpp wants them
        if values.ndim > 1:
            stored_as = GGMLQuantizationType[kind]
        writer.add_tensor(f"{TENSORS[pattern].format(layer)}.{leaf}", quantize(values, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def say_nothing(level, text, user_data) -> None:
    """llama.cpp prints some hundred lines for each model that it loads."""


class LlamaCpp:
    """Our decoder in llama.cpp, on the CPU, with and without flash attention: which is faster differs by length."""

    def __init__(self, llm: Phi, kind: str, threads: int):
        llama_cpp.llama_log_set(say_nothing, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.gguf"
            write_gguf(llm, path, kind)
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
