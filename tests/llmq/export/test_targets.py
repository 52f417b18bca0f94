"""The bytes of GPTQ and AWQ folders, against what is written element by element from the formats' descriptions, and of
MLX's, by its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmq.errors import LlmqError
from llmq.export.targets import TARGETS
from llmq.formats import awq, gptq, mlx
from llmq.grids.base import QuantizedWeight
from llmq.grids.scheme import Scheme
from tests.llmq import written
from tests.llmq.written import Case

ROWS, WIDTH = 32, 128


def weight(case: Case) -> QuantizedWeight:
    """The weight that `written` draws for a case, with codes from −2^(bits−1) on."""
    rng, offset = np.random.default_rng(0), 1 << (case.bits - 1)
    codes, scales, zeros, _ = written.drawn(rng, ROWS, WIDTH, case)
    scheme = Scheme(case.bits, case.group if case.group > 0 else None, not case.zeros)
    zero = torch.from_numpy((zeros - offset).astype(np.int8)) if case.zeros else None
    return QuantizedWeight(torch.from_numpy((codes - offset).astype(np.int8)), torch.from_numpy(scales), zero, scheme)


@pytest.mark.parametrize(
    "case",
    [Case("gptq", bits, 32) for bits in (2, 3, 4, 8)] + [Case("gptq", 4, -1), Case("awq"), Case("awq", zeros=True)],
    ids=str,
)
def test_bytes(case: Case) -> None:
    maker = written.awq if case.kind == "awq" else written.gptq
    wanted, dense = maker(np.random.default_rng(0), ROWS, WIDTH, case)
    q, target = weight(case), TARGETS[case.kind]
    found = target.pack(q, target.told(q))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert torch.allclose(target.unpack(found, target.told(q)), torch.from_numpy(dense).float())


def test_zero_points_of_gptq() -> None:
    case = Case("gptq", zeros=True)
    q = weight(case)
    with pytest.raises(LlmqError, match="GPTQ's first layout does not hold a zero point at the lowest code: --to awq"):
        gptq.pack(q)
    assert q.zero is not None
    q.zero.clamp_(min=-7)
    found = gptq.pack(q)
    assert torch.allclose(TARGETS["gptq"].unpack(found, TARGETS["gptq"].told(q)), q.dequantize(torch.float32))


def test_what_does_not_divide() -> None:
    q = weight(Case("gptq"))
    small = QuantizedWeight(q.codes[:12], q.scale[:12], None, q.scheme)
    with pytest.raises(LlmqError, match=r"do not divide a weight \[12, 128\]: --keep it"):
        gptq.pack(small)
    with pytest.raises(LlmqError, match="which do not divide 12: --keep the weight"):
        awq.pack(small)
    large = QuantizedWeight(q.codes, q.scale.float() * 1e8, None, q.scheme)
    with pytest.raises(LlmqError, match="a scale is too large for float16"):
        awq.pack(large)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_mlx_value_by_value(bits: int, zeros: bool) -> None:
    """scale · q + bias, with the q of a row as one little-endian number."""
    q = weight(Case("mlx", bits, 64, zeros))
    q = QuantizedWeight(q.codes, q.scale.float(), q.zero, q.scheme)
    told = mlx.settings(q)
    assert told == {"group_size": 64, "bits": bits, "mode": "affine"}
    found = mlx.pack(q, told)
    row = int.from_bytes(found["weight"][5].numpy().tobytes(), "little")
    codes = torch.tensor([row >> at * bits & ((1 << bits) - 1) for at in range(WIDTH)], dtype=torch.float32)
    scale, bias = (found[name][5].repeat_interleave(64) for name in ("scales", "biases"))
    assert torch.allclose(codes * scale + bias, q.dequantize(torch.float32)[5], atol=1e-6)
    assert torch.allclose(mlx.unpack(found, told), q.dequantize(torch.float32), atol=1e-6)
