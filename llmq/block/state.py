"""A weight of a block while it is quantized, and the rounding of inputs before such weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.inputs import at_products
from llmq.discovery.view import View
from llmq.grids.activations import round_input
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme
from llmq.grids.table import inputs_of


@dataclass
class WeightState:
    """One weight while it is quantized.

    view: its position in the block; value: the weight to quantize, [out, in], in the model's dtype or, after a
    transform, float32; dtype: its dtype in the block; input_id: the same for all weights that are fed by the same
    tensor; statistics: of that input, until they are freed; quantized: the result, or None before; input_scale: float32
    [1] if activations are static; importance: E[x²] of its input channels, float32 [in], if known; rounded: the weight
    rounded to nearest; correction: if it was corrected before it was quantized, how strongly, from 0 to 1, for the
    errors of its input and for those of the residual stream that its output is added to (None: no stream was found);
    error: of the result, relative to the value, once it is in the value's place.
    """

    name: str
    view: View
    scheme: Scheme
    value: Tensor
    dtype: torch.dtype
    input_id: int
    statistics: dict[type[Any], Any] = field(default_factory=dict)
    quantized: Quantized | None = None
    input_scale: Tensor | None = None
    rounded: Tensor | None = None
    importance: Tensor | None = None
    correction: tuple[float, float | None] | None = None
    error: float | None = None
    seconds: float = 0.0

    @property
    def parameter(self) -> str:
        """Its name within the block: the parameter's name if it is a whole parameter."""
        return self.view.name

    def result(self) -> Tensor:
        """The dequantized result as loaders compute it: [out, in], in `dtype`."""
        assert self.quantized is not None
        return self.quantized.dequantize(self.dtype)


@contextmanager
def rounded_inputs(
    module: nn.Module, states: Iterable[WeightState], *, straight_through: bool = False
) -> Iterator[None]:
    """Within the context, round the inputs of all weights of a block whose scheme rounds activations.

    straight_through: gradients ignore the rounding; those of a static scale that requires one are of the clipped inputs
    (PACT: Choi et al. 2018, arXiv:1805.06085, §3), and clipped inputs then get none.
    """

    def rounding(state: WeightState) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            scale = state.input_scale
            rounded = round_input(x, state.scheme, None if scale is None else scale.detach())
            if not straight_through or rounded is x:
                return rounded
            if scale is not None and scale.requires_grad:
                ends = inputs_of(state.scheme.grid)
                x = torch.minimum(torch.maximum(x, (scale * ends.low).to(x)), (scale * ends.high).to(x))
            return x + (rounded - x).detach()

        return take

    states = list(states)
    # Weights without input rounding are included, since they may share a product with one that rounds its input.
    some = any(state.scheme.activations is not None for state in states)
    with at_products(module, {state.view: rounding(state) for state in states} if some else {}):
        yield
