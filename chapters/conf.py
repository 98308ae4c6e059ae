"""The book, built by Sphinx from the table of contents in `_quarto.yml` and the outputs stored in the notebooks.

    python -m sphinx -W --keep-going -c chapters -b html . _book

Nothing is executed. Quarto's `#|` lines become what Sphinx understands: alt text, folded solutions, hidden cells.
"""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.fileutil import copy_asset

ROOT = Path(__file__).resolve().parent.parent
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
BOOK = QUARTO["book"]


def table_of_contents(book: dict) -> list[tuple[str, list[str]]]:
    """`[(caption, files), …]` of a Quarto book, the root page left out."""
    parts = [("", [])]
    for item in book["chapters"]:
        if isinstance(item, dict):
            parts.append((item["part"], list(item["chapters"])))
        else:
            parts[0][1].append(item)
    parts.append(("Appendices", list(book.get("appendices", []))))
    files = [file for _, chapters in parts for file in chapters]
    missing = [file for file in files if not (ROOT / file).is_file()]
    if missing:
        raise FileNotFoundError(f"_quarto.yml lists files that do not exist: {', '.join(missing)}")
    return [(caption, [f for f in chapters if f != "index.md"]) for caption, chapters in parts]


CONTENTS = table_of_contents(BOOK)


# ---- notebooks: `#|` lines to tags and alt text -----------------------------------------------------------------

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """The `#|` lines on top of a cell as a dict, and the rest of the cell."""
    lines, found = source.split("\n"), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match[1]] = match[2].strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def prepare_cell(cell: dict) -> dict | None:
    """A code cell as the book shows it, or None for one that it leaves out."""
    directives, cell["source"] = split_directives("".join(cell["source"]))
    if directives.keys() & {"hide", "default_exp"} or not (cell["source"] or cell["outputs"]):
        return None
    cell["outputs"] = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    metadata = cell.setdefault("metadata", {})
    metadata.pop("jupyter", None)
    tags, myst = metadata.setdefault("tags", []), metadata.setdefault("mystnb", {})
    if directives.keys() & {"export", "exports", "exporti"}:
        tags.append("export")
    if "fig-alt" in directives:
        myst["image"] = {"alt": directives["fig-alt"]}
    if "fig-cap" in directives:
        myst["figure"] = {"caption": directives["fig-cap"]}
    if is_prose("".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])):
        tags.append("wrap")                                  # see book.css
    if is_imports(cell["source"]):
        tags.append("hide-input")
        myst["code_prompt_show"], myst["code_prompt_hide"] = "Show the imports", "Hide the imports"
    if directives.get("echo") == "false":
        tags.append("remove-input")
    if directives.get("output") == "false":
        tags.append("remove-output")
    if "solution" in tags or directives.get("code-fold") == "true":
        tags.append("hide-input")
        myst["code_prompt_show"] = "Show the solution" if "solution" in tags else "Show the code"
        myst["code_prompt_hide"] = "Hide it again"
    return cell


def is_prose(text: str) -> bool:
    """Whether what a cell printed has no columns, which wrapping on a narrow page would break."""
    return bool(text.strip()) and not re.search(r"\S {3,}\S", text)


def is_imports(source: str) -> bool:
    """Whether a cell does nothing but import, at some length."""
    lines = [line for line in source.split("\n") if line.strip()]
    return len(lines) > 4 and all(re.match(r"(from|import|#|\s|\)|if __name__)", line) for line in lines)


CALLOUT = re.compile(r"^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}[ \t]*$", re.M)


def convert_callouts(text: str) -> str:
    """Quarto's `::: {.callout-note title="…"}` as MyST's admonitions (Sphinx would drop them without an error)."""
    def admonition(match: re.Match) -> str:
        fence, kind, rest = match.groups()
        title = re.search(r'title\s*=\s*"([^"]*)"', rest)
        kind = {"caution": "caution", "important": "important", "tip": "tip", "warning": "warning"}.get(kind, "note")
        return f"{fence}{{admonition}} {title[1]}\n:class: {kind}\n" if title else f"{fence}{{{kind}}}"
    return CALLOUT.sub(admonition, text)


BOX = re.compile(r"^(?=\*\*You['’](?:ll|ve) )", re.M)


def prepare_notebook(text: str, number: str) -> str:
    """A notebook's JSON made ready for myst-nb; `number` goes before the title."""
    notebook, cells = json.loads(text), []
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            cell = prepare_cell(cell)
        else:
            source = convert_callouts("".join(cell["source"]))
            if index == 0:
                source = re.sub(r"^# ", f"# {number} · ", source, count=1)
                source = BOX.sub("{.notebook-box}\n", source, count=1)
            cell["source"] = source
        if cell is not None:
            cells.append(cell)
    notebook["cells"] = cells
    notebook["metadata"].setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
    return json.dumps(notebook)


def toctrees() -> str:
    """The sidebar: one hidden toctree for each part."""
    blocks = []
    for caption, files in CONTENTS:
        names = "\n".join(file.rsplit(".", 1)[0] for file in files)
        head = f":caption: {caption}\n" if caption else ""
        blocks.append(f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n{head}\n{names}\n```\n")
    return "".join(blocks)


def read_source(app, docname: str, source: list[str]) -> None:
    """Sphinx's `source-read` event: what the page is made of, changed before it is parsed."""
    if app.env.doc2path(docname).suffix == ".ipynb":
        source[0] = prepare_notebook(source[0], docname.split("/")[-1][:2])
    else:
        source[0] = convert_callouts(source[0])
    if docname == app.config.root_doc:
        source[0] += toctrees()


TOGETHER = re.compile(r" ± |(?<=\d) min\)")
PRODUCT = re.compile(r"(?<=[\w²³√¼½)]) [·/] (?=[\w√¼½(]{1,6}(?![\w√¼½(]))")


def keep_together(app, doctree, docname: str) -> None:
    """Short words of code stay on one line (see book.css), and so do a number and its error, an exercise's
    minutes, and short products outside of tables."""
    def join(match: re.Match) -> str:
        return match[0].replace(" ", "\N{NO-BREAK SPACE}")

    for literal in doctree.findall(nodes.literal):
        if max(map(len, literal.astext().split()), default=0) <= 24:
            literal["classes"].append("short")
    products = {id(text) for paragraph in doctree.findall(nodes.paragraph)
                if not isinstance(paragraph.parent, nodes.entry) for text in paragraph.findall(nodes.Text)}
    for text in list(doctree.findall(nodes.Text)):
        whole = TOGETHER.sub(join, text)
        if id(text) in products:
            whole = PRODUCT.sub(join, whole)
        if whole != text and not isinstance(text.parent, (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block)):
            text.parent.replace(text, nodes.Text(whole))


def ship_mathjax(app, exception) -> None:
    """Copy MathJax beside the pages, so that formulas show without a network."""
    if exception is None and app.builder.format == "html":
        package = Path(importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0])
        source, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
        copy_asset(str(source / "tex-mml-chtml.js"), str(target))
        shutil.copytree(source / "output" / "chtml" / "fonts", target / "output" / "chtml" / "fonts", dirs_exist_ok=True)


def setup(app):
    app.connect("source-read", read_source)
    app.connect("doctree-resolved", keep_together)
    app.connect("build-finished", ship_mathjax)


# ---- Sphinx's own settings ---------------------------------------------------------------------------------------

project = BOOK["title"]
html_title = BOOK["title"]
author = "nanochat_nb contributors"
root_doc = "index"
extensions = ["myst_nb"]
include_patterns = ["index.md", *(file for _, files in CONTENTS for file in files)]
exclude_patterns = [".*", "runs", "_*", "tests", "benchmarks", "presets", "nanochat_nb", "build", "**/.ipynb_checkpoints"]
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline", "deflist"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-mml-chtml.js"
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "show_toc_level": 2, "navigation_with_keys": True, "use_download_button": False, "use_fullscreen_button": False,
    "home_page_in_toc": True, "navbar_persistent": [], "pygments_light_style": "tango", "pygments_dark_style": "github-dark",
}
