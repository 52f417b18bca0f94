"""Checks that the class which config.json names would load what is written, as transformers' own loader does it."""

from __future__ import annotations

import torch

from llmq import formats
from llmq.checkpoint.sink import Sink
from llmq.discovery.named import Named, Refused, Tensors
from llmq.discovery.stock import accepts
from llmq.errors import LlmqError
from llmq.planning.plan import Plan
from llmq.planning.weights import WeightPlan


def check_named_class(plan: Plan, section: dict[str, object], sink: Sink | None = None) -> None:
    """Raises LlmqError, naming a parameter, if a class other than the causal one would lack or refuse a parameter of
    the output that it loads from the source; of a mixture, and where weights outside the blocks are quantized, the
    model's own class is asked if no other is named. Folders that these classes are to refuse are not checked. Also if
    transformers' rules for the model do not go with the format.

    section: the output's `quantization_config`. sink: the written tensors; without it, those that the plan says. Warns
    in the plan if the check cannot be made, or if the source lacks parameters already.
    """
    named = plan.named
    if plan.for_llmq_alone or plan.served:
        return
    for model in (plan.model, *([] if named is None else [named.model])):
        if plan.recipe.loader != "llmq" and not accepts(model, section):
            raise LlmqError(
                f"{plan.source.folder}: stock transformers loads no {type(model).__name__} in this format: its rules "
                "for the model's tensors, which cut one in several, cannot be joined with those of the format. Way "
                "out: --loader llmq, for a folder that llmq.load reads"
            )
    if named is None and (plan.outside or any(info.mixture for info in plan.structure.blocks)):
        named = Named(plan.model, plan.source.names())
    if named is None:
        return
    source = {name: (info.dtype, info.shape) for name in plan.source.names() for info in [plan.source.info(name)]}
    tensors = _planned(plan, source) if sink is None else _written(sink)
    try:
        lacking = named.refused(source)
        refused = _refused(plan, named, tensors, section).beyond(lacking)
    except LlmqError as problem:
        _warn(plan, str(problem))
        return
    if refused:
        first, count = (*refused.missing, *refused.mismatched)[0], len(refused.missing) + len(refused.mismatched)
        way = "exclude these weights with --keep, or use another format (--grid)"
        if any(f"{block.name}.{info.module}." in first for block in plan.structure.blocks for info in block.parts):
            way = (
                "in a quantized folder it makes linear layers of these experts, which are stored in one tensor: "
                "--loader llmq quantizes them, too, for llmq.load alone"
            )
        raise LlmqError(
            f"{plan.source.folder}: {named.name}, which config.json names, would not load {count} parameters of what "
            f"is written ({first} …), although it loads those of the source: {way}"
        )
    if lacking:
        first = (*lacking.missing, *lacking.mismatched)[0]
        _warn(plan, f"{named.name}, which config.json names, misses parameters of the source already: {first} …")


def _refused(plan: Plan, named: Named, tensors: Tensors, section: dict[str, object]) -> Refused:
    """What the class would not accept of the output's tensors. Raises LlmqError if it cannot be asked.

    A loader that reads values is asked in two parts: which weights it takes as quantized, and whether it accepts all
    others, with those of the source in place of the quantized ones.
    """
    try:
        return named.refused(tensors, section)
    except LlmqError as problem:
        quantized = [item for item in plan.weights if item.scheme is not None]
        stored = {name for item in quantized for name in _stored(plan, item)}
        infos = {item.tensor: plan.source.info(item.tensor) for item in quantized}
        plain = {name: told for name, told in tensors.items() if name not in stored}
        try:
            taken = {f"{module}.weight" for module in named.converted(section)}
        except LlmqError:
            raise problem from None
        rest = named.refused(plain | {name: (info.dtype, info.shape) for name, info in infos.items()})
        wrong = taken ^ {named.parameters[name] for name in infos if name in named.parameters}
        return Refused((*rest.missing, *sorted(stored - tensors.keys())), (*rest.mismatched, *sorted(wrong)))


def _planned(plan: Plan, source: Tensors) -> Tensors:
    """The output's tensors, as the plan's schemes store them."""
    tensors = dict(source)
    for item in plan.weights:
        if item.scheme is not None:
            del tensors[item.tensor]
            tensors |= _stored(plan, item)
    for block in plan.blocks:
        for parameter, joined in block.joined.items():
            parts = [tensors.pop(name) for name in block.tensors[parameter]]
            tensors[joined] = parts[0][0], tuple(block.module.get_parameter(parameter).shape)
    return tensors if plan.cache is None else tensors | plan.cache.stored(plan.dtype)


def _stored(plan: Plan, item: WeightPlan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that store a quantized weight: name → (dtype, shape)."""
    assert item.scheme is not None
    spec = formats.of(item.scheme).spec(item.shape, item.scheme, plan.dtype)
    return {f"{item.name}.{suffix}": told for suffix, told in spec.items()}


def _written(sink: Sink) -> Tensors:
    return {name: (info.dtype, info.shape) for unit in sink.done for name, info in sink.infos(unit).items()}


def _warn(plan: Plan, sentence: str) -> None:
    if sentence not in plan.warnings:
        plan.warnings.append(sentence)
