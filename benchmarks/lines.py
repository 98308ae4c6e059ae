"""How many wordings are enough? A linear classifier names the topic of the exam's lines.

    python benchmarks/lines.py [--rounds 12] [--seed 0]

The classifier sees a line's words, pairs of words and groups of three to five letters, hashed into 65,536 features, and is taught
a quarter, half and all of the training lines of static/talk.toml, then those of static/practice.toml as well. The exam's lines
are those that no training may show. It bounds what more lines are worth before any model is trained.
"""
import argparse
import random
import re
import zlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanochat_nb.corpus import lines_of, practice, say, talk

FEATURES = 1 << 16
TABLES = ("identity", "small_talk")


def features(text: str) -> list[int]:
    """Numbers of the words, pairs of words and groups of 3, 4 and 5 letters of `text`."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    text = f" {' '.join(words)} "
    found = {("word", w) for w in words} | {("pair", *pair) for pair in zip(words, words[1:])}
    found |= {("letters", text[i:i + n]) for n in (3, 4, 5) for i in range(len(text) - n + 1)}
    return sorted({zlib.crc32(repr(f).encode()) % FEATURES for f in found})


def pack(lines: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All features in a row, and where each line begins: what `EmbeddingBag` reads."""
    ends = torch.tensor([0] + [len(line) for line in lines]).cumsum(0)
    return torch.tensor([f for line in lines for f in line]), ends[:-1]


def taught(lines: list[list[int]], topics: list[int], count: int, rounds: int, rng: random.Random) -> torch.nn.EmbeddingBag:
    """Weights (features, topics) of a linear classifier, by Adam in batches of 64."""
    weights = torch.nn.EmbeddingBag(FEATURES, count, mode="mean")
    torch.nn.init.zeros_(weights.weight)
    optimizer, order = torch.optim.Adam(weights.parameters(), lr=0.05), list(range(len(lines)))
    for _ in tqdm(range(rounds), leave=False):
        rng.shuffle(order)
        for first in range(0, len(order), 64):
            batch = order[first:first + 64]
            logits = weights(*pack([lines[i] for i in batch])) * 8
            F.cross_entropy(logits, torch.tensor([topics[i] for i in batch]), label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = [(table, topic) for table in TABLES for topic in talk()[table] if lines_of(table, topic, "test")]

    def drawn(lines, rng):
        return [features(say(line, rng, {})) for line in lines]

    print("| training lines a topic (" + "; ".join(TABLES) + ") | " + " | ".join(TABLES) + " |\n|---|---:|---:|")
    for share, more in ((0.25, False), (0.5, False), (1.0, False), (1.0, True)):
        rng = random.Random(args.seed)
        torch.manual_seed(args.seed)
        train = {}
        for table, topic in names:
            extra = set(practice().get(table, {}).get(topic, ()))
            lines = [line for line in lines_of(table, topic, "train") if more or line not in extra]
            rng.shuffle(lines)
            train[table, topic] = lines[:max(1, int(len(lines) * share))]
        data = [(line, k) for k, name in enumerate(names) for line in drawn(train[name], rng)]
        weights = taught([line for line, _ in data], [k for _, k in data], len(names), args.rounds, rng)
        counts, cells = [], []
        for table in TABLES:
            topics = [(k, name) for k, name in enumerate(names) if name[0] == table]
            right = [(weights(*pack(drawn(lines_of(*name, "test"), rng))).argmax(1) == k).float().mean().item()
                     for k, name in topics]
            counts.append(f"{sum(len(train[name]) for _, name in topics) / len(topics):.0f}")
            cells.append(f"{sum(right) / len(right):.1%}")
        print(f"| {'; '.join(counts)}{' with practice.toml' if more else ''} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
