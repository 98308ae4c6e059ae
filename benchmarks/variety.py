"""How varied is the world's text, beside real text? Compression and distinct sequences of words.

    python benchmarks/variety.py TEXT_FILE... [--characters 30000]

For each kind of the world's text, and for the files given, as much of each: how many times smaller zlib makes it (less is richer),
and the share of sequences of four words that are different from one another. Of the files the least, the middle and the most.
"""
import argparse
import zlib
from collections import defaultdict
from pathlib import Path

from nanochat_nb.corpus import open_text


def compression(text: str) -> float:
    """How many times smaller zlib makes `text`."""
    return len(text.encode()) / len(zlib.compress(text.encode(), 9))


def distinct(text: str, n: int = 4) -> float:
    """The share of n-word sequences that are different from one another."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--characters", type=int, default=30_000)
    args = parser.parse_args()
    kinds = defaultdict(list)
    for document in open_text(["world"], documents=6000).documents("train"):
        kinds[document.kind].append(document.text)
    texts = {kind: "\n".join(parts) for kind, parts in kinds.items()}
    real = [path.read_text("utf-8", errors="replace")[args.characters // 2:] for path in args.files]     # after the licence
    real = [text[:args.characters] for text in real if len(text) >= args.characters]
    print("| text | zlib makes it smaller, times | distinct sequences of four words |\n|---|---:|---:|")
    for kind, text in sorted(texts.items(), key=lambda item: compression(item[1][:args.characters])):
        if len(text) < args.characters:
            raise SystemExit(f"there are only {len(text):,} characters of {kind}: give fewer --characters")
        print(f"| {kind} | {compression(text[:args.characters]):.1f} | {distinct(text[:args.characters]):.0%} |")
    squeezed, different = sorted(map(compression, real)), sorted(map(distinct, real), reverse=True)
    for name, i in (("richest", 0), ("middle", len(real) // 2), ("poorest", -1)):
        print(f"| {len(real)} files, the {name} in each column | {squeezed[i]:.1f} | {different[i]:.0%} |")


if __name__ == "__main__":
    main()
