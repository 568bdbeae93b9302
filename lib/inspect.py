"""`python load_weights.py inspect DIR`: what a folder holds, what is ignored or missing, and what to do with it.

All tensors can be in place and still be read wrongly: with q, k and v in another order, or rotary channels paired
differently, the shapes are the same, and the model talks nonsense. Therefore `--try` runs the model: it predicts a page
of text that it has never seen, and looks at an image.
"""
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from data import EOT, IGNORE, Sample, collate, eot_id
from lib.chat import ask
from lib.common import plural
from lib.device import choose_device, to_device
from lib.folders import (Kind, Weights, check_tensors, meta_model, open_folder, projector_warning, read_tensor,
                         saved_shapes)
from lib.head_bias import HEAD_BIAS
from lib.save_weights import lacks_image_row, verify_checksums
from lib.tensor_files import tensor_files
from model import LLaVAPhi

LAYOUTS = (     # part of a language model's tensor names -> the published layout
    (".q_proj.", "split q, k, v (transformers 4.37 and newer)"),
    ("query_key_value", "fused query_key_value, packed head by head (transformers 4.36, LLaVA-Phi)"),
    ("transformer.h.", "mixer.Wqkv (phi-msft)"),
    ("layers.", "one list, layers.N (the earliest Phi files)"),
)
IMAGE_WORDS = {
    "crop": "the square in the middle of a picture",
    "pad": "the whole picture, padded to a square",
    "squash": "the whole picture, squeezed into a square",
}
MERGE_LLM = "python load_weights.py merge --llm {}    (with a CLIP or SigLIP folder as --vision)"
MERGE_TOWER = "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)"
ASK = "python sample.py --model {} --image x.jpg"
NEXT = {
    Kind.PHI: MERGE_LLM, Kind.NO_TOWER: MERGE_LLM, Kind.CLIP: MERGE_TOWER, Kind.SIGLIP: MERGE_TOWER,
    Kind.PROJECTOR: "python load_weights.py merge --projector {}    (with folders as --llm and --vision)",
    Kind.LLAVA: ASK, Kind.MIPHA: ASK,
}
UNUSED_LAYERS = "layers and LayerNorm after the hidden state that is read: not loaded, but kept when a model is saved"


def print_row(label: str, text: object) -> None:
    print(f"  {label:10} {text}")


def inspect(path: Path, load_model: Callable[..., LLaVAPhi] | None = None) -> int:
    """Print a page about a folder -> the exit code: 2 if there is a problem.

    load_model: given to try the model out as well.
    """
    weights, files = open_folder(path), tensor_files(path)
    print(f"{path}: {weights.kind}")
    print_row("files", f"{len(files)} x {files[0].suffix[1:]}, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")
    for part in weights.parts:
        inspect_part(weights, part)
    missing = "nothing"
    try:
        if "llm" in weights.parts:
            missing = inspect_tokenizer(weights)
        warning = projector_warning(weights)
        if warning:
            print_row("warning", warning)
        inspect_config(weights)
        if "llm" in weights.parts and missing == "nothing" and lacks_image_row(weights.tokenizer, weights.config.llm):
            print_row("", "no row is left for <image>: a saved model gets one more, which only other programs use")
        intact, problem = verify_checksums(path)
    except (ValueError, OSError) as e:
        problem = e
    if problem:
        print_row("problem", problem)
        return 2
    verified = f"verified: {plural(intact, 'file')} as written"
    print_row("checksums", verified if intact else "none; folders that this program saves have them")
    print_row("missing", missing)
    sound = try_out(weights, load_model) if load_model else True
    print_row("next", f"python train.py --stage pretrain --model {path}" if warning else
              NEXT.get(weights.kind, "nothing").format(path))
    return 0 if sound else 2


def inspect_part(weights: Weights, part: str) -> None:
    """Print the number and the size of the language model's, the tower's or the projector's tensors."""
    tensors = []
    for name, pieces in weights.found.items():
        if name.startswith(part + "."):
            tensors += pieces.values()
    dtypes = " and ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in tensors}))
    parameters = sum(prod(stored.shape) for stored in tensors)
    size = sum(stored.nbytes for stored in tensors) / 1e6
    print_row(part, f"{plural(len(tensors), 'tensor')}, {parameters:,} parameters, {dtypes}, {size:,.1f} MB")
    layouts = [text for mark, text in LAYOUTS if any(mark in stored.name for stored in tensors)]
    if part == "llm" and layouts:
        print_row("", layouts[0])


def inspect_tokenizer(weights: Weights) -> str:
    """Print the tokenizer's size, or what is wrong with it -> what is missing."""
    try:
        tokenizer = weights.tokenizer
    except (ValueError, OSError) as e:
        print_row("tokenizer", f"none: {e}")
        return "a tokenizer"
    where = "tokenizer.json" if (weights.paths[0] / "tokenizer.json").is_file() else "vocab.json and merges.txt"
    print_row("tokenizer", f"{where}: {tokenizer.get_vocab_size():,} tokens, {EOT} is {eot_id(tokenizer)}")
    return "nothing"


def inspect_config(weights: Weights) -> None:
    """Print a model's sizes and which tensors are ignored. ValueError names everything that does not fit."""
    llm, vision, image_mode = weights.config.llm, weights.config.vision, weights.config.image_mode
    if "llm" in weights.parts:
        print_row("config", f"{llm.n_layer} layers of width {llm.n_embd}, {llm.n_head} heads, "
                            f"{llm.block_size} positions, {llm.vocab_size} rows of vocabulary, dropout {llm.dropout:g}")
        if HEAD_BIAS in weights.found and not read_tensor(weights, HEAD_BIAS).any():
            print_row("", "head bias folded: it is zero, and the head's weight does its work, also in transformers")
    if "vision" in weights.parts:
        print_row("config", f"{vision.image_size} x {vision.image_size} pixels make {vision.n_patches} patches, "
                            f"{vision.n_used} of {vision.n_layer} layers are used, of width {vision.n_embd}, "
                            f"{vision.n_head} heads")
        print_row("images", f"{image_mode}: {IMAGE_WORDS[image_mode]} (config.json's image_aspect_ratio changes it)")
    model = meta_model(weights.config)
    built = dict(model.named_parameters())
    ignored = Counter(weights.dropped.values())
    for name, pieces in weights.found.items():
        if name not in built:
            ignored[UNUSED_LAYERS] += len(pieces)
    for reason, count in ignored.items():
        print_row("ignored", f"{plural(count, 'tensor')}: {reason}")
    shapes = saved_shapes(model)
    if "vision" not in weights.parts:           # then the width of what a projector reads is known from nothing else
        shapes |= {name: weights.found[name]["whole"].shape for name in shapes.keys() & weights.found.keys()
                   if name.startswith("projector.")}
    check_tensors(weights, shapes, [name for name in shapes if name.startswith(weights.parts)], limit=10 ** 6)

# ---------------------------------------------------------------------------------------------------
# --try


class Page(NamedTuple):
    """A text that no model was trained on, and a question about a red circle in the same language."""
    file: str
    question: str
    sound: float                    # nats per token: a sound model is below this,
    misread: float                  # and one whose weights were read wrongly above this


# A uniform guess has ln 51200 = 10.8, and token frequencies alone about 7: a model with scrambled layers can do no
# better. Phi-2 has 2 to 3 on plain prose, and perhaps half a nat more after tuning on conversations.
ENGLISH = Page("english.txt", "What is the color of the circle?\nAnswer the question using a single word or phrase.",
               sound=4.0, misread=6.0)
# The demo's language model only knows about shapes. Its page describes images in words, from which the captions follow
# with certainty: 0.0003 nats, or 0.004 after tuning. Rotary channels paired with their neighbors give 0.2, any wrong
# order of q, k and v more than 0.7.
SHAPES = Page("shapes.txt", "What colour is the circle?", sound=0.01, misread=0.03)


def try_out(weights: Weights, load_model: Callable[..., LLaVAPhi]) -> bool:
    """Run a folder's model and print what it shows -> False if its weights were read wrongly."""
    if weights.kind not in (Kind.PHI, Kind.LLAVA, Kind.MIPHA):
        print_row("try", f"nothing: {weights.kind} does not speak; merge it with a language model first")
        return True
    parameters = sum(prod(stored.shape) for pieces in weights.found.values() for stored in pieces.values())
    # fp32 shows small differences, but with billions of parameters it would take too much memory and minutes.
    dtype = torch.float32 if parameters < 1e9 else torch.bfloat16
    model = load_model(weights, dtype, choose_device(None))
    tok = weights.tokenizer
    page = SHAPES if len(tok.encode(" redcircletopright").ids) == 1 else ENGLISH        # one word of the demo's
    loss = page_loss(model, tok, page)
    verdict = "sound" if loss < page.sound else "misread" if loss > page.misread else "unclear"
    print_row("try", f"a page of text: {loss:.4g} nats per token, {verdict} "
                     f"(a sound model is below {page.sound}, a misread one above {page.misread})")
    if weights.kind != Kind.PHI:
        drawn, blank = ask(model, tok, page.question, draw_circle(), max_new_tokens=12)
        verdict = "sound" if "red" in drawn.lower() and "red" not in blank.lower() else "unclear"
        print_row("try", f"a picture: a red circle is {drawn.strip()!r}, no circle is {blank.strip()!r}, {verdict} "
                         "(a trained projector: red, and something else)")
    if loss > page.misread:
        print_row("problem", "the tensors are all there, but the model does not do what such a model was trained for: "
                             "these are other weights than expected, or they are read in the wrong way")
    return loss <= page.misread


@torch.no_grad()
def page_loss(model: LLaVAPhi, tok: Tokenizer, page: Page) -> float:
    """Mean loss in nats per token. In a line "given => predicted", only the second half counts."""
    text = (Path(__file__).parent / page.file).read_text(encoding="utf-8")
    passages = [line.split(" => ") for line in text.splitlines()] if " => " in text else [["", text]]
    samples = []
    for given, predicted in passages:
        before = tok.encode(given).ids or [eot_id(tok)]         # as between two documents in training
        ids = (before + tok.encode(predicted).ids)[:model.config.llm.block_size]
        labels = [IGNORE] * len(before) + ids[len(before):]
        samples.append(Sample("", ids, labels, None))
    total = model(*to_device(collate(samples, model.config.vision.image_size), model.device))
    return total.item() / sum(label != IGNORE for sample in samples for label in sample.labels)


def draw_circle() -> tuple[Image.Image, Image.Image]:
    """A red circle in the top right quarter of a dark background, and just the background."""
    blank = Image.new("RGB", (336, 336), (40, 40, 48))
    drawn = blank.copy()
    ImageDraw.Draw(drawn).ellipse((196, 28, 308, 140), (214, 48, 49))
    return drawn, blank
