"""Lines of a block's log: one of each sort."""

from __future__ import annotations

from llmq.block.attempt import Attempt, Outcome

LOG = (
    Attempt("awq", "norm → first, second", 0.5, 0.4, Outcome.KEPT, choice="α 0.5"),
    Attempt("awq", "up → down", 0.4, None, Outcome.UNDONE, why="no scale tried was better than none"),
    Attempt("AWQ", None, 0.3, 0.2, Outcome.KEPT),
    Attempt("SignRound", None, None, None, Outcome.SKIPPED, why="no weight here can be refined"),
)
