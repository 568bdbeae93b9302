"""Load on the server: answers a second for one client and for eight, CPU time of an answer, memory.

$ python tests/bench/serve.py --model out/demo/finetune       # after `make demo`; 20 questions a client
$ python tests/bench/serve.py --wide --questions 1 --rounds 2   # 2 layers of Phi-2's width, 32 tokens, no pictures

The server runs in a process of its own. Each client asks its next question when it has the answer to the last one;
each question of the demo is about a picture that the model has not seen. All clients ask the same questions, so their
answers are checked against each other.
"""
import argparse
import base64
import io
import json
import multiprocessing
import os
import random
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def run_server(folder: str | None, pipe) -> None:
    """In a process of its own: serve the model in `folder`, or random weights of Phi-2's width, until it is ended."""
    import torch

    from data import load_tokenizer
    from lib.generate import Session
    from lib.quant import prepack_linears
    from load_weights import load_model
    from model import LLaVAConfig, LLaVAPhi, PhiConfig, init_weights
    from serve.server import Server
    from vision import VisionConfig

    if folder:
        model = load_model(Path(folder))
        tok = load_tokenizer(Path(folder))
    else:
        tiny_tower = VisionConfig(image_size=56, n_layer=2, n_head=4, n_embd=64, n_inner=256)
        model = LLaVAPhi(LLaVAConfig(PhiConfig(n_layer=2, dropout=0.0), tiny_tower)).eval().requires_grad_(False)
        init_weights(model, torch.Generator().manual_seed(0))
        prepack_linears(model)                              # as load_model does
        tok = load_tokenizer(Path("demo/phi"))
    sys.stderr = open("/dev/null", "w")                     # the log
    server = Server("127.0.0.1", 0, None, False)
    server.start(Session(model), tok, "bench",
                 {"max_new_tokens": 32, "temperature": 0.0, "top_k": 0, "top_p": 1.0})
    pipe.send(server.url)
    pipe.recv()


def make_questions(n: int, with_pictures: bool) -> list[dict]:
    """Bodies of n requests."""
    from demo import shapes

    rng = random.Random(0)
    bodies = []
    for i in range(n):
        content = [{"type": "text", "text": f"What is {i}?"}]
        if with_pictures:
            scene = shapes.draw_scene(rng, held_out=True)
            question, _ = shapes.any_question(scene, scene[0], rng)
            file = io.BytesIO()
            shapes.paint(scene, rng).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        bodies.append({"messages": [{"role": "user", "content": content}]})
    return bodies


def ask(url: str, body: dict) -> str:
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def measure(url: str, bodies: list[dict], n_clients: int) -> tuple[float, list[str]]:
    """-> answers a second, and the answers, which must be the same for every client."""
    def one_client(number: int) -> list[str]:
        first = number * len(bodies) // n_clients           # each begins elsewhere: no two ask the same at a time
        order = [*range(first, len(bodies)), *range(first)]
        answers = {i: ask(url, bodies[i]) for i in order}
        return [answers[i] for i in range(len(bodies))]

    with ThreadPoolExecutor(n_clients) as pool:
        start = time.perf_counter()
        answers = list(pool.map(one_client, range(n_clients)))
        seconds = time.perf_counter() - start
    assert all(each == answers[0] for each in answers), "clients got different answers to the same questions"
    return n_clients * len(bodies) / seconds, answers[0]


def cpu_seconds(pid: int) -> float:
    """That the server has used so far: unlike answers a second, hardly changed by what else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_memory(pid: int) -> float:
    """MB; Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/finetune")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bodies = make_questions(args.questions, with_pictures=not args.wide)
    ours, its = multiprocessing.Pipe()
    folder = None if args.wide else args.model
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(folder, its))
    process.start()
    try:
        bench(ours.recv(), process.pid, bodies, args.clients, args.rounds)
    finally:
        process.terminate()


def bench(url: str, pid: int, bodies: list[dict], n_clients: int, rounds: int) -> None:
    """The best round counts; a busy moment of the machine spoils the others."""
    ask(url, bodies[0])                                     # threads and buffers are there
    before = resident_memory(pid)
    alone = 0.0
    together = 0.0
    used = 0.0                                              # CPU seconds with all clients
    for _ in range(rounds):
        rate, answers = measure(url, bodies, 1)
        alone = max(alone, rate)
        start = cpu_seconds(pid)
        rate, same = measure(url, bodies, n_clients)
        used += cpu_seconds(pid) - start
        together = max(together, rate)
        assert answers == same, "company changed an answer"
    milliseconds = 1000 * used / (rounds * n_clients * len(bodies))
    print(f"one client {alone:.2f} answers/s, {n_clients} clients {together:.2f} ({milliseconds:.0f} ms of CPU each); "
          f"memory {before:.0f} MB before, {resident_memory(pid):.0f} MB after")


if __name__ == "__main__":
    main()
