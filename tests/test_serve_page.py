"""The page in a real browser: drop a picture, ask, read the answer as it comes, ask again, stop, make mistakes.

Drives a headless Chromium over the DevTools pipe, with nothing but the standard library. Skipped where no Chromium or
Chrome is installed. With SCREENSHOTS=FOLDER in the environment it leaves pictures of the page there.
"""
import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers import GOLDEN, GOLDEN_ANSWER
from test_serve import start_long_answer

from lib.generate import Session
from serve.server import Server

PHOTO = GOLDEN / "images/photo.jpg"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DEFAULTS = {"max_new_tokens": 16, "temperature": 0.0, "top_k": 0, "top_p": 1.0}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


class Browser:
    """A headless Chromium with one tab. `call` sends a DevTools command, `js` evaluates an expression in the page."""

    def __init__(self, profile: Path):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        ours_in, its_out = os.pipe()
        its_in, ours_out = os.pipe()
        # The protocol is fixed: the browser reads file descriptor 3 and writes 4.
        script = f"exec {BROWSER} {' '.join(flags)} about:blank 3<&{its_in} 4>&{its_out}"
        self.process = subprocess.Popen(["bash", "-c", script], pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        self.input, self.output = ours_out, ours_in
        self.buffer, self.number, self.session = b"", 0, None
        self.requests: list[str] = []           # every address that the page asked for
        self.errors: list[str] = []             # what the page threw or logged as an error
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.output], [], [], max(0, deadline - time.monotonic()))
                assert ready, f"the browser does not answer {method}"
                self.buffer += os.read(self.output, 1 << 20)
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.note(answer)

    def note(self, event: dict) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if event["method"] == "Log.entryAdded" and params["entry"]["source"] == "security":
            self.errors.append(params["entry"]["text"])

    def js(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                           userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 30):
        """Wait until the expression is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"not true: {expression}; {self.js('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith('{url}') && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", shift: bool = False) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def enter(self) -> None:
        self.press("Enter", 13, "\r")

    def tab(self) -> str:
        """Move the focus on. -> the id of what has it now"""
        self.press("Tab", 9)
        return self.js("document.activeElement.id || document.activeElement.textContent")

    def drop(self, path: Path) -> None:
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def screenshot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            time.sleep(0.3)
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.input)
            os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(tiny_model, tiny_tokenizer):
    server = Server("127.0.0.1", 0, None, False)
    server.start(Session(tiny_model), tiny_tokenizer, "tiny", DEFAULTS)
    yield server
    server.stop()


LAST = "document.querySelector('#chat li.model:last-child .text').textContent"
DONE = "!document.querySelector('#send').hidden && document.querySelectorAll('#chat .note').length"


@pytest.fixture
def page(browser, server):
    """Freshly opened, and at the end: no request to elsewhere, nothing thrown, nothing that the policy forbade."""
    browser.requests.clear()
    browser.errors.clear()
    browser.open(server.url)
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    browser.js("document.querySelector('#length').value = 32")
    yield browser
    assert not browser.errors
    assert all(url.startswith((server.url, "data:")) for url in browser.requests), browser.requests


def test_drop_ask_read_and_ask_again(page, tiny_model):
    seen = []
    handle = tiny_model.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    page.drop(PHOTO)
    page.until("!document.querySelector('#preview').hidden")
    assert page.js("document.activeElement.id") == "question"
    page.type("What is this?")
    page.enter()
    page.until(f"{DONE} === 1")
    assert page.js(LAST).startswith(GOLDEN_ANSWER)
    assert "32 tokens" in page.js("document.querySelector('#chat .note').textContent")
    assert page.js("document.querySelector('#spoken').textContent").startswith("Answer: or!")
    page.type("Why?")
    page.enter()
    page.until(f"{DONE} === 2")
    assert page.js("turns.length") == 4 and page.js(LAST)
    assert sum(seen) == 1
    handle.remove()
    page.js("document.querySelector('#new-chat').click()")
    assert page.js("document.querySelectorAll('#chat li').length") == 0
    assert page.js("document.querySelector('#preview').hidden && document.querySelector('#name').textContent === HINT")


def test_an_answer_streams_and_stop_keeps_what_was_said(page, server):
    page.js("document.querySelector('#length').max = 2000; document.querySelector('#length').value = 2000")
    page.type("Tell me all.")
    page.enter()
    page.until("document.querySelector('#state').textContent.includes('tokens/s')")
    half = page.js(LAST)
    assert half and page.js("document.querySelector('#send').hidden")
    page.js("document.querySelector('#stop').click()")
    page.until(f"{DONE} === 1")
    assert "stopped" in page.js("document.querySelector('#chat .note').textContent")
    assert page.js(LAST).startswith(half)
    deadline = time.monotonic() + 10
    while server.line:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    page.js("document.querySelector('#length').value = 16")
    page.type("And then?")
    page.enter()
    page.until(f"{DONE} === 2")


def test_an_answer_comes_after_another_users(page, server):
    other = start_long_answer(server)
    page.type("Who?")
    page.enter()
    page.until("document.querySelector('#state').textContent.includes('Waiting')")
    other.close()
    page.until(f"{DONE} === 1")


def test_keyboard_alone(page):
    assert page.js("document.activeElement.id") == "question"
    for key in "one":
        page.press(key, ord(key.upper()), key)          # as a keyboard types: no handler may take the keys away
    page.press("Enter", 13, "\r", shift=True)           # a new line, not sent
    page.type("two")
    assert page.js("document.querySelector('#question').value") == "one\ntwo"
    order = [page.tab() for _ in range(12)]
    for name in ("send", "show-settings", "new-chat", "file"):
        assert name in order, order
    page.js("document.querySelector('#question').focus()")
    page.js("document.querySelector('#length').max = 2000; document.querySelector('#length').value = 2000")
    page.enter()
    page.until(f"document.querySelector('#chat li.model .text') && {LAST}.length > 20")
    page.press("Escape", 27)
    page.until(f"{DONE} === 1")


def test_a_pasted_picture_and_a_copied_answer(page):
    page.js("""(() => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0))], '', {type: 'image/jpeg'}));
        document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
    })()""" % base64.b64encode(PHOTO.read_bytes()).decode())
    page.until("!document.querySelector('#preview').hidden")
    page.type("What is this?")
    page.enter()
    page.until(f"{DONE} === 1")
    assert page.js(LAST).startswith(GOLDEN_ANSWER)
    page.js("document.querySelector('#chat .note button').click()")
    page.until("document.querySelector('#chat .note button').textContent === 'Copied'")


def test_mistakes_are_said_in_words(page, tmp_path):
    wrong = "document.querySelector('#wrong').textContent"
    (tmp_path / "notes.txt").write_text("no picture")
    page.drop(tmp_path / "notes.txt")
    page.until(f"{wrong}.includes('notes.txt is not a picture')")
    for name, content in (("fake.jpg", b"no picture either"), ("cut.png", b"\x89PNG\r\n\x1a\n"), ("empty.gif", b""),
                          ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>")):
        (tmp_path / name).write_bytes(content)
        page.drop(tmp_path / name)                      # said at once, not after a question about it
        page.until(f"{wrong}.includes('{name} is not a picture: expected JPEG, PNG')")
        assert page.js("document.querySelector('#preview').hidden && picture === null")
    page.drop(PHOTO)
    page.until("!document.querySelector('#preview').hidden")
    assert page.js(f"{wrong} === ''")
    page.js("picture = 'data:image/jpeg;base64,aGVsbG8='")         # what a browser shows and the server cannot read
    page.type("What is this?")
    page.enter()
    page.until(f"{wrong}.includes('unreadable')")
    assert page.js("document.querySelector('#question').value") == "What is this?"      # to be sent again
    assert page.js("turns.length") == 0 and page.js("document.querySelectorAll('#chat li').length") == 0
    page.screenshot("mistake")
    page.js("document.querySelector('#new-chat').click()")
    assert page.js("document.querySelector('#wrong').textContent === ''")


def test_the_box_is_as_high_as_the_question(page, server):
    """Also when a question comes back into it because no answer came."""
    height = "document.querySelector('#question').offsetHeight"
    fits = "document.querySelector('#question').scrollHeight <= document.querySelector('#question').clientHeight"
    low = page.js(height)
    page.js("picture = 'data:image/jpeg;base64,aGVsbG8='")
    page.type("What is this? " * 12)
    high = page.js(height)
    assert high > low and page.js(fits)
    page.enter()
    page.until("document.querySelector('#wrong').textContent.includes('unreadable')")
    assert page.js(height) == high and page.js(fits)
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=False)
    page.until(f"{fits} && {height} > {high}")
    page.js("picture = null")
    page.js("document.querySelector('#length').value = 3")
    page.enter()
    page.until(f"{DONE} === 1")
    assert page.js(height) == low


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844), (844, 390)])
def test_the_picture_stays_in_sight(page, server, width, height):
    """However long the conversation is, and on a phone, too."""
    page.open(server.url, width, height)
    page.drop(PHOTO)
    page.until("!document.querySelector('#preview').hidden")
    page.js("for (let i = 0; i < 40; i++) addTurn(i % 2 ? 'model' : 'mine', '', 'What is this? '.repeat(9))")
    box = page.js("JSON.stringify(document.querySelector('#preview').getBoundingClientRect())")
    top, bottom = (json.loads(box)[side] for side in ("top", "bottom"))
    page.screenshot(f"long-{width}")
    assert page.js("document.querySelector('#main').scrollTop") > 100
    assert 0 <= top < bottom <= height / 2
    assert page.js("document.documentElement.scrollHeight") <= height           # one scroll bar is enough
    last = page.js("JSON.stringify(document.querySelector('#chat li:last-child').getBoundingClientRect())")
    assert bottom < json.loads(last)["bottom"] <= height


def test_the_page_has_the_models_name(page):
    assert page.js("document.title") == page.js("document.querySelector('h1').textContent") == "tiny"


def test_text_is_never_markup(page, server, tmp_path, monkeypatch):
    """Neither a question, nor an answer, nor a file's name, nor the server's words."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    monkeypatch.setattr("serve.server.until_stop", lambda pieces, stops: ((markup, 0, False) for _ in pieces))
    path = tmp_path / "<b>bold<img src=x>.jpg"
    path.write_bytes(PHOTO.read_bytes())
    page.drop(path)
    page.until("!document.querySelector('#preview').hidden")
    page.type(markup)
    page.enter()
    page.until(f"{DONE} === 1")
    assert page.js("document.querySelector('#chat li.mine .text').textContent") == markup
    assert markup in page.js(LAST) and "<b>bold" in page.js("document.querySelector('#name').textContent")
    assert page.js("document.querySelectorAll('#chat img, #chat script, figure b').length") == 0


def test_a_key_is_asked_for(browser, tiny_model, tiny_tokenizer):
    server = Server("127.0.0.1", 0, "k", False)
    server.start(Session(tiny_model), tiny_tokenizer, "tiny", DEFAULTS)
    browser.open(server.url)
    browser.until("document.querySelector('#wrong').textContent.includes('API key')")
    assert browser.js("document.activeElement.id") == "key"
    browser.type("k")
    browser.enter()
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    browser.until("document.querySelector('#wrong').textContent === ''")
    server.stop()
    browser.js("document.querySelector('#question').focus()")
    browser.type("Still there?")
    browser.enter()
    browser.until("document.querySelector('#wrong').textContent.includes('cannot be reached')")


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(page, server, width, height, dark):
    name = f"{width}-{'dark' if dark else 'light'}"
    page.open(server.url, width, height, dark)
    page.until("document.querySelector('#model').textContent === 'tiny'")
    page.screenshot(f"empty-{name}")
    page.js("document.querySelector('#length').value = 32; document.querySelector('#show-settings').click()")
    page.screenshot(f"settings-{name}")
    page.js("document.querySelector('#show-settings').click()")
    page.drop(PHOTO)
    page.until("!document.querySelector('#preview').hidden")
    page.js("document.querySelector('#question').focus()")
    page.type("What is in this picture? " + "w" * 200)
    page.enter()
    page.until(f"{DONE} === 1")
    page.screenshot(f"chat-{name}")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("document.querySelector('#send').getBoundingClientRect().right") <= width
    assert page.js("document.querySelector('#question').getBoundingClientRect().bottom") <= height
