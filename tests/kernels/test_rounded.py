"""Codebooks as integers: entries off by half a step at most, values those of the rounded entries."""

from __future__ import annotations

import pytest
import torch

from llmq_kernels import rounded
from llmq_kernels.int_linear import reference
from llmq_kernels.levels_linear.reference import levels_dequantize
from llmq_kernels.nf4_linear.reference import nf4_absmax, nf4_dequantize
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
    + [0.7230, 1.0]
)


def dense(plain: PackedInt) -> torch.Tensor:
    codes = reference.unpack_codes(plain.packed, 8, plain.in_features)
    return reference.dequantize(codes, plain.scale, None, plain.group_size)


def test_steps() -> None:
    codebooks = torch.stack((NF4, NF4 * 1e-6, torch.arange(-8.0, 8), torch.zeros(16)))
    steps, length = rounded.whole_steps(codebooks)
    assert steps.dtype == torch.int8 and length.shape == (4, 1)
    off = (steps * length - codebooks).abs()
    assert (off <= length / 2 * (1 + 1e-5)).all()
    assert (steps[:3].abs().amax(1) >= 64).all() and (off[3] == 0).all()
    # Evenly spaced entries are whole numbers of steps.
    assert off[2].max() <= 1e-5
    assert float(off[0].norm() / NF4.norm()) < 0.0059


@pytest.mark.parametrize("nested", [False, True])
def test_blocks(nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    out, width, block = 40, 192, 64
    packed = torch.randint(0, 256, (out * width // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(out * width // block, generator=generator) + 0.1
    more: tuple[torch.Tensor | None, torch.Tensor | None, float] = None, None, 0.0
    if nested:
        absmax = torch.randint(0, 256, absmax.shape, generator=generator).to(torch.uint8)
        more = torch.ones(1), torch.rand(256, generator=generator), 0.25
    weight = PackedCodebook(packed, absmax, NF4, *more, out, width, block)
    plain = rounded.of_blocks(weight)
    scale = nf4_absmax(absmax, *more)
    steps, length = rounded.whole_steps(NF4.view(1, 16))
    expected = nf4_dequantize(packed, scale, (steps * length).view(-1), out, width, block)
    torch.testing.assert_close(dense(plain), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="do not divide"):
        rounded.of_blocks(PackedCodebook(packed, absmax, NF4, *more, out * 2, width // 2, block))


@pytest.mark.parametrize("width", [33, 64])
def test_levels(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (9, -(-width // 2)), dtype=torch.uint8, generator=generator)
    levels = torch.randn(9, 16, generator=generator)
    steps, length = rounded.whole_steps(levels)
    expected = levels_dequantize(packed, steps * length, width)
    torch.testing.assert_close(dense(rounded.of_levels(PackedLevels(packed, levels, 9, width))), expected)
