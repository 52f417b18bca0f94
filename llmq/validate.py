"""Checks of plain data against a dataclass's annotations: types and keys; errors suggest the nearest known word."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Mapping as AbstractMapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llmq.errors import LlmqError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_UNIONS = (UnionType, Union)  # `int | None`, and `Literal[…] | None`
T = TypeVar("T")


def made(make: Callable[[], T], where: str) -> T:
    """The result of `make`; `where` is put before the message of an LlmqError."""
    try:
        return make()
    except LlmqError as error:
        raise LlmqError(f"{where}: {error}") from error


def check_keys(data: Any, kind: type, where: str) -> dict[str, Any]:
    """A copy of a mapping whose keys are all fields of a dataclass. Raises LlmqError for any other key."""
    if not isinstance(data, Mapping):
        raise LlmqError(f"{where}: must be a mapping, not {data!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            raise LlmqError(f"{where}: unknown key {key!r}{nearest(str(key), known) or '; known: ' + ', '.join(known)}")
    return dict(data)


def check_types(made: Any) -> None:
    """Check that every field of a dataclass has its annotated type. Raises LlmqError naming the field."""
    for name, hint in get_type_hints(type(made)).items():
        check_type(name, getattr(made, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check that a value has the annotated type, or is a choice of a Literal. Raises LlmqError naming it."""
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    elif not _fits(value, hint):
        raise LlmqError(f"{name} must be {_words(hint)}, not {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that a value is allowed. Raises LlmqError with all allowed values and the nearest."""
    if value not in allowed:
        raise LlmqError(f"{name} {value!r} is not known: choose from {', '.join(allowed)}{nearest(value, allowed)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """'did you mean …', with the most similar known word, or an empty string."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; a bool is not a number, an int is also a float."""
    inner = get_args(hint)
    if hint is Any:
        return True
    if get_origin(hint) in _UNIONS:
        return any(_fits(value, one) for one in inner)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is AbstractMapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """An annotated type in words."""
    if get_origin(hint) in _UNIONS:
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is AbstractMapping:
        return "a mapping"
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return f"a list, each item {_words(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"({', '.join(map(_words, get_args(hint)))})"
    return _WORDS.get(hint, f"a {hint.__name__}")
