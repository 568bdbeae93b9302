"""The published recipes, and every flag of train.py. It imports no torch, so that `--help` and a mistake answer at once."""
import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.common import Parser, dtype_name

# What differs between stages or recipes; what all share is a default in train.py. `data.py check` reads rows, too.
# llava-phi: its scripts/llava_phi/{pretrain,finetune}.sh, and for sft section 3.1 of its paper (arXiv 2401.02330).
LLAVA_PHI = {
    "pretrain": {
        "template": "plain",                # picture, caption, newline
        "image_mode": "crop",
        "global_batch": 256,                # samples
        "epochs": 1.0,
        "train": "projector",               # between a frozen tower and a frozen language model
        "lr": 1e-3,
        "schedule": "cosine",
        "beta2": 0.98,
        "eps": 1e-7,
        "group": "none",
        "model": "",
        "llm": "checkpoints/phi-2",
        "vision": "checkpoints/clip-vit-large-patch14-336",
        "data": "data/pretrain/blip_laion_cc_sbu_558k.json",
        "images": "data/pretrain/images",
        "out": "out/pretrain",
    },
    "finetune": {
        "template": "v0",                   # the chat
        "image_mode": "pad",
        "global_batch": 128,
        "epochs": 1.0,
        "train": "projector,llm,vision",    # as the script has it; the paper's text leaves the tower frozen
        "lr": 2e-5,
        "schedule": "cosine",
        "beta2": 0.98,
        "eps": 1e-7,
        "group": "modality_length",
        "model": "out/pretrain",
        "llm": "",
        "vision": "",
        "data": "data/finetune/llava_v1_5_mix665k.json",
        "images": "data/finetune",
        "out": "out/finetune",
    },
    "sft": {
        "template": "v0",
        "image_mode": "crop",               # of no account: its data has no pictures
        "global_batch": 128,
        "epochs": 2.0,
        "train": "llm",
        "lr": 3e-5,
        "schedule": "linear",
        "beta2": 0.98,
        "eps": 1e-7,
        "group": "none",
        "model": "",
        "llm": "checkpoints/phi-2",
        "vision": "",
        "data": "data/sft/sharegpt.json",
        "images": "",
        "out": "out/phi-2-sft",
    },
}
# mipha: scripts/mipha/{pretrain,finetune}.sh of the same repository (arXiv 2403.06199). They leave AdamW's numbers to
# transformers' defaults. There is no sft: the paper finds that it does not help.
MIPHA_RECIPE = {
    "pretrain": LLAVA_PHI["pretrain"] | {
        "image_mode": "squash",
        "beta2": 0.999,
        "eps": 1e-8,
        "vision": "checkpoints/siglip-so400m-patch14-384",
        "out": "out/mipha-pretrain",
    },
    "finetune": LLAVA_PHI["finetune"] | {
        "epochs": 2.0,
        "beta2": 0.999,
        "eps": 1e-8,
        "model": "out/mipha-pretrain",
        "out": "out/mipha-finetune",
    },
}
RECIPES = {"llava-phi": LLAVA_PHI, "mipha": MIPHA_RECIPE}


def flag(default, help: str, *choices: str, least: float = 0, most: float = sys.float_info.max):
    """A field of TrainConfig with what its command-line flag needs. Numbers must lie between `least` and `most`."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most))


def by_stage(help: str, *choices: str, least: float = 0, most: float = sys.float_info.max):
    """A field whose default is in RECIPES: it depends on --stage and --recipe."""
    return flag(dataclasses.MISSING, help, *choices, least=least, most=most)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    stage: str = flag("pretrain", "pretrain: the projector; finetune: all; sft: the language model alone, before both",
                      "pretrain", "finetune", "sft")
    recipe: str = flag("llava-phi", "whose defaults: llava-phi's (CLIP) or mipha's (SigLIP)", *RECIPES)
    model: str = by_stage("folder to start from; empty: --llm and --vision with a new projector")
    llm: str = by_stage("Phi-2 folder (pretrain, sft)")
    vision: str = by_stage("CLIP or SigLIP folder (pretrain)")
    data: str = by_stage("LLaVA json or jsonl")
    images: str = by_stage("folder that image paths in the data start from")
    follow_links: bool = flag(False, "let links in that folder lead out of it")
    val_data: str = flag("", "a second json, whose loss is measured before, during (--val-every) and after training")
    out: str = by_stage("folder for metrics, checkpoints and the final model")
    # what is learned, and from what
    train: str = by_stage("comma-separated parts that learn: projector, llm, vision")
    freeze: str = flag("", "comma-separated parts taken out of --train again")
    lora_r: int = flag(0, "rank of low-rank adapters in the language model, which is then frozen itself; 0: none")
    lora_alpha: float = flag(16.0, "adapters are scaled by lora_alpha / lora_r, and merged when the model is saved")
    lora_on: str = flag("both", "which linear layers of each block get adapters", "both", "attn", "mlp")
    base_bits: int = flag(16, "4: the language model under the adapters is held in 4 bits, for one small GPU (QLoRA)")
    template: str = by_stage("prompt: plain (image, caption, newline) or v0 (chat)", "plain", "v0")
    image_mode: str = by_stage("pictures: crop the centre, pad to a square, or squash into one",
                               "crop", "pad", "squash")
    max_length: int = flag(2048, "positions per sample, image expanded; longer ones are cut on the right", least=1)
    group: str = by_stage("order within an epoch: none (random) or modality_length (as LLaVA groups its batches)",
                          "none", "modality_length")
    on_bad_sample: str = flag("stop", "stop, or skip: count it, list it in out/bad_samples.jsonl, give up above 0.1 %%",
                              "stop", "skip")
    seed: int = flag(42, "data order, dropout and a new projector", most=2 ** 63 - 1)
    # how long, how fast
    global_batch: int = by_stage("samples per optimizer step, over all processes", least=1)
    epochs: float = by_stage("passes over the data")
    max_steps: int = flag(0, "stop after so many steps; 0: what the epochs give")
    lr: float = by_stage("peak learning rate")
    projector_lr: float = flag(0.0, "the projector's own peak learning rate; 0: as --lr")
    vision_lr: float = flag(0.0, "the tower's own peak learning rate; 0: as --lr")
    warmup: float = flag(0.03, "share of the steps over which the rate rises from 0", most=1)
    schedule: str = by_stage("how it falls to 0 afterwards", "cosine", "linear")
    beta1: float = flag(0.9, "AdamW", most=0.9999)
    beta2: float = by_stage("AdamW", most=0.9999999)
    eps: float = by_stage("AdamW", least=1e-30)
    weight_decay: float = flag(0.0, "AdamW; biases and LayerNorms are never decayed")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dropout: float = flag(-1.0, "residual dropout of the language model; -1: as its config.json says",
                          least=-1, most=0.99)
    # the machine
    dtype: str = flag("bf16", "arithmetic, fp32 or bf16; master weights and sums are always fp32")
    micro_tokens: int = flag(16384, "tokens per forward on one process: as many as its memory holds", least=1)
    recompute: str = flag("auto", "in the backward pass: none (fastest), selective (half the memory, 3 %% more work), "
                                  "full (least memory, 22 %% more); auto: the first that fits",
                          "auto", "none", "selective", "full")
    gather: str = flag("auto", "what several processes exchange only once a step (less traffic, more memory): none, "
                               "weights, or both weights and gradients; auto: as much as fits",
                       "auto", "none", "weights", "both")
    compile: bool = flag(False, "compile each block: one graph for all lengths; it starts a minute later")
    workers: int = flag(4, "data processes per training process")
    # what is written, and when
    log_every: int = flag(1, "steps between lines on the screen; metrics.jsonl has every step", least=1)
    val_every: int = flag(0, "steps between validations; 0: before and after only")
    save_every: int = flag(0, "steps between checkpoints; 0: only when interrupted")
    keep: int = flag(2, "checkpoints kept", least=1)
    stop_after: int = flag(0, "save and leave after this step, as if interrupted; 0: no")
    resume: str = flag("auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint folder")


def parse_args(argv: list[str] | None = None) -> tuple[TrainConfig, dict]:
    """-> the settings of a run, and what is asked for instead of training (plot, plan). ValueError: a bad flag."""
    # The defaults depend on stage and recipe, so these two flags are looked for first.
    row_parser = Parser(add_help=False)
    row_parser.add_argument("--stage", default="pretrain")
    row_parser.add_argument("--recipe", default="llava-phi")
    row = row_parser.parse_known_args(argv)[0]
    defaults = RECIPES.get(row.recipe, {}).get(row.stage)
    if defaults is None and row.recipe == "mipha" and row.stage == "sft":
        raise ValueError("--recipe mipha has no --stage sft: start from Phi-2 as it is published")

    parser = Parser(description=__doc__, epilog=f"Defaults in brackets are those of --stage {row.stage}; where a "
                    f"recipe is named, those that {row.recipe} was published with (lib/recipes.py says where).")
    defaults = defaults or LLAVA_PHI["pretrain"]        # a name that is not known is refused below, with the choices
    for f in dataclasses.fields(TrainConfig):
        kind = {"type": f.type, "choices": f.metadata["choices"] or None}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if f.name == "dtype":
            kind = {"type": dtype_name}
        default = defaults.get(f.name, f.default)
        source = row.recipe if f.name in defaults else "default"
        shown = "" if default == "" else f" ({source}: %(default)r)"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"] + shown, **kind)
    parser.add_argument("--plot", nargs="+", type=Path, metavar="OUT",
                        help="no training: draw these runs' curves into loss.html")
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=False,
                        help="no training, no weights: print memory, speed and traffic to expect")
    parser.add_argument("--gpus", type=int, default=8, help="for --plan")
    parser.add_argument("--gpu-memory", type=float, default=80, help="for --plan, GB each")
    args = vars(parser.parse_args(argv))

    action = {name: args.pop(name) for name in ("plot", "plan", "gpus", "gpu_memory")}
    cfg = TrainConfig(**args)
    check_flags(cfg)
    for name in ("gpus", "gpu_memory"):
        check_range(name, action[name], 1, sys.float_info.max)
    return cfg, action


def check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:              # also refuses NaN, with which no comparison is true
        limit = f", {most} at most" if most < sys.float_info.max else ""
        raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more{limit}")


def check_flags(cfg: TrainConfig) -> None:
    """ValueError for values out of range and for flags that contradict each other."""
    for f in dataclasses.fields(TrainConfig):
        if f.type in (int, float):
            check_range(f.name, getattr(cfg, f.name), f.metadata["least"], f.metadata["most"])
    for name in ("llm", "vision"):
        # A model brings its own parts. A flag that would change nothing is an error, not a default to be ignored.
        if cfg.model and getattr(cfg, name) != RECIPES[cfg.recipe][cfg.stage][name]:
            raise ValueError(f"--{name} {getattr(cfg, name)}: --model {cfg.model} has one already; with --model '' a "
                             "new model is made from --llm and --vision")
    if cfg.compile and cfg.recompute == "selective":
        raise ValueError("--compile does what --recompute selective does by itself; give --recompute none or full")
    if cfg.base_bits not in (4, 16):
        raise ValueError(f"--base-bits {cfg.base_bits}: expected 4 or 16")
    if cfg.base_bits == 4 and (not cfg.lora_r or cfg.lora_on != "both"):
        raise ValueError("--base-bits 4 needs --lora-r (64, say) and --lora-on both: weights in 4 bits cannot learn, "
                         "only adapters on them can")
    if cfg.base_bits == 4 and cfg.compile:
        raise ValueError("--base-bits 4 works without --compile only")
    if cfg.stage == "sft" and (cfg.model or cfg.vision):
        raise ValueError("--stage sft trains a language model alone: give --llm, and neither --model nor --vision")
