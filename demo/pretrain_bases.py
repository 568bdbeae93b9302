"""Pre-train the demo's two bases and write them as their real counterparts are published: demo/phi and demo/clip.

The language model reads and writes the shapes world in text only: captions, and conversations (LLaVA's template) about
a picture that is spelled out as 16 words, one per patch: "." for nothing, or a word that says all there is to see, such
as redcircletopleft. That is what a patch's features do; two words would have to be bound together by their positions.

The vision tower is trained as CLIP is, contrastively: a whole picture (its class token) must find its caption among
those of the batch, and, because LLaVA reads patches, each quarter (the mean of its patches, at the last and at the last
but one layer) must find the phrase that names what lies there. The two never meet here; neither sees a held-out scene.

$ python -m demo.pretrain_bases                     # both, one after the other: about a quarter of an hour on one core
$ python -m demo.pretrain_bases --only clip
"""
import argparse
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from data import IGNORE, SYSTEM, Sample, collate, encode, eot_id, load_tokenizer
from demo.shapes import NAMES, PLACES, SIZE, Scene, Shape, caption, converse, draw_scene, paint
from load_weights import clip_json, phi_json, to_saved, write_json, write_tokenizer
from model import Layout, Phi, PhiConfig, cross_entropy_sum, init_weights
from vision import VisionConfig, VisionTower

PHI = PhiConfig(vocab_size=640, block_size=512, n_layer=4, n_head=8, n_embd=128, n_inner=512, rotary_dim=8, dropout=0.0)
CLIP = VisionConfig(image_size=SIZE, patch_size=14, n_layer=4, n_head=4, n_embd=128, n_inner=512)
PHRASES = ["nothing", *NAMES]
WORDS = {Shape(i, *name.split()): f"{name}{place}".replace(" ", "") for i, place in enumerate(PLACES) for name in NAMES}


def fit(name: str, module: nn.Module, next_loss: Callable[[], Tensor], steps: int, lr: float, decay: float) -> None:
    """AdamW; the rate rises over the first 5 % of the steps, then falls to a hundredth along a cosine."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    began, losses = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.05 * steps), 0.505 + 0.495 * math.cos(math.pi * step / steps))
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            loss, seconds = np.mean(losses[-50:]), time.time() - began
            print(f"{name} {step + 1}/{steps} | loss {loss:.4f} | {seconds:.0f} s", flush=True)


def save(folder: Path, tensors: dict[str, Tensor], prefix: str, config: dict) -> None:
    """Under the published names, q, k and v apart; in fp16, as Phi-2 is published: half the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {}
    for ours, tensor in tensors.items():
        names = to_saved(ours)
        for name, piece in zip(names, tensor.half().chunk(len(names))):
            pieces[name.removeprefix(prefix)] = piece.contiguous()
    save_file(dict(sorted(pieces.items())), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)

# ---------------------------------------------------------------------------------------------------
# Language model


def words(scene: Scene) -> str:
    """The picture as 16 words, one per patch, row by row: a "." or the shape with its place, one token each."""
    cells = ["."] * 16
    for shape in scene:
        corner = 8 * (shape.place // 2) + 2 * (shape.place % 2)
        for cell in (corner, corner + 1, corner + 4, corner + 5):
            cells[cell] = WORDS[shape]
    return " ".join(cells)


def document(rng: random.Random, tok: Tokenizer) -> Sample:
    """A caption by itself or after the picture in words, or a conversation about those words; answers are learned."""
    scene, style = draw_scene(rng, False), rng.random()
    if style < 0.2:
        given, text = (tok.encode(t, add_special_tokens=False).ids for t in (" " + words(scene), caption(scene) + "\n"))
        given = given if style > 0.03 else []
        return Sample("", given + text, [IGNORE] * len(given) + text, None)
    said = [{"from": who, "value": text} for turn in converse(scene, rng) for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = f"{words(scene)}\n{said[0]['value']}"
    ids, labels = encode({"conversations": said}, tok, "v0")
    # the system text need not be read each time
    start = len(tok.encode(SYSTEM, add_special_tokens=False).ids) if style < 0.8 else 0
    return Sample("", ids[start:], labels[start:], None)


def train_tokenizer(rng: random.Random, folder: Path) -> Tokenizer:
    """Byte-level BPE as Phi-2's, on the world's own texts and the chat template."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    texts = []
    for _ in range(2000):
        scene = draw_scene(rng, False)
        turns = "".join(f"USER: {question} ASSISTANT: {answer}" for question, answer in converse(scene, rng))
        texts += [f"{SYSTEM} {turns}", f"{caption(scene)}\nDescribe the picture.", f" {words(scene)}"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"],
                                                       initial_alphabet=alphabet, show_progress=False))
    assert all(len(tok.encode(f" {word}").ids) == 1 for word in WORDS.values()), "a patch's word is more than one token"
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    write_tokenizer(folder, load_tokenizer(folder), image=False)
    return load_tokenizer(folder)


def pretrain_phi(out: Path, steps: int, batch: int, lr: float) -> None:
    rng = random.Random(1)
    tok = train_tokenizer(rng, out)
    model = Phi(PHI)
    init_weights(model, torch.Generator().manual_seed(1))

    def next_loss() -> Tensor:
        b = collate(sorted((document(rng, tok) for _ in range(batch)), key=lambda sample: len(sample.ids)), SIZE)
        h = model(model.wte(b.ids), Layout(b.lengths, b.ids.device))
        return cross_entropy_sum(h[b.rows], model.lm_head, b.targets) / len(b.targets)
    fit("phi", model, next_loss, steps, lr, decay=0.01)
    tensors = {f"llm.{name}": p for name, p in model.state_dict().items()}
    save(out, tensors, "language_model.", phi_json(PHI, eot_id(tok), "float16"))

# ---------------------------------------------------------------------------------------------------
# Vision tower


class Contrast(nn.Module):
    """The whole tower, its last LayerNorm, and what CLIP adds for training: projections into one space, a temperature.

    The language has 13 phrases, so its tower is a table; a caption is what the phrases of four quarters say together.
    """
    def __init__(self, width: int = 64):
        super().__init__()
        self.tower = VisionTower(dataclasses.replace(CLIP, feature_layer=-1))
        self.ln_post = nn.LayerNorm(CLIP.n_embd, eps=CLIP.eps)
        self.look, self.look_whole = (nn.Linear(CLIP.n_embd, width, bias=False) for _ in range(2))
        self.phrases = nn.Embedding(len(PHRASES), width)
        self.caption = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.hidden: list[Tensor] = []
        for block in self.tower.h[-2:]:
            block.register_forward_hook(lambda module, args, out: self.hidden.append(out))

    def match(self, seen: Tensor, said: Tensor, right: Tensor) -> Tensor:
        """seen (A, width), said (B, width), right (A, B): what belongs together -> the contrastive loss of each row."""
        scores = self.scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T
        return F.cross_entropy(scores, right / right.sum(1, keepdim=True))

    def forward(self, images: Tensor, regions: Tensor) -> Tensor:
        """images (N, 3, H, W) uint8, regions (N, 4): the phrase of each quarter -> loss."""
        self.hidden.clear()
        self.tower(images)
        whole = self.look_whole(self.ln_post(self.hidden[-1][:, 0]))                            # (N, width)
        captions = self.caption(self.phrases(regions).flatten(1))                               # (N, width)
        same = (regions[:, None] == regions).all(-1).float()                                    # (N, N) one scene twice
        loss = (self.match(whole, captions, same) + self.match(captions, whole, same)) / 2
        for x in self.hidden:
            quarters = x[:, 1:].unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(0, 2)       # (N * 4, D)
            named = F.one_hot(regions.flatten(), len(PHRASES)).float()                          # (N * 4, 13)
            loss = loss + self.match(self.look(self.ln_post(quarters)), self.phrases.weight, named)
        return loss


def pictures(n: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    images, regions = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(n, 4, dtype=torch.int64)
    for i in range(n):
        scene = draw_scene(rng, False)
        images[i] = torch.from_numpy(np.array(paint(scene, rng))).permute(2, 0, 1)
        for shape in scene:
            regions[i, shape.place] = PHRASES.index(shape.name)
    return images, regions


def pretrain_clip(out: Path, steps: int, batch: int, lr: float) -> None:
    images, regions = pictures(24000, random.Random(2))
    draw = torch.Generator().manual_seed(2)
    torch.manual_seed(2)                            # the layers that init_weights does not draw: table and projections
    model = Contrast()
    init_weights(model.tower, draw)
    nn.init.normal_(model.tower.cls, std=0.02, generator=draw)

    def next_loss() -> Tensor:
        rows = torch.randint(0, len(images), (batch,), generator=draw)
        return model(images[rows], regions[rows])
    fit("clip", model, next_loss, steps, lr, decay=0.05)
    tensors = model.tower.state_dict() | {f"ln_post.{name}": p for name, p in model.ln_post.state_dict().items()}
    tensors = {f"vision.{name}": p for name, p in tensors.items()}
    save(out, tensors, "vision_tower.", clip_json(CLIP) | {"torch_dtype": "float16"})
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE},
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "resample": 3})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="default: %(default)s")
    parser.add_argument("--only", choices=["phi", "clip"], help="default: both")
    parser.add_argument("--phi-steps", type=int, default=2600, help="default: %(default)s")
    parser.add_argument("--clip-steps", type=int, default=1000, help="default: %(default)s")
    args = parser.parse_args()
    if args.only != "clip":
        pretrain_phi(args.out / "phi", args.phi_steps, 40, 3e-3)
    if args.only != "phi":
        pretrain_clip(args.out / "clip", args.clip_steps, 64, 1e-3)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
