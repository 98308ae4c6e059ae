"""Compares `KernelStep` with the model's own step. Run by test_inference.py in Triton's interpreter: TRITON_INTERPRET=1."""
from dataclasses import replace

import torch

from nanochat_nb.inference import KernelStep, RowCache, long_step, prefill
from nanochat_nb.model import GPT, GPTConfig


def shaken(**changes) -> GPT:
    """A small model with windows, value embeddings and keys that look back, in which nothing is zero."""
    config = GPTConfig.from_depth(2, vocab_size=60, sequence_len=64, head_dim=32, aspect_ratio=32)
    model = GPT(replace(config, **changes), dtype=torch.float32).init_weights(0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.05)
    return model.inference_copy()


@torch.inference_mode()
def distance(model: GPT, lengths: list[int], steps: int) -> float:
    """The largest relative distance of the two steps' logits, over `steps` steps after prompts of these lengths."""
    prompts = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    snapshots, logits = prefill(model, prompts)
    ours, theirs = (RowCache(model.config, len(lengths), 256, model.device, model.dtype) for _ in range(2))
    for snapshot in snapshots:
        ours.enter(snapshot), theirs.enter(snapshot)
    step, ids, worst = KernelStep(model), logits.argmax(-1), 0.0
    for _ in range(steps):
        want = long_step(model, ids, theirs)
        worst = max(worst, ((step(ids, ours) - want).norm() / want.norm()).item())
        ids = want.argmax(-1)
    for w in ours.store:
        worst = max(worst, (ours.store[w] - theirs.store[w]).abs().max().item())
    return worst


if __name__ == "__main__":
    one_layer = dict(n_layer=1, look_back_layers=(), value_embed_layers=(0,))
    for changes, lengths, steps in (({}, [130], 1), ({}, [1, 5, 131], 2), (dict(n_kv_head=1, n_head=2), [3, 40], 1), (one_layer, [2, 7], 1)):
        found = distance(shaken(**changes), lengths, steps)
        print(changes, lengths, f"{found:.1e}", flush=True)
        assert found < 1e-5
