"""Training speed beside nanochat's on this CPU: the same model, the same random tokens, turn by turn.

    python benchmarks/throughput.py NANOCHAT [--rounds 3] [--layers 4 --width 256 --rows 32 --length 256 --vocabulary 4096] [--at-once 16]

NANOCHAT is a checkout of karpathy/nanochat at 92d63d4. Each round starts a fresh process for nanochat in float32 (its default on
a CPU) and in bfloat16, compiled as its training script does, and for ours in both, with the environment that `run_all.sh` sets.
A process takes two steps to warm up and then the median of twelve. Ratios are medians over rounds, against nanochat of the same
round. Memory is the process's peak. With `--at-once` both take so many rows at a time and add the gradients up, as their
training scripts do with that setting.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
STEPS = 12


def one_step(net, model, optimizer, at_once):
    """A function that trains one step on idx and targets through `net`, which is `model` or its compiled form."""
    def step(idx, targets):
        total = 0.0
        for few in zip(idx.split(at_once), targets.split(at_once)):
            loss = net(*few) * (len(few[0]) / len(idx))
            loss.backward()
            total += loss.item()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    return step


def nanochat_step(args):
    """(a function that trains one step on idx and targets, FLOPs per token) of nanochat's model and optimizer."""
    import torch
    from nanochat.gpt import GPT, GPTConfig
    heads = args.width // 64
    config = GPTConfig(sequence_len=args.length, vocab_size=args.vocabulary, n_layer=args.layers, n_head=heads, n_kv_head=heads,
                       n_embd=args.width)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights()
    flops, compiled = model.estimate_flops(), torch.compile(model, dynamic=False)
    optimizer = model.setup_optimizer()
    return one_step(compiled, model, optimizer, args.at_once), flops


def our_step(args):
    """The same of ours."""
    from nanochat_nb.model import GPT, GPTConfig
    from nanochat_nb.optimizer import build_optimizer
    from nanochat_nb.runtime import keep_memory, start_runtime
    rt = start_runtime("cpu", args.dtype)
    keep_memory()                                            # as the training loop does
    config = GPTConfig.from_depth(args.layers, vocab_size=args.vocabulary, sequence_len=args.length, head_dim=64,
                                  aspect_ratio=args.width // args.layers)
    model = GPT(config, dtype=rt.dtype).init_weights(0)
    optimizer = build_optimizer(model, rt=rt)
    return one_step(model, model, optimizer, args.at_once), model.flops_per_token()


def work(args) -> None:
    """One process of one side: prints what it measured as JSON."""
    import torch
    torch.manual_seed(0)
    step, flops = (our_step if args.worker == "ours" else nanochat_step)(args)
    tokens = torch.randint(0, args.vocabulary, (args.rows, args.length + 1))
    batch, times = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        step(*batch)
        times.append(time.perf_counter() - start)
    print(json.dumps({"first": times[0], "tokens": args.rows * args.length / statistics.median(times[2:]), "flops": flops,
                      "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def measure(args, worker: str, dtype: str) -> dict:
    """What a fresh process of one side measures."""
    path, own = (HERE, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}) if worker == "ours" else (args.nanochat, {})
    sizes = [f"--{k}={getattr(args, k)}" for k in ("layers", "width", "rows", "length", "vocabulary")] + [f"--at-once={args.at_once}"]
    out = subprocess.run([sys.executable, __file__, str(args.nanochat), f"--worker={worker}", f"--dtype={dtype}", *sizes], check=True,
                         env=os.environ | own | {"PYTHONPATH": str(path), "NANOCHAT_DTYPE": dtype}, capture_output=True, text=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path)
    for name, value in (("rounds", 3), ("layers", 4), ("width", 256), ("rows", 32), ("length", 256), ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--at-once", type=int, default=0, help="rows at a time; 0: all")
    parser.add_argument("--worker", choices=["ours", "nanochat"])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    args.at_once = args.at_once or args.rows
    if args.worker:
        return work(args)
    sides = [(worker, dtype) for dtype in ("float32", "bfloat16") for worker in ("nanochat", "ours")]
    rounds = []
    for i in range(args.rounds):
        rounds.append({side: measure(args, *side) for side in sides})
        print(f"round {i + 1}: " + ", ".join(f"{w} {d} {r['tokens']:,.0f}" for (w, d), r in rounds[-1].items()), flush=True)
    print("\n| | tokens/s, median | × nanochat float32 | × nanochat bfloat16 | first step, s | peak memory, GiB | MFLOP/token |\n" + "|---" * 7 + "|")
    for side in sides:
        mine = [r[side] for r in rounds]
        against = [statistics.median(r[side]["tokens"] / r["nanochat", d]["tokens"] for r in rounds) for d in ("float32", "bfloat16")]
        middle = {k: statistics.median(m[k] for m in mine) for k in ("tokens", "memory", "flops")}
        print(f"| {' '.join(side)} | {middle['tokens']:,.0f} | {against[0]:.2f} | {against[1]:.2f} | {max(m['first'] for m in mine):.1f} | "
              f"{middle['memory']:.2f} | {middle['flops'] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
