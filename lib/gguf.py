"""A model as two GGUF files for llama.cpp and Ollama: the decoder with its tokenizer, the tower with the projector.

The format is a header of key-value pairs and tensor descriptions, then the tensors, each aligned to 32 bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Keys and tensor names are those of llama.cpp's "phi2" and
"clip" architectures. Its phi2 has a head bias, so nothing is folded here.
"""
import json
import struct
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import SYSTEM, eot_id
from lib.layouts import rename
from lib.save_weights import SAVED_MODEL, ToSave, replacing_model
from model import LLaVAConfig, PhiConfig

ALIGNMENT = 32
NUMBERS_PER_BLOCK = 32                  # numbers that share a scale in q8_0 and q4_0


class Type(NamedTuple):
    """How a tensor is stored: ggml's number for it, and the bytes of `block` numbers."""
    number: int
    block: int
    nbytes: int
    file_type: int          # general.file_type of a file whose matrices are stored so


TYPES = {"f32": Type(0, 1, 4, 0), "f16": Type(1, 1, 2, 1), "bf16": Type(30, 1, 2, 32),
         "q8_0": Type(8, NUMBERS_PER_BLOCK, 34, 7), "q4_0": Type(2, NUMBERS_PER_BLOCK, 18, 2)}

DECODER = {                 # our module, or tensor -> llama.cpp's
    "llm.wte": "token_embd",
    "llm.h.{layer}.ln": "blk.{layer}.attn_norm",
    "llm.h.{layer}.attn.qkv": "blk.{layer}.attn_qkv",
    "llm.h.{layer}.attn.proj": "blk.{layer}.attn_output",
    "llm.h.{layer}.mlp.fc": "blk.{layer}.ffn_up",
    "llm.h.{layer}.mlp.proj": "blk.{layer}.ffn_down",
    "llm.ln_f": "output_norm",
    "llm.lm_head": "output",
}
TOWER = {
    "vision.cls": "v.class_embd",
    "vision.pos": "v.position_embd.weight",
    "vision.patch": "v.patch_embd",
    "vision.ln_pre": "v.pre_ln",
    "vision.h.{layer}.ln_1": "v.blk.{layer}.ln1",
    "vision.h.{layer}.attn.qkv": "v.blk.{layer}.attn_{qkv}",            # three tensors
    "vision.h.{layer}.attn.proj": "v.blk.{layer}.attn_out",
    "vision.h.{layer}.ln_2": "v.blk.{layer}.ln2",
    "vision.h.{layer}.mlp.fc": "v.blk.{layer}.ffn_up",
    "vision.h.{layer}.mlp.proj": "v.blk.{layer}.ffn_down",
    "projector.fc": "mm.0",
    "projector.proj": "mm.2",
}


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file, not computed yet."""
    name: str
    shape: tuple[int, ...]
    kind: str                           # one of TYPES
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // TYPES[self.kind].block * TYPES[self.kind].nbytes


def save_gguf(out: Path, model: ToSave, kind: str) -> None:
    """Write a folder with both files and a Modelfile for Ollama. kind: how the decoder's matrices are stored.

    Norms and biases are in fp32, as llama.cpp wants them. The tower and the projector are in f16 whatever the kind,
    which is what llama.cpp's own converter makes of them.
    """
    with replacing_model(out) as made:
        decoder, tower = f"model-{kind}.gguf", "mmproj-f16.gguf"
        fields = decoder_fields(model.config.llm, kind) | tokenizer_fields(model.tokenizer, model.config.llm.vocab_size)
        write_gguf(made / decoder, fields, entries_of(model, DECODER, kind))
        write_gguf(made / tower, tower_fields(model.config), entries_of(model, TOWER, "f16"))
        (made / "Modelfile").write_text(MODELFILE.format(decoder=decoder, tower=tower, system=SYSTEM), encoding="utf-8")


MODELFILE = """\
# ollama create llava-phi -f Modelfile
FROM ./{decoder}
FROM ./{tower}
TEMPLATE "{{{{ .System }}}} USER: {{{{ .Prompt }}}} ASSISTANT:"
SYSTEM "{system}"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature 0
"""

# ---------------------------------------------------------------------------------------------------
# Tensors


def entries_of(model: ToSave, names: dict[str, str], kind: str) -> list[GGUFTensor]:
    """The tensors of one file. names: DECODER or TOWER. kind: how matrices are stored.

    Of the tower there are only the layers that are computed: llama.cpp runs all of them, and has no place for the
    LayerNorm after them.
    """
    entries = []
    for name, shape in model.shapes.items():
        theirs = rename(name, names)
        if not theirs or (name.startswith("vision.h.") and int(name.split(".")[2]) >= model.config.vision.n_used):
            continue
        letters = ["q", "k", "v"] if "{qkv}" in theirs else [""]
        shape = (shape[0] // len(letters), *shape[1:])
        for number, letter in enumerate(letters):
            load = partial(load_piece, model, name, number, len(letters))
            entries.append(GGUFTensor(theirs.replace("{qkv}", letter), shape, tensor_kind(name, shape, kind), load))
    return entries


def tensor_kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The kind a tensor is stored in: vectors and positions in fp32, and f16 where a row does not fill its blocks."""
    if len(shape) == 1 or name == "vision.pos":
        return "f32"
    if kind == "q4_0" and name == "llm.lm_head.weight":
        kind = "q8_0"           # the one matrix that 4 bits hurt visibly; llama.cpp gives it more bits as well
    return kind if shape[-1] % TYPES[kind].block == 0 else "f16"


def load_piece(model: ToSave, name: str, number: int, pieces: int) -> Tensor:
    return model.load(name).chunk(pieces)[number]

# ---------------------------------------------------------------------------------------------------
# Keys and values


def decoder_fields(config: PhiConfig, kind: str) -> dict[str, object]:
    return {
        "general.architecture": "phi2",
        "general.type": "model",
        "general.file_type": TYPES[kind].file_type,
        "general.quantization_version": 2,
        "phi2.context_length": config.block_size,
        "phi2.embedding_length": config.n_embd,
        "phi2.feed_forward_length": config.n_inner,
        "phi2.block_count": config.n_layer,
        "phi2.attention.head_count": config.n_head,
        "phi2.attention.head_count_kv": config.n_head,
        "phi2.attention.layer_norm_epsilon": config.eps,
        "phi2.rope.dimension_count": config.rotary_dim,
        "phi2.rope.freq_base": float(config.rope_base),
    }


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5      # llama.cpp's types of tokens


def tokenizer_fields(tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    """The tokenizer, with as many tokens as the embedding has rows: the unused ones get names."""
    described = json.loads(tokenizer.to_str())
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for token, number in described["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    eot = eot_id(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",                 # byte-level BPE
        "tokenizer.ggml.pre": "phi-2",                  # the regular expression that splits a text before that
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": eot,
        "tokenizer.ggml.eos_token_id": eot,
        "tokenizer.ggml.unknown_token_id": eot,
        "tokenizer.ggml.padding_token_id": eot,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (SAVED_MODEL / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def tower_fields(config: LLaVAConfig) -> dict[str, object]:
    vision = config.vision
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": TYPES["f16"].file_type,
        "clip.has_vision_encoder": True,
        "clip.has_text_encoder": False,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.gelu == "tanh",         # without this key it is CLIP's quick GELU
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.n_embd,
        "clip.vision.feed_forward_length": vision.n_inner,
        "clip.vision.projection_dim": config.llm.n_embd,
        "clip.vision.attention.head_count": vision.n_head,
        "clip.vision.attention.layer_norm_epsilon": vision.eps,
        # Without the feature layer llama.cpp leaves out one layer more, as if the file held the whole tower
        # (https://github.com/ggml-org/llama.cpp/issues/25817).
        "clip.vision.block_count": vision.n_used,
        "clip.vision.feature_layer": [vision.n_used],
        "clip.vision.image_mean": list(vision.mean),
        "clip.vision.image_std": list(vision.std),
    }

# ---------------------------------------------------------------------------------------------------
# The file


def write_gguf(path: Path, fields: dict[str, object], entries: list[GGUFTensor]) -> None:
    """Write a file, one tensor in memory at a time."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(fields))]
    for key, value in fields.items():
        header.append(packed_string(key) + packed_value(value))
    offset = 0
    for entry in entries:
        # ggml counts dimensions from the innermost one.
        n, number = len(entry.shape), TYPES[entry.kind].number
        header.append(packed_string(entry.name) + struct.pack(f"<I{n}QIQ", n, *reversed(entry.shape), number, offset))
        offset += entry.nbytes + -entry.nbytes % ALIGNMENT
    with open(path, "wb") as file:
        file.writelines(header)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for entry in entries:
            data = encode_numbers(entry.load(), entry.kind)
            assert data.nbytes == entry.nbytes, f"{entry.name}: {data.nbytes} bytes, {entry.nbytes} announced"
            file.write(data)
            file.write(bytes(-file.tell() % ALIGNMENT))


def packed_string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


VALUE_TYPES = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}         # -> GGUF's number, and how struct packs it


def packed_value(value: object) -> bytes:
    """A value with its type in front. A list has elements of one type; its ints are signed, as in other writers."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + packed_string(value)
    if isinstance(value, list):
        elements = [packed_value(element) for element in value]
        kind = struct.pack("<I", 5) if isinstance(value[0], int) else elements[0][:4]
        length = struct.pack("<Q", len(value))
        return struct.pack("<I", 9) + kind + length + b"".join(element[4:] for element in elements)
    number, form = VALUE_TYPES[type(value)]
    return struct.pack("<I" + form, number, value)


def encode_numbers(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor's numbers as a kind's bytes, in order."""
    tensor = tensor.detach().to("cpu").contiguous()
    if kind == "f32":
        return tensor.float().numpy()
    if kind == "f16":
        return tensor.half().numpy()
    if kind == "bf16":
        return tensor.bfloat16().view(torch.int16).numpy()
    blocks = tensor.float().view(-1, NUMBERS_PER_BLOCK).numpy()                                 # (blocks, 32)
    return encode_q8_0(blocks) if kind == "q8_0" else encode_q4_0(blocks)


def encode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """fp32 (blocks, 32) -> uint8 (blocks, 34): a scale in f16, then 32 signed bytes, rounded half away from zero."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * reciprocal(scale)
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), rounded.view(np.uint8)], axis=1)


def encode_q4_0(blocks: np.ndarray) -> np.ndarray:
    """fp32 (blocks, 32) -> uint8 (blocks, 18): a scale in f16, then 32 numbers of 4 bits, for -8 to 7 scales.

    The number farthest from zero becomes -8, so the scale has the opposite sign. A byte holds number i in its low half
    and number i + 16 in its high half.
    """
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = farthest / np.float32(-8)
    numbers = np.clip(np.trunc(blocks * reciprocal(scale) + np.float32(8.5)), 0, 15).astype(np.uint8)
    packed = numbers[:, :16] | numbers[:, 16:] << 4                                 # (blocks, 16)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), packed], axis=1)


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where a block is all zeros."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
