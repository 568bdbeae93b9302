"""Ask a model about pictures: one question, a chat in the terminal, or a measurement of its speed.

$ python sample.py --image x.jpg                                         # chat; /help says what else it knows
$ python sample.py --image x.jpg --prompt "What is this?"                # one answer on stdout, the rest on stderr
$ python sample.py --image a.jpg b.jpg --prompt "What is this?" --json   # each picture is asked, in one batch
$ cat x.jpg | python sample.py --image - --prompt "What is this?"
$ python sample.py --prompt "Who wrote Faust?"                           # no picture
$ python sample.py --bench --int8
"""
import argparse
import contextlib
import io
import json
import math
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
from model import LLaVAConfig, LLaVAPhi, Prefix

with contextlib.suppress(ImportError):
    import readline                 # not on Windows; gives input() its arrow keys and history

HELP = """/image PATH   look at another picture; the chat starts anew
/reset        start anew with the same picture
/save FILE    write the chat as json
Ctrl-C stops an answer; a second time, or Ctrl-D, leaves."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")     # could move a terminal's cursor
MAX_CHARACTERS = 32_000             # of a question; 2,048 positions hold about 8,000


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(text: str, end: str = "") -> None:
    print(CONTROL.sub("", text), end=end, flush=True)

# ---------------------------------------------------------------------------------------------------
# Asking


class Text:
    """Ids in, text out as soon as it is certain. All pieces together are tok.decode(all ids).strip()."""
    def __init__(self, tok: Tokenizer):
        self.tok, self.open, self.held, self.begun = tok, [], "", False

    def add(self, i: int | None) -> str:
        """The next id, or None for the end -> what can be said now."""
        self.open += [] if i is None else [i]
        text = self.tok.decode(self.open, skip_special_tokens=True)
        if i is not None and text.endswith("\ufffd"):       # bytes of a character that is not complete yet
            return ""
        text = self.held + text if self.begun else text.lstrip()
        new = text.rstrip()
        self.open, self.held, self.begun = [], text[len(new):], self.begun or bool(new)    # space may be at the end
        return new


class Clock:
    """Time to the first token, tokens per second."""
    def __init__(self):
        self.start, self.first, self.last, self.n = time.perf_counter(), 0.0, 0.0, 0

    def tick(self) -> None:
        self.n, self.last = self.n + 1, time.perf_counter() - self.start
        self.first = self.first or self.last

    @property
    def rate(self) -> float:
        return (self.n - 1) / (self.last - self.first) if self.n > 1 else 0.0

    def __str__(self) -> str:
        return (f"first token {self.first:.2f} s | {self.n} tokens | {self.rate:.1f} tokens/s | "
                f"peak memory {peak_memory() / 1e9:.1f} GB")


def encode(config: LLaVAConfig, tok: Tokenizer, turns: list[str], image: Tensor) -> list[int]:
    """Question, answer, ..., question about an image (0 or 1, 3, S, S) -> packed ids. ValueError: cannot be asked."""
    if not turns[-1].strip():
        raise ValueError("the question is empty")
    if len(turns[-1]) > MAX_CHARACTERS:
        raise ValueError(f"the question has {len(turns[-1]):,} characters, expected at most {MAX_CHARACTERS:,}")
    turns[-1].encode()                                      # half a character from the terminal is a ValueError too
    return expand(encode_prompt(turns, tok, len(image) > 0), None, config.vision.n_patches, config.llm.block_size)[0]


def answer(model: LLaVAPhi, tok: Tokenizer, chats: list[list[str]], images: list[Tensor], clock: Clock,
           **options) -> Iterator[list[str]]:
    """Answer the last question of every chat, in one batch: yields what each of them newly says, step by step.

    chats: question, answer, question, ... per row; images[i] (0 or 1, 3, S, S) uint8; options: of LLaVAPhi.generate.
    Raises ValueError: a chat leaves no room for an answer, or its question cannot be asked.
    """
    prompts = [encode(model.config, tok, turns, image) for turns, image in zip(chats, images)]
    texts = [Text(tok) for _ in chats]
    for column in model.generate(prompts, images, eos_id=eot_id(tok), **options):
        clock.tick()
        yield ["" if i is None else text.add(i) for text, i in zip(texts, column)]
    yield [text.add(None) for text in texts]


def open_image(source: str | None, config: LLaVAConfig) -> Tensor:
    """A path as people type, paste or drag it, "-" for stdin, or None -> (1 or 0, 3, S, S) uint8."""
    S = config.vision.image_size
    if source is None:
        return torch.zeros(0, 3, S, S, dtype=torch.uint8)
    text = source.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif re.match(r"[a-z]+://|data:", text, re.IGNORECASE):
        raise ValueError(f"{text[:80]} is an address, and nothing here uses the network: download it and give the file")
    path, unescaped = Path(text).expanduser(), Path(re.sub(r"\\(.)", r"\1", text)).expanduser()    # my\ cat.jpg
    path = unescaped if unescaped.exists() and not path.exists() else path
    return load_image(io.BytesIO(sys.stdin.buffer.read()) if text == "-" else path, S, config.image_mode)[None]

# ---------------------------------------------------------------------------------------------------
# Once, as a chat, or for the clock


def once(model: LLaVAPhi, tok: Tokenizer, images: list[Tensor], args: argparse.Namespace, options: dict) -> None:
    """Every picture is asked the same. One answer streams; several are printed when all are there."""
    alone, said, clock = len(images) == 1 and not args.json, [""] * len(images), Clock()
    for pieces in answer(model, tok, [[args.prompt]] * len(images), images, clock, **options):
        said = [text + piece for text, piece in zip(said, pieces)]
        if alone and pieces[0]:
            show(pieces[0])
    if alone:
        print()
    for source, text in zip(args.image or [None], [] if alone else said):
        if args.json:
            print(json.dumps({"image": source, "prompt": args.prompt, "answer": text}))
        else:
            show(f"{source}: {text}", end="\n")
    if args.verbose:
        say(str(clock))


class Chat:
    """One picture at most, and everything said about it so far."""
    def __init__(self, model: LLaVAPhi, tok: Tokenizer, image: Tensor, args: argparse.Namespace, options: dict):
        self.model, self.tok, self.image, self.source = model, tok, image, args.image and args.image[0]
        self.verbose, self.options = args.verbose, options
        self.turns: list[str] = []
        self.memory: list[Prefix] = []                      # keys and values so far: a turn computes only what is new

    def ask(self, question: str) -> None:
        """Stream the answer to stdout. Ctrl-C keeps what was said so far; an error leaves the chat as it was."""
        turns, said, clock, block_size = [*self.turns, question], "", Clock(), self.model.config.llm.block_size
        pieces = answer(self.model, self.tok, [turns], [self.image], clock, memory=self.memory, **self.options)
        try:
            for (piece,) in pieces:
                said += piece
                show(piece)
        except KeyboardInterrupt:
            pieces.close()
            say(" [stopped]")
        print(flush=True)
        self.turns = [*turns, said] if said else self.turns
        if clock.n == self.options["max_new_tokens"]:
            say(f"[stopped after {clock.n} tokens: --max-new-tokens allows more]")
        elif self.memory and len(self.memory[0].ids) + 1 >= block_size:
            say(f"[the model's {block_size} positions are full: /reset starts anew]")
        if self.verbose and clock.n:
            say(str(clock))

    def obey(self, command: str, rest: str) -> None:
        if command == "/image" and rest:
            self.image, self.source, self.turns = open_image(rest, self.model.config), rest, []
        elif command == "/reset":
            self.turns = []
        elif command == "/save" and rest:
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
                if re.match(r"/\w*(\s|$)", line):           # but not /home/me/cat.jpg
                    self.obey(*(part.strip() for part in line.partition(" ")[::2]))
                elif line:
                    self.ask(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                say("\n[Ctrl-C again leaves]")
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as e:              # the chat goes on
                say(f"error: {e} (/help)")


def read_line() -> str:
    """A line with history and arrow keys in a terminal, else from the pipe: no prompt sign on stdout then."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def bench(model: LLaVAPhi, tok: Tokenizer, image: Tensor, options: dict, n: int = 32) -> dict[str, float]:
    """Speed of one answer of n tokens (the best of three), and what share of the memory bandwidth decoding reaches."""
    ids, clocks, seconds = encode(model.config, tok, ["What is this?"], image), [], []
    for _ in range(3):
        clocks.append(Clock())
        for _ in model.generate([ids], [image], eos_id=-1, **options | {"max_new_tokens": n}):
            clocks[-1].tick()
    block = torch.ones(2**26, device=model.device)
    for _ in range(5):
        start = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - start)
    first, rate, bandwidth = min(c.first for c in clocks), max(c.rate for c in clocks), block.nbytes / min(seconds)
    read = sum(t.nbytes for part in (model.llm.h, model.llm.lm_head) for t in part.state_dict().values())
    return {"prompt tokens": len(ids), "seconds to first token": first, "tokens per second": rate,
            "peak memory, GB": peak_memory() / 1e9, "memory bandwidth, GB/s": bandwidth / 1e9,
            "share of it used, %": 100 * read * rate / bandwidth}

# ---------------------------------------------------------------------------------------------------
# The machine and the command line


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource                                         # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text()).group(1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose(args: argparse.Namespace, config: LLaVAConfig) -> tuple[str, str]:
    """Device and dtype: what was asked for, else what is there and what fits."""
    if args.dtype in ("fp16", "float16"):
        raise ValueError("--dtype fp16: Phi-2's attention scores overflow in fp16; take bf16 or fp32")
    dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, args.dtype)
    if dtype not in (None, "fp32", "bf16"):
        raise ValueError(f"--dtype {args.dtype}: expected fp32 or bf16")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    device = args.device or ("cuda" if cuda else "mps" if mps else "cpu")
    here = ["cpu", *["cuda"] * cuda, *["mps"] * mps]
    if device.split(":")[0] not in here:
        raise ValueError(f"--device {device}: expected one of {', '.join(here)}")
    if args.compile and not cuda:
        raise ValueError("--compile captures CUDA graphs, and there is no CUDA device here")
    with torch.device("meta"):
        need = 4.4 * sum(p.numel() for p in LLaVAPhi(config).parameters())         # bytes, and a tenth for the rest
    fits = args.int8 or need < free_memory()
    return device, dtype or ("fp32" if device == "cpu" and fits else "bf16")


def find_model(given: str | None) -> Path:
    usual = [Path("out/finetune"), Path("checkpoints/llava-phi")]
    if found := [Path(given)] if given else [folder for folder in usual if any(folder.glob("*model*"))]:
        return found[0]
    raise ValueError("no model: neither out/finetune (made by train.py) nor checkpoints/llava-phi is here; "
                     "get the published one with `hf download zxmonent/llava-phi --local-dir checkpoints/llava-phi`")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    def add(name: str, text: str, **kind) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **kind)

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see `python sample.py --help`")

    parser.error = fail
    add("--model", "model folder; none: out/finetune if it is there, else checkpoints/llava-phi")
    add("--image", "pictures, - for stdin; none: only words", nargs="+", action="extend", metavar="FILE")
    add("--prompt", "ask this once and leave, - for stdin; none: chat")
    add("--max-new-tokens", "an answer's length at most", type=int, default=256)
    add("--temperature", "0: always the likeliest token", type=float, default=0.0)
    add("--top-k", "draw among so many likeliest tokens; 0: all", type=int, default=0)
    add("--top-p", "draw within so much probability", type=float, default=1.0)
    add("--seed", "of the draws", type=int, default=0)
    add("--dtype", "fp32 or bf16; none: bf16 on a GPU, fp32 on a CPU if it fits into memory, else bf16")
    add("--device", "cpu, cuda or mps; none: the best there is")
    add("--int8", "weights in 8 bits, a quarter of the memory", action=flag, default=False)
    add("--compile", "CUDA graphs: faster long answers", action=flag, default=False)
    add("--json", "one json object per picture, with --prompt", action=flag, default=False)
    add("--verbose", "time to first token, tokens per second, memory", action=flag, default=False)
    add("--bench", "measure the speed instead", action=flag, default=False)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0 or not 0 < args.top_p <= 1:
        fail("expected --max-new-tokens from 1, --temperature and --top-k from 0, --top-p above 0 and up to 1")
    if args.prompt is None and not args.bench and (len(args.image or []) > 1 or args.json):
        fail("a chat is in words and about one picture: --json and several pictures need --prompt")
    if "-" in (args.image or []) and args.prompt in (None, "-") and not args.bench:
        fail("stdin brings the picture, so the question must come as --prompt TEXT")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = find_model(args.model)
    config, tok = load_config(folder), load_tokenizer(folder)
    device, dtype = choose(args, config)
    args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    images = [open_image(source, config) for source in args.image or [None]]       # before the model: that takes longer
    if args.prompt is not None:
        encode(config, tok, [args.prompt], images[0])
    say(f"{folder} on {device} in {'int8 and ' if args.int8 else ''}{dtype}")
    model = load_model(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device, args.int8)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
               "top_p": args.top_p, "fast": args.compile, "generator": torch.Generator(device).manual_seed(args.seed)}
    if args.bench:
        image = images[0] if args.image else images[0].new_zeros(1, *images[0].shape[1:])
        for name, value in bench(model, tok, image, options).items():
            print(f"{name:24}{value:10.2f}")
    elif args.prompt is not None:
        once(model, tok, images, args, options)
    else:
        Chat(model, tok, images[0], args, options).run()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                 # `| head`: whoever reads has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
