"""Kill a miniature run fifty times, at moments drawn from a seed, and compare every end with a run that nobody killed.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--stages base sft rl]

A trial takes a run that is finished up to some stage, starts that stage, kills one of its processes with SIGKILL, and
gives the same command again, up to four times; then the stage is let finish. After each kill: nobody is left alive, and
the next attempt goes on at most one save interval behind the last step that was logged. At the end: all weights, the
optimizer's state, and every row of metrics but for timings are those of the run that nobody killed, bit for bit. Moments
are found by watching the run's folder, the library knows nothing of it. Linux only. Nothing else must be tuned: a kill
that misses its moment counts where it fell, and the tally at the end says where that was.
"""
import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"base": dict(steps=40, save_every=7, eval_every=6), "sft": dict(steps=30, save_every=4, eval_every=3),
            "rl": dict(steps=12, save_every=3, eval_every=2)}
MOMENTS = ("as a step ends", "in a step", "in a save", "in an evaluation", "while starting")
TIMINGS = {"seconds", "tokens_per_second", "mfu"}


def command(run: Path, stage: str, processes: int) -> list[str]:
    settings = [f"{name}.{key}={value}" for name, values in SETTINGS.items() for key, value in values.items()]
    return [sys.executable, "-m", "nanochat_nb.launch", str(ROOT / "tests" / "miniature.yaml"), "--run", str(run),
            "--until", stage, "--processes", str(processes), *(word for s in settings for word in ("--set", s))]


def start(run: Path, stage: str, processes: int) -> subprocess.Popen:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST")
    env = {k: v for k, v in os.environ.items() if k not in dropped} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(run.parent / f"{run.name}.out", "ab") as out:
        return subprocess.Popen(command(run, stage, processes), env=env, stdout=out, stderr=out)


# --- processes: who is there, and who is killed ---

def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def below(pid: int) -> list[int]:
    """All living descendants of a process."""
    parent = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        state = read(str(path)).rpartition(")")[2].split()
        if state and state[0] != "Z":
            parent[int(path.parent.name)] = int(state[1])
    found, todo = [], [pid]
    while todo:
        children = [p for p, q in parent.items() if q == todo[-1]]
        todo.pop()
        found += children
        todo += children
    return found


def alive(pid: int) -> bool:
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def victims(launcher: int) -> dict[str, list[int]]:
    """The processes of a run by what they are; those that are not there yet have no entry."""
    found = {"the launcher": [launcher]}
    for pid in below(launcher):
        line = read(f"/proc/{pid}/cmdline").replace("\0", " ")
        kind = ("the process that trains" if "ipykernel_launcher" in line else
                "torchrun" if "torch.distributed.run" in line else
                "a rank's parent" if "nanochat_nb.launch" in line else None)
        if kind:
            found.setdefault(kind, []).append(pid)
    if len(found.get("the process that trains", [])) > 1:
        found["one rank of two"] = found.pop("the process that trains")
    return found


# --- moments: where a run is, by its folder ---

class Watch:
    """What the folder of a run says about one stage."""

    def __init__(self, run: Path, stage: str):
        self.stage, self.settings = stage, SETTINGS[stage]
        self.log, self.checkpoints = run / "metrics" / f"{stage}.jsonl", run / stage
        self.before = self.size()                          # of an earlier attempt

    def size(self) -> tuple[int, int]:
        try:
            stat = self.log.stat()
            return stat.st_ino, stat.st_size
        except OSError:
            return 0, 0

    def rows(self) -> list[dict]:
        found = []
        for line in read(str(self.log)).split("\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def step(self) -> int:
        """The last step that was logged, -1 for none."""
        return max((r["step"] for r in self.rows() if "loss" in r), default=-1)

    def saving(self) -> bool:
        return any(self.checkpoints.glob(".step_*"))

    def evaluating(self) -> bool:
        """Whether the next thing to log is a validation."""
        rows, next_step = self.rows(), self.step() + 1
        done = any("loss" not in r and r["step"] == next_step for r in rows)
        save_first = next_step % self.settings["save_every"] == 0 and self.newest() < next_step
        return bool(rows) and not done and not save_first and next_step % self.settings["eval_every"] == 0

    def moment(self, began: bool, at_once: bool) -> str:
        """Where a run was that has just been killed."""
        if self.saving():
            return "in a save"
        if not began:
            return "while starting"
        return "in an evaluation" if self.evaluating() else "as a step ends" if at_once else "in a step"

    def newest(self) -> int:
        return max((int(p.name[5:]) for p in self.checkpoints.glob("step_*")), default=0)


def wait_for(moment: str, watch: Watch, process: subprocess.Popen, rng: random.Random) -> tuple[bool, bool, dict]:
    """Return when the run is where it is to be killed: (has it logged anything yet, did a step just end, its processes)."""
    first, last, there, steps = watch.size(), None, {}, watch.settings["steps"]
    target = rng.randrange(min(watch.step() + 2, steps - 1), steps)
    starting = time.monotonic() + rng.uniform(0.5, 12.0)
    while process.poll() is None:
        now = watch.size()
        began = now != first
        if moment == "while starting" and (time.monotonic() > starting or began):
            return began, False, victims(process.pid)
        if began and not there:                            # while there is time: looking takes milliseconds
            there = victims(process.pid)
        if moment == "in a save" and watch.saving() and watch.newest() >= target - watch.settings["save_every"]:
            time.sleep(rng.uniform(0, 0.004))
            return True, False, there
        if began and now != last:
            cut, last, step = last is None and first != (0, 0), now, watch.step()    # a resume cuts the log
            if moment == "in an evaluation" and step >= target - watch.settings["eval_every"] and watch.evaluating():
                time.sleep(rng.uniform(0, 0.01))
                return True, False, there
            if moment in MOMENTS[:2] and step >= min(target, steps - 2) and not cut:
                if moment == "in a step":
                    time.sleep(rng.uniform(0.1, 0.9) * watch.rows()[-1].get("seconds", 0.0))
                return True, moment == "as a step ends", there
        time.sleep(0.001)
    return True, False, there


def kill(process: subprocess.Popen, rng: random.Random, whom: str, there: dict[str, list[int]]) -> str | None:
    """SIGKILL one process of the run, wait until all are gone; what it was, or None when all was over."""
    if process.poll() is not None:
        return None
    chosen = whom if whom in there else rng.choice(sorted(there))
    os.kill(rng.choice(there[chosen]), signal.SIGKILL)
    everyone, deadline = sum(there.values(), below(process.pid)), time.monotonic() + 900       # a busy machine
    while process.poll() is None or any(map(alive, everyone)):
        assert time.monotonic() < deadline, f"killed {chosen}, and somebody lives on"
        time.sleep(0.02)
    assert process.returncode, f"killed {chosen}, and the command said that all was well"
    return chosen


# --- results ---

def results(run: Path, stage: str) -> dict:
    """What a stage computed, timings aside: its last checkpoint, and the log. (Which checkpoints before the last
    are there depends on the clock, too.)"""
    last = max((run / stage).glob("step_*"))
    found = {f"{last.name}/{p.name}": p.read_bytes() for p in last.glob("*.safetensors")}
    for line in read(str(run / "metrics" / f"{stage}.jsonl")).splitlines():
        row = {k: v for k, v in json.loads(line).items() if k not in TIMINGS}
        found[f"row {row['step']} {sorted(row)}"] = row
    assert not list((run / stage).glob(".step_*")), "a killed save was not cleared up"
    assert len(found) > 3
    return found


def finished_before(whole: Path, stage: str, run: Path) -> None:
    """Copy `whole` as it was before `stage`."""
    order = ("base", "sft", "rl")
    later = {*order[order.index(stage):]} | ({"tokens"} if stage == "base" else set())
    shutil.copytree(whole, run, ignore=lambda folder, names: {
        n for n in names if n.startswith(".lock") or n.split(".")[0].removeprefix("eval-") in later})


def trial(whole: Path, run: Path, stage: str, processes: int, kills: list[tuple[str, str]], rng: random.Random,
          tally: collections.Counter, worst: list[int]) -> None:
    """Kill a stage at each of `kills` (moment, victim), let it finish, compare."""
    finished_before(whole, stage, run)
    interval, left_at = SETTINGS[stage]["save_every"], None
    for moment, whom in kills:
        watch, earlier = Watch(run, stage), read(str(run / "log.txt"))
        process = start(run, stage, processes)
        began, at_once, there = wait_for(moment, watch, process, rng)
        killed = kill(process, rng, whom, there)
        check_repeated(left_at, resumed_at(run, stage, earlier), interval, worst)
        if killed is None:
            tally["too late: it had finished", "nobody", stage] += 1
            break
        where = watch.moment(began, at_once)
        tally[where, killed, stage] += 1
        left_at = watch.step()
        print(f"  {stage}, {processes} process{'es' * (processes > 1)}: killed {killed} {where}, "
              f"step {left_at + 1} of {SETTINGS[stage]['steps']}", flush=True)
    earlier = read(str(run / "log.txt"))
    process = start(run, stage, processes)
    assert process.wait() == 0, read(str(run.parent / f"{run.name}.out"))[-3000:]
    check_repeated(left_at, resumed_at(run, stage, earlier), interval, worst)
    expected, got = results(whole, stage), results(run, stage)
    assert expected.keys() == got.keys(), sorted(expected.keys() ^ got.keys())
    different = [name for name in expected if expected[name] != got[name]]
    assert not different, different


def resumed_at(run: Path, stage: str, earlier: str) -> int | None:
    """The step at which the attempt went on that followed `earlier`, the log so far; None when it did not get so far."""
    found = re.findall(rf"{stage}: resumed at step (\d+)", read(str(run / "log.txt")).removeprefix(earlier))
    return int(found[-1]) if found else None


def check_repeated(left_at: int | None, resumed: int | None, interval: int, worst: list[int]) -> None:
    """At most one save interval is computed twice: the steps logged after the checkpoint, and the one it died in."""
    if left_at is not None and resumed is not None:
        worst.append(left_at + 1 - resumed)
        assert left_at + 1 - resumed <= interval, f"killed after step {left_at}, resumed at {resumed}"


def print_tally(tally: collections.Counter, worst: list[int]) -> None:
    stages = [s for s in SETTINGS if any(key[2] == s for key in tally)]
    print(f"\n| where | who was killed | {' | '.join(stages)} | all |")
    print(f"|---|---|{'---:|' * (len(stages) + 1)}")
    for where, whom in sorted({key[:2] for key in tally}):
        counts = [tally[where, whom, s] for s in stages]
        print(f"| {where} | {whom} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    print(f"\n{sum(n for key, n in tally.items() if key[1] != 'nobody')} kills; every end equal bit for bit; "
          f"at most {max(worst, default=0)} steps computed twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    rng, tally, worst, folder = random.Random(args.seed), collections.Counter(), [], Path(tempfile.mkdtemp())
    wholes, number, last = {}, 0, max(args.stages, key=list(SETTINGS).index)
    while (left := args.kills - sum(n for key, n in tally.items() if key[1] != "nobody")) > 0:
        stage, processes = args.stages[number % len(args.stages)], 1 + number // len(args.stages) % 2
        if processes not in wholes:
            wholes[processes] = folder / f"whole{processes}"
            assert start(wholes[processes], last, processes).wait() == 0, read(f"{wholes[processes]}.out")[-3000:]
            print(f"the run that nobody kills, {processes} process{'es' * (processes > 1)}: done", flush=True)
        whom = ("the process that trains", "the launcher") if processes == 1 else (
            "one rank of two", "torchrun", "a rank's parent", "the launcher")
        kills = [(rng.choice(MOMENTS), rng.choice(whom)) for _ in range(min(left, rng.randint(2, 4)))]
        run = folder / f"killed{number}"
        trial(wholes[processes], run, stage, processes, kills, rng, tally, worst)
        shutil.rmtree(run)
        number += 1
    print_tally(tally, worst)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
