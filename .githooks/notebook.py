"""Git's view of notebooks, with the standard library alone: `clean` (stdin to stdout) on the way into a commit, as nbdev_clean
writes them; `show FILE` for readable diffs. What is not a whole notebook passes unchanged."""
import json
import sys


def clean(data: bytes) -> bytes:
    """The notebook without execution counts and foreign metadata; tags, outputs and cell ids stay."""
    try:
        notebook = json.loads(data)
        for cell in notebook["cells"]:
            cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in ("tags", "jupyter")}
            if cell["cell_type"] == "code":
                cell["execution_count"] = None
                for output in cell["outputs"]:
                    if "execution_count" in output:
                        output["execution_count"] = None
        notebook["metadata"] = {k: v for k, v in notebook["metadata"].items() if k == "kernelspec"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return data
    return (json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def show(data: bytes) -> bytes:
    """Ids, tags, sources and printed outputs: what a reviewer reads."""
    try:
        lines = []
        for cell in json.loads(data)["cells"]:
            lines += [" ".join(["# %%", cell["cell_type"], cell["id"], *cell["metadata"].get("tags", [])]), "".join(cell["source"])]
            for output in cell.get("outputs", []):
                text = output.get("text") or output.get("data", {}).get("text/plain") or ""
                lines += [f"#> {line}" for line in "".join(text).splitlines()]
        return ("\n".join(lines) + "\n").encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError):
        return data


if __name__ == "__main__":
    given = open(sys.argv[2], "rb").read() if sys.argv[1] == "show" else sys.stdin.buffer.read()
    sys.stdout.buffer.write(show(given) if sys.argv[1] == "show" else clean(given))
