"""MXFP4 as transformers stores it for whole stacks of experts, described by `llmq inspect`, dequantized when read.

`NAME_blocks` uint8 [experts, out, in/32, 16] has two FP4 codes in a byte, the low nibble first; `NAME_scales` uint8
[experts, out, in/32] an exponent for every 32 codes. Dequantized, `NAME` is [experts, in, out], as transformers has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.base import Row, Unclear, dtype_name
from llmq.formats.dequantized import Coded, damaged, pieces
from llmq.formats.scaled import pairs_of_numbers

CODES, SCALES_NAME = "_blocks", "_scales"
GROUP = 32
BIAS, NAN = 127, 255
PACKAGES = {"mxfp4": "accelerate"}
STOCK_UNPACKS = not torch.cuda.is_available()


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


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder's weights are stacks in MXFP4."""
    return method == "mxfp4"


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every stack that is stored as codes. Raises LlmqError if one has no scales, or scales that do not fit it."""
    names = set(source.names())
    found = []
    for name in source.names():
        stem = name.removesuffix(CODES)
        if name.endswith(SCALES_NAME) and name.removesuffix(SCALES_NAME) + CODES not in names:
            # Other scales may have this name too.
            if source.info(name).dtype == torch.uint8:
                codes = name.removesuffix(SCALES_NAME) + CODES
                raise damaged(source, name, f"has the scales of codes that are missing ({codes})")
        elif stem != name and source.info(name).dtype == torch.uint8:
            found.append(_coded(source, dtype, stem, names))
    return found


def _coded(source: Source, dtype: torch.dtype, stem: str, names: set[str]) -> Coded:
    codes, scales = stem + CODES, stem + SCALES_NAME
    if scales not in names:
        raise damaged(source, codes, f"is stored as MXFP4 codes, and its scales ({scales}) are missing")
    shape, beside = source.info(codes).shape, source.info(scales)
    if beside.dtype != torch.uint8:
        raise damaged(source, scales, f"is {dtype_name(beside.dtype)}, and the exponents of MXFP4 are uint8")
    if len(shape) != 4 or shape != (*beside.shape, GROUP // 2):
        raise damaged(source, scales, f"is {[*beside.shape]} for codes {[*shape]}")
    experts, out, groups, _ = shape
    pairs = pairs_of_numbers()

    def rows(start: int, stop: int) -> Tensor:
        value = torch.empty((stop - start, groups * GROUP, out), dtype=dtype)
        for expert in range(start, stop):
            found, exponents = (source.read_rows(name, expert, expert + 1)[0] for name in (codes, scales))
            if bool((exponents == NAN).any()):
                raise damaged(source, scales, f"has the exponent {NAN}, which is not a number, for expert {expert}")
            for begin, end in pieces((out, groups * GROUP), 0, out):
                words = pairs.index_select(0, found[begin:end].reshape(-1).int())
                numbers = words.view(torch.float32).view(end - begin, groups, GROUP)
                numbers = torch.ldexp(numbers, exponents[begin:end].int()[..., None] - BIAS)
                value[expert - start, :, begin:end] = numbers.reshape(end - begin, -1).T
        return value

    return Coded(stem, (experts, groups * GROUP, out), (codes, scales), rows)
