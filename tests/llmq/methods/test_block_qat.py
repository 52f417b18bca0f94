"""Training through the rounding, on a block of its own: what it lowers, what it leaves, that it repeats itself."""

from __future__ import annotations

import pytest
import torch

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight
from llmq.grids.scheme import Activations, Scheme
from llmq.methods._training import Training
from llmq.methods.block_qat import ESTIMATORS, BlockQat
from tests.llmq.methods.test_signround import block_of, codes


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_block_gets_nearer_to_its_target(estimator: str) -> None:
    block = block_of(Scheme(3, 8))
    before, start = block.error(), codes(block)
    BlockQat(iterations=60, minibatch=2, estimator=estimator).refine(block)
    assert block.error() < 0.95 * before
    assert any(not torch.equal(a, b) for a, b in zip(start, codes(block), strict=True))


def test_the_same_seed_gives_the_same_bytes_and_the_module_is_as_it_was() -> None:
    results = []
    for _ in range(2):
        block = block_of(Scheme(2, 8, symmetric=False))
        weights = [p.data.clone() for p in block.module.parameters()]
        BlockQat(iterations=12, seed=3).refine(block)
        found = [w.quantized for w in block.weights.values()]
        results.append([(q.codes, q.scale) for q in found if isinstance(q, QuantizedWeight)])
        for was, parameter in zip(weights, block.module.parameters(), strict=True):
            assert torch.equal(was, parameter.data)
            assert not parameter.requires_grad and parameter.grad is None
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_step_0_is_the_start_and_where_nothing_helps_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(Scheme(3, 8))
    with block.rounding():
        block.target = [output + 1e-4 * torch.randn(output.shape) for output in block.outputs()]
    start, seen = codes(block), []
    found = Training._held_out

    def noticed(self: Training) -> float:
        seen.append(found(self))
        if len(seen) == 1:
            held = self.held
            assert seen[0] == sum(float(self.block.loss(i, self.block.output(i))) for i in held)
        return seen[-1]

    monkeypatch.setattr(Training, "_held_out", noticed)
    BlockQat(iterations=10, reach=8.0).refine(block)
    assert 0 < seen[0] < min(seen[1:])
    for was, now in zip(start, codes(block), strict=True):
        assert torch.equal(was, now)


def static_block(scale: float) -> tuple[torch.Tensor, float, float]:
    """The input scale that is learned from a start of `scale` times the largest magnitude's; error before and after."""
    block = block_of(Scheme(8, None, activations=Activations(dynamic=False)))
    block.calibrate_inputs()
    start = {}
    for name, state in block.weights.items():
        assert state.input_scale is not None and isinstance(state.quantized, QuantizedWeight)
        start[name] = state.input_scale * scale
        block.set_input_scale(name, start[name])
        block.set_quantized(name, state.quantized)
    before = block.error()
    BlockQat(iterations=40, clip_reach=0.9).refine(block)
    after = block.error()
    state = block.weights["first.weight"]
    assert isinstance(state.quantized, QuantizedWeight) and state.input_scale is not None
    assert state.quantized.input_scale is state.input_scale and not state.input_scale.requires_grad
    return state.input_scale / start["first.weight"], before, after


def test_a_clip_of_static_inputs_is_learned_up_where_it_cuts_off_too_much() -> None:
    moved, before, after = static_block(0.3)
    assert float(moved) > 1.2 and after < 0.8 * before


def test_options_are_checked() -> None:
    with pytest.raises(LlmqError, match="estimator must be one of ste, dsq"):
        BlockQat(estimator="none")
    with pytest.raises(LlmqError, match="clip-reach"):
        BlockQat(clip_reach=1.0)
    with pytest.raises(LlmqError, match="last must be"):
        BlockQat(last="first")
    assert BlockQat(last="output").logits is False and BlockQat().logits and BlockQat.float_target
    assert BlockQat().workspace((4, 8)) >= 5 * 4 * 32
