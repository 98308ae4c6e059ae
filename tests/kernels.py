"""Compares `KernelStep` with the model's own step, in Triton's interpreter: test_inference.py runs this with TRITON_INTERPRET=1.
test_gpu.py asks the same of a GPU."""
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
    """The largest relative distance of the two steps' logits, keys and values, over `steps` steps after prompts of these lengths."""
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
    return max(worst, *(((ours.store[w] - s).norm() / s.norm()).item() for w, s in theirs.store.items()))


@torch.inference_mode()
def distance_of_a_sum(model: GPT, rows: int, inputs: int) -> float:
    """The same of a product that several programs share, and of its sums of squares."""
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(model.device, model.dtype)
    x, w, stream = draw(rows, inputs), draw(64, inputs), draw(rows, 64)
    step, want, far = KernelStep(model), stream.double() + x.double() @ w.double().T, []
    for _ in range(2):                                       # the counters must be back at zero
        out, squares = step._add(x, w, stream)
        far += [(out - want).norm() / want.norm(), (squares.sum(1) - want.square().sum(1)).norm() / want.square().sum(1).norm()]
    return max(far).item()


if __name__ == "__main__":
    one_layer = dict(n_layer=1, look_back_layers=(), value_embed_layers=(0,))
    three_layers = dict(n_layer=3, look_back_layers=(2,), value_embed_layers=(0, 2))
    cases = (({}, [130], 1), ({}, [1, 5, 131], 2), (dict(n_kv_head=1, n_head=2), [3, 40], 1), (one_layer, [2, 7], 1), (three_layers, [9, 4], 1))
    for changes, lengths, steps in cases:
        found = distance(shaken(**changes), lengths, steps)
        print(changes, lengths, f"{found:.1e}", flush=True)
        assert found < 1e-5
    found = distance_of_a_sum(shaken(), 3, 4096)
    print("a sum in four parts", f"{found:.1e}", flush=True)
    assert found < 1e-5
