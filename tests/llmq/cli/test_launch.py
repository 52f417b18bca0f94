"""Ranks are started together, and stopped when one has failed."""

from __future__ import annotations

import sys

import pytest

from llmq.cli import launch

SCRIPT = "import os, sys, time; rank = os.environ['RANK']; "


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-S", "-c"))


@pytest.mark.usefixtures("command")
def test_all_ranks_know_each_other() -> None:
    told = "sys.exit(os.environ['WORLD_SIZE'] != '2' or not os.environ['MASTER_PORT'] or rank not in '01')"
    assert launch.launch(2, [SCRIPT + told]) == 0


@pytest.mark.usefixtures("command")
def test_a_killed_rank_stops_all_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    script = SCRIPT + "rank == '1' and os.kill(os.getpid(), 9); time.sleep(600)"
    assert launch.launch(2, [script]) == 137
    told = capsys.readouterr().err
    assert "rank 1 of 2 on " in told and "SIGKILL" in told and "resumes the run" in told


@pytest.mark.usefixtures("command")
def test_the_code_of_a_rank_that_failed_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(2, [SCRIPT + "rank == '0' and sys.exit(2); time.sleep(600)"]) == 2
    assert not capsys.readouterr().err
