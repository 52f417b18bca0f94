"""Blocks of tiny models, opened as a run opens them, for tests that work on one block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmq import job
from llmq.block.block import Block
from llmq.checkpoint.sink import Sink
from llmq.recipe.recipe import Recipe
from llmq.streaming import stream
from llmq.streaming.block_io import BlockIO
from llmq.watch import Silent
from tests.architectures import tiny

CPU = torch.device("cpu")


def ids(windows: int = 3, tokens: int = 48, seed: int = 0) -> Tensor:
    """Random token ids [windows, tokens] that tiny models know."""
    return torch.randint(10, 250, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def write(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny checkpoint of a model type, stored in `dtype`."""
    tiny.model(kind).to(dtype).save_pretrained(folder)
    return folder


def open_block(folder: Path, recipe: Recipe, windows: Tensor | None = None, index: int = 0) -> Block:
    """A block of a checkpoint at the moment before anything is done to it, its target known."""
    plan = job.plan(str(folder), recipe, ids=ids() if windows is None else windows)
    io = BlockIO(plan, CPU, Sink(folder, 0, -1))  # nothing is written
    recording = stream.record_calls(io, Silent())
    block = io.open(plan.blocks[index], recording.hidden, recording.of_block(index, recording.states()))
    block.target = block.outputs()
    return block


def apart(values: list[Tensor], targets: list[Tensor]) -> float:
    """‖values − targets‖ / ‖targets‖ in float64."""
    v, t = (torch.cat([part.flatten().double() for part in parts]) for parts in (values, targets))
    return float((v - t).norm() / t.norm())
