"""Training stages killed and resumed, cut into pieces, and split over two processes: always the same run."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanochat_nb.pretraining as pretraining
import nanochat_nb.rl as rl
import nanochat_nb.sft as sft
from nanochat_nb.checkpoint import list_checkpoints, load_checkpoint, step_of
from nanochat_nb.loader import batch_documents, in_words, open_shards
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import UserError, start_runtime
from nanochat_nb.tokenizer import run_tokenizer

BASE = dict(depth=1, head_dim=32, sequence_len=192, total_batch_tokens=768, steps=9, documents=600, eval_every=4,
            eval_batches=2, sample_every=5, save_every=2, keep=10, dtype="float32", device="cpu",
            lr_scale=0.3)      # gentle: at full rates a run this small turns 1e-7 of rounding into 1e-4 within six steps
SFT = dict(mixture={"identity": 2.0, "letters": 1.5, "choice": 1.0}, examples=12, steps=6, eval_every=2,
           eval_examples=4, save_every=2, keep=10, dtype="float32", device="cpu")
RL = dict(tasks=["choice", "letters"], examples=12, replay=3, reminders=2, recall=3, prompts_per_step=4, samples_per_prompt=4, steps=5, max_new_tokens=8,
          eval_prompts=4, eval_samples=2, eval_every=2, save_every=2, keep=10, dtype="float32", device="cpu")
STAGES = {"base": (pretraining.run_base, BASE, pretraining), "sft": (sft.run_sft, SFT, sft), "rl": (rl.run_rl, RL, rl)}
TIMINGS = {"seconds", "tokens_per_second"}


def even_length(self, conversation, text):
    """A reward that an untrained model earns now and then, so that groups differ: an even number of characters."""
    return float(len(text) % 2 == 0)


@pytest.fixture(autouse=True)
def easy_reward(monkeypatch):
    monkeypatch.setattr("nanochat_nb.tasks.Task.reward", even_length)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of all three stages."""
    folder = tmp_path_factory.mktemp("whole")
    run_tokenizer(run=str(folder), vocab_size=512, documents=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat_nb.tasks.Task.reward", even_length)
        for run_stage, options, _ in STAGES.values():
            run_stage(run=str(folder), **options)
    return folder


def copy_before(whole: Path, stage: str, to: Path) -> Path:
    """The run as it was before `stage` began."""
    for name in ("tokenizer", "tokens", *list(STAGES)[:list(STAGES).index(stage)]):
        if name != "tokens" or stage != "base":
            shutil.copytree(whole / name, to / name)
    return to


def rows(folder: Path, stage: str) -> list[dict]:
    lines = (folder / "metrics" / f"{stage}.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def assert_same_weights(a: Path, b: Path, stage: str):
    a, b = load_checkpoint(a / stage), load_checkpoint(b / stage)
    assert a.step == b.step
    for name in a.model_state:
        assert torch.equal(a.model_state[name], b.model_state[name]), name
    for name in a.optimizer_state:
        assert torch.equal(a.optimizer_state[name], b.optimizer_state[name]), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["before the update", "in the save", "after the last save"])
def test_killed_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch, stage, where):
    """Weights and optimizer to the last bit, metrics but for timings."""
    run_stage, options, module = STAGES[stage]
    folder = copy_before(whole, stage, tmp_path)
    owner, name = {"before the update": (module, "update"), "in the save": (pretraining, "save_checkpoint"),
                   "after the last save": (module, "finish")}[where]
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == {"before the update": 4, "in the save": 2, "after the last save": 1}[where]:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        run_stage(run=str(folder), **options)
    monkeypatch.setattr(owner, name, original)
    run_stage(run=str(folder), **options)
    assert_same_weights(whole, folder, stage)
    assert rows(whole, stage) == rows(folder, stage)
    if stage == "rl":
        remembered = [load_checkpoint(run / "rl").meta["loop"]["memory"]["rare"] for run in (whole, folder)]
        assert remembered[0] == remembered[1] != []


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path):
    """The one before it is resumed from, and the end is the same."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    last = list_checkpoints(tmp_path / "base")[-1]
    with open(last / "model.safetensors", "r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"\1" * 8)
    pretraining.run_base(run=str(tmp_path), **BASE)
    assert_same_weights(whole, tmp_path, "base")


def test_other_parameters_do_not_continue_a_checkpoint(whole, tmp_path, capsys):
    """They begin afresh, and the old checkpoints are kept aside; what only watches may change."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    pretraining.run_base(run=str(tmp_path), **BASE | dict(eval_every=3, save_every=4, micro_batch_rows=2))
    assert "resumed at step 9 of 9" in capsys.readouterr().out
    pretraining.run_base(run=str(tmp_path), **BASE | dict(steps=3))
    assert load_checkpoint(tmp_path / "base").step == 3
    assert load_checkpoint(tmp_path / "base.old").step == 9


def test_another_number_format_is_said(whole, tmp_path, capsys):
    """A run may go on in another one, as on another machine, but not silently."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    pretraining.run_base(run=str(tmp_path), **BASE)
    assert "goes on in" not in capsys.readouterr().out
    pretraining.run_base(run=str(tmp_path), **BASE | dict(dtype="bfloat16"))
    assert "in torch.float32 so far and goes on in torch.bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("cost", [0.5, 30.0])
def test_saving_takes_at_most_a_twentieth_of_the_time(monkeypatch, cost):
    """A quick save is made every minute, a slow one when twenty times its duration has gone by."""
    clock, saves = [0.0], []

    def save(loop):
        saves.append(clock[0])
        clock[0] += cost

    monkeypatch.setattr(pretraining, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(pretraining, "save", save)
    loop = SimpleNamespace(stage="base", steps=2000, step=0, save_seconds=60.0, save_every=0,
                           rt=SimpleNamespace(broadcast=lambda value: value))
    for _ in pretraining.training_steps(loop):
        clock[0] += 1.0
    gaps = [b - a - cost for a, b in zip(saves[:-1], saves[1:-1])]     # the last save is that of the end
    wanted = max(60.0, 20 * cost)
    assert 60 <= saves[0] <= 62 and len(gaps) >= 2 and all(wanted <= gap <= wanted + 2 for gap in gaps)


def test_micro_batches_do_not_change_the_loss(whole, tmp_path):
    for stage in ("base", "sft"):
        run_stage, options, _ = STAGES[stage]
        folder = copy_before(whole, stage, tmp_path / stage)
        run_stage(run=str(folder), **options | dict(micro_batch_rows=3))
        assert_close(rows(whole, stage), rows(folder, stage))


def assert_close(a: list[dict], b: list[dict], tolerance: float = 1e-4):
    """Equal rows, numbers to `tolerance`; sampled texts aside."""
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x.keys() - {"samples"}:
            assert x[key] == pytest.approx(y[key], abs=tolerance), (key, x["step"])


@pytest.mark.parametrize("stage", STAGES)
def test_nan_stops_with_the_batch_and_the_last_good_checkpoint(whole, tmp_path, monkeypatch, stage):
    """And the same command, with the cause gone, ends as the run that had no trouble."""
    run_stage, options, module = STAGES[stage]
    folder, name = copy_before(whole, stage, tmp_path), "policy_gradient" if stage == "rl" else "accumulate"
    original, calls = getattr(module, name), []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return float("nan") if len(calls) == 4 else original(*args, **kwargs)

    monkeypatch.setattr(module, name, poisoned)
    with pytest.raises(UserError) as told:
        run_stage(run=str(folder), **options)
    monkeypatch.setattr(module, name, original)
    step = max(row["step"] for row in rows(folder, stage) if "loss" in row) + 1
    last = step_of(list_checkpoints(folder / stage)[-1])
    assert f"became nan at step {step}, whose batch is made of " in str(told.value)
    assert f"last good checkpoint is step_{last:08d}" in str(told.value) and step - 2 <= last <= step
    if stage == "base":
        made_of = batch_documents(open_shards(folder / "tokens" / "train"), step, rows=4, sequence_len=192)
        assert in_words(made_of) in str(told.value)
    else:
        assert "letters: " in str(told.value) or "choice: " in str(told.value)
    run_stage(run=str(folder), **options)
    assert_same_weights(whole, folder, stage)


def test_an_exploding_loss_stops(whole, tmp_path):
    """A thousand times the learning rate; at the right one (`whole`) no step came near the limit."""
    folder = copy_before(whole, "base", tmp_path)
    with pytest.raises(UserError, match=r"the loss became [\d.]+ at step \d+, whose batch is made of shard_00000.bin: "):
        pretraining.run_base(run=str(folder), **BASE | dict(steps=30, lr_scale=1000, eval_every=0))
    limit = pretraining.hopeless(512)
    assert all(row["loss"] < 0.6 * limit for stage in ("base", "sft") for row in rows(whole, stage) if "loss" in row)


FULL = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
from nanochat_nb.checkpoint import latest_checkpoint
from nanochat_nb.pretraining import run_base
from nanochat_nb.runtime import UserError, start_runtime
folder, reference = Path({folder!r}), Path({reference!r})
run_base(run=str(reference), **t.BASE)        # in this process, whose threads may be other than pytest's
(folder / "base").mkdir()
mount = ["mount", "-t", "tmpfs", "none", str(folder / "base"), "-o"]
subprocess.run([*mount, "size={size}"], check=True)
try:
    run_base(run=str(folder), **t.BASE)
    raise SystemExit("the disk should have been full")
except UserError as error:
    assert "Free some space" in str(error), error
assert sorted(p.name for p in (folder / "base").iterdir()) == ["step_00000002", "step_00000004"]
assert latest_checkpoint(folder / "base").name == "step_00000004"
subprocess.run([*mount, "remount,size=1g"], check=True)
run_base(run=str(folder), **t.BASE)
t.assert_same_weights(reference, folder, "base")
"""


def test_a_full_disk(whole, tmp_path):
    """A file system with room for two checkpoints and a half: the third save fails, the two are whole, and with more
    room the run goes on."""
    for private in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        trial = shutil.which("unshare") and subprocess.run([*private, "mount", "-t", "tmpfs", "none", str(tmp_path)],
                                                           capture_output=True, text=True)
        if trial and trial.returncode == 0:
            break
    else:
        pytest.skip(f"no file system can be mounted here: {trial.stderr.strip() if trial else 'there is no unshare'}")
    size = sum(p.stat().st_size for p in list_checkpoints(whole / "base")[0].iterdir())
    folder, reference = (copy_before(whole, "base", tmp_path / name) for name in ("run", "reference"))
    script = tmp_path / "full.py"
    script.write_text(FULL.format(tests=str(Path(__file__).parent), folder=str(folder), reference=str(reference),
                                  size=int(2.6 * size)), "utf-8")
    done = subprocess.run([*private, sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("change, message", [
    (dict(depth=0), "depth must be at least 1"), (dict(aspect_ratio=0), "aspect_ratio must"), (dict(steps=0, token_ratio=0), "token_ratio"),
    (dict(total_batch_tokens=1000), "no multiple of sequence_len"), (dict(micro_batch_rows=0), "micro_batch_rows"),
    (dict(documents=3), "corpus is too small"), (dict(lr_scale=-1), "lr_scale"), (dict(text=["wrold"]), "world")])
def test_bad_parameters_of_pretraining(whole, tmp_path, change, message):
    folder = copy_before(whole, "base", tmp_path)
    with pytest.raises(UserError, match=message):
        pretraining.run_base(run=str(folder), **BASE | change)


@pytest.mark.parametrize("change, message", [
    (dict(mixture={"identiy": 1.0}), "identity"), (dict(mixture={}), "nothing to learn"),
    (dict(conversations=["absent.jsonl"]), "absent.jsonl"), (dict(steps=0, epochs=0), "nothing to do"),
    (dict(total_batch_tokens=100), "no multiple"), (dict(lr_fraction=0), "lr_fraction"),
    (dict(mixture={"identity": 1.0, "letters": -1.0}), "letters is -1"), (dict(text_share=0.01), "rounds to no text")])
def test_bad_parameters_of_fine_tuning(whole, tmp_path, change, message):
    folder = copy_before(whole, "sft", tmp_path)
    with pytest.raises(UserError, match=message):
        sft.run_sft(run=str(folder), **SFT | change)


@pytest.mark.parametrize("change, message", [
    (dict(tasks=["leters"]), "letters"), (dict(tasks=[]), "at least one task"), (dict(samples_per_prompt=1), "samples_per_prompt"),
    (dict(advantage="best"), "advantage"), (dict(steps=-1), "steps"), (dict(replay=-1), "replay"), (dict(recall=-1), "recall"),
    (dict(reminders=-1), "reminders"), (dict(tasks=["choice", "letters", "identity"]), "nothing beside choice, letters, identity"),
    (dict(tasks=["word_problem"], replay=1), "no solutions of word_problem"), (dict(eval_prompts=0), "eval_prompts"), (dict(temperature=0.0), "temperature")])
def test_bad_parameters_of_rl(whole, tmp_path, change, message):
    folder = copy_before(whole, "rl", tmp_path)
    with pytest.raises(UserError, match=message):
        rl.run_rl(run=str(folder), **RL | change)


@pytest.mark.parametrize("stage", STAGES)
def test_muon_takes_the_rounds_of_the_plan(whole, tmp_path, monkeypatch, stage):
    """Three at this size: 5 · 64 channels / 768 tokens a step is over a fifth."""
    class Enough(Exception):
        pass

    def note(model, **options):
        raise Enough(options["rounds"])

    run_stage, options, module = STAGES[stage]
    monkeypatch.setattr(module, "build_optimizer", note)
    with pytest.raises(Enough, match="3"):
        run_stage(run=str(copy_before(whole, stage, tmp_path)), **options)


def test_a_named_run_needs_the_stage_before(tmp_path):
    for run_stage, options, _ in STAGES.values():
        with pytest.raises(UserError):
            run_stage(run=str(tmp_path), **options)


def test_checkpoint_of_another_tokenizer(whole, tmp_path):
    folder = copy_before(whole, "sft", tmp_path)
    run_tokenizer(run=str(folder), vocab_size=500, documents=300)
    with pytest.raises(UserError, match="another tokenizer"):
        sft.run_sft(run=str(folder), **SFT)


def test_own_conversations_are_learned_and_held_out(whole, tmp_path):
    folder = copy_before(whole, "sft", tmp_path)
    lines = [[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}] for i in range(60)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    result = sft.run_sft(run=str(folder), **SFT | dict(mixture={}, conversations=[str(folder / "own.jsonl")], conversation_epochs=2.0))
    assert 80 <= result["mixture"]["own"] < 120 and result["mixture"]["own"] % 2 == 0


WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
import test_training as t
import nanochat_nb.tasks
nanochat_nb.tasks.Task.reward = t.even_length
for stage in {stages!r}:
    run_stage, options, _ = t.STAGES[stage]
    run_stage(run={folder!r}, **options)
"""


def stages_on_ranks(folder: Path, stages: list[str], ranks: int = 2) -> None:
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), stages=stages, folder=str(folder)), "utf-8")
    on_ranks(script, ranks)


def on_ranks(script: Path, ranks: int = 2) -> None:
    """Run a script on gloo ranks."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)],
                   check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def test_two_ranks_are_one_run(whole, tmp_path):
    """Same losses to 1e-4 on two gloo ranks; then one rank goes on from the two ranks' checkpoint."""
    folder = copy_before(whole, "base", tmp_path)
    stages_on_ranks(folder, ["base", "sft"])
    for stage in ("base", "sft"):
        assert_close(rows(whole, stage), rows(folder, stage))
    for path in list_checkpoints(folder / "base"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    pretraining.run_base(run=str(folder), **BASE)
    assert_close(rows(whole, "base"), rows(folder, "base"))


@pytest.mark.parametrize("before, after", [(1, 2), (4, 2)])
def test_resumed_on_other_ranks(whole, tmp_path, before, after):
    """Begun on so many ranks and ended on others: the losses of one rank, to 1e-4."""
    folder = copy_before(whole, "base", tmp_path)
    if before == 1:
        for name in ("base", "tokens", "metrics"):
            shutil.copytree(whole / name, folder / name)
    else:
        stages_on_ranks(folder, ["base"], before)
    for path in list_checkpoints(folder / "base"):
        if step_of(path) > 4:
            shutil.rmtree(path)
    stages_on_ranks(folder, ["base"], after)
    assert json.loads((folder / "base" / "summary.json").read_text())["world_size"] == after
    assert_close(rows(whole, "base"), rows(folder, "base"))


def test_rl_on_two_ranks(whole, tmp_path):
    """Each rank answers every second question with the random numbers that question has anywhere."""
    folder = copy_before(whole, "rl", tmp_path)
    stages_on_ranks(folder, ["rl"])
    one, two = rows(whole, "rl"), rows(folder, "rl")
    assert [r for r in one if r["step"] == 0] == [pytest.approx(r, abs=1e-4) for r in two if r["step"] == 0]
    assert len(one) == len(two)


@pytest.mark.parametrize("signals, asked", [((4,), 1), ((1, 3, 4), 2), ((0, 0, 0, 4), 3), ((2, 1, 0), 3)])
def test_silent_groups_are_replaced(monkeypatch, signals, asked):
    """`rounds` asks other questions until a round's worth of groups carries a signal, or the rounds are spent."""
    seen, learned, left = [], [], iter(signals)

    def roll_out(engine, tokenizer, questions, seeds, **_):
        seen.append(list(zip(questions, seeds)))
        telling = next(left)
        return [[SimpleNamespace(reward=1.0), SimpleNamespace(reward=0.0 if i < telling else 1.0)] for i in range(len(questions))]

    monkeypatch.setattr(rl, "roll_out", roll_out)
    monkeypatch.setattr(rl, "learn_from", lambda loop, groups, *_: learned.extend(groups))
    p = dict(rounds=3, replay=0, recall=0, prompts_per_step=4, seed=0, samples_per_prompt=2, max_new_tokens=8, temperature=1.0, top_k=0, advantage="mean")
    model = SimpleNamespace(config=SimpleNamespace(sequence_len=8))
    rl.practise_step(SimpleNamespace(rt=start_runtime("cpu", "float32"), step=5, model=model, memory={}), None, None, list(range(100)), {}, p)
    assert len(seen) == asked and len(learned) == 4 * asked
    assert len({question for batch in seen for question, _ in batch}) == len({seed for batch in seen for _, seed in batch}) == 4 * asked


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (0.0, 0.0)])
def test_old_solutions_are_learned_with_half_a_vote(monkeypatch, rewards):
    """One question, two answers, one old solution: the gradient is that of the sum written out; and a silent step learns the solution."""
    model = GPT(GPTConfig.from_depth(1, vocab_size=64, sequence_len=32, head_dim=32), dtype=torch.float32).init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    answers = [rl.Rollout([1, 2], ids, [1] * len(ids), reward, True) for ids, reward in zip(([5, 6, 7], [8, 9]), rewards)]
    old = rl.Rollout([1], [3, 4, 5], [0, 1, 1], 1.0, True)
    seen, flops = {}, []
    monkeypatch.setattr(rl, "update", lambda loop, loss, lr: seen.update(grad=model.lm_head.weight.grad.clone()))
    monkeypatch.setattr(rl, "record", lambda loop, began, **row: flops.append(row["flops"]))
    loop = SimpleNamespace(rt=start_runtime("cpu", "float32"), model=model, step=0, steps=1)
    p = dict(advantage="likelihood", normalize="tokens", max_new_tokens=8, lr_shape="cosine", micro_batch_rows=2)
    rl.learn_from(loop, [answers], [old], SimpleNamespace(special=lambda name: 0), p, 0.0)
    model.zero_grad()
    tokens = 3 + 2                                                     # of all answers
    told = [(answers[0], 1 / tokens)] * (rewards[0] > 0) + [(old, 0.5 / tokens)]
    loss = torch.zeros(())
    for r, weight in told:
        logp = model(torch.tensor([r.prompt + r.ids]))[0].log_softmax(-1)
        loss = loss - weight * sum(chosen * logp[len(r.prompt) + i - 1, token] for i, (token, chosen) in enumerate(zip(r.ids, r.mask)))
    loss.backward()
    assert torch.allclose(seen["grad"], model.lm_head.weight.grad, atol=1e-6) and seen["grad"].abs().max() > 1e-3
    learned, read = sum(len(r.prompt) + len(r.ids) for r, _ in told), 2 + tokens
    assert flops == [pytest.approx(model.flops_per_token() * (learned + read / 3))]


WAITING = """
import time
from datetime import timedelta
import torch.distributed as dist
from nanochat_nb.pretraining import on_rank_zero
from nanochat_nb.runtime import UserError, start_runtime
dist.init_process_group("gloo", timeout=timedelta(seconds=10))     # half an hour, made short
rt, done = start_runtime("cpu", "float32"), []
on_rank_zero(lambda: (time.sleep(15), done.append(rt.rank)), rt)
assert rt.gather(done) == [[0], []], "rank 0 works, and alone"
def fail():
    raise UserError("the disk is full")
try:
    on_rank_zero(fail, rt)
    raise SystemExit("nothing was raised")
except UserError as error:
    assert "the disk is full" in str(error)
dist.destroy_process_group()
"""


def test_ranks_wait_for_rank_zero_longer_than_a_collective_would(tmp_path):
    """However long rank 0 tokenizes; and its error is everybody's, so that none waits for ever."""
    script = tmp_path / "waiting.py"
    script.write_text(WAITING, "utf-8")
    on_ranks(script)
