"""Plain data checked against the annotations of a dataclass: types, keys, the nearest known word in every complaint."""

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
    """What `make` returns; an LlmqError from it says where."""
    try:
        return make()
    except LlmqError as error:
        raise LlmqError(f"{where}: {error}") from error


def check_keys(data: Any, kind: type, where: str) -> dict[str, Any]:
    """A copy of a mapping with no other keys than the fields of a dataclass. Raises LlmqError."""
    if not isinstance(data, Mapping):
        raise LlmqError(f"{where}: must be a mapping, not {data!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            raise LlmqError(f"{where}: unknown key {key!r}{nearest(str(key), known) or '; known: ' + ', '.join(known)}")
    return dict(data)


def check_types(made: Any) -> None:
    """Every field of a dataclass holds what its annotation says. Raises LlmqError naming the field."""
    for name, hint in get_type_hints(type(made)).items():
        check_type(name, getattr(made, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """A value is of an annotated type, one of its choices where it is a Literal. Raises LlmqError naming it."""
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    elif not _fits(value, hint):
        raise LlmqError(f"{name} must be {_words(hint)}, not {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """A value is one of those allowed. Raises LlmqError with all of them and the nearest."""
    if value not in allowed:
        raise LlmqError(f"{name} {value!r} is not known: choose from {', '.join(allowed)}{nearest(value, allowed)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the most similar known word, or nothing."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: true and false are no numbers, a whole number is a number."""
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
