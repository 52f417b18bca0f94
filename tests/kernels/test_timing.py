"""Measured once per process: what is called, and what is reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq_kernels import timing


@pytest.mark.parametrize(("threads", "name"), [(1, "thread_time"), (2, "perf_counter")])
def test_the_fastest_of_all_weights_but_the_first(threads: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 15.0, 20.0, 23.0, 30.0, 39.0])
    monkeypatch.setattr(timing.time, name, lambda: next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen: list[int] = []

    def product(x: Tensor, weight: Tensor) -> None:
        seen.append(int(weight))

    assert timing.fastest(product, torch.zeros(1), torch.arange(4)) == 3.0
    assert seen == [0, 1, 2, 3]
