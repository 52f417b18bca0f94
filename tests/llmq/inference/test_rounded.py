"""A model's codebooks as integers, by request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import llmq
from llmq.formats.plain import LevelsWeight
from llmq.inference.linear import CodebookLinear, IntLinear, quant_linear
from llmq.inference.rounded import round_codebooks
from llmq.inference.stack import StackedLinear
from llmq_kernels.int_linear import int8pack
from tests.llmq.inference.test_linear import apart, weights


@pytest.mark.skipif(not int8pack.operator_is_fast(), reason="torch has no fast 8-bit operator here")
def test_layers_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (32, 8), dtype=torch.int64).to(torch.int32)
    levels = LevelsWeight(words, torch.randn(32, 16), 4, 64)
    bias = torch.ones(32)
    model = nn.Sequential(
        nn.Sequential(quant_linear(weights()[1], bias, torch.bfloat16), quant_linear(levels, None, torch.bfloat16)),
        quant_linear(weights()[1], None, torch.float32),
        quant_linear(weights()[0], None, torch.bfloat16),
    ).eval()
    inner = list(model[0])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = [layer(x) for layer in inner]
    untouched = [model[1], model[2]]
    assert round_codebooks(model) == 2
    assert "1 of 3 weights stay codebooks" in caplog.text
    assert [model[1], model[2]] == untouched and isinstance(model[1], CodebookLinear)
    for layer, wanted in zip(model[0], expected, strict=True):
        assert isinstance(layer, IntLinear) and layer.layout == "int8pack" and not layer.training
        assert 0 < apart(layer(x).float(), wanted.float()) < 0.015


def test_experts_that_stay_are_told(caplog: pytest.LogCaptureFixture) -> None:
    stack = StackedLinear(1, quant_linear(weights()[1], None, torch.bfloat16))
    assert round_codebooks(nn.Sequential(stack)) == 0
    assert "1 stacks of experts stay codebooks" in caplog.text


def test_the_choice_is_named(tmp_path: Path) -> None:
    with pytest.raises(llmq.LlmqError, match="exact or int8, not 'fast'"):
        llmq.load(tmp_path, codebooks="fast")
