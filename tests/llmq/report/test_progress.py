"""Progress bars: a stage each, a step at a time, notes as they are written."""

from __future__ import annotations

import io

from rich.console import Console

from llmq.report.progress import Bars


def test_a_bar_for_each_stage_that_steps_move_on() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Bars(console) as bars:
        bars.step("before any stage")
        bars.stage("first", 2)
        bars.step("one")
        bars.stage("second", 3)
        bars.step("two")
        bars.step("three")
        bars.note("kept [b]as it is[/b] 4")
        tasks = [(task.description, task.completed, task.total) for task in bars.progress.tasks]
        assert tasks == [("first", 1, 2), ("second", 2, 3)] and bars.progress.tasks[1].fields["note"] == "three"
    assert isinstance(console.file, io.StringIO) and "kept [b]as it is[/b] 4" in console.file.getvalue()
    assert bars.progress.finished is False and not bars.progress.live.is_started
