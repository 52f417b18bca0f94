"""The command line: parses, calls, prints. Every error that a user can fix is a few lines of text and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq import ranks
from llmq.allocation.goal import Goal
from llmq.cli import adapters, evaluate, export, push, tune
from llmq.cli.goals import with_goal
from llmq.cli.launch import enter
from llmq.cli.options import (
    Device,
    MaxMemory,
    Model,
    Out,
    Ranks,
    StreamHub,
    Tp,
    Trust,
    err_console,
    explained,
    parse_memory,
    with_recipe,
)
from llmq.cli.surroundings import settle
from llmq.recipe.recipe import Recipe

app = typer.Typer(
    name="llmq",
    help="Quantize the weights of any language or vision-language model, with less memory than the model needs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console = Console()


@app.command()
@with_recipe
@with_goal
def plan(
    model: Model,
    chosen: Recipe,
    goal: Goal | None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Check this folder's disk as well.")] = None,
    tp: Tp = 1,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
    stream_hub: StreamHub = False,
) -> None:
    """Show what [bold]quantize[/] would do to each weight, the memory and disk it needs, or why it would refuse."""
    from llmq import job
    from llmq.report import terminal
    from llmq.report.progress import Bars

    with Bars(err_console) as bars:
        made = job.plan(
            model,
            chosen,
            goal=goal,
            out=out,
            tp=tp,
            device=device,
            trust_remote_code=trust_remote_code,
            stream_hub=stream_hub,
            max_memory=parse_memory(max_memory),
            watch=bars,
        )
    terminal.plan(out_console, made)


@app.command()
@with_recipe
@with_goal
def quantize(
    model: Model,
    out: Out,
    chosen: Recipe,
    goal: Goal | None,
    tp: Tp = 1,
    device: Device = "cpu",
    count: Ranks = 1,
    max_memory: MaxMemory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    trust_remote_code: Trust = False,
    stream_hub: StreamHub = False,
) -> None:
    """Quantize a model into a folder that transformers and vLLM load directly, in the format of its grid.

    Processes one decoder block at a time. If the run is killed, the same command resumes it.
    """
    enter(count)
    from llmq import job
    from llmq.report import terminal
    from llmq.report.progress import Bars

    # One rank reports and draws bars; what makes another one fail, that one says.
    out_console.quiet = not ranks.first()
    drawn = err_console if ranks.first() else Console(quiet=True)
    most = parse_memory(max_memory)
    with Bars(drawn) as bars:
        made = job.plan(
            model,
            chosen,
            goal=goal,
            out=out,
            tp=tp,
            device=device,
            trust_remote_code=trust_remote_code,
            stream_hub=stream_hub,
            max_memory=most,
            watch=bars,
        )
    if dry_run:
        terminal.plan(out_console, made)
        return
    terminal.summary(out_console, made)
    try:
        with Bars(drawn) as bars:
            report = job.quantize(
                model,
                out,
                goal=goal,
                tp=tp,
                device=device,
                trust_remote_code=trust_remote_code,
                stream_hub=stream_hub,
                max_memory=most,
                watch=bars,
                made=made,
            )
    except KeyboardInterrupt:
        drawn.print(f"interrupted; finished blocks are kept in {out}: the same command resumes the run")
        raise typer.Exit(130) from None
    terminal.report(out_console, report)
    ranks.stop()


@app.command()
def inspect(
    folder: Annotated[
        str, typer.Argument(help="Any quantized (or plain) model folder, or a GGUF file; a hub id or 'demo' too.")
    ],
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Show where scales can move between weights (awq, smoothquant …), or why not."),
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Every weight of a folder: bits, group size, error, bytes; the folder may be written by any tool.

    The experts of a block are one line.
    """
    with explained():
        from llmq.checkpoint.hub import resolve
        from llmq.formats.gguf.file import is_gguf
        from llmq.report import terminal

        if is_gguf(Path(folder)) and not pairs:
            from llmq.formats.gguf.inspect import inspect_file

            terminal.inspection(out_console, inspect_file(Path(folder)))
            return
        path = resolve(folder, trust_remote_code=trust_remote_code)
        if pairs:
            from llmq.planning.plan import pairs_of

            terminal.pairs(out_console, pairs_of(path, trust_remote_code))
            return
        from llmq.formats.inspection import inspect_folder

        terminal.inspection(out_console, inspect_folder(path))


@app.command()
def recipes() -> None:
    """The presets for --recipe: what each does, what it measured, and when to choose it."""
    with explained():
        from llmq.recipe import presets
        from llmq.report import terminal

        found = [(n, presets.recipe(n), presets.advice(n), presets.measured(n)) for n in presets.names()]
        terminal.recipes(out_console, found)


@app.command()
def methods() -> None:
    """The methods for --method, what each is and which options it has."""
    with explained():
        from llmq.recipe import catalog
        from llmq.report import terminal

        found, broken = catalog.known()
        terminal.methods(out_console, found)
        for problem in broken:
            err_console.print(f"[yellow]warning:[/] {escape(problem)}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many new tokens.")] = 64,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt by greedy decoding: a quick look at what the model generates."""
    with explained():
        from llmq.checkpoint.hub import resolve
        from llmq.inference.generate import generate as run

        folder = resolve(model, trust_remote_code=trust_remote_code)
        run(folder, prompt, tokens, device=device, trust_remote_code=trust_remote_code)


evaluate.add(app)
adapters.add(app, with_recipe, explained)
app.command()(export.export)
app.command()(push.push)
app.command()(tune.tune)


def main() -> None:
    """Entry point of the console script."""
    settle()
    others = sys.argv[1:2] and not sys.argv[1].startswith("-") and sys.argv[1] not in ("quantize", "eval")
    if ranks.asked() > 1 and others and not {"-h", "--help"}.intersection(sys.argv):
        sys.exit(
            f"error: of llmq's commands only `quantize` and `eval` work with several ranks, and {ranks.asked()} "
            "were started (the environment variables RANK and WORLD_SIZE): start one process"
        )
    sys.exit(app())
