"""Maps a stored tensor's name to the model's name for it, by transformers' rules, as from_pretrained does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import nn


class Rules:
    """transformers' rules for the checkpoints of a model: renamings, and conversions of several tensors."""

    def __init__(self, model: nn.Module, quantizer: Any = None) -> None:
        """quantizer: transformers', whose own rules for packed weights then count too."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules: list[Any] = get_model_conversion_mapping(model, hf_quantizer=quantizer)  # type: ignore[arg-type]
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

    def filled(self, name: str) -> set[str]:
        """The names in the model of all that transformers makes of a stored tensor: several if it cuts the tensor."""
        target, pattern = self.rename(name)
        patterns = [] if pattern is None else self.converter(pattern).target_patterns
        if not patterns or patterns[0] not in target:
            return {target}
        before, _, behind = target.partition(patterns[0])
        return {before + other + behind for other in patterns}

    def only_renamed(self, name: str) -> str:
        """The name that transformers gives a stored tensor before it joins it with others."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, [])[0]

    def converter(self, pattern: str) -> Any:
        """The rule that has a pattern."""
        return next(rule for rule in reversed(self._converters) if pattern in rule.source_patterns)

    def place(self, name: str) -> str:
        """The name that a stored tensor which no rule joins would have in the model, the base model's prefix included.

        name: of a tensor beside one that a rule joins, as a packed weight's codes are beside its dense weight.
        """
        from transformers.core_model_loading import rename_source_key

        renamed, prefix = self.only_renamed(name), f"{self._prefix}."
        stem = name.rpartition(".")[0]
        as_named, _ = rename_source_key(f"{stem}.weight", self._renamings, self._converters)
        target = self.rename(f"{stem}.weight")[0]
        if self._prefix and as_named == prefix + target:
            return renamed.removeprefix(prefix)
        return prefix + renamed if self._prefix and target == prefix + as_named else renamed

    def of_others(self, name: str) -> tuple[str, str, Any] | None:
        """The name in the model that other models' rules give a stored tensor, the pattern that matches, and its rule.

        Writers name experts alike in all models, also where a model's own checkpoints name them otherwise. None if no
        rule of a model that transformers knows gives a parameter of this model, or if they disagree.
        """
        renamed = self.only_renamed(name)
        found: dict[Any, tuple[str, str, Any]] = {}
        for rule in _all_converters():
            target, pattern = rule.rename_source_key(renamed)
            target = next((t for t in self._with_and_without_prefix(target) if t in self._state), None)
            if pattern is not None and target is not None:
                steps = str([(type(step).__name__, vars(step)) for step in rule.operations])
                at = rule.source_patterns.index(pattern)
                found.setdefault((target, at, len(rule.source_patterns), steps), (target, pattern, rule))
        return next(iter(found.values())) if len(found) == 1 else None

    def _with_and_without_prefix(self, name: str) -> tuple[str, str, str]:
        return name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"


@cache
def _all_converters() -> list[Any]:
    """The rules by which transformers joins several tensors to one, for all models that it knows, each once."""
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules: dict[Any, Any] = {}
    for kind in CONFIG_MAPPING:
        for rule in get_checkpoint_conversion_mapping(kind) or ():  # type: ignore[no-untyped-call]
            if isinstance(rule, WeightConverter) and len(rule.target_patterns) == 1:
                rules.setdefault((tuple(rule.source_patterns), tuple(rule.target_patterns)), rule)
    return list(rules.values())


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
