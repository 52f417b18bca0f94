"""½ · mean (gradient · change)² of the log-likelihood: the divergence to second order, by 32 backward passes.

The gradient is that of a text's log-likelihood with labels of the model's own, so the mean is Δᵀ F Δ with the Fisher
information F (Kunstner et al. 2019, arXiv:1905.12558), errors of a group's weights that cancel included: the whole
matrix, not its diagonal. One pass serves all candidates. A mean of 32 squares is right within about a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.allocation.scores import Scoring
from llmq.allocation.scores._backward import expected_losses


def losses(task: Scoring) -> list[list[float]]:
    """See `llmq.allocation.scores`. Raises LlmqError as `expected_losses` does."""
    return expected_losses(task, "gradient", measure)


def measure(gradients: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
    """(Σ g · Δ)² over all values of all weights [out, in], float64 []."""
    parts = [(g * change).sum(-1).sum(dtype=torch.float64) for g, change in zip(gradients, changes, strict=True)]
    return torch.stack(parts).sum().square()
