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

from lib.common import (LOCK, USUAL_MODELS, Parser, at_least, dtype_name, find_model, hold_folder, model_fingerprint,
                        parse_or_exit, plural, read_json, run_command, torchrun_env, visible, write_whole)

import numpy as np
from tqdm import tqdm

from benchmarks import PAPER, QUESTION_FLAGS, TASKS, add_benchmark_flags
from benchmarks.files import read_answers, reading, short_sha256, to_json, to_jsonl, words_asked
from benchmarks.report import print_all, print_result, report_page
from benchmarks.scoring import (BLANK, Answered, Example, Grade, Graded, Task, asked_again, calibration, mean,
                                paired_test, published_columns, summarize_twice)

# ---------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> Namespace:
    """Parse the command line. Raises ValueError for a flag that is wrong on its own."""
    parser = Parser(prog="eval.py", description=__doc__)
    on_or_off = BooleanOptionalAction
    add = parser.add_argument
    add("--task", help=f"comma-separated: {', '.join(TASKS)}; paper stands for {', '.join(PAPER)}")
    add("--root", default="data/eval", help="folder of the benchmark data, laid out like LLaVA's playground/data/eval")
    add("--split", help="split; default: the one that published scores are on")
    add("--model", help=f"model folder; default: the first of {', '.join(map(str, USUAL_MODELS))} that exists")
    add("--out", help="folder for answers and results, with a subfolder per task if several; default: out/eval/TASK")
    add("--image-mode", default="model", choices=("model", "paper", "pad", "crop", "squash"),
        help="model: as the model was trained; paper: as for the published scores (docs/evaluation.md says how)")
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
    """The names in --task, each once, with "paper" expanded. Raises ValueError for an unknown one, or for several where
    one answers file is given."""
    names = []
    for word in (args.task or "").split(","):
        names += PAPER if word.strip() == "paper" else [word.strip()]
    number = "one" if args.score or args.compare else "one or more"
    if not TASKS.keys() >= {*names} or number == "one" and len(names) > 1:
        raise ValueError(f"--task {args.task or 'is missing'}: expected {number} of {', '.join(TASKS)}, or paper")
    return list(dict.fromkeys(names))

# ---------------------------------------------------------------------------------------------------
# The data, loaded and checked before any model


class Data(NamedTuple):
    """A benchmark with its questions."""
    name: str
    task: Task
    split: str
    folder: Path
    questions: list[Example]        # all that the split has
    examples: list[Example]         # those that are asked now: all, or the first ones with --limit


def load_data(name: str, args: Namespace, pictures: bool = False) -> Data:
    """Read a benchmark's questions. ValueError says what is missing or wrong, where it belongs, where to get it.

    pictures: the files of those that are asked must be there too.
    """
    task = TASKS[name]
    split = args.split or next(iter(task.splits))
    folder = data_folder(name, task, Path(args.root))
    options = Namespace(**{**vars(args), "split": split})
    problem = "" if split in task.splits else f"no split {split!r}, only {', '.join(task.splits)}"
    if not problem:
        try:
            questions = list(task.read(folder, options))
            if args.blank or task.blank:
                questions = list(asked_again(questions))
            data = Data(name, task, split, folder, questions, first_questions(questions, args.limit))
            rehearse(data)
            problem = repeated_id(data) or (missing_pictures(data) if pictures else "")
        except FileNotFoundError as e:
            problem = f"{e}. Get it: {task.source}"
        except ValueError as e:
            problem = str(e)
    if problem:
        raise ValueError(f"{name}: {problem}")
    return data


def first_questions(questions: list[Example], limit: int | None) -> list[Example]:
    """One that is asked again about a blank picture counts once."""
    starts = [row for row, example in enumerate(questions) if example.image != BLANK]
    return questions[:starts[limit]] if limit and limit < len(starts) else questions


def data_folder(name: str, task: Task, root: Path) -> Path:
    """A benchmark's folder goes by several names: return the first that holds one of its files, else the first that
    exists, else the first, for the message that says where the files are expected."""
    folders = [root / folder for folder in task.folders or (name,)]
    holding = [folder for folder in folders if any((folder / file).exists() for file in task.files)]
    existing = [folder for folder in folders if folder.is_dir()]
    return [*holding, *existing, *folders][0]


def repeated_id(data: Data) -> str:
    """What is wrong with the ids of the questions as a whole; "" if nothing is."""
    for number, times in Counter(example.question_id for example in data.questions).most_common(1):
        if times == 1 or data.task.repeated_ids:
            return ""
        return f"question_id {number!r} occurs {times} times in {data.folder}, expected once"
    return f"no questions: the file in {data.folder}, or that of --questions, is empty"


def rehearse(data: Data) -> None:
    """Grade an empty answer to every question. Raises ValueError for data that a grader cannot use, which would
    otherwise end the run after the last answer."""
    graded = grade_answers(data, [{"text": ""}] * len(data.examples))
    with reading(data.folder):
        summarize_twice(data.task, graded)


def missing_pictures(data: Data) -> str:
    """Which pictures are not there, "" if all are. Nothing is decoded yet."""
    paths = dict.fromkeys(picture for example in data.examples for picture in example.pictures
                          if isinstance(picture, Path))
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return ""
    return (f"{len(missing):,} of {len(paths):,} images are missing, the first is {missing[0]}. Get them: "
            f"{data.task.source}")


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
    args.limit = None                       # all of it
    for name in names:
        try:
            data = load_data(name, args, pictures=True)
            _, notes = data_versions(data, args)
            problems = [f"{name}: {note}. Get it: {data.task.source}" for note in notes]
        except ValueError as e:
            problems = [str(e)]
        bad += bool(problems)
        for line in problems or [f"{name}: {plural(len(data.examples), 'question')} and all images are there"]:
            print(visible(line))
    if bad:
        raise ValueError(f"{bad} of {len(names)} tasks do not have the official data")

# ---------------------------------------------------------------------------------------------------
# Generation: answers.jsonl grows by a line per answer, in any order, and is sorted when all are there.
# Process 0 appends to answers.jsonl, process r to answers.r.jsonl, so that any number of processes can resume the run.


def question_settings(data: Data, args: Namespace) -> dict:
    """Which questions are asked, and how they are worded. `score_file` reads these back from settings.json."""
    flags = {flag: getattr(args, flag) for flag in QUESTION_FLAGS}
    blank = {"blank": True} if args.blank else {}
    return {"task": data.name, "split": data.split, **flags, **blank}


def generation_settings(data: Data, fingerprint: str, config, args: Namespace) -> dict:
    """Everything that an answer depends on. config: the model's LLaVAConfig.

    The number of processes and the batch size are left out: they change nothing in fp32, and one answer in a few
    hundred in bf16 or with 4-bit weights, whose matmul kernel depends on the number of rows.
    """
    # The published model with this tower, a key of PUBLISHED_MODELS: Mipha's has no class token.
    reference = "llava_phi" if config.vision.class_token else "mipha"
    image_mode = args.image_mode
    if image_mode == "model":
        image_mode = config.image_mode
    elif image_mode == "paper":
        image_mode = data.task.mipha_mode if reference == "mipha" else data.task.paper_mode
    questions = []
    for example in data.questions:
        names = [Path(getattr(picture, "name", "")).name or True for picture in example.pictures]
        questions.append([example.question_id, example.prompt, names if len(names) > 1 else (*names, False)[0]])
    bits = {"bits": args.bits} if args.bits < 16 else {}
    return {**question_settings(data, args), "model": fingerprint, "reference": reference, "image_mode": image_mode,
            "dtype": args.dtype, **bits, "max_new_tokens": data.task.max_new_tokens,
            "questions": short_sha256(to_json(questions).encode())}


@contextmanager
def begin(out: Path, settings: dict, limit: int | None = None) -> Iterator[None]:
    """Lock the folder for this run while the context lasts.

    Raises ValueError when another run holds it, or when it contains answers made with other settings, foreign files,
    or the result of more questions than --limit asks.
    """
    with hold_folder(out):
        problem = folder_problem(out, settings, limit)
        if problem:
            raise ValueError(f"{out} {problem}; give another --out")
        write_whole(out / "settings.json", to_json(settings))
        yield


def folder_problem(out: Path, settings: dict, limit: int | None) -> str:
    """Why these answers may not be written to this folder; "" if they may."""
    path = out / "settings.json"
    if not path.exists():
        # A run that was killed early leaves its lock, and perhaps a file that was not renamed yet.
        foreign = {file.name for file in out.iterdir()} - {LOCK, f".writing_{path.name}"}
        return "is not empty and was not made by eval.py" if foreign else ""
    before = read_json(path)
    changed = []
    for key in {**before, **settings}:
        if before.get(key) != settings.get(key):
            changed.append(f"{key} was {before.get(key)!r}, now {settings.get(key)!r}")
    if limit and "model" in before and (out / "result.json").exists():      # without a model: scored again in no time
        asked = read_json(out / "result.json").get("limit")
        if asked is None or asked > limit:
            changed.append(f"limit was {asked or 'none'}, now {limit}, which would replace the result")
    return f"holds results of other settings: {'; '.join(changed)}" if changed else ""


def answers_so_far(out: Path, data: Data) -> dict[int, dict]:
    """Row -> answer, from every process of this run and of interrupted ones."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        found = read_answers(path, data.questions, data.task, allow_missing=True, torn=True)
        answers |= {row: answer for row, answer in enumerate(found) if answer}
    return answers


def plan_batches(examples: list[Example], prompts: dict[int, list[int]], rank: int, world: int,
                 batch: int) -> list[list[int]]:
    """The rows that this process answers, in batches of similar length, with questions about one picture together.

    prompts: token ids of each row that is still to be answered. Pictures are assigned to processes round-robin, in task
    order and regardless of what is answered already, so that the assignment is the same after a restart.
    """
    rows_of_picture = defaultdict(list)
    for row, example in enumerate(examples):
        # Questions without a picture, or with a blank one, share no prefix: they are assigned 64 rows at a time.
        no_picture = example.image in (None, BLANK)
        rows_of_picture[example.image, row // 64 if no_picture else 0].append(row)
    groups = []
    for i, rows in enumerate(rows_of_picture.values()):
        open_rows = [row for row in rows if row in prompts]
        if i % world == rank and open_rows:
            groups.append(sorted(open_rows, key=lambda row: len(prompts[row])))
    groups.sort(key=lambda rows: (len(prompts[rows[-1]]), min(rows)))
    in_order = [row for rows in groups for row in rows]
    return [in_order[start:start + batch] for start in range(0, len(in_order), batch)]


def write_answers(path: Path, answers: Iterator[dict], progress: tqdm) -> None:
    """Append each answer to the file as it ends."""
    written = path.read_bytes() if path.exists() else b""
    with open(path, "ab") as file, progress:
        file.truncate(written.rfind(b"\n") + 1)                 # drop a line that a kill left unfinished
        for line in answers:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            progress.update()

# ---------------------------------------------------------------------------------------------------
# Scoring


def grade_answers(data: Data, answers: list[dict]) -> Graded:
    """Grade each answer by the benchmark's rule; the score is None where there is none, or no truth to compare with."""
    graded = []
    for example, answer in zip(data.examples, answers):
        grade = Grade(None)
        if data.task.grade and example.truth is not None:
            with reading(f"{data.folder}, question {example.question_id!r}"):
                # A missing one is wrong, as in those official scorers that do not crash on it.
                grade = data.task.grade(example, answer["text"]) if answer else Grade(0.0, unparsed=True, raw=(0.0,))
        graded.append((example, grade))
    return graded


def asked_in_other_words(example: Example, answer: dict) -> bool:
    """Was the answer made with another prompt? Only the first two lines are compared, because LLaVA saves some prompts
    without the instruction at the end."""
    return words_asked(answer.get("prompt", example.prompt))[:2] != words_asked(example.prompt)[:2]


def describe_answers(data: Data, answers: list[dict], graded: Graded) -> dict:
    """The fields of result.json about the answers as such."""
    return {
        "unparsed": sum(grade.unparsed for _, grade in graded),
        "empty": sum(answer.get("text") == "" for answer in answers),
        "truncated": sum(bool(answer.get("truncated")) for answer in answers),
        "missing": answers.count({}),
        "calibration": None if data.task.judge else calibration(answers, graded),
        "other_prompts": sum(map(asked_in_other_words, data.examples, answers)),
    }


def write_submission(data: Data, answered: Answered, out: Path, notes: list[str]) -> str | None:
    """Write the file for the benchmark's server; return its name. If it cannot be made, a note says why."""
    try:
        content = data.task.submission(answered, data.folder)
        return write_whole(out / data.task.submission_name, content).name
    except (ValueError, OSError) as e:
        notes.append(f"submission file not written: {e}")
        return None


def score_task(data: Data, answers: list[dict], args: Namespace, out: Path, settings: dict,
               run: dict | None = None) -> dict:
    """Grade and summarize, write the submission, report.html and result.json, and print the result.

    run: how the answers were made; None: as the result that is there says.
    """
    task = data.task
    graded = grade_answers(data, answers)
    answered = [(example, answer.get("text", "")) for example, answer in zip(data.examples, answers)]
    if task.judge and (args.grades or args.judge_url):
        graded = task.judge(answered, args, out)
    score = summarize_twice(task, graded)
    judge = None
    if task.judge and score.value is not None:
        asked = f"{args.judge_model}, with this project's prompt"
        judge = f"the grades in {Path(args.grades).name}" if args.grades else asked
    if run is None and "model" in settings and (out / "result.json").exists():
        run = read_json(out / "result.json")["run"]
    checksums, notes = data_versions(data, args)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:              # scoring alone does not import it
        versions["torch"] = sys.modules["torch"].__version__
    columns = published_columns(settings.get("reference"))
    asked_once = [(example, text) for example, text in answered if example.image != BLANK]
    result = {
        "task": data.name,
        "split": data.split,
        "metric": task.metric,
        "n": len(asked_once),
        "blank": len(answered) - len(asked_once),       # of these, asked again about a blank picture
        "scored": sum(grade.score is not None for example, grade in graded if example.image != BLANK),
        **score._asdict(),
        "published": {name: task.published[model] for model, name in columns.items() if model in task.published},
        **describe_answers(data, answers, graded),
        "limit": args.limit,
        "judge": judge,
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
    if task.submission and (score.value is None or published_split) and {} not in answers and not args.limit:
        result["submission"] = write_submission(data, asked_once, out, notes)
    write_whole(out / "report.html", report_page(answers, graded, result))
    write_whole(out / "result.json", to_json(result))
    print_result(result, out, data.examples, answers)
    return result

# ---------------------------------------------------------------------------------------------------
# Comparing two answers files


def load_side(path: Path, data: Data, args: Namespace) -> list[tuple[str, float | None]]:
    """Print the score of an answers file; return the text and the score of each answer."""
    answers = read_answers(path, data.examples, data.task, args.limit, args.allow_missing)
    graded = grade_answers(data, answers)
    score = summarize_twice(data.task, graded)
    if score.value is None:
        raise ValueError(f"{data.name}: nothing to compare: these answers are graded on a server or by a judge")
    low, high = score.interval
    print(f"{path}: {data.task.metric} {score.value:.2f} ({low:.2f} to {high:.2f})")
    return [(answer.get("text", ""), grade.score) for answer, (_, grade) in zip(answers, graded)]


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
    changes = [new - old for old, new in zip(before, after)]
    gained = sum(change > 0 for change in changes)
    low, high, p, test = paired_test(before, after)
    print(f"the second is better on {gained:,} of {len(before):,} questions and worse on {len(flips) - gained:,}: "
          f"{100 * mean(changes):+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}), p = {p:.3g} ({test})")
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
    [name] = chosen_tasks(args)
    data = load_data(name, args)
    usual = path.parent if settings else Path("out/eval", f"{name}-{path.stem}")
    out = Path(args.out or usual)
    answers = read_answers(path, data.examples, data.task, args.limit, args.allow_missing)
    # A folder of others' answers has no settings, and need not be ours; in any other, they must agree with these.
    foreign = out == path.parent and not settings
    settings = settings or {**question_settings(data, args), "scored": path.name}
    with hold_folder(out) if foreign else begin(out, settings, args.limit):
        score_task(data, answers, args, out, settings)


def answer_and_score(args: Namespace) -> None:
    """Check all the data, then the model; answer the open questions; score task by task."""
    from lib import asking                  # imported here because both need torch, which scoring does without
    from load_weights import load_model
    tasks = [load_data(name, args, pictures=True) for name in chosen_tasks(args)]
    folder = find_model(args.model)
    args.device = asking.own_device(args.device)
    args.dtype = asking.own_dtype(args.dtype, args.device)
    model = asking.Model(folder, load_model, args.dtype, args.device, args.bits)
    fingerprint = model_fingerprint(folder)
    barrier = asking.join_processes()
    here = torchrun_env()
    results = []
    for data in tasks:
        out = Path(args.out or "out/eval")
        if len(tasks) > 1 or not args.out:
            out = out / data.name
        settings = generation_settings(data, fingerprint, model.config, args)
        # Rank 0 locks the folder on behalf of all processes.
        with begin(out, settings, args.limit) if here.rank == 0 else nullcontext():
            barrier()
            started = time.time()
            n_asked = answer_missing(data, model, settings, args, out)
            barrier()
            if here.rank == 0:
                run = {"device": args.device, "processes": here.world, "batch": args.batch, "exact": args.exact,
                       "questions": n_asked, "seconds": round(time.time() - started, 1)}
                results.append(score_run(data, run if n_asked else None, settings, args, out))
    if len(results) > 1:
        print_all(results)
    if not args.limit and any(result["value"] is not None for result in results):
        print(f"  scores for the model's card: python load_weights.py export --model {folder} --out DIR "
              f"--scores {args.out or 'out/eval'}")


def answer_missing(data: Data, model, settings: dict, args: Namespace, out: Path) -> int:
    """Answer this process's share of the open questions; return how many are open over all processes.

    model: a lib.asking.Model.
    """
    here = torchrun_env()
    todo = set(range(len(data.examples))) - answers_so_far(out, data).keys()
    if todo:                                # otherwise no model is loaded
        model.load()
        prompts = model.encode(data.questions, todo)
        batches = plan_batches(data.questions, prompts, here.rank, here.world, args.batch)
        answers = model.answers(data.questions, prompts, batches, settings, args.exact)
        path = out / (f"answers.{here.rank}.jsonl" if here.rank else "answers.jsonl")
        progress = tqdm(total=sum(map(len, batches)), desc=data.name, unit="q", disable=here.rank > 0)
        write_answers(path, answers, progress)
    return len(todo)


def score_run(data: Data, run: dict | None, settings: dict, args: Namespace, out: Path) -> dict:
    """Merge the answers of all processes into one file, in the order of the questions, and score them."""
    answers = answers_so_far(out, data)
    path = write_whole(out / "answers.jsonl", to_jsonl(answers[row] for row in sorted(answers)))
    for other in out.glob("answers.*.jsonl"):
        other.unlink()
    answers = read_answers(path, data.examples, data.task, args.limit, args.allow_missing)
    return score_task(data, answers, args, out, settings, run)


def main(args: Namespace) -> None:
    """Of the four commands only the last needs a model."""
    if args.check_data:
        check_benchmarks(chosen_tasks(args), args)
    elif args.compare:
        [name] = chosen_tasks(args)
        compare(load_data(name, args), args)
    elif args.score:
        score_file(args)
    else:
        answer_and_score(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_or_exit(parse), interrupted="stopped; run the same command to resume"))
