"""Shared by several test files: processes, pictures, random prompts, records, training runs, changed model folders."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import load_weights
from data import IGNORE, IMAGE_ID, Sample
from lib.folders import open_weights
from lib.generate import Session
from model import LLaVAConfig, LLaVAPhi, Packed, PhiConfig, init_weights
from vision import CLIP_MEAN, CLIP_STD, VisionConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY_MODEL = GOLDEN / "tiny-llava-phi"
TINY_PHI, TINY_CLIP = GOLDEN / "tiny-phi", GOLDEN / "tiny-clip"
TINY_MIPHA = ROOT / "tests" / "golden-mipha" / "tiny-mipha"

# The original code's answer to the first golden prompt, decoded and stripped.
GOLDEN_ANSWER = "or!\ufffd ASS or!\ufffd squares- tab- tab- tab-\ufffd or!\ufffd squares"

# ---------------------------------------------------------------------------------------------------
# Processes


def hear_signals() -> None:
    """nohup, and & in a script, start the tests with these ignored, and what the tests start would ignore them, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start_script(*args: object, processes: int = 1, **options) -> subprocess.Popen:
    """Start `python ARGS` in the checkout, as a user does on the command line; with torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
               "preexec_fn": hear_signals} | options
    return subprocess.Popen([sys.executable, *torchrun, *map(str, args)], **options)


def run_script(*args: object, processes: int = 1, timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Run `python ARGS` to its end. A timeout also kills the processes that torchrun started."""
    process = start_script(*args, processes=processes, **{"start_new_session": True} | options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

# ---------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(pixels: Tensor) -> Tensor:
    """Undo the normalization of the goldens' pixels."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return ((pixels * std + mean) * 255).round().to(torch.uint8)


def pattern(w: int, h: int) -> Image.Image:
    """A picture computed by a formula, so that it is the same wherever the original code's outputs are checked."""
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    return Image.fromarray((np.stack([7 * x + 3 * y, 5 * x + 11 * y, 13 * x + 17 * y], -1) % 256).astype(np.uint8))

# ---------------------------------------------------------------------------------------------------
# Random prompts: 97 words, pictures of 28 x 28 pixels in 4 patches


def draw_image(rng: random.Random, n: int = 1) -> Tensor:
    return torch.tensor([rng.randrange(256) for _ in range(n * 3 * 28 * 28)], dtype=torch.uint8).view(n, 3, 28, 28)


def draw_words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1, 97) for _ in range(n)]


def draw_prompt(rng: random.Random, n_images: int) -> tuple[list[int], Tensor]:
    """A few words, then n_images times a picture and a few words."""
    ids = draw_words(rng, rng.randrange(1, 9))
    for _ in range(n_images):
        ids += expanded([IMAGE_ID]) + draw_words(rng, rng.randrange(1, 9))
    return ids, draw_image(rng, n_images)


def draw_samples() -> list[Sample]:
    """Five training samples of growing length, three with a picture; the second half of each is supervised."""
    rng = random.Random(0)
    samples = []
    for i, n_images in enumerate((1, 0, 1, 1, 0)):
        ids, images = draw_prompt(rng, n_images)
        ids += draw_words(rng, 20 * i)
        labels = [IGNORE] * (len(ids) // 2) + ids[len(ids) // 2:]
        labels = [IGNORE if label == IMAGE_ID else label for label in labels]
        samples.append(Sample(str(i), ids, labels, images[0] if n_images else None))
    return samples


def expanded(ids: list[int], n_patches: int = 4) -> list[int]:
    """Repeat each IMAGE_ID once for every patch, as the pipeline does."""
    return [i for j in ids for i in ([j] * n_patches if j == IMAGE_ID else [j])]

# ---------------------------------------------------------------------------------------------------
# Models with random weights, their logits and answers

SMALL = LLaVAConfig(
    llm=PhiConfig(vocab_size=97, block_size=64, n_layer=3, n_head=3, n_embd=48, n_inner=80, rotary_dim=8, dropout=0.0),
    vision=VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=32, n_inner=64),
)


@torch.no_grad()
def random_model(config: LLaVAConfig, scale: float, eos_bias: float = 0.0) -> LLaVAPhi:
    """Weights `scale` times larger than fresh ones: answers that vary. eos_bias: added to token 0's logit."""
    model = LLaVAPhi(config).eval()
    init_weights(model, torch.Generator().manual_seed(1))
    for p in model.parameters():
        p.mul_(scale if p.dim() > 1 else 1)
    model.llm.lm_head.bias[0] = eos_bias
    return model


def pack(prompts: list[list[int]]) -> tuple[Tensor, list[int], Tensor]:
    """Expanded prompts -> packed ids with 0 under the patches, lengths, image positions."""
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    return ids.clamp_min(0), [len(prompt) for prompt in prompts], (ids == IMAGE_ID).nonzero().flatten()


@torch.no_grad()
def all_logits(model: LLaVAPhi, prompts: list[list[int]], images: Tensor) -> Tensor:
    """The plain forward pass without a KV cache: logits (T, V)."""
    ids, lengths, image_positions = pack(prompts)
    return model.llm.lm_head(model.llm(model.embed(ids, images, image_positions), Packed(lengths, ids.device)))


def plain_answer(model: LLaVAPhi, prompt: list[int], images: Tensor, n: int, eos_id: int = 0) -> list[int]:
    """The oracle for generation: model.generate, which has no KV cache."""
    ids, _, image_positions = pack([prompt])
    return model.generate(ids, images, image_positions, n, eos_id)


def fast_answers(session: LLaVAPhi | Session, prompts: list[list[int]], images: list[Tensor], n: int, eos_id: int = 0,
                 **sampling) -> list[list[int]]:
    """The same from lib/generate.py, for a whole batch; a model gets a new session."""
    if isinstance(session, LLaVAPhi):
        session = Session(session)
    columns = list(session.generate(prompts, images, max_new_tokens=n, eos_id=eos_id, **sampling))
    return [[token for token in (column[row] for column in columns) if token is not None]
            for row in range(len(prompts))]

# ---------------------------------------------------------------------------------------------------
# Records


def talk(*said: str, **more) -> dict:
    """A record of a conversation: question, answer, question, ..."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return more | {"conversations": turns}


IMAGES = ["wide.png", "tall.png", "photo.jpg", "square.png", "big.jpg", "odd.png"]


def conversations(n: int = 24) -> list[dict]:
    """Records of one to three turns about the goldens' pictures; every fourth has none."""
    records = []
    for i in range(n):
        said = []
        for t in range(1 + i % 3):
            image = "<image>\n" if t == 0 and i % 4 else ""
            said += [image + f"Question {i} {t}?" + " why" * (i % 5), f"Answer {i * 7 % 11}" + " because" * (i * 5 % 7)]
        more = {"image": IMAGES[i % 6]} if i % 4 else {}
        records.append(talk(*said, id=f"r{i}", **more))
    return records

# ---------------------------------------------------------------------------------------------------
# Training runs on the tiny model

TRAIN_FLAGS = ["--dtype", "float32", "--dropout", "0", "--workers", "0", "--global-batch", "4", "--lr", "1e-3",
               "--micro-tokens", "300"]


def train_flags(out: Path, data: Path, *more: str, stage: str = "finetune") -> list[str]:
    """The command line of a small training run on the goldens' tiny weights and pictures."""
    start = {
        "sft": ["--llm", GOLDEN / "tiny-phi"],
        "pretrain": ["--llm", GOLDEN / "tiny-phi", "--vision", GOLDEN / "tiny-clip"],
        "finetune": ["--model", TINY_MODEL],
    }[stage]
    where = ["--data", data, "--images", GOLDEN / "images", "--out", out]
    return [str(flag) for flag in ["--stage", stage, *start, *where, *TRAIN_FLAGS, *more]]


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without the fields that depend on the clock and the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "mfu", "memory_gb")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]

# ---------------------------------------------------------------------------------------------------
# Model folders


def load_weights_command(argv: list[str]) -> int:
    """`python load_weights.py ARGV` in this process -> its exit code."""
    return load_weights.main(load_weights.parse(argv))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def unchanged(content: dict) -> dict:
    return content


def rewrite(source: Path, out: Path, change: Callable[[dict], dict] = unchanged,
            config: Callable[[dict], dict] = unchanged, keep: tuple[str, ...] = ()) -> Path:
    """A copy of a model folder with its tensors (in one safetensors file) and its config changed.

    keep: which of its other json files are copied; all of them by default.
    """
    out.mkdir()
    for path in source.glob("*.json"):
        if "index" not in path.name and (not keep or path.name in keep):
            shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps(config(json.loads((source / "config.json").read_text()))))
    tensors = {name: tensor.contiguous() for name, tensor in change(tensors_of(source)).items()}
    save_file(tensors, out / "model.safetensors")
    return out


def same(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    """Do two models have the same tensors, bit for bit, among those whose names begin with `prefix`?"""
    a, b = ({name: x for name, x in m.state_dict().items() if name.startswith(prefix)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def model_from(phi: Path, tower: Path) -> LLaVAPhi:
    """A model from a Phi folder and a tower's. Its projector is newly initialized each time."""
    bases = open_weights(phi, tower)
    model = LLaVAPhi(bases.config)
    load_weights.load_into(model, bases, allow_missing=("projector.",))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes, for every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def siglip_folder(kind: str, out: Path) -> Path:
    """Google's SiglipModel with its text tower, or the vision tower alone, made from the tower in tiny-mipha."""
    old, new = "model.vision_tower.vision_model.", "" if kind == "without prefix" else "vision_model."

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tower = {new + name.removeprefix(old): x for name, x in tensors.items() if name.startswith(old)}
        text = {"text_model.final_layer_norm.weight": torch.ones(4), "text_model.head.weight": torch.ones(4, 4),
                "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
        return tower | text if kind == "whole" else tower

    def config(mipha: dict) -> dict:
        tower = {key: value for key, value in mipha["vision_config"]["vision_tower"].items() if key[:3] != "mm_"}
        tower = without(tower, "hidden_act", "layer_norm_eps", "num_channels")      # published files leave defaults out
        return {"model_type": "siglip", "vision_config": tower} if kind == "whole" else tower

    return rewrite(TINY_MIPHA, out, change, config, keep=("config.json", "preprocessor_config.json"))
