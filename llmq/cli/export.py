"""`llmq export`: a finished folder in the formats of other programs. app.py adds it to its own commands."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq.cli.options import Out, Trust, err_console, explained
from llmq.errors import LlmqError

TARGETS = ("dense",)
out_console = Console()


def export(
    folder: Annotated[str, typer.Argument(help="A quantized folder, or a hub id (org/name).")],
    to: Annotated[
        str,
        typer.Option(help="dense: the dequantized weights as plain safetensors, in the model's dtype and full size."),
    ],
    out: Out,
    trust_remote_code: Trust = False,
) -> None:
    """Write a quantized folder for tools that do not read its format; a killed run resumes.

    [bold]--to dense[/] is also called simulated quantization: any tool computes with the quantized values.
    """
    with explained():
        if to not in TARGETS:
            raise LlmqError(f"--to {to}: choose from {', '.join(TARGETS)}")
        from llmq.export.dense import export_dense
        from llmq.report.progress import Bars

        with Bars(err_console) as bars:
            export_dense(folder, out, trust_remote_code=trust_remote_code, watch=bars)
        out_console.print(f"written: {escape(str(out))}", highlight=False, soft_wrap=True)
