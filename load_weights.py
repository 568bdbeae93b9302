"""Every way weights enter or leave: published folders of Phi-2, CLIP, SigLIP, LLaVA-Phi and Mipha in, one format out.

A folder is recognised by the names of its tensors. Its config.json gives sizes only, and its own name means nothing.
Reading is strict in both directions: a tensor that is missing, unknown or of the wrong shape is an error, and what is
left out on purpose is listed in DROPPED. Tensors are read one at a time and copied into the model, so loading takes the
memory of the model and of one tensor. What we save is a folder that is complete by itself and that transformers'
LlavaForConditionalGeneration and vLLM read as well.

    python load_weights.py merge --llm checkpoints/phi-2 --vision checkpoints/clip-vit-large-patch14-336 --out out/base
    python load_weights.py merge --vision checkpoints/siglip-so400m-patch14-384 --out out/mipha-base
    python load_weights.py inspect out/base --try
    python load_weights.py export --model out/finetune --out out/llava-phi --dtype bf16
    python load_weights.py export --model out/finetune --out out/parts --to parts
"""
import argparse
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from lib.common import Parser, dtype_name, run_command, torch_dtype


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python load_weights.py`. ValueError describes a mistake in it."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="make one base model from a Phi-2 folder and a CLIP or SigLIP folder")
    merging.add_argument("--llm", type=Path, default=Path("checkpoints/phi-2"), help="folder of the language model")
    merging.add_argument("--vision", type=Path, default=Path("checkpoints/clip-vit-large-patch14-336"),
                         help="folder of the vision tower, CLIP or SigLIP")
    merging.add_argument("--out", type=Path, default=Path("out/base"), help="folder to write")
    merging.add_argument("--seed", type=int, default=42, help="seed of the new projector's weights")
    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("folder", type=Path)
    inspecting.add_argument("--try", dest="try_out", action=argparse.BooleanOptionalAction, default=False,
                            help="also run the model for a minute, and say whether what it does makes sense")
    exporting = commands.add_parser("export", help="write any readable model in the format we save")
    exporting.add_argument("--model", type=Path, default=Path("out/finetune"),
                           help="folder to read: a model, or a training checkpoint (out/step_NNNNNN)")
    exporting.add_argument("--out", type=Path, required=True, help="folder to write")
    exporting.add_argument("--to", choices=("model", "parts"), default="model",
                           help="model: one folder, which transformers and vLLM read too; "
                                "parts: Phi, vision tower and projector apart, as llama.cpp's converters want them")
    for command in (merging, exporting):
        command.add_argument("--dtype", type=dtype_name, help="bf16 or fp32; not given: each tensor as it is stored")
    return parser.parse_args(argv)


def check_command_line() -> None:
    parse()


if __name__ == "__main__":
    # The imports below take seconds. `--help` and a mistake in a flag are answered before them.
    exit_code = run_command(check_command_line)
    if exit_code:
        sys.exit(exit_code)

import torch
from torch import Tensor

from lib.folders import (PHI, Folder, blueprint, check_tensors, config_of, config_of_run, load_config, meta_model,
                         read_all, read_folders, read_kind, read_tensor)
from lib.inspect import inspect
from lib.layouts import is_siglip
from lib.lora import merge_lora
from lib.quant import check_int4_product, copy_or_quantize, prepack_linears, quantize_linears
from lib.save_weights import (SAVED_MODEL, Lazy, replacing_model, save, save_model, saved_dtypes, write_checksums,
                              write_tensors)
from model import LLaVAConfig, LLaVAPhi, Phi, init_weights

# ---------------------------------------------------------------------------------------------------
# Names
#
# We call a tensor "llm.h.3.attn.qkv.weight"; a published file calls it something else in each era. The tables hold
# names without ".weight" and ".bias", {layer} stands for a layer's number and {qkv} for q, k and v in turn: three
# published tensors whose rows follow each other in ours.


# ---------------------------------------------------------------------------------------------------
# Files


# ---------------------------------------------------------------------------------------------------
# Config


# ---------------------------------------------------------------------------------------------------
# Loading


@torch.no_grad()
def load_into(model: LLaVAPhi, folders: Iterable[Path], copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
              allow_missing: tuple[str, ...] = ()) -> None:
    """Fill a model from one LLaVA-like folder, or from a Phi folder and a tower's, one tensor at a time.

    copy(parameter, tensor): called once per parameter that is not quantized; it must cast, and be done with `tensor`
    (on the CPU, in the file's dtype) when it returns. Quantized layers quantize their tensors by themselves.
    allow_missing: parts such as "projector." that the folders need not have; they are left as they are.
    """
    # LoRA's adapters are in no folder: a run draws them, and a saved model has them merged.
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    found = check_tensors(read_folders(folders), parameters, model.config, allow_missing)
    wanted = {name: pieces for name, pieces in found.items() if name in parameters}
    for name, tensor in read_all(wanted, model.config):
        copy_or_quantize(model, name, tensor, copy)
        del tensor              # else it would still be there while the next one is read


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               bits: int = 16) -> LLaVAPhi:
    """A LLaVA-like folder of any layout as a frozen model in eval mode, straight on its device.

    bits: 8 or 4 quantizes the Linears. Each weight is quantized as it arrives, so the model never exists in a larger
    type. Plain Linears are prepacked where that makes a CPU faster. ValueError where 4 bits are not supported.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype}: expected bfloat16 or float32; Phi-2's attention scores overflow in fp16")
    if bits == 4:
        check_int4_product(torch.device(device))
    model = meta_model(load_config(folder)).to(dtype).eval()
    if bits < 16:
        quantize_linears(model, bits)       # on the meta device this only changes classes
    # Before memory is taken: a config.json can promise tensors of any size.
    check_tensors(read_folders([folder]), dict(model.named_parameters()), model.config)
    model = model.to_empty(device=device).requires_grad_(False)
    load_into(model, [folder])
    prepack_linears(model)
    return model


def load_phi(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Phi:
    """The same for a plain Phi-2 folder: the language model alone."""
    source = read_kind(folder, PHI)
    config = config_of(source)
    llm = meta_model(config).llm.to(dtype)
    found = check_tensors([source], [f"llm.{name}" for name, _ in llm.named_parameters()], config)
    llm = llm.to_empty(device=device).eval().requires_grad_(False)
    parameters = {f"llm.{name}": parameter for name, parameter in llm.named_parameters()}
    for name, tensor in read_all(found, config):
        parameters[name].copy_(tensor)
    return llm

# ---------------------------------------------------------------------------------------------------
# Saving: the tensors


# ---------------------------------------------------------------------------------------------------
# Saving: the text files that transformers and vLLM read beside the tensors


# ---------------------------------------------------------------------------------------------------
# Commands


def merge(llm: Path, vision: Path, out: Path, seed: int, dtype: torch.dtype | None) -> None:
    """Write one base model from a Phi-2 folder and a CLIP or SigLIP folder; the projector between them is new."""
    folders = read_folders([llm, vision])
    config = config_of(*folders)
    needed = [name for name in blueprint(config) if not name.startswith("projector")]
    found = check_tensors(folders, needed, config)
    projector = meta_model(config).projector.to_empty(device="cpu")
    init_weights(projector, torch.Generator().manual_seed(seed))
    projector.to(dtype or found["llm.wte.weight"][""].dtype)
    tensors = {f"projector.{name}": parameter for name, parameter in projector.named_parameters()}
    save_model(out, tensors, config, [llm, vision], dtype)


def export(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Write any readable model, or a training checkpoint (out/step_NNNNNN), in the format we save."""
    if not (model / "checkpoint.json").is_file():
        save_model(out, {}, load_config(model), [model], dtype)
        return
    from lib.checkpoint import read_for_export  # brings torch.distributed, which takes a moment
    settings, sources = read_for_export(model)
    only_llm = settings["stage"] == "sft"
    folders = [read_kind(*sources, PHI)] if only_llm else read_folders(sources)
    config = config_of_run(folders, settings["dropout"], settings["image_mode"])
    tensors = checkpoint_tensors(model, folders, config, settings["lora_alpha"])
    part = "llm" if only_llm else ""
    save(part, out, tensors, config, folders, dtype or torch_dtype(settings["dtype"]))


def export_parts(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """A plain Phi folder, a tower's and LLaVA's mm_projector: what llama.cpp's converters and LLaVA take."""
    folders = read_folders([model])
    config = config_of(*folders)
    found = check_tensors(folders, blueprint(config), config)
    projector = [name for name in blueprint(config) if name.startswith("projector")]
    with replacing_model(out) as made:
        save("llm", made / "phi-2", {}, config, folders, dtype)
        shutil.copyfile(SAVED_MODEL / "chat_template.jinja", made / "phi-2" / "chat_template.jinja")
        save("vision", made / ("siglip" if is_siglip(config.vision) else "clip"), {}, config, folders, dtype)
        write_tensors("projector", made, saved_dtypes(projector, {}, found, dtype), {}, found, config, "mm_projector")
        write_checksums(made)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def checkpoint_tensors(checkpoint: Path, sources: list[Folder], config: LLaVAConfig,
                       lora_alpha: float) -> dict[str, Lazy]:
    """Everything that a run has changed, to be loaded when its turn comes, LoRA adapters merged into their weights."""
    from lib.checkpoint import trained_tensors  # brings torch.distributed, which nothing else here needs
    trained = trained_tensors(checkpoint)
    stems = [name.removesuffix("lora_a") for name in trained if name.endswith("lora_a")]
    found = check_tensors(sources, [stem + "weight" for stem in stems], config)

    def merged(stem: str) -> Tensor:
        name = stem + "weight"
        weight = {name: read_tensor(name, found[name], config).float()}
        adapters = {stem + leaf: trained[stem + leaf]() for leaf in ("lora_a", "lora_b")}
        return merge_lora(weight | adapters, lora_alpha)[name]

    tensors = {name: load for name, load in trained.items() if ".lora_" not in name}
    for stem in stems:
        tensors[stem + "weight"] = partial(merged, stem)
    return tensors


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "inspect":
        return inspect(args.folder, args.try_out)
    dtype = torch_dtype(args.dtype) if args.dtype else None
    if args.command == "merge":
        merge(args.llm, args.vision, args.out, args.seed, dtype)
    elif args.to == "parts":
        export_parts(args.model, args.out, dtype)
        return 0
    else:
        export(args.model, args.out, dtype)
    return inspect(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
