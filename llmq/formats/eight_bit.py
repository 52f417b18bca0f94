"""compressed-tensors `int-quantized` and `float-quantized`: 8-bit weights that meet 8-bit activations (W8A8, FP8).

What is stored for a weight [out, in] is listed in `spec`: codes as they are, not packed. Written against
compressed-tensors 0.20; tried with stock transformers 5.23 on the CPU, which rounds the activations of every product
(see llmq.numerics.activations):

- Dynamic activations store nothing. Static ones store `input_scale` [1]. Scales belong in the model's dtype: loading
  rounds others to it, so what float32 scales meant is not what runs.
- vLLM takes int8 activations per token, or per tensor and static; float8 either way. Weight scales per channel go with
  all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import QUANT_METHOD, VERSION
from llmq.numerics.quantized import QuantizedWeight
from llmq.recipe import Scheme

FORMATS = {"int": "int-quantized", "float": "float-quantized"}
DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}
WEIGHT, SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
SUFFIXES = (WEIGHT, SCALE, INPUT_SCALE)


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype, per_tensor: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a weight [out, in] becomes: suffix → (dtype, shape); per_tensor: one scale for the whole weight.

    Raises LlmqError when the scheme is not one of this format's.
    """
    _check(scheme)
    rows, width = shape
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        WEIGHT: (DTYPES[scheme.grid], (rows, width)),
        SCALE: (scale_dtype, (1,) if per_tensor else (rows, 1)),
    }
    if scheme.activations is not None and not scheme.activations.dynamic:
        entries[INPUT_SCALE] = (scale_dtype, (1,))
    return entries


def pack(q: QuantizedWeight, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says.

    q: codes int8 or float8_e4m3fn [out, in], scale [out, 1], or [1] for the whole weight; input_scale: of one element,
    needed for static activations only, stored in the scale's dtype. Raises LlmqError when it is missing.
    """
    _check(q.scheme)
    tensors = {WEIGHT: q.codes.contiguous(), SCALE: q.scale.contiguous()}
    if q.scheme.activations is not None and not q.scheme.activations.dynamic:
        if input_scale is None:
            raise LlmqError(f"a {q.scheme} weight with static activations needs the scale of its input")
        tensors[INPUT_SCALE] = input_scale.reshape(1).to(q.scale.dtype)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`, but that one scale for the whole weight comes back repeated, [out, 1].

    Raises LlmqError when tensors are missing or have dtypes or shapes other than `spec`'s.
    """
    _check(scheme)
    static = scheme.activations is not None and not scheme.activations.dynamic
    missing = [s for s in SUFFIXES if s not in tensors and (s != INPUT_SCALE or static)]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    codes, scale = tensors[WEIGHT], tensors[SCALE]
    for suffix, (dtype, shape) in spec(codes.shape, scheme, scale.dtype, scale.dim() == 1).items():
        found = tensors[suffix]
        if tuple(found.shape) != shape or (suffix == WEIGHT and found.dtype != dtype):
            raise LlmqError(
                f"{suffix} of a {scheme} weight must be {dtype} {[*shape]}, not {found.dtype} {[*found.shape]}"
            )
    return QuantizedWeight(codes, scale.expand(codes.shape[0], 1).contiguous(), None, scheme)


def refusal(scheme: Scheme) -> str | None:
    """Why stock readers cannot load this scheme in this format, in a sentence, or None."""
    if scheme.grid not in FORMATS or scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric:
        return f"{' and '.join(FORMATS.values())} hold symmetric 8-bit weights with a scale per channel, not {scheme}"
    if scheme.grid == "int" and scheme.activations is None:
        return "int-quantized weights go with 8-bit activations; int8 weights alone are written as pack-quantized"
    return None


def group(scheme: Scheme, targets: Sequence[str], per_tensor: bool = False) -> dict[str, Any]:
    """One entry of `config_groups`: the modules with these names, or of these classes, are in this scheme."""
    _check(scheme)
    activations = None
    if scheme.activations is not None:
        dynamic = scheme.activations.dynamic
        activations = _arguments(scheme, "token" if dynamic else "tensor", dynamic)
    return {
        "targets": [*targets],
        "format": FORMATS[scheme.grid],
        "weights": _arguments(scheme, "tensor" if per_tensor else "channel", False),
        "input_activations": activations,
        "output_activations": None,
    }


def config(groups: Mapping[Scheme, Sequence[str]], ignore: Iterable[str], per_tensor: bool = False) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose weights are all in this format.

    groups: the module names of each scheme; ignore: the names of linear modules left alone. Names as in the checkpoint,
    without '.weight'. Raises LlmqError when nothing is quantized.
    """
    schemes = sorted((s for s, names in groups.items() if names), key=lambda s: (-len(groups[s]), str(s)))
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    alone = len(schemes) == 1
    entries = [group(s, ["Linear"] if alone else sorted(groups[s]), per_tensor) for s in schemes]
    formats = {entry["format"] for entry in entries}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {f"group_{index}": entry for index, entry in enumerate(entries)},
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _arguments(scheme: Scheme, strategy: str, dynamic: bool) -> dict[str, Any]:
    """What compressed-tensors calls QuantizationArgs: of the weight, or of its input."""
    return {
        "num_bits": 8,
        "type": scheme.grid,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "actorder": None,
        "dynamic": dynamic,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _check(scheme: Scheme) -> None:
    reason = refusal(scheme)
    if reason:
        raise LlmqError(reason)
