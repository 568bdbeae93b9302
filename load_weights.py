"""Load, merge, inspect and export weights: Phi-2, CLIP, SigLIP, LLaVA-Phi and Mipha folders in, one format out.

A folder is recognized by the names of its tensors. Its config.json only gives sizes, and its own name means nothing.
Loading is strict: a tensor that is missing, unknown or of the wrong shape is an error, and the few that are ignored on
purpose are listed in lib/layouts.py. Tensors are read one at a time and copied into the model, so loading takes the
memory of the model and of one tensor. A saved folder is self-contained, and transformers'
LlavaForConditionalGeneration and vLLM read it as well.

    python load_weights.py merge --llm checkpoints/phi-2 --vision checkpoints/clip-vit-large-patch14-336 --out out/base
    python load_weights.py merge --vision checkpoints/siglip-so400m-patch14-384 --out out/mipha-base
    python load_weights.py inspect out/base --try
    python load_weights.py export --model out/finetune --out out/llava-phi --dtype bf16
    python load_weights.py export --model out/finetune --out out/gguf --to gguf --type q8_0
"""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.common import Parser, dtype_name, parse_or_exit, run_command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line of `python load_weights.py`. ValueError describes a mistake in it."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="make one base model from a Phi-2 folder and a CLIP or SigLIP folder")
    merging.add_argument("--llm", type=Path, default=Path("checkpoints/phi-2"), help="folder of the language model")
    merging.add_argument("--vision", type=Path, default=Path("checkpoints/clip-vit-large-patch14-336"),
                         help="folder of the vision tower, CLIP or SigLIP")
    merging.add_argument("--projector", type=Path, metavar="FILE", help="trained projector (mm_projector.bin, as "
                         "LLaVA's stage 1 writes it); default: that of --llm if it has one, else a new one")
    merging.add_argument("--out", type=Path, default=Path("out/base"), help="folder to write")
    merging.add_argument("--seed", type=int, default=42, help="seed of the new projector's weights")
    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("folder", type=Path)
    inspecting.add_argument("--try", dest="try_out", action=argparse.BooleanOptionalAction, default=False,
                            help="also run the model for a minute, and judge whether its output makes sense")
    exporting = commands.add_parser("export", help="convert any readable model to the format we save")
    exporting.add_argument("--model", type=Path, default=Path("out/finetune"),
                           help="folder to read: a model, or a training checkpoint (out/step_NNNNNN)")
    exporting.add_argument("--out", type=Path, required=True, help="folder to write")
    exporting.add_argument("--to", choices=("model", "parts", "gguf"), default="model",
                           help="model: one folder, which transformers and vLLM read too; gguf: two files for "
                                "llama.cpp and Ollama; parts: Phi, vision tower and projector separately")
    exporting.add_argument("--type", choices=("f32", "f16", "bf16", "q8_0", "q4_0"),
                           help="how a GGUF file stores the language model's matrices; default: f16")
    exporting.add_argument("--head-bias", choices=("fold", "keep"),
                           help="fold (the default): the bias of the language model's head is folded into its weight, "
                                "exactly, since transformers' Llava has no such bias; keep: both as they are")
    exporting.add_argument("--scores", type=Path,
                           help="folder that eval.py wrote, such as out/eval: its scores go into the model's README.md")
    for command in (merging, exporting):
        command.add_argument("--dtype", type=dtype_name, help="bf16 or fp32; default: each tensor as it is stored")
    args = parser.parse_args(argv)
    if args.command == "export":
        for flag, forms in (("type", "gguf"), ("head_bias", "model"), ("scores", "model"), ("dtype", "model or parts")):
            if getattr(args, flag) is not None and args.to not in forms.split(" or "):
                parser.error(f"--{flag.replace('_', '-')} is for --to {forms}, found --to {args.to}")
    return args


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)         # --help and mistakes are answered before the imports below take seconds

import torch
from torch import Tensor

from lib.checkpoint import read_for_export, trained_tensors
from lib.configs import config_of_run
from lib.device import torch_dtype
from lib.folders import MODELS, Kind, Weights, check_tensors, meta_model, open_weights, read_tensor, saved_shapes
from lib.gguf import save_gguf
from lib.inspect import inspect
from lib.lora import merge_lora
from lib.model_card import read_scores
from lib.quant import check_int4_product, copy_or_quantize, prepack_linears, quantize_linears
from lib.save_weights import Lazy, collect, run_settings, save_model, save_parts
from model import LLaVAPhi, init_weights

# ---------------------------------------------------------------------------------------------------
# Loading


def load_model(source: Weights | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               bits: int = 16) -> LLaVAPhi:
    """Load a folder of any layout as a frozen model in eval mode, straight onto its device.

    source: the folder of a LLaVA-Phi or Mipha model, or opened weights; those of Phi-2 give a model without a tower.
    bits: 8 or 4 quantizes the Linears, each weight as it is read, so the model never exists at full size. Linears that
    stay as they are get prepacked where that is faster on a CPU. ValueError where 4 bits are not supported.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype}: expected bfloat16 or float32; Phi-2's attention scores overflow in fp16")
    if bits == 4:
        check_int4_product(torch.device(device))
    weights = source if isinstance(source, Weights) else open_weights(source)
    model = meta_model(weights.config, "vision" in weights.parts).to(dtype).eval()
    # Checked before memory is allocated: a config.json can claim tensors of any size.
    check_tensors(weights, saved_shapes(model), [name for name, _ in model.named_parameters()])
    if bits < 16:
        quantize_linears(model, bits)           # on the meta device this only changes classes
    model = model.to_empty(device=device).requires_grad_(False)
    copy_tensors(model, weights, Tensor.copy_)
    prepack_linears(model)
    return model


def load_into(model: LLaVAPhi, source: Weights, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
              allow_missing: tuple[str, ...] = ()) -> None:
    """Fill a model from opened weights, one tensor at a time.

    copy(parameter, tensor): called once per parameter that is not quantized; it must cast, and not keep `tensor` (on
    the CPU, in the file's dtype). Quantized layers quantize their tensors themselves.
    allow_missing: prefixes such as "projector." that the source may lack altogether, but not partly; if it does, their
    parameters are left as they are.
    """
    absent = tuple(part for part in allow_missing if not any(name.startswith(part) for name in source.found))
    plain = meta_model(model.config, tower=model.vision is not None)        # as it is stored: in full, and not adapted
    needed = [name for name, _ in plain.named_parameters() if not name.startswith(absent)]
    check_tensors(source, saved_shapes(plain), needed)
    copy_tensors(model, source, copy)


@torch.no_grad()
def copy_tensors(model: LLaVAPhi, source: Weights, copy: Callable[[Tensor, Tensor], object]) -> None:
    """Read tensors in file order (sequential reads). Only one is alive at a time."""
    names = {name for name, _ in model.named_parameters()}
    for name in source.found:
        if name in names:
            copy_or_quantize(model, name, read_tensor(source, name), copy)

# ---------------------------------------------------------------------------------------------------
# Commands


def merge(llm: Path, vision: Path, out: Path, seed: int, dtype: torch.dtype | None,
          projector: Path | None = None) -> None:
    """Write one model from a Phi-2 folder, a CLIP or SigLIP folder, and a projector: the given one, else a new one."""
    bases = open_weights(llm, vision, *([projector] if projector else []))
    tensors = {}
    if "projector" not in bases.parts:
        model = meta_model(bases.config)
        shapes = saved_shapes(model)            # checked before a new projector of their width takes memory
        check_tensors(bases, shapes, [name for name in shapes if not name.startswith("projector.")])
        fresh = model.projector.to_empty(device="cpu")
        init_weights(fresh, torch.Generator().manual_seed(seed))
        fresh.to(dtype or bases.dtype("llm.wte.weight"))
        tensors = {f"projector.{name}": parameter for name, parameter in fresh.named_parameters()}
    save_model(out, tensors, bases.config, bases, dtype)


def export(path: Path, out: Path, dtype: torch.dtype | None, to: str = "model", fold: bool = True,
           kind: str = "f16", scores: list[dict] = []) -> None:
    """Write any readable model, or a training checkpoint (out/step_NNNNNN), in another form.

    to: "model", the format we save; "parts" or "gguf". fold: put the head's bias into its weight, in a model, so that
    transformers computes the same. kind: how a GGUF file stores the decoder's matrices. scores: for the model's card.
    """
    changed: dict[str, Lazy] = {}
    if (path / "checkpoint.json").is_file():
        settings, paths = read_for_export(path)
        by_itself = settings["stage"] == "sft" and to == "model"        # a language model has no other form
        source = open_weights(*paths, expect=(Kind.PHI,) if by_itself else MODELS)
        config = config_of_run(source.config, settings["dropout"], settings["image_mode"])
        changed = merged_tensors(path, source, settings["lora_alpha"])
        dtype = dtype or torch_dtype(settings["dtype"])
    else:
        source = open_weights(path)
        config, settings = source.config, run_settings(path)
    if to == "model":
        save_model(out, changed, config, source, dtype, fold, settings, scores)
    elif to == "parts":
        save_parts(out, collect(changed, config, source, dtype))
    else:
        save_gguf(out, collect(changed, config, source, dtype), kind)


def merged_tensors(checkpoint: Path, source: Weights, lora_alpha: float) -> dict[str, Lazy]:
    """The tensors that a run has changed, loaded lazily, with LoRA adapters merged into their weights."""
    trained = trained_tensors(checkpoint)
    stems = [name.removesuffix("lora_a") for name in trained if name.endswith("lora_a")]
    check_tensors(source, saved_shapes(meta_model(source.config)), [stem + "weight" for stem in stems])

    def merged(stem: str) -> Tensor:
        pair = {stem + leaf: trained[stem + leaf]() for leaf in ("lora_a", "lora_b")}
        weight = read_tensor(source, stem + "weight").float()
        return merge_lora(pair | {stem + "weight": weight}, lora_alpha)[stem + "weight"]

    tensors = {name: load for name, load in trained.items() if ".lora_" not in name}
    return tensors | {stem + "weight": partial(merged, stem) for stem in stems}


def main(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        return inspect(args.folder, load_model if args.try_out else None)
    dtype = torch_dtype(args.dtype) if args.dtype else None
    if args.command == "merge":
        merge(args.llm, args.vision, args.out, args.seed, dtype, args.projector)
    else:
        scores = read_scores(args.scores, args.model) if args.scores else []
        export(args.model, args.out, dtype, args.to, args.head_bias != "keep", args.type or "f16", scores)
        if args.to != "model":
            print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
            return 0
    return inspect(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
