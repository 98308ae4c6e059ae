"""The global sequence of batches is the same whatever the ranks, the interruptions and the document lengths."""
import json
from itertools import islice

import numpy as np
import pytest
import torch

from nanochat_nb import loader
from nanochat_nb.loader import (open_shards, pack_conversations, packed_batches, plan_window, plans,
                                pretraining_batches, write_shards)
from nanochat_nb.runtime import UserError
from nanochat_nb.tokenizer import SPLIT_PATTERN, Tokenizer

TOK = Tokenizer.from_ranks({bytes([b]): b for b in range(256)}, pattern=SPLIT_PATTERN)
BOS = TOK.special("<|bos|>")
ROWS, T = 24, 17                                             # 24 divides over 1, 2, 3, 4 and 8 ranks

CORPORA = {                                                  # lengths in characters
    "short": lambda rng: rng.integers(1, 5, size=600),
    "long": lambda rng: rng.integers(200, 900, size=8),
    "one": lambda rng: [2500],
    "exact": lambda rng: [T, T - 1, T + 1, 2 * T] * 40,
    "long-tailed": lambda rng: np.exp(rng.normal(2.5, 1.2, size=150)).astype(int) + 1,
}


@pytest.fixture(params=list(CORPORA))
def shards(request, tmp_path, monkeypatch):
    """Shards of an awkward corpus; several shards and, with windows this small, several windows an epoch."""
    rng = np.random.default_rng(len(request.param))
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, size=n)) for n in CORPORA[request.param](rng)]
    monkeypatch.setattr(loader, "WINDOW_TOKENS", 900)
    return write_shards(texts, TOK, tmp_path / "shards", shard_tokens=300, batch=7, show=False)


def sequence(shards, steps, **options):
    return [torch.cat(b, dim=1) for b in islice(pretraining_batches(shards, rows=ROWS, sequence_len=T, seed=3,
                                                                    **options), steps)]


def test_same_batches_for_any_ranks_and_interruptions(shards):
    per_epoch = shards.num_tokens // (ROWS * (T + 1))
    steps = 3 * per_epoch + 4                                # four epochs begin
    whole = sequence(shards, steps)
    assert all((b[:, 0] == BOS).all() and b.shape == (ROWS, 2 * T) for b in whole)
    rng = np.random.default_rng(1)
    for world_size in (1, 2, 3, 4, 8):
        at = 0
        while at < steps:                                    # a run that is stopped at random steps
            stop = min(steps, at + int(rng.integers(1, steps)))
            parts = [sequence(shards, stop - at, rank=r, world_size=world_size, start_step=at)
                     for r in range(world_size)]
            assert all(torch.equal(torch.cat(p), whole[at + i]) for i, p in enumerate(zip(*parts)))
            at = stop


def test_every_token_once_per_epoch(shards):
    carry, covered = [], np.zeros(int(shards.lengths.sum()), dtype=int)
    offset = np.cumsum(shards.lengths) - shards.lengths
    for epoch in range(3):
        for w, group in enumerate(loader._windows(shards, 3, epoch)):
            plan, carry = plan_window(shards, group, carry, room=T + 1, key=(3, "window", epoch, w))
            for d, begin, end in plan.pieces.tolist():
                covered[offset[d] + begin:offset[d] + end] += 1
            sizes = 1 + plan.pieces[:, 2] - plan.pieces[:, 1]
            assert all(sizes[a:b].sum() == T + 1 for a, b in zip(plan.rows, plan.rows[1:]))
    for d, begin, end in carry:
        covered[offset[d] + begin:offset[d] + end] += 1
    covered[offset] = 3                                      # the documents' own bos is put back by every piece
    assert (covered == 3).all()
    assert sum(1 + e - b for _, b, e in carry) < T + 1


def test_batches_are_text(shards):
    """Each row decodes to pieces of documents, in their words."""
    texts = {TOK.decode(shards.document(d)[1:].tolist()) for d in range(shards.num_documents)}
    joined = "\n".join(sorted(texts))
    idx, targets = next(pretraining_batches(shards, rows=ROWS, sequence_len=T, seed=5))
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    for row in idx.tolist():
        assert all(part in joined for part in TOK.decode(row).split("<|bos|>"))


def order(shards, *, seed, epoch):
    """The documents of an epoch in the order in which its windows take them up, before rows are packed."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "cut_long", lambda documents, *rest: seen.extend(documents) or [])
        for w, group in enumerate(loader._windows(shards, seed, epoch)):
            plan_window(shards, group, [], room=T + 1, key=(seed, "window", epoch, w))
    return seen


def test_every_epoch_and_every_seed_has_an_order_of_its_own(shards):
    if shards.num_documents == 1:
        pytest.skip("one document has one order")
    orders = [order(shards, seed=seed, epoch=epoch) for seed, epoch in ((3, 0), (3, 1), (3, 2), (4, 0))]
    assert all(sorted(found) == list(range(shards.num_documents)) for found in orders)
    assert len(set(map(tuple, orders))) == 4 and orders[0] != sorted(orders[0])


def test_resume_plans_one_window_only(shards, monkeypatch):
    last = list(islice(plans(shards, sequence_len=T, seed=0, remember=True), 12))[-1]
    calls = []
    monkeypatch.setattr(loader, "plan_window", lambda *a, **k: calls.append(1) or plan_window(*a, **k))
    first, plan = next(plans(shards, sequence_len=T, seed=0, start_row=last[0]))
    while len(plan) == 0:                                    # a window smaller than a row
        first, plan = next(plans(shards, sequence_len=T, seed=0, start_row=last[0]))
    assert first == last[0] and np.array_equal(plan.pieces, last[1].pieces) and len(calls) == 1


def test_damaged_marks_are_planned_again(shards):
    path = shards.folder / f"plan_{T}_3.json"
    whole = sequence(shards, 8)
    for damage in ("", "{", json.dumps({"key": [], "marks": []}), json.dumps({"key": "x", "marks": [[9, 9, 0, []]]})):
        path.write_text(damage)
        assert torch.equal(sequence(shards, 2, start_step=6)[0], whole[6])


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt", "lengths"])
def test_damaged_shard_is_named(shards, damage):
    path = shards.folder / "shard_00000.bin"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-2])
    elif damage == "corrupt":
        path.write_bytes(data[:10] + bytes([data[10] ^ 4]) + data[11:])
    else:
        path.with_suffix(".json").write_text('{"lengths": [1]}')
    with pytest.raises(UserError, match="shard_00000"):
        list(islice(pretraining_batches(open_shards(shards.folder), rows=ROWS, sequence_len=T), 200))


def test_too_small_and_indivisible(shards):
    with pytest.raises(UserError, match="too small"):
        next(pretraining_batches(shards, rows=4096, sequence_len=T))
    with pytest.raises(UserError, match="does not divide"):
        next(pretraining_batches(shards, rows=24, sequence_len=T, world_size=5))
    with pytest.raises(UserError, match="no text"):
        write_shards(["", ""], TOK, shards.folder / "empty", show=False)


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


@pytest.mark.parametrize("sequence_len", [8, 31, 64, 300])
def test_packed_conversations_never_nan_never_dropped(sequence_len):
    rng = np.random.default_rng(sequence_len)
    def words(n):
        return "".join(chr(97 + c) for c in rng.integers(0, 26, size=n))
    chats = [chat(*(words(int(n)) for n in rng.integers(1, 60, size=2 * rng.integers(1, 6)))) for _ in range(80)]
    rendered = [TOK.render_conversation(c) for c in chats]
    packed = pack_conversations(rendered, sequence_len=sequence_len, tokenizer=TOK)
    idx, targets = packed.rows(range(len(packed)))
    assert (idx[:, 0] == BOS).all() and (targets >= 0).any(dim=1).all()
    long = sum(len(ids) > sequence_len + 1 for ids, _ in rendered)
    assert packed.stats["conversations"] == 80 and packed.stats["empty"] == 0
    assert packed.stats["cut"] <= long and (packed.stats["shortened"] > 0) == (sequence_len < 64) or sequence_len == 64
    if not packed.stats["shortened"]:
        assert (targets >= 0).sum() == sum(sum(mask) for _, mask in rendered) == packed.stats["targets"]
    again = pack_conversations(rendered, sequence_len=sequence_len, tokenizer=TOK)
    assert again.plan == packed.plan


def test_conversation_without_an_answer_is_counted():
    packed = pack_conversations([TOK.render_conversation(chat("hi")), TOK.render_conversation(chat("a", "b"))],
                                sequence_len=16, tokenizer=TOK)
    assert packed.stats["empty"] == 1 and len(packed) == 1
    with pytest.raises(UserError, match="nothing|anything"):
        pack_conversations([TOK.render_conversation(chat("hi"))], sequence_len=16, tokenizer=TOK)


def test_packed_batches_same_for_any_ranks():
    rendered = [TOK.render_conversation(chat("q" * (i % 9 + 1), "a" * (i % 13 + 1))) for i in range(70)]
    packed = pack_conversations(rendered, sequence_len=20, tokenizer=TOK)
    def batches(n, **options):
        return [torch.cat(b, dim=1) for b in islice(packed_batches(packed, rows=ROWS, seed=2, **options), n)]
    whole = batches(9)
    for world_size in (2, 3, 4, 8):
        parts = [batches(4, rank=r, world_size=world_size, start_step=5) for r in range(world_size)]
        assert all(torch.equal(torch.cat(p), whole[5 + i]) for i, p in enumerate(zip(*parts)))
