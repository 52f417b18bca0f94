"""Decides whether the Triton kernels can run on a tensor's device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on tensors of that device, or None.

    They run on GPUs, and with TRITON_INTERPRET=1 in the environment also on a CPU, slowly. Tests use that, by choosing
    the Triton layout explicitly; it is never chosen automatically on a CPU.
    """
    if not _installed():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return _too_old(device)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on a GPU, not on {device.type}"
    return None


def on_triton(x: Tensor) -> bool:
    """Whether a product with this input runs on Triton's kernels. They read bfloat16 and float16."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and _installed()
        and _too_old(x.device) is None
    )


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton kernels need compute capability 8.0, which {torch.cuda.get_device_name(device)} does not have"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
