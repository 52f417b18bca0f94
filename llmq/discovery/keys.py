"""Finds what attention keeps of its tokens, by running a model with a cache, and sees or changes it from then on.

Keys and values are whatever modules hand to the cache's `update`. That is transformers' one interface of all caches; no
module, and none of its arguments, is known by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from llmq.discovery.blocks import PROBE_TOKENS
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.matmuls import PRODUCTS, flat
from llmq.discovery.parameters import shared_zeros
from llmq.discovery.routers import Following, follow_products
from llmq.errors import LlmqError, first_line

CACHE = "past_key_values"
"""What transformers calls the cache among a model's arguments."""
UPDATE = "update"
EXPERTS = "_experts_implementation"
Take = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called with a module's path, its keys and its values, [batch, heads, tokens, width] each; returns what is kept."""


@dataclass(frozen=True)
class Keys:
    """A module that hands keys and values to the cache. module: its path; place: of the cache among its arguments;
    heads: of the keys, which are those of the values; width, values: entries of a key and of a value."""

    module: str
    place: int | str
    heads: int
    width: int
    values: int


def dry_keys(model: nn.Module) -> list[Keys]:
    """As `find_keys`, of a model whose parameters may be on the meta device: with zeros, if possible without
    arithmetic."""
    twin = deepcopy(model).eval()
    for module in twin.modules():
        if hasattr(config := getattr(module, "config", None), EXPERTS):
            # Products of rows that are sorted by expert refuse zeros in the memory of one number.
            setattr(config, EXPERTS, "eager")
    with torch.no_grad(), shared_zeros(twin):
        try:
            with without_arithmetic():
                return find_keys(twin)
        except LlmqError:
            raise
        except Exception:  # the model computes with values: it has to be run
            pass
        try:
            return find_keys(twin)
        except LlmqError:
            raise
        except Exception as problem:  # model code may fail in any way
            raise LlmqError(
                f"{type(model).__name__} does not run with a cache ({first_line(problem)}): its keys and values cannot "
                "be found"
            ) from problem


def find_keys(model: nn.Module) -> list[Keys]:
    """The modules that hand keys and values to a cache, in the order of a run on a few tokens.

    Raises LlmqError for a model that keeps none, and for one that keeps something else: a latent of which keys and
    values are computed, or keys of which several layers make use.
    """
    cache, recorder = _empty(model.config), _Recorder(model)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    with recorder.recording(cache), torch.no_grad(), follow_products(model) as following, recorder.behind:
        recorder.following = following
        model(input_ids=ids, use_cache=True, **{CACHE: cache})
    found = recorder.found
    if not found:
        raise LlmqError(f"{type(model).__name__} keeps no keys and values of its tokens: there is no cache to round")
    if twice := [name for name, count in Counter(one.module for one in found).items() if count > 1]:
        raise LlmqError(f"{twice[0]} keeps several keys and values, which llmq cannot tell apart")
    mine, kinds = {one.module for one in found}, {type(model.get_submodule(one.module)) for one in found}
    for one in found:
        if one.module in recorder.behind.latent:
            raise LlmqError(_LATENT.format(one.module))
    others = [name for name in recorder.called if name not in mine and type(model.get_submodule(name)) in kinds]
    if others:
        raise LlmqError(
            f"{others[0]} keeps no keys and values of its own, but uses those of another layer: a rounded cache of "
            "such a model is not supported"
        )
    return found


_LATENT = (
    "{} multiplies what it keeps of its tokens by more weights, as attention with a latent does, or makes it so: its "
    "scales would say nothing of keys and values, and a rounded cache of such a model is not supported"
)


class _Behind(TorchFunctionMode):
    """Finds products of weights with what the cache gave back. latent: the modules that it was given to, of these.

    Attention itself is a product with something else than a weight, and what comes behind it is not followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.latent: set[str] = set()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() > 1}
        # The tensors are kept, because an id is used again once its object is gone.
        self.given: dict[int, tuple[Tensor, str]] = {}

    def give(self, module: str, tensors: Iterable[Any]) -> None:
        """Follow what the cache gave to a module."""
        self.given |= {id(one): (one, module) for one in tensors if isinstance(one, Tensor)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [value for value in flat((args, kwargs or {})) if isinstance(value, Tensor)]
        modules = {self.given[id(one)][1] for one in tensors if id(one) in self.given}
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            if any(one.untyped_storage().data_ptr() in self.weights for one in tensors):
                self.latent |= modules
        elif func is not nn.functional.scaled_dot_product_attention:
            for module in modules:
                self.give(module, flat(result))
        return result


def _empty(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config.get_text_config(decoder=True))


class _Recorder:
    """Notes in which module each update of a cache is made. called: all modules that ran, by their paths."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[Keys] = []
        self.called: dict[str, None] = {}
        self.following: Following | None = None
        self.behind = _Behind(model)
        self._stack: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def recording(self, cache: Any) -> Iterator[None]:
        """Within the context, updates of the cache are noted."""
        handles: list[RemovableHandle] = []
        kept = getattr(cache, UPDATE)

        def update(*args: Any, **kwargs: Any) -> Any:
            self._note(cache, args, kwargs)
            given = kept(*args, **kwargs)
            self.behind.give(self._stack[-1][0], flat(given))
            return given

        def leave(*_: Any) -> None:
            self._stack.pop()

        try:
            setattr(cache, UPDATE, update)
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.called[name] = None
            self._stack.append((name, args, kwargs))

        return enter

    def _note(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, given, named = self._stack[-1]
        handed = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:2]
        places: list[int | str] = [i for i, value in enumerate(given) if value is cache]
        places += [key for key, value in named.items() if value is cache]
        if not places:
            raise LlmqError(f"{name} updates a cache that it was not called with: its keys cannot be followed")
        shapes = [tuple(one.shape) for one in handed]
        if len(shapes) < 2 or any(len(s) != 4 or (s[0], s[2]) != (1, PROBE_TOKENS) for s in shapes):
            raise LlmqError(f"{name} keeps no keys and values of heads, but {shapes or 'nothing'}")
        if shapes[0][1] != shapes[1][1]:
            raise LlmqError(f"{name}: keys have {shapes[0][1]} heads, values {shapes[1][1]}")
        if handed[0] is handed[1]:
            raise LlmqError(f"{name} keeps one tensor as keys and values: a rounded cache of it is not supported")
        if self._is_latent(name, *handed):
            raise LlmqError(_LATENT.format(name))
        self.found.append(Keys(name, places[0], shapes[0][1], shapes[0][3], shapes[1][3]))

    def _is_latent(self, module: str, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values are made of one product of a module's weights through another."""
        assert self.following is not None
        weights = {f"{module}.{n}" for n, p in self.model.get_submodule(module).named_parameters() if p.dim() > 1}
        first, second = (self.following.made_of(one) & weights for one in (keys, values))
        return bool(first & second) and len(first | second) > 1


def watch_keys(module: nn.Module, found: Sequence[Keys], take: Take, config: Any) -> list[RemovableHandle]:
    """From now on, the cache gets what `take` returns of the keys and values of these modules; also where the model
    runs without a cache. Removing the handles ends that.

    module: in which their paths are; config: the model's.
    """
    handles: list[RemovableHandle] = []
    for one in found:
        inner, watcher = module.get_submodule(one.module), _Watcher(config, one, take)
        handles.append(inner.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        handles.append(inner.register_forward_hook(watcher.leave, always_call=True))
    return handles


@contextmanager
def at_keys(module: nn.Module, found: Sequence[Keys], take: Take, config: Any) -> Iterator[None]:
    """`watch_keys` within the context."""
    handles = watch_keys(module, found, take, config)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Puts `take` before the update of the cache that a module is called with, for that call."""

    def __init__(self, config: Any, keys: Keys, take: Take) -> None:
        self.config, self.keys, self.take = config, keys, take
        self.open: list[tuple[Any, Any]] = []

    def enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the module's forward."""
        place = self.keys.place
        at = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))
        # An empty cache gives back what it gets.
        cache = _empty(self.config) if at is None else at
        self.open.append((cache, vars(cache).get(UPDATE)))
        inner = (lambda keys, values, *_, **__: (keys, values)) if at is None else getattr(cache, UPDATE)
        setattr(cache, UPDATE, self._changed(inner))
        if at is None and isinstance(place, int):
            args = (*args[:place], cache, *args[place + 1 :])
        elif at is None:
            kwargs = kwargs | {str(place): cache}
        return args, kwargs

    def leave(self, *_: Any) -> None:
        """After it, whether or not it failed."""
        cache, before = self.open.pop()
        vars(cache).pop(UPDATE, None)
        if before is not None:
            setattr(cache, UPDATE, before)

    def _changed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def update(*args: Any, **kwargs: Any) -> Any:
            names = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
            places: list[int | str] = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
            first, second = [*places, *names][:2]
            new = self.take(self.keys.module, _at(args, kwargs, first), _at(args, kwargs, second))
            positional, named = list(args), dict(kwargs)
            for at, value in zip((first, second), new, strict=True):
                if isinstance(at, int):
                    positional[at] = value
                else:
                    named[at] = value
            return inner(*positional, **named)

        return update


def _at(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str) -> Tensor:
    value: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return value
