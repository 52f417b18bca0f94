"""Finds the weights that stock transformers cannot load packed.

A packed module has no `weight` of its own until the model first runs. Loading still calls the model's own weight
initialization on every module, and some of these routines access `weight` unconditionally: loading then fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from llmq.discovery.named import quiet
from llmq.discovery.reasons import Kind, Reason
from llmq.discovery.rename import Rules

UNPACKABLE = Reason(
    Kind.NOT_LOADABLE, "stock transformers cannot load it packed: the model's own code accesses it while loading"
)


def unpackable(model: nn.Module, names: list[str]) -> set[str]:
    """Those of the Linear modules `names` for which the model's initialization code fails once their weight is packed.

    Found by calling that code; the model must be on the meta device, where initialization takes no memory.
    """
    modules = {name: model.get_submodule(name) for name in names}
    if any(p.device.type != "meta" for p in model.parameters()):
        return set()
    held = {id(m): (name, m, dict(m._parameters)) for name, m in modules.items()}
    found: set[str] = set()
    for module in modules.values():
        del module._parameters["weight"]
    try:
        for owner, module in _owners(model, None):
            while True:
                try:
                    with torch.no_grad():  # as in transformers, because initialization writes to weights in place
                        owner._init_weights(module)  # type: ignore[operator]
                except AttributeError as error:
                    if error.name == "weight" and id(error.obj) in held:
                        name, reached, parameters = held.pop(id(error.obj))
                        _restore(reached, parameters)
                        found.add(name)
                        continue
                except Exception:  # noqa: S110  other failures on the meta device are irrelevant here
                    pass
                break
    finally:
        for _, module, parameters in held.values():
            _restore(module, parameters)
    return found


def accepts(model: nn.Module, section: Mapping[str, Any]) -> bool:
    """Whether transformers' rules for the model's checkpoints can be joined with those of a `quantization_config`."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(deepcopy(dict(section)), pre_quantized=True)
        # Its package need not be installed to write the folder.
        with suppress(ImportError):
            quantizer.validate_environment(device_map=None, weights_only=True)
        try:
            Rules(model, quantizer)
        except ValueError:
            # It also looks at the names of what is packed, which the model has once it is prepared.
            prepared: Any = deepcopy(model)
            with quiet():
                quantizer.preprocess_model(model=prepared, device_map=None, checkpoint_files=None)
            Rules(prepared, quantizer)
    except Exception:  # of a type's rules and a package's together anything may fail
        return False
    return True


def _restore(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    module._parameters.clear()
    module._parameters.update(parameters)


def _owners(module: nn.Module, owner: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module]]:
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        yield from _owners(child, owner)
    if owner is not None:
        yield owner, module
