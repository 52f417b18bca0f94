"""Levels of a grid with a scale for each group: bytes by arithmetic, and every code of every shape survives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats import codebook
from llmq.formats.base import Unclear
from llmq.formats.codebook import fixed
from llmq.formats.codebook.fixed import LEVELS, SCALE, SHAPE, TRITS, FixedLayer
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.scheme import Scheme
from llmq.inference.linear import CodebookLinear, VectorsLinear, quant_linear

GRIDS = [("ternary", 2), ("binary", 2), ("log", 3), ("log", 4), ("apot", 3), ("apot", 4)]


def scheme_of(grid: str, bits: int, group: int | None) -> Scheme:
    return Scheme(bits, group, grid=grid, packing="llmq" if bits == 2 else "standard")


def weight(scheme: Scheme, rows: int, width: int, seed: int) -> QuantizedWeight:
    """Any codes, any scales."""
    draw = torch.Generator().manual_seed(seed)
    rounding = rounding_of(scheme.rules)
    levels = rounding.levels(scheme, torch.device("cpu"))
    points = levels[torch.randint(0, len(levels), (rows, width), generator=draw)]
    scale = (torch.rand(rows, scheme.groups(width), generator=draw) + 0.01).bfloat16()
    return QuantizedWeight(rounding.encode(points, scheme), scale, None, scheme)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(GRIDS),
    st.integers(1, 7),
    st.sampled_from([None, 2, 6, 7, 16, 64]),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_what_is_packed_is_read_back(
    grid: tuple[str, int], rows: int, group: int | None, count: int, seed: int
) -> None:
    scheme, width = scheme_of(*grid, group), (group or 13) * count
    if grid[1] > 2 and (group or width) % 2:
        with pytest.raises(LlmqError, match="needs groups of an even size"):
            codebook.spec((rows, width), scheme, torch.bfloat16)
        return
    q = weight(scheme, rows, width, seed)
    stored = codebook.pack(q)
    told = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    assert told == codebook.spec((rows, width), scheme, torch.bfloat16)
    again = codebook.unpack(stored, scheme)
    dense = q.dequantize(torch.float32)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.dequantize(torch.float32), dense)
    layer = FixedLayer((rows, width), len(stored[LEVELS]), group or width)
    assert {name: entry.shape for name, entry in layer.entries.items()} == {n: shape for n, (_, shape) in told.items()}
    packed = quant_linear(layer.read(stored), None, torch.float32)
    assert isinstance(packed, VectorsLinear if grid[1] == 2 else CodebookLinear)
    torch.testing.assert_close(packed(torch.eye(width)).t(), dense, rtol=1e-6, atol=1e-7)
    buffers = sum(buffer.nbytes for name, buffer in packed.named_buffers() if name != "bias")
    assert codebook.loaded_bytes((rows, width), scheme, torch.bfloat16) == buffers


def test_five_codes_in_a_byte_by_arithmetic() -> None:
    """Every five codes, and a row that ends within a byte."""
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8)
    scheme = scheme_of("ternary", 2, None)
    scale = torch.ones(1, 1)

    def stored(codes: Tensor) -> list[int]:
        found: list[int] = codebook.pack(QuantizedWeight(codes.view(1, -1), scale, None, scheme))[TRITS][0].tolist()
        return found

    wanted = [sum((int(c) + 1) * 3**k for k, c in enumerate(codes)) for codes in every]
    assert stored(every) == wanted and sorted(wanted) == [*range(243)]
    assert stored(torch.tensor([1, 1, 1, 1, 1, 0, -1], dtype=torch.int8)) == [242, 1]
    sizes = codebook.spec((64, 320), Scheme(2, 64, grid="ternary", packing="llmq"), torch.bfloat16)
    assert 8 * sizes[TRITS][1][0] * sizes[TRITS][1][1] == 1.6 * 64 * 320


def test_what_stands_for_no_level_is_refused() -> None:
    scheme = scheme_of("ternary", 2, None)
    stored = codebook.pack(weight(scheme, 2, 10, 0))
    wrong = stored | {TRITS: torch.full((2, 2), 243, dtype=torch.uint8)}
    for read in (lambda: codebook.unpack(wrong, scheme), lambda: FixedLayer((2, 10), 3, 10).read(wrong)):
        with pytest.raises(LlmqError, match="weight_trits.*a byte is 243"):
            read()
    with pytest.raises(Unclear, match="a code is 15, and there are 15 levels"):
        fixed.indices(torch.full((1, 2), -1, dtype=torch.int32), 15, 16)
    with pytest.raises(LlmqError, match="weight_levels of a ternary channel"):
        codebook.unpack(stored | {LEVELS: torch.tensor([-1.0, 0.0, 2.0])}, scheme)
    with pytest.raises(LlmqError, match=r"weight_scale of a .* must be bfloat16 \[2, 1\]"):
        codebook.unpack(stored | {SCALE: stored[SCALE][:1]}, scheme)
    with pytest.raises(LlmqError, match=r"weight_shape says \[2, 10\], the model needs \[2, 9\]"):
        FixedLayer((2, 9), 3, 9).read(stored)
    with pytest.raises(LlmqError, match="needs weight_trits, weight_levels, weight_scale"):
        codebook.unpack({SHAPE: stored[SHAPE]}, scheme)


def test_a_server_could_split_whole_bytes_and_groups() -> None:
    scheme = Scheme(2, 64, grid="ternary", packing="llmq")
    assert codebook.splits((6, 640), scheme, 2, True) and codebook.splits((6, 640), scheme, 2, False)
    assert not codebook.splits((6, 128), scheme, 2, True) and not codebook.splits((5, 640), scheme, 2, False)
    assert codebook.splits((6, 128), Scheme(4, 64, grid="log"), 2, True)
