"""The published recipes, every flag of train.py, and those of data.py, which looks at data as a recipe reads it.

It does not import torch, so that `--help` and mistakes are answered at once.
"""
import argparse
import os
import re
from argparse import Namespace
from pathlib import Path

from lib.common import Parser, at_least, dtype_name

IMAGE_MODES = ("crop", "pad", "squash")         # how an image is made square, see data.load_image

# What a stage or recipe has instead of the defaults in `add_flags`. data.py reads these, too.
# llava-phi: scripts/llava_phi/{pretrain,finetune}.sh, and for sft section 3.1 of the paper (arXiv 2401.02330).
LLAVA_PHI = {
    "pretrain": {
        "template": "plain",                # image, caption, newline
        "image_mode": "crop",
        "global_batch": 256,                # samples
        "train": "projector",               # tower and language model are frozen
        "lr": 1e-3,
        "llm": "checkpoints/phi-2",
        "vision": "checkpoints/clip-vit-large-patch14-336",
        "data": ["data/pretrain/blip_laion_cc_sbu_558k.json"],
        "images": ["data/pretrain/images"],
        "out": "out/pretrain",
    },
    "finetune": {
        "template": "v0",                   # chat
        "image_mode": "pad",
        "global_batch": 128,
        "train": "projector,llm,vision",    # as in the script; according to the paper, the tower stays frozen
        "lr": 2e-5,
        "group": "modality_length",
        "model": "out/pretrain",
        "data": ["data/finetune/llava_v1_5_mix665k.json"],
        "images": ["data/finetune"],
        "out": "out/finetune",
    },
    "sft": {
        "template": "v0",
        "image_mode": "crop",               # unused: sft data has no images
        "global_batch": 128,
        "epochs": 2.0,
        "train": "llm",
        "lr": 3e-5,
        "schedule": "linear",
        "llm": "checkpoints/phi-2",
        "data": ["data/sft/sharegpt.json"],
        "images": [],
        "out": "out/phi-2-sft",
    },
}
# mipha: scripts/mipha/{pretrain,finetune}.sh of the same repository (arXiv 2403.06199). They keep transformers'
# defaults for AdamW. There is no sft: the paper finds that it does not help.
ADAMW = {"beta2": 0.999, "eps": 1e-8}
MIPHA_RECIPE = {
    "pretrain": LLAVA_PHI["pretrain"] | ADAMW | {
        "image_mode": "squash",
        "vision": "checkpoints/siglip-so400m-patch14-384",
        "out": "out/mipha-pretrain",
    },
    "finetune": LLAVA_PHI["finetune"] | ADAMW | {
        "epochs": 2.0,
        "model": "out/mipha-pretrain",
        "out": "out/mipha-finetune",
    },
}
RECIPES = {"llava-phi": LLAVA_PHI, "mipha": MIPHA_RECIPE}

INSTEAD_OF_TRAINING = ("plot", "plot_to", "against", "plan", "gpus", "gpus_per_node", "gpu", "gpu_memory", "tflops")


def parse(argv: list[str] | None) -> Namespace:
    """A run's settings. ValueError: an invalid flag, or flags that contradict each other."""
    # The other defaults depend on these three, so they are parsed first.
    row = Parser(add_help=False, prog="train.py")
    row.add_argument("--stage", choices=tuple(LLAVA_PHI), default="pretrain",
                     help="pretrain: the projector; finetune: everything; sft: just the language model, before both")
    row.add_argument("--recipe", choices=tuple(RECIPES), default="llava-phi",
                     help="whose published defaults: llava-phi's (CLIP) or mipha's (SigLIP)")
    row.add_argument("--lora-r", type=at_least(0), default=0,
                     help="rank of LoRA adapters in the language model, whose own weights are then frozen; 0: none. "
                          "LLaVA's published rates and scale for adapters become the defaults")
    chosen = row.parse_known_args(argv)[0]
    if chosen.stage not in RECIPES[chosen.recipe]:
        row.error(f"--recipe {chosen.recipe} has no --stage {chosen.stage}: start from Phi-2 as it is published")

    parser = Parser(prog="train.py", description="Train LLaVA-Phi: every stage of the published recipes.",
                    epilog=f"The defaults shown are those of --stage {chosen.stage} --recipe {chosen.recipe}"
                           f"{f' --lora-r {chosen.lora_r}' if chosen.lora_r else ''}.", parents=[row])
    add_flags(parser)
    published = RECIPES[chosen.recipe][chosen.stage]
    parser.set_defaults(**published)
    if chosen.lora_r:
        # LLaVA's own recipe for adapters (scripts/v1_5/finetune_lora.sh): a scale of 2 and ten times finetune's rate.
        # Projector and tower, which are trained whole, keep the stage's rate; the projector does in LLaVA's script,
        # too, and the tower is frozen there. At a tenth of the rate and a scale of 1/4, adapters learned nothing in a
        # hundred steps.
        parser.set_defaults(lora_alpha=2.0 * chosen.lora_r, lr=2e-4, projector_lr=published["lr"],
                            vision_lr=published["lr"])
    cfg = parser.parse_args(argv)
    problem = contradiction(cfg, published)
    if problem:
        parser.error(problem)
    return cfg


def add_flags(parser: Parser) -> None:
    """Every other flag. Those without a default here have one in every stage of RECIPES."""
    on_or_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("folders").add_argument
    add("--model", default="", help="model folder to start from; empty: --llm and --vision with a new projector")
    add("--llm", default="", help="Phi-2 folder (pretrain, sft)")
    add("--vision", default="", help="CLIP or SigLIP folder (pretrain)")
    add("--projector", default="", metavar="FILE", help="trained projector for --llm and --vision, as LLaVA's stage 1 "
        "writes it (mm_projector.bin); default: a new one")
    add("--data", nargs="+", type=lambda name: weighted(name) and name, metavar="FILE[:EPOCHS]", help="records: json "
        "or jsonl, LLaVA's, ShareGPT's or OpenAI's messages; FILE:0.1 gives another tenth of a file to each epoch of "
        "the run, FILE:2 all of it twice")
    add("--images", nargs="+", type=lambda name: str(Path(name)), help="folder that image paths in the data are "
        "relative to, or .zip or .tar archives")
    add("--follow-links", action=on_or_off, default=False, help="allow links that lead out of that folder")
    add("--val-data", default="", help="validation json, whose loss is measured before, during (--val-every) and after")
    add("--out", help="folder for metrics, checkpoints and the final model; shared by all nodes")

    add = parser.add_argument_group("model and data").add_argument
    add("--train", help="comma-separated parts to train: projector, llm, vision")
    add("--freeze", default="", help="comma-separated parts to take out of --train again")
    add("--lora-alpha", type=at_least(0.0), default=16.0, help="adapters are scaled by lora_alpha / lora_r, and merged "
        "when the model is saved; with --lora-r, the default is twice that")
    add("--lora-on", choices=("both", "attn", "mlp"), default="both", help="linear layers that get adapters")
    add("--base-bits", type=int, choices=(4, 16), default=16, help="4: QLoRA, with the language model's frozen weights "
        "in 4 bits")
    add("--template", choices=("plain", "v0"), help="prompt: plain (image, caption, newline) or v0 (chat)")
    add("--image-mode", choices=IMAGE_MODES, help="how images are made square")
    add("--max-length", type=at_least(1), default=2048, help="positions per sample, image expanded; longer samples are "
        "truncated on the right")
    add("--group", choices=("none", "modality_length"), default="none", help="order within an epoch: random, or by "
        "modality and length as LLaVA groups its batches")
    add("--on-bad-sample", choices=("stop", "skip"), default="stop", help="skip: count it, list it in "
        "out/bad_samples.jsonl, give up above 0.1 %%")
    add("--seed", type=at_least(0, 2 ** 63 - 1), default=42, help="seed of data order, dropout and new weights")

    add = parser.add_argument_group("optimization").add_argument
    add("--global-batch", type=at_least(1), help="samples per optimizer step, over all processes")
    add("--epochs", type=at_least(1e-6), default=1.0, help="passes over the data")
    add("--max-steps", type=at_least(0), default=0, help="upper limit of optimizer steps; 0: --epochs decides")
    add("--lr", type=at_least(0.0), help="peak learning rate")
    add("--projector-lr", type=at_least(0.0), default=0.0, help="the projector's own peak rate; 0: as --lr")
    add("--vision-lr", type=at_least(0.0), default=0.0, help="the vision tower's own peak rate; 0: as --lr")
    add("--warmup", type=at_least(0.0, 1.0), default=0.03, help="fraction of steps in which the rate rises from 0")
    add("--schedule", choices=("cosine", "linear"), default="cosine", help="how the rate then decays to 0")
    add("--beta1", type=at_least(0.0, 0.9999), default=0.9, help="AdamW")
    add("--beta2", type=at_least(0.0, 0.9999999), default=0.98, help="AdamW")
    add("--eps", type=at_least(1e-30), default=1e-7, help="AdamW")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="AdamW; never applied to biases and LayerNorms")
    add("--grad-clip", type=at_least(0.0), default=1.0, help="largest gradient norm; 0: no clipping")
    add("--dropout", type=at_least(-1.0, 0.99), default=-1.0, help="residual dropout of the language model; -1: as its "
        "config.json says")

    add = parser.add_argument_group("hardware").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="auto: the GPUs, or the CPU where torch finds none")
    add("--dtype", type=dtype_name, default="bf16", metavar="{fp32,bf16}", help="compute dtype; master weights and "
        "reductions are always fp32")
    add("--micro-tokens", type=at_least(1), default=16384, help="tokens per forward pass on one process: as many as "
        "fit into its memory")
    add("--recompute", choices=("auto", "none", "selective", "full"), default="auto", help="activation checkpointing: "
        "none, selective (half the memory, 3 %% more compute) or full (least memory, 22 %% more); auto: the first "
        "that fits")
    # "on" saves both halves of FSDP's traffic in every micro-batch but the last: 4 bytes per weight for gathering it in
    # bf16 twice, 4 for reducing its gradient in fp32. Saving only one of them would fit into slightly less memory, but
    # be one more mode to test.
    add("--gather", choices=("auto", "on", "off"), default="auto", help="FSDP, between the micro-batches of a step: on "
        "keeps weights gathered and gradients unsynchronized (less traffic, more memory), off reshards each time")
    add("--compile", action=on_or_off, default=False, help="compile each block with torch.compile, one graph for all "
        "lengths; the start takes a minute longer")
    add("--workers", type=at_least(0), default=4, help="data loading processes per training process")

    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log-every", type=at_least(1), default=1, help="steps between lines on the screen; metrics.jsonl has all")
    add("--val-every", type=at_least(0), default=0, help="steps between validations; 0: before and after only")
    add("--track", choices=("tensorboard", "wandb", "trackio"), default="", help="send the rows of metrics.jsonl to "
        "this tracker, too, which you have installed")
    add("--keep-best", action=on_or_off, default=False, help="also write the model with the lowest validation loss so "
        "far, to out/best")
    add("--patience", type=at_least(0), default=0, help="validations without a lower loss after which the run ends; 0: "
        "never")
    add("--recheck-every", type=at_least(0), default=0, help="steps between checks for a device that computes "
        "nonsense: a micro-batch is computed twice, and another gradient ends the run, with exit code 3; 0: never")
    add("--save-minutes", type=at_least(0.0), default=30.0, help="minutes between checkpoints; 0: by --save-every only")
    add("--save-every", type=at_least(0), default=0, help="steps between checkpoints; 0: by --save-minutes only")
    add("--keep", type=at_least(1), default=2, help="number of checkpoints to keep")
    add("--resume", default="auto", help="auto: from the newest checkpoint in --out; never; or a checkpoint folder")

    add = parser.add_argument_group("instead of training").add_argument
    add("--plot", nargs="+", type=Path, metavar="OUT", help="draw the curves of these runs: loss, gradient norm, rate")
    add("--plot-to", default="", metavar="FILE", help="page to draw them into; default: loss.html in the first of them")
    add("--against", default="", metavar="OUT", help="with --plot: hold the runs against this one, the --out folder or "
        "the metrics.jsonl of a run that went well")
    add("--plan", action=on_or_off, default=False, help="print what fits into memory, computed from shapes, and exit")
    add("--gpus", type=at_least(1), default=8, help="for --plan")
    add("--gpus-per-node", type=at_least(1), default=8, help="for --plan")
    add("--gpu", default="", metavar="NAME",
        help="for --plan: a card, such as 'RTX 4090', for its memory and its speed")
    add("--gpu-memory", type=at_least(1.0), default=0.0, help="for --plan: GB per GPU; 0: those of --gpu, else 80")
    add("--tflops", type=at_least(1.0), default=0.0,
        help="for --plan: a GPU's peak in dense TFLOP/s; 0: that of --gpu, else no hours are given")


def weighted(name: str) -> tuple[str, float]:
    """One of --data's names: a file, and how many epochs of it make one of the run."""
    path, colon, weight = name.rpartition(":")
    if colon and re.fullmatch(r"[-+.\deE]+|nan|inf", weight):
        return path, at_least(1e-6, 1000)(weight)
    return name, 1.0


def contradiction(cfg: Namespace, published: dict) -> str:
    """Which flags contradict each other, and what to give instead; "" if none do."""
    for flag, value in (("plot-to", cfg.plot_to), ("against", cfg.against)):
        if value and not cfg.plot:
            return f"--{flag} {value} needs --plot, with the --out folders of runs"
    for name in ("llm", "vision"):
        # A whole model has its own parts. A flag without effect is an error rather than silently ignored.
        if cfg.model and getattr(cfg, name) != published.get(name, ""):
            return (f"--{name} {getattr(cfg, name)}: --model {cfg.model} has one already; with --model '' a "
                    "new model is made from --llm and --vision")
    if cfg.projector and (cfg.model or not cfg.vision):
        return f"--projector {cfg.projector} goes with --llm and --vision; --model has a projector already"
    if (cfg.keep_best or cfg.patience) and not cfg.val_data or cfg.patience and not cfg.val_every:
        return ("--keep-best and --patience go by the validation loss: give --val-data, and --val-every for how often")
    if cfg.compile and cfg.recompute == "selective":
        return "--compile already does what --recompute selective would; give --recompute none or full"
    if cfg.base_bits == 4 and (not cfg.lora_r or cfg.lora_on != "both"):
        return ("--base-bits 4 needs --lora-r (64, say) and --lora-on both: weights in 4 bits cannot learn, "
                "only adapters on them can")
    if cfg.base_bits == 4 and cfg.compile:
        return "--base-bits 4 does not work with --compile; leave one of them out"
    if cfg.stage == "sft" and (cfg.model or cfg.vision):
        return "--stage sft trains just a language model: give --llm, and neither --model nor --vision"
    return ""


def recipe_note(siglip: bool, recipe: str) -> str:
    """One line if a recipe is another tower's, for its defaults then fit the run badly; else ""."""
    tower, own = ("SigLIP", "mipha") if siglip else ("CLIP", "llava-phi")
    if recipe == own:
        return ""
    return f"note: the vision tower is {tower}, and the defaults are those of --recipe {recipe}, not --recipe {own}"


def settings(cfg: Namespace) -> dict:
    """The settings that define a run and go into its checkpoints: every flag but those that replace training."""
    return {name: value for name, value in vars(cfg).items() if name not in INSTEAD_OF_TRAINING}


def replace(cfg: Namespace, **changes) -> Namespace:
    """A copy of the settings with some of them changed."""
    return Namespace(**vars(cfg) | changes)

# ---------------------------------------------------------------------------------------------------
# python data.py check, show, convert

DATA_COMMANDS = """Look at data before a GPU is used.

    $ python data.py check --data data/finetune/llava_v1_5_mix665k.json --images data/finetune
    $ python data.py check --data my.json --images my_pictures --model checkpoints/mipha-3b
    $ python data.py show --data my.json --images my_pictures --out show.html
    $ python data.py convert --data downloaded/*.parquet --out data/mine
"""


def parse_data(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="data.py", description=DATA_COMMANDS)
    commands = parser.add_subparsers(required=True, dest="command", metavar="{check,show,convert}")
    as_trained = Parser(add_help=False)
    add = as_trained.add_argument
    add("--data", type=Path, required=True, help="records: json or jsonl, LLaVA's, ShareGPT's or OpenAI's messages")
    add("--images", type=Path, nargs="+", required=True, help="folder that image paths in the data are relative to, or "
        ".zip or .tar archives")
    add("--stage", choices=["pretrain", "finetune"], default="finetune", help="the stage that the data is for")
    add("--recipe", choices=list(RECIPES), default="llava-phi", help="the recipe of that stage; see train.py --help")
    add("--model", type=Path, nargs="+", metavar="FOLDER",
        help="the model to be trained, for its sizes: one folder, or Phi-2's and the vision tower's")
    add("--tokenizer", type=Path, help="tokenizer folder, without which lengths are not checked; default: the model's, "
        "else checkpoints/phi-2")
    add("--max-length", type=at_least(1), help="positions per sample, image expanded; default: the model's, up to 2048")
    add("--n-patches", type=at_least(1), help="positions per image; default: the model's, else the recipe's")
    add("--image-size", type=at_least(1), help="pixels per side; default: the model's, else the recipe's")
    add("--image-mode", choices=IMAGE_MODES, help="how images are made square; default: as the recipe says")
    add("--follow-links", action=argparse.BooleanOptionalAction, default=False, help="allow links out of --images")
    add = commands.add_parser("check", parents=[as_trained], help="find every bad sample").add_argument
    add("--decode", choices=["header", "full"], default="full", help="full also finds truncated images")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--show", type=int, default=20, help="samples to list per kind of problem")
    add("--write-clean", type=Path, help="write the good records here, and the bad ones to a .rejects.jsonl next to it")
    add = commands.add_parser("show", parents=[as_trained], help="a page of samples as trained on").add_argument
    add("--n", type=at_least(1), default=12, help="samples, evenly spread over the data")
    add("--ids", nargs="+", metavar="ID", help="these samples instead")
    add("--out", type=Path, default=Path("show.html"), help="the page")
    add = commands.add_parser("convert", help="parquet files with pictures in their rows -> jsonl and zip").add_argument
    add("--data", type=Path, nargs="+", required=True, help="parquet files, like those of The Cauldron, FineVision or "
        "LLaVA-OneVision-Data")
    add("--out", type=Path, required=True, help="folder for records.jsonl and images.zip; the same command goes on "
        "after an interruption")
    args = parser.parse_args(argv)
    if args.command == "convert":
        return args
    if args.model and len(args.model) > 2:
        parser.error(f"--model: expected one folder, or Phi-2's and the vision tower's, found {len(args.model)}")
    if args.tokenizer is None:
        args.tokenizer = args.model[0] if args.model else Path("checkpoints/phi-2")
    return args
