"""Training and decoding beside nanochat on one GPU: the same sizes, the same tokens, turn by turn.

    python benchmarks/gpu.py NANOCHAT [--depths 12 20] [--rows 32] [--batch 524288] [--steps 4] [--sides ...] [--decode 1 64]

NANOCHAT is a checkout of karpathy/nanochat at 92d63d4. Every side is a process of its own. All compile at the same time, as their
training scripts do; then one after another runs alone: two warm-up steps, then the median of `--steps` full steps with gradient
accumulation and the optimizer. Tokens are drawn by Zipf's law, the same for all. MFU counts each side's own FLOPs per token against
the data sheet. "near" is nanochat with its attention function replaced by PyTorch's FlexAttention for the windows, as in ours: its
own choice without FlashAttention 3 is a mask.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent.parent
LENGTH, WORDS, HEAD = 2048, 32768, 128
SIDES = ("nanochat", "ours", "nanochat near", "nanochat fp8", "ours fp8", "nanochat near fp8")
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}


@functools.cache
def wait_for_turn() -> None:
    """Say that everything is compiled, then sleep until this process may have the GPU to itself."""
    print("compiled", flush=True)
    sys.stdin.readline()


def patient_backend():
    """torch.compile's default backend, which waits for its turn before it first runs what it compiled."""
    import torch
    from torch._inductor.compile_fx import compile_fx
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):     # else the backward pass is compiled late
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def backend(graph, inputs):
        run = compile_fx(graph, inputs)

        def when_free(*inputs):
            wait_for_turn()
            return run(*inputs)

        return when_free

    return backend


def lend_windows(gpt) -> None:
    """Give nanochat FlexAttention for its windows and PyTorch's choice for the rest, as ours has."""
    from torch.nn.attention.flex_attention import flex_attention
    from nanochat_nb.model import attend, near_blocks
    blocks = near_blocks(LENGTH, LENGTH // 4, "cuda")

    def attention(q, k, v, causal=True, window_size=(-1, -1)):
        if window_size[0] >= LENGTH:
            return attend(q, k, v)
        return flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=blocks).transpose(1, 2)

    gpt.flash_attn.flash_attn_func = attention


def nanochat_model(depth: int):
    """nanochat's model on the GPU, built as its script does."""
    import torch
    from nanochat.gpt import GPT, GPTConfig
    torch.set_float32_matmul_precision("high")
    width = depth * 64
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=LENGTH, vocab_size=WORDS, n_layer=depth, n_head=width // HEAD, n_kv_head=width // HEAD,
                              n_embd=width))
    model.to_empty(device="cuda")
    model.init_weights()
    return model


def nanochat_step(args, idx, targets):
    """(a function that trains one step on all rows, FLOPs per token), as nanochat's loop does it."""
    import nanochat.gpt
    import torch
    if "near" in args.worker:
        lend_windows(nanochat.gpt)
    model = nanochat_model(args.depth)
    flops = model.estimate_flops()
    if "fp8" in args.worker:
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training
        large = lambda m, name: isinstance(m, torch.nn.Linear) and min(m.weight.shape) >= 128 and not any(n % 16 for n in m.weight.shape)
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"), module_filter_fn=large)
    net, optimizer = torch.compile(model, dynamic=False, backend=patient_backend()), model.setup_optimizer()
    parts = list(zip(idx.split(args.rows), targets.split(args.rows)))

    def step(parts=parts):
        for x, y in parts:
            loss = net(x, y)
            (loss / len(parts)).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return lambda few=None: step(parts[:few]), flops


def our_step(args, idx, targets):
    """The same of ours: notebook 11's step on notebook 04's model and notebook 05's optimizer."""
    import torch
    from nanochat_nb import pretraining
    from nanochat_nb.model import GPTConfig, train_in_fp8
    from nanochat_nb.optimizer import build_optimizer
    from nanochat_nb.runtime import start_runtime
    rt = start_runtime("cuda")
    model = pretraining.build_model(GPTConfig.from_depth(args.depth, vocab_size=WORDS, sequence_len=LENGTH), rt, seed=0)
    if "fp8" in args.worker:
        train_in_fp8(model)
    net, optimizer = torch.compile(model, dynamic=False, backend=patient_backend()), build_optimizer(model, rt=rt)
    folder = tempfile.TemporaryDirectory()
    loop = pretraining.TrainingLoop("base", folder.name, rt, model=model, optimizer=optimizer, steps=1000, recipe={}, meta={})
    loop.bar, loop.scratch = SimpleNamespace(set_postfix_str=lambda *a, **k: None), folder
    flops = model.flops_per_token()

    def step(few=None):
        rows = few * args.rows if few else len(idx)
        plan = SimpleNamespace(steps=1000, warmup_steps=1, weight_decay=0.28, batch_tokens=rows * LENGTH)
        pretraining.pretraining_step(loop, net, (idx[:rows], targets[:rows]), plan, flops, args.rows)
        return loop.metrics.rows()[-1]["loss"]

    return step, flops


def train(args) -> dict:
    """What one side measures."""
    import torch
    likely = 1 / (torch.arange(WORDS) + 2.7)
    tokens = torch.multinomial(likely, args.batch // LENGTH * (LENGTH + 1), replacement=True, generator=torch.Generator().manual_seed(1))
    tokens = tokens.view(-1, LENGTH + 1).cuda()
    step, flops = (our_step if "ours" in args.worker else nanochat_step)(args, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    losses, times = [step(1), step(2)], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"tokens": args.batch / statistics.median(times), "flops": flops, "memory": torch.cuda.max_memory_allocated() / 2**30,
            "losses": losses, "times": times}


def our_writer(depth: int):
    """(a function that writes `new` greedy tokens after each of `rows` prompts, bytes of the weights read for a token)."""
    import torch
    from nanochat_nb.inference import Engine
    from nanochat_nb.model import GPT, GPTConfig, Linear
    from nanochat_nb.runtime import start_runtime
    model = GPT(GPTConfig.from_depth(depth, vocab_size=WORDS, sequence_len=LENGTH), dtype=start_runtime("cuda").dtype).cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    engine = Engine(model, SimpleNamespace(special=lambda name: -1))
    weights = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return lambda prompt, rows, new: engine.generate([prompt], num_samples=rows, max_new_tokens=new, temperature=0, tools=False), weights


def nanochat_writer(depth: int):
    """The same of nanochat's engine. Its tokenizer needs rustbpe, which nothing here uses."""
    sys.modules.setdefault("rustbpe", SimpleNamespace())
    from nanochat.engine import Engine
    model = nanochat_model(depth)
    engine = Engine(model, SimpleNamespace(encode_special=lambda name: -1, get_bos_token_id=lambda: -1))
    return lambda prompt, rows, new: engine.generate_batch(prompt, num_samples=rows, max_tokens=new, temperature=0), 2 * model.num_matmul_params()


def decode(args) -> dict:
    """Seconds per step of the engine, per number of rows, and the bytes that a step must read."""
    import torch
    write, weights = (our_writer if args.worker == "ours decode" else nanochat_writer)(args.depth)
    wait_for_turn()
    prompt, new, result = list(range(1, 129)), 257, {}
    for rows in args.decode:
        times = []
        for length in (new, 1, new, 1):                      # the first two warm up
            torch.cuda.synchronize()
            start = time.perf_counter()
            write(prompt, rows, length)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        cached = rows * (len(prompt) + new / 2) * args.depth * 2 * args.depth * 64 * 2
        result[str(rows)] = {"seconds": (times[2] - times[3]) / (new - 1), "bytes": weights + cached}
    return result


def start(args, worker: str, depth: int):
    """A process of one side; it compiles at once."""
    path = os.pathsep.join([str(HERE)] + [str(args.nanochat)] * ("nanochat" in worker))
    numbers = [f"--{k}={getattr(args, k)}" for k in ("rows", "batch", "steps")] + ["--decode", *map(str, args.decode)]
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen([sys.executable, __file__, str(args.nanochat), f"--worker={worker}", f"--depth={depth}", *numbers],
                               env=os.environ | {"PYTHONPATH": path, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    process.errors = errors
    return process


def lines(process):
    """What a process prints, without what its imports say."""
    return (line for line in process.stdout if line.startswith(("compiled", "{")))


def result(process) -> dict | None:
    """What a process measured, now that it is its turn; None if it failed."""
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass
    found = next((json.loads(line) for line in lines(process) if line.startswith("{")), None)
    process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanochat", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES[:3]))
    for name, value in (("rows", 32), ("batch", 2**19), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--worker")
    parser.add_argument("--depth", type=int)
    args = parser.parse_args()
    if args.worker:
        found = (decode if "decode" in args.worker else train)(args)
        return print(json.dumps(found), flush=True)
    import torch
    sys.path.insert(0, str(HERE))
    from nanochat_nb.pretraining import data_sheet
    name = torch.cuda.get_device_name()
    peak, bandwidth = data_sheet(name), next((v for k, v in BANDWIDTH.items() if k in name), None)
    print(f"{name}, torch {torch.__version__}", flush=True)
    tasks = [(side, depth) for depth in args.depths for side in args.sides]
    tasks += [(f"{side} decode", depth) for depth in args.depths for side in ("ours", "nanochat") if args.decode]
    running = {task: start(args, *task) for task in tasks}
    for process in running.values():
        next(lines(process), None)
    print("| | depth | tokens/s | MFU | × nanochat | peak memory, GiB | MFLOP/token | loss of 1st, last step | seconds of the steps |\n" + "|---" * 9 + "|", flush=True)
    speed = {}
    for (side, depth), process in running.items():
        found = result(process)
        if found is None:
            process.errors.seek(0)
            print(f"{side}, depth {depth}, failed:\n{process.errors.read()[-1500:]}", flush=True)
        elif "decode" in side:
            for rows, m in found.items():
                share = f", {m['bytes'] / m['seconds'] / bandwidth:.1%} of the memory's bandwidth" if bandwidth else ""
                print(f"{side}, depth {depth}, {rows} rows: {m['seconds'] * 1e3:.2f} ms a step, {int(rows) / m['seconds']:,.0f} tokens/s{share}", flush=True)
        else:
            speed[side, depth] = found["tokens"]
            against = speed.get((("nanochat fp8" if "fp8" in side else "nanochat"), depth))
            print(f"| {side} | {depth} | {found['tokens']:,.0f} | {found['flops'] * found['tokens'] / peak:.1%} | "
                  f"{found['tokens'] / against if against else float('nan'):.2f} | {found['memory']:.1f} | {found['flops'] / 1e6:.0f} | "
                  f"{found['losses'][0]:.3f}, {found['losses'][-1]:.3f} | {', '.join(f'{t:.3f}' for t in found['times'])} |", flush=True)


if __name__ == "__main__":
    main()
