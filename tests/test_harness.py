"""lm-evaluation-harness, the examiner that most papers use, asks our server and reaches our own score."""
import json
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # before any of its libraries is imported
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval[api])")
pytest.importorskip("transformers", reason="the harness reads our tokenizer with transformers, which is not installed")

from live import Live                                      # noqa: E402
from nanochat_nb.checkpoint import export_model            # noqa: E402
from nanochat_nb.corpus import open_text                   # noqa: E402
from nanochat_nb.evaluation import CoreTask, evaluate_core_task  # noqa: E402
from nanochat_nb.inference import Engine                   # noqa: E402
from nanochat_nb.model import GPT, GPTConfig               # noqa: E402
from nanochat_nb.server import create_app                  # noqa: E402
from nanochat_nb.tokenizer import Tokenizer                # noqa: E402

ROWS = [{"query": f"What is {a} + {b}? Answer:", "choices": ["A", "B", "C", "D"], "gold": (a * b) % 4} for a in range(6) for b in range(5)]


def test_the_harness_reaches_our_accuracy(tmp_path):
    """`local-completions` scores choices through `echo` and `logprobs`; the right ones are those that we find."""
    tok = Tokenizer.train([d.text for d in open_text(["world"], documents=100).documents("train")], 500)
    config = GPTConfig(sequence_len=128, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    model, rng = GPT(config, dtype=torch.float32).init_weights(0), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)
    verdicts, _ = evaluate_core_task(model, tok, CoreTask("sums", "multiple_choice", "", 0, " "), ROWS)
    folder = export_model(model, tok, tmp_path / "exported")
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {"task": "sums", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}, "cache_dir": str(tmp_path / "cache")},
            "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}]}
    with Live(create_app(Engine(model, tok), name="ours")) as live:
        found = lm_eval.simple_evaluate(
            model="local-completions", tasks=[task], bootstrap_iters=0, log_samples=True,
            model_args={"model": "ours", "base_url": f"{live.address}/completions", "tokenizer": str(folder), "max_length": 128,
                        "tokenizer_backend": "huggingface", "add_bos_token": True, "num_concurrent": 1, "batch_size": 8, "max_retries": 1})
    samples = sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])
    assert [bool(sample["acc"]) for sample in samples] == verdicts
    assert found["results"]["sums"]["acc,none"] == pytest.approx(sum(verdicts) / len(verdicts))
    assert 0 < sum(verdicts) < len(verdicts)
