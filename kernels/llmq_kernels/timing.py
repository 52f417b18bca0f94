"""What is faster on this processor, measured once per process: thresholds from one processor are wrong on another."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

PROBE = (2048, 4096)
"""Outputs and inputs of a weight that is timed."""
COPIES = 4
"""Of the weight, read in turn: as a model's weights, the next one is then not in a core's own caches."""


def fastest(product: Callable[[Tensor, Tensor], object], x: Tensor, weights: Tensor) -> float:
    """Seconds of the fastest product of x with one of the weights, the first not counted.

    With one thread they are of the processor: other processes then change little.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for weight in weights:
        began = clock()
        product(x, weight)
        seconds.append(clock() - began)
    return min(seconds[1:])
