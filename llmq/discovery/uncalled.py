"""Finds linear layers whose weight the model's code reads instead of calling them: packed, they have none to read."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import shared_zeros


def uncalled(model: nn.Module) -> set[str]:
    """The plain linear layers that a run does not call, although it calls the module that holds them.

    The run is on the inputs that transformers gives the model's class (`dummy_inputs`), without arithmetic, and the
    model on the meta device. What it does not reach, an image's tower for example, is not judged; nor is anything where
    it fails.
    """
    names = {module: name for name, module in model.named_modules()}
    called: set[str] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(names[module])

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        with shared_zeros(model), without_arithmetic():
            model(**model.dummy_inputs)  # type: ignore[arg-type]
    except Exception:  # the inputs are not those of every class, and model code may fail in any way on zeros
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name for name in linear - called if name.rpartition(".")[0] in called}
