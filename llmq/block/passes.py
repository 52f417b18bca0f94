"""A pass of a block over its batches that collects statistics, and the sums of them over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.discovery.inputs import Takes, collect
from llmq.discovery.view import View

Feeding = Callable[[Any], Takes]
"""What the inputs of a weight are passed to, for a statistic of them."""


class Kept:
    """The inputs of a weight, on the CPU, in order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Keep a copy of x."""
        self.inputs.append(x.detach().to("cpu", copy=True))


def collected(
    module: nn.Module,
    run: Callable[[int], Tensor],
    count: int,
    statistics: Mapping[View, Sequence[Any]],
    feeding: Feeding | None,
    device: torch.device,
) -> list[Tensor]:
    """Run a block on each of its `count` batches; returns the results, and adds to the statistics of each weight's
    input. Those of several ranks are of the batches of all of them.

    feeding: None for the statistics themselves.
    """
    if ranks.size() == 1:
        own = feeding or _itself
        with collect(module, {view: [own(one) for one in those] for view, those in statistics.items()}):
            return [run(index) for index in range(count)]
    results = []
    for hand in ranks.hands(count):
        kept = {view: Kept() for view, those in statistics.items() if those}
        with collect(module, {view: [one] for view, one in kept.items()}):
            results += [run(index) for index in hand]
        for view, one in kept.items():
            for statistic in statistics[view]:
                add(statistic, feeding, one.inputs, device)
            one.inputs.clear()
    return results


def _itself(statistic: Takes) -> Takes:
    return statistic


def add(statistic: Any, feeding: Feeding | None, inputs: Sequence[Tensor], device: torch.device) -> None:
    """Add the inputs that each rank has to a statistic (`block.statistics`), in the order of batches, on all ranks."""

    feeding = feeding or _itself

    def feed(takes: Takes) -> None:
        for x in inputs:
            takes.update(x.to(device))

    if ranks.size() == 1:
        feed(feeding(statistic))
        return
    if not hasattr(statistic, "sums"):
        ranks.relay_state(vars(statistic), partial(feed, feeding(statistic)), device)
        return
    before = statistic.count
    ranks.relay([(one.total, partial(feed, feeding(one))) for one in statistic.sums()])
    statistic.count = before + sum(ranks.everyone(statistic.count - before))
