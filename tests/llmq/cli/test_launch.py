"""Ranks are started together, and stopped when one has failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmq import job, ranks
from llmq.cli import launch
from llmq.cli.app import app, main
from llmq.errors import LlmqError

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


def test_another_rank_says_what_it_fails_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LlmqError("a weight of its own is damaged")

    monkeypatch.setattr(ranks, "start", lambda: None)
    monkeypatch.setattr(ranks, "first", lambda: False)
    monkeypatch.setattr(job, "plan", fail)
    found = CliRunner().invoke(app, ["quantize", "demo", "-o", str(tmp_path / "out")])
    assert found.exit_code == 2 and "a weight of its own is damaged" in found.output


def test_both_say_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "asked", lambda: 4)
    with pytest.raises(LlmqError, match="--ranks 2, but torchrun started 4 ranks"):
        launch.enter(2)


def test_commands_of_one_process_refuse_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "asked", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["llmq", "inspect", "demo"])
    with pytest.raises(SystemExit, match="only `quantize` and `eval` work with several ranks, and 2 were"):
        main()
    monkeypatch.setattr(sys, "argv", ["llmq", "eval", "--help"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code


def test_what_a_torchrun_around_says_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-S", "-c"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launch.launch(1, [SCRIPT + "sys.exit('TORCHELASTIC_USE_AGENT_STORE' in os.environ)"]) == 0
