"""Pre-train the demo's two bases and write them as their real counterparts are published: demo/phi and demo/clip.

LLaVA joins a language model and a vision tower that have never met. For the demo to be the same task in miniature, it
needs two such bases, small enough to be committed.

The language model reads and writes the shapes world in text only: captions, and conversations (LLaVA's template) about
a picture that is spelled out as 16 words, one per patch: "." for nothing, or one word for all there is to see, such as
redcircletopleft. A patch's features do the same; two words would have to be bound together by their positions.

The vision tower is trained as CLIP is, contrastively: a whole picture (its class token) must find its caption among
those of the batch, and, because LLaVA reads patches, each quarter (the mean of its patches, at the last two layers)
must find the phrase that names what lies there. Neither base sees a held-out scene.

$ python -m demo.pretrain_bases                     # both, one after the other: about a quarter of an hour on one core
$ python -m demo.pretrain_bases --only clip
"""
import dataclasses
import math
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from lib.common import Parser, parse_or_exit, run_command


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="-m demo.pretrain_bases", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder that gets phi/ and clip/")
    add("--only", choices=["phi", "clip"], help="train only this one")
    add("--phi-steps", type=int, default=2600, help="training steps of the language model")
    add("--clip-steps", type=int, default=1000, help="training steps of the vision tower")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from data import EOT, IGNORE, SYSTEM, Sample, collate, encode, eot_id, load_tokenizer, tokenize
from demo.shapes import NAMES, QUARTERS, SIZE, Scene, Shape, caption, converse, draw_scene, paint, to_conversation
from lib.layouts import to_saved
from lib.save_weights import phi_json, tower_json, write_json, write_tokenizer
from model import Packed, Phi, PhiConfig, cross_entropy_sum, init_weights
from vision import VisionConfig, VisionTower

TINY_PHI = PhiConfig(
    vocab_size=640,                                 # more than the tokenizer uses, as in Phi-2
    block_size=512,
    n_layer=4,
    n_head=8,
    n_embd=128,
    n_inner=512,
    rotary_dim=8,
    dropout=0.0,
)
TINY_CLIP = VisionConfig(
    image_size=SIZE,
    patch_size=14,
    n_layer=4,
    n_head=4,
    n_embd=128,
    n_inner=512,
)


def fit(name: str, module: nn.Module, next_loss: Callable[[], Tensor], steps: int, lr: float, decay: float) -> None:
    """AdamW; the rate rises over the first 5 % of the steps, then falls to a hundredth along a cosine."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    start = time.time()
    losses = []
    for step in range(steps):
        warmup = (step + 1) / (0.05 * steps)
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(warmup, cosine)
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = np.mean(losses[-50:])
            print(f"{name} {step + 1}/{steps} | loss {recent:.4f} | {time.time() - start:.0f} s", flush=True)


def save_base(folder: Path, parts: dict[str, nn.Module], prefix: str, config: dict) -> None:
    """Write parts of LLaVAPhi as a base of its own: published names without `prefix`; q, k and v separate.

    In fp16, as Phi-2 is published: half the bytes in the repository.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            saved_names = to_saved(f"{part}.{name}")
            for saved_name, piece in zip(saved_names, tensor.half().chunk(len(saved_names))):
                saved[saved_name.removeprefix(prefix)] = piece.contiguous()
    save_file(dict(sorted(saved.items())), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)

# ---------------------------------------------------------------------------------------------------
# Language model


def patch_word(shape: Shape) -> str:
    """The word for a patch that shows this shape, where it is. One token, as tests/test_demo.py checks."""
    return f"{shape.name}{QUARTERS[shape.quarter]}".replace(" ", "")


def in_words(scene: Scene) -> str:
    """The picture as 16 words, one per patch in row order: "." or the shape with its quarter, one token each."""
    patches = ["."] * 16
    for shape in scene:
        corner = 8 * shape.row + 2 * shape.column               # the quarter's first patch, of 2 x 2
        for patch in (corner, corner + 1, corner + 4, corner + 5):
            patches[patch] = patch_word(shape)
    return " ".join(patches)


def document(rng: random.Random, tok: Tokenizer) -> Sample:
    """A caption, alone or after the picture in words, or a conversation about those words. Answers are supervised."""
    scene = draw_scene(rng, held_out=False)
    style = rng.random()
    if style < 0.2:
        # A few captions have no picture: the language alone.
        given = tokenize(" " + in_words(scene), tok).ids if style > 0.03 else []
        text = tokenize(caption(scene) + "\n", tok).ids
        return Sample("", given + text, [IGNORE] * len(given) + text, image=None)
    said = to_conversation(converse(scene, rng))
    said[0]["value"] = f"{in_words(scene)}\n{said[0]['value']}"
    ids, labels = encode({"conversations": said}, tok, "v0")
    start = 0
    if style < 0.8:                                 # the system text need not be read each time
        start = len(tokenize(SYSTEM, tok).ids)
    return Sample("", ids[start:], labels[start:], image=None)


def train_tokenizer(rng: random.Random, folder: Path) -> Tokenizer:
    """Byte-level BPE like Phi-2's, trained on the world's own texts and the chat template."""
    texts = []
    for _ in range(2000):
        scene = draw_scene(rng, held_out=False)
        turns = "".join(f"USER: {question} ASSISTANT: {answer}" for question, answer in converse(scene, rng))
        texts += [f"{SYSTEM} {turns}", f"{caption(scene)}\nDescribe the picture.", f" {in_words(scene)}"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[EOT], initial_alphabet=alphabet,
                                                       show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tok, image=False)
    (folder / "tokenizer.json").write_text(tok.to_str(pretty=True) + "\n", encoding="utf-8")   # with a final newline
    return load_tokenizer(folder)


def pretrain_phi(out: Path, steps: int) -> None:
    """Train the language model and its tokenizer; write both to `out`."""
    rng = random.Random(1)
    tok = train_tokenizer(rng, out)
    model = Phi(TINY_PHI)
    init_weights(model, torch.Generator().manual_seed(1))

    def next_loss() -> Tensor:
        samples = [document(rng, tok) for _ in range(40)]
        samples.sort(key=lambda sample: len(sample.ids))
        b = collate(samples, SIZE)
        h = model(model.wte(b.ids), Packed(b.lengths, b.ids.device))                    # (T, C)
        return cross_entropy_sum(h[b.loss_positions], model.lm_head, b.targets) / len(b.targets)

    fit("phi", model, next_loss, steps, lr=3e-3, decay=0.01)
    save_base(out, {"llm": model}, "language_model.", phi_json(TINY_PHI, eot_id(tok), "float16"))

# ---------------------------------------------------------------------------------------------------
# Vision tower

PHRASES = ["nothing", *NAMES]                       # what a quarter of a picture can show


def contrastive_loss(scores: Tensor, right: Tensor) -> Tensor:
    """scores (A, B); right (A, B), 1.0 where row and column match: each row must find its columns."""
    return F.cross_entropy(scores, right / right.sum(1, keepdim=True))


class Contrast(nn.Module):
    """The whole tower, its last LayerNorm, and what CLIP adds for training: projections into one space, a temperature.

    The language has 13 phrases, so its tower is an embedding table; a caption combines the phrases of four quarters.
    """

    def __init__(self):
        super().__init__()
        width = 64
        self.tower = VisionTower(dataclasses.replace(TINY_CLIP, feature_layer=-1))     # LLaVA leaves the last block out
        self.ln_post = nn.LayerNorm(TINY_CLIP.n_embd, eps=TINY_CLIP.eps)
        self.project_quarter = nn.Linear(TINY_CLIP.n_embd, width, bias=False)
        self.project_whole = nn.Linear(TINY_CLIP.n_embd, width, bias=False)
        self.phrases = nn.Embedding(len(PHRASES), width)
        self.caption = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.hidden: list[Tensor] = []              # outputs of the last two blocks in this forward pass
        for block in self.tower.h[-2:]:
            block.register_forward_hook(lambda block, args, out: self.hidden.append(out))       # (N, 1 + P, D)

    def similarity(self, seen: Tensor, said: Tensor) -> Tensor:
        """seen (A, width), said (B, width) -> cosines (A, B), divided by the learned temperature."""
        seen = F.normalize(seen, dim=-1)
        said = F.normalize(said, dim=-1)
        return self.scale.exp() * seen @ said.T

    def forward(self, images: Tensor, regions: Tensor) -> Tensor:
        """images (N, 3, H, W) uint8, regions (N, 4): the phrase of each quarter -> loss."""
        self.hidden.clear()
        self.tower(images)
        # The whole picture and its caption, each to be found by the other. The same scene may be in a batch twice.
        whole = self.project_whole(self.ln_post(self.hidden[-1][:, 0]))                 # (N, width), class tokens
        captions = self.caption(self.phrases(regions).flatten(1))                       # (N, width)
        equal_quarters = regions[:, None] == regions                                    # (N, N, 4)
        same = equal_quarters.all(-1).float()                                           # (N, N)
        find_caption = contrastive_loss(self.similarity(whole, captions), same)
        find_picture = contrastive_loss(self.similarity(captions, whole), same)
        loss = (find_caption + find_picture) / 2
        # The quarters and their phrases.
        right = F.one_hot(regions.flatten(), len(PHRASES)).float()                      # (N * 4, 13)
        for x in self.hidden:
            patches = x[:, 1:].unflatten(1, (2, 2, 2, 2))           # (N, quarter row, its row, quarter column, its, D)
            quarters = patches.mean(dim=(2, 4)).flatten(0, 2)                           # (N * 4, D)
            seen = self.project_quarter(self.ln_post(quarters))                         # (N * 4, width)
            loss = loss + contrastive_loss(self.similarity(seen, self.phrases.weight), right)
        return loss


def pictures(n: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """n training pictures (n, 3, H, W) uint8, and the phrases of their quarters (n, 4), as indices of PHRASES."""
    images = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8)
    regions = torch.zeros(n, 4, dtype=torch.int64)
    for i in range(n):
        scene = draw_scene(rng, held_out=False)
        pixels = np.array(paint(scene, rng))                                            # (H, W, 3)
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        for shape in scene:
            regions[i, shape.quarter] = PHRASES.index(shape.name)
    return images, regions


def pretrain_clip(out: Path, steps: int) -> None:
    """Train the vision tower; write it and its preprocessor_config.json to `out`."""
    images, regions = pictures(24000, random.Random(2))
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(2)                            # for what init_weights leaves out: the table and the projections
    model = Contrast()
    init_weights(model.tower, generator)
    nn.init.normal_(model.tower.cls, std=0.02, generator=generator)

    def next_loss() -> Tensor:
        rows = torch.randint(0, len(images), (64,), generator=generator)
        return model(images[rows], regions[rows])

    fit("clip", model, next_loss, steps, lr=1e-3, decay=0.05)
    parts = {"vision": model.tower, "vision.ln_post": model.ln_post}
    save_base(out, parts, "vision_tower.", tower_json(TINY_CLIP) | {"torch_dtype": "float16"})
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,                              # bicubic
    })


def main(args: Namespace) -> None:
    if args.only != "clip":
        pretrain_phi(args.out / "phi", args.phi_steps)
    if args.only != "phi":
        pretrain_clip(args.out / "clip", args.clip_steps)


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
