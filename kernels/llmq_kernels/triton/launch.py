"""Kernel launches; scripts/compile_kernels.py compiles exactly what is launched here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llmq_kernels.triton.gpu import on


class Launch(NamedTuple):
    """A kernel with all arguments of a launch.

    arguments: tensors (or None) and numbers, in the kernel's order; constexprs: its constants; options: Triton's own
    (num_warps, num_stages, maxnreg, enable_fp_fusion).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


def launch(device: torch.device, *launches: Launch) -> None:
    """Launch kernels on a device, one after another."""
    with on(device):
        for kernel, grid, arguments, constexprs, options in launches:
            kernel[grid](*arguments, **constexprs, **options)
