"""The engine: equal to the naive loop in every mix, deaf to its neighbours, and polite when interrupted."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_nb import inference
from nanochat_nb.execution import isolation
from nanochat_nb.inference import Engine, best_stage, main
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import UserError, generator
from nanochat_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(["12 times 34 is 408, one two three four five six seven"] * 3, 275, backend="python")


def make_model(dtype=torch.float32, **changes):
    config = dict(sequence_len=300, vocab_size=275, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="S")
    model = GPT(GPTConfig(**config | changes), dtype=dtype).init_weights(0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += torch.randn(p.shape, generator=generator("noise", i)) * (0.15 if p.ndim > 1 else 0.3)
    return model


@torch.no_grad()
def naive(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def silent(engine):
    """Noise may say <|bos|>; these tests let it talk on."""
    engine.stops = frozenset()
    return engine


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4, "window_pattern": "SL"}, {"n_layer": 1, "n_kv_head": 1},
                                     {"value_embed_layers": (), "rope_base": 10_000.0, "qk_scale": 1.0}])
def test_greedy_equals_the_naive_loop_whatever_arrives_when(tok, changes):
    model, draw = make_model(**changes), random.Random(0)
    engine = silent(Engine(model, tok, max_batch=3))
    jobs, numbers, got = [], {}, {}
    for _ in range(9):
        prompt = [draw.randrange(275) for _ in range(draw.choice([1, 2, 7, 30, 140, 260]))]
        jobs.append((prompt, draw.randrange(1, 30)))
    waiting = list(range(9))
    while waiting or engine.busy:
        while waiting and (draw.random() < 0.4 or not engine.busy):
            i = waiting.pop(0)
            numbers[engine.submit(jobs[i][0], max_new_tokens=jobs[i][1], temperature=0, tools=False)] = i
        for event in engine.step():
            got.setdefault(numbers[event.request], []).extend(event.ids)
    assert [got[i] for i in range(9)] == [naive(model, *job) for job in jobs]


@pytest.mark.parametrize("changes", [{"look_back_layers": (0, 2)}, {"look_back_layers": (1,), "n_kv_head": 4, "window_pattern": "SL"},
                                     {"dtype": torch.bfloat16, "rope_dtype": "float32", "look_back_layers": (1,)}])
@pytest.mark.parametrize("flags", [(), ("amx_bf16",)])
@torch.inference_mode()
def test_the_short_step_equals_the_models_own(changes, flags, monkeypatch):
    """With matrices reordered and as they are, attention by products and by PyTorch's kernel."""
    monkeypatch.setattr(inference, "cpu_flags", lambda: frozenset(flags))
    changes = changes | {"n_embd": 64}
    model, near = make_model(**changes).inference_copy(), 1e-5 if changes.get("dtype") is None else 0.05
    for rows in ([[7] * 140], [[1, 2], [7] * 150, [5] * 127], [[i, 2] * (i + 60) for i in range(9)]):
        caches = [inference.RowCache(model.config, 9, 300, model.device, model.dtype) for _ in "ab"]
        for snapshot in inference.prefill(model, rows)[0]:
            for cache in caches:
                cache.enter(snapshot)
        short = inference.ShortStep(model, 300)
        for step in range(6):
            ids = torch.tensor([13 * step + i for i in range(len(rows))])
            caches[0].begin()
            want = inference.next_logits(model, model.hidden(ids[:, None], caches[0])[:, 0])
            assert (short(ids, caches[1]) - want).norm() < near * want.norm()
        assert caches[0].ends == caches[1].ends


def test_samples_do_not_depend_on_company(tok):
    model = make_model()
    prompts = [[i] * (3 * i + 1) for i in range(8)]
    dials = dict(max_new_tokens=10, temperature=1.1, top_p=0.9, seed=5, num_samples=2)
    crowd = silent(Engine(model, tok, max_batch=5)).generate(prompts, **dials)
    engine = silent(Engine(model, tok))
    engine.submit([9, 9], max_new_tokens=40, temperature=0.3, top_k=3)
    alone = [engine.generate([p], **dials)[0] for p in prompts]
    assert [[c.ids for c in g] for g in crowd] == [[c.ids for c in g] for g in alone]
    seeded = silent(Engine(model, tok)).generate(prompts[:2], **dials | {"seed": [5, 6]})
    assert seeded[0][0].ids == crowd[0][0].ids and seeded[1][0].ids != crowd[1][0].ids


def test_the_search_runs_where_float64_is(monkeypatch):
    """Apple's GPU has no float64. No such machine is at hand: here the CPU's float64 is taken away unless it was asked for."""
    assert inference.search_device(torch.device("mps")).type == "cpu"
    assert inference.search_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    asked = []
    monkeypatch.setattr(inference, "search_device", lambda device: (asked.append(device), device)[1])
    real = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda t: real(t) if asked else pytest.fail("float64 on the logits' device"))
    u = torch.tensor([0.6], dtype=torch.float64)
    assert inference.choose(torch.zeros(1, 4), u, inference.Dials([inference.Dial()])).tolist() == [2]
    assert asked


def test_a_shared_prompt_is_read_once(tok, monkeypatch):
    read, real = [], inference.prefill
    monkeypatch.setattr(inference, "prefill", lambda m, prompts, **k: (read.extend(prompts), real(m, prompts, **k))[1])
    engine = silent(Engine(make_model(), tok, max_batch=3))
    groups = engine.generate([[1, 2], [3]], max_new_tokens=6, num_samples=7)
    assert sorted(read) == [(1, 2), (3,)] and [len(g) for g in groups] == [7, 7] and not engine.prefixes


def test_finish_reasons_limits_and_cancel(tok):
    engine = Engine(make_model(), tok, max_len=20)
    engine.stops = frozenset(range(275))
    [[stopped]] = engine.generate([[1] * 5], max_new_tokens=9)
    assert stopped.finish_reason == "stop" and len(stopped.ids) == 1
    silent(engine)
    [[full]] = engine.generate([[1] * 15], max_new_tokens=99)
    assert full.finish_reason == "length" and len(full.ids) == 5
    a, b, c = (engine.submit([i], max_new_tokens=9) for i in (1, 2, 3))
    engine.step()
    engine.cancel(a)
    engine.cancel(12345)
    events = engine.step()
    assert {e.request: e.finish_reason for e in events} == {a: "cancelled", b: None, c: None}
    assert len(engine.rows) == 2
    stream = engine.stream([4], max_new_tokens=9)
    next(stream)
    stream.close()
    assert len(engine.rows) == 2                             # a closed stream leaves its row


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "empty"), ([1] * 300, {}, "300 tokens"), ([275], {}, "another tokenizer"), ([1], {"top_p": 0.0}, "top_p"), ([1], {"min_p": 1.5}, "min_p"),
    ([1], {"temperature": -1}, "temperature"), ([1], {"max_new_tokens": 0}, "max_new_tokens"),
    ([1], {"logprobs": -1}, "logprobs"), ([1], {"stop": [""]}, "stop"), ([1], {"stop": [1.5]}, "stop"), ([1], {"tools": "calculater"}, "did you mean 'calculator'"),
    ([1], {"top_k": 2.5}, "top_k=2.5"), ([1], {"max_new_tokens": 2.5}, "max_new_tokens=2.5"), ([1], {"logprobs": 0.5}, "logprobs=0.5")])
def test_bad_requests(tok, prompt, options, message):
    engine = Engine(make_model(), tok)
    with pytest.raises(UserError, match=message):
        engine.generate([[1], prompt], **{"max_new_tokens": 3} | options)
    assert not engine.busy                                   # the good one does not stay behind


def test_a_text_too_long_for_a_base_model_keeps_its_beginning_mark(tok, capsys):
    ids = inference._prompt(Engine(make_model(), tok), "base", [{"content": "one two three " * 30}], 20)
    assert len(ids) == 20 and ids[0] == tok.special("<|bos|>") and "no longer fit" in capsys.readouterr().err
    assert ids[1:] == tok.encode("one two three " * 30)[-19:]


def test_new_weights_are_used_and_cast_once(tok):
    model = make_model(torch.bfloat16)
    engine = silent(Engine(model, tok))
    assert engine.model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    before = engine.generate([[1, 2, 3]], max_new_tokens=12, temperature=0)[0][0].ids
    copy = engine.model
    assert engine.generate([[1, 2, 3]], max_new_tokens=12, temperature=0)[0][0].ids == before and engine.model is copy
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator("other", p.numel())) * 0.2
    after = engine.generate([[1, 2, 3]], max_new_tokens=12, temperature=0)[0][0].ids
    assert engine.model is copy                              # new numbers in the same memory
    assert after != before and after == silent(Engine(model, tok)).generate([[1, 2, 3]], max_new_tokens=12, temperature=0)[0][0].ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_follows_new_weights_and_keeps_the_company_rule(tok, dtype):
    model, write = make_model(dtype), dict(max_new_tokens=12, temperature=0, tools=False)
    engine = silent(Engine(model, tok, int8=True))
    before = engine.generate([[1, 2, 3]], **write)[0][0].ids
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator("other", p.numel())) * 0.2
    after = engine.generate([[1, 2, 3]], **write)[0][0].ids
    assert after != before and after == silent(Engine(model, tok, int8=True)).generate([[1, 2, 3]], **write)[0][0].ids
    if dtype == torch.float32:                               # few rows and many go different ways
        crowd = silent(Engine(model, tok, int8=True)).generate([[1, 2, 3], *([i] for i in range(30))], **write)
        assert crowd[0][0].ids == after
    assert {m.numbers.dtype for m in engine.model.modules() if isinstance(m, inference.Int8)} == {torch.int8}


def test_training_goes_on_after_generating(tok):
    model = make_model()
    silent(Engine(model, tok)).generate([[1] * 200], max_new_tokens=5)
    ids = torch.ones(1, 250, dtype=torch.long)
    model(ids, ids).backward()
    assert model.lm_head.weight.grad is not None


def scripted(scripts):
    """A stand-in for `_choose`: each request says the next token of the script for its prompt."""
    def say(r):
        script = scripts[r.prompt]
        return script[min(sum(r.mask), len(script) - 1)]     # while tokens are forced, the choice does not matter
    return lambda rows, logits, dials: [say(r) for r in rows]


def test_tools_are_forced_and_masked(tok, monkeypatch):
    s = tok.special
    call = lambda text: [s("<|python_start|>"), *tok.encode(text), s("<|python_end|>")]
    scripts = {(1,): call("6*7") + [s("<|assistant_end|>")], (2,): call("no sum") + [s("<|assistant_end|>")],
               (3,): [s("<|python_end|>"), *call("")] + [s("<|assistant_end|>")]}
    monkeypatch.setattr(inference, "_choose", scripted(scripts))
    good, nonsense, empty = (g[0] for g in Engine(make_model(), tok).generate([list(p) for p in scripts], max_new_tokens=50))
    assert "<|output_start|>42<|output_end|>" in tok.decode(good.ids)
    forced = [t for t, m in zip(good.ids, good.mask) if not m]
    told = Engine(make_model(), tok).generate([[1]], max_new_tokens=50, logprobs=0)[0][0]
    oracle = make_model()(torch.tensor([[1, *told.ids]])).detach().log_softmax(-1)[0]
    assert [p.top for p in told.logprobs] == [[]] * len(told.ids)            # forced tokens have theirs too
    assert [p.chosen for p in told.logprobs] == pytest.approx([float(oracle[i, t]) for i, t in enumerate(told.ids)], abs=1e-4)
    assert forced == inference.forced_ids(tok, "42")
    assert all(nonsense.mask) and all(empty.mask)


def test_own_stops_end_an_answer(tok, monkeypatch):
    s = tok.special
    script = [*tok.encode("one two"), s("<|python_start|>"), *tok.encode("6*7"), s("<|python_end|>"), *tok.encode(" 42 XYZ six")]
    monkeypatch.setattr(inference, "_choose", scripted({(1,): script}))
    write = lambda *stop: silent(Engine(make_model(), tok)).generate([[1]], max_new_tokens=50, stop=stop)[0][0]
    assert silent(Engine(make_model(), tok)).generate([[1]], max_new_tokens=50, stop="XYZ")[0][0] == write("XYZ")
    at_string, at_token = write("XYZ"), write(s("<|python_end|>"), "never said")
    assert at_string.finish_reason == at_token.finish_reason == "stop"
    assert tok.decode(at_string.ids).endswith("<|output_end|> 42 XYZ") and at_token.ids[-1] == s("<|python_end|>")
    assert tok.decode(write("42").ids).endswith(" 42")       # not the 42 that the calculator printed
    assert write(s("<|output_end|>")).finish_reason == "length"              # forced, not chosen


@pytest.mark.skipif(isolation() is None, reason="no sandbox works on this machine")
def test_programs_run_while_other_rows_go_on(tok, monkeypatch):
    s = tok.special
    program = "import time; time.sleep(0.3); print('ab' * 2)"
    scripts = {(1,): [s("<|python_start|>"), *tok.encode(program), s("<|python_end|>"), s("<|assistant_end|>")],
               (2,): [5] * 400}
    monkeypatch.setattr(inference, "_choose", scripted(scripts))
    engine = Engine(make_model(), tok)
    slow = engine.submit([1], max_new_tokens=150, tools="python")
    other = engine.submit([2], max_new_tokens=150, tools=False)
    seen, during = {slow: [], other: []}, 0
    while engine.busy:
        for event in engine.step():
            seen[event.request] += event.ids
            during += bool(engine.parked) and event.request == other
    assert "<|output_start|>abab<|output_end|><|assistant_end|>" in tok.decode(seen[slow])
    assert seen[other] == [5] * 150 and during > 3


def test_a_parked_row_comes_back_as_it_was(tok, monkeypatch):
    """A row that was taken out and put back continues as if nothing had happened."""
    model, prompt = make_model(), [7] * 40
    want = naive(model, prompt, 20)
    engine = silent(Engine(model, tok))
    engine.submit(prompt, max_new_tokens=20, temperature=0, tools=False)
    engine.submit([1, 2], max_new_tokens=20, temperature=0, tools=False)
    got = [t for _ in range(5) for e in engine.step() if e.request == 1 for t in e.ids]
    request, snapshot = engine.rows[0], engine.cache.snapshot(0)
    inference._leave(engine, 0)
    engine.step()
    inference._enter(engine, request, snapshot)
    while engine.busy:
        got += [t for e in engine.step() if e.request == 1 for t in e.ids]
    assert got == want


def crowd(engine, stops):
    """Answers in a small engine: cold and warm ones, own stops, some that come later, two that are cancelled."""
    dials = [dict(temperature=0), dict(temperature=0.9, top_k=20), dict(temperature=1.1, top_p=0.9), dict(temperature=0, logprobs=2)]
    ask = lambda i: engine.submit([1, 2 + i] * (1 + 9 * i), max_new_tokens=30 + i, tools=False, seed=i, stop=stops[i:i + 1], **dials[i % 4])
    numbers, answers, under_way = [ask(i) for i in range(5)], {}, 0
    for step in range(200):
        if step in (4, 9):
            numbers.append(ask(5 + step % 2))
        if step in (6, 20):
            engine.cancel(engine.rows[0].number)
        for event in engine.step():
            told = [round(p.chosen, 3) for p in event.logprobs]
            answers.setdefault(event.request, []).extend([*event.ids, event.finish_reason, *told])
        under_way += engine._ahead is not None
    assert not engine.busy and engine._ahead is None
    return [answers[n] for n in numbers], under_way


def test_a_step_begun_before_its_time_changes_nothing(tok, monkeypatch):
    plain, recorded = inference._step_logits, torch.zeros(3, 275)            # a recording's logits lie in one place
    monkeypatch.setattr(inference, "_step_logits", lambda engine, ids: recorded[:len(ids)].copy_(plain(engine, ids)))
    first, never = crowd(Engine(make_model(), tok, max_batch=3), [])
    written = [[t for t in answer if isinstance(t, int)] for answer in first]
    stops = [ids[len(ids) // 2] for ids in written]
    for own in ([], stops):
        want, never = crowd(Engine(make_model(), tok, max_batch=3), own)
        eager = Engine(make_model(), tok, max_batch=3)
        eager._goes_ahead = True
        got, under_way = crowd(eager, own)
        assert got == want and never == 0 and under_way > 9
    assert sum("stop" in answer for answer in want) > 2


def looping(monkeypatch, tok, source):
    """Let a program's call be written again and again: the next token depends on the last alone, and forced ones lead back.
    What the model itself says then, for each length of the first row's text: the last that was computed for it."""
    call = [tok.special("<|python_start|>"), *tok.encode(source), tok.special("<|python_end|>")]
    after, plain, said = {a: b for a, b in zip(call, call[1:] + call[:1])}, inference._step_logits, {}
    assert len(after) == len(call)                           # no token twice

    def steps(engine, ids):
        following, length = torch.tensor([after.get(i, call[0]) for i in ids.tolist()]), engine.cache.ends[0]
        logits = said[length] = plain(engine, ids)
        return torch.full_like(logits, -9).scatter(1, following[:, None], 9.0)

    monkeypatch.setattr(inference, "_step_logits", steps)
    return said


def both_ways(tok, prompts, said, **options):
    """Answers without and with going ahead, what the model said (tensors by length), and how often a step was ahead."""
    found, under_way = [], 0
    for ahead in (False, True):
        said.clear()
        engine = Engine(make_model(), tok)
        engine._goes_ahead = ahead
        numbers, answers = [engine.submit(p, temperature=0, **options) for p in prompts], {}
        while engine.busy:
            for event in engine.step():
                answers.setdefault(event.request, []).extend(event.ids)
            under_way += engine._ahead is not None
        found.append(([answers[n] for n in numbers], dict(said)))
    (without, model), (ahead, same) = found
    assert without == ahead and all(torch.allclose(same[n], logits, atol=1e-4) for n, logits in model.items())
    return ahead, under_way


def test_nobody_goes_ahead_of_forced_tokens(tok, monkeypatch):
    said = looping(monkeypatch, tok, "6*7")
    ahead, under_way = both_ways(tok, [[1, 2], [3]], said, max_new_tokens=60)
    assert under_way > 10 and "<|output_start|>42<|output_end|>" in tok.decode(ahead[0])


@pytest.mark.skipif(isolation() is None, reason="no sandbox works on this machine")
def test_a_row_that_waits_for_its_program_takes_back_the_step_ahead(tok, monkeypatch):
    said = looping(monkeypatch, tok, "print(4)")
    ahead, under_way = both_ways(tok, [[1, 2] * 70], said, max_new_tokens=80, tools="python")        # beyond a ring's end
    assert under_way > 10 and "<|output_start|>4" in tok.decode(ahead[0])


INTERPRETER = Path(sys.prefix) / "interpreter"               # run_all.sh test puts Triton there


@pytest.mark.skipif(not (INTERPRETER / "triton").is_dir(), reason="Triton is not installed")
def test_the_kernels_compute_what_the_model_does_in_tritons_interpreter():
    root = Path(__file__).parents[1]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (INTERPRETER, root)))}
    done = subprocess.run([sys.executable, "-W", "ignore", "tests/kernels.py"], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stdout + done.stderr[-2000:]


def test_command_line_errors(tmp_path):
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        (tmp_path / "laptop" / "tokenizer").mkdir(parents=True)
        best_stage(tmp_path / "laptp")
    with pytest.raises(UserError, match="no trained model"):
        main(["--run", str(tmp_path / "laptop"), "-p", "hello"])
    with pytest.raises(UserError, match="did you mean 'sft'"):
        main(["--run", str(tmp_path / "laptop"), "--stage", "sftt", "-p", "hello"])


def test_command_line_answers_and_chats(tok, tmp_path, capsys, monkeypatch):
    from nanochat_nb.checkpoint import save_checkpoint
    run = tmp_path / "toy"
    tok.save(run / "tokenizer")
    for stage in ("base", "sft"):
        save_checkpoint(run / stage, 1, model=make_model(), meta={"tokenizer": tok.fingerprint()})
    assert best_stage(run) == "sft"
    (run / "base" / "summary.json").write_text("{}")
    assert best_stage(run) == "base"                         # sft has not finished yet
    for stage in ("base", "sft"):
        main(["--run", str(run), "--stage", stage, "-p", "one two", "--max-new-tokens", "5", "--temperature", "0"])
        first = capsys.readouterr().out
        main(["--run", str(run), "--stage", stage, "-p", "one two", "--max-new-tokens", "5", "--temperature", "0"])
        assert first == capsys.readouterr().out
    main(["--run", str(run), "--stage", "sft", "-p", "one two", "--max-new-tokens", "5", "--int8", "--min-p", "0.1"])
    with pytest.raises(UserError, match="shorten it"):
        main(["--run", str(run), "--stage", "sft", "-p", "7" * 999])
    lines = iter(["one two three four five six seven " * 3] * 9 + ["/new", "", "one", "7" * 999])
    monkeypatch.setattr("builtins.input", lambda prompt: _next(lines))
    main(["--run", str(run), "--stage", "sft", "--max-new-tokens", "8"])
    said = capsys.readouterr().err
    assert "no longer fit" in said and "shorten it" in said


def _next(lines):
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


def test_tool_calls_that_follow_each_other_are_printed_apart(tok, capsys):
    call = lambda sum_, result: [tok.special("<|python_start|>"), *tok.encode(sum_), tok.special("<|python_end|>"),
                                 tok.special("<|output_start|>"), *tok.encode(result), tok.special("<|output_end|>")]
    ids = call("1+1", "2") + call("2+2", "4") + tok.encode(" so four")
    assert inference._show(tok, iter(ids)) == ids
    assert capsys.readouterr().out.strip() == "[1+1 = 2][2+2 = 4] so four"


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
def test_as_few_turns_are_dropped_as_must_be(tok, system):
    """Bisection finds what trying one pair after another finds, for every room."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"one two {'three ' * (i % 4)}{i}"} for i in range(11)]
    rendered = {n: tok.render_for_completion({"messages": system + turns[n:]}) for n in range(0, 11, 2)}
    for room in range(1, len(rendered[0]) + 2):
        fits = [n for n, ids in rendered.items() if len(ids) <= room]
        if fits:
            assert inference.chat_prompt(tok, system + turns, max_len=room) == (rendered[fits[0]], fits[0])
        else:
            with pytest.raises(UserError, match=f"{len(rendered[10])} tokens"):
                inference.chat_prompt(tok, system + turns, max_len=room)
