"""Several gloo ranks train the model that one rank trains: same losses, same weights, states that fit any world size."""
import os
import re
import resource
import socket

import pytest
import torch
import torch.multiprocessing as mp

from nanochat_nb import runtime
from nanochat_nb.checkpoint import load_checkpoint, save_checkpoint
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.optimizer import MuonAdamW, build_optimizer
from nanochat_nb.runtime import (UserError, compute_dtype, detect_device, generator, join_ranks, start_runtime,
                                 stop_runtime)

# 3 layers and 65 symbols: numbers of matrices and of elements that neither 2 nor 4 divides
CONFIG = GPTConfig(sequence_len=16, vocab_size=65, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
ROWS, STEPS = 8, 4


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 65, (ROWS, 17), generator=generator(0, "test batch", step))


def train(rank: int, world_size: int, port: int, folder: str, first: int = 0) -> None:
    """Train from the checkpoint of step `first` to the end on this rank's rows, saving after every second step."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    rt = start_runtime("cpu", "float32")
    model, losses = GPT(CONFIG, dtype=rt.dtype).init_weights(0), []
    optimizer = build_optimizer(model, rt=rt)
    if first:
        saved = load_checkpoint(folder, step=first)
        losses = saved.meta["losses"]
        model.load_state_dict(saved.model_state)
        optimizer.load_full_state(saved.optimizer_state)
    for step in range(first, STEPS):
        rows = batch(step)[rank::world_size]
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [value / world_size for value in rt.sum(loss.item())]
        if step % 2:
            save_checkpoint(folder, step + 1, model=model, optimizer=optimizer, rt=rt, meta={"losses": losses}, keep=9)
    sizes = rt.gather(sum(p.detach().double().abs().sum().item() for p in model.parameters()))
    assert len(set(sizes)) == 1, "the ranks hold different models"
    if world_size > 1:
        fill_disk(folder, model, rt)
    stop_runtime()


def fill_disk(folder: str, model: GPT, rt) -> None:
    """A save that fails on rank 0 must end every rank with the same error, so that none waits for ever."""
    with pytest.raises((TypeError, UserError), match="not JSON serializable"):    # a mistake, not a full disk
        save_checkpoint(folder, 99, model=model, rt=rt, meta={"loop": object()})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match="Free some space"):
        save_checkpoint(folder, 99, model=model, rt=rt)


def spawn(work, world_size: int, *arguments) -> None:
    """`work(rank, world_size, port, *arguments)` in a process for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (world_size, port, *arguments), nprocs=world_size)


def run(world_size: int, folder, first: int = 0) -> None:
    if world_size > 1:
        return spawn(train, world_size, str(folder), first)
    before = dict(os.environ)
    try:
        train(0, 1, 0, str(folder), first)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(1, folder)
    return load_checkpoint(folder)


def assert_same(a, b, tolerance: float = 1e-4) -> None:
    assert a.meta["losses"] == pytest.approx(b.meta["losses"], abs=tolerance) and len(a.meta["losses"]) == STEPS
    for x, y in ((a.model_state, b.model_state), (a.optimizer_state, b.optimizer_state)):
        assert x.keys() == y.keys()
        for name in x:
            # AdamW's first steps are signs of the gradient; a rounding may turn one where the gradient is ~0
            assert (x[name].double() - y[name].double()).abs().gt(tolerance).float().mean() < 0.01, name


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one(one, tmp_path, world_size):
    run(world_size, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]    # the failed save left nothing
    assert_same(one, load_checkpoint(tmp_path))
    if world_size == 2:
        run(1, tmp_path, first=2)                              # and one rank continues what two began
        assert_same(one, load_checkpoint(tmp_path))


def test_resume_is_bit_for_bit(one, tmp_path):
    run(1, tmp_path)
    run(1, tmp_path, first=2)
    again = load_checkpoint(tmp_path)
    assert again.meta["losses"] == one.meta["losses"]
    assert all(torch.equal(value, again.model_state[name]) for name, value in one.model_state.items())


# numbers of elements and of matrices that neither 2 nor 4 divides, and fewer than there are ranks
ODD = {"adamw": [[(7,)], [(5, 3)], [(1,)], [(65, 4)]], "muon": [[(6, 4)] * 3, [(4, 6)], [(4, 4)] * 5]}


def odd_optimizer(rt=None) -> MuonAdamW:
    """Parameters of odd sizes in float64, drawn from a seed."""
    rng, groups = generator(0, "odd"), []
    for kind, numbers in (("adamw", dict(lr=0.1, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1)),
                          ("muon", dict(lr=0.1, momentum=0.9, beta2=0.9, rounds=5, weight_decay=0.1))):
        for shapes in ODD[kind]:
            params = [torch.randn(shape, generator=rng).double().requires_grad_() for shape in shapes]
            groups.append({"kind": kind, "params": params, **numbers})
    return MuonAdamW(groups, rt, dtype=torch.float64)


def odd_steps(optimizer: MuonAdamW, ranks: list[int], steps: int = 4) -> dict:
    """Steps with the mean of the gradients that each of `ranks` has; all parameters and the whole state afterwards."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(params):
            own = [torch.randn(p.shape, generator=generator("odd", step, rank, i)).double() for rank in ranks]
            p.grad = sum(own) / len(own)
        params[1].grad = None if step == 2 else params[1].grad              # counts as zero
        optimizer.step()
    return {"params": torch.cat([p.detach().flatten() for p in params]), "state": optimizer.full_state()}


def odd_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    rt = start_runtime("cpu", "float32")
    torch.save(odd_steps(odd_optimizer(rt), [rank]), f"{folder}/{rank}.pt")
    stop_runtime()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_divided_optimizer_is_the_whole_one(tmp_path, world_size):
    """Given gradients in float64: the same parameters on every rank, and together the state of one process that got their mean."""
    spawn(odd_rank, world_size, str(tmp_path))
    want = odd_steps(odd_optimizer(), list(range(world_size)))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    assert all(torch.equal(rank["params"], found[0]["params"]) and (rank["state"] == {}) == (i > 0) for i, rank in enumerate(found))
    assert torch.allclose(found[0]["params"], want["params"], rtol=1e-10, atol=1e-12)
    assert found[0]["state"].keys() == want["state"].keys()
    for name, value in want["state"].items():
        assert torch.allclose(found[0]["state"][name], value, rtol=1e-10, atol=1e-12), name


def two_gpus(monkeypatch) -> None:
    """Pretend that this machine has two GPUs, and start no process group."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(runtime, "join_ranks", lambda where: (0, int(os.environ.get("WORLD_SIZE", 1)), 0))
    monkeypatch.setattr(runtime, "_compute_dtype", None)


def test_the_gpu_asked_for_is_the_gpu_used(monkeypatch):
    two_gpus(monkeypatch)
    assert start_runtime("cuda:1", "float32").device == torch.device("cuda:1")
    assert start_runtime("cuda", "float32").device == torch.device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_runtime(None, "float32").device == torch.device("cuda:1")
    with pytest.raises(UserError, match="every process needs its own"):
        start_runtime("cuda:1", "float32")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="has only 2"):
        start_runtime(None, "float32")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cuda:2", "cuda:x", "cuda:", "gpu"):
        with pytest.raises(UserError):
            detect_device(name)


def test_mps_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert detect_device().type == "cpu" and detect_device("mps").type == "mps"


def test_joining_ranks_leaves_the_dtype_alone(monkeypatch):
    monkeypatch.setattr(runtime, "_compute_dtype", torch.bfloat16)
    assert join_ranks(torch.device("cpu")) == (0, 1, 0) and compute_dtype() == torch.bfloat16


def test_the_command_for_several_machines_is_one_that_torchrun_takes(root):
    """As chapters/setup.md prints it: what follows `--` is ours, however much it looks like torchrun's."""
    from torch.distributed.run import parse_args
    page = (root / "chapters" / "setup.md").read_text("utf-8")
    command = re.search(r"torchrun (--nnodes.*?) \|\| break", page, re.DOTALL)[1].replace("\\\n", "")
    found = parse_args(command.split())
    assert found.module and found.training_script == "nanochat_nb.launch" and found.nnodes == "2"
    assert found.training_script_args == ["$step", "--run", "$run", "--preset", "speedrun"]
