"""What the report says of machine and commit, and the curves of its page."""
import json

import pytest

from nanochat_nb.report import curves, environment, git_sha


@pytest.mark.parametrize("noted, told", [({"git": "abc"}, "abc"), ({"git": ""}, ""), ({}, git_sha())])
def test_the_commit_is_that_of_the_training(tmp_path, noted, told):
    """A run trained by a copy without git has none: the commit of the machine that writes the report is another program's."""
    assert environment(tmp_path, {"base": {"machine": {"cpu": "far away"}} | noted})["git"] == told


def test_a_single_task_of_rl_has_no_curve_of_its_own(tmp_path):
    """It would be that of all tasks once more."""
    log = tmp_path / "metrics" / "rl.jsonl"
    log.parent.mkdir()
    for tasks in (["word_problem"], ["word_problem", "letters"]):
        rows = [{"step": step, "pass@1": 0.5} | {f"{task}_pass@1": 0.5 for task in tasks} for step in (0, 10)]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        page = curves(tmp_path)
        assert "pass@1" in page and ("word problems pass@1" in page) == (len(tasks) > 1)
