"""Ask a model about pictures: one question, a chat in the terminal, or a measurement of its speed.

$ python sample.py --image x.jpg                                         # chat; /help says what else it knows
$ python sample.py --image x.jpg --prompt "What is this?"                # one answer, on stdout; all the rest is on stderr
$ python sample.py --image a.jpg b.jpg --prompt "What is this?" --json   # each picture is asked the same, in one batch
$ cat x.jpg | python sample.py --image - --prompt "What is this?"
$ python sample.py --prompt "Who wrote Faust?"                           # no picture
$ python sample.py --bench --int8
"""
import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import encode_prompt, eot_id, expand, load_image, load_tokenizer
from load_weights import load_config, load_model
from model import LLaVAPhi, Prefix

HELP = """/image PATH   look at another picture; the chat starts anew
/reset        start anew with the same picture
/save FILE    write the chat as json
/help         this
Ctrl-C stops an answer; a second time, or Ctrl-D, leaves."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")     # what could move a terminal's cursor
MAX_CHARACTERS = 32_000             # of a question; 2,048 positions hold about 8,000


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

# ---------------------------------------------------------------------------------------------------
# Asking


class Text:
    """Ids in, text out as soon as it is certain. The pieces together are tok.decode(all ids).strip()."""
    def __init__(self, tok: Tokenizer):
        self.tok, self.open, self.held, self.said = tok, [], "", ""

    def add(self, i: int | None) -> str:
        """The next id, or None for the end -> what can be said now."""
        self.open += [] if i is None else [i]
        text = self.tok.decode(self.open, skip_special_tokens=True)
        if i is not None and text.endswith("\ufffd"):       # the bytes of a character that is not complete yet
            return ""
        self.open, self.held = [], self.held + text
        new = self.held if self.said else self.held.lstrip()
        new, self.held = new.rstrip(), new[len(new.rstrip()):]                     # space may turn out to be at the end
        self.said += new
        return new


class Clock:
    """Counts steps: time to the first token, tokens per second."""
    def __init__(self):
        self.start, self.first, self.last, self.n = time.perf_counter(), 0.0, 0.0, 0

    def tick(self) -> None:
        self.n += 1
        self.last = time.perf_counter() - self.start
        self.first = self.first or self.last

    @property
    def rate(self) -> float:
        return (self.n - 1) / (self.last - self.first) if self.n > 1 else 0.0

    def __str__(self) -> str:
        return f"first token {self.first:.2f} s | {self.n} tokens | {self.rate:.1f} tokens/s | peak memory {peak_memory() / 1e9:.1f} GB"


def encode(model: LLaVAPhi, tok: Tokenizer, turns: list[str], image: Tensor) -> list[int]:
    """Question, answer, ..., question about an image (0 or 1, 3, S, S) -> packed ids. ValueError: more than the model's positions."""
    return expand(encode_prompt(turns, tok, len(image) > 0), None, model.config.vision.n_patches, model.config.llm.block_size)[0]


def answer(model: LLaVAPhi, tok: Tokenizer, chats: list[list[str]], images: list[Tensor], clock: Clock, **options) -> Iterator[list[str]]:
    """Answer the last question of every chat, in one batch: yields what each of them newly says, step by step.

    chats: question, answer, question, ... per row; images[i] (0 or 1, 3, S, S) uint8; options: of LLaVAPhi.generate.
    Raises ValueError: a chat leaves no room for an answer.
    """
    texts, prompts = [Text(tok) for _ in chats], [encode(model, tok, turns, image) for turns, image in zip(chats, images)]
    for column in model.generate(prompts, images, eos_id=eot_id(tok), **options):
        clock.tick()
        yield [text.add(i) if i is not None else "" for text, i in zip(texts, column)]
    yield [text.add(None) for text in texts]


def open_image(source: str, model: LLaVAPhi) -> Tensor:
    """A path as people type, paste or drag it, or "-" for stdin -> (1, 3, S, S) uint8."""
    text = source.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif re.match(r"[a-z]+://|data:", text, re.IGNORECASE):
        raise ValueError(f"{text[:80]} is an address, and nothing here uses the network: download it, then give the file")
    path = Path(text).expanduser()
    if not path.exists() and Path(re.sub(r"\\(.)", r"\1", text)).expanduser().exists():  # my\ cat.jpg
        path = Path(re.sub(r"\\(.)", r"\1", text)).expanduser()
    file = io.BytesIO(sys.stdin.buffer.read()) if text == "-" else path
    return load_image(file, model.config.vision.image_size, model.config.image_mode)[None]


def no_image(model: LLaVAPhi) -> Tensor:
    S = model.config.vision.image_size
    return torch.zeros(0, 3, S, S, dtype=torch.uint8)


def check_question(text: str) -> str:
    if not text.strip():
        raise ValueError("the question is empty")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the question has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    return text

# ---------------------------------------------------------------------------------------------------
# What the command line does


def once(model: LLaVAPhi, tok: Tokenizer, args: argparse.Namespace, options: dict) -> None:
    """Every picture is asked the same. One answer streams; several are printed when all are there."""
    sources, prompt = args.image or [None], check_question(sys.stdin.read() if args.prompt == "-" else args.prompt)
    images = [open_image(source, model) if source else no_image(model) for source in sources]
    stream = len(sources) == 1 and not args.json
    said, clock = [""] * len(sources), Clock()
    for pieces in answer(model, tok, [[prompt]] * len(sources), images, clock, **options):
        said = [text + piece for text, piece in zip(said, pieces)]
        if stream and pieces[0]:
            print(CONTROL.sub("", pieces[0]), end="", flush=True)
    if stream:
        print()
    for source, text in zip(sources, said if not stream else []):
        print(json.dumps({"image": source, "prompt": prompt, "answer": text}) if args.json else
              CONTROL.sub("", f"{source}: {text}"))
    if args.verbose:
        say(str(clock))


class Chat:
    """One picture at most, and everything said about it so far."""
    def __init__(self, model: LLaVAPhi, tok: Tokenizer, image: str | None, options: dict, verbose: bool):
        self.model, self.tok, self.options, self.verbose = model, tok, options, verbose
        self.source, self.image = image, open_image(image, model) if image else no_image(model)
        self.turns: list[str] = []
        self.memory: list[Prefix] = []                      # keys and values so far: each turn computes only what is new

    def ask(self, question: str) -> None:
        """Stream the answer to stdout. Ctrl-C keeps what was said; an error leaves the chat as it was."""
        turns, said, clock = [*self.turns, check_question(question)], "", Clock()
        pieces = answer(self.model, self.tok, [turns], [self.image], clock, memory=self.memory, **self.options)
        try:
            for (piece,) in pieces:
                said += piece
                print(CONTROL.sub("", piece), end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
            say(" [stopped]")
        print()
        self.turns = [*turns, said] if said else self.turns
        if self.memory and len(self.memory[0].ids) + 1 >= self.model.config.llm.block_size:
            say(f"[the {self.model.config.llm.block_size} positions of the model are full: /reset starts anew]")
        elif clock.n == self.options["max_new_tokens"]:
            say(f"[stopped after {self.options['max_new_tokens']} tokens: --max-new-tokens allows more]")
        if self.verbose and clock.n:
            say(str(clock))

    def command(self, name: str, rest: str) -> None:
        if name == "/image" and rest:
            self.image, self.source, self.turns = open_image(rest, self.model), rest, []
        elif name == "/reset":
            self.turns = []
        elif name == "/save" and rest:
            with open(rest, "x", encoding="utf-8") as file:
                json.dump({"image": self.source, "turns": self.turns}, file, indent=1, ensure_ascii=False)
        else:
            say(HELP)

    def run(self) -> None:
        leaving = False
        while True:
            try:
                line = read_line().strip()
                leaving = False
                if line.startswith("/") and not Path(line.split()[0]).exists():
                    self.command(*line.partition(" ")[::2])
                elif line:
                    self.ask(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                say("\n[Ctrl-C again leaves]")
            except (ValueError, OSError) as e:              # the chat goes on
                say(f"error: {e}")


def read_line() -> str:
    """A line with history and arrow keys in a terminal, else one from the pipe: a prompt has no place on stdout then."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def bench(model: LLaVAPhi, tok: Tokenizer, image: Tensor, n: int = 32) -> dict[str, float]:
    """Speed of one answer of n tokens, and what share of the memory bandwidth decoding reaches."""
    ids, runs = encode(model, tok, ["What is this?"], image), []
    for _ in range(3):
        clock = Clock()
        for _ in model.generate([ids], [image], max_new_tokens=n, eos_id=-1):
            clock.tick()
        runs.append(clock)
    first, rate = min(run.first for run in runs), max(run.rate for run in runs)
    block = torch.ones(2**28, dtype=torch.uint8, device=model.device).view(torch.int64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - start)
    weights = sum(t.nbytes for part in (model.llm.h, model.llm.ln_f, model.llm.lm_head) for t in [*part.parameters(), *part.buffers()])
    bandwidth = block.nbytes / min(seconds)
    return {"prompt tokens": len(ids), "seconds to first token": first, "tokens per second": rate,
            "peak memory GB": peak_memory() / 1e9, "bandwidth GB/s": bandwidth / 1e9, "share of bandwidth": weights * rate / bandwidth}

# ---------------------------------------------------------------------------------------------------
# The machine, the command line


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource                     # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text()).group(1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose(args: argparse.Namespace, folder: Path) -> tuple[str, torch.dtype]:
    """Device and dtype: what was asked for, else what is there and what fits."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if args.dtype in ("fp16", "float16"):
        raise ValueError("--dtype fp16: Phi-2's attention scores overflow in fp16; take bf16 or fp32")
    if args.dtype not in (None, "fp32", "bf16"):
        raise ValueError(f"--dtype {args.dtype}: expected fp32 or bf16")
    with torch.device("meta"):
        need = 4 * sum(p.numel() for p in LLaVAPhi(load_config(folder)).parameters())
    fits = args.int8 or 1.1 * need < free_memory()
    name = args.dtype or ("fp32" if device == "cpu" and fits else "bf16")
    why = "" if args.dtype or device != "cpu" or fits else f" (fp32 needs {1.1 * need / 1e9:.1f} GB, {free_memory() / 1e9:.1f} GB are free)"
    say(f"{folder} on {device}, {'int8 weights, ' if args.int8 else ''}{name}{why}")
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def find_model(given: str | None) -> Path:
    if given:
        return Path(given)
    for folder in (Path("out/finetune"), Path("checkpoints/llava-phi")):
        if folder.exists():
            return folder
    raise ValueError("no model: neither out/finetune (from train.py) nor checkpoints/llava-phi is here; get the published one with "
                     "`hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi`, or make a small one with `make demo`")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction

    def add(name: str, text: str, **kind) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **kind)

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see `python sample.py --help`")

    parser.error = fail
    add("--model", "model folder; none: out/finetune if it is there, else checkpoints/llava-phi")
    add("--image", "picture files, or - for stdin; none: talk without a picture", nargs="+", action="extend", metavar="FILE")
    add("--prompt", "ask this once and leave, - for stdin; none: chat")
    add("--max-new-tokens", "length of an answer at most", type=int, default=256)
    add("--temperature", "0: always the likeliest token", type=float, default=0.0)
    add("--top-k", "draw among so many likeliest tokens; 0: all", type=int, default=0)
    add("--top-p", "draw within this much probability", type=float, default=1.0)
    add("--seed", "of the draws", type=int, default=0)
    add("--dtype", "fp32 or bf16; none: bf16 on a GPU, on a CPU fp32 if it fits")
    add("--device", "cpu, cuda or mps; none: the best there is")
    add("--int8", "weights in 8 bits: a quarter of the memory", action=flag, default=False)
    add("--json", "with --prompt: one json object per picture", action=flag, default=False)
    add("--verbose", "time to first token, tokens per second, memory", action=flag, default=False)
    add("--bench", "measure the speed instead", action=flag, default=False)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        fail("expected --max-new-tokens of 1 or more, --temperature and --top-k of 0 or more, --top-p above 0 and up to 1")
    if args.prompt is None and not args.bench and (len(args.image or []) > 1 or args.json):
        fail("a chat is about one picture, in words: several pictures and --json need --prompt")
    if "-" in (args.image or []) and args.prompt in (None, "-") and not args.bench:
        fail("stdin brings the picture, so the question must come as --prompt TEXT")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = find_model(args.model)
    device, dtype = choose(args, folder)
    tok, model = load_tokenizer(folder), load_model(folder, dtype, device, args.int8)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
               "generator": torch.Generator(device).manual_seed(args.seed)}
    if args.bench:
        image = open_image(args.image[0], model) if args.image else torch.zeros(1, *no_image(model).shape[1:], dtype=torch.uint8)
        for name, value in bench(model, tok, image).items():
            print(f"{name:24}{value:10.2f}")
    elif args.prompt is not None:
        once(model, tok, args, options)
    else:
        Chat(model, tok, args.image[0] if args.image else None, options, args.verbose).run()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:             # `| head`: whoever read has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
