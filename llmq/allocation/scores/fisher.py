"""½ · Σ mean gradient² · change² of the log-likelihood: the diagonal of the Fisher information, by 32 backward passes.

A loss that grows with its curvature times the squared change is that of HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852),
which has one mean curvature for a layer; that of each weight is SqueezeLLM's (Kim et al. 2023, arXiv:2306.07629). Here
labels are the model's own (Kunstner et al. 2019, arXiv:1905.12558). It has less noise than the score `gradient`, but
takes errors of different weights as unrelated, while GPTQ makes them cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.allocation.scores import Scoring
from llmq.allocation.scores._backward import expected_losses


def losses(task: Scoring) -> list[list[float]]:
    """See `llmq.allocation.scores`. Raises LlmqError as `expected_losses` does."""
    return expected_losses(task, "fisher", measure)


def measure(gradients: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
    """Σ g² · Δ² over all values of all weights [out, in], float64 []."""
    parts = [
        (g * change).square().sum(-1).sum(dtype=torch.float64) for g, change in zip(gradients, changes, strict=True)
    ]
    return torch.stack(parts).sum()
