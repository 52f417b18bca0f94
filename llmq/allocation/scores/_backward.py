"""Gradients of a model's log-likelihood along what rounding changes: one block in memory, forwards and then backwards.

Labels y are drawn from the model's own distribution p of the tokens of a piece of text, and g is the gradient of
Σ log p(y) over the piece's T tokens with respect to a weight. Given the text, labels of different tokens are
independent, and the gradient of each has the mean 0: so E[g gᵀ] = T · F, where F is the Fisher information of a token
(Kunstner et al. 2019, arXiv:1905.12558, §2: it takes labels of the model, not those of the text). A small change Δ of
the weight moves the model's distribution by KL ≈ ½ Δᵀ F Δ = ½ E[(g · Δ)²] / T, in nats per token.

One backward pass through a piece serves all weights and all of their candidates. Forwards, what enters every block is
kept on the host, for all windows; backwards, the last block first, a block is filled again, its inputs are observed,
its weights are rounded as each candidate says, and the gradient is handed through it. So memory is that of one block,
of the changes of its weights by all candidates in the model's dtype, of the activations of one piece, and of all
windows' states between all blocks: blocks × tokens × width numbers.

Two things are taken as they are: what blocks hand to later ones beside hidden states has values, but no gradient; and
a candidate's rounding of a weight's input is not counted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llmq.allocation.groups import Group
from llmq.allocation.scores import Scoring
from llmq.block.block import Block
from llmq.checkpoint.files import PARTIAL, put
from llmq.checkpoint.tensors import encode
from llmq.discovery.calls import Call, Recording, States, of_length
from llmq.discovery.tail import Tail, find_tail
from llmq.errors import LlmqError
from llmq.machine import give_back
from llmq.planning.plan import BlockPlan
from llmq.streaming.block_reader import BlockReader, discard
from llmq.streaming.stream import forward, record_calls
from llmq.training.tail import in_memory, logarithms

SAMPLES = 32
"""The backward passes, each with labels of its own."""
TOKENS = 512
"""The tokens of a piece of text, at most."""
EVERY = 30.0
"""The seconds of work that a killed score loses, besides the block that it was in and the pass forwards."""
_KEY = "llmq"

Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""The sample of T · Δᵀ F Δ, float64 [], from the gradients and the changes of a group's weights, each [out, in]."""


def expected_losses(task: Scoring, name: str, measure: Measure) -> list[list[float]]:
    """½ · mean of the measure over samples / tokens, for each group and each of its candidates: nats of KL per token.

    name: of the score, for its file in the task's folder. Raises LlmqError for groups of routed experts or of weights
    outside the blocks, for a model without logits of each token, and as the quantizer does.
    """
    _refuse(task)
    blocks = [group.block for group in task.groups if group.block is not None]
    if not blocks:
        return []
    sums = _Backward(task, measure, _Kept.open(task, name)).run(min(blocks))
    per = 2 * SAMPLES * min(TOKENS, task.batches[0].shape[1])
    return [[one / per for one in sums[group.name]] for group in task.groups]


def pieces(ids: Tensor) -> Tensor:
    """The pieces of text of windows [windows, tokens] that gradients are taken on, at most SAMPLES of at most TOKENS
    tokens: the starts of the last windows first."""
    length = min(TOKENS, ids.shape[1])
    cut = ids[:, : ids.shape[1] // length * length].reshape(len(ids), -1, length)
    return cut.flip(0).transpose(0, 1).reshape(-1, length)[:SAMPLES]


def drawn(logits: Tensor, chance: Tensor) -> Tensor:
    """Labels, int64 [...], drawn from the distribution of logits [..., vocabulary] by chance [...] in [0, 1)."""
    # In float64, the order in which a device adds does not decide a label.
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(sums, (chance.to(sums) * sums[..., -1]).unsqueeze(-1), right=True)
    return found.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def chances(seed: int, tokens: int) -> Tensor:
    """What labels are drawn by: float64 [SAMPLES, tokens]."""
    return torch.rand(SAMPLES, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _refuse(task: Scoring) -> None:
    """Raise LlmqError for what has no gradient here."""
    streamed = any(block.experts is not None for block in task.plan.blocks)
    if streamed or any(group.experts for group in task.groups):
        raise LlmqError("this score has no gradients of routed experts: score by --score error")
    for group in task.groups:
        if group.block is None:
            raise LlmqError(
                f"{group.name}: this score has no gradients of weights outside the blocks: score by --score divergence "
                "or --score linear"
            )


@contextmanager
def _way_out() -> Iterator[None]:
    """Say what to do about a model without logits."""
    try:
        yield
    except LlmqError as problem:
        raise LlmqError(f"{problem}: score without logits, by --score error") from problem


@dataclass
class _State:
    """What the pass backwards has come to. left: the blocks before which it is; slopes: for each sample, the gradient
    with respect to the output of the last of these; sums: of measures, by group and candidate."""

    left: int
    slopes: list[Tensor]
    sums: dict[str, list[float]]


@dataclass
class _Kept:
    """The state on disk, from which a killed score goes on; of: what it is the state of."""

    path: Path | None
    of: str
    written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, task: Scoring, name: str) -> _Kept:
        """The state of a task's score."""
        plan, quantizer = task.plan, task.quantizer
        parts = [name, SAMPLES, TOKENS, task.judged, task.device.type, plan.recipe.seed, plan.dtype]
        parts += [
            plan.source.fingerprint(),
            [batch.tolist() for batch in task.batches],
            type(quantizer),
            sorted(vars(quantizer).items()),
        ]
        parts += [(group.name, group.candidates) for group in task.groups]
        path = None if task.folder is None else task.folder / f"{name}.safetensors"
        return cls(path, hashlib.sha256(repr(parts).encode()).hexdigest())

    def load(self) -> _State | None:
        """The state; None if there is none of this very task."""
        from safetensors import SafetensorError, safe_open

        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads(file.metadata()[_KEY])
                slopes = [file.get_tensor(str(i)) for i in range(SAMPLES)]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
        return _State(told["left"], slopes, told["sums"]) if told["of"] == self.of else None

    def save(self, state: _State) -> None:
        """Write the state, if the last one is old enough. Raises LlmqError if that cannot be done."""
        if self.path is None or time.monotonic() - self.written < EVERY:
            return
        told = json.dumps({"of": self.of, "left": state.left, "sums": state.sums})
        _, data = encode({str(i): slope for i, slope in enumerate(state.slopes)}, {_KEY: told})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            put(self.path, data, self.path.with_name(self.path.name + PARTIAL))
        except OSError as error:
            told = f"cannot write {self.path}: {error.strerror}; mend that and run the same command again"
            raise LlmqError(told) from error
        self.written = time.monotonic()

    def remove(self) -> None:
        """Delete what is on disk."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass
class _Chain:
    """Some windows on their way through the unquantized model. inputs: what enters each block, and, if it was run to
    the end, what the last one returns; batch by batch."""

    recording: Recording
    inputs: list[list[States]]

    def run(self, reader: BlockReader, block: BlockPlan) -> None:
        """Run a filled block."""
        entered = self.inputs[-1]
        calls = self.recording.of_block(block.index, entered)
        self.inputs.append(forward(block.module, [one.hidden for one in entered], calls, reader.device))

    def entering(self, block: int, batches: Sequence[int]) -> tuple[list[Tensor], list[Call]]:
        """A block's inputs and calls, for some of the batches."""
        entered = self.inputs[block]
        calls = self.recording.of_block(block, entered)
        return [entered[i].hidden for i in batches], [calls[i] for i in batches]


class _Backward:
    """One pass forwards and one backwards, for all groups of a task."""

    def __init__(self, task: Scoring, measure: Measure, kept: _Kept) -> None:
        self.task, self.plan, self.measure, self.kept = task, task.plan, measure, kept
        self.reader = BlockReader(task.plan, task.device)
        self.chains: list[_Chain] = []
        self.observed: tuple[_Chain, Sequence[int]] | None = None

    def run(self, first: int) -> Mapping[str, list[float]]:
        """The sums of measures, by group and candidate. first: no block before it has a group."""
        with _way_out():
            tail = find_tail(self.plan.model, [block.module for block in self.plan.blocks])
        blocks, state = self.plan.blocks, self.kept.load()
        self._record()
        self._forward(blocks[: len(blocks) if state is None else max(0, state.left - 1)])
        self.task.watch.stage("Gradients", len(blocks) - first + 1)
        if state is None:
            state = _State(len(blocks), self._slopes(tail), {})
            self.kept.save(state)
        for block in blocks[state.left :]:
            self.task.watch.step(f"{block.unit} was already done")
        self.task.watch.step("the model's end")
        for block in reversed(blocks[first : state.left]):
            state = self._backward(block, state)
            self.kept.save(state)
            self.task.watch.step(block.unit)
        self.kept.remove()
        return state.sums

    def _record(self) -> None:
        """Record the calls for the windows that are observed and those that gradients are taken on: one by one, and
        those that are both once, if all have the same length."""
        batches = self.task.batches
        ids, batch = torch.cat([*batches]), len(batches[0])
        text = pieces(ids)
        observed = batches[: max(1, len(batches) - self.task.judged)] if self.task.quantizer.quantize_needs else ()
        seen = sum(map(len, observed))
        if seen and text.shape[1] == ids.shape[1]:
            chain = self._chain(list(torch.split(ids, 1)))
            self.observed = chain, range(seen)
            self.scored = chain, range(len(ids) - 1, len(ids) - 1 - len(text), -1)
            return
        if seen:
            self.observed = self._chain(list(torch.split(ids[:seen], batch))), range(-(-seen // batch))
        self.scored = self._chain(list(torch.split(text, 1))), range(len(text))

    def _chain(self, batches: list[Tensor]) -> _Chain:
        recording = record_calls(self.reader, self.task.watch, batches)
        chain = _Chain(recording, [recording.states()])
        self.chains.append(chain)
        return chain

    def _forward(self, blocks: Sequence[BlockPlan]) -> None:
        """Run the unquantized model through some blocks, and keep what is between them."""
        self.task.watch.stage("Running the unquantized model", len(blocks))
        for block in blocks:
            self.reader.fill(block)
            for chain in self.chains:
                chain.run(self.reader, block)
            discard(block.module)
            self.task.watch.step(block.unit)

    def _slopes(self, tail: Tail) -> list[Tensor]:
        """The gradients with respect to the last block's output, for each sample, of the log-likelihood of labels."""
        chain, batches = self.scored
        ended = [chain.inputs[-1][i].hidden for i in batches]
        shape, found = (1, min(TOKENS, self.task.batches[0].shape[1])), []
        luck = chances(self.plan.recipe.seed, shape[1])
        with in_memory(self.reader, tail), _way_out():
            tail.settle(ended[0].to(self.task.device), shape)
            for i in range(SAMPLES):
                found.append(slope(tail, ended[i % len(ended)], luck[i : i + 1], self.task.device))
        return found

    def _backward(self, planned: BlockPlan, state: _State) -> _State:
        """Hand the gradients back through a block, and measure the changes of its weights with them."""
        groups = [group for group in self.task.groups if group.block == planned.index]
        weights = {w.view.name: w for group in groups for w in group.weights if w.view is not None}
        chain, batches = self.scored
        chosen = replace(planned, weights=weights)
        if self.observed is None or not weights:
            block = self.reader.open(chosen, [], [])
        else:
            seen, of = self.observed
            block = self.reader.open(chosen, *seen.entering(planned.index, of))
            block.observe(self.task.quantizer.quantize_needs)
        changes = {
            group.name: [self._change(block, group, i) for i in range(len(group.candidates))] for group in groups
        }
        block.forget()
        wide = torch.float64
        sums = {name: torch.zeros(len(c), dtype=wide, device=self.task.device) for name, c in changes.items()}
        names = dict.fromkeys(state.view.parameter for state in block.weights.values())
        parameters = [block.module.get_parameter(name) for name in names]
        for parameter in parameters:
            parameter.requires_grad_(True)
        hidden, calls = chain.entering(planned.index, batches)
        slopes = []
        for i, given in enumerate(state.slopes):
            entered, call = hidden[i % len(hidden)], calls[i % len(hidden)]
            slopes.append(self._through(block, call, entered, given))
            for group in groups:
                gradients = [_gradient(block, weight.view.name) for weight in group.weights if weight.view is not None]
                for c, change in enumerate(changes[group.name]):
                    if change is not None:
                        sums[group.name][c] += self.measure(gradients, change)
            for parameter in parameters:
                parameter.grad = None
        discard(block.module)
        for each in self.chains:
            # The blocks before need only what enters them.
            del each.inputs[planned.index :]
        give_back()
        return _State(planned.index, slopes, state.sums | {name: one.tolist() for name, one in sums.items()})

    def _change(self, block: Block, group: Group, candidate: int) -> list[Tensor] | None:
        """What a candidate's rounding changes of each weight [out, in], in the model's dtype; None for no rounding."""
        scheme = group.candidates[candidate]
        if scheme is None:
            return None
        found = []
        for weight in group.weights:
            assert weight.view is not None
            state = block.weights[weight.view.name]
            try:
                rounded = self.task.quantizer.quantize(state.value, scheme, state.statistics, self.task.scale_dtype)
            except LlmqError as problem:
                raise LlmqError(f"{weight.name}: {problem}") from problem
            found.append(rounded.dequantize(state.dtype) - state.value)
        return found

    def _through(self, block: Block, call: Call, hidden: Tensor, given: Tensor) -> Tensor:
        """The gradient with respect to a block's input, given that of its output; the parameters get theirs."""
        leaf = hidden.to(self.task.device).detach().requires_grad_(True)
        with torch.enable_grad(), of_length("a block", hidden.shape[-2]):
            output = call.run(block.module, leaf)
            torch.autograd.backward([output], [given.to(output)])
        assert leaf.grad is not None
        return leaf.grad.to(hidden)


def slope(tail: Tail, hidden: Tensor, chance: Tensor, device: torch.device) -> Tensor:
    """The gradient of Σ log p(label) with respect to the last block's output for one piece, in its dtype and where it
    is. hidden: that output; chance: what labels are drawn by, [1, tokens]. The tail is in memory."""
    leaf = hidden.to(device).detach().requires_grad_(True)
    with torch.enable_grad():
        for part in tail.pieces(hidden.shape):
            logits = tail.logits(leaf[:, part], None if tail.apart else chance.shape)
            labels = drawn(logits, chance[:, part])
            logarithms(logits).gather(-1, labels.unsqueeze(-1)).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad.to(hidden)


def _gradient(block: Block, name: str) -> Tensor:
    """The gradient of a weight [out, in], float32 or wider; zeros if the weight was not used."""
    state = block.weights[name]
    gradient = block.module.get_parameter(state.view.parameter).grad
    wide = torch.promote_types(state.dtype, torch.float32)
    return torch.zeros_like(state.value, dtype=wide) if gradient is None else state.view.of(gradient).to(wide)
