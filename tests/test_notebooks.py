"""Every notebook runs from top to bottom; every exercise's stub fails its check and its solution passes."""
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from nanochat_nb.launch import check_exercises

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def checked(request) -> dict:
    """Notebook → the future of its check; two run at a time, each lesson on one thread."""
    wanted = [item.callspec.params["path"] for item in request.session.items if item.fspath == request.node.fspath]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield {path: pool.submit(check_exercises, path) for path in wanted}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, checked):
    """The lessons run without an error or a warning; the exercises work as stub and as solution."""
    assert checked[path].result() == []
