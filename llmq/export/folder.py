"""A quantized folder as exports read it: its codes and scales by weight, one at a time, and all its other tensors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.formats import codebook, compressed_tensors, ggml
from llmq.formats.compressed_tensors.inspect import scheme_of
from llmq.formats.dequantized import cache_scales, unquantized
from llmq.formats.inspection import section_of
from llmq.formats.stacks import unmarked
from llmq.grids.base import QuantizedWeight
from llmq.grids.kquants import KWeight
from llmq.grids.scheme import Scheme
from llmq.validate import made

PACKED, WEIGHT, SCALE, ZERO = "weight_packed", "weight", "weight_scale", "weight_zero_point"
ORDER, GLOBAL = "weight_g_idx", "weight_global_scale"
PARTS = (
    *(PACKED, WEIGHT, ggml.BLOCKS),
    *(SCALE, ZERO, ORDER, GLOBAL, "weight_shape"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
"""Suffixes of the tensors of a weight."""
METHOD = "compressed-tensors"
INPUTS = "the folder says that inputs are rounded, too: that is not exported, only its weights are"
CACHE = "the folder has scales of keys and values: they are not exported"
AGAIN = "quantize the model again with llmq (an integer grid, or --grid mxfp4), and export that folder"


class QuantizedFolder:
    """A folder in compressed-tensors' layouts of integers and FP4, by llmq or others, or of llama.cpp's blocks.

    weights: names, with '.weight', of those that are stored as codes; others: all tensors that belong to none. dtype:
    of most of the others. Raises LlmqError if it is no such folder, or holds weights that cannot be read so.
    """

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        self.source = FolderSource(path, trust_remote_code, quantized_ok=True)
        self.path = self.source.folder
        method, self.section = section_of(self.path, self.source.config)
        if method is None:
            raise LlmqError(f"{path} is not quantized: give a folder that llmq quantize wrote")
        if method != METHOD or self.section.get("format") == codebook.FORMAT:
            told = self.section["format"] if method == METHOD else method
            raise LlmqError(f"{path} is in the format of {told}: export it --to dense, or {AGAIN}")
        if not ggml.dequantizes(method, self.section) and unmarked(self.section)[1]:
            raise LlmqError(
                f"{path} has experts packed one by one where its model has one tensor for all, which no other tool "
                "reads: llmq.load runs it; to export, quantize without --loader llmq"
            )
        names = set(self.source.names())
        stems = {name.removesuffix(f".{SCALE}") for name in names if name.endswith(f".{SCALE}")}
        stems |= {name.removesuffix(f".{ggml.BLOCKS}") for name in names if name.endswith(f".{ggml.BLOCKS}")}
        self._parts = {
            f"{stem}.weight": {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in names} for stem in stems
        }
        self.weights = [
            name for name in sorted(self._parts) if {PACKED, WEIGHT, ggml.BLOCKS} & self._parts[name].keys()
        ]
        if not self.weights:
            raise LlmqError(f"{path}: config.json names {method}, but no weight has scales: download it again")
        taken = {stored for name in self.weights for stored in self._parts[name].values()}
        # Other programs round keys and values in their own ways.
        cached = cache_scales(self.source)
        taken |= set(cached)
        self.warnings = [CACHE] if cached else []
        if any(group.get("input_activations") for group in (self.section.get("config_groups") or {}).values()):
            self.warnings.append(INPUTS)
        self.others = [name for name in self.source.names() if name not in taken]
        told = ggml.schemes_of(self.section) if ggml.dequantizes(method, self.section) else {}
        self._schemes = {name: told.get(name.removesuffix(".weight")) or self._scheme(name) for name in self.weights}
        self.dtype = self._dtype()

    @property
    def config(self) -> dict[str, Any]:
        """config.json without what says how the weights are stored."""
        return unquantized(self.source.config)

    @property
    def config_text(self) -> str:
        """`config` as the text of a file."""
        return json.dumps(self.config, indent=2) + "\n"

    def scheme(self, name: str) -> Scheme:
        """The scheme of a weight's codes; inputs that a server would round are left out."""
        return self._schemes[name]

    def weight(self, name: str) -> QuantizedWeight | KWeight:
        """A weight's codes and scales. Raises LlmqError if its tensors do not fit together."""
        tensors = {part: self.source.read(stored) for part, stored in self._parts[name].items()}
        scheme = self._schemes[name]
        if ggml.BLOCKS in tensors:
            return ggml.unpack(tensors, scheme)
        if PACKED not in tensors and tensors[WEIGHT].dtype == torch.int8:
            rows, width = tensors[WEIGHT].shape
            scale = tensors[SCALE]
            scale = scale if scale.dim() == 2 and len(scale) == rows else scale.reshape(1, 1).expand(rows, 1)
            zero = tensors.get(ZERO)
            if width % scale.shape[1] or (zero is not None and zero.numel() != scale.numel()):
                raise LlmqError(f"{self._where(name)}: {[rows, width]} codes with scales {[*scale.shape]}: {AGAIN}")
            zero = None if zero is None or not bool(zero.any()) else zero.to(torch.int8).view(scale.shape)
            return QuantizedWeight(tensors[WEIGHT], scale.contiguous(), zero, scheme)
        try:
            return compressed_tensors.unpack(tensors, scheme)
        except LlmqError as error:
            raise LlmqError(f"{self._where(name)}: {error}") from error

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a weight."""
        parts = self._parts[name]
        if ggml.BLOCKS in parts:
            return ggml.shape_of(self.source.info(parts[ggml.BLOCKS]), self._schemes[name])
        rows, words = self.source.info(parts.get(PACKED, parts.get(WEIGHT, ""))).shape
        if PACKED not in parts:
            return rows, words
        if "weight_shape" in parts:
            return rows, int(self.source.read(parts["weight_shape"])[1])
        return rows, words * 2

    def _scheme(self, name: str) -> Scheme:
        """See `scheme`. Raises LlmqError for weights that no export reads."""
        parts = self._parts[name]
        if ggml.BLOCKS in parts:
            raise LlmqError(f"{self._where(name)} is stored as blocks of a type that config.json does not say: {AGAIN}")
        codes = self.source.info(parts.get(PACKED) or parts[WEIGHT])
        told = scheme_of(self.path, name.removesuffix(".weight"), self.section)
        if len(codes.shape) != 2:
            raise LlmqError(f"{self._where(name)} is several matrices in a tensor, which llmq cannot export: {AGAIN}")
        if ORDER in parts:
            raise LlmqError(f"{self._where(name)} has groups in activation order, as nothing else has: {AGAIN}")
        if codes.dtype == torch.uint8 and told.get("num_bits") == 4:
            kind = "nvfp4" if GLOBAL in parts else "mxfp4"
            return Scheme(bits=4, group_size=16 if GLOBAL in parts else 32, grid=kind)
        if codes.dtype not in (torch.int32, torch.int8) or told.get("type", "int") != "int":
            kind = str(codes.dtype).removeprefix("torch.")
            raise LlmqError(f"{self._where(name)} is {kind} with scales, which llmq cannot export: {AGAIN}")
        group = told.get("group_size") if told.get("strategy") == "group" else None
        return made(
            lambda: Scheme(
                bits=int(told.get("num_bits", 8)), group_size=group, symmetric=bool(told.get("symmetric", True))
            ),
            self._where(name),
        )

    def _where(self, name: str) -> str:
        parts = self._parts[name]
        return f"{self.source.info(next(iter(parts.values()))).file}: {name}"

    def _dtype(self) -> torch.dtype:
        """The dtype of most of what is not quantized; where all is, that of scales."""
        count: Counter[torch.dtype] = Counter()
        for name in self.others:
            info = self.source.info(name)
            count[info.dtype] += info.nbytes * info.dtype.is_floating_point
        likely, size = (count.most_common(1) or [(torch.bfloat16, 0)])[0]
        return likely if size and likely in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16
