"""How long a window may be: by the model's config, and by trying, because a config need not tell."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.blocks import PROBE_TOKENS, Structure, structure_key
from llmq.discovery.calls import of_length, reach, record
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import shared_zeros
from llmq.errors import LlmqError
from llmq.recipe.recipe import Recipe

CHECK_TOKENS = 128


def longest(model: nn.Module) -> int | None:
    """The model's longest input by its config, under whichever name the config has it (attribute_map)."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    names = {name for name in (*config.to_dict(), *config.attribute_map) if name.startswith("max_position")}
    limits = [getattr(config, name, None) for name in names]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def tokens_to_check(folder: Path, recipe: Recipe, model: nn.Module, structure: Structure) -> int:
    """The length of the window that checks blocks of a run without calibration: at most what the model takes."""
    tokens = min(CHECK_TOKENS, recipe.calibration.seqlen, longest(model) or CHECK_TOKENS)
    while tokens > PROBE_TOKENS:
        try:
            check_length(folder, model, structure, tokens)
            break
        except LlmqError:
            tokens //= 2
    return tokens


def check_length(folder: Path, model: nn.Module, structure: Structure, tokens: int) -> int | None:
    """The bytes of what goes from block to block for a window of that length, None if its blocks cannot be run so.

    Raises LlmqError if the model's code fails on windows of that length, whatever the config says.

    With zeros as parameters: what lies before the blocks as it is, and each kind of block without its arithmetic. So a
    table of positions or a mask that is too short is found, in the blocks too, in little time and memory.
    """
    inside = structure.path + "."
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    with shared_zeros(model, [name for name, _ in model.named_parameters() if not name.startswith(inside)]):
        try:
            with of_length(f"{folder}: the model", tokens):
                return _run(model, blocks, _window(tokens))
        except LlmqError:
            try:
                _run(model, blocks, _window(PROBE_TOKENS))
            except Exception:
                # Blocks that cannot run without arithmetic are not checked: few tokens are no problem for them.
                with of_length(f"{folder}: the model", tokens):
                    reach(model, blocks[0], _window(tokens))
                return None
            raise


def _window(tokens: int) -> Tensor:
    return torch.zeros(1, tokens, dtype=torch.long)


def _run(model: nn.Module, blocks: list[nn.Module], window: Tensor) -> int:
    """Run what lies before the blocks, and one block of each kind without its arithmetic.

    Returns the bytes of what goes from block to block.
    """
    recording = record(model, blocks, [window], first=_dry(blocks[0]))
    calls = recording.sampled()
    seen = {structure_key(blocks[0], calls[0], set())}
    for block, call in zip(blocks[1:], calls[1:], strict=True):
        key = structure_key(block, call, set())
        if key not in seen:
            seen.add(key)
            call.run(_dry(block), recording.hidden[0])
    return recording.nbytes


def _dry(block: nn.Module) -> Callable[..., Any]:
    """A copy of the block, run without its arithmetic: what it keeps between its runs, such as tables, stays apart."""
    copy = deepcopy(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        with shared_zeros(copy), without_arithmetic():
            return copy(*args, **kwargs)

    return run
