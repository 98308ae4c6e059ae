"""`--plan`: what it says agrees with what is built, and it builds nothing."""
import re

import pytest
import torch

from nanochat_nb import launch
from nanochat_nb.launch import load_preset, main, override, plan_text
from nanochat_nb.pretraining import memory_plan, parse_hardware, standing_bytes
from nanochat_nb.runtime import Runtime, UserError


def numbers(text: str, name: str) -> str:
    """The value of the row called `name`."""
    return re.search(rf"^  {name} +(\S+)", text, re.M)[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A place for runs and downloads of which a test can say that nothing is in it."""
    monkeypatch.setattr(launch, "run_path", lambda name: tmp_path / "runs" / name)
    monkeypatch.setenv("NANOCHAT_NB_DATA", str(tmp_path / "data"))
    return tmp_path


def test_plan_of_the_speedrun_builds_nothing(elsewhere, capsys):
    main(["speedrun", "--plan", "--hardware", "8xH100", "--depth", "20"])
    text = capsys.readouterr().out
    assert list(elsewhere.iterdir()) == []
    tables, matrices, gates, scalars = 12 * 32768 * 1280, 20 * 12 * 1280**2, 10 * 12 * 10, 24 + 2 + 2 * 20
    assert numbers(text, "total") == f"{tables + matrices + gates + scalars:,}"
    steps, tokens = (int(numbers(text, k).replace(",", "")) for k in ("steps", "tokens"))
    assert tokens == steps * 1_048_576 and abs(tokens / 8 / (12 * 20 * 1280**2 + 32768 * 1280) - 1) < 0.01
    parts = re.search(r"GiB per GPU.*?\n(.*?)\n  together +(\S+)", text, re.S)
    together = sum(float(line.split()[-1]) for line in parts[1].splitlines())
    assert abs(together - float(parts[2])) < 0.05 and "fits into 80" in text
    alone = float(numbers(text, "FLOPs")) / (0.488 * 989e12) / 3600
    assert alone < float(numbers(text, "GPU-hours")) < 2 * alone
    assert abs(int(re.search(r"about \$(\d+) at \$3.00", text)[1]) - 3 * float(numbers(text, "GPU-hours"))) < 1
    for source in ("2505.13738", "2203.15556", "2409.19913", "2405.13698"):
        assert source in text


def test_plan_without_hardware_is_for_this_machine(elsewhere, capsys):
    main(["laptop", "--plan", "--set", "base.steps=10"])
    text = capsys.readouterr().out
    assert numbers(text, "tokens") == "40,960" and "fixed by hand" in text and "unknown" not in text


def test_what_does_not_fit_says_what_would():
    hardware = parse_hardware("8x4090")
    text = plan_text(load_preset("speedrun"), hardware, 8)
    advice = re.search(r"does not fit[^;]*; try\s+--set (\S+)", text)[1]
    assert "fits into 24" in plan_text(override(load_preset("speedrun"), settings=[advice]), hardware, 8)
    rows = int(advice.split("=")[1])
    assert "does not fit" in plan_text(override(load_preset("speedrun"), settings=[f"base.micro_batch_rows={2 * rows}"]), hardware, 8)
    assert "not even one row" in plan_text(override(load_preset("speedrun"), depth=40), hardware, 8)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_state_is_divided_as_the_optimizer_divides_it(world_size):
    """The plan's share is the largest of all ranks', and together they hold the whole state."""
    from nanochat_nb.model import GPT, GPTConfig
    from nanochat_nb.optimizer import build_optimizer
    config = GPTConfig.from_depth(4, vocab_size=512, sequence_len=128, head_dim=64)
    model, shares = GPT(config, dtype=torch.float32), []
    for rank in range(world_size):
        stacks = build_optimizer(model, rt=Runtime(torch.device("cpu"), torch.float32, rank, world_size)).stacks
        shares.append(sum(t.numel() * 4 for stack in stacks for t in stack.state.values()))
    assert standing_bytes(config, world_size=world_size)["optimizer state"] == max(shares)
    assert standing_bytes(config)["optimizer state"] == sum(shares)
    assert memory_plan(config, rows=2, world_size=world_size)["weights"] == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("name, expected", [
    ("8xH100", ("H100", 8)), ("h200", ("H200", 1)), ("2 x RTX 4090", ("RTX 4090", 2)), ("4090", ("RTX 4090", 1)),
    ("NVIDIA A100", ("A100", 1)), ("8xH100-PCIe", ("H100 PCIe", 8)), ("4xcpu", ("CPU", 4)), ("2xCPU-AMX", ("CPU-AMX", 2))])
def test_hardware_is_understood(name, expected):
    found = parse_hardware(name)
    assert (found.name, found.count) == expected and found.flops(12) > 0
    assert found.is_gpu == (found.memory > 0)


@pytest.mark.parametrize("arguments, expected", [
    (["--plan", "--hardware", "8xFOO"], "unknown device 'FOO'"),
    (["--plan", "--hardware", "8xH10"], "did you mean 'H100'"),
    (["--plan", "--hardware", "0xH100"], "at least 1 H100"),
    (["--plan", "--hardware", ""], "write it as in 8xH100"),
    (["--plan", "--hardware", "3xH100"], "does not divide over 3 ranks"),
    (["--plan", "--processes", "0"], "--processes must be at least 1"),
    (["--plan", "--depth", "0"], "depth must be at least 1"),
    (["--plan", "--set", "base.aspect_ratio=0"], "aspect_ratio must be at least 1"),
    (["--hardware", "8xH100"], "--hardware goes with --plan")])
def test_what_cannot_be_planned(elsewhere, arguments, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        main(["speedrun", *arguments])
    assert list(elsewhere.iterdir()) == []


def test_a_plan_looks_at_own_files_as_a_run_does(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\0\1\2" * 100)
    with pytest.raises(UserError, match="binary"):
        main(["laptop", "--plan", "--text", str(tmp_path / "x.txt")])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", None])
def test_a_marker_that_cannot_be_read_means_not_done(tmp_path, content):
    path = launch.marker_path(tmp_path, launch.STEPS["base"])
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    assert launch.read_marker(tmp_path, launch.STEPS["base"]) == {}
