"""A column's change reaches every later column before that one's turn, in parts as one by one."""

from __future__ import annotations

import pytest
import torch

from llmq.numerics import columns
from llmq.numerics.columns import compensate


@pytest.mark.parametrize("count", [1, 5, 6, 13])
def test_parts_give_what_single_columns_give(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "INNER", 3)
    block, coefficients = torch.randn(count, 4, dtype=torch.float64), torch.randn(count, count, dtype=torch.float64)
    wanted, found = block.clone(), block.clone()
    changes = torch.full_like(block, torch.nan)
    for k in range(count):
        torch.testing.assert_close(found[k], wanted[k])
        changes[k] = wanted[k].sin()
        wanted[k + 1 :] -= torch.outer(coefficients[k, k + 1 :], changes[k])
        compensate(found, coefficients, changes, k)
