"""Benchmarks that a language model grades: grade files, a judge behind an address, a key that only the judge sees."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_benchmarks import evaluate, llava_file, prepare, write


def test_grade_files(tmp_path, capsys):
    """MM-Vet's official grade file, three runs; LLaVA's review file, one of its reviews failed."""
    flags, data = prepare("mmvet", tmp_path / "eval")
    path = llava_file(tmp_path / "a.jsonl", data, ["x", "y"])
    write(tmp_path / "grades.json", {"v1_0": {"model": [], "content": [], "score": [1.0, 0.5, 0.6]},
                                     "v1_1": {"model": [], "content": [], "score": [0.0, 0.5, 0.4]}})
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--grades", str(tmp_path / "grades.json")])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == pytest.approx(50) and result["judge"] == "the grades in grades.json"
    numbers = result["numbers"]
    assert (numbers["run 1"], numbers["set math+ocr"], numbers["rec"]) == pytest.approx((50, 70, 30))
    write(tmp_path / "grades.json", {"v1_0": {"score": [1.0]}})
    with pytest.raises(ValueError, match="no grade for v1_1"):
        evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out"), "--grades",
                 str(tmp_path / "grades.json")])

    flags, data = prepare("llavabench", tmp_path / "eval")
    path = llava_file(tmp_path / "b.jsonl", data, ["x", "y"])
    write(tmp_path / "review.jsonl", [{"question_id": 0, "category": "llava_bench_conv", "content": "8 6\nFine.",
                                       "tuple": [8.0, 6.0]},
                                      {"question_id": 1, "category": "llava_bench_detail", "content": "8, 9\n",
                                       "tuple": [-1, -1]}])
    evaluate([*flags, "--score", str(path), "--out", str(tmp_path / "out2"), "--grades",
              str(tmp_path / "review.jsonl")])
    result = json.loads((tmp_path / "out2/result.json").read_text())
    assert result["value"] == 75 and result["numbers"]["conv reference"] == 80 and result["unparsed"] == 1


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that says what the test put in `replies`; None: it never answers."""
    replies: list = []
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        reply = self.replies.pop(0)
        if reply is None:
            threading.Event().wait(1.0)
            return
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Judge.replies, Judge.asked = [], []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield ["--judge-url", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "some/judge",
           "--judge-timeout", "0.3"]
    server.shutdown()
    server.server_close()


def test_judge_is_cached_and_may_time_out(tmp_path, judge, capsys):
    flags, data = prepare("mmvet", tmp_path / "eval")
    score = [*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge]
    Judge.replies[:] = ["0.5", None]
    with pytest.raises(ValueError, match="judge at .* failed .*timed out"):
        evaluate(score)
    assert not (tmp_path / "out/result.json").exists()
    Judge.replies[:] = ["five", "1.0"]                      # the first grade is kept; the second needs two tries
    evaluate(score)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["value"] == 75 and result["judge"].startswith("some/judge") and len(Judge.asked) == 4
    assert Judge.asked[-1]["temperature"] == 0.5 and Judge.asked[0]["temperature"] == 0
    evaluate(score)                                          # all from the cache
    assert len(Judge.asked) == 4
    with pytest.raises(ValueError, match="--judge-model"):
        evaluate([*score[:-6], "--judge-url", "http://x"])


def test_llavabench_judge(tmp_path, judge):
    flags, data = prepare("llavabench", tmp_path / "eval")
    Judge.replies[:] = ["8 6\nok", "10 9\nok"]
    evaluate([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge])
    assert json.loads((tmp_path / "out/result.json").read_text())["value"] == pytest.approx(100 * 7.5 / 9)
    assert "A red picture." in Judge.asked[0]["messages"][1]["content"]


class Redirecting(BaseHTTPRequestHandler):
    """Sends every question on to `target`, and keeps the headers of all that it was sent itself."""
    target = ""
    status = 302
    seen: list = []

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append(dict(self.headers))
        self.send_response(self.status)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_judges_key_goes_to_the_judge_only(status, tmp_path, monkeypatch, capsys):
    """A judge that redirects to another server: that one gets neither the key nor the question."""
    servers = []
    handlers = []
    for _ in range(2):
        handlers.append(type("Handler", (Redirecting,), {"seen": [], "status": status}))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handlers[-1]))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
    other = f"http://127.0.0.1:{servers[1].server_port}/v1/chat/completions"
    handlers[0].target = other
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret-0123\n")
    flags, data = prepare("mmvet", tmp_path / "eval")
    score = [*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), "--judge-model", "j", "--judge-timeout", "5", "--judge-url"]
    with pytest.raises(ValueError, match="redirects to another server, http://127.0.0.1") as problem:
        evaluate([*score, f"http://127.0.0.1:{servers[0].server_port}/v1"])
    assert handlers[0].seen[0]["Authorization"] == "Bearer sk-secret-0123" and handlers[1].seen == []
    # The same for what is no web server at all, and for an address of another scheme.
    for target in ("ftp://127.0.0.1/x", "file:///etc/passwd", "https://127.0.0.1:1/x", "//127.0.0.1:1/x"):
        handlers[0].target = target
        with pytest.raises(ValueError, match="the judge at .* failed") as problem:
            evaluate([*score, f"http://127.0.0.1:{servers[0].server_port}/v1"])
        assert "sk-secret" not in str(problem.value)
    for url in ("file:///etc/passwd", "ftp://127.0.0.1", "127.0.0.1:80", "http://", "http://x:y", "http://me:pw@x"):
        with pytest.raises(ValueError, match="--judge-url") as problem:
            evaluate([*score, url])
        assert "pw" not in str(problem.value)
    printed = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "sk-secret" not in printed.out + printed.err and b"sk-secret" not in files
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_judge_may_redirect_to_itself(tmp_path, judge, monkeypatch):
    """An added slash is common; the question must arrive whole, as a POST."""
    honest = Judge.do_POST

    def do_POST(self):
        if not self.path.endswith("/"):
            return Redirecting.do_POST(self)
        return honest(self)

    for name, value in {"target": "/v1/chat/completions/", "status": 307, "seen": [], "do_POST": do_POST}.items():
        monkeypatch.setattr(Judge, name, value, raising=False)
    flags, data = prepare("mmvet", tmp_path / "eval")
    Judge.replies[:] = ["0.5", "1.0"]
    evaluate([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
             str(tmp_path / "out"), *judge])
    assert json.loads((tmp_path / "out/result.json").read_text())["value"] == 75
    assert "What is x?" in Judge.asked[0]["messages"][0]["content"]


@pytest.mark.parametrize("key", ["sk-secret\nsecond line", "Bearer sk-secret", "sk-secr\u00e9t"])
def test_an_unusable_key_is_not_repeated(key, tmp_path, judge, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    flags, data = prepare("mmvet", tmp_path / "eval")
    with pytest.raises(ValueError, match="JUDGE_API_KEY holds") as problem:
        evaluate([*flags, "--score", str(llava_file(tmp_path / "a.jsonl", data, ["x", "y"])), "--out",
                 str(tmp_path / "out"), *judge])
    assert "sk-" not in str(problem.value) and Judge.asked == []
