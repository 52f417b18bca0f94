"""Levels of each row: every code survives, and is read for the kernels as it is read for anything else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.formats import codebook
from llmq.formats.codebook.learned import LearnedLayer
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme


@given(rows=st.integers(1, 9), width=st.integers(1, 70), bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_is_read_back(rows: int, width: int, bits: int, seed: int) -> None:
    scheme = Scheme(bits, None, grid="kmeans")
    value = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    q = round_to_nearest(value, scheme, torch.bfloat16)
    assert isinstance(q, QuantizedWeight) and q.levels is not None
    tensors = codebook.pack(q)
    for suffix, (dtype, shape) in codebook.spec((rows, width), scheme, torch.bfloat16).items():
        assert tensors[suffix].dtype == dtype and tuple(tensors[suffix].shape) == shape
    back = codebook.unpack(tensors, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))
    plain = LearnedLayer((rows, width), bits).read(tensors)
    packed, levels = plain.packed()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :width]
    assert torch.equal(levels.gather(1, codes.long()), q.dequantize(torch.float32))
