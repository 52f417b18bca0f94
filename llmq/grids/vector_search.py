"""The sum of one entry of each codebook that is nearest to a vector, by beam search (AQLM, §3.2).

All is in coordinates in which the error is a plain sum of squares. It is never computed from vectors: with products of
the vector with all entries, and of all entries with each other, ‖w − a − b‖² − ‖w‖² = (‖a‖² − 2 w·a) + (‖b‖² − 2 w·b) +
2 a·b is a sum of values from tables. The place of a least value takes ten times the time of the value itself, so it is
looked for in the section that has the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 9
"""Vectors that are worked on at a time."""
COSTS = 1 << 18
"""Costs of sums that are in memory at a time, so that they stay in the processor's cache."""
SECTIONS = 8


def search(wanted: Tensor, books: Tensor, beam: int, start: Tensor | None = None) -> Tensor:
    """The entries whose sum is near each vector, int64 [n, books].

    wanted: float32 [n, size]; books: float32 [books, entries, size]; beam: sums that are kept from book to book; start:
    entries, integers [n, books], than which the result is never worse. The result is the nearest sum if there is one
    book, or two and `beam` is the number of entries.
    """
    # With a 1 after each vector, one product gives −2 w·a + ‖a‖².
    tables = torch.cat((books * -2, books.square().sum(2, keepdim=True)), 2).transpose(1, 2)
    wide = torch.cat((wanted, wanted.new_ones(len(wanted), 1)), 1)
    between = 2 * (books[:, None] @ books.transpose(1, 2)) if len(books) > 1 else books
    found = torch.empty(len(wanted), len(books), dtype=torch.int64, device=wanted.device)
    for begin in range(0, len(wanted), CHUNK):
        alone = [wide[begin : begin + CHUNK] @ table for table in tables]
        if len(books) == 1:
            found[begin : begin + CHUNK, 0] = _place(alone[0])
        else:
            found[begin : begin + CHUNK] = _again(alone, between, _beam(alone, between, beam))
    if start is None:
        return found
    worse = error(wanted, books, found) >= error(wanted, books, start)
    return torch.where(worse[:, None], start.long(), found)


def total(books: Tensor, entries: Tensor) -> Tensor:
    """The sum of chosen entries, float32 [n, size]. entries: int32 or int64 [n, books]."""
    out = books[0].index_select(0, entries[:, 0])
    for number in range(1, len(books)):
        out += books[number].index_select(0, entries[:, number])
    return out


def error(wanted: Tensor, books: Tensor, entries: Tensor) -> Tensor:
    """The squared distance of chosen sums from their vectors, float32 [n]."""
    return (wanted - total(books, entries)).square_().sum(1)


def _beam(alone: list[Tensor], between: Tensor, beam: int) -> Tensor:
    """Entries [n, books] by beam search, book after book.

    alone: of each book, the cost [n, entries] of its entries; between: [books, books, entries, entries], what a pair
    costs besides.
    """
    rows, entries = alone[0].shape
    beam = min(beam, entries)
    first = _smallest(alone[0], beam)
    cost, chosen = alone[0].gather(1, first), first[:, :, None]
    for number in range(1, len(alone) - 1):
        costs = _added(alone[number][:, None], between[:, number], chosen).add_(cost[:, :, None]).view(rows, -1)
        place = _smallest(costs, beam)
        cost, parent, entry = costs.gather(1, place), place // entries, place % entries
        chosen = torch.cat((chosen.gather(1, parent[:, :, None].expand(-1, -1, number)), entry[:, :, None]), 2)
    step = max(1, COSTS // (beam * entries))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        cost[part] += _added(alone[-1][part, None], between[:, -1], chosen[part]).amin(2)
    best = chosen[torch.arange(rows, device=chosen.device), cost.argmin(1)]
    last = _place(_added(alone[-1], between[:, -1], best))
    return torch.cat((best, last[:, None]), 1)


def _added(alone: Tensor, between: Tensor, chosen: Tensor) -> Tensor:
    """The cost of each entry of a book [..., entries], with chosen entries [..., m] of the m books before it."""
    flat = chosen.reshape(-1, chosen.shape[-1])
    costs = between[0].index_select(0, flat[:, 0])
    for number in range(1, flat.shape[1]):
        costs += between[number].index_select(0, flat[:, number])
    return costs.view(*chosen.shape[:-1], -1).add_(alone)


def _place(costs: Tensor) -> Tensor:
    """The place of the smallest of costs [n, k], int64 [n]."""
    return _smallest(costs, 1)[:, 0]


def _smallest(costs: Tensor, count: int) -> Tensor:
    """The places of small costs [n, k], int64 [n, count]: the smallest ones if `count` is large, else nearly those.

    Of every eighth cost only the smallest counts: finding this costs a fifth of the time of a partial sort. If `count`
    is 1 it is the smallest.
    """
    rows, width = costs.shape
    columns = width // SECTIONS
    if columns < 4 * count or width % SECTIONS:
        return costs.topk(count, 1, largest=False, sorted=False).indices
    sections = costs.view(rows, SECTIONS, columns).transpose(1, 2)
    least = sections.amin(2)
    column = least.argmin(1, keepdim=True) if count == 1 else least.topk(count, 1, largest=False, sorted=False).indices
    section = sections.gather(1, column[:, :, None].expand(-1, -1, SECTIONS)).argmin(2)
    return section * columns + column


def _again(alone: list[Tensor], between: Tensor, entries: Tensor) -> Tensor:
    """Each entry set to its best value with the others fixed, the last one, which is best already, at the end."""
    for number, costs in enumerate(alone):
        here = costs.clone()
        for other in range(len(alone)):
            if other != number:
                here += between[other, number].index_select(0, entries[:, other])
        entries[:, number] = _place(here)
    return entries
