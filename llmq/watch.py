"""Progress of a long run: Watch, which the command line draws as progress bars, and Silent, which shows nothing."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Receives the progress of a run."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, text: str) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""


class Silent:
    """A Watch that shows nothing."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, text: str) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""
