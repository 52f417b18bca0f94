"""`llmq push`: its options, and what it prints. app.py adds it to its own commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq.cli.options import err_console, explained

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
