"""The plan's checks of every weight: shapes, patterns, groups, servers. Errors name all weights that fail."""

from __future__ import annotations

import re
from math import prod

from torch import nn

from llmq import formats, ranks
from llmq.checkpoint.source import Source
from llmq.discovery.architecture import not_causal, suggested
from llmq.discovery.named import Named
from llmq.discovery.names import Links
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.methods import Pipeline
from llmq.methods.base import Method
from llmq.planning.fused import apart
from llmq.planning.served import told_uneven, uneven
from llmq.planning.weights import WeightPlan, matches, one_size
from llmq.recipe.recipe import Recipe

SHOWN = 5
"""Weights outside the blocks that a message names."""


def check_sources(source: Source, model: nn.Module, links: Links, model_class: str | None = None) -> None:
    """Raises LlmqError if a parameter has no tensor in the checkpoint, or one of another shape.

    model_class: the class that the user named, if any.
    """
    for name, parameter in model.named_parameters():
        if not links.tensors(name):
            if model_class is not None and _is_whole(source, Named(model, source.names())):
                continue
            reason = links.failed.get(name) or _missing(source, model, links, model_class)
            raise LlmqError(f"{source.folder}: {name} cannot be read: {reason}")
        tensor = links.source.get(name)
        if tensor is None:
            continue
        stored = source.info(tensor).shape
        if stored != tuple(parameter.shape):
            raise LlmqError(
                f"{source.folder}: {tensor} is {[*stored]} in the checkpoint but {[*parameter.shape]} by config.json: "
                "they are of different models"
            )


def _missing(source: Source, model: nn.Module, links: Links, model_class: str | None) -> str:
    """Why a parameter may have no tensor, with the way out."""
    better = suggested(source.config)
    if model_class is not None and better not in (None, model_class):
        return (
            f"the checkpoint has no tensor for it, and {model_class} ({type(model).__name__}) would fill it with "
            f"random numbers: --class {better} opens what config.json names"
        )
    if told := not_causal(source.config):
        return f"the checkpoint has no tensor for it; {told}"
    left = f"; it has {links.unused[0]}, for example, which this model does not" if links.unused else ""
    return (
        f"the checkpoint has no tensor for it: it is incomplete, or of another model{left}: download all of its files "
        "again, with its own config.json"
    )


def _is_whole(source: Source, named: Named) -> bool:
    """Whether the class that config.json names finds all of its weights."""
    infos = {name: source.info(name) for name in source.names()}
    try:
        return not named.refused({name: (info.dtype, info.shape) for name, info in infos.items()})
    except LlmqError:
        return False


def missing_processor(source: Source) -> list[str]:
    """A warning if the model takes images or sounds, and nothing in the folder says how they are prepared."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

    classes = {
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
    }
    named = source.config.get("architectures") or []
    files = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
    if not classes & {*named} or source.config.get("model_type") not in PROCESSOR_MAPPING_NAMES:
        return []
    if any((source.folder / file).is_file() for file in files):
        return []
    return [
        f"{source.folder} has no processor ({' or '.join(files)}): the quantized model answers text, but no server can "
        "prepare images or sounds for it; copy that file from the model that it was made from into both folders"
    ]


def check_patterns(recipe: Recipe, items: list[WeightPlan]) -> None:
    """Raises LlmqError if --keep or --override matches no weight, or only weights that are not quantized."""
    names = [i.name for i in items]
    # A stack that was kept by the names which its experts would have.
    kept = [i.module for i in items if i.by_user]
    for option, patterns in (("--keep", recipe.keep), ("--override", [p for p, _ in recipe.overrides])):
        for pattern in patterns:
            try:
                hit = [n for n in (*names, *kept) if matches(pattern, n)]
            except re.error as error:
                raise LlmqError(f"{option} {pattern!r} is not a regular expression: {error}") from error
            if not hit:
                raise LlmqError(f"{option} {pattern!r} matches no weight; a weight's name looks like {names[0]!r}")
    for pattern, _ in recipe.overrides:
        if not any(matches(pattern, i.name) and (i.scheme or i.by_user) for i in items):
            one = next(i for i in items if matches(pattern, i.name))
            raise LlmqError(
                f"--override {pattern!r} matches only weights that are not quantized: {one.name} ({one.reason})"
            )


def check_vectors(items: list[WeightPlan], pipeline: Pipeline) -> None:
    """Raises LlmqError if a method that treats weights one by one is to work on a grid that rounds several together, or
    the other way round."""
    schemes = {i.scheme for i in items if i.scheme is not None}
    others = [method for method in pipeline.all if method is not pipeline.quantizer]
    for together in (True, False):
        mine = sorted(str(scheme) for scheme in schemes if bool(scheme.rules.vector_code) is together)
        listed = ", ".join(type(method).__name__.lower() for method in others if method.vectors is not together)
        if mine and listed and together:
            raise LlmqError(
                f"{listed}: it is for weights that are rounded one by one, and {mine[0]} rounds several together: "
                "leave it out"
            )
        if mine and listed:
            raise LlmqError(
                f"{listed}: it is for weights that are rounded several together, and {mine[0]} rounds them one by one: "
                "leave it out, or quantize by --method vq"
            )


def check_weights(items: list[WeightPlan], recipe: Recipe, quantizer: Method, tp: int) -> None:
    """Raises LlmqError if nothing is quantized, or a scheme does not suit its format, weight, method or server."""
    chosen = [i for i in items if i.scheme is not None]
    if not chosen:
        inside = [i for i in items if i.block is not None] or items
        reasons = sorted({i.reason.sentence for i in inside if i.reason})
        raise LlmqError("there is nothing to quantize: " + "; ".join(reasons))
    schemes = {i.scheme for i in chosen if i.scheme is not None}
    refusal = formats.refusal(schemes)
    if refusal:
        raise LlmqError(refusal)
    for scheme in sorted({i.scheme for i in chosen if i.scheme and i.block is not None}, key=str):
        reason = quantizer.refusal(scheme)
        if reason:
            raise LlmqError(
                f"method {'+'.join(recipe.methods)!r}: {reason}; choose another scheme, or --method rtn, which "
                "supports "
                "every grid"
            )
    ragged = [i for i in chosen if i.scheme and i.scheme.step and i.shape[1] % i.scheme.step]
    if ragged:
        other = "--ragged smaller (a smaller group there), --ragged channel (one scale per row there), "
        raise LlmqError(
            f"the group size does not divide the width of {_name_all(ragged)}. Ways out: --group-size with a divisor, "
            + (other if any(i.scheme and not one_size(i.scheme) for i in ragged) else "")
            + "--ragged keep (do not quantize them), or --keep PATTERN"
        )
    torn = [i for i in chosen if tp > 1 and not _splits(i, tp)]
    if torn:
        raise LlmqError(
            f"--tp {tp}: a server cannot split {_name_all(torn)}. "
            "Ways out: a smaller --group-size, --group-size channel, --keep PATTERN, or fewer parts"
        )


def _splits(item: WeightPlan, tp: int) -> bool:
    assert item.scheme is not None
    rows, width = item.shape
    return formats.of(item.scheme).splits((rows, width), item.scheme, tp, item.row_parallel)


def _name_all(items: list[WeightPlan]) -> str:
    """All weights by name; names that differ only in the block's or expert's number are merged, with lists of both."""
    outside = [f"{i.name} [{i.shape[0]}, {i.shape[1]}] ({i.scheme})" for i in items if i.block is None]
    experts: dict[tuple[str, tuple[int, ...], Scheme | None], dict[int, list[int]]] = {}
    for item in items:
        if item.block is None:
            continue
        name = item.name.replace(f".{item.block}.", ".*.", 1)
        if item.expert is not None:
            name = ".*.".join(name.rsplit(f".{item.expert}.", 1))
        found = experts.setdefault((name, item.shape, item.scheme), {}).setdefault(item.block, [])
        found += [] if item.expert is None else [item.expert]
    alike: dict[tuple[str, tuple[int, ...], Scheme | None, str], list[int]] = {}
    for (name, shape, scheme), blocks in experts.items():
        for block, mine in blocks.items():
            alike.setdefault((name, shape, scheme, _ranges(mine)), []).append(block)
    inside = [
        f"{name} [{shape[0]}, {shape[1]}] ({scheme}) in blocks {_ranges(blocks)}"
        + (f" (experts {mine})" if mine else "")
        for (name, shape, scheme, mine), blocks in alike.items()
    ]
    return ", ".join([*inside, *outside[:SHOWN], *([f"{len(outside) - SHOWN} more"] if len(outside) > SHOWN else [])])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → '0–2, 5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def check_ranks(*, chosen: bool) -> None:
    """Raises LlmqError if several ranks are to do what only one process can.

    chosen: whether the bits of each weight are chosen already.
    """
    if ranks.size() > 1 and not chosen:
        raise LlmqError(
            "a budget for the bits is shared out by one process: quantize by one process (without --ranks or "
            "torchrun), or give --recipe the recipe.yaml that such a run has written"
        )


def warnings(items: list[WeightPlan], recipe: Recipe) -> list[str]:
    """Warnings for the user, a sentence each."""
    warnings = []
    inside = [i for i in items if i.block is not None]
    share = sum(prod(i.shape) for i in inside if i.scheme) / max(1, sum(prod(i.shape) for i in inside))
    if inside and share < 0.9:
        warnings.append(f"only {share:.0%} of the blocks' weights are quantized; `llmq plan` says why")
    schemes = {i.scheme for i in items if i.scheme is not None}
    if found := uneven(items):
        warnings.append(f"{told_uneven(found)}; transformers reads it")
    wanted = [recipe.scheme.rules, *(scheme.rules for _, scheme in recipe.overrides if scheme is not None)]
    for other, span in sorted({(grid.ragged, grid.span) for grid in wanted if grid.ragged}):
        odd = [i for i in items if i.scheme and i.scheme.grid == other and i.shape[1] % span]
        if odd:
            warnings.append(f"blocks of {span} inputs do not divide the width of {_name_all(odd)}: rounded as {other}")
    warnings += [loader.sentence for loader in formats.loaders(schemes, bool(apart(items))) if loader.warn]
    return warnings
