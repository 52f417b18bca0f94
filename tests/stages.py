"""A watch that does something at one step of a stage of a run."""

from __future__ import annotations

from llmq.watch import Silent


class AtStep(Silent):
    """Calls `reached` at a step of a stage, both counted from the stage's beginning."""

    def __init__(self, stage: str, at: int) -> None:
        self.wanted, self.at, self.name, self.count = stage, at, "", 0

    def stage(self, name: str, total: int) -> None:
        self.name, self.count = name, 0

    def step(self, text: str) -> None:
        self.count += 1
        if self.name == self.wanted and self.count == self.at:
            self.reached()

    def reached(self) -> None:
        raise NotImplementedError
