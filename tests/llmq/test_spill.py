"""Tensors in files: their values, their memory, their ends; and whole runs that save memory write the same bytes."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmq import job, spill
from llmq.checkpoint.claim import STATE
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.machine import resident_memory
from llmq.recipe.recipe import Recipe
from llmq.spill import Saving, keep, keep_all, rest, rest_one, saving, zeros
from llmq.watch import Silent
from tests.llmq.refusal import refused

IDS = torch.arange(256).view(8, 32) % 250
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with saving(Saving.PASSES, tmp_path):
        yield tmp_path


def mapped(folder: Path) -> int:
    """How many files of a folder are in this process's memory."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"{folder}/")


def test_nothing_is_done_unless_memory_is_saved(tmp_path: Path) -> None:
    value = torch.randn(3, 5)
    assert keep(value, Saving.STATES) is value
    with saving(Saving.PRODUCTS, tmp_path):
        assert keep(value, Saving.STATES) is value
    with saving(Saving.STATES, tmp_path):
        assert keep(value, Saving.STATES) is not value and keep(value, Saving.PASSES) is value
    assert not spill.saves(Saving.PRODUCTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_values_stay_when_they_rest(folder: Path, dtype: torch.dtype) -> None:
    values = [torch.randn(n, 700).mul_(50).to(dtype) for n in (1, 300, 7)]
    kept = [keep(value, Saving.STATES) for value in values]
    total = zeros((500, 500), torch.float32, CPU, Saving.PASSES)
    assert not total.any()
    total[100:200, 3:90] += 1
    rest_one(total[100:200])
    rest()
    for value, other in zip(values, kept, strict=True):
        assert torch.equal(value, other) and other.dtype == dtype
    assert float(total.sum()) == 100 * 87
    assert not [*folder.iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of this process's memory")
def test_what_rests_takes_no_memory_and_files_end_with_their_tensors(folder: Path) -> None:
    before = resident_memory()
    value = zeros((100, 2**20), torch.uint8, CPU, Saving.PASSES).fill_(1)
    assert resident_memory() - before > 90 * 2**20 and mapped(folder)
    rest(Saving.STATES)
    assert resident_memory() - before > 90 * 2**20
    rest_one(value[10:60])
    assert 20 * 2**20 < resident_memory() - before < 70 * 2**20
    rest(Saving.PASSES)
    assert resident_memory() - before < 20 * 2**20
    part = value[5:7]
    del value
    assert int(part.sum()) == 2 * 2**20
    del part
    assert not mapped(folder)


def test_tensors_of_a_dataclass(folder: Path) -> None:
    from llmq.grids.nearest import round_to_nearest

    made = round_to_nearest(torch.randn(8, 64), Scheme(4, 32), torch.float32)
    kept = keep_all(made, Saving.PASSES)
    assert kept.codes is not made.codes and torch.equal(kept.codes, made.codes)
    assert torch.equal(kept.dequantize(torch.float32), made.dequantize(torch.float32))


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "disk full"), (errno.EIO, "cannot write")])
def test_a_disk_that_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str) -> None:
    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    refused(lambda: keep(torch.ones(5), Saving.STATES), told, str(folder), "--max-memory", "same command")
    assert not [*folder.iterdir()]


class _Ends(Silent):
    """Ends the run when the first block is done."""

    def step(self, text: str) -> None:
        if text.startswith("block 0"):
            raise KeyboardInterrupt


def run(model: Path, out: Path, level: Saving, watch: Silent | None = None, **options: str) -> dict[str, bytes]:
    """The shards that a run writes."""
    recipe = Recipe(methods=("gptq",), scheme=Scheme(4, 32), options=options)
    made = job.plan(str(model), recipe, ids=IDS, out=out)
    made.saving = level
    job.quantize(str(model), out, recipe, ids=IDS, made=made, watch=watch)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def test_runs_that_save_memory_write_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    """Also one that goes on, saving less, from where another ended; nothing is left of files."""
    wanted = run(tiny_model, tmp_path / "none", Saving.NONE)
    assert run(tiny_model, tmp_path / "products", Saving.PRODUCTS) == wanted
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "ended", Saving.PASSES, _Ends())
    assert run(tiny_model, tmp_path / "ended", Saving.STATES) == wanted
    assert run(tiny_model, tmp_path / "whole", Saving.PASSES) == wanted
    names = {path.name for path in (tmp_path / "none" / STATE).iterdir()}
    for name in ("ended", "whole"):
        assert {path.name for path in (tmp_path / name / STATE).iterdir()} == names
    assert not spill.saves(Saving.PRODUCTS) and not mapped(tmp_path)


def test_statistics_in_passes_have_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmq.block.block import Block

    wanted = run(tiny_model, tmp_path / "once", Saving.NONE, correct="none")
    passes, plain = [], Block.observe_inputs
    monkeypatch.setattr(
        Block, "observe_inputs", lambda block, needs, states: passes.append(len(states)) or plain(block, needs, states)
    )
    assert run(tiny_model, tmp_path / "passes", Saving.PASSES, correct="none") == wanted
    assert max(passes) < 7 * 3 and len(passes) > 2 * 3


def test_a_run_whose_files_do_not_fit(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as full, pytest.raises(LlmqError, match="disk full"):
        full.setattr(os, "posix_fallocate", fail)
        run(tiny_model, tmp_path / "full", Saving.STATES)
    assert {path.name for path in (tmp_path / "full" / STATE).iterdir()} == {
        "fingerprint.json",
        "journal.jsonl",
        "lock",
    }


def test_any_number_of_hidden_states_take_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file counts towards the most that a process may have open."""
    monkeypatch.setattr(spill, "SLAB", mmap.PAGESIZE)
    monkeypatch.setattr(spill, "SHARE", 8)
    one = torch.arange(mmap.PAGESIZE).to(torch.uint8)
    with spill.saving(spill.Saving.PASSES, tmp_path):
        states = [spill.keep(one + n, spill.Saving.STATES) for n in range(300)]
        assert len(spill._state.mapped) < 50
        apart = [spill.keep(one, spill.Saving.PASSES) for _ in range(3)]
        assert len({spill._state.mapped[-n][0] for n in (1, 2, 3)}) == len(apart) == 3
        spill.rest()
        assert all(torch.equal(state, one + n) for n, state in enumerate(states))
