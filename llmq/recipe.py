"""What a quantized weight is (Scheme), and which scheme and methods go to which weights (Recipe).

Plain frozen data: nothing here touches a tensor. YAML in, YAML out, unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from llmq.errors import LlmqError

RANGES = ("minmax", "mse", "weighted", "percentile", "kl", "aciq")
RAGGED = ("error", "smaller", "channel", "keep")
ACT_ORDERS = ("none", "static", "grouped")

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """An integer grid for a weight [out, in]: w ≈ (code − zero) · scale, codes in [−2^(bits−1), 2^(bits−1) − 1].

    bits: 2…8. group_size: input columns that share a scale; None is one scale per output channel.
    symmetric: zero is 0 and not stored.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        if not 2 <= self.bits <= 8:
            raise LlmqError(f"bits must be a whole number from 2 to 8, not {self.bits!r}")
        if self.group_size is not None and self.group_size < 2:
            raise LlmqError(f"group size must be a whole number from 2 up, or 'channel', not {self.group_size!r}")

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """How many groups a row of `width` inputs has; the group size must divide the width."""
        return 1 if self.group_size is None else width // self.group_size

    def bits_per_weight(self, rows: int, width: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of a [rows, width] matrix: codes, scales and zero points."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(width) / width


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics are taken from, and how much of it.

    text: 'demo' (the interpreter's own standard library), a .txt/.jsonl/.parquet file, or a hub data set id.
    samples × seqlen tokens, packed, never padded; seqlen is cut to the most the model takes.
    """

    text: str = "demo"
    samples: int = 128
    seqlen: int = 2048
    split: str = "train"
    column: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes that come out, apart from the model.

    overrides: (pattern, scheme) pairs, the last match wins; keep: patterns of weights left in their own dtype. A
    pattern is dotted parts of a weight's name in the checkpoint, a shell glob, or 're:' and a regular expression.
    range, act_order: 'auto', and damping, sweeps: None, are the method's own defaults, what measures best for it. One
    that is given to a method that does not take it is refused. damping, sweeps: see llmq.methods.gptq.
    """

    methods: tuple[str, ...] = ("gptq",)
    scheme: Scheme = field(default_factory=Scheme)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    keep: tuple[str, ...] = ()
    ragged: str = "error"
    range: str = "auto"
    act_order: str = "auto"
    damping: float | None = None
    sweeps: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        for name, value, allowed in (
            ("ragged", self.ragged, RAGGED),
            ("range", self.range, ("auto", *RANGES)),
            ("act-order", self.act_order, ("auto", *ACT_ORDERS)),
        ):
            if value not in allowed:
                choices = f"choose from {', '.join(allowed)}{nearest(value, allowed)}"
                raise LlmqError(f"{name} {value!r} is not known: {choices}")
        if self.calibration.samples < 1 or self.calibration.seqlen < 2:
            raise LlmqError("calibration needs at least 1 sample of at least 2 tokens: raise --samples or --seqlen")
        if self.sweeps is not None and self.sweeps < 0:
            raise LlmqError(f"sweeps must be 0 or more, not {self.sweeps!r}")
        if self.damping is not None and not 0 < self.damping < 1:
            raise LlmqError(f"damping must lie between 0 and 1, not {self.damping!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML and JSON hold it; Recipe.from_dict reads it back."""
        data = dataclasses.asdict(self)
        data["overrides"] = {pattern: dataclasses.asdict(scheme) for pattern, scheme in self.overrides}
        return data | {"methods": list(self.methods), "keep": list(self.keep)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from plain data. Raises LlmqError at an unknown key or an impossible value."""
        values = _checked_keys(data, Recipe, where)
        scheme = _scheme(values.pop("scheme", {}), Scheme(), f"{where}: scheme")
        overrides = values.pop("overrides", {})
        if not isinstance(overrides, Mapping):
            raise LlmqError(f"{where}: overrides must map patterns to schemes, as in {{'*.down': {{bits: 8}}}}")
        values["overrides"] = tuple(
            (pattern, _scheme(change, scheme, f"{where}: overrides: {pattern}"))
            for pattern, change in overrides.items()
        )
        at = f"{where}: calibration"
        calibration = _checked_keys(values.pop("calibration", {}), Calibration, at)
        values["calibration"] = _made(lambda: Calibration(**calibration), at)
        if isinstance(values.get("methods"), str):
            values["methods"] = values["methods"].split("+")
        if isinstance(values.get("keep"), str):
            values["keep"] = [values["keep"]]
        values |= {name: tuple(values[name]) for name in ("methods", "keep") if isinstance(values.get(name), list)}
        return _made(lambda: Recipe(scheme=scheme, **values), where)

    @staticmethod
    def load(file: Path) -> Recipe:
        """A recipe from a YAML file. Raises LlmqError naming the file."""
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise LlmqError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
        return Recipe.from_dict({} if data is None else data, str(file))


def parse_override(text: str, base: Scheme) -> tuple[str, Scheme]:
    """'PATTERN=bits:8,group_size:64,symmetric:false' → the pattern and the base scheme so changed. Raises LlmqError."""
    pattern, equals, changes = text.rpartition("=")
    if not equals or not pattern:
        raise LlmqError(f"--override {text!r}: write it as 'PATTERN=bits:8' or 'PATTERN=bits:8,group_size:64'")
    values = {}
    for change in changes.split(","):
        key, colon, value = change.partition(":")
        if not colon:
            raise LlmqError(f"--override {text!r}: {change!r} is not key:value, as in bits:8")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise LlmqError(f"--override {text!r}: {value!r} is no value for {key.strip()}") from error
    return pattern, _scheme(values, base, f"--override {text!r}")


def _scheme(data: Any, base: Scheme, where: str) -> Scheme:
    values = _checked_keys(data, Scheme, where)
    if values.get("group_size") == "channel":
        values["group_size"] = None
    return _made(lambda: dataclasses.replace(base, **values), where)


def _made(make: Callable[[], T], where: str) -> T:
    """What `make` returns; an LlmqError from it says where."""
    try:
        return make()
    except LlmqError as error:
        raise LlmqError(f"{where}: {error}") from error


def _checked_keys(data: Any, kind: type, where: str) -> dict[str, Any]:
    """A copy of a mapping with no other keys than the fields of a dataclass."""
    if not isinstance(data, Mapping):
        raise LlmqError(f"{where}: must be a mapping, not {data!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            raise LlmqError(f"{where}: unknown key {key!r}{nearest(str(key), known) or '; known: ' + ', '.join(known)}")
    return dict(data)


def _check_types(made: Any) -> None:
    """Every field of a dataclass holds what its annotation says. Raises LlmqError naming the field."""
    for name, hint in get_type_hints(type(made)).items():
        value = getattr(made, name)
        if not _fits(value, hint):
            raise LlmqError(f"{name} must be {_words(hint)}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: true and false are no numbers, a whole number is a number."""
    inner = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in inner)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """An annotated type in words."""
    if get_origin(hint) is UnionType:
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return f"a list, each item {_words(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"({', '.join(map(_words, get_args(hint)))})"
    return _WORDS.get(hint, f"a {hint.__name__}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the most similar known word, or nothing."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
