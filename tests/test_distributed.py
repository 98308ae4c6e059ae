"""Several gloo ranks train the model that one rank trains: same losses, same weights, states that fit any world size."""
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from nanochat_nb.checkpoint import load_checkpoint, save_checkpoint
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.optimizer import build_optimizer
from nanochat_nb.runtime import UserError, generator, start_runtime, stop_runtime

# 3 layers and a vocabulary of 65 rows padded to 128: matrix counts that divide by neither 2 nor 4.
CONFIG = GPTConfig(sequence_len=16, vocab_size=65, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
ROWS, STEPS = 8, 4


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 65, (ROWS, 17), generator=generator(0, "test batch", step))


def train(rank: int, world_size: int, port: int, folder: str, first: int, last: int) -> None:
    """Train steps first..last on this rank's rows, from the checkpoint at `first` if there is one; save; record losses."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    rt = start_runtime("cpu", "float32")
    model = GPT(CONFIG, dtype=rt.dtype).init_weights(0)
    optimizer = build_optimizer(model, rt=rt)
    if first:
        saved = load_checkpoint(folder, step=first)
        model.load_state_dict(saved.model_state)
        optimizer.load_full_state(saved.optimizer_state)
    losses = []
    for step in range(first, last):
        rows = batch(step)[rank::world_size]
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [value / world_size for value in rt.sum(loss.item())]
    hashes = rt.gather(sum(p.detach().double().abs().sum().item() for p in model.parameters()))
    assert len(set(hashes)) == 1, "the ranks hold different models"
    save_checkpoint(folder, last, model=model, optimizer=optimizer, rt=rt, meta={"losses": losses}, keep=9)
    stop_runtime()


def run(world_size: int, folder, first: int = 0, last: int = STEPS):
    """Train on `world_size` ranks and return what they saved."""
    if world_size == 1:
        before = dict(os.environ)
        try:
            train(0, 1, 0, str(folder), first, last)
        finally:
            os.environ.clear()
            os.environ.update(before)
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        mp.spawn(train, (world_size, port, str(folder), first, last), nprocs=world_size)
    return load_checkpoint(folder, step=last)


def assert_same(a, b, tolerance: float = 1e-4) -> None:
    assert a.meta["losses"] == pytest.approx(b.meta["losses"], abs=tolerance)
    for x, y in ((a.model_state, b.model_state), (a.optimizer_state, b.optimizer_state)):
        assert x.keys() == y.keys()
        for name in x:
            # the first steps of AdamW are signs of the gradient; a rounding may turn one where the gradient is ~0
            assert (x[name].double() - y[name].double()).abs().gt(tolerance).float().mean() < 0.01, name


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one(tmp_path, world_size):
    assert_same(run(1, tmp_path / "one"), run(world_size, tmp_path / "many"))


def test_resume_is_exact_and_at_another_world_size(tmp_path):
    whole = run(1, tmp_path / "whole")
    run(1, tmp_path / "cut", last=2)
    again = run(1, tmp_path / "cut", first=2)
    for name, value in whole.model_state.items():
        assert torch.equal(value, again.model_state[name]), name          # bit for bit
    again.meta["losses"] = load_checkpoint(tmp_path / "cut", step=2).meta["losses"] + again.meta["losses"]
    assert again.meta["losses"] == whole.meta["losses"]
    run(2, tmp_path / "grown", last=2)
    grown = run(1, tmp_path / "grown", first=2)
    grown.meta["losses"] = load_checkpoint(tmp_path / "grown", step=2).meta["losses"] + grown.meta["losses"]
    assert_same(whole, grown)


def fill_disk(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    import resource
    rt = start_runtime("cpu", "float32")
    model = GPT(CONFIG, dtype=rt.dtype).init_weights(0)
    save_checkpoint(folder, 1, model=model, rt=rt)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match="Free some space"):               # on both ranks, so that none waits for ever
        save_checkpoint(folder, 2, model=model, rt=rt)
    stop_runtime()


def test_failed_save_stops_every_rank_and_keeps_the_previous(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(fill_disk, (port, str(tmp_path)), nprocs=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"] and load_checkpoint(tmp_path).step == 1
