"""Checks that the source's numbers are the weights: floating point, in full, and not halves of something else."""

from __future__ import annotations

import torch
from torch import nn

from llmq.checkpoint.files import QUANTIZED
from llmq.checkpoint.source import Source
from llmq.discovery.named import Named
from llmq.discovery.names import Links
from llmq.errors import LlmqError

READ = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights that llmq quantizes."""


def check_numbers(source: Source, model: nn.Module, links: Links, named: Named | None = None) -> list[str]:
    """Raises LlmqError, naming a weight, if numbers are stored without what gives them their meaning.

    That is a parameter in a dtype that needs scales, or a weight with tensors beside it, or in its place, that the
    model does not load: scales, zero points, codes, an adapter that was not merged. named: the class that config.json
    names, if it is another one. Returns warnings: of biases that transformers leaves out.
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
                f"reads float32, float16 and bfloat16 weights: {_way_out(source)}"
            )
    biases: list[str] = []
    for weight, extra in _beside(model, links, named).items():
        others = [tensor for tensor in extra if not tensor.endswith(".bias")]
        biases += [tensor for tensor in extra if tensor.endswith(".bias")]
        if others:
            stored = weight in links.source
            adapter = any("lora_" in tensor or "base_layer" in tensor for tensor in others)
            raise LlmqError(
                f"{source.folder}: {links.source.get(weight, weight)} has {_some(others)} "
                f"{'beside it, without which its numbers may not be the weight' if stored else 'in its place'}: "
                + ("merge the adapter first" if adapter else _way_out(source))
                + (", or take these tensors out of the file if they belong to nothing" if stored else "")
            )
    if not biases:
        return []
    return [f"transformers does not use {_some(biases)} of the checkpoint: is config.json that of this model?"]


def _stored(model: nn.Module, links: Links, named: Named | None) -> dict[str, nn.Parameter]:
    """Tensor → the parameter that it is loaded to, of the model or of the named class."""
    found: dict[str, nn.Parameter] = {}
    if named is not None:
        parameters = dict(named.model.named_parameters(remove_duplicate=False))
        found = {tensor: parameters[name] for tensor, name in named.parameters.items() if name in parameters}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return found | {tensor: parameters[name] for name, tensor in links.source.items() if name in parameters}


def _beside(model: nn.Module, links: Links, named: Named | None) -> dict[str, list[str]]:
    """Weight of a Linear module, by its name in the model → the tensors of that module that no class loads."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = f"{name}.weight"
            weights[links.source.get(weight, weight).removesuffix(".weight")] = weight
    found: dict[str, list[str]] = {}
    for tensor in links.unused:
        parts = tensor.split(".")
        owners = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        owner = next((owner for owner in owners if owner in weights), None)
        if owner is not None and (named is None or tensor not in named.parameters):
            found.setdefault(weights[owner], []).append(tensor)
    return found


def _some(tensors: list[str]) -> str:
    return ", ".join(tensors[:3]) + (" …" if len(tensors) > 3 else "")


def _way_out(source: Source) -> str:
    """What to do with a source that is quantized, with the file that says how."""
    described = next((name for name in QUANTIZED if (source.folder / name).is_file()), None)
    return "start from the unquantized model" + (f" ({described} says how this one is quantized)" if described else "")
