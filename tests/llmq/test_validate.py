"""Plain data held against annotations: what fits, and complaints that name the field and the nearest word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from llmq.errors import LlmqError
from llmq.validate import check_choice, check_keys, check_type, check_types, made, nearest
from tests.llmq.refusal import refused

Kind = Literal["dynamic", "static"]


@dataclass
class Data:
    bits: int = 4
    name: str = ""


@pytest.mark.parametrize(
    ("hint", "fits", "others"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 1.5, float("nan")], [True, "1", None]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["", "a"], [b"a", 1, None]),
        (int | None, [1, None], ["", True]),
        (Kind | None, ["static", None], ["other", 1]),
        (Any, [None, {1: "a"}], []),
        (tuple[str, ...], [(), ("a", "b")], [["a"], ("a", 1), "a"]),
        (tuple[str, int], [("a", 1)], [("a",), (1, "a"), ("a", 1, 2)]),
        (tuple[tuple[str, Data], ...], [(("a", Data()),)], [(("a", 1),)]),
        (Mapping[str, int], [{}, {"a": 1}], [{1: 1}, {"a": True}, [("a", 1)]]),
        (Mapping[str, Any], [{"a": None}], [{None: 1}]),
        (Data, [Data()], [{"bits": 4}, None]),
    ],
    ids=str,
)
def test_what_is_of_a_type(hint: Any, fits: list[Any], others: list[Any]) -> None:
    for value in fits:
        check_type("field", value, hint)
    for value in others:
        with pytest.raises(LlmqError, match="^field must be "):
            check_type("field", value, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (bool, "true or false"),
        (str, "text"),
        (int | None, "a whole number or null"),
        (Kind | None, "one of dynamic, static or null"),
        (tuple[str, ...], "a list, each item text"),
        (tuple[str, int], "(text, a whole number)"),
        (Mapping[str, int], "a mapping"),
        (Data, "a Data"),
    ],
    ids=str,
)
def test_a_complaint_says_the_type_in_words(hint: Any, words: str) -> None:
    with pytest.raises(LlmqError) as caught:
        check_type("field", b"?", hint)
    assert str(caught.value) == f"field must be {words}, not b'?'"


def test_a_choice_is_told_with_all_and_the_nearest() -> None:
    check_type("kind", "static", Kind)
    check_choice("kind", "static", ("dynamic", "static"))
    for call in (
        lambda: check_type("kind", "dynamc", Kind),
        lambda: check_choice("kind", "dynamc", ("dynamic", "static")),
    ):
        refused(call, "kind 'dynamc' is not known: choose from dynamic, static; did you mean 'dynamic'?")
    assert refused(lambda: check_choice("kind", 5, ("a",))).endswith("choose from a")  # type: ignore[arg-type]


def test_the_nearest_word_or_none() -> None:
    assert nearest("methds", ["scheme", "methods"]) == "; did you mean 'methods'?"
    assert nearest("xyz", ["scheme", "methods"]) == "" == nearest("a", [])


def test_keys_are_those_of_the_fields() -> None:
    given = {"bits": "not checked here"}
    copy = check_keys(given, Data, "file")
    assert copy == given and copy is not given
    refused(lambda: check_keys({"bit": 3}, Data, "file"), "file: unknown key 'bit'; did you mean 'bits'?")
    refused(lambda: check_keys({"zzz": 3}, Data, "file"), "file: unknown key 'zzz'; known: bits, name")
    refused(lambda: check_keys({5: 3}, Data, "file"), "file: unknown key 5")
    for other in ([], None, "text"):
        refused(lambda other=other: check_keys(other, Data, "file"), f"file: must be a mapping, not {other!r}")


def test_every_field_of_a_dataclass_is_checked() -> None:
    check_types(Data())
    refused(lambda: check_types(Data(name=3)), "name must be text, not 3")  # type: ignore[arg-type]


def test_where_it_went_wrong_is_put_before() -> None:
    def wrong() -> None:
        raise LlmqError("bits is odd")

    assert made(lambda: 3, "file") == 3
    assert refused(lambda: made(wrong, "file")) == "file: bits is odd"
    with pytest.raises(KeyError):
        made(lambda: {}["a"], "file")
