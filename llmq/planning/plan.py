"""The plan of a run: every weight's scheme, memory and disk. A run that cannot finish is refused here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llmq import methods
from llmq.checkpoint.source import FolderSource, Source, shapes
from llmq.data.calibration import Windows
from llmq.discovery import blocks as discover
from llmq.discovery.architecture import generates
from llmq.discovery.blocks import Structure
from llmq.discovery.find_pairs import find_in
from llmq.discovery.named import Named, build_as, build_named, named
from llmq.discovery.names import Links, link
from llmq.discovery.pairs import Found
from llmq.discovery.rename import Rules
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning import checks
from llmq.planning.budget import budget, group_bytes
from llmq.planning.cache import check_cache, plan_cache, told_without
from llmq.planning.distill import check_tuning, with_tuning
from llmq.planning.experts import check_experts, check_route, group, plan_experts
from llmq.planning.fused import check_fused
from llmq.planning.lengths import check_length, longest, tokens_to_check
from llmq.planning.memory import check_room, host_memory
from llmq.planning.numbers import check_numbers, main_dtype
from llmq.planning.outside import check_class, check_outside, include_outside
from llmq.planning.parts import group_parts, plan_parts
from llmq.planning.served import check_served
from llmq.planning.stacks import for_llmq_alone
from llmq.planning.tail import set_tail
from llmq.planning.trial import try_quantizer
from llmq.planning.types import BlockPlan as BlockPlan
from llmq.planning.types import Plan as Plan
from llmq.planning.weights import plan_weights
from llmq.recipe.recipe import Recipe
from llmq.spill import Saving


def make_plan(
    source: Source,
    recipe: Recipe,
    windows: Callable[[int | None], Windows],
    *,
    out: Path | None = None,
    tp: int = 1,
    device: str = "cpu",
    scored: bool = False,
    limit: int | None = None,
) -> Plan:
    """Check everything and make the plan. `windows`: returns the calibration windows, given the model's maximum length
    if it is known; `scored`: whether they are needed even if no method does, to score weights on; `limit`: the most
    memory in bytes that the run may take, by default what the machine has.

    Raises LlmqError with all weights that fail a check and the remedies.
    """
    pipeline = methods.make(recipe)
    check_class(recipe, pipeline)
    model, dtype, structure, links = _discover(source, recipe.model_class)
    other, warned = _named(source, model)
    noted, left_out = check_numbers(source, model, links, other)
    warned += noted
    links.unused = [tensor for tensor in links.unused if tensor not in left_out]
    checks.check_sources(source, model, links, recipe.model_class)
    items = plan_weights(source, recipe, model, structure, links, dtype, other)
    items += plan_experts(source, recipe, model, structure, links, dtype)
    items += plan_parts(source, recipe, model, structure, links, dtype)
    items, noted = include_outside(source, recipe, model, structure, links, other, items, dtype)
    warned += noted
    checks.check_patterns(recipe, items)
    checks.check_weights(items, recipe, pipeline.quantizer, tp)
    checks.check_vectors(items, pipeline)
    # Experts first: what servers allow of weights with one input is no way out for them.
    check_experts(items, recipe, for_llmq_alone(items, source.names()))
    check_fused(items, recipe)
    check_served(items, recipe)
    check_cache(recipe, items)
    calibrated = scored or pipeline.calibrated or recipe.cache is not None or any(_static(i.scheme) for i in items)
    warned += check_route(items, recipe, calibrated)
    check_outside(items)
    name, where = "+".join(recipe.methods), torch.device(device)
    try_quantizer([i for i in items if i.block is not None], pipeline.quantizer, name, dtype, where)
    try_quantizer([i for i in items if i.block is None], pipeline.data_free, name, dtype, where)
    found = _windows(source, recipe, model, structure, windows if calibrated else None)
    between = check_length(source.folder, model, structure, found.ids.shape[1]) if structure.blocks else None
    plan = Plan(source, recipe, model, structure, links, dtype, items, found, pipeline, other, set(left_out))
    if pipeline.transforms:
        plan.pairs = find_in(model, structure)
        _check_pairs(plan)
    plan.blocks = _blocks(plan)
    plan.cache = plan_cache(recipe, model, structure, links)
    warned += [] if plan.cache is None else told_without(plan.cache)
    warned += set_tail(plan)
    warned += checks.missing_processor(source)
    plan.warnings = [*source.warnings, *warned, *found.notes, *checks.warnings(items, recipe), *_joined_warnings(plan)]
    tail = check_tuning(plan)
    have = host_memory(limit)
    for plan.saving in Saving:
        plan.budget = budget(plan, device, between, plan.saving)
        if tail is not None:
            plan.budget = with_tuning(plan, tail, plan.budget, between, device)
        if plan.budget.memory <= have:
            break
    check_room(plan.budget, out, device, limit)
    return plan


def pairs_of(folder: Path, trust_remote_code: bool = False) -> dict[str, Found]:
    """The scale pairs in the blocks of a folder's model. Raises LlmqError."""
    source = FolderSource(folder, trust_remote_code, quantized_ok=True)
    model = discover.build(folder, main_dtype(source, source.names()), trust_remote_code)
    return find_in(model, discover.find(model))


def _windows(
    source: Source,
    recipe: Recipe,
    model: nn.Module,
    structure: Structure,
    windows: Callable[[int | None], Windows] | None,
) -> Windows:
    """The calibration windows, or what takes their place where nothing is calibrated (windows is None)."""
    if not structure.blocks:
        return Windows(torch.zeros(1, 1, dtype=torch.long), (), "none needed")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if windows is not None:
        found = windows(longest(model))
    else:
        ids = (torch.arange(tokens_to_check(source.folder, recipe, model, structure)) % vocabulary)[None]
        found = Windows(ids, (), "none needed; one window of consecutive token ids checks each block")
    if int(found.ids.max()) >= vocabulary:
        raise LlmqError(
            f"{source.folder}: the tokenizer gives id {int(found.ids.max())}, but the model has {vocabulary} "
            "embeddings: they are of different models"
        )
    return found


def _discover(source: Source, model_class: str | None = None) -> tuple[nn.Module, torch.dtype, Structure, Links]:
    """The model in the dtype of its blocks' weights, its structure, and the checkpoint's names for its parameters.

    model_class: the class that opens it; no blocks are looked for then.
    """
    dtype = main_dtype(source, source.names())
    if model_class is not None:
        model = build_as(source.folder, model_class, dtype, source.trust_remote_code)
        return model, dtype, Structure("", ()), link(model, shapes(source))
    while True:
        model, links = _linked(source, dtype)
        structure = discover.find(model)
        inside = [f"{b.name}.{w.view.parameter}" for b in structure.blocks for w in b.weights]
        found = main_dtype(source, [links.source[name] for name in inside if name in links.source], dtype)
        if found == dtype:
            return model, dtype, structure, links
        dtype = found


def _linked(source: Source, dtype: torch.dtype) -> tuple[nn.Module, Links]:
    """The model, and the checkpoint's names for its parameters; of the class that config.json names, if that finds all
    of its parameters and the causal class does not."""
    model = discover.build(source.folder, dtype, source.trust_remote_code)
    links = link(model, shapes(source))
    if not _whole(model, links):
        with suppress(LlmqError):
            other = build_named(source.folder, dtype, source.trust_remote_code)
            if other is None or not generates(type(other)) or other.config.is_encoder_decoder:  # type: ignore[union-attr]
                return model, links
            if _whole(other, found := link(other, shapes(source))):
                return other, found
    return model, links


def _whole(model: nn.Module, links: Links) -> bool:
    return all(links.tensors(name) for name, _ in model.named_parameters())


def _named(source: Source, model: nn.Module) -> tuple[Named | None, list[str]]:
    """The class that config.json names, if it is another than the model's; and what to warn of."""
    try:
        return named(source.folder, model, source.names(), source.trust_remote_code), []
    except LlmqError as problem:
        return None, [f"{problem}: what only that class loads is copied, but not checked"]


def _blocks(plan: Plan) -> list[BlockPlan]:
    found = []
    for index, block in enumerate(plan.structure.blocks):
        chosen = [w for w in plan.weights if w.block == index and w.scheme is not None]
        weights = {w.view.name: w for w in chosen if w.view is not None and w.expert is None}
        experts = None if block.experts is None else group(index, block.experts, chosen, plan.pairs.get(block.name))
        parts = group_parts(index, chosen, plan.dtype, partial(group_bytes, plan)) if block.parts else None
        prefix = block.name + "."
        inside = (n for n in plan.links.names() if n.startswith(prefix))
        tensors = {n.removeprefix(prefix): plan.links.tensors(n) for n in inside}
        pairs = plan.pairs[block.name].pairs if block.name in plan.pairs else []
        module = plan.model.get_submodule(block.name)
        full = {w.tensor.removeprefix(prefix) for w in plan.weights if w.tensor in plan.links.slices}
        joined = {n: _joined_name(plan, prefix + n) for n in sorted(full & tensors.keys())}
        found.append(BlockPlan(index, block.name, module, weights, tensors, pairs, experts, joined, parts))
    return found


def _joined_name(plan: Plan, parameter: str) -> str:
    """The name of the one tensor for a parameter that is stored in parts, which every class that loads it understands.

    That of the class that config.json names, whose names the checkpoint's are likelier to be, if the model's own class
    finds it by that name, too; else the model's.
    """
    (first, *_) = plan.links.tensors(parameter)
    other = None if plan.named is None else plan.named.parameters.get(first)
    return other if other is not None and Rules(plan.model).rename(other) == (parameter, None) else parameter


def _joined_warnings(plan: Plan) -> list[str]:
    """A warning if tensors are joined that servers ask for one by one: all but those of experts.

    Servers take whole stacks of experts too, but by the checkpoint's names for what holds them.
    """
    blocks = plan.structure.blocks
    experts = {f"{b.name}.{b.experts.module}." for b in blocks if b.experts is not None}
    experts |= {f"{b.name}.{name}" for b in blocks for parts in b.parts for name in parts.names}
    found = {f"{b.name}.{n}": written for b in plan.blocks for n, written in b.joined.items()}

    def within(parameter: str, written: str) -> bool:
        holder = written.rpartition(".")[0]
        return parameter.startswith(tuple(experts)) and plan.links.tensors(parameter)[0].startswith(f"{holder}.")

    found = {parameter: written for parameter, written in found.items() if not within(parameter, written)}
    if not found:
        return []
    parameter, written = next(iter(found.items()))
    names = plan.links.tensors(parameter)
    told = ", ".join(names) if len(names) < 5 else f"{names[0]} and {len(names) - 1} more"
    more = f", and the like of {len(found) - 1} more" if len(found) > 1 else ""
    return [
        f"{told} are written as one tensor, {written}{more}: stock transformers cannot join them in a quantized "
        "folder; a server that reads them one by one, as vLLM does, will not find them"
    ]


def _check_pairs(plan: Plan) -> None:
    if not any(found.pairs or found.experts[0] for found in plan.pairs.values()):
        every = [r for found in plan.pairs.values() for r in (*found.rejections, *found.experts[1])]
        reasons = sorted({f"{r.source}: {r.reason}" for r in every})
        raise LlmqError(
            f"{plan.source.folder}: method {'+'.join(plan.recipe.methods)!r} moves scales between weights, but this "
            "model has no pair of weights between which scales can move without changing a block's output "
            f"({'; '.join(reasons[:4])}). Leave out the transform: gptq and rtn need none"
        )


def _static(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.activations is not None and not scheme.activations.dynamic
