"""Where does a model look? For each token of an answer, two maps over the patches of the picture, as numbers or a page.

attention: of one layer, averaged over its heads; what is read, not what changes the answer. gradient: how strongly the
choice of the token reacts to each patch, by gradient times input.
"""
import html
import math

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data import IMAGE_ID, eot_id
from lib.chat import Picture, answer, encode_chat, open_image, token_text
from lib.common import html_page, visible
from lib.generate import Session
from lib.pictures import png_address
from lib.quant import Int4Linear, Int8Linear
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
    for _ in answer(session, tok, [[question]], [images], logprobs=0, **options):
        pass
    return look_back(session, tok, question, images, layer)


def check_look(model: LLaVAPhi, images: Tensor, layer: int) -> None:
    """ValueError where there are no maps to make."""
    n_layer = model.config.llm.n_layer
    quantized = any(isinstance(module, (Int8Linear, Int4Linear)) for module in model.modules())
    if quantized or len(images) != 1 or not 0 <= layer < n_layer:
        raise ValueError(f"looking needs one picture, a layer from 0 to {n_layer - 1} and weights in 16 or 32 bits, "
                         f"found {len(images)} pictures, layer {layer}{', and fewer bits' * quantized}")


def look_back(session: Session, tok: Tokenizer, question: str, images: Tensor, layer: int) -> list[dict]:
    """`look` at the answer that the session has just given, with logprobs. See check_look for what it can look at."""
    model = session.model
    scored = [each for each in session.scored[0] if each.token != eot_id(tok)]
    prompt = encode_chat(model.config, tok, [question], images)
    maps = shares(model, prompt, images, [each.token for each in scored], layer) if scored else []
    return [{"token": token_text(tok, each.token), "logprob": each.logprob, "attention": read, "gradient": felt}
            for each, read, felt in zip(scored, *maps)]


def shares(model: LLaVAPhi, prompt: list[int], images: Tensor, answer: list[int], layer: int) -> list[list]:
    """Each patch's share of all positions, by attention and by gradient: for each of the n tokens, rows of patches."""
    ids = torch.tensor(prompt + answer[:-1], device=model.device)                  # the last token is not read
    patches = (ids == IMAGE_ID).nonzero().flatten()
    with torch.no_grad():
        x = model.embed(ids.clamp_min(0), images.to(model.device), patches)        # (T, C)
    seqs = Watched([len(ids)], model.device, model.config.llm.block_size)
    seqs.first, seqs.layer = len(prompt) - 1, layer
    h = model.llm(x.requires_grad_(), seqs)[seqs.first:]                           # (n, C)
    logits = model.llm.lm_head(h).float()                                          # (n, V)
    # The lead over the runner-up: where a token is certain, its probability no longer reacts to anything.
    token = torch.tensor(answer, device=model.device)[:, None]
    lead = logits.gather(1, token) - logits.scatter(1, token, float("-inf")).amax(1, keepdim=True)     # (n, 1)
    products = [torch.autograd.grad(each, x, retain_graph=True)[0] * x.detach() for each in lead]
    effects = torch.stack([product.float().norm(dim=-1) for product in products])  # (n, T)
    effects /= effects.sum(1, keepdim=True).clamp_min(1e-30)
    side = math.isqrt(len(patches))
    return [each[:, patches].unflatten(1, (side, side)).tolist() for each in (seqs.weights, effects)]


def seen_box(w: int, h: int, size: int, mode: str) -> tuple[float, float, float, float]:
    """Where the square that data.load_image makes of a picture of w x h pixels lies on it: left, top, width and height,
    in parts of the picture's own."""
    if mode == "squash":
        return 0.0, 0.0, 1.0, 1.0
    W, H, square = (w, h, max(w, h)) if mode == "pad" else (size * w // min(w, h), size * h // min(w, h), size)
    return int((W - square) / 2) / W, int((H - square) / 2) / H, square / W, square / H


def look_page(picture: Image.Image, question: str, looks: list[dict], config: LLaVAConfig, layer: int) -> str:
    """A self-contained page. picture: as the user gave it, upright and RGB."""
    box = seen_box(*picture.size, config.vision.image_size, config.image_mode)
    place = ";".join(f"{name}:{100 * part:.3f}%" for name, part in zip(("left", "top", "width", "height"), box))
    figures = ""
    for each in looks:
        figures += f"<figure><code>{html.escape(visible(each['token']))}</code> {math.exp(each['logprob']):.1%}<br>\n"
        for kind in ("attention", "gradient"):
            most = max(map(max, each[kind])) or 1.0
            heat = Image.new("RGBA", (len(each[kind][0]), len(each[kind])))        # a pixel for each patch
            heat.putdata([(*HEAT, round(216 * share / most)) for row in each[kind] for share in row])
            figures += (f'<div><div class="picture"><img style="{place}" src="{png_address(heat)}" alt="{kind}"></div>'
                        f"{kind}, {sum(map(sum, each[kind])):.0%} on the picture</div>\n")
        figures += "</figure>\n"
    small = picture.copy()
    small.thumbnail((640, 640))
    said = html.escape(visible("".join(each["token"] for each in looks).strip()))
    return html_page("Where the model looks", f"""<p>{html.escape(visible(question))}<br><strong>{said}</strong></p>
<div class="picture"></div><p>For each token its probability and the shares of the patches, in the attention of layer
{layer} and by gradient times input. The strongest patch of each map has the full color.</p>
<div class="maps">{figures}</div>""", LOOK_STYLE + f"""
.picture {{ aspect-ratio: {picture.width} / {picture.height}; background-image: url({png_address(small)}) }}""")
