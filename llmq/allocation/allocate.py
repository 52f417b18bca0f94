"""The whole of it: from a plan and a goal to the recipe that has the bits of each weight, and what proved it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from llmq import formats, methods
from llmq.allocation import scores, windows, written
from llmq.allocation.bounds import Bounds, bounds_of
from llmq.allocation.choose import Allocation, Bound, allocate, check_bounds, curve, recipe_of, views
from llmq.allocation.goal import Goal
from llmq.allocation.groups import Group, groups_of
from llmq.allocation.scores import Scoring, divergence, linear
from llmq.allocation.scores._linear import extended
from llmq.allocation.scores._walk import Walk
from llmq.allocation.store import Store
from llmq.checkpoint.sink import Sink
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method
from llmq.planning.memory import FORWARD_COPIES, TRANSIENT, hidden_width
from llmq.planning.trial import try_quantizer
from llmq.planning.types import BATCH_TOKENS, Open, Plan
from llmq.recipe.recipe import Recipe
from llmq.report.bits import BitsRow, TriedRow
from llmq.report.report import versions
from llmq.watch import Silent, Watch

ROOM = 2 << 30
"""The most that the chains of hidden states of all scored candidates take together, in bytes."""
ENOUGH, LEAST = 1024, 512
"""Tokens that divergences are measured on: fewer for every candidate than ENOUGH, and one per group is measured; fewer
than LEAST for these, and gradients are used."""


@dataclass(frozen=True)
class Chosen:
    """The recipe that a goal led to, and how.

    tried: the allocations that were compared, the chosen one first; truths: their divergences on windows kept back, in
    nats, of weights rounded without corrections; empty if none was measured. points: (stored bits per weight,
    predicted divergence) of the best allocations of all sizes. uniform: (scheme, stored bits per weight, predicted
    divergence) of one scheme for all weights. posts: (what, bytes) of the memory beside these weights, if that bounds
    them; milliseconds: of a decode step, predicted, if that bounds them.
    """

    goal: Goal
    recipe: Recipe
    groups: list[Group]
    losses: list[list[float]]
    score: str
    tried: list[Allocation]
    truths: list[float]
    points: list[tuple[float, float]]
    seconds: float
    processor: float
    held: Tensor
    uniform: list[tuple[str, float, float]] = field(default_factory=list)
    posts: tuple[tuple[str, int], ...] = ()
    milliseconds: float | None = None

    @property
    def numbers(self) -> int:
        """The count of the values of all weights whose bits were chosen."""
        return sum(group.numbers for group in self.groups)


def check(plan: Plan, goal: Goal) -> list[Group]:
    """The groups of a plan's weights, with their candidates. Raises LlmqError if some could not be used."""
    candidates = goal.schemes(plan.recipe)
    schemes = {scheme for scheme in candidates if scheme is not None}
    if reason := formats.refusal(schemes):
        raise LlmqError(f"--candidates: {reason}")
    for scheme in sorted(schemes, key=str):
        if scheme.activations is not None and not scheme.activations.dynamic:
            raise LlmqError(f"--candidates: {scheme}: static scales of inputs are not found for each candidate")
        if reason := plan.pipeline.quantizer.refusal(scheme):
            raise LlmqError(f"--candidates: method {'+'.join(plan.recipe.methods)!r}: {reason}")
    if not plan.blocks:
        raise LlmqError("bits are chosen by running the model's blocks, and this one is opened as a class without any")
    groups = groups_of(plan.weights, plan.recipe, candidates, plan.dtype)
    for group in groups:
        if not any(group.candidates):
            raise LlmqError(
                f"{group.name}: no candidate's group size divides its width {group.weights[0].shape[1]}: --ragged "
                "smaller or channel, other --candidates, or --keep it"
            )
    if not groups:
        raise LlmqError("the recipe leaves no weight whose bits could be chosen: fewer --keep and --override")
    used = {scheme: group.weights[0] for group in groups for scheme in group.candidates if scheme is not None}
    name, where = "+".join(plan.recipe.methods), torch.device("cpu")
    try_quantizer(
        [replace(weight, scheme=scheme) for scheme, weight in used.items()], scorer(plan), name, plan.dtype, where
    )
    return groups


def scorer(plan: Plan) -> Method:
    """What rounds the weights while they are scored: the plan's quantizer, without corrections for earlier errors."""
    if plan.pipeline.quantizer.correct == "none":
        return plan.pipeline.quantizer
    options = {**plan.recipe.options, "correct": "none"}
    return methods.make(replace(plan.recipe, options=options)).quantizer


def usual_score(plan: Plan, groups: Sequence[Group]) -> tuple[str, int]:
    """The best score that a model of this size allows, and the tokens that it measures on."""
    width = hidden_width(plan.model) * torch.float32.itemsize
    tokens = windows.SCORED * windows.TOKENS
    for name, chains, least in (("divergence", len(divergence.pairs(groups)), ENOUGH), ("linear", len(groups), LEAST)):
        room = ROOM // max(1, chains * width)
        if room >= least:
            return name, min(tokens, room)
    if any(group.block is None for group in groups):
        # Of routed experts and weights outside the blocks there are no gradients.
        return "linear", max(1, min(tokens, ROOM // max(1, len(groups) * width)))
    return "gradient", tokens


def prepare(plan: Plan, goal: Goal, watch: Watch | None = None) -> tuple[list[Group], Bounds]:
    """The groups and bounds of a plan, whose budget gets the memory that choosing bits takes.

    Raises LlmqError if the goal cannot be met.
    """
    groups = check(plan, goal)
    name = goal.score or usual_score(plan, groups)[0]
    scores.find(name)
    told = ", ".join("unquantized" if scheme is None else str(scheme) for scheme in goal.schemes(plan.recipe))
    told = f"{goal.told()}: {len(groups)} groups of weights, each one of {told}; by the score {name!r}"
    limits = bounds_of(plan, goal, groups, watch or Silent())
    bounds = limits.bounds
    plan.open = Open(told, limits.posts, limits.more)
    check_bounds(groups, bounds)
    whole = all(None in group.candidates for group in groups) and goal.kl is None
    if whole and all(
        sum(row[group.candidates.index(None)] for row, group in zip(bound.costs, groups, strict=True)) <= bound.limit
        for bound in bounds
    ):
        raise LlmqError(f"{goal.told()} hold all weights as they are: there is nothing to quantize")
    plan.budget = replace(plan.budget, memory=max(plan.budget.memory, memory(plan, groups, goal.score)))
    return groups, limits


def choose_bits(plan: Plan, goal: Goal, device: torch.device, watch: Watch) -> Chosen:
    """Score, choose and prove. plan: its model is in float32 afterwards, and of no use.

    Raises LlmqError; what was measured is kept, and the same call goes on.
    """
    began, used = time.perf_counter(), time.process_time()
    groups, limits = prepare(plan, goal, watch)
    bounds = limits.bounds
    posts = () if plan.open is None else plan.open.posts
    usual, tokens = usual_score(plan, groups)
    name = goal.score or usual
    score = scores.find(name)
    scale_dtype, parts = plan.dtype, windows.split(plan.ids, plan.calibration.held)
    scored = parts.scored[: max(1, tokens // parts.scored.shape[1])]
    store = Store.of(_depends(plan, groups, name, scored, device))
    batches, judged = parts.batches(scored)
    wide = widened(plan)
    task = Scoring(
        wide, groups, scorer(plan), batches, judged, scale_dtype, device, watch, store.scratch(f"score-{name}")
    )
    losses = store.read(name)
    if losses is None:
        losses = score(task)
        store.write(name, losses, watch)
    else:
        watch.note(f"scored before: {store.folder} has the losses of this model's weights")
    tried = _distinct(groups, losses, bounds, goal, linear_view(task, losses))
    truths: list[float] = []
    if goal.prove:
        truths = _proved(task, parts, tried, store)
        order = sorted(range(len(tried)), key=lambda i: _worth(tried[i], truths[i], groups, goal))
        tried, truths = [tried[i] for i in order], [truths[i] for i in order]
    recipe = recipe_of(plan.recipe, groups, tried[0])
    took, used = time.perf_counter() - began, time.process_time() - used
    points, uniform = curve(groups, losses), _uniform(groups, losses)
    chosen = Chosen(goal, recipe, groups, losses, name, tried, truths, points, took, used, parts.proof, uniform, posts)
    if limits.times is None:
        return chosen
    times = sum(row[c] for row, c in zip(limits.times, tried[0].picks, strict=True))
    return replace(chosen, milliseconds=times)


def measured(chosen: Chosen, plan: Plan, sink: Sink, device: torch.device, watch: Watch) -> BitsRow:
    """The row of the report, with the divergence of the folder that the sink has written.

    plan: of the written folder; its model is in float32 afterwards.
    """
    tried = tuple(
        TriedRow(one.name, 8 * one.nbytes(chosen.groups) / chosen.numbers, one.predicted, truth)
        for one, truth in zip_longest(chosen.tried, chosen.truths)
    )
    row = BitsRow(
        chosen.goal.told(),
        chosen.score,
        len(chosen.groups),
        tried,
        tuple(chosen.points),
        tuple(chosen.uniform),
        round(chosen.seconds, 2),
        round(chosen.processor, 2),
        lines=chosen.posts,
        milliseconds=chosen.milliseconds,
    )
    batches = torch.split(chosen.held, max(1, BATCH_TOKENS // chosen.held.shape[1]))
    return row.measured(written.divergence(widened(plan), sink, batches, device, watch))


def widened(plan: Plan) -> Plan:
    """The plan in float32. Its model, on the meta device, is changed in place."""
    plan.model.float()
    return replace(plan, dtype=torch.float32)


def linear_view(task: Scoring, losses: list[list[float]]) -> list[list[float]]:
    """Losses by the smallest candidate's alone, a quarter for each bit more."""
    measured = {pair: losses[pair[0]][pair[1]] for pair in linear.pairs(task)}
    errors = {
        (g, c): 4.0 ** -(scheme.bits - 1)
        for g, group in enumerate(task.groups)
        for c, scheme in enumerate(group.candidates)
        if scheme is not None
    }
    return extended(task, measured, errors)


def memory(plan: Plan, groups: Sequence[Group], score: str | None = None) -> int:
    """The peak of resident memory while bits are chosen, in bytes, predicted."""
    import psutil

    four = torch.float32.itemsize
    usual, tokens = usual_score(plan, groups)
    name = score or usual
    parts = windows.split(plan.ids, plan.calibration.held)
    width = hidden_width(plan.model)
    counted = parts.statistics.numel() + parts.proof.numel()
    chains = {"divergence": len(divergence.pairs(groups)), "linear": len(groups)}.get(name, 0)
    states = 2 * counted * width * four + chains * min(tokens, parts.scored.numel()) * width * four
    states += 2 * 3 * parts.proof.numel() * width * four
    blocks = [sum(p.numel() for p in block.module.parameters()) for block in plan.blocks]
    chosen = [item for item in plan.weights if item.scheme is not None]
    mine = [[item for item in chosen if item.block == block.index] for block in plan.blocks]
    # Allocations are compared one after the other; of each, the weights that a later one has too are kept.
    rounded = four * max((sum(prod(i.shape) for i in items) for items in mine), default=0)
    quantizer = scorer(plan)
    widths = [{i.input_id: i.shape[1] for i in items}.values() for items in mine]
    needs = [sum(need.nbytes(w) for need in quantizer.quantize_needs for w in inputs) for inputs in widths]
    work = max((quantizer.workspace(i.shape) for items in mine for i in items), default=0)
    forward = (
        FORWARD_COPIES
        * parts.batch
        * parts.statistics.shape[1]
        * max((max(i.shape) for i in plan.weights), default=1)
        * four
    )
    embedding = sum(plan.model.get_parameter(n).numel() for n in plan.structure.outside) * four
    run = max(blocks) * four + max(needs, default=0) + max(work + rounded, forward)
    now = psutil.Process().memory_info().rss + TRANSIENT
    return int(now + states + max(run, embedding + max(blocks) * four, 2 * embedding))


def _distinct(
    groups: Sequence[Group],
    losses: list[list[float]],
    bounds: Sequence[Bound],
    goal: Goal,
    by_errors: list[list[float]],
) -> list[Allocation]:
    """The best allocations of each view of the losses, different ones, with the predictions of the scored losses."""
    found: dict[tuple[int, ...], Allocation] = {}
    for name, view in views(groups, losses, by_errors).items():
        try:
            one = allocate(groups, view, bounds, goal.kl)
        except LlmqError:
            if not found:
                raise
            continue
        predicted = sum(row[c] for row, c in zip(losses, one.picks, strict=True))
        if goal.kl is not None and predicted > goal.kl:
            continue
        found.setdefault(one.picks, replace(one, predicted=predicted, name=name))
    return list(found.values()) if goal.prove else [next(iter(found.values()))]


def _worth(one: Allocation, truth: float, groups: Sequence[Group], goal: Goal) -> tuple[bool, float]:
    """What orders proved allocations, the best first: divergence; for --max-kl, size where the divergence is met."""
    unmet = goal.kl is not None and truth > goal.kl
    return unmet, truth if goal.kl is None or unmet else one.nbytes(groups)


def _proved(task: Scoring, parts: windows.Split, tried: Sequence[Allocation], store: Store) -> list[float]:
    """The divergences of some allocations on the windows that are kept back for that."""
    names = [f"proof-{'.'.join(map(str, one.picks))}" for one in tried]
    names = [Store.of({"picks": name}).folder.name for name in names]
    known = {name: store.read(f"proof-{name}") for name in names}
    missing = [i for i, name in enumerate(names) if known[name] is None]
    if missing:
        batches, judged = parts.batches(parts.proof)
        folder = store.scratch("proof-" + "-".join(names[i][:8] for i in missing))
        found = Walk(
            replace(task, batches=batches, judged=judged, folder=folder),
            [dict(enumerate(tried[i].picks)) for i in missing],
        ).run()
        for i, truth in zip(missing, found, strict=True):
            known[names[i]] = truth
            store.write(f"proof-{names[i]}", truth, task.watch)
    return [float(known[name]) for name in names]


def _uniform(groups: Sequence[Group], losses: Sequence[Sequence[float]]) -> list[tuple[str, float, float]]:
    """(scheme, stored bits per weight, predicted loss) of each scheme that all groups may have."""
    numbers = sum(group.numbers for group in groups)
    shared: set[Scheme | None] = set.intersection(*(set(group.candidates) for group in groups))
    found = []
    for scheme in shared - {None}:
        places = [group.candidates.index(scheme) for group in groups]
        nbytes = sum(group.nbytes[c] for group, c in zip(groups, places, strict=True))
        loss = sum(row[c] for row, c in zip(losses, places, strict=True))
        found.append((str(scheme), 8 * nbytes / max(1, numbers), loss))
    return sorted(found, key=lambda row: row[1])


def _depends(
    plan: Plan, groups: Sequence[Group], score: str, scored: Tensor, device: torch.device
) -> dict[str, object]:
    """All that scores depend on."""
    return {
        "source": plan.source.fingerprint(),
        "groups": [[g.name, [w.name for w in g.weights], [str(s) for s in g.candidates]] for g in groups],
        "methods": plan.recipe.methods,
        "options": {key: value for key, value in plan.recipe.options.items() if key != "correct"},
        "seed": plan.recipe.seed,
        "score": score,
        "text": plan.calibration.digest,
        "held": None if plan.calibration.held is None else plan.calibration.held.tolist(),
        "scored": len(scored),
        "versions": versions(),
        "device": device.type,
    }
