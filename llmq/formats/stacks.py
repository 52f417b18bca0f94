"""How the experts of a parameter [experts, ...] that a checkpoint stores whole are named and marked when packed.

An expert's matrix is stored under `<module>.<expert>.<parameter>`, with `.T` behind it if the parameter's entries are
[in, out]. Stock loaders have no rule for such names and would fill the parameter with random numbers. So every `format`
of the configuration has a prefix, with which compressed-tensors' and vLLM's readers refuse the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmq.formats.base import Loader

ALONE = Loader(
    "only llmq.load (and `llmq eval --kernels`) reads it: the checkpoint stores its experts as one tensor for all, for "
    "which stock transformers and vLLM have no packed form: they refuse the folder",
    code="llmq",
)
PREFIX = "llmq-"
TURNED = ".T"


def stem(module: str, parameter: str, expert: int, transposed: bool) -> str:
    """The name under which an expert's matrix of a parameter of a module is stored."""
    return f"{module}.{expert}.{parameter}{TURNED if transposed else ''}"


def parse(stem: str) -> tuple[str, int, bool] | None:
    """The parameter, the expert and whether it is transposed, of a name as `stem` makes it; None for other names."""
    found = re.fullmatch(r"(.+)\.(\d+)\.([^.]+?)(\.T)?", stem)
    return None if found is None else (f"{found[1]}.{found[3]}", int(found[2]), found[4] is not None)


def marked(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` that only llmq reads."""
    groups = {name: group | {"format": PREFIX + group["format"]} for name, group in section["config_groups"].items()}
    return dict(section) | {"format": PREFIX + section["format"], "config_groups": groups}


def unmarked(section: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A `quantization_config` without the marks, and whether it had them."""
    form = section.get("format")
    if not isinstance(form, str) or not form.startswith(PREFIX):
        return dict(section), False
    groups = section.get("config_groups")
    plain = {}
    for name, group in (groups if isinstance(groups, Mapping) else {}).items():
        kind = group.get("format") if isinstance(group, Mapping) else None
        plain[name] = {**group, "format": kind.removeprefix(PREFIX)} if isinstance(kind, str) else group
    return dict(section) | {"format": form.removeprefix(PREFIX), "config_groups": plain}, True
