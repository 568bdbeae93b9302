"""Score a model on thirteen benchmarks: generate answers (resumable, on any number of processes), then score them.

Prompts, token limits, parsing and metrics are those of the code behind the published numbers, quirks included: LLaVA's
and LLaVA-Phi's eval scripts, GT-Vision-Lab's VQA scorer, the scorers of POPE, MME, MMMU, MM-Vet, VLMEvalKit (MMBench).
Each benchmark is a file in benchmarks/; this one holds what they share.
The data is expected under --root, laid out like LLaVA's playground/data/eval.

$ python eval.py --task scienceqa                              # generate, score, report: out/eval/scienceqa
$ python eval.py --task pope,mme --model out/finetune          # several; --task paper is the paper's eight
$ torchrun --nproc_per_node=8 eval.py --task paper             # the questions are shared among eight GPUs
$ python eval.py --task paper --check-data                     # is the official data there? loads no model
$ python eval.py --task pope --score answers.jsonl             # no model, no GPU; LLaVA's own answers files work too
$ python eval.py --task pope --compare A.jsonl B.jsonl         # paired test and the list of flips
$ python eval.py --task jsonl --questions my.jsonl --images my_images        # or my_images.zip
"""
import json
import platform
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from lib.common import (LOCK, USUAL_MODELS, Parser, at_least, dtype_name, find_model, hold_folder,
                        model_fingerprint, parse_or_exit, plural, read_json, read_jsonl, run_command, visible,
                        write_whole)

import numpy as np
from tqdm import tqdm

from benchmarks import PAPER, QUESTION_FLAGS, TASKS, add_benchmark_flags
from benchmarks.files import first_existing, read_answers, reading, short_sha256, to_json, to_jsonl, words_asked
from benchmarks.report import print_all, print_result, report_page
from benchmarks.scoring import (BLANK, Example, Grade, Score, Task, asked_again, calibration, mean, paired_test,
                                published_columns, summarize_twice)
from lib.archives import Member

# ---------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> Namespace:
    """Parse the command line. Raises ValueError for a flag that is wrong on its own."""
    parser = Parser(prog="eval.py", description=__doc__)
    on_or_off = BooleanOptionalAction
    special = []
    for name, task in TASKS.items():
        if (task.paper_mode, task.mipha_mode) != ("pad", "pad"):
            special.append(f"{name} {task.paper_mode} (Mipha {task.mipha_mode})")
    add = parser.add_argument
    add("--task", help=f"comma-separated: {', '.join(TASKS)}; paper stands for {', '.join(PAPER)}")
    add("--root", default="data/eval", help="folder of the benchmark data, laid out like LLaVA's playground/data/eval")
    add("--split", help="split; default: the one that published scores are on")
    add("--model", help=f"model folder; default: the first of {', '.join(map(str, USUAL_MODELS))} that exists")
    add("--out", help="folder for answers and results, with a subfolder per task if several; default: out/eval/TASK")
    add("--image-mode", default="model", choices=("model", "paper", "pad", "crop", "squash"),
        help="model: as the model was trained; paper: as for the published scores, which is pad except for "
             + ", ".join(special))
    add("--bits", type=int, choices=(4, 8, 16), default=16,
        help="bits per weight; 16: unquantized, in --dtype; on a GPU, 8 bits save memory but no time")
    add("--dtype", type=dtype_name, help="fp32 or bf16; default: bf16 on a GPU that supports it, fp32 on a CPU")
    add("--device", help="cpu or cuda; default: cuda if available")
    add("--batch", type=at_least(1), default=16, help="questions per batch")
    add("--exact", action=on_or_off, default=False,
        help="one question at a time and no prefix caching, like the official runs; in fp32 this changes no answer, "
             "unless --bits is 4")
    add("--blank", action=on_or_off, default=False, help="ask every question about a picture a second time, with a "
        "blank one: the score without looking (shapes: always)")
    add("--limit", type=at_least(1), help="only the first N questions (shapes: each with and without its picture)")
    add("--check-data", action=on_or_off, default=False, help="only check that the official data is there")
    add("--score", help="only score this answers file, ours or LLaVA's; needs no model")
    add("--compare", nargs=2, metavar=("A", "B"), help="only compare two answers files")
    add("--allow-missing", action=on_or_off, default=False, help="count missing answers as wrong instead of stopping")
    add_benchmark_flags(parser)
    args = parser.parse_args(argv)
    if args.exact:
        args.batch = 1
    return args


def chosen_tasks(args: Namespace) -> list[str]:
    """The names in --task, each once, with "paper" expanded. Raises ValueError for an unknown one."""
    names = []
    for word in (args.task or "").split(","):
        names += PAPER if word.strip() == "paper" else [word.strip()]
    for name in names:
        if name not in TASKS:
            problem = f"{name} is unknown" if name else "is missing"
            raise ValueError(f"--task {problem}: expected one or more of {', '.join(TASKS)}, or paper")
    return list(dict.fromkeys(names))

# ---------------------------------------------------------------------------------------------------
# The data, loaded and checked before any model


class Data(NamedTuple):
    """A benchmark with its questions."""
    name: str
    task: Task
    split: str
    folder: Path
    examples: list[Example]

    def first(self, limit: int | None) -> "Data":
        """The first questions; one that is asked again about a blank picture counts once."""
        starts = [row for row, example in enumerate(self.examples) if example.image != BLANK]
        return self._replace(examples=self.examples[:starts[limit]] if limit and limit < len(starts) else self.examples)


def load_data(name: str, args: Namespace) -> Data:
    """Read a benchmark's questions. ValueError says what is missing or wrong, where it belongs, where to get it."""
    task = TASKS[name]
    split = args.split or next(iter(task.splits))
    if split not in task.splits:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(task.splits)}")
    folder = data_folder(name, task, Path(args.root))
    options = Namespace(**{**vars(args), "split": split})
    problem = ""
    try:
        data = Data(name, task, split, folder, list(task.read(folder, options)))
        if args.blank or task.blank:
            data = data._replace(examples=list(asked_again(data.examples)))
        problem = repeated_id(data)
        rehearse(data)
    except FileNotFoundError as e:
        problem = f"{e}. Get it: {task.source}"
    except ValueError as e:
        problem = str(e)
    if problem:
        raise ValueError(f"{name}: {problem}")
    return data


def repeated_id(data: Data) -> str:
    """What is wrong with the ids of the questions as a whole; "" if nothing is."""
    for number, times in Counter(example.question_id for example in data.examples).most_common(1):
        if times == 1 or data.task.repeated_ids:
            return ""
        return f"question_id {number!r} occurs {times} times in {data.folder}, expected once"
    return f"no questions in {data.folder}"


def rehearse(data: Data) -> None:
    """Grade an empty answer to every question. Raises ValueError for data that a grader cannot use, which would
    otherwise end the run after the last answer."""
    grades = []
    for example in data.examples:
        with reading(f"{data.folder}, question {example.question_id!r}"):
            scored = data.task.grade and example.truth is not None
            grades.append(data.task.grade(example, "") if scored else Grade(None))
    with reading(data.folder):
        summarize_twice(data.task, data.examples, grades)


def data_folder(name: str, task: Task, root: Path) -> Path:
    """A benchmark's folder goes by several names: return the one that holds its files, else one that exists.

    Without either, return the first, for the message that says where the files are expected.
    """
    folders = [root / folder for folder in task.folders or (name,)]
    for folder in folders:
        if first_existing(folder, *task.files):
            return folder
    for folder in folders:
        if folder.is_dir():
            return folder
    return folders[0]


def check_images(data: Data) -> None:
    """Raise FileNotFoundError if an image is missing. Nothing is decoded yet."""
    pictures = dict.fromkeys(picture for example in data.examples for picture in example.pictures)
    paths = [picture for picture in pictures if isinstance(picture, Path)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        problem = f"{len(missing):,} of {len(paths):,} images are missing, the first is {missing[0]}"
        raise FileNotFoundError(f"{data.name}: {problem}. Get them: {data.task.source}")


def data_versions(data: Data, args: Namespace) -> tuple[dict[str, str], list[str]]:
    """Checksums of the files, and notes on what is not official: another version, another number of questions."""
    checksums = {}
    notes = []
    for name, official in data.task.files.items():
        path = data.folder / name
        if not path.is_file():
            continue
        checksums[name] = short_sha256(path.read_bytes())
        if official not in ("", checksums[name]):
            notes.append(f"{path} is another version: sha256 {checksums[name]}, the official file {official}")
    expected = data.task.splits[data.split]
    if args.img_only and data.task.images_only:
        expected = data.task.images_only
    n = sum(example.image != BLANK for example in data.examples)
    if expected and n != expected:
        notes.append(f"{plural(n, 'question')}, the official {data.split} set has {expected:,}")
    return checksums, notes


def check_benchmarks(names: list[str], args: Namespace) -> None:
    """Print whether each task's data is complete. Raises ValueError when something is missing or not official."""
    bad = 0
    for name in names:
        try:
            data = load_data(name, args)
            check_images(data)
            _, notes = data_versions(data, args)
            problems = [f"{name}: {note}. Get it: {data.task.source}" for note in notes]
        except (ValueError, FileNotFoundError) as e:
            problems = [str(e)]
        if problems:
            bad += 1
        for line in problems or [f"{name}: {plural(len(data.examples), 'question')} and all images are there"]:
            print(visible(line))
    if bad:
        raise ValueError(f"{bad} of {len(names)} tasks do not have the official data")

# ---------------------------------------------------------------------------------------------------
# Generation: answers.jsonl grows by a line per answer, in any order, and is sorted when all are there.
# Process 0 appends to answers.jsonl, process r to answers.r.jsonl, so that any number of processes can resume the run.


def question_settings(data: Data, args: Namespace) -> dict:
    """Which questions are asked, and how they are worded. `score_file` reads these back from settings.json."""
    settings = {"task": data.name, "split": data.split}
    for flag in QUESTION_FLAGS:
        settings[flag] = getattr(args, flag)
    if args.blank:
        settings["blank"] = True
    return settings


def reference_model(config) -> str:
    """The published model (a key of PUBLISHED_MODELS) with this LLaVAConfig's tower: Mipha's has no class token."""
    return "llava_phi" if config.vision.class_token else "mipha"


def generation_settings(data: Data, fingerprint: str, config, args: Namespace) -> dict:
    """Everything that an answer depends on. config: the model's LLaVAConfig.

    The number of processes and the batch size are left out: they change nothing in fp32, and one answer in a few
    hundred in bf16 or with 4-bit weights, whose matmul kernel depends on the number of rows.
    """
    reference = reference_model(config)
    image_mode = args.image_mode
    if image_mode == "model":
        image_mode = config.image_mode
    elif image_mode == "paper":
        image_mode = data.task.mipha_mode if reference == "mipha" else data.task.paper_mode
    questions = []
    for example in data.examples:
        names = [Path(picture.name).name if isinstance(picture, (Path, Member)) else True
                 for picture in example.pictures]
        questions.append([example.question_id, example.prompt, names if len(names) > 1 else (*names, False)[0]])
    arithmetic = {"dtype": args.dtype}
    if args.bits < 16:
        arithmetic["bits"] = args.bits
    return {**question_settings(data, args), "model": fingerprint, "reference": reference, "image_mode": image_mode,
            **arithmetic, "max_new_tokens": data.task.max_new_tokens,
            "questions": short_sha256(to_json(questions).encode())}


@contextmanager
def begin(out: Path, settings: dict, limit: int | None = None) -> Iterator[None]:
    """Lock the folder for this run while the context lasts.

    Raises ValueError when another run holds it, or when it contains answers made with other settings, foreign files,
    or the result of more questions than --limit asks.
    """
    path = out / "settings.json"
    if out.exists() and not path.exists():
        # A run that was killed early leaves its lock, and perhaps a file that was not renamed yet.
        ours = {LOCK, f".writing_{path.name}"}
        if not out.is_dir() or {file.name for file in out.iterdir()} - ours:
            raise ValueError(f"{out} is not empty and was not made by eval.py: give another --out")
    with hold_folder(out):
        if not path.exists():
            write_whole(path, to_json(settings))
        before = read_json(path)
        changed = []
        for key in {**before, **settings}:
            if before.get(key) != settings.get(key):
                changed.append(f"{key} was {before.get(key)!r}, now {settings.get(key)!r}")
        more = limit_before(out, limit)
        if more:
            changed.append(f"limit was {more}, now {limit}, which would replace the result")
        if changed:
            raise ValueError(f"{out} holds results of other settings: {'; '.join(changed)}; give another --out")
        yield


def limit_before(out: Path, limit: int | None) -> str:
    """The --limit of the run whose result is in `out` if it asked more questions than `limit` allows; else ""."""
    result = read_json(out / "result.json") if limit and (out / "result.json").exists() else {}
    before = result.get("limit")
    if "model" not in result.get("settings", {}) or (before and before <= limit):      # of a file: scored in no time
        return ""
    return str(before or "none")


def answers_so_far(out: Path, examples: list[Example]) -> dict[int, dict]:
    """Row -> answer, from every process of this run and of interrupted ones."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        for line in read_jsonl(path, torn=True):
            row, number = line.get("row"), line.get("question_id")
            if not isinstance(row, int) or not 0 <= row < len(examples) or examples[row].question_id != number:
                raise ValueError(f"{path} answers question {number!r} in row {row!r}, which is not this task's")
            answers[row] = line
    return answers


def plan_batches(examples: list[Example], prompts: dict[int, list[int]], rank: int, world: int,
                 batch: int) -> list[list[int]]:
    """The rows that this process answers, in batches of similar length, with questions about one picture together.

    prompts: token ids of each row that is still to be answered. Pictures are assigned to processes round-robin, in task
    order and regardless of what is answered already, so that the assignment is the same after a restart.
    """
    rows_of_picture: dict[object, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        # Questions without a picture, or with a blank one, share no prefix: they are assigned 64 rows at a time.
        no_picture = example.image is None or example.image == BLANK
        key = (example.image, row // 64) if no_picture else example.image
        rows_of_picture[key].append(row)
    groups = []
    for i, rows in enumerate(rows_of_picture.values()):
        open_rows = [row for row in rows if row in prompts]
        if i % world == rank and open_rows:
            groups.append(sorted(open_rows, key=lambda row: len(prompts[row])))
    groups.sort(key=lambda rows: (len(prompts[rows[-1]]), min(rows)))
    in_order = [row for rows in groups for row in rows]
    return [in_order[start:start + batch] for start in range(0, len(in_order), batch)]


def write_answers(path: Path, answers: Iterator, examples: list[Example], progress: tqdm) -> None:
    """Append each answer to the file as it ends."""
    written = path.read_bytes() if path.exists() else b""
    with open(path, "ab") as file, progress:
        file.truncate(written.rfind(b"\n") + 1)                 # drop a line that a kill left unfinished
        for answer in answers:
            example = examples[answer.row]
            line = {"row": answer.row, "question_id": example.question_id,
                    "prompt": example.info.get("saved", example.prompt), "text": answer.text,
                    "truncated": answer.truncated, "tokens": answer.n_tokens, "logprob": answer.logprob}
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            progress.update()


def put_in_order(out: Path, data: Data) -> None:
    """Merge all processes' answers into one file, in the order of the questions."""
    answers = answers_so_far(out, data.examples)
    write_whole(out / "answers.jsonl", to_jsonl(answers[row] for row in sorted(answers)))
    for path in out.glob("answers.*.jsonl"):
        path.unlink()

# ---------------------------------------------------------------------------------------------------
# Scoring


def match_answers(path: Path, data: Data, args: Namespace) -> list[dict | None]:
    """The answer to each question of `data`; see read_answers."""
    return read_answers(path, data.examples, data.task.repeated_ids, args.limit, args.allow_missing)


def grade_answers(data: Data, answers: list[dict | None], args: Namespace, out: Path) -> list[Grade]:
    """Grade each answer by the benchmark's rule or its judge; the score is None where neither is available."""
    if data.task.judge:
        if not args.grades and not args.judge_url:
            return [Grade(None)] * len(answers)
        texts = [answer["text"] if answer else "" for answer in answers]
        return data.task.judge(data.examples, texts, args, out)
    grades = []
    for example, answer in zip(data.examples, answers):
        if example.truth is None:
            grades.append(Grade(None))
        elif answer is None:        # wrong, as in those official scorers that do not crash on it
            grades.append(Grade(0.0, unparsed=True, raw=(0.0,)))
        else:
            grades.append(data.task.grade(example, answer["text"]))
    return grades


def asked_in_other_words(example: Example, answer: dict) -> bool:
    """Was the answer made with another prompt? Only the first two lines are compared, because LLaVA saves some prompts
    without the instruction at the end."""
    return words_asked(answer.get("prompt", example.prompt))[:2] != words_asked(example.prompt)[:2]


def describe_judge(data: Data, total: Score | None, args: Namespace) -> str | None:
    """Where the grades come from; None where no judge was asked."""
    if not data.task.judge or total is None:
        return None
    if args.grades:
        return f"the grades in {Path(args.grades).name}"
    return f"{args.judge_model}, with this project's prompt"


def published_scores(task: Task, settings: dict) -> dict[str, float]:
    """Name of a model -> its published score; the model to compare with comes first."""
    scores = {}
    for model, name in published_columns(settings.get("reference")).items():
        if model in task.published:
            scores[name] = task.published[model]
    return scores


def score_task(data: Data, answers: list[dict | None], args: Namespace, out: Path, settings: dict,
               run: dict | None = None) -> dict:
    """Grade and summarize, then write the submission, report.html and result.json."""
    task = data.task
    grades = grade_answers(data, answers, args, out)
    total = summarize_twice(data.task, data.examples, grades)
    given = [answer for answer in answers if answer]
    texts = [answer["text"] for answer in given]
    others = [asked_in_other_words(e, answer) for e, answer in zip(data.examples, answers) if answer]
    checksums, notes = data_versions(data, args)
    blank = sum(example.image == BLANK for example in data.examples)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:              # scoring alone does not import it
        versions["torch"] = sys.modules["torch"].__version__
    result = {
        "task": data.name,
        "split": data.split,
        "metric": task.metric,
        "n": len(data.examples) - blank,
        "blank": blank,                     # of these, asked again about a blank picture
        "scored": sum(g.score is not None for e, g in zip(data.examples, grades) if e.image != BLANK),
        "value": total.value if total else None,
        "interval": [total.low, total.high] if total else None,
        "interval_method": f"95 %, {total.interval}" if total else None,
        "numbers": total.subscores if total else {},
        "intervals": total.intervals if total else {},          # of some of these numbers
        "published": published_scores(task, settings),
        "unparsed": sum(grade.unparsed for grade in grades),
        "empty": texts.count(""),
        "truncated": sum(bool(answer.get("truncated")) for answer in given),
        "missing": answers.count(None),
        "calibration": None if task.judge else calibration(data.examples, answers, grades),
        "other_prompts": others.count(True),
        "limit": args.limit,
        "judge": describe_judge(data, total, args),
        "submission": None,
        "settings": settings,
        "first_prompt": data.examples[0].prompt,
        "checksums": checksums,
        "notes": notes,
        "versions": versions,
        "run": run,
    }
    # A submission is made only for the published split, and only when every question is answered.
    published_split = data.split == next(iter(task.splits))
    if task.write_submission and (total is None or published_split) and None not in answers and not args.limit:
        try:
            asked = [(e, text) for e, text in zip(data.examples, texts) if e.image != BLANK]
            result["submission"] = task.write_submission(*map(list, zip(*asked)), data.folder, out).name
        except (ValueError, OSError) as e:
            notes.append(f"submission file not written: {e}")
    write_whole(out / "report.html", report_page(data.examples, answers, grades, result))
    write_whole(out / "result.json", to_json(result))
    return result

# ---------------------------------------------------------------------------------------------------
# Comparing two answers files


def load_side(path: Path, data: Data, args: Namespace) -> list[tuple[str, float | None]]:
    """Print the score of an answers file; return the text and the score of each answer."""
    answers = match_answers(path, data, args)
    grades = [] if data.task.judge else grade_answers(data, answers, args, path.parent)
    total = summarize_twice(data.task, data.examples, grades)
    if total is None:
        raise ValueError(f"{data.name}: nothing to compare: these answers are graded on a server or by a judge")
    print(f"{path}: {data.task.metric} {total.value:.2f} ({total.low:.2f} to {total.high:.2f})")
    return [(answer["text"] if answer else "", grade.score) for answer, grade in zip(answers, grades)]


def compare(data: Data, args: Namespace) -> None:
    """Print both scores, a paired test, and every question whose score differs."""
    first, second = [load_side(Path(path), data, args) for path in args.compare]
    flips = []
    before = []
    after = []
    for example, (old_text, old), (new_text, new) in zip(data.examples, first, second):
        if old is None or example.image == BLANK:
            continue
        before.append(old)
        after.append(new)
        if old != new:
            word = "better" if new > old else "worse "
            flips.append(f"{word}  question {example.question_id}  {old_text!r} -> {new_text!r}  "
                         f"truth {example.truth!r}")
    gained = sum(new > old for old, new in zip(before, after))
    change = 100 * mean([new - old for old, new in zip(before, after)])
    low, high, p, test = paired_test(before, after)
    print(f"the second is better on {gained:,} of {len(before):,} questions and worse on {len(flips) - gained:,}: "
          f"{change:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}), p = {p:.3g} ({test})")
    for line in flips:
        print(visible(line))

# ---------------------------------------------------------------------------------------------------
# The commands


def score_file(args: Namespace) -> None:
    """--score FILE. A settings.json next to it, if there is one, says which task it answers and how that was asked."""
    path = Path(args.score)
    settings_file = path.parent / "settings.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    if settings.get("task") not in list(TASKS):
        settings = {}                       # some other program's
    if settings and args.task in (None, settings["task"]):
        for name in ("task", "split", *QUESTION_FLAGS):
            setattr(args, name, settings.get(name))
        args.blank = settings.get("blank", False)
    names = chosen_tasks(args)
    if len(names) > 1:
        raise ValueError(f"--score takes one task, these are {len(names)}")
    data = load_data(names[0], args).first(args.limit)
    if args.out:
        out = Path(args.out)
    else:
        out = path.parent if settings else Path("out/eval") / f"{data.name}-{path.stem}"
    answers = match_answers(path, data, args)
    # A folder of others' answers has no settings, and need not be ours; in any other, they must agree with these.
    foreign = out == path.parent and not settings
    settings = settings or {**question_settings(data, args), "scored": path.name}
    with hold_folder(out) if foreign else begin(out, settings, args.limit):
        print_result(score_task(data, answers, args, out, settings), out, data.examples, answers)


def answer_and_score(args: Namespace) -> None:
    """Check all the data, then the model; answer the open questions; score task by task."""
    from lib import asking                  # imported here because both need torch, which scoring does without
    from load_weights import load_model
    tasks = [load_data(name, args) for name in chosen_tasks(args)]
    for data in tasks:
        check_images(data.first(args.limit))
    folder = find_model(args.model)
    args.device = asking.own_device(args.device)
    args.dtype = asking.own_dtype(args.dtype, args.device)
    model = asking.Model(folder, load_model, args.dtype, args.device, args.bits)
    fingerprint = model_fingerprint(folder)
    processes = asking.join_processes()
    results = []
    for data in tasks:
        out = Path(args.out or "out/eval")
        if len(tasks) > 1 or not args.out:
            out = out / data.name
        settings = generation_settings(data, fingerprint, model.config, args)
        # Rank 0 locks the folder on behalf of all processes.
        with begin(out, settings, args.limit) if processes.rank == 0 else nullcontext():
            processes.barrier()
            started = time.time()
            n_asked = answer_missing(data, model, processes, settings, args, out)
            processes.barrier()
            if processes.rank == 0:
                run = {"device": args.device, "processes": processes.world, "batch": args.batch, "exact": args.exact,
                       "questions": n_asked, "seconds": round(time.time() - started, 1)}
                results.append(score_run(data, run, settings, args, out))
    if len(results) > 1:
        print_all(results)
    if not args.limit and any(result["value"] is not None for result in results):
        print(f"  scores for the model's card: python load_weights.py export --model {folder} --out DIR "
              f"--scores {args.out or 'out/eval'}")


def answer_missing(data: Data, model, processes, settings: dict, args: Namespace, out: Path) -> int:
    """Answer this process's share of the open questions; return how many are open over all processes.

    model, processes: lib.asking.Model and Processes.
    """
    asked = range(len(data.first(args.limit).examples))
    todo = set(asked) - answers_so_far(out, data.examples).keys()
    if todo:                                # otherwise no model is loaded
        model.load()
        prompts = model.encode(data.examples, todo)
        batches = plan_batches(data.examples, prompts, processes.rank, processes.world, args.batch)
        answers = model.answers(data.examples, prompts, batches, settings["image_mode"], settings["max_new_tokens"],
                                args.exact)
        path = out / (f"answers.{processes.rank}.jsonl" if processes.rank else "answers.jsonl")
        progress = tqdm(total=sum(map(len, batches)), desc=data.name, unit="q", disable=processes.rank > 0)
        write_answers(path, answers, data.examples, progress)
    return len(todo)


def score_run(data: Data, run: dict, settings: dict, args: Namespace, out: Path) -> dict:
    """Merge the answers of all processes and score them."""
    put_in_order(out, data)
    data = data.first(args.limit)
    answers = match_answers(out / "answers.jsonl", data, args)
    result = score_task(data, answers, args, out, settings, run)
    print_result(result, out, data.examples, answers)
    return result


def main(args: Namespace) -> None:
    """Of the four commands only the last needs a model."""
    if args.check_data:
        check_benchmarks(chosen_tasks(args), args)
    elif args.compare:
        compare(load_data(chosen_tasks(args)[0], args).first(args.limit), args)
    elif args.score:
        score_file(args)
    else:
        answer_and_score(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_or_exit(parse), interrupted="stopped; run the same command to resume"))
