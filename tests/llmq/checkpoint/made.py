"""Checkpoints of a few tensors, written by safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmq.checkpoint.files import INDEX

CONFIG = {"model_type": "anything", "hidden_size": 8}


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def one(folder: Path, tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(
        tensors or {"a.weight": torch.arange(24.0).reshape(6, 4), "b": torch.ones(3)}, folder / "model.safetensors"
    )
    return folder


def sharded(folder: Path) -> Path:
    """A checkpoint of two shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    parts = {"model-00001-of-00002.safetensors": ["x", "y"], "model-00002-of-00002.safetensors": ["z"]}
    for shard, names in parts.items():
        save_file({name: torch.full((4, 4), float(ord(name))) for name in names}, folder / shard)
    where = {name: shard for shard, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
