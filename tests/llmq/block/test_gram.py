"""Sums of products of which half is computed."""

from __future__ import annotations

import pytest
import torch

from llmq.block import gram
from llmq.block.gram import add_gram, mirror


@pytest.mark.parametrize("strip", [7, 20, 512])
def test_sums_are_those_of_all_rows_and_symmetric(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "STRIP", strip)
    total, x = torch.zeros(20, 20), torch.randn(3, 9, 20)
    add_gram(total, x[0], slice(0, 20))
    add_gram(total[:13], x[1], slice(0, 13))
    add_gram(total[13:], x[1], slice(13, 20))
    mirror(total)
    add_gram(total, x[2], slice(0, 20))
    mirror(total)
    torch.testing.assert_close(total, x.flatten(0, 1).t() @ x.flatten(0, 1))
    assert torch.equal(total, total.t())
