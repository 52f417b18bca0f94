"""The sum of one entry of each codebook that is nearest to a vector, by beam search (AQLM, §3.2).

All is in coordinates in which the error is a plain sum of squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 19
"""Distances that are in memory at a time, so that they stay in the processor's cache."""
SECTIONS = 8


def search(wanted: Tensor, books: Tensor, beam: int, start: Tensor | None = None) -> Tensor:
    """The entries whose sum is near each vector, int64 [n, books].

    wanted: float32 [n, size]; books: float32 [books, entries, size]; beam: sums that are kept from book to book; start:
    entries, integers [n, books], than which the result is never worse. The result is the nearest sum if there is one
    book, or two and `beam` is the number of entries.
    """
    count, entries, _ = books.shape
    norms = books.square().sum(2)
    found = torch.empty(len(wanted), count, dtype=torch.int64, device=wanted.device)
    step = max(1, CHUNK // (entries * (beam if count > 1 else 1)))
    for begin in range(0, len(wanted), step):
        part = wanted[begin : begin + step]
        if count == 1:
            found[begin : begin + step, 0] = torch.addmm(norms[0], part, books[0].t(), alpha=-2).argmin(1)
        else:
            found[begin : begin + step] = _again(part, books, norms, _beam(part, books, norms, beam))
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


def _beam(wanted: Tensor, books: Tensor, norms: Tensor, beam: int) -> Tensor:
    """Entries [n, books] by beam search, book after book."""
    rows, size = wanted.shape
    count, entries, _ = books.shape
    beam = min(beam, entries)
    costs = torch.addmm(norms[0], wanted, books[0].t(), alpha=-2)
    first = _smallest(costs, beam)
    cost, chosen = costs.gather(1, first), first[:, :, None]
    left = wanted[:, None] - books[0][first]
    # One product gives the costs of all sums: −2 · left · entry + 1 · norm + cost · 1.
    costs = costs.new_empty(rows * beam, entries)
    for number in range(1, count):
        one = torch.ones_like(cost)[:, :, None]
        here = torch.cat((left * -2, one, cost[:, :, None]), 2).view(rows * beam, size + 2)
        there = torch.cat((books[number], norms[number][:, None], torch.ones_like(norms[number])[:, None]), 1)
        torch.mm(here, there.t(), out=costs)
        if number == count - 1:
            parent = costs.amin(1).view(rows, beam).argmin(1, keepdim=True)
            place = parent * entries
            entry = costs.view(rows, beam, entries)[torch.arange(rows, device=place.device), parent[:, 0]].argmin(1)
            place += entry[:, None]
        else:
            place = _smallest(costs.view(rows, -1), beam)
            cost = costs.view(rows, -1).gather(1, place)
        parent, entry = place // entries, place % entries
        chosen = torch.cat((chosen.gather(1, parent[:, :, None].expand(-1, -1, number)), entry[:, :, None]), 2)
        left = left.gather(1, parent[:, :, None].expand(-1, -1, size)) - books[number][entry]
    return chosen[:, 0]


def _smallest(costs: Tensor, count: int) -> Tensor:
    """The places of small costs [n, k], int64 [n, count]: the smallest ones if `count` is large, else nearly those.

    Of every eighth cost only the smallest counts: finding this costs a fifth of the time of a partial sort.
    """
    rows, width = costs.shape
    columns = width // SECTIONS
    if columns < 4 * count or width % SECTIONS:
        return costs.topk(count, 1, largest=False, sorted=False).indices
    least, section = costs.view(rows, SECTIONS, columns).min(1)
    column = least.topk(count, 1, largest=False, sorted=False).indices
    return section.gather(1, column) * columns + column


def _again(wanted: Tensor, books: Tensor, norms: Tensor, entries: Tensor) -> Tensor:
    """Each entry set to its best value with the others fixed, the last one, which is best already, at the end."""
    left = wanted - total(books, entries)
    for number, book in enumerate(books):
        left += book[entries[:, number]]
        entries[:, number] = torch.addmm(norms[number], left, book.t(), alpha=-2).argmin(1)
        left -= book[entries[:, number]]
    return entries
