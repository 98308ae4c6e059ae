"""Does the embedded world reward a deeper model? Bits per byte at equal tokens, depth by depth.

    python benchmarks/depths.py [--tokens 573440] [--depths 2 4 6 8] [--picture FILE.png]

Each depth is pretrained from scratch with the laptop preset's base parameters on the same text and the same tokenizer,
for the same number of tokens; validated on the same held-out documents. Prints a table.
"""
import argparse
import tempfile
import time
from pathlib import Path

import yaml

from nanochat_nb.pretraining import run_base
from nanochat_nb.tokenizer import run_tokenizer

PRESET = Path(__file__).parent.parent / "presets" / "laptop.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=573_440)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    preset, found = yaml.safe_load(PRESET.read_text(encoding="utf-8")), {}
    with tempfile.TemporaryDirectory() as place:
        run_tokenizer(run=place, **preset["tokenizer"])
        for depth in args.depths:
            base = preset["base"] | {"depth": depth, "steps": args.tokens // preset["base"]["total_batch_tokens"],
                                     "eval_every": 0, "sample_every": 0, "save_every": 0}
            folder = Path(place) / f"d{depth}"
            folder.mkdir()
            for shared in ("tokenizer", *(["tokens"] if found else [])):
                (folder / shared).symlink_to(Path(place) / shared)
            start = time.monotonic()
            summary = run_base(run=str(folder), **base)
            found[depth] = summary["metrics"]["val_bpb"], time.monotonic() - start
            if not (Path(place) / "tokens").exists():         # every depth reads the same shards
                (folder / "tokens").rename(Path(place) / "tokens")
    print("| depth | bits per byte | seconds |\n|---:|---:|---:|")
    for depth, (bpb, seconds) in found.items():
        print(f"| {depth} | {bpb:.4f} | {seconds:.0f} |")
    if args.picture:
        import matplotlib.pyplot as plt
        plt.plot(list(found), [bpb for bpb, _ in found.values()], "o-", color="#0072b2")
        plt.gca().set(xlabel="layers", ylabel="bits per byte", title=f"{args.tokens:,} tokens of the world", ylim=(0, None))
        plt.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
