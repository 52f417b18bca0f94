"""The list of methods and their descriptions, read from their source without importing it (or torch).

A method is the public class derived from `Method` in a file under `llmq/methods/`, or an entry point of the group
`llmq.methods` in any installed package: its name is used with `--method`, its class's keyword arguments become
command-line options, and the text after `name:` in its docstring is their help. A class attribute `scheme`, a plain
dict, is the method's default scheme. Other classes in the file are ignored.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, first_line
from llmq.validate import nearest

GROUP = "llmq.methods"
FOLDER = Path(__file__).parent.parent / "methods"


@dataclass(frozen=True)
class Option:
    """A keyword argument of a method. kind: its annotation; choices: those of a Literal."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """A method's description. kind: its class's name; roles: which of transform, quantize, refine, tune it defines."""

    name: str
    kind: str
    summary: str
    options: tuple[Option, ...]
    roles: tuple[str, ...]
    scheme: dict[str, Any] = field(default_factory=dict)
    outside: bool = False


def names() -> list[str]:
    """The names of all methods: the files of `llmq/methods`, then the entry points of installed packages."""
    return [*_own(), *sorted(_outside().keys() - set(_own()))]


def check(name: str) -> None:
    """Raises LlmqError, with the nearest name, if there is no such method."""
    known = names()
    if name not in known:
        raise LlmqError(f"method {name!r} is not known: choose from {', '.join(known)}{nearest(name, known)}")


def entry_point(name: str) -> EntryPoint | None:
    """The entry point of another package's method; None for llmq's own."""
    return None if name in _own() else _outside()[name]


def versions(methods: Iterable[str]) -> dict[str, str]:
    """The other packages that define these methods, with their versions."""
    points = [entry_point(name) for name in methods]
    return {point.dist.name: point.dist.version for point in points if point is not None and point.dist is not None}


@cache
def known() -> tuple[list[Description], list[str]]:
    """The descriptions of all methods, and an error message for each that cannot be read."""
    found, broken = [], []
    for name in names():
        try:
            found.append(describe(name))
        except LlmqError as error:
            broken.append(str(error))
    return found, broken


@cache
def describe(name: str) -> Description:
    """A method's description. Raises LlmqError if there is no such method, or its source cannot be read."""
    check(name)
    outside = entry_point(name)
    file, wanted = (FOLDER / f"{name}.py", "") if outside is None else (_file(outside), outside.attr or "")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise LlmqError(f"method {name!r}: {file} cannot be read: {first_line(error)}") from error
    line = _line(tree, wanted)
    if not line:
        raise LlmqError(
            f"method {name!r}: {file} has no {f'class {wanted}' if wanted else 'class derived from Method'}"
        )
    text = " ".join((ast.get_docstring(line[0]) or "").split())
    defined = {n.name: n for one in reversed(line) for n in one.body if isinstance(n, ast.FunctionDef)}
    roles = tuple(role for role in ("transform", "quantize", "refine", "tune") if role in defined)
    try:
        scheme = next(filter(None, map(_scheme, line)), {})
    except (ValueError, TypeError) as error:
        raise LlmqError(f"method {name!r}: {file}: scheme must be a plain dict of literals") from error
    summary = text.partition(". ")[0].rstrip(":.")
    return Description(name, line[0].name, summary, _options(defined, text), roles, scheme, outside is not None)


@cache
def _own() -> tuple[str, ...]:
    return tuple(sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "base" and not f.stem.startswith("_")))


@cache
def _outside() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _file(point: EntryPoint) -> Path:
    try:
        spec = importlib.util.find_spec(point.module)
    except Exception as error:  # finding a submodule imports its package, which may fail in any way
        raise LlmqError(f"method {point.name!r}: {point.value} cannot be found: {first_line(error)}") from error
    if spec is None or spec.origin is None:
        raise LlmqError(f"method {point.name!r}: there is no module {point.module} (entry point {point.value})")
    return Path(spec.origin)


def _line(tree: ast.Module, wanted: str) -> list[ast.ClassDef]:
    """The method's class (`wanted`, or the first public class derived from Method), followed by its bases in the file.

    Empty if there is none.
    """
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    called = {alias.asname or alias.name for node in imports for alias in node.names if alias.name == "Method"}

    def line(name: str) -> list[ast.ClassDef]:
        found = [name]
        for one in found:  # the list grows as bases are found
            bases = [base.id for base in classes[one].bases if isinstance(base, ast.Name)]
            found += [base for base in bases if base in classes and base not in found]
        return [classes[one] for one in found]

    def derived(name: str) -> bool:
        bases = [ast.unparse(base) for node in line(name) for base in node.bases]
        return any(base in called or base.endswith(".Method") for base in bases)

    if wanted:
        return line(wanted) if wanted in classes else []
    return next((line(name) for name in classes if not name.startswith("_") and derived(name)), [])


def _options(defined: dict[str, ast.FunctionDef], text: str) -> tuple[Option, ...]:
    if "__init__" not in defined:
        return ()
    arguments = defined["__init__"].args
    options = []
    named = arguments.args[1:]
    without: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults))
    pairs = [*zip(named, [*without, *arguments.defaults], strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    for argument, default in pairs:
        if argument.arg == "seed":  # every recipe has one
            continue
        kind = ast.unparse(argument.annotation) if argument.annotation else "str"
        choices = tuple(re.findall(r"'([^']*)'", kind)) if kind.startswith("Literal") else ()
        base = re.sub(r"^Optional\[|[ \]].*", "", kind.strip("'"))
        types: dict[str, type] = {"int": int, "float": float, "bool": bool}
        options.append(Option(argument.arg, types.get(base, str), _value(default), _help(argument.arg, text), choices))
    return tuple(options)


def _value(default: ast.expr | None) -> Any:
    """A default for display: its value, or its source if it is not a literal."""
    try:
        return None if default is None else ast.literal_eval(default)
    except ValueError:
        return None if default is None else ast.unparse(default)


def _help(name: str, text: str) -> str:
    """The text after 'name:' or 'name, other:' in a docstring, up to a semicolon or the end of the sentence."""
    found = re.search(rf"(?:^|\s){name}(?:, \w+)*: (.*?)(?:;|\. |\.?$)", text)
    return found[1].strip() if found else ""


def _scheme(found: ast.ClassDef) -> dict[str, Any]:
    for node in found.body:
        target = (
            node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else 0
        )
        if isinstance(target, ast.Name) and target.id == "scheme" and isinstance(node, (ast.Assign, ast.AnnAssign)):
            return dict(ast.literal_eval(node.value)) if node.value else {}
    return {}
