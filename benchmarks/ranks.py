"""Two processes of one thread beside one process of two threads: tokens a second of the same training step.

    python benchmarks/ranks.py [--rounds 3] [--layers 4 --width 256 --rows 32 --length 256 --vocabulary 4096] [--dtype bfloat16]

Fresh processes each round, turn by turn, with gloo between the two. Two steps to warm up, then the median of twelve. Target: 0.9.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SIZES = {"layers": 4, "width": 256, "rows": 32, "length": 256, "vocabulary": 4096}
WARM, STEPS = 2, 12


def work(args) -> None:
    """One rank: trains on its share of the rows; rank 0 prints tokens a second."""
    import torch
    from nanochat_nb.model import GPT, GPTConfig
    from nanochat_nb.optimizer import build_optimizer
    from nanochat_nb.pretraining import accumulate
    from nanochat_nb.runtime import keep_memory, start_runtime, stop_runtime
    rt = start_runtime("cpu", args.dtype)
    keep_memory()
    config = GPTConfig.from_depth(args.layers, vocab_size=args.vocabulary, sequence_len=args.length, head_dim=64,
                                  aspect_ratio=args.width // args.layers)
    model = GPT(config, dtype=rt.dtype).init_weights(0)
    optimizer = build_optimizer(model, rt=rt)
    tokens = torch.randint(0, args.vocabulary, (args.rows, args.length + 1), generator=torch.Generator().manual_seed(0))
    mine, times = tokens.chunk(rt.world_size)[rt.rank], []
    for _ in range(WARM + STEPS):
        start = time.perf_counter()
        accumulate(model, mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), rt=rt, micro_batch_rows=args.rows)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    if rt.is_main:
        print(json.dumps(args.rows * args.length / statistics.median(times[WARM:])), flush=True)
    stop_runtime()


def measure(args, processes: int) -> float:
    """Tokens a second of fresh processes that share two threads."""
    command = [__file__, "--worker", f"--dtype={args.dtype}", *(f"--{name}={getattr(args, name)}" for name in SIZES)]
    started = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": str(2 // processes), "PYTHONPATH": str(HERE)}
    out = subprocess.run([*started, *command], check=True, env=env, capture_output=True, text=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (SIZES | {"rounds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return work(args)
    ratios = []
    print("| one process, two threads | two processes, one thread each | ratio |\n|---:|---:|---:|")
    for _ in range(args.rounds):
        one, two = measure(args, 1), measure(args, 2)
        ratios.append(two / one)
        print(f"| {one:,.0f} | {two:,.0f} | {ratios[-1]:.2f} |", flush=True)
    print(f"\nmedian {statistics.median(ratios):.2f} (target 0.9)")


if __name__ == "__main__":
    main()
