"""What weights are turned into before they are packed: columns in the order of groups, odd widths as 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmq.formats import plain
from llmq.formats.plain import Entry, in_groups, mapping, none_if_zero, part_of_rows, served
from tests.llmq.formats.made import codes
from tests.llmq.refusal import refused
from tests.llmq.written import stream


def drawn(bits: int, rows: int = 5, width: int = 24) -> tuple[np.ndarray, torch.Tensor]:
    """Signed codes, and the words that hold them, packed by the tests' own code."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, (rows, width))
    return values - (1 << (bits - 1)), torch.from_numpy(stream(values, bits).copy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_come_into_the_order_of_their_groups(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CHUNK", 2 * 24)  # two rows at a time
    values, words = drawn(bits)
    group = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(24) // 8))
    moved, order = in_groups(words, bits, 24, group, 8)
    assert order is not None and order.dtype == torch.int32
    assert np.array_equal(codes(moved, bits, 24), values[:, order.numpy()])
    assert group[order.long()].tolist() == sorted(group.tolist())
    for number in range(3):  # columns of a group stay as they were among themselves
        inside = order[8 * number : 8 * number + 8].tolist()
        assert inside == sorted(inside)


def test_columns_in_order_stay_where_they_are() -> None:
    _, words = drawn(4)
    moved, order = in_groups(words, 4, 24, torch.arange(24, dtype=torch.int32) // 16, 16)  # the last group is short
    assert moved is words and order is None


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ([0] * 9 + [1] * 7, ("every group 8 of the 16 inputs", "[9, 7]")),
        ([-1] * 8 + [1] * 8, ("some are negative",)),
        ([0] * 8 + [2] * 8, ("[8, 0, 8]",)),
        ([*range(16)], ("[1, 1, 1, 1, 1, 1, 1, 1] …",)),
    ],
)
def test_groups_of_another_size_are_told(group: list[int], words: tuple[str, ...]) -> None:
    _, packed = drawn(4, width=16)
    refused(lambda: in_groups(packed, 4, 16, torch.tensor(group), 8), "g_idx", *words)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_widths_without_kernels_are_served_as_8_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CHUNK", 2 * 22)
    values, words = drawn(bits, width=22)
    wide, wider = served(words, bits, 22)
    assert wider == (bits if bits in plain.BITS else 8)
    assert (wide is words) == (bits == wider) and np.array_equal(codes(wide, wider, 22), values)


def test_zero_points_that_are_all_0_are_none() -> None:
    assert none_if_zero(torch.zeros(2, 3, dtype=torch.int8)) is None
    zero = torch.tensor([[0, -1]], dtype=torch.int8)
    assert none_if_zero(zero) is zero


def test_a_section_of_the_configuration_is_an_object_or_nothing() -> None:
    given = {"a": 1}
    assert mapping(given, "dynamic") is given and mapping(None, "dynamic") == {} == mapping({}, "dynamic")
    for wrong in ([], "text", 0, ["x" * 100]):
        value: Any = wrong
        assert (
            len(refused(lambda value=value: mapping(value, "dynamic"), "config.json: dynamic must be an object")) < 120
        )


def test_an_entry_in_words() -> None:
    assert str(Entry((torch.float16, torch.float32), (3, 4))) == "float16 or float32 [3, 4]"


def test_at_least_one_row_at_a_time() -> None:
    assert part_of_rows(plain.CHUNK * 2) == 1 and part_of_rows(0) == plain.CHUNK and part_of_rows(1 << 20) == 4
