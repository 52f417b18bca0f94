"""Maps a stored tensor's name to the model's name for it, by transformers' renaming rules, as from_pretrained does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """A function: stored name → (name in the model, whether transformers converts the tensor)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")

    def renamed(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return target, pattern is not None

    return renamed


def renamer_only(model: nn.Module) -> Callable[[str], str]:
    """A function: stored name → the name that transformers gives the tensor before it joins it with others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]
