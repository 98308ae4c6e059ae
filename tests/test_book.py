"""The book builds from stored outputs without a warning, reads offline, and its links lead somewhere."""
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml

pytest.importorskip("sphinx", reason="Sphinx is not installed")


@pytest.fixture(scope="module")
def conf(root):
    """chapters/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("book_conf", root / "chapters" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def book(root, tmp_path_factory):
    """The built book's folder."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "chapters", "-b", "html",
               "-d", str(folder / "doctrees"), ".", str(folder / "html")]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    assert not built.stderr.strip(), built.stderr[-3000:]
    return folder / "html"


class Page(HTMLParser):
    """What a page refers to: links, things a browser loads by itself, anchors, images."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.anchors, self.images = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("next", "prev", "search", "index", "canonical"):
            self.loads.append(a["href"])
        if a.get("src"):
            self.loads.append(a["src"])
        if tag == "img":
            self.images.append(a)


@pytest.fixture(scope="module")
def pages(book):
    return {path: Page(path.read_text(encoding="utf-8")) for path in book.rglob("*.html")
            if "_static" not in path.parts}


def test_every_page_is_in_the_table_of_contents(root):
    text = (root / "_quarto.yml").read_text(encoding="utf-8")
    listed = re.findall(r"- (\S+\.(?:md|ipynb))", text)
    there = [p.relative_to(root).as_posix() for folder, kind in (("nbs", "ipynb"), ("chapters", "md"))
             for p in sorted((root / folder).glob(f"*.{kind}"))]
    assert len(listed) == len(set(listed)) and set(listed) == {"index.md", *there}
    assert [n for n in listed if n.startswith("nbs/")] == sorted(n for n in listed if n.startswith("nbs/"))
    assert yaml.safe_load(text)["project"]["type"] == "book"


def test_links_lead_somewhere(book, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists() or url.fragment and target in pages \
                    and unquote(url.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(book)} -> {link}")
    assert not broken, broken[:20]


def test_it_reads_offline(book, pages):
    outside = [f"{path.name}: {load}" for path, page in pages.items() for load in page.loads
               if urlsplit(load).scheme not in ("", "data")]
    missing = [f"{path.name}: {load}" for path, page in pages.items() for load in page.loads
               if not urlsplit(load).scheme and not (path.parent / unquote(urlsplit(load).path)).exists()]
    styles = [f"{path.name}: {m}" for path in book.rglob("*.css") for m in
              re.findall(r"(?:@import\s+|url\()[\"']?https?://[^)\"']+", path.read_text(encoding="utf-8", errors="replace"))]
    assert not outside and not missing and not styles, (outside[:5], missing[:5], styles[:5])
    assert (book / "_static" / "mathjax" / "tex-mml-chtml.js").is_file()
    assert list((book / "_static" / "mathjax").rglob("*.woff"))


def test_pictures_have_alt_text(book, pages):
    bare = [f"{path.relative_to(book)}: {image.get('src', '')[:60]}" for path, page in pages.items()
            for image in page.images if "_images/" in image.get("src", "")
            and (not image.get("alt") or "_images/" in image["alt"])]
    assert not bare, bare[:20]


def test_directives_do_not_show(book, pages):
    for path in pages:
        if path.parent.name == "nbs":
            text = re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))
            assert not re.search(r"^#\|", text, re.M), path.name


def test_solutions_are_folded_and_exercises_are_not(book, root):
    shown = 0
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        page = (book / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        solutions = sum("solution" in c["metadata"].get("tags", []) for c in cells)
        assert page.count("Show the solution") == solutions, path.name
        for block in re.findall(r'<div class="cell [^"]*tag_exercise[^"]*"', page):
            assert "tag_hide-input" not in block
            shown += 1
    assert shown >= 40


def test_each_notebook_says_what_you_will_build(book, root):
    for path in sorted((root / "nbs").glob("*.ipynb")):
        page = (book / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert page.count("notebook-box") == (path.stem != "18_chat"), path.name


def test_short_words_of_code_and_errors_stay_together(book):
    page = (book / "nbs" / "10_evaluation.html").read_text(encoding="utf-8")
    assert '<code class="short docutils literal notranslate"><span class="pre">laptop</span>' in page
    assert not re.search(r"\d ± \d", re.sub(r"<pre>.*?</pre>|<code.*?</code>", "", page, flags=re.S))


def test_callouts_survive(conf):
    text = '::: {.callout-tip title="Try it"}\nwords\n:::\n\n:::: {.callout-note}\nmore\n::::'
    assert conf.convert_callouts(text) == \
        ":::{admonition} Try it\n:class: tip\n\nwords\n:::\n\n::::{note}\nmore\n::::"


def test_cells_are_prepared(conf):
    def cell(source, tags=()):
        return {"cell_type": "code", "source": source, "outputs": [], "metadata": {"tags": list(tags)}}
    exported = conf.prepare_cell(cell("#| export\ndef f(): pass"))
    assert exported["source"] == "def f(): pass" and "export" in exported["metadata"]["tags"]
    assert conf.prepare_cell(cell("#| default_exp runtime")) is None and conf.prepare_cell(cell("#| hide\nx")) is None
    pictured = conf.prepare_cell(cell('#| fig-alt: "A line: it rises."\nplot()'))
    assert pictured["metadata"]["mystnb"]["image"]["alt"] == "A line: it rises." and pictured["source"] == "plot()"
    assert "hide-input" in conf.prepare_cell(cell("def f(): pass", ["solution"]))["metadata"]["tags"]
    assert "hide-input" not in conf.prepare_cell(cell("def f(): pass", ["exercise"]))["metadata"]["tags"]
    said = cell("print(story)") | {"outputs": [{"output_type": "stream", "text": ["short\n", "long " * 30]}]}
    assert "wrap" in conf.prepare_cell(said)["metadata"]["tags"]
    said["outputs"][0]["text"] = ["a short line\n"]
    assert "wrap" in conf.prepare_cell(said | {"metadata": {}})["metadata"]["tags"]
    assert "wrap" not in conf.prepare_cell(cell("x = 1"))["metadata"]["tags"]
    assert not conf.is_prose("task     score\n" + "long " * 30)
