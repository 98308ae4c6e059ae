"""The server: what a client may rely on, whoever else is asking."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from live import Live, wait_until
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.corpus import open_text
from nanochat_nb.inference import TEMPERATURE, Engine, chat, run_folder
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import UserError
from nanochat_nb.server import (ApiError, Limits, ModelPool, Sampling, ScriptedEngine, check_port, create_app,
                                model_bytes, sampling_options, serve)
from nanochat_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([d.text for d in open_text(["world"], documents=30).documents("train")], 300)


@pytest.fixture
def loaders(tok):
    return {name: lambda name=name: ScriptedEngine(tok, lambda p: tok.encode(name)) for name in "abc"}


def small_model(tok):
    config = GPTConfig(sequence_len=64, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    return GPT(config, dtype=torch.float32).init_weights(1)


def submit_and_wait(worker, seconds=10):
    ended = threading.Event()
    worker.submit([65], lambda ids, finish: finish and ended.set(), max_new_tokens=9)
    return ended.wait(seconds)


def load(pool, name):
    with pool.use(name) as worker:
        return worker


def test_a_model_in_use_does_not_leave(loaders):
    pool = ModelPool(loaders, sizes=dict.fromkeys("abc", 1), budget=1)
    with pool.use("a") as worker:                    # found, and nothing submitted yet
        with pytest.raises(ApiError) as refused:
            load(pool, "b")
        assert refused.value.response.status_code == 429
        assert list(pool.workers) == ["a"] and submit_and_wait(worker)
    load(pool, "b")
    assert list(pool.workers) == ["b"] and pool.room == {"b": 1}
    with pytest.raises(ApiError):
        load(pool, "d")
    pool.close()


def test_two_that_load_at_once_share_the_budget(loaders):
    """Room is taken before loading: of two models that fit alone but not together, one is told to come back."""
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(30)
        return loaders["a"]()

    pool = ModelPool(loaders | {"a": slow}, sizes={"a": 2, "b": 2}, budget=3)
    first = threading.Thread(target=lambda: load(pool, "a"))
    first.start()
    assert begun.wait(10)
    with pytest.raises(ApiError) as refused:
        load(pool, "b")
    go_on.set()
    first.join(10)
    assert refused.value.response.status_code == 429 and list(pool.workers) == ["a"]
    load(pool, "b")
    assert list(pool.workers) == ["b"]
    pool.close()


def test_every_checkpoint_of_a_folder_of_runs_is_a_model(tmp_path, tok):
    """Loaded when asked for; of three that do not fit together the least recently used leaves."""
    for run, stages in (("one", ("base", "sft")), ("two", ("base",))):
        tok.save(tmp_path / run / "tokenizer")
        for stage in stages:
            save_checkpoint(tmp_path / run / stage, 1, model=small_model(tok), meta={"tokenizer": tok.fingerprint()})
    size = model_bytes(tmp_path / "one", "base")
    assert size > 4 * sum(p.numel() for p in small_model(tok).parameters())
    app = create_app(tmp_path, device="cpu", memory=2 * size)
    client, pool = TestClient(app), app.state.pool
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["one-sft", "one-base", "two-base"]
    for model in ("one-sft", "one-base", "one-sft", "two-base"):
        assert client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2}).status_code == 200
    assert list(pool.workers) == ["one-sft", "two-base"]
    pool.close()


def test_a_loading_model_keeps_nobody_waiting_and_loads_once(loaders):
    begun, go_on, loads = threading.Event(), threading.Event(), []

    def slow():
        loads.append(1)
        begun.set()
        assert go_on.wait(30)
        return loaders["a"]()

    pool, got = ModelPool(loaders | {"slow": slow}), []
    threads = [threading.Thread(target=lambda: got.append(load(pool, "slow"))) for _ in range(3)]
    for t in threads:
        t.start()
    assert begun.wait(10)
    other = threading.Thread(target=lambda: got.append(load(pool, "b")))
    other.start()
    other.join(10)
    assert len(got) == 1                             # "b" is here, "slow" is not
    go_on.set()
    for t in threads:
        t.join(10)
    assert len(loads) == 1 and len(got) == 4 and len({id(w) for w in got}) == 2
    pool.close()


def test_a_model_that_does_not_load_can_be_asked_for_again(loaders):
    def broken():
        raise OSError("no such file")

    pool = ModelPool(loaders | {"broken": broken})
    for _ in range(2):
        with pytest.raises(OSError):
            load(pool, "broken")
    load(pool, "a")
    assert list(pool.workers) == ["a"]
    pool.close()


@pytest.fixture(scope="module")
def engine(tok):
    return Engine(small_model(tok), tok)


def test_echo_and_log_probabilities(engine, tok):
    """Ids or text, whole or streamed, with or without new tokens: the same numbers, and as many as there are tokens."""
    client, ids = TestClient(create_app(engine)), tok.encode("one owl 🦉")
    ask = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    whole = client.post("/v1/completions", json=ask).json()["choices"][0]
    found = whole["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == len(ids) + 3
    assert any(name.startswith("bytes:\\x") for name in found["tokens"]) and whole["text"].startswith("one owl 🦉")
    prompt = client.post("/v1/completions", json=ask | {"max_tokens": 0}).json()
    assert prompt["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:len(ids)])
    assert prompt["choices"][0]["text"] == "one owl 🦉" and prompt["usage"]["completion_tokens"] == 0
    lines = client.post("/v1/completions", json=ask | {"stream": True, "prompt": [ids, ids]}).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in mine) == whole["text"]
        [given] = [chunk["logprobs"] for chunk in mine if chunk["logprobs"]]
        assert given["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:])
    assert client.post("/v1/completions", json=ask | {"logprobs": 99}).status_code == 400


def test_dials_stops_and_numbers_are_the_engines(engine, tok):
    """min_p as other servers take it; a stop string ends the row in the engine; log-probabilities are those of its steps."""
    client, prompt = TestClient(create_app(engine)), tok.encode("one owl", prepend="<|bos|>")
    greedy = dict(max_new_tokens=12, temperature=0, tools=False, logprobs=2)
    [[whole]] = engine.generate([prompt], **greedy)
    ask = {"prompt": "one owl", "max_tokens": 12, "temperature": 2, "seed": 5}
    text = lambda **more: client.post("/v1/completions", json=ask | more).json()["choices"][0]["text"]
    assert text(min_p=1) == text(temperature=0) != text() == text(min_p=0) == text(min_p=None)
    assert client.post("/v1/completions", json=ask | {"min_p": 1.1}).status_code == 400
    stop = text(temperature=0)[2:4]
    [[ended]] = engine.generate([prompt], stop=[stop], **greedy)
    answer = client.post("/v1/completions", json=ask | {"temperature": 0, "stop": ["", stop], "logprobs": 2}).json()
    [choice], told = answer["choices"], answer["choices"][0]["logprobs"]
    assert choice["text"] == text(temperature=0).split(stop)[0] and choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(ended.ids) < len(whole.ids)
    assert told["token_logprobs"] == pytest.approx([step.chosen for step in whole.logprobs][:len(told["tokens"])], abs=1e-5)


def test_every_request_lets_its_model_go(loaders):
    app = create_app(loaders, limits=Limits(choices=2))
    client, pool = TestClient(app, raise_server_exceptions=False), app.state.pool
    ask = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    for change, status in [({}, 200), ({"stream": True}, 200), ({"n": 3}, 400), ({"logprobs": True}, 400),
                           ({"stream": True, "n": 3}, 400), ({"messages": [{"role": "assistant", "content": "x"}]}, 400),
                           ({"model": "x"}, 404)]:
        assert client.post("/v1/chat/completions", json=ask | change).status_code == status
        assert not any(pool._users.values()), change
    pool.close()


SECRET = "xylophone"


def test_metrics_and_log_count_and_never_quote(tok, engine, caplog):
    """The totals are those that the clients were told; of what they said there is nothing, whatever went wrong."""
    class Broken(ScriptedEngine):
        def submit(self, prompt, **options):
            raise ValueError("no")

    caplog.set_level("INFO", logger="nanochat_nb.server")
    app = create_app({"größer": lambda: engine, "broken": lambda: Broken(tok, lambda p: [])})
    client = TestClient(app, raise_server_exceptions=False)
    ask = {"model": "größer", "prompt": f"{SECRET} one", "max_tokens": 4, "stop": SECRET, "user": SECRET}
    used = [client.post("/v1/completions", json=ask).json()["usage"] for _ in range(2)]
    client.post("/v1/completions", json=ask | {"stream": True, "n": 2})                     # whose prompt counts once
    for change in ({"model": SECRET}, {"model": "broken"}, {"max_tokens": SECRET}, {"prompt": []}, {"n": 99}):
        assert client.post(f"/v1/completions?q={SECRET}", json=ask | change).status_code >= 400
    client.get(f"/{SECRET}")
    client.get(f"/v1/models/{SECRET}")
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    numbers = dict(line.rsplit(" ", 1) for line in told.text.splitlines() if line[0] != "#")
    assert numbers['nanochat_requests_total{path="/v1/completions",model="größer",status="200"}'] == "3"
    assert numbers['nanochat_requests_total{path="/v1/completions",model="",status="404"}'] == "1"
    assert int(numbers['nanochat_prompt_tokens_total{model="größer"}']) == 3 * used[0]["prompt_tokens"]
    assert int(numbers['nanochat_completion_tokens_total{model="größer"}']) >= sum(u["completion_tokens"] for u in used)
    assert numbers['nanochat_first_token_seconds_count{model="größer"}'] == "3"
    assert numbers["nanochat_requests_waiting"] == "0" and numbers["nanochat_models_loaded"] == "2"
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "nanochat_nb.server"]
    assert [line["status"] for line in lines] == [200, 200, 200, 404, 500, 400, 400, 400, 404, 404]
    assert lines[0] | used[0] == lines[0] | {"total_tokens": used[0]["total_tokens"]} and lines[2]["complete"]
    assert SECRET not in told.text and SECRET not in json.dumps(lines)


def test_a_key_opens_everything_but_health(tok):
    client = TestClient(create_app(ScriptedEngine(tok, lambda p: [65]), api_key="open sesame"))
    ask = {"prompt": "x"}
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer open sesame"}, 200)):
        assert client.get("/v1/models", headers=headers).status_code == status
        assert client.get("/metrics", headers=headers).status_code == status
        assert client.post("/v1/completions", json=ask, headers=headers).status_code == status
        assert client.post("/v1/chat/completions", json={}, headers=headers).status_code == (status if status == 401 else 400)
    assert client.get("/health").status_code == 200


def test_others_may_not_come_in_without_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCHAT_NB_API_KEY", raising=False)
    with pytest.raises(UserError, match="NANOCHAT_NB_API_KEY"):
        serve(str(tmp_path), host="0.0.0.0")


def test_who_hangs_up_frees_a_row_and_a_full_queue_says_come_back(tok):
    """Over a real connection: two requests fill the queue, a third is refused; one hangs up, and the next gets in."""
    engine = ScriptedEngine(tok, lambda p: [65] * 10**5, max_len=10**6, delay=0.005)
    ask = {"prompt": "x", "max_tokens": 10**5}
    with Live(create_app(engine, limits=Limits(requests=2, max_tokens=10**6))) as live, httpx.Client(trust_env=False) as client:
        streams = [client.stream("POST", f"{live.address}/completions", json=ask | {"stream": True}) for _ in range(2)]
        lines = [stream.__enter__().iter_lines() for stream in streams]      # kept: a lost one hangs up
        assert all(next(line).startswith("data: ") for line in lines)
        refused = client.post(f"{live.address}/completions", json=ask)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        streams[0].__exit__(None, None, None)
        wait_until(lambda: len(engine.rows) == 1)
        assert client.post(f"{live.address}/completions", json=ask | {"n": 2}).status_code == 429      # one would fit, two do not
        with pytest.raises(httpx.TimeoutException):          # it gets in, and gives up
            client.post(f"{live.address}/completions", json=ask, timeout=0.5)
        streams[1].__exit__(None, None, None)
        wait_until(lambda: not engine.rows)
        assert client.post(f"{live.address}/completions", json=ask | {"max_tokens": 3}).status_code == 200


def test_a_server_that_stops_lets_answers_end(tok):
    engine = ScriptedEngine(tok, lambda p: tok.encode("a long answer about owls and other birds"), delay=0.02)
    with Live(create_app(engine)) as live, httpx.Client(trust_env=False) as client:
        with client.stream("POST", f"{live.address}/completions", json={"prompt": "x", "stream": True, "max_tokens": 99}) as response:
            lines = response.iter_lines()
            first = json.loads(next(lines)[6:])["choices"][0]["text"]
            live.server.should_exit = True
            rest = [line[6:] for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert first + "".join(json.loads(line)["choices"][0]["text"] for line in rest[:-1]) == "a long answer about owls and other birds"
        live.thread.join(30)
        assert not live.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            client.get(f"{live.address}/models")


def test_the_command_stops_when_it_is_told(tmp_path, tok, root):
    """The program itself: one line of log for an answer, an end without a traceback at SIGTERM."""
    tok.save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "base", 1, model=small_model(tok), meta={"tokenizer": tok.fingerprint()})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "nanochat_nb.server", "--run", str(tmp_path), "--port", str(port), "--device", "cpu"],
                               cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "base" in process.stdout.readline() and "listening" in process.stdout.readline()
        with httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=5)) as client:
            wait_until(lambda: client.get(f"http://127.0.0.1:{port}/health").status_code == 200)
            client.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": SECRET, "max_tokens": 3})
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    [line] = said.splitlines()
    assert json.loads(line)["status"] == 200 and SECRET not in said
    assert process.returncode in (0, -signal.SIGTERM)


def test_the_openai_client_works_unchanged(tok, engine):
    """The official Python client: models, whole and streamed answers, log-probabilities, errors as its own classes."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with Live(create_app(engine, name="small", api_key="key")) as live:
        client = openai.OpenAI(base_url=live.address, api_key="key", max_retries=0)
        assert [model.id for model in client.models.list()] == ["small"]
        ask = dict(model="small", messages=[{"role": "user", "content": "hi"}], max_tokens=8, seed=3, n=2)
        whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        texts = ["", ""]
        for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices] and chunk.usage == whole.usage
        assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)
        text = client.completions.create(model="small", prompt="owl", echo=True, logprobs=1, max_tokens=2, stop=["zzz"]).choices[0]
        assert text.text.startswith("owl") and len(text.logprobs.tokens) == len(tok.encode("owl")) + 2
        with pytest.raises(openai.NotFoundError, match="small"):
            client.completions.create(model="smal", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**ask, temperature=9)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=live.address, api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_no_port(port):
    with pytest.raises(UserError, match="from 1 to 65535"):
        check_port("127.0.0.1", port)


def test_a_request_without_a_temperature_gets_the_terminals():
    assert sampling_options(Sampling(), 1, 1)["temperature"] == TEMPERATURE
    assert sampling_options(Sampling(temperature=0), 1, 1)["temperature"] == 0


def test_a_run_by_name_or_folder(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert run_folder("here") == Path("here")
    assert run_folder("laptop") == root / "runs" / "laptop" and str(run_folder("runs/laptop")) == "runs/laptop"
    with pytest.raises(UserError):
        run_folder("")


def test_quit_leaves_the_terminal_chat(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    chat(SimpleNamespace(max_len=8), "sft", max_new_tokens=4)


@pytest.mark.parametrize("module, first", [("inference", "torch"), ("server", "fastapi")])
def test_an_interrupt_while_importing_is_quiet(module, first, tmp_path, root):
    """The slow import is replaced by one that is interrupted."""
    (tmp_path / f"{first}.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, "-m", f"nanochat_nb.{module}"], cwd=root, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode == -signal.SIGINT and done.stderr == ""
