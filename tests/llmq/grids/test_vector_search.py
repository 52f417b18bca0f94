"""The search for sums of entries, against all sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.grids.vector_search import error, search, total


def problem(count: int, entries: int, n: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    scale = 0.5 ** torch.arange(count).view(-1, 1, 1)
    return torch.randn(n, 4, generator=draw), torch.randn(count, entries, 4, generator=draw) * scale


def every(wanted: Tensor, books: Tensor) -> Tensor:
    """The least squared distance of each vector from any sum, float64 [n]."""
    sums = books[0].double()
    for book in books[1:]:
        sums = (sums[:, None] + book.double()).flatten(0, 1)
    return (wanted[:, None].double() - sums).square().sum(2).amin(1)


@pytest.mark.parametrize(("count", "entries"), [(1, 16), (2, 16), (2, 256)])
def test_a_full_beam_finds_the_nearest_sum(count: int, entries: int) -> None:
    wanted, books = problem(count, entries)
    found = search(wanted, books, entries)
    assert torch.allclose(error(wanted, books, found).double(), every(wanted, books), atol=1e-5)
    named = sum(books[number][found[:, number]] for number in range(count))
    assert torch.equal(total(books, found), named)


@pytest.mark.parametrize(("count", "entries"), [(2, 256), (3, 16), (4, 8)])
def test_a_narrow_beam_is_near_and_never_worse_than_its_start(count: int, entries: int) -> None:
    wanted, books = problem(count, entries)
    found = search(wanted, books, 8)
    if count < 4:
        assert float(error(wanted, books, found).mean()) < 1.3 * float(every(wanted, books).mean()) + 0.01
    start = torch.randint(0, entries, found.shape, generator=torch.Generator().manual_seed(9))
    assert bool((error(wanted, books, search(wanted, books, 1, start)) <= error(wanted, books, start)).all())
    best = search(wanted, books, entries)
    assert torch.equal(search(wanted, books, 1, best.int()), best) or count > 1
    assert bool((error(wanted, books, search(wanted, books, 1, best)) <= error(wanted, books, best)).all())
