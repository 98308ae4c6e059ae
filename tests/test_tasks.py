"""Tasks, and what the presets draw from them: no question on both sides, nothing missing after hours of training."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import nanochat_nb.sft as sft
import nanochat_nb.tasks as tasks
from nanochat_nb.corpus import split_of
from nanochat_nb.evaluation import evaluate_task, everywhere, open_tasks
from nanochat_nb.rl import open_questions
from nanochat_nb.runtime import UserError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


class Hub(list):
    """A data set that counts its reads, as every read of a large one costs time and memory."""
    reads = 0

    def __getitem__(self, i: int) -> dict:
        self.reads += 1
        return list.__getitem__(self, i)


def hub_row(name: str, i: int) -> dict:
    """Row `i` as the hub gives it."""
    if name == "mmlu":
        return {"question": f"Which is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": "sums"}
    if name.startswith("arc"):
        return {"question": f"Which is {i}?", "answerKey": "B", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    if name == "gsm8k":
        return {"question": f"What is {i} + 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
    if name == "humaneval":
        return {"prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}", "entry_point": f"f{i}",
                "test": f"def check(f):\n    assert f() == {i}"}
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {i}"},
                         {"role": "assistant", "content": str(i)}]}


SPLITS = {"gsm8k": ("train", "test"), "smoltalk": ("train", "test"), "humaneval": ("test",),
          "mmlu": ("auxiliary_train", "validation", "test")}


@pytest.fixture
def hub(monkeypatch):
    """Data sets of 300 rows with the splits of the real ones, and nothing for a name that no hub has."""
    opened = {}

    def load(name: str, split: str):
        assert name in tasks.REAL and name != "spellingbee", f"{name} is on no hub"
        assert split in SPLITS.get(name, ("train", "validation", "test")), f"{name} has no split {split}"
        opened[name, split] = Hub(hub_row(name, i) for i in range(300))
        return opened[name, split]

    monkeypatch.setattr(tasks, "load_hf_rows", load)
    return opened


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_every_task_of_a_preset_opens(preset, hub):
    """All that fine-tuning and RL will draw from is there, for training and for validation."""
    stages = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text("utf-8"))
    mixture, data = stages["sft"]["mixture"], stages["sft"].get("data", "")
    for split in ("train", "val"):
        counts = sft.open_mixture(mixture, split, data=data, examples=20, seed=0).counts()
        assert all(counts.values()) and len(counts) == len(mixture)
    for name in stages["rl"].get("tasks", ["word_problem"]):
        assert open_questions([name], "train", data=stages["rl"].get("data", ""), examples=5, seed=0)


def test_a_preset_does_not_repeat_the_identity(hub):
    """Of its questions about who the model is at least seven in ten are different texts."""
    for path in PRESETS.glob("*.yaml"):
        stage = yaml.safe_load(path.read_text("utf-8"))["sft"]
        task = tasks.open_task("identity", "train", limit=round(stage["mixture"]["identity"] * stage["examples"]))
        asked = {str(task[i]["messages"][-2]["content"]) for i in range(len(task))}
        assert len(asked) >= 0.7 * len(task), path.name


@pytest.mark.parametrize("words", ["", "\n".join(f"{a}{b}pple" for a in "abcdefghij" for b in "klmnopqrst")])
def test_spellingbee_keeps_its_words_apart(tmp_path, words):
    """With a word list or without one, no word of the test is a word of training, and each split is filled."""
    if words:
        (tmp_path / "words").mkdir()
        (tmp_path / "words" / "words_alpha.txt").write_text(words, "utf-8")
    seen = {}
    for split in ("train", "val", "test"):
        rows = tasks.open_task("spellingbee", split, data=tmp_path).rows
        seen[split] = {row["word"] for row in rows}
        assert len(rows) == 1000
        if words or split != "train":                    # training also gets all the words that the world's texts use
            assert all(split_of("word", word) == split for word in seen[split])
        assert not words or seen[split] <= set(words.split())
    assert not seen["train"] & (seen["val"] | seen["test"])


def test_a_limit_reads_no_more_rows(hub):
    """Of a large data set only the rows that are wanted are read, in the order of the whole set."""
    few = tasks.open_task("smoltalk", "train", data="huggingface", limit=5)
    rows = hub["smoltalk", "train"]
    assert rows.reads == 0
    first = [few[i] for i in range(len(few))]
    assert len(first) == rows.reads == 5
    whole = tasks.open_task("smoltalk", "train", data="huggingface")
    assert first == [whole[i] for i in range(5)]


def test_examples_limit_the_held_out_rows_of_every_task(hub):
    """`eval_examples` counts for real tasks, too; both splits together are the whole, with nothing twice."""
    for name in ("smoltalk", "gsm8k", "spellingbee"):
        assert len(sft.open_split(name, "val", data="huggingface", examples=3, seed=0)) == 3
        whole = tasks.open_task(name, "train", data="huggingface")
        parts = [sft.open_split(name, split, data="huggingface", examples=10**6, seed=0) for split in ("train", "val")]
        assert sum(map(len, parts)) == len(whole)
        questions = [{json.dumps(part[i]["messages"][:-1]) for i in range(len(part))} for part in parts]
        assert not questions[0] & questions[1]


def test_a_shared_system_prompt_does_not_decide_what_is_held_out(tmp_path):
    """Conversations that begin alike are held out one by one, by the user's first turn."""
    for prompt in (f"You are helper {i}." for i in range(40)):      # each alone may be held out or not
        lines = [[{"role": "system", "content": prompt}, {"role": "user", "content": f"Say {i}"},
                  {"role": "assistant", "content": f"{i}!"}] for i in range(200)]
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        held = len(sft.open_split(str(path), "val", data="", examples=1000, seed=0))
        assert 2 <= held <= 25
        assert len(sft.open_split(str(path), "train", data="", examples=0, seed=0)) == 200 - held


def test_an_exam_goes_on_without_a_set_that_no_network_brings(monkeypatch, tmp_path):
    """What cannot be downloaded is left out, with the reason; a damaged file of the user's own stops."""
    def load(name: str, split: str):
        raise UserError(f"cannot load {name} ({split}): no route to the hub")

    monkeypatch.setattr(tasks, "load_hf_rows", load)
    opened, skipped = open_tasks(["fact", "mmlu", "gsm8k"], "huggingface", 5, 0)
    assert [task.name for task in opened] == ["fact"] and set(skipped) == {"mmlu", "gsm8k"}
    assert all("no route to the hub" in reason for reason in skipped.values())
    ranks = SimpleNamespace(gather=lambda mine: [mine, {"fact": "lost on another rank"}])
    assert everywhere(opened, skipped, ranks) == ([], skipped | {"fact": "lost on another rank"})
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        open_tasks(["fact", "gsm8k"], str(tmp_path), 5, 0)
    (tmp_path / "gsm8k" / "test.jsonl").write_text("")
    opened, skipped = open_tasks(["fact", "gsm8k"], str(tmp_path), 5, 0)
    assert [task.name for task in opened] == ["fact"] and "gsm8k" in skipped
    with pytest.raises(UserError, match="no questions"):
        evaluate_task(None, None, tasks.Task("none", []))


def test_nothing_trains_on_an_exam(tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(hub_row("humaneval", 1)) + "\n")
    assert len(tasks.open_task("humaneval", data=tmp_path)) == 1
    for data in (tmp_path, "huggingface"):
        with pytest.raises(UserError, match="is an exam"):
            tasks.open_task("humaneval", "train", data=data)
