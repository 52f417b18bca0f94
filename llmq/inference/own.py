"""Copies of loaded tensors, so that none of them lies in a mapped file, whose pages would count as resident."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmq.inference.layer import QuantLinear
from llmq.machine import page_out
from llmq_kernels.products import row_slabs

AT_ONCE, SMALL = 1 << 24, 1 << 16
"""Bytes that are copied at once; tensors of fewer bytes share their pages with others and are left alone."""


def own(model: Any) -> None:
    """Copy, one at a time, parameters that may still be mapped from a file, whose pages would stay resident."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = _copy(parameter.data)


def own_layer(layer: QuantLinear) -> None:
    """`own` for one layer, but for the tensors that packing made."""
    fresh = layer.fresh()
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.device.type == "cpu" and not any(buffer is part for part in fresh):
            # A new tensor: a view would keep its base tensor in memory.
            layer._buffers[name] = _copy(buffer)


def _copy(tensor: Tensor) -> Tensor:
    """A copy, a few rows at a time: the rows of a mapped file that were copied need not stay in memory."""
    if tensor.dim() < 2 or not tensor.is_contiguous() or tensor.nbytes <= AT_ONCE:
        return tensor.clone()
    copied = torch.empty_like(tensor)
    for rows in row_slabs(len(tensor), tensor[0].nbytes, AT_ONCE):
        copied[rows] = tensor[rows]
        leave([tensor[rows]])
    return copied


def leave(tensors: Iterable[Tensor]) -> None:
    """Let the system take back pages of mapped files that were read for these tensors."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > SMALL:
            page_out(tensor.data_ptr(), tensor.nbytes)
