"""MXFP4 as transformers stores it for whole stacks of experts, which `llmq inspect` describes; llmq does not read it.

`NAME_blocks` uint8 [experts, out, in/32, 16] has two FP4 codes in a byte, `NAME_scales` uint8 [experts, out, in/32] an
exponent for every 32 codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.base import Row, Unclear, dtype_name

CODES, SCALES_NAME = "_blocks", "_scales"
GROUP = 32


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of its two tensors. Raises Unclear if they do not fit."""
    codes, scales = parts[CODES], parts[SCALES_NAME]
    fits = codes.shape == (*scales.shape, GROUP // 2) and len(scales.shape) > 1
    if not fits or (codes.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise Unclear(f"{dtype_name(codes.dtype)} {[*codes.shape]} with scales {[*scales.shape]}")
    shape = (*scales.shape[:-1], GROUP * scales.shape[-1])
    return Row(module, shape, "float", 4, GROUP, True, None, codes.nbytes + scales.nbytes, dtype_name(codes.dtype))


COMPANIONS = {CODES: (SCALES_NAME,)}
SCALES = (SCALES_NAME,)
