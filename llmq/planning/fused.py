"""Weights that a server such as vLLM joins into one matrix while loading: they must have one scheme.

vLLM 0.32 takes the scheme of a joined matrix from its first part. With different schemes it fails while loading, or, if
only the symmetry differs, loads the folder and computes wrong logits without a word.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable

from llmq.discovery.reasons import Kind
from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.weights import WeightPlan, matches
from llmq.recipe.recipe import Recipe

GATE_SHARE = 32
LEFT = (Kind.BY_USER, Kind.INDIVISIBLE)


def families(items: Iterable[WeightPlan]) -> list[list[WeightPlan]]:
    """The weights of which a server makes one matrix, two or more in each list.

    They have one input and one parent module (docs/design.md, "Fused weights"). Beside two or more others, those with
    less than 1/32 of the outputs of the largest are gates with one output per head: servers join these only with each
    other. Beside a single one they may be the keys and values of one head for many heads of queries, and belong to it.
    """
    together: dict[tuple[int | None, int, str], list[WeightPlan]] = {}
    for item in items:
        if item.block is not None and (item.scheme is not None or (item.reason and item.reason.kind in LEFT)):
            key = (item.block, item.input_id, item.module.rpartition(".")[0])
            together.setdefault(key, []).append(item)
    found = []
    for family in together.values():
        most = max(item.shape[0] for item in family)
        gates = [item for item in family if item.shape[0] * GATE_SHARE < most]
        large = [item for item in family if item not in gates]
        found += [gates, large] if len(large) > 1 else [family]
    return [family for family in found if len(family) > 1]


def apart(items: Iterable[WeightPlan]) -> list[list[WeightPlan]]:
    """The families whose weights have different schemes."""
    return [family for family in families(items) if len({item.scheme for item in family}) > 1]


def check_fused(items: list[WeightPlan], recipe: Recipe) -> None:
    """Raises LlmqError, with the options that mend it, if weights that servers fuse have different schemes.

    A recipe for another loader may have them.
    """
    wrong = apart(items)
    if not wrong or recipe.loader not in ("any", "vllm"):
        return
    family = wrong[0]
    told = ", ".join(f"{item.name.rpartition('.')[2]} {item.scheme or 'not quantized'}" for item in family)
    where = family[0].name.rpartition(".")[0]
    more = f" (and in {len(wrong) - 1} more places)" if len(wrong) > 1 else ""
    raise LlmqError(
        f"{where}: {told}{more}: servers such as vLLM make one matrix of weights with one input, and fail to load "
        "different schemes or load them wrong. Ways out: one scheme for all of them, "
        f"{_options(wrong, items, recipe)}; or --loader transformers, for a folder that only transformers is to load, "
        "or a server of which you know that it keeps these apart"
    )


def _options(wrong: list[list[WeightPlan]], items: list[WeightPlan], recipe: Recipe) -> str:
    """The options that give every family one scheme, as typed in a shell: none if one is kept, else the changed one."""
    groups: dict[Scheme | None, list[WeightPlan]] = {}
    for family in wrong:
        schemes = {item.scheme for item in family}
        scheme = None if None in schemes else max(schemes - {recipe.scheme}, key=lambda s: (s.bits, str(s)))  # type: ignore[union-attr]
        groups.setdefault(scheme, []).extend(family)
    words = []
    for scheme, weights in groups.items():
        pattern = _pattern(weights, items)
        if scheme is None:
            mine = {item.name for item in weights}
            # On the command line, --keep replaces the patterns of a recipe file: those still needed are repeated.
            needed = [p for p in recipe.keep if any(matches(p, i.name) and i.name not in mine for i in items)]
            words += [f"--keep {shlex.quote(p)}" for p in (*needed, pattern)]
        else:
            words.append(_override(pattern, scheme, recipe.scheme))
    return " ".join(words)


def _override(pattern: str, scheme: Scheme, base: Scheme) -> str:
    """The option that changes the base scheme to another for a pattern's weights."""
    old = {f.name: getattr(base, f.name) for f in dataclasses.fields(Scheme)}
    changed = {key: getattr(scheme, key) for key in old if getattr(scheme, key) != old[key]}
    inputs = changed.get("activations")
    if isinstance(inputs, Activations) and inputs.range != Activations.range:
        # Such a change can only be written in a recipe file; JSON is YAML too.
        plain = {key: dataclasses.asdict(v) if isinstance(v, Activations) else v for key, v in changed.items()}
        return f"in a recipe file, overrides: {json.dumps({pattern: plain})}"
    return "--override " + shlex.quote(f"{pattern}={','.join(f'{k}:{_value(k, v)}' for k, v in changed.items())}")


def _value(key: str, value: object) -> str:
    """A value as --override reads it."""
    if value is None:
        return "channel" if key == "group_size" else "none"
    if isinstance(value, Activations):
        return value.word
    return value if isinstance(value, str) else json.dumps(value)


def _pattern(weights: list[WeightPlan], items: list[WeightPlan]) -> str:
    """A pattern that matches these weights and no other, in their blocks."""
    names = {item.name for item in weights}
    blocks = {item.block for item in weights}
    ends: dict[str, set[str]] = {}
    for item in weights:
        before, _, after = item.name.partition(f".{item.block}.")
        parent, _, last = after.rpartition(".")
        ends.setdefault(parent, set()).add(last)
    tails = [f"{re.escape(parent)}{chr(92) + '.' if parent else ''}{_any(last)}" for parent, last in ends.items()]
    tail = tails[0] if len(tails) == 1 else f"({'|'.join(tails)})"
    for start in (r"\.", rf"\.{_any({str(b) for b in blocks})}\."):
        pattern = f"re:{start}{tail}$"
        if {item.name for item in items if matches(pattern, item.name)} == names:
            return pattern
    return f"re:^{_any(names)}$"


def _any(words: set[str]) -> str:
    """A regular expression for one of these words."""
    listed = sorted((re.escape(word) for word in words), key=lambda w: (len(w), w))
    return listed[0] if len(listed) == 1 else f"({'|'.join(listed)})"
