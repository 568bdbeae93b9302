"""Ask a model about pictures: one question, a chat in the terminal, or a page and an API for other programs.

$ python sample.py --image x.jpg                                         # chat; /help lists the commands
$ python sample.py --image x.jpg --prompt "What is this?"                # one answer on stdout, the rest on stderr
$ python sample.py --image a.jpg b.jpg --prompt "What is this?" --json   # one question, several pictures, one batch
$ python sample.py --image a.jpg b.jpg --together --prompt "Which is older?"    # one question about both
$ cat x.jpg | python sample.py --image - --prompt "What is this?"
$ python sample.py --prompt "Who wrote Faust?"                           # no picture
$ python sample.py --serve                                               # a page, and an API like OpenAI's: serve/
"""
import glob
import json
import os
import re
import select
import sys
from argparse import BooleanOptionalAction, Namespace
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lib.common import (USUAL_MODELS, Parser, at_least, dtype_name, find_model, parse_or_exit, plural,
                        run_command, without_control, write_whole)

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")      # settings of an answer, for lib.chat.answer


def parse(argv: list[str] | None) -> Namespace:
    """Parse the command line. Raises ValueError for a flag that is wrong on its own or contradicts another."""
    parser = Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--model", help=f"model folder; default: the first of {', '.join(map(str, USUAL_MODELS))} that exists")
    add("--image", nargs="+", action="extend", metavar="FILE", help="pictures, or - for stdin; default: text only")
    add("--together", action=BooleanOptionalAction, default=False, help="ask about all pictures at once, not each")
    add("--prompt", help="ask this once and exit, or - for stdin; default: chat")
    add("--max-new-tokens", type=at_least(1), default=256, help="longest answer, in tokens")
    add("--temperature", type=at_least(0.0), default=0.0, help="sampling temperature; 0: greedy")
    add("--top-k", type=at_least(0), default=0, help="sample from the k most likely tokens; 0: off")
    add("--top-p", type=at_least(1e-6, 1.0), default=1.0,
        help="sample from the most likely tokens whose probabilities add up to this")
    add("--seed", type=int, default=0, help="random seed")
    add("--dtype", type=dtype_name, metavar="{fp32,bf16}",
        help="default: bf16 if the device has instructions for it or fp32 does not fit into memory, else fp32")
    add("--device", help="cpu, cuda, cuda:1 or mps; default: the best available")
    add("--bits", type=int, choices=(4, 8, 16), default=16,
        help="bits per weight; 16: unquantized, in --dtype; 8 and 4 take half and a quarter of bf16's memory; on a "
             "GPU, 8 bits save memory but no time")
    add("--cuda-graph", action=BooleanOptionalAction, default=False,
        help="decode with CUDA graphs, faster for long answers")
    add("--choices", metavar="A,B,C|FILE", help="with --prompt: rank these answers (a list, or a file with one a line) "
        "by the probability that the model gives them, instead of generating one")
    add("--logprobs", type=at_least(0), metavar="N",
        help="with --json: each token's log-probability and the N likeliest tokens, in OpenAI's form")
    add("--look", metavar="FILE", help="with --prompt: write a page that shows where the model looks for each token")
    add("--look-layer", type=at_least(0), help="layer whose attention --look shows; default: 0")
    add("--json", action=BooleanOptionalAction, default=False, help="with --prompt: print one json object per picture")
    add("--verbose", action=BooleanOptionalAction, default=False,
        help="print time to first token, tokens per second, memory; with --serve, log questions and answers")
    add("--serve", action=BooleanOptionalAction, default=False,
        help="serve a page and an OpenAI-compatible API, whose defaults are --max-new-tokens, --temperature, --top-k "
             "and --top-p")
    add("--host", default="127.0.0.1", help="with --serve: address to listen on; any but a loopback one needs a key")
    add("--port", type=int, default=8000, help="with --serve: port to listen on; 0: any free one")
    add("--api-key", help="with --serve: key that clients must send; default: API_KEY in the environment")
    args = parser.parse_args(argv)
    problem = find_contradiction(args)
    changed = [f"--{name.replace('_', '-')}" for name in (*SAMPLING, "seed")
               if getattr(args, name) != parser.get_default(name)]
    if not problem and args.choices is not None and changed:
        problem = f"--choices generates nothing: leave out {', '.join(changed)}"
    if problem:
        parser.error(problem)
    args.sources = [args.image] if args.together else args.image or [None]      # what each question is about
    return args


def find_contradiction(args: Namespace) -> str:
    """What is wrong with flags that are right on their own, or ""."""
    pictures = args.image or []
    chatting = args.prompt is None and not args.serve
    extras = [f"--{name}" for name in ("choices", "logprobs", "look") if getattr(args, name) is not None]
    if args.serve and (args.prompt is not None or pictures or args.json):
        return ("--serve takes its questions and pictures from the page and the API: leave out --prompt, --image and "
                "--json")
    if chatting and (len(pictures) > 1 and not args.together or args.json):
        return ("a chat is about one picture and prints text: --json needs --prompt, and several pictures that or "
                "--together")
    if args.together and not pictures:
        return "--together is about the pictures of --image, and there is none"
    if extras and (args.prompt is None or len(extras) > 1 or args.logprobs is not None and not args.json):
        return f"{', '.join(extras)}: give one at a time, with --prompt, and --logprobs with --json, too"
    if args.look and (len(pictures) != 1 or args.bits < 16):
        return "--look takes one picture of --image, and needs --bits 16, since fewer bits have no gradient"
    if args.look_layer is not None and not args.look:
        return "--look-layer is a layer for --look FILE, which is not given"
    if "-" in pictures and (chatting or args.prompt == "-"):
        return "stdin carries the picture, so the question must be given as --prompt TEXT"
    return ""


if __name__ == "__main__":
    ARGS = parse_or_exit(parse)         # --help and mistakes are answered before the imports below take seconds

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data import load_tokenizer
from lib.chat import (Clock, answer, check_choices, describe_logprobs, encode_chat, open_image, pasted_path,
                      picture_file, rank)
from lib.device import choose_device, free_memory, has_bf16, torch_dtype
from lib.folders import open_weights, projector_warning
from lib.generate import Session
from lib.look import check_look, look_back, look_page
from lib.pictures import open_rgb
from load_weights import load_model
from model import LLaVAConfig

try:
    import readline                     # importing it gives input() arrow keys and a history
except ImportError:
    readline = None                     # Windows

COMMANDS = """/image PATH   start over with another picture
/reset        start over with the same picture
/save FILE    write the chat as json
/quit         leave
Ctrl-C stops an answer; a second time, or Ctrl-D, leaves."""
TAKE_PATH = ("/image", "/save")


def print_note(text: str) -> None:
    """Print to stderr. stdout carries only the answer, so that `python sample.py ... > answer.txt` saves just that."""
    print(text, file=sys.stderr, flush=True)


def print_answer(text: str, end: str = "") -> None:
    """Print a model's text as it arrives. Control characters go: a model can be made to emit escape sequences."""
    print(without_control(text), end=end, flush=True)

# ---------------------------------------------------------------------------------------------------
# One question


def ask_once(session: Session, tok: Tokenizer, images: list[Tensor], args: Namespace, sampling: dict) -> None:
    """Ask the same question about every picture. A single answer streams; several are printed when all are complete."""
    clock = Clock()
    pieces = answer(session, tok, [[args.prompt]] * len(images), images, clock, **sampling)
    if len(images) == 1 and not args.json:
        for [piece] in pieces:
            print_answer(piece)
        print()
    else:
        texts = ["".join(text) for text in zip(*pieces)]
        for source, text, scored in zip(args.sources, texts, session.scored):
            if args.json:
                row = {"image": source, "prompt": args.prompt, "answer": text}
                if args.logprobs is not None:
                    row["logprobs"] = describe_logprobs(tok, scored)
                print(json.dumps(row))
            else:
                print_answer(f"{source}: {text}", end="\n")
    if args.verbose:
        print_note(str(clock))


def rank_once(session: Session, tok: Tokenizer, images: list[Tensor], args: Namespace) -> None:
    """--choices: instead of an answer, how likely each of these is."""
    for source, image in zip(args.sources, images):
        ranked = rank(session, tok, args.prompt, image, args.choices)
        if args.json:
            print(json.dumps({"image": source, "prompt": args.prompt, "choices": ranked}))
            continue
        name = f"{source}: " if len(images) > 1 else ""
        for row in ranked:
            print_answer(f"{name}{row['p_sum']:7.2%}  {row['choice']}  (log-likelihood {row['sum']:.3f}, "
                         f"{row['mean']:.3f} a token)", end="\n")


def look_once(session: Session, tok: Tokenizer, images: list[Tensor], picture: Image.Image, args: Namespace,
              sampling: dict) -> None:
    """--look: an answer, and a page that shows where on the picture the model looked for each of its tokens."""
    layer = args.look_layer or 0
    check_look(session.model, images[0], layer)         # rather than after the answer
    ask_once(session, tok, images, args, sampling | {"logprobs": 0})
    looks = look_back(session, tok, args.prompt, images[0], layer)
    write_whole(Path(args.look), look_page(picture, args.prompt, looks, session.model.config, layer))
    print_note(f"[written: {args.look}]")

# ---------------------------------------------------------------------------------------------------
# A chat


@dataclass
class Chat:
    """A conversation in the terminal about one picture, about several together, or about none."""
    session: Session                        # keeps the KV cache: a turn computes only its new tokens
    tok: Tokenizer
    image: Tensor
    source: str | list[str] | None          # where the picture comes from
    sampling: dict
    verbose: bool = False
    turns: list[str] = field(default_factory=list)      # question, answer, question, ...

    def ask(self, question: str) -> None:
        """Stream the answer to stdout. Ctrl-C keeps the text so far; an error leaves the chat as it was."""
        turns = [*self.turns, question]
        text = ""
        clock = Clock()
        try:
            for [piece] in answer(self.session, self.tok, [turns], [self.image], clock, **self.sampling):
                text += piece
                print_answer(piece)
        except KeyboardInterrupt:
            print_note(" [stopped]")
        print(flush=True)
        if text:                            # a question without an answer would break the alternation of roles
            self.turns = [*turns, text]
        # An answer that stops in the middle of a sentence looks like a bug: say which limit it hit.
        if self.session.finish == ["length"]:
            print_note(f"[stopped after {plural(clock.steps, 'token')}: --max-new-tokens allows more]")
        elif self.session.finish == ["context"]:
            limit = self.session.model.config.llm.block_size
            print_note(f"[the model's {limit} positions are full: /reset starts over]")
        if self.verbose and clock.steps:
            print_note(str(clock))

    def obey(self, line: str) -> None:
        """Carry out a line that begins with a slash. OSError and ValueError (a bad path) leave the chat as it was."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/image" and argument:
            self.image = open_image(argument, self.session.model.config)
            self.source = argument
            self.turns = []
            print_note(f"[about {argument} from here on]")
        elif command == "/reset":
            self.turns = []
            print_note(f"[starting over, about {self.source or 'no picture'}]")
        elif command == "/save" and argument:
            path = pasted_path(argument)
            if path.exists():
                print_note(f"{path} is there already: give another name")
                return
            with open(path, "x", encoding="utf-8") as file:
                json.dump({"image": self.source, "turns": self.turns}, file, indent=1, ensure_ascii=False)
            print_note(f"[saved to {path}]")
        else:
            if command != "/help":
                print_note(f"{command} {'needs a path' if command in TAKE_PATH else 'is unknown'}; the commands are:")
            print_note(COMMANDS)

    def run(self) -> None:
        """Read questions and commands until /quit, or until Ctrl-C comes twice without a line in between."""
        if sys.stdin.isatty():
            about = self.source or "no picture"
            print_note(f"about {about if isinstance(about, str) else ' and '.join(about)}; /help lists the commands")
            let_tab_complete()
        interrupted = False
        while True:
            try:
                line = read_line().strip()
                interrupted = False
                if line.split()[:1] == ["/quit"]:
                    return
                if re.match(r"/\w*(\s|$)", line):       # a command, but not /home/me/cat.jpg
                    self.obey(line)
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:
                if interrupted:
                    print_note("")
                    return
                interrupted = True
                print_note("\n[Ctrl-C again leaves]")
            except BrokenPipeError:
                raise                                   # an OSError too, but nobody is left to read the answers
            except (ValueError, OSError) as e:
                print_note(f"error: {e} (/help)")       # a wrong path or a full context must not end the chat


def read_line() -> str:
    """Read a line: in a terminal with a prompt, history and arrow keys; from a pipe without a prompt on stdout.

    The end of the input is "/quit". Lines that are pasted together are one question: those after the first are waiting
    already.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return sys.stdin.readline() or "/quit"
    try:
        text = input("> ")
        while not text.startswith("/") and select.select([sys.stdin], [], [], 0.05)[0]:
            text += "\n" + input()
        return text
    except EOFError:
        print()                         # the shell's prompt starts a line of its own
        return "/quit"


def complete_line(line: str, state: int) -> str | None:
    """For the Tab key: the state-th way in which a command, or the path that it takes, can go on."""
    command, space, path = line.partition(" ")
    if not line.startswith("/"):
        ways = [line + "\t"]            # of a text that is pasted
    elif command in TAKE_PATH and space:
        found = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
        ways = [f"{command} {way}" + "/" * os.path.isdir(way) for way in found]
    else:
        ways = [way for way in ("/image ", "/reset", "/save ", "/quit", "/help") if way.startswith(line)]
    return [*ways, None][state]


def let_tab_complete() -> None:
    if readline:
        readline.set_completer(complete_line)
        readline.set_completer_delims("")           # complete_line gets the whole line
        uses_libedit = "libedit" in (readline.__doc__ or "")            # macOS
        readline.parse_and_bind("bind ^I rl_complete" if uses_libedit else "tab: complete")

# ---------------------------------------------------------------------------------------------------
# The command


def choose_dtype(n_parameters: int, asked: str | None, device: str, bits: int) -> tuple[str, str]:
    """--dtype, else the one that suits a model of this size on this device. Returns its name and a description.

    On a CPU a small model is fast enough in fp32, which gives the same text on every machine, and so is an 8-bit model,
    whose large matmuls are in int8. A model that does not fit into memory in fp32 runs in bf16.
    """
    dtype, why = asked or ("bf16" if has_bf16(device) else "fp32"), ""
    if not asked and device == "cpu":
        need = 1.1 * 4 * n_parameters                   # a tenth more for activations and the KV cache
        if bits == 8 or n_parameters < 100e6:
            dtype = "fp32"
        elif bits == 16 and dtype == "fp32" and need > free_memory("cpu"):
            dtype, why = "bf16", ", since fp32 does not fit into memory"
    return dtype, f"{device} in {dtype}{why}"


def prepare_question(args: Namespace, config: LLaVAConfig, tok: Tokenizer) -> tuple[list[Tensor], Image.Image | None]:
    """The pictures as the model takes them, and the one to paint on as it was given. The question is checked with them.

    This comes before the weights, which take a while to load.
    """
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if args.choices is not None:
        args.choices = check_choices(args.choices)
    sources, picture = args.sources, None
    if args.look:
        picture = open_rgb(picture_file(args.image[0]), config.vision.image_size, config.image_mode)
        picture.info = {}                               # or its EXIF data would turn it a second time
        sources = [picture]
    images = [open_image(source, config) for source in sources]
    if args.prompt is not None:
        encode_chat(config, tok, [args.prompt], images[0])
    return images, picture


def main(args: Namespace) -> None:
    folder = find_model(args.model)
    if args.serve:
        from serve.server import Server                 # imported here: only --serve needs it
        key = args.api_key if args.api_key is not None else os.environ.get("API_KEY") or None
        server = Server(args.host, args.port, key, args.verbose)    # a taken port fails before the model loads
    if args.cuda_graph and not torch.cuda.is_available():
        raise ValueError("--cuda-graph needs a CUDA device, and there is none here")
    device = choose_device(args.device)
    weights = open_weights(folder)
    tok = load_tokenizer(folder)
    images, picture = prepare_question(args, weights.config, tok)

    n_parameters = sum(prod(stored.shape) for pieces in weights.found.values() for stored in pieces.values())
    dtype, where = choose_dtype(n_parameters, args.dtype, device, args.bits)
    print_note(f"{folder} on {where}{f', weights in int{args.bits}' if args.bits < 16 else ''}")
    if warning := projector_warning(weights):
        print_note(f"warning: {warning}")
    session = Session(load_model(weights, torch_dtype(dtype), device, bits=args.bits), args.cuda_graph)

    sampling = {name: getattr(args, name) for name in SAMPLING}
    if args.serve:
        name = os.path.relpath(folder)                  # out/demo/finetune says more than finetune
        server.run(session, tok, folder.resolve().name if name.startswith(".") else name, sampling)
        return
    sampling["generator"] = torch.Generator(device).manual_seed(args.seed)
    if args.choices:
        rank_once(session, tok, images, args)
    elif args.look:
        look_once(session, tok, images, picture, args, sampling)
    elif args.prompt is not None:
        ask_once(session, tok, images, args, sampling | {"logprobs": args.logprobs})
    else:
        Chat(session, tok, images[0], args.sources[0], sampling, args.verbose).run()


if __name__ == "__main__":
    sys.exit(run_command(main, ARGS))
