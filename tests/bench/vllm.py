"""Does vLLM answer as we do? It serves an exported folder and is asked the demo's questions, over its HTTP API.

$ python tests/bench/vllm.py --model out/demo/finetune --root out/demo/data --vllm VENV/bin/vllm

vLLM has an environment of its own, since it wants other versions of most packages; docs/other-engines.md says what its
build for CPUs needs. Both sides compute in fp32 and greedily. vLLM's attention on a CPU takes heads of 32 and more, and
the demo's have 16, so its heads are padded with zeros in the folder that is served, which changes no answer.
"""
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import Namespace
from pathlib import Path
from urllib.error import HTTPError, URLError

sys.path[0] = str(Path(__file__).resolve().parents[2])      # this folder has a data.py and a vllm.py of its own

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.scoring import BLANK, Example, grade_plain
from benchmarks.shapes import read
from data import load_tokenizer
from lib.chat import answer, ask
from lib.common import Parser, read_json, run_command
from lib.generate import Session
from load_weights import export, load_model
from model import LLaVAPhi

SERVE = ("--model-impl", "transformers", "--limit-mm-per-prompt", '{"image": 1}',
         "--override-generation-config", '{"temperature": 0}')      # as in README.md
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}       # it reports its use
SMALLEST_HEAD = 32


def pad_heads(folder: Path) -> None:
    """Widen the decoder's heads to 32 with zeros, in a folder of one shard."""
    config = read_json(folder / "config.json")
    text = config["text_config"]
    heads, width = text["num_attention_heads"], text["hidden_size"]
    size = width // heads
    if size >= SMALLEST_HEAD:
        return

    def padded(tensor: Tensor) -> Tensor:                           # (heads * size, ...) -> (heads * 32, ...)
        wide = tensor.new_zeros(heads, SMALLEST_HEAD, *tensor.shape[1:])
        wide[:, :size] = tensor.view(heads, size, *tensor.shape[1:])
        return wide.flatten(0, 1)

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("language_model.") and ".self_attn." in name:
            if ".dense.weight" in name:
                tensors[name] = padded(tensor.T.contiguous()).T.contiguous()
            elif ".dense." not in name:
                # Scores are divided by the root of the head's size, which is another one now.
                tensors[name] = padded(tensor) * ((SMALLEST_HEAD / size) ** 0.5 if ".q_proj." in name else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for rope in (text, text["rope_parameters"]):
        rope["partial_rotary_factor"] *= size / SMALLEST_HEAD
    text["head_dim"] = SMALLEST_HEAD
    (folder / "config.json").write_text(json.dumps(config))


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def wait_until_ready(server: subprocess.Popen, url: str, seconds: int) -> None:
    """Raises ValueError if the server ends, or is not ready in time."""
    for _ in range(seconds):
        if server.poll() is not None:
            raise ValueError(f"vLLM ended with code {server.returncode}; its messages are above")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (URLError, TimeoutError):
            time.sleep(1)
    raise ValueError(f"vLLM was not ready after {seconds} s")


def their_answer(url: str, *contents: list[dict] | str) -> str:
    """The answer to question, answer, ..., question, or "HTTP 500" and the like. The server is greedy by itself."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    try:
        reply = post(f"{url}/v1/chat/completions", {"model": "m", "max_tokens": 32, "messages": messages})
    except HTTPError as e:
        return f"HTTP {e.code}"
    return reply["choices"][0]["message"]["content"].strip()


def picture(path: Path) -> dict:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def compare(model: Path, url: str, examples: list[Example]) -> None:
    ours_model, tokenizer = load_model(model), load_tokenizer(model)
    same = ours_right = theirs_right = 0
    for example in examples:
        [ours] = ask(ours_model, tokenizer, example.prompt, [example.image], max_new_tokens=32)
        theirs = their_answer(url, [picture(example.image), {"type": "text", "text": example.prompt}])
        if ours != theirs:
            print(f"{example.question_id}: {example.prompt!r}: ours {ours!r}, vLLM's {theirs!r}")
        same += ours == theirs
        ours_right += grade_plain(example, ours).score
        theirs_right += grade_plain(example, theirs).score
    print(f"{same} of {len(examples)} answers the same; right: ours {ours_right:g}, vLLM's {theirs_right:g}")
    compare_forms(ours_model, tokenizer, url, *examples[:2])


def compare_forms(model: LLaVAPhi, tokenizer: Tokenizer, url: str, example: Example, other: Example) -> None:
    """The other forms of a chat: the picture last, two turns, no picture; and what it says to two pictures."""
    image, text = picture(example.image), {"type": "text", "text": example.prompt}
    session = Session(model)

    def ours(turns: list[str], image: Path | None) -> str:
        return "".join(piece for [piece] in answer(session, tokenizer, [turns], [image], max_new_tokens=32))

    first = ours([example.prompt], example.image)
    forms = {"the picture behind the question": ([[text, image]], first),
             "two turns": ([[image, text], first, other.prompt],
                           ours([example.prompt, first, other.prompt], example.image)),
             "no picture": ([example.prompt], ours([example.prompt], None))}
    for name, (contents, expected) in forms.items():
        found = their_answer(url, *contents)
        print(f"{name}: {'the same' if found == expected else f'ours {expected!r}, vLLM found {found!r}'}")
    print(f"two pictures: {their_answer(url, [image, image, text])}")


@torch.inference_mode()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="the demo's data")
    parser.add_argument("--vllm", default="vllm", help="the program, in an environment of its own")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    examples = [example for example in read(args.root / "shapes", Namespace()) if example.image != BLANK]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export(args.model, folder, None)
        pad_heads(folder)
        length = read_json(folder / "config.json")["text_config"]["max_position_embeddings"]
        # Eager: compiling for a handful of questions takes longer than answering them.
        server = subprocess.Popen([args.vllm, "serve", str(folder), *SERVE, "--max-model-len", str(length),
                                   "--dtype", "float32", "--enforce-eager", "--port", str(args.port),
                                   "--served-model-name", "m", "--disable-uvicorn-access-log"],
                                  env=os.environ | QUIET, stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{args.port}"
            wait_until_ready(server, url, seconds=900)
            compare(args.model, url, examples[:args.questions])
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(run_command(main))
