"""The windows that weights are scored on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.allocation.windows import extra, split
from llmq.data.calibration import Windows
from tests.llmq.refusal import refused


def windows(rows: int, tokens: int) -> Tensor:
    return torch.arange(rows * tokens).view(rows, tokens)


@pytest.mark.parametrize(("rows", "tokens", "sizes"), [(128, 2048, (4, 8)), (44, 512, (4, 8)), (9, 64, (1, 1))])
def test_no_window_has_two_uses(rows: int, tokens: int, sizes: tuple[int, int]) -> None:
    apart = Windows(windows(rows, tokens), (), "").apart(extra(tokens))
    assert apart.held is not None and len(apart.ids) + len(apart.held) == rows
    found = split(apart.ids, apart.held)
    parts = found.statistics, found.scored, found.proof
    assert (len(found.scored), len(found.proof)) == sizes
    assert {part.shape[1] for part in parts} == {min(512, tokens)}
    used = torch.cat(parts)
    assert len(used[:, 0].unique()) == len(used)
    assert set(found.proof[:, 0].tolist()) <= {row * tokens + k for row in range(rows) for k in range(0, tokens, 512)}
    assert not set(found.proof[:, 0].tolist()) & set(apart.ids.flatten().tolist())
    batches, judged = found.batches(found.proof)
    assert torch.equal(torch.cat([*batches[-judged:]]), found.proof)
    assert torch.equal(torch.cat([*batches[:-judged]]), found.statistics)
    assert max(batch.numel() for batch in batches) <= 2048


def test_too_few_windows_are_refused() -> None:
    for rows in (1, 2):
        apart = Windows(windows(rows, 64), (), "").apart(8)
        refused(lambda found=apart: split(found.ids, found.held), "at least 3 windows", "--samples")  # type: ignore[misc]
    assert Windows(windows(1, 8), (), "").apart(8).held is None
    refused(lambda: split(windows(9, 8), None), "--samples")
