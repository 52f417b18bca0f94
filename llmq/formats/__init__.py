"""Formats: one file or folder each, which holds all that is known of it. This one asks them (see `base`)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch

from llmq.formats.base import Format, Groups, Loader
from llmq.grids.scheme import Scheme


def of(scheme: Scheme) -> Format:
    """The format that holds a scheme: its grid names it."""
    return cast(Format, importlib.import_module(f"{__name__}.{scheme.rules.format}"))


@cache
def _modules() -> tuple[Any, ...]:
    return tuple(importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))


def having(part: str) -> tuple[Any, ...]:
    """Every format here that has a part: READERS, PACKAGES, claims, COMPANIONS … (`base`). None must have them all."""
    return tuple(module for module in _modules() if hasattr(module, part))


def readers() -> dict[str, tuple[Any, ...]]:
    """Method as transformers' tables name it → the classes that read it: the first that does not refuse is taken."""
    found: dict[str, tuple[Any, ...]] = {}
    for module in having("READERS"):
        for method, reader in module.READERS.items():
            found[method] = (*found.get(method, ()), reader)
    return found


def packages() -> dict[str, str]:
    """Method in config.json → the package that stock transformers needs to read it."""
    return {method: package for module in having("PACKAGES") for method, package in module.PACKAGES.items()}


def unpacked_by_stock(method: str) -> bool:
    """Whether stock transformers makes weights of a method in config.json dense, at the first forward or before."""
    return any(module.STOCK_UNPACKS and method in module.PACKAGES for module in having("STOCK_UNPACKS"))


def method_of(section: Mapping[str, Any]) -> str | None:
    """What the `quantization_config` of any folder says that it was quantized with."""
    method = section.get("quant_method")
    if method:
        return str(method)
    return next((str(name) for module in having("claims") for name in module.PACKAGES if module.claims(section)), None)


def refusal(schemes: Collection[Scheme]) -> str | None:
    """Why these schemes cannot be in one folder, in a sentence, or None."""
    alone = [scheme for scheme in schemes if of(scheme).ONE_SCHEME]
    if len(schemes) > 1 and alone:
        listed, kind = ", ".join(sorted(map(str, schemes))), alone[0].rules.name
        return f"one folder holds {kind} weights of one kind, or other grids, not both ({listed}): --keep some weights"
    used = {of(scheme) for scheme in schemes}
    if len(used) > 1:
        return f"one folder has one format, which does not hold all of {', '.join(sorted(map(str, schemes)))}"
    return None


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    return of(next(iter(groups), Scheme())).config(groups, ignore, dtype)


def name(schemes: Collection[Scheme]) -> str:
    """The format's name for people."""
    return of(next(iter(schemes), Scheme())).title(schemes)


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """Who reads a folder with these schemes."""
    return of(next(iter(schemes), Scheme())).loaders(schemes)
