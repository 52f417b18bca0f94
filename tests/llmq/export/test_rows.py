"""Rows found again by their bytes."""

from __future__ import annotations

import torch

from llmq.export.rows import RowIndex, keys


def sample(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_rows_are_found_wherever_they_are() -> None:
    a, b, index = sample(5, 0), sample(3, 1), RowIndex()
    assert index.find(a) is None
    index.add(a)
    index.add(b)
    found = index.find(torch.cat([b, a.flip(0)]))
    assert found is not None
    assert found.weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and found.rows.tolist() == [0, 1, 2, 4, 3, 2, 1, 0]
    (first, here, rows), (second, there, others) = found.parts()
    assert (first, second) == (1, 0) and here.tolist() == [0, 1, 2] and rows.tolist() == [0, 1, 2]
    assert there.tolist() == [3, 4, 5, 6, 7] and others.tolist() == [4, 3, 2, 1, 0]
    assert index.find(torch.cat([a, sample(1, 2)])) is None
    assert index.find(a * 2) is None


def test_of_equal_rows_the_nearest() -> None:
    """Rows of zeros are in every weight; they are taken from the weight that the others come from."""
    a, b, index = sample(4, 0), sample(4, 1), RowIndex()
    a[1] = a[2] = b[0] = b[3] = 0
    index.add(a)
    index.add(b)
    for weight, wanted in ((a, 0), (b, 1)):
        found = index.find(weight)
        assert found is not None and found.weights.tolist() == [wanted] * 4
    found = index.find(a)
    assert found is not None and found.rows.tolist() == [0, 1, 2, 3]


def test_signs_of_zeros_do_not_count() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])
    first, second, third = keys(rows).tolist()
    assert first == second != third
