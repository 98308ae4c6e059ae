"""The whole pipeline in miniature through run_all.sh: uninterrupted, killed and resumed, skipped, and given bad input."""
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "tests" / "miniature.yaml"
TIMINGS = {"seconds", "tokens_per_second", "mfu", "finished"}


def environment() -> dict[str, str]:
    """This process's environment without what pytest and torchrun put there; run_all.sh uses the environment at hand."""
    dropped = ("PYTEST_CURRENT_TEST", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {k: v for k, v in os.environ.items() if k not in dropped} | {"OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    """`run_all.sh` with these arguments, where it was installed; in a bare checkout, the module that it calls."""
    if (ROOT / ".venv" / "installed").exists():
        return ["bash", str(ROOT / "run_all.sh"), *arguments]
    return [sys.executable, "-m", "nanochat_nb.launch", *arguments]


def run_all(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*map(str, arguments)), env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def results(run: Path) -> dict:
    """All that a run computed, timings aside: weights and vocabulary byte for byte, metrics row by row."""
    found = {}
    for path in sorted(run.glob("*/step_*/*.safetensors")) + [run / "tokenizer" / "tokenizer.json"]:
        found[str(path.relative_to(run))] = path.read_bytes()
    for path in sorted(run.glob("metrics/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"metrics/{path.stem}"] = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
    for path in sorted(run.glob("eval/*.json")):
        found[f"eval/{path.stem}"] = json.loads(path.read_text())["metrics"]
    return found


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_all(MINIATURE, "--run", run)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "run_all.sh chat" in done.stdout
    return run


def test_every_stage_leaves_its_traces(finished):
    for name in ("tokenizer", "base", "eval-base", "sft", "eval-sft", "rl", "eval-rl", "report"):
        assert json.loads((finished / "markers" / f"{name}.json").read_text())["state"] == "finished"
        notebook = json.loads((finished / "notebooks" / f"{name}.ipynb").read_text())
        assert notebook["metadata"]["papermill"]["exception"] is None
    for name in ("base", "sft", "rl"):
        notebook = json.loads((finished / "notebooks" / f"{name}.ipynb").read_text())
        pictures = [o for c in notebook["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
        assert pictures, f"the executed notebook of {name} has no plot"
    report = json.loads((finished / "report.json").read_text())
    assert {"tokenizer", "base", "sft", "rl"} <= set(report["stages"])
    assert (finished / "report.html").stat().st_size > 1000


def test_the_log_is_readable(finished):
    log = (finished / "log.txt").read_text()
    assert "[2/8] base" in log and "100%" in log
    assert "Traceback" not in log and "WARNING" not in log


def test_running_again_skips_everything(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    done = run_all(MINIATURE, "--run", finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished earlier") == 8
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}


def children_of(pid: int) -> list[int]:
    """All processes below `pid`."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = process.read_text()
        except OSError:
            continue
        parents[int(text.split()[0])] = int(text.rsplit(")", 1)[1].split()[1])
    below, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [p for p, q in parents.items() if q == parent]
        below += children
        todo += children
    return below


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill_during(run: Path, stage: str, step: int, *arguments: str) -> None:
    """Start the pipeline; kill -9 the launcher once `stage` has logged `step` steps; assert that nobody is left."""
    env = environment() | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(str(MINIATURE), "--run", str(run), *arguments), env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    log, deadline = run / "metrics" / f"{stage}.jsonl", time.monotonic() + 300
    while not (log.exists() and any(json.loads(x).get("step", 0) >= step and "loss" in x
                                    for x in log.read_text().split("\n")[:-1])):
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    below = children_of(process.pid)
    assert below, "the stage runs in a kernel of its own"
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, below)), "a killed launcher left processes behind"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_and_run_again_equals_uninterrupted(finished, tmp_path):
    """kill -9 in the middle of pretraining and of RL; the end is the same, bit for bit."""
    run = tmp_path / "killed"
    kill_during(run, "base", 12)
    kill_during(run, "rl", 2)
    (run / "metrics" / ".rl.jsonl.7.tmp").write_text("half a fi")      # killed while writing
    (run / "rl" / ".step_00000003.tmp").mkdir(exist_ok=True)           # and in the middle of a save
    done = run_all(MINIATURE, "--run", run)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[6/8] rl: resume, it was interrupted" in done.stdout
    assert list((run / "notebooks").glob("base.attempt1.ipynb")), "the earlier attempt's notebook is kept"
    for path in (run / "notebooks").glob("*.ipynb"):
        json.loads(path.read_text())
    assert [p.name for p in run.rglob(".*")] == [".lock"], "what a kill left is cleared up"
    expected, got = results(finished), results(run)
    assert expected.keys() == got.keys()
    for name in expected:
        assert expected[name] == got[name], f"{name} differs from the uninterrupted run's"


@pytest.fixture
def kills(monkeypatch):
    """benchmarks/kills.py, for the miniature run as the tests start it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kills
    from nanochat_nb.launch import load_preset
    values = {name: {"eval_every": 1, **p} for name, p in load_preset(MINIATURE).items() if name in kills.SETTINGS}
    monkeypatch.setattr(kills, "SETTINGS", values)
    monkeypatch.setattr(kills, "command", lambda run, name, processes: command(
        str(MINIATURE), "--run", str(run), "--until", name, *(("--processes", str(processes)) if processes > 1 else ())))
    return kills


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage, moment", [("base", "in a save"), ("sft", "in a step"), ("rl", "while starting")])
def test_killed_at_a_random_moment(finished, tmp_path, kills, stage, moment):
    """The short form of benchmarks/kills.py: a process of each stage is killed, the same command follows."""
    tally = collections.Counter()
    kills.trial(finished, tmp_path / "killed", stage, 1, [(moment, "the process that trains")],
                random.Random(f"{stage} 0"), tally, [])
    assert [key[1:] for key in tally] == [("the process that trains", stage)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_and_torchrun_are_killed(tmp_path, kills):
    """The same of two processes: one of them is killed, then torchrun itself; the third attempt ends as a run that nobody killed."""
    whole, tally = tmp_path / "whole", collections.Counter()
    done = run_all(MINIATURE, "--run", whole, "--until", "base", "--processes", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills.trial(whole, tmp_path / "killed", "base", 2, [("in a step", "one rank of two"), ("as a step ends", "torchrun")],
                random.Random(0), tally, [])
    assert sorted(key[1] for key in tally) == ["one rank of two", "torchrun"]


def test_another_parameter_runs_that_stage_and_those_after_it(finished, tmp_path):
    done = run_all(MINIATURE, "--run", finished, "--set", "rl.steps=5", "--until", "sft")
    assert done.stdout.count("finished earlier") == 4, done.stdout + done.stderr
    from nanochat_nb.launch import STEPS, check_overrides, load_preset, stage_parameters, status, step_key, upstream
    overrides = check_overrides(load_preset(MINIATURE) | {"rl": load_preset(MINIATURE)["rl"] | {"steps": 5}})
    step = STEPS["rl"]
    key = step_key("rl", stage_parameters(step, overrides), upstream(finished, step))
    assert status(finished, step, key).startswith("new")


IDLE = {"base": {"micro_batch_rows": 2, "save_every": 7, "eval_every": 9, "keep": 5, "device": "cpu", "compile": False},
        "sft": {"micro_batch_rows": 2}, "rl": {"micro_batch_rows": 2}, "eval": {"batch_rows": 4, "batch_tokens": 1024}}


def test_parameters_that_change_no_result_repeat_nothing(finished):
    """Another micro-batch, device or saving interval leaves finished steps finished; others do not."""
    from nanochat_nb.launch import STEPS, check_overrides, load_preset, stage_parameters, status, step_key, upstream
    preset = load_preset(MINIATURE)

    def states(extra: dict) -> dict[str, str]:
        merged = check_overrides({stage: values | extra.get(stage, {}) for stage, values in preset.items()})
        return {name: status(finished, step, step_key(name, stage_parameters(step, merged), upstream(finished, step)))
                for name, step in STEPS.items()}

    assert set(states(IDLE).values()) == {"finished"}
    for stage, values in {"base": {"documents": 999}, "eval": {"max_per_task": 3}, "sft": {"lr_fraction": 0.7}}.items():
        assert {name for name, state in states({stage: values}).items() if state != "finished"} == {
            name for name, step in STEPS.items() if step.stage == stage}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_after_running_out_of_memory_smaller_micro_batches_resume(tmp_path):
    """The advice of the error message: lower micro_batch_rows, run the same command again."""
    run = tmp_path / "memory"
    kill_during(run, "base", 12, "--until", "base")
    done = run_all(MINIATURE, "--run", run, "--until", "base", "--set", "base.micro_batch_rows=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "base: resume, it was interrupted" in done.stdout and "base: resumed at step" in done.stdout
    assert not (run / "earlier").exists() and not (run / "base.old").exists()
    summary = json.loads((run / "base" / "summary.json").read_text())
    assert summary["parameters"]["micro_batch_rows"] == 1, "the new value was used"


def test_a_data_set_without_a_source_is_refused(tmp_path):
    """Before the first stage: public data sets to train on that the given data cannot provide."""
    from nanochat_nb.launch import check_files, check_names, load_preset
    from nanochat_nb.runtime import UserError
    data = str(tmp_path)
    with pytest.raises(UserError, match="gsm8k.*nothing for split 'train'.*rl.data"):
        check_names({"rl": {"tasks": ["gsm8k"], "data": data}})
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1+1?", "answer": "<<1+1=2>>2\\n#### 2"}\n')
    check_names({"rl": {"tasks": ["gsm8k"], "data": data}})
    for preset in ("laptop", "gpu", "speedrun"):
        check_names(load_preset(preset))
    (tmp_path / "own.jsonl").write_text("no conversation\n")
    with pytest.raises(UserError, match="own.jsonl"):
        check_files({"sft": {"mixture": {str(tmp_path / "own.jsonl"): 1.0}}})


BAD = [
    (["laptp"], "did you mean 'laptop'"),
    (["laptop", "--set", "bas.depth=2"], "did you mean 'base'"),
    (["laptop", "--set", "base.dpth=2"], "did you mean 'depth'"),
    (["laptop", "--set", "base.depth=deep"], "base.depth"),
    (["laptop", "--set", "nonsense"], "STAGE.PARAMETER=VALUE"),
    (["laptop", "--set", "sft.total_batch_tokens=4100"], "no multiple of base.sequence_len 256"),
    (["laptop", "--set", "sft.mixture={facts: 1}"], "did you mean 'fact'"),
    (["laptop", "--set", "tokenizer.mixture={facts: 1}"], "did you mean 'fact'"),
    (["laptop", "--set", "rl.tasks=[word_problm]"], "did you mean 'word_problem'"),
    (["laptop", "--set", "sft.mixture={gsm8k: 1}"], "set sft.data"),
    (["laptop", "--set", "rl.replay=4", "--set", "sft.mixture={fact: 1}"], "sft.mixture has none of word_problem"),
    (["laptop", "--set", "rl.reminders=4", "--set", "sft.mixture={word_problem: 1}"], "sft.mixture has nothing else"),
    (["laptop", "--set", "eval.data=nowhere"], "no folder nowhere"),
    (["laptop", "--text", "nowhere.txt"], "no file or folder nowhere.txt"),
    (["laptop", "--run", "a b"], "letters, digits"),
    (["laptop", "--run", "/proc/nobody/here"], "cannot be used as a folder"),
    (["laptop", "--processes", "0"], "--processes must be at least 1"),
    (["laptop", "--set", "tokenizer.vocab_size=-4", "--until", "tokenizer"], "too small"),
    (["laptop", "--depth", "0", "--until", "tokenizer"], "depth must be at least 1"),
    (["laptop", "--text", ""], "an empty name"),
    (["nope.yaml"], "no preset file"),
]


@pytest.mark.parametrize("arguments, expected", BAD, ids=lambda x: "-".join(x)[-40:] if isinstance(x, list) else "")
def test_bad_command_line(arguments, expected, tmp_path):
    """One line, before anything starts."""
    done = run_all(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_bad_files(finished, tmp_path):
    """Empty, binary and other text that nothing can learn from; conversations that are none."""
    for name, data in {"empty.txt": b"", "binary.txt": bytes(range(256)) * 40, "latin.txt": "café ".encode("latin-1") * 100}.items():
        (tmp_path / name).write_bytes(data)
        done = run_all(MINIATURE, "--run", tmp_path / "run", "--text", name, cwd=tmp_path)
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr, done.stderr
    lines = [json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]), '{"no": "messages"}']
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    done = run_all(MINIATURE, "--run", tmp_path / "run", "--conversations", "chats.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "line 2" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_needs_no_installation(tmp_path):
    script = tmp_path / "run_all.sh"
    script.write_text((ROOT / "run_all.sh").read_text())
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--depth" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["run_all.sh"]


def test_chat_without_a_model_says_so(tmp_path):
    """run_all.sh's own shell code, with the installation taken out."""
    script = (ROOT / "run_all.sh").read_text().replace("\ninstall\n", "\n")
    (tmp_path / "run_all.sh").write_text(script)
    done = subprocess.run(["bash", "run_all.sh", "chat", "--run", "nothing", "--port", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "error: there is no trained model in nothing" in done.stderr
