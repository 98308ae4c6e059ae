"""What a checkpoint costs: seconds that training stands still for each, at the laptop preset's size and at that of depth 12.

    python benchmarks/saves.py [--saves 10] [--place FOLDER]

Runs `run_base` on the embedded world with a save after every step, and times the function that saves, checksums, renaming
and tidying included. PLACE is where the run lies (default: a temporary folder): the disk decides. Target: 0.6 s.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

from nanochat_nb import pretraining
from nanochat_nb.tokenizer import run_tokenizer

SIZES = {"laptop preset": dict(depth=4, head_dim=64, sequence_len=256, total_batch_tokens=4096, micro_batch_rows=16),
         "depth 12": dict(depth=12, head_dim=128, sequence_len=256, total_batch_tokens=256, micro_batch_rows=1)}


def timed_saves(run: Path, saves: int, **size) -> tuple[list[float], float]:
    """Seconds of each save, and a checkpoint's megabytes."""
    seconds, own = [], pretraining.save

    def save(loop):
        begin = time.perf_counter()
        own(loop)
        seconds.append(time.perf_counter() - begin)

    pretraining.save = save
    try:
        pretraining.run_base(run=str(run), steps=saves, save_every=1, eval_every=0, eval_batches=1, sample_every=0, device="cpu", **size)
    finally:
        pretraining.save = own
    newest = max((run / "base").glob("step_*"))
    return seconds, sum(f.stat().st_size for f in newest.iterdir()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--place", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        for name, size in SIZES.items():
            run = Path(folder) / name.replace(" ", "_")
            run_tokenizer(run=str(run), vocab_size=2048, documents=500)
            rows.append((name, *timed_saves(run, args.saves, **size)))
    print("\n| size | MB | saves | median s | longest s |\n|---|---:|---:|---:|---:|")
    for name, seconds, size in rows:
        print(f"| {name} | {size:.0f} | {len(seconds)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
