"""Rows in several threads: the same result in the same order, the first error, and torch's own threads as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from llmq.grids.base import round_to_grid
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.machine import by_rows

CPU = torch.device("cpu")


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_rows(three: None) -> None:
    both = threading.Barrier(2, timeout=30)

    def work(rows: slice) -> tuple[int, int, int, bool]:
        if rows.start < 8:
            both.wait()  # The first two only end if they run at the same time.
        return rows.start, rows.stop, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = by_rows(10, 4, work, CPU)
    assert found == [(0, 4, 1, False), (4, 8, 1, False), (8, 10, 1, False)]
    assert torch.get_num_threads() == 3 and by_rows(0, 4, work, CPU) == []


def test_the_first_error_is_raised(three: None) -> None:
    def work(rows: slice) -> None:
        if rows.start:
            raise ValueError(f"row {rows.start}")

    with pytest.raises(ValueError, match="row 2"):
        by_rows(100, 2, work, CPU)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_codes_do_not_depend_on_threads(symmetric: bool) -> None:
    weight, scheme = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)), Scheme(4, 128, symmetric)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        scale, zero = find_range(weight, scheme, "weighted", torch.arange(1.0, 1025))
        found.append((scale, zero, round_to_grid(weight, scale, zero, scheme)))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.equal(one, other)
