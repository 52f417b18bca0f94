"""Vector quantization as a method: its options, what it refuses, and who else refuses its grid."""

from __future__ import annotations

import pytest
import torch

from llmq.block.statistics import Hessian
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight
from llmq.methods import find
from llmq.methods.vq import VQ
from llmq.numerics.vq import solve

ONE = Scheme(1, 8, grid="vq")


def test_options_reach_the_arithmetic() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(32, 16, generator=draw), Hessian(16, torch.device("cpu"))
    hessian.update(torch.randn(64, 16, generator=draw))
    found = VQ(damping=0.2, rounds=1, beam=2).quantize(weight, ONE, {Hessian: hessian}, torch.float16)
    want = solve(weight, hessian.total, ONE, damping=0.2, rounds=1, beam=2, scale_dtype=torch.float16)
    assert isinstance(found, VQWeight) and torch.equal(found.codes, want.codes)
    assert torch.equal(found.codebooks, want.codebooks) and found.scale.dtype == torch.float16


def test_refusals() -> None:
    for options in ({"damping": 0.0}, {"rounds": -1}, {"beam": 0}, {"correct": "some"}):
        with pytest.raises(LlmqError, match="must be|must lie|not known"):
            VQ(**options)  # type: ignore[arg-type]
    assert "not to 4-bit" in str(VQ().refusal(Scheme())) and VQ().refusal(ONE) is None


@pytest.mark.parametrize("name", ["gptq", "awq", "hqq", "nf4"])
def test_quantizers_of_single_weights_refuse_vectors(name: str) -> None:
    assert "not to 1-bit vq g8" in str(find(name)().refusal(ONE))
