"""What only a GPU can show. Skipped where there is none."""
from dataclasses import replace

import pytest
import torch

import kernels
from nanochat_nb.inference import Engine, KernelStep
from nanochat_nb.model import GPT, Fp8Product, GPTConfig, attend_near, train_in_fp8, visible
from nanochat_nb.optimizer import adamw_update, fused_adamw_update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Words:
    """As much of a tokenizer as an engine asks for; nothing ends an answer."""

    def special(self, name):
        return -1


def shaken(dtype, **changes):
    """A model of windows, value embeddings and keys that look back, in which nothing is zero."""
    config = replace(GPTConfig.from_depth(4, vocab_size=512, sequence_len=256, head_dim=64), **changes)
    model = GPT(config, dtype=dtype).init_weights(0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.02)
    return model


def loss_and_gradients(model, net):
    """Loss on fixed ids and all gradients, in float64 on the CPU."""
    ids = torch.randint(512, (4, 257), generator=torch.Generator().manual_seed(2)).to(model.device)
    loss = net(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def distance(a, b):
    """Relative distance of a from b."""
    return ((a.double().cpu() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.04)])
def test_gradients_equal_those_of_the_cpu_in_float32(compiled, dtype, tolerance):
    torch.set_float32_matmul_precision("highest")
    reference = shaken(torch.float32)
    want_loss, want = loss_and_gradients(reference, reference)
    model = shaken(dtype).cuda()
    loss, found = loss_and_gradients(model, torch.compile(model, dynamic=False) if compiled else model)
    assert abs(loss - want_loss) < tolerance / 10
    # the scalars' gradients are sums over the whole batch that nearly cancel
    far = {n: distance(found[n], want[n]) for n in want if want[n].numel() > 100}
    assert max(far.values()) < tolerance, max(far, key=far.get)


def test_windows_by_blocks_equal_windows_by_mask():
    q, k, v = torch.randn(3, 2, 640, 4, 64, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(3))
    place = torch.arange(640, device="cuda")
    for window in (128, 200):
        by_mask = attend_near(q, k, v, window, {window: visible(place, place, window)})
        by_blocks = torch.compile(lambda *qkv: attend_near(*qkv, window, {}), dynamic=False)(q, k, v)
        assert distance(by_blocks, by_mask.double().cpu()) < 0.01


def test_products_in_fp8_are_near_those_in_float64():
    rng = torch.Generator("cuda").manual_seed(4)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, generator=rng, requires_grad=True)
    weight = torch.randn(384, 256, device="cuda", generator=rng, requires_grad=True)
    grad = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16, generator=rng)
    y = Fp8Product.apply(x, weight)
    y.backward(grad)
    X, W, G = (t.detach().double().cpu() for t in (x, weight, grad))
    assert distance(y, X @ W.T) < 0.05
    assert distance(x.grad, G @ W) < 0.08 and distance(weight.grad, G.T @ X) < 0.08


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8")
def test_fp8_training_follows_bf16_and_is_for_training_only():
    losses = []
    for fp8 in (False, True):
        model = shaken(torch.bfloat16).cuda()
        plain = loss_and_gradients(model, model)[0]
        if fp8:
            train_in_fp8(model)
            assert loss_and_gradients(model, model)[0] != plain
        with torch.no_grad():
            ids = torch.arange(256, device="cuda")[None]
            losses.append(model(ids, ids).item())
    assert losses[0] == losses[1]


def test_fused_adamw_equals_the_formula():
    rng = torch.Generator("cuda").manual_seed(5)
    first = [torch.randn(1000, device="cuda", generator=rng), *torch.zeros(2, 1000, device="cuda")]
    second = [t.clone() for t in first]
    for step in (1, 2, 3):
        grad = torch.randn(1000, device="cuda", generator=rng)
        numbers = dict(step=step, lr=0.1, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.2)
        for update, (p, mean, square) in ((adamw_update, first), (fused_adamw_update, second)):
            update(p, grad, mean, square, **numbers)
    assert torch.allclose(first[0], second[0], atol=1e-5)


def test_recorded_steps_write_what_the_whole_model_says():
    torch.set_float32_matmul_precision("highest")
    model = shaken(torch.float32).cuda()
    prompts = [torch.randint(512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 120, 126, 127, 128, 200)]
    engine = Engine(model, Words(), max_batch=3)             # rows leave and enter, lengths cross 128
    for answers in (engine.generate(prompts, max_new_tokens=20, temperature=0, tools=False) for _ in range(2)):
        for prompt, (answer,) in zip(prompts, answers):
            says = model(torch.tensor([prompt + answer.ids], device="cuda"))[0].argmax(-1)
            assert answer.ids == says[len(prompt) - 1:-1].tolist()
    dials = dict(max_new_tokens=20, temperature=0.9, top_k=40, top_p=0.95, tools=False)
    crowd = engine.generate(prompts, seed=list(range(7)), **dials)
    alone = [Engine(model, Words()).generate([p], seed=i, **dials)[0] for i, p in enumerate(prompts)]
    assert [c[0].ids for c in crowd] == [a[0].ids for a in alone]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("lengths", [[130], [1, 5, 130, 200], [2 * i + 1 for i in range(100)]])
@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"n_layer": 1, "look_back_layers": (), "value_embed_layers": (0,)}])
def test_a_step_of_kernels_writes_what_the_models_own_step_does(dtype, tolerance, lengths, changes):
    torch.set_float32_matmul_precision("highest")
    model = shaken(dtype, **changes).cuda().inference_copy()
    assert KernelStep.fits(model)
    assert kernels.distance(model, lengths, 4) < tolerance


@pytest.mark.parametrize("rows", [2, 32, 128])
def test_programs_that_share_a_product_add_up_to_it(rows):
    assert kernels.distance_of_a_sum(shaken(torch.float32).cuda(), rows, 4096) < 1e-5


def test_new_weights_are_used_by_recorded_steps():
    model = shaken(torch.bfloat16).cuda()
    engine, write = Engine(model, Words()), lambda engine: engine.generate([[1, 2, 3]], max_new_tokens=30, temperature=0, tools=False)[0][0].ids
    before = write(engine)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.9)
    assert write(engine) == write(Engine(model, Words())) != before
