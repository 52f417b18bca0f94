"""Tiny mixtures of experts, and what their stock modules of experts are called with and return."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmq import formats
from llmq.checkpoint.sink import Sink
from llmq.discovery.blocks import Structure, build, find
from llmq.grids.scheme import Scheme
from llmq.report.report import Report
from tests.architectures import tiny

W4 = Scheme(4, 16)


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """A tiny random checkpoint of a type, in float32, with changes to its configuration."""
    config = tiny.config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    kind_of: Any = AutoModelForCausalLM
    model = kind_of.from_config(config, dtype=torch.float32)
    tiny.shake(model)
    model.save_pretrained(folder)
    return folder


def structure(kind: str) -> Structure:
    """The structure of a tiny model of a type, found from its configuration alone."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.config(kind).save_pretrained(folder)
        return find(build(Path(folder), torch.float32))


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A folder as stock transformers loads it, in float32, and what it says of missing and unexpected tensors."""
    kind: Any = AutoModelForCausalLM
    model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), {kind: found for kind, found in told.items() if found}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tiny.tokens(), use_cache=False).logits
    return result


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def put_quantized(state: dict[str, Tensor], report: Report, written: dict[str, Tensor]) -> None:
    """Put the values of quantized weights into a model's state, those of experts by the names that llmq gives them."""
    for row in report.quantized:
        assert row.scheme is not None
        mine = {n.removeprefix(f"{row.name}."): t for n, t in written.items() if n.startswith(f"{row.name}.")}
        value = formats.of(row.scheme).unpack(mine, row.scheme).dequantize(torch.float32)
        if f"{row.name}.weight" in state:
            state[f"{row.name}.weight"].copy_(value)
            continue
        owner, expert, name = re.fullmatch(r"(.*)\.(\d+)\.(\w+?)(?:\.T)?", row.name).groups()  # type: ignore[union-attr]
        entry = state[f"{owner}.{name}"][int(expert)]
        entry.copy_(value.T if row.name.endswith(".T") else value)


def written(folder: Path) -> dict[str, bytes]:
    """Everything in a finished folder that must not depend on how it came about."""
    differ = {"report.json", "report.html", "README.md"}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in differ}


class Broken(Exception):
    """The end of a run."""


def breaking(at: int) -> Callable[..., None]:
    """Sink.commit that ends the run at its at-th call, before anything is written."""
    real, calls = Sink.commit, iter(range(10**6))

    def commit(sink: Sink, *args: Any) -> None:
        if next(calls) == at:
            raise Broken
        real(sink, *args)

    return commit


def before_each_commit(quantize: Callable[[Path], object], folder: Path) -> tuple[dict[str, bytes], list[Path]]:
    """What a run writes, and copies of its folder from before each of its commits: what a kill there leaves."""
    real, copies = Sink.commit, list[Path]()

    def commit(sink: Sink, *args: Any) -> None:
        copies.append(shutil.copytree(sink.out, folder / str(len(copies))))
        real(sink, *args)

    with mock.patch.object(Sink, "commit", commit):
        quantize(folder / "whole")
    return written(folder / "whole"), copies


def check_resumes(
    quantize: Callable[[Path], Report], folder: Path, commits: int, weights: int, ended: slice = slice(None)
) -> None:
    """Ended before any of its commits, a run resumes and ends with the same bytes, and reports every weight once.

    ended: before which of them.
    """
    whole, copies = before_each_commit(quantize, folder)
    assert sum(name.startswith("model-") for name in whole) == len(copies) == commits
    for at, copy in [*enumerate(copies)][ended]:
        assert len(list(copy.glob("model-*"))) == at
        report = quantize(copy)
        assert written(copy) == whole, at
        assert len({row.name for row in report.quantized}) == len(report.quantized) == weights


def check_groups(
    quantize: Callable[[int, Path], object], folder: Path, sizes: Sequence[int], shards: Callable[[int], int]
) -> None:
    """In groups of any of these sizes, which take so many shards, the tensors are the same."""
    found = {}
    for size in sizes:
        quantize(size, folder / str(size))
        assert len(list((folder / str(size)).glob("model-*"))) == shards(size)
        found[size] = stored(folder / str(size))
    *others, last = found.values()
    for other in others:
        assert other.keys() == last.keys()
        assert all(torch.equal(tensor, last[name]) for name, tensor in other.items())


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """Within the context, what a module is called with (its tensors, in order) and what it returns."""
    seen: list[tuple[list[Tensor], Tensor]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        seen.append(([v.clone() for v in given], output.clone()))

    hook = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
