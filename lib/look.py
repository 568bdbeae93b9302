"""Where does a model look? For each token of an answer, two maps over the patches of the picture, as numbers or a page.

attention: of one layer, averaged over its heads; what is read, not what changes the answer. gradient: how strongly the
choice of the token reacts to each patch, by gradient times input.
"""
import html
import math

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data import IMAGE_ID, eot_id
from lib.chat import Picture, answer, encode_chat, open_image, token_text
from lib.common import html_page, visible
from lib.generate import Session
from lib.pictures import png_address
from model import LLaVAConfig, LLaVAPhi, Packed

HEAT = (255, 0, 140)                # a color that few pictures have
LOOK_STYLE = """.maps { display: flex; flex-wrap: wrap; gap: 1em 2em }
figure { margin: 0; width: 21em; max-width: 100% }
figure div { display: inline-block; width: 49%; font-size: small }
.picture { position: relative; overflow: hidden; background-size: 100% 100%; width: 100%; max-width: 21em }
.picture img { position: absolute; image-rendering: pixelated }
code { white-space: pre-wrap; border: 1px solid var(--line) }"""


class Watched(Packed):
    """One sequence. The attention weights of one layer's queries from `first` on are computed a second time."""

    def __init__(self, ids: Tensor, first: int, layer: int):
        super().__init__([len(ids)], ids.device, len(ids))
        self.first = first
        self.layer = layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if layer == self.layer:
            scores = torch.einsum("qhc,khc->hqk", q[self.first:].float(), k.float()) * q.size(-1) ** -0.5
            unseen = self.pos > self.pos[self.first:, None]                        # (n, T)
            self.weights = scores.masked_fill(unseen, float("-inf")).softmax(-1).mean(0).detach()      # (n, T)
        return super().attend(q, k, v, layer)


def look(model: LLaVAPhi, tok: Tokenizer, question: str, image: Tensor | Picture, layer: int = 0,
         **options) -> list[dict]:
    """Answer a question about a picture. For each token: its text ("token"), "logprob", and the maps "attention" (of
    this layer) and "gradient", rows of patches with their shares of the whole; the rest fell on words.

    options: of `answer`. Raises ValueError for a quantized model, a layer that it does not have, or not one picture.
    """
    session = Session(model)
    images = open_image(image, model.config)
    check_look(model, images, layer)            # rather than after the answer
    list(answer(session, tok, [[question]], [images], logprobs=0, **options))
    return look_back(session, tok, question, images, layer)


def check_look(model: LLaVAPhi, images: Tensor, layer: int) -> None:
    """ValueError where there are no maps to make."""
    n_layer = model.config.llm.n_layer
    quantized = not all(parameter.is_floating_point() for parameter in model.parameters())
    if quantized or len(images) != 1 or not 0 <= layer < n_layer:
        raise ValueError(f"looking needs one picture, a layer from 0 to {n_layer - 1} and weights in 16 or 32 bits, "
                         f"found {len(images)} pictures, layer {layer}{', and fewer bits' * quantized}")


def look_back(session: Session, tok: Tokenizer, question: str, images: Tensor, layer: int) -> list[dict]:
    """`look` at the answer that the session has just given, with logprobs. See check_look for what it can look at."""
    scored = [each for each in session.scored[0] if each.token != eot_id(tok)]
    if not scored:
        return []
    prompt = encode_chat(session.model.config, tok, [question], images)
    maps = shares(session.model, prompt, images, [each.token for each in scored], layer)
    return [{"token": token_text(tok, each.token), "logprob": each.logprob, "attention": read, "gradient": felt}
            for each, read, felt in zip(scored, *maps)]


def shares(model: LLaVAPhi, prompt: list[int], images: Tensor, answer: list[int], layer: int) -> list[list]:
    """Each patch's share of all positions, by attention and by gradient: for each of the n tokens, rows of patches."""
    ids = torch.tensor(prompt + answer[:-1], device=model.device)                  # the last token is not read
    patches = (ids == IMAGE_ID).nonzero().flatten()
    with torch.no_grad():
        x = model.embed(ids.clamp_min(0), images.to(model.device), patches)        # (T, C)
    first = len(prompt) - 1
    seqs = Watched(ids, first, layer)
    h = model.llm(x.requires_grad_(), seqs)[first:]                                # (n, C)
    logits = model.llm.lm_head(h).float()                                          # (n, V)
    # The lead over the runner-up: where a token is certain, its probability no longer reacts to anything.
    token = torch.tensor(answer, device=model.device)[:, None]
    lead = logits.gather(1, token) - logits.scatter(1, token, float("-inf")).amax(1, keepdim=True)     # (n, 1)
    effects = []
    for each in lead:
        [gradient] = torch.autograd.grad(each, x, retain_graph=True)               # (T, C)
        effects.append((gradient * x.detach()).float().norm(dim=-1))
    effects = torch.stack(effects)                                                 # (n, T)
    effects /= effects.sum(1, keepdim=True).clamp_min(1e-30)
    side = math.isqrt(len(patches))
    return [each[:, patches].unflatten(1, (side, side)).tolist() for each in (seqs.weights, effects)]


def seen_box(w: int, h: int, size: int, mode: str) -> tuple[float, float, float, float]:
    """Where the square that data.load_image makes of a picture of w x h pixels lies on it: left, top, width and height,
    in parts of the picture's own."""
    if mode == "squash":
        return 0.0, 0.0, 1.0, 1.0
    square = max(w, h)
    if mode == "crop":                  # the shorter side becomes `size`, as data.load_image rounds it
        w, h, square = size * w // min(w, h), size * h // min(w, h), size
    return int((w - square) / 2) / w, int((h - square) / 2) / h, square / w, square / h


def look_page(picture: Image.Image, question: str, looks: list[dict], config: LLaVAConfig, layer: int) -> str:
    """A self-contained page. picture: as the user gave it, upright and RGB."""
    left, top, width, height = seen_box(*picture.size, config.vision.image_size, config.image_mode)
    place = f"left:{left:.3%};top:{top:.3%};width:{width:.3%};height:{height:.3%}"
    figures = ""
    for each in looks:
        figures += f"<figure><code>{html.escape(visible(each['token']))}</code> {math.exp(each['logprob']):.1%}<br>\n"
        for kind in ("attention", "gradient"):
            grid = np.array(each[kind])                                            # a pixel for each patch
            strength = 216 * grid / (grid.max() or 1.0)
            heat = Image.new("RGBA", grid.shape[::-1], HEAT)
            heat.putalpha(Image.fromarray(strength.round().astype(np.uint8)))
            figures += (f'<div><div class="picture"><img style="{place}" src="{png_address(heat)}" alt="{kind}"></div>'
                        f"{kind}, {grid.sum():.0%} on the picture</div>\n")
        figures += "</figure>\n"
    small = picture.copy()
    small.thumbnail((640, 640))
    said = html.escape(visible("".join(each["token"] for each in looks).strip()))
    return html_page("Where the model looks", f"""<p>{html.escape(visible(question))}<br><strong>{said}</strong></p>
<div class="picture"></div><p>For each token its probability and the shares of the patches, in the attention of layer
{layer} and by gradient times input. The strongest patch of each map has the full color.</p>
<div class="maps">{figures}</div>""", LOOK_STYLE + f"""
.picture {{ aspect-ratio: {picture.width} / {picture.height}; background-image: url({png_address(small)}) }}""")
