"""The memory of the weights of a block that are quantized stage by stage, or whose statistics are collected in passes.

A stage is the weights that have one input. What is in memory at once in each of its steps is counted here.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from llmq.block.chains import REPLAYED, ROOM
from llmq.block.moments import HELD_OUT, HELD_TOKENS, few_outputs
from llmq.block.statistics import Hessian, in_passes
from llmq.grids.base import pieces
from llmq.methods.base import Method
from llmq.planning.memory import FORWARD_COPIES, Load, hidden_width
from llmq.planning.types import Plan
from llmq.planning.weights import WeightPlan
from llmq.spill import Saving

APART_COPIES = 3
"""Of a batch's inputs in float32, while two runs are compared, or what they differ by is added to sums."""


def taken(method: Method, item: WeightPlan, device: str, statistics: int | None = None) -> int:
    """What a method takes for a weight: of what it rounds in pieces, one piece, and the codes of all, and their copy.

    statistics: the bytes of those that rest meanwhile (`Method.together`).
    """
    shape, extra = item.shape, 0
    if item.scheme is not None and len(shape) == 2 and method.apart(item.scheme):
        rows = _rows(item, device)
        shape, extra = (rows, shape[1]), 2 * prod(shape) if rows < shape[0] else 0
    return extra + (method.workspace(shape) if statistics is None else method.together(shape, statistics))


class _Stage:
    """The bytes of a stage of weights.

    sums: its statistics; drift, streams: the sums of corrections; values: all of its weights in float32; piece: what is
    rounded of one at once; products: what the drift does to the weights, where it is not kept; held: the tokens that
    choose strengths; batch: what a batch takes beside the block and the sums.
    """

    def __init__(self, plan: Plan, items: list[WeightPlan], device: str) -> None:
        size, width = plan.dtype.itemsize, items[0].shape[1]
        needs = dict.fromkeys(plan.pipeline.quantizer.quantize_needs)
        needs |= {Hessian: None} if plan.pipeline.corrects else {}
        self.sums, self.square = sum(need.nbytes(width) for need in needs), 4 * width**2
        self.items, self.shape = items, max((item.shape for item in items), key=prod)
        self.values = 4 * sum(prod(item.shape) for item in items)
        self.piece = 4 * width * max(_rows(item, device) for item in items)
        outs = sum(item.shape[0] for item in items)
        adding = _adding(plan, items)
        corrects = plan.pipeline.corrects
        self.drift, self.streams = (self.square, 4 * adding * width) if corrects else (0, 0)
        # With few outputs there are sums of them instead; with not many it is multiplied by the weights and freed.
        self.direct, self.narrow = few_outputs(outs, width), outs <= 2 * width
        self.products = self.values if self.narrow and corrects else 0
        self.drift = self.products if self.direct else self.drift
        held = min(HELD_TOKENS, plan.ids.numel() // HELD_OUT + 1)
        self.held = held * (size * width + 4 * (outs if self.direct else width) + 4 * adding) if corrects else 0
        tokens = min(plan.ids.numel(), plan.batch * plan.ids.shape[1])
        widest = max(width, *(item.shape[0] for item in items))
        self.batch = FORWARD_COPIES * tokens * widest * size
        if corrects:
            more = self.piece + 4 * tokens * outs if self.direct else 0
            self.batch = max(self.batch, APART_COPIES * 4 * tokens * width + more)

    @property
    def multiplying(self) -> int:
        """While the drift is multiplied by the weights, if it is."""
        return self.drift if self.direct or not self.narrow else self.drift + self.piece + self.products

    @property
    def corrected(self) -> int:
        """While the weights are corrected, without their statistics."""
        if self.narrow:
            return self.square + self.products + max(self.streams, 2 * self.piece)
        return self.drift + 2 * self.square + self.values + 2 * self.piece


def _adding(plan: Plan, items: list[WeightPlan]) -> int:
    """The outputs of a stage that are added to a stream, if its one weight has as many as that is wide."""
    return items[0].shape[0] if len(items) == 1 and items[0].shape[0] == hidden_width(plan.model) else 0


def _rows(item: WeightPlan, device: str) -> int:
    """How many rows of a weight are rounded at once."""
    rows = item.shape[0]
    return rows if item.scheme is None else pieces(rows, item.scheme, torch.device(device))[0].stop


def _stages(plan: Plan, items: list[WeightPlan], device: str = "cpu") -> list[_Stage]:
    found: dict[int, list[WeightPlan]] = {}
    for item in items:
        found.setdefault(item.input_id, []).append(item)
    return [_Stage(plan, stage, device) for stage in found.values()]


def corrected(plan: Plan, items: list[WeightPlan], load: Load, saving: Saving, device: str) -> Load:
    """What a block takes whose weights are corrected in order. load: without that."""
    quantizer, codes = plan.pipeline.quantizer, sum(prod(item.shape) for item in items)
    most = 0
    for one in _stages(plan, items, device):
        kept = one.sums + one.streams + one.held
        most = max(
            most,
            kept + one.drift + one.batch,
            kept + one.multiplying,
            kept + one.square + one.products + (0 if one.narrow else one.drift),
            one.sums + one.corrected,
            one.sums + one.values + max(taken(quantizer, item, device) for item in one.items),
        )
    tokens = plan.ids.numel() * plan.dtype.itemsize
    # The outputs of products, and of attention.
    replayed = min(REPLAYED, tokens * (sum(i.shape[0] for i in items) + hidden_width(plan.model)))
    kept = _shown(plan, items) if saving < Saving.STATES else 0
    kept += replayed if saving < Saving.PRODUCTS else 0
    # Codes are packed later.
    return replace(load, statistics=max(load.statistics, kept), workspace=most + max(0, codes - load.packed))


def most_passes(plan: Plan) -> int:
    """The most passes in which statistics of a block, or of a stage of it, are collected where memory is limited."""
    if plan.pipeline.corrects:
        return 2
    needs = plan.pipeline.quantizer.quantize_needs
    widths = ({item.input_id: item.shape[1] for item in block.weights.values()} for block in plan.blocks)
    return max((len(in_passes(one, needs)) for one in widths if needs), default=1)


def _shown(plan: Plan, items: list[WeightPlan]) -> int:
    """The bytes of what the weights of an unquantized block show: inputs of all stages, and streams."""
    tokens, widths = plan.ids.numel() * plan.dtype.itemsize, {item.input_id: item.shape[1] for item in items}
    inputs = tokens * sum(widths.values())
    shown = inputs + tokens * sum(_adding(plan, one.items) for one in _stages(plan, items))
    return shown if shown <= ROOM else 0


def in_files(plan: Plan, items: list[WeightPlan], saving: Saving) -> int:
    """The bytes of what is in files of a block's weights."""
    files = _shown(plan, items) if saving >= Saving.STATES and plan.pipeline.corrects else 0
    if saving >= Saving.PASSES:
        # The parameters of both chains, codes, and sums.
        files += (2 * plan.dtype.itemsize + 1) * sum(prod(item.shape) for item in items)
        files += max((one.sums + one.drift + one.streams for one in _stages(plan, items)), default=0)
    return files


def resting(plan: Plan, items: list[WeightPlan], load: Load, block: int) -> Load:
    """What a block takes if whatever waits is in files. load: without that; block: the bytes of its parameters."""
    quantizer, size = plan.pipeline.quantizer, plan.dtype.itemsize
    rounded = size * sum(prod(item.shape) for item in items)
    largest = max(prod(item.shape) for item in items)
    # The rounded block, what is packed of it, and one weight in float32.
    most = rounded + load.packed + (4 + size) * largest
    for one in _stages(plan, items):
        most = max(
            most,
            block + one.held + max(one.sums, one.drift + one.streams) + one.batch,
            one.held + one.multiplying,
            one.held + one.square + one.products,
            one.corrected if plan.pipeline.corrects else 0,
            (one.values if plan.pipeline.corrects else size * prod(one.shape))
            + max(taken(quantizer, item, "cpu", one.sums) for item in one.items),
        )
    return Load(block, load.packed, 0, max(0, most - block - load.packed), load.forward)
