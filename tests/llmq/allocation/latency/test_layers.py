"""Random layers are of the classes that loading makes, and have values."""

from __future__ import annotations

import torch

from llmq.allocation.latency.layers import packed, weight
from llmq.formats.plain import IntWeight
from llmq.grids.scheme import Activations, Scheme
from llmq.inference.linear import CodebookLinear, Float8Linear, Int8Linear, IntLinear, VectorsLinear
from tests.llmq.allocation.tasks import CPU
from tests.llmq.refusal import refused


def test_random_layers() -> None:
    kinds = {
        Scheme(3, 16): IntLinear,
        Scheme(4, 64, grid="nf4", double_quant=True): CodebookLinear,
        Scheme(8, None, activations=Activations()): Int8Linear,
        Scheme(8, None, grid="fp8", activations=Activations()): Float8Linear,
        Scheme(2, 16, grid="ternary", packing="llmq"): VectorsLinear,
    }
    for scheme, kind in kinds.items():
        layer = packed((300, 64), scheme, torch.float32, True, CPU)
        assert type(layer) is kind and (layer.out_features, layer.in_features) == (300, 64)
        assert layer.dense().std() > 0.01 and layer.bias is not None
    found = weight((8, 32), Scheme(4, 16, symmetric=False), torch.bfloat16, CPU)
    assert isinstance(found, IntWeight) and found.zero is not None
    fp8 = Scheme(8, None, grid="fp8")
    refused(lambda: weight((8, 32), fp8, torch.bfloat16, CPU), "--target-latency", "fp8", "--candidates")
