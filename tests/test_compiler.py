"""What only a compiled model does, as far as a CPU can show: the compiler follows it, and the numbers stay the same."""
import torch

from nanochat_nb import model as m


def followed(function):
    """The function as the compiler traces it, in one piece, run without generating code."""
    return torch.compile(function, backend="aot_eager", dynamic=False, fullgraph=True)


def test_windows_are_cut_into_blocks_once_for_all_layers(monkeypatch):
    made, near_blocks = [], m.near_blocks
    monkeypatch.setattr(m, "near_blocks", lambda *a: made.append(a) or near_blocks(*a))
    q, k, v = torch.randn(3, 1, 320, 2, 16, generator=torch.Generator().manual_seed(0))

    def layers(q, k, v):
        masks = {}
        return m.attend_near(m.attend_near(q, k, v, 150, masks), k, v, 150, masks)

    by_mask = layers(q, k, v)
    assert not made
    assert torch.allclose(followed(layers)(q, k, v), by_mask, atol=1e-5)
    assert len(made) == 1


def test_the_loss_for_gpus_is_one_graph_with_the_same_numbers():
    rng = torch.Generator().manual_seed(1)
    x, weight = torch.randn(40, 24, generator=rng), torch.randn(50, 24, generator=rng)
    targets, scale = torch.randint(-1, 50, (40,), generator=rng), torch.rand(40, generator=rng)
    for found, want in zip(followed(m._chunk_loss_fused)(x, weight, targets, scale), m._chunk_loss(x, weight, targets, scale)):
        assert torch.allclose(found, want, atol=1e-5)
