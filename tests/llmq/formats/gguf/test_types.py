"""The table of GGUF's types."""

from __future__ import annotations

import pytest

from llmq.errors import LlmqError
from llmq.formats.gguf.types import TYPES, of_number


def test_numbers_are_of_one_type_each() -> None:
    assert len({kind.number for kind in TYPES.values()}) == len(TYPES)
    assert all(of_number(kind.number, "here") is kind for kind in TYPES.values())
    with pytest.raises(LlmqError, match="here has type 1000, which llmq does not know"):
        of_number(1000, "here")


def test_sizes() -> None:
    """Bits per weight as ggml's documentation has them."""
    told = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q8_0": 8.5, "Q2_K": 2.625, "Q4_K": 4.5, "Q6_K": 6.5625, "MXFP4": 4.25}
    told |= {"TQ1_0": 1.6875, "TQ2_0": 2.0625, "Q2_0": 2.25, "NVFP4": 4.5, "BF16": 16}
    assert {name: TYPES[name].bits_per_weight for name in told} == told


def test_the_package_has_the_same() -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; sizes are tested above")
    # Q8_1 and Q8_K are of rounded inputs, and in no file.
    for known in set(gguf.GGMLQuantizationType) - {gguf.GGMLQuantizationType.Q8_1, gguf.GGMLQuantizationType.Q8_K}:
        mine = of_number(int(known), known.name)
        assert (mine.name, (mine.values, mine.nbytes)) == (known.name, gguf.GGML_QUANT_SIZES[known])
    files = {known.name.removeprefix("MOSTLY_"): int(known) for known in gguf.LlamaFileType}
    assert all(files[kind.name] == kind.file_type for kind in TYPES.values() if kind.name in files and kind.file_type)
