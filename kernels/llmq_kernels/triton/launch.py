"""How a kernel is launched: what scripts/compile_kernels.py compiles is what is launched here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llmq_kernels.triton.gpu import on


class Launch(NamedTuple):
    """A kernel with everything that a launch gives it.

    arguments: tensors (None: one that is not there) and numbers, in the kernel's order; constexprs: the rest of its
    arguments; options: what Triton is told beside them (num_warps, num_stages, maxnreg, enable_fp_fusion).
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
