"""`export --to gguf`: the file format, the packed types, the tokenizer, and which tensors there are.

That llama.cpp computes our numbers from these files is shown by tests/bench/other_engines.py.
"""
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_MIPHA, TINY_MODEL, load_weights_command
from tokenizers import AddedToken, Tokenizer

from data import SYSTEM
from lib.gguf import encode_numbers, tokenizer_fields
from lib.save_weights import verify_checksums
from load_weights import load_model
from model import Phi, PhiConfig

TYPES = {0: ("f32", 1, 4), 1: ("f16", 1, 2), 30: ("bf16", 1, 2), 8: ("q8_0", 32, 34), 2: ("q4_0", 32, 18)}
SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


class Reader:
    """A GGUF file read by the specification, and by nothing of the writer's."""

    def __init__(self, path: Path):
        self.data = path.read_bytes()
        self.at = 0
        assert self.data[:4] == b"GGUF"
        self.at = 4
        version, n_tensors, n_fields = self.unpack("<IQQ")
        assert version == 3
        self.fields = dict((self.string(), self.value(*self.unpack("<I"))) for _ in range(n_fields))
        tensors = {}
        for _ in range(n_tensors):
            name = self.string()
            [n] = self.unpack("<I")
            tensors[name] = (self.unpack(f"<{n}Q")[::-1], *self.unpack("<IQ"))
        start = self.at + -self.at % 32
        self.tensors = {name: self.tensor(start + offset, shape, *TYPES[number])
                        for name, (shape, number, offset) in tensors.items()}

    def unpack(self, form: str) -> tuple:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self) -> str:
        [length] = self.unpack("<Q")
        self.at += length
        return self.data[self.at - length:self.at].decode()

    def value(self, number: int) -> object:
        if number == 9:
            number, length = self.unpack("<IQ")
            return [self.value(number) for _ in range(length)]
        return self.string() if number == 8 else self.unpack(SCALARS[number])[0]

    def tensor(self, start: int, shape: tuple, kind: str, block: int, nbytes: int) -> tuple[str, np.ndarray]:
        assert start % 32 == 0
        size = int(np.prod(shape)) // block * nbytes
        raw = np.frombuffer(self.data[start:start + size], np.uint8)
        assert len(raw) == size, "the file ends before its last tensor"
        return kind, decode(raw, kind).reshape(shape)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of a kind -> fp32, one block after the other."""
    if kind in ("f32", "f16"):
        return raw.view(np.float32 if kind == "f32" else np.float16).astype(np.float32)
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    values = []
    for block in raw.reshape(-1, 34 if kind == "q8_0" else 18):
        [scale] = block[:2].view(np.float16).astype(np.float32)
        if kind == "q8_0":
            numbers = block[2:].view(np.int8).astype(np.float32)
        else:
            numbers = np.concatenate([block[2:] & 15, block[2:] >> 4]).astype(np.float32) - 8
        values.append(scale * numbers)
    return np.concatenate(values)


def files_of(source: Path, out: Path, kind: str) -> tuple[Reader, Reader]:
    load_weights_command(["export", "--model", str(source), "--out", str(out), "--to", "gguf", "--type", kind])
    return Reader(out / f"model-{kind}.gguf"), Reader(out / "mmproj-f16.gguf")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_decoder(kind, tmp_path):
    """Every number is there under llama.cpp's name, exactly in fp32, else as the kind rounds it; no bias is folded."""
    decoder, _ = files_of(TINY_MODEL, tmp_path / "gguf", kind)
    llm = load_model(TINY_MODEL).llm
    expected = {"token_embd.weight": llm.wte.weight, "output.bias": llm.lm_head.bias,
                "output.weight": llm.lm_head.weight, "output_norm.weight": llm.ln_f.weight,
                "blk.1.attn_qkv.weight": llm.h[1].attn.qkv.weight,
                "blk.1.attn_output.weight": llm.h[1].attn.proj.weight, "blk.0.attn_norm.bias": llm.h[0].ln.bias,
                "blk.0.ffn_up.weight": llm.h[0].mlp.fc.weight, "blk.1.ffn_down.weight": llm.h[1].mlp.proj.weight}
    assert len(decoder.tensors) == sum(1 for _ in llm.parameters())
    for name, tensor in expected.items():
        stored_as, values = decoder.tensors[name]
        ours = tensor.to_dense().numpy()
        # Rows of 40 are no blocks of 32, so only one matrix of the tiny model is in 8 or 4 bits.
        in_blocks = ours.ndim == 2 and ours.shape[-1] % 32 == 0
        assert stored_as == ("f32" if ours.ndim == 1 else kind if in_blocks or kind[0] != "q" else "f16")
        step = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3, "q4_0": 0.14}[stored_as]
        assert np.abs(values - ours).max() <= step * np.abs(ours).max(), name
    assert verify_checksums(tmp_path / "gguf") == (2, "")


def test_what_the_decoder_says_of_itself(tmp_path):
    decoder, _ = files_of(TINY_MODEL, tmp_path / "gguf", "f16")
    fields = decoder.fields
    assert fields["general.architecture"] == "phi2" and fields["phi2.rope.dimension_count"] == 8
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 512
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][0] == 3 and fields["tokenizer.ggml.tokens"][-1] == "[PAD511]"
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert SYSTEM[:40] in fields["tokenizer.chat_template"]
    assert SYSTEM in (tmp_path / "gguf" / "Modelfile").read_text()


@pytest.mark.parametrize("source", [TINY_MODEL, TINY_MIPHA])
def test_the_tower(source, tmp_path):
    """Only the layers that are computed, and the number of them where llama.cpp looks for it."""
    _, tower = files_of(source, tmp_path / "gguf", "f16")
    model = load_model(source)
    vision, siglip = model.config.vision, source == TINY_MIPHA
    assert tower.fields["clip.vision.block_count"] == vision.n_used
    assert tower.fields["clip.vision.feature_layer"] == [vision.n_used]
    assert tower.fields["clip.use_gelu"] == siglip
    assert np.allclose(tower.fields["clip.vision.image_mean"], vision.mean)
    layers = {name.split(".")[2] for name in tower.tensors if name.startswith("v.blk.")}
    assert layers == {str(layer) for layer in range(vision.n_used)}
    assert ("v.patch_embd.bias" in tower.tensors) == siglip and ("v.class_embd" in tower.tensors) != siglip
    assert not any("post_ln" in name for name in tower.tensors)
    width = vision.n_embd
    for name, ours in (("v.blk.1.attn_k.weight", model.vision.h[1].attn.qkv.weight.to_dense()[width:2 * width]),
                       ("v.blk.0.ffn_up.weight", model.vision.h[0].mlp.fc.weight.to_dense()),
                       ("v.patch_embd.weight", model.vision.patch.weight), ("mm.2.bias", model.projector.proj.bias),
                       ("v.position_embd.weight", model.vision.pos),
                       ("mm.0.weight", model.projector.fc.weight.to_dense())):
        tolerance = 1e-3 * float(ours.abs().max())
        np.testing.assert_allclose(tower.tensors[name][1], ours.numpy(), atol=tolerance, err_msg=name)


def test_blocks_of_8_and_4_bits():
    """Each block by the definition in plain loops, a block of zeros and halves among them."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2] = torch.arange(64) - 31.5
    for kind in ("q8_0", "q4_0"):
        packed = encode_numbers(x, kind)
        for block, raw in zip(x.view(-1, 32).numpy(), packed, strict=True):
            farthest = max(block, key=abs)
            scale = np.float32(abs(farthest) / np.float32(127) if kind == "q8_0" else farthest / np.float32(-8))
            assert raw[:2].view(np.float16)[0] == np.float16(scale)
            inverse = np.float32(1) / scale if scale else np.float32(0)
            if kind == "q8_0":
                numbers = [int(np.sign(v)) * int(abs(np.float32(v * inverse)) + np.float32(0.5)) for v in block]
                assert raw[2:].view(np.int8).tolist() == numbers
            else:
                numbers = [min(15, int(np.float32(v * inverse) + np.float32(8.5))) for v in block]
                assert [b & 15 for b in raw[2:]] + [b >> 4 for b in raw[2:]] == numbers


def test_added_tokens_are_text(tiny_tokenizer):
    """Phi-2's runs of spaces are neither byte-level nor control tokens; unused rows have names of their own."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(" " * 31, special=False)])
    last = tokenizer.token_to_id(" " * 31)
    fields = tokenizer_fields(tokenizer, 512)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[last] == " " * 31 and types[last] == 4
    assert tokens[last + 1] == f"[PAD{last + 1}]" and types[last + 1] == 5 and len(set(tokens)) == 512
    space_a = tokenizer.encode(" a").ids[0]
    assert tokens[space_a][0] == "\u0120" and types[space_a] == 1              # GPT-2's letter for a space
    assert all(merge.count(" ") == 1 for merge in fields["tokenizer.ggml.merges"])


def test_the_gguf_package_reads_them(tmp_path):
    gguf = pytest.importorskip("gguf")
    files_of(TINY_MODEL, tmp_path / "gguf", "q8_0")
    for name in ("model-q8_0.gguf", "mmproj-f16.gguf"):
        ours, theirs = Reader(tmp_path / "gguf" / name), gguf.GGUFReader(tmp_path / "gguf" / name)
        assert {tensor.name for tensor in theirs.tensors} == ours.tensors.keys()
        for tensor in theirs.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ours.tensors[tensor.name][1].shape)
            np.testing.assert_array_equal(values, ours.tensors[tensor.name][1])


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_llama_cpp_packs_the_same_bytes(kind, tmp_path):
    """Its own quantizer, without its mixtures of types, makes of our fp32 file what we write, tensor by tensor."""
    llama_cpp, gguf = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    from tests.bench.llama import write_decoder                     # it needs llama_cpp

    llm = Phi(PhiConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=128, n_inner=512, rotary_dim=8))
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    paths = [tmp_path / name for name in ("f32.gguf", "ours.gguf", "theirs.gguf")]
    write_decoder(llm, paths[0], "f32")
    write_decoder(llm, paths[1], kind)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.pure, settings.ftype, settings.nthread = True, {"q8_0": 7, "q4_0": 2}[kind], 1
    settings.output_tensor_type = 8                                 # q8_0, also where the others have 4 bits
    assert llama_cpp.llama_model_quantize(bytes(paths[0]), bytes(paths[2]), settings) == 0
    ours, theirs = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in paths[1:])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, theirs[name].data, err_msg=name)
