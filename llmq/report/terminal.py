"""Terminal output: a plan, a finished run, an inspected folder, recipes, methods and pairs, as tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.block.attempt import Outcome
from llmq.machine import size
from llmq.report.experts import experts_of, grouped, place, shapes
from llmq.report.measured import digits
from llmq.spill import Saving

# For `llmq methods` and similar commands, which do not import torch.
if TYPE_CHECKING:
    from llmq.discovery.pairs import Found
    from llmq.formats.base import Row
    from llmq.formats.inspection import Alike, Inspection
    from llmq.planning.plan import Plan
    from llmq.planning.weights import WeightPlan
    from llmq.recipe.catalog import Description
    from llmq.recipe.presets import Measured
    from llmq.recipe.recipe import Recipe
    from llmq.report.report import Report
    from llmq.report.rows import KeptRow

WORST = 5
NOTES = 20
"""Different fallbacks that are printed."""
SHOWN = 300
"""Characters of the first window that are printed."""


def plan(console: Console, made: Plan) -> None:
    """Every weight's shape, scheme and bytes before and after, a block's experts as one row, then the summary."""
    title = escape(str(made.source.folder))
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("scheme")
    for heading in ("before", "after", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    inside = sorted(made.weights, key=lambda i: len(made.structure.blocks) if i.block is None else i.block)
    for item in grouped(inside):
        table.add_row(*(_experts_row(item) if isinstance(item, list) else _row(item)))
    console.print(table)
    console.print()
    summary(console, made)


def _row(item: WeightPlan) -> list[str]:
    what = str(item.scheme) if item.scheme else f"[dim]kept: {escape(str(item.reason))}[/]"
    bits = f"{8 * item.after / max(1, prod(item.shape)):.2f}"
    return [escape(item.name), " × ".join(map(str, item.shape)), what, size(item.before), size(item.after), bits]


def _experts_row(items: list[WeightPlan]) -> list[str]:
    """The row of a block's routed experts."""
    what = Counter(f"[dim]kept: {escape(str(i.reason))}[/]" if i.scheme is None else str(i.scheme) for i in items)
    told = [f"{count} × {said}" if len(what) > 1 else said for said, count in what.items()]
    name = f"{escape(place(items))} × {len({i.expert for i in items})}: {len(items)} weights"
    before, after, numbers = (sum(of) for of in zip(*((i.before, i.after, prod(i.shape)) for i in items), strict=True))
    bits = f"{8 * after / max(1, numbers):.2f}"
    shape = shapes([i.shape for i in items], " × ").replace(", ", "\n")
    return [name, shape, "\n".join(told), size(before), size(after), bits]


def summary(console: Console, made: Plan) -> None:
    """A plan in a few lines: the quantized weights, the size, the calibration text, the memory and disk."""
    chosen = [i for i in made.weights if i.scheme is not None]
    schemes = sorted({i.scheme.told for i in chosen if i.scheme is not None})
    grid = Table.grid(padding=(0, 2))
    blocks, outside = len(made.structure.blocks), len(made.outside)
    where = [f"{len(chosen) - outside} weights in {blocks} blocks"] if blocks else []
    where += [f"{outside} weights {'outside the blocks' if blocks else f'of {type(made.model).__name__}'}"] * bool(
        outside
    )
    grid.add_row("quantize", f"{' and '.join(where)}" + ("" if made.open else f" to {', '.join(schemes)}"))
    if made.open is not None:
        grid.add_row("bits", f"will be chosen for {escape(made.open.goal)}")
        width = max((len(size(nbytes)) for _, nbytes in made.open.posts), default=0)
        for index, (what, nbytes) in enumerate(made.open.posts):
            grid.add_row("" if index else "memory", f"{size(nbytes):>{width}}  {escape(what)}")
        for sentence in made.open.more:
            grid.add_row("", escape(sentence))
    used = getattr(made.pipeline.quantizer, "range", None)
    grid.add_row("method", "+".join(made.recipe.methods) + (f", {used} range" if used else ""))
    if not made.open:
        after = f"{size(made.budget.disk)}, {made.bits_per_weight:.2f} bits/weight"
        grid.add_row("size", f"{size(made.source.total_bytes)} → {after}")
    places = sum(len(found.pairs) for found in made.pairs.values())
    if places:
        grid.add_row("pairs", f"{places} places where scales can move, in {len(made.pairs)} blocks")
    grid.add_row("calibration", escape(made.calibration.description))
    if blocks and outside:
        grid.add_row("", f"outside the blocks none: {made.pipeline.how_without}")
    device = f", {size(made.budget.device_memory)} on the device" if made.budget.device_memory else ""
    if made.calibration.first:
        grid.add_row("first window", escape(readable(made.calibration.first, console.encoding)))
    grid.add_row("needs", f"{size(made.budget.memory)} of memory{device}, {size(made.budget.disk)} of disk")
    if made.saving:
        grid.add_row("", escape(told_saving(made)))
    for index, loader in enumerate(made.loaders):
        grid.add_row("" if index else "loads", escape(loader.sentence))
    console.print(grid)
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def told_saving(made: Plan) -> str:
    """What is done so that the run fits into the memory that it may take, in a sentence."""
    from llmq.planning.stages import most_passes

    told = ["products of earlier runs of a block are not kept"]
    if made.saving >= Saving.STATES:
        told.append("hidden states are in files")
    if made.saving >= Saving.PASSES:
        count = most_passes(made)
        told += [f"statistics are collected in up to {count} passes"] if count > 1 else []
        told.append("weights and matrices that wait are in files")
    files = f" ({size(made.budget.files)} more of disk while it runs)" if made.budget.files else ""
    return f"so that it fits: {', '.join(told)}{files}"


def readable(text: str, encoding: str) -> str:
    """The beginning of a text in quotes, on one line: what cannot be printed is written as in Python's source."""
    start = repr(text[:SHOWN]).encode(encoding, "backslashreplace").decode(encoding)
    return start + (f" ... {len(text) - SHOWN} more" if len(text) > SHOWN else "")


def report(console: Console, done: Report) -> None:
    """A finished run: a line per block, and for its experts; the largest errors, fallbacks, and the headline."""
    table = Table(title="blocks", title_justify="left")
    for heading in ("block", "output error", "mean weight error", "bits", "seconds"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    quantized, inside = done.quantized, defaultdict(list)
    for row in quantized:
        inside[row.block].append(row)
    for index, block in enumerate(done.blocks):
        rows = inside[index]
        bits = 8 * sum(row.bytes for row in rows) / max(1, sum(prod(row.shape) for row in rows))
        mean = sum(row.error for row in rows) / max(1, len(rows))
        table.add_row(escape(block.name), block.shown, f"{mean:.2e}", f"{bits:.2f}", f"{block.seconds:.1f}")
    if outside := inside[None]:
        bits = 8 * sum(row.bytes for row in outside) / max(1, sum(prod(row.shape) for row in outside))
        mean = sum(row.error for row in outside) / len(outside)
        seconds = sum(row.seconds for row in outside)
        name = "outside the blocks" if done.blocks else f"{len(outside)} weights"
        table.add_row(name, "", f"{mean:.2e}", f"{bits:.2f}", f"{seconds:.1f}")
    console.print(table)
    _experts(console, done)
    worst = sorted(quantized, key=lambda row: -row.error)[:WORST]
    losses = ", ".join(f"{escape(row.name)} {row.error:.2e}" for row in worst)
    console.print(f"largest errors: {losses}", highlight=False)
    _attempts(console, done)
    if done.corrections is not None:
        console.print(escape(done.corrections), highlight=False)
    if done.cache is not None:
        console.print(f"cache: {done.cache}", highlight=False)
    if done.tuned is not None:
        console.print(escape(f"{done.recipe['methods'][-1]}: {done.tuned}"), highlight=False)
    for names, note in _alike(done.fallbacks):
        console.print(f"[yellow]{escape(names)}[/]: {escape(note)}", highlight=False)
    for reason, alike in groupby(sorted(done.kept, key=_reason), key=_reason):
        console.print(escape(f"kept ({reason}): {_names([row.name for row in alike])}"), highlight=False)
    for warning in done.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    for loader in done.loaders:
        console.print(f"loads: {escape(loader)}", highlight=False)
    headline(console, done)
    if done.chosen is not None:
        told = "; ".join(filter(None, (str(done.chosen), done.chosen.beside)))
        console.print(escape(f"bits: {told}"), highlight=False)


def _experts(console: Console, done: Report) -> None:
    """A line for the routed experts of each block, if there are any."""
    found = experts_of(done)
    if not found:
        return
    table = Table(title="experts", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in (
        "block",
        "weights",
        "error: median, 90 %, worst",
        "tokens: min, median, max",
        "no token",
        "routing",
    ):
        table.add_column(heading, justify="right")
    for experts in found:
        cells = [str(experts.block), str(len(experts.rows)), ", ".join(digits(error, 3) for error in experts.errors)]
        known = experts.tokens is not None
        cells += [", ".join(map(str, experts.tokens or ())), f"{experts.idle} of {len(experts.each)}" if known else ""]
        table.add_row(*cells, "" if experts.routing is None else f"{100 * experts.routing:.2f} %")
    console.print(table)
    if any(experts.routing is not None for experts in found):
        console.print("routing: the share of choices of experts that are those of the unquantized block", style="dim")


def _alike(notes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(names, note) for every note, in the order in which they are first met; the last stands for what is too much."""
    found: dict[str, list[str]] = {}
    for name, note in notes:
        found.setdefault(note, []).append(name)
    told = [(_names(names), note) for note, names in found.items()]
    rest = {name for names in list(found.values())[NOTES:] for name in names}
    return told[:NOTES] + ([(f"{len(rest)} more weights", "other fallbacks: report.json has them")] if rest else [])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _attempts(console: Console, done: Report) -> None:
    """The number of the methods' attempts, and those that were undone or skipped."""
    kept, undone = done.attempts(Outcome.KEPT), done.attempts(Outcome.UNDONE)
    if kept or undone:
        console.print(f"tried {len(kept + undone)} changes to the blocks, kept {len(kept)}, undid {len(undone)}")
    for name, attempt in undone[:WORST]:
        console.print(f"[yellow]undone[/] in {escape(name)}: {escape(str(attempt))}", highlight=False)
    for said, count in Counter(str(attempt) for _, attempt in done.attempts(Outcome.SKIPPED)).most_common():
        console.print(f"[yellow]skipped[/] in {count} blocks: {escape(said)}", highlight=False)


def _reason(row: KeptRow) -> str:
    return str(row.reason)


def headline(console: Console, done: Report) -> None:
    """Size, bits, time and memory in a line."""
    console.print(
        f"[bold]{escape(str(done.out))}[/]: "
        f"{size(done.source_bytes)} → {size(done.bytes)} ({done.ratio:.2f}× smaller), "
        f"{done.bits_per_weight:.2f} bits per quantized weight, verified; "
        f"{done.seconds:.1f} s, peak memory {size(done.peak_memory)} (predicted {size(done.predicted_memory)})",
        highlight=False,
    )


def inspection(console: Console, found: Inspection) -> None:
    """A line for each weight, one for the experts of a block, then the totals."""
    from llmq.formats.inspection import Alike

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("weight", overflow="fold")
    for name in ("shape", "stored as", "error", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.lines:
        if isinstance(row, Alike):
            table.add_row(*_alike_row(row))
            continue
        error = "" if row.error is None else f"{row.error:.4f}"
        shape = "×".join(map(str, row.shape)) or "1"
        name = escape(row.name.removesuffix(".weight"))
        if not row.understood:
            table.add_row(name, "", "not understood", "", size(row.nbytes), style="yellow")
            continue
        table.add_row(name, shape, scheme(row), error, size(row.nbytes), style="dim" if row.bits is None else None)
    console.print(table)
    console.print()
    totals = Table.grid(padding=(0, 2))
    totals.add_row("quantized with", escape(" ".join(filter(None, (found.method, found.format))) or "nothing"))
    schemes = Counter(scheme(row) for row in found.quantized)
    totals.add_row("quantized", ", ".join(f"{count} × {what}" for what, count in schemes.most_common()) or "none")
    kept = [row for row in found.rows if row.bits is None and row.understood]
    totals.add_row("not quantized", f"{len(kept)} tensors, {size(sum(row.nbytes for row in kept))}")
    if found.unknown:
        why = "; ".join(f"{count} × {said}" for said, count in Counter(row.why for row in found.unknown).most_common(3))
        nbytes = size(sum(row.nbytes for row in found.unknown))
        totals.add_row("layout not understood", escape(f"{len(found.unknown)} weights, {nbytes} stored: {why}"))
    if found.bits_per_quantized_weight is not None:
        totals.add_row("bits per quantized weight", f"{found.bits_per_quantized_weight:.3f}")
    if found.bits_per_weight is not None:
        totals.add_row("bits per weight, whole model", f"{found.bits_per_weight:.3f}")
    if found.cache is not None:
        totals.add_row("keys and values", f"{found.cache.told}: the folder has scales for them")
    errors = [(row.error, row.name) for row in found.rows if row.error is not None]
    if errors:
        totals.add_row("largest error", f"{max(errors)[0]:.4f} {escape(max(errors)[1])}")
    numbers = "" if found.unknown else f", {found.size / 1e6:.2f} million numbers"
    totals.add_row("size", f"{size(found.nbytes)}{numbers}")
    console.print(totals, highlight=False)


def _alike_row(found: Alike) -> list[str]:
    """The row of the experts of a block: how many, their weights, the different shapes and schemes, all their bytes."""
    known = [row for row in found.rows if row.understood]
    what = Counter(scheme(row) if row.understood else "not understood" for row in found.rows)
    told = ", ".join(f"{count} × {said}" if len(what) > 1 else said for said, count in what.most_common())
    errors = sorted(row.error for row in known if row.error is not None)
    error = f"{errors[0]:.4f}–{errors[-1]:.4f}" if errors else ""
    name = f"{escape(found.name)} × {found.count}: {len(found.rows)} weights"
    cells = [name, shapes(row.shape for row in known), told, error, size(sum(row.nbytes for row in found.rows))]
    style = "yellow" if len(known) < len(found.rows) else "dim" if all(row.bits is None for row in known) else ""
    return [f"[{style}]{cell}[/]" if style else cell for cell in cells]


def scheme(row: Row) -> str:
    """The storage of a weight: 'bfloat16', 'int4 g128', 'int4 channel asymmetric', 'nf4 g64', 'Q4_0' …"""
    if row.bits is None or row.kind == row.dtype:
        return row.dtype
    kind = row.kind if row.kind[-1:].isdigit() else f"{row.kind}{row.bits}"
    told = f"{kind} {f'g{row.group}' if row.group else 'channel'}" + ("" if row.symmetric else " asymmetric")
    return f"{told} ({row.holds})" if row.holds else told


def recipes(console: Console, found: Sequence[tuple[str, Recipe, str, Measured]]) -> None:
    """A row for each preset: its name, what it does, what it measured, its advice; what the measurements are; what to
    choose by hardware."""
    from llmq.recipe.presets import HARDWARE

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("methods, scheme")
    table.add_column("KL", no_wrap=True)
    table.add_column("time", no_wrap=True, justify="right")
    table.add_column("when")
    for name, recipe, advice, measured in found:
        what = f"{'+'.join(recipe.methods)}, {recipe.scheme}"
        table.add_row(name, what, f"{measured.kl:.4f}", f"{measured.time:g} ×", escape(advice))
    console.print(table)
    console.print(
        "\nKL: to the unquantized model, in nats, lower is better. Time: of quantizing, as a multiple of w4a16-gptq's. "
        "Measured on a model of 8.4 M parameters, with 128 windows of 512 tokens (docs/benchmarks.md).\n",
        style="dim",
        highlight=False,
    )
    grid = Table.grid(padding=(0, 2))
    for where, what in HARDWARE.items():
        grid.add_row(escape(where), escape(what))
    console.print(grid, highlight=False)


def methods(console: Console, found: Sequence[Description]) -> None:
    """A paragraph for each method: its roles in a recipe, a summary, its options with their defaults."""
    for method in found:
        outside = ", from another package" if method.outside else ""
        console.print(f"[bold]{escape(method.name)}[/] ({', '.join(method.roles)}{outside})", highlight=False)
        console.print(f"  {escape(method.summary)}.", highlight=False)
        for option in method.options:
            default = "" if option.default is None else f" Default {option.default}."
            text = f"  --{option.name.replace('_', '-')}: {option.help}.{default}"
            console.print(escape(text), highlight=False)


def pairs(console: Console, found: Mapping[str, Found]) -> None:
    """The scale pairs, a table for every kind of block: source, consumers, or why there is no pair."""
    from llmq.discovery.pairs import explain

    alike: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for name, one in found.items():
        inside = [(f"each expert: {source}", what, kind) for source, what, kind in explain(*one.experts)]
        alike.setdefault((*explain(one.pairs, one.rejections), *inside), []).append(name)
    for rows, names in alike.items():
        title = escape(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it")
        table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for heading in ("from", "kind", "to, or why not"):
            table.add_column(heading)
        for source, what, kind in rows:
            table.add_row(escape(source), kind or "[dim]none[/]", escape(what), style=None if kind else "dim")
        console.print(table)
