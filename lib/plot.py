"""`python train.py --plot OUT...`: the curves of one or several runs as a web page, drawn as for a paper."""
import html
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.common import html_page, read_jsonl, write_whole

Curve = list[tuple[int, float]]                 # (steps done, value)

# Title of the vertical axis, height, curves: field of metrics.jsonl -> name in the legend. The last one lies on top.
PANELS = [
    ("loss per token (nats)", 190, {"loss": "training loss", "val_loss_blank": "blank pictures",
                                    "val_loss": "validation loss"}),
    ("gradient norm", 90, {"grad_norm": "gradient norm"}),
    ("learning rate", 90, {"lr": "learning rate"}),
]
NOISY = ("loss", "grad_norm")                   # a thin line for every step, a thick one for the running mean
DOTTED = ("val_loss", "val_loss_blank")                          # measured at some steps only
LEFT, RIGHT, TOP, GAP = 66, 444, 36, 18         # ends of the steps' axis, upper edge of the first panel, space between
CURVE_NOTE = ("Thin lines: every step; thick ones: their running mean over a fiftieth of the run. "
        "A triangle marks a value above the scale.")
CURVE_STYLE = """
:root { --c0: #1f6fb2; --c1: #c8501e; --c2: #2f8f4e }
@media (prefers-color-scheme: dark) { :root { --c0: #62aee8; --c1: #f2935c; --c2: #6cc78a } }
.runs { display: flex; flex-wrap: wrap; gap: 0 2em }
.runs > div { flex: 1 1 20em; min-width: 0; max-width: 40em }
.runs h2 { font-size: 1.15em }
svg text { font: 12px system-ui, sans-serif; fill: currentColor }
svg path { fill: none; stroke: currentColor; opacity: .6 } svg .grid { opacity: .15 }
svg .band { fill: currentColor; opacity: .15 }
"""


def plot(runs: list[Path], to: Path, against: str = "") -> None:
    """Write a self-contained page with a column of curves for each of these --out folders.

    against: a run to hold them against, which is drawn as a band; in words, too.
    """
    columns = ""
    reference = read_curves(Path(against))["loss"] if against else []
    for folder in runs:
        curves = read_curves(folder)
        columns += f"<div><h2>{html.escape(str(folder))}</h2>\n{figure(curves, reference)}\n"
        if against:
            said = f"{folder}: {verdict(curves['loss'], reference)} ({against})"
            columns += f"<p>{html.escape(said)}</p>\n"
            print(said)
        columns += "</div>\n"
    body = f'<div class="runs">\n{columns}</div>\n<p>{CURVE_NOTE}</p>'
    write_whole(to, html_page("Training curves", body, CURVE_STYLE))
    print(f"wrote {to}")


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves of a run (its --out folder, or its metrics.jsonl), by field.

    Skipped steps are left out, and so is every value that is not finite.
    """
    curves = {field: [] for _, _, fields in PANELS for field in fields}
    path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; --plot and --against take --out folders of runs, or a "
                                "metrics.jsonl")
    for row in read_jsonl(path, torn=True):
        done = row["step"] + ("loss" in row)    # training steps are counted from 0, validations carry the steps done
        for field in curves.keys() & row.keys():
            if math.isfinite(row[field]) and not row.get("skipped"):
                curves[field].append((done, row[field]))
    return curves


BAND = 5, 95                                    # percentiles


def band(reference: Curve) -> list[tuple[int, float, float]]:
    """(step, low, high): between which a run's losses have lain over the last twentieth of its length.

    Its own running mean is always inside, also in a short run, whose mean is that of a step or two.
    """
    values = [value for _, value in reference]
    window = max(5, len(values) // 20)
    edges = []
    for i, (step, mean) in enumerate(running_mean(reference), 1):
        low, high = map(float, np.percentile(values[max(0, i - window):i], BAND))
        edges.append((step, min(low, mean), max(high, mean)))
    return edges


def verdict(curve: Curve, reference: Curve) -> str:
    """Where the running mean of a run's loss lies in the end, and since when, against the band of another run."""
    edges = {step: (low, high) for step, low, high in band(reference)}
    side, since, last = "", 0, 0
    for step, value in running_mean(curve):
        if step not in edges:
            continue
        low, high = edges[step]
        now = "above" if value > high else "below" if value < low else "inside"
        if now != side:
            side, since = now, step
        last = step
    if not side:
        return "it has no step in common with the reference"
    return f"{side} the reference's band " + (f"at step {last:,}" if side == "inside" else f"from step {since:,} on")


def figure(curves: dict[str, Curve], reference: Curve = ()) -> str:
    """The panels of one run as inline SVG, one below the other on the same steps. reference: drawn as a band."""
    last = max((step for curve in curves.values() for step, _ in curve), default=0)
    if not last:
        return "<p>no steps yet</p>"

    def x_of(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    svg, x, y = "", LEFT, TOP
    for i, (field, name) in enumerate(PANELS[0][2].items()):
        if curves[field]:
            svg += draw_curve([(x, 12), (x + 9, 12), (x + 18, 12)], field, i) + text(x + 25, 16, name, "start")
            x += 40 + 7 * len(name)
    marks = range(0, last + 1, max(1, int(round_step(last, 6))))
    edges = [(step, low, high) for step, low, high in band(reference) if step <= last]
    for title, height, fields in PANELS:
        svg += "".join(f'<path d="M{x_of(step):.1f} {y + height}v4"/>' for step in marks)
        around = edges if "loss" in fields else []
        svg += draw_panel(title, {field: curves[field] for field in fields}, around, x_of, y, y + height)
        y += height + GAP
    svg += "".join(text(x_of(step), y, f"{step:,}", "middle") for step in marks)
    svg += text((LEFT + RIGHT) / 2, y + 20, "step", "middle")
    return f'<svg viewBox="0 0 470 {y + 26}" width="100%" role="img" aria-label="training curves">{svg}</svg>'


def draw_panel(title: str, curves: dict[str, Curve], edges: list[tuple[int, float, float]],
               x_of: Callable[[float], float], upper: int, lower: int) -> str:
    """The vertical axis, grid and curves between two heights. edges: (step, low, high) of a band."""
    marks = scale([[value for _, value in curve] for curve in curves.values()], (lower - upper) // 30)
    low, high = marks[0], marks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        return x_of(step), lower - (lower - upper) * (min(max(value, low), high) - low) / (high - low)

    svg = f'<path d="M{LEFT} {upper}V{lower}H{RIGHT}"/>'
    middle = (upper + lower) / 2
    svg += f'<g transform="rotate(-90 14 {middle})">{text(14, middle, title, "middle")}</g>'
    for mark in marks:
        _, y = place(0, mark)
        svg += f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>' + text(LEFT - 6, y + 4, f"{mark:.4g}", "end")
    if edges:
        outline = [place(step, bottom) for step, bottom, _ in edges]
        outline += [place(step, top) for step, _, top in reversed(edges)]
        svg += f'<polygon class="band" points="{points(outline)}"/>'
    for i, (field, curve) in enumerate(curves.items()):
        svg += draw_curve([place(*point) for point in curve], field, i)
    above = sorted((value, x_of(step)) for curve in curves.values() for step, value in curve if value > high)
    svg += "".join(text(x, upper - 1, "\u25b4", "middle") for _, x in above)
    for value, x in above[-1:]:                                 # the highest with its value, on the roomier side
        right = 2 * x > LEFT + RIGHT
        svg += text(x + (-7 if right else 7), upper - 1, f"{value:.4g}", "end" if right else "start")
    return svg


def draw_curve(curve: list[tuple[float, float]], field: str, color: int) -> str:
    svg = ""
    if field in NOISY:
        svg += polyline(curve, color, 1, opacity=0.35)
        curve = running_mean(curve)
    if field in DOTTED:
        svg += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--c{color})"/>' for x, y in curve)
        if len(curve) < 3:                  # measured only before and after, it may have fallen in any way
            return svg
    return svg + polyline(curve, color, 2)


def polyline(curve: list[tuple[float, float]], color: int, width: int, opacity: float = 1) -> str:
    return (f'<polyline fill="none" stroke="var(--c{color})" stroke-width="{width}" opacity="{opacity}" '
            f'points="{points(curve)}"/>')


def points(curve: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)


def text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def running_mean(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    window, values = max(1, len(curve) // 50), [value for _, value in curve]
    return [(x, float(np.mean(values[max(0, i - window):i]))) for i, (x, _) in enumerate(curve, 1)]


def round_step(distance: float, n: int) -> float:
    """1, 2 or 5 times a power of ten: the first that covers the distance in at most n steps."""
    power = 10.0 ** math.floor(math.log10(distance / n))
    return next(m * power for m in (1, 2, 5, 10) if m * power * n >= 0.999 * distance)


def scale(curves: list[list[float]], n: int) -> list[float]:
    """The marks of a vertical axis, from end to end. A few high outliers do not count: they would flatten the rest."""
    values = [value for curve in curves for value in curve] or [0.0]
    usual = 1.3 * float(np.percentile(curves[0] if len(curves[0]) > 20 else [max(values)], 99, method="lower"))
    high = max(values) if max(values) < 2 * usual else usual
    low = min(values) if min(values) > high / 2 else 0.0
    step = round_step(high - low or high or 1.0, n)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step - 1e-3), first + 1) + 1)]
