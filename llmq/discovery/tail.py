"""What a model does after its last block (the final norm, the head), found and run by running the model.

The model's own forward runs with blocks that compute nothing, the last of which returns given hidden states. So what
the model does between its last block and its logits is done by its own code, and no part of it is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.calls import replaced_forwards
from llmq.discovery.gains import watch_gains
from llmq.discovery.handed import Results
from llmq.discovery.parameters import assign, shared_zeros, watch_used
from llmq.errors import LlmqError, first_line

PIECE = 1 << 24
"""The most logits that are computed at once."""
PROBE = (1, 8)
TRIED = 16
"""The tokens on which it is tried what logits depend on."""
TOLERANCE = 1e-3
META = torch.device("meta")


@dataclass
class Tail:
    """The part of a model after its last block.

    model: whose parameters may be on the meta device; blocks: its blocks, in order; parameters: the names of those that
    the tail reads: they must be in memory, on the device of the hidden states, whenever it runs; gains: of these, what
    values are multiplied by; rows, width: the sizes of the vocabulary and of the hidden states; by_token: whether
    hidden states are [batch, tokens, width]; apart: whether each token's logits depend on its own hidden states only,
    once that was tried (`settle`).
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    parameters: tuple[str, ...] = ()
    gains: frozenset[str] = frozenset()
    rows: int = 0
    width: int = 0
    by_token: bool = True
    apart: bool = False
    _first: nn.Module | None = None
    _dtype: torch.dtype | None = None
    _results: dict[torch.Size, Results] = field(default_factory=dict)

    def logits(self, hidden: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The model's logits [batch, tokens, vocabulary] for the last block's output `hidden`.

        hidden: in the dtype of `parameters`, which may be wider than the model's; shape: batch and tokens, where they
        are not the first two axes of `hidden`. Gradients reach `hidden`, and those
        of `parameters` that require one. Raises LlmqError.
        """
        return self._run(hidden, shape or hidden.shape[:2], 0.0)

    def check(self, hidden: Tensor) -> None:
        """Raise LlmqError unless each token's logits depend on nothing but that token's hidden states [1, tokens,
        width], so that they can be computed a few tokens at a time. `parameters` must be in memory."""
        half = max(1, hidden.shape[1] // 2)
        with torch.no_grad():
            whole = self._run(hidden, hidden.shape[:2], 0.0)
            parts = [self._run(part, part.shape[:2], 1.0) for part in torch.split(hidden, half, 1)]
        if not _same(torch.cat(parts, 1), whole):
            raise LlmqError("the model's logits depend on more than the output of its last block for the same token")

    def settle(self, hidden: Tensor, shape: Sequence[int]) -> None:
        """Find out whether logits are `apart`, on the first of some real hidden states; shape: as for `logits`.

        `parameters` must be in memory. Raises LlmqError if logits depend on more than the output of the last block.
        """
        usual = hidden.shape[:2] == tuple(shape)
        if usual:
            hidden = hidden[:1, :TRIED]
            shape = hidden.shape[:2]
        with torch.no_grad():
            if not _same(self._run(hidden, shape, 1.0), self._run(hidden, shape, 0.0)):
                raise LlmqError("the model's logits depend on more than the output of its last block")
        try:
            if usual and shape[1] > 1:
                self.check(hidden)
                self.apart = True
        except LlmqError:
            self.apart = False

    def pieces(self, shape: Sequence[int]) -> Iterator[slice]:
        """The tokens, for states [batch, tokens, …] of this shape, of which logits are computed at once."""
        if not self.apart:
            yield slice(None)
            return
        batch, tokens = shape[:2]
        step = max(1, PIECE // max(1, self.rows * batch))
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def _run(
        self, hidden: Tensor | None, shape: Sequence[int], fill: float, around: Callable[[], Any] | None = None
    ) -> Tensor:
        """hidden: None for zeros; fill: what stands for the input embeddings; around: a context for the tail alone."""
        ids = torch.zeros(*shape, dtype=torch.long, device=None if hidden is None else hidden.device)
        last, reached = len(self.blocks) - 1, False
        entry = getattr(self.model, "get_input_embeddings", lambda: None)()
        if self._first is None:
            self._first = deepcopy(self.blocks[0])
        with ExitStack() as stack:

            def make(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    nonlocal reached
                    results = self._results_of(ids, args, kwargs)
                    given = results.hidden if hidden is None else hidden
                    if i < last:
                        return results.of(i, given.detach())
                    reached = True
                    if around is not None:
                        stack.enter_context(around())
                    return results.of(i, given)

                return forward

            def embed(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    found = original(*args, **kwargs).detach()
                    return torch.full_like(found, fill, dtype=self._dtype or found.dtype)

                return forward

            entries = [entry] if isinstance(entry, nn.Module) else []
            try:
                with (
                    zeros_outside(self.model, self.blocks, ids.device),
                    replaced_forwards([*self.blocks], make),
                    replaced_forwards(entries, embed),
                ):
                    output = self.model(input_ids=ids, use_cache=False)
            except LlmqError:
                raise
            except Exception as error:  # model code may fail in any way
                raise LlmqError(f"what follows the last block cannot be run ({first_line(error)})") from error
            finally:
                for results in self._results.values():
                    results.known.clear()
        logits = getattr(output, "logits", None)
        if not reached:
            raise LlmqError("the last block is not called on text alone")
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise LlmqError("the model returns no logits of each token")
        return logits

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


def find_tail(model: nn.Module, blocks: Sequence[nn.Module]) -> Tail:
    """The tail of a model whose parameters may be on the meta device, by one run on zeros.

    blocks: those of its structure, in order. Raises LlmqError if the model returns no logits, or cannot be run so.
    """
    tail = Tail(model, tuple(blocks))
    used: set[str] = set()
    multiplied: set[str] = set()

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal used, multiplied
        with watch_used(model) as used, watch_gains(model) as multiplied:
            yield

    with torch.no_grad():
        tail.rows = tail._run(None, PROBE, 0.0, around).shape[-1]
    hidden = next(iter(tail._results.values())).hidden
    tail.width, tail._dtype, tail.by_token = hidden.shape[-1], hidden.dtype, hidden.shape[:-1] == PROBE
    tail.parameters, tail.gains = tuple(sorted(used)), frozenset(multiplied)
    return tail


@contextmanager
def zeros_outside(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the context, parameters outside the blocks that are on the meta device are zeros in the memory of one
    number, and all buffers there are on the device."""
    inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    empty = [n for n, p in model.named_parameters() if id(p) not in inside and p.device.type == "meta"]
    buffers = {n: b for n, b in model.named_buffers() if id(b) not in inside and b.device not in (device, META)}
    with shared_zeros(model, empty, device):
        try:
            for name, buffer in buffers.items():
                assign(model, name, buffer.to(device))
            yield
        finally:
            for name, buffer in buffers.items():
                assign(model, name, buffer)


def _same(logits: Tensor, others: Tensor) -> bool:
    apart = torch.linalg.vector_norm(logits.float() - others.float())
    return bool(apart <= TOLERANCE * torch.linalg.vector_norm(others.float()))
