"""The whole project in miniature, through the same commands as the real one. `make demo` runs this.

Draws the data, aligns the projector between two frozen pre-trained bases (stage 1), tunes projector and language model
on conversations (stage 2), asks about pictures that training never showed, scores the answers against chance and
against a blank image, writes out/demo/report.html.

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

from lib.common import LOCK, hold_folder, html_page, read_jsonl, run_command, write_whole
from lib.plot import loss_curve, loss_svg

OUT = Path("out/demo")
DATA = OUT / "data"

# The tiny models need a higher learning rate than the published recipe, and less of everything else. Each stage is an
# ordinary command line, which a reader can copy from the screen and change.
COMMON = ["--dtype", "fp32", "--workers", "1", "--micro-tokens", "8192", "--log-every", "20"]
STAGE_1 = ["train.py", "--stage", "pretrain", "--llm", "demo/phi", "--vision", "demo/clip",
           "--data", f"{DATA}/pretrain.json", "--images", f"{DATA}/images",
           "--val-data", f"{DATA}/heldout_captions.json",
           "--out", f"{OUT}/pretrain", "--global-batch", "32", "--lr", "3e-3", "--epochs", "2"]
# The tower stays frozen, as the paper's text has it (its script trains it); that is one point better here.
STAGE_2 = ["train.py", "--stage", "finetune", "--model", f"{OUT}/pretrain",
           "--data", f"{DATA}/finetune.json", "--images", f"{DATA}/images",
           "--out", f"{OUT}/finetune", "--global-batch", "32", "--lr", "1e-3", "--epochs", "1", "--freeze", "vision"]
EVAL = ["eval.py", "--task", "shapes", "--root", f"{DATA}", "--model", f"{OUT}/finetune", "--out", f"{OUT}/eval"]


def run_step(*args: str) -> None:
    """Run one command as a user would type it. If it fails, the demo ends with its exit code."""
    print(f"\n$ python {shlex.join(args)}", flush=True)
    began = time.time()
    done = subprocess.run([sys.executable, *args])
    if done.returncode:
        sys.exit(done.returncode)
    print(f"  ({time.time() - began:.0f} s)", flush=True)


def caption_losses() -> tuple[float, float]:
    """Stage 1's loss on held-out pictures, before and after training."""
    steps = read_jsonl(OUT / "pretrain" / "metrics.jsonl")
    before, after = [step["val_loss"] for step in steps if "val_loss" in step]
    return before, after

# ---------------------------------------------------------------------------------------------------
# The report

REPORT_STYLE = """
.two { display: flex; gap: 2em; flex-wrap: wrap }
.two > div { flex: 1; min-width: 380px }
.cards { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.card { display: flex; gap: 1em; border: 1px solid #ddd; border-radius: 8px; padding: .7em }
.card img { width: 112px; height: 112px }
ul { margin: 0; padding-left: 1.1em }
.right b { color: #1b7f3b }
.wrong b { color: #c0311b; text-decoration: line-through }
"""


def report(seconds: float) -> Path:
    """One self-contained page: the losses of both stages, the score, pictures with questions and answers."""
    stage_1 = loss_svg({"training loss": loss_curve(OUT / "pretrain" / "metrics.jsonl")}, 420, 260)
    stage_2 = loss_svg({"training loss": loss_curve(OUT / "finetune" / "metrics.jsonl")}, 420, 260)
    before, after = caption_losses()
    result = json.loads((OUT / "eval" / "result.json").read_text())
    numbers = {"accuracy on held-out pictures": result["value"]} | result["numbers"]
    table = ""
    for name, value in numbers.items():
        table += f"<tr><td>{html.escape(name)}<td>{value:.1f} %"
    body = f"""
<p>A tiny CLIP, a projector and a tiny Phi, trained in {seconds / 60:.1f} minutes by the code that trains the real
ones.</p>
<div class="two"><div><h2>Stage 1: the projector learns captions</h2>
{stage_1}
<p>Caption loss on held-out pictures: {before:.2f} before, <b>{after:.2f}</b> after. Both towers are frozen.</p></div>
<div><h2>Stage 2: the language model learns to answer</h2>
{stage_2}</div></div>
<h2>Questions about pictures it never saw</h2>
<table>{table}</table>
<div class="cards">{cards()}</div>"""
    return write_whole(OUT / "report.html", html_page("LLaVA-Phi, in miniature", body, REPORT_STYLE))


def cards(limit: int = 12) -> str:
    """The first pictures, each with its questions and the model's answers, right or wrong."""
    questions = read_jsonl(DATA / "shapes" / "questions.jsonl")
    answers = {row["question_id"]: row["text"] for row in read_jsonl(OUT / "eval" / "answers.jsonl")}
    images = sorted({question["image"] for question in questions})
    page = ""
    for image in images[:limit]:
        picture = base64.b64encode((DATA / "shapes" / "images" / image).read_bytes()).decode()
        rows = ""
        for question in questions:
            if question["image"] != image:
                continue
            answer = answers[question["question_id"]]
            mark = "right" if answer.strip().lower() == question["answer"] else "wrong"
            rows += f'<li class="{mark}">{html.escape(question["text"])} <b>{html.escape(answer)}</b></li>'
        page += f'<div class="card"><img src="data:image/png;base64,{picture}" alt="shapes"><ul>{rows}</ul></div>'
    return page

# ---------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    with hold_folder(OUT):                      # a second `make demo` would delete this one's files
        began = time.time()
        for path in OUT.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        run_demo(began)


def run_demo(began: float) -> None:
    run_step("-m", "demo.shapes", "--out", str(DATA))
    run_step(*STAGE_1, *COMMON)
    run_step(*STAGE_2, *COMMON)
    run_step(*EVAL)

    # One question, asked through sample.py as a user would.
    questions = read_jsonl(DATA / "shapes" / "questions.jsonl")
    question = next(q for q in questions if q["category"] == "thing")
    picture = f"{DATA}/shapes/images/{question['image']}"
    run_step("sample.py", "--model", f"{OUT}/finetune", "--image", picture, "--prompt", question["text"])
    print(f"  (what the picture really shows there: {question['answer']})")

    before, after = caption_losses()
    print(f"\ncaption loss on held-out pictures: {before:.3f} before stage 1, {after:.3f} after it, both towers frozen")
    print(f"report: {report(time.time() - began)} ({(time.time() - began) / 60:.1f} minutes in all)")


if __name__ == "__main__":
    sys.exit(run_command(main))
