"""Small things that every command needs: flags, errors, files, locks. A reader of the model can skip this file.

It does without torch, so that `--help`, a mistake in a flag and the scoring of answers respond at once.
"""
import argparse
import errno
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

fcntl = None
with suppress(ImportError):
    import fcntl        # Windows does not have it

# ---------------------------------------------------------------------------------------------------
# Outside the virtual environment. Every script imports this file before any package, and old Pythons get this far.

PACKAGES = ("torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm")
ADVICE = ("activate the virtual environment (source .venv/bin/activate), or run `make demo`, which creates it and "
          "installs requirements.txt")

if sys.version_info < (3, 11):
    print(f"error: Python {sys.version.split()[0]} is too old, 3.11 or newer is needed: {ADVICE}", file=sys.stderr)
    sys.exit(2)


def explain_import(kind, error, trace) -> None:
    """One line instead of the traceback where a package is missing, or lacks what a later version has.

    Nothing is said about a Ctrl-C while packages are imported: Python then ends as programs do that have no handler.
    """
    if kind is KeyboardInterrupt:
        return
    package = error.name.partition(".")[0] if isinstance(error, ImportError) and error.name else ""
    if package not in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    lacks = "is not installed" if error.name == package and isinstance(error, ModuleNotFoundError) else "is too old"
    print(f"error: the package {package} {lacks} for {sys.executable} ({error}): {ADVICE}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = explain_import

# ---------------------------------------------------------------------------------------------------
# The command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every flag's default, and keeps the line breaks of a module's docstring.

    A default of None or "" is not shown: the flag's own help says what it means.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_value = action.default is not None and action.default != ""
        return super()._get_help_string(action) if has_value else action.help


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is a ValueError with one line instead of a page of usage.

    `run_command` prints that line. Flags cannot be abbreviated: an abbreviation that works today is ambiguous as soon
    as a second flag begins with the same letters.
    """

    def __init__(self, **kind):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kind)

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see `python {self.prog} --help`")


def at_least(least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """An argparse type: a number in this range, a whole one if `least` is an int. NaN and infinity are refused."""
    number = type(least)
    limit = f" and at most {most}" if most < sys.float_info.max else ""
    kind = "whole number" if number is int else "number"

    def read(text: str) -> float:
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a {kind} of at least {least}{limit}, found {text}")
        return value
    return read


def parse_or_exit(parse: Callable):
    """Return a script's settings, read from its command line by `parse`. A mistake, or --help, ends the program here.

    Scripts call it before they import torch, which takes seconds.
    """
    settings = []
    exit_code = run_command(lambda: settings.append(parse(None)))
    if exit_code:
        sys.exit(exit_code)
    return settings[0]


def run_command(main: Callable, *args, interrupted: str = "") -> int:
    """Call a script's main function with `args`; return the exit code of the process.

    Anything that a user's file, flag or machine can cause is raised as ValueError or OSError, and ends with one line
    and exit code 2. Every other exception is a bug of ours and keeps its traceback. interrupted: printed after Ctrl-C.
    """
    # A closed stdin or stdout is None: nothing is there to be read, and what is printed goes nowhere.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    # Names and texts may hold characters that UTF-8, or the terminal's encoding, does not have.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_code = main(*args) or 0
        if exit_code > 128:
            print_last(f"stopped by {signal.Signals(exit_code - 128).name}")
        return exit_code
    except KeyboardInterrupt:
        if interrupted:
            print_last(interrupted)
        return 130
    except BrokenPipeError:
        detach_stdout()             # somebody piped us into `head`, which has read enough
        return 0
    except (ValueError, OSError) as e:
        leave_it_to_process_0()
        filename = getattr(e, "filename", None)
        flag = flag_for(Path(filename), args) if isinstance(filename, str) else ""
        print_last(f"error: {e}{flag}")
        return 2


def detach_stdout() -> None:
    """Let stdout lead nowhere once its reader is gone. Python flushes it again on exit, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_it_to_process_0() -> None:
    """Wait for torchrun to end this process, because process 0 has met the same mistake and prints it.

    torchrun sends SIGTERM to all others as soon as one has ended. Leaving with 0 keeps them out of its list of
    failures. If nobody ends this process, the mistake was met here alone, and the caller goes on to print it: first
    one process of a node.
    """
    here = torchrun_env()
    if here.rank:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        time.sleep(10 if here.local_rank else 5)


def print_last(line: str) -> None:
    """Print the line with which a command ends.

    torchrun follows every failure with a traceback and a table, under which the line would be lost. It ends that table
    with what it finds in a file of the process, so the line goes there. It prints no table when it is about to restart
    the processes.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with suppress(OSError):         # the terminal may be gone
        if file and os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
        else:
            print(line, file=sys.stderr)


def flag_for(path: Path, args: tuple) -> str:
    """" (--out VALUE)", for the flag that leads to this path; "" if none does.

    Its value, which may be its default, is the path, the closest folder above it, or one below that could not be made.
    """
    above, below = [], []
    for settings in args:
        for name, value in vars(settings).items() if isinstance(settings, argparse.Namespace) else ():
            for place in value if isinstance(value, list) else [value]:
                if not place or not isinstance(place, (str, Path)):
                    continue
                flag = (Path(place), f" (--{name.replace('_', '-')} {place})")
                if flag[0] in (path, *path.parents):
                    above.append(flag)
                elif path in flag[0].parents:
                    below.append(flag)
    _, text = max(above or below, key=lambda flag: len(flag[0].parts), default=(path, ""))
    return text


def plural(n: int, noun: str) -> str:
    """"1 step", "2,000 steps"."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"

# ---------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, for a file or a folder. On success it is flushed to disk and renamed to
    `path`; on failure it is removed. So a crash or a full disk leaves either the old content or all of the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".writing_{path.name}")
    remove(part)
    try:
        yield part
        for written in [*part.rglob("*"), part]:
            sync_folder(written)
        if path.is_dir():
            remove(path)            # a rename replaces a file, but not a non-empty folder
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        remove(part)                # already renamed on success


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# How file systems say that they do not implement a call, or not for a folder: SMB, FUSE, Lustre, some of NFS.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EISDIR,
               errno.EPERM, errno.EACCES}


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a power failure; or a file. Some file systems cannot."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise
        kind = "folder" if path.is_dir() else "file"
        warn_once(f"this file system cannot sync a {kind} to disk ({e.strerror}): a power failure may lose what was "
                  "written last")


WARNED: set[str] = set()


def warn_once(text: str) -> None:
    """Print a warning on stderr, but not a second time."""
    if text not in WARNED:
        WARNED.add(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def write_whole(path: Path, data: str | bytes) -> Path:
    """Write a small file by `replacing` it.

    Characters that UTF-8 cannot encode (a model can produce half a surrogate pair) are written as escapes.
    """
    with replacing(path) as part:
        part.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
    return path


def append_line(path: Path, record: dict) -> None:
    """Append a line of json in one write, so that processes do not mix theirs. OSError: nothing was written."""
    line = json.dumps(record).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        before, written = file.tell(), 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        finally:
            if written < len(line):                 # the disk became full in the middle of it
                file.truncate(before)


def sha256(path: Path) -> str:
    """The checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(folder: Path) -> str:
    """A hash of a model folder's weights, config and tokenizer: whether scores are this model's."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt"):
            with open(path, "rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


LOCK = ".in_use"            # the lock file in an output folder; it names the process that writes there


@contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Create `out` and lock it while the context lasts. If another process holds it, the ValueError names that process.

    The lock is the kernel's and dies with the process, even after kill -9; the file's content only says whose it is.
    It is a POSIX record lock, not flock: forked data workers do not inherit it, so they cannot keep a folder locked
    after their parent was killed, and NFS forwards it to its server. A process can take it twice.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    while True:
        file = open(path, "a+")
        problem = "" if fcntl else "this system has no POSIX locks"
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            problem = e
            if e.errno in (errno.EAGAIN, errno.EACCES):         # the two that POSIX has for a lock that is taken
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise ValueError(f"{out} is in use by {owner}; wait for it, end it, or choose another folder") from None
        if problem:
            warn_once(f"{out} cannot be locked ({problem}): do not start a second run in it")
        # The previous holder may have deleted the file after we opened it. Then ours is unlinked, and locking it keeps
        # nobody out.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(PermissionError):         # Windows deletes no open file
                path.unlink(missing_ok=True)        # before the lock is released


JSON_LIMIT = 20_000_000     # bytes of a json file in a model folder; Phi-2's tokenizer.json has 2 MB


def read_json(path: Path, limit: int = JSON_LIMIT, kind: type | tuple[type, ...] = dict) -> dict | list:
    """Read a json file of unknown origin. ValueError names the file and says what is wrong with it.

    kind: the expected type, an object (dict) unless the caller can read a list too.
    """
    problem = ""
    if not path.is_file():
        problem = "not there, though it belongs to this folder: incomplete download or copy?"
    elif path.stat().st_size > limit:
        problem = f"{path.stat().st_size} bytes, too large for a json file of a model folder"
    if problem:
        raise ValueError(f"{path}: {problem}")
    return parse_json(path.read_bytes(), str(path), kind)


def parse_json(text: bytes, where: str, kind: type | tuple[type, ...]) -> dict | list:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        problem = (pointer_problem(text)
                   or f"not a json {'list' if kind is list else 'object'}, begins with {text[:40]!r}")
        raise ValueError(f"{where}: {problem}")
    return value


def pointer_problem(text: bytes) -> str:
    """What to do if a file that begins like this is a pointer, which git leaves in place of a large file; else ""."""
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or get it with `hf download`"
    return ""


def jsonl_rows(path: Path, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield the place ("FILE, line 3") and the object of every line that is not blank. ValueError names a bad line.

    torn: a killed process may have left an unfinished last line, which is dropped.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, dict)


def read_jsonl(path: Path, torn: bool = False) -> list[dict]:
    """The objects of a file with one json object per line; see jsonl_rows."""
    return [row for _, row in jsonl_rows(path, torn)]

# ---------------------------------------------------------------------------------------------------
# Dtype names, torchrun's processes, model folders

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}        # our name -> torch's; both are accepted on the command line


def dtype_name(text: str) -> str:
    """"fp32", "float32", "bf16" or "bfloat16" -> "fp32" or "bf16". Used as an argparse type.

    fp16 is refused: Phi-2's attention scores overflow in it, and the model answers with NaN.
    """
    for ours, torchs in DTYPES.items():
        if text in (ours, torchs):
            return ours
    raise argparse.ArgumentTypeError(f"{text}: expected fp32 or bf16; Phi-2's attention scores overflow in fp16")


class Torchrun(NamedTuple):
    rank: int               # of this process among all
    world: int              # number of processes
    local_rank: int         # of this process among those on its machine
    local_world: int


def torchrun_env() -> Torchrun:
    """Rank and world size from torchrun's environment variables; (0, 1, 0, 1) without torchrun."""
    return Torchrun(
        rank=int(os.environ.get("RANK", 0)),
        world=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


USUAL_MODELS = (Path("out/finetune"), Path("checkpoints/llava-phi"), Path("checkpoints/mipha-3b"))


def find_model(asked: str | None) -> Path:
    """The model folder that was asked for, else the first usual place that holds one."""
    if asked:
        return Path(asked)
    for folder in USUAL_MODELS:
        if any(folder.glob("*model*")):
            return folder
    demo = "; the demo's is --model out/demo/finetune" if Path("out/demo/finetune/config.json").exists() else ""
    raise ValueError("no model: neither out/finetune (made by train.py), checkpoints/llava-phi nor "
                     "checkpoints/mipha-3b is here; get a published one with `hf download zxmonent/llava-phi "
                     "--local-dir checkpoints/llava-phi` or `hf download zhumj34/Mipha-3B --local-dir "
                     "checkpoints/mipha-3b`" + demo)

# ---------------------------------------------------------------------------------------------------
# Untrusted text, shown in a terminal or on a page


def visible(text: str) -> str:
    """Escape control characters and direction marks, so that a model's text cannot act on a terminal or a page."""
    for c in set(text) - {"\n", "\t"}:
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def visible_name(name: str) -> str:
    """The same for a name that stands in the middle of a line."""
    return visible(name).replace("\n", "\\n")


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_control(text: str) -> str:
    """Drop what could move a terminal's cursor, change its colors, or reverse its text."""
    return CONTROL.sub("", text)


def html_page(title: str, body: str, style: str = "") -> str:
    """A self-contained page. Its security policy forbids scripts and requests to any host."""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title><style>
:root {{ color-scheme: light dark; --text: #222; --ground: #fff; --line: #ddd; --right: #1b7f3b; --wrong: #c0311b }}
@media (prefers-color-scheme: dark) {{
:root {{ --text: #ddd; --ground: #16181c; --line: #3a3e45; --right: #5fcb84; --wrong: #ff8a75 }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: var(--text); background: var(--ground); overflow-wrap: break-word }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ padding: .3em .8em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }}
{style}
</style></head><body><h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
