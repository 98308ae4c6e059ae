"""The server when many ask at once, when something fails in the middle, and when clients leave."""
import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from live import Live, wait_until
from nanochat_nb.server import Limits, ScriptedEngine, create_app


def asking(app):
    """A client without a network: all its requests run on one event loop, as behind a socket."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://testserver/v1")


async def until_done(tasks, count, seconds=20):
    """Wait until `count` of the tasks have an answer; whether that happened."""
    deadline = asyncio.get_running_loop().time() + seconds
    while sum(task.done() for task in tasks) < count and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    return sum(task.done() for task in tasks) >= count


def test_a_crowd_that_waits_for_one_model_blocks_no_other(tok):
    """More requests wait for a loading model than the framework has threads; another model answers all the same."""
    go_on, loads = threading.Event(), []

    def slow():
        loads.append(1)
        assert go_on.wait(60)
        return ScriptedEngine(tok, lambda p: [65])

    app = create_app({"fast": lambda: ScriptedEngine(tok, lambda p: [65]), "slow": slow}, limits=Limits(requests=80))

    async def ask_all():
        async with asking(app) as client:
            ask = lambda model: client.post("/completions", json={"model": model, "prompt": "x"})
            crowd = [asyncio.create_task(ask("slow")) for _ in range(100)]
            try:
                assert await until_done(crowd, 20)            # who found no place: counted before the model is there
                answer = await asyncio.wait_for(ask("fast"), 20)
            finally:
                go_on.set()
            return answer.status_code, sorted([answer.status_code for answer in await asyncio.gather(*crowd)])

    assert asyncio.run(ask_all()) == (200, [200] * 80 + [429] * 20)
    assert len(loads) == 1 and app.state.pool.asked == 0
    app.state.pool.close()


def test_all_who_wait_are_told_when_a_model_does_not_load(tok):
    begun, go_on, loads = threading.Event(), threading.Event(), []

    def broken():
        loads.append(1)
        begun.set()
        assert go_on.wait(60)
        raise OSError("no such file")

    app = create_app({"broken": broken})

    async def ask_all():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver/v1") as client:
            crowd = [asyncio.create_task(client.post("/completions", json={"prompt": "x"})) for _ in range(5)]
            await asyncio.sleep(0.1)
            crowd[0].cancel()                                 # one gives up: the others go on waiting
            await asyncio.sleep(0.1)
            go_on.set()
            return [answer.status_code for answer in await asyncio.gather(*crowd[1:])]

    assert asyncio.run(ask_all()) == [500] * 4 and len(loads) == 1
    assert app.state.pool.room == {} and app.state.pool.asked == 0
    app.state.pool.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_holds_for_requests_of_the_same_moment(tok, stream):
    """Looking and taking are one: of twenty that come before the first has begun, four get in."""
    go_on = threading.Event()
    app = create_app(ScriptedEngine(tok, lambda p: [65] if go_on.wait(60) else []), limits=Limits(requests=4))

    async def ask_all():
        async with asking(app) as client:
            crowd = [asyncio.create_task(client.post("/completions", json={"prompt": "x", "stream": stream})) for _ in range(20)]
            await until_done(crowd, 16, seconds=10)
            go_on.set()
            return sorted([answer.status_code for answer in await asyncio.gather(*crowd)])

    assert asyncio.run(ask_all()) == [200] * 4 + [429] * 16 and app.state.pool.asked == 0
    whole = TestClient(app).post("/v1/completions", json={"prompt": "x", "n": 5})      # nobody is there: it gets in
    assert whole.status_code == 200 and len(whole.json()["choices"]) == 5
    app.state.pool.close()


@pytest.mark.parametrize("extra, rows", [({}, 1), ({"n": 2, "prompt": ["x", "y"]}, 4)])
def test_who_hangs_up_before_any_text_frees_the_rows(tok, extra, rows):
    """Tokens that give no text: no event ever says that the answer goes on."""
    engine = ScriptedEngine(tok, lambda p: [tok.special("<|bos|>")] * 10**5, max_len=10**6, delay=0.005)
    app = create_app(engine, limits=Limits(max_tokens=10**6))
    with Live(app) as live, httpx.Client(trust_env=False) as client:
        with pytest.raises(httpx.TimeoutException):
            client.post(f"{live.address}/completions", json={"prompt": "x", "max_tokens": 10**5} | extra, timeout=1)
        assert engine.requests == rows
        wait_until(lambda: not engine.rows and not app.state.pool.asked, seconds=10)


def test_a_stream_that_fails_says_so(engine, monkeypatch, caplog):
    """Whatever goes wrong after the first byte: one event with the error, without its text, and no end as if all were well."""
    def out_of_memory(*_):
        raise RuntimeError("the secret of somebody")

    monkeypatch.setattr("nanochat_nb.server.token_scores", out_of_memory)
    caplog.set_level("INFO")
    ask = {"prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 2, "stream": True}
    answer = TestClient(create_app(engine)).post("/v1/completions", json=ask)
    *_, last = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert json.loads(last)["error"]["type"] == "server_error"
    assert any('"error": "RuntimeError"' in record.getMessage() for record in caplog.records)
    assert any('"complete": false' in record.getMessage() for record in caplog.records)
    assert "secret" not in answer.text + caplog.text


def test_ctrl_c_while_a_model_loads_is_quiet():
    """Python must not end under a thread in which torch works: that would abort the process."""
    program = """if True:
        import signal, time, torch
        from nanochat_nb.server import ModelPool
        signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's job in the background ignores it
        def load():
            print("loading", flush=True)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                torch.randn(500, 500) @ torch.randn(500, 500)
        with ModelPool({"a": load}).use():
            pass
    """
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "loading\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode in (1, -signal.SIGINT) and "terminate" not in told, told
