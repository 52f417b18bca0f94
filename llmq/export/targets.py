"""What a folder in another format has: the tensors of a weight, its configuration, and how both are read again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.export.folder import QuantizedFolder
from llmq.formats import awq, gptq, mlx
from llmq.formats.packing import unpack_codes
from llmq.formats.plain import IntWeight
from llmq.grids.base import QuantizedWeight

Told = Mapping[str, Any]
"""What a configuration says of a weight."""


@dataclass(frozen=True)
class Target:
    """A format. told(weight): what its configuration says of the weight; pack(weight, told): its tensors by suffix;
    unpack(tensors, told): float32 [out, in]; config(folder, told by weight): what is added to config.json. All but
    unpack raise LlmqError, told and pack without the weight's name.
    """

    name: str
    told: Callable[[QuantizedWeight], Told]
    pack: Callable[[QuantizedWeight, Told], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Told], Tensor]
    config: Callable[[QuantizedFolder, Mapping[str, Told]], dict[str, Any]]


def _integers(weight: QuantizedWeight) -> Told:
    """Bits, group size and symmetry: what GPTQ's and AWQ's configurations say of all weights."""
    group = weight.codes.shape[1] // weight.scale.shape[1]
    return {"bits": weight.scheme.bits, "group_size": group, "symmetric": weight.zero is None}


def _mlx_config(folder: QuantizedFolder, told: Mapping[str, Told]) -> dict[str, Any]:
    """The most frequent settings for all, and an entry for each module that differs."""
    count = Counter(tuple(sorted(one.items())) for one in told.values())
    usual = dict(count.most_common(1)[0][0])
    others = {name.removesuffix(".weight"): dict(one) for name, one in told.items() if dict(one) != usual}
    # mlx-lm writes both names, and reads the first.
    return {"quantization": usual | others, "quantization_config": usual | others}


def _one(folder: QuantizedFolder, told: Mapping[str, Told], target: str) -> tuple[int, int, bool]:
    """Bits, group size (−1 for one scale per row) and symmetry of all weights. Raises LlmqError if they differ."""
    widths = {name: folder.shape(name)[1] for name in told}
    whole = all(one["group_size"] == widths[name] for name, one in told.items())
    found = {(one["bits"], -1 if whole else one["group_size"], one["symmetric"]) for one in told.values()}
    if len(found) > 1:
        listed = ", ".join(sorted({str(folder.scheme(name)) for name in told}))
        raise LlmqError(
            f"{folder.path}: a folder of {target} has one scheme for all weights, not {listed}: give them one scheme, "
            "or export to mlx or gguf"
        )
    return found.pop()


def _gptq_config(folder: QuantizedFolder, told: Mapping[str, Told]) -> dict[str, Any]:
    bits, group, symmetric = _one(folder, told, "GPTQ")
    section = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "true_sequential": True,
        "damp_percent": 0.05,
        "lm_head": bool(_outside(told)),
        "checkpoint_format": "gptq",
        # gptqmodel's and vLLM's list of modules that are not quantized.
        "dynamic": {f"-:{re.escape(module)}$": {} for module in _plain(folder)},
    }
    return {"quantization_config": section}


def _awq_config(folder: QuantizedFolder, told: Mapping[str, Told]) -> dict[str, Any]:
    bits, group, _ = _one(folder, told, "AWQ")
    if outside := _outside(told):
        raise LlmqError(
            f"{folder.path}: loaders of AWQ leave what is outside the decoder's blocks unquantized, as {outside[0]}: "
            "export to mlx or gguf, or quantize without --include"
        )
    section = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _plain(folder) or None,
    }
    return {"quantization_config": section}


def _plain(folder: QuantizedFolder) -> list[str]:
    """The modules whose matrix is not quantized: what is not in such a list, loaders take for quantized."""
    return [
        module
        for name in folder.others
        if (module := name.removesuffix(".weight")) != name and len(folder.source.info(name).shape) == 2
    ]


def _outside(told: Mapping[str, Told]) -> list[str]:
    """The quantized weights that are in no numbered list of blocks, such as that of the output embedding."""
    return [name for name in told if not re.search(r"\.\d+\.", name)]


def _of_kernels(weight: IntWeight) -> Tensor:
    """What a reader's plain form of a weight stands for, float32 [out, in]."""
    codes = unpack_codes(weight.words, weight.bits, weight.in_features).to(torch.float32)
    if weight.zero is not None:
        codes -= weight.zero.to(torch.float32).repeat_interleave(weight.group_size, dim=1)
    return codes * weight.scale.to(torch.float32).repeat_interleave(weight.group_size, dim=1)


def _from_gptq(tensors: Mapping[str, Tensor], told: Told) -> Tensor:
    shape = (tensors["scales"].shape[1], len(tensors["g_idx"]))
    return _of_kernels(gptq.GPTQLayer(shape, told["bits"], told["group_size"], 1, True).read(tensors))


def _from_awq(tensors: Mapping[str, Tensor], told: Told) -> Tensor:
    shape = (tensors["scales"].shape[1], len(tensors["qweight"]))
    return _of_kernels(awq.AWQLayer(shape, told["group_size"]).read(tensors))


TARGETS = {
    "mlx": Target("MLX", mlx.settings, mlx.pack, mlx.unpack, _mlx_config),
    "gptq": Target("GPTQ", _integers, lambda weight, _: gptq.pack(weight), _from_gptq, _gptq_config),
    "awq": Target("AWQ", _integers, lambda weight, _: awq.pack(weight), _from_awq, _awq_config),
}
