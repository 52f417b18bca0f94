"""Checks that the class which config.json names would load what is written, as transformers' own loader does it."""

from __future__ import annotations

from llmq import formats
from llmq.checkpoint.sink import Sink
from llmq.discovery.named import Tensors
from llmq.errors import LlmqError
from llmq.planning.plan import Plan


def check_named_class(plan: Plan, section: dict[str, object], sink: Sink | None = None) -> None:
    """Raises LlmqError, naming a parameter, if a class other than the causal one would lack or refuse a parameter of
    the output that it loads from the source.

    section: the output's `quantization_config`. sink: the written tensors; without it, those that the plan says. Warns
    in the plan if the check cannot be made, or if the source lacks parameters already.
    """
    named = plan.named
    if named is None:
        return
    source = {name: (info.dtype, info.shape) for name in plan.source.names() for info in [plan.source.info(name)]}
    try:
        lacking = named.refused(source)
        refused = named.refused(_planned(plan, source) if sink is None else _written(sink), section).beyond(lacking)
    except LlmqError as problem:
        _warn(plan, str(problem))
        return
    if refused:
        first, count = (*refused.missing, *refused.mismatched)[0], len(refused.missing) + len(refused.mismatched)
        raise LlmqError(
            f"{plan.source.folder}: {named.name}, which config.json names, would not load {count} parameters of what "
            f"is written ({first} …), although it loads those of the source: exclude these "
            "weights with --keep, or use another format (--grid)"
        )
    if lacking:
        first = (*lacking.missing, *lacking.mismatched)[0]
        _warn(plan, f"{named.name}, which config.json names, misses parameters of the source already: {first} …")


def _planned(plan: Plan, source: Tensors) -> Tensors:
    """The output's tensors, as the plan's schemes store them."""
    tensors = dict(source)
    for item in plan.weights:
        if item.scheme is not None:
            del tensors[item.tensor]
            for suffix, (dtype, shape) in formats.of(item.scheme).spec(item.shape, item.scheme, plan.dtype).items():
                tensors[f"{item.name}.{suffix}"] = dtype, shape
    return tensors


def _written(sink: Sink) -> Tensors:
    return {name: (info.dtype, info.shape) for unit in sink.done for name, info in sink.infos(unit).items()}


def _warn(plan: Plan, sentence: str) -> None:
    if sentence not in plan.warnings:
        plan.warnings.append(sentence)
