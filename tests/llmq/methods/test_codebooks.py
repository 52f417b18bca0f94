"""Tuning codebooks and scales to a block's output: what it lowers, what it leaves, that it repeats itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmq import methods
from llmq.block.block import Block
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight
from llmq.methods.codebooks import Codebooks
from llmq.recipe.recipe import Recipe
from tests.llmq.methods.test_signround import block_of

ONE = Scheme(1, 8, grid="vq")


def vectors(block: Block) -> list[VQWeight]:
    return [state.quantized for state in block.weights.values() if isinstance(state.quantized, VQWeight)]


def coarse() -> Block:
    """A block whose weights use four entries of their codebooks alone, which leaves much to lower."""
    block = block_of(ONE)
    for state, q in zip(block.weights.values(), vectors(block), strict=True):
        state.quantized = replace(q, codes=q.codes % 4)
    return block


def parts(block: Block) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(q.codes, q.codebooks, q.scale) for q in vectors(block)]


def test_the_block_gets_nearer_to_its_target_with_the_same_codes() -> None:
    block, again = coarse(), coarse()
    before, start = block.error(), parts(block)
    weights = [parameter.data.clone() for parameter in block.module.parameters()]
    for one in (block, again):
        Codebooks(iterations=60, minibatch=2, seed=3).refine(one)
    assert block.error() < 0.9 * before
    for was, now, same in zip(start, parts(block), parts(again), strict=True):
        assert torch.equal(was[0], now[0])
        assert not torch.equal(was[1], now[1]) and not torch.equal(was[2], now[2])
        assert now[1].dtype == was[1].dtype and now[2].dtype == was[2].dtype
        assert all(torch.equal(a, b) for a, b in zip(now, same, strict=True))
    for held, parameter in zip(weights, block.module.parameters(), strict=True):
        assert torch.equal(held, parameter.data) and parameter.grad is None and not parameter.requires_grad


def test_where_nothing_helps_the_start_is_kept() -> None:
    block = coarse()
    with block.rounding():
        block.target = [output + 1e-4 * torch.randn(output.shape) for output in block.outputs()]
    start = parts(block)
    Codebooks(iterations=5, reach=8.0, scale_reach=0.9).refine(block)
    for was, now in zip(start, parts(block), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))


def test_it_refines_vq_and_refuses_odd_options() -> None:
    pipeline = methods.make(Recipe(methods=("vq", "codebooks"), options={"last": "output"}))
    assert [type(method) for method in pipeline.refiners] == [Codebooks] and not pipeline.refiners[0].logits
    for options in ({"iterations": 0}, {"reach": -1.0}, {"scale_reach": 1.0}, {"last": "first"}):
        with pytest.raises(LlmqError, match="must"):
            Codebooks(**options)  # type: ignore[arg-type]
