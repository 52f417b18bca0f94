"""The experts of each block: a table of quantiles, and a strip of every expert's error by the tokens that chose it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmq.report.experts import Experts
from llmq.report.measured import digits
from llmq.report.page.charts import Cloud, Clouds, dots

NEAR_END = 0.88
"""Beyond this share of an axis there is only its last label."""
HEADINGS = ["block", "experts", "weights", "bits", "error: median", "90 %", "largest"]
TOKENS = ["tokens: fewest", "median", "most", "without"]
ROUTING = "routing kept"


def clouds(found: Sequence[Experts]) -> Clouds | None:
    """The strips of all blocks with their table, whose first column is the block; None without experts.

    There are no strips if the tokens were not recorded.
    """
    if not found:
        return None
    counts = [tokens for experts in found for tokens, _ in experts.each if tokens is not None]
    most = max(counts, default=0)
    errors = [error for experts in found for _, error in experts.each if math.isfinite(error)]
    low, high = min(errors, default=0.0), max(errors, default=0.0)

    def place(tokens: int, error: float) -> tuple[float, float]:
        share = (min(error, high) - low) / (high - low) if high > low else 0.5
        return across(tokens, most), share if math.isfinite(error) else 1.0

    strips = []
    for experts in found if counts else ():
        known = [(tokens, error) for tokens, error in experts.each if tokens is not None]
        strips.append(
            Cloud(
                f"block {experts.block}",
                f"median {digits(experts.errors[0], 3)}, up to {digits(experts.errors[-1], 3)}",
                _told(experts),
                dots(place(*each) for each in known if each[0]),
                dots(place(*each) for each in known if not each[0]),
            )
        )
    worst = max(found, key=lambda experts: experts.errors[-1])
    idle = sum(experts.idle for experts in found)
    description = (
        "Quantiles of the errors of all weights of a block's experts. "
        f"The largest is {digits(worst.errors[-1], 3)}, in block {worst.block}."
    )
    if counts:
        description += f" No token chose {idle:,} of the {len(counts):,} experts."
    full = any(experts.tokens is not None for experts in found), any(experts.routing is not None for experts in found)
    return Clouds(
        "experts",
        "Experts",
        description,
        strips,
        _ticks(most) if counts else [],
        digits(low, 3),
        digits(high, 3),
        [*HEADINGS, *(TOKENS if full[0] else []), *([ROUTING] if full[1] else [])],
        [_row(experts, *full) for experts in found],
    )


def across(tokens: int, most: int) -> float:
    """The place of a number of tokens on an axis up to `most`, logarithmic but for 0: from 0 to 1."""
    return math.log1p(tokens) / math.log1p(most) if most else 0.0


def _ticks(most: int) -> list[tuple[float, str]]:
    """0, powers of ten, and the largest number."""
    powers = [10**k for k in range(1, len(str(most))) if across(10**k, most) <= NEAR_END]
    return [(round(100 * across(tokens, most), 1), f"{tokens:,}") for tokens in (0, *powers, *([most] if most else []))]


def _row(experts: Experts, tokens: bool, routing: bool) -> list[str]:
    row = [f"block {experts.block}", str(len(experts.each)), str(len(experts.rows)), f"{experts.bits:.2f}"]
    row += [digits(error, 3) for error in experts.errors]
    if tokens:
        row += [""] * 4 if experts.tokens is None else [str(count) for count in (*experts.tokens, experts.idle)]
    return [*row, *([_share(experts)] if routing else [])]


def _share(experts: Experts) -> str:
    return "" if experts.routing is None else f"{100 * experts.routing:.2f} %"


def _told(experts: Experts) -> str:
    """The tooltip of a strip."""
    number = max(range(len(experts.each)), key=lambda i: experts.each[i][1])
    tokens, error = experts.each[number]
    median, high, _ = (digits(value, 3) for value in experts.errors)
    return (
        f"block {experts.block}: errors of weights: median {median}, 90 % up to {high}; "
        f"the expert with the largest mean error is {number}: {digits(error, 3)}, chosen by {tokens} tokens"
    )
