"""What a plan promises and what a run did, as tables for the terminal."""

from __future__ import annotations

from itertools import groupby
from math import prod

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.machine import size
from llmq.planning.plan import Plan
from llmq.planning.weights import WeightPlan
from llmq.report.report import Report

WORST = 5


def plan(console: Console, made: Plan) -> None:
    """Every weight's shape, scheme and bytes before and after, then the summary."""
    title = escape(str(made.source.folder))
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("scheme")
    for heading in ("before", "after", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in made.weights:
        table.add_row(*_row(item))
    console.print(table)
    console.print()
    summary(console, made)


def _row(item: WeightPlan) -> list[str]:
    what = str(item.scheme) if item.scheme else f"[dim]kept: {escape(str(item.reason))}[/]"
    bits = f"{8 * item.after / max(1, prod(item.shape)):.2f}"
    return [escape(item.name), " × ".join(map(str, item.shape)), what, size(item.before), size(item.after), bits]


def summary(console: Console, made: Plan) -> None:
    """A plan in a few lines: what is quantized, to which size, from which text, in how much memory and disk."""
    chosen = [i for i in made.weights if i.scheme is not None]
    schemes = sorted({str(i.scheme) for i in chosen})
    grid = Table.grid(padding=(0, 2))
    grid.add_row("quantize", f"{len(chosen)} weights in {len(made.structure.blocks)} blocks to {', '.join(schemes)}")
    used = getattr(made.pipeline.quantizer, "range", None)
    grid.add_row("method", "+".join(made.recipe.methods) + (f", {used} range" if used else ""))
    grid.add_row(
        "size", f"{size(made.source.total_bytes)} → {size(made.budget.disk)}, {made.bits_per_weight:.2f} bits/weight"
    )
    places = sum(len(found.pairs) for found in made.pairs.values())
    if places:
        grid.add_row("pairs", f"{places} places where scales can move, in {len(made.pairs)} blocks")
    grid.add_row("calibration", escape(made.calibration.description))
    device = f", {size(made.budget.device_memory)} on the device" if made.budget.device_memory else ""
    grid.add_row("needs", f"{size(made.budget.memory)} of memory{device}, {size(made.budget.disk)} of disk")
    console.print(grid)
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def report(console: Console, done: Report) -> None:
    """A finished run: a line per block, the weights that lost most, everything that fell back, and the headline."""
    table = Table(title="blocks", title_justify="left")
    for heading in ("block", "output error", "mean weight error", "bits", "seconds"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    quantized = [row for row in done.weights if row["scheme"] is not None]
    for index, block in enumerate(done.blocks):
        rows = [row for row in quantized if row["block"] == index]
        bits = 8 * sum(r["bytes"] for r in rows) / max(1, sum(prod(r["shape"]) for r in rows))
        mean = sum(r["error"] for r in rows) / max(1, len(rows))
        table.add_row(
            escape(block["name"]), f"{block['error']:.2e}", f"{mean:.2e}", f"{bits:.2f}", f"{block['seconds']:.1f}"
        )
    console.print(table)
    worst = sorted(quantized, key=lambda row: -row["error"])[:WORST]
    losses = ", ".join(f"{escape(r['name'])} {r['error']:.2e}" for r in worst)
    console.print(f"largest errors: {losses}", highlight=False)
    tried = [line for block in done.blocks for line in block.get("log", [])]
    if tried:
        kept = sum(line["kept"] for line in tried)
        console.print(f"tried {len(tried)} changes to the blocks, kept {kept}, undid {len(tried) - kept}")
    for name, what in done.undone[:WORST]:
        console.print(f"[yellow]undone[/] in {escape(name)}: {escape(what)}", highlight=False)
    for name, note in done.fallbacks:
        console.print(f"[yellow]{escape(name)}[/]: {escape(note)}", highlight=False)
    left = [row for row in done.weights if row["scheme"] is None]
    for reason, alike in groupby(sorted(left, key=lambda r: r["kept"]), key=lambda r: r["kept"]):
        names = [row["name"] for row in alike]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(escape(f"kept ({reason}): {', '.join(names[:3])}{more}"), highlight=False)
    for warning in done.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    for loader in done.loaders:
        console.print(f"loads: {escape(loader)}", highlight=False)
    headline(console, done)


def headline(console: Console, done: Report) -> None:
    """Size, bits, time and memory in a line."""
    console.print(
        f"[bold]{escape(str(done.out))}[/]: "
        f"{size(done.source_bytes)} → {size(done.bytes)} ({done.ratio:.2f}× smaller), "
        f"{done.bits_per_weight:.2f} bits per quantized weight, verified; "
        f"{done.seconds:.1f} s, peak memory {size(done.peak_memory)} (predicted {size(done.predicted_memory)})",
        highlight=False,
    )
