"""AWQ's files: each weight against the codes it was written from, by numpy, nibble for nibble."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AwqConfig

from llmq.formats import awq as module
from llmq.formats import plain
from llmq.formats.awq import FORMATS, AWQReader
from tests.llmq.formats.made import codes, dense, fits, stored
from tests.llmq.written import AWQ_COLUMNS, Case, awq

ROWS, WIDTH = 40, 96
MODULE = nn.Linear(WIDTH, ROWS)


@pytest.mark.parametrize(("group", "zeros"), [(32, True), (32, False), (-1, True)])
def test_a_weight_is_what_it_was_written_from(group: int, zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CHUNK", 16 * WIDTH)  # sixteen rows at a time
    tensors, expected = awq(np.random.default_rng(0), ROWS, WIDTH, Case("awq", 4, group, zeros))
    reader = AWQReader(AwqConfig(bits=4, group_size=group))
    layer = reader.layer("block.up", MODULE, (ROWS, WIDTH), stored(tensors))
    assert layer is not None and fits(layer.entries, tensors)
    weight = layer.read(tensors)
    assert (weight.zero is None) == (not zeros) and weight.bits == 4 and weight.order is None
    assert np.allclose(dense(weight), expected, rtol=1e-12)


def test_the_nibbles_of_a_word_hold_columns_in_autoawq_s_order() -> None:
    """Nibble n holds column AWQ_COLUMNS[n], which is the inverse of the reader's table."""
    assert [module.NIBBLES[column] for column in AWQ_COLUMNS] == [*range(8)]
    word = sum(column << (4 * nibble) for nibble, column in enumerate(AWQ_COLUMNS))
    words = torch.tensor([[word - (1 << 32) if word >> 31 else word]], dtype=torch.int32)
    tensors = {"qweight": words, "qzeros": words * 0, "scales": torch.ones(1, 8)}
    layer = AWQReader(AwqConfig(bits=4, group_size=-1)).layer("a", nn.Linear(1, 8), (8, 1), stored(tensors))
    assert layer is not None
    assert codes(layer.read(tensors).words, 4, 1)[:, 0].tolist() == [column - 8 for column in range(8)]


def test_an_ordinary_weight_is_none_of_awq() -> None:
    there = stored({"weight": torch.ones(ROWS, WIDTH)})
    assert AWQReader(AwqConfig(bits=4)).layer("block.up", MODULE, (ROWS, WIDTH), there) is None


def test_layouts_that_are_read() -> None:
    assert AWQReader.refusal(AwqConfig(bits=4, group_size=128)) is None
    for form in (*FORMATS, "GEMM", "AwqFormat.GEMM"):
        assert AWQReader.refusal(SimpleNamespace(bits=4, group_size=32, format=form)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"format": "gemv"}, "stored as 'gemv', not as gemm"),
        ({"bits": 8}, "AWQ has 4 bits, not 8"),
        ({"act_bits": 8}, "its activations have 8 bits"),
    ],
)
def test_checkpoints_that_are_left_to_stock_transformers(given: dict[str, Any], words: str) -> None:
    made = SimpleNamespace(**({"bits": 4, "group_size": 32, "format": "gemm"} | given))
    assert words in (AWQReader.refusal(made) or "")
