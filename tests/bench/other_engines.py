"""Does llama.cpp compute what we compute? One exported model, both engines, in one process; see docs/other-engines.md.

$ python load_weights.py export --model out/demo/finetune --out out/gguf --to gguf
$ python tests/bench/other_engines.py --model out/demo/finetune --gguf out/gguf --root out/demo/data

Needs `pip install llama-cpp-python` beside requirements.txt. Three things are compared, each where it arises, so that a
difference names its cause: the logits and greedy ids of a question without a picture, what the tower and the projector
make of a picture, and greedy answers to the demo's questions, with the prompt from the chat template in the file.

llama-cpp-python takes its vision half from the folder that the environment variable MTMD_CPP_LIB names, if it is set.
"""
import base64
import ctypes
import io
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llama_cpp
import numpy as np
import torch
from llama_cpp import Llama, mtmd_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image

from benchmarks.scoring import BLANK, grade_plain
from benchmarks.shapes import read
from data import ImageConfig, encode_prompt, load_image, load_tokenizer
from lib.chat import ask
from lib.common import Parser, run_command
from lib.generate import Session
from load_weights import load_model
from model import LLaVAPhi

QUESTION = "What is in this picture, and what is it for?"
GGML_TYPE_F32 = 0


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


def compare_text(model: LLaVAPhi, llm: Llama, ids: list[int], n_tokens: int) -> None:
    """Logits behind a question without a picture, then n_tokens greedy ids. The end token does not end them."""
    size = model.config.vision.image_size
    no_image = torch.zeros(0, 3, size, size, dtype=torch.uint8)
    logits = Session(model).prefill([ids], [no_image], len(ids))[0]
    columns = Session(model).generate([ids], [no_image], max_new_tokens=n_tokens, eos_id=-1)
    ours = [column[0] for column in columns]

    llm.reset()
    llm.eval(ids)
    theirs = [int(llm.scores[llm.n_tokens - 1].argmax())]
    found = torch.from_numpy(llm.scores[llm.n_tokens - 1].copy())
    while len(theirs) < n_tokens:
        llm.eval(theirs[-1:])
        theirs.append(int(llm.scores[llm.n_tokens - 1].argmax()))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n_tokens)
    print(f"text       first {same} of {n_tokens} greedy ids the same; logits: relative error "
          f"{relative_error(logits, found):.2g}, largest difference {(logits - found).abs().max():.2g} "
          f"(the head bias alone is up to {model.llm.lm_head.bias.abs().max():.2g})")


def encode_picture(llm: Llama, context: mtmd_cpp.mtmd_context_p, pixels: torch.Tensor) -> torch.Tensor:
    """pixels (3, S, S) uint8, of the tower's own size so that nothing is resized -> patches (P, C) as the decoder's."""
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
    shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llm.n_embd()
    patches = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), shape).copy()
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    return torch.from_numpy(patches)


def compare_picture(model: LLaVAPhi, llm: Llama, context: mtmd_cpp.mtmd_context_p, image: torch.Tensor) -> None:
    """Patches behind the projector. An order or a layer of the tower that differs shows as a cosine far from 1."""
    theirs = encode_picture(llm, context, image)                                    # (P, C)
    ours = model.projector(model.vision(image[None]))[0].float()                    # (P, C)
    if ours.shape != theirs.shape:
        raise ValueError(f"llama.cpp makes {tuple(theirs.shape)} of a picture, the model {tuple(ours.shape)}")
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)            # (P,)
    print(f"picture    {len(ours)} patches: relative error {relative_error(ours, theirs):.2g}; cosine "
          f"{cosine.mean():.5f} on average, {cosine.min():.5f} at worst")


def their_answer(llm: Llama, question: str, pixels: torch.Tensor) -> str:
    """As docs/other-engines.md asks, with the picture sized beforehand."""
    png = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": question}]
    reply = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=32)
    return reply["choices"][0]["message"]["content"].strip()


def compare_answers(model: LLaVAPhi, folder: Path, llm: Llama, root: Path, n: int) -> None:
    """The demo's first n questions about a picture."""
    tokenizer = load_tokenizer(folder)
    examples = [example for example in read(root / "shapes", Namespace()) if example.image != BLANK][:n]
    same = ours_right = theirs_right = 0
    for example in examples:
        pixels = load_image(example.image, ImageConfig.of(model.config.vision, model.config.image_mode))
        [ours] = ask(model, tokenizer, example.prompt, [pixels[None]], max_new_tokens=32)
        theirs = their_answer(llm, example.prompt, pixels)
        if ours != theirs:
            print(f"{example.question_id}: {example.prompt!r}: ours {ours!r}, llama.cpp's {theirs!r}")
        same += ours == theirs
        ours_right += grade_plain(example, ours).score
        theirs_right += grade_plain(example, theirs).score
    print(f"questions  {same} of {len(examples)} answers the same; "
          f"right: ours {ours_right:g}, llama.cpp's {theirs_right:g}")


@torch.inference_mode()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that was exported")
    parser.add_argument("--gguf", type=Path, required=True, help="folder of `export --to gguf`")
    parser.add_argument("--image", type=Path, default=Path("tests/golden/images/photo.jpg"), help="one to look at")
    parser.add_argument("--root", type=Path, help="the demo's data, for questions about pictures")
    parser.add_argument("--questions", type=int, default=100, help="how many of them")
    parser.add_argument("--tokens", type=int, default=32, help="how many greedy ids to compare")
    args = parser.parse_args()
    [decoder] = args.gguf.glob("model-*.gguf")

    model = load_model(args.model)
    ids = encode_prompt([QUESTION], load_tokenizer(args.model), image=False)
    # Keys and values in fp32, because in llama.cpp's usual fp16 they would be most of the difference in an f32 file.
    tower = MTMDChatHandler(str(args.gguf / "mmproj-f16.gguf"), use_gpu=False)
    llm = Llama(str(decoder), n_ctx=model.config.llm.block_size, logits_all=True, verbose=False, chat_handler=tower,
                type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    print(f"{decoder.name}, llama-cpp-python {llama_cpp.__version__}")
    compare_text(model, llm, ids, args.tokens)
    tower._init_mtmd_context(llm)
    image = load_image(args.image, ImageConfig.of(model.config.vision, model.config.image_mode))
    compare_picture(model, llm, tower.mtmd_ctx, image)
    if args.root:
        compare_answers(model, args.model, llm, args.root, args.questions)


if __name__ == "__main__":
    sys.exit(run_command(main))
