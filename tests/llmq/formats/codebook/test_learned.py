"""Levels of each row: every code survives, and is read for the kernels as it is read for anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import LlmqError
from llmq.formats import codebook
from llmq.formats.codebook.learned import LearnedLayer
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4]),
    together=st.sampled_from([1, 1, 2, 4, 16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_what_is_packed_is_read_back(rows: int, width: int, bits: int, together: int, seed: int) -> None:
    scheme = Scheme(bits, None, grid="kmeans", level_rows=together)
    value = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    q = round_to_nearest(value, scheme, torch.bfloat16)
    assert isinstance(q, QuantizedWeight) and q.levels is not None
    tensors = codebook.pack(q)
    for suffix, (dtype, shape) in codebook.spec((rows, width), scheme, torch.bfloat16).items():
        assert tensors[suffix].dtype == dtype and tuple(tensors[suffix].shape) == shape
    back = codebook.unpack(tensors, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))
    plain = LearnedLayer((rows, width), bits, together).read(tensors)
    packed, levels = plain.packed()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :width]
    assert torch.equal(levels.gather(1, codes.long()), q.dequantize(torch.float32))


def test_shared_levels_take_fewer_bytes_and_must_fit() -> None:
    alone, shared = (Scheme(4, None, grid="kmeans", level_rows=n) for n in (1, 16))
    sizes = [codebook.spec((256, 256), scheme, torch.bfloat16) for scheme in (alone, shared)]
    bits = [sum(8 * kind.itemsize * torch.Size(shape).numel() for kind, shape in one.values()) / 2**16 for one in sizes]
    assert [round(value, 2) for value in bits] == [5.0, 4.13]
    assert codebook.splits((64, 64), shared, 4, False) and not codebook.splits((64, 64), shared, 8, False)
    assert codebook.splits((64, 64), shared, 8, True) and codebook.splits((64, 64), alone, 64, False)
    q = round_to_nearest(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), shared, torch.bfloat16)
    other = Scheme(4, None, grid="kmeans", level_rows=20)
    with pytest.raises(LlmqError, match=r"weight_shape of a .* says that \[16\] rows share levels"):
        codebook.unpack(codebook.pack(q), other)
    with pytest.raises(LlmqError, match=r"weight_shape says \[32, 8, 16\], the model and config.json \[32, 8, 20\]"):
        LearnedLayer((32, 8), 4, 20).read(codebook.pack(q))
