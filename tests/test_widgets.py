"""Sliders in Jupyter: `live` draws what its dials say, keeps its place, and figures bring no box of their own."""
import pytest

from nanochat_nb.runtime import live, plot_style


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
