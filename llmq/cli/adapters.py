"""`llmq finetune` and `llmq merge`: their options, and what they print. app.py adds them to its own commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.adapters.settings import Settings
from llmq.recipe.recipe import Recipe

SHOWN = 5
"""Rows in the table of retentions."""
DEFAULT = Settings()

Model = Annotated[str, typer.Argument(help="A folder (config.json, safetensors), a hub id (org/name), or 'demo'.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write. The same command resumes a broken run.")]
Device = Annotated[str, typer.Option(help="Where it is computed: cpu, cuda, cuda:1 …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code. Read it first.")]
Command = Callable[..., None]


def add(app: typer.Typer, with_recipe: Callable[[Command], Command], explained: Callable[[], Any]) -> None:
    """Add both commands to the command line. with_recipe, explained: those of options.py."""

    @wraps(finetune)
    def tune(**given: Any) -> None:
        with explained():
            finetune(**given)

    app.command("finetune")(tune)
    app.command("merge")(_plain_too(with_recipe(merge)))


def _plain_too(command: Command) -> Command:
    """Make --bits 16 write the merged weights unquantized; a Recipe has no such width."""
    own = {"base", "adapter", "out", "trained_on", "loss", "device", "trust_remote_code", "bits"}
    takes = signature(command)

    @wraps(command)
    def wrapped(**given: Any) -> None:
        if given.get("bits") == 16:
            extra = [name for name, value in given.items() if name not in own and value not in (None, [], ())]
            if extra:
                option = extra[0].replace("_", "-")
                Console(stderr=True).print(f"[bold red]error:[/] --bits 16 does not quantize: leave out --{option}")
                raise typer.Exit(2)
            given["bits"] = None
            given["plain"] = True
        command(**given)

    shown = [p for p in takes.parameters.values() if p.name != "plain"]
    wrapped.__signature__ = takes.replace(parameters=shown)  # type: ignore[attr-defined]
    return wrapped


def finetune(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            help="A .json, .jsonl, .csv or .parquet file of rows: messages (an answer with weight 0 is not learned), "
            "prompt and completion or chosen, instruction and output, or text.",
        ),
    ],
    out: Out,
    base_bits: Annotated[
        int,
        typer.Option(help="4: the base is frozen in NF4 (QLoRA). 16: as it is, or dequantized from FP8 or FP4 (LoRA)."),
    ] = DEFAULT.base_bits,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapters.")] = DEFAULT.rank,
    alpha: Annotated[float, typer.Option(help="The adapters' scale is alpha / rank.")] = DEFAULT.alpha,
    dropout: Annotated[float, typer.Option(help="Dropout before the adapters.")] = DEFAULT.dropout,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = DEFAULT.lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = DEFAULT.warmup,
    schedule: Annotated[str, typer.Option(help="After the warmup: cosine, linear or constant.")] = DEFAULT.schedule,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on the adapters.")] = DEFAULT.weight_decay,
    clip: Annotated[float, typer.Option(help="The gradient's norm is clipped to this.")] = DEFAULT.clip,
    epochs: Annotated[float, typer.Option(help="How often each row is seen.")] = DEFAULT.epochs,
    steps: Annotated[int, typer.Option(help="Number of steps; overrides --epochs.")] = DEFAULT.steps,
    batch: Annotated[int, typer.Option(help="Rows per forward pass.")] = DEFAULT.batch,
    accumulate: Annotated[int, typer.Option(help="Passes per step.")] = DEFAULT.accumulate,
    seqlen: Annotated[int, typer.Option(help="Tokens per row; longer rows are cut.")] = DEFAULT.seqlen,
    eval_share: Annotated[float, typer.Option(help="Share of the rows held out.")] = DEFAULT.eval_share,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out rows, in place of a share of the data.")] = None,
    optimizer: Annotated[
        str, typer.Option(help="AdamW: 8bit or paged (bitsandbytes), torch, or auto (8-bit where it runs).")
    ] = DEFAULT.optimizer,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for about a third more time.")
    ] = DEFAULT.checkpointing,
    template: Annotated[
        str, typer.Option(help="auto (the tokenizer's chat template, where it has one) or none.")
    ] = DEFAULT.template,
    dtype: Annotated[
        str, typer.Option(help="What the base computes in: auto, float32, bfloat16, float16.")
    ] = DEFAULT.dtype,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[
        int, typer.Option(help="Of the adapters' initialization, the order of rows, and dropout.")
    ] = DEFAULT.seed,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Train LoRA adapters on a frozen NF4 base (QLoRA), with a held-out loss before and after and a loss curve.

    The loss is taken on the answers only. If the run is killed, the same command resumes from the last checkpoint.
    """
    from llmq.adapters import finetune as tuning
    from llmq.report.progress import Bars

    settings = Settings(
        base_bits=base_bits,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seqlen=seqlen,
        eval_share=eval_share,
        optimizer=optimizer,
        checkpointing=checkpointing,
        template=template,
        dtype=dtype,
        seed=seed,
    )
    console = Console(stderr=True)
    try:
        with Bars(console) as bars:
            outcome = tuning.finetune(
                model,
                data,
                out,
                settings,
                eval_data=eval_data,
                save_every=save_every,
                device=device,
                trust_remote_code=trust_remote_code,
                watch=bars,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; the last checkpoint is kept in {out}: the same command resumes from it")
        raise typer.Exit(130) from None
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{outcome.rows} trained on, {outcome.held_out} held out; {outcome.tokens:,} learned tokens")
    table.add_row("steps", f"{outcome.steps} in {outcome.seconds:.0f} s, by {escape(outcome.optimizer)}")
    table.add_row("training loss", f"{outcome.loss:.4f} (mean of the last tenth)")
    if outcome.before is not None and outcome.after is not None:
        table.add_row("held-out loss", f"{outcome.before:.4f} before, {outcome.after:.4f} after")
    table.add_row("written", f"{escape(str(out))}: the adapter, loss.svg; next: llmq merge {escape(model)} {out} -o …")
    Console().print(table)


def merge(
    base: Model,
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter, from finetune or PEFT.")],
    out: Out,
    chosen: Recipe,
    trained_on: Annotated[
        str,
        typer.Option(
            help="The weights that the adapter was trained on: nf4, base, or auto (from its record, else base)."
        ),
    ] = "auto",
    loss: Annotated[
        bool, typer.Option("--loss", help="Load the whole result and measure its loss on the tune's held-out rows.")
    ] = False,
    plain: bool = False,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Merge a LoRA adapter in float32, quantize the result by any recipe, and report how much of the tune survives.

    [bold]--bits 16[/] writes the merged weights unquantized. Without --calib, calibrates on the tune's own data.
    """
    from llmq.adapters import merge as merging
    from llmq.report.progress import Bars

    console = Console(stderr=True)
    try:
        with Bars(console) as bars:
            report = merging.merge(
                base,
                adapter,
                out,
                chosen,
                plain=plain,
                trained_on=trained_on,
                loss=loss,
                device=device,
                trust_remote_code=trust_remote_code,
                watch=bars,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; finished blocks are kept in {out}: the same command resumes the run")
        raise typer.Exit(130) from None
    print_left(Console(), report)


def print_left(console: Console, report: Any) -> None:
    """Print a MergeReport's worst weights, the mean over all, and the file that has every weight."""
    quantized = report.mean("naive_survived") is not None
    table = Table(
        title="Tune after quantization. D: its change of a weight, E: the written weight's error; kept: 1+⟨E,D⟩/⟨D,D⟩"
    )
    table.add_column("weight", overflow="fold")
    for heading in ("‖D‖/‖W‖", "kept", "‖D‖/‖E‖", *(("naive: kept", "‖D‖/‖E‖") if quantized else ())):
        table.add_column(heading, justify="right")

    def row(name: str, values: list[float | None]) -> None:
        change, *rest = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(escape(name), change, *(rest if quantized else rest[:2]))

    names = ("change", "survived", "snr", "naive_survived", "naive_snr")
    for one in report.worst[:SHOWN]:
        row(one.name.removesuffix(".weight"), [getattr(one, name) for name in names])
    table.add_section()
    row(f"mean of {len(report.left)} weights", [report.mean(name) for name in names])
    console.print(table)
    if report.kept is not None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        console.print(f"Held-out loss: {losses}: {report.kept:.1%} of the tune's gain is kept.")
    elif quantized:
        console.print(
            "A calibrated method minimizes the error of a weight's output, not of the weight itself: --loss measures "
            "how much of the tune's gain is kept."
        )
    console.print("merge.json in the written folder has every weight.")
