"""`llmq push` and `llmq export`: their options, and what they print. app.py adds them to its own commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq.cli.options import Out, Trust, err_console, explained

out_console = Console()


def push(
    folder: Annotated[Path, typer.Argument(help="A finished folder, as quantize or merge wrote it.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: NAME/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created if missing. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
) -> None:
    """Check that a folder is complete, and upload it to the Hugging Face hub. The same command resumes an upload."""
    with explained():
        from llmq.push import push as upload
        from llmq.report.report import Report

        if Report.there(folder) and Path(Report.load(folder).model).is_absolute():
            err_console.print("[yellow]note:[/] the uploaded report names folders of this machine", highlight=False)
        try:
            url = upload(folder, repo_id, private=private, revision=revision, message=message)
        except KeyboardInterrupt:
            err_console.print("interrupted; the same command resumes the upload, and finished files are not sent again")
            raise typer.Exit(130) from None
        out_console.print(f"[bold]{escape(str(folder))}[/] is at {escape(url)}", highlight=False, soft_wrap=True)


def export(
    folder: Annotated[str, typer.Argument(help="A quantized folder, or a hub id (org/name).")],
    out: Out,
    trust_remote_code: Trust = False,
) -> None:
    """Write the dense model that a quantized folder stands for, for tools that do not read its format.

    Also called simulated quantization: the weights have the quantized values, in the dtype of the model, and its full
    size. If the run is killed, the same command resumes it.
    """
    with explained():
        from llmq.export import export as write
        from llmq.report.progress import Bars

        with Bars(err_console) as bars:
            write(folder, out, trust_remote_code=trust_remote_code, watch=bars)
        out_console.print(f"written: {escape(str(out))}", highlight=False, soft_wrap=True)
