"""k-means of short vectors whose entries have weights: the first codebooks of vector quantization.

The start is that of k-means++ (Arthur and Vassilvitskii 2007), with a generator of its own: the same vectors always
give the same codebook. A cluster that loses all its vectors gets the one that costs the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 1 << 15
"""How many vectors are enough for a codebook."""
ROUNDS = 10
CHUNK = 1 << 10
SEED = 0


def cluster(vectors: Tensor, weights: Tensor, count: int) -> Tensor:
    """The centres of `count` clusters with little Σ weights · (vector − nearest centre)², float32 [count, size].

    vectors: float32 [n, size]; weights: float32 like vectors, 0 or more. With fewer vectors than clusters, some
    centres are equal. It takes time and memory by the number of vectors: SAMPLED are enough.
    """
    centres = _spread(vectors, weights, count)
    for _ in range(ROUNDS):
        found, cost = assign(vectors, weights, centres)
        mass = torch.zeros_like(centres).index_add_(0, found, weights)
        total = torch.zeros_like(centres).index_add_(0, found, vectors * weights)
        moved = torch.where(mass > 0, total / mass.clamp_min(torch.finfo(torch.float32).tiny), centres)
        lost = (torch.bincount(found, minlength=count) == 0).nonzero().flatten()
        if len(lost):
            worst = torch.argsort(cost, descending=True, stable=True)[: len(lost)]
            moved[lost[: len(worst)]] = vectors[worst]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def assign(vectors: Tensor, weights: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each vector, int64 [n], and its cost Σ weights · (vector − centre)², float32 [n]."""
    found, cost = [], []
    for start in range(0, len(vectors), CHUNK):
        part, by = vectors[start : start + CHUNK], weights[start : start + CHUNK]
        best = torch.addmm(by @ centres.square().t(), part * by, centres.t(), alpha=-2).min(1)
        found.append(best.indices)
        cost.append(best.values.add_((part.square() * by).sum(1)))
    return torch.cat(found), torch.cat(cost)


def _spread(vectors: Tensor, weights: Tensor, count: int) -> Tensor:
    """The start of k-means++: each further centre is a vector, drawn by its cost so far."""
    draws = torch.rand(count, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).tolist()
    cost = (vectors.square() * weights).sum(1)
    centres = torch.empty(count, vectors.shape[1], device=vectors.device)
    for number, draw in enumerate(draws):
        sums = cost.double().cumsum(0)
        chosen = int(torch.searchsorted(sums, sums[-1:] * draw, right=True).clamp_(max=len(vectors) - 1))
        centres[number] = vectors[chosen]
        distance = ((vectors - centres[number]).square() * weights).sum(1)
        cost = torch.minimum(cost, distance) if number else distance
    return centres
