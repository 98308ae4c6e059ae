"""presets/speedrun.yaml itself on many processes, made small by overrides: two layers, four steps, embedded data."""
import json
from pathlib import Path

from test_pipeline import ROOT, run_all

SMALL = [
    "tokenizer.documents=300", "tokenizer.vocab_size=512", "tokenizer.train_chars=100_000",
    "base.device=cpu", "base.head_dim=32", "base.sequence_len=256", "base.total_batch_tokens=4096", "base.steps=4",
    "base.documents=1000", "base.eval_batches=1", "eval.device=cpu", "eval.data=''", "eval.held_out_documents=16",
    "eval.max_per_task=2", "eval.max_new_tokens=8", "eval.ngram_tokens=5000", "eval.tasks=[letters, choice]",
    "sft.device=cpu", "sft.data=''", "sft.mixture={fact: 1, letters: 1}", "sft.examples=40", "sft.steps=4", "sft.total_batch_tokens=4096",
    "rl.device=cpu", "rl.data=''", "rl.tasks=[letters]", "rl.examples=20", "rl.prompts_per_step=8", "rl.samples_per_prompt=2",
    "rl.steps=2", "rl.max_new_tokens=8", "rl.eval_prompts=8", "rl.eval_samples=2",
]


def test_speedrun_on_eight_ranks(tmp_path):
    """torchrun with gloo: pretraining on eight ranks, fine-tuning and RL on two (sixteen processes a stage would take minutes on
    two cores); a kernel for each rank, one log, each step logged once."""
    run = tmp_path / "speedrun"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    for last, ranks in (("base", 8), ("rl", 2)):
        done = run_all("speedrun", "--run", run, "--processes", str(ranks), "--depth", "2", "--text", "world", "--until", last, *settings)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage, steps, ranks in (("base", 4, 8), ("sft", 4, 2), ("rl", 2, 2)):
        rows = [json.loads(x) for x in (run / "metrics" / f"{stage}.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "loss" in r] == list(range(steps)), f"{stage} logs each step once"
        assert json.loads((run / "markers" / f"{stage}.json").read_text())["state"] == "finished"
        assert json.loads((run / stage / "summary.json").read_text())["world_size"] == ranks
        assert sorted(p.name for p in (run / "notebooks").glob(f"{stage}*.ipynb")) == sorted(
            [f"{stage}.ipynb"] + [f"{stage}.rank{rank}.ipynb" for rank in range(1, ranks)])
    config = json.loads((sorted((run / "base").glob("step_*"))[-1] / "meta.json").read_text())["config"]
    assert config["n_layer"] == 2
    assert Path(ROOT / "presets" / "speedrun.yaml").exists()
