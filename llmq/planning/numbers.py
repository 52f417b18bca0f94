"""Checks that the source's numbers are the weights: floating point, in full, and not halves of something else."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from llmq.checkpoint.files import QUANTIZED
from llmq.checkpoint.source import Source
from llmq.discovery.named import Named
from llmq.discovery.names import Links
from llmq.errors import LlmqError
from llmq.formats.base import dtype_name
from llmq.formats.fp8 import CODES as CODES_OF_FP8

READ = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights that llmq quantizes."""

FP8_WAY_OUT = (
    "take the config.json that the model was published with, whose quantization_config says how to read them, or "
)
CODES, SAMPLE = 256, 1 << 16
"""The values that 8 bits can have; the numbers of a weight that are looked at."""


@dataclass(frozen=True)
class Extra:
    """A tensor that no class loads, by its name that of a Linear module or of something beside its weight.

    weight: the weight's parameter; rest: what the tensor's name has beyond the module's; inside: in the module, or
    beside it (`NAME.scale`, `NAME_scale`).
    """

    tensor: str
    weight: str
    rest: str
    inside: bool


def check_numbers(
    source: Source, model: nn.Module, links: Links, named: Named | None = None
) -> tuple[list[str], list[str]]:
    """Raises LlmqError, naming a weight, if numbers are stored without what gives them their meaning.

    That is a parameter in a dtype that needs scales, or a weight with tensors beside it, or in its place, that the
    model does not load: scales, zero points, codes, an adapter that was not merged. named: the class that config.json
    names, if it is another one. Returns warnings, and tensors to leave out of what is written: scales of caches and
    inputs, and state of training, which say nothing of the weight that they lie beside.
    """
    for tensor, parameter in _stored(model, links, named).items():
        dtype = source.info(tensor).dtype
        if parameter.is_floating_point() and dtype not in READ:
            kind = str(dtype).removeprefix("torch.")
            if dtype == torch.float64:
                if parameter.dim() < 2:
                    continue
                raise LlmqError(f"{source.folder}: {tensor} is stored as {kind}: convert it to float32")
            raise LlmqError(
                f"{source.folder}: {tensor} is stored as {kind}, numbers that mean nothing without their scales; llmq "
                f"reads float32, float16 and bfloat16 weights: {FP8_WAY_OUT if dtype in CODES_OF_FP8 else ''}"
                f"{_way_out(source)}"
            )
    extras = _extras(model, links, named)
    biases = [extra.tensor for extra in extras if _is_bias(extra)]
    parts: dict[str, list[str]] = {}
    found: dict[tuple[str, bool], bool] = {}
    left: list[str] = []
    for extra in extras:
        if _is_bias(extra):
            continue
        # All tensors of one name are of one tool: values are read for the first of them only.
        alike = extra.rest, _count(source, extra) == 1
        if alike not in found:
            found[alike] = _is_part(source, links, extra)
        if found[alike]:
            parts.setdefault(extra.weight, []).append(extra.tensor)
        elif extra.inside or _fits(source, links, extra):
            left.append(extra.tensor)
    if parts:
        weight, others = next(iter(parts.items()))
        stored = weight in links.source
        adapter = any("lora_" in tensor or "base_layer" in tensor for tensor in others)
        raise LlmqError(
            f"{source.folder}: {links.source.get(weight, weight)} has {_some(others)} "
            f"{'beside it, without which its numbers may not be the weight' if stored else 'in its place'}: "
            + ("merge the adapter first" if adapter else _way_out(source))
            + (", or take these tensors out of the file if they belong to nothing" if stored else "")
        )
    warnings = []
    if biases:
        warnings.append(
            f"transformers does not use {_some(biases)} of the checkpoint: is config.json that of this model?"
        )
    if left:
        warnings.append(
            f"{_some(left)} lie beside weights that are whole without them (a scale of a cache or of inputs, state of "
            "training); transformers does not load them: they are left out of what is written"
        )
    return warnings, left


def _stored(model: nn.Module, links: Links, named: Named | None) -> dict[str, nn.Parameter]:
    """Tensor → the parameter that it is loaded to, of the model or of the named class."""
    found: dict[str, nn.Parameter] = {}
    if named is not None:
        parameters = dict(named.model.named_parameters(remove_duplicate=False))
        found = {tensor: parameters[name] for tensor, name in named.parameters.items() if name in parameters}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return found | {tensor: parameters[name] for name, tensor in links.source.items() if name in parameters}


def _extras(model: nn.Module, links: Links, named: Named | None) -> list[Extra]:
    """The tensors that no class loads and whose name begins with that of a Linear module."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = f"{name}.weight"
            weights[links.source.get(weight, weight).removesuffix(".weight")] = weight
    found = []
    for tensor in links.unused:
        if named is not None and tensor in named.parameters:
            continue
        parts = tensor.split(".")
        owners = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        owner = next((owner for owner in owners if owner in weights), None)
        if owner is not None:
            found.append(Extra(tensor, weights[owner], tensor.removeprefix(owner + "."), True))
            continue
        ends = (at for at in range(len(tensor) - 1, tensor.rfind(".") + 1, -1) if not tensor[at].isalnum())
        owner = next((tensor[:at] for at in ends if tensor[:at] in weights), None)
        if owner is not None and weights[owner] in links.source:
            found.append(Extra(tensor, weights[owner], tensor.removeprefix(owner), False))
    return found


def _is_bias(extra: Extra) -> bool:
    return extra.rest.endswith("bias") and (not extra.inside or extra.tensor.endswith(".bias"))


def _is_part(source: Source, links: Links, extra: Extra) -> bool:
    """Whether a weight's numbers may not be the weight without this tensor: by its shape, its name and their values."""
    if extra.weight not in links.source:
        return True
    if extra.rest.endswith(_EXTRA_STATE_KEY_SUFFIX):
        return False
    if not _fits(source, links, extra):
        return extra.inside
    if _is_largest(source, links, extra):
        return False
    parts = extra.rest.split(".")
    called = parts[0] == "weight" or (len(parts) == 1 and parts[0].startswith("weight"))
    return _count(source, extra) > 1 or called or not extra.inside or _are_codes(source, links, extra)


def _count(source: Source, extra: Extra) -> int:
    return prod(source.info(extra.tensor).shape)


def _size(source: Source, links: Links, extra: Extra) -> tuple[int, int]:
    """The weight's rows and width."""
    rows, *width = source.info(links.source[extra.weight]).shape or (1,)
    return rows, prod(width)


def _fits(source: Source, links: Links, extra: Extra) -> bool:
    """Whether a tensor has the shape of scales: one for all, for each row or column, or for each tile of the weight."""
    rows, width = _size(source, links, extra)
    shape = source.info(extra.tensor).shape
    count = prod(shape)
    tiles = len(shape) == 2 and shape[0] <= rows and shape[1] <= width and count < rows * width
    return count in (0, 1, rows, width) or tiles


def _is_largest(source: Source, links: Links, extra: Extra) -> bool:
    """Whether a tensor holds the largest magnitude of the weight, or of each row: what a trainer or quantizer noted."""
    count, (rows, width) = _count(source, extra), _size(source, links, extra)
    if count not in (1, rows) or not width or not source.info(extra.tensor).dtype.is_floating_point:
        return False
    most = source.read(links.source[extra.weight]).float().reshape(rows, width).abs().amax(1)
    noted = source.read(extra.tensor).float().flatten()
    return torch.allclose(noted, most.max() if count == 1 else most, rtol=1e-2, atol=0)


def _are_codes(source: Source, links: Links, extra: Extra) -> bool:
    """Whether a weight holds no more values than codes of 8 bits, as if it had been cast without its scale."""
    tensor = links.source[extra.weight]
    rows, width = _size(source, links, extra)
    some = source.read_rows(tensor, 0, min(rows, -(-SAMPLE // max(1, width))))
    return some.numel() > 16 * CODES and len(set(some.flatten().tolist())) <= CODES


def _some(tensors: list[str]) -> str:
    return ", ".join(tensors[:3]) + (" …" if len(tensors) > 3 else "")


def _way_out(source: Source) -> str:
    """What to do with a source that is quantized, with the file that says how."""
    described = next((name for name in QUANTIZED if (source.folder / name).is_file()), None)
    return "start from the unquantized model" + (f" ({described} says how this one is quantized)" if described else "")


def main_dtype(source: Source, names: list[str], default: torch.dtype | None = None) -> torch.dtype:
    """The dtype of most bytes of the named tensors, among those that llmq reads; the default if none has one."""
    sizes: dict[torch.dtype, int] = {}
    for name in names:
        info = source.info(name)
        if info.dtype in READ:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default=default)
    if dtype is None:
        kinds = ", ".join(sorted({dtype_name(source.info(name).dtype) for name in names}))
        raise LlmqError(f"{source.folder}: its weights are {kinds}; llmq reads float32, float16 and bfloat16 sources")
    return dtype
