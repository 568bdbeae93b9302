"""The whole mission in miniature, through the same commands that run the real one. `make demo` calls this.

Draws the data, aligns the projector between two frozen pre-trained bases (stage 1), tunes projector and language model
on conversations (stage 2), asks about pictures that were never shown, scores that against chance and against a blank
image, writes out/demo/report.html.

$ python -m demo.run
"""
import base64
import html
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from train import loss_svg

OUT = Path("out/demo")
DATA = OUT / "data"
COMMON = ["--dtype", "float32", "--workers", "1", "--micro-tokens", "8192", "--log-every", "20"]
STAGE_1 = ["train.py", "--stage", "pretrain", "--llm", "demo/phi", "--vision", "demo/clip",
           "--data", f"{DATA}/pretrain.json", "--images", f"{DATA}/images",
           "--val-data", f"{DATA}/heldout_captions.json",
           "--out", f"{OUT}/pretrain", "--global-batch", "32", "--lr", "3e-3", "--epochs", "2"]
STAGE_2 = ["train.py", "--stage", "finetune", "--model", f"{OUT}/pretrain",
           "--data", f"{DATA}/finetune.json", "--images", f"{DATA}/images",
           "--out", f"{OUT}/finetune", "--global-batch", "32", "--lr", "1e-3", "--epochs", "1",
           "--freeze", "vision"]        # as the paper's text has it; one point better here
EVAL = ["eval.py", "--task", "shapes", "--root", f"{DATA}", "--model", f"{OUT}/finetune", "--out", f"{OUT}/eval"]


def run(*args: str) -> None:
    """One command, as a user would type it. Its output is shown; a failure ends the demo."""
    print(f"\n$ python {shlex.join(args)}", flush=True)
    began = time.time()
    done = subprocess.run([sys.executable, *args])
    if done.returncode:
        sys.exit(done.returncode)
    print(f"  ({time.time() - began:.0f} s)", flush=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(seconds: float) -> Path:
    """One self-contained page: the losses of both stages, the score, pictures with questions and answers."""
    curves = {stage: [(m["step"] + 1, m["loss"]) for m in read_lines(OUT / stage / "metrics.jsonl") if "loss" in m]
              for stage in ("pretrain", "finetune")}
    before, after = [m["val_loss"] for m in read_lines(OUT / "pretrain" / "metrics.jsonl") if "val_loss" in m]
    result = json.loads((OUT / "eval" / "result.json").read_text())
    questions = {row["question_id"]: row for row in read_lines(DATA / "shapes" / "questions.jsonl")}
    answers = {row["question_id"]: row["text"] for row in read_lines(OUT / "eval" / "answers.jsonl")}
    cards = []
    for image in sorted({row["image"] for row in questions.values()})[:12]:
        picture = base64.b64encode((DATA / "shapes" / "images" / image).read_bytes()).decode()
        rows = ""
        for i, q in questions.items():
            if q["image"] == image:
                mark = "right" if answers[i].strip().lower() == q["answer"] else "wrong"
                rows += f"<li class={mark}>{html.escape(q['text'])} <b>{html.escape(answers[i])}</b></li>"
        cards.append(f"<div class=card><img src='data:image/png;base64,{picture}' alt='shapes'><ul>{rows}</ul></div>")
    table = "".join(f"<tr><td>{html.escape(name)}<td>{value:.1f} %" for name, value in scores(result).items())
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><title>LLaVA-Phi demo</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}}
.two{{display:flex;gap:2em;flex-wrap:wrap}}.two>div{{flex:1;min-width:380px}}table{{border-collapse:collapse}}
td{{padding:.2em 1.2em .2em 0;border-bottom:1px solid #ddd}}
.cards{{display:grid;margin-top:1em;grid-template-columns:1fr 1fr;gap:1em}}
.card{{display:flex;gap:1em;border:1px solid #ddd;border-radius:8px;padding:.7em}}.card img{{width:112px;height:112px}}
ul{{margin:0;padding-left:1.1em}}.right b{{color:#1b7f3b}}.wrong b{{color:#c0311b;text-decoration:line-through}}</style>
<h1>LLaVA-Phi, in miniature</h1>
<p>A tiny CLIP, a projector and a tiny Phi, trained in {seconds / 60:.1f} minutes by the code that trains the real
ones.</p>
<div class=two><div><h2>Stage 1: the projector learns captions</h2>
{loss_svg({"training loss": curves["pretrain"]}, 420, 260)}
<p>Caption loss on held-out pictures: {before:.2f} before, <b>{after:.2f}</b> after. Both towers are frozen.</p></div>
<div><h2>Stage 2: the language model learns to answer</h2>
{loss_svg({"training loss": curves["finetune"]}, 420, 260)}</div></div>
<h2>Questions about pictures it never saw</h2><table>{table}</table><div class=cards>{"".join(cards)}</div></html>"""
    path = OUT / "report.html"
    path.write_text(page)
    return path


def scores(result: dict) -> dict[str, float]:
    return {"accuracy on held-out pictures": result["value"]} | result["numbers"]


def main() -> None:
    began = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    run("-m", "demo.shapes", "--out", str(DATA))
    run(*STAGE_1, *COMMON)
    run(*STAGE_2, *COMMON)
    run(*EVAL)
    row = next(row for row in read_lines(DATA / "shapes" / "questions.jsonl") if row["category"] == "thing")
    picture = f"{DATA}/shapes/images/{row['image']}"
    run("sample.py", "--model", f"{OUT}/finetune", "--image", picture, "--prompt", row["text"])
    print(f"  (what the picture really shows there: {row['answer']})")
    before, after = [m["val_loss"] for m in read_lines(OUT / "pretrain" / "metrics.jsonl") if "val_loss" in m]
    print(f"\ncaption loss on held-out pictures: {before:.3f} before stage 1, {after:.3f} after it, both towers frozen")
    print(f"report: {report(time.time() - began)} ({(time.time() - began) / 60:.1f} minutes in all)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
