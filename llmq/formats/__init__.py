"""Checkpoint formats: all code for a format is in its own file or folder (see `base`); this file dispatches to them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch

from llmq.formats import vllm
from llmq.formats.base import Format, Groups, Loader
from llmq.grids.scheme import Scheme


def of(scheme: Scheme) -> Format:
    """The format that stores a scheme, as its grid names it."""
    return cast(Format, importlib.import_module(f"{__name__}.{scheme.rules.format}"))


@cache
def _modules() -> tuple[Any, ...]:
    return tuple(importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))


def having(part: str) -> tuple[Any, ...]:
    """Every format that has a part (READERS, PACKAGES, claims, COMPANIONS …, see `base`); all parts are optional."""
    return tuple(module for module in _modules() if hasattr(module, part))


def readers() -> dict[str, tuple[Any, ...]]:
    """Method in transformers' tables → the readers for it, of which the first that does not refuse is used."""
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


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder of a method in config.json is left to stock transformers, also if llmq could dequantize it."""
    known = next((module for module in having("dequantizes") if module.dequantizes(method, section)), None)
    return known is None or not hasattr(known, "read_by_stock") or bool(known.read_by_stock(method, section))


def packed_for_kernels(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether the format that llmq could dequantize such a folder by has a reader for llmq's kernels, which runs it."""
    known = next((module for module in having("dequantizes") if module.dequantizes(method, section)), None)
    if known is None or not hasattr(known, "READERS"):
        return False
    return not hasattr(known, "runs_packed") or bool(known.runs_packed(section))


def method_of(section: Mapping[str, Any]) -> str | None:
    """The quantization method that a folder's `quantization_config` names."""
    method = section.get("quant_method")
    if method:
        return str(method)
    return next((str(name) for module in having("claims") for name in module.PACKAGES if module.claims(section)), None)


def refusal(schemes: Collection[Scheme]) -> str | None:
    """Why one folder cannot hold these schemes, in a sentence, or None."""
    alone = [scheme for scheme in schemes if of(scheme).ONE_SCHEME]
    if len(schemes) > 1 and alone:
        listed, kind = ", ".join(sorted(map(str, schemes))), alone[0].rules.name
        return (
            f"a folder with {kind} weights has one scheme for all of them ({listed}): give them one scheme, or --keep "
            "some weights"
        )
    used = {of(scheme) for scheme in schemes}
    if len(used) > 1:
        return f"a folder has one format, and no format stores all of {', '.join(sorted(map(str, schemes)))}"
    return None


def experts_refusal(scheme: Scheme) -> str | None:
    """Why stock transformers could not load a mixture's experts of a scheme, in a clause with a way out, or None."""
    refuse = getattr(of(scheme), "refuse_experts", None)
    if refuse is None:
        return f"transformers cannot load experts as {scheme}: give them an integer scheme (--grid int)"
    told: str | None = refuse(scheme)
    return told


def stacks_refusal(scheme: Scheme) -> str | None:
    """Why llmq could not load experts of a scheme that the checkpoint stores as one tensor, in a clause, or None."""
    refuse = getattr(of(scheme), "refuse_stacks", None)
    told: str | None = f"llmq does not read experts as {scheme}: use --grid int" if refuse is None else refuse(scheme)
    return told


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    return of(next(iter(groups), Scheme())).config(groups, ignore, dtype)


def loads_dense(schemes: Collection[Scheme]) -> bool:
    """Whether `dense` can make stock transformers unpack a folder of these schemes while loading."""
    kind = of(next(iter(schemes), Scheme()))
    return hasattr(kind, "loads_dense") and bool(kind.loads_dense(schemes))


def with_targets(
    section: Mapping[str, Any], schemes: Collection[Scheme], names: Iterable[str], classes: bool = True
) -> dict[str, Any]:
    """A folder's `quantization_config` that names these quantized modules, where its format has targets.

    classes: whether a class that is a target stays one; otherwise the names are those of all quantized modules.
    """
    kind = cast(Any, of(next(iter(schemes))))
    return kind.with_targets(section, names, classes) if hasattr(kind, "with_targets") else dict(section)


def replaces_modules(schemes: Collection[Scheme]) -> bool:
    """Whether stock transformers replaces the modules of weights with these schemes, before they are loaded."""
    return bool(getattr(of(next(iter(schemes), Scheme())), "REPLACES_MODULES", False))


def for_llmq_alone(schemes: Collection[Scheme]) -> bool:
    """Whether only llmq reads a folder of these schemes."""
    return bool(getattr(of(next(iter(schemes), Scheme())), "OWN", False))


def dense(section: Mapping[str, Any], schemes: Collection[Scheme]) -> dict[str, Any]:
    """A folder's `quantization_config`, with which stock transformers unpacks its weights while loading."""
    made: dict[str, Any] = cast(Any, of(next(iter(schemes)))).dense(section)
    return made


def name(schemes: Collection[Scheme]) -> str:
    """The format's name for people."""
    return of(next(iter(schemes), Scheme())).title(schemes)


def loaders(schemes: Collection[Scheme], apart: bool = False) -> list[Loader]:
    """What is known of the tools that can read a folder with these schemes.

    apart: whether weights that servers fuse have different schemes.
    """
    known = of(next(iter(schemes), Scheme())).loaders(schemes)
    return known if for_llmq_alone(schemes) else [*known, vllm.APART if apart else vllm.loader(schemes)]
