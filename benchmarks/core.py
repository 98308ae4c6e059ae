"""CORE beside nanochat's core_eval on this CPU: the same weights, the same rows, task by task.

    python benchmarks/core.py NANOCHAT DATA [--rows 25] [--rounds 3] [--tasks arc_easy piqa …] [--dtype float32] [--threads 1]

NANOCHAT is a checkout of karpathy/nanochat at 92d63d4, DATA a folder with core.yaml, eval_meta_data.csv and eval_data/. The model is the one
of nanochat's runs/runcpu.sh (6 layers of 384 channels, rows of 512 tokens, a vocabulary of 32,768) with random weights, saved as nanochat
saves it, with a tokenizer trained on the rows themselves. Both sides load these files. Each is a process of its own that stays, and they
take turns, so that a slow minute of the machine meets both; compared is the processor time of all threads, from the row to the verdict,
tokenizer included. "same" counts rows with the same verdict; "loss" is the largest difference between the mean losses of an option, since
equal verdicts alone say little where all are wrong.
"""
import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent.parent
LENGTH = 512


def save_tokenizer(args) -> None:
    """tokenizer.pkl, as nanochat saves it, trained on the rows' texts."""
    from nanochat_nb.evaluation import core_prompts, core_rows, read_core
    from nanochat_nb.tokenizer import Tokenizer
    files = [(task, args.data / "eval_data" / task.file) for task in read_core(args.data)[0]]
    texts = [core_prompts(task, row, [])[-1] for task, path in files if path.exists() for row in core_rows(path, None)]
    (args.folder / "tokenizer.pkl").write_bytes(pickle.dumps(Tokenizer.train(texts, args.vocabulary).encoding))


def save_model(args) -> None:
    """A nanochat model with no weight left at zero, as nanochat writes checkpoints."""
    import torch
    from nanochat.gpt import GPT, GPTConfig
    heads = args.width // 64
    fields = dict(sequence_len=LENGTH, vocab_size=args.vocabulary, n_layer=args.layers, n_head=heads, n_kv_head=heads,
                  n_embd=args.width, window_pattern="L")
    with torch.device("meta"):
        model = GPT(GPTConfig(**fields))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * (0.05 if p.ndim > 1 else 0.1)
    torch.save(model.state_dict(), args.folder / "model_000000.pt")
    (args.folder / "meta_000000.json").write_text(json.dumps({"model_config": fields}))


def nanochat_examiner(args):
    """A function from (task, rows) to a verdict per row and the mean losses of every row's options."""
    import torch
    from nanochat import core_eval
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads((args.folder / "meta_000000.json").read_text())["model_config"]))
    model.to_empty(device="cpu")
    model.init_weights()                                     # fills the tables that are not in the file
    model.load_state_dict(torch.load(args.folder / "model_000000.pt", weights_only=True))
    model.eval()
    tokenizer = RustBPETokenizer.from_directory(args.folder)
    seen, forward = [], core_eval.forward_model

    def watched(model, ids):
        losses, predictions = forward(model, ids)
        seen.append(losses)
        return losses, predictions

    core_eval.forward_model = watched

    def examine(task, rows):
        meta = {"task_type": task.kind, "num_fewshot": task.shots, "continuation_delimiter": task.delimiter}
        verdicts = []
        for i in range(len(rows)):
            verdicts.append(bool(core_eval.evaluate_example(i, model, tokenizer, rows, "cpu", meta)))
            seen[-1] = seen[-1].clone()
        losses, seen[:] = list(seen), []
        return verdicts, losses

    return examine


def our_examiner(args):
    """The same of ours."""
    import torch
    from nanochat_nb import evaluation
    from nanochat_nb.checkpoint import import_nanochat
    model, tokenizer = import_nanochat(args.folder, 0, args.folder, dtype=getattr(torch, args.dtype))
    seen, score = [], evaluation.score_questions

    def watched(model, questions, **options):
        scores = score(model, questions, **options)
        seen[:] = [questions, scores]
        return scores

    evaluation.score_questions = watched

    def examine(task, rows):
        verdicts, _ = evaluation.evaluate_core_task(model, tokenizer, task, rows)
        return verdicts, seen

    return examine


def work(args) -> None:
    """One side: examines each task named on standard input, and prints seconds, verdicts and losses as JSON.

    Losses are (places of the scored tokens, mean loss) for ours; nanochat is told the places and answers with its means.
    """
    import torch
    from nanochat_nb.evaluation import core_rows, read_core
    torch.set_num_threads(args.threads)
    ours = args.worker == "ours"
    examine = (our_examiner if ours else nanochat_examiner)(args)
    tasks = {task.label: task for task in read_core(args.data)[0]}
    for line in sys.stdin:
        asked = json.loads(line)
        if "places" in asked:                                # of the task just examined
            print(json.dumps([[losses[k, start - 1:end - 1].mean().item() for k, (start, end) in enumerate(row)]
                              for row, losses in zip(asked["places"], kept)]), flush=True)
            continue
        task = tasks[asked["task"]]
        rows = core_rows(args.data / "eval_data" / task.file, args.rows)
        start = time.process_time()
        verdicts, kept = examine(task, rows)
        found = {"seconds": time.process_time() - start, "verdicts": verdicts}
        if ours:
            questions, scores = kept
            found["places"] = [[(s, len(o)) for o, s in zip(q.options, q.starts)] for q in questions]
            found["losses"] = [[loss for loss, _ in row] for row in scores]
        print(json.dumps(found), flush=True)


def start(args, worker: str) -> subprocess.Popen:
    """A process of one side."""
    numbers = [f"--{k}={getattr(args, k)}" for k in ("rows", "layers", "width", "vocabulary", "threads", "dtype")]
    return subprocess.Popen([sys.executable, __file__, str(args.nanochat), str(args.data), f"--worker={worker}", f"--folder={args.folder}",
                             *numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{args.nanochat}", "NANOCHAT_DTYPE": args.dtype,
                                              "OMP_NUM_THREADS": str(args.threads)})


def ask(process: subprocess.Popen, question: dict):
    """What a side answers."""
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(next(line for line in process.stdout if line[0] in "{["))


def compare(args, sides: dict, task: str) -> tuple[str, list[float], int]:
    """A line of the table; seconds of nanochat and of ours, the median of the rounds; rows with the same verdict."""
    found = [{side: ask(process, {"task": task}) for side, process in sides.items()} for _ in range(args.rounds)]
    theirs, ours = found[-1]["nanochat"], found[-1]["ours"]
    means = ask(sides["nanochat"], {"places": ours["places"]})
    apart = max(abs(a - b) for x, y in zip(means, ours["losses"]) for a, b in zip(x, y))
    same = sum(a == b for a, b in zip(theirs["verdicts"], ours["verdicts"]))
    seconds = [statistics.median(r[side]["seconds"] for r in found) for side in sides]
    ratios = [r["nanochat"]["seconds"] / r["ours"]["seconds"] for r in found]
    line = (f"| {task} | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[0] / seconds[1]:.1f}× | {', '.join(f'{r:.1f}' for r in ratios)} | "
            f"{same} of {len(means)} | {sum(ours['verdicts'])} | {apart:.0e} |")
    return line, seconds, same == len(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, value in (("rows", 25), ("rounds", 3), ("layers", 6), ("width", 384), ("vocabulary", 32768), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="keep the model here, and take it from here when it is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows < 11:
        parser.error("--rows must be at least 11: most tasks show ten other rows before each")
    args.nanochat, args.data = args.nanochat.resolve(), args.data.resolve()
    sys.modules.setdefault("rustbpe", SimpleNamespace()) if args.worker == "nanochat" else None   # to train with; not needed here
    if args.worker:
        return {"tokenizer": save_tokenizer, "model": save_model}.get(args.worker, work)(args)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or Path(folder)
        args.folder.mkdir(parents=True, exist_ok=True)
        if not (args.folder / "meta_000000.json").exists():
            if any(start(args, worker).wait() for worker in ("tokenizer", "model")):
                sys.exit("the model could not be made")
        sides = {side: start(args, side) for side in ("nanochat", "ours")}
        examine_all(args, sides)
        for process in sides.values():
            process.stdin.close()
            process.wait()


def examine_all(args, sides: dict) -> None:
    """The table, a line per task, and its last line for all together."""
    from nanochat_nb.evaluation import read_core
    listed = [t.label for t in read_core(args.data)[0] if (args.data / "eval_data" / t.file).exists()]
    print(f"{args.layers} layers, {args.width} channels, vocabulary {args.vocabulary}, {args.dtype}, {args.threads} threads, {args.rows} rows\n")
    print("| task | nanochat, CPU s | ours | ratio | rounds' ratios | same | right | loss |\n" + "|---" * 8 + "|", flush=True)
    total, same = [0.0, 0.0], True
    for task in args.tasks or listed:
        line, seconds, agreed = compare(args, sides, task)
        total, same = [a + b for a, b in zip(total, seconds)], same and agreed
        print(line, flush=True)
    print(f"| all | {total[0]:.2f} | {total[1]:.2f} | {total[0] / total[1]:.1f}× | | {'all' if same else 'NOT ALL'} | | |")


if __name__ == "__main__":
    main()
