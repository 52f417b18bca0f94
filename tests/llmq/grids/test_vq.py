"""The grid of vectors: its schemes, rounding without data, dequantizing by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from llmq.errors import LlmqError
from llmq.grids.base import rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.grids.table import EACH, GRIDS
from llmq.grids.vq import VQWeight, books_of, row_scale

TWO = Scheme(2, 8, grid="vq")


@pytest.mark.parametrize(("bits", "size", "count"), [(1, 8, 1), (2, 8, 2), (2, 4, 1), (3, 8, 3), (1, 16, 2), (4, 4, 2)])
def test_bits_and_size_give_the_number_of_codebooks(bits: int, size: int, count: int) -> None:
    assert books_of(Scheme(bits, size, grid="vq")) == (count, 256, size)


def test_no_other_schemes() -> None:
    for bits, size in ((1, 4), (3, 4), (5, 8), (2, 32), (0, 8)):
        with pytest.raises(
            LlmqError, match="grid 'vq' is 1 to 4 bits" if bits else "bits must be a whole number from 1 to 8"
        ):
            Scheme(bits, size, grid="vq")
    with pytest.raises(LlmqError, match="from 2 to 8"):
        Scheme(1, 8)
    assert str(TWO) == "2-bit vq g8" and {*GRIDS} - {*EACH} == {"vq"}


def test_what_codes_stand_for() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (5, 3, 2), generator=draw).to(torch.uint8)
    books, scale = torch.randn(2, 256, 8, generator=draw).bfloat16(), torch.rand(5, generator=draw).bfloat16()
    want = torch.empty(5, 24, dtype=torch.float64)
    for row in range(5):
        for group in range(3):
            pair = [books[m, int(codes[row, group, m])].double() for m in range(2)]
            want[row, 8 * group : 8 * group + 8] = (pair[0] + pair[1]) * scale[row].double()
    found = VQWeight(codes, books, scale, TWO)
    assert torch.allclose(found.dequantize(torch.float32).double(), want, rtol=1e-6)
    assert torch.equal(found.dequantize(torch.bfloat16), found.dequantize(torch.float32).bfloat16())


def test_rounding_without_data() -> None:
    weight = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    found = round_to_nearest(weight, TWO, torch.bfloat16)
    assert isinstance(found, VQWeight) and found.codes.shape == (300, 4, 2) and found.codebooks.dtype == torch.bfloat16
    error = (found.dequantize(torch.float32) - weight).square().mean(0)
    assert float(error.mean()) < 0.1
    importance = torch.where(torch.arange(32) < 8, 100.0, 0.01)
    by = round_to_nearest(weight, TWO, torch.bfloat16, importance=importance).dequantize(torch.float32)
    assert float((by - weight)[:, :8].square().mean()) < float(error[:8].mean())


def test_extreme_rows_and_what_is_not_finite() -> None:
    weight = torch.tensor([[0.0] * 8, [1e-40] * 8, [1e30] * 8])
    assert row_scale(weight, torch.bfloat16).tolist()[0] == 1 and bool(row_scale(weight, torch.bfloat16).gt(0).all())
    weight[1, 2] = float("nan")
    with pytest.raises(LlmqError, match="not finite"):
        row_scale(weight, torch.float32)


def test_single_weights_have_no_points() -> None:
    rounding = rounding_of(TWO.rules)
    with pytest.raises(LlmqError, match="rounds vectors of weights together"):
        rounding.levels(TWO, torch.device("cpu"))
    with pytest.raises(LlmqError, match="rounds vectors of weights together"):
        rounding.find_scale(torch.ones(1, 8), TWO, "mse", None, torch.float32)
    with pytest.raises(LlmqError, match="needs the importance"):
        rounding.round(torch.ones(1, 8), TWO, torch.float32, "weighted", None)
