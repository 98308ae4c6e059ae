"""The server's form: what OpenAI's clients may send and rely on, and what is refused rather than ignored."""
import json
import time
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from nanochat_nb.inference import Logprob
from nanochat_nb.runtime import UserError
from nanochat_nb.server import ScriptedEngine, create_app, listed_ids, serve, text_logprobs


@pytest.fixture(scope="module")
def tool(tok):
    """An answer with a tool's input and output in it, and half a letter before the tool."""
    mark = tok.special
    return [*tok.encode("so "), *tok.encode("🦉")[:-1], mark("<|python_start|>"), *tok.encode("1+1"), mark("<|python_end|>"),
            mark("<|output_start|>"), *tok.encode("2"), mark("<|output_end|>"), *tok.encode("2!"), mark("<|assistant_end|>")]


def user(text):
    return {"role": "user", "content": text}


def test_conversations_in_any_order_reach_the_model(tok):
    """Everything that was said stands in the prompt, once and in the form of the training."""
    prompts = []
    client = TestClient(create_app(ScriptedEngine(tok, lambda p: prompts.append(tok.decode(p)) or [65], max_len=999)))
    bos, ask, told, answer = "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"
    for messages, expected in [
            ([user("a"), user("b")], f"{ask}a\n\nb{told}"),
            ([{"role": "assistant", "content": "hello"}, user("a")], f"{ask}{told}{answer}hello<|assistant_end|>{ask}a{told}"),
            ([{"role": "system", "content": "s"}, {"role": "system", "content": [{"type": "text", "text": "t"}]}, user("a")],
             f"{ask}s\n\nt\n\na{told}"),
            ([user("a"), {"role": "developer", "content": "s"}], f"{ask}s\n\na{told}"),
            ([user("a"), {"role": "assistant", "content": None}, user("b")],
             f"{ask}a{told}{answer}<|assistant_end|>{ask}b{told}")]:
        reply = client.post("/v1/chat/completions", json={"messages": messages})
        assert reply.status_code == 200, reply.text
        assert prompts.pop() == bos + expected + answer
    said, system = {"role": "assistant", "content": "x"}, {"role": "system", "content": "s"}
    for messages in ([user("a"), said], [user("a"), said, system], [said, system], [{"role": "user", "content": None}], [system]):
        assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 400
    assert not prompts


@pytest.mark.parametrize("path, field, value, nothing", [
    ("chat/completions", "tools", [{"type": "function", "function": {"name": "f"}}], []),
    ("chat/completions", "tool_choice", "required", "none"), ("chat/completions", "functions", [{"name": "f"}], []),
    ("chat/completions", "response_format", {"type": "json_object"}, {"type": "text"}),
    ("chat/completions", "logit_bias", {"65": -100}, {}), ("completions", "logit_bias", {"65": -100}, {}),
    ("completions", "suffix", "end", ""), ("completions", "best_of", 2, 1)])
def test_what_is_not_here_is_refused_by_name(tok, path, field, value, nothing):
    client = TestClient(create_app(ScriptedEngine(tok, lambda p: [65])))
    ask = {"messages": [user("x")]} if path.startswith("chat") else {"prompt": "x"}
    refused = client.post(f"/v1/{path}", json=ask | {field: value})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    for empty in (None, nothing):
        assert client.post(f"/v1/{path}", json=ask | {field: empty}).status_code == 200


def test_a_completion_shows_a_tools_text_too(tok, tool):
    client = TestClient(create_app(ScriptedEngine(tok, lambda p: tool[:])))
    ask = {"prompt": "x", "max_tokens": 99}
    assert client.post("/v1/completions", json=ask).json()["choices"][0]["text"] == "so �1+122!"
    lines = client.post("/v1/completions", json=ask | {"stream": True}).text.split("\n\n")
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")) == "so �1+122!"


def test_offsets_point_into_the_text_that_is_shown(tok, tool):
    """Every token that is whole text stands where its offset says; special tokens of an answer take no room."""
    asked = [tok.special("<|bos|>"), *tok.encode("owl 🦉"), *tok.encode("🦉")[:-1]]
    text = tok.decode(asked) + "so �1+122!"
    found = text_logprobs(tok, asked, tool, [Logprob(-1.0, [])] * len(asked + tool))
    assert len(found["text_offset"]) == len(asked + tool) and found["text_offset"] == sorted(found["text_offset"])
    named = list(zip(found["tokens"], found["text_offset"]))
    for name, offset in named[:len(asked)] + [(name, at) for name, at in named[len(asked):] if not name.startswith("<|")]:
        assert name.startswith("bytes:") or text.startswith(name, offset), (name, offset)
    assert found["text_offset"][-1] == len(text)


def test_the_tokens_of_a_tool_are_listed_when_a_stop_string_follows(tok, tool):
    assert listed_ids(tok, tool, ("2!",), False)[-1:] == tok.encode("2") and len(listed_ids(tok, tool, ("2!",), False)) > 10


def test_a_seed_gives_a_prompt_the_same_answer_wherever_it_stands(engine):
    client = TestClient(create_app(engine))

    def texts(prompt, **more):
        reply = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 12, "temperature": 1, **more}).json()
        return [choice["text"] for choice in reply["choices"]]

    alone = texts("owl", seed=3, n=2)
    assert texts(["cat", "owl"], seed=3, n=2)[2:] == alone and alone[0] != alone[1]
    assert len(set(texts(["owl"] * 3))) == 3                 # without a seed, each answer is a fresh one


def test_chunks_agree_on_when_and_count_at_the_end(tok, monkeypatch):
    """A stream that takes minutes was created at one moment; `usage` is null until the last chunk, and absent unasked."""
    clock = iter(range(10**6))
    monkeypatch.setattr("nanochat_nb.server.time", SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter,
                                                                   sleep=time.sleep))
    client = TestClient(create_app(ScriptedEngine(tok, lambda p: [65] * 5)))
    for path, ask in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [user("x")]})):
        ask |= {"stream": True, "max_tokens": 5}
        for asked, options in ((True, {"include_usage": True}), (False, None)):
            lines = client.post(f"/v1/{path}", json=ask | {"stream_options": options}).text.split("\n\n")
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert len({chunk["created"] for chunk in chunks}) == 1 and len(chunks) >= 5
            if asked:
                assert chunks[-1].pop("usage")["completion_tokens"] == 5
                assert all(chunk["usage"] is None for chunk in chunks[:-1])
            else:
                assert not any("usage" in chunk for chunk in chunks)


def test_health_tells_strangers_only_that_it_lives(tok):
    client = TestClient(create_app({"secret-model": lambda: ScriptedEngine(tok, lambda p: [65])}, api_key="open"))
    key = {"Authorization": "Bearer open"}
    assert client.post("/v1/completions", json={"prompt": "x"}, headers=key).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/health", headers=key).json() == {"status": "ok", "loaded": ["secret-model"], "requests": 0}


@pytest.mark.parametrize("key", ["größer", " ", " open", "open\n", "a\tb"])
def test_a_key_that_no_client_can_send_is_refused(monkeypatch, tmp_path, key):
    monkeypatch.setenv("NANOCHAT_NB_API_KEY", key)
    with pytest.raises(UserError, match="NANOCHAT_NB_API_KEY may have"):
        serve(str(tmp_path), host="0.0.0.0")


def test_a_page_of_another_site_is_refused_whatever_it_sends(tok):
    """The browser says where a page is from; a form's content type needs nobody's permission, so that alone is no guard."""
    engine = ScriptedEngine(tok, lambda p: [65])
    client = TestClient(create_app(engine))
    for origin in ("https://evil.example", "null", "http://testserver:81", "http://[", ""):
        for kind in ("application/json", "text/plain"):
            refused = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Origin": origin, "Content-Type": kind})
            assert refused.status_code == 403, (origin, kind)
    assert not engine.requests
    for origin in ({}, {"Origin": "http://testserver"}):
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=origin).status_code == 200
