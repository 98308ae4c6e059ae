"""The chat page in a real browser: type, send, see the answer stream in, stop it, see a tool call, come back to it."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import httpx                                               # noqa: E402
import uvicorn                                             # noqa: E402

from nanochat_nb.corpus import open_text                   # noqa: E402
from nanochat_nb.server import ScriptedEngine, create_app  # noqa: E402
from nanochat_nb.tokenizer import Tokenizer                # noqa: E402
from nanochat_nb.ui import STATIC, preview_page, stop_all, voila_command  # noqa: E402

LONG = " ".join(f"word{i}" for i in range(60))
HOSTILE = "<img src=x onerror=\"document.title='broken into'\"> **bold** `x < y`\n\n```python\nprint('<b>')\n```"


def free_port(count: int = 1) -> int:
    """The first of `count` neighbouring ports that nobody uses now."""
    for port in range(18000 + os.getpid() % 1000 * 10, 64000, count):
        try:
            for i in range(count):
                socket.create_server(("127.0.0.1", port + i)).close()
            return port
        except OSError:
            continue
    raise RuntimeError("no free port")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([d.text for d in open_text(["world"], documents=100).documents("train")], 400)


def script(tok: Tokenizer):
    """What the scripted model answers, by the last question."""
    s = tok.special
    tool = [*tok.encode("It is "), s("<|python_start|>"), *tok.encode("12*37"), s("<|python_end|>"),
            s("<|output_start|>"), *tok.encode("444"), s("<|output_end|>"), *tok.encode("444, said the owl 🦉")]

    def reply(prompt: list[int]) -> list[int]:
        question = tok.decode(prompt)
        question = question[question.rindex("<|user_start|>"):]
        answer = tool if "times" in question else tok.encode(HOSTILE if "hostile" in question else LONG)
        return [*answer, s("<|assistant_end|>")]
    return reply


SLOW_MS = 180_000          # a kernel takes a few seconds to start; a busy machine, minutes


@pytest.fixture(scope="module")
def page_address(tokenizer):
    """The page, over the real server with a scripted engine."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app({"owl-rl": lambda: ScriptedEngine(tokenizer, script(tokenizer), max_len=4000, delay=0.004),
                      "owl-slow": lambda: ScriptedEngine(tokenizer, script(tokenizer), max_len=4000, delay=0.06)})
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = free_port()
    env = os.environ | {"JUPYTER_PATH": str(STATIC / "jupyter"),
                        "NANOCHAT_NB_SERVER": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    voila = subprocess.Popen(voila_command(port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    address = f"http://127.0.0.1:{port}/"
    wait_until(lambda: answers(address + "static/missing"), SLOW_MS / 1000)
    yield address
    stop_all([voila])
    server.should_exit = True
    thread.join(10)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def wait_until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds} s")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, page_address):
    """A fresh visitor; requests that leave this machine and errors on the page fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(SLOW_MS)
    page, trouble = context.new_page(), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: trouble.append(r.url) if not re.match(r"(https?://127\.0\.0\.1|data:|blob:)", r.url) else None)
    visit(page, page_address)
    yield page
    context.close()
    assert not trouble, trouble


def visit(page, address: str) -> None:
    page.goto(address, timeout=SLOW_MS)
    page.wait_for_selector(".nc-picker option", state="attached", timeout=SLOW_MS)


def send(page, text: str) -> None:
    page.fill(".nc-input", text)
    page.press(".nc-input", "Enter")


def finished(page) -> None:
    page.wait_for_selector(".nc-root:not(.nc-running)", timeout=SLOW_MS)


ANSWER = ".nc-assistant:last-child .nc-body"


def test_an_answer_streams_in(page):
    page.evaluate("""() => { window.lengths = []; new MutationObserver(() => {
        const n = document.querySelector('.nc-assistant .nc-body')?.textContent.length ?? 0;
        if (n > (window.lengths.at(-1) ?? 0)) window.lengths.push(n); })
        .observe(document.querySelector('.nc-log'), {childList: true, subtree: true, characterData: true}); }""")
    page.fill(".nc-input", "Tell me")
    page.press(".nc-input", "Shift+Enter")
    page.keyboard.type("a story")
    page.press(".nc-input", "Enter")
    page.wait_for_selector(".nc-running")
    page.wait_for_function("() => window.lengths.length > 0")
    finished(page)
    assert page.inner_text(".nc-user .nc-body") == "Tell me\na story"
    assert page.inner_text(ANSWER) == LONG
    lengths = page.evaluate("window.lengths")
    assert len(lengths) >= 5 and lengths[-1] == len(LONG)    # it grew on the screen; it did not appear at once


def test_stop_keeps_what_came_and_frees_the_row(page):
    page.select_option(".nc-picker", "owl-slow")
    send(page, "Tell me a story")
    page.wait_for_function(f"() => (document.querySelector('{ANSWER}')?.textContent.length ?? 0) > 10")
    page.click(".nc-send")
    finished(page)
    kept = page.inner_text(ANSWER)
    assert LONG.startswith(kept) and len(kept) < len(LONG) / 2
    assert "Stopped" in page.inner_text(".nc-assistant:last-child")
    page.wait_for_timeout(300)
    assert page.inner_text(ANSWER) == kept                   # nothing arrives late
    send(page, "What is 12 times 37?")                       # and the next question is answered
    page.wait_for_selector(".nc-tool-out", timeout=SLOW_MS)


def test_a_tool_call_is_a_block(page):
    send(page, "What is 12 times 37?")
    finished(page)
    assert page.inner_text(f"{ANSWER} .nc-tool-in") == "12*37"
    assert page.inner_text(f"{ANSWER} .nc-tool-out") == "444"
    assert page.inner_text(ANSWER).replace("\n", " ").endswith("444, said the owl 🦉")


def test_a_models_words_are_not_html(page):
    send(page, "hostile")
    finished(page)
    assert "<img src=x" in page.inner_text(ANSWER) and page.query_selector(f"{ANSWER} img") is None
    assert page.inner_text(f"{ANSWER} strong") == "bold" and page.inner_text(f"{ANSWER} p code") == "x < y"
    assert page.inner_text(f"{ANSWER} pre").strip() == "print('<b>')" and "broken" not in page.title()


def test_conversations_stay_in_the_browser(page, page_address):
    send(page, "What is 12 times 37?")
    finished(page)
    page.click(".nc-side .nc-new")
    assert page.query_selector(".nc-message") is None
    visit(page, page_address)                                # a reload, with a new kernel
    page.click(".nc-title >> text=What is 12 times 37?")
    assert page.inner_text(f"{ANSWER} .nc-tool-out") == "444"
    page.hover(".nc-entry")
    page.click(".nc-entry .nc-button")
    assert page.query_selector(".nc-entry") is None
    assert "times" not in page.evaluate("localStorage.getItem('nanochat_nb')")


def test_edit_and_another_answer(page):
    send(page, "hostile")
    finished(page)
    page.hover(".nc-user")
    page.click(".nc-user [title^=Edit]")
    assert page.input_value(".nc-input") == "hostile"
    send(page, "What is 12 times 37?")
    page.wait_for_selector(".nc-tool-out")
    finished(page)
    assert len(page.query_selector_all(".nc-user")) == 1     # the edited question replaced the first one
    page.click(".nc-assistant:last-child [title^=Another]")
    page.wait_for_selector(".nc-running", state="attached")
    finished(page)
    assert len(page.query_selector_all(".nc-message")) == 2 and page.inner_text(f"{ANSWER} .nc-tool-out") == "444"


def test_a_phone(browser, page_address):
    context = browser.new_context(viewport={"width": 390, "height": 780}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    visit(page, page_address)
    assert page.get_attribute(".nc-root", "data-theme") == "dark"
    send(page, "hostile")
    finished(page)
    assert page.evaluate("document.querySelector('.nc-log').scrollWidth <= innerWidth")     # nothing sticks out
    assert not page.is_visible(".nc-side")
    page.click(".nc-menu")
    page.wait_for_selector(".nc-title", state="visible")
    context.close()


@pytest.fixture
def mute(browser):
    """The widget with a model that notes what it is asked, and says nothing."""
    page = browser.new_page()
    page.clock.install()
    page.set_content(preview_page([]).replace("running.add(said.id);", "window.asked = said; window.say = hear; return;"))
    page.wait_for_selector(".nc-picker option", state="attached")
    yield page
    page.close()


@pytest.mark.parametrize("trouble", ["stop", "error", "empty"])
def test_a_question_without_an_answer_is_left_out(mute, trouble):
    send(mute, "first")
    if trouble == "stop":
        mute.click(".nc-send")
    else:
        mute.evaluate("say({type: %r, id: asked.id, message: 'too long', reason: 'stop'})"
                      % {"error": "error", "empty": "done"}[trouble])
    assert "left out" in mute.inner_text(".nc-assistant:last-child")
    send(mute, "second")
    assert mute.evaluate("asked.messages") == [{"role": "user", "content": "second"}]
    mute.evaluate("say({type: 'delta', id: asked.id, parts: [{type: 'text', text: 'Yes.'}]})")
    mute.evaluate("say({type: 'done', id: asked.id, reason: 'stop'})")
    send(mute, "third")
    assert [m["role"] for m in mute.evaluate("asked.messages")] == ["user", "assistant", "user"]


def test_a_page_that_nothing_answers_says_so(mute):
    send(mute, "are you there?")
    assert not mute.is_visible(".nc-notice")
    mute.clock.fast_forward(9000)
    assert "run_all.sh chat" in mute.inner_text(".nc-notice") and mute.is_visible(".nc-notice button")
    mute.evaluate("say({type: 'heard', id: asked.id})")
    assert not mute.is_visible(".nc-notice")
    assert mute.title() == "nanochat"


def test_two_tabs_share_their_conversations(page, page_address):
    other = page.context.new_page()
    visit(other, page_address)
    for tab, text in ((other, "hostile"), (page, "What is 12 times 37?")):
        send(tab, text)
        tab.wait_for_selector(".nc-assistant")
        finished(tab)
    for tab in (page, other):
        tab.wait_for_function("() => document.querySelectorAll('.nc-entry').length === 2")
    visit(page, page_address)
    assert len(page.query_selector_all(".nc-entry")) == 2


@pytest.mark.parametrize("offset", [0, 1])
def test_a_port_in_use_is_the_reason_given(offset, root, tmp_path, monkeypatch):
    port = free_port(2)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", port + offset)):
        done = start(root, port)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"error: cannot listen on 127.0.0.1:{port + offset} (" in done.stderr
    assert list(tmp_path.glob("nanochat_nb-chat-*")) == []                 # no empty folder stays behind


def test_no_port_for_the_model(root):
    done = start(root, 65535)
    assert done.returncode == 1 and done.stderr.startswith("error: --port 65535") and len(done.stderr.splitlines()) == 1


def start(root, port: int):
    return subprocess.run([sys.executable, "-m", "nanochat_nb.ui", "--run", "runs/none", "--port", str(port)], cwd=root,
                          capture_output=True, text=True, timeout=60)


def heed_interrupts() -> None:
    """A suite started in the background ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_one_command_starts_everything_and_stops_it(browser, tokenizer, tmp_path, root):
    """A trained run's folder, the real command, the real engine; then Ctrl-C."""
    from nanochat_nb.checkpoint import save_checkpoint
    from nanochat_nb.model import GPT, GPTConfig
    tokenizer.save(tmp_path / "tiny" / "tokenizer")
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1,
                          n_embd=32, window_pattern="SL"))
    model.init_weights(0)
    save_checkpoint(tmp_path / "tiny" / "sft", 1, model=model, meta={"tokenizer": tokenizer.fingerprint()})
    port = free_port(2)
    log = open(tmp_path / "log", "w+")
    both = subprocess.Popen([sys.executable, "-m", "nanochat_nb.ui", "--run", str(tmp_path / "tiny"), "--port", str(port)],
                            cwd=root, stdout=log, stderr=subprocess.STDOUT,
                            preexec_fn=heed_interrupts)
    try:
        wait_until(lambda: "chat with it" in (tmp_path / "log").read_text() or both.poll() is not None, SLOW_MS / 1000)
        page = browser.new_page()
        page.set_default_timeout(SLOW_MS)
        visit(page, f"http://127.0.0.1:{port}/")
        assert page.input_value(".nc-picker") == "tiny-sft"
        send(page, "Who are you?")
        page.wait_for_function(f"() => (document.querySelector('{ANSWER}')?.textContent.length ?? 0) > 0")
        finished(page)
        assert page.query_selector(".nc-error") is None
        page.close()
    finally:
        both.send_signal(signal.SIGINT)
        both.wait(60)
    assert both.returncode == 0, (tmp_path / "log").read_text()
    for address in (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}/health"):
        assert not answers(address)
