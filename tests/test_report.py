"""Curves of the report page."""
import json

from nanochat_nb.report import curves


def test_a_single_task_of_rl_has_no_curve_of_its_own(tmp_path):
    """It would be that of all tasks once more."""
    log = tmp_path / "metrics" / "rl.jsonl"
    log.parent.mkdir()
    for tasks in (["word_problem"], ["word_problem", "letters"]):
        rows = [{"step": step, "pass@1": 0.5} | {f"{task}_pass@1": 0.5 for task in tasks} for step in (0, 10)]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        page = curves(tmp_path)
        assert "pass@1" in page and ("word problems pass@1" in page) == (len(tasks) > 1)
