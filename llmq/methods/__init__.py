"""Quantizers: one file and one class each. A method sees weights, statistics and its options; never a model."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmq.errors import LlmqError
from llmq.methods.base import Method
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Recipe, Scheme, nearest

OPTIONS = ("range", "act_order", "damping", "sweeps")
"""The fields of a Recipe that go to the method, where it takes them."""


def names() -> list[str]:
    """The methods there are: the files beside this one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def find(name: str) -> type[Method]:
    """The method class in the file of that name. Raises LlmqError, with the nearest name, where there is none."""
    if name not in names():
        raise LlmqError(f"method {name!r} is not known: choose from {', '.join(names())}{nearest(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return next(c for c in own if issubclass(c, Method))


def make(recipe: Recipe) -> Method:
    """The recipe's quantizer. Raises LlmqError where the recipe gives an option that it does not take."""
    if len(recipe.methods) != 1:
        raise LlmqError(f"method {'+'.join(recipe.methods)!r}: one method at a time is supported")
    kind = find(recipe.methods[0])
    taken = inspect.signature(kind).parameters
    options: dict[str, Any] = {k: getattr(recipe, k) for k in OPTIONS}
    # What is left on auto, or not given, is the method's own default: what measures best for it.
    given = {k: v for k, v in options.items() if v not in (None, "auto")}
    for name in given:
        if name not in taken:
            fitting = [other for other in names() if name in inspect.signature(find(other)).parameters]
            raise LlmqError(
                f"{name} {given[name]!r} (--{name.replace('_', '-')}) is no option of method {recipe.methods[0]!r}: "
                f"leave it out, or choose a method that has it ({', '.join(fitting)})"
            )
    return kind(**given)


def needs(recipe: Recipe) -> tuple[type[Any], ...]:
    """The statistics of a weight's input that the recipe's quantizer asks for."""
    return make(recipe).needs


def quantize(recipe: Recipe, weight: Tensor, scheme: Scheme, statistics: Mapping[type[Any], Any]) -> QuantizedWeight:
    """Quantize one weight [out, in] of any float dtype; scales come in the weight's dtype. Raises LlmqError."""
    return make(recipe).quantize(weight, scheme, statistics)


def workspace(recipe: Recipe, shape: tuple[int, ...]) -> int:
    """Bytes the quantizer needs beside the weight and its statistics."""
    return make(recipe).workspace(shape)
