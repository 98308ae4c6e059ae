"""`run_all.sh` before Python starts: what it refuses, and the environment it gives."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="run_all.sh is a script of bash")


@pytest.fixture
def clone(tmp_path):
    """A folder with what `run_all.sh` reads before it installs."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("run_all.sh", "requirements.lock", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder, *words, **env):
    return subprocess.run(["bash", folder / "run_all.sh", *words], capture_output=True, text=True, timeout=60,
                          env={"PATH": "/usr/bin:/bin"} | env)


def test_an_environment_behind_a_link_is_not_emptied(clone, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    (clone / ".venv").symlink_to(tmp_path / "other")
    done = run(clone, "laptop")
    assert done.returncode != 0 and ".venv is a link" in done.stderr
    assert (tmp_path / "other" / "kept").exists()


@pytest.mark.parametrize("given, expected", [({}, "glibc.malloc.tcache_count=0"),
                                             ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, "glibc.malloc.arena_max=1")])
def test_training_gets_a_heap_without_small_caches(clone, given, expected):
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "told $GLIBC_TUNABLES to $*"\n')
    python.chmod(0o755)
    stamp = subprocess.run(["bash", "-c", 'cat requirements.lock settings.ini setup.py pyproject.toml | cksum; echo "$PWD"'],
                           cwd=clone, capture_output=True, text=True, check=True).stdout
    (clone / ".venv" / "installed").write_text(stamp)
    assert run(clone, "laptop", **given).stdout.strip() == f"told {expected} to -m nanochat_nb.launch laptop"
