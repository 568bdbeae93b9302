"""Ask a model about pictures: one question, a chat in the terminal, or a measurement of its speed.

$ python sample.py --image x.jpg                                         # chat; /help says what else it knows
$ python sample.py --image x.jpg --prompt "What is this?"                # one answer on stdout, the rest on stderr
$ python sample.py --image a.jpg b.jpg --prompt "What is this?" --json   # each picture is asked, in one batch
$ cat x.jpg | python sample.py --image - --prompt "What is this?"
$ python sample.py --prompt "Who wrote Faust?"                           # no picture
$ python sample.py --serve                                               # a page, and an API as OpenAI's: serve/
$ python sample.py --bench --bits 8
"""
import contextlib
import json
import math
import os
import re
import sys
import time
from argparse import BooleanOptionalAction, Namespace

from lib.common import (USUAL_MODELS, Parser, choose_device, choose_dtype, dtype_name, find_model, run_command,
                        torch_dtype, use_device, without_control)


def parse(argv: list[str] | None) -> Namespace:
    """The command line. ValueError in one line for what cannot be."""
    parser = Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--model", help=f"model folder; none: the first that is there of {', '.join(map(str, USUAL_MODELS))}")
    add("--image", nargs="+", action="extend", metavar="FILE", help="pictures, - for stdin; none: only words")
    add("--prompt", help="ask this once and leave, - for stdin; none: chat")
    add("--max-new-tokens", type=int, default=256, help="an answer's length at most")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="draw among so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens with this probability in total")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", type=dtype_name, metavar="{fp32,bf16}",
        help="none: bf16 where the device has instructions for it or fp32 does not fit into memory, else fp32")
    add("--device", help="cpu, cuda or mps; none: the best there is")
    add("--bits", type=int, choices=(4, 8, 16), default=16,
        help="bits of a weight: 8 and 4 take half and a quarter of bf16's memory; on a GPU 8 bits save memory, not time; "
             "16: as --dtype says")
    add("--int8", action=BooleanOptionalAction, default=False, help="the same as --bits 8")
    add("--compile", action=BooleanOptionalAction, default=False, help="CUDA graphs: faster long answers")
    add("--json", action=BooleanOptionalAction, default=False, help="one json object per picture, with --prompt")
    add("--verbose", action=BooleanOptionalAction, default=False,
        help="time to first token, tokens per second, memory; with --serve: questions and answers in the log")
    add("--serve", action=BooleanOptionalAction, default=False,
        help="a page and an OpenAI-compatible API; --max-new-tokens, --temperature, --top-k, --top-p: its defaults")
    add("--host", default="127.0.0.1", help="with --serve: where to listen; other than this machine needs a key")
    add("--port", type=int, default=8000, help="with --serve; 0: any free one")
    add("--api-key", help="with --serve: what clients have to know; none: API_KEY in the environment")
    add("--bench", action=BooleanOptionalAction, default=False, help="measure the speed instead")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if args.int8 and args.bits == 4:
        parser.error("--int8 is --bits 8, and --bits 4 was given as well: choose one")
    if args.int8:
        args.bits = 8
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature {args.temperature}: expected a number from 0")
    if args.top_k < 0:
        parser.error(f"--top-k {args.top_k}: expected a number from 0")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: expected a number above 0 and up to 1")
    if args.serve and (args.prompt is not None or args.image or args.json or args.bench):
        parser.error("--serve takes its questions and pictures from the page and the API: leave out --prompt, --image, "
                     "--json and --bench")
    chatting = args.prompt is None and not args.bench and not args.serve
    if chatting and (len(args.image or []) > 1 or args.json):
        parser.error("a chat is in words and about one picture: --json and several pictures need --prompt")
    if "-" in (args.image or []) and (chatting or args.prompt == "-"):
        parser.error("stdin brings the picture, so the question must come as --prompt TEXT")
    return args


def check_command_line() -> None:
    parse(None)


if __name__ == "__main__":
    # The imports below take seconds. `--help` and a mistake in a flag are answered before them.
    exit_code = run_command(check_command_line)
    if exit_code:
        sys.exit(exit_code)

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import load_tokenizer
from lib.chat import Clock, answer, ask, encode_chat, free_memory, open_image, peak_memory
from lib.folders import open_weights
from load_weights import load_model
from lib.generate import Session
from model import LLaVAConfig, LLaVAPhi

with contextlib.suppress(ImportError):
    # Importing readline is all it takes to give input() arrow keys and a history. Windows does not have it.
    import readline  # noqa: F401

COMMANDS = """/image PATH   look at another picture; the chat starts anew
/reset        start anew with the same picture
/save FILE    write the chat as json
/quit         leave
Ctrl-C stops an answer; a second time, or Ctrl-D, leaves."""


def print_note(text: str) -> None:
    """Whatever is not the answer goes to stderr, so that `python sample.py ... > answer.txt` holds the answer alone."""
    print(text, file=sys.stderr, flush=True)


def print_answer(text: str, end: str = "") -> None:
    """Show a model's text as it arrives. A model can be made to say escape sequences; the terminal must not obey."""
    print(without_control(text), end=end, flush=True)

# ---------------------------------------------------------------------------------------------------
# Asking


# ---------------------------------------------------------------------------------------------------
# One question


def ask_once(model: LLaVAPhi, tok: Tokenizer, images: list[Tensor], args: Namespace, options: dict) -> None:
    """Ask the same question about every picture. One answer streams; several are printed when all are complete."""
    clock = Clock()
    if len(images) == 1 and not args.json:
        for [piece] in answer(Session(model, args.compile), tok, [[args.prompt]], images, clock, **options):
            print_answer(piece)
        print()
    else:
        texts = ask(model, tok, args.prompt, images, clock=clock, **options)
        for source, text in zip(args.image or [None], texts):
            if args.json:
                print(json.dumps({"image": source, "prompt": args.prompt, "answer": text}))
            else:
                print_answer(f"{source}: {text}", end="\n")
    if args.verbose:
        print_note(str(clock))

# ---------------------------------------------------------------------------------------------------
# A chat


class Chat:
    """A conversation in the terminal about one picture, or about none."""

    def __init__(self, model: LLaVAPhi, tok: Tokenizer, image: Tensor, args: Namespace, options: dict):
        self.session = Session(model, args.compile)     # a turn computes only what is new
        self.tok = tok
        self.image = image
        self.source = args.image[0] if args.image else None
        self.verbose = args.verbose
        self.options = options
        self.turns: list[str] = []          # question, answer, question, ...

    def ask(self, question: str) -> None:
        """Stream the answer to stdout. Ctrl-C keeps what was said so far; an error leaves the chat as it was."""
        turns = [*self.turns, question]
        text = ""
        clock = Clock()
        try:
            for [piece] in answer(self.session, self.tok, [turns], [self.image], clock, **self.options):
                text += piece
                print_answer(piece)
        except KeyboardInterrupt:
            print_note(" [stopped]")
        print(flush=True)
        if text:                            # a question without any answer would break the order of speakers
            self.turns = [*turns, text]
        self.explain_the_end(clock)

    def explain_the_end(self, clock: Clock) -> None:
        """An answer that stops in the middle of a sentence looks like a defect: say which limit it met."""
        config = self.session.model.config
        if self.session.finish == ["length"]:
            print_note(f"[stopped after {clock.steps} tokens: --max-new-tokens allows more]")
        elif self.session.finish == ["context"]:
            print_note(f"[the model's {config.llm.block_size} positions are full: /reset starts anew]")
        if self.verbose and clock.steps:
            print_note(str(clock))

    def obey(self, line: str) -> None:
        """Carry out a line that begins with a slash. Raises OSError, ValueError: the chat stays as it was.

        EOFError: the user wants to leave.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/image" and argument:
            self.image = open_image(argument, self.session.model.config)
            self.source = argument
            self.turns = []
        elif command == "/reset":
            self.turns = []
        elif command == "/quit":
            raise EOFError
        elif command == "/save" and argument:
            with open(argument, "x", encoding="utf-8") as file:         # "x": never over a file that is there
                json.dump({"image": self.source, "turns": self.turns}, file, indent=1, ensure_ascii=False)
        else:
            print_note(COMMANDS)

    def run(self) -> None:
        """Read questions and commands until the input ends, or Ctrl-C comes twice without a line in between."""
        interrupted = False
        while True:
            try:
                line = read_line().strip()
                interrupted = False
                if re.match(r"/\w*(\s|$)", line):       # a command, but not /home/me/cat.jpg
                    self.obey(line)
                elif line:
                    self.ask(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                print_note("\n[Ctrl-C again leaves]")
            except BrokenPipeError:
                raise                                   # an OSError too, but nobody is left to read the answers
            except (ValueError, OSError) as e:
                print_note(f"error: {e} (/help)")       # a wrong path or a full context must not end the chat


def read_line() -> str:
    """A line with history and arrow keys in a terminal, else from the pipe: no prompt sign on stdout then."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line

# ---------------------------------------------------------------------------------------------------
# Speed and memory


def bench(model: LLaVAPhi, tok: Tokenizer, image: Tensor, options: dict, cuda_graph: bool = False,
          n: int = 32) -> dict[str, float]:
    """Speed of one answer of n tokens, the best of three.

    To write a token, the decoder reads all of its weights once, so a single answer can be no faster than the memory
    delivers them. The last row says how near to that limit it comes.
    """
    ids = encode_chat(model.config, tok, ["What is this?"], image)
    options = options | {"max_new_tokens": n}
    clocks = []
    for _ in range(3):
        clock = Clock()
        # No token has id -1, so the answer never ends early.
        for column in Session(model, cuda_graph).generate([ids], [image], eos_id=-1, **options):
            clock.tick(column)
        clocks.append(clock)
    first = min(clock.first for clock in clocks)
    rate = max(clock.rate for clock in clocks)
    bandwidth = memory_bandwidth(model.device)
    n_bytes = 0                                         # embedding and tower are not read for a further token
    for part in (model.llm.h, model.llm.lm_head):
        n_bytes += sum(tensor.nbytes for tensor in part.state_dict().values())
    return {
        "prompt tokens": len(ids),
        "seconds to first token": first,
        "tokens per second": rate,
        "peak memory, GB": peak_memory() / 1e9,
        "memory bandwidth, GB/s": bandwidth / 1e9,
        "share of it used, %": 100 * n_bytes * rate / bandwidth,
    }


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second at which this device reads 256 MB, the best of five."""
    block = torch.ones(2**26, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum().item()                              # .item() waits for the GPU
        seconds.append(time.perf_counter() - start)
    return block.nbytes / min(seconds)


def dtype_for(model: LLaVAConfig, asked: str | None, device: str, bits: int) -> tuple[str, str]:
    """--dtype, else what suits the model on this device -> its name, and what to say about it.

    On a CPU a small model is fast enough in fp32, which gives the same text on every machine, and a model in 8 bits has
    its large products in int8. A model that does not fit into memory in fp32 is computed in bf16.
    """
    dtype = choose_dtype(asked, device)
    if asked or device != "cpu":
        return dtype, f"{device} in {dtype}"
    with torch.device("meta"):                          # shapes without memory, only to count the parameters
        n_parameters = sum(p.numel() for p in LLaVAPhi(model).parameters())
    if bits == 8 or n_parameters < 100e6:
        return "fp32", "cpu in fp32"
    need = 1.1 * 4 * n_parameters                       # with a tenth for activations and the cache
    if bits == 16 and dtype == "fp32" and need > free_memory():
        return "bf16", "cpu in bf16, since fp32 does not fit into memory"
    return dtype, f"cpu in {dtype}"

# ---------------------------------------------------------------------------------------------------
# The command line


def open_server(args: Namespace) -> object:
    """Take the port that --serve will answer at. ValueError, OSError: it may not or cannot be had."""
    from serve.server import Server
    key = args.api_key if args.api_key is not None else os.environ.get("API_KEY") or None
    return Server(args.host, args.port, key, args.verbose)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = find_model(args.model)
    server = open_server(args) if args.serve else None      # a port that is taken should not be found after the load
    if args.compile and not torch.cuda.is_available():
        raise ValueError("--compile captures CUDA graphs, and there is no CUDA device here")
    device = choose_device(args.device)
    use_device(device)
    source = open_weights(folder)
    config = source.config
    tok = load_tokenizer(folder)
    dtype, where = dtype_for(config, args.dtype, device, args.bits)

    # Everything that can be wrong with the question is looked at before the weights, which take a while to load.
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    images = [open_image(source, config) for source in args.image or [None]]
    if args.prompt is not None:
        encode_chat(config, tok, [args.prompt], images[0])

    weights = f", weights in int{args.bits}" if args.bits < 16 else ""
    print_note(f"{folder} on {where}{weights}")
    model = load_model(source, torch_dtype(dtype), device, bits=args.bits)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "generator": torch.Generator(device).manual_seed(args.seed),
    }
    if server:
        server.run(model, tok, folder.resolve().name, options, args.compile)
    elif args.bench:
        image = images[0] if args.image else images[0].new_zeros(1, *images[0].shape[1:])       # black will do
        for name, value in bench(model, tok, image, options, args.compile).items():
            print(f"{name:24}{value:10.2f}")
    elif args.prompt is not None:
        ask_once(model, tok, images, args, options)
    else:
        if sys.stdin.isatty():
            print_note(f"about {args.image[0] if args.image else 'no picture'}; /help says what else can be typed")
        Chat(model, tok, images[0], args, options).run()


if __name__ == "__main__":
    sys.exit(run_command(main))
