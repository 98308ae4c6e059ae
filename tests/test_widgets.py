"""Sliders in Jupyter: `live` draws what its dials say, keeps its place, and figures bring no box of their own."""
import ast
import json
from pathlib import Path

import pytest

from nanochat_nb.runtime import live, plot_style

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture
def shown(monkeypatch):
    pytest.importorskip("ipywidgets")
    import matplotlib
    matplotlib.use("agg")
    widgets = []
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    monkeypatch.setattr("IPython.display.display", widgets.append)
    return widgets


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_live_draws_what_its_dials_say(shown):
    drawn = []

    def draw(text="a", temperature=1.0):
        drawn.append((text, temperature, tuple(plot_style().gcf().get_size_inches())))

    live(draw, size=(5, 2), temperature=(0.1, 2.0))
    text, temperature, place = shown[0].children
    shown[0].update()
    assert drawn[-1] == ("a", 1.0, (5, 2))                  # the function's own defaults are where the dials start
    temperature.value, text.value = 2.0, ""
    assert drawn[-1] == ("", 2.0, (5, 2))
    assert place.layout.min_height == "210px"               # or the page would jump while a picture is replaced


def test_live_is_silent_in_headless_runs(shown, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME")
    live(pytest.fail, msg="x")
    assert shown == []


def test_figures_bring_no_box_of_their_own():
    """Jupyter draws a dark or a light box behind a figure that calls itself transparent."""
    backend = pytest.importorskip("matplotlib_inline.backend_inline")
    assert backend._fetch_figure_metadata(plot_style().figure()) is None


def bound(cell: ast.Module) -> set[str]:
    """The names that running a cell binds, without imports and what is local to a function."""
    names, todo = set(), list(cell.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, (ast.Lambda, ast.comprehension)):
            todo += ast.iter_child_nodes(node)
    return names


def read(function: ast.AST) -> set[str]:
    """The names that a function reads from outside."""
    nodes = list(ast.walk(function))
    own = {n.arg for n in nodes if isinstance(n, ast.arg)} | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {n.id for n in nodes if isinstance(n, ast.Name)} - own


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_later_cell_takes_a_name_from_a_live_picture(path):
    """A slider can be moved after the whole notebook has run: what its picture reads must still be what it was."""
    cells = [ast.parse("".join(c["source"])) for c in json.loads(path.read_text())["cells"]
             if c["cell_type"] == "code" and not "".join(c["source"]).startswith("%")]
    for number, cell in enumerate(cells):
        functions = {n.name: n for earlier in cells[:number + 1] for n in earlier.body if isinstance(n, ast.FunctionDef)}
        for call in (n for n in ast.walk(cell) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "live" and n.args):
            draw, names = functions.get(getattr(call.args[0], "id", ""), call.args[0]), set()
            todo = read(draw)
            while new := todo - names:
                names |= new
                todo = set().union(*(read(functions[name]) for name in new if name in functions))
            taken = names & set().union(*map(bound, cells[number + 1:])) - {"plt"}                 # which is bound to the same again
            assert not taken, f"{path.name}: the picture of code cell {number}"
