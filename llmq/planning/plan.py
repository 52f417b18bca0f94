"""The plan of a run: every weight's scheme, memory and disk. A run that cannot finish is refused here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import formats, methods
from llmq.checkpoint.source import FolderSource, Source, shapes
from llmq.data.calibration import Windows
from llmq.discovery import blocks as discover
from llmq.discovery.blocks import Structure
from llmq.discovery.find_pairs import find_in
from llmq.discovery.named import Named, named
from llmq.discovery.names import Links, link
from llmq.discovery.pairs import Found, Pair
from llmq.discovery.rename import Rules
from llmq.errors import LlmqError
from llmq.formats.base import Loader
from llmq.formats.stacks import ALONE
from llmq.grids.scheme import Scheme
from llmq.methods import Pipeline
from llmq.planning import checks
from llmq.planning.experts import ExpertsPlan, check_experts, check_route, group, plan_experts
from llmq.planning.fused import apart, check_fused
from llmq.planning.lengths import check_length, longest, tokens_to_check
from llmq.planning.memory import ROUTED_COPIES, ROUTED_EXTRA, Budget, Load, check_room, predict
from llmq.planning.numbers import check_numbers, main_dtype
from llmq.planning.parts import PartsPlan, codes, group_parts, plan_parts
from llmq.planning.stacks import for_llmq_alone
from llmq.planning.trial import try_quantizer
from llmq.planning.weights import WeightPlan, plan_weights
from llmq.recipe.recipe import Recipe

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block.

    index: of the block; name, module: its path in the model, and its module; weights: those to quantize, by
    `View.name`, in order; tensors: parameter or buffer within the block → the tensors of the checkpoint that it is made
    of; pairs: the block's scale pairs, if a method uses them; experts: its routed experts, if they are quantized, whose
    weights are not in `weights`; joined: parameters stored in parts that are written as one tensor → its name there;
    parts: as `experts`, but of those that cannot be run one at a time.
    """

    index: int
    name: str
    module: nn.Module
    weights: dict[str, WeightPlan]
    tensors: dict[str, tuple[str, ...]]
    pairs: list[Pair]
    experts: ExpertsPlan | None = None
    joined: dict[str, str] = field(default_factory=dict)
    parts: PartsPlan | None = None

    @property
    def units(self) -> list[str]:
        """The units that it is written as: groups of experts, and last the rest of the block."""
        groups = [group for plan in (self.experts, self.parts) if plan is not None for group in plan.groups]
        return [*(group.unit for group in groups), self.unit]

    @property
    def streamed(self) -> set[str]:
        """The parameters within the block of which only one expert's entry is in memory."""
        info = None if self.experts is None else self.experts.info
        return set() if info is None else {f"{info.module}.{name}" for name in info.parameters}

    @property
    def stored(self) -> set[str]:
        """All of its tensors of the checkpoint."""
        return {name for found in self.tensors.values() for name in found}

    @property
    def unit(self) -> str:
        """The block's name in the sink's journal."""
        return f"block {self.index}"


@dataclass
class Plan:
    """Everything that is decided before the work starts.

    model: of the causal class; named: the class that config.json names, if that is another one; dtype: of the blocks'
    weights, in which the model runs and scales are stored; left_out: tensors of the checkpoint that are not written.
    """

    source: Source
    recipe: Recipe
    model: nn.Module
    structure: Structure
    links: Links
    dtype: torch.dtype
    weights: list[WeightPlan]
    calibration: Windows
    pipeline: Pipeline
    named: Named | None = None
    left_out: set[str] = field(default_factory=set)
    pairs: dict[str, Found] = field(default_factory=dict)
    blocks: list[BlockPlan] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(0, 0, 0))
    warnings: list[str] = field(default_factory=list)

    @property
    def schemes(self) -> set[Scheme]:
        """The schemes of all quantized weights."""
        return {i.scheme for i in self.weights if i.scheme is not None}

    @property
    def loaders(self) -> list[Loader]:
        """What is known of the tools that can read the folder."""
        if self.for_llmq_alone:
            return [ALONE]
        return formats.loaders(self.schemes, bool(apart(self.weights)))

    @property
    def for_llmq_alone(self) -> bool:
        """Whether only `llmq.load` can read the folder: stacks of experts are packed one by one."""
        return for_llmq_alone(self.weights, self.source.names())

    @property
    def ids(self) -> Tensor:
        """The calibration windows, int64 [samples, tokens]."""
        return self.calibration.ids

    @property
    def batch(self) -> int:
        """Windows per forward pass."""
        return max(1, BATCH_TOKENS // self.ids.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero points included."""
        chosen = [i for i in self.weights if i.scheme is not None]
        return 8 * sum(i.after for i in chosen) / max(1, sum(prod(i.shape) for i in chosen))


def make_plan(
    source: Source,
    recipe: Recipe,
    windows: Callable[[int | None], Windows],
    *,
    out: Path | None = None,
    tp: int = 1,
    device: str = "cpu",
) -> Plan:
    """Check everything and make the plan. `windows`: returns the calibration windows, given the model's maximum length
    if it is known.

    Raises LlmqError with all weights that fail a check and the remedies.
    """
    model, dtype, structure, links = _discover(source)
    other, warned = _named(source, model)
    pipeline = methods.make(recipe)
    noted, left_out = check_numbers(source, model, links, other)
    warned += noted
    links.unused = [tensor for tensor in links.unused if tensor not in left_out]
    checks.check_sources(source, model, links, other)
    items = plan_weights(source, recipe, model, structure, links, dtype, other)
    items += plan_experts(source, recipe, model, structure, links, dtype)
    items += plan_parts(source, recipe, model, structure, links, dtype)
    checks.check_patterns(recipe, items)
    checks.check_weights(items, recipe, pipeline.quantizer, tp)
    # Experts first: what servers allow of weights with one input is no way out for them.
    check_experts(items, recipe, for_llmq_alone(items, source.names()))
    check_fused(items, recipe)
    calibrated = pipeline.calibrated or any(_static(i.scheme) for i in items)
    warned += check_route(items, recipe, calibrated)
    try_quantizer(items, pipeline.quantizer, "+".join(recipe.methods), dtype, torch.device(device))
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if calibrated:
        found = windows(longest(model))
    else:
        ids = (torch.arange(tokens_to_check(source.folder, recipe, model, structure)) % vocabulary)[None]
        found = Windows(ids, (), "none needed; one window of consecutive token ids checks each block")
    if int(found.ids.max()) >= vocabulary:
        raise LlmqError(
            f"{source.folder}: the tokenizer gives id {int(found.ids.max())}, but the model has {vocabulary} "
            "embeddings: they are of different models"
        )
    between = check_length(source.folder, model, structure, found.ids.shape[1])
    plan = Plan(source, recipe, model, structure, links, dtype, items, found, pipeline, other, set(left_out))
    if pipeline.transforms:
        plan.pairs = find_in(model, structure)
        _check_pairs(plan)
    plan.blocks = _blocks(plan)
    warned += checks.missing_processor(source)
    plan.warnings = [*source.warnings, *warned, *found.notes, *checks.warnings(items), *_joined_warnings(plan)]
    plan.budget = _budget(plan, device, between)
    check_room(plan.budget, out, device)
    return plan


def pairs_of(folder: Path, trust_remote_code: bool = False) -> dict[str, Found]:
    """The scale pairs in the blocks of a folder's model. Raises LlmqError."""
    source = FolderSource(folder, trust_remote_code, quantized_ok=True)
    model = discover.build(folder, main_dtype(source, source.names()), trust_remote_code)
    return find_in(model, discover.find(model))


def _discover(source: Source) -> tuple[nn.Module, torch.dtype, Structure, Links]:
    """The model in the dtype of its blocks' weights, its structure, and the checkpoint's names for its parameters."""
    dtype = main_dtype(source, source.names())
    while True:
        model = discover.build(source.folder, dtype, source.trust_remote_code)
        structure, links = discover.find(model), link(model, shapes(source))
        inside = [f"{b.name}.{w.view.parameter}" for b in structure.blocks for w in b.weights]
        found = main_dtype(source, [links.source[name] for name in inside if name in links.source], dtype)
        if found == dtype:
            return model, dtype, structure, links
        dtype = found


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
        parts = group_parts(index, chosen, plan.dtype, partial(_group_bytes, plan)) if block.parts else None
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


def _budget(plan: Plan, device: str, between: int | None = None) -> Budget:
    """between: the bytes of what goes from block to block for one window, if known."""
    size = plan.dtype.itemsize
    loads, inside = [], []
    for block in plan.blocks:
        inside += [f"{block.name}.{n}" for n, _ in block.module.named_parameters()]
        mine = list(block.weights.values())
        numbers = sum(prod(i.shape) for i in mine)
        # Transforms use float32 copies besides the block, and both results are kept until the better one is known.
        copies = numbers * ((8 if plan.pipeline.transforms else 0) + (2 if plan.pipeline.refiners else 0))
        dense = sum(p.numel() for n, p in block.module.named_parameters() if n not in block.streamed)
        load = Load(
            dense * size + copies,
            sum(i.after for i in mine),
            _statistics(plan, mine),
            max((method.workspace(i.shape) for method in plan.pipeline.all for i in mine), default=0),
        )
        loads.append(load if block.parts is None else load.and_experts(_parts_load(plan, block)))
        if block.experts is not None:
            # What enters the unquantized block's experts is kept from the start.
            entering = plan.ids.numel() * (block.experts.info.call.width * size + 16 * block.experts.info.call.chosen)
            loads[-1] = replace(load, block=load.block + entering)
            loads.append(load.then(_experts_load(plan, block.experts)))
    saved = sum(i.before - i.after for i in plan.weights if i.scheme is not None)
    samples, seqlen = plan.ids.shape
    return predict(
        plan.model,
        inside,
        plan.structure.outside,
        plan.dtype,
        (samples, seqlen),
        plan.batch,
        loads,
        plan.source.total_bytes - saved,
        device,
        chains=4 if plan.pipeline.float_target else 3,
        between=between,
        stacks=[f"{b.name}.{name}" for b in plan.blocks if b.parts is not None for name in b.parts.parameters],
    )


def _statistics(plan: Plan, items: list[WeightPlan]) -> int:
    """The bytes of the statistics of some weights: those of one pass are freed before the next pass."""
    widths = {item.input_id: item.shape[1] for item in items}
    passes = (sum(need.nbytes(width) for need in needs for width in widths.values()) for needs in plan.pipeline.passes)
    return max(passes, default=0)


def _group_bytes(plan: Plan, items: list[WeightPlan]) -> int:
    """What some weights need while they are quantized together: statistics, and what refinements learn at once."""
    learned = sum(method.workspace(item.shape) for method in plan.pipeline.refiners for item in items)
    return _statistics(plan, items) + learned


def _parts_load(plan: Plan, block: BlockPlan) -> Load:
    """What the experts of a block that are in memory with it need beside it: the results and statistics of a group."""
    assert block.parts is not None
    groups = [list(block.parts.of(group).values()) for group in block.parts.groups]
    mine = list(block.parts.weights.values())
    windows = min(plan.batch, len(plan.ids))
    rows = windows * plan.ids.shape[1] * max(info.copies for info in plan.structure.blocks[block.index].parts)
    # A refinement's trial has a rounded copy of every parameter that holds some of the group's weights, and a gradient.
    copies = 2 * codes(mine) * plan.dtype.itemsize if plan.pipeline.refiners else 0
    return Load(
        copies,
        0,
        max(_group_bytes(plan, group) for group in groups),
        # Codes are there once the pass for the statistics is over.
        max(codes(group) for group in groups)
        + max(method.workspace(i.shape) for method in plan.pipeline.all for i in mine),
        int(ROUTED_COPIES * rows * max(max(i.shape) for i in mine) * max(2, plan.dtype.itemsize)) + ROUTED_EXTRA,
    )


def _experts_load(plan: Plan, experts: ExpertsPlan) -> Load:
    """What a block's experts need beside the rest of it: one of them, a group's result, and what enters all of them."""
    size, width = plan.dtype.itemsize, experts.info.call.width
    largest = max(experts.weights, key=lambda mine: sum(prod(i.shape) for i in mine.values())).values()
    numbers = sum(prod(i.shape) for i in largest)
    copies = 4 * numbers * (2 if plan.pipeline.transforms else 1)
    tokens = plan.ids.numel()
    # Rows, choices and weights, and the sums of outputs, of the unquantized and of the quantized block.
    routed = 2 * tokens * (width * (size + 4) + 16 * experts.info.call.chosen)
    if plan.recipe.route == "all":
        # An expert's target and its output for all tokens.
        routed += 2 * tokens * width * size
    kinds = dict.fromkeys(need for needs in plan.pipeline.passes for need in needs)
    own = _statistics(plan, list(largest))
    return Load(
        numbers * size + copies + routed,
        max(sum(i.after for mine in experts.weights[g.begin : g.end] for i in mine.values()) for g in experts.groups),
        sum(kind.nbytes(width) for kind in kinds) + 2 * own,
        max((method.workspace(i.shape) for method in plan.pipeline.all for i in largest), default=0),
    )
