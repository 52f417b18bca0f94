"""llmq tune: measure the kernels' launch configurations on this GPU, for weights of given shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli.options import err_console, explained
from llmq.errors import LlmqError


def tune(
    shape: Annotated[list[str], typer.Option(help="A weight as OUTxIN, such as 4096x14336; may be repeated.")],
    bits: Annotated[list[int] | None, typer.Option(help="Bits of the codes: 2, 3, 4 or 8; may be repeated.")] = None,
    group_size: Annotated[list[int] | None, typer.Option(help="Codes in a group; may be repeated.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the input; by default 1, 2, 4 … 1024.")] = None,
    device: Annotated[str, typer.Option(help="The GPU to measure on.")] = "cuda",
    again: Annotated[bool, typer.Option(help="Repeat earlier measurements.")] = False,
    asymmetric: Annotated[bool, typer.Option(help="Measure weights with zero points.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the inputs: bfloat16 or float16.")] = "bfloat16",
    codebook: Annotated[
        str, typer.Option(help="Measure 4-bit codes of a codebook: all (NF4, FP4; groups of 64) or rows (kmeans).")
    ] = "",
    experts: Annotated[int, typer.Option(help="Measure so many stacked weights, to which rows are routed.")] = 0,
    pairs: Annotated[bool, typer.Option(help="Rows are not sorted by expert, as when one token is decoded.")] = False,
) -> None:
    """Measure launch configurations of the integer kernels on this GPU and keep the fastest for later runs."""
    with explained():
        from rich.progress import Progress

        from llmq_kernels import tune as kernels

        shapes = [parse(text) for text in shape]
        if codebook == "rows" and group_size:
            raise LlmqError("--group-size: a codebook for each row has no groups; leave it out")
        try:
            with Progress(console=err_console) as bar:
                task = bar.add_task("measuring", total=None)

                def advance(done: int, total: int, line: str) -> None:
                    bar.update(task, completed=done, total=total)
                    bar.console.print(line)

                path: Path = kernels.tune(
                    shapes,
                    bits or (4,),
                    group_size or (64 if codebook else 128,),
                    rows,
                    device,
                    again,
                    asymmetric,
                    dtype,
                    advance,
                    kernels.kind_of(codebook, experts, pairs),
                )
        except ValueError as error:
            raise LlmqError(str(error)) from error
        except KeyboardInterrupt:
            err_console.print("interrupted; finished measurements are kept: the same command resumes")
            raise typer.Exit(130) from None
        typer.echo(f"kept in {path}")


def parse(text: str) -> tuple[int, int]:
    """OUTxIN. Raises LlmqError for anything else."""
    out, _, width = text.partition("x")
    if not (out.isdigit() and width.isdigit() and int(out) and int(width)):
        raise LlmqError(f"a shape is OUTxIN, such as 4096x14336, not {text!r}")
    return int(out), int(width)
