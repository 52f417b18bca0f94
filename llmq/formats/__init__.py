"""Formats: one file each, bytes on disk and nothing else. This one chooses among them, and says who reads what."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from llmq.formats.bitsandbytes import write as bitsandbytes
from llmq.formats.compressed_tensors import eight_bit
from llmq.formats.compressed_tensors import packed as compressed_tensors
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme


class Format(Protocol):
    """What each file here has, as functions."""

    def spec(
        self, shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a weight [out, in] becomes: suffix → (dtype, shape)."""

    def pack(self, q: Any) -> dict[str, Tensor]:
        """The tensors to store, by suffix, as `spec` says."""

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        """The inverse of `pack`. Raises LlmqError when tensors are missing or misshapen."""


def of(scheme: Scheme) -> Format:
    """The format that holds a scheme."""
    if scheme.grid == "nf4":
        return cast(Format, bitsandbytes)
    if scheme.grid == "fp8" or scheme.activations is not None:
        return cast(Format, eight_bit)
    return cast(Format, compressed_tensors)


def refusal(schemes: Collection[Scheme]) -> str | None:
    """Why these schemes cannot be in one folder, in a sentence, or None."""
    nf4 = {s for s in schemes if s.grid == "nf4"}
    if nf4 and len(schemes) > 1:
        listed = ", ".join(sorted(map(str, schemes)))
        return f"one folder holds nf4 weights of one kind, or other grids, not both ({listed}): --keep some weights"
    return None


def config(groups: Mapping[Scheme, Sequence[str]], ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose model computes in `dtype`.

    groups: the module names of each scheme; ignore: the names of linear modules left alone. Names as in the checkpoint,
    without '.weight'. Raises LlmqError when nothing is quantized.
    """
    if any(scheme.grid == "nf4" for scheme in groups):
        compute = str(dtype).removeprefix("torch.")
        return bitsandbytes.config(groups, ignore) | {"bnb_4bit_compute_dtype": compute}
    return compressed_tensors.config(groups, ignore)


def name(schemes: Collection[Scheme]) -> str:
    """The format's name for people."""
    if any(scheme.grid == "nf4" for scheme in schemes):
        return "bitsandbytes nf4"
    kinds = sorted({compressed_tensors.format_of(scheme) for scheme in schemes})
    return f"compressed-tensors {', '.join(kinds)}"


def loaders(schemes: Collection[Scheme]) -> list[str]:
    """Who reads a folder with these schemes, a sentence each."""
    if any(scheme.grid == "nf4" for scheme in schemes):
        return ["stock transformers with bitsandbytes reads it, on a GPU or CPU", "vLLM reads it (not tried)"]
    said = []
    if all(scheme.symmetric for scheme in schemes):
        said.append("stock transformers with compressed-tensors reads it, on a GPU or CPU")
    elif len(schemes) == 1:
        said.append(
            "stock transformers with compressed-tensors reads it, but unpacks its asymmetric weights while loading, so "
            "that it takes the memory of an unquantized model"
        )
    else:
        said.append(
            "stock transformers 5.23 with compressed-tensors 0.20 fails on asymmetric weights beside another scheme: "
            "give all weights one scheme, or leave zero points out (--symmetric)"
        )
    odd = sorted({s.bits for s in schemes if s.bits not in (4, 8)})
    if odd:
        said.append(f"vLLM has no kernels for {', '.join(map(str, odd))} bits (not tried)")
    else:
        said.append("vLLM reads it (not tried)")
    return said
