"""The structure of a model as discovery describes it: its decoder blocks and their weights."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.discovery.experts import ExpertsInfo
from llmq.discovery.parts import PartsInfo
from llmq.discovery.reasons import Reason
from llmq.discovery.view import View


@dataclass(frozen=True)
class WeightInfo:
    """One weight of a block. name: its module's path in the model; view: its position in a parameter of the block; rows
    × width: [out, in].

    input_id: the same for all weights fed by the same tensor (servers fuse those); row_parallel: whether a
    tensor-parallel server splits it along its input (a weight fed by neither the block's input nor a norm).
    """

    name: str
    view: View
    rows: int
    width: int
    input_id: int
    row_parallel: bool


@dataclass(frozen=True)
class BlockInfo:
    """One decoder block. left: parameters with two or more axes that are not quantized, each with the reason; experts:
    its routed experts, if they can be run one at a time; parts: those that cannot. The stacks of either are neither in
    `weights` nor in `left`.
    """

    name: str
    weights: tuple[WeightInfo, ...]
    left: dict[str, Reason]
    experts: ExpertsInfo | None = None
    parts: tuple[PartsInfo, ...] = ()

    @property
    def mixture(self) -> bool:
        """Whether it has routed experts."""
        return self.experts is not None or bool(self.parts)


@dataclass(frozen=True)
class Structure:
    """The blocks of a model in order, and the path of the list that holds them.

    unreached: the names of those in the list that text alone does not run (they attend to an image); not in `blocks`.
    outside: the parameters outside the blocks that a pass on text reads, but for the output embedding, and those that
    tell its device.
    """

    path: str
    blocks: tuple[BlockInfo, ...]
    unreached: tuple[str, ...] = ()
    outside: frozenset[str] = frozenset()
