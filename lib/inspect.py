"""`python load_weights.py inspect DIR`: what a folder holds, what would be ignored, what is missing."""
from collections import Counter
from math import prod
from pathlib import Path

import torch

from data import EOT, eot_id, load_tokenizer
from lib.common import choose_device
from lib.folders import (CLIP, LLAVA, MIPHA, PHI, SIGLIP, Folder, blueprint, check_tensors, config_of, meta_model,
                         read_folder, tensor_files)
from lib.layouts import UNUSED_HEAD, UNUSED_LAYERS
from lib.save_weights import verify_checksums

LAYOUTS = (     # a piece of a language model's tensor names -> which of the published layouts it is in
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
NEXT = {
    PHI: "python load_weights.py merge --llm {}    (with a CLIP or SigLIP folder as --vision)",
    CLIP: "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)",
    SIGLIP: "python load_weights.py merge --vision {}    (with a Phi-2 folder as --llm)",
    LLAVA: "python sample.py --model {} --image x.jpg",
    MIPHA: "python sample.py --model {} --image x.jpg",
}


def print_row(label: str, text: object) -> None:
    print(f"  {label:10} {text}")


def inspect(path: Path, try_out: bool = False) -> int:
    """Print a page about a folder: what it is, what would be left out, what is missing, and what to run next.

    try_out: run the model as well. -> the exit code: 2 if there is a problem.
    """
    folder = read_folder(path)
    files = tensor_files(path)
    print(f"{path}: {folder.kind}")
    print_row("files", f"{len(files)} x {files[0].suffix[1:]}, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")
    for part in folder.parts:
        inspect_part(folder, part)
    missing = "nothing"
    if "llm" in folder.parts:
        try:
            tokenizer = load_tokenizer(path)
            where = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.json and merges.txt"
            print_row("tokenizer", f"{where}: {tokenizer.get_vocab_size():,} tokens, {EOT} is {eot_id(tokenizer)}")
        except (ValueError, OSError) as e:
            print_row("tokenizer", f"none: {e}")
            missing = "a tokenizer"
    try:
        inspect_config(folder)
        intact = verify_checksums(path)
        if intact is None:
            print_row("checksums", "none; folders that this program saves have them")
        else:
            print_row("checksums", f"verified: {intact} files are as they were written")
    except (ValueError, OSError) as e:
        print_row("problem", e)
        return 2
    print_row("missing", missing)
    sound = try_folder(folder) if try_out else True
    print_row("next", NEXT.get(folder.kind, "nothing").format(path))
    return 0 if sound else 2


def try_folder(folder: Folder) -> bool:
    """Run a folder's model on a few texts and pictures and print what it shows. -> False if it was read wrong."""
    from lib.try_model import try_model
    from load_weights import load_model, load_phi
    if folder.kind not in (PHI, LLAVA, MIPHA):
        print_row("try", f"nothing: {folder.kind} does not speak; merge it with a language model first")
        return True
    parameters = sum(prod(stored.shape) for pieces in folder.found.values() for stored in pieces.values())
    # fp32 shows the fine differences. A model of billions of parameters would take all memory in it, and minutes.
    dtype = torch.float32 if parameters < 1e9 else torch.bfloat16
    device = choose_device(None)
    model = None
    if folder.kind == PHI:
        llm = load_phi(folder.path, dtype, device)
    else:
        model = load_model(folder.path, dtype, device)
        llm = model.llm
    sound = True
    for finding in try_model(llm, load_tokenizer(folder.path), model):
        print_row("try", f"{finding.verdict:8} {finding.what}: {finding.shown} (a sound model: {finding.expected})")
        sound = sound and finding.verdict != "misread"
    if not sound:
        print_row("problem", "the tensors are all there, but what the model does is not what such a model was trained "
                             "to do: these are other weights than expected, or they are read in the wrong way")
    return sound


def inspect_part(folder: Folder, part: str) -> None:
    """Print how many tensors there are of the language model, the tower or the projector, and how large they are."""
    tensors = []
    for name, pieces in folder.found.items():
        if name.startswith(part + "."):
            tensors += pieces.values()
    dtypes = " and ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in tensors}))
    parameters = sum(prod(stored.shape) for stored in tensors)
    size = sum(stored.nbytes for stored in tensors) / 1e6
    print_row(part, f"{len(tensors)} tensors, {parameters:,} parameters, {dtypes}, {size:,.1f} MB")
    if part == "llm":
        for mark, text in LAYOUTS:
            if any(mark in stored.name for stored in tensors):
                print_row("", text)
                break


def inspect_config(folder: Folder) -> None:
    """Print a folder's sizes and what would be left out. ValueError names everything that does not fit."""
    config = config_of(folder)
    if "llm" in folder.parts:
        llm = config.llm
        print_row("config", f"{llm.n_layer} layers of width {llm.n_embd}, {llm.n_head} heads, {llm.block_size} positions, "
                            f"{llm.vocab_size} rows of vocabulary, dropout {llm.dropout:g}")
    if "vision" in folder.parts:
        vision = config.vision
        print_row("config", f"{vision.image_size} x {vision.image_size} pixels make {vision.n_patches} patches, "
                            f"{vision.n_used} of {vision.n_layer} layers are used, of width {vision.n_embd}, "
                            f"{vision.n_head} heads")
        print_row("images", f"{config.image_mode}: {IMAGE_WORDS[config.image_mode]}")
    built = {name for name, parameter in meta_model(config).named_parameters()}
    ignored = Counter(folder.dropped.values())
    for name, pieces in folder.found.items():
        if name.startswith("vision.head."):
            ignored[UNUSED_HEAD] += len(pieces)
        elif name not in built:
            ignored[UNUSED_LAYERS] += len(pieces)
    for reason, count in ignored.items():
        print_row("ignored", f"{count} tensors: {reason}")
    needed = [name for name in blueprint(config) if name.startswith(folder.parts)]
    check_tensors([folder], needed, config, limit=10 ** 6)
