"""Attacks on the sandbox: each must be contained, and leave nothing behind."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_nb import execution
from nanochat_nb.execution import calculate, isolation, run_code
from nanochat_nb.runtime import UserError

BOXES = [(method, as_root) for method in ("bubblewrap", "namespaces")
         for as_root in ((True, False) if os.geteuid() == 0 else (False,))]
boxed = pytest.mark.skipif(isolation() is None, reason="neither bubblewrap nor user namespaces work on this machine")


@pytest.fixture(params=BOXES, ids=lambda b: f"{b[0]}-{'root' if b[1] else 'user'}")
def box(request, monkeypatch):
    """`run_code` held to one box, for each that works here, not only the strongest."""
    method, as_root = request.param
    if sys.platform != "linux" or (method == "bubblewrap" and not execution.shutil.which("bwrap")):
        pytest.skip(f"no {method} here")
    if not execution._works(method, as_root):
        pytest.skip(f"{method} {'as root' if as_root else 'by user namespace'} does not work on this machine")
    monkeypatch.setattr(execution, "_method", lambda: (method, as_root))
    return run_code


def printed(result):
    assert result.ok, result
    return result.stdout.strip()


def processes() -> list[str]:
    """The command lines of everything that runs on this machine."""
    out = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            out.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:
            pass
    return out


def test_it_runs_programs_and_says_how(box):
    result = box("import json\nprint(json.dumps({'a': 1}))\nopen('/tmp/x', 'w').write('y')\nopen('/tmp/x').read()")
    assert result.ok and result.stdout == '{"a": 1}\n' and result.isolation in ("bubblewrap", "namespaces")


def test_endless_loop_and_ignored_signals(box):
    begun = time.monotonic()
    result = box("import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", timeout=0.4)
    assert result.timed_out and not result.ok and time.monotonic() - begun < 3


def test_fork_bomb(box):
    program = ("import os, time\nn = 0\nwhile n < 100:\n    try:\n        if os.fork() == 0: time.sleep(77)\n"
               "    except OSError: break\n    n += 1\nprint(n)")
    result = box(program, timeout=2)
    if os.geteuid() != 0 or execution._method()[1]:
        assert int(printed(result)) < 20                     # the limit binds every user but root itself
    assert not [p for p in processes() if "RLIMIT_" in p]    # the guard's text is on its command line


def test_memory_bomb(box):
    assert box("x = [0] * 10**9", memory_mb=128).error == "MemoryError"
    assert box("x = []\nwhile True: x.append(bytearray(10**7))", memory_mb=128).error == "MemoryError"


def test_no_memory_beside_what_is_mapped(box):
    """RLIMIT_AS counts mappings: calls that hold memory without one are refused, by every way to write them."""
    if not execution._filter():
        pytest.skip("no list of refused calls for this processor")
    files = ("import os\nfor i in range(8):\n    file = os.memfd_create(str(i))\n"
             "    for _ in range(60): os.write(file, bytes(2**20))")
    assert "PermissionError" in box(files, memory_mb=100).error
    calls = ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
             "for call in (lambda: libc.shmget(0, 1 << 20, 0o1600), lambda: libc.msgget(0, 0o1600),\n"
             "             lambda: libc.semget(0, 9, 0o1600), lambda: libc.syscall(319 + (1 << 30), b'x', 0)):\n"
             "    print(call(), ctypes.get_errno())")
    assert printed(box(calls)).split("\n") == ["-1 1"] * 4    # 1 is EPERM, also where the kernel does not know the call


def test_no_namespaces_or_mounts_of_its_own(box):
    """What the kernel does behind these calls is much code for a program without rights to be let near."""
    if not execution._filter():
        pytest.skip("no list of refused calls for this processor")
    calls = ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
             "for call in (lambda: libc.unshare(0x10020000), lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)):\n"
             "    print(call(), ctypes.get_errno())")
    assert printed(box(calls)).split("\n") == ["-1 1"] * 2


def test_nothing_of_ours_is_open(box):
    program = ("import os\nfor i in range(3, 64):\n    try: os.fstat(i)\n    except OSError: continue\n    print(i)")
    assert printed(box(program)) == ""                       # the list of refused calls came through a pipe


def test_full_scratch(box):
    program = ("n = 0\ntry:\n    while n < 300: open(f'/tmp/{n}', 'wb').write(bytes(2**20)); n += 1\n"
               "except OSError: pass\nprint(n)")
    assert int(printed(box(program))) <= 64


def test_many_empty_files(box):
    if execution._method()[0] != "namespaces":
        pytest.skip("bubblewrap cannot limit the number of files")
    program = ("n = 0\ntry:\n    while n < 20_000: open(f'/tmp/{n}', 'w').close(); n += 1\n"
               "except OSError: pass\nprint(n)")
    assert int(printed(box(program))) < execution._SCRATCH_FILES


def test_endless_output(box):
    result = box("while True: print('x' * 10000)", timeout=0.5, max_output=1000)
    assert result.timed_out and result.truncated and len(result.stdout) == 1000


def test_deep_recursion_and_threads(box):
    assert "RecursionError" in box("def f(): f()\nf()").error
    begun = time.monotonic()
    assert box("import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()").ok
    assert time.monotonic() - begun < 3                      # a thread does not outlive the last line


def test_daemon_does_not_outlive_the_program(box):
    marker = f"marker{os.getpid()}"
    box(f"import os, sys\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv({execution._interpreter()!r}, ['{marker}', '-c', 'import time; time.sleep(60)'])\n"
        "import time; time.sleep(0.2)", timeout=2)
    assert not [p for p in processes() if marker in p and "sleep(60)" in p and "RLIMIT" not in p]


def test_no_environment(box, monkeypatch):
    monkeypatch.setenv("NANOCHAT_NB_SECRET", "swordfish")
    assert "swordfish" not in printed(box("import os\nprint(dict(os.environ))"))


def test_no_files_of_ours(box, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    secret.chmod(0o666)
    for target in (secret, "/etc/passwd", "/etc/shadow"):
        assert "No such file" in box(f"open({str(target)!r}).read()").error
    link = f"import os\nos.symlink({str(secret)!r}, '/tmp/link')\nprint(open('/tmp/link').read())"
    assert "No such file" in box(link).error


def test_no_writing_outside(box, tmp_path):
    folders = ["/", "/usr", "/usr/lib", str(tmp_path), "/var/tmp", "/dev", os.path.realpath(sys.base_prefix)]
    program = (f"import os\nfor d in {folders!r}:\n    try: open(d + '/nanochat_nb_was_here', 'w')\n"
               "    except OSError: continue\n    print(d)")
    assert printed(box(program)) == ""
    assert not any((Path(d) / "nanochat_nb_was_here").exists() for d in folders)


def test_no_writing_to_a_mount_below(box, tmp_path):
    """A disk below a folder that the box shows is shown with it, and read-only like it."""
    own = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    below = "/usr/src"                                       # a second mount there is seen by nobody else
    mount = f'mount -t tmpfs -o mode=777 none {below} && mkdir -m 777 "{below}/a disk" && mount -t tmpfs none "{below}/a disk"'
    if subprocess.run([*own, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounts of our own here")
    program = (f"import os\nfor d in ('{below}', '{below}/a disk'):\n    os.listdir(d)\n"
               "    try: open(d + '/hole', 'w')\n    except OSError as error: print(error.strerror)")
    call = (f"from nanochat_nb import execution\nprint(execution._execute({program!r}, *{execution._method()!r}, timeout=9,"
            " memory_mb=256, processes=8, keep=999).stdout)")
    found = subprocess.run([*own, "sh", "-c", mount + ' && exec "$0" -c "$1"', sys.executable, call], capture_output=True, text=True)
    assert found.stdout.split("\n")[:2] == ["Read-only file system"] * 2, found


def test_a_temporary_folder_behind_a_link(box, tmp_path, monkeypatch):
    """The kernel lists mounts by their real paths; what is not found there could not be made read-only."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path / "link"))
    program = "import os\nprint([d for d in ('/', '/usr') if not os.statvfs(d).f_flag & os.ST_RDONLY])"
    assert printed(box(program)) == "[]"


def test_no_network(box):
    program = ("import socket\ns = socket.socket()\ns.settimeout(1)\n"
               "try: s.connect(('1.1.1.1', 80)); print('out')\nexcept OSError: pass\n"
               "print([n for _, n in socket.if_nameindex() if n != 'lo'])")
    result = printed(box(program))
    assert "out" not in result and "eth" not in result
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:   # ours is not theirs: their loopback is another one
        port = server.getsockname()[1]
        assert not box(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)").ok


def test_no_other_processes(box):
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            box(f"import os\nfor pid in ({victim.pid}, os.getppid(), 1, -1):\n    try: os.kill(pid, 9)\n    except OSError: pass")
            assert victim.poll() is None
            assert "No such file" in box("import os\nos.listdir('/proc')").error
        finally:
            victim.kill()


def test_no_privileges(box):
    program = ("import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
               "print(os.getuid(), libc.mount(b'none', b'/tmp', b'tmpfs', 0, None),"
               " libc.chroot(b'/tmp'), libc.sethostname(b'x', 1))")
    uid, *calls = printed(box(program)).split()
    assert calls == ["-1", "-1", "-1"]
    assert not execution._method()[1] or int(uid) > 65535


def test_leaving_early_is_not_passing(box):
    for leave in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "import os; os.abort()",
                  "import os; os.execv('/bin/true', ['true'])"):
        result = box(leave + "\nassert False")
        assert not result.ok and result.error, leave


def test_no_exit_status_passes_for_the_secret_one():
    """The system keeps eight bits of a status, so -2 and 510 are 254, too."""
    for program, passes in (("x = 1", True), ("import sys; sys.exit(254)", False), ("import sys; sys.exit(-2)", False),
                            ("import sys; sys.exit(510)", False)):
        limits = [str(n) for n in (1 << 32, 10, 64, 1 << 20, 0, 254)]        # memory, seconds, processes, file size, user, secret
        found = subprocess.run([sys.executable, "-c", execution._GUARD, *limits], input=program.encode(), stderr=subprocess.DEVNULL)
        assert (found.returncode == 254) == passes, program


def test_import_tricks(box):
    program = ("import sys\nsys.modules['os'] = None\nsys.path[:] = []\n"
               "builtins = __import__('builtins')\nbuiltins.exec = None\nprint('still here')")
    assert printed(box(program)) == "still here"
    assert "ModuleNotFoundError" in box("import torch").error


def test_surrogates_nulls_and_syntax(box):
    assert "SyntaxError" in box("def").error
    assert not box("x = '\0'").ok and not box("print('\ud800')").ok
    assert box("").ok


def test_refuses_without_a_box(monkeypatch):
    monkeypatch.setattr(execution, "_method", lambda: None)
    with pytest.raises(UserError, match="unisolated=True"):
        run_code("print(1)")
    result = run_code("print(1)", unisolated=True)
    assert result.ok and result.isolation == "none"
    assert run_code("while True: pass", timeout=0.3, unisolated=True).timed_out


@boxed
def test_many_at_once():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run_code(f"print({i})").stdout, range(12)))
    assert results == [f"{i}\n" for i in range(12)]


def test_calculator_never_raises():
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.settings(max_examples=300, deadline=1000)
    @hypothesis.given(hypothesis.strategies.one_of(
        hypothesis.strategies.text(max_size=600),
        hypothesis.strategies.text("0123456789+-*/()%., '\"count", max_size=600)))
    def check(expression):
        result = calculate(expression)
        assert result is None or len(result) < 2000
    check()
