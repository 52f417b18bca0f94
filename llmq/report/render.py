"""What the command line prints for `inspect`, `recipes` and `methods`: tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.machine import size

if TYPE_CHECKING:
    from llmq.discovery.pairs import Found
    from llmq.formats.base import Row
    from llmq.formats.inspection import Inspection
    from llmq.recipe.catalog import Description
    from llmq.recipe.recipe import Recipe


def inspection(console: Console, found: Inspection) -> None:
    """A line for each weight, then what they come to."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("weight", overflow="fold")
    for name in ("shape", "stored as", "error", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        error = "" if row.error is None else f"{row.error:.4f}"
        shape = "×".join(map(str, row.shape)) or "1"
        name = escape(row.name.removesuffix(".weight"))
        table.add_row(name, shape, scheme(row), error, size(row.nbytes), style="dim" if row.bits is None else None)
    console.print(table)
    console.print()
    totals = Table.grid(padding=(0, 2))
    totals.add_row("quantized with", escape(" ".join(filter(None, (found.method, found.format))) or "nothing"))
    schemes = Counter(scheme(row) for row in found.quantized)
    totals.add_row("quantized", ", ".join(f"{count} × {what}" for what, count in schemes.most_common()) or "none")
    kept = len(found.rows) - len(found.quantized)
    totals.add_row("left alone", f"{kept} tensors, {size(sum(row.nbytes for row in found.rows if row.bits is None))}")
    if found.bits_per_quantized_weight is not None:
        totals.add_row("bits per quantized weight", f"{found.bits_per_quantized_weight:.3f}")
    totals.add_row("bits per weight, whole model", f"{found.bits_per_weight:.3f}")
    errors = [(row.error, row.name) for row in found.rows if row.error is not None]
    if errors:
        totals.add_row("largest error", f"{max(errors)[0]:.4f} {escape(max(errors)[1])}")
    totals.add_row("size", f"{size(found.nbytes)}, {found.size / 1e6:.2f} million numbers")
    console.print(totals, highlight=False)


def scheme(row: Row) -> str:
    """How a weight is stored: 'bfloat16', 'int4 g128', 'int4 channel asymmetric', 'nf4 g64' …"""
    if row.bits is None:
        return row.dtype
    kind = row.kind if row.kind[-1:].isdigit() else f"{row.kind}{row.bits}"
    return f"{kind} {f'g{row.group}' if row.group else 'channel'}" + ("" if row.symmetric else " asymmetric")


def recipes(console: Console, found: Sequence[tuple[str, Recipe, str]]) -> None:
    """A row for each preset: its name, methods, scheme and advice."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for name in ("methods", "scheme", "when"):
        table.add_column(name)
    for name, recipe, advice in found:
        table.add_row(name, "+".join(recipe.methods), str(recipe.scheme), escape(advice))
    console.print(table)


def methods(console: Console, found: Sequence[Description]) -> None:
    """A paragraph for each method: what it does in a recipe, what it is, its options with their defaults."""
    for method in found:
        outside = ", from another package" if method.outside else ""
        console.print(f"[bold]{escape(method.name)}[/] ({', '.join(method.roles)}{outside})", highlight=False)
        console.print(f"  {escape(method.summary)}.", highlight=False)
        for option in method.options:
            default = "" if option.default is None else f" Default {option.default}."
            text = f"  --{option.name.replace('_', '-')}: {option.help}.{default}"
            console.print(escape(text), highlight=False)


def pairs(console: Console, found: Mapping[str, Found]) -> None:
    """Where scales can move, a table for every kind of block: from what, to what, or why not."""
    from llmq.discovery.pairs import explain

    alike: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for name, one in found.items():
        alike.setdefault(tuple(explain(*one)), []).append(name)
    for rows, names in alike.items():
        title = escape(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it")
        table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for heading in ("from", "kind", "to, or why not"):
            table.add_column(heading)
        for source, what, kind in rows:
            table.add_row(escape(source), kind or "[dim]none[/]", escape(what), style=None if kind else "dim")
        console.print(table)
