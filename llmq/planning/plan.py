"""The plan of a run: every weight's scheme, memory and disk. A run that cannot finish is refused here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import formats, methods
from llmq.checkpoint.source import FolderSource, Source
from llmq.data.calibration import Windows
from llmq.discovery import blocks as discover
from llmq.discovery.blocks import Structure
from llmq.discovery.find_pairs import find_in
from llmq.discovery.named import Named, named
from llmq.discovery.names import Links, link
from llmq.discovery.pairs import Found, Pair
from llmq.errors import LlmqError
from llmq.formats.base import Loader, dtype_name
from llmq.grids.scheme import Scheme
from llmq.methods import Pipeline
from llmq.planning import checks
from llmq.planning.fused import apart, check_fused
from llmq.planning.lengths import check_length, longest, tokens_to_check
from llmq.planning.memory import Budget, Load, check_room, predict
from llmq.planning.numbers import READ, check_numbers
from llmq.planning.trial import try_quantizer
from llmq.planning.weights import WeightPlan, plan_weights
from llmq.recipe.recipe import Recipe

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block.

    index: of the block; name, module: its path in the model, and its module; weights: those to quantize, by
    `View.name`, in order; tensors: parameter or buffer within the block → tensor of the checkpoint; pairs: the block's
    scale pairs, if a method uses them.
    """

    index: int
    name: str
    module: nn.Module
    weights: dict[str, WeightPlan]
    tensors: dict[str, str]
    pairs: list[Pair]

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
        return formats.loaders(self.schemes, bool(apart(self.weights)))

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
    checks.check_patterns(recipe, items)
    checks.check_weights(items, recipe, pipeline.quantizer, tp)
    check_fused(items, recipe)
    try_quantizer(items, pipeline.quantizer, "+".join(recipe.methods), dtype, torch.device(device))
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if pipeline.calibrated or any(_static(i.scheme) for i in items):
        found = windows(longest(model))
    else:
        ids = (torch.arange(tokens_to_check(source.folder, recipe, model, structure)) % vocabulary)[None]
        found = Windows(ids, (), "none needed; one window of consecutive token ids checks each block")
    if int(found.ids.max()) >= vocabulary:
        raise LlmqError(
            f"{source.folder}: the tokenizer gives id {int(found.ids.max())}, but the model has {vocabulary} "
            "embeddings: they are of different models"
        )
    check_length(source.folder, model, structure, found.ids.shape[1])
    plan = Plan(source, recipe, model, structure, links, dtype, items, found, pipeline, other, set(left_out))
    if pipeline.transforms:
        plan.pairs = find_in(model, structure.path)
        _check_pairs(plan)
    plan.blocks = _blocks(plan)
    plan.warnings = [*warned, *found.notes, *checks.warnings(items)]
    plan.budget = _budget(plan, device)
    check_room(plan.budget, out, device)
    return plan


def pairs_of(folder: Path, trust_remote_code: bool = False) -> dict[str, Found]:
    """The scale pairs in the blocks of a folder's model. Raises LlmqError."""
    source = FolderSource(folder, trust_remote_code, quantized_ok=True)
    model = discover.build(folder, _main_dtype(source, source.names()), trust_remote_code)
    return find_in(model, discover.find(model).path)


def _discover(source: Source) -> tuple[nn.Module, torch.dtype, Structure, Links]:
    """The model in the dtype of its blocks' weights, its structure, and the checkpoint's names for its parameters."""
    dtype = _main_dtype(source, source.names())
    while True:
        model = discover.build(source.folder, dtype, source.trust_remote_code)
        structure, links = discover.find(model), link(model, source.names())
        inside = [f"{b.name}.{w.view.parameter}" for b in structure.blocks for w in b.weights]
        found = _main_dtype(source, [links.source[name] for name in inside if name in links.source], dtype)
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
        weights = {w.view.name: w for w in chosen if w.view is not None}
        prefix = block.name + "."
        tensors = {n.removeprefix(prefix): t for n, t in plan.links.source.items() if n.startswith(prefix)}
        pairs = plan.pairs[block.name].pairs if block.name in plan.pairs else []
        found.append(BlockPlan(index, block.name, plan.model.get_submodule(block.name), weights, tensors, pairs))
    return found


def _check_pairs(plan: Plan) -> None:
    if not any(found.pairs for found in plan.pairs.values()):
        reasons = sorted({f"{r.source}: {r.reason}" for found in plan.pairs.values() for r in found.rejections})
        raise LlmqError(
            f"{plan.source.folder}: method {'+'.join(plan.recipe.methods)!r} moves scales between weights, but this "
            "model has no pair of weights between which scales can move without changing a block's output "
            f"({'; '.join(reasons[:4])}). Leave out the transform: gptq and rtn need none"
        )


def _static(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.activations is not None and not scheme.activations.dynamic


def _budget(plan: Plan, device: str) -> Budget:
    size = plan.dtype.itemsize
    loads, inside = [], []
    for block in plan.blocks:
        inside += [f"{block.name}.{n}" for n, _ in block.module.named_parameters()]
        mine = list(block.weights.values())
        widths = {i.input_id: i.shape[1] for i in mine}
        # The statistics of one pass are freed before the next pass.
        statistics = (
            sum(need.nbytes(width) for need in needs for width in widths.values()) for needs in plan.pipeline.passes
        )
        numbers = sum(prod(i.shape) for i in mine)
        # Transforms use float32 copies besides the block, and both results are kept until the better one is known.
        copies = numbers * ((8 if plan.pipeline.transforms else 0) + (2 if plan.pipeline.refiners else 0))
        loads.append(
            Load(
                sum(p.numel() for p in block.module.parameters()) * size + copies,
                sum(i.after for i in mine),
                max(statistics, default=0),
                max((method.workspace(i.shape) for method in plan.pipeline.all for i in mine), default=0),
            )
        )
    saved = sum(i.before - i.after for i in plan.weights if i.scheme is not None)
    samples, seqlen = plan.ids.shape
    return predict(
        plan.model,
        inside,
        plan.dtype,
        (samples, seqlen),
        plan.batch,
        loads,
        plan.source.total_bytes - saved,
        device,
        chains=4 if plan.pipeline.float_target else 3,
    )


def _main_dtype(source: Source, names: list[str], default: torch.dtype | None = None) -> torch.dtype:
    """The dtype of most bytes of the named tensors, among those that llmq reads; the default if none has one."""
    sizes: dict[torch.dtype, int] = {}
    for name in names:
        info = source.info(name)
        if info.dtype in READ:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default=default)
    if dtype is None:
        kinds = ", ".join(sorted({dtype_name(source.info(name).dtype) for name in names}))
        raise LlmqError(f"{source.folder}: its weights are {kinds}; llmq reads float32, float16 and bfloat16 sources")
    return dtype
