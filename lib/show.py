"""`python data.py show`: samples as the model gets them, on a page without scripts.

The page shows what the functions that training calls return: Dataset.prepare, load_image, collate.
"""
import dataclasses
import html
from argparse import Namespace
from itertools import accumulate, groupby

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from data import IGNORE, IMAGE_ID, SYSTEM, Dataset, Sample, collate, eot_id, load_image, load_tokenizer
from lib.check_data import dataset_to_check, sizes_to_check
from lib.common import html_page, visible, write_whole
from lib.pictures import png_address
from lib.records import NOTES, id_of, lines_of

SHOW_STYLE = """
:root { --learned: #c4ecc9; --edge: #1c7c31; --faint: #767676; --image: #dbe7fb; --cut: #b3261e }
.sample { display: grid; grid-template-columns: 240px 1fr; gap: 0 1.2em; border-top: 1px solid #8886; padding: 1em 0 }
h2 { font-size: 1em; margin: 0 0 .5em; grid-column: 1 / -1; overflow-wrap: anywhere }
img { width: 100%; border: 1px solid #8886; display: block; margin-bottom: .5em }
.tokens { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9 }
.tokens span, .legend span { border-left: 1px solid #8885; padding: .1em 0 }
.legend span { padding: .1em .4em; margin-right: 1em; white-space: nowrap }
span.learned { background: var(--learned); border-bottom: 2px solid var(--edge) }
span.template { color: var(--faint) }
span.image { background: var(--image); border: 1px solid #6a8fd0; padding: .1em .5em; white-space: nowrap }
span.cut { color: var(--cut); text-decoration: line-through }
.about { color: var(--faint); grid-column: 1 / -1; margin: .5em 0 0 } .bad { color: var(--cut) }
@media (max-width: 700px) { .sample { grid-template-columns: 1fr } img { max-width: 240px } }
@media (prefers-color-scheme: dark) {
  :root { --learned: #1d4a28; --edge: #55c26d; --faint: #949494; --image: #21365a; --cut: #ff8a80 }
}
"""
LEGEND = """<p class="legend"><span class="learned">learned</span> <span>read, not learned</span>
<span class="template">the template's own words</span> <span class="image">positions of an image</span>
<span class="cut">cut off</span></p>
<p>A line stands between two tokens, and &crarr; for a line break. A learned token is predicted from everything in front
of it.</p>"""


def show_data(args: Namespace) -> None:
    dataset = dataset_to_check(args, load_tokenizer(args.tokenizer), *sizes_to_check(args))
    spans = dataset.find_ranges().tolist()
    chosen = choose(dataset, spans, args.n, args.ids)
    about = (f"<p>{len(chosen):,} of {len(spans):,} samples, as --stage {args.stage} of the recipe {args.recipe} reads "
             f"them: template {dataset.template}, images made square by {dataset.image_config.mode}, at most "
             f"{dataset.block_size:,} positions.</p>")
    samples = "\n".join(sample_html(dataset, span) for span in chosen)
    title = visible(f"What is learned from {args.data.name}")
    write_whole(args.out, html_page(title, about + LEGEND + samples, SHOW_STYLE))
    print(f"wrote {args.out}: {len(chosen):,} of {len(spans):,} samples")


def choose(dataset: Dataset, spans: list[tuple[int, int]], n: int, ids: list[str] | None) -> list[tuple[int, int]]:
    """The records with these ids, or n of all, evenly spread."""
    if not ids:
        return [spans[int(i)] for i in np.linspace(0, len(spans) - 1, min(n, len(spans)))]
    found = [(id_of(dataset.read(span)), span) for span in spans]
    missing = set(ids) - {id for id, _ in found}
    if missing:
        raise ValueError(f"no record with the id {', '.join(sorted(missing))} in {dataset.path}")
    return [span for id, span in found if id in ids]


def sample_html(dataset: Dataset, span: tuple[int, int]) -> str:
    """A sample, or what is wrong with it."""
    raw = dataset.read(span)
    [line] = lines_of(dataset.path, [span[0]])
    title = f"<h2>{shown(f'{id_of(raw)}, line {line}')}</h2>"
    try:
        _, names, ids, labels, (_, _, _, cut, notes) = dataset.prepare(span)
        images = [load_image(dataset.pictures.open(name), dataset.image_config) for name in names]
    except (ValueError, OSError) as e:
        text = shown(raw[:2000].decode("utf-8", "replace"))
        return f'<div class="sample">{title}<p class="bad">{shown(str(e))}</p><p>{text}</p></div>'
    batch = collate([Sample("", ids, labels, torch.stack(images) if images else None)])
    learned = (batch.loss_positions + 1).tolist()
    # Prepared once more with room for all of it, to show what is cut.
    _, _, all_ids, all_labels, _ = dataclasses.replace(dataset, block_size=1 << 30).prepare(span)
    kinds = np.full(len(all_ids), "", dtype="U8")           # of a token: a class of SHOW_STYLE
    if dataset.template == "v0":
        kinds[template_words(all_ids, all_labels, dataset.tok)] = "template"
    kinds[learned] = "learned"
    kinds[np.equal(all_ids, IMAGE_ID)] = "image"
    kinds[len(ids):] = "cut"
    seen = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in batch.images]
    pictures = "".join(f'<img src="{png_address(image)}" alt="{shown(name[:80])}">' for name, image in zip(names, seen))
    n_image = len(batch.image_positions)
    about = (f"{len(ids):,} positions: {n_image:,} of images, {len(ids) - n_image - len(learned):,} read, "
             f"{len(learned):,} learned; {cut:,} cut off")
    about += "".join(f"<br>note: {shown(note)}" for bit, note in enumerate(NOTES) if notes >> bit & 1)
    if not learned:
        about += f'<br><b class="bad">nothing to learn: no answer in the first {dataset.block_size:,} positions</b>'
    tokens = tokens_html(all_ids, kinds, dataset.tok, dataset.image_config.n_patches)
    return (f'<div class="sample">{title}<div>{pictures}</div><p class="tokens">{tokens}</p>'
            f'<p class="about">{about}</p></div>')


def shown(text: str) -> str:
    return html.escape(visible(text))


def template_words(ids: list[int], labels: list[int], tok: Tokenizer) -> list[int]:
    """Positions of the chat template's words: those in front of each question, and between it and its answer."""
    words = []
    before = SYSTEM + " USER: "
    for is_read, positions in groupby(range(len(ids)), lambda i: labels[i] == IGNORE):
        if is_read:
            positions = [i for i in positions if ids[i] != IMAGE_ID]
            words += positions_of(before, positions, ids, tok) + positions_of(" ASSISTANT:", positions[::-1], ids, tok)
            before = "USER: "
    return words


def positions_of(words: str, positions: list[int], ids: list[int], tok: Tokenizer) -> list[int]:
    """The first of these positions, whose tokens together are as long as `words`."""
    lengths = accumulate(len(tok.decode([ids[i]])) for i in positions)
    return [i for i, length in zip(positions, lengths) if length <= len(words)]


def tokens_html(ids: list[int], kinds: np.ndarray, tok: Tokenizer, n_patches: int) -> str:
    """A span for each token, or for the few whose bytes make up one character; one for the positions of an image."""
    spans = []
    start = n_images = 0
    for end in range(1, len(ids) + 1):
        more = end < len(ids) and kinds[end] == kinds[start] and end - start < 4
        if ids[start] == IMAGE_ID:
            if end - start < n_patches:
                continue
            n_images += 1
            text = f"image {n_images}: {n_patches} positions"
        else:
            text = tok.decode(ids[start:end], skip_special_tokens=False)
            if "\ufffd" in text and more:
                continue
            text = shown(text).replace("\n", "&crarr;\n")
            text = f"<b>{text}</b>" if ids[start] == eot_id(tok) else text      # unlike one that somebody typed
        token = " ".join(map(str, ids[start:end][:4]))
        spans.append(f'<span class="{kinds[start]}" title="token {token}">{text}</span>')
        start = end
    return "".join(spans)
