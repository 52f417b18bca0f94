"""The sum of one entry of each codebook that is nearest to a vector, by beam search (AQLM, §3.2).

All is in coordinates in which the error is a plain sum of squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 19
"""Distances that are in memory at a time, so that they stay in the processor's cache."""
PASSES = 2
"""How often each entry is chosen again, with the others fixed, after the beam search."""


def search(wanted: Tensor, books: Tensor, beam: int, start: Tensor | None = None) -> Tensor:
    """The entries whose sum is near each vector, int64 [n, books].

    wanted: float32 [n, size]; books: float32 [books, entries, size]; beam: sums that are kept from book to book; start:
    entries, int64 [n, books], than which the result is never worse. With one book the result is the nearest entry.
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
            best = _again(part, books, norms, _beam(part, books, norms, beam))
            found[begin : begin + step] = best
    if start is None:
        return found
    worse = error(wanted, books, found) >= error(wanted, books, start)
    return torch.where(worse[:, None], start, found)


def total(books: Tensor, entries: Tensor) -> Tensor:
    """The sum of chosen entries, float32 [n, size]. entries: int64 [n, books]."""
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
    cost, first = torch.addmm(norms[0], wanted, books[0].t(), alpha=-2).topk(beam, 1, largest=False)
    left = wanted[:, None] - books[0][first]
    chosen = first[:, :, None]
    for number in range(1, count):
        keep = 1 if number == count - 1 else beam
        products = (left.view(-1, size) @ books[number].t()).view(rows, beam, entries)
        costs = products.mul_(-2).add_(norms[number]).add_(cost[:, :, None]).view(rows, -1)
        cost, place = costs.topk(keep, 1, largest=False) if keep > 1 else costs.min(1, keepdim=True)
        parent, entry = place // entries, place % entries
        chosen = torch.cat((chosen.gather(1, parent[:, :, None].expand(-1, -1, number)), entry[:, :, None]), 2)
        left = left.gather(1, parent[:, :, None].expand(-1, -1, size)) - books[number][entry]
    return chosen[:, 0]


def _again(wanted: Tensor, books: Tensor, norms: Tensor, entries: Tensor) -> Tensor:
    """Each entry set to its best value with the others fixed, a few times."""
    left = wanted - total(books, entries)
    for _ in range(PASSES):
        for number, book in enumerate(books):
            left += book[entries[:, number]]
            entries[:, number] = torch.addmm(norms[number], left, book.t(), alpha=-2).argmin(1)
            left -= book[entries[:, number]]
    return entries
