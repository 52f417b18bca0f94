"""The command-line options that make a goal: a budget for the bits of the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmq.allocation.goal import Goal
    from llmq.recipe.recipe import Recipe

PANEL = "A budget for the bits"

TargetBits = Annotated[
    float | None,
    typer.Option(
        help="Choose each weight's bits for the least loss: so many stored bits per weight on average, with scales "
        "(3.125 is 3-bit g128).",
        rich_help_panel=PANEL,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(help="The same, for a size of the folder's weights: 5GiB, 600MiB.", rich_help_panel=PANEL),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        help="The fewest bytes whose predicted divergence of the logits from the unquantized model is at most this, "
        "in nats: 0.02.",
        rich_help_panel=PANEL,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        help="The same, for the memory of the process that serves the folder: 24GiB. Its weights as they are loaded, "
        "the keys and values of --context tokens for each of --batch requests, and its own share; `llmq plan` shows "
        "the posts.",
        rich_help_panel=PANEL,
    ),
]
TargetLatency = Annotated[
    str | None,
    typer.Option(
        "--target-latency",
        help="The same, for the time from one token to the next, measured on this machine with llmq's kernels, after "
        "--context tokens: 40ms. Alone, or beside one of the other budgets.",
        rich_help_panel=PANEL,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        help="Tokens of a request, for --fit and --target-latency: 4096, 32k. Default 4096.", rich_help_panel=PANEL
    ),
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Requests at once, for the same. Default 1.", rich_help_panel=PANEL)
]
Serve = Annotated[
    str | None,
    typer.Option(
        help="Where the folder will be served: cpu or cuda, by llmq's kernels, or vllm. Default: cuda where there is a "
        "GPU, else cpu.",
        rich_help_panel=PANEL,
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        help="What may be chosen for a weight: bits, with g and a group size or 'channel', and 'a' for zero points; a "
        "grid (fp8); 16 for unquantized. Default 2,3,4,5,6,8,16 with the group size of --group-size.",
        rich_help_panel=PANEL,
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="How the loss of each choice is found: divergence (measured; the best), linear, gradient, fisher, error "
        "(a poor guide). Default: the best that the model's size allows.",
        rich_help_panel=PANEL,
    ),
]
Prove = Annotated[
    bool,
    typer.Option(
        "--prove/--no-prove",
        help="Compare the two or three best choices by their real divergence before one is written.",
        rich_help_panel=PANEL,
    ),
]


def goal_of(
    recipe: Recipe,
    *,
    target_bits: float | None = None,
    target_size: str | None = None,
    max_kl: float | None = None,
    fit: str | None = None,
    target_latency: str | None = None,
    context: str | None = None,
    batch: int | None = None,
    serve: str | None = None,
    candidates: str | None = None,
    score: str | None = None,
    prove: bool = True,
) -> Goal | None:
    """The goal that the options make; None if they give no budget. Raises LlmqError."""
    from llmq.allocation.goal import Fit, Goal, Latency, parse_candidates
    from llmq.errors import LlmqError
    from llmq.machine import has_cuda, parse_count, parse_size, parse_time

    served = {"--context": context, "--batch": batch, "--serve": serve}
    if fit is None and target_latency is None and any(value is not None for value in served.values()):
        given = next(name for name, value in served.items() if value is not None)
        raise LlmqError(f"{given} is for --fit and --target-latency: give one of them too")
    if all(value is None for value in (target_bits, target_size, max_kl, fit, target_latency)):
        if candidates is not None or score is not None:
            raise LlmqError(
                "--candidates and --score are for a budget: give --target-bits, --target-size, --max-kl, --fit or "
                "--target-latency"
            )
        return None
    tokens = 4096 if context is None else parse_count(context, "--context")
    where = serve or ("cuda" if (fit or target_latency) is not None and has_cuda() else "cpu")
    memory = None if fit is None else parse_size(fit, "--fit")
    time = None if target_latency is None else parse_time(target_latency, "--target-latency")
    if score is not None:
        from llmq.allocation import scores

        scores.find(score)
    return Goal(
        bits=target_bits,
        nbytes=None if target_size is None else parse_size(target_size, "--target-size"),
        kl=max_kl,
        fit=None if memory is None else Fit(memory, tokens, batch or 1, where),
        latency=None if time is None else Latency(time, tokens, batch or 1, where),
        candidates=() if candidates is None else parse_candidates(candidates, recipe.scheme),
        score=score,
        prove=prove,
    )


def goal_options(
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    max_kl: MaxKl = None,
    fit: Fit = None,
    target_latency: TargetLatency = None,
    context: Context = None,
    batch: Batch = None,
    serve: Serve = None,
    candidates: Candidates = None,
    score: Score = None,
    prove: Prove = True,
) -> None:
    """The options of a goal, as parameters."""


def with_goal(command: Callable[..., None]) -> Callable[..., None]:
    """Add a goal's options to a command that takes a `Recipe` as `chosen`; it gets the Goal, or None, as `goal`."""
    own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "goal"]
    options = [*signature(goal_options, eval_str=True).parameters.values()]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        goal = goal_of(given["chosen"], **{p.name: given.pop(p.name) for p in options})
        command(goal=goal, **given)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *options)]
    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
