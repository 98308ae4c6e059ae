"""Generating beside nanochat's Engine on this CPU: the same random weights, the same prompts, turn by turn.

    python benchmarks/engine.py NANOCHAT [--rounds 5] [--dtype float32] [--layers 4 --width 256 --vocabulary 4096] [--threads 2]
    taskset -c 0 python benchmarks/engine.py NANOCHAT --threads 1 --rounds 30 --loads "batch 1"        # on a busy machine

NANOCHAT is a checkout of karpathy/nanochat at 92d63d4. A model of nanochat's with random weights is saved as nanochat saves them and
imported here. Each side is a process of its own that stays; they take turns, and every second round the other begins. Three
loads: one prompt of 32 tokens; 64 prompts of 8 to 256 tokens, which nanochat's engine takes one by one; 16 prompts of 64 tokens, 8 samples
of each (a step of RL). Every answer has 128 tokens, greedy but for the samples, without tools. The first round warms up and is not counted.

Tokens a second are those of each side's fastest round: others' work on the machine makes a round slower, never faster. "ratio" compares
these rounds; "by CPU" compares, in the same way, the processor time that the process used, which others' work hardly touches (on several
threads it counts waiting too, so use --threads 1 for it). "middle" is the median of the rounds' ratios of time. "same" counts greedy
tokens that agree: in float32 all should, in bfloat16 rounding parts them. nanochat computes in float32 on a CPU unless told otherwise, and
casts its weights at every step; --nanochat-dtype float32 beside --dtype bfloat16 compares what each side takes by itself on a CPU with bfloat16.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent.parent
LENGTH, NEW = 512, 128


def loads(vocabulary: int) -> dict[str, tuple[list[list[int]], int]]:
    """Name → (prompts, samples of each)."""
    draw = random.Random(0)
    prompts = lambda lengths: [[draw.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return {"batch 1": (prompts([32]), 1), "64 mixed prompts": (prompts(draw.choices(range(8, 257), k=64)), 1),
            "16 × 8 samples": (prompts([64] * 16), 8)}


def save_model(folder: Path, args) -> None:
    """A nanochat model with no weight left at zero, as nanochat writes checkpoints."""
    import torch
    from nanochat.gpt import GPT, GPTConfig
    heads = args.width // 64
    fields = dict(sequence_len=LENGTH, vocab_size=args.vocabulary, n_layer=args.layers, n_head=heads, n_kv_head=heads,
                  n_embd=args.width, window_pattern="SSSL")
    with torch.device("meta"):
        model = GPT(GPTConfig(**fields))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * (0.05 if p.ndim > 1 else 0.1)
    torch.save(model.state_dict(), folder / "model_000000.pt")
    (folder / "meta_000000.json").write_text(json.dumps({"model_config": fields}))


def nanochat_writer(folder: Path, args):
    """A function from (prompts, samples) to the new tokens of every answer."""
    import torch
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads((folder / "meta_000000.json").read_text())["model_config"]))
    model.to_empty(device="cpu")
    model.init_weights()                                     # fills the tables that are not in the file
    model.load_state_dict(torch.load(folder / "model_000000.pt", weights_only=True))
    engine = Engine(model.eval(), SimpleNamespace(encode_special=lambda name: -1, get_bos_token_id=lambda: -1))

    def write(prompts, samples):
        rows = [engine.generate_batch(p, num_samples=samples, max_tokens=NEW, temperature=float(samples > 1))[0] for p in prompts]
        return [row[len(p):] for p, group in zip(prompts, rows) for row in group]

    return write


def our_writer(folder: Path, args):
    """The same of ours."""
    import torch
    from nanochat_nb.checkpoint import import_nanochat
    from nanochat_nb.inference import Engine
    model, _ = import_nanochat(folder, 0, dtype=getattr(torch, args.dtype))
    engine = Engine(model, SimpleNamespace(special=lambda name: -1))

    def write(prompts, samples):
        groups = engine.generate(prompts, num_samples=samples, max_new_tokens=NEW, temperature=float(samples > 1), tools=False)
        return [answer.ids for group in groups for answer in group]

    return write


def work(args) -> None:
    """One side: answers each load that is named on standard input, and prints seconds and tokens as JSON."""
    import torch
    torch.set_num_threads(args.threads)
    sys.modules.setdefault("rustbpe", SimpleNamespace())     # nanochat's tokenizer asks for it; nothing here does
    if args.worker == "save":
        return save_model(args.folder, args)
    write, all_loads = (our_writer if args.worker == "ours" else nanochat_writer)(args.folder, args), loads(args.vocabulary)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        rows = write(*all_loads[line.strip()])
        print(json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "rows": rows}), flush=True)


def start(args, worker: str, folder: str) -> subprocess.Popen:
    """A process of one side, with its own library on the path."""
    path = os.pathsep.join([str(HERE)] if worker == "ours" else [str(args.nanochat)])
    numbers = [f"--{k}={getattr(args, k)}" for k in ("layers", "width", "vocabulary", "threads", "dtype")]
    theirs = args.nanochat_dtype or args.dtype
    return subprocess.Popen([sys.executable, __file__, str(args.nanochat), f"--worker={worker}", f"--folder={folder}", *numbers],
                            env=os.environ | {"PYTHONPATH": path, "NANOCHAT_DTYPE": theirs, "OMP_NUM_THREADS": str(args.threads)},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, load: str) -> dict:
    """What a side measured on one load."""
    process.stdin.write(load + "\n")
    process.stdin.flush()
    return json.loads(next(line for line in process.stdout if line.startswith("{")))


def compare(sides: dict[str, subprocess.Popen], load: str, rounds: int) -> str:
    """A line of the table."""
    found = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sorted(sides, reverse=turn % 2):
            found[side].append(ask(sides[side], load))
    rows = [found[side][0]["rows"] for side in sides]
    fastest = {what: [min(r[what] for r in found[side][1:]) for side in sides] for what in ("seconds", "cpu")}
    ratios = [t["seconds"] / o["seconds"] for t, o in zip(*(found[side][1:] for side in sides))]
    speed = [sum(map(len, rows[1])) / seconds for seconds in fastest["seconds"]]
    pairs = [a == b for x, y in zip(*rows) for a, b in zip(x, y)]
    same = f"{sum(pairs)} of {len(pairs)}" if "samples" not in load else ""
    by_time, by_cpu = (theirs / ours for theirs, ours in fastest.values())
    return (f"| {load} | {speed[0]:,.0f} | {speed[1]:,.0f} | {by_time:.2f}× | {by_cpu:.2f}× | {statistics.median(ratios):.2f}× "
            f"({min(ratios):.2f}–{max(ratios):.2f}) | {same} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--nanochat-dtype", choices=["float32", "bfloat16"], help="where it differs from --dtype")
    parser.add_argument("--loads", nargs="+", choices=list(loads(9)), default=list(loads(9)))
    for name, value in (("rounds", 5), ("layers", 4), ("width", 256), ("vocabulary", 4096), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        if start(args, "save", folder).wait():
            sys.exit("nanochat's model could not be made")
        sides = {side: start(args, side, folder) for side in ("nanochat", "ours")}
        print(f"{args.layers} layers, {args.width} channels, vocabulary {args.vocabulary}, {args.threads} threads, {args.rounds} rounds; "
              f"nanochat in {args.nanochat_dtype or args.dtype}, ours in {args.dtype}\n")
        print("| load | nanochat, tokens/s | ours | ratio | by CPU | middle | same |\n" + "|---" * 7 + "|", flush=True)
        for load in args.loads:
            print(compare(sides, load, args.rounds), flush=True)
        for process in sides.values():
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
