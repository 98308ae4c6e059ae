"""What other projects' tricks are worth here: one change at a time, on real text, at equal tokens and by the clock.

    python benchmarks/ablations.py PLACE [--only NAME ...] [--steps 200] [--seeds 1 2] [--documents 300]

PLACE is a folder that `benchmarks/learning.py` has made: its text.jsonl and tokenizer are used, and results are added to its
ablations.jsonl; what stands there is not run again. The model is the benchmarks' (4 layers of 256, vocabulary of 4,096, rows of
256), 8,192 tokens a step, bfloat16, one thread. Each run is a process of its own in which one thing of the library is replaced;
runs with the same seed begin with the same weights and read the same rows, so the table gives the mean of the differences by
seed, and how far they lie apart. "time" is the processor time from the first step's end to the last's, against the unchanged run of the same seed
(that of z-loss is of a plain version of the loss, not of one made to be fast; averages of weights are kept in the two runs that
use them).
"""
import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanochat_nb import model as M, optimizer as O, pretraining as P
from nanochat_nb.checkpoint import load_model
from nanochat_nb.corpus import open_text
from nanochat_nb.evaluation import held_out, measure_text
from nanochat_nb.runtime import start_runtime

SETTINGS = dict(depth=4, head_dim=64, sequence_len=256, micro_batch_rows=32, eval_every=0, eval_batches=1, sample_every=0,
                save_every=10**6, dtype="bfloat16", device="cpu")
TAILS = (0.1, 0.2, 0.4)                                  # averages of the weights over so much of the end


def more_parameters(add, draw, *, prefix: str, rate: float) -> None:
    """Give the trunk what `add(trunk)` adds, let `draw(model)` fill it, and train it by AdamW: `rate` times the embeddings' rate."""
    trunk, draw_all, build = M.Trunk.__init__, M.init_parameters, P.build_optimizer

    def init(self, config, **options):
        trunk(self, config, **options)
        add(self)

    def draws(model, seed):
        draw_all(model, seed)
        with torch.no_grad():
            draw(model)

    def builds(model, *, rt, embedding_lr, **options):
        known = build(model, rt=rt, embedding_lr=embedding_lr, **options)
        scale = (model.config.n_embd / 768) ** -0.5
        group = O.adamw_group(dict(model.named_parameters()), (prefix,), embedding_lr * scale * rate, (0.8, 0.995), 0.0)
        return O.MuonAdamW(known.param_groups + [group | {"initial_lr": group["lr"]}], rt, dtype=model.dtype)

    M.Trunk.__init__, M.init_parameters, P.build_optimizer = init, draws, builds


def norm_scales() -> None:
    """A learned factor for each channel of each norm before attention and MLP, one at the start."""
    def add(trunk):
        trunk.norm_scales = nn.Parameter(torch.ones(trunk.config.n_layer, 2, trunk.config.n_embd))
        for i, block in enumerate(trunk.blocks):
            object.__setattr__(block, "scales", lambda i=i: trunk.norm_scales[i])

    def forward(self, x, value_embedding, reading, rows=None):
        first, second = self.scales().to(x.dtype)
        x = M.chosen(x, rows) + self.attn(M.norm(x) * first, value_embedding, reading, rows)
        return x + self.mlp(M.norm(x) * second)

    M.Block.forward = forward
    more_parameters(add, lambda model: model.norm_scales.fill_(1), prefix="norm_scales", rate=0.02)


def bigrams() -> None:
    """A table of 16,384 rows for pairs of tokens, by a hash, zero at the start, added to the embedding."""
    embed, rows = M.Trunk.embed, 16_384

    def with_pairs(self, idx, reading):
        x = embed(self, idx, reading)
        before = F.pad(idx[:, :-1], (1, 0))
        return x + self.pairs((before * 36_313 + idx * 27_191) % rows).to(x.dtype)

    M.Trunk.embed = with_pairs
    more_parameters(lambda trunk: setattr(trunk, "pairs", M.Embedding(rows, trunk.config.n_embd)),
                    lambda model: model.pairs.weight.zero_(), prefix="pairs.", rate=0.5)


def dense_connections() -> None:
    """MUDD (arXiv 2502.12170): queries, keys, values and the stream of a layer each read their own mix of all layers so far,
    with weights that depend on the token; at the start, the last layer alone."""
    width = 16

    def add(trunk):
        c = trunk.config
        trunk.mix_bias = nn.Parameter(torch.zeros(c.n_layer, 4, c.n_layer))
        trunk.mix_up = nn.Parameter(torch.zeros(c.n_layer, width, c.n_embd))
        trunk.mix_down = nn.Parameter(torch.zeros(c.n_layer, 4 * c.n_layer, width))

    def draw(model):
        model.mix_bias.zero_()
        model.mix_down.zero_()
        for i in range(1, model.config.n_layer):
            model.mix_bias[i, :, i] = 1
        rng = torch.Generator().manual_seed(0)
        model.mix_up.normal_(0, model.config.n_embd ** -0.5, generator=rng)

    def hidden(self, idx, cache=None, reading=None, rows=None):      # pretraining: every position has a target
        reading = M.start_reading(self, idx, cache)
        x = self.embed(idx, reading)
        seen, middle = [x], None
        for i, block in enumerate(self.blocks):
            streams = [x] * 4
            if i:
                narrow = F.gelu(F.linear(M.norm(x), self.mix_up[i].to(x.dtype)))
                mix = F.linear(narrow, self.mix_down[i].to(x.dtype)) + self.mix_bias[i].flatten().to(x.dtype)
                mix = mix.unflatten(-1, (4, -1))[..., :i + 1]
                streams = (mix @ torch.stack(seen, dim=-2)).unbind(-2)
            *heads, stream = (self.resid_lambdas[i] * s + self.x0_lambdas[i] * seen[0] for s in streams)
            table = self.value_embeds[str(i)] if str(i) in self.value_embeds else None
            x = stream + block.attn([M.norm(h) for h in heads], None if table is None else table(idx).to(x.dtype), reading)
            x = x + block.mlp(M.norm(x))
            middle = x if i == len(self.blocks) // 2 else middle
            seen.append(x)
        return M.norm(x - self.backout_lambda.to(x.dtype) * middle)

    def forward(self, x, value_embedding, reading):
        of_q, of_k, of_v = x
        q, v = (project(s).unflatten(-1, (-1, self.head_dim)) for project, s in ((self.q, of_q), (self.v, of_v)))
        k = self.keys(of_k, reading.before)
        if self.gate is not None:
            strength = 3 * torch.sigmoid(self.gate(of_v[..., :M.GATE_CHANNELS]))
            v = v + strength[..., None] * value_embedding.unflatten(-1, (-1, self.head_dim))
        q, k = (M.turn_and_norm(t, reading.cos, reading.sin, self.qk_scale) for t in (q, k))
        return self.out(reading.attend(self.layer, q, k, v, self.window).flatten(-2))

    M.Trunk.hidden, M.Attention.forward = hidden, forward
    more_parameters(add, draw, prefix="mix_", rate=0.02)


def paired_heads() -> None:
    """Two heads after each other in one row of twice the length: a query sees the keys of both (modded-nanogpt)."""
    attend = M.attend_to_past

    def paired(q, k, v, window, masks=None):
        def woven(t):
            rows, time, heads, size = t.shape
            return t.view(rows, time, heads // 2, 2, size).transpose(2, 3).reshape(rows, 2 * time, heads // 2, size)

        y = attend(*map(woven, (q, k, v)), window and 2 * window + 1, masks)
        rows, time, heads, size = q.shape
        return y.reshape(rows, time, 2, heads // 2, size).transpose(2, 3).reshape(q.shape)

    M.attend_to_past = paired


def z_loss(weight: float = 1e-4) -> None:
    """`weight` times the square of the logarithm of the sum over the vocabulary, added to the loss (PaLM, arXiv 2204.02311)."""
    plain = M._chunk_loss

    def chunk_loss(x, matrix, targets, scale):
        if scale is None:
            return plain(x, matrix, targets, scale)              # an exam: bits per byte without it
        z, keep, column = F.linear(x, matrix), targets >= 0, targets.clamp(min=0)[:, None]
        t = (z.float() / M.SOFTCAP).tanh()
        total = (M.SOFTCAP * t).logsumexp(-1, keepdim=True)
        losses = (total - M.SOFTCAP * t.gather(1, column) + weight * total.square()).squeeze(1) * keep
        p = (M.SOFTCAP * t - total).exp() * (1 + 2 * weight * total)
        p.scatter_add_(1, column, p.new_full((), -1.0).expand(column.shape))
        z = (p * (1 - t.square())).to(z.dtype)
        scale = (scale * keep)[:, None]
        return losses, (z @ matrix * scale).to(x.dtype), z.mT @ (x * scale).to(x.dtype)

    M._chunk_loss = chunk_loss


def everywhere_value_embeddings() -> None:
    """Value embeddings in every layer instead of every second one."""
    from_depth = M.GPTConfig.from_depth
    M.GPTConfig.from_depth = classmethod(lambda cls, depth, **rest: from_depth(
        depth, value_embed_layers=tuple(range(depth)), **rest))


def high_end() -> None:
    """Rates that fall to three tenths instead of a twentieth, for averages that do the rest."""
    fall = P.lr_multiplier
    P.lr_multiplier = lambda step, steps, **rest: fall(step, steps, **{"final": 0.3} | rest)


VARIANTS = {                                             # what is replaced, and settings of run_base; the first is the unchanged one
    "none": (lambda: None, {}),
    "learned norm scales": (norm_scales, {}),
    "bigram table": (bigrams, {}),
    "MUDD connections": (dense_connections, {}),
    "paired heads": (paired_heads, {}),
    "z-loss": (z_loss, {}),
    "value embeddings in every layer": (everywhere_value_embeddings, {}),
    "rates fall to 0.3": (high_end, {}),
    "rates × 1.3": (lambda: None, {"lr_scale": 1.3}),
    "4,096 tokens a step": (lambda: None, {"total_batch_tokens": 4096}),
}


def watch(steps: int, parts: tuple) -> tuple[list, list]:
    """Two lists that fill as it trains: averages of the weights over the last parts, (part, sums, count), and clocks after each step."""
    found, clocks, update = [[part, None, 0] for part in parts], [], P.update

    def watched(loop, loss, **rest):
        update(loop, loss, **rest)
        clocks.append(time.process_time())
        for tail in found:
            if loop.step + 1 > steps * (1 - tail[0]):
                now = loop.model.state_dict()
                tail[1] = {k: v.double() for k, v in now.items()} if tail[1] is None else {k: v + now[k] for k, v in tail[1].items()}
                tail[2] += 1

    P.update = watched
    return found, clocks


def run(place: Path, name: str, steps: int, seed: int, documents: int) -> None:
    """Train one variant and print its rows as JSON."""
    torch.set_num_threads(1)
    change, settings = VARIANTS[name]
    change()
    settings = SETTINGS | {"total_batch_tokens": 8192} | settings
    steps = steps * 8192 // settings["total_batch_tokens"]
    tails, clocks = watch(steps, TAILS if name in ("none", "rates fall to 0.3") else ())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer").symlink_to((place / "tokenizer").resolve())
        P.run_base(run=folder, text=[str(place.resolve() / "text.jsonl")], steps=steps, seed=seed, **settings)
        trained, tokenizer, _ = load_model(folder, stage="base", dtype=torch.float32)
    texts = held_out(open_text([str(place / "text.jsonl")]), documents)
    bpb = lambda model: measure_text(model, tokenizer, texts, batch_tokens=8192, rt=start_runtime("cpu", "float32"))[0]["document_bpb"]
    rows = [("", bpb(trained))]
    for part, sums, count in tails:
        averaged = copy.deepcopy(trained)
        averaged.load_state_dict({k: (v / count).float() for k, v in sums.items()})
        rows.append((f"mean of the last {part:.0%}", bpb(averaged)))
    for tail, value in rows:
        print(json.dumps({"name": ", ".join(filter(None, (name, tail))), "steps": steps, "seed": seed, "bpb": value, "seconds": clocks[-1] - clocks[0],
                          "parameters": sum(p.numel() for p in trained.parameters())}))


def table(rows: list[dict]) -> str:
    """All rows of one length as Markdown: differences to the unchanged run of the same seed."""
    plain = {r["seed"]: r for r in rows if r["name"] == "none"}
    lines = ["| change | seeds | bits per byte | against none | time | parameters |", "|---|---:|---:|---:|---:|---:|"]
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name and r["seed"] in plain]
        off = [100 * (r["bpb"] / plain[r["seed"]]["bpb"] - 1) for r in mine]
        spread = f" ({min(off):+.2f} to {max(off):+.2f})" if len(off) > 1 else ""
        pace = statistics.mean(r["seconds"] / plain[r["seed"]]["seconds"] for r in mine)
        lines.append(f"| {name} | {len(mine)} | {statistics.mean(r['bpb'] for r in mine):.4f} | {statistics.mean(off):+.2f}%{spread} "
                     f"| {pace:.2f} × | {mine[0]['parameters']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run(args.place, args.one[0], args.steps, int(args.one[1]), args.documents)
    path, length = args.place / "ablations.jsonl", {"length": args.steps, "documents": args.documents}
    known = lambda: [r for line in (path.read_text().splitlines() if path.exists() else ())
                     if length.items() <= (r := json.loads(line)).items()]
    for seed in args.seeds:
        for name in dict.fromkeys(["none", *args.only]):             # what the others are compared with
            if any(r["name"] == name and r["seed"] == seed for r in known()):
                continue
            out = subprocess.run([sys.executable, __file__, str(args.place), "--one", name, str(seed), "--steps", str(args.steps),
                                  "--documents", str(args.documents)], check=True, stdout=subprocess.PIPE, text=True).stdout
            made = [json.loads(line) | length for line in out.splitlines() if line.startswith("{")]
            with path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
            print(json.dumps(made), flush=True)
    print(table(known()))


if __name__ == "__main__":
    main()
