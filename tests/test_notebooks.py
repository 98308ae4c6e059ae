"""Every notebook runs from top to bottom; every exercise's stub fails its check and its solution passes."""
from pathlib import Path

import pytest

from nanochat_nb.launch import check_exercises, execute_lessons

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    """The lessons run without a warning on standard error; the exercises work as stub and as solution."""
    assert check_exercises(path) == []
