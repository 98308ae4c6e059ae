"""Notebook 10: the download of the CORE bundle against a server on loopback, several ranks, too little memory."""
import http.server
import io
import json
import threading
import zipfile

import pytest
import torch

from nanochat_nb import evaluation
from nanochat_nb.corpus import open_text
from nanochat_nb.evaluation import (CoreTask, evaluate_core_task, evaluate_task, find_core, halving, run_eval,
                                    text_bits_per_byte, verdicts)
from nanochat_nb.execution import isolation
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import UserError
from nanochat_nb.tasks import open_task, text_of
from nanochat_nb.tokenizer import Tokenizer

ROWS = [{"query": f"{a} + {b} =", "choices": [str(a + b), "none"], "gold": 0} for a in range(3) for b in range(3)]


def bundle() -> bytes:
    """A bundle of one task."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("eval_bundle/core.yaml", "icl_tasks:\n- {label: sums, dataset_uri: sums.jsonl, "
                                                 "num_fewshot: [1], icl_task_type: multiple_choice}\n")
        packed.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\nsums,50\n")
        packed.writestr("eval_bundle/eval_data/sums.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    return out.getvalue()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves one file, or 404 when it has none."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        if self.server.data is None:
            return self.send_error(404)
        self.server.seen += body
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        self.wfile.write(self.server.data if body else b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    found.data, found.seen = bundle(), 0
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(evaluation, "CORE_BUNDLE", f"http://127.0.0.1:{found.server_port}/eval_bundle.zip")
    monkeypatch.setenv("NANOCHAT_NB_DATA", str(tmp_path))
    yield found
    found.shutdown()
    found.server_close()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_the_bundle_is_downloaded_once_and_scored(server, tmp_path):
    """A base model with `data: huggingface` gets its CORE tasks."""
    for _ in range(2):
        result = run_eval(checkpoint="base", data="huggingface", held_out_documents=2, max_new_tokens=4, device="cpu")
        assert result["tasks"]["sums"]["n"] == len(ROWS) and "core_partial" in result["metrics"]
    assert names(tmp_path) == ["core"] and server.seen == 1


def test_no_network_skips_core_and_says_why(server, capsys):
    server.data = None
    result = run_eval(checkpoint="base", data="huggingface", held_out_documents=2, max_new_tokens=4, device="cpu")
    assert result["tasks"] == {} and "404" in result["skipped"]["core"]
    assert "NOT EVALUATED: core (could not download" in capsys.readouterr().out


@pytest.mark.parametrize("mishap", ["changed", "no zip", "no bundle"])
def test_a_damaged_bundle_leaves_nothing_behind(server, tmp_path, mishap):
    whole = server.data
    middle = whole.index(b"sums.jsonl", whole.index(b"eval_data")) + 12
    if mishap == "no bundle":
        empty = io.BytesIO()
        zipfile.ZipFile(empty, "w").close()
        server.data = empty.getvalue()
    else:
        server.data = b"<html>" if mishap == "no zip" else whole[:middle] + b"\0\0\0\0" + whole[middle + 4:]
    folder, reason = find_core("huggingface", True)
    assert folder == "" and reason
    assert names(tmp_path) == []
    server.data = whole
    assert find_core("huggingface", True) == (str(tmp_path / "core"), "")


SUMS = CoreTask("sums", "multiple_choice", "", 1, " ")
MIXED = [row | {"gold": i % 2} for i, row in enumerate(ROWS)]


class Rank:
    """One of several ranks, each a thread: as much of a `Runtime` as an evaluation uses."""

    def __init__(self, rank, said, meeting):
        self.rank, self.world_size, self.said, self.meeting = rank, len(said), said, meeting

    def gather(self, value):
        self.said[self.rank] = value
        self.meeting.wait(60)
        everything = list(self.said)
        self.meeting.wait(60)
        return everything

    def sum(self, *values):
        return [sum(column) for column in zip(*self.gather(values))]


def on_ranks(count, work):
    """What `work(rank)` returns on each of `count` ranks."""
    said, meeting, found = [None] * count, threading.Barrier(count), [None] * count
    ranks = [Rank(i, said, meeting) for i in range(count)]
    threads = [threading.Thread(target=lambda r=r: found.__setitem__(r.rank, work(r))) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.fixture(scope="module")
def exam():
    """A random model with opinions, and its tokenizer."""
    texts = [d.text for d in open_text(["world"], documents=40).documents("train")]
    tok = Tokenizer.train(texts, 400)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32), dtype=torch.float32)
    model.init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return model, tok, texts[:7]


def test_ranks_change_no_score(exam):
    """CORE rows, chat tasks of both kinds and bits per byte: three ranks find what one finds, each the whole of it."""
    model, tok, texts = exam

    def work(rt):
        core = evaluate_core_task(model, tok, SUMS, MIXED, rt=rt)
        chat = [evaluate_task(model, tok, open_task(name, limit=7), max_new_tokens=4, rt=rt) for name in ("choice", "fact")]
        return core, chat, text_bits_per_byte(model, tok, texts, rt=rt)[0]

    core, chat, bits = work(None)
    assert {True, False} == set(core[0])
    for found in on_ranks(3, work):
        assert found[:2] == (core, chat) and found[2] == pytest.approx(bits)


def test_too_little_memory_halves_the_batch(exam, monkeypatch):
    """Scores are those of a device with room for all; when not even one row fits, that is said in words."""
    def cramped(items, most=2):
        if len(items) > most:
            raise torch.OutOfMemoryError("no room")
        return [item * 2 for item in items]

    assert halving(cramped, list(range(11))) == [2 * i for i in range(11)]
    with pytest.raises(UserError, match="single row"):
        halving(lambda items: cramped(items, most=0), [1, 2])
    model, tok, _ = exam
    whole, sizes = evaluation.score_together, []
    expected = evaluate_core_task(model, tok, SUMS, MIXED)

    def small(model, questions):
        sizes.append(len(questions))
        if len(questions) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(model, questions)

    monkeypatch.setattr(evaluation, "score_together", small)
    assert evaluate_core_task(model, tok, SUMS, MIXED) == expected and max(sizes) > 2


def test_programs_judged_side_by_side_keep_their_order():
    if not isolation():
        pytest.skip("no sandbox works here")
    task = open_task("code", "test", limit=6, seed=0)
    rows = [task[i] for i in range(6)]
    answers = [text_of(row["messages"][-1]["content"]) if i % 3 else "no program" for i, row in enumerate(rows)]
    assert verdicts(task, rows, answers) == [bool(i % 3) for i in range(6)]
