"""A block with routed experts: the block without them, and its experts one at a time, are quantized after each other.

The block runs up to its experts' call; what enters it (rows, choices, weights) is kept for all calibration windows.
Every expert is then a block of its own: the rows that chose it are its inputs. Its outputs, times their weights, are
summed into each batch's output of the experts' module, with which the block is run again. One expert is in memory.

Experts that cannot be run one at a time are parts of a block that is in memory whole (`quantize_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq import ranks
from llmq.block.block import Block
from llmq.block.expert import CHUNK_ROWS, OTHERS, ExpertBlock
from llmq.block.group import GroupBlock
from llmq.block.passes import add
from llmq.block.state import WeightState, rounded_inputs
from llmq.block.statistics import Statistic
from llmq.discovery.calls import Call, States
from llmq.discovery.experts import Expert, Routed, instead
from llmq.errors import LlmqError
from llmq.machine import give_back
from llmq.methods import Pipeline
from llmq.planning.experts import ExpertGroup
from llmq.planning.plan import BlockPlan
from llmq.streaming import steps
from llmq.streaming.block_io import BlockIO, pack_weights
from llmq.streaming.block_reader import states_of
from llmq.watch import Watch

IDLE = "no calibration token chose this expert"
STOOD_IN = f"{IDLE}: other tokens stood in"


class _Reached(Exception):
    """Ends a block's run at its experts' call."""


@contextmanager
def without_experts(block: BlockPlan) -> Iterator[None]:
    """Within the context, a block with streamed experts runs as if each of them returned its input."""
    if block.experts is None:
        yield
        return
    with instead(block.module, block.experts.info, lambda routed: routed.rows.clone()):
        yield


def entering(block: BlockPlan, hidden: list[Tensor], calls: list[Call], device: torch.device) -> list[Routed]:
    """What enters the experts of a filled block for each batch, on the CPU; of the batches of all ranks."""
    assert block.experts is not None
    found: list[Routed] = []

    def keep(routed: Routed) -> Tensor:
        found.append(Routed(*(t.detach().to("cpu") for t in (routed.rows, routed.choices, routed.weights))))
        raise _Reached

    with torch.no_grad(), instead(block.module, block.experts.info, keep):
        for states, call in zip(hidden, calls, strict=True):
            with suppress(_Reached):
                call.run(block.module, states.to(device))
    return ranks.gather(found)


def outputs(
    block: BlockPlan, hidden: list[Tensor], calls: list[Call], sums: Sequence[Tensor], device: torch.device
) -> list[States]:
    """What the block hands to later ones for each batch, on the CPU, with the experts' output given: sums per batch,
    of all ranks, float32."""
    assert block.experts is not None
    found = []
    mine = [sums[batch] for batch in ranks.mine(len(sums))]
    for states, call, total in zip(hidden, calls, mine, strict=True):

        def give(routed: Routed, total: Tensor = total) -> Tensor:
            return total.to(routed.rows)

        with torch.no_grad(), instead(block.module, block.experts.info, give):
            found.append(call.step(block.module, states, device))
    return found


class Sums:
    """The experts' summed output for each batch: float32 [tokens, width]."""

    def __init__(self, routed: list[Routed]) -> None:
        self.routed = routed
        self.totals = [torch.zeros(r.rows.shape, dtype=torch.float32) for r in routed]

    def rows(self, expert: int) -> Tensor:
        """The rows of all batches that chose an expert: [n, width]."""
        return torch.cat([r.rows[torch.where(r.choices == expert)[0]] for r in self.routed])

    def everyone(self) -> list[Tensor]:
        """The rows of all batches, whoever chose them, in chunks: [n, width]."""
        return [part for r in self.routed for part in torch.split(r.rows, CHUNK_ROWS)]

    def weights(self, expert: int) -> Tensor:
        """The routing weights of these rows: [n]."""
        return torch.cat([r.weights[r.choices == expert] for r in self.routed])

    def add(self, expert: int, outputs: Tensor) -> None:
        """Add an expert's outputs [n, width] for its rows, times their weights."""
        begin = 0
        for routed, total in zip(self.routed, self.totals, strict=True):
            token, place = torch.where(routed.choices == expert)
            mine = outputs[begin : begin + len(token)].float()
            total.index_add_(0, token, mine * routed.weights[token, place].float()[:, None])
            begin += len(token)

    def others(self, expert: int) -> Tensor:
        """Up to 128 rows that did not choose an expert, evenly spread over all batches: [m, width]."""
        found = []
        for routed, share in zip(self.routed, torch.arange(OTHERS).tensor_split(len(self.routed)), strict=True):
            free = torch.where(~(routed.choices == expert).any(1))[0]
            places = torch.linspace(0, len(free) - 1, min(len(share), len(free))).long()
            found.append(routed.rows[free[places]])
        return torch.cat(found)


def run(expert: Expert, rows: Tensor, device: torch.device) -> Tensor:
    """What an expert computes of rows [n, width], on the CPU."""
    with torch.no_grad():
        parts = [expert(part.to(device)).to(rows) for part in torch.split(rows, CHUNK_ROWS)]
    return torch.cat(parts)


def quantize_rest(
    io: BlockIO, planned: BlockPlan, block: Block, before: list[Routed], watch: Watch
) -> tuple[list[States], list[Tensor], float]:
    """Quantize the experts of a block whose other weights are quantized, rounded in place and packed.

    before: what entered its experts when it was unquantized, for the inputs of its target. Returns what it hands on,
    the unquantized experts' output for `before`, and the agreement of the two blocks' routing.
    """
    states = block.weights.values()
    with rounded_inputs(block.module, states):
        given = entering(planned, block.inputs, block.calls, io.device)
    wanted, sums = quantize_experts(io, planned, before, given, watch)
    with rounded_inputs(block.module, states):
        output = outputs(planned, block.inputs, block.calls, sums, io.device)
    return output, wanted, agreement(before, given)


def agreement(before: Sequence[Routed], given: Sequence[Routed]) -> float:
    """The share of the choices in `before` that are also made in `given` for the same token, in any order: 0 to 1.

    before: of the unquantized block, for the inputs of its target; given: of the block with all but its experts
    quantized, for its own inputs. Both are the quantized model's hidden states, so that only this block's weights make
    a difference; for methods with a float target, `before` is of the unquantized model's, and earlier blocks count too.
    """
    same = [(b.choices[:, :, None] == g.choices[:, None, :]).any(2) for b, g in zip(before, given, strict=True)]
    return sum(int(found.sum()) for found in same) / max(1, sum(found.numel() for found in same))


def unrounded(io: BlockIO, block: BlockPlan, routed: list[Routed]) -> list[Tensor]:
    """The output of the unquantized experts for what enters them, read one after the other."""
    assert block.experts is not None
    sums = Sums(routed)

    def work(expert: int) -> Tensor:
        return run(io.fill_expert(block, expert), sums.rows(expert), io.device)

    for expert, output in ranks.spread(range(block.experts.info.count), work):
        sums.add(expert, output)
    return sums.totals


def restored(io: BlockIO, block: BlockPlan, routed: list[Routed]) -> list[Tensor]:
    """The output of the written experts for what enters them, read back one after the other."""
    assert block.experts is not None
    sums = Sums(routed)
    for expert, output in ranks.spread(range(block.experts.info.count), partial(_run_written, io, block, sums)):
        sums.add(expert, output)
    return sums.totals


def _run_written(io: BlockIO, block: BlockPlan, sums: Sums, expert: int) -> Tensor:
    module, states = io.restore_expert(block, expert)
    with rounded_inputs(module, states):
        return run(module, sums.rows(expert), io.device)


def quantize_experts(
    io: BlockIO, block: BlockPlan, wanted: list[Routed], given: list[Routed], watch: Watch
) -> tuple[list[Tensor], list[Tensor]]:
    """Quantize a block's experts, and commit them in groups; those that are committed already are read back.

    wanted: what enters the unquantized block's experts; given: what enters those of the block whose other weights are
    quantized. Returns the unquantized experts' output for the first, and the quantized ones' for the second.
    """
    assert block.experts is not None
    target, result, planned = Sums(wanted), Sums(given), block.experts
    statistics = _statistics(io, given)
    for group in block.experts.groups:
        done = group.unit in io.sink.done

        def work(expert: int, done: bool = done) -> _Result:
            module = io.fill_expert(block, expert)
            before = run(module, target.rows(expert), io.device)
            if done:
                return _Result(before, _run_written(io, block, result, expert))
            mine, after = _quantize(io, block, expert, module, result, statistics)
            rows, packed = pack_weights(block, mine, planned.weights[expert])
            log = [asdict(replace(attempt, expert=expert)) for attempt in mine.log]
            return _Result(before, after, [row | _told(io, mine, row["notes"]) for row in rows], log, packed)

        every = _Result()
        for expert, one in ranks.spread(range(group.begin, group.end), work):
            target.add(expert, one.before)
            result.add(expert, one.after)
            every.rows += one.rows
            every.log += one.log
            every.tensors |= one.tensors
        if not done:
            io.sink.commit(group.unit, every.tensors, {"weights": every.rows, "log": every.log})
            give_back()
        watch.step(f"{group.unit}{' were already done' if done else ''}")
    return target.totals, result.totals


@dataclass
class _Result:
    """What comes of an expert: its outputs, unquantized and quantized; unless it was there, its rows, log, tensors."""

    before: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _told(io: BlockIO, mine: ExpertBlock, notes: tuple[str, ...]) -> dict[str, Any]:
    """What the row of a weight says of its expert. notes: those of the weight."""
    stood_in = (STOOD_IN,) if mine.tokens == 0 and io.plan.pipeline.calibrated else ()
    blends = any(hasattr(need, "blend") for needs in io.plan.pipeline.passes for need in needs)
    return {"tokens": mine.tokens, "alpha": mine.alpha if blends else None, "notes": (*notes, *stood_in)}


def _quantize(
    io: BlockIO,
    block: BlockPlan,
    expert: int,
    module: Expert,
    result: Sums,
    statistics: dict[type[Statistic], Statistic],
) -> tuple[ExpertBlock, Tensor]:
    """An expert after it was quantized, and its outputs."""
    assert block.experts is not None
    info, planned, rows = block.experts.info, block.experts.weights[expert], result.rows(expert)
    mine = ExpertBlock(
        module,
        states_of(module, planned),
        rows,
        result.weights(expert),
        result.others(expert),
        statistics,
        {weight.input_id for weight in planned.values() if not weight.row_parallel},
        everyone=result.everyone() if io.plan.recipe.route == "all" else (),
        pairs=block.experts.pairs,
        scale_dtype=io.plan.dtype,
        device=io.device,
    )
    try:
        mine.target = mine.observe(io.plan.pipeline.first)
        steps.quantize(mine, io.plan.pipeline)
        with rounded_inputs(module, mine.weights.values()):
            return mine, run(module, rows, io.device)
    except LlmqError as problem:
        raise LlmqError(f"{block.name}.{info.module}, expert {expert}: {problem}") from problem


def _statistics(io: BlockIO, routed: list[Routed]) -> dict[type[Statistic], Statistic]:
    """The statistics of all rows that enter the experts, of every kind that a method needs, if experts blend them."""
    needed = io.plan.pipeline.passes if io.plan.recipe.route == "own" else ()
    kinds = dict.fromkeys(need for needs in needed for need in needs if hasattr(need, "blend"))
    made = {kind: kind(routed[0].rows.shape[1], io.device) for kind in kinds}
    mine = [routed[batch].rows for batch in ranks.mine(len(routed))]
    for hand in ranks.hands(len(mine)):
        for one in made.values():
            add(one, None, [mine[i] for i in hand], io.device)
    return made


def quantize_parts(io: BlockIO, planned: BlockPlan, block: Block, watch: Watch) -> list[WeightState]:
    """Quantize and commit the experts of a filled block, whose other weights are quantized and rounded in place.

    Groups that are committed already are skipped. Afterwards the block has the experts as they were written; returns
    them. No scale is moved inside such an expert.
    """
    assert planned.parts is not None
    pipeline = replace(io.plan.pipeline, transforms=())
    for group in planned.parts.groups:
        done = group.unit in io.sink.done
        if not done:
            tensors, payload = _quantize_group(io, planned, block, group, pipeline)
            io.sink.commit(group.unit, tensors, payload)
            del tensors
            give_back()
        watch.step(f"{group.unit}{' were already done' if done else ''}")
    return io.put_parts(planned)


def _quantize_group(
    io: BlockIO, planned: BlockPlan, block: Block, group: ExpertGroup, pipeline: Pipeline
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of some experts of a block, and what the journal says of them."""
    assert planned.parts is not None
    weights = planned.parts.of(group)
    states = states_of(block.module, weights)
    mine = GroupBlock(block.module, states, block.inputs, block.calls, scale_dtype=io.plan.dtype, device=io.device)
    mine.target = block.target
    try:
        mine.observe(pipeline.first)
        steps.quantize(mine, pipeline)
    except LlmqError as problem:
        raise LlmqError(f"{planned.name}, {group.unit.partition(', ')[2]}: {problem}") from problem
    assert mine.tokens is not None
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        (row,), packed = pack_weights(planned, mine, {name: weight})
        # Unpacked codes take twice the memory of packed ones, or more.
        mine.weights[name].quantized = mine.weights[name].rounded = None
        idle = (IDLE,) if not mine.tokens[name] and io.plan.pipeline.calibrated else ()
        rows.append(row | {"tokens": mine.tokens[name], "notes": (*row["notes"], *idle)})
        tensors |= packed
    where = group.unit.partition(", ")[2]
    return tensors, {"weights": rows, "log": [asdict(replace(attempt, where=where)) for attempt in mine.log]}
