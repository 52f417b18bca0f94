"""A decoder block while it is quantized: its weights, its inputs, and how far it is from what it should give. Methods
see this.

A block can tell its own error with all its weights rounded, and undo what was tried on it. It knows no model, no file
and no plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.block.attempt import Attempt
from llmq.block.statistics import Inputs, Statistic
from llmq.discovery.calls import Call
from llmq.discovery.matmuls import collect
from llmq.discovery.pairs import LINEAR, NORM, Pair
from llmq.discovery.parameters import assign
from llmq.grids.activations import round_per_token, round_static
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.histogram import Magnitudes, find_activation_scale
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

CHUNK = 1 << 21


@dataclass
class WeightState:
    """One weight while it is quantized.

    value: what is to be rounded, [out, in], in the model's dtype or, once a transform changed it, float32; parameter:
    its name within the block; input_id: the same for all weights that are fed by the same tensor; statistics: of that
    input, while they are held; quantized: the result, once there is one; input_scale: float32 [1] where activations are
    static; importance: E[x²] of its input channels as far as it is known, float32 [in]; rounded: the weight to nearest.
    """

    name: str
    parameter: str
    module: nn.Linear
    scheme: Scheme
    value: Tensor
    input_id: int
    statistics: dict[type[Any], Any] = field(default_factory=dict)
    quantized: Quantized | None = None
    input_scale: Tensor | None = None
    rounded: Tensor | None = None
    importance: Tensor | None = None
    seconds: float = 0.0


@dataclass
class Trial:
    """Something tried on a block; it is undone unless `keep` is called."""

    kept: bool = False

    def keep(self) -> None:
        """Let it stand."""
        self.kept = True


class Block:
    """A decoder block, its weights to quantize, and the calls of every calibration batch.

    inputs: hidden states per batch [batch, tokens, width], what the quantized model so far makes of the calibration
    windows; target: what this block should make of them, per batch; pairs: where scales can move. scale_dtype: what
    scales are stored in. log: a line for each thing a method tried, for the report.
    """

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
    ) -> None:
        self.module, self.inputs, self.calls, self.pairs = module, inputs, calls, list(pairs)
        self.weights = {state.parameter: state for state in states}
        self.scale_dtype = scale_dtype
        self.device = device or torch.device("cpu")
        self.target: list[Tensor] = []
        self.changed: set[str] = set()
        self.log: list[Attempt] = []
        self._error: float | None = None

    def output(self, index: int) -> Tensor:
        """What the block, as it is now, makes of batch `index`, on the block's device."""
        with torch.no_grad():
            return self.calls[index].run(self.module, self.inputs[index].to(self.device))

    def outputs(self) -> list[Tensor]:
        """What the block, as it is now, makes of every batch; on the host, in the model's dtype."""
        return [self.output(i).to(h) for i, h in enumerate(self.inputs)]

    def observe(self, needs: Iterable[type[Statistic]]) -> list[Tensor]:
        """One pass of the block as it is: its outputs, and the statistics of every distinct input anew."""
        held: dict[int, dict[type[Statistic], Statistic]] = {}
        fed: dict[nn.Module, list[Statistic]] = {}
        for state in self.weights.values():
            if state.input_id not in held:
                held[state.input_id] = {need: need(state.value.shape[1], self.device) for need in needs}
                fed[state.module] = list(held[state.input_id].values())
            state.statistics = held[state.input_id]
        with collect(fed):
            return self.outputs()

    def weigh(self) -> None:
        """Take each input channel's importance from the statistics, where they have it."""
        for state in self.weights.values():
            if Inputs in state.statistics:
                state.importance, state.rounded, self._error = state.statistics[Inputs].mean_square, None, None

    def forget(self) -> None:
        """Let go of all statistics."""
        for state in self.weights.values():
            state.statistics = {}

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """The block with every weight rounded (as quantized, else to nearest) and inputs rounded as schemes say."""
        before = {}
        for name, state in self.weights.items():
            before[name] = state.module.weight.data
            assign(self.module, name, self._rounded(state).to(before[name].dtype))
        try:
            with rounded_inputs(self.weights.values()):
                yield
        finally:
            for name, value in before.items():
                assign(self.module, name, value)

    def _rounded(self, state: WeightState) -> Tensor:
        if state.quantized is not None:
            return state.quantized.dequantize(state.module.weight.dtype)
        if state.rounded is None:
            nearest = round_to_nearest(state.value, state.scheme, self.scale_dtype, importance=state.importance)
            state.rounded = nearest.dequantize(state.module.weight.dtype)
        return state.rounded

    def error(self) -> float:
        """‖output − target‖ / ‖target‖ over all batches, everything rounded; known until something changes."""
        if self._error is None:
            self.calibrate_inputs()
            with self.rounding():
                self._error = relative_error(map(self.output, range(len(self.inputs))), self.target)
        return self._error

    def calibrate_inputs(self) -> None:
        """Find the static scale of every input that is to have one and has none yet; one pass of the block."""
        missing: dict[int, tuple[Magnitudes, nn.Module, list[tuple[WeightState, str]]]] = {}
        for state in self.weights.values():
            kind = state.scheme.activations
            if kind is not None and not kind.dynamic and state.input_scale is None:
                missing.setdefault(state.input_id, (Magnitudes(state.value.shape[1], self.device), state.module, []))[
                    2
                ].append((state, kind.range))
        if not missing:
            return
        with collect({module: [histogram] for histogram, module, _ in missing.values()}):
            self.outputs()
        for histogram, _, fed in missing.values():
            for state, method in fed:
                state.input_scale = find_activation_scale(histogram, method, state.scheme.grid).to(self.device)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Try something: weights, other parameters and results are as before afterwards, unless it is kept."""
        parameters = dict(self.module.named_parameters())
        states = {name: replace(state) for name, state in self.weights.items()}
        changed, error, trial = set(self.changed), self._error, Trial()
        try:
            yield trial
        finally:
            if not trial.kept:
                for name, parameter in parameters.items():
                    assign(self.module, name, parameter.data)
                for name, state in states.items():
                    vars(self.weights[name]).update(vars(state))
                self.changed, self._error = changed, error

    def set(self, parameter: str, value: Tensor) -> None:
        """Give a parameter of the block another value [same shape]: float32 for a weight that is to be quantized."""
        dtype = self.module.get_parameter(parameter).dtype
        assign(self.module, parameter, value.to(dtype))
        if parameter in self.weights:
            state = self.weights[parameter]
            state.value, state.rounded, state.quantized = value, None, None
        else:
            self.changed.add(parameter)
        self._error = None

    def set_input_scale(self, parameter: str, scale: Tensor) -> None:
        """Give a weight the static scale of its input, float32 [1]."""
        self.weights[parameter].input_scale = scale
        self._error = None

    def set_quantized(self, parameter: str, quantized: Quantized) -> None:
        """Give a weight its result."""
        state = self.weights[parameter]
        state.quantized = with_input_scale(quantized, state.input_scale)
        self._error = None

    def get(self, parameter: str) -> Tensor:
        """A parameter in float32, as exactly as it is known."""
        state = self.weights.get(parameter)
        return (self.module.get_parameter(parameter).data if state is None else state.value).to(torch.float32)

    def scale(self, pair: Pair, scale: Tensor, shift: Tensor | None = None) -> None:
        """Move a positive factor per channel from a pair's source to what it feeds: x → (x − shift) / scale.

        scale, shift: float32 [channels]; a shift needs a pair that is `shiftable`. What the source is stored in rounds
        the factor, and the consumers are multiplied by the factor that was actually stored. Where a consumer is not
        quantized, factors are powers of two, which lose nothing in storage.
        """
        matrices = [consumer.parameter for consumer in pair.consumers] + ([pair.source] if pair.kind == LINEAR else [])
        exact = not all(name in self.weights for name in matrices)
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
            # A norm that multiplies by 1 + w rounds even powers of two: such channels stay where nothing may be lost.
            scale = torch.where(stored == scale.to(stored.device), stored, 1.0) if exact else stored
        for name, edit in pair.edits(scale).items():
            self.set(name, edit.of(self.get(name)))
        for consumer in pair.consumers:
            if consumer.parameter in self.weights:
                state = self.weights[consumer.parameter]
                state.input_scale = None
                if state.importance is not None:
                    state.importance = state.importance / scale.to(self.device)[consumer.channel.to(self.device)] ** 2

    def _storable(self, pair: Pair, scale: Tensor) -> Tensor:
        """The factors that a norm's weight is really divided by, once the quotient is rounded to its stored dtype."""
        source = self.get(pair.source)
        entries = slice(None) if pair.rows is None else pair.rows.to(source.device)
        whole = source[entries] + pair.offset
        scale = torch.where(whole == 0, 1.0, scale.to(source.device))
        dtype = self.module.get_parameter(pair.source).dtype
        stored = (whole / scale - pair.offset).to(dtype).to(torch.float32) + pair.offset
        return torch.where((whole == 0) | (stored == 0), 1.0, whole / stored)


@contextmanager
def rounded_inputs(states: Iterable[WeightState]) -> Iterator[None]:
    """Round the input of each weight whose scheme says so, while the context is open."""
    hooks = [rounding_hook(w.module, w.scheme, w.input_scale) for w in states if w.scheme.activations is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounding_hook(module: nn.Module, scheme: Scheme, scale: Tensor | None) -> Any:
    """Have a module's input rounded as the scheme says: per token, or by `scale` where there is one."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        x = round_per_token(x, scheme.grid) if scale is None else round_static(x, scale.to(x.device), scheme.grid)
        return (x, *args[1:])

    return module.register_forward_pre_hook(hook)


def relative_error(values: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """‖values − targets‖ / ‖targets‖ over all of them, a few rows at a time."""
    apart = whole = 0.0
    for value, target in zip(values, targets, strict=True):
        for v, t in zip(torch.split(value.flatten(), CHUNK), torch.split(target.flatten(), CHUNK), strict=True):
            exact = t.to(v.device, torch.float32)
            apart += float(torch.linalg.vector_norm(v.float() - exact)) ** 2
            whole += float(torch.linalg.vector_norm(exact)) ** 2
    return math.sqrt(apart / whole) if whole else math.sqrt(apart)


def with_input_scale(quantized: Quantized, scale: Tensor | None) -> Quantized:
    """The weight with the static scale of its input, which is stored beside it."""
    if scale is None or not isinstance(quantized, QuantizedWeight):
        return quantized
    return replace(quantized, input_scale=scale)
