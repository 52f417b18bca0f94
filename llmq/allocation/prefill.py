"""What a prompt takes while a model serves it: what it keeps of the tokens, and the tensors that live at once.

Both are found by running the model on the meta device, where tensors have shapes and no memory. So heads that share
keys, latent keys, windows and states of linear attention count what transformers' own classes keep of them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import shared_zeros
from llmq.errors import LlmqError, first_line
from llmq.inference import experts
from llmq.inference.stack import GROUPED

HEAP = 1 << 25
"""The C library takes blocks of fewer bytes than this from its heap, in the order in which they are freed."""
SHORT = (128, 256)
"""Lengths of two runs, for models that do not run on the meta device."""
LAST = "logits_to_keep"
CACHE = "past_key_values"
"""What transformers' `generate` calls the values that a model keeps."""
COPIES = 8
"""Of the widest activation of a block, for these models."""


@dataclass(frozen=True)
class Prompt:
    """Bytes. cache: what the model keeps of all tokens; peak: of all tensors that live at once while it reads the
    prompt, the cache among them, but not the parameters; heap: of those, the peak of the ones below HEAP; kept: of the
    cache, the ones below HEAP; keys: of the cache, the keys and values of attention, and no states.
    """

    cache: int
    peak: int
    heap: int
    kept: int
    keys: int


def prompt(model: nn.Module, context: int, batch: int = 1, chunk: int | None = None) -> Prompt:
    """What a prompt of `batch` rows of `context` tokens takes. model: its parameters may be on the meta device; chunk:
    the tokens of a row that are read at a time, by a model that goes on from what it keeps.

    Latent attention: transformers keeps the heads' keys and values; vLLM keeps the latent, which is several times
    smaller. Raises LlmqError for a model that says of no length what it keeps.
    """
    twin = on_meta(model)
    try:
        return _traced(twin, context, batch, chunk)
    except Exception as problem:  # a model's code may ask for values in any way
        return _without_values(model, context, batch, problem)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, that runs its experts as `llmq.load` does."""
    return as_loaded(model).to("meta")


def as_loaded(model: nn.Module) -> nn.Module:
    """A copy of a model that runs its experts as `llmq.load` does."""
    twin = deepcopy(model).eval()
    configs = [getattr(module, "config", None) for module in twin.modules()]
    for config in {id(c): c for c in configs if c is not None}.values():
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = experts.NAME
    return twin


def _traced(model: nn.Module, context: int, batch: int, chunk: int | None) -> Prompt:
    """By a run of the last tokens, after all others: what is kept of these counts, and is copied while it grows."""
    *before, last = (torch.zeros(batch, n, dtype=torch.long, device="meta") for n in _steps(context, chunk))
    known = {*_storages([*model.parameters(), *model.buffers()])}
    with torch.inference_mode(), Fused():
        cache = None
        for ids in before:
            cache = run(model, ids, cache)[CACHE]
        with _Live(known) as live:
            live.add(cache)
            result = run(model, last, cache)
            held = kept(result)
            sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
            on_heap = sum(nbytes for nbytes in sizes.values() if nbytes < HEAP)
            return Prompt(_nbytes(held), live.peak, live.heap_peak, on_heap, _nbytes(_keys(result)))


def _steps(context: int, chunk: int | None) -> list[int]:
    """How many tokens are read one after the other; in place of many steps one, before the last two."""
    if chunk is None or context <= chunk:
        return [context]
    rest = context - 2 * chunk
    return [rest, chunk, chunk] if rest > 0 else [context - chunk, chunk]


def _without_values(model: nn.Module, context: int, batch: int, problem: Exception) -> Prompt:
    """The same, by runs without arithmetic of two short lengths; what lives at once is only estimated."""
    sizes = []
    share = 0.0
    twin = deepcopy(model).eval()
    for tokens in SHORT:
        try:
            with shared_zeros(twin), without_arithmetic():
                result = run(twin, torch.zeros(1, tokens, dtype=torch.long))
                sizes.append(_nbytes(kept(result)))
                share = _nbytes(_keys(result)) / max(1, sizes[-1])
        except Exception:
            raise LlmqError(
                f"how much memory this model keeps for each token is not known, so --fit is not possible: "
                f"{first_line(problem)}. Give --target-size or --target-bits instead"
            ) from problem
    slope = max(0, sizes[1] - sizes[0]) / (SHORT[1] - SHORT[0])
    cache = batch * int(max(sizes[0], sizes[1] + slope * (context - SHORT[1])))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = 0 if head is None else len(head.weight)
    widest = max((p.shape[0] for p in matrices if len(p) != vocabulary), default=1)
    work = COPIES * batch * context * widest * max(p.element_size() for p in model.parameters())
    return Prompt(cache, cache + work, cache + work, cache, int(share * cache))


def run(model: nn.Module, ids: Tensor, cache: Any = None) -> dict[Any, Any]:
    """Run the model on tokens, after those of which it keeps the cache; what it returns, by name or place.

    As `generate` calls it: with logits of the last token alone, where the model can leave out the others.
    """
    last = {LAST: 1} if LAST in inspect.signature(model.forward).parameters else {}
    result = model(input_ids=ids, use_cache=True, **last, **({} if cache is None else {CACHE: cache}))
    return dict(result) if isinstance(result, Mapping) else dict(enumerate(result))


def kept(result: Mapping[Any, Any]) -> list[Tensor]:
    """The tensors that a run returns to go on from, beside logits."""
    return tensors_in([value for name, value in result.items() if name not in ("logits", 0)])


def _keys(result: Mapping[Any, Any]) -> list[Tensor]:
    """The keys and values in what a run returns, as transformers' caches name them."""
    layers = getattr(result.get(CACHE), "layers", ())
    return tensors_in([getattr(layer, name, None) for layer in layers for name in ("keys", "values")])


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, each once."""
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in a value: in lists, dicts and the attributes of objects, each object once."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts: Sequence[Any] = (
        list(value.values())
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, (list, tuple, set))
        else list(getattr(value, "__dict__", {}).values())
    )
    for part in parts:
        yield from _tensors(part, seen)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Of the values: a window of a longer tensor counts as what it is from the next token on."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _storages(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors]


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operators make within it, until they are freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.now = self.peak = self.heap = self.heap_peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def add(self, value: Any) -> None:
        """Count the tensors in a value from now on."""
        for tensor in tensors_in(value):
            self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self._count(nbytes, nbytes)
        weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self._count(nbytes, -nbytes)

    def _count(self, nbytes: int, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)
        if nbytes < HEAP:
            self.heap += change
            self.heap_peak = max(self.heap_peak, self.heap)


class Fused(TorchFunctionMode):
    """What fused kernels compute, where the meta device would do otherwise, or refuse a dtype.

    Attention without the products of all tokens, with a mask of booleans turned into numbers; products of rows that are
    sorted by expert.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in GROUPED and len(args) > 1 and args[0].dim() == 2:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **named)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | named
        query, value, mask = given["query"], given["value"], given.get("attn_mask")
        numbers = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        *lead, tokens, _ = query.shape
        made = query.new_empty(*lead[:-1], tokens, lead[-1], value.shape[-1]).transpose(-2, -3)
        del numbers
        return made
