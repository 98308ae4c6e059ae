"""nanochat's checkpoints imported and run beside nanochat itself: the same logits, the same greedy continuations.

    python benchmarks/same_function.py JULY [OCTOBER]

JULY is a checkout of karpathy/nanochat at 92d63d4, OCTOBER one at fca2b8c. In each a model is made with random weights, none of
which stays zero, and saved by nanochat's own `save_checkpoint`; nanochat then computes logits in float32 for rows shorter and
longer than its context, and continues prompts by its own `generate` at temperature 0. We import the checkpoint and do the same.
Targets: logits within 1e-4, all tokens equal.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
SHAPES = [dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=64), dict(n_layer=4, n_head=2, n_kv_head=2, n_embd=128)]
VOCABULARY, LENGTH, STEP, NEW = 1000, 160, 7, 40


def theirs(folder: Path) -> None:
    """In a process with nanochat on its path: a checkpoint for each shape, and what nanochat makes of it."""
    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    for i, shape in enumerate(SHAPES):
        config = GPTConfig(sequence_len=LENGTH, vocab_size=VOCABULARY, **shape)
        if hasattr(config, "window_pattern"):
            config.window_pattern = "SSL"
        model = GPT(config)
        model.init_weights()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=0.1)
        ids = [torch.randint(VOCABULARY, (2, length)) for length in (5, LENGTH, 3 * LENGTH)]
        prompts = [row[:n].tolist() for row, n in zip(ids[1], (2, 30))]
        with torch.no_grad():
            logits = [model(x).float() for x in ids]
        answers = [list(model.generate(prompt, NEW, temperature=0.0)) for prompt in prompts]
        save_checkpoint(str(folder / str(i)), STEP, model.state_dict(), None, {"model_config": asdict(config)})
        torch.save({"ids": ids, "logits": logits, "prompts": prompts, "answers": answers}, folder / f"{i}.pt")


class Words:
    """As much of a tokenizer as an engine asks for; nothing ends an answer."""

    def special(self, name: str) -> int:
        return -1


def compare(name: str, folder: Path) -> bool:
    """Import what `theirs` left and print a row for each shape; whether all targets are met."""
    from nanochat_nb.checkpoint import import_nanochat
    from nanochat_nb.inference import Engine
    good = True
    for i, shape in enumerate(SHAPES):
        model, _ = import_nanochat(folder / str(i), STEP)
        said = torch.load(folder / f"{i}.pt")
        with torch.no_grad():
            far = max((model(ids) - want).abs().max().item() for ids, want in zip(said["ids"], said["logits"]))
        size = max(want.std().item() for want in said["logits"])
        found = Engine(model, Words()).generate(said["prompts"], max_new_tokens=NEW, temperature=0.0, tools=False)
        pairs = [(a, b) for (answer,), want in zip(found, said["answers"]) for a, b in zip(answer.ids, want)]
        same = sum(a == b for a, b in pairs)
        print(f"| {name} | {', '.join(f'{k} {v}' for k, v in shape.items())} | {far:.1e} | {size:.2f} | {same} of {2 * NEW} |")
        good &= far < 1e-4 and same == 2 * NEW
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("july", type=Path)
    parser.add_argument("october", type=Path, nargs="?")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return theirs(args.july)
    print("| nanochat of | shape | furthest logit off | their spread | greedy tokens equal |\n|---|---|---:|---:|---:|")
    good = True
    for name, checkout in (("July 2026", args.july), ("October 2025", args.october)):
        if checkout:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, __file__, folder, "--worker"], check=True, stdout=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": str(checkout.resolve()), "NANOCHAT_DTYPE": "float32"})
                good &= compare(name, Path(folder))
    sys.exit(not good)


if __name__ == "__main__":
    main()
