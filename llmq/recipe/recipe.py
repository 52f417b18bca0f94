"""Recipe: the methods, and the scheme of each weight.

Plain frozen data without tensors, read from and written to YAML; unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from llmq.errors import LlmqError
from llmq.grids.cache import Cache
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.recipe import catalog
from llmq.validate import check_choice, check_keys, check_types, made

RAGGED = ("error", "smaller", "channel", "keep")
LOADERS = ("any", "transformers", "vllm", "llmq")
ROUTES = ("own", "all")
LISTS = ("methods", "keep", "include")


@dataclass(frozen=True)
class Calibration:
    """The text for the statistics, and how much of it is used.

    text: 'demo' (the interpreter's own standard library), a .txt/.json/.jsonl/.csv/.parquet file, compressed or not, or
    a hub data set id. column: of its rows; None takes chats, 'text', a prompt and its answer, or the only text.
    samples × seqlen tokens, packed, never padded; seqlen is reduced to the model's maximum.
    """

    text: str = "demo"
    samples: int = 128
    seqlen: int = 2048
    split: str = "train"
    column: str | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Recipe:
    """Everything that the written bytes depend on, apart from the model.

    methods: in order, transforms first, then at most one quantizer (default rtn), then refinements, then what tunes the
    whole model. scheme: by default the first method's own, if it has one (as `nf4` has). overrides: (pattern, scheme)
    pairs, the last match wins; keep: patterns of weights left in their own dtype; include: patterns of linear weights
    outside the decoder's blocks that are quantized too, without calibration. A pattern is dotted parts of a weight's
    name in the checkpoint, a shell glob, or 're:' and a regular expression. options: the methods' own options by name,
    each is passed to the methods that have it; one that no method has is refused. loader: who is to load the folder:
    with 'any' and 'vllm', weights that servers fuse must have one scheme; with 'vllm', experts may be packed that stock
    transformers reads wrong, and with 'llmq', those that nothing but `llmq.load` could read. route: the tokens that an
    expert of a mixture is calibrated with: its own, or all that enter its block's experts. model_class: the class of
    transformers that opens the model, for one that does not generate text: all its linear weights are quantized without
    calibration. kv_cache: how a server is to round the keys and values that it keeps (`grids.cache.CACHES`), with
    scales that are calibrated. The defaults are those that measured best for each method.
    """

    methods: tuple[str, ...] = ("gptq",)
    scheme: Scheme = cast(Scheme, None)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    ragged: str = "error"
    loader: str = "any"
    route: str = "own"
    model_class: str | None = None
    kv_cache: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheme is None:
            object.__setattr__(self, "scheme", default_scheme(self.methods))
        check_types(self)
        if not self.methods:
            raise LlmqError("a recipe needs at least one method: 'rtn' is the simplest")
        check_choice("ragged", self.ragged, RAGGED)
        check_choice("loader", self.loader, LOADERS)
        check_choice("route", self.route, ROUTES)
        if self.kv_cache is not None:
            Cache.named(self.kv_cache)
        if self.calibration.samples < 1 or self.calibration.seqlen < 2:
            raise LlmqError("calibration needs at least 1 sample of at least 2 tokens: raise --samples or --seqlen")

    @property
    def cache(self) -> Cache | None:
        """How keys and values are rounded, if they are."""
        return None if self.kv_cache is None else Cache.named(self.kv_cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML and JSON hold it; Recipe.from_dict reads it back."""
        data = dataclasses.asdict(self)
        data["overrides"] = {pattern: dataclasses.asdict(scheme) for pattern, scheme in self.overrides}
        return data | {name: list(getattr(self, name)) for name in LISTS}

    def to_yaml(self) -> str:
        """The text of a recipe file, without what is as it is by default; Recipe.load reads it back."""
        usual = Recipe(self.methods).to_dict()
        told = {key: value for key, value in self.to_dict().items() if key == "methods" or value != usual[key]}
        told["scheme"] = dataclasses.asdict(self.scheme)
        changed = {
            pattern: {k: v for k, v in scheme.items() if v != told["scheme"][k]}
            for pattern, scheme in told.pop("overrides", {}).items()
        }
        return yaml.safe_dump(told | ({"overrides": changed} if changed else {}), sort_keys=False, allow_unicode=True)

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from plain data. Raises LlmqError for an unknown key or an invalid value."""
        values = check_keys(data, Recipe, where)
        if isinstance(values.get("methods"), str):
            values["methods"] = values["methods"].split("+")
        methods = values.get("methods", Recipe().methods)
        usual = made(lambda: default_scheme(methods if isinstance(methods, (list, tuple)) else ()), where)
        scheme = changed_scheme(values.pop("scheme", {}), usual, f"{where}: scheme")
        overrides = values.pop("overrides", {})
        if not isinstance(overrides, Mapping):
            raise LlmqError(f"{where}: overrides must map patterns to schemes, as in {{'*.down': {{bits: 8}}}}")
        values["overrides"] = tuple(
            (pattern, changed_scheme(change, scheme, f"{where}: overrides: {pattern}"))
            for pattern, change in overrides.items()
        )
        at = f"{where}: calibration"
        calibration = check_keys(values.pop("calibration", {}), Calibration, at)
        values["calibration"] = made(lambda: Calibration(**calibration), at)
        for name in LISTS:
            given = values.get(name)
            values |= {name: (given,)} if isinstance(given, str) else {}
            values |= {name: tuple(given)} if isinstance(given, list) else {}
        return made(lambda: Recipe(scheme=scheme, **values), where)

    @staticmethod
    def load(file: Path) -> Recipe:
        """A recipe from a YAML file. Raises LlmqError naming the file."""
        return Recipe.from_dict(read_yaml(file), str(file))


def read_yaml(file: Path) -> Any:
    """The contents of a YAML file; an empty file is an empty mapping. Raises LlmqError naming the file."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LlmqError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    return {} if data is None else data


def default_scheme(methods: tuple[str, ...] | list[str]) -> Scheme:
    """The methods' default scheme, if one has it (as `nf4` has). Unknown names are ignored here and refused later."""
    scheme = Scheme()
    known = catalog.names()
    for name in methods:
        if name in known:
            scheme = changed_scheme(catalog.describe(name).scheme, scheme, f"method {name}")
    return scheme


def parse_override(text: str, base: Scheme) -> tuple[str, Scheme]:
    """'PATTERN=bits:8,group_size:64,symmetric:false' → the pattern and the changed base scheme. Raises LlmqError."""
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
            raise LlmqError(f"--override {text!r}: {value!r} is not a value for {key.strip()}") from error
    return pattern, changed_scheme(values, base, f"--override {text!r}")
