"""A method's attempt on a block, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """An attempt was kept, undone because the block's error did not fall, or skipped as there was nothing to do."""

    KEPT = "kept"
    UNDONE = "undone"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Attempt:
    """One line of a block's log.

    method: its name, several joined by '+'; where: the changed pair of weights, as text, or None for the whole block in
    its written form; before, after: the block's relative output error without and with the change, None if not
    computed; choice: the method's best candidate; why: the reason for skipping it, or for not judging it by the error;
    expert: the number of the routed expert that it was made on, as a block of its own.
    """

    method: str
    where: str | None
    before: float | None
    after: float | None
    outcome: Outcome
    choice: str = ""
    why: str = ""
    expert: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole block was judged in its written form, and not one pair with rounding to nearest."""
        return self.where is None

    def __str__(self) -> str:
        what = self.method if self.where is None else f"{self.method}: {self.where}"
        what = what if self.expert is None else f"expert {self.expert}: {what}"
        if self.before is None:
            return f"{what}: {self.why or self.outcome}"
        after = "" if self.after is None else f" → {self.after:.4f}"
        return f"{what}: error {self.before:.4f}{after}{f' ({self.why})' if self.why else ''}"
