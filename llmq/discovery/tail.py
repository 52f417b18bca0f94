"""The tail of a model, all that runs after its last block, found and run by running the model around given states.

The model runs as ever, but its blocks only return what they are told: the last one the states that the tail is to start
from. So a final norm, an output embedding, a soft limit on logits and whatever else there is are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.calls import forwards
from llmq.discovery.gains import watch_gains
from llmq.discovery.handed import Results
from llmq.discovery.parameters import assign, shared_zeros, watch_used
from llmq.errors import LlmqError

PIECE = 1 << 24
"""The most logits that are computed at once."""
TRIED = 16
"""The tokens on which it is tried whether logits of tokens can be computed apart."""


@dataclass
class Tail:
    """What runs after the blocks of a model.

    parameters: those that it reads, by their names in the model; gains: of these, what values are multiplied by; apart:
    whether each token's logits depend on its own states only, so that tokens can be computed some at a time;
    vocabulary, width: the numbers of a token's logits and hidden states.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    parameters: tuple[str, ...] = ()
    gains: frozenset[str] = frozenset()
    apart: bool = False
    vocabulary: int = 0
    width: int = 0
    _first: nn.Module | None = None
    _results: dict[torch.Size, Results] = field(default_factory=dict)

    def logits(self, ids: Tensor, hidden: Tensor | None, around: Callable[[], Any] | None = None) -> Tensor:
        """The logits [batch, tokens, vocabulary] for the last block's output [batch, tokens, width], None for zeros.

        ids: the token ids, int64 [batch, tokens]; around: a context for the tail alone. The tail's parameters must be
        in memory, and all others outside the blocks, or zeros (`zeros_outside`). Gradients reach `hidden` and
        parameters. Raises LlmqError if the model returns no logits.
        """
        last, seen = len(self.blocks) - 1, False
        if self._first is None:
            self._first = deepcopy(self.blocks[0])
        with ExitStack() as stack:

            def make(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    nonlocal seen
                    results = self._results_of(ids, args, kwargs)
                    given = results.hidden if hidden is None else hidden
                    if i < last:
                        return results.of(i, given.detach())
                    if around is not None:
                        stack.enter_context(around())
                    seen = True
                    return results.of(i, given)

                return forward

            with forwards([*self.blocks], make):
                output = self.model(input_ids=ids, use_cache=False)
            for results in self._results.values():
                results.known.clear()
        logits = getattr(output, "logits", None)
        if not seen or not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
            raise LlmqError("the model returns no logits for every token, which distill compares")
        return logits

    def pieces(self, shape: torch.Size) -> Iterator[slice]:
        """The tokens, for states of this shape, of which logits are computed at once."""
        if not self.apart:
            yield slice(None)
            return
        batch, tokens = shape[:2]
        step = max(1, PIECE // max(1, self.vocabulary * batch))
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def _results_of(self, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
        """What a block returns for ids of this shape: the first block's result with zeros as parameters."""
        if ids.shape not in self._results:
            assert self._first is not None
            for name, buffer in self._first.named_buffers():
                if not buffer.is_meta:
                    assign(self._first, name, buffer.to(ids.device))
            with torch.no_grad(), shared_zeros(self._first, device=ids.device):
                result = self._first(*args, **kwargs)
            self._results[ids.shape] = Results(result, [*args, *kwargs.values()], None, {})
        return self._results[ids.shape]


def find_tail(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> Tail:
    """The tail of a model whose parameters are on the meta device. ids: of a short window, int64 [batch, tokens].

    Raises LlmqError if the model returns no logits.
    """
    tail = Tail(model, blocks)
    used: set[str] = set()
    multiplied: set[str] = set()

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal used, multiplied
        with watch_used(model) as used, watch_gains(model) as multiplied:
            yield

    with torch.no_grad(), zeros_outside(model, blocks):
        tail.vocabulary = tail.logits(ids, None, around).shape[-1]
    tail.width = next(iter(tail._results.values())).hidden.shape[-1]
    tail.parameters, tail.gains = tuple(sorted(used)), frozenset(multiplied)
    return tail


@contextmanager
def zeros_outside(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | None = None) -> Iterator[None]:
    """Within the context, parameters outside the blocks that are on the meta device are zeros in the memory of one
    number; and all buffers there are on the device."""
    inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    empty = [n for n, p in model.named_parameters() if id(p) not in inside and p.device.type == "meta"]
    buffers = {n: b for n, b in model.named_buffers() if id(b) not in inside and b.device.type != "meta"}
    with shared_zeros(model, empty, device):
        try:
            for name, buffer in buffers.items():
                assign(model, name, buffer.to(device or buffer.device))
            yield
        finally:
            for name, buffer in buffers.items():
                assign(model, name, buffer)


def tokens_apart(tail: Tail, ids: Tensor, hidden: Tensor) -> bool:
    """Whether the logits of some tokens, computed alone, are those that they have among all others.

    ids [batch, tokens] and hidden [batch, tokens, width]: real states, with the parameters in memory; only the first
    tokens of a window are tried. It is not so where states have other axes.
    """
    if hidden.shape[:2] != ids.shape or ids.shape[1] < 2:
        return False
    ids, hidden = ids[:1, :TRIED], hidden[:1, :TRIED]
    tokens = ids.shape[1]
    parts = [slice(0, tokens // 2), slice(tokens // 2, tokens)]
    with torch.no_grad():
        whole = tail.logits(ids, hidden).float()
        alone = torch.cat([tail.logits(ids[:, part], hidden[:, part]).float() for part in parts], 1)
    return bool((whole - alone).norm() <= 1e-3 * whole.norm())
