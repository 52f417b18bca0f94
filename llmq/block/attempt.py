"""What a method tried on a block, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Whether an attempt stands, was undone because the block's error did not fall, or there was nothing to do."""

    KEPT = "kept"
    UNDONE = "undone"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Attempt:
    """One line of a block's log.

    method: its name, several joined by '+'; where: the pair of weights that was changed, in words, or None for the
    whole block as it is written; before, after: the block's relative output error without and with it, None where it
    was not computed; choice: which of the method's candidates it was; why: why it was skipped, or not judged by its
    error.
    """

    method: str
    where: str | None
    before: float | None
    after: float | None
    outcome: Outcome
    choice: str = ""
    why: str = ""

    @property
    def whole(self) -> bool:
        """Whether it judges the block as it is written, not one pair rounded in the simplest way."""
        return self.where is None

    def __str__(self) -> str:
        what = self.method if self.where is None else f"{self.method}: {self.where}"
        if self.before is None:
            return f"{what}: {self.why or self.outcome}"
        after = "" if self.after is None else f" → {self.after:.4f}"
        return f"{what}: error {self.before:.4f}{after}{f' ({self.why})' if self.why else ''}"
