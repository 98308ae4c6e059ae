"""Reinforcement learning against more fine-tuning, from one run's SFT checkpoint, at equal compute.

    python benchmarks/rl_study.py runs/laptop [--seeds 1 2 3] [--steps 48] [--only NAME ...] [--out FILE.jsonl]
    python benchmarks/rl_study.py runs/laptop --rivals TFLOPS [--seeds 1 2 3] [--out FILE.jsonl]
    python benchmarks/rl_study.py runs/laptop --solutions 300 --times 14 […]

Each recipe below starts from the same SFT weights and practises word problems. Three rivals spend the FLOPs of the first recipe on
more fine-tuning: on the solutions of new word problems, on the mixture of the run's own fine-tuning (again, in the same
order: once), and on that mixture's word problems alone. With one seed RL and the first rival get the same questions, which the run's
own fine-tuning (seed 0) has not shown; RL sees only whether its answers are right. All are tested on the same 200 held-out
problems, 8 answers each at temperature 1 (pass@1, pass@8, unbiased), 8 at temperature 0.5 (cold), and one at temperature 0.
With --rivals nothing is practised: the rivals alone, at so many FLOPs. With --solutions the run's base is first fine-tuned anew, as
the run was but with so few word problems, each shown --times times, and all that follows starts there. Nothing is written to RUN.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from nanochat_nb.checkpoint import load_checkpoint, load_model
from nanochat_nb.inference import Engine
from nanochat_nb.rl import open_questions, roll_out, run_rl, test_pass
from nanochat_nb.runtime import MetricsLog, start_runtime
from nanochat_nb.sft import run_sft
from nanochat_nb.tasks import open_task

TASKS = ["word_problem"]
SCORES = {"pass@1": "pass@1", "pass@8": "pass@8", "pass@1_cold": "cold", "greedy": "greedy"}   # and their heads
BATCH = 4096                                             # tokens a step of more SFT
PRACTICE = {"tasks": TASKS, "examples": 1500, "prompts_per_step": 16, "samples_per_prompt": 8, "max_new_tokens": 160,
            "advantage": "mean", "normalize": "tokens", "lr_fraction": 0.05, "eval_prompts": 64, "eval_samples": 8,
            "eval_every": 16}
SMALL = {"advantage": "likelihood", "lr_fraction": 0.1, "temperature": 0.7, "examples": 2000, "prompts_per_step": 8, "eval_every": 0}
RECIPES = {                                              # each changes what it names
    "minus the mean": {},
    "GRPO: over the std, mean per answer": {"advantage": "std", "normalize": "sequence"},
    "over the std": {"advantage": "std"},
    "Dr. GRPO: by a constant length": {"normalize": "constant"},
    "nanochat: mean per question": {"normalize": "group"},
    "RLOO: minus the others": {"advantage": "others"},
    "MaxRL: right answers, one vote a group": {"advantage": "likelihood", "lr_fraction": 0.1},
    "MaxRL, cooler, with old solutions": {"advantage": "likelihood", "lr_fraction": 0.1, "temperature": 0.7, "replay": 16,
                                          "examples": 4000},
    "preset: old solutions, rare answers": SMALL | {"replay": 16, "recall": 16},
    "the present preset: also reminded of the rest": SMALL | {"replay": 16, "recall": 16, "reminders": 16},
    "preset without rare answers": SMALL | {"replay": 16},
    "preset without old solutions": SMALL | {"recall": 16},
    "DAPO: over the std, silent groups replaced": {"advantage": "std", "rounds": 3, "steps": 0.6},
    "silent groups replaced": {"rounds": 3, "steps": 0.6},
    "groups of 4": {"prompts_per_step": 32, "samples_per_prompt": 4},
    "groups of 16": {"prompts_per_step": 8, "samples_per_prompt": 16},
    "rates falling in a line": {"lr_shape": "linear"},
    "0.02 of the rates": {"lr_fraction": 0.02},
    "0.1 of the rates": {"lr_fraction": 0.1},
}


RIVALS = [(what, rate) for what in ("the same mixture", "its word problems alone", "solutions of new problems") for rate in (0.1, 0.3)]


def examine(folder: Path, stage: str, rt) -> dict[str, float]:
    """pass@1, pass@8 and the greedy score of each task on held-out questions."""
    model, tokenizer, _ = load_model(folder, stage=stage, device=rt.device, dtype=rt.dtype)
    engine, out = Engine(model, tokenizer), {}
    for task in TASKS:
        held = open_questions([task], "test", data="", examples=200, seed=0)
        p = {"seed": 7, "eval_samples": 8, "max_new_tokens": 160, "top_k": 0}
        for name, temperature in (("", 1.0), ("_cold", 0.5)):
            found = test_pass(engine, tokenizer, held, p | {"temperature": temperature}, rt)
            out |= {k + name: v for k, v in found.items() if k.startswith(task)}
        greedy = roll_out(engine, tokenizer, held, [0] * len(held), num_samples=1, max_new_tokens=160,
                          temperature=0.0, top_k=0)
        out[f"{task}_greedy"] = sum(group[0].reward > 0 for group in greedy) / len(held)
    return out


def practised(run: Path, recipe: dict, seed: int, steps: int, rt) -> dict:
    """Scores after RL, the FLOPs that it spent, and its tests on 64 validation problems on the way."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
        shutil.copytree(run / "sft", folder / "sft")
        settings = PRACTICE | recipe | {"steps": round(steps * recipe.get("steps", 1))}
        summary = run_rl(run=str(folder), seed=seed, **settings)
        tests = [r for r in MetricsLog(folder / "metrics" / "rl.jsonl").rows() if "pass@1" in r]
        way = [[r["step"], r["pass@1"], r["pass@8"]] for r in tests]
        return examine(folder, "rl", rt) | {"flops": summary["flops"], "way": way}


def fine_tuned(run: Path, flops: float, seed: int, rt, *, what: str, rate: float) -> dict:
    """Scores after as many FLOPs of more fine-tuning: `what` is one of the rivals' names."""
    model, _, meta = load_model(run, stage="sft", device=rt.device, dtype=rt.dtype)
    steps = max(1, round(flops / model.flops_per_token() / BATCH))
    before = meta["recipe"]
    options = {name: before[name] for name in ("mixture", "examples", "seed", "conversations", "conversation_epochs")}
    if what == "the same mixture":
        options["text_share"] = before["text_share"]
    else:
        options["mixture"] = {task: before["mixture"][task] for task in TASKS}
    if what == "solutions of new problems":
        options |= {"mixture": dict.fromkeys(TASKS, 1.0), "examples": steps * BATCH // 150, "seed": seed, "conversations": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
        shutil.copytree(run / "sft", folder / "base")
        (folder / "tokens").symlink_to((run / "tokens").resolve())
        run_sft(run=str(folder), epochs=1.0, steps=steps, total_batch_tokens=BATCH, lr_fraction=rate, eval_every=0,
                eval_examples=5, **options)
        return examine(folder, "sft", rt) | {"flops": steps * BATCH * model.flops_per_token()}


def with_few_solutions(run: Path, folder: Path, solutions: int, times: float) -> Path:
    """`folder`, with the run's base fine-tuned as it was but on `solutions` word problems, each shown `times` times (one in twenty
    once: of conversations from a file so many are kept for validation)."""
    before, again = load_checkpoint(run / "sft").meta["recipe"], folder / "again.jsonl"
    for part in ("tokenizer", "base"):
        shutil.copytree(run / part, folder / part)
    (folder / "tokens").symlink_to((run / "tokens").resolve())
    task = open_task("word_problem", "train", limit=solutions, seed=before["seed"])
    again.write_text("".join(json.dumps(task[i]["messages"]) + "\n" for i in range(solutions)))
    options = {name: before[name] for name in ("mixture", "examples", "epochs", "total_batch_tokens", "lr_fraction", "text_share", "seed", "conversations")}
    options["conversations"] = [*before["conversations"], str(again)]
    options["mixture"] = before["mixture"] | {"word_problem": solutions / before["examples"]}
    run_sft(run=str(folder), steps=0, eval_every=0, conversation_epochs=times - 1, **options)
    return folder


def line(name: str, results: list[dict], seconds: float) -> str:
    """One row of the table: mean over seeds, ± standard deviation between seeds, in percent; FLOPs in units of 1e12."""
    cells = []
    for key in (f"{t}_{k}" for t in TASKS for k in SCORES):
        values = [100 * r[key] for r in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    flops = statistics.mean(r.get("flops", 0) for r in results) / 1e12
    return f"| {name} | {len(results)} | " + " | ".join(cells) + f" | {flops:.1f} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rivals", type=float, metavar="TFLOPS")
    parser.add_argument("--solutions", type=int, default=0, help="so many distinct word problems in fine-tuning (default: as RUN)")
    parser.add_argument("--times", type=float, default=14.0, help="how often each is shown then (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a .jsonl file for every single result")
    args = parser.parse_args()
    rt = start_runtime("cpu", "")
    if load_checkpoint(args.run / "sft").meta["recipe"]["seed"] != 0:
        parser.error("the study's seeds begin at 1: it needs a run that was fine-tuned with seed 0")
    with tempfile.TemporaryDirectory() as place:
        study(with_few_solutions(args.run, Path(place), args.solutions, args.times) if args.solutions else args.run, args, rt)


def study(run: Path, args, rt) -> None:
    """The table, a line after another."""
    print("| recipe | seeds | " + " | ".join(SCORES.values()) + " | TFLOPs | s |\n" + "|---" * (len(SCORES) + 4) + "|", flush=True)

    def tried(name: str, seeds, work) -> list[dict]:
        start, results = time.monotonic(), []
        for seed in seeds:
            results.append(work(seed))
            if args.out:
                with args.out.open("a") as file:
                    few = {"solutions": args.solutions} if args.solutions else {}
                    file.write(json.dumps(few | {"recipe": name, "seed": seed} | results[-1]) + "\n")
        print(line(name, results, (time.monotonic() - start) / len(results)), flush=True)
        return results

    def rivals(flops: float) -> None:
        for what, rate in RIVALS:
            tried(f"more SFT, {what}, {rate} of the rates", args.seeds if what == "solutions of new problems" else [0],
                  lambda seed: fine_tuned(run, flops, seed, rt, what=what, rate=rate))

    if args.rivals:
        return rivals(args.rivals * 1e12)
    tried("SFT", [0], lambda seed: examine(run, "sft", rt))
    for name in args.only:
        results = tried(name, args.seeds, lambda seed: practised(run, RECIPES[name], seed, args.steps, rt))
        if name == next(iter(RECIPES)):
            rivals(statistics.mean(r["flops"] for r in results))


if __name__ == "__main__":
    main()
