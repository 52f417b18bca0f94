"""Where the parameters that an adapter names lie in a checkpoint, by transformers' own renaming rules.

An adapter names parameters as the class did that it was trained on, in the transformers of that day. That class can be
another than the one that AutoModelForCausalLM opens (a vision-language checkpoint has one for all of it), and
transformers can have renamed its parts since. A name is looked up as it is, and as from_pretrained would rename it, in
both classes; the tensor that fills the parameter is the place. So names of parts that the causal class leaves out are
found too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from llmq.checkpoint.source import Source, shapes
from llmq.discovery import blocks as discover
from llmq.discovery.named import build_named
from llmq.discovery.names import Links, link
from llmq.discovery.rename import renamer, renamer_only
from llmq.errors import LlmqError


@dataclass(frozen=True)
class Place:
    """A stored tensor, the module of the model whose parameter it fills, and all parameters that it fills.

    module: None if transformers joins the tensor with others while loading (one of several experts).
    """

    tensor: str
    module: nn.Module | None
    parameters: tuple[str, ...]


@dataclass
class _View:
    """A class that opens the checkpoint: the model on the meta device, and how names become its own."""

    model: nn.Module
    links: Links
    renamed: Callable[[str], tuple[str, bool]]
    only_renamed: Callable[[str], str]
    state: set[str]
    plain: dict[str, str] = field(default_factory=dict)


class Places:
    """Finds parameters of an adapter in a checkpoint. model: as AutoModelForCausalLM opens it, on the meta device.

    The class that config.json names is built only if a name is not found in the causal one. Raises LlmqError if
    neither can be built.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self.model = discover.build(source.folder, torch.float32, source.trust_remote_code)
            self._complete = False
        except LlmqError:
            other = _named(source)
            if other is None:
                raise
            self.model, self._complete = other, True
        self._views = [self._view(self.model)]

    def _view(self, model: nn.Module) -> _View:
        names = self.source.names()
        view = _View(
            model, link(model, shapes(self.source)), renamer(model), renamer_only(model), set(model.state_dict())
        )
        view.plain = {view.only_renamed(name): name for name in names}
        return view

    def _each(self) -> Iterator[_View]:
        yield from list(self._views)
        if not self._complete:
            self._complete = True
            model = _named(self.source)
            if model is not None and type(model) is not type(self.model):
                self._views.append(self._view(model))
                yield self._views[-1]

    def find(self, parameter: str) -> Place | str:
        """The place of a parameter, or the words that say why it has none."""
        why = "which this model does not have: give the base it was trained on"
        for view in self._each():
            name = parameter if parameter in view.state else view.renamed(parameter)[0]
            if name in view.links.source:
                return self._place(view, name)
            if parameter not in view.state and (tensor := view.plain.get(view.only_renamed(parameter))) is not None:
                return Place(tensor, None, (parameter,))
            if name in view.state and parameter in view.state:
                reason = view.links.why_apart(name) or "the checkpoint has no tensor for it"
                why = f"which cannot be merged: {reason}"
        return why

    def vocabularies(self) -> list[nn.Module]:
        """The input embedding and, if there is one, the output embedding of each class that was built."""
        found = []
        for view in self._views:
            for get in ("get_input_embeddings", "get_output_embeddings"):
                module = getattr(view.model, get, lambda: None)()
                found += [] if module is None else [module]
        return found

    def _place(self, view: _View, name: str) -> Place:
        tensor = view.links.source[name]
        module = view.model.get_submodule(name.rpartition(".")[0])
        return Place(tensor, module, tuple(p for p, stored in view.links.source.items() if stored == tensor))


def _named(source: Source) -> nn.Module | None:
    """The model that config.json names; None if there is no such class that can be built: the causal one says why."""
    with suppress(LlmqError):
        return build_named(source.folder, torch.float32, source.trust_remote_code)
    return None
