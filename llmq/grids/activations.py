"""Rounding of a weight's input while the model runs (W8A8, W4A4), as compressed-tensors does it.

The rounding is simulated as in compressed-tensors 0.20 (quantization/utils/helpers.py, lifecycle/forward_helpers.py),
which stock transformers runs: values are rounded to the grid and dequantized, every step in the input's own dtype. Its
int8 scale is the largest magnitude / 127.5, so the largest value rounds to 127 or, below 0, to −128; vLLM's kernels
divide by 127, in float32. All grids have a code for 0 and no zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.base import rounding_of
from llmq.grids.power_scales import power_above
from llmq.grids.scheme import Scheme
from llmq.grids.table import Inputs, find, inputs_of


def round_per_token(x: Tensor, grid: str) -> Tensor:
    """Round every token with its own scale: the token's largest magnitude over the grid's.

    x: any float [..., width]; grid: 'int' (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError for a grid
    without input rounding. The result equals compressed-tensors' for inputs with three axes, as in decoders; for two
    axes it would take one scale for all tokens, unlike its own servers.
    """
    rounding = rounding_of(find(grid))
    return round_static(x, rounding.input_scale(x.abs().amax(-1, keepdim=True), inputs_of(grid).divisor, None), grid)


def round_static(x: Tensor, scale: Tensor, grid: str) -> Tensor:
    """Round values with a given scale; values beyond the grid's ends are clipped.

    x: any float [..., width]; scale: any positive float that broadcasts to x, converted to x's dtype first; grid: 'int'
    (8 bits) or 'fp8'. Returns x's shape and dtype. Raises LlmqError for a grid without input rounding.
    """
    inputs_of(grid)
    scale = scale.to(x.dtype)
    return rounding_of(find(grid)).round_input(x / scale).mul_(scale)


def round_groups(x: Tensor, grid: str, static: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
    """Round groups of a token's inputs, each with its own scale.

    x: any float [..., width]; grid: of the weights; static: the scale of the groups' scales, float32 [1], if the grid's
    inputs have one; inputs: other inputs than the grid's usual ones. Returns x's shape and dtype. Raises LlmqError for
    a grid without input rounding, or groups that do not divide the width.
    """
    inputs = inputs or inputs_of(grid)
    rounding = rounding_of(find(inputs.grid or grid))
    parts = x.reshape(*x.shape[:-1], -1, inputs.group_size or x.shape[-1])
    scale = rounding.input_scale(parts.abs().amax(-1, keepdim=True), inputs.divisor, static)
    # The scale of nvfp4 is float32, and so is all that is computed with it.
    return rounding.round_input(parts / scale).mul_(scale).flatten(-2).to(x.dtype)


def round_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """A weight's input [..., in] rounded as its scheme says: with scales of its own, or with `scale` if given."""
    inputs = scheme.inputs
    if inputs is None:
        return x
    scale = None if scale is None else stored_scale(scale, scheme).to(x.device)
    if inputs.group_size is not None:
        return round_groups(x, scheme.grid, scale, inputs)
    grid = inputs.grid or scheme.grid
    return round_per_token(x, grid) if scale is None else round_static(x, scale, grid)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """A static scale, float32, as it is stored beside a weight: the next power of two, if the scheme wants those."""
    return scale if scheme.scales == "free" else power_above(scale)


def cache_scale(largest: Tensor, grid: str) -> Tensor:
    """The scale of each of some parts of a cache: 1 where a part is 0 everywhere. largest: magnitudes, any shape;
    returns float32 of that shape."""
    top = largest.to(torch.float32)
    return torch.where(top > 0, top / inputs_of(grid).divisor, 1.0)


def static_scale(largest: Tensor | float, grid: str) -> Tensor:
    """The scale at which `largest` is the grid's largest magnitude, float32 [1]; 1 if `largest` is 0."""
    return cache_scale(torch.as_tensor(largest, dtype=torch.float32).reshape(1), grid)
