"""Finds scale pairs in a decoder block by running it, never by name, and proves each by running it again.

Every channel of a source (a norm's weight, a matrix's output rows) gets a different factor; the factor by which each
input column of a later product was multiplied tells which channel feeds that column (bench.py). The pair is kept only
if random factors at the source, moderate and large ones, and their inverses at every consumer leave the block's output
unchanged. Fused projections: in causal attention the first token's output is its value vector alone, so the rows of the
values are found on that token; gated products are found by scaling one part of the rows at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.bench import SAME, Bench, Run, Unsteady, followed, run_to_fill, unchanged
from llmq.discovery.blocks import Structure, recorded, structure_key
from llmq.discovery.calls import Call
from llmq.discovery.experts import ALONE, ROWS, Expert, ExpertsInfo, instead
from llmq.discovery.pairs import LINEAR, NORM, Consumer, Edit, Found, Pair, Rejection
from llmq.discovery.pairs import explain as explain
from llmq.discovery.parameters import randomize
from llmq.errors import LlmqError, first_line

PARTS = 4  # a fused projection is cut into at most this many parts
LARGE = 10  # the last check enlarges a source by up to this power of two
ELSEWHERE = "scaling it changes which experts the block selects"


class _Refused(Exception):
    """Why a source makes no pair."""


def find_pairs(block: nn.Module, call: Call, hidden: Tensor, shared: Iterable[str] = (), seed: int = 0) -> Found:
    """The scale pairs of a block with float32 parameters in memory, preferably random ones (parameters.randomize).

    call: the block's recorded call; hidden: its hidden states [batch, tokens, width], of which only the shape is used.
    shared: parameters that other blocks use too; they are not changed. Cost: three or four runs per source that makes a
    pair, one to four for others, about ten for a fused projection; a run has 32 tokens, or four times those of
    `hidden`. Memory: the block and a copy of one pair's parameters.
    """
    with torch.inference_mode():
        try:
            search = _Search(Bench(block, call, hidden, seed), set(shared))
        except Unsteady as error:
            return Found([], [Rejection(name, str(error)) for name, p in block.named_parameters() if p.dim() == 2])
        return search.all()


class _Search:
    def __init__(self, bench: Bench, shared: set[str]) -> None:
        self.bench, self.block, self.shared = bench, bench.block, shared
        self.shapes = {name: tuple(p.shape) for name, p in self.block.named_parameters()}
        self.axes: dict[str, int] = {}
        for use in bench.base.uses:
            if use.axis is not None and len(self.shapes[use.parameter]) == 2:
                self.axes.setdefault(use.parameter, use.axis)
        # With routed experts, some consumers of a source may not have been called.
        whole = {use.parameter for use in bench.base.uses if use.whole}
        # Those without memory are not run with the block at all (`_alone`).
        there = {name for name, p in self.block.named_parameters() if not p.is_meta}
        self.unseen = any(len(shape) >= 2 and name in there - whole for name, shape in self.shapes.items())

    def all(self) -> Found:
        pairs: list[Pair] = []
        rejections: list[Rejection] = []
        found = Found(pairs, rejections)
        for names in self._vectors():
            self._try(found, names[0], partial(self._norm, names))
        for name in self.axes:
            self._try(found, name, partial(self._linear, name))
        order = {name: i for i, name in enumerate(self.shapes)}
        pairs.sort(key=lambda pair: order[pair.source])
        rejections.sort(key=lambda rejection: order[rejection.source])
        return found

    def _vectors(self) -> Iterator[list[str]]:
        """The vectors of modules without any other parameters, grouped by module and size."""
        for name, module in self.block.named_modules():
            own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
            own = {key: p for key, p in own.items() if key in self.shapes}
            if any(p.dim() >= 2 for p in own.values()):
                continue
            sizes: dict[int, list[str]] = {}
            for key, parameter in own.items():
                if parameter.dim() == 1 and parameter.numel() > 1:
                    sizes.setdefault(parameter.numel(), []).append(key)
            yield from sizes.values()

    def _try(self, found: Found, source: str, pair: Callable[[], Pair]) -> None:
        self.partly, self.elsewhere = "", False
        try:
            if source in self.shared:
                raise _Refused("it is shared with another block")
            found.pairs.append(pair())
        except (_Refused, Unsteady) as error:
            found.rejections.append(Rejection(source, str(error)))

    def _norm(self, names: list[str]) -> Pair:
        """The pair of a module's vectors: a weight and perhaps a bias, or one of them alone."""
        size = self.shapes[names[0]][0]
        factors = self.bench.distinct(size)
        tries = [(names, "")] + [(names, one) for one in names]
        if len(names) > 1:
            tries += [([one], other) for one in names for other in ("", one)]
        first = None
        for chosen, shifted in tries:
            edits = {name: Edit(0, factors, float(name == shifted)) for name in chosen}
            run = self._run(edits)
            first = first or run
            consumers = self._consumers(run, factors)
            if consumers:
                break
            if not self._moves(first):
                raise _Refused(self._why(first, factors))
        else:
            assert first is not None
            raise _Refused(self._why(first, factors))
        weights = [shifted] if shifted else [n for n in chosen if len(chosen) == 1 or self._carries(n, consumers)]
        others = [n for n in chosen if n not in weights]
        if len(weights) != 1 or len(others) > 1:
            raise _Refused("its vectors are not one weight and one bias")
        bias = others[0] if others else None
        pair = Pair(NORM, weights[0], bias, 0, float(bool(shifted)), None, size, consumers, size)
        return self._proven(self._trimmed(pair), run)

    def _linear(self, name: str) -> Pair:
        """The pair of a matrix's output rows, or of only those rows that feed another matrix."""
        axis = 1 - self.axes[name]
        size = self.shapes[name][axis]
        bias = self._beside(name, size)

        def scaled(rows: Tensor) -> tuple[Run, Tensor]:
            factors = self.bench.distinct(len(rows))
            spread = torch.ones(size).index_copy(0, rows, factors)
            edits = {name: Edit(axis, spread)} | ({bias: Edit(0, spread)} if bias else {})
            factors = (9.0 + torch.arange(size)).index_copy(0, rows, factors)  # no column is multiplied by 9 or more
            return self._run(edits), factors

        whole, factors = scaled(torch.arange(size))
        run, consumers = whole, self._consumers(whole, factors)
        if not consumers and self._moves(whole):
            values = self._consumers(whole, factors, first=True)
            for rows in [_channels(values)] if values else self._parts(name, whole, size):
                run, part = scaled(rows)
                consumers = self._consumers(run, part)
                if consumers:
                    break
        if not consumers:
            raise _Refused(self._why(whole, factors, name))
        return self._proven(self._trimmed(Pair(LINEAR, name, bias, axis, 0.0, None, size, consumers, size)), run)

    def _run(self, edits: dict[str, Edit]) -> Run:
        run = self.bench.run({name: edit.of(self.block.get_parameter(name)) for name, edit in edits.items()})
        base, own = self.bench.base.path(), run.path()
        if own == base:
            return run
        # Other experts were selected: only the products before them can be compared.
        self.elsewhere = True
        same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(own, base, strict=False)))
        return replace(run, uses=run.uses[:same])

    def _moved(self, run: Run) -> list[int]:
        """Products whose input has changed."""
        pairs = enumerate(zip(run.uses, self.bench.base.uses, strict=False))
        return [i for i, (new, old) in pairs if (new.input - old.input).norm() > SAME * old.input.norm()]

    def _moves(self, run: Run) -> bool:
        return bool(self._moved(run))

    def _parts(self, name: str, run: Run, size: int) -> Iterator[Tensor]:
        """Candidate rows of one projection of a fused matrix: contiguous rows, or every second, third …"""
        widths = {run.uses[i].input.shape[1] for i in self._moved(run)}
        for parts in range(2, PARTS + 1):
            if size % parts == 0 and size // parts in widths:
                width = size // parts
                yield from (torch.arange(size)[i * width : (i + 1) * width] for i in reversed(range(parts)))
                yield from (torch.arange(size)[i::parts] for i in range(parts))

    def _consumers(self, run: Run, factors: Tensor, first: bool = False) -> tuple[Consumer, ...]:
        """The matrices whose input columns all follow a factor; `first`: judged on each sequence's first token only."""
        channels: dict[str, list[Tensor]] = {}
        uses: dict[str, list[Any]] = {}
        for new, old in zip(run.uses, self.bench.base.uses, strict=False):
            rows = slice(None, None, self.bench.tokens if first else None)
            channels.setdefault(new.parameter, []).append(followed(old.input[rows], new.input[rows], factors))
            uses.setdefault(new.parameter, []).append(old)
        consumers = []
        for name, maps in channels.items():
            if not any(bool((m >= 0).all()) for m in maps):
                if any(bool((m >= 0).any()) for m in maps) and not first:
                    self.partly = f"it feeds only some of the input columns of {name}"
                continue
            if not first:
                self._check(name, uses[name], maps)
            width = self.shapes[name][1 - self.axes[name]] if name in self.axes else 0
            consumers.append(Consumer(name, self.axes.get(name, 1), maps[0], self._beside(name, width)))
        return tuple(consumers)

    def _check(self, name: str, uses: list[Any], maps: list[Tensor]) -> None:
        if name in self.shared:
            raise _Refused(f"it feeds {name}, which is shared with another block")
        if name not in self.axes or not all(use.whole for use in uses):
            raise _Refused(f"it feeds {name}, which is not used as one matrix")
        if self.unseen and any(use.chosen for use in uses):
            raise _Refused(f"it feeds {name} and other experts that the block selects from")
        if not all(torch.equal(m, maps[0]) for m in maps) or any(use.axis != self.axes[name] for use in uses):
            raise _Refused(f"it feeds {name}, which is used in more than one way")

    def _beside(self, name: str, size: int) -> str | None:
        """The bias of a matrix: the only vector of this size in its module, if there is exactly one."""
        prefix = name.rpartition(".")[0]
        beside = [n for n, shape in self.shapes.items() if n.rpartition(".")[0] == prefix and shape == (size,)]
        return beside[0] if len(beside) == 1 else None

    def _carries(self, name: str, consumers: tuple[Consumer, ...]) -> bool:
        """Whether zeroing a vector stops the hidden states from reaching the consumers: then it is a weight."""
        run = self.bench.run({name: torch.zeros_like(self.block.get_parameter(name))})
        for use in (use for use in run.uses if use.parameter in {consumer.parameter for consumer in consumers}):
            if use.input.shape[0] % self.bench.tokens:
                return False
            sequences = use.input.reshape(-1, self.bench.tokens, use.input.shape[-1])
            if (sequences - sequences[:1]).norm() > SAME * (1e-3 + sequences.norm()):
                return False
        return True

    def _trimmed(self, pair: Pair) -> Pair:
        """The pair with channels only for those entries that feed a consumer."""
        rows = _channels(pair.consumers)
        if len(rows) == pair.entries:
            return pair
        index = torch.full((pair.entries,), -1).index_copy(0, rows, torch.arange(len(rows)))
        consumers = tuple(replace(consumer, channel=index[consumer.channel]) for consumer in pair.consumers)
        return replace(pair, rows=rows, consumers=consumers, channels=len(rows))

    def _proven(self, pair: Pair, run: Run) -> Pair:
        """The pair, if scaling both ends leaves the block's output unchanged; `run`: with only the source scaled."""
        if {pair.source, pair.bias} & self.shared:
            raise _Refused("it is shared with another block")
        effect = run.difference(self.bench.base)
        if effect < SAME:
            raise _Refused("scaling it changes nothing")
        edits = pair.edits(self.bench.random(pair.channels))
        error = self._run(edits).difference(self.bench.base)
        if not error <= min(SAME, effect / 100):
            raise _Refused(ELSEWHERE if self.elsewhere else "its output is also used outside matrix products")
        # A clamp between source and consumer is reached only by values larger than random weights give.
        large = self.bench.random(pair.channels).sub(1.5).mul(LARGE).exp2()
        if not self._run(pair.edits(large)).difference(self.bench.base) <= SAME:
            raise _Refused("large values of its output are clamped before the next product")
        if pair.bias is None or any(consumer.bias is None for consumer in pair.consumers):
            return pair
        able = replace(pair, shiftable=True)
        weights = {consumer.parameter: self.block.get_parameter(consumer.parameter) for consumer in pair.consumers}
        shifts = able.shifts(self.bench.random(pair.channels), weights)
        shifted = self.bench.run({name: self.block.get_parameter(name) + extra for name, extra in shifts.items()})
        return able if shifted.difference(self.bench.base) <= SAME else pair

    def _why(self, run: Run, factors: Tensor, matrix: str | None = None) -> str:
        """Why a source has no consumers; `run`: with all its channels scaled by `factors`."""
        partly = self.partly
        if run.difference(self.bench.base) < SAME:
            return "scaling it changes nothing"
        if self.elsewhere:
            return ELSEWHERE
        if not self._moves(run):
            return "no matrix product of the block comes after it"
        if self._consumers(run, factors.square()):
            return "the input that it feeds scales with the square of a factor on it"
        if partly:
            return partly
        if matrix is not None:
            whole = self.block.get_parameter(matrix) * 1.5
            bias = self._beside(matrix, self.shapes[matrix][1 - self.axes[matrix]])
            biases = {bias: self.block.get_parameter(bias) * 1.5} if bias else {}
            if self.bench.run({matrix: whole} | biases).difference(self.bench.base) < SAME:
                return "its output is normalized: a common factor on it changes nothing"
        return "no matrix product has an input that scales with it channel by channel"


def _channels(consumers: Iterable[Consumer]) -> Tensor:
    """The channels that occur in the consumers' maps, in order."""
    return torch.unique(torch.cat([consumer.channel for consumer in consumers]))  # type: ignore[no-any-return]


def find_all(
    model: nn.Module, names: list[str], calls: list[Call], hidden: Tensor, experts: Sequence[ExpertsInfo | None] = ()
) -> dict[str, Found]:
    """The pairs of every block of these names, by its name; identical blocks are run once.

    experts: of each block, if any; they are not run with it, and none is in memory but one, for pairs within an expert.
    calls: one per block, as recorded; hidden: the first block's input. Blocks get random parameters one at a time;
    their own parameters and the calls' contents are restored. Raises LlmqError if a block cannot be run.
    """
    blocks = [model.get_submodule(name) for name in names]
    owners = Counter(id(p) for block in blocks for p in block.parameters())
    attributes = _attributes(blocks)
    known: dict[Any, Found] = {}
    result: dict[str, Found] = {}
    with unchanged(calls):
        for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            shared = {n for n, p in block.named_parameters() if owners[id(p)] > 1}
            make = (structure_key(block, call, shared), attributes[i])
            if make not in known:
                with _alone(block, experts[i] if experts else None) as expert:
                    try:
                        known[make] = find_pairs(block, call, hidden, shared)
                        if expert is not None:
                            found = find_pairs(expert, ALONE, torch.empty(ROWS, expert.width))
                            known[make] = known[make]._replace(experts=(found.pairs, found.rejections))
                        run_to_fill(block, call, hidden)
                    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
                        words = f"{names[i]} cannot be run alone to find pairs: {first_line(error)}"
                        raise LlmqError(words) from error
            result[names[i]] = known[make]
    return result


@contextmanager
def _alone(block: nn.Module, experts: ExpertsInfo | None) -> Iterator[Expert | None]:
    """Within the context, a block has random parameters; gives a random expert, or None.

    The experts return the sine of their input: no scale moves through them, nor past them to what follows.
    """
    if experts is None:
        with randomize(block):
            yield None
        return
    stacked = {f"{experts.module}.{name}" for name in experts.parameters}
    module = block.get_submodule(experts.module)
    entries = {n: torch.empty(module.get_parameter(n).shape[1:], device="meta") for n in experts.parameters}
    expert = Expert(module, experts.call, entries)
    with randomize(block, but=stacked), randomize(expert), instead(block, experts, lambda routed: routed.rows.sin()):
        yield expert


def find_in(model: nn.Module, structure: Structure) -> dict[str, Found]:
    """The pairs of every block of a model on the meta device (discover.build)."""
    names = [block.name for block in structure.blocks]
    experts = [block.experts for block in structure.blocks]
    with recorded(model, [model.get_submodule(name) for name in names]) as (recording, _):
        return find_all(model, names, recording.sampled(), recording.hidden[0], experts)


def _attributes(blocks: list[nn.Module]) -> list[tuple[Any, ...]]:
    """Plain attributes of each block's modules, ignoring the layer index."""
    plain = (bool, int, float, str)
    values = [
        {
            (name, key): value
            for name, module in block.named_modules()
            for key, value in {"": type(module).__name__, **vars(module)}.items()
            if isinstance(value, plain)
        }
        for block in blocks
    ]
    places = {key for own in values for key in own} - {
        key for i, own in enumerate(values) for key, value in own.items() if isinstance(value, bool) or value != i
    }
    return [tuple(item for item in own.items() if item[0] not in places) for own in values]
