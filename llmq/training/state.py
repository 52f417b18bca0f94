"""Checkpoints of a training run: safetensors and JSON in one file, written atomically. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.files import PARTIAL, put
from llmq.checkpoint.tensors import encode
from llmq.errors import LlmqError, first_line

FILE = "checkpoint.safetensors"
_KEY = "llmq"
_TENSOR = "tensor in the file"


def save(
    folder: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
) -> None:
    """Replace the checkpoint: the trained parameters, the optimizer's whole state, and JSON `about` them.

    It is written piece by piece, without a copy in memory of what is on the CPU. Raises LlmqError if it cannot be.
    """
    tensors = {f"trained.{name}": value.detach() for name, value in trained.items()}
    plain = _taken_out(optimizer.state_dict(), "optimizer", tensors)
    _, pieces = encode(tensors, {_KEY: json.dumps({"about": dict(about), "optimizer": plain})})
    path = folder / FILE
    try:
        put(path, pieces, path.with_name(path.name + PARTIAL))
    except OSError as error:
        raise LlmqError(f"cannot write {path}: {error.strerror}; mend that and run the same command again") from error


def about(folder: Path) -> dict[str, Any] | None:
    """What the checkpoint says `about` itself; None if there is none. Raises LlmqError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told: dict[str, Any] = json.loads(file.metadata()[_KEY])["about"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return told


def load(folder: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the checkpoint's values into the parameters and the optimizer; returns `about`, or None without a checkpoint.

    Raises LlmqError if it is damaged or has other parameters.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            written = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _put_back(written["optimizer"], tensors)
        state["state"] = {int(index): values for index, values in state["state"].items()}  # JSON keys are strings
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"trained.{name}"])
        optimizer.load_state_dict(state)
        told: dict[str, Any] = written["about"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return told


def _damaged(path: Path, error: Exception) -> LlmqError:
    return LlmqError(f"{path} is damaged ({first_line(error)}): delete {path.parent.parent} to start again")


def _taken_out(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of `tree` in which each tensor is moved to `tensors` and replaced by its name there."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach()
        return {_TENSOR: name}
    if isinstance(tree, dict):
        return {key: _taken_out(value, f"{name}.{key}", tensors) for key, value in tree.items()}
    return tree


def _put_back(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_taken_out`."""
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {key: _put_back(value, tensors) for key, value in tree.items()}
