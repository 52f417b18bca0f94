"""Experts that are stored packed one by one, in a model that has one parameter for all of them.

transformers would join their dense weights to that parameter, by a rule; run backwards, the rule says which rows of
which expert a stored weight is (`Conversion.parts`). Each packed weight gets a placeholder of its own, and the
parameter is taken out of the model, so that nothing fills it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from llmq.checkpoint.tensors import TensorInfo
from llmq.discovery.conversion import Conversion, Part
from llmq.discovery.rename import Rules
from llmq.errors import LlmqError
from llmq.formats.plain import Layer, Reader
from llmq.formats.stacks import parse

Stored = Mapping[str, TensorInfo]
ORDINARY = {"weight", "bias"}


@dataclass(frozen=True)
class PackedPart:
    """Rows of an expert's matrix that are stored packed, under `stem`.

    place: of its placeholder in the model; apart: the suffixes of tensors that transformers would join to others, as
    if they were dense weights.
    """

    stem: str
    place: str
    start: int
    shape: tuple[int, int]
    layer: Layer
    apart: frozenset[str]


@dataclass(frozen=True)
class Stack:
    """A parameter [experts, ...] whose experts are packed.

    transposed: entries are [in, out]; experts: for each the parts of its matrix, in the order of their rows.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    experts: tuple[tuple[PackedPart, ...], ...]


@dataclass
class Joined:
    """Stems of stored weights that one rule joins to a parameter: pattern of the rule → stems."""

    rule: Any
    foreign: bool
    stems: dict[str, list[str]] = field(default_factory=dict)


class Joining:
    """Collects the stored weights that transformers would join to parameters of a model."""

    def __init__(self, model: nn.Module, rules: Rules) -> None:
        self.model, self.rules = model, rules
        self.state = model.state_dict()
        self.joined: dict[str, Joined] = {}
        self.stacked: dict[str, dict[int, tuple[str, bool]]] = {}

    def add(self, stem: str, target: str, pattern: str, rule: Any = None) -> None:
        """A stored weight, the parameter, and the pattern that matched. rule: if it is not one of the model's own."""
        foreign = rule is not None
        found = self.joined.setdefault(target, Joined(rule if foreign else self.rules.converter(pattern), foreign))
        found.stems.setdefault(pattern, []).append(stem)

    def foreign(self, stem: str) -> bool:
        """Adds a weight that only other models' rules know; False if they do not tell where it belongs."""
        found = self.rules.of_others(f"{stem}.weight")
        if found is None:
            return False
        target, pattern, rule = found
        experts = self.model.get_submodule(target.rpartition(".")[0])
        # Classes that say nothing of how they hold their matrices may hold them in any way.
        usual = not getattr(experts, "is_transposed", True) and getattr(experts, "is_concatenated", True)
        if not usual or getattr(experts, "has_bias", False):
            return False
        self.add(stem, target, pattern, rule)
        return True

    def own(self, stem: str) -> bool:
        """Adds a weight that llmq named as an expert's of a stack; False if it is none."""
        found = parse(stem)
        if found is None:
            return False
        parameter, expert, transposed = found
        target = self.rules.rename(parameter)[0]
        if target not in self.state or self.state[target].dim() != 3:
            return False
        self.stacked.setdefault(target, {})[expert] = (stem, transposed)
        return True

    def refuse_foreign(self, stored: Mapping[str, Stored]) -> None:
        """Raises LlmqError if stock transformers would not know where a weight belongs."""
        for target, joined in self.joined.items():
            if joined.foreign:
                raise LlmqError(unknown(stored[next(iter(joined.stems.values()))[0]], target, self.model))

    def stacks(self, stored: Mapping[str, Stored], reader: Reader) -> tuple[list[Stack], str | None]:
        """The packed stacks, and why one of the parameters can not be kept packed, or None.

        Raises LlmqError if an expert is missing, or not all experts of a stack are stored alike.
        """
        stacks = [self._own_stack(target, stems, stored, reader) for target, stems in self.stacked.items()]
        for target, joined in self.joined.items():
            stems = [stem for found in joined.stems.values() for stem in found]
            packed = [stem for stem in stems if not set(stored[stem]) <= ORDINARY]
            if not packed:
                if joined.foreign:
                    raise LlmqError(unknown(stored[stems[0]], target, self.model))
                continue
            found = self._stack(target, joined, stored, reader)
            if isinstance(found, Stack):
                stacks.append(found)
            else:
                self.refuse_foreign(stored)
                return [], f"{next(iter(stored[packed[0]].values())).name} is part of {target}, {found}"
        return stacks, None

    def _own_stack(
        self, target: str, stems: Mapping[int, tuple[str, bool]], stored: Mapping[str, Stored], reader: Reader
    ) -> Stack:
        """A stack of experts that llmq named. Raises LlmqError if one is missing, or not all are stored alike."""
        shape = tuple(self.state[target].shape)
        first, turned = next(iter(stems.values()))
        file = next(iter(stored[first].values())).file
        if set(stems) != set(range(shape[0])):
            odd = min(set(stems) ^ set(range(shape[0])))
            raise LlmqError(
                f"{file}: {'no' if odd not in stems else 'a'} tensor of expert {odd} of {target}, which has {shape[0]} "
                "experts: download or write the checkpoint again"
            )
        out, inputs = (shape[2], shape[1]) if turned else (shape[1], shape[2])
        experts = []
        like: Layer | None = None
        for expert in range(shape[0]):
            stem, transposed = stems[expert]
            place = self.rules.place(f"{stem}.{next(iter(stored[stem]))}").rpartition(".")[0]
            layer = layer_of((stem, place), _linear(out, inputs), (out, inputs), stored[stem], reader)
            if layer is None or transposed != turned or (like is not None and layer != like):
                raise LlmqError(_unlike(stored[stem], stem, first))
            like = layer
            experts.append((PackedPart(stem, place, 0, (out, inputs), layer, frozenset()),))
        return Stack(target, shape, turned, tuple(experts))

    def _stack(self, target: str, joined: Joined, stored: Mapping[str, Stored], reader: Reader) -> Stack | str:
        shape = tuple(self.state[target].shape)
        parts = Conversion(target, joined.rule, self.model, {}, {target: shape}).parts()
        if parts is None or len(shape) != 3:
            return "of which it is not a part of rows"
        numbered = self._numbered(target, joined, parts, stored)
        size, width = prod(shape[1:]), shape[2]
        transposed = {part.stride[-1] != 1 for found in parts.values() for part in found}
        if len(transposed) != 1:
            return "of which it is not a part of rows"
        turned = transposed.pop()
        experts: list[list[PackedPart]] = [[] for _ in range(shape[0])]
        for pattern, found in parts.items():
            first: Layer | None = None
            apart: frozenset[str] = frozenset()
            for stem, part in zip(numbered[pattern], found, strict=True):
                expert, offset = divmod(part.offset, size)
                start = offset if turned else offset // width
                rows = len(part.shape) == 2 and part.stride == ((1, width) if turned else (width, 1))
                if not rows or (not turned and offset % width):
                    return "of which it is not a part of rows"
                place = self.rules.place(f"{stem}.{next(iter(stored[stem]))}").rpartition(".")[0]
                out, inputs = part.shape
                layer = layer_of((stem, place), _linear(out, inputs), (out, inputs), stored[stem], reader)
                if layer is None or (first is not None and layer != first):
                    raise LlmqError(_unlike(stored[stem], stem, numbered[pattern][0]))
                if first is None:
                    first = layer
                    apart = frozenset(s for s in layer.entries if self.rules.rename(f"{stem}.{s}")[1] is not None)
                experts[expert].append(PackedPart(stem, place, start, (out, inputs), layer, apart))
        for expert_parts in experts:
            expert_parts.sort(key=lambda p: p.start)
            at = 0
            for piece in expert_parts:
                if piece.start != at:
                    return "of which it is not a part of rows"
                at += piece.shape[0]
            if at != shape[2 if turned else 1]:
                return "of which it is not a part of rows"
        return Stack(target, shape, turned, tuple(map(tuple, experts)))

    def _numbered(
        self, target: str, joined: Joined, parts: Mapping[str, list[Part]], stored: Mapping[str, Stored]
    ) -> dict[str, list[str]]:
        """For each pattern the stems in the order of their experts. Raises LlmqError unless it is one for each part."""
        file = next(iter(stored[next(iter(joined.stems.values()))[0]].values())).file
        again = "transformers would fill it with random numbers; download or write the checkpoint again"
        strange = set(joined.stems) - set(parts)
        if strange:
            raise LlmqError(f"{file}: the experts of {target} are stored under names of two kinds: {again}")
        found: dict[str, list[str]] = {}
        for pattern, needed in parts.items():
            if pattern not in joined.stems:
                raise LlmqError(f"{file}: no tensor like {pattern} of {target}, which the model needs: {again}")
            by_number = {self._number(pattern, stem): stem for stem in joined.stems[pattern]}
            stem = next(iter(by_number.values()))
            for i in range(len(needed)):
                if i not in by_number:
                    before, _, after = stem.rpartition(f".{self._number(pattern, stem)}.")
                    raise LlmqError(f"{file}: no tensor of {before}.{i}.{after}, which the model needs: {again}")
            if len(by_number) > len(needed):
                beyond = by_number[max(by_number)]
                raise LlmqError(
                    f"{file}: {beyond} is stored, but config.json says that there are {len(needed)} experts: "
                    "download or write the checkpoint again"
                )
            found[pattern] = [by_number[i] for i in range(len(needed))]
        return found

    def _number(self, pattern: str, stem: str) -> int:
        """The number of the expert that a stem names, where the pattern has an asterisk; 0 if it has none."""
        match = re.search(pattern.replace("*", r"(\d+)", 1), f"{self.rules.only_renamed(f'{stem}.weight')}")
        return int(match.group(1)) if match and match.groups() else 0


def layer_of(
    names: Sequence[str], module: nn.Module, shape: tuple[int, int], stored: Stored, reader: Reader
) -> Layer | None:
    """How a weight is stored; None if as it is.

    names: those by which the configuration may call it, as it is stored and as transformers renames it; the first that
    agrees with the files is believed. Raises LlmqError of the first if none does.
    """
    problems = []
    for name in dict.fromkeys(names):
        try:
            return reader.layer(name, module, shape, stored)
        except LlmqError as problem:
            problems.append(problem)
    raise problems[0]


def _unlike(stored: Stored, stem: str, first: str) -> str:
    return (
        f"{next(iter(stored.values())).file}: {stem} is not packed like {first}, and all experts must be: write the "
        "checkpoint again with one scheme for them"
    )


@cache
def _linear(rows: int, width: int) -> nn.Linear:
    """What a stored weight would be the weight of. One for all experts: making one takes longer than all else."""
    with torch.device("meta"):
        return nn.Linear(width, rows, bias=False)


def unknown(stored: Stored, parameter: str, model: nn.Module) -> str:
    """The refusal of packed weights of which nothing says where they belong."""
    info = next(iter(stored.values()))
    kind = getattr(getattr(model, "config", None), "model_type", "this model")
    return (
        f"{info.file}: {info.name} seems to be a part of {parameter}, but transformers has no rule for {kind} that "
        "says which, or none for packed weights: it would fill that with random numbers; load the folder with the tool "
        "that wrote it, or quantize the model with llmq"
    )
