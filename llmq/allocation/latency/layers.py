"""Random weights, packed as llmq packs those of a folder that it loads."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmq import formats
from llmq.checkpoint.tensors import read_header
from llmq.errors import LlmqError
from llmq.formats.plain import Weight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.inference.layer import QuantLinear
from llmq.inference.linear import quant_linear
from llmq.inference.transformers_hook import reading

NAME = "weight"
SPREAD = 0.05


def packed(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, bias: bool, device: torch.device) -> QuantLinear:
    """A linear layer with a random weight [out, in], for inputs of `dtype`. Raises LlmqError as `weight` does."""
    value = weight(shape, scheme, dtype, device)
    return quant_linear(value, torch.zeros(shape[0], dtype=dtype, device=device) if bias else None, dtype)


def weight(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Weight:
    """A random weight, stored and read as one of a folder.

    Raises LlmqError if llmq's kernels do not run the scheme.
    """
    generator = torch.Generator().manual_seed(0)
    value = torch.empty(shape).uniform_(-SPREAD, SPREAD, generator=generator)
    quantized = round_to_nearest(value, scheme, dtype, "minmax" if "minmax" in scheme.rules.ranges else None)
    found = _read(formats.of(scheme).pack(quantized), scheme, shape, dtype)
    tensors: dict[str, Any] = {name: part.to(device) for name, part in vars(found).items() if isinstance(part, Tensor)}
    return replace(found, **tensors)


def _read(stored: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    """A stored weight as llmq reads it from a folder."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    section = formats.config({scheme: [NAME]}, (), dtype)
    reasons = []
    with reading():
        config: Any = AutoQuantizationConfig.from_dict(section)
    method = str(getattr(config.quant_method, "value", config.quant_method))
    # A method may have one entry for each of its widths.
    readers = [reader for key, found in formats.readers().items() if key.startswith(method) for reader in found]
    for reader in dict.fromkeys(readers):
        reason = reader.refusal(config)
        if reason is not None:
            reasons.append(reason)
            continue
        with tempfile.TemporaryDirectory(prefix="llmq-") as folder:
            file = Path(folder) / "one.safetensors"
            save_file({f"{NAME}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}, file)
            infos = {name.removeprefix(f"{NAME}."): info for name, info in read_header(file).items()}
            layer = reader(config).layer(NAME, nn.Linear(shape[1], shape[0], bias=False, device="meta"), shape, infos)
            # Some read their metadata from the file.
            found: Weight | None = None if layer is None else layer.read(stored)
        if found is not None:
            return found
    reason = (reasons or ["its reader finds no weight"])[0]
    raise LlmqError(
        f"--target-latency: llmq's kernels do not run {scheme}: {reason}: leave it out of --candidates, as its time "
        "cannot be measured"
    )
