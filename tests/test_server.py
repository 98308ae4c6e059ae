"""The server: what a client may rely on, whoever else is asking."""
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient

from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.corpus import open_text
from nanochat_nb.inference import TEMPERATURE, Engine, chat, run_folder
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import UserError
from nanochat_nb.server import (ApiError, Limits, ModelPool, Sampling, ScriptedEngine, check_port, create_app,
                                model_bytes, sampling_options)
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
