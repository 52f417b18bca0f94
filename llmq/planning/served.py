"""What vLLM needs of a folder beyond what stock transformers does, and experts that transformers cannot read."""

from __future__ import annotations

from collections.abc import Iterable

from llmq import formats
from llmq.errors import LlmqError
from llmq.planning.fused import families
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe


def for_servers(items: Iterable[WeightPlan]) -> bool:
    """Whether some experts have a scheme that stock transformers would read wrong, or not at all."""
    schemes = {item.scheme for item in items if item.expert is not None and item.scheme is not None}
    return any(formats.experts_refusal(scheme) is not None for scheme in schemes)


def uneven(items: Iterable[WeightPlan]) -> list[WeightPlan]:
    """The weights of which a server makes one matrix, whose scales are for blocks of outputs that one weight does not
    fill: vLLM 0.32 refuses all but the last of a dense layer's parts, and any of an expert's.
    """
    return [
        item
        for family in families(items)
        for item in (family if family[0].expert is not None else family[:-1])
        if item.scheme is not None and item.shape[0] % item.scheme.rules.rows
    ]


def told_uneven(found: list[WeightPlan]) -> str:
    """What is wrong with such weights, in words."""
    first = found[0]
    assert first.scheme is not None
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{first.name}{more}: vLLM makes one matrix of it and of others with the same input, and refuses its "
        f"{first.shape[0]} outputs, which are not whole blocks of {first.scheme.rules.rows}"
    )


def check_served(items: list[WeightPlan], recipe: Recipe) -> None:
    """Raises LlmqError if the recipe is for vLLM, and vLLM would refuse the folder."""
    if recipe.loader != "vllm":
        return
    for scheme in sorted({item.scheme for item in items if item.scheme is not None}, key=str):
        if why := formats.vllm.refusal(scheme):
            raise LlmqError(f"{why}: choose another scheme, or leave out --loader vllm")
    if found := uneven(items):
        raise LlmqError(f"{told_uneven(found)}. Ways out: --grid fp8, --keep PATTERN, or leave out --loader vllm")
