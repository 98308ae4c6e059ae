"""The scaling rules at their small end: the loss falls from the first steps, whatever the batch."""
import math

import pytest

from nanochat_nb.pretraining import run_base
from nanochat_nb.runtime import MetricsLog
from nanochat_nb.tokenizer import run_tokenizer

VOCABULARY, STEPS = 512, 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    run_tokenizer(run=str(folder), vocab_size=VOCABULARY, documents=300)
    return folder / "tokenizer"


def first_losses(tokenizer, folder, tokens: int) -> list[float]:
    """The losses of the first steps of a run with so many tokens a step, with the rules' own learning rates."""
    folder.mkdir()
    (folder / "tokenizer").symlink_to(tokenizer)
    run_base(run=str(folder), steps=STEPS, depth=2, head_dim=64, sequence_len=128, total_batch_tokens=tokens, eval_every=0, eval_batches=1,
             sample_every=0, device="cpu", dtype="float32")
    return [row["loss"] for row in MetricsLog(folder / "metrics" / "base.jsonl").rows() if "loss" in row]


@pytest.mark.parametrize("tokens", [512, 2048, 4096])
def test_the_loss_falls_from_the_first_steps(tokenizer, tmp_path, tokens):
    """No step is worse than guessing, and every ten steps are clearly better than the ten before."""
    losses = first_losses(tokenizer, tmp_path / "run", tokens)
    assert max(losses) < math.log(VOCABULARY) + 0.01, losses
    tens = [sum(losses[i:i + 10]) / 10 for i in range(0, STEPS, 10)]
    assert tens[1] < tens[0] - 0.1 and tens[2] < tens[1] - 0.1, tens
