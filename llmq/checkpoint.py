"""The state of a training run on disk: safetensors and JSON in one file, whole or not there. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError

FILE = "checkpoint.safetensors"
_KEY = "llmq"


def write(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all, replacing what had the name. Raises LlmqError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LlmqError(f"cannot write {path}: {error.strerror}; mend that and run the same command again") from error


def save(
    folder: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
) -> None:
    """Replace the checkpoint: the trained parameters, the optimizer's whole state, and JSON `about` them."""
    from safetensors.torch import save as to_bytes

    state = optimizer.state_dict()
    tensors = {f"trained.{name}": value.detach().cpu().contiguous() for name, value in trained.items()}
    rest: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                # A copy: optimizers share some of these tables, which safetensors does not hold twice.
                tensors[f"state.{index}.{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            else:
                rest.setdefault(str(index), {})[key] = value
    written = {"about": dict(about), "groups": state["param_groups"], "rest": rest}
    write(folder / FILE, to_bytes(tensors, {_KEY: json.dumps(written)}))


def load(folder: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the checkpoint's values into the parameters and the optimizer; returns `about`, or None without a checkpoint.

    Raises LlmqError if it is damaged or of other parameters.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            written = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in written["rest"].items()}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "state":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = value
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"trained.{name}"])
        optimizer.load_state_dict({"state": state, "param_groups": written["groups"]})
        about: dict[str, Any] = written["about"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LlmqError(f"{path} is damaged ({error}): delete {folder.parent} to start again") from error
    return about
