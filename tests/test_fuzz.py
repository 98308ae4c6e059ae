"""Whatever a client sends, the server answers in OpenAI's form, and never with a 500."""
import json

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_nb.corpus import open_text
from nanochat_nb.inference import Engine
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.server import Limits, create_app
from nanochat_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def app():
    """A random model with a short context, so that an answer takes milliseconds."""
    tok = Tokenizer.train([d.text for d in open_text(["world"], documents=30).documents("train")], 300)
    config = GPTConfig(sequence_len=48, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    engine = Engine(GPT(config, dtype=torch.float32).init_weights(1), tok)
    yield (found := create_app(engine, name="small", limits=Limits(body_bytes=10_000), hosts=("*",)))
    found.state.pool.close()


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, raise_server_exceptions=False)


TEXT = st.text(st.characters(), max_size=20)               # half surrogate pairs included
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([2**63, -1, 0, 1, 1e308])
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "developer"]) | SCALARS,
                              "content": TEXT | st.lists(st.fixed_dictionaries(
                                  {"type": st.sampled_from(["text", "python", "python_output"]), "text": TEXT}), max_size=3) | ANYTHING})
GOOD = {"temperature": st.floats(0, 2), "top_p": st.floats(0.01, 1), "min_p": st.floats(0, 1), "top_k": st.integers(1, 400),
        "max_tokens": st.integers(0, 60),
        "stop": TEXT | st.lists(TEXT, max_size=4), "seed": st.integers(-2**63, 2**63 - 1), "n": st.integers(1, 3), "stream": st.booleans(),
        "echo": st.booleans(), "logprobs": st.integers(0, 20) | st.booleans(), "top_logprobs": st.integers(0, 20),
        "model": st.sampled_from(["small", ""]) | TEXT,
        "prompt": TEXT | st.lists(TEXT, max_size=3) | st.lists(st.integers(0, 299), max_size=60),
        "messages": st.lists(TURN, max_size=4) | st.just([{"role": "user", "content": "hi"}])}
BODY = st.fixed_dictionaries({}, optional={name: field | ANYTHING for name, field in GOOD.items()})


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_no_body_breaks_it(client, path):
    """Fields that are right, nearly right, or anything at all: an answer or a complaint, and the reason for it."""
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(BODY)
    def send(body):
        body.setdefault("prompt" if path == "completions" else "messages", "x" if path == "completions" else [{"role": "user", "content": "x"}])
        response = client.post(f"/v1/{path}", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404, 413), response.text
        if response.status_code != 200:
            assert response.json()["error"]["message"]

    send()
    assert {200, 400} <= seen                              # both sides of the door were tried


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": "\\ud800", "echo": true, "logprobs": 1}',
                                  b'{"model": "\\ud800"}', b"[" * 5000, b'{"max_tokens": ' + b"9" * 5000 + b"}", b"x" * 20_000])
def test_no_bytes_break_it(client, body):
    for path in ("completions", "chat/completions"):
        response = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code < 500, response.text


def test_schemathesis_finds_no_server_error(app):
    """Requests drawn from the API's own description."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (pip install schemathesis)")
    schema, tried = schemathesis.openapi.from_asgi("/openapi.json", app), []
    for operation in (found.ok() for found in schema.get_all_operations()):

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def send(case):
            case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

        send()
        tried.append(operation.path)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"} <= set(tried)
