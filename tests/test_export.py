"""An exported model in `transformers`: the same logits, the same ids, the same conversations."""
import os
import random

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # before transformers is imported
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[transformers])")

from nanochat_nb.checkpoint import main, save_checkpoint   # noqa: E402
from nanochat_nb.corpus import CONVERSATION_KINDS, conversations, open_text  # noqa: E402
from nanochat_nb.inference import Engine                   # noqa: E402
from nanochat_nb.model import GPT, GPTConfig               # noqa: E402
from nanochat_nb.tokenizer import Tokenizer                # noqa: E402


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train([d.text for d in open_text(["world"], documents=100).documents("train")], 600)


@pytest.fixture(scope="module")
def ours(tok) -> GPT:
    """A model of windows, value embeddings, grouped heads and keys that look back, in which nothing is zero."""
    config = GPTConfig(sequence_len=64, vocab_size=tok.vocab_size, n_layer=4, n_head=4, n_kv_head=2, n_embd=64,
                       window_pattern="SL", look_back_layers=(1, 2))
    model, rng = GPT(config, dtype=torch.float32).init_weights(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def folder(tok, ours, tmp_path_factory, request):
    """What the command writes, for a run with one stage."""
    run = tmp_path_factory.mktemp("run")
    cache, transformers.dynamic_module_utils.HF_MODULES_CACHE = transformers.dynamic_module_utils.HF_MODULES_CACHE, str(run / "modules")
    request.addfinalizer(lambda: setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache))
    tok.save(run / "tokenizer")
    save_checkpoint(run / "sft", 1, model=ours, meta={"tokenizer": tok.fingerprint()})
    main(["--run", str(run), "--out", str(run / "out")])
    return run / "out"


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def test_the_logits_are_ours(ours, theirs, tok):
    ids = torch.randint(0, tok.vocab_size, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(ids), theirs(ids)
        assert (found.logits - expected).abs().max() < 1e-4 < expected.std()
        labels = ids.clone()
        labels[:, :10] = -100
        loss = theirs(ids, labels=labels).loss
        targets = torch.where(labels[:, 1:] < 0, -1, labels[:, 1:])
        assert abs(loss - ours(ids[:, :-1], targets)) < 1e-4


def test_padding_in_front_changes_nothing(ours, theirs, tok):
    row = torch.tensor([tok.encode("the owl and the cat", prepend="<|bos|>")])
    padded = torch.nn.functional.pad(row, (5, 0), value=tok.special("<|assistant_end|>"))
    with torch.no_grad():
        found = theirs(padded, attention_mask=torch.nn.functional.pad(torch.ones_like(row), (5, 0))).logits[:, 5:]
        assert (found - ours(row)).abs().max() < 1e-4


def test_greedy_answers_are_the_engines(ours, theirs, tok):
    prompt = tok.encode("the owl", prepend="<|bos|>")
    [[expected]] = Engine(ours, tok).generate([prompt], max_new_tokens=12, temperature=0, tools=False)
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()
    assert found[:len(expected.ids)] == expected.ids


def test_the_tokenizer_gives_our_ids(folder, tok):
    found = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    letters = "aeht EN19'é🦉\n\t  .,-_\u00a0ß漢"
    texts = [d.text for d in open_text(["world"], documents=60).documents("val")] + ["", " ", "it's", "12345", "\r\n\r\n x"]
    texts += ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(500)]
    for text in texts:
        ids = found(text)["input_ids"]
        assert ids == tok.encode(text, prepend="<|bos|>"), text
        assert found.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_writes_our_conversations(folder, tok):
    found = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [c for kind in CONVERSATION_KINDS for c in conversations(kind, "val", limit=6)]
    chats.append({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                               {"role": "assistant", "content": "Hello!"}]})
    assert any(isinstance(m["content"], list) for c in chats for m in c["messages"])
    for chat in chats:
        messages = chat["messages"]
        text = found.apply_chat_template(messages, tokenize=False)
        assert text == tok.decode(tok.render_conversation(chat)[0])
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == tok.render_conversation(chat)[0]
        asked = found.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert found(asked, add_special_tokens=False)["input_ids"] == tok.render_for_completion(chat)
