"""`run_all.sh miniseries`: several depths with one tokenizer and one text; skipped when finished, resumed when interrupted."""
import json

import pytest

from test_pipeline import run_all

SMALL = ["tokenizer.documents=300", "tokenizer.vocab_size=512", "tokenizer.train_chars=100_000", "base.head_dim=32",
         "base.sequence_len=128", "base.total_batch_tokens=512", "base.eval_batches=2"]


def series(folder, *depths: int):
    settings = [word for setting in [*SMALL, "base.token_ratio=0.02"] for word in ("--set", setting)]
    return run_all("miniseries", "--depths", *depths, "--run", folder, *settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series") / "mini"
    done = series(folder, 2, 1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "depth 1: 3 steps of 512 tokens" in done.stdout and "| depth |" in done.stdout
    return folder


def test_the_table_the_law_and_the_picture(folder):
    found = json.loads((folder / "miniseries.json").read_text())
    assert [row["depth"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        summary = json.loads((folder / f"d{row['depth']}" / "base" / "summary.json").read_text())
        assert row["bpb"] == summary["metrics"]["val_bpb"] and row["tokens"] == row["steps"] * 512 and row["flops"] == summary["flops"]
    assert [row["steps"] for row in found["rows"]] == [3, 18]          # at 0.02 tokens per parameter
    text = (folder / "miniseries.md").read_text()
    assert "cannot be read from this" in text and (found["law"] is None) == ("No law" in text)
    assert (folder / "miniseries.png").read_bytes()[:4] == b"\x89PNG"


def test_one_tokenizer_and_one_text(folder):
    shared = folder / "shared"
    for name in ("d1", "d2"):
        assert (folder / name / "tokenizer" / "tokenizer.json").read_bytes() == (shared / "tokenizer" / "tokenizer.json").read_bytes()
        assert (folder / name / "tokens").resolve() == (shared / "tokens").resolve()
    shards = [json.loads(sorted((folder / name / "base").glob("step_*/meta.json"))[-1].read_text())["tokens"] for name in ("d1", "d2")]
    assert shards[0] == shards[1]


def test_again_skips_and_a_lost_summary_is_made_again(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/base/*/model.safetensors")}
    (folder / "d1" / "base" / "summary.json").unlink()
    done = series(folder, 1, 2)
    assert done.returncode == 0, done.stderr
    assert "base: resume, base/summary.json is missing" in done.stdout and "base: resumed at step 3 of 3" in done.stdout
    assert done.stdout.count("base: finished earlier") == 1 and done.stdout.count("tokenizer: finished earlier") == 3
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*/base/*/model.safetensors")}


def test_fewer_depths_change_nothing(folder):
    """The text stays as long as the largest depth needed it."""
    done = series(folder, 1)
    assert done.returncode == 0 and done.stdout.count("base: finished earlier") == 1, done.stdout + done.stderr
    assert not (folder / "d1" / "earlier").exists() and "No law" in (folder / "miniseries.md").read_text()


@pytest.mark.parametrize("arguments, expected", [
    (["--depths", "0", "2"], "depth must be at least 1"),
    (["--set", "base.depth=3"], "takes its depths from --depths"),
    (["--set", "base.token_ratio=0"], "token_ratio must be positive"),
    (["--set", "base.dpth=3"], "did you mean 'depth'")])
def test_what_is_refused(arguments, expected, tmp_path):
    done = run_all("miniseries", "--run", tmp_path / "none", *arguments)
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


def test_each_depth_has_its_own_horizon_at_one_ratio():
    from nanochat_nb.launch import SERIES_DEPTHS, planned, series_overrides
    plans = {depth: planned(values)[2] for depth, values in series_overrides(SERIES_DEPTHS).items()}
    assert list(plans) == sorted(SERIES_DEPTHS)
    assert all(planned(values)[1].n_embd == 64 * depth for depth, values in series_overrides(SERIES_DEPTHS).items())
    for plan in plans.values():
        assert abs(plan.tokens / plan.parameters - 0.1) < 0.005 and plan.batch_tokens == 4096
