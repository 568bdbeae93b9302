"""
Score a model on thirteen benchmarks: generate answers (resumable, on any number of processes), then score them.

Prompts, token limits, parsing and metrics are those of the code behind the published numbers, quirks included: LLaVA's
and LLaVA-Phi's eval scripts, GT-Vision-Lab's VQA scorer, the scorers of POPE, MME, MMMU, MM-Vet, VLMEvalKit (MMBench).
Each benchmark is a file in benchmarks/; this one holds what is the same for all of them.
Data lies under --root in the layout of LLaVA's playground/data/eval, folder names as they come.

$ python eval.py --task scienceqa                              # generate, score, report: out/eval/scienceqa
$ python eval.py --task pope,mme --model out/finetune          # several; --task paper is the paper's eight
$ torchrun --nproc_per_node=8 eval.py --task paper             # the same files, eight times as fast
$ python eval.py --task paper --check-data                     # is the data there and the right version? loads no model
$ python eval.py --task pope --score answers.jsonl             # no model, no GPU; LLaVA's own answers files work too
$ python eval.py --task pope --compare A.jsonl B.jsonl         # paired test and the list of flips
$ python eval.py --task jsonl --questions my.jsonl --images my_images
"""
import argparse
import hashlib
import io
import json
import os
import platform
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import PAPER, QUESTION_FLAGS, TASKS, add_flags
from benchmarks.files import first_existing, read_answers, short_sha256, to_json, to_jsonl
from benchmarks.report import print_all, print_result, report_page
from benchmarks.scoring import BLANK, Example, Grade, Score, Task, mean, paired_test, published_columns
from lib.common import (LOCK, USUAL_MODELS, Parser, choose_device, choose_dtype, dtype_name, find_model, hold_folder,
                        read_json, read_jsonl, run_command, torch_dtype, torchrun_env, use_device, visible, write_whole)

# torch and the model are imported inside the functions that generate, so that scoring needs neither.


# ---------------------------------------------------------------------------------------------------
# Data: loaded and checked before any model


class Data(NamedTuple):
    """A benchmark with its questions."""
    name: str
    task: Task
    split: str
    folder: Path
    examples: list[Example]

    def first(self, limit: int | None) -> "Data":
        return self._replace(examples=self.examples[:limit])


def load_data(name: str, args: Namespace) -> Data:
    """Raises ValueError or FileNotFoundError: what is missing or wrong, where it is expected, where to get it."""
    task = TASKS[name]
    split = args.split or next(iter(task.splits))
    if split not in task.splits:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(task.splits)}")
    folder = data_folder(name, task, Path(args.root))
    options = Namespace(**{**vars(args), "split": split})
    try:
        examples = list(task.read(folder, options))
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name}: {e}. Get it: {task.source}") from e
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        # The readers index freely into what they expect: a file of another shape ends here.
        problem = f"{folder} is not in the official format ({type(e).__name__}: {e})"
        raise ValueError(f"{name}: {problem}. Get it: {task.source}") from e
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e
    if not examples:
        raise ValueError(f"{name}: no questions in {folder}. Get them: {task.source}")
    number, times = Counter(example.question_id for example in examples).most_common(1)[0]
    if times > 1 and not task.repeated_ids:
        raise ValueError(f"{name}: question_id {number!r} occurs {times} times in {folder}, expected once")
    return Data(name, task, split, folder, examples)


def data_folder(name: str, task: Task, root: Path) -> Path:
    """Of the names that a benchmark's folder goes by: one that holds its files, else one that exists, else the first.

    The last of these is for the message that says where the files are expected.
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
    """FileNotFoundError if an image is missing. Only the names are looked up: nothing is decoded yet."""
    paths = dict.fromkeys(example.image for example in data.examples if isinstance(example.image, Path))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        problem = f"{len(missing):,} of {len(paths):,} images are missing, the first is {missing[0]}"
        raise FileNotFoundError(f"{data.name}: {problem}. Get them: {data.task.source}")


def data_versions(data: Data, args: Namespace) -> tuple[dict[str, str], list[str]]:
    """-> checksums of the files, and what is not official about them: another version, another number of questions."""
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
    if expected and len(data.examples) != expected:
        notes.append(f"{len(data.examples):,} questions, the official {data.split} set has {expected:,}")
    return checksums, notes


def check_benchmarks(names: list[str], args: Namespace) -> None:
    """Print what is there and what is not. Raises ValueError when something is missing or not official."""
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
        for line in problems or [f"{name}: {len(data.examples):,} questions and all their images are there"]:
            print(visible(line))
    if bad:
        raise ValueError(f"{bad} of {len(names)} tasks do not have the official data")

# ---------------------------------------------------------------------------------------------------
# Generation: answers.jsonl grows by a line per answer, in any order; when all are there it is put in order.
# Process 0 appends to answers.jsonl, process r to answers.r.jsonl, so that any number of them can go on after a kill.


class LoadedModel(NamedTuple):
    """A model and what it takes to ask it."""
    model: object               # model.LLaVAPhi
    tok: object                 # tokenizers.Tokenizer
    eot_id: int


def load(source, args: Namespace) -> LoadedModel:
    """Load an opened folder (lib.folders.Weights) with its tokenizer.

    The imports are here because torch takes seconds, and most of this program's work needs none.
    """
    from data import eot_id, load_tokenizer
    from load_weights import load_model
    model = load_model(source, torch_dtype(args.dtype), args.device, bits=args.bits)
    tok = load_tokenizer(source.paths[0])
    return LoadedModel(model, tok, eot_id(tok))


def model_fingerprint(folder: Path) -> str:
    """Changes with any weight, with the config and with the tokenizer."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt"):
            with open(path, "rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def question_settings(data: Data, args: Namespace) -> dict:
    """Which questions, in which words. `score_file` takes these back from the settings beside a file of answers."""
    settings = {"task": data.name, "split": data.split}
    for flag in QUESTION_FLAGS:
        settings[flag] = getattr(args, flag)
    return settings


def reference_model(config) -> str:
    """Which published model a LLaVAConfig is built like (a key of PUBLISHED_MODELS). Mipha's SigLIP has no class token."""
    return "llava_phi" if config.vision.class_token else "mipha"


def generation_settings(data: Data, fingerprint: str, config, args: Namespace) -> dict:
    """All that an answer depends on. Processes and batch size are not in it: in fp32 they change nothing, and in bf16 or
    with 4-bit weights, whose product for few rows is another than that for many, one answer in some hundreds.

    fingerprint, config: of the model, a LLaVAConfig.
    """
    reference = reference_model(config)
    image_mode = args.image_mode
    if image_mode == "model":
        image_mode = config.image_mode
    elif image_mode == "paper":
        image_mode = data.task.mipha_mode if reference == "mipha" else data.task.paper_mode
    questions = []
    for example in data.examples:
        picture = example.image.name if isinstance(example.image, Path) else example.image is not None
        questions.append([example.question_id, example.prompt, picture])
    arithmetic = {"dtype": args.dtype}
    if args.bits < 16:
        arithmetic["bits"] = args.bits
    return {**question_settings(data, args), "model": fingerprint, "reference": reference, "image_mode": image_mode,
            **arithmetic, "max_new_tokens": data.task.max_new_tokens,
            "questions": short_sha256(to_json(questions).encode())}


@contextmanager
def begin(out: Path, settings: dict) -> Iterator[None]:
    """Keep the folder for this run as long as the context lasts.

    Raises ValueError when another run has it, or when it holds answers made with other settings, or what is not this
    program's.
    """
    path = out / "settings.json"
    if out.exists() and not path.exists():
        # A run that was killed at once leaves its lock, and perhaps a file that was not yet renamed.
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
        if changed:
            raise ValueError(f"{out} holds results of other settings: {'; '.join(changed)}; give another --out")
        yield


def answers_so_far(out: Path, examples: list[Example]) -> dict[int, dict]:
    """Row -> answer, of every process of this or of a killed run."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        for line in read_jsonl(path, torn=True):
            row, number = line.get("row"), line.get("question_id")
            if not isinstance(row, int) or row >= len(examples) or examples[row].question_id != number:
                raise ValueError(f"{path} answers question {number!r} in row {row!r}, which is not this task's")
            answers[row] = line
    return answers


def plan_batches(examples: list[Example], lengths: dict[int, int], rank: int, world: int,
                 batch: int) -> list[list[int]]:
    """The rows that this process answers, in batches: of like length, and those about one picture together.

    lengths: tokens of the prompt of each row that is still to be answered. Pictures are dealt to the processes in turn,
    in the order of the task and whatever is answered already, so that the split is the same after a restart.
    """
    rows_of_picture: dict[object, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        # There is no picture to share where there is none or a blank one; those are dealt out 64 rows at a time.
        no_picture = example.image is None or example.image == BLANK
        key = (example.image, row // 64) if no_picture else example.image
        rows_of_picture[key].append(row)
    groups = []
    for i, rows in enumerate(rows_of_picture.values()):
        open_rows = [row for row in rows if row in lengths]
        if i % world == rank and open_rows:
            groups.append(sorted(open_rows, key=lengths.get))
    groups.sort(key=lambda rows: (lengths[rows[-1]], min(rows)))
    in_order = [row for rows in groups for row in rows]
    return [in_order[start:start + batch] for start in range(0, len(in_order), batch)]


def open_picture(image: Path | bytes | str | None, vision, mode: str):
    """A question's picture as the tower of this VisionConfig wants it -> uint8 (1, 3, size, size), or
    (0, 3, size, size) for a question without a picture."""
    import torch

    from data import ImageConfig, load_image
    size = vision.image_size
    config = ImageConfig.of(vision, mode)
    if image is None:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    if image == BLANK:
        return torch.tensor(config.pad_color, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, size, size)
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    return load_image(source, config)[None]


def pictures_ahead(examples: list[Example], batches: list[list[int]], vision, mode: str) -> Iterator[list]:
    """The pictures of each batch, decoded while the batches before it run.

    One picture is one tensor: by its identity the model knows which questions can share the tower's work.
    """
    with ThreadPoolExecutor(4) as pool:
        decoding = {}
        for i, batch in enumerate(batches):
            upcoming = dict.fromkeys(examples[row].image for rows in batches[i:i + 3] for row in rows)
            decoding = {image: job for image, job in decoding.items() if image in upcoming}    # forget what is done
            for image in upcoming:
                if image not in decoding:
                    decoding[image] = pool.submit(open_picture, image, vision, mode)
            yield [decoding[examples[row].image].result() for row in batch]


def encode_question(example: Example, loaded: LoadedModel) -> list[int]:
    """Prompt -> token ids, the picture's positions included. ValueError if no room is left for an answer."""
    from data import encode_prompt, expand
    config = loaded.model.config
    has_image = example.image is not None
    ids = encode_prompt([example.prompt], loaded.tok, image=has_image)
    room = config.llm.block_size
    if has_image:
        room -= config.vision.n_patches
    if len(ids) >= room:
        raise ValueError(f"question {example.question_id!r} has {len(ids):,} tokens, the model room for {room - 1:,}")
    return expand(ids, None, config.vision.n_patches, config.llm.block_size)[0]


def ask(session, prompts: list[list[int]], images: list, max_new_tokens: int,
        eos_id: int) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers of a batch: (index in the batch, tokens of its answer), each as soon as it ends."""
    tokens = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    columns = session.generate(prompts, images, max_new_tokens=max_new_tokens, eos_id=eos_id)
    for column in columns:                      # one token of each prompt, None where its answer has ended
        for i in unfinished:
            if column[i] is None:
                yield i, tokens[i]
            else:
                tokens[i].append(column[i])
        unfinished = [i for i in unfinished if column[i] is not None]
    for i in unfinished:
        yield i, tokens[i]


def generate(data: Data, settings: dict, loaded: LoadedModel, todo: set[int], rank: int, world: int, args: Namespace,
             out: Path) -> None:
    """Answer the rows of `todo` that are this process's, appending each answer as it ends."""
    from tqdm import tqdm

    from lib.generate import Session
    examples = data.examples
    config = loaded.model.config
    limit = settings["max_new_tokens"]
    prompts = {row: encode_question(examples[row], loaded) for row in todo}
    lengths = {row: len(ids) for row, ids in prompts.items()}
    batches = plan_batches(examples, lengths, rank, world, args.batch)
    pictures = pictures_ahead(examples, batches, config.vision, settings["image_mode"])
    session = Session(loaded.model)             # the next batch often goes on with the last one's picture
    path = out / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
    written = path.read_bytes() if path.exists() else b""
    progress = tqdm(total=sum(map(len, batches)), desc=data.name, unit="q", disable=rank > 0)
    with open(path, "ab") as file, progress:
        file.truncate(written.rfind(b"\n") + 1)                 # a line that a kill left unfinished
        for batch, images in zip(batches, pictures):
            if args.exact:
                session = Session(loaded.model)
            for i, tokens in ask(session, [prompts[row] for row in batch], images, limit, loaded.eot_id):
                row = batch[i]
                example = examples[row]
                truncated = session.finish[i] != "stop"
                line = {"row": row, "question_id": example.question_id,
                        "prompt": example.info.get("saved", example.prompt),
                        "text": loaded.tok.decode(tokens, skip_special_tokens=True).strip(), "truncated": truncated}
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                progress.update()

# ---------------------------------------------------------------------------------------------------
# Scoring


def match_answers(path: Path, data: Data, args: Namespace) -> list[dict | None]:
    """The answer to each question of `data`; see read_answers."""
    return read_answers(path, data.examples, data.task.repeated_ids, args.limit, args.allow_missing)


def grade_answers(data: Data, answers: list[dict | None], args: Namespace, out: Path) -> list[Grade]:
    """Grade each answer by the benchmark's rule or its judge; the score is None where neither is at hand."""
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


def summarize_scored(data: Data, grades: list[Grade]) -> Score | None:
    """The benchmark's number over what was scored; None if nothing was."""
    scored = [(example, grade) for example, grade in zip(data.examples, grades) if grade.score is not None]
    if not scored:
        return None
    return data.task.summarize([example for example, _ in scored], [grade for _, grade in scored])


def asked_in_other_words(example: Example, answer: dict) -> bool:
    """Whether an answer was made with another prompt. Only two lines are compared: LLaVA saves some prompts without
    the instruction at the end."""
    saved = answer.get("prompt", example.prompt)
    return saved.removeprefix("<image>\n").split("\n")[:2] != example.prompt.split("\n")[:2]


def describe_judge(data: Data, total: Score | None, args: Namespace) -> str | None:
    """Whose grades the score is made of; None where no judge was asked."""
    if not data.task.judge or total is None:
        return None
    if args.grades:
        return f"the grades in {Path(args.grades).name}"
    return f"{args.judge_model}, asked in this project's words"


def published_scores(task: Task, settings: dict) -> dict[str, float]:
    """Name of a model -> its score; first the model that this one is to be compared with."""
    scores = {}
    for model, name in published_columns(settings.get("reference")).items():
        if model in task.published:
            scores[name] = task.published[model]
    return scores


def score(data: Data, answers: list[dict | None], args: Namespace, out: Path, settings: dict,
          run: dict | None = None) -> dict:
    """Grade, summarize, write result.json, report.html and the submission; nothing is written before all is known."""
    task = data.task
    grades = grade_answers(data, answers, args, out)
    total = summarize_scored(data, grades)
    given = [answer for answer in answers if answer]
    texts = [answer["text"] for answer in given]
    others = [asked_in_other_words(e, answer) for e, answer in zip(data.examples, answers) if answer]
    checksums, notes = data_versions(data, args)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:              # scoring alone does not load it
        versions["torch"] = sys.modules["torch"].__version__
    result = {
        "task": data.name,
        "split": data.split,
        "metric": task.metric,
        "n": len(data.examples),
        "value": total.value if total else None,
        "interval": [total.low, total.high] if total else None,
        "interval_method": f"95 %, {total.interval}" if total else None,
        "numbers": total.subscores if total else {},
        "published": published_scores(task, settings),
        "unparsed": sum(grade.unparsed for grade in grades),
        "empty": texts.count(""),
        "truncated": sum(bool(answer.get("truncated")) for answer in given),
        "missing": answers.count(None),
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
    # A submission is for the split that is published, and whole or not at all.
    published_split = data.split == next(iter(task.splits))
    if task.write_submission and (total is None or published_split) and None not in answers and not args.limit:
        try:
            result["submission"] = task.write_submission(data.examples, texts, data.folder, out).name
        except (ValueError, OSError) as e:
            notes.append(f"submission file not written: {e}")
    write_whole(out / "report.html", report_page(data.examples, answers, grades, result))
    write_whole(out / "result.json", to_json(result))
    return result

# ---------------------------------------------------------------------------------------------------
# Comparing two answers files


def load_side(path: Path, data: Data, args: Namespace) -> list[tuple[str, float | None]]:
    """Print the score of an answers file -> text and score of each answer."""
    answers = match_answers(path, data, args)
    grades = grade_answers(data, answers, args, path.parent)
    total = summarize_scored(data, grades)
    if total is None:
        raise ValueError(f"{data.name}: answers cannot be compared without the truth, which is on a server")
    print(f"{path}: {data.task.metric} {total.value:.2f} ({total.low:.2f} to {total.high:.2f})")
    return [(answer["text"] if answer else "", grade.score) for answer, grade in zip(answers, grades)]


def compare(data: Data, args: Namespace) -> None:
    """Print both scores, a paired test, and every question whose score differs."""
    if data.task.judge:
        raise ValueError(f"{data.name}: judged answers cannot be compared, grades belong to one answers file")
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
# Command line


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__)
    on_or_off = argparse.BooleanOptionalAction
    special = []
    for name, task in TASKS.items():
        if (task.paper_mode, task.mipha_mode) != ("pad", "pad"):
            special.append(f"{name} {task.paper_mode} (Mipha {task.mipha_mode})")
    add = parser.add_argument
    add("--task", help=f"one or several with commas: {', '.join(TASKS)}; paper: {', '.join(PAPER)}")
    add("--root", default="data/eval", help="folder of the benchmarks, in the layout of LLaVA's playground/data/eval")
    add("--split", help="another split than the one that the published score is on")
    add("--model", help=f"model folder; none: the first of {', '.join(map(str, USUAL_MODELS))} that is there")
    add("--out", help="folder of answers and results, of several tasks a folder each; none: out/eval/TASK")
    add("--image-mode", default="model", choices=("model", "paper", "pad", "crop", "squash"),
        help="model: as it was trained; paper: as the published scores were made, which is pad except for "
             + ", ".join(special))
    add("--bits", type=int, choices=(4, 8, 16), default=16,
        help="bits of a weight; on a GPU 8 bits save memory, not time; 16: as --dtype says")
    add("--dtype", type=dtype_name, help="fp32 or bf16; none: bf16 on a GPU that has it, fp32 on a CPU")
    add("--device", help="cpu or cuda; none: cuda where there is one")
    add("--batch", type=int, default=16, help="questions answered at a time")
    add("--exact", action=on_or_off, default=False,
        help="one question at a time and nothing shared between them, as official runs; changes nothing in fp32, "
             "unless --bits is 4")
    add("--limit", type=int, help="only the first N questions")
    add("--check-data", action=on_or_off, default=False, help="only look whether the data is there and official")
    add("--score", help="only score this answers file, ours or LLaVA's; needs no model")
    add("--compare", nargs=2, metavar=("A", "B"), help="only compare two answers files")
    add("--allow-missing", action=on_or_off, default=False, help="count missing answers as wrong instead of stopping")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.exact:
        args.batch = 1
    if args.batch < 1 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--batch {args.batch} --limit {args.limit}: expected positive numbers")
    return args


def chosen_tasks(args: Namespace) -> list[str]:
    """--task with its commas and "paper" -> names, each once. ValueError on one that is not in the table."""
    names = []
    for word in (args.task or "").split(","):
        names += PAPER if word.strip() == "paper" else [word.strip()]
    for name in names:
        if name not in TASKS:
            problem = f"{name} is unknown" if name else "is missing"
            raise ValueError(f"--task {problem}: expected one or several of {', '.join(TASKS)}, or paper")
    return list(dict.fromkeys(names))


def score_file(args: Namespace) -> None:
    """--score FILE: where settings lie beside the file they say which task it is and how it was asked."""
    path = Path(args.score)
    settings_file = path.parent / "settings.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    if settings and args.task in (None, settings.get("task")):
        for name in ("task", "split", *QUESTION_FLAGS):
            setattr(args, name, settings.get(name))
    names = chosen_tasks(args)
    if len(names) > 1:
        raise ValueError(f"--score takes one task, these are {len(names)}")
    data = load_data(names[0], args).first(args.limit)
    if args.out:
        out = Path(args.out)
    else:
        out = path.parent if settings else Path("out/eval") / f"{data.name}-{path.stem}"
    answers = match_answers(path, data, args)
    settings = settings or {**question_settings(data, args), "scored": path.name}
    # Beside the answers, their settings are those of `settings`; any other folder has to agree with them.
    with begin(out, settings) if out != path.parent else hold_folder(out):
        print_result(score(data, answers, args, out, settings), out)


class Processes(NamedTuple):
    """This process among those that torchrun started; alone without it."""
    rank: int
    world: int
    barrier: Callable[[], None]


def join_processes() -> Processes:
    """torchrun says in the environment how many there are and which one this is."""
    import torch.distributed as dist
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes(rank, world, lambda: None)
    # Only barriers go over it, and the fastest process may wait at one for hours.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Processes(rank, world, dist.barrier)


def choose_arithmetic(args: Namespace) -> None:
    """Fill in --device and --dtype. On a CPU fp32, so that batching does not change answers."""
    import torch
    here = torchrun_env()
    if args.device in (None, "cuda") and here.local_rank < torch.cuda.device_count():
        use_device(f"cuda:{here.local_rank}")               # before anything is allocated on another one
    args.device = choose_device(args.device)
    if args.device == "cuda":
        if here.local_world > torch.cuda.device_count():
            raise ValueError(f"{here.local_world} processes on a machine with {torch.cuda.device_count()} GPUs: give "
                             "torchrun one for each (--nproc_per_node)")
        args.device = f"cuda:{here.local_rank}"
    use_device(args.device)
    if args.device.startswith("cuda"):
        args.dtype = choose_dtype(args.dtype, args.device)
    else:
        args.dtype = args.dtype or "fp32"


def generate_and_score(args: Namespace) -> None:
    """Check all the data, then the model; answer what is not answered yet; score task by task."""
    tasks = [load_data(name, args) for name in chosen_tasks(args)]
    for data in tasks:
        check_images(data.first(args.limit))
    folder = find_model(args.model)
    from lib.folders import open_weights
    choose_arithmetic(args)
    source = open_weights(folder)
    fingerprint = model_fingerprint(folder)
    processes = join_processes()
    loaded = None
    results = []
    for data in tasks:
        out = Path(args.out or "out/eval")
        if len(tasks) > 1 or not args.out:
            out = out / data.name
        settings = generation_settings(data, fingerprint, source.config, args)
        # The first process holds the folder for all that torchrun started.
        with begin(out, settings) if processes.rank == 0 else nullcontext():
            processes.barrier()
            started = time.time()
            asked = range(len(data.first(args.limit).examples))
            todo = set(asked) - answers_so_far(out, data.examples).keys()
            if todo and not loaded:                         # one model for all tasks, and none if all is answered
                loaded = load(source, args)
            if todo:
                generate(data, settings, loaded, todo, processes.rank, processes.world, args, out)
            processes.barrier()
            if processes.rank == 0:
                put_in_order(out, data)
                run = {"device": args.device, "processes": processes.world, "batch": args.batch, "exact": args.exact,
                       "questions": len(todo), "seconds": round(time.time() - started, 1)}
                data = data.first(args.limit)
                answers = match_answers(out / "answers.jsonl", data, args)
                results.append(score(data, answers, args, out, settings, run))
                print_result(results[-1], out)
    if len(results) > 1:
        print_all(results)


def put_in_order(out: Path, data: Data) -> None:
    """All processes' answers into one file, in the order of the questions."""
    answers = answers_so_far(out, data.examples)
    write_whole(out / "answers.jsonl", to_jsonl(answers[row] for row in sorted(answers)))
    for path in out.glob("answers.*.jsonl"):
        path.unlink()


def main(argv: list[str] | None = None) -> None:
    """Only the last of the four needs a model."""
    args = parse(argv)
    if args.check_data:
        check_benchmarks(chosen_tasks(args), args)
    elif args.compare:
        compare(load_data(chosen_tasks(args)[0], args).first(args.limit), args)
    elif args.score:
        score_file(args)
    else:
        generate_and_score(args)


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="stopped; the same command goes on from here"))
