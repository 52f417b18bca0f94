"""Maps the model's parameters to the checkpoint's tensors, by transformers' own renaming rules.

The output keeps the source's tensor names, so every server that can read the source can read the output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from llmq.discovery.rename import renamer


@dataclass
class Links:
    """source: parameter or buffer → tensor; converted: parameter → why no stored tensor fits; unused: tensors."""

    source: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def link(model: nn.Module, names: list[str]) -> Links:
    """Match the checkpoint's tensor names to the model's parameters and buffers, as from_pretrained would."""
    renamed, state, links = renamer(model), model.state_dict(), Links()
    for name in names:
        target, converted = renamed(name)
        if target not in state:
            links.unused.append(name)
        elif converted:
            links.converted[target] = f"transformers converts {name} while loading it"
        else:
            links.source[target] = name
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        stored = next((links.source[name] for name in names if name in links.source), None)
        if stored is not None:
            links.source |= {name: stored for name in names if name not in links.source}
    return links
