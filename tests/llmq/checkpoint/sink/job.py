"""A small job that goes through a Sink, for its tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.sink import Sink

PRINT = {"source": "ab" * 32, "recipe": {"methods": ["rtn"], "scheme": {"bits": 4, "group_size": None}}, "seed": 0}
CONFIG = {"model_type": "anything", "quantization_config": {"quant_method": "x"}}
UNITS = ["embeddings", "block 0", "block 1", "nothing", "block 2"]


def tensors_of(unit: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(UNITS.index(unit))
    if unit == "nothing":
        return {}
    return {
        f"{unit}.codes": torch.randint(-100, 100, (16, 8), generator=generator, dtype=torch.int32),
        f"{unit}.scale": torch.randn(16, 1, generator=generator).to(torch.bfloat16),
        f"{unit}.flag": torch.ones(3, dtype=torch.bool),
    }


def aux(folder: Path) -> dict[str, Path]:
    (folder / "additional_chat_templates").mkdir(exist_ok=True, parents=True)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}" * 50)
    (folder / "README.md").write_text("replaced by ours")
    return {name: folder / name for name in ("tokenizer.json", "README.md", "additional_chat_templates/rag.jinja")}


def work(out: Path, carried: dict[str, Path]) -> list[str]:
    """The whole job, or what is left of it; returns the notes."""
    with Sink.open(out, PRINT, len(UNITS)) as sink:
        for number, unit in enumerate(UNITS):
            if unit not in sink.done:
                sink.commit(unit, tensors_of(unit), {"error": 0.1 * number, "rows": (number, None)})
        report = json.dumps(sink.done)
        sink.finish(CONFIG, carried, {"README.md": "card", "report.json": report})
        return sink.notes


def content(out: Path, state: bool = False) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and (state or ".llmq" not in path.parts)
    }


def opened(out: Path, **changes: Any) -> None:
    units = changes.pop("units", len(UNITS))
    Sink.open(out, PRINT | changes, units).close()


def in_child(job: Callable[[], object]) -> int:
    """Run the job in a fork of this process; the signal that ended it, or its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
