"""Materialize and free a model's parameters one by one; on the meta device they take no memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def zeros(module: nn.Module, names: list[str] | None = None) -> Iterator[None]:
    """Set the named parameters (default: all) to zeros, which take memory only once written to; restore them
    afterwards.

    Tied parameters stay tied within the module and, afterwards, with the rest of the model.
    """
    chosen = [n for n, _ in module.named_parameters()] if names is None else names
    with _instead(module, chosen, lambda _, p: _zeros(p)):
        yield


def _zeros(parameter: Tensor) -> Tensor:
    # Unlike torch.zeros, numpy leaves it to the system to make pages when they are first written to.
    memory = torch.from_numpy(np.zeros(max(1, parameter.nbytes), dtype=np.uint8))
    return memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)


@contextmanager
def shared_zeros(
    module: nn.Module, names: list[str] | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """As `zeros`, in the memory of one number per parameter: for code that only reads them. device: default the CPU."""
    chosen = [n for n, _ in module.named_parameters()] if names is None else names
    with _instead(module, chosen, lambda _, p: torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)):
        yield


@contextmanager
def watch_used(module: nn.Module) -> Iterator[set[str]]:
    """Within the context, the set becomes that of the parameters which operators read; each has memory of its own."""
    owners = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters() if p.device.type != "meta"}
    used: set[str] = set()

    class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.device.type != "meta":
                    used.update({owners[p] for p in [value.untyped_storage().data_ptr()] if p in owners})
            return func(*args, **(kwargs or {}))

    with Watched():  # type: ignore[no-untyped-call]
        yield used


@contextmanager
def randomize(module: nn.Module, seed: int = 0, but: Collection[str] = ()) -> Iterator[None]:
    """Set every parameter to random float32 values on the CPU, floating buffers to float32; restore them afterwards.

    but: parameters that are left as they are. Matrices preserve the variance of their inputs (uniform, variance
    1 / width). Vectors next to a matrix or to another vector of the same size (biases) are small; other vectors and
    scalars (norms) lie in [0.5, 1.5].
    """
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, parameter: Tensor) -> Tensor:
        if not parameter.is_floating_point():
            return torch.zeros(parameter.shape, dtype=parameter.dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        before = itertools.takewhile(
            lambda item: item[0] != name.rpartition(".")[2], owner.named_parameters(recurse=False)
        )
        beside = any(p.shape == parameter.shape for _, p in before)
        beside = beside or any(p.dim() >= 2 for p in owner.parameters(recurse=False))
        low, high = 0.5, 1.5
        if parameter.dim() >= 2:
            high = (3 / parameter.shape[-1]) ** 0.5 if parameter.numel() else 1.0
            low = -high
        elif beside and parameter.numel() > 1:
            low, high = -0.2, 0.2
        return torch.empty(parameter.shape).uniform_(low, high, generator=generator)

    buffers = {n: b for n, b in module.named_buffers() if b.is_floating_point() and b.device.type != "meta"}
    with _instead(module, [n for n, _ in module.named_parameters() if n not in but], make):
        try:
            for name, buffer in buffers.items():
                assign(module, name, buffer.float())
            yield
        finally:
            for name, buffer in buffers.items():
                assign(module, name, buffer)


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace some parameters' values; afterwards put the original tensors back."""
    with _instead(module, list(values), lambda name, _: values[name]):
        yield


@contextmanager
def _instead(module: nn.Module, names: list[str], make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    before = {name: module.get_parameter(name) for name in names}
    try:
        for name, parameter in before.items():
            assign(module, name, make(name, parameter))
        yield
    finally:
        for name, parameter in before.items():
            _replace(module, module.get_parameter(name), parameter)


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by `value`, in all modules that share it."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    old = getattr(holder, leaf)
    if isinstance(old, nn.Parameter):
        _replace(module, old, nn.Parameter(value, requires_grad=False))
    else:
        holder._buffers[leaf] = value


def empty(module: nn.Module, name: str) -> None:
    """Move a parameter back to the meta device, freeing its memory."""
    parameter = module.get_parameter(name)
    if parameter.device.type != "meta":
        assign(module, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for other in module.modules():
        for key, parameter in other._parameters.items():
            if parameter is old:
                other._parameters[key] = new
