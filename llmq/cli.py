"""The command line: parses, calls, prints. Every error a user can mend is a few lines of text and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from llmq.errors import LlmqError
from llmq.recipe import Recipe, parse_override

if TYPE_CHECKING:
    from llmq.report import Report

app = typer.Typer(
    name="llmq",
    help="Quantize the weights of any causal language model, on a machine that could never hold it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console = Console()
err_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A folder (config.json, safetensors), a hub id (org/name), or 'demo'.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write. The same command resumes a broken run.")]
Method = Annotated[str | None, typer.Option(help="gptq (needs calibration text, better) or rtn (round to nearest).")]
Bits = Annotated[int | None, typer.Option(help="Bits per weight, 2 to 8. Default 4.")]
Group = Annotated[
    str | None, typer.Option("--group-size", help="Inputs that share a scale, or 'channel'. Default 128.")
]
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points. Default symmetric.")
]
Range = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="How scales are found: minmax, mse, or weighted by E of x². Default: mse for rtn, else weighted.",
    ),
]
ActOrder = Annotated[
    str | None, typer.Option("--act-order", help="GPTQ's order of columns: grouped (default), static or none.")
]
Sweeps = Annotated[
    int | None, typer.Option(help="How often GPTQ's scales and codes are revisited. Default 2; 0 is the paper's GPTQ.")
]
Damping = Annotated[
    float | None,
    typer.Option(help="Share of the mean diagonal that GPTQ adds to its Hessian's diagonal. Default 0.01."),
]
Calib = Annotated[
    str | None,
    typer.Option("--calib", help="Calibration text: 'demo', a .txt, .jsonl or .parquet file, or a hub data set id."),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. Default 128.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens per window. Default 2048, or the model's maximum.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; options given beside it win.")]
Override = Annotated[
    list[str] | None, typer.Option(help="'PATTERN=bits:8,group_size:64' for matching weights. Repeatable.")
]
Keep = Annotated[list[str] | None, typer.Option(help="Leave the weights that match this pattern alone. Repeatable.")]
Ragged = Annotated[
    str | None,
    typer.Option(help="Where the group size does not divide a width: error (default), smaller, channel or keep."),
]
Tp = Annotated[int, typer.Option(min=1, help="Refuse shapes that a server could not split over this many GPUs.")]
Device = Annotated[str, typer.Option(help="Where a block is computed: cpu, cuda, cuda:1 …")]
Seed = Annotated[int | None, typer.Option(help="Seed of anything drawn by chance. Default 0.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code. Read it first.")]


@contextmanager
def explained() -> Iterator[None]:
    """Turn an LlmqError into its message and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except LlmqError as error:
        err_console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err_console.print("interrupted")
        raise typer.Exit(130) from None


def recipe_options(
    method: Method = None,
    bits: Bits = None,
    group_size: Group = None,
    symmetric: Symmetric = None,
    range: Range = None,
    act_order: ActOrder = None,
    sweeps: Sweeps = None,
    damping: Damping = None,
    calib: Calib = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    recipe: RecipeFile = None,
    override: Override = None,
    keep: Keep = None,
    ragged: Ragged = None,
    seed: Seed = None,
) -> Recipe:
    """The recipe file, or the defaults, changed by the options that were given. Raises LlmqError."""
    given = {
        "methods": method,
        "range": range,
        "act_order": act_order,
        "sweeps": sweeps,
        "damping": damping,
        "keep": keep or None,
        "ragged": ragged,
        "seed": seed,
    }
    scheme = {
        "bits": bits,
        "group_size": None if group_size is None else parse_group(group_size),
        "symmetric": symmetric,
    }
    calibration = {"text": calib, "samples": samples, "seqlen": seqlen}
    data = (Recipe.load(recipe) if recipe else Recipe()).to_dict()
    for part, changes in ((data, given), (data["scheme"], scheme), (data["calibration"], calibration)):
        part |= {key: value for key, value in changes.items() if value is not None}
    made = Recipe.from_dict(data)
    changed = tuple(parse_override(text, made.scheme) for text in override or ())
    return replace(made, overrides=(*made.overrides, *changed))


def parse_group(text: str) -> int | str:
    """'128' → 128; 'channel' stays. Raises LlmqError."""
    if text != "channel" and not text.isdigit():
        raise LlmqError(f"--group-size must be a whole number or 'channel', not {text!r}")
    return text if text == "channel" else int(text)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a recipe, and hand it the Recipe made of them."""
    own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "chosen"]
    options = list(signature(recipe_options, eval_str=True).parameters.values())

    @wraps(command)
    def wrapped(**given: Any) -> None:
        with explained():
            chosen = recipe_options(**{p.name: given.pop(p.name) for p in options})
            command(chosen=chosen, **given)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *options)]
    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


@app.command()
@with_recipe
def plan(
    model: Model,
    chosen: Recipe,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Check this folder's disk as well.")] = None,
    tp: Tp = 1,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Show what [bold]quantize[/] would do to each weight, the memory and disk it needs, or why it would refuse."""
    from llmq import job, summary

    made = job.plan(model, chosen, out=out, tp=tp, device=device, trust_remote_code=trust_remote_code)
    summary.plan(out_console, made)


@app.command()
@with_recipe
def quantize(
    model: Model,
    out: Out,
    chosen: Recipe,
    tp: Tp = 1,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a model into a compressed-tensors folder that transformers and vLLM load as it is.

    Streams one decoder block at a time; killed at any moment, the same command goes on where it stopped.
    """
    from llmq import job, summary
    from llmq.progress import Bars

    made = job.plan(model, chosen, out=out, tp=tp, device=device, trust_remote_code=trust_remote_code)
    if dry_run:
        summary.plan(out_console, made)
        return
    summary.summary(out_console, made)
    try:
        with Bars(err_console) as bars:
            report = job.quantize(model, out, device=device, watch=bars, made=made)
    except KeyboardInterrupt:
        err_console.print(f"interrupted; finished blocks are kept in {out}: the same command goes on from there")
        raise typer.Exit(130) from None
    summary.report(out_console, report)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or 'demo': quantized or not.")],
    base: Annotated[
        str | None, typer.Option(help="The unquantized model to measure beside them. Default: the one in report.json.")
    ] = None,
    text: Annotated[str, typer.Option(help="'demo' (held-out standard library) or a text file.")] = "demo",
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default 2048, or the model's maximum.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first windows of the text.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (the model's own).")] = "float32",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity by the standard protocol, the base model beside it in the same run, the protocol printed."""
    with explained():
        from llmq import render, summary
        from llmq.hub import resolve
        from llmq.report import Report
        from llmq_eval import perplexities

        reports = {name: Report.load(Path(name)) for name in models if Report.there(Path(name))}
        base = base or _base(reports.values(), trust_remote_code)
        names = list(dict.fromkeys([base, *models] if base else models))
        results = perplexities(
            [resolve(name, trust_remote_code=trust_remote_code) for name in names],
            text,
            window=window,
            max_windows=max_windows,
            batch=batch,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        render.perplexities(out_console, names, results, base)
        for report in reports.values():
            summary.headline(out_console, report)


def _base(reports: Iterable[Report], trust_remote_code: bool) -> str | None:
    """The model that the first of the reports names, where it can still be had; else a warning."""
    from llmq.hub import resolve

    base = next((report.model for report in reports), None)
    if base is None:
        return None
    try:
        resolve(base, trust_remote_code=trust_remote_code)
    except LlmqError as error:
        text = f"{error}; it is the base model in report.json: measuring without it, unless you give --base"
        err_console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
        return None
    return base


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Any quantized (or plain) model folder.")]) -> None:
    """Every weight of a folder: bits, group size, error, bytes; whichever tool wrote it."""
    with explained():
        from llmq import render
        from llmq.inspection import inspect_folder

        render.inspection(out_console, inspect_folder(folder))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many new tokens.")] = 64,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Go on from a prompt, greedily: a quick look at what the model says."""
    with explained():
        from llmq.generate import generate as run
        from llmq.hub import resolve

        folder = resolve(model, trust_remote_code=trust_remote_code)
        run(folder, prompt, tokens, device=device, trust_remote_code=trust_remote_code)


def main() -> None:
    """The console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
