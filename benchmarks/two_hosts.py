"""One training run on two hosts, one of which dies and comes back: shown with two network namespaces on one machine.

    python benchmarks/two_hosts.py                      # as root, on Linux, with iproute2

The two "hosts" share a disk, as the nodes of a cluster do, and nothing else of the network but one cable (a veth pair):
neither sees the other's localhost. On both the same command is given, the one of chapters/setup.md. When some steps are
done, every process of the second host is killed with SIGKILL; the first host waits; the second one is started again with
the same command; the run goes on from its checkpoint. At the end its losses are compared with those of one process on
one host. Where network namespaces are forbidden, the hosts are two addresses of this machine's loopback instead, which
shows the same rendezvous over less of a network; it is said which of the two it was.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTS, CABLE = ("nb-host0", "nb-host1"), ("nb-veth0", "nb-veth1")
PRESET = """
tokenizer: {documents: 300, vocab_size: 512, train_chars: 100_000}
base: {depth: 1, head_dim: 32, sequence_len: 128, steps: 16, total_batch_tokens: 512, lr_scale: 0.2, documents: 400,
       eval_every: 4, eval_batches: 1, sample_every: 0, save_every: 4, device: cpu, dtype: float32}
"""


def ip(*words: str, host: str = "") -> None:
    subprocess.run(["ip", *(["-n", host] if host else []), *words], check=True, capture_output=True, text=True)


def lay_cable() -> str | None:
    """Make two namespaces joined by a veth pair; None, or why that is not possible here."""
    if not shutil.which("ip"):
        return "iproute2 is not installed (on Debian: apt install iproute2)"
    if os.geteuid():
        return "making network namespaces needs root"
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for i, host in enumerate(HOSTS):
            ip("link", "set", CABLE[i], "netns", host)
            ip("addr", "add", f"10.77.0.{i + 1}/24", "dev", CABLE[i], host=host)
            ip("link", "set", CABLE[i], "up", host=host)
            ip("link", "set", "lo", "up", host=host)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


def cut_cable() -> None:
    for host in HOSTS:                                     # its end of the cable goes with it
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def environment(**more: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {k: v for k, v in os.environ.items() if k not in dropped} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def host(i: int, run: Path, preset: Path, spaces: bool) -> subprocess.Popen:
    """Give the command on host `i`; what it says is appended to a file beside the run."""
    address = f"10.77.0.{i + 1}" if spaces else f"127.0.0.{i + 2}"
    first = address.rpartition(".")[0] + (".1" if spaces else ".2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29511", "--rdzv-id", "base",
               "--rdzv-conf", f"is_host={int(i == 0)}", "--local-addr", address, "--max-restarts", "3",
               "-m", "--", "nanochat_nb.launch", "base", "--run", str(run), "--preset", str(preset)]
    heard = {"GLOO_SOCKET_IFNAME": CABLE[i] if spaces else "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    inside = ["ip", "netns", "exec", HOSTS[i]] if spaces else []
    with open(run.parent / f"host{i}.out", "ab") as out:
        return subprocess.Popen([*inside, *command], env=environment(**heard),
                                stdout=out, stderr=out, start_new_session=True)


def alone(what: str, run: Path, preset: Path, *more: str) -> None:
    done = subprocess.run([sys.executable, "-m", "nanochat_nb.launch", what, "--run", str(run), *more],
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> dict[int, float]:
    path, found = run / "metrics" / "base.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "loss" in row:
            found[row["step"]] = row["loss"]
    return found


def family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    found = [pid]
    for process in found:
        children = Path(f"/proc/{process}/task/{process}/children")
        found += [int(p) for p in children.read_text().split()] if children.exists() else []
    return found


def wait_until(condition, processes: list[subprocess.Popen], folder: Path, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [p for p in processes if p.poll()]
        assert not ended and time.monotonic() < deadline, f"{what}: it did not come so far\n" + "".join(
            path.read_text(errors="replace")[-3000:] for path in folder.glob("host*.out"))
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long to wait for each part")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    preset = folder / "preset.yaml"
    preset.write_text(PRESET)
    cut_cable()
    problem = lay_cable()
    print("two hosts: two network namespaces, joined by a veth pair" if problem is None else
          f"no network namespaces ({problem}); two addresses of the loopback instead", flush=True)
    try:
        show(folder, preset, problem is None, args.seconds)
    finally:
        cut_cable()
    shutil.rmtree(folder)


def show(folder: Path, preset: Path, spaces: bool, seconds: float) -> None:
    one, two = folder / "one", folder / "two"
    alone(str(preset), one, preset, "--until", "tokenizer")
    shutil.copytree(one, two)
    alone(str(preset), one, preset, "--until", "base")
    hosts = [host(i, two, preset, spaces) for i in (0, 1)]
    try:
        wait_until(lambda: len(losses(two)) >= 7, hosts, folder, "starting", seconds)
        for pid in family(hosts[1].pid):
            os.kill(pid, signal.SIGKILL)
        hosts[1].wait()
        done = len(losses(two))
        print(f"killed the second host after {done} of 16 steps", flush=True)
        time.sleep(5)
        assert hosts[0].poll() is None and len(losses(two)) <= done + 1, "the first host waits"
        hosts[1] = host(1, two, preset, spaces)
        print("started it again", flush=True)
        marker = two / "markers" / "base.json"
        wait_until(lambda: json.loads(marker.read_text())["state"] == "finished", hosts, folder, "going on", seconds)
        assert [p.wait(60) for p in hosts] == [0, 0]
    finally:
        for process in hosts:
            for pid in family(process.pid) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    said = [line for line in (folder / "host0.out").read_text().splitlines() if "resumed at" in line]
    a, b = losses(one), losses(two)
    apart = max(abs(a[step] - b[step]) for step in a)
    print(f"the first host said: {said[-1] if said else 'nothing of a resume'}")
    print(f"steps {len(a)} and {len(b)}; losses of one host and of two differ by at most {apart:.1e}")
    assert said and a.keys() == b.keys() and len(a) == 16 and apart < 1e-4


if __name__ == "__main__":
    main()
