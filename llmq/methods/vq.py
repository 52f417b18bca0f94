"""VQ: vectors of weights as sums of codebook entries (AQLM, GPTVQ): the arithmetic is in `llmq.numerics.vq`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llmq.block.statistics import Hessian
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme
from llmq.methods._correction import HOW
from llmq.methods.base import Method, Stats, statistic
from llmq.numerics.vq import solve
from llmq.validate import check_choice


class VQ(Method):
    """Vector quantization in AQLM's format: a code selects 4, 8 or 16 weights of a row from learned codebooks.

    damping: fraction of the Hessian's mean diagonal that is added to its diagonal; rounds: how often codes, scales and
    codebooks are improved at most, after they were chosen; beam: how many sums of entries are kept from codebook to
    codebook while a code is searched; correct: whether weights are corrected first for the errors of earlier ones, as
    gptq's are.
    """

    scheme: ClassVar[dict[str, Any]] = {"grid": "vq", "bits": 2, "group_size": 8}
    quantize_needs = (Hessian,)

    def __init__(
        self,
        *,
        damping: float = 0.05,
        rounds: int = 4,
        beam: int = 8,
        correct: Literal["held-out", "full", "none"] = "held-out",
    ) -> None:
        check_choice("correct", correct, HOW)
        if not 0 < damping < 1:
            raise LlmqError(f"damping must lie between 0 and 1, not {damping!r}")
        if rounds < 0 or not 1 <= beam <= 256:
            raise LlmqError(f"rounds must be 0 or more, and beam from 1 to 256, not {rounds!r} and {beam!r}")
        self.damping, self.rounds, self.beam, self.correct = damping, rounds, beam, correct

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """See `Method.quantize`."""
        return solve(
            weight,
            statistic(stats, Hessian).total,
            scheme,
            damping=self.damping,
            rounds=self.rounds,
            beam=self.beam,
            scale_dtype=scale_dtype,
        )

    def grids(self) -> tuple[str, ...]:
        """See `Method.grids`."""
        return ("vq",)

    def workspace(self, shape: tuple[int, ...]) -> int:
        """The factor and a [in, in] matrix while factoring, five of the weight's size, float32; two sets of codes."""
        rows, width = shape
        return 8 * width * width + 22 * rows * width
