"""A decoder block while it is quantized, as methods see it: its weights, its inputs, its target and its error.

A block can compute its own error with all weights rounded, and undo a trial. It has no access to the model, to files or
to the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.block.attempt import Attempt
from llmq.block.loss import chunk_of, divergence, relative_loss
from llmq.block.loss import relative_error as relative_error
from llmq.block.passes import collected
from llmq.block.state import WeightState as WeightState
from llmq.block.state import rounded_inputs
from llmq.block.statistics import Inputs, Statistic
from llmq.discovery.addends import Seen
from llmq.discovery.calls import Call, of_length
from llmq.discovery.inputs import Takes
from llmq.discovery.pairs import LINEAR, NORM, Pair
from llmq.discovery.parameters import assign
from llmq.discovery.replay import Replay
from llmq.discovery.tail import Tail
from llmq.discovery.view import View, put
from llmq.grids.activations import stored_scale
from llmq.grids.base import Quantized, with_input_scale
from llmq.grids.histogram import Magnitudes, find_activation_scale
from llmq.grids.nearest import round_to_nearest
from llmq.machine import to_device
from llmq.spill import Saving, keep


@dataclass
class Trial:
    """A change of a block that is undone unless `keep` is called."""

    kept: bool = False

    def keep(self) -> None:
        """Keep the change."""
        self.kept = True


class Block:
    """A decoder block, its weights to quantize, and the calls of every calibration batch.

    inputs: hidden states per batch [batch, tokens, width], computed by the already quantized blocks from the
    calibration windows; target: the output that this block should have, per batch; unquantized: inputs and calls of the
    unquantized model, if a method needs them; shown: by batch and weight, what the unquantized block shows on them, if
    it is kept (`block.chains`); partial: whether other values stand in for some that it computes; pairs: the block's
    scale pairs; scale_dtype: the stored dtype of scales; log: the methods' attempts, for the report; tail: of
    the last block, what the model does with its output, if the block may be judged by the logits.
    """

    in_passes = True
    """Whether the statistics of its weights can be collected for some of them after the other."""

    def __init__(
        self,
        module: nn.Module,
        states: Sequence[WeightState],
        inputs: list[Tensor],
        calls: list[Call],
        *,
        pairs: Sequence[Pair] = (),
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        unquantized: tuple[list[Tensor], list[Call]] | None = None,
        partial: bool = False,
    ) -> None:
        self.module, self.inputs, self.calls, self.pairs = module, inputs, calls, list(pairs)
        self.unquantized, self.partial = unquantized, partial
        self.shown: list[dict[str, Seen]] | None = None
        self.replays: list[Replay] | None = None
        self.weights = {state.parameter: state for state in states}
        self.scale_dtype, self.device = scale_dtype, device or torch.device("cpu")
        self.target: list[Tensor] = []
        self.changed: set[str] = set()
        self.log: list[Attempt] = []
        self.tail: Tail | None = None
        self.by_logits = False
        self._error: float | None = None
        self._overwritten: list[dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor]]] = []

    def output(self, index: int) -> Tensor:
        """The block's current output for batch `index`, on the block's device."""
        with torch.no_grad(), of_length("a block", self.inputs[index].shape[-2]):
            return self.calls[index].run(self.module, to_device(self.inputs[index], self.device))

    def outputs(self) -> list[Tensor]:
        """The block's current output for every batch, on the CPU, in the model's dtype."""
        return [self._output(i) for i in range(len(self.inputs))]

    def _output(self, index: int) -> Tensor:
        return keep(self.output(index).to(self.inputs[index]), Saving.STATES)

    def observe(self, needs: Iterable[type[Statistic]]) -> list[Tensor]:
        """One pass of the current block: returns its outputs, and replaces the statistics of every distinct input."""
        return self.observe_inputs(needs, self.weights.values())

    def observe_inputs(self, needs: Iterable[type[Statistic]], states: Iterable[WeightState]) -> list[Tensor]:
        """The same for the inputs of some weights."""
        held: dict[int, dict[type[Statistic], Statistic]] = {}
        fed: dict[View, list[Statistic]] = {}
        for state in states:
            if state.input_id not in held:
                held[state.input_id] = {need: need(state.value.shape[1], self.device) for need in needs}
                fed[state.view] = list(held[state.input_id].values())
            state.statistics = held[state.input_id]
        return collected(self.module, self._output, len(self.inputs), fed, self.feeding, self.device)

    def feeding(self, statistic: Statistic) -> Takes:
        """What the inputs of a weight are passed to, for a statistic of them."""
        return statistic

    def weigh(self) -> None:
        """Set each weight's importance from its statistics, if they include it."""
        for state in self.weights.values():
            if Inputs in state.statistics:
                state.importance, state.rounded, self._error = state.statistics[Inputs].mean_square, None, None

    def forget(self) -> None:
        """Free all statistics."""
        for state in self.weights.values():
            state.statistics = {}

    @contextmanager
    def rounding(self, *, straight_through: bool = False) -> Iterator[None]:
        """Within the context, every weight is rounded (as quantized, else to nearest) and inputs are rounded as schemes
        say.

        straight_through: gradients ignore the rounding of inputs.
        """
        before = {(n := w.view.parameter): self.module.get_parameter(n).data for w in self.weights.values()}
        try:
            put(self.module, ((state.view, self._rounded(state)) for state in self.weights.values()))
            with rounded_inputs(self.module, self.weights.values(), straight_through=straight_through):
                yield
        finally:
            for name, value in before.items():
                assign(self.module, name, value)

    def round_in_place(self) -> None:
        """Replace all of the block's weights by their results, which must all exist. What they were is let go."""
        put(self.module, ((state.view, _settled(state)) for state in self.weights.values()))

    def _rounded(self, state: WeightState) -> Tensor:
        if state.quantized is not None:
            return state.result()
        if state.rounded is None:
            nearest = round_to_nearest(state.value, state.scheme, self.scale_dtype, importance=state.importance)
            state.rounded = nearest.dequantize(state.dtype)
        return state.rounded

    def error(self) -> float:
        """‖output − target‖ / ‖target‖ over all batches, with everything rounded; cached until the block changes.

        Within `judging_logits`, the mean of `loss` over all batches instead.
        """
        if self._error is None:
            self.calibrate_inputs()
            batches = range(len(self.inputs))
            with self.rounding():
                if self.by_logits:
                    with torch.no_grad():
                        losses = ranks.gather(float(self.loss(i, self.output(i))) for i in batches)
                    self._error = sum(losses) / len(losses)
                else:
                    self._error = relative_error(map(self.output, batches), self.target, batches=True)
        return self._error

    def loss(self, index: int, output: Tensor) -> Tensor:
        """How far an output of batch `index` [batch, tokens, width] is from the target, float32: what a method lowers.

        The mean over tokens of the squared error, relative to the target's mean square; within `judging_logits`, that
        of KL(logits of the target ‖ logits of the output), in nats. Gradients reach `output`.
        """
        target = self.target[index].to(self.device, torch.float32)
        if self.by_logits:
            assert self.tail is not None
            return divergence(self.tail.logits, output.to(torch.float32), target, chunk_of(self.tail.rows))
        return relative_loss(output, target)

    @contextmanager
    def judging_logits(self, wanted: bool) -> Iterator[None]:
        """Within the context, `loss` and `error` are of the model's logits, if wanted and if this is the last block."""
        self.by_logits = wanted and self.tail is not None
        self._error = None if self.by_logits else self._error
        try:
            yield
        finally:
            if self.by_logits:
                # Of a block that may have changed, the error of its output is not known.
                self._error = None
            self.by_logits = False

    def calibrate_inputs(self) -> None:
        """Find the missing static scales of inputs, with one pass of the block."""
        missing: dict[int, tuple[Magnitudes, View, list[tuple[WeightState, str]]]] = {}
        for state in self.weights.values():
            kind = state.scheme.activations
            if kind is not None and not kind.dynamic and state.input_scale is None:
                histogram = Magnitudes(state.value.shape[1], self.device)
                missing.setdefault(state.input_id, (histogram, state.view, []))[2].append((state, kind.range))
        if not missing:
            return
        histograms = {view: [histogram] for histogram, view, _ in missing.values()}
        collected(self.module, self._output, len(self.inputs), histograms, None, self.device)
        for histogram, _, fed in missing.values():
            for state, method in fed:
                found = find_activation_scale(histogram, method, state.scheme.grid)
                state.input_scale = stored_scale(found, state.scheme).to(self.device)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Try a change: afterwards weights, other parameters and results are restored, unless the trial is kept."""
        parameters = dict(self.module.named_parameters())
        states = {name: replace(state) for name, state in self.weights.items()}
        changed, error, trial = set(self.changed), self._error, Trial()
        self._overwritten.append({})
        try:
            yield trial
        finally:
            overwritten = self._overwritten.pop()
            if not trial.kept:
                for part, value in overwritten.values():
                    part.copy_(value)
                for name, parameter in parameters.items():
                    assign(self.module, name, parameter.data)
                for name, state in states.items():
                    vars(self.weights[name]).update(vars(state))
                self.changed, self._error, self.shown, self.replays = changed, error, None, None

    def set(self, name: str, value: Tensor) -> None:
        """Give a weight (by its `View.name`, [out, in]) or another parameter (as stored) a value of the same shape.

        Weights to be quantized keep the value in float32, without rounding it to the model's dtype.
        """
        state, self.shown, self.replays = self.weights.get(name), None, None
        if state is not None:
            self._write(state.view, value)
            _revalue(state, value)
        else:
            self._write(View(name), value)
            for part in self._within(name):
                _revalue(part, part.view.of(value))
            if not self._is_quantized(name):
                self.changed.add(name)
        self._error = None

    def _write(self, view: View, value: Tensor) -> None:
        """Change a value in the module; every open trial saves values overwritten in a parameter's memory."""
        if not view.whole:
            part = view.get(self.module)
            for kept in self._overwritten:
                kept.setdefault((part.data_ptr(), part.shape, part.stride()), (part, part.clone()))
        view.set(self.module, value.to(self.module.get_parameter(view.parameter).dtype))

    def _within(self, parameter: str) -> list[WeightState]:
        """The weights that are views of a parameter."""
        return [state for state in self.weights.values() if state.view.parameter == parameter]

    def _is_quantized(self, parameter: str) -> bool:
        """Whether a whole parameter will be quantized, so that its values are kept in float32."""
        size = self.module.get_parameter(parameter).numel()
        return sum(state.value.numel() for state in self._within(parameter)) == size

    def set_input_scale(self, parameter: str, scale: Tensor) -> None:
        """Set the static scale of a weight's input, float32 [1]."""
        state = self.weights[parameter]
        state.input_scale, self._error = stored_scale(scale, state.scheme), None

    def set_quantized(self, parameter: str, quantized: Quantized) -> None:
        """Set a weight's result."""
        state = self.weights[parameter]
        state.quantized = with_input_scale(quantized, state.input_scale)
        self._error = None

    def get(self, name: str) -> Tensor:
        """A weight (by its `View.name`, [out, in]) or parameter (as stored), float32; unrounded if it is quantized."""
        state = self.weights.get(name)
        if state is not None:
            return state.value.to(torch.float32)
        stored, parts = self.module.get_parameter(name).data, self._within(name)
        value = stored.to(torch.float32, copy=bool(parts))
        for part in parts:
            part.view.of(value).copy_(part.value)
        return value

    def scale(self, pair: Pair, scale: Tensor, shift: Tensor | None = None) -> None:
        """Move a positive factor per channel from a pair's source to its consumers: x → (x − shift) / scale.

        scale, shift: float32 [channels]; a shift needs a pair that is `shiftable`. The source's stored dtype rounds the
        factor; the consumers are multiplied by the factor that was actually stored. If a consumer is not quantized,
        factors are powers of two, which are stored without loss.
        """
        matrices = [consumer.parameter for consumer in pair.consumers] + ([pair.source] if pair.kind == LINEAR else [])
        exact = not all(map(self._is_quantized, matrices))
        if exact:
            scale = torch.exp2(torch.log2(scale).round())
        if shift is not None:
            moved = pair.shifts(
                shift, {consumer.parameter: self.get(consumer.parameter) for consumer in pair.consumers}
            )
            for name, change in moved.items():
                self.set(name, self.get(name) + change.to(self.device))
        if pair.kind == NORM:
            stored = self._storable(pair, scale)
            # A norm that multiplies by 1 + w rounds even powers of two: if no loss is allowed, such channels are not
            # changed.
            scale = torch.where(stored == scale.to(stored.device), stored, 1.0) if exact else stored
        for name, edit in pair.edits(scale).items():
            self.set(name, edit.of(self.get(name)))
        for consumer in pair.consumers:
            for state in self._within(consumer.parameter):
                state.input_scale = None
                if state.importance is not None:
                    state.importance = state.importance / scale.to(self.device)[consumer.channel.to(self.device)] ** 2

    def _storable(self, pair: Pair, scale: Tensor) -> Tensor:
        """The factors that a norm's weight is actually divided by after the quotient is rounded to its stored dtype."""
        source = self.get(pair.source)
        entries = slice(None) if pair.rows is None else pair.rows.to(source.device)
        whole = source[entries] + pair.offset
        scale = torch.where(whole == 0, 1.0, scale.to(source.device))
        dtype = self.module.get_parameter(pair.source).dtype
        stored = (whole / scale - pair.offset).to(dtype).to(torch.float32) + pair.offset
        return torch.where((whole == 0) | (stored == 0), 1.0, whole / stored)


def _revalue(state: WeightState, value: Tensor) -> None:
    state.value, state.rounded, state.quantized = value, None, None


def _settled(state: WeightState) -> Tensor:
    """The result of a weight, which takes the place of its value."""
    result = state.result()
    state.error = relative_error([result], [state.value]) if ranks.rank() == 0 else None
    state.value = result
    return result
