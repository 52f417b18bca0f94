"""What `inspect` accepts of numbers in a config.json, and when they contradict the tensors."""

from __future__ import annotations

import pytest

from llmq.formats.base import UNKNOWN, Row, Unclear, check_named, inputs_per_scale, whole


def test_whole_numbers() -> None:
    config = {"a": None, "b": "4", "c": 8, "d": True, "e": 4.0, "f": "-1", "g": "four"}
    assert [whole(config, key) for key in "abcdefgh"] == [None, 4, 8, None, None, -1, None, None]
    assert whole(config, "a", "c") == 8


@pytest.mark.parametrize(
    ("inputs", "scales", "stated", "group"),
    [
        (256, 2, None, 128),
        (300, 3, 128, 128),  # the last group is short
        (96, 3, None, 32),
        (256, 1, -1, 0),
        (256, 1, None, 0),
        (64, 1, 128, 0),  # a group larger than the weight
        (256, 1, 256, 0),
    ],
)
def test_inputs_per_scale(inputs: int, scales: int, stated: int | None, group: int) -> None:
    assert inputs_per_scale(inputs, scales, stated) == group


@pytest.mark.parametrize(("inputs", "scales", "stated"), [(256, 2, 64), (256, 2, -1), (300, 3, None), (192, 2, None)])
def test_scales_that_do_not_fit(inputs: int, scales: int, stated: int | None) -> None:
    with pytest.raises(Unclear):
        inputs_per_scale(inputs, scales, stated)


def test_sizes_of_the_model() -> None:
    """A width that the model has, or the product of two of its sizes, is good; another width that it has is better."""
    for config in (
        {},
        {"a": 1024},
        {"a": 64, "b": 16},
        {"a": 512, "b": 64, "c": {"d": 16}},
        {"quantization": {"g": 512}},
    ):
        check_named(1024, 4, config)
    for config in ({"a": 512}, {"a": 512, "b": 2}, {"text": {"a": 512}}):
        with pytest.raises(Unclear, match="8 bits 512 as the model has"):
            check_named(1024, 4, config)


def test_outputs_beside_a_weight() -> None:
    """Two weights with as many outputs settle it; one does not, and neither do two beside a third."""
    shared = {"size": 512, "count": 2}
    for beside in ([], [1024], [512, 1024], [512, 512, 1024]):
        with pytest.raises(Unclear, match="8 bits 512 as the model has"):
            check_named(1024, 4, shared, beside)
    check_named(1024, 4, shared, [1024, 1024])
    check_named(1024, 4, shared, [1024, 1024, 512, 512])
    check_named(1024, 4, {"size": 512}, [], others=(4, 6))
    check_named(1024, 4, {"a": 1024}, [512, 512, 2048])  # keys and values, and queries with a gate
    with pytest.raises(Unclear, match="8 bits 512 as the weights beside it give"):
        check_named(1024, 4, {"a": 1024, "b": 512}, [512, 512])


def test_what_is_not_understood_counts_nothing() -> None:
    known = Row("a", (4, 8), "int", 4, 0, True, None, 16, "int32")
    unknown = Row("a", (), UNKNOWN, None, None, None, None, 16, "", "why")
    assert (known.size, known.understood, unknown.size, unknown.understood) == (32, True, 0, False)
