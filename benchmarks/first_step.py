"""How long until pretraining's first step is done: from the notebook's start to its `run` cell, and from there on.

    bash run_all.sh laptop --run timing --until tokenizer
    python benchmarks/first_step.py runs/timing presets/laptop.yaml

Starts the base stage in the run's folder, waits for the first row of its metrics, stops it, and prints a table.
Targets: 10 s and 10 s.
"""
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path


def started(path: Path) -> tuple[float, float]:
    """When the notebook and its first `run` cell started, in seconds since 1970."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "run" in c["metadata"].get("tags", []))
    times = notebook["metadata"]["papermill"]["start_time"], cell["metadata"]["papermill"]["start_time"]
    return tuple(datetime.fromisoformat(t).timestamp() for t in times)


def main() -> None:
    """Run, wait, stop, print."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, preset = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    log = run / "metrics" / "base.jsonl"
    if log.exists():
        sys.exit(f"{run.name} has begun its base stage already; take a run that stopped after the tokenizer")
    command = [sys.executable, "-m", "nanochat_nb.launch", str(preset), "--run", str(run), "--until", "base"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    launched = time.time()
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            sys.exit("the base stage ended before its first step; see its log in the run's folder")
        time.sleep(0.02)
    first = time.time()
    time.sleep(2)                                            # the notebook is saved while its cell runs
    process.send_signal(signal.SIGTERM)
    process.wait()
    notebook, cell = started(run / "notebooks" / "base.ipynb")
    print("| from | to | seconds |\n|---|---|---:|")
    print(f"| command | notebook | {notebook - launched:.1f} |")
    print(f"| notebook | run cell | {cell - notebook:.1f} |")
    print(f"| run cell | first step finished | {first - cell:.1f} |")
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
