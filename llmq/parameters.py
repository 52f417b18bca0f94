"""A model's parameters, put in place and taken away one by one: on the meta device they cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def zeros(module: nn.Module, names: list[str] | None = None) -> Iterator[None]:
    """Give the named parameters (all of them by default) zeros, free until written to; afterwards what they were.

    Ties are kept within the module and, afterwards, with the rest of the model.
    """
    chosen = [n for n, _ in module.named_parameters()] if names is None else names
    before = {name: module.get_parameter(name) for name in chosen}
    try:
        for name, parameter in before.items():
            assign(module, name, torch.zeros(parameter.shape, dtype=parameter.dtype))
        yield
    finally:
        for name, parameter in before.items():
            _replace(module, module.get_parameter(name), parameter)


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in place of a parameter or buffer, keeping ties: other owners of a parameter see it too."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    old = getattr(holder, leaf)
    if isinstance(old, nn.Parameter):
        _replace(module, old, nn.Parameter(value, requires_grad=False))
    else:
        holder._buffers[leaf] = value


def empty(module: nn.Module, name: str) -> None:
    """Send a parameter back to the meta device."""
    parameter = module.get_parameter(name)
    if parameter.device.type != "meta":
        assign(module, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for other in module.modules():
        for key, parameter in other._parameters.items():
            if parameter is old:
                other._parameters[key] = new
