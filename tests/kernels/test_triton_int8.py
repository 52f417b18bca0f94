"""W8A8 in Triton, in its interpreter where there is no GPU: bit for bit what it is said to be."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmq.grids.activations import round_per_token, round_static
from llmq_kernels.int8_linear import cpu as int8_cpu
from llmq_kernels.weights import PackedInt8

pytest.importorskip("triton")
import triton
import triton.language as tl

from llmq_kernels.int8_linear import triton as int8
from llmq_kernels.triton.inputs import round_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATIC = [None, 0.013]


@triton.jit
def listed_kernel(found, blocks_m, blocks_n, ROWS: tl.constexpr):
    program = tl.program_id(0)
    m, n = int8.block_of(program, blocks_m, blocks_n, ROWS)
    tl.store(found + 2 * program, m)
    tl.store(found + 2 * program + 1, n)


def draw(rows: int, out: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of very different sizes, one of zeros among them; a weight over its whole grid; scales of both signs."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-5, 3, rows).unsqueeze(1)
    if rows > 2:
        x[1] = 0
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    return x.to(dtype), weight, torch.randn(out, 1, generator=generator) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("width", [77, 300, 8200])
def test_rounds_inputs_as_the_quantizer_does(dtype: torch.dtype, static: float | None, width: int) -> None:
    x, _, _ = draw(12, 5, width, dtype)
    known = None if static is None else torch.tensor([static])
    codes, scale = round_input(x.to(DEVICE), None if known is None else known.to(DEVICE), torch.int8)
    expected = round_per_token(x, "int") if known is None else round_static(x, known, "int")
    assert torch.equal(codes.cpu().to(dtype) * scale.cpu().to(dtype).unsqueeze(1), expected)
    assert codes.min() == -128 and codes.max() == 127


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 130])
@pytest.mark.parametrize("static", STATIC)
def test_is_the_exact_product_scaled_once(dtype: torch.dtype, rows: int, static: float | None) -> None:
    known = None if static is None else torch.tensor([static])
    for out, width, bias in ((33, 77, None), (130, 300, torch.randn(130).to(dtype))):
        x, weight, scale = draw(rows, out, width, dtype)
        moved = [None if t is None else t.to(DEVICE) for t in (weight, scale, known, bias)]
        *stored, last = moved
        y = int8.linear(x.to(DEVICE), PackedInt8(*stored), last).cpu()
        codes, x_scale = int8_cpu.round_input(x, known)
        exact = (codes.double() @ weight.double().t()).float() * x_scale.float() * scale.float().view(-1)
        assert torch.equal(y, (exact if bias is None else exact + bias.float()).to(dtype))


@pytest.mark.parametrize(("blocks_m", "blocks_n"), [(1, 5), (3, 4), (16, 3), (37, 2), (48, 7)])
def test_every_block_has_one_program_and_neighbours_share_blocks(blocks_m: int, blocks_n: int) -> None:
    """At most 16 blocks of x while the weight is gone through."""
    programs = blocks_m * blocks_n
    found = torch.full((programs, 2), -1, dtype=torch.int32, device=DEVICE)
    listed_kernel[(programs,)](found, blocks_m, blocks_n, int8.ROWS)
    assert {tuple(pair) for pair in found.tolist()} == set(itertools.product(range(blocks_m), range(blocks_n)))
    # As many programs as there are multiprocessors read a rectangle, not a line.
    some = found[:132].tolist()
    assert len({m for m, _ in some}) <= int8.ROWS or len({n for _, n in some}) == blocks_n


def test_refuses_sums_that_might_overflow() -> None:
    with pytest.raises(ValueError, match="131071 inputs, not 131072"):
        weight = PackedInt8(torch.zeros(1, 131072, dtype=torch.int8), torch.ones(1, 1), None)
        int8.linear(torch.zeros(1, 131072), weight, None)
