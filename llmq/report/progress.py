"""A progress bar, with the remaining time, for each stage of a run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """A Watch that draws a progress bar per stage on stderr, with the remaining time; silent without a terminal."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""
        self.task = self.progress.add_task(name, total=total, note="")

    def step(self, text: str) -> None:
        """One step is done."""
        if self.task is not None:
            self.progress.update(self.task, advance=1, note=text)

    def note(self, text: str) -> None:
        """Something the user should know happened."""
        self.progress.console.print(text, highlight=False, markup=False)
