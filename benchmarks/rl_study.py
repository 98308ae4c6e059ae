"""Reinforcement learning against more fine-tuning, from one run's SFT checkpoint, at equal compute.

    python benchmarks/rl_study.py runs/laptop [--seeds 3] [--steps 24] [--only NAME ...]

Each recipe below starts from the same SFT weights and practises word problems. Two rivals spend the FLOPs of the first recipe on
more fine-tuning: on the solutions of new word problems, and on the mixture of the run's own fine-tuning (again, in the same
order: once). With one seed RL and the first rival get the same questions, which the run's
own fine-tuning (seed 0) has not shown; RL sees only whether its answers are right. All are tested on the same 200 held-out
problems, 8 answers each at temperature 1 (pass@1, pass@8, unbiased) and one at temperature 0. Nothing is written to RUN.
"""
import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from nanochat_nb.checkpoint import load_checkpoint, load_model
from nanochat_nb.inference import Engine
from nanochat_nb.rl import open_questions, roll_out, run_rl, test_pass
from nanochat_nb.runtime import start_runtime
from nanochat_nb.sft import run_sft

TASKS = ["word_problem"]
BATCH = 4096                                             # tokens a step of more SFT
PRACTICE = {"tasks": TASKS, "examples": 1000, "prompts_per_step": 16, "samples_per_prompt": 8, "max_new_tokens": 160,
            "eval_prompts": 1, "eval_samples": 1}
RIGHT, MEAN = {"advantage": "none", "lr_fraction": 0.1}, {"advantage": "mean", "lr_fraction": 0.05}
RECIPES = {
    "right answers only, 0.1 of the rates": RIGHT,
    "right answers only, 0.05": RIGHT | {"lr_fraction": 0.05},
    "right answers only, 0.2": RIGHT | {"lr_fraction": 0.2},
    "right answers only, 0.1, groups of 16": RIGHT | {"prompts_per_step": 8, "samples_per_prompt": 16},
    "right answers only, 0.1, linear": RIGHT | {"lr_shape": "linear"},
    "minus the mean, 0.05": MEAN,
    "minus the mean, 0.02": MEAN | {"lr_fraction": 0.02},
    "minus the mean, 0.1": MEAN | {"lr_fraction": 0.1},
    "GRPO's std, 0.05": MEAN | {"advantage": "std"},
    "RLOO, 0.05": MEAN | {"advantage": "others"},
    "minus the mean, 0.05, per sequence": MEAN | {"normalize": "sequence"},
    "minus the mean, 0.05, constant length": MEAN | {"normalize": "constant"},
}


RIVALS = (("solutions of new problems", True, 0.1), ("solutions of new problems", True, 0.3),
          ("the same mixture", False, 0.1), ("the same mixture", False, 0.3))


def examine(folder: Path, stage: str, rt) -> dict[str, float]:
    """pass@1, pass@8 and the greedy score of each task on held-out questions."""
    model, tokenizer, _ = load_model(folder, stage=stage, device=rt.device, dtype=rt.dtype)
    engine, out = Engine(model, tokenizer), {}
    for task in TASKS:
        held = open_questions([task], "test", data="", examples=200, seed=0)
        p = {"seed": 7, "eval_samples": 8, "max_new_tokens": 160, "temperature": 1.0, "top_k": 0}
        found = test_pass(engine, tokenizer, held, p, rt)
        out |= {k: v for k, v in found.items() if k.startswith(task)}
        greedy = roll_out(engine, tokenizer, held, [0] * len(held), num_samples=1, max_new_tokens=160,
                          temperature=0.0, top_k=0)
        out[f"{task}_greedy"] = sum(group[0].reward > 0 for group in greedy) / len(held)
    return out


def practised(run: Path, recipe: dict, seed: int, steps: int, rt) -> tuple[dict, float]:
    """Scores after RL, and the FLOPs that it spent."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
        shutil.copytree(run / "sft", folder / "sft")
        summary = run_rl(run=str(folder), steps=steps, seed=seed, **{**PRACTICE, **recipe})
        return examine(folder, "rl", rt), summary["flops"]


def fine_tuned(run: Path, flops: float, seed: int, rt, *, solutions: bool, rate: float) -> dict:
    """Scores after as many FLOPs of more fine-tuning: on `solutions` of new problems, or on the same mixture
    as before."""
    model, _, meta = load_model(run, stage="sft", device=rt.device, dtype=rt.dtype)
    steps = max(1, round(flops / model.flops_per_token() / BATCH))
    before = meta["recipe"]
    options = ({"mixture": dict.fromkeys(TASKS, 1.0), "examples": steps * BATCH // 150, "seed": seed} if solutions else
               {"mixture": before["mixture"], "examples": before["examples"], "seed": before["seed"]})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
        shutil.copytree(run / "sft", folder / "base")
        run_sft(run=str(folder), epochs=1.0, steps=steps, total_batch_tokens=BATCH, lr_fraction=rate, eval_every=0,
                eval_examples=5, **options)
        return examine(folder, "sft", rt)


def line(name: str, results: list[dict], seconds: float) -> str:
    """One row of the table: mean over seeds, ± standard deviation between seeds, in percent."""
    cells = []
    for key in (f"{t}_{k}" for t in TASKS for k in ("pass@1", "pass@8", "greedy")):
        values = [100 * r[key] for r in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    return f"| {name} | {len(results)} | " + " | ".join(cells) + f" | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    rt = start_runtime("cpu", "")
    if load_checkpoint(args.run / "sft").meta["recipe"]["seed"] != 0:
        parser.error("the study's seeds begin at 1: it needs a run that was fine-tuned with seed 0")
    heads = ["pass@1", "pass@8", "greedy"]
    print("| recipe | seeds | " + " | ".join(heads) + " | s |\n" + "|---" * (len(heads) + 3) + "|", flush=True)
    print(line("SFT", [examine(args.run, "sft", rt)], 0), flush=True)
    for i, name in enumerate(args.only):
        start, results, spent = time.monotonic(), [], 0.0
        for seed in range(1, args.seeds + 1):
            scores, spent = practised(args.run, RECIPES[name], seed, args.steps, rt)
            results.append(scores)
        print(line(name, results, (time.monotonic() - start) / args.seeds), flush=True)
        for kind, solutions, rate in RIVALS if i == 0 else ():
            start = time.monotonic()
            seeds = range(1, args.seeds + 1) if solutions else [0]
            more = [fine_tuned(args.run, spent, seed, rt, solutions=solutions, rate=rate) for seed in seeds]
            print(line(f"more SFT, {kind}, {rate} of the rates, {spent:.1e} FLOPs", more, (time.monotonic() - start) / len(seeds)), flush=True)


if __name__ == "__main__":
    main()
