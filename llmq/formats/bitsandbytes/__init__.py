"""bitsandbytes' 4-bit formats on disk: written (`write`), read for kernels (`read`) and as a dense model (`source`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from llmq.formats.base import Groups, Loader
from llmq.formats.bitsandbytes import write
from llmq.formats.bitsandbytes.inspect import COMPANIONS, SCALES, inspect
from llmq.formats.bitsandbytes.read import BitsandbytesReader
from llmq.formats.bitsandbytes.write import pack, spec, unpack
from llmq.grids.scheme import Scheme

__all__ = ["COMPANIONS", "SCALES", "inspect", "pack", "spec", "unpack"]

ONE_SCHEME = True
REPLACES_MODULES = True
READERS = {"bitsandbytes_4bit": BitsandbytesReader, "bitsandbytes_8bit": BitsandbytesReader}
PACKAGES = {"bitsandbytes": "bitsandbytes"}


def claims(section: Mapping[str, Any]) -> bool:
    """Whether a configuration without `quant_method` is of this format: older bitsandbytes configurations have none."""
    return bool(section.get("load_in_4bit") or section.get("load_in_8bit"))


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`."""
    return shape[1 if row_parallel else 0] % parts == 0


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    return write.config(groups, ignore, dtype)


def title(schemes: Collection[Scheme]) -> str:
    """See `Format.title`."""
    return f"bitsandbytes {', '.join(sorted({scheme.grid for scheme in schemes}))}"


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    return [Loader("stock transformers with bitsandbytes reads it, on a GPU or CPU", code="transformers")]
