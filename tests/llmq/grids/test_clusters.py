"""k-means: a fixed point of the two steps, by brute force; always the same; no empty cluster is left."""

from __future__ import annotations

import torch

from llmq.grids.clusters import assign, cluster


def test_assignments_and_centres_fit_each_other() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(300, 3, generator=draw), torch.rand(300, 3, generator=draw) + 0.1
    centres = cluster(vectors, weights, 5)
    assert torch.equal(centres, cluster(vectors, weights, 5))
    costs = ((vectors[:, None].double() - centres.double()).square() * weights[:, None]).sum(2)
    found, cost = assign(vectors, weights, centres)
    assert torch.allclose(cost.double(), costs.amin(1), atol=1e-4)
    assert torch.allclose(costs.gather(1, found[:, None])[:, 0], costs.amin(1), atol=1e-4)
    assert len(found.unique()) == 5
    # Better than the best of many random choices of vectors as centres.
    for _ in range(20):
        chosen = vectors[torch.randperm(300, generator=draw)[:5]]
        assert float(assign(vectors, weights, chosen)[1].sum()) > float(cost.sum())


def test_separate_heaps_are_found_and_few_vectors_are_met_exactly() -> None:
    heaps = torch.arange(8.0).repeat(50)[:, None] * 10 + torch.rand(400, 2, generator=torch.Generator().manual_seed(1))
    assert float(assign(heaps, torch.ones(400, 2), cluster(heaps, torch.ones(400, 2), 8))[1].max()) < 2
    few = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    assert float(assign(few, torch.ones(6, 4), cluster(few, torch.ones(6, 4), 16))[1].max()) < 1e-4
