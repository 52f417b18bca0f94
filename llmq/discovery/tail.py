"""What a model does after its last block (the final norm, the head), found and run by running the model.

The model's own forward runs with blocks that compute nothing, the last of which returns given hidden states. So what
the model does between its last block and its logits is done by its own code, and no part of it is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.calls import replaced_forwards
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.handed import Results
from llmq.discovery.parameters import shared_zeros, watch_used
from llmq.errors import LlmqError, first_line

PROBE = (1, 4)
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Tail:
    """The part of a model after its last block.

    model: whose parameters may be on the meta device; blocks: its blocks, in order; parameters: the names of those that
    the tail reads: they must be in memory, on the device of the hidden states, whenever it runs; rows: the size of the
    vocabulary.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    results: Results
    parameters: tuple[str, ...]
    rows: int

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [batch, tokens, vocabulary] for the last block's output `hidden` [batch, tokens, width].

        hidden: in the dtype of `parameters`. Gradients reach `hidden`, and those of `parameters` that require one.
        Raises LlmqError.
        """
        with self._without_others():
            return _run(self.model, self.blocks, self.results, hidden, 0.0)

    def check(self, hidden: Tensor) -> None:
        """Raise LlmqError unless each token's logits depend on nothing but that token's hidden states [1, tokens,
        width], so that they can be computed a few tokens at a time. `parameters` must be in memory."""
        with torch.no_grad(), self._without_others():
            whole = _run(self.model, self.blocks, self.results, hidden, 0.0)
            half = max(1, hidden.shape[1] // 2)
            parts = [_run(self.model, self.blocks, self.results, p, 1.0) for p in torch.split(hidden, half, 1)]
        apart = torch.linalg.vector_norm(torch.cat(parts, 1).float() - whole.float())
        if not apart <= TOLERANCE * torch.linalg.vector_norm(whole.float()):
            raise LlmqError("the model's logits depend on more than the output of its last block for the same token")

    @contextmanager
    def _without_others(self) -> Iterator[None]:
        """Within the context, parameters that only serve to reach the blocks are zeros, which take no memory."""
        mine = set(self.parameters)
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        others = [
            name
            for name, p in self.model.named_parameters()
            if name not in mine and id(p) not in inside and p.device.type == "meta"
        ]
        with shared_zeros(self.model, others):
            yield


def find_tail(model: nn.Module, blocks: list[nn.Module]) -> Tail:
    """The tail of a model whose parameters may be on the meta device, by one run without arithmetic.

    blocks: those of its structure, in order. Raises LlmqError if the model returns no logits, or cannot be run so.
    """
    names = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    found: list[Results] = []
    reached: list[Tensor] = []

    def make(i: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if i == 0:
                result = original(*args, **kwargs)
                found.append(Results(result, [*args, *kwargs.values()], None, {}))
            if i == len(blocks) - 1:
                used.clear()
                reached.append(found[0].hidden.detach().clone())
                return found[0].of(i, reached[0])
            return found[0].of(i, found[0].hidden)

        return forward

    ids = torch.zeros(PROBE, dtype=torch.long)
    try:
        with (
            shared_zeros(model, names),
            without_arithmetic(),
            watch_used(model) as used,
            replaced_forwards(blocks, make),
        ):
            logits = _logits(model(input_ids=ids, use_cache=False))
    except LlmqError:
        raise
    except Exception as error:  # model code may fail in any way
        raise LlmqError(f"what follows the last block cannot be run ({first_line(error)})") from error
    if not reached:
        raise LlmqError("the last block is not called on text alone")
    if logits.shape[:2] != reached[0].shape[:2]:
        raise LlmqError(f"the model's logits have the shape {tuple(logits.shape)}: they are not of each token")
    found[0].known.clear()
    return Tail(model, tuple(blocks), found[0], tuple(sorted(used)), logits.shape[-1])


def _run(model: nn.Module, blocks: tuple[nn.Module, ...], results: Results, hidden: Tensor, fill: float) -> Tensor:
    """fill: what stands for the input embeddings, which are not looked up."""
    shape = hidden.shape

    def make(i: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return results.of(i, hidden)

        return forward

    def embed(i: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return torch.full(shape[:2] + width, fill, dtype=results.hidden.dtype)

        return forward

    entry = getattr(model, "get_input_embeddings", lambda: None)()
    width = (getattr(entry, "embedding_dim", shape[-1]),)
    ids = torch.zeros(shape[:2], dtype=torch.long)
    entries = [entry] if isinstance(entry, nn.Module) else []
    try:
        with replaced_forwards(list(blocks), make), replaced_forwards(entries, embed):
            return _logits(model(input_ids=ids, use_cache=False))
    except LlmqError:
        raise
    except Exception as error:  # model code may fail in any way
        raise LlmqError(f"what follows the last block cannot be run ({first_line(error)})") from error
    finally:
        results.known.clear()


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LlmqError("the model returns no logits of each token")
    return logits
