"""What holds the house together: notebooks, modules and presets agree. Seconds, no training."""
import ast
import builtins
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
LIBRARY = ROOT / "nanochat_nb"
NUMBERS = {p.stem.split("_", 1)[1]: int(p.stem[:2]) for p in NOTEBOOKS}
MODULES = sorted(p.stem for p in LIBRARY.glob("*.py") if not p.stem.startswith("_"))


def cells(path: Path) -> list[dict]:
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def code_cells(path: Path) -> list[dict]:
    return [c for c in cells(path) if c["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def default_exp(path: Path) -> list[str]:
    return re.findall(r"^#\| *default_exp (\S+)", "\n".join(c["source"] for c in code_cells(path)), re.M)


def by_name(path: Path) -> str:
    return path.stem


def test_exporting_again_changes_nothing(tmp_path):
    """The committed library is what nbdev makes of the notebooks."""
    for name in ("nbs", "nanochat_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "kernel-ipc*"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    exporter = shutil.which("nbdev_export", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert exporter, "nbdev_export is not installed"
    done = subprocess.run([exporter], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in sorted(LIBRARY.glob("*.py")):
        assert (tmp_path / "nanochat_nb" / path.name).read_text() == path.read_text(), \
            f"{path.name} is not its notebook's export: run nbdev_export"
    assert (tmp_path / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()


def test_each_module_has_one_notebook():
    exported = {}
    for path in NOTEBOOKS:
        names = default_exp(path)
        if path.stem.endswith("_chat") and not names:      # the dashboard exports nothing
            continue
        assert names == [path.stem.split("_", 1)[1]], f"{path.name} must export exactly the module of its name"
        assert names[0] not in exported, f"{path.name} and {exported[names[0]]} export the same module"
        exported[names[0]] = path.name
    assert sorted(exported) == MODULES


def test_notebook_numbers_are_unique():
    assert len({p.stem[:2] for p in NOTEBOOKS}) == len(NOTEBOOKS)


def imported(tree: ast.AST) -> set[str]:
    """The modules of this library that a syntax tree imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1:
                found |= {module.split(".")[0]} if module else {a.name for a in node.names}
            elif module.startswith("nanochat_nb."):
                found.add(module.split(".")[1])
            elif module == "nanochat_nb":
                found |= {a.name for a in node.names if a.name in NUMBERS}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nanochat_nb.")}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_a_higher_number(module):
    for name in imported(ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8"))):
        assert NUMBERS[name] < NUMBERS[module], f"{module} ({NUMBERS[module]}) imports {name} ({NUMBERS[name]})"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_no_notebook_imports_from_a_higher_number(path):
    source = "\n".join(c["source"] for c in code_cells(path))
    for name in re.findall(r"^\s*(?:from|import) nanochat_nb\.(\w+)", source, re.M):
        assert NUMBERS[name] <= int(path.stem[:2]), f"{path.name} imports {name} ({NUMBERS[name]})"


BLOCKER = """
import importlib, importlib.abc, sys
import numpy, torch, tiktoken
allowed = set(sys.stdlib_module_names) | {"nanochat_nb", "numpy", "torch", "tiktoken"}
for name in [m for m in sys.modules if m.split(".")[0] in
             ("IPython", "nbdev", "fastcore", "papermill", "tqdm", "yaml", "regex", "requests", "matplotlib", "pandas")]:
    del sys.modules[name]                                  # in case torch or tiktoken brought one of these along
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        caller = sys._getframe(1)
        while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
        if caller and "nanochat_nb" in caller.f_code.co_filename and name.split(".")[0] not in allowed:
            raise ImportError(f"{caller.f_code.co_filename} imports {name}: only torch, numpy, tiktoken may be needed")
sys.meta_path.insert(0, Block())
for module in sys.argv[1:]:
    importlib.import_module("nanochat_nb." + module)
"""


def test_core_needs_only_torch_numpy_tiktoken():
    core = [m for m in MODULES if NUMBERS[m] <= 13]
    done = subprocess.run([sys.executable, "-c", BLOCKER, *core], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_modules_import_without_notebook_tools():
    """An application that imports the library does not need nbdev, fastcore, IPython or papermill."""
    code = ("import sys, importlib\n"
            "for m in ('nbdev', 'fastcore', 'execnb', 'IPython', 'papermill', 'nbclient'): sys.modules[m] = None\n"
            "for m in sys.argv[1:]: importlib.import_module('nanochat_nb.' + m)")
    needed = [m for m in MODULES if m != "ui"]             # the chat widget is a widget: anywidget needs IPython
    done = subprocess.run([sys.executable, "-c", code, *needed], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


FUNCTIONS = {"02_tokenizer": "run_tokenizer", "10_evaluation": "run_eval", "11_pretraining": "run_base",
             "12_sft": "run_sft", "13_rl": "run_rl", "14_report": "run_report"}
STAGES = [p for p in NOTEBOOKS if p.stem in FUNCTIONS]


@pytest.mark.parametrize("path", STAGES, ids=by_name)
def test_parameters_cell_equals_signature(path):
    marked = [c for c in code_cells(path) if "parameters" in tags(c)]
    assert len(marked) == 1, f"{path.name} needs exactly one cell tagged `parameters`"
    assert any("run" in tags(c) for c in code_cells(path)), f"{path.name} needs a cell tagged `run`"
    assigned = {}
    for node in ast.parse(marked[0]["source"]).body:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, "the parameters cell holds plain assignments only"
        assigned[node.targets[0].id] = ast.literal_eval(node.value)
    function = getattr(importlib.import_module("nanochat_nb." + path.stem.split("_", 1)[1]), FUNCTIONS[path.stem])
    found = inspect.signature(function).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in found.values())
    plain = {k: list(p.default) if isinstance(p.default, tuple) else p.default for k, p in found.items()}
    assigned = {k: list(v) if isinstance(v, tuple) else v for k, v in assigned.items()}
    assert list(assigned) == list(plain), f"{path.name}: names or order differ from {function.__name__}'s"
    assert assigned == plain
    json.dumps(plain)


@pytest.mark.parametrize("path", STAGES, ids=by_name)
def test_run_cells_stand_alone(path):
    """Headless, only `parameters` and `run` cells execute: each name they use must come from one of them."""
    kept = [c["source"] for c in code_cells(path) if {"parameters", "run"} & set(tags(c))]
    tree = ast.parse("\n".join(line for source in kept for line in source.split("\n") if not line.startswith(("%", "#|"))))
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arguments):
            bound |= {a.arg for a in node.args + node.kwonlyargs}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    missing = used - bound - set(dir(builtins)) - {"display"}
    assert not missing, f"{path.name}: run cells use {sorted(missing)}, which only lesson cells define"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebook_is_clean(path):
    """No execution counts, unique cell ids, no stored traceback, warning, path or address; not too large."""
    assert path.stat().st_size < 400_000, f"{path.name} is larger than 400 kB"
    ids = [c["id"] for c in cells(path)]
    assert len(set(ids)) == len(ids), f"{path.name}: a cell id appears twice"
    for cell in code_cells(path):
        assert cell["execution_count"] is None
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"{path.name} #{cell['id']} stores a traceback"
            assert output.get("name") != "stderr", f"{path.name} #{cell['id']} stores standard error"
            assert "needs_background" not in output.get("metadata", {}), \
                f"{path.name} #{cell['id']} stores a picture with a box behind it: refresh the notebook"
            if picture := output.get("data", {}).get("image/png"):
                corner = Image.open(BytesIO(b64decode("".join(picture)))).convert("RGBA").getpixel((0, 0))
                assert corner[3] == 0, f"{path.name} #{cell['id']} stores a picture that is not transparent"
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(?<![\w.])/(tmp|root|home|work)/|0x[0-9a-f]{9,}|Warning:", text), \
                f"{path.name} #{cell['id']} stores a path, an address or a warning: {text[:200]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_exercises_come_with_a_check_and_a_solution(path):
    code = code_cells(path)
    for this, after in zip(code, code[1:] + [None]):
        if "exercise" in tags(this):
            assert "# --- check ---" in this["source"], f"{path.name} #{this['id']} has no check"
            assert after and "solution" in tags(after), f"{path.name} #{this['id']} has no solution after it"


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=by_name)
def test_presets_are_valid(path):
    from nanochat_nb.launch import STAGES, check_overrides
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    there = {k: v for k, v in preset.items() if k not in STAGES or (LIBRARY / f"{STAGES[k].module[12:]}.py").exists()}
    check_overrides(there)


def test_nothing_names_this_machine():
    """No registry address and no machine's path in what is committed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in (".py", ".sh", ".txt", ".lock", ".yaml", ".yml", ".ini", ".toml") and path.name != "test_structure.py":
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"--(extra-)?index-url|--find-links|(?<![\w.])/(root|work|farm)/\w.*", text)
            assert not found, f"{name}: {found[0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_git_filter_leaves_clean_notebooks_alone(path):
    """What `.gitconfig` puts between the working tree and a commit changes nothing in a clean notebook, and loses nothing."""
    sys.path.insert(0, str(ROOT / ".githooks"))
    try:
        import notebook as hooks
    finally:
        sys.path.pop(0)
    data = path.read_bytes()
    assert hooks.clean(data) == data
    used = json.loads(data)
    for cell in used["cells"]:
        cell["metadata"]["execution"] = {"iopub.status.busy": "now"}
        if cell["cell_type"] == "code":
            cell["execution_count"] = 7
    assert hooks.clean(json.dumps(used).encode()) == data
    assert hooks.clean(b"<<<<<<< conflict") == b"<<<<<<< conflict"
    assert "".join(used["cells"][0]["source"]).encode() in hooks.show(data)


@pytest.mark.parametrize("name, preset, solutions, steps, flops", [
    ("long_study", None, None, 200, (1e13, 3e13)), ("few_study", None, 300, 60, (1e12, 1.1e13)), ("hard_study", "27 November, evening", None, 60, (1e12, 2e13))])
def test_the_study_of_rl_is_drawn_from_its_runs(name, preset, solutions, steps, flops):
    """The numbers that 13 draws are those of benchmarks/rl_study.jsonl."""
    recipes = {"RL, 200 steps": "MaxRL, cooler", "RL with old solutions": "MaxRL, cooler", "RL without (MaxRL)": "MaxRL: right",
               "RL without (minus the mean)": "minus the mean", "RL (preset)": "preset: ",
               "RL, hard questions": "hard questions, old", "RL, hard, no rare answers": "hard questions, no rare",
               "RL, hard, no old solutions": "hard questions, no old", "RL, hard, neither": "hard questions, neither"}
    runs = [json.loads(line) for line in (ROOT / "benchmarks" / "rl_study.jsonl").read_text().splitlines()]
    runs = [r for r in runs if (r.get("preset"), r.get("solutions")) == (preset, solutions) and r.get("steps") in (None, steps)
            and flops[0] < r.get("flops", 0) < flops[1]]
    cell = next(c for c in code_cells(ROOT / "nbs" / "13_rl.ipynb") if f"{name} = {{" in c["source"])
    drawn = next(ast.literal_eval(node.value) for node in ast.parse(cell["source"]).body
                 if isinstance(node, ast.Assign) and node.targets[0].id == name)
    columns = ("pass@1", "pass@1_cold", "greedy", "pass@8")
    for method, rows in drawn.items():
        made = [[100 * r[f"word_problem_{n}"] for n in columns] for r in sorted(runs, key=lambda r: (r["seed"], r["recipe"]))
                if r["recipe"].startswith(recipes.get(method, f"more SFT, {method}"))]
        assert len(made) == len(rows), method
        for row, run in zip(rows, made):
            assert row == pytest.approx(run, abs=0.0501), method
