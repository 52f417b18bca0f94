"""The interface of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llmq.block.statistics import Statistic
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme

if TYPE_CHECKING:
    from llmq.block.block import Block

Stats = Mapping[type[Any], Any]
S = TypeVar("S")


@dataclass(frozen=True)
class Tuned:
    """What came of training the whole model.

    before, after: the loss on held-out batches, at the start and at the best step; steps: those that were made; at: the
    best of them, 0 for the start.
    """

    before: float
    after: float
    steps: int
    at: int


class Student(Protocol):
    """The whole quantized model, as a method that tunes it sees it: what can be trained, and a loss.

    The loss is the mean over tokens of KL(unquantized ‖ quantized) of the logits, in nats.
    """

    @property
    def batches(self) -> int:
        """The number of batches of calibration windows."""

    @property
    def windows(self) -> int:
        """The windows of a batch."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, float32 on the CPU: factors on scales, at 1, and relative changes of norms, at 0."""

    def loss(self, batches: Sequence[int]) -> float:
        """The loss over some batches."""

    def descend(self, batches: Sequence[int], step: Callable[[], object]) -> float:
        """The loss over some batches, and its gradient: `step` is called for some of the parameters after the other,
        when only they have a gradient."""

    def save(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
        """Keep the state of training on disk, so that a killed run goes on from there."""

    def load(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the kept state into values and optimizer; returns `about`, None if there is none."""

    def progress(self, text: str) -> None:
        """A step of training is done."""


class Method:
    """A method is a transform, a quantizer, a refinement, or several of these, by the functions that it defines; or it
    tunes the whole model after all blocks are written.

    transform_needs, quantize_needs, refine_needs: the statistics of every weight's input that each of the three needs;
    they may depend on the options. Each set is collected in its own pass over the calibration windows and freed before
    the next one. The inputs are: for `transform`, those of the block at that time; for `quantize`, those of the block
    after all transforms, unrounded; for `refine`, those of the block as quantized so far, with inputs rounded as the
    schemes say, that is, the inputs of the written model. float_target: for a refinement, whether its target is
    computed from the unquantized model's hidden states instead of the quantized model's. logits: for a refinement,
    whether `Block.loss` and `Block.error` of the last block are the divergence of the model's logits, where what
    follows that block can be run. correct: for a quantizer, 'held-out' or 'full' if it shall get weights that are
    corrected for the errors of those quantized before (see `methods._correction`). vectors: for a refinement, whether
    it is for grids that round vectors of weights together, and for these alone. scheme: the method's default scheme, as
    in a recipe.
    """

    transform_needs: tuple[type[Statistic], ...] = ()
    quantize_needs: tuple[type[Statistic], ...] = ()
    refine_needs: tuple[type[Statistic], ...] = ()
    float_target: bool = False
    logits: bool = False
    correct: str = "none"
    vectors: bool = False
    scheme: ClassVar[dict[str, Any]] = {}

    def transform(self, block: Block) -> str | None:
        """Change the block's weights so that its output stays the same but rounding loses less.

        Returns a sentence that says why there is nothing to do in this block, or None. `block.weights` have the
        statistics of `transform_needs`.
        """
        raise NotImplementedError

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        """Quantize one weight [out, in], given in the model's dtype or float32; scales must be in `scale_dtype`.

        Returns a value of the same type, and with tensors of the same dtypes and shapes, as `round_to_nearest` returns
        for the scheme. The plan calls it once per scheme, on a small random weight, and refuses a result that cannot be
        stored. Raises LlmqError if a value is not finite.
        """
        raise NotImplementedError

    def refine(self, block: Block) -> str | None:
        """Improve the block's quantized weights.

        Returns a sentence that says why there is nothing to do in this block, or None. `block.weights` have the
        statistics of `refine_needs`.
        """
        raise NotImplementedError

    def tune(self, student: Student) -> Tuned:
        """Train what can still move in the written model. Afterwards its parameters have the best values."""
        raise NotImplementedError

    def grids(self) -> tuple[str, ...]:
        """The grids that `quantize` supports."""
        return ("int",)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why `quantize` does not support a scheme, in a clause that names it, or None; the plan calls it."""
        grids = self.grids()
        return None if scheme.grid in grids else f"it rounds to the grid {', '.join(grids)!r}, not to {scheme}"

    def apart(self, scheme: Scheme) -> bool:
        """Whether `quantize` may be given some pieces of a weight's rows (`grids.base.pieces`) without the others, with
        the bytes that it returns for all: ranks then share the rows of a weight."""
        return False

    def workspace(self, shape: tuple[int, ...]) -> int:
        """The memory in bytes for a weight of this shape, besides the weight and its statistics."""
        return 2 * math.prod(shape)

    def together(self, shape: tuple[int, ...], statistics: int) -> int:
        """The memory in bytes for a weight of this shape with its statistics, where they may rest in a file.

        statistics: what they take while they do not.
        """
        return statistics + self.workspace(shape)


def range_refusal(range: str | None, scheme: Scheme) -> str | None:
    """Why a scheme does not support a range method, or None."""
    ranges = scheme.rules.ranges
    if range is None or range in ranges:
        return None
    return f"scales of {scheme} are found by {', '.join(ranges)}, not by --range {range}"


def statistic(stats: Stats, kind: type[S]) -> S:
    """The statistic of a kind; raises LlmqError if it was not collected."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        raise LlmqError(f"no {kind.__name__} statistic was collected for the input of this weight")
    return found
