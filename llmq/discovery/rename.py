"""Maps a stored tensor's name to the model's name for it, by transformers' rules, as from_pretrained does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Rules:
    """transformers' rules for the checkpoints of a model: renamings, and conversions of several tensors."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, WeightConverter)]
        self._state = model.state_dict()
        self._prefix = getattr(model, "base_model_prefix", "")

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Stored names in the order in which transformers reads them: experts by their number."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)

    def rename(self, name: str) -> tuple[str, str | None]:
        """A stored name → the name in the model, and the pattern of the rule that converts it, None if none does."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return target, pattern

    def only_renamed(self, name: str) -> str:
        """The name that transformers gives a stored tensor before it joins it with others."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, [])[0]

    def converter(self, pattern: str) -> Any:
        """The rule that has a pattern."""
        return next(rule for rule in reversed(self._converters) if pattern in rule.source_patterns)


def renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """A function: stored name → (name in the model, whether transformers converts the tensor)."""
    rules = Rules(model)

    def renamed(name: str) -> tuple[str, bool]:
        target, pattern = rules.rename(name)
        return target, pattern is not None

    return renamed


def renamer_only(model: nn.Module) -> Callable[[str], str]:
    """A function: stored name → the name that transformers gives the tensor before it joins it with others."""
    return Rules(model).only_renamed
