"""Bits per byte beside nanochat's, on real text: the same tokenizer, the same tokens or the same minutes, the same exam.

    python benchmarks/learning.py NANOCHAT PLACE --text FILE_OR_FOLDER... [--only ours nanochat cropped] [--steps 600] [--seeds 1 2 3]
                                  [--rates 4 8 16] [--documents 500]

NANOCHAT is a checkout of karpathy/nanochat at 92d63d4; what is made lies in PLACE, and what is already there is not made again.
Documents are cut into pieces of about 3,000 characters, shuffled for nanochat, which reads a file in its order.
nanochat trains by its own scripts (scripts.tok_train, scripts.base_train, bfloat16, compiled) on parquet files of the same
documents, with all its learning rates multiplied by each of `--rates`; ours by `run_base` with nanochat's tokenizer. Both have
4 layers of width 256, heads of 64, rows of 256 and 8,192 tokens a step; all else is as each chooses it. nanochat's checkpoint is
then read by `import_nanochat`, and the same function reads the same held-out documents with both models, in float32, in chunks
of 256 tokens, each after a <|bos|>; "first 256" counts the first chunk of each document only. "cropped" is our training on the
rows of nanochat's loader, which drops the rest of a document where a row ends. For equal minutes give each side (`--only`) as
many steps as it takes in them. With one seed a row is one run.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanochat_nb import pretraining
from nanochat_nb.checkpoint import import_nanochat, load_model, read_nanochat_tokenizer
from nanochat_nb.corpus import cut_text, open_text
from nanochat_nb.evaluation import bits_per_byte, document_rows, held_out, measure_text, padded
from nanochat_nb.runtime import start_runtime

HERE = Path(__file__).resolve().parent.parent
VOCABULARY = 4096
RATES = {"embedding-lr": 0.3, "unembedding-lr": 0.008, "matrix-lr": 0.02, "scalar-lr": 0.5}     # nanochat's defaults
# nanochat's seed is fixed in its code, so it is changed on the way in
START = "import runpy, sys, torch; seed, begin = int(sys.argv.pop(1)), torch.manual_seed; " \
        "torch.manual_seed = lambda _: begin(seed); sys.argv[0] = 'base_train'; runpy.run_module('scripts.base_train', run_name='__main__')"


def prepare(args) -> None:
    """nanochat's folder: its text, its tokenizer, and a `wandb` that is never used."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = args.place / "nanochat"
    if (folder / "tokenizer" / "token_bytes.pt").exists():
        return
    data = folder / "base_data_climbmix"
    data.mkdir(parents=True)
    whole = open_text(args.text)
    with (args.place / "text.jsonl").open("w", encoding="utf-8") as file:                    # both read these
        for split in ("train", "val"):
            for document in whole.documents(split):
                file.writelines(json.dumps({"text": piece}) + "\n" for piece in cut_text(document.text))
    source = open_text([str(args.place / "text.jsonl")])
    for name, split in (("shard_00000", "train"), ("shard_06542", "val")):         # the last one is for validation
        texts = [document.text for document in source.documents(split)]
        random.Random(0).shuffle(texts)
        pq.write_table(pa.table({"text": texts}), data / f"{name}.parquet", row_group_size=1024)
        print(f"{split}: {len(texts):,} documents, {sum(map(len, texts)):,} characters", flush=True)
    (folder / "stand_in").mkdir()
    (folder / "stand_in" / "wandb.py").write_text("")
    nanochat(args, "-m", "scripts.tok_train", f"--vocab-size={VOCABULARY}")
    tokenizer = read_nanochat_tokenizer(folder / "tokenizer")
    tokenizer.save(args.place / "tokenizer")


def nanochat(args, *command: str) -> None:
    """Run Python in nanochat's checkout, with its log in PLACE."""
    folder = args.place / "nanochat"
    env = os.environ | {"NANOCHAT_BASE_DIR": str(folder.resolve()), "NANOCHAT_DTYPE": "bfloat16", "WANDB_MODE": "disabled",
                        "PYTHONPATH": f"{args.nanochat.resolve()}:{(folder / 'stand_in').resolve()}"}
    with (args.place / "nanochat.log").open("ab") as log:
        subprocess.run([sys.executable, *command], check=True, cwd=args.nanochat, env=env, stdout=log, stderr=log)


def theirs(args, steps: int, seed: int, rate: float) -> tuple:
    """(model, tokenizer, seconds) after nanochat's own training."""
    tag = f"{steps}_{seed}_{rate}"
    begin = time.monotonic()
    nanochat(args, "-c", START, str(seed), "--depth=4", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=256",
             "--device-batch-size=32", "--total-batch-size=8192", f"--num-iterations={steps}", "--eval-every=-1",
             "--core-metric-every=-1", "--sample-every=-1", f"--model-tag={tag}", "--device-type=cpu",
             *(f"--{name}={value * rate}" for name, value in RATES.items()))
    folder = args.place / "nanochat"
    model, tokenizer = import_nanochat(folder / "base_checkpoints" / tag, steps, folder / "tokenizer")
    return model, tokenizer, time.monotonic() - begin


def ours(args, steps: int, seed: int, rate: float, place: str = "ours") -> tuple:
    """(model, tokenizer, seconds) after our training."""
    folder = args.place / f"{place}_{steps}_{seed}_{rate}"
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").symlink_to((args.place / "tokenizer").resolve())
    begin = time.monotonic()
    pretraining.run_base(run=str(folder), text=[str(args.place.resolve() / "text.jsonl")], depth=4, head_dim=64, sequence_len=256,
                         steps=steps, total_batch_tokens=8192, micro_batch_rows=32, lr_scale=rate, eval_every=0, eval_batches=1,
                         sample_every=0, dtype="bfloat16", device="cpu", seed=seed)
    model, tokenizer, _ = load_model(folder, stage="base", dtype=torch.float32)
    return model, tokenizer, time.monotonic() - begin


def cropped(args, steps: int, seed: int, rate: float) -> tuple:
    """(model, tokenizer, seconds) after our training on nanochat's rows."""
    sys.path.insert(0, str(args.nanochat.resolve()))
    from packing import nanochat_batches

    def batches(shards, *, rows: int, sequence_len: int, seed: int, **rest):
        for idx, targets, _ in nanochat_batches(shards, rows, sequence_len, seed=seed):
            yield idx.clone(), targets.clone()                                         # the loader writes into them again

    own, pretraining.pretraining_batches = pretraining.pretraining_batches, batches
    try:
        return ours(args, steps, seed, rate, place="cropped")
    finally:
        pretraining.pretraining_batches = own


def starts(model, tokenizer, texts: dict[str, list[str]]) -> float:
    """Bits per byte of the first row of each document: the only place of a document that nanochat's rows begin with."""
    rows = [document_rows(tokenizer, [text], model.config.sequence_len)[0] for group in texts.values() for text in group]
    groups = (padded(rows[i:i + 32], -1) for i in range(0, len(rows), 32))
    return bits_per_byte(model, ((ids[:, :-1].clamp(min=0), ids[:, 1:]) for ids in groups), tokenizer.token_bytes())


SIDES = {"ours": ours, "nanochat": theirs, "cropped": cropped}


def measured(args, side: str, steps: int, seed: int, rate: float) -> dict:
    """One run's row, from PLACE/results.jsonl when it has been made."""
    path, key = args.place / "results.jsonl", {"side": side, "steps": steps, "seed": seed, "rate": rate}
    for line in path.read_text().splitlines() if path.exists() else ():
        if key.items() <= json.loads(line).items():
            return json.loads(line)
    rt = start_runtime("cpu", "float32")
    model, tokenizer, seconds = SIDES[side](args, steps, seed, rate)
    texts = held_out(open_text([str(args.place / "text.jsonl")]), args.documents)
    found, _ = measure_text(model, tokenizer, texts, batch_tokens=8192, rt=rt)
    row = key | {"bpb": found["document_bpb"], "start_bpb": starts(model, tokenizer, texts), "seconds": seconds,
                 "parameters": sum(p.numel() for p in model.parameters()), "flops": model.flops_per_token()}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("place", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--only", nargs="+", choices=list(SIDES), default=["ours", "nanochat"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 16.0])
    parser.add_argument("--documents", type=int, default=500)
    args = parser.parse_args()
    args.text = [str(Path(text).resolve()) for text in args.text]
    args.place.mkdir(parents=True, exist_ok=True)
    prepare(args)
    table = []
    for side in args.only:
        rates = args.rates if side == "nanochat" else [1.0]
        first = {rate: measured(args, side, args.steps, args.seeds[0], rate) for rate in rates}
        best = min(first, key=lambda rate: first[rate]["bpb"])
        rows = [first[best], *(measured(args, side, args.steps, seed, best) for seed in args.seeds[1:])]
        table += [(side, rate, [first[rate]]) for rate in rates if rate != best] + [(side, best, rows)]
    print("\n| | rates | steps | runs | bits per byte | first 256 | parameters | MFLOP/token | s |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for side, rate, rows in table:
        whole, first = (f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
                        for values in ([row[name] for row in rows] for name in ("bpb", "start_bpb")))
        print(f"| {side} | {rate:g} × | {args.steps} | {len(rows)} | {whole} | {first} | {rows[0]['parameters']:,} | "
              f"{rows[0]['flops'] / 1e6:.1f} | {statistics.mean(row['seconds'] for row in rows):.0f} |")


if __name__ == "__main__":
    main()
