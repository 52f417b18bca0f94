"""What a plan is: everything that is decided before the work starts. `plan.make_plan` makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.checkpoint.source import Source
from llmq.data.calibration import Windows
from llmq.discovery.blocks import Structure
from llmq.discovery.named import Named
from llmq.discovery.names import Links
from llmq.discovery.pairs import Found, Pair
from llmq.discovery.tail import Tail
from llmq.formats import served
from llmq.formats.base import Loader
from llmq.formats.stacks import ALONE
from llmq.grids.scheme import Scheme
from llmq.methods import Pipeline
from llmq.planning.cache import CachePlan
from llmq.planning.experts import ExpertsPlan
from llmq.planning.fused import apart
from llmq.planning.memory import Budget
from llmq.planning.outside import loads_dense
from llmq.planning.parts import PartsPlan
from llmq.planning.served import for_servers
from llmq.planning.stacks import for_llmq_alone
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe
from llmq.spill import Saving

BATCH_TOKENS = 2048
DENSE = Loader(
    "stock transformers with compressed-tensors reads it, and unpacks its weights while loading, so that parts of the "
    "model can be called alone: it takes the memory of an unquantized model (llmq.load keeps weights packed)",
    code="transformers",
)


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


@dataclass(frozen=True)
class Open:
    """What the bits of a plan's weights will be chosen for. goal: in words; posts: (what, bytes) of a process that
    serves the folder, but for these weights; more: further sentences."""

    goal: str
    posts: tuple[tuple[str, int], ...] = ()
    more: tuple[str, ...] = ()


@dataclass
class Plan:
    """Everything that is decided before the work starts.

    model: of the causal class; named: the class that config.json names, if that is another one; dtype: of the blocks'
    weights, in which the model runs and scales are stored; left_out: tensors of the checkpoint that are not written;
    saving: what is done to need no more memory than there is; tail: what follows the last block, if a method learns
    from the logits; open: what the bits of the weights will be chosen for, if they are not chosen yet; cache: what
    rounds keys and values, if the recipe wants that.
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
    tail: Tail | None = None
    budget: Budget = field(default_factory=lambda: Budget(0, 0, 0))
    saving: Saving = Saving.NONE
    warnings: list[str] = field(default_factory=list)
    open: Open | None = None
    cache: CachePlan | None = None

    @property
    def outside(self) -> dict[str, WeightPlan]:
        """Tensor → the weight, for those outside the blocks that are quantized, without calibration."""
        return {i.tensor: i for i in self.weights if i.block is None and i.scheme is not None}

    @property
    def schemes(self) -> set[Scheme]:
        """The schemes of all quantized weights."""
        return {i.scheme for i in self.weights if i.scheme is not None}

    @property
    def loaders(self) -> list[Loader]:
        """What is known of the tools that can read the folder."""
        if self.stacked:
            return [ALONE]
        if self.served:
            found = [served.loader(self.schemes), formats.vllm.loader(self.schemes)]
            return found if self.cache is None else [*found, self.cache.loader]
        if not self.blocks:
            dense = loads_dense(self.model, self.weights, self.dtype)
            return [DENSE] if dense else formats.of(next(iter(self.schemes))).loaders(self.schemes)
        found = formats.loaders(self.schemes, bool(apart(self.weights)))
        return found if self.cache is None else [*found, self.cache.loader]

    @property
    def for_llmq_alone(self) -> bool:
        """Whether only `llmq.load` can read the folder: no standard format has its weights."""
        return self.stacked or formats.for_llmq_alone(self.schemes)

    @property
    def stacked(self) -> bool:
        """Whether stacks of experts are packed one by one, which only `llmq.load` can read."""
        return for_llmq_alone(self.weights, self.source.names())

    @property
    def served(self) -> bool:
        """Whether experts have a scheme that stock transformers reads wrong, so that it is to refuse the folder."""
        return not self.for_llmq_alone and for_servers(self.weights)

    @property
    def ids(self) -> Tensor:
        """The calibration windows, int64 [samples, tokens]."""
        return self.calibration.ids

    @property
    def batch(self) -> int:
        """Windows per forward pass."""
        return max(1, BATCH_TOKENS // self.ids.shape[1])

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The windows of each forward pass, int64 [at most `batch`, tokens]."""
        return torch.split(self.ids, self.batch)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero points included."""
        chosen = [i for i in self.weights if i.scheme is not None]
        return 8 * sum(i.after for i in chosen) / max(1, sum(prod(i.shape) for i in chosen))
