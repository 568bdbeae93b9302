"""Does llama.cpp compute what we compute? One exported model, both engines, in one process; see docs/other-engines.md.

$ python load_weights.py export --model out/finetune --out out/gguf --to gguf
$ python tests/bench/other_engines.py --model out/finetune --gguf out/gguf --image x.png

Needs `pip install gguf llama-cpp-python` beside requirements.txt. Three things are compared, each where it arises, so
that a difference names its cause: the decoder's tensors in the GGUF file, the logits and greedy ids of a question
without a picture, and what the tower and the projector make of a picture, which is what the decoder then reads.
"""
import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from llama_cpp import Llama, mtmd_cpp

from data import ImageConfig, encode_prompt, load_image, load_tokenizer
from lib.common import Parser, run_command
from lib.generate import KVCache, Session, prefill
from load_weights import load_model
from model import LLaVAPhi

TENSORS = {         # llama.cpp's name of a tensor -> ours; {} is the layer
    "token_embd": "llm.wte",
    "output_norm": "llm.ln_f",
    "output": "llm.lm_head",
    "blk.{}.attn_norm": "llm.h.{}.ln",
    "blk.{}.attn_qkv": "llm.h.{}.attn.qkv",
    "blk.{}.attn_output": "llm.h.{}.attn.proj",
    "blk.{}.ffn_up": "llm.h.{}.mlp.fc",
    "blk.{}.ffn_down": "llm.h.{}.mlp.proj",
}
QUESTION = "What is in this picture, and what is it for?"


def our_tensor(model: LLaVAPhi, name: str) -> torch.Tensor:
    """The tensor of our model that llama.cpp calls `name`."""
    stem, leaf = name.rsplit(".", 1)
    layer = next((part for part in stem.split(".") if part.isdigit()), "")
    pattern = stem.replace(f".{layer}.", ".{}.") if layer else stem
    return model.get_parameter(f"{TENSORS[pattern].format(layer)}.{leaf}").to_dense()             # also if prepacked


def compare_tensors(model: LLaVAPhi, path: Path) -> None:
    """Every tensor of the decoder's GGUF file against ours. A file in four or eight bits differs by its rounding."""
    tensors = GGUFReader(path).tensors
    largest = 0.0
    values = 0
    for tensor in tensors:
        ours = our_tensor(model, tensor.name).float().numpy()
        theirs = dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
        largest = max(largest, float(np.abs(ours - theirs).max()))
        values += ours.size
    expected = sum(parameter.numel() for parameter in model.llm.parameters())
    bias = any(tensor.name == "output.bias" for tensor in tensors)
    print(f"decoder   {values:,} of {expected:,} values in {len(tensors)} tensors, largest difference {largest:.2g}; "
          f"head bias {'kept' if bias else 'LOST'}")


def compare_text(model: LLaVAPhi, llm: Llama, ids: list[int], n_tokens: int) -> None:
    """Logits behind a question without a picture, then n_tokens greedy ids. The end token does not end them."""
    size = model.config.vision.image_size
    no_image = torch.zeros(0, 3, size, size, dtype=torch.uint8)
    logits = prefill(model, [ids], [no_image], KVCache(model.llm, [ids], len(ids)))[0].numpy()
    columns = Session(model).generate([ids], [no_image], max_new_tokens=n_tokens, eos_id=-1)
    ours = [column[0] for column in columns]

    llm.reset()
    llm.eval(ids)
    theirs = [int(llm.scores[llm.n_tokens - 1].argmax())]
    difference = np.abs(llm.scores[llm.n_tokens - 1] - logits).max()
    without_bias = np.abs(model.llm.lm_head.bias.detach().float().numpy()).max()
    while len(theirs) < n_tokens:
        llm.eval(theirs[-1:])
        theirs.append(int(llm.scores[llm.n_tokens - 1].argmax()))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n_tokens)
    print(f"text      first {same} of {n_tokens} greedy ids the same; logits: largest difference {difference:.2g} "
          f"(the head bias alone is up to {without_bias:.2g})")


def encode_picture(llm: Llama, mmproj: Path, pixels: torch.Tensor) -> np.ndarray:
    """pixels (3, S, S) uint8, of the tower's own size so that nothing is resized -> patches (P, C) as the decoder's.

    Raises ValueError: llama.cpp cannot load the file.
    """
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu = False
    settings.warmup = False
    context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), llm.model, settings)
    if context is None:
        raise ValueError(f"{mmproj}: llama.cpp cannot load this as the vision half of {llm.model_path}")
    size = pixels.size(-1)
    rgb = pixels.permute(1, 2, 0).contiguous().numpy()                              # (S, S, 3), as a bitmap's bytes
    bitmap = mtmd_cpp.mtmd_bitmap_init(size, size, rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    marker = mtmd_cpp.mtmd_default_marker()
    text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    failed = mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1)
    assert not failed, f"mtmd_tokenize returned {failed}"
    chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, 0)                               # the picture is all there is
    failed = mtmd_cpp.mtmd_encode_chunk(context, chunk)
    assert not failed, f"mtmd_encode_chunk returned {failed}"
    n_patches = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
    found = mtmd_cpp.mtmd_get_output_embd(context)
    patches = np.ctypeslib.as_array(found, (n_patches, llm.n_embd())).copy()
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    mtmd_cpp.mtmd_free(context)
    return patches


def compare_picture(model: LLaVAPhi, llm: Llama, mmproj: Path, image: torch.Tensor) -> None:
    """Patches behind the projector. An order or a layer of the tower that differs shows as a cosine far from 1."""
    theirs = torch.from_numpy(encode_picture(llm, mmproj, image))                   # (P, C)
    ours = model.projector(model.vision(image[None]))[0].float()                    # (P, C)
    if ours.shape != theirs.shape:
        raise ValueError(f"{mmproj} makes {tuple(theirs.shape)} of a picture, the model {tuple(ours.shape)}")
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)            # (P,)
    error = (ours - theirs).norm() / ours.norm()
    print(f"picture   {len(ours)} patches: relative error {error:.3%}; cosine {cosine.mean():.5f} on average, "
          f"{cosine.min():.5f} at worst")


@torch.inference_mode()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that was exported")
    parser.add_argument("--gguf", type=Path, required=True, help="folder of `export --to gguf`")
    parser.add_argument("--image", type=Path, help="a picture to look at")
    parser.add_argument("--tokens", type=int, default=32, help="how many greedy ids to compare")
    args = parser.parse_args()
    [decoder] = args.gguf.glob("model-*.gguf")

    model = load_model(args.model)
    ids = encode_prompt([QUESTION], load_tokenizer(args.model), image=False)
    compare_tensors(model, decoder)
    llm = Llama(str(decoder), n_ctx=model.config.llm.block_size, logits_all=True, verbose=False)
    compare_text(model, llm, ids, args.tokens)
    if args.image:
        vision = model.config.vision
        image = load_image(args.image, ImageConfig.of(vision, model.config.image_mode))
        compare_picture(model, llm, args.gguf / "mmproj-f16.gguf", image)


if __name__ == "__main__":
    sys.exit(run_command(main))
