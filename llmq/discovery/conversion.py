"""Which stored tensors fill which part of a parameter, where transformers joins or cuts tensors while loading them.

transformers' own rules are run, on tensors without memory: forwards, to see that they give the model's parameters, and
backwards on the parameter, where every result is a view: its offset, shape and stride are the part that one stored
tensor fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.errors import first_line


@dataclass(frozen=True)
class Part:
    """A part of a contiguous tensor, as torch.as_strided takes it: offset and stride in elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The part, as a view of a contiguous tensor."""
        return whole.as_strided(self.shape, self.stride, int(whole.storage_offset()) + self.offset)


@dataclass(frozen=True)
class Slice:
    """A stored tensor, and the part: of the parameter that it fills, or of it that is the parameter."""

    tensor: str
    part: Part


@dataclass
class Conversion:
    """Stored tensors that one rule of transformers makes parameters of.

    parameters: name → shape; tensors: the pattern of the rule → the stored names that it matched, in order.
    """

    first: str
    rule: Any
    model: Any
    tensors: dict[str, list[str]]
    parameters: dict[str, tuple[int, ...]]

    @property
    def names(self) -> list[str]:
        """All of its stored tensors."""
        return [name for found in self.tensors.values() for name in found]

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, made by transformers of the tensors that `read` returns. May raise anything."""
        rule = deepcopy(self.rule)
        rule.collected_tensors = {pattern: [read(n) for n in names] for pattern, names in self.tensors.items()}
        made = rule.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def parts(self) -> dict[str, list[Part]] | None:
        """For each pattern of the rule, the parts of the only parameter that its tensors fill, in their order.

        None if they are not such parts. Neither the tensors' names nor their shapes are needed.
        """
        if len(self.parameters) > 1:
            return None
        name, shape = next(iter(self.parameters.items()))
        whole = torch.empty(shape, device="meta")
        try:
            with _Views():
                back = self.rule.reverse_transform()
                views: dict[str, Any] = {back.source_patterns[0]: [whole]}
                for operation in back.operations:
                    views = operation.convert(
                        views,
                        source_patterns=back.source_patterns,
                        target_patterns=back.target_patterns,
                        full_layer_name=name,
                        model=self.model,
                        config=self.model.config,
                    )
        except Exception:  # a rule may not be reversible: then there are no such parts
            return None
        if not all(_within(view, whole) for view in views.values()):
            return None
        parts: dict[str, list[Part]] = {}
        # The reversed rule's targets are this rule's sources, in order, without the escapes of a regular expression.
        for pattern, key in zip(self.rule.source_patterns, back.target_patterns, strict=True):
            many = "*" in key
            keys = (key.replace("*", str(i)) for i in range(len(views) + 1 if many else 1))
            parts[pattern] = [_part(views.pop(k)) for k in keys if k in views]
        return None if views else parts

    def filled(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Slice, ...]] | None:
        """For each parameter the parts that its tensors fill; None if they are not such parts. shapes: of tensors."""
        parts = self.parts()
        if parts is None or any(len(found) != len(self.tensors.get(p, ())) for p, found in parts.items()):
            return None
        (name, shape), slices = next(iter(self.parameters.items())), []
        for pattern, names in self.tensors.items():
            for tensor, part in zip(names, parts[pattern], strict=True):
                if part.shape != tuple(shapes[tensor]):
                    return None
                slices.append(Slice(tensor, part))
        covers = sum(torch.Size(s.part.shape).numel() for s in slices) == torch.Size(shape).numel()
        return {name: tuple(slices)} if covers else None

    def cut(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Slice] | None:
        """For each parameter the part of the only stored tensor that it is; None if it is no such part."""
        if len(self.names) != 1:
            return None
        stored = torch.empty(tuple(shapes[self.names[0]]), device="meta")
        try:
            with _Views():
                made = self.convert(lambda _: stored)
        except Exception:  # transformers itself would fail: said by `link`
            return None
        if not all(_within(value, stored) for value in made.values()):
            return None
        return {name: Slice(self.names[0], _part(value)) for name, value in made.items()}


def conversion(
    first: str, rule: Any, model: nn.Module, tensors: dict[str, list[str]], shapes: Mapping[str, Sequence[int]]
) -> Conversion | str:
    """The conversion of stored tensors by a rule, or why transformers could not make the model's parameters of them.

    first: the first parameter's name, as the rule gives it; shapes: of the stored tensors.
    """
    found, state = Conversion(first, rule, model, tensors, {}), model.state_dict()
    try:
        made = found.convert(lambda name: torch.empty(tuple(shapes[name]), device="meta"))
    except Exception as error:  # a rule applied to another model's tensors may fail in any way
        return _absent(tensors, state.get(first)) or (
            f"transformers cannot make it of {_some(found.names)}: {first_line(error)}"
        )
    for name, value in made.items():
        if name not in state:
            return f"transformers would make {name} of {_some(found.names)}, which the model does not have"
        if value.shape != state[name].shape:
            if absent := _absent(tensors, state[name]):
                return absent
            shape = [*state[name].shape]
            return f"transformers makes it of {_some(found.names)}, of shape {[*value.shape]}; the model has {shape}"
        found.parameters[name] = tuple(value.shape)
    return found


def _absent(tensors: Mapping[str, Sequence[str]], parameter: Tensor | None) -> str | None:
    """That a numbered tensor is missing, if one is: experts have as many numbers as the parameter has entries."""
    for names in tensors.values():
        parts = [name.split(".") for name in names]
        places = [i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1]
        if parameter is None or len(places) != 1 or not all(part[places[0]].isdigit() for part in parts):
            continue
        there = {int(part[places[0]]) for part in parts}
        missing = next((i for i in range(len(parameter)) if i not in there), None)
        if missing is not None:
            name = ".".join(str(missing) if i == places[0] else part for i, part in enumerate(parts[0]))
            return f"the checkpoint has no tensor {name}: it is incomplete: download all of its files again"
    return None


class _Views(TorchFunctionMode):
    """Within it, `contiguous` copies nothing, so that chunks and transposed matrices remain views."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def _within(value: Any, whole: Tensor) -> bool:
    value = value[0] if isinstance(value, list) else value
    return isinstance(value, Tensor) and value.untyped_storage()._cdata == whole.untyped_storage()._cdata


def _part(value: Any) -> Part:
    value = value[0] if isinstance(value, list) else value
    return Part(int(value.storage_offset()), tuple(value.shape), tuple(value.stride()))


def _some(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
