"""Quantized variants of a model, run side by side with the unquantized one, with one block in memory.

A variant rounds some groups of weights, each with one of its candidates. Until its first rounded group it is the
unquantized model, and takes no time; from then on it is a chain of hidden states of its own, which goes through all
later blocks. In the end all variants are compared with the unquantized model by their logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmq.allocation.groups import Group
from llmq.allocation.judge import judging
from llmq.allocation.scores import Scoring
from llmq.allocation.scores._linear import ratio, squared_error
from llmq.allocation.snapshot import Snapshot
from llmq.block.block import Block
from llmq.block.state import WeightState, rounded_inputs
from llmq.discovery.calls import Call, Recording, States
from llmq.discovery.parameters import assign
from llmq.discovery.view import View, put
from llmq.grids.scheme import Scheme
from llmq.machine import give_back
from llmq.planning.plan import BlockPlan
from llmq.planning.weights import WeightPlan
from llmq.streaming import stream
from llmq.streaming.block_reader import BlockReader, discard

Changes = Mapping[int, int]
"""Of a variant: the index of a group → the index of its candidate."""


@dataclass
class Walk:
    """One pass over all blocks with some variants.

    compared: groups and candidates; errors: of these, after the run, the squared error of the weights rounded to
    nearest, relative to the weights.
    """

    task: Scoring
    variants: Sequence[Changes]
    compared: Sequence[tuple[int, int]] = ()
    errors: dict[tuple[int, int], float] = field(default_factory=dict)

    def run(self) -> list[float]:
        """Each variant's divergence from the unquantized model, the mean over the judged tokens, in nats."""
        task, plan = self.task, self.task.plan
        reader = BlockReader(plan, task.device)
        recording = stream.record_calls(reader, task.watch, task.batches)
        states = recording.states()
        chains: list[list[States] | None] = [None] * len(self.variants)
        begin = len(states) - task.judged
        snapshot = Snapshot(task.folder, len(plan.blocks))
        task.watch.stage("Scoring blocks", len(plan.blocks))
        first, squares = 0, torch.zeros(len(self.compared), 2, dtype=torch.float64)
        if (kept := snapshot.load()) is not None:
            first, (states, *others), squares = kept.block, kept.states, kept.tensors["squares"]
            chains = [one or None for one in others]
        for block in plan.blocks:
            if block.index < first:
                task.watch.step("was already done")
                continue
            states, chains = self._block(reader, block, recording, states, chains, begin, squares)
            give_back()
            snapshot.offer(block.index + 1, [states, *(one or [] for one in chains)], {"squares": squares})
            task.watch.step(block.name)
        found = self._judge(reader, states[begin:], chains, squares)
        self.errors = {pair: ratio(*squares[i].tolist()) for i, pair in enumerate(self.compared)}
        snapshot.clear()
        return found

    def _block(
        self,
        reader: BlockReader,
        block: BlockPlan,
        recording: Recording,
        states: list[States],
        chains: list[list[States] | None],
        begin: int,
        squares: Tensor,
    ) -> tuple[list[States], list[list[States] | None]]:
        """What the block hands on, unquantized (first) and of each variant."""
        device = reader.device
        calls = [calls[block.index] for calls in recording.calls]
        given = [call.given(one.handed) for call, one in zip(calls, states, strict=True)]
        opened = reader.open(block, stream.hidden_of(states[:begin]), given[:begin])
        for name in sorted(block.streamed):
            reader.load(f"{block.name}.{name}")
        needs = tuple(self.task.quantizer.quantize_needs)

        def stepped(before: Sequence[States], which: Sequence[Call]) -> list[States]:
            handed = [call.given(one.handed) for call, one in zip(which, before, strict=True)]
            return stream.forward(block.module, stream.hidden_of([*before]), handed, device) if before else []

        outputs: list[States]
        if begin and needs:
            observed = opened.observe(needs)
            plain = not any(call.needed for call in calls)
            outputs = [States(h) for h in observed] if plain else stepped(states[:begin], calls[:begin])
        else:
            outputs = stepped(states[:begin], calls[:begin])
        judged = stepped(states[begin:], calls[begin:])
        stream.check_output(block.name, [*outputs, *judged], stream.BEFORE)
        rounded = _Rounded(self.task, block, opened)
        for i, (g, c) in enumerate(self.compared):
            for state in rounded.places.get(g, ()):
                squares[i] += squared_error(state.value, self.task.groups[g].candidates[c], self.task.scale_dtype)
        wanted: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, changes in enumerate(self.variants):
            mine = tuple(sorted((g, c) for g, c in changes.items() if g in rounded.places))
            if mine or chains[number] is not None:
                wanted.setdefault(mine, []).append(number)
        after: list[list[States] | None] = [None] * len(chains)
        for i, (mine, numbers) in enumerate(sorted(wanted.items())):
            with rounded.within(mine):
                for number in numbers:
                    after[number] = stepped(chains[number] or states[begin:], calls[begin:])
                    # A chain is in memory once, not before and after the block.
                    chains[number] = None
            rounded.keep_only({pair for later, _ in sorted(wanted.items())[i + 1 :] for pair in later})
        discard(block.module)
        return [*outputs, *judged], after

    def _judge(
        self, reader: BlockReader, base: list[States], chains: list[list[States] | None], squares: Tensor
    ) -> list[float]:
        task = self.task
        shapes = [batch.shape for batch in task.batches[-task.judged :]]
        outside = {g: name for g, group in enumerate(task.groups) if (name := _in_tail(task, group)) is not None}
        found = []
        task.watch.stage("Comparing logits", len(chains))
        with judging(reader, base[0].hidden, shapes[0]) as judge:
            for i, (g, c) in enumerate(self.compared):
                if g in outside:
                    value = judge.known[outside[g]]
                    squares[i] += squared_error(value, task.groups[g].candidates[c], task.scale_dtype)
            for changes, chain in zip(self.variants, chains, strict=True):
                changed: dict[str, Tensor] = {}
                for g, c in changes.items():
                    scheme = task.groups[g].candidates[c]
                    if scheme is not None and g in outside:
                        value = judge.known[outside[g]]
                        made = task.plan.pipeline.data_free.quantize(value, scheme, {}, task.scale_dtype)
                        changed[outside[g]] = made.dequantize(value.dtype)
                parts = [
                    judge.divergence(one.hidden, other.hidden, shape, changed)
                    for one, other, shape in zip(base, chain or base, shapes, strict=True)
                ]
                found.append(float(torch.cat(parts).mean()) if chain or changed else 0.0)
                task.watch.step("")
        return found


class _Rounded:
    """The rounded weights of a filled block, made when they are needed. places: by group, its weights here."""

    def __init__(self, task: Scoring, block: BlockPlan, opened: Block) -> None:
        self.task, self.opened = task, opened
        self.made: dict[tuple[int, int], list[tuple[WeightState, Tensor]]] = {}
        self.places: dict[int, list[WeightState]] = {}
        for g, group in enumerate(task.groups):
            mine = [w for w in group.weights if w.block == block.index]
            if mine:
                self.places[g] = [self._state(block, group, weight) for weight in mine]

    def _state(self, block: BlockPlan, group: Group, weight: WeightPlan) -> WeightState:
        assert weight.view is not None and weight.scheme is not None
        if not group.experts:
            return self.opened.weights[weight.view.name]
        view = weight.view
        if block.experts is not None:
            view = replace(view, parameter=f"{block.experts.info.module}.{view.parameter}", index=weight.expert)
        value = view.get(self.opened.module)
        return WeightState(weight.name, view, weight.scheme, value, value.dtype, weight.input_id)

    def of(self, group: int, candidate: int) -> list[tuple[WeightState, Tensor]]:
        """A group's weights here, rounded with a candidate; in the model's dtype."""
        key = group, candidate
        if key not in self.made:
            scheme = self.task.groups[group].candidates[candidate]
            states = [] if scheme is None else self.places[group]
            self.made[key] = [self._round(group, state, scheme) for state in states if scheme is not None]
        return self.made[key]

    def _round(self, group: int, state: WeightState, scheme: Scheme) -> tuple[WeightState, Tensor]:
        # An expert's own statistics would need its own tokens: it is rounded without any.
        task = self.task
        quantizer = task.plan.pipeline.data_free if task.groups[group].experts else task.quantizer
        with torch.no_grad():
            made = quantizer.quantize(state.value, scheme, state.statistics, task.scale_dtype)
        return replace(state, scheme=scheme), made.dequantize(state.dtype)

    @contextmanager
    def within(self, pairs: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Within the context, the block has these groups rounded, and their inputs as their schemes say."""
        values = [one for pair in pairs for one in self.of(*pair)]
        module = self.opened.module
        names = {state.view.parameter for state, _ in values}
        before = {name: module.get_parameter(name).data for name in names}
        try:
            put(module, _views(values))
            with rounded_inputs(module, [state for state, _ in values]):
                yield
        finally:
            for name, value in before.items():
                assign(module, name, value)

    def keep_only(self, pairs: set[tuple[int, int]]) -> None:
        """Free what is not needed again in this block."""
        for pair in self.made.keys() - pairs:
            del self.made[pair]


def _views(values: Sequence[tuple[WeightState, Tensor]]) -> Iterator[tuple[View, Tensor]]:
    return ((state.view, value) for state, value in values)


def _in_tail(task: Scoring, group: Group) -> str | None:
    """The parameter that a group outside the blocks is, by its name in the model; None for other groups."""
    if group.block is not None or group.experts:
        return None
    names = {tensor: name for name, tensor in task.plan.links.source.items()}
    return names.get(group.weights[0].tensor)
