"""First contact with weights: does this model speak, and does it see? `load_weights.py inspect DIR --try` runs this.

That a folder loads without loss says that every tensor has found its place, but not that it was read right. With q, k
and v in another order, or the channels of a rotary embedding paired in another way, the shapes are the same, and so is
the number of tensors. Such a model runs and talks nonsense. So it is asked to predict a page of text that it has never
seen, to go on with a sentence, and, if it has eyes, to look at a picture.

"""
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor

from data import eot_id
from lib.chat import ask
from model import LLaVAPhi, Packed, Phi

PAGES = Path(__file__).parent


class Language(NamedTuple):
    """What a model is asked, in the language that it was trained on."""
    page: str                       # file of passages, in each what is given and what is to be predicted
    sentence: str                   # to go on with
    continuation: str               # what a sound model says then
    question: str                   # about a picture of one red circle
    sound: float                    # nats a token on the page: a sound model is below,
    misread: float                  # and one whose weights were read wrong is above


# The limits of English. A model that knows nothing is at ln 51200 = 10.8 nats a token; one that knows how frequent each
# token is, but does not look at those before, at about 7. With its layers scrambled a model can do no better than that,
# since whatever it would know of the context reaches it as noise. Phi-2 read right is at 2 to 3 on plain prose, and
# tuned on conversations perhaps half a nat above. Between 4 and 6 something else is wrong: other weights, or less
# training than expected.
ENGLISH = Language("english.txt", "The capital of France is", "Paris",
                   "What is the color of the circle?\nAnswer the question using a single word or phrase.", 4.0, 6.0)

# The demo's language model speaks of nothing but shapes. Its page gives the picture in words, as its pre-training did,
# and the caption then follows without doubt: 0.0003 nats a token, 0.004 after it has been tuned on pictures. The mildest
# misreading that we know, rotary channels paired with their neighbours, is at 0.2, every wrong order of q, k and v
# above 0.7.
SHAPES = Language("shapes.txt", " . . redcircletopright redcircletopright . . redcircletopright redcircletopright" + " ." * 8,
                  "a red circle at the top right", "What colour is the circle?", 0.01, 0.03)

# Some misreadings cost next to nothing: a wrong eps in the LayerNorms, or the head's bias left out. No limit can find
# them. For weights whose loss was measured once, it is known to four digits, and that does. The keys are fingerprints,
# the values losses on the English page in fp32. It is gibberish to the demo's model, which makes it the more sensitive
# page: far from being certain, the model answers to every change (the smallest seen is 0.01, by paired neighbours).
KNOWN = {"d04c9ea514c19b90": 18.7336}       # demo/phi
TOLERANCE = 1e-3                    # machines add up in different orders; that changes the sixth digit


class Finding(NamedTuple):
    what: str
    shown: str                      # what this model shows
    expected: str                   # what a sound one would
    verdict: str                    # "sound", "misread" or "unclear"


def language_of(tok: Tokenizer) -> Language:
    """The demo's tokenizer knows a shape and its place as one word."""
    return SHAPES if len(tok.encode(" redcircletopright").ids) == 1 else ENGLISH


def read_page(name: str) -> list[tuple[str, str]]:
    """A page's passages: what is given and what is to be predicted."""
    text = (PAGES / name).read_text(encoding="utf-8")
    if " => " not in text:
        return [("", text)]
    passages = []
    for line in text.splitlines():
        given, said = line.split(" => ")
        passages.append((given, said + "\n"))
    return passages


@torch.no_grad()
def logits_of(llm: Phi, ids: list[int]) -> Tensor:
    """One text's ids (T) -> logits (T, V) in fp32."""
    row = torch.tensor(ids, device=llm.wte.weight.device)
    x = llm(llm.wte(row), Packed([len(ids)], row.device))             # (T, C)
    return llm.lm_head(x).float()


def mean_loss(llm: Phi, tok: Tokenizer, page: str) -> float:
    """Nats a token on a page. The given part of a passage is read, but not counted."""
    total, count = 0.0, 0
    for given, said in read_page(page):
        before = tok.encode(given).ids
        if not before:
            before = [eot_id(tok)]      # as between two documents in training: so the first word is predicted as well
        ids = tok.encode(said).ids[:llm.config.block_size - len(before)]
        logits = logits_of(llm, before + ids)[len(before) - 1:-1]                   # those that predict `ids`
        total += F.cross_entropy(logits, torch.tensor(ids, device=logits.device), reduction="sum").item()
        count += len(ids)
    return total / count


def fingerprint(llm: Phi) -> str:
    """A short name for a language model's weights: a checksum of some rows of its embedding and of its last block.

    Every layout has these as they are, so a misread model has the same fingerprint. One that has been trained on has
    another, also where adapters were trained, which leave the embedding and perhaps attention or the MLPs alone.
    """
    checksum = hashlib.sha256()
    for weight in (llm.wte.weight, llm.h[-1].attn.proj.weight, llm.h[-1].mlp.proj.weight):
        checksum.update(weight[:256].detach().float().cpu().numpy().tobytes())
    return checksum.hexdigest()[:16]


def judge_page(llm: Phi, tok: Tokenizer, language: Language) -> Finding:
    loss = mean_loss(llm, tok, language.page)
    if loss < language.sound:
        verdict = "sound"
    elif loss > language.misread:
        verdict = "misread"
    else:
        verdict = "unclear"
    return Finding("a page of text", f"{loss:.4g} nats a token",
                   f"below {language.sound}; a misread one: above {language.misread}", verdict)


def judge_known(llm: Phi, tok: Tokenizer) -> Finding | None:
    """Compare with the loss that was measured for these very weights, if it was."""
    key = fingerprint(llm)
    if key not in KNOWN or llm.wte.weight.dtype != torch.float32:
        return None
    loss = mean_loss(llm, tok, ENGLISH.page)
    verdict = "sound" if abs(loss - KNOWN[key]) < TOLERANCE else "misread"
    return Finding("these very weights", f"{loss:.4f} nats a token on the English page",
                   f"{KNOWN[key]:.4f}, which was measured once", verdict)


def judge_head_bias(llm: Phi) -> Finding:
    """transformers' Llava drops the bias of Phi-2's head, so there are folders without a good one."""
    largest = llm.lm_head.bias.detach().abs().max().item()
    verdict = "misread" if largest == 0 else "sound"
    return Finding("the head's bias", f"{largest:.4g} at the most", "not zero everywhere", verdict)


def judge_sentence(llm: Phi, tok: Tokenizer, language: Language, n_tokens: int = 12) -> Finding:
    """Greedy continuation of a sentence. Without a cache: for a dozen tokens it is not worth one."""
    ids = tok.encode(language.sentence).ids
    start = len(ids)
    while len(ids) < start + n_tokens:
        best = int(logits_of(llm, ids)[-1].argmax())
        if best == eot_id(tok):
            break
        ids.append(best)
    said = tok.decode(ids[start:])
    verdict = "sound" if language.continuation in said else "unclear"
    return Finding("a sentence", f"{language.sentence.strip()[-40:]!r} goes on {said!r}",
                   repr(language.continuation), verdict)


def draw_circle(size: int = 336) -> tuple[Image.Image, Image.Image]:
    """A red circle in the top right quarter of a dark ground, and the ground alone."""
    blank = Image.new("RGB", (size, size), (40, 40, 48))
    drawn = blank.copy()
    x, y, r = size * 3 // 4, size // 4, size // 6
    ImageDraw.Draw(drawn).ellipse((x - r, y - r, x + r, y + r), (214, 48, 49))
    return drawn, blank


def judge_picture(model: LLaVAPhi, tok: Tokenizer, language: Language) -> Finding:
    """Whether the model names the colour of what it sees, and does not do so when there is nothing.

    A wrong answer is "unclear" only: a projector that has not been trained yet gives no better ones.
    """
    drawn, blank = (ask(model, tok, language.question, [picture], max_new_tokens=12)[0] for picture in draw_circle())
    sees = "red" in drawn.lower() and "red" not in blank.lower()
    return Finding("a picture", f"a red circle is {drawn!r}, no circle is {blank!r}",
                   "red, and something else (once the projector is trained)", "sound" if sees else "unclear")


def try_model(llm: Phi, tok: Tokenizer, model: LLaVAPhi | None = None) -> Iterator[Finding]:
    """Everything that can be tried, each finding as soon as it is there. `model`: the whole, if there is more than llm."""
    language = language_of(tok)
    yield judge_page(llm, tok, language)
    known = judge_known(llm, tok)
    if known:
        yield known
    yield judge_head_bias(llm)
    yield judge_sentence(llm, tok, language)
    if model:
        yield judge_picture(model, tok, language)
