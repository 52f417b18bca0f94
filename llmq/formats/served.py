"""Experts that vLLM reads as compressed-tensors stores them, and stock transformers reads wrong, or not at all.

Tried with transformers 5.23, whose `CompressedTensorsDequantize` drops the scale of NVFP4's scales without a word,
takes the exponents of mxfp8 for scales, and fails on blocks. So the configuration of such a folder has one more group,
which matches no module, and whose `format` transformers refuses, with an error that quotes it; vLLM looks at the
formats of groups that it matches only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmq.formats.base import Loader
from llmq.grids.scheme import Scheme

GUARD = "llmq"
WORDS = "llmq-experts: for vLLM and llmq.load"
NOTHING = "re:(?!)"
"""A target that matches no module."""
REFUSED = "stock transformers refuses it: it would read experts in this scheme wrong, or not at all"


def loader(schemes: Collection[Scheme]) -> Loader:
    """Who reads a folder with such experts, beside vLLM. llmq.load makes floats of 4 and 8 bits dense, nothing else."""
    if all(scheme.rules.layout and scheme.bits in (4, 8) for scheme in schemes):
        return Loader(f"{REFUSED}; llmq.load makes it dense", code="llmq")
    return Loader(f"{REFUSED}; llmq.load does not read it, because of its other weights")


def guarded(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` that stock transformers refuses."""
    groups = section["config_groups"]
    group = next(iter(groups.values())) | {"targets": [NOTHING], "format": WORDS}
    return dict(section) | {"config_groups": {GUARD: group, **groups}}


def unguarded(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `quantization_config` without what makes transformers refuse it."""
    groups = section.get("config_groups")
    group = groups.get(GUARD) if isinstance(groups, Mapping) else None
    if not isinstance(groups, Mapping) or not isinstance(group, Mapping) or group.get("format") != WORDS:
        return section
    return dict(section) | {"config_groups": {name: kept for name, kept in groups.items() if name != GUARD}}
