"""The whole project in miniature, through the same commands as the real one. `make demo` runs this.

Draws the data, aligns the projector between two frozen pre-trained bases (stage 1), tunes projector and language model
on conversations (stage 2), asks about pictures that training never showed, scores the answers against chance and
against a blank image, asks all of a picture's questions in one chat, writes out/demo/report.html. Interrupted, it goes
on where it was.

$ python -m demo.run
"""
import hashlib
import html
import shlex
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from lib.common import LOCK, hold_folder, html_page, read_json, read_jsonl, remove, run_command, write_whole
from lib.pictures import png_address
from lib.plot import CURVE_NOTE, CURVE_STYLE, figure, read_curves, verdict

OUT = Path("out/demo")
DATA = OUT / "data"
REFERENCE = Path("demo/reference")      # losses of both stages in a run that went well
MOST_LOST = 5                           # points that a question may lose in a chat, against the same question alone

# The tiny models need a higher learning rate than the published recipe, and less of everything else. Each stage is an
# ordinary command line, which a reader can copy from the screen and change.
COMMON = ["--dtype", "fp32", "--workers", "1", "--micro-tokens", "8192", "--log-every", "20"]
STAGE_1 = ["train.py", "--stage", "pretrain", "--llm", "demo/phi", "--vision", "demo/clip",
           "--data", f"{DATA}/pretrain.json", "--images", f"{DATA}/images",
           "--val-data", f"{DATA}/heldout_captions.json", "--val-every", "10",
           "--out", f"{OUT}/pretrain", "--global-batch", "32", "--lr", "3e-3", "--epochs", "2"]
# The tower stays frozen, as the paper's text has it (its script trains it); that is one point better here.
STAGE_2 = ["train.py", "--stage", "finetune", "--model", f"{OUT}/pretrain",
           "--data", f"{DATA}/finetune.json", "--images", f"{DATA}/images",
           "--out", f"{OUT}/finetune", "--global-batch", "32", "--lr", "1e-3", "--epochs", "1", "--freeze", "vision"]
EVAL = ["eval.py", "--task", "shapes", "--root", f"{DATA}", "--model", f"{OUT}/finetune", "--out", f"{OUT}/eval"]


def run_step(*args: str, typed: Path | None = None, said: Path | None = None) -> None:
    """Run one command as a user would type it. If it fails, the demo ends with its exit code.

    typed: file for its stdin; said: file for its stdout, with .log for its stderr.
    """
    files = {"<": typed, ">": said, "2>": said and said.with_suffix(".log")}
    redirected = "".join(f" {sign} {path}" for sign, path in files.items() if path)
    print(f"\n$ python {shlex.join(args)}{redirected}", flush=True)
    began = time.time()
    stdin, stdout, stderr = [path and open(path, mode) for path, mode in zip(files.values(), "rww")]
    process = subprocess.Popen([sys.executable, *args], stdin=stdin, stdout=stdout, stderr=stderr)
    try:
        process.wait()
    finally:
        process.wait()                          # Ctrl-C has reached it, too: it saves what it has
    if process.returncode:
        sys.exit(process.returncode)
    print(f"  ({time.time() - began:.0f} s)", flush=True)


def questions_by_picture() -> dict[str, list[dict]]:
    pictures = {}
    for question in read_jsonl(DATA / "shapes" / "questions.jsonl"):
        pictures.setdefault(question["image"], []).append(question)
    return pictures


def is_right(question: dict, answer: str) -> bool:
    return answer.strip().lower() == question["answer"]

# ---------------------------------------------------------------------------------------------------
# Chats: a question is answered in the middle of a conversation as well as by itself


def hold_chats() -> None:
    """Ask all questions about a picture in one chat, and so about every picture."""
    lines = []
    for image, questions in questions_by_picture().items():
        lines += [f"/image {DATA}/shapes/images/{image}", *(question["text"] for question in questions)]
    typed = write_whole(OUT / "chats.txt", "\n".join(lines) + "\n")
    run_step("sample.py", "--model", f"{OUT}/finetune", typed=typed, said=OUT / "chat_answers.txt")


def read_chats_and_alone() -> tuple[dict[str, str], dict[str, str]]:
    """The answers in the chats, and those to the same questions, each asked by itself; both by question_id."""
    ids = [question["question_id"] for questions in questions_by_picture().values() for question in questions]
    in_chat = dict(zip(ids, (OUT / "chat_answers.txt").read_text().splitlines(), strict=True))
    return in_chat, {row["question_id"]: row["text"] for row in read_jsonl(OUT / "eval" / "answers.jsonl")}


def share_right(answers: dict[str, str]) -> list[float]:
    """Percentages of right answers: to the first question about a picture, to the second, ...; at last, to all."""
    chats = [[is_right(question, answers[question["question_id"]]) for question in questions]
             for questions in questions_by_picture().values()]
    turns = [[right for right in turn if right is not None] for turn in zip_longest(*chats)]
    return [100 * sum(turn) / len(turn) for turn in [*turns, sum(turns, [])]]


def compare_chats(in_chat: list[float], alone: list[float]) -> None:
    """Print both by turn. The demo fails where its chats do, as a model does that learned from short conversations."""
    print("\nall questions about a picture, right answers in %:")
    columns = [*(f"{i}." for i in range(1, len(alone))), "all"]
    print("  turn       " + "".join(f"{column:>6}" for column in columns))
    print("  in a chat  " + "".join(f"{share:6.1f}" for share in in_chat))
    print("  alone      " + "".join(f"{share:6.1f}" for share in alone))
    if alone[-1] - in_chat[-1] > MOST_LOST:
        sys.exit(f"the chats fail: {in_chat[-1]:.1f} % right, expected at most {MOST_LOST} points fewer than alone")

# ---------------------------------------------------------------------------------------------------
# The report

REPORT_STYLE = CURVE_STYLE + """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24em), 1fr)); gap: 1em }
.card { display: flex; gap: 1em; border: 1px solid var(--line); border-radius: 8px; padding: .8em }
.card img { width: 112px; height: 112px; flex: none; border-radius: 4px; outline: 1px solid var(--line) }
.card p { margin: 0 0 .2em }
.chat b { display: block; padding-left: 1.5em }
.right { color: var(--right) }
.wrong { color: var(--wrong) }
"""


def caption_losses() -> tuple[float, float]:
    """Stage 1's loss on held-out pictures, before and after training."""
    curve = read_curves(OUT / "pretrain")["val_loss"]
    return curve[0][1], curve[-1][1]


def verdicts() -> list[str]:
    """How both stages went, against the committed losses of a run that went well."""
    return [f"{stage}: {verdict(read_curves(OUT / stage)['loss'], reference_losses(stage))}"
            for stage in ("pretrain", "finetune")]


def reference_losses(stage: str) -> list[tuple[int, float]]:
    return read_curves(REFERENCE / f"{stage}.jsonl")["loss"]


def report() -> Path:
    """One self-contained page: the curves of both stages, the score, pictures with questions and answers."""
    before, after = caption_losses()
    result = read_json(OUT / "eval" / "result.json")
    pictures = questions_by_picture()
    in_chat, alone = read_chats_and_alone()
    score = result["numbers"]
    kinds = [name for name in score if name not in ("chance", "blank image")]
    table = "".join(f"<tr><td>{html.escape(name)}<td>{score[name]:.1f} %" for name in kinds)
    # Three shapes are the hardest, and the most to look at.
    shown = [image for image, questions in pictures.items() if any(q["answer"] == "three" for q in questions)][:12]
    body = f"""
<p>A tiny CLIP, a projector and a tiny Phi, trained by the code that trains the real ones.
Of {len(in_chat)} questions about {len(pictures)} pictures that it never saw, it answers <b>{result["value"]:.1f} %</b>
correctly when each is asked by itself, {share_right(in_chat)[-1]:.1f} % when all about a picture are asked in one chat.
Guessing reaches {score["chance"]:.1f} %, and the same model, shown a blank picture, {score["blank image"]:.1f} %.</p>
<div class="runs"><div><h2>Stage 1: the projector learns captions</h2>
{figure(read_curves(OUT / "pretrain"), reference_losses("pretrain"))}</div>
<div><h2>Stage 2: the model learns to answer</h2>
{figure(read_curves(OUT / "finetune"), reference_losses("finetune"))}</div></div>
<p>The loss on captions of held-out pictures fell from {before:.2f} to <b>{after:.2f}</b> in stage 1, where both towers
are frozen. {CURVE_NOTE} The gray band is where the losses of an earlier run lay; {"; ".join(verdicts())}.</p>
<h2>Chats about two of these pictures</h2>
<div class="cards chat">{"".join(card(image, pictures[image], in_chat) for image in shown[:2])}</div>
<h2>Questions about others, each asked by itself</h2>
<div class="cards">{"".join(card(image, pictures[image], alone) for image in shown[2:])}</div>
<h2>Right answers by kind of question</h2>
<table>{table}</table>"""
    return write_whole(OUT / "report.html", html_page("LLaVA-Phi, in miniature", body, REPORT_STYLE))


def card(image: str, questions: list[dict], answers: dict[str, str]) -> str:
    """A picture, its questions and the model's answers, each marked as right or wrong."""
    rows = ""
    for question in questions:
        answer = answers[question["question_id"]]
        mark = f'<b class="right">{html.escape(answer)} ✓</b>'
        if not is_right(question, answer):
            mark = f'<b class="wrong">{html.escape(answer)} ✗ (really {question["answer"]})</b>'
        rows += f"<p>{html.escape(question['text'])} {mark}</p>"
    picture = png_address(Image.open(DATA / "shapes" / "images" / image))
    return f'<div class="card"><img src="{picture}" alt="shapes"><div>{rows}</div></div>'

# ---------------------------------------------------------------------------------------------------
# The command


def program_checksum() -> str:
    """Of the code and the bases: an interrupted demo is not gone on with by another program."""
    digest = hashlib.sha256()
    for pattern in ("*.py", "lib/*.py", "benchmarks/*.py", "demo/*.py", "demo/*/*"):
        for path in sorted(Path().glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def clear_or_go_on() -> None:
    """Keep the files of an interrupted demo of this very program; delete those of any other."""
    begun = OUT / "begun"                       # holds that program's checksum
    checksum = program_checksum()
    if begun.exists() and begun.read_text() == checksum and not (OUT / "report.html").exists():
        print(f"going on with the interrupted demo in {OUT}")
        return
    for path in OUT.iterdir():
        if path.name != LOCK:
            remove(path)
    write_whole(begun, checksum)


def main() -> None:
    with hold_folder(OUT):                      # a second `make demo` would delete this one's files
        clear_or_go_on()
        run_demo(time.time())


def run_demo(began: float) -> None:
    run_step("-m", "demo.shapes", "--out", str(DATA))
    run_step(*STAGE_1, *COMMON)
    run_step(*STAGE_2, *COMMON)
    run_step(*EVAL)

    # One question, asked through sample.py as a user would; then all of them, in chats.
    question = next(q for q in read_jsonl(DATA / "shapes" / "questions.jsonl") if q["category"] == "thing")
    picture = f"{DATA}/shapes/images/{question['image']}"
    run_step("sample.py", "--model", f"{OUT}/finetune", "--image", picture, "--prompt", question["text"])
    print(f"  (what the picture really shows there: {question['answer']})")
    hold_chats()

    before, after = caption_losses()
    print(f"\ncaption loss on held-out pictures: {before:.3f} before stage 1, {after:.3f} after it, both towers frozen")
    print("training loss, against that of the run in demo/reference:", *verdicts(), sep="\n  ")
    print(f"report: {report()} ({(time.time() - began) / 60:.1f} minutes in all)")
    compare_chats(*map(share_right, read_chats_and_alone()))


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="stopped; `make demo` goes on from here"))
