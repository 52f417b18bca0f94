"""Methods: one file and one class each. A method sees weights, statistics and a block; never a model.

Authors of methods in other packages import everything that they need from here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from llmq.block.block import Block
from llmq.block.statistics import Hessian, Inputs, MeanSquare, Statistic
from llmq.errors import LlmqError, first_line
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method, Stats, Student, Tuned, statistic
from llmq.recipe import catalog
from llmq.recipe.recipe import Recipe
from llmq.validate import check_type

__all__ = [
    "Block",
    "Hessian",
    "Inputs",
    "LlmqError",
    "MeanSquare",
    "Method",
    "Pipeline",
    "Quantized",
    "QuantizedWeight",
    "Scheme",
    "Statistic",
    "Stats",
    "Student",
    "Tuned",
    "find",
    "make",
    "round_to_nearest",
    "statistic",
]

DEFAULT_QUANTIZER = "rtn"


@dataclass(frozen=True)
class Pipeline:
    """A recipe's methods, ready to run, in order: transforms, the quantizer, refinements, and what tunes the whole."""

    transforms: tuple[Method, ...]
    quantizer: Method
    refiners: tuple[Method, ...]
    tuner: Method | None = None

    @property
    def all(self) -> tuple[Method, ...]:
        """Every method."""
        return (*self.transforms, self.quantizer, *self.refiners, *([] if self.tuner is None else [self.tuner]))

    @property
    def data_free(self) -> Method:
        """What quantizes a weight that there is no calibration data for: the quantizer, or rtn if that needs some."""
        return find(DEFAULT_QUANTIZER)() if self.quantizer.quantize_needs else self.quantizer

    @property
    def how_without(self) -> str:
        """What `data_free` does, in words."""
        name = type(self.data_free).__name__.lower()
        return "rounded to nearest" if name == DEFAULT_QUANTIZER else f"quantized by {name}"

    @property
    def calibrated(self) -> bool:
        """Whether any method needs calibration data."""
        return bool(self.transforms or self.refiners or self.tuner or self.quantizer.quantize_needs or self.corrects)

    @property
    def passes(self) -> tuple[tuple[type[Statistic], ...], ...]:
        """The statistics of each pass over the calibration windows, in order; they are freed before the next pass."""
        found = [method.transform_needs for method in self.transforms]
        found += [self.quantizer.quantize_needs, *(method.refine_needs for method in self.refiners)]
        return tuple(needs for needs in found if needs)

    @property
    def first(self) -> tuple[type[Statistic], ...]:
        """The statistics of a block's first pass: the quantizer's, if there is no transform."""
        return () if self.transforms else self.quantizer.quantize_needs

    @property
    def corrects(self) -> bool:
        """Whether weights are corrected, before they are rounded, for errors of earlier ones."""
        return self.quantizer.correct != "none"

    @property
    def float_target(self) -> bool:
        """Whether the unquantized model's hidden states are needed, from which a block's target is then computed."""
        return self.corrects or any(method.float_target for method in self.refiners)


def find(name: str) -> type[Method]:
    """The method's class, as the catalog describes it.

    Raises LlmqError if there is no method of that name, or its package cannot be imported.
    """
    catalog.check(name)
    outside = catalog.entry_point(name)
    if outside is None:
        own: type[Method] = getattr(importlib.import_module(f"{__name__}.{name}"), catalog.describe(name).kind)
        return own
    try:
        kind = outside.load()
    except Exception as error:  # code of another package may fail in any way
        raise LlmqError(f"method {name!r}: {outside.value} cannot be imported: {first_line(error)}") from error
    if inspect.ismodule(kind):
        kind = getattr(kind, catalog.describe(name).kind, None)
    if not (inspect.isclass(kind) and issubclass(kind, Method)):
        raise LlmqError(f"method {name!r}: {outside.value} is not a class derived from llmq.methods.Method")
    return kind


def make(recipe: Recipe) -> Pipeline:
    """The recipe's methods with their options. Raises LlmqError for an invalid order or option."""
    kinds = [find(name) for name in recipe.methods]
    _check_options(recipe, kinds)
    roles = [_roles(kind) for kind in kinds]
    quantizers = [i for i, role in enumerate(roles) if "quantize" in role]
    if len(set(recipe.methods)) < len(recipe.methods):
        raise LlmqError(f"method {'+'.join(recipe.methods)!r}: a method is listed twice")
    # A method that can transform and quantize only transforms if another method quantizes.
    only = [i for i in quantizers if "transform" not in roles[i]]
    if len(only) > 1:
        raise LlmqError(
            f"method {'+'.join(recipe.methods)!r}: {recipe.methods[only[0]]} and {recipe.methods[only[1]]} both "
            "quantize; choose one"
        )
    chosen = next(iter(only or quantizers[-1:]), None)
    transforms = [i for i, role in enumerate(roles) if "transform" in role]
    refiners = [i for i, role in enumerate(roles) if "refine" in role and i not in transforms and i != chosen]
    tuners = [i for i, role in enumerate(roles) if "tune" in role and i not in (*transforms, *refiners, chosen)]
    if len(tuners) > 1:
        raise LlmqError(f"method {'+'.join(recipe.methods)!r}: at most one method tunes the whole model; choose one")
    order = [*transforms, *([] if chosen is None or chosen in transforms else [chosen]), *refiners, *tuners]
    if order != list(range(len(kinds))):
        raise LlmqError(
            f"method {'+'.join(recipe.methods)!r}: transforms come first, then the quantizer, then refinements, and "
            f"last what tunes the whole model: write {'+'.join(recipe.methods[i] for i in order)!r}"
        )
    built = [_build(kind, recipe) for kind in kinds]
    if chosen is not None:
        quantizer = built[chosen]
    else:
        # A refinement calibrates anyway, so its starting point can use the range 'weighted'; so does what tunes.
        usual = {"range": "weighted"} if refiners or tuners else {}
        quantizer = _build(find(DEFAULT_QUANTIZER), replace(recipe, options={**usual, **recipe.options}))
    tuner = built[tuners[0]] if tuners else None
    return Pipeline(tuple(built[i] for i in transforms), quantizer, tuple(built[i] for i in refiners), tuner)


def _roles(kind: type[Method]) -> set[str]:
    return {
        role for role in ("transform", "quantize", "refine", "tune") if getattr(kind, role) is not getattr(Method, role)
    }


def _build(kind: type[Method], recipe: Recipe) -> Method:
    taken = _taken(kind)
    options = {**recipe.options, "seed": recipe.seed}
    return kind(**{name: value for name, value in options.items() if name in taken})


def _taken(kind: type[Method]) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _check_options(recipe: Recipe, kinds: Iterable[type[Method]]) -> None:
    kinds = [*kinds]
    if not any("quantize" in _roles(kind) for kind in kinds):
        kinds.append(find(DEFAULT_QUANTIZER))
    for name, value in recipe.options.items():
        takers = [kind for kind in kinds if name in _taken(kind)]
        if not takers:
            having = [known.name for known in catalog.known()[0] if any(o.name == name for o in known.options)]
            raise LlmqError(
                f"{name} {value!r} (--{name.replace('_', '-')}) is not an option of method "
                f"{'+'.join(recipe.methods)!r}: "
                + (f"leave it out, or choose a method that has it ({', '.join(having)})" if having else _known(kinds))
            )
        for kind in takers:
            check_type(name.replace("_", "-"), value, get_type_hints(kind.__init__).get(name, Any))


def _known(kinds: list[type[Method]]) -> str:
    return "its options are " + (", ".join(sorted(set().union(*map(_taken, kinds)))) or "none")
