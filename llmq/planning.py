"""The checks of the first seconds: every weight's scheme, memory, disk. It refuses now, or the run finishes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import discover, methods
from llmq.budget import Budget, Load, check_room, predict
from llmq.calibration import Windows
from llmq.discover import Structure
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors
from llmq.naming import Links, link
from llmq.recipe import Recipe, Scheme
from llmq.source import Source

BATCH_TOKENS = 2048
SMALLEST_GROUP = 16
CHECK_TOKENS = 512


@dataclass(frozen=True)
class Item:
    """One weight with two or more axes: what becomes of it.

    module: its path in the model; tensor: its name in the checkpoint; scheme: None when it is left alone, for `reason`;
    before, after: stored bytes.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    before: int
    after: int
    scheme: Scheme | None
    reason: str = ""
    block: int | None = None
    shares: int = 0
    splits_input: bool = False

    @property
    def name(self) -> str:
        """The weight's name for people and patterns: the checkpoint's, without '.weight'."""
        return self.tensor.removesuffix(".weight")


@dataclass
class Plan:
    """Everything that is known before work starts."""

    source: Source
    recipe: Recipe
    model: nn.Module
    structure: Structure
    links: Links
    dtype: torch.dtype
    items: list[Item]
    calibration: Windows
    budget: Budget = field(default_factory=lambda: Budget(0, 0, 0))
    warnings: list[str] = field(default_factory=list)

    def of_block(self, index: int) -> list[Item]:
        """The quantized weights of one block, in order."""
        return [i for i in self.items if i.block == index and i.scheme is not None]

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
        chosen = [i for i in self.items if i.scheme is not None]
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
    """Look at everything and promise, or refuse. `windows` is told the most tokens
    the model takes, where known, and gives the calibration windows.

    Raises LlmqError with every offending weight and the ways out.
    """
    dtype = _model_dtype(source)
    model = discover.build(source.folder, dtype, source.trust_remote_code)
    structure = discover.find(model)
    links = link(model, source.names())
    items = _items(source, recipe, model, structure, links, dtype)
    _check_sources(source, model, links)
    _check_patterns(recipe, items)
    _check_items(items, recipe, tp)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if methods.needs(recipe):
        found = windows(_longest(model))
    else:
        ids = (torch.arange(min(CHECK_TOKENS, _longest(model) or CHECK_TOKENS)) % vocabulary)[None]
        found = Windows(ids, (), "none needed; one window of token ids in a row checks each block")
    if int(found.ids.max()) >= vocabulary:
        raise LlmqError(
            f"{source.folder}: the tokenizer gives id {int(found.ids.max())}, the model has {vocabulary} embeddings: "
            "they do not belong together"
        )
    plan = Plan(source, recipe, model, structure, links, dtype, items, found)
    plan.warnings = [*found.notes, *_warnings(items)]
    plan.budget = _budget(plan, device)
    check_room(plan.budget, out, device)
    return plan


def _longest(model: nn.Module) -> int | None:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    limits = [v for k, v in config.to_dict().items() if k.startswith("max_position") and isinstance(v, int) and v > 0]
    return min(limits, default=None)


def _budget(plan: Plan, device: str) -> Budget:
    size = plan.dtype.itemsize
    loads, inside = [], []
    for index, block in enumerate(plan.structure.blocks):
        module = plan.model.get_submodule(block.name)
        inside += [f"{block.name}.{n}" for n, _ in module.named_parameters()]
        mine = plan.of_block(index)
        inputs = {i.shares: sum(need.nbytes(i.shape[1]) for need in methods.needs(plan.recipe)) for i in mine}
        loads.append(
            Load(
                sum(p.numel() for p in module.parameters()) * size,
                sum(i.after for i in mine),
                sum(inputs.values()),
                max((methods.workspace(plan.recipe, i.shape) for i in mine), default=0),
            )
        )
    saved = sum(i.before - i.after for i in plan.items if i.scheme is not None)
    samples, seqlen = plan.ids.shape
    return predict(
        plan.model, inside, plan.dtype, (samples, seqlen), plan.batch, loads, plan.source.total_bytes - saved, device
    )


def _model_dtype(source: Source) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for name in source.names():
        info = source.info(name)
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default=None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LlmqError(f"{source.folder}: its weights are {dtype}; llmq reads float32, float16 and bfloat16 sources")
    return dtype


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a weight: 're:' and a regular expression, a shell glob, or dotted parts of a name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _items(
    source: Source, recipe: Recipe, model: nn.Module, structure: Structure, links: Links, dtype: torch.dtype
) -> list[Item]:
    items = []
    planned: set[str] = set()
    for index, block in enumerate(structure.blocks):
        for weight in block.weights:
            parameter = f"{weight.name}.weight"
            planned.add(parameter)
            tensor = links.source.get(parameter)
            if tensor is None:
                reason = links.converted.get(parameter, "the checkpoint has no tensor for it")
                items.append(_left(parameter, parameter, (weight.rows, weight.width), dtype, reason, index))
                continue
            before = source.info(tensor).nbytes
            item = Item(
                weight.name,
                tensor,
                (weight.rows, weight.width),
                before,
                before,
                None,
                "",
                index,
                weight.shares,
                weight.splits_input,
            )
            items.append(_schemed(item, recipe, dtype))
        for parameter, reason in block.left.items():
            planned.add(parameter)
            shape = tuple(model.get_parameter(parameter).shape)
            items.append(_left(parameter, links.source.get(parameter, parameter), shape, dtype, reason, index))
    for parameter, value in model.named_parameters():
        if value.dim() >= 2 and parameter not in planned:
            tensor = links.source.get(parameter, parameter)
            items.append(_left(parameter, tensor, tuple(value.shape), dtype, "outside the decoder blocks", None))
    for tensor in links.unused:
        shape = source.info(tensor).shape
        if len(shape) >= 2:
            items.append(_left(tensor, tensor, shape, dtype, "transformers does not load it: copied as it is", None))
    return items


def _left(
    parameter: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str, block: int | None
) -> Item:
    size = prod(shape) * dtype.itemsize
    return Item(parameter.removesuffix(".weight"), tensor, shape, size, size, None, reason, block)


def _schemed(item: Item, recipe: Recipe, dtype: torch.dtype) -> Item:
    scheme = recipe.scheme
    for pattern, override in recipe.overrides:
        if matches(pattern, item.name):
            scheme = override
    if any(matches(pattern, item.name) for pattern in recipe.keep):
        return replace(item, reason="kept by --keep")
    rows, width = item.shape
    group = scheme.group_size
    if group and width % group:
        if recipe.ragged == "error":
            return replace(item, scheme=scheme)
        if recipe.ragged == "keep":
            return replace(item, reason=f"group size {group} does not divide its width {width}")
        scheme = replace(scheme, group_size=_smaller(width, group) if recipe.ragged == "smaller" else None)
    sizes = compressed_tensors.spec((rows, width), scheme, dtype)
    after = sum(prod(shape) * kind.itemsize for kind, shape in sizes.values())
    return replace(item, scheme=scheme, after=after)


def _smaller(width: int, group: int) -> int | None:
    """The largest group size below `group` that divides the width, not under 16, or None (per channel)."""
    return next((g for g in range(group - 1, SMALLEST_GROUP - 1, -1) if width % g == 0), None)


def _check_sources(source: Source, model: nn.Module, links: Links) -> None:
    for name, parameter in model.named_parameters():
        tensor = links.source.get(name)
        if tensor is None:
            reason = links.converted.get(
                name, "the checkpoint has no tensor for it: it is incomplete, or another model's"
            )
            raise LlmqError(f"{source.folder}: {name} cannot be read: {reason}")
        stored = source.info(tensor).shape
        if stored != tuple(parameter.shape):
            raise LlmqError(
                f"{source.folder}: {tensor} is {[*stored]} in the checkpoint and {[*parameter.shape]} by config.json: "
                "they do not belong together"
            )


def _check_patterns(recipe: Recipe, items: list[Item]) -> None:
    names = [i.name for i in items]
    for option, patterns in (("--keep", recipe.keep), ("--override", [p for p, _ in recipe.overrides])):
        for pattern in patterns:
            try:
                hit = [n for n in names if matches(pattern, n)]
            except re.error as error:
                raise LlmqError(f"{option} {pattern!r} is not a regular expression: {error}") from error
            if not hit:
                raise LlmqError(f"{option} {pattern!r} matches no weight; a weight's name looks like {names[0]!r}")
    for pattern, _ in recipe.overrides:
        if not any(matches(pattern, i.name) and (i.scheme or "--keep" in i.reason) for i in items):
            one = next(i for i in items if matches(pattern, i.name))
            raise LlmqError(f"--override {pattern!r} matches only what is left alone: {one.name} ({one.reason})")


def _check_items(items: list[Item], recipe: Recipe, tp: int) -> None:
    chosen = [i for i in items if i.scheme is not None]
    if not chosen:
        reasons = sorted({i.reason for i in items if i.block is not None and i.reason})
        raise LlmqError("there is nothing to quantize: " + "; ".join(reasons))
    for scheme in {i.scheme for i in chosen if i.scheme is not None}:
        refusal = compressed_tensors.refusal(scheme)
        if refusal:
            raise LlmqError(refusal)
    ragged = [i for i in chosen if i.scheme and i.scheme.group_size and i.shape[1] % i.scheme.group_size]
    if ragged:
        raise LlmqError(
            f"the group size does not divide the width of {_name_all(ragged)}. "
            "Ways out: --group-size with a divisor, --ragged smaller (a smaller group there), "
            "--ragged channel (one scale per row there), --ragged keep (leave them alone), or --keep PATTERN"
        )
    torn = [i for i in chosen if tp > 1 and not _splits(i, tp)]
    if torn:
        raise LlmqError(
            f"--tp {tp}: a server cannot split {_name_all(torn)}. "
            "Ways out: a smaller --group-size, --group-size channel, --keep PATTERN, or fewer parts"
        )


def _splits(item: Item, tp: int) -> bool:
    rows, width = item.shape
    assert item.scheme is not None
    if not item.splits_input:
        # Zero points are packed along the output.
        return rows % tp == 0 and (item.scheme.symmetric or rows // tp * item.scheme.bits % 32 == 0)
    part = width // tp
    return width % tp == 0 and part % (item.scheme.group_size or 1) == 0 and part * item.scheme.bits % 32 == 0


def _name_all(items: list[Item]) -> str:
    """Every weight by name; those that differ only in their block in one, with the blocks."""
    alike: dict[tuple[str, tuple[int, ...], Scheme | None], list[int]] = {}
    for item in items:
        name = item.name.replace(f".{item.block}.", ".*.", 1)
        alike.setdefault((name, item.shape, item.scheme), []).append(item.block or 0)
    return ", ".join(
        f"{name} [{shape[0]}, {shape[1]}] ({scheme}) in blocks {_ranges(blocks)}"
        for (name, shape, scheme), blocks in alike.items()
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → '0–2, 5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def _warnings(items: list[Item]) -> list[str]:
    warnings = []
    families: dict[tuple[int | None, int], set[str]] = {}
    for item in items:
        if item.block is not None and (item.scheme is not None or "--keep" in item.reason):
            families.setdefault((item.block, item.shares), set()).add(str(item.scheme or "kept"))
    mixed = [f"block {b}: {' and '.join(sorted(s))}" for (b, _), s in families.items() if len(s) > 1]
    if mixed:
        warnings.append(
            "weights that share an input have different schemes (" + "; ".join(mixed[:3]) + "): "
            "servers such as vLLM fuse them and refuse that; give them one scheme"
        )
    inside = [i for i in items if i.block is not None]
    share = sum(prod(i.shape) for i in inside if i.scheme) / max(1, sum(prod(i.shape) for i in inside))
    if share < 0.9:
        warnings.append(f"only {share:.0%} of the blocks' weights are quantized; `llmq plan` says why")
    if any(i.scheme is not None and not i.scheme.symmetric for i in items):
        warnings.append(
            "asymmetric weights: vLLM reads them, stock transformers 5.23 with compressed-tensors 0.20 fails on them "
            "unless it is given CompressedTensorsConfig(dequantize=True)"
        )
    return warnings
