"""What the tests share."""
from pathlib import Path

import pytest
import torch

from nanochat_nb.corpus import open_text
from nanochat_nb.inference import Engine
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="module")
def tok():
    """A small tokenizer; a module that needs another one has its own."""
    return Tokenizer.train([d.text for d in open_text(["world"], documents=30).documents("train")], 300)


@pytest.fixture(scope="module")
def engine(tok):
    """An engine of a very small model with random weights."""
    config = GPTConfig(sequence_len=64, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    return Engine(GPT(config, dtype=torch.float32).init_weights(1), tok)
