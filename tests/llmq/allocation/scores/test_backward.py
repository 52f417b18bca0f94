"""The pass backwards: pieces of text, labels, a killed score that goes on, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.allocation.scores import _backward as module
from llmq.allocation.scores import fisher, gradient
from llmq.discovery import tail as discovered
from llmq.errors import LlmqError
from llmq.watch import Silent
from tests.architectures import tiny
from tests.llmq.allocation.scores.dense import IDS, losses_of, task_of


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


class Killed(BaseException):
    """Stands for the end of the process."""


class Killing(Silent):
    """Kills a run at a step, counted from 0 over all stages; notes what was done."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.texts = at, list[str]()

    def step(self, text: str) -> None:
        if len(self.texts) == self.at:
            raise Killed
        self.texts.append(text)


def test_pieces_are_the_starts_of_the_last_windows_first() -> None:
    ids = torch.arange(4 * 1300).view(4, 1300)
    found = module.pieces(ids)
    assert found.shape == (8, 512)
    assert found[:, 0].tolist() == [3900, 2600, 1300, 0, 4412, 3112, 1812, 512]
    assert module.pieces(torch.zeros(40, 24, dtype=torch.long)).shape == (32, 24)
    assert torch.equal(module.pieces(IDS), IDS.flip(0))


@given(st.integers(1, 50), st.integers(0, 2**31))
def test_labels_have_the_probabilities_of_the_model(vocabulary: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(vocabulary, generator=chance)
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    found = module.drawn(logits.expand(4000, vocabulary), even)
    shares = torch.bincount(found, minlength=vocabulary) / 4000
    assert (shares - logits.softmax(-1)).abs().max() <= 2 / 4000


def test_impossible_labels_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(3, 5)
    chance = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert module.drawn(logits, chance).tolist() == [1, 3, 3]


@pytest.mark.parametrize("score", [gradient, fisher])
def test_a_killed_score_goes_on(
    score: object, few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    whole = Killing()
    wanted = score.losses(task_of(folder, watch=whole))  # type: ignore[attr-defined]
    blocks = 4
    steps = len(whole.texts)
    # The two scores share all that is kept.
    every = (3, steps - blocks - 1, steps - blocks, steps - 2, steps - 1)
    for at in every if score is gradient else every[1::2]:
        kept = tmp_path / str(at)
        with pytest.raises(Killed):
            score.losses(task_of(folder, watch=Killing(at), kept=kept))  # type: ignore[attr-defined]
        again = Killing()
        assert score.losses(task_of(folder, watch=again, kept=kept)) == wanted  # type: ignore[attr-defined]
        done = [text for text in again.texts if text.endswith("was already done")]
        assert len(done) == max(0, at - (steps - blocks) + 1), at
        assert not [*kept.glob("*")]


def test_a_state_of_another_task_or_a_damaged_one_is_not_used(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)

    def killed(watch: Killing) -> None:
        with pytest.raises(Killed):
            gradient.losses(task_of(folder, watch=watch, kept=tmp_path))

    whole = Killing()
    wanted = gradient.losses(task_of(folder, IDS.flip(0), watch=whole))
    killed(Killing(len(whole.texts) - 1))
    (file,) = tmp_path.glob("*")
    assert gradient.losses(task_of(folder, IDS.flip(0), kept=tmp_path)) == wanted
    killed(Killing(len(whole.texts) - 1))
    file.write_bytes(file.read_bytes()[:100])
    assert gradient.losses(task_of(folder, kept=tmp_path)) == gradient.losses(task_of(folder))


def test_the_state_is_not_written_more_often_than_needed(few: None, folder: Path, tmp_path: Path) -> None:
    gradient.losses(task_of(folder, kept=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_windows_longer_than_pieces_and_judged_ones(few: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch is not observed, and of what is longer than a piece, all is observed."""
    monkeypatch.setattr(module, "TOKENS", 8)
    task = task_of(folder, judged=1, batch=2)
    found = gradient.losses(task)
    text = IDS[[5, 4, 3, 2], :8]
    for mine, other in zip(found, losses_of(task, tiny.model("llama"), text, IDS[:4], diagonal=False), strict=True):
        # At 2 bits, another order of sums may change a code; other windows change losses by factors.
        assert mine == pytest.approx(other, rel=0.1)


def test_data_free_methods_observe_nothing(few: None, folder: Path) -> None:
    watch = Killing()
    task = task_of(folder, method="hqq", watch=watch)
    found = fisher.losses(task)
    assert watch.texts.count("") == 4, "a recording of the pieces alone"
    assert all(row[0] > row[1] > row[2] == 0 for row in found)


def test_only_some_groups(few: None, folder: Path) -> None:
    """What is not asked for changes nothing, and blocks before the first group are not visited."""
    whole = task_of(folder)
    wanted = gradient.losses(whole)
    watch = Killing()
    groups = [group for group in whole.groups if group.block == 2]
    part = replace(whole, groups=groups, watch=watch)
    kept = [row for row, group in zip(wanted, whole.groups, strict=True) if group.block == 2]
    assert gradient.losses(part) == kept
    assert watch.texts[-3:] == ["the model's end", "block 3", "block 2"]
    assert gradient.losses(replace(whole, groups=[])) == []


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match="no gradients of routed experts.*--score error"):
        gradient.losses(task_of(tiny.make("mixtral", tmp_path)))


def test_weights_outside_the_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny.make("gpt_neox", tmp_path)
    with pytest.raises(LlmqError, match="embed_out.*outside the blocks.*--score divergence"):
        gradient.losses(task_of(model, method="rtn", include=("embed_out",)))


def test_a_model_without_logits_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise LlmqError("the model returns no logits of each token")

    monkeypatch.setattr(module, "find_tail", none)
    with pytest.raises(LlmqError, match="no logits of each token: .*--score error"):
        gradient.losses(task_of(folder))
    monkeypatch.undo()
    monkeypatch.setattr(discovered.Tail, "settle", none)
    with pytest.raises(LlmqError, match="no logits of each token: .*--score error"):
        gradient.losses(task_of(folder))
