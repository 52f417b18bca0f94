"""compressed-tensors on disk: packed integers (`packed`), unpacked 8-bit codes (`eight_bit`), microscaling floats
(`microscaled`), and what they share.
`read` also reads folders of other writers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.formats.base import Groups, Loader, Spec
from llmq.formats.compressed_tensors import eight_bit, microscaled, packed
from llmq.formats.compressed_tensors.cache import read_cache
from llmq.formats.compressed_tensors.config import (
    INTEGERS,
    config_of,
    dense,
    layout_of,
    loads_dense,
    with_cache,
    with_targets,
)
from llmq.formats.compressed_tensors.inspect import COMPANIONS, SCALES, inspect
from llmq.formats.compressed_tensors.read import CompressedTensorsReader
from llmq.grids.base import QuantizedWeight
from llmq.grids.scheme import Scheme

__all__ = ["COMPANIONS", "SCALES", "dense", "inspect", "loads_dense", "read_cache", "with_cache", "with_targets"]

ONE_SCHEME = False
READERS = {"compressed-tensors": CompressedTensorsReader}
PACKAGES = {"compressed-tensors": "compressed_tensors"}
STOCK_UNPACKS = True


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    return _layout(scheme).spec(shape, scheme, scale_dtype)


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    return _layout(q.scheme).pack(q)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """See `Format.unpack`."""
    return _layout(scheme).unpack(tensors, scheme)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`."""
    return _layout(scheme).splits(shape, scheme, parts, row_parallel)


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    return config_of(groups, ignore)


def refuse_experts(scheme: Scheme) -> str | None:
    """Why stock transformers 5.23 with compressed-tensors 0.20 fails on a mixture's experts of a scheme, or None."""
    if not scheme.symmetric:
        return "transformers fails on experts with zero points: use --symmetric"
    if microscaled.divided(scheme):
        return f"transformers reads experts as {scheme} without the scale of their scales: use --grid int or mxfp4"
    if (scheme.rules.layout and scheme.bits == 8 and scheme.group_size) or scheme.rules.rows > 1:
        return f"transformers fails on experts as {scheme}: use --grid int or fp8"
    if layout_of(scheme) == INTEGERS:
        return f"transformers fails on experts as {scheme}: leave their inputs alone (--activations none)"
    if scheme.activations is not None and not scheme.activations.dynamic:
        return "transformers does not read static scales of experts' inputs: use --activations dynamic"
    return None


def refuse_served(scheme: Scheme) -> str | None:
    """Why vLLM 0.32 fails on a mixture's experts of a scheme that stock transformers does not read, or None."""
    known = microscaled.divided(scheme) or layout_of(scheme) in microscaled.FORMATS or scheme.rules.rows > 1
    if not known or refuse_experts(scheme) is None:
        return refuse_experts(scheme)
    if scheme.rules.rows > 1 and scheme.activations is None:
        return f"vLLM has experts as {scheme} with rounded inputs only: use --activations dynamic"
    return None


def refuse_stacks(scheme: Scheme) -> str | None:
    """Why `llmq.load` could not keep packed what was a stack of experts, of a scheme, or None."""
    if scheme.rules.layout and (layout_of(scheme) not in microscaled.FOURS or scheme.activations is not None):
        inputs = "leave their inputs alone (--activations none)" if layout_of(scheme) in microscaled.FOURS else ""
        return f"llmq does not keep experts as {scheme} packed: {inputs or 'use --grid int, mxfp4 or nvfp4'}"
    return None


def title(schemes: Collection[Scheme]) -> str:
    """See `Format.title`."""
    return f"compressed-tensors {', '.join(sorted({layout_of(scheme) for scheme in schemes}))}"


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    if any(layout_of(scheme) in microscaled.FORMATS and scheme.bits < 8 for scheme in schemes):
        own = "; llmq.load reads it dense in any dtype" if all(scheme.bits == 4 for scheme in schemes) else ""
        sentence = (
            "stock transformers with compressed-tensors 0.20 reads it, in bfloat16 only, and makes it dense on a CPU"
        )
        return [Loader(sentence + own, code="transformers")]
    if all(scheme.symmetric for scheme in schemes):
        return [Loader("stock transformers with compressed-tensors reads it, on a GPU or CPU", code="transformers")]
    if len(schemes) == 1:
        sentence = (
            "stock transformers with compressed-tensors reads it, but unpacks its asymmetric weights while loading, so "
            "that it takes the memory of an unquantized model"
        )
        return [Loader(sentence, code="transformers")]
    sentence = (
        "stock transformers 5.23 with compressed-tensors 0.20 fails on asymmetric weights if the folder has several "
        "schemes: give all weights one scheme, or use --symmetric"
    )
    return [Loader(sentence, warn=True)]


class _Layout(Protocol):
    """The interface of `packed`, `eight_bit` and `microscaled`."""

    def spec(self, shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec: ...

    def pack(self, q: QuantizedWeight) -> dict[str, Tensor]: ...

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight: ...

    def splits(self, shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool: ...


def _layout(scheme: Scheme) -> _Layout:
    """The module that stores a scheme."""
    layout = layout_of(scheme)
    return packed if layout == packed.FORMAT else microscaled if layout in microscaled.FORMATS else eight_bit
