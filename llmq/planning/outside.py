"""Linear weights outside the decoder's blocks that the user includes: rounded one at a time, without calibration data.

They are the weights of Linear modules of the model, or, for tensors that only the class in config.json loads, of that
class. Of a tensor that no class loads (a layer for multi-token prediction) nobody says what it is: it is taken for a
linear weight if a quantized weight of some block has the same name within its block and the same shape.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from llmq import formats
from llmq.checkpoint.source import Source, shapes
from llmq.discovery.blocks import FEW_OUTPUTS, Structure
from llmq.discovery.named import Named
from llmq.discovery.names import Links, link
from llmq.discovery.reasons import Kind, Reason
from llmq.discovery.stock import UNPACKABLE, accepts, unpackable
from llmq.discovery.uncalled import uncalled
from llmq.errors import LlmqError
from llmq.methods import Pipeline
from llmq.planning.weights import WeightPlan, matches, schemed
from llmq.recipe.recipe import Recipe

LEFT = (Kind.OUTSIDE, Kind.NOT_LOADED)
CHOSEN = (Kind.BY_USER, Kind.INDIVISIBLE)
NOT_ALIKE = Reason(
    Kind.NOT_LOADED,
    "no class of transformers loads it, and no quantized weight of a block has its name and shape: it is copied "
    "unchanged",
)
UNCALLED = Reason(Kind.NOT_LINEAR, "its module is not called where a run of the model calls what holds it")
KEPT_BY_STOCK = Reason(Kind.NOT_LOADABLE, "stock transformers never packs it in this format")
FEW = Reason(Kind.SMALL, f"it has fewer than {FEW_OUTPUTS} outputs: not all loaders read such weights packed")
AT_FIRST_CALL = (
    "stock transformers unpacks these weights when the whole model is called first: a part that is called before (an "
    "encoder, by `generate`) fails. With one scheme for all, and without --activations, it unpacks them while loading"
)
HEAD = Reason(Kind.OUTSIDE, "it is the output embedding: --include quantizes it, too, if it names it")


def include_outside(
    source: Source,
    recipe: Recipe,
    model: nn.Module,
    structure: Structure,
    links: Links,
    named: Named | None,
    items: list[WeightPlan],
    dtype: torch.dtype,
) -> tuple[list[WeightPlan], list[str]]:
    """The items; those outside the blocks that the recipe includes have a scheme, or the reason why they have none. And
    what to warn of.

    A recipe that names a class includes all linear weights of that class but its output embedding. Raises LlmqError if
    a pattern matches nothing, or nothing that can be quantized so.
    """
    if not recipe.include and recipe.model_class is None:
        return items, []
    whole = recipe.model_class is not None
    loads = [_Loads(model, links)]
    if named is not None:
        loads.append(_Loads(named.model, link(named.model, shapes(source))))
    alike = _of_blocks(items, structure)
    head = head_of(model) if whole else set()
    found = []
    for item in items:
        mine = item.block is None and item.scheme is None and item.reason is not None and item.reason.kind in LEFT
        asked = mine and any(_matches(pattern, item.name) for pattern in recipe.include)
        if not asked and not (mine and whole and item.reason is not None and item.reason.kind is Kind.OUTSIDE):
            found.append(item)
            continue
        reason = _reason(item, loads, alike)
        if reason is None and loads[0].parameter(item) in head and not asked:
            reason = HEAD
        if reason is not None:
            found.append(replace(item, reason=reason))
            continue
        nbytes = source.info(item.tensor).nbytes
        found.append(schemed(replace(item, reason=None, before=nbytes, after=nbytes), recipe, dtype))
    dense = loads_dense(model, found, dtype)
    found = _loadable(found, loads, dense, dtype)
    _check(recipe, found, loads)
    chosen = [item for item in found if item.block is None and item.scheme is not None]
    unread = [item for item in chosen if not any(one.parameter(item) for one in loads)]
    warned = [_unread(unread)] if unread else []
    if whole and not dense and any(hasattr(formats.of(item.scheme), "STOCK_UNPACKS") for item in chosen if item.scheme):
        warned.append(AT_FIRST_CALL)
    return found, warned


def _unread(items: list[WeightPlan]) -> str:
    return (
        f"{items[0].name} and {len(items) - 1} more are quantized, and no class of transformers loads them: only a "
        "server that has such layers does (transformers' use_mtp reads them unquantized)"
    )


def loads_dense(model: nn.Module, items: Iterable[WeightPlan], dtype: torch.dtype) -> bool:
    """Whether stock transformers is told to unpack all weights while it loads them: it can with this model's rules.

    Parts of a model without a decoder's blocks are called alone (an encoder by `generate`), before the whole model, at
    whose first forward all is unpacked otherwise; and its weights' initialization may read any weight.
    """
    schemes = {item.scheme for item in items if item.scheme is not None}
    if any(item.block is not None for item in items) or not formats.loads_dense(schemes):
        return False
    section = formats.dense(formats.config({scheme: ["any"] for scheme in schemes}, [], dtype), schemes)
    return accepts(model, section)


def _loadable(items: list[WeightPlan], loads: list[_Loads], dense: bool, dtype: torch.dtype) -> list[WeightPlan]:
    """The items; those outside the blocks that stock transformers could not load packed without their scheme."""
    schemes = {item.scheme for item in items if item.scheme is not None}
    if not schemes or formats.refusal(schemes):
        return items  # refused later, with the reason
    replaces = formats.replaces_modules(schemes)
    section = formats.config({scheme: ["any"] for scheme in schemes}, [], dtype) if replaces else None
    reasons = [one.unloadable(section, dense) for one in loads]
    found = []
    for item in items:
        mine = [at for at, one in enumerate(loads) if item.block is None and item.scheme and one.parameter(item)]
        why = reasons[mine[0]](loads[mine[0]].parameter(item) or "") if mine else None
        found.append(item if why is None else replace(item, scheme=None, after=item.before, reason=why))
    return found


def _reason(item: WeightPlan, loads: list[_Loads], alike: Mapping[str, set[tuple[int, ...]]]) -> Reason | None:
    """Why a weight outside the blocks cannot be quantized; None if it can."""
    for one in loads:
        parameter = one.parameter(item)
        if parameter is not None:
            return one.reason(parameter)
    parts = item.tensor.split(".")
    known = any(item.shape in alike.get(".".join(parts[at:]), ()) for at in range(1, len(parts)))
    return None if known else NOT_ALIKE


def _matches(pattern: str, name: str) -> bool:
    try:
        return matches(pattern, name)
    except re.error as error:
        raise LlmqError(f"--include {pattern!r} is not a regular expression: {error}") from error


def _check(recipe: Recipe, items: list[WeightPlan], loads: list[_Loads]) -> None:
    """Raises LlmqError if a pattern of --include matches nothing, or nothing outside the blocks that can be quantized.

    What --keep or --ragged leaves alone counts as included.
    """
    outside = [item for item in items if item.block is None]
    for pattern in recipe.include:
        told = f"--include {pattern!r} matches"
        hit = [item for item in items if matches(pattern, item.name)]
        if not hit:
            tied = [names for one in loads for names in one.shared.values()]
            pairs = ((name, names[0]) for names in tied for name in names[1:])
            for name, first in pairs:
                if matches(pattern, name.removesuffix(".weight")):
                    raise LlmqError(f"{told} only {name}, which is shared with {first}: an embedding stays as it is")
            like = f"; outside the decoder's blocks a name looks like {outside[0].name!r}" if outside else ""
            raise LlmqError(f"{told} no weight{like}")
        left = [item for item in hit if item.block is None]
        if not left:
            raise LlmqError(
                f"{told} only weights of the decoder's blocks ({hit[0].name}), which are quantized without it"
            )
        if not any(item.scheme or (item.reason and item.reason.kind in CHOSEN) for item in left):
            # One convolution beside a hundred linear layers says nothing of these.
            usual = Counter(item.reason for item in left).most_common(1)[0][0]
            first = next(item.name for item in left if item.reason == usual)
            raise LlmqError(f"{told} no weight that can be quantized: {first}: {usual}")


def _of_blocks(items: Iterable[WeightPlan], structure: Structure) -> dict[str, set[tuple[int, ...]]]:
    """The names of quantized weights within their blocks, each with its shapes; names as in the checkpoint."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for item in items:
        number = "" if item.block is None else structure.blocks[item.block].name.rpartition(".")[2]
        _, numbered, inside = item.tensor.partition(f".{number}.")
        if item.scheme is not None and number and numbered:
            found.setdefault(inside, set()).add(item.shape)
    return found


def head_of(model: nn.Module) -> set[str]:
    """The parameters of the output embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


@dataclass(frozen=True)
class _Loads:
    """A class that loads the checkpoint: its model, and where its parameters are stored."""

    model: nn.Module
    links: Links

    @cached_property
    def stored(self) -> dict[str, str]:
        """Tensor → the parameter that it is."""
        return {tensor: parameter for parameter, tensor in reversed(self.links.source.items())}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, under every name that they have."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def shared(self) -> dict[int, list[str]]:
        """Parameter's id → its names, if it has several."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        return {key: found for key, found in names.items() if len(found) > 1}

    @cached_property
    def uncalled(self) -> set[str]:
        """Linear modules whose weight is read instead."""
        return uncalled(self.model)

    def unloadable(self, section: dict[str, Any] | None, dense: bool) -> Callable[[str], Reason | None]:
        """A function: one of its parameters → why stock transformers could not load it packed, or None.

        section: the `quantization_config`, if the format's loader replaces modules, and so can be asked which; dense:
        whether weights are unpacked while they are loaded.
        """
        linear = [name for name, module in self.model.named_modules() if type(module) is nn.Linear]
        read = set() if dense or section else unpackable(self.model, linear)
        package = formats.packages().get(formats.method_of(section or {}) or "", "torch")
        # A folder can be written without the package that reads it, which then cannot be asked.
        known = section is not None and importlib.util.find_spec(package) is not None
        taken = Named(self.model, []).converted(section) if section is not None and known else None

        def why(parameter: str) -> Reason | None:
            module = parameter.removesuffix(".weight")
            if taken is not None and module not in taken:
                return KEPT_BY_STOCK
            return UNPACKABLE if module in read else None

        return why

    def parameter(self, item: WeightPlan) -> str | None:
        """The parameter that an item is; None if this class does not load it."""
        return self.stored.get(item.tensor) or (item.tensor if item.tensor in self.parameters else None)

    def reason(self, parameter: str) -> Reason | None:
        """Why one of its parameters cannot be quantized alone; None if it can."""
        if not self.links.tensors(parameter) or self.links.why_apart(parameter):
            return Reason(Kind.NOT_STORED, self.links.why_apart(parameter) or "the checkpoint has no tensor for it")
        owner, _, leaf = parameter.rpartition(".")
        kind = type(self.model.get_submodule(owner))
        # Derived classes compute something else, or are read by the module that holds them.
        if leaf != "weight" or kind is not nn.Linear:
            return Reason(
                Kind.NOT_LINEAR, f"it is the weight of {kind.__name__}, and only plain linear layers are loaded packed"
            )
        if self.parameters[parameter].shape[0] < FEW_OUTPUTS:
            return FEW
        if owner in self.uncalled:
            return UNCALLED
        others = [name for name in self.shared.get(id(self.parameters[parameter]), ()) if name != parameter]
        if others:
            return Reason(Kind.SHARED, f"it is shared with {others[0]}")
        return None


def check_class(recipe: Recipe, pipeline: Pipeline) -> None:
    """Raises LlmqError if the recipe names a class, and methods that calibrate a decoder's blocks."""
    if recipe.model_class is not None and pipeline.calibrated:
        raise LlmqError(
            f"--class {recipe.model_class}: method {'+'.join(recipe.methods)!r} is calibrated with text, block by "
            "block of a model that generates text; a model that another class opens is quantized without calibration: "
            "--method rtn, or --method hqq"
        )


def check_outside(items: list[WeightPlan]) -> None:
    """Raises LlmqError if a weight outside the blocks would need calibration data."""
    for item in items:
        inputs = None if item.block is not None or item.scheme is None else item.scheme.activations
        if inputs is not None and not inputs.dynamic:
            raise LlmqError(
                f"{item.name}: static scales of inputs are calibrated, and outside the decoder's blocks nothing is: "
                "--activations dynamic, or --override 'PATTERN=activations:dynamic' with the pattern of --include"
            )
