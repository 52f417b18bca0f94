"""Packing is exact, reversible, and bit for bit what compressed-tensors writes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats import packing
from llmq.formats.packing import pack_codes, pack_columns, packed_width, unpack_codes, unpack_columns


def some_codes(rows: int, n: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    return torch.randint(low, -low, (rows, n), generator=generator).to(torch.int8)


sizes = {"rows": st.integers(1, 40), "n": st.integers(1, 150), "bits": st.integers(2, 8), "seed": st.integers(0, 2**31)}


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_rows_round_trip_and_equal_compressed_tensors(rows: int, n: int, bits: int, seed: int) -> None:
    codes = some_codes(rows, n, bits, seed)
    words = pack_codes(codes, bits)
    assert words.shape == (rows, packed_width(n, bits))
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_codes(words, bits, n), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@settings(max_examples=200, deadline=None)
@given(**sizes)
def test_columns_round_trip_and_equal_compressed_tensors(rows: int, n: int, bits: int, seed: int) -> None:
    codes = some_codes(rows, n, bits, seed)
    words = pack_columns(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(unpack_columns(words, bits, rows), codes)


def test_rows_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = some_codes(37, 50, 3, 0)
    whole = pack_codes(codes, 3)
    monkeypatch.setattr(packing, "CHUNK", 120)
    assert torch.equal(pack_codes(codes, 3), whole)


def test_codes_that_are_not_contiguous() -> None:
    codes = some_codes(24, 33, 5, 0)
    assert torch.equal(pack_codes(codes.t(), 5), pack_codes(codes.t().contiguous(), 5))
    assert torch.equal(pack_codes(codes[::2], 5), pack_codes(codes[::2].contiguous(), 5))


def test_wrong_dtype_is_refused() -> None:
    with pytest.raises(LlmqError, match="must be int8"):
        pack_codes(torch.zeros(2, 8, dtype=torch.int32), 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_single_row_may_have_any_stride(bits: int) -> None:
    """As a column of zero points has, turned."""
    column = torch.arange(16).remainder(3).to(torch.int8).view(16, 1)
    assert torch.equal(pack_codes(column.t().contiguous(), bits), pack_codes(column.flatten()[None].clone(), bits))
