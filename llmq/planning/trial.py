"""Try the quantizer at plan time, once per scheme, on a small random weight: its result must be storable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.errors import LlmqError, first_line
from llmq.grids.base import Quantized, with_input_scale
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method
from llmq.planning.weights import WeightPlan

ROWS, WIDTH, TOKENS = 8, 256, 64
"""The largest width of the random weight, unless a group is wider; and the tokens of its random input."""


def try_quantizer(
    items: Iterable[WeightPlan], quantizer: Method, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Quantize and store a random weight with every scheme of the items; name: of the method, as in --method.

    dtype: of weights, inputs and scales. Raises LlmqError naming the method, the first weight of a scheme and the
    expected result, if quantizing fails or the scheme's format cannot store the result.
    """
    first: dict[Scheme, WeightPlan] = {}
    for item in items:
        if item.scheme is not None:
            first.setdefault(item.scheme, item)
    for scheme, item in first.items():
        rows, width = item.shape
        group = scheme.group_size or 1
        shape = min(rows, ROWS), min(width, max(group, WIDTH // group * group))
        # The run's own random numbers are not affected.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            try:
                weight, stats = _random(shape, quantizer, dtype, device)
                found = quantizer.quantize(weight, scheme, stats, dtype)
                problem = _problem(found, scheme, shape, dtype)
            except Exception as error:  # a method of another package may fail in any way
                kind = "" if isinstance(error, LlmqError) else f"{type(error).__name__}: "
                problem = kind + first_line(error)
        if problem:
            usual = round_to_nearest(torch.ones(shape), scheme, dtype)
            raise LlmqError(
                f"method {name!r} cannot quantize {item.name}.weight ({scheme}): on a random weight {[*shape]}, "
                f"{problem}. `quantize` must return what rounding to nearest does: {_told(usual)}"
            )


def _random(
    shape: tuple[int, int], quantizer: Method, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[type[Any], Any]]:
    """A weight [out, in], and the statistics of an input of its width that the quantizer asks for."""
    torch.manual_seed(0)
    weight = torch.randn(shape).mul_(0.02).to(device, dtype)
    stats = {need: need(shape[1], device) for need in quantizer.quantize_needs}
    x = torch.randn(1, TOKENS, shape[1]).to(device, dtype)
    for statistic in stats.values():
        statistic.update(x)
    return weight, stats


def _problem(found: Quantized, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> str:
    """What is wrong with a result, in a clause; empty if it can be stored and read back."""
    if found.scheme != scheme:
        return f"it returned the scheme {found.scheme}"
    if not isinstance(found.notes, tuple) or not all(isinstance(note, str) for note in found.notes):
        return f"its notes are not a tuple of sentences but {found.notes!r:.60}"
    value = found.dequantize(dtype)
    if value.shape != shape or value.dtype != dtype:
        return f"its dequantize({dtype}) gave {_tensor(value)}"
    if not bool(value.isfinite().all()):
        return "its dequantize gave values that are not finite"
    if scheme.activations is not None and not scheme.activations.dynamic:
        found = with_input_scale(found, torch.ones(1, device=value.device))
    kind = formats.of(scheme)
    stored, spec = kind.pack(found), kind.spec(shape, scheme, dtype)
    if stored.keys() != spec.keys():
        return f"the tensors to store are {', '.join(stored)}, not {', '.join(spec)}"
    for suffix, tensor in stored.items():
        if tensor.dtype != spec[suffix][0] or not _fits(tensor, spec[suffix][1]):
            wanted = torch.empty(spec[suffix][1], dtype=spec[suffix][0], device="meta")
            return f"{suffix} would be stored as {_tensor(tensor)}, not {_tensor(wanted)}"
    if not torch.equal(kind.unpack(stored, scheme).dequantize(dtype), value):
        return "the stored tensors are read back as a different weight than its dequantize gives"
    return ""


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape; if its length depends on the values, the shape is an upper bound."""
    return tensor.dim() == len(shape) and all(have <= most for have, most in zip(tensor.shape, shape, strict=True))


def _told(value: Quantized) -> str:
    """The type of a result, with the dtypes and shapes of its tensors."""
    assert is_dataclass(value)
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    tensors = [f"{name} {_tensor(tensor)}" for name, tensor in named.items() if isinstance(tensor, Tensor)]
    return f"{type(value).__name__} with {', '.join(tensors)}"


def _tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"
