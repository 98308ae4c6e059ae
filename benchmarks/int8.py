"""What weights in 8 bits cost and save: size, speed and bits per byte of a trained run, on this CPU.

    python benchmarks/int8.py RUN [--stage base] [--documents 40] [--rounds 5] [--rows 1 16 64]

RUN is a run's folder. Bits per byte are of the first held-out documents of the course's own world. Speed is of greedy answers of 64
tokens after prompts of 32, in rows side by side; the three forms take turns, medians over rounds.
"""
import argparse
import statistics
import time

import torch

from nanochat_nb.checkpoint import load_model
from nanochat_nb.corpus import open_text
from nanochat_nb.evaluation import text_bits_per_byte
from nanochat_nb.inference import Engine, weight_bytes

NEW = 64


def seconds(engine: Engine, rows: int) -> float:
    """Seconds to write NEW tokens after each of `rows` prompts."""
    start = time.perf_counter()
    engine.generate([list(range(i, i + 32)) for i in range(rows)], max_new_tokens=NEW, temperature=0, tools=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--stage", default="base")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    args = parser.parse_args()
    engines = {}
    for form, dtype, int8 in (("float32", "float32", False), ("bfloat16", "bfloat16", False), ("int8", "bfloat16", True)):
        model, tokenizer, _ = load_model(args.run, stage=args.stage, device="cpu", dtype=dtype)
        engines[form] = Engine(model, tokenizer, int8=int8)
        engines[form].stops = frozenset()
    print("| | weights, MB | bits per byte |" + "".join(f" tokens/s, {n} rows |" for n in args.rows))
    print("|---" * (3 + len(args.rows)) + "|", flush=True)
    texts = [d.text for d in open_text(["world"]).documents("val")][:args.documents]
    times = {(form, n): [] for form in engines for n in args.rows}
    for _ in range(args.rounds + 1):                         # the first round warms up
        for form, n in times:
            times[form, n].append(seconds(engines[form], n))
    for form, engine in engines.items():
        with torch.inference_mode():
            bits, _ = text_bits_per_byte(engine.model, tokenizer, texts)
        speeds = "".join(f" {n * NEW / statistics.median(times[form, n][1:]):,.0f} |" for n in args.rows)
        print(f"| {form} | {weight_bytes(engine.model) / 1e6:.1f} | {bits:.4f} |{speeds}", flush=True)


if __name__ == "__main__":
    main()
