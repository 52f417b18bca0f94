"""The memory and disk that a plan needs: what each block loads, and what is predicted from that."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llmq import ranks
from llmq.planning.experts import ExpertsPlan
from llmq.planning.memory import REST_BYTES, ROUTED_COPIES, ROUTED_EXTRA, Budget, Load, hidden_width, predict
from llmq.planning.parts import codes
from llmq.planning.stages import corrected, in_files, resting, taken
from llmq.planning.tail import tail_bytes
from llmq.planning.types import BlockPlan, Plan
from llmq.planning.weights import WeightPlan
from llmq.spill import Saving

KEPT = 2**30
"""The most bytes of what weights show that a rank keeps, until it is its turn to add to the sums of all ranks."""


def budget(plan: Plan, device: str, between: int | None = None, saving: Saving = Saving.NONE) -> Budget:
    """The peaks of a plan's run. between: the bytes of what goes from block to block for one window, if known; saving:
    what is done to need less memory."""
    size = plan.dtype.itemsize
    loads, inside = [], []
    for block in plan.blocks:
        inside += [f"{block.name}.{n}" for n, _ in block.module.named_parameters()]
        mine = list(block.weights.values())
        numbers = sum(prod(i.shape) for i in mine)
        # Transforms use float32 copies besides the block, and both results are kept until the better one is known.
        copies = numbers * ((8 if plan.pipeline.transforms else 0) + (2 if plan.pipeline.refiners else 0))
        # The weights that are rounded already are there beside the unrounded ones.
        copies += numbers * size if plan.pipeline.corrects else 0
        dense = sum(p.numel() for n, p in block.module.named_parameters() if n not in block.streamed)
        packed = sum(i.after for i in mine)
        statistics = _statistics(plan, mine, saving, corrected=plan.pipeline.corrects)
        # Before it is packed the rounded block has the codes of all weights, and one weight is there twice.
        settling = codes(mine) + size * max((prod(i.shape) for i in mine), default=0) - packed - statistics
        load = Load(dense * size + copies, packed, statistics, max(_workspace(plan, mine, device), settling))
        if mine and not (plan.pipeline.transforms or plan.pipeline.refiners):
            if saving >= Saving.PASSES and device == "cpu":
                load = resting(plan, mine, load, dense * size)
            elif plan.pipeline.corrects:
                load = corrected(plan, mine, load, saving, device)
        loads.append(load if block.parts is None else load.and_experts(_parts_load(plan, block)))
        if block.experts is not None:
            # What enters the unquantized block's experts is kept from the start.
            entering = plan.ids.numel() * (block.experts.info.call.width * size + 16 * block.experts.info.call.chosen)
            loads[-1] = replace(load, block=load.block + entering)
            loads.append(load.then(_experts_load(plan, block.experts, device)))
    if plan.tail is not None:
        held, work = tail_bytes(plan)
        loads[-1] = replace(loads[-1], block=loads[-1].block + held, workspace=loads[-1].workspace + work)
    outside = [*plan.outside.values()]
    if outside:
        loads.append(_outside_load(plan, outside))
    saved = sum(i.before - i.after for i in plan.weights if i.scheme is not None)
    samples, seqlen = plan.ids.shape
    # Each rank has its share of the windows, and keeps some of what their weights show.
    hands = -(-len(plan.batches) // ranks.size())
    kept = min(max(KEPT, kept_bytes(plan)), hands * kept_bytes(plan)) if ranks.size() > 1 else 0
    found = predict(
        plan.model,
        inside,
        plan.structure.outside,
        plan.dtype,
        (min(samples, hands * plan.batch), seqlen),
        plan.batch,
        loads,
        plan.source.total_bytes - saved,
        device,
        chains=4 if plan.pipeline.float_target else 3,
        between=between,
        saving=saving,
        stacks=[f"{b.name}.{name}" for b in plan.blocks if b.parts is not None for name in b.parts.parameters],
    )
    files = max((in_files(plan, [*block.weights.values()], saving) for block in plan.blocks), default=0)
    return replace(found, memory=found.memory + kept, files=found.files + files)


def _outside_load(plan: Plan, items: list[WeightPlan]) -> Load:
    """What the largest weight outside the blocks needs, beside what is written as one unit with it."""
    quantizer = plan.pipeline.data_free
    largest = 0 if plan.blocks else max(plan.source.info(name).nbytes for name in plan.source.names())
    return Load(
        max(prod(i.shape) for i in items) * (plan.dtype.itemsize + 4),
        min(max(REST_BYTES, largest), plan.source.total_bytes),
        0,
        max(quantizer.workspace(i.shape) for i in items),
    )


def _statistics(plan: Plan, items: list[WeightPlan], saving: Saving = Saving.NONE, *, corrected: bool = False) -> int:
    """The bytes of the statistics of some weights: those of one pass are freed before the next pass.

    corrected: whether the weights are corrected, so that the quantizer's statistics are not collected in such a pass.
    """
    widths = {item.input_id: item.shape[1] for item in items}
    quantizer, found = plan.pipeline.quantizer.quantize_needs, [0]
    for needs in plan.pipeline.passes:
        sizes = [sum(need.nbytes(width) for need in needs) for width in widths.values()]
        if needs == quantizer:
            sizes = [] if corrected else [max(sizes, default=0)] if saving >= Saving.PASSES else sizes
        found.append(sum(sizes))
    return max(found)


def kept_bytes(plan: Plan) -> int:
    """The bytes that a rank keeps of a batch until it is added to the sums of all ranks: the inputs of all weights of a
    block, or of a stage of those that are corrected in order, how far they are apart, and the streams."""
    size, tokens, most = plan.dtype.itemsize, plan.batch * plan.ids.shape[1], 1
    for block in plan.blocks:
        widths = {item.input_id: item.shape[1] for item in block.weights.values()}
        outs = dict.fromkeys(widths, 0)
        for item in block.weights.values():
            outs[item.input_id] += item.shape[0] if item.shape[0] == hidden_width(plan.model) else 0
        stages = [(size + 4) * width + 4 * outs[number] for number, width in widths.items()]
        most = max(most, size * sum(widths.values()), *(stages if plan.pipeline.corrects else [0]))
    return tokens * most


def _workspace(plan: Plan, items: list[WeightPlan], device: str) -> int:
    """What methods need for weights that are quantized one at a time, and refinements for all of them at once."""
    one = max((taken(method, item, device) for method in plan.pipeline.all for item in items), default=0)
    together = (sum(method.workspace(item.shape) for item in items) for method in plan.pipeline.refiners)
    return max(one, *together, 0)


def group_bytes(plan: Plan, items: list[WeightPlan]) -> int:
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
        max(group_bytes(plan, group) for group in groups),
        # Codes are there once the pass for the statistics is over.
        max(codes(group) for group in groups)
        + max(method.workspace(i.shape) for method in plan.pipeline.all for i in mine),
        int(ROUTED_COPIES * rows * max(max(i.shape) for i in mine) * max(2, plan.dtype.itemsize)) + ROUTED_EXTRA,
    )


def _experts_load(plan: Plan, experts: ExpertsPlan, device: str) -> Load:
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
        _workspace(plan, list(largest), device),
    )
