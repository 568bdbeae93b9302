"""Load on the server: answers a second for 8 clients against one client's, batches against one at a time, memory.

$ python tests/bench/serve.py --model out/demo/finetune       # after `make demo`; 20 questions a client
$ python tests/bench/serve.py --wide --questions 1 --rounds 2   # 2 layers of Phi-2's width, 32 tokens, no pictures

The server runs in a process of its own. Each client asks its next question when it has the answer to the last one;
each question of the demo is about a picture that the model has not seen. All clients ask the same questions, so their
answers are checked against each other: batches must not change them.
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


def run_server(folder: str | None, max_batch: int, pipe) -> None:
    """In a process of its own: serve the model in `folder`, or random weights of Phi-2's width, until it is ended."""
    import torch

    import serve.engine
    from data import load_tokenizer
    from lib.quant import prepack_linears
    from load_weights import load_model
    from model import LLaVAConfig, LLaVAPhi, PhiConfig, init_weights
    from serve.server import Server
    from vision import VisionConfig

    serve.engine.MAX_BATCH = max_batch
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
    options = {"max_new_tokens": 32, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "fast": False}
    server.start(serve.engine.Engine(model, tok), "bench", options)
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
            question, _ = shapes.ask(scene, scene[0], rng)
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
    folder = None if args.wide else args.model
    servers = {}
    for max_batch in (1, 8):
        ours, its = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=run_server, args=(folder, max_batch, its))
        process.start()
        servers[max_batch] = process, ours
    try:
        compare(servers, bodies, args.clients, args.rounds)
    finally:
        for process, _ in servers.values():
            process.terminate()


def compare(servers: dict, bodies: list[dict], n_clients: int, rounds: int) -> None:
    """Servers take turns, so that a busy moment of the machine hits both. The best round of each counts."""
    urls = {}
    before = {}
    for max_batch, (process, pipe) in servers.items():
        urls[max_batch] = pipe.recv()
        ask(urls[max_batch], bodies[0])                     # threads and buffers are there
        before[max_batch] = resident_memory(process.pid)
    alone = dict.fromkeys(servers, 0.0)
    together = dict.fromkeys(servers, 0.0)
    used = dict.fromkeys(servers, 0.0)                      # CPU seconds with all clients
    expected = None
    for _ in range(rounds):
        for max_batch, url in urls.items():
            rate, answers = measure(url, bodies, 1)
            alone[max_batch] = max(alone[max_batch], rate)
            start = cpu_seconds(servers[max_batch][0].pid)
            rate, same = measure(url, bodies, n_clients)
            used[max_batch] += cpu_seconds(servers[max_batch][0].pid) - start
            together[max_batch] = max(together[max_batch], rate)
            expected = expected or answers
            assert answers == same == expected, "a batch changed an answer"
    n_answers = rounds * n_clients * len(bodies)
    for max_batch, (process, _) in servers.items():
        milliseconds = 1000 * used[max_batch] / n_answers
        print(f"up to {max_batch} at a time: one client {alone[max_batch]:.2f} answers/s, {n_clients} clients "
              f"{together[max_batch]:.2f} ({milliseconds:.0f} ms of CPU each); memory {before[max_batch]:.0f} MB before, "
              f"{resident_memory(process.pid):.0f} MB after", flush=True)


if __name__ == "__main__":
    main()
