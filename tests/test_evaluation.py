"""Notebook 10's download of the CORE bundle, against a server on loopback."""
import http.server
import io
import json
import threading
import zipfile

import pytest

from nanochat_nb import evaluation
from nanochat_nb.evaluation import find_core, run_eval

ROWS = [{"query": f"{a} + {b} =", "choices": [str(a + b), "none"], "gold": 0} for a in range(3) for b in range(3)]


def bundle() -> bytes:
    """A bundle of one task."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("eval_bundle/core.yaml", "icl_tasks:\n- {label: sums, dataset_uri: sums.jsonl, "
                                                 "num_fewshot: [1], icl_task_type: multiple_choice}\n")
        packed.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\nsums,50\n")
        packed.writestr("eval_bundle/eval_data/sums.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    return out.getvalue()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves one file, or 404 when it has none."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        if self.server.data is None:
            return self.send_error(404)
        self.server.seen += body
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        self.wfile.write(self.server.data if body else b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    found.data, found.seen = bundle(), 0
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(evaluation, "CORE_BUNDLE", f"http://127.0.0.1:{found.server_port}/eval_bundle.zip")
    monkeypatch.setenv("NANOCHAT_NB_DATA", str(tmp_path))
    yield found
    found.shutdown()
    found.server_close()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_the_bundle_is_downloaded_once_and_scored(server, tmp_path):
    """A base model with `data: huggingface` gets its CORE tasks."""
    for _ in range(2):
        result = run_eval(checkpoint="base", data="huggingface", held_out_documents=2, max_new_tokens=4, device="cpu")
        assert result["tasks"]["sums"]["n"] == len(ROWS) and "core_partial" in result["metrics"]
    assert names(tmp_path) == ["core"] and server.seen == 1


def test_no_network_skips_core_and_says_why(server, capsys):
    server.data = None
    result = run_eval(checkpoint="base", data="huggingface", held_out_documents=2, max_new_tokens=4, device="cpu")
    assert result["tasks"] == {} and "404" in result["skipped"]["core"]
    assert "NOT EVALUATED: core (could not download" in capsys.readouterr().out


@pytest.mark.parametrize("mishap", ["changed", "no zip", "no bundle"])
def test_a_damaged_bundle_leaves_nothing_behind(server, tmp_path, mishap):
    whole = server.data
    middle = whole.index(b"sums.jsonl", whole.index(b"eval_data")) + 12
    if mishap == "no bundle":
        empty = io.BytesIO()
        zipfile.ZipFile(empty, "w").close()
        server.data = empty.getvalue()
    else:
        server.data = b"<html>" if mishap == "no zip" else whole[:middle] + b"\0\0\0\0" + whole[middle + 4:]
    folder, reason = find_core("huggingface", True)
    assert folder == "" and reason
    assert names(tmp_path) == []
    server.data = whole
    assert find_core("huggingface", True) == (str(tmp_path / "core"), "")
