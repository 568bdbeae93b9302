"""`python train.py --plot OUT...`: the loss curves of one or several runs as a web page."""
import html
from pathlib import Path

import numpy as np

from lib.common import html_page, read_jsonl, write_whole


def plot(runs: list[Path], to: Path) -> None:
    """Write the loss curves of these --out folders to a self-contained page."""
    curves = {}
    for folder in runs:
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; --plot takes the --out folders of runs")
        curves[str(folder)] = loss_curve(path)
    write_whole(to, html_page("Training loss", loss_svg(curves)))
    print(f"wrote {to}")


def loss_curve(path: Path) -> list[tuple[int, float]]:
    """(steps done, loss) of each training step in a metrics.jsonl, except skipped ones, whose loss is not finite."""
    return [(r["step"] + 1, r["loss"]) for r in read_jsonl(path, torn=True) if "loss" in r and not r["skipped"]]


def loss_svg(curves: dict[str, list[tuple[int, float]]], width: int = 800, height: int = 360) -> str:
    """Curves of (step, loss) as inline SVG on common axes: a thin line for the raw values, a thick running mean."""
    colors = ["#1f6fb2", "#c8501e", "#2f8f4e", "#8a4fa3", "#7a6a00"]
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>no steps yet</p>"
    last_step = max(step for step, _ in points)
    highest = max(loss for _, loss in points) or 1

    def x(step: float) -> float:
        return 50 + (width - 60) * step / last_step

    def y(loss: float) -> float:
        return height - 30 - (height - 45) * loss / highest

    def line(curve: list[tuple[float, float]], style: str) -> str:
        places = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        return f'<polyline fill="none" {style} points="{places}"/>'

    svg = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" font-size="12" font-family="sans-serif">']
    for i in range(5):                          # four grid lines and the axis, with their numbers
        step, loss = last_step * i / 4, highest * i / 4
        svg.append(f'<line x1="50" x2="{width - 10}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        svg.append(f'<text x="6" y="{y(loss):.1f}">{loss:.2f}</text>')
        svg.append(f'<text x="{x(step):.1f}" y="{height - 8}" text-anchor="middle">{step:.0f}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        color = colors[i % len(colors)]
        window = max(1, len(curve) // 50)
        losses = np.array([loss for _, loss in curve])
        means = np.convolve(losses, np.ones(window) / window, "valid")
        steps = [step for step, _ in curve[window - 1:]]
        svg.append(line(curve, f'stroke="{color}" stroke-width="1" opacity="0.3"'))
        svg.append(line([*zip(steps, means)], f'stroke="{color}" stroke-width="2"'))
        svg.append(f'<text x="{width - 12}" y="{22 + 16 * i}" text-anchor="end" fill="{color}">'
                   f'{html.escape(name)}</text>')
    return "".join(svg) + "</svg>"
