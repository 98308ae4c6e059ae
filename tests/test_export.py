"""An exported model in `transformers`: the same logits, the same ids, the same conversations."""
import json
import os
import random

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # before transformers is imported
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[transformers])")

from nanochat_nb.checkpoint import export_model, main, save_checkpoint   # noqa: E402
from nanochat_nb.corpus import CONVERSATION_KINDS, conversations, open_text  # noqa: E402
from nanochat_nb.evaluation import evaluate_core, load_hub, main as evaluate  # noqa: E402
from nanochat_nb.inference import Engine                   # noqa: E402
from nanochat_nb.model import GPT, GPTConfig               # noqa: E402
from nanochat_nb.runtime import UserError                  # noqa: E402
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
    found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rng = random.Random(0)
    letters = "aeht EN19'é🦉\n\t  .,-_\u00a0ß漢"
    texts = [d.text for d in open_text(["world"], documents=60).documents("val")] + ["", " ", "it's", "12345", "\r\n\r\n x"]
    texts += ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(500)]
    for text in texts:
        ids = found(text)["input_ids"]
        assert ids == tok.encode(text, prepend="<|bos|>"), text
        assert found.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_writes_our_conversations(folder, tok):
    found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
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


def bundle(folder):
    """CORE in miniature: a task of each kind."""
    rows = {"sums": ("multiple_choice", 2, [{"query": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "none"], "gold": a % 2}
                                            for a in range(5) for b in range(1, 4)]),      # b = 0 would be a tie, which rounding decides
            "who": ("schema", 0, [{"context_options": [f"The {a} slept because the {a}", f"The {a} slept because the {b}"],
                                   "continuation": "was tired.", "gold": i % 2}
                                  for i, (a, b) in enumerate([("owl", "cat"), ("cat", "dog"), ("dog", "owl"), ("fox", "owl")])]),
            "next": ("language_modeling", 1, [{"context": f"one two {w} and", "continuation": w} for w in ("red", "blue", "green")])}
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(
        f"- {{label: {name}, dataset_uri: {name}.jsonl, num_fewshot: [{shots}], icl_task_type: {kind}}}\n"
        for name, (kind, shots, _) in rows.items()))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "".join(f"{name},25\n" for name in rows))
    for name, (_, _, lines) in rows.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_exported_model_scores_what_it_scores_here(folder, ours, tok, tmp_path, capsys):
    core = bundle(tmp_path / "core")
    expected = evaluate_core(ours, tok, core)
    evaluate(["--model", str(folder), "--core", str(core), "--trust-remote-code", "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "eval" / "hub-core.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected["records"]
    assert "core_partial" in capsys.readouterr().out


def test_gpt2s_kind_sits_the_exam(folder, tok, tmp_path):
    """A small random GPT-2 in place of the real one: the verdicts are those of its logits, row by row."""
    config = transformers.GPT2Config(vocab_size=tok.vocab_size, n_positions=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gpt2" / name).write_bytes((folder / name).read_bytes())
    model, tokenizer = load_hub(tmp_path / "gpt2")
    assert model.context == 96 and tokenizer.encode("an owl") == tok.encode("an owl")
    options = [(tok.encode("the owl and the cat", prepend="<|bos|>"), 3), (tok.encode("one", prepend="<|bos|>"), 1)]
    for (row, start), (loss, greedy) in zip(options, model.score(options)):
        logits = model.network(torch.tensor([row])).logits[0].log_softmax(-1)
        by_hand = [-logits[i - 1, row[i]].item() for i in range(start, len(row))]
        assert abs(loss - sum(by_hand) / len(by_hand)) < 1e-4
        assert greedy == all(logits[i - 1].argmax() == row[i] for i in range(start, len(row)))
    assert evaluate_core(model, tokenizer, bundle(tmp_path / "core"))["tasks"]["sums"]["n"] == 15


def test_nothing_is_written_over(ours, tok, tmp_path):
    (tmp_path / "file").write_text("mine")
    for there in (tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="is a file, or not empty"):
            export_model(ours, tok, there)
    assert (tmp_path / "file").read_text() == "mine"
