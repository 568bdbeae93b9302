"""Shows a result: a table on the screen, and a self-contained page without scripts, to open or to send.

Whatever a model, a data file or a judge wrote is escaped first: control characters in both, html in the page.
"""
import base64
import html
import io
import json
import math
from pathlib import Path

from PIL import Image

from benchmarks import TASKS
from benchmarks.files import words_asked
from benchmarks.scoring import BLANK, Example, Graded, published_columns
from lib.archives import Member
from lib.common import html_page, plural, visible

WRONG_ANSWERS = 60          # shown in the report
SHOWN_ANSWERS = 20          # to one's own questions, on the screen


def headline(result: dict) -> list[str]:
    """Score and interval."""
    if result["value"] is None:
        return ["not scored here", ""]
    low, high = result["interval"]
    return [f"{result['value']:.2f}", f"{low:.2f} to {high:.2f}"]


def result_table(result: dict) -> list[list[str]]:
    """A heading, the headline next to published scores, and a row for each sub-score."""
    published = result["published"]
    table = [["", "here", "95 % interval", *published],
             [result["metric"], *headline(result), *map(str, published.values())]]
    for name, value in result["numbers"].items():
        low_high = [f"{end:.2f}" for end in result["intervals"].get(name, ())]
        table.append([name, f"{value:.2f}", " to ".join(low_high), *[""] * (len(table[0]) - 3)])
    return table


def remarks(result: dict) -> list[str]:
    """What to know when reading the score, a sentence or two each."""
    task = TASKS[result["task"]]
    settings = result["settings"]
    questions = plural(result["n"], "question")
    if result["blank"]:
        questions += f", {result['blank']:,} of them asked again about a blank picture"
    lines = [f"{questions}: {plural(result['unparsed'], 'answer')} not readable, {result['empty']:,} empty, "
             f"{result['truncated']:,} cut at the token limit, {result['missing']:,} missing."]
    if "model" in settings:
        bits = f", weights in {settings['bits']} bits" if "bits" in settings else ""
        lines.append(f"Image mode {settings['image_mode']}, {settings['dtype']}{bits}, greedy, at most "
                     f"{settings['max_new_tokens']} new tokens.")
    if task.ocr_notes:
        lines.append(task.ocr_notes[settings["ocr"]])
    if result["value"] is None:
        lines.append("Not scored here: the questions come without answers, a judge is needed (--grades, --judge-url), "
                     "or --limit left none of the questions that count.")
    if result["judge"]:
        lines.append(f"Judged by {result['judge']}; another judge shifts this score by several points.")
    if result["calibration"]:
        lines.append(f"Expected calibration error {result['calibration']['error']:.3f}, with the probability of an "
                     "answer as its confidence.")
    if result["other_prompts"]:
        lines.append(f"{plural(result['other_prompts'], 'answer')} made with another prompt than this task's.")
    if result["split"] in task.split_notes:
        lines.append(task.split_notes[result["split"]])
    is_mipha = settings.get("reference") == "mipha"
    if is_mipha and "mipha" in task.published:
        lines.append("This model has Mipha's tower (SigLIP): the score to compare with is Mipha-3B's.")
    if "tinyllava" in task.published:
        whose = "LLaVA-Phi's" if is_mipha else "this"
        lines.append("* CLIP-L/336 and Phi-2 with TinyLLaVA-Factory's base recipe: "
                     f"{whose} architecture, well trained.")
    if result["submission"]:
        lines.append(f"Submission file: {result['submission']}")
    for note in result["notes"]:
        lines.append(note[0].upper() + note[1:])
    return lines

# ---------------------------------------------------------------------------------------------------
# The screen


def print_table(table: list[list[str]]) -> None:
    """Print the first column left-aligned and the others, which are numbers, right-aligned."""
    table = [[visible(cell) for cell in row] for row in table]
    first, *others = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, others)]
        print("  ".join(["", name.ljust(first), *padded]).rstrip())


def print_result(result: dict, out: Path, examples: list[Example], answers: list[dict]) -> None:
    if result["task"] == "jsonl":
        print_answers(examples, answers)
    print(f"\n{result['task']} ({result['split']})")
    print_table(result_table(result))
    for line in [*remarks(result), f"{out / 'result.json'}, {out / 'report.html'}"]:
        print(f"  {visible(line)}")


def print_answers(examples: list[Example], answers: list[dict]) -> None:
    """The first answers to one's own questions, which are read rather than scored."""
    for example, answer in list(zip(examples, answers))[:SHOWN_ANSWERS]:
        question = words_asked(example.prompt)[-1][:80]
        print(visible(f"  {example.question_id}: {question} -> {answer.get('text', '(missing)')}"))
    if len(examples) > SHOWN_ANSWERS:
        print(f"  and {len(examples) - SHOWN_ANSWERS:,} more in answers.jsonl")


def print_all(results: list[dict]) -> None:
    """Print one line per task."""
    names = published_columns(results[0]["settings"].get("reference")).values()
    table = [["all tasks", "here", "95 % interval", *names]]
    for result in results:
        published = [str(result["published"].get(name, "")) for name in names]
        table.append([f"{result['task']} ({result['split']})", *headline(result), *published])
    print()
    print_table(table)

# ---------------------------------------------------------------------------------------------------
# The page

STYLE = """td { white-space: pre-wrap }
.scores td:not(:first-child), .scores th { text-align: right }
.wide { overflow-x: auto }
@media (max-width: 40em) {                                  /* a phone: the cells of a wrong answer below each other */
td, th { padding: .3em .4em }
.answers th { display: none }
.answers tr { display: block; padding: .6em 0; border-bottom: 1px solid var(--line) }
.answers td { display: block; padding: 0; border: 0 }
.answers td:nth-child(4)::before { content: "answer: " }
.answers td:nth-child(5)::before { content: "read as: " }
.answers td:nth-child(6)::before { content: "truth: " }
}"""


def thumbnail(image: Path | Member | bytes | str) -> str:
    """A data URI of a small JPEG; "" if there is no picture to show.

    The picture is re-encoded, so that nothing else in its file gets into the page.
    """
    if image == BLANK:
        return ""
    small = io.BytesIO()
    try:
        source = image.open() if isinstance(image, Member) else io.BytesIO(image) if isinstance(image, bytes) else image
        with Image.open(source, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:         # Pillow would only warn
                return ""
            picture = picture.convert("RGB")
            picture.thumbnail((160, 160))
            picture.save(small, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""               # a report about answers must not fail over one picture
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def html_table(rows: list[list[str]], style: str, pictures: list[list[str]] | None = None) -> str:
    """A heading and rows of text, all escaped. pictures: data URIs, a list for each row."""
    lines = ""
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = [html.escape(visible(text)) for text in row]
        if pictures:
            cells.insert(0, "".join(f'<img src="{address}" alt="">' for address in pictures[i] if address))
        lines += "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"
    return f'<div class="wide"><table class="{style}">\n{lines}</table></div>\n'


def report_page(answers: list[dict], graded: Graded, result: dict) -> str:
    """The score table, and a sample of the wrong answers, or of all where none is scored, spread over the task."""
    scored = any(grade.score is not None for _, grade in graded)
    listed = []
    for answer, (example, grade) in zip(answers, graded):
        # An answer about a blank picture is not wrong, it is a measurement.
        wrong = grade.score is not None and grade.score < 0.5 and example.image != BLANK
        if wrong or not scored:
            listed.append((example, answer.get("text", "(missing)"), grade))
    shown = listed[::max(1, math.ceil(len(listed) / WRONG_ANSWERS))]
    rows = [["question_id", "question", "answer", "read as", "truth"]]
    pictures = [[]]                                             # the heading has none
    for example, text, grade in shown:
        truth = example.truth if isinstance(example.truth, str) else json.dumps(example.truth, ensure_ascii=False)
        rows.append([str(example.question_id), example.prompt, text, grade.parsed, truth])
        pictures.append(list(map(thumbnail, example.pictures)))
    body = html_table(result_table(result), "scores")
    for line in remarks(result):
        body += f"<p>{html.escape(visible(line))}</p>\n"
    if result["calibration"]:
        table = [["confidence", "answers", "mean", "accuracy"]]
        for row in result["calibration"]["table"]:
            table.append([row["confidence"], f"{row['n']:,}", f"{row['mean']:.3f}", f"{row['accuracy']:.3f}"])
        body += "<h2>Accuracy by confidence</h2>\n" + html_table(table, "scores")
    title = "Wrong answers" if scored else "Answers"
    body += f"<h2>{title}: {len(listed):,}, of which {len(shown):,} are shown</h2>\n"
    body += html_table(rows, "answers", pictures)
    return html_page(f"{result['task']} ({result['split']})", body, STYLE)
