"""Kernel launches; scripts/compile_kernels.py compiles exactly what is launched here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq_kernels.triton.gpu import on


class Launch(NamedTuple):
    """A kernel with all arguments of a launch.

    arguments: tensors (or None) and numbers, in the kernel's order; constexprs: its constants; options: Triton's own
    (num_warps, num_stages, maxnreg, enable_fp_fusion, launch_pdl).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]

    @property
    def rest(self) -> tuple[Any, ...]:
        """The values of the kernel's constants, in its order."""
        return tuple(self.constexprs[name] for name in self.kernel.arg_names[len(self.arguments) :])


def launch(device: torch.device, *launches: Launch) -> None:
    """Launch kernels on a device, one after another."""
    with on(device):
        for one in launches:
            start(one)


def start(one: Launch) -> Any:
    """Launch a kernel on the current device; returns what Triton compiled, or None from its interpreter."""
    return one.kernel[one.grid](*one.arguments, **one.constexprs, **one.options)


class Repeated:
    """Launches of one kernel that differ in tensors, in one number and in the grid, on one device.

    Triton's launcher looks at every argument of every launch for what machine code depends on, which takes it 9 µs.
    Here only the tensors' addresses can change that (all are multiples of 16, as torch allocates them, or Triton looks
    itself), so what was compiled is launched directly.
    """

    def __init__(self) -> None:
        self.compiled: Any = None
        self.rest: tuple[Any, ...] = ()
        self.runs: dict[int, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], number: int, make: Callable[[], Launch]
    ) -> None:
        """Launch; make() is the same as a whole `Launch` with the arguments (*tensors, number, …). The grid depends on
        the number alone.
        """
        for tensor in tensors:
            if tensor is not None and tensor.data_ptr() & 15:
                start(make())
                return
        run = self.runs.get(number)
        if run is not None:
            run(*tensors, number, *self.rest)
            return
        if self.compiled is None:
            made = make()
            compiled = start(made)
            self.rest = (*made.arguments[len(tensors) + 1 :], *made.rest)
            # Last: another thread may launch from here on.
            self.compiled = compiled
            return
        run = self.runs[number] = self.compiled[grid]
        run(*tensors, number, *self.rest)
