"""A GGUF file of any tool as `llmq inspect` shows it: the type of each tensor, and the bits that it takes."""

from __future__ import annotations

from pathlib import Path

from llmq.formats.base import Row
from llmq.formats.gguf import file
from llmq.formats.gguf.types import DTYPES
from llmq.formats.inspection import Inspection

PER_SCALE = {"NVFP4": 16}
"""Values that share a scale, where a block has several scales of its own."""


def inspect_file(path: Path) -> Inspection:
    """Every tensor of a GGUF file, in the file's order. Raises LlmqError if it cannot be read."""
    contents = file.read(path)
    rows = []
    for held in contents.tensors:
        kind = held.kind
        if kind.kind == "plain":
            dtype = str(DTYPES[kind.name]).removeprefix("torch.")
            rows.append(Row(held.name, held.shape, "plain", None, None, None, None, held.nbytes, dtype))
        else:
            group = PER_SCALE.get(kind.name, kind.values)
            rows.append(Row(held.name, held.shape, kind.name, kind.bits, group, None, None, held.nbytes, kind.name))
    architecture = contents.entries.get("general.architecture")
    return Inspection(path, "gguf", None if architecture is None else str(architecture), tuple(rows))
