"""`tune` without a GPU: what it would measure, what it keeps, and what it says when there is nothing to measure on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from llmq_kernels import tune
from llmq_kernels.int_linear import planes
from llmq_kernels.triton import gpu as gpus
from llmq_kernels.triton import tables
from llmq_kernels.triton.config import PLAIN, Config, Kind
from llmq_kernels.triton.rule import rule
from llmq_kernels.triton.variants import launch_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="torch finds none"):
        tune.tune([(64, 64)])


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 256, 1024])
def test_candidates_start_with_the_rule_and_serve_the_rows(rows: int) -> None:
    gpu = gpus.KNOWN[2]
    found = tune.candidates(gpu, 4, rows, 4096, 4096, 128)
    assert found[0] == rule(gpu, 4, rows, 4096, 4096, 128)
    assert any(config.family == "dense" for config in found)
    assert all(config.block_m >= rows for config in found if config.family == "one_row")
    assert all(4 * config.programs_k <= 4096 // planes.TILE[4] for config in found if config.programs_k > 1)


KINDS = [Kind("all"), Kind("rows"), Kind("", 128), Kind("", 128, True), Kind("all", 8), Kind("rows", 8, True)]


@pytest.mark.parametrize(("bits", "kind"), [*((bits, PLAIN) for bits in (2, 3, 4, 8)), *((4, kind) for kind in KINDS)])
def test_sixty_compilations_tune_a_shape(bits: int, kind: Kind) -> None:
    """Over all rows: few_rows' machine code is the same for 1 to 8 rows."""
    size = 4096 if kind.experts else 8192
    group = size if kind.codebook == "rows" else 64 if kind.codebook else 128
    for gpu in gpus.KNOWN:
        every = set()
        for rows in tune.PAIRS if kind.pairs else tune.ROUTED if kind.experts else tune.ROWS:
            found = tune.candidates(gpu, bits, rows, size, size, group, kind)
            assert found[0] == tables.ruled(gpu, bits, rows, size, size, group, kind)
            assert len(found) > 3 and (not kind.experts or all(config.programs_k == 1 for config in found))
            for config in found:
                if config.family != "dense":
                    sizes = bits, rows, size, size, group
                    made = launch_of(config, *sizes, False, torch.bfloat16, gpu.backend, kind)
                    every.add((made.kernel, *map(str, (made.constexprs, made.options))))
        assert len(every) <= 60


@pytest.mark.parametrize("kind", [Kind("rows"), Kind("", 3), Kind("all", 3, True)], ids=repr)
def test_products_of_every_kind_are_measured(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate that runs in the interpreter is right; a wrong one would warn, which is an error here."""
    timed: list[Config] = []

    def seconds(x: torch.Tensor, weights: Any, config: Config, *_: Any) -> float:
        timed.append(config)
        return 1.0

    monkeypatch.setattr(planes, "refusal", lambda *_: None)
    monkeypatch.setattr(tune, "BEYOND_CACHE", 1)
    monkeypatch.setattr(tune, "seconds", seconds)
    gpu, rows = gpus.INTERPRETER, 2 if kind.pairs else 6
    group = 64 if kind.codebook != "rows" else 256
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="skipped a configuration")
        found = tune.measure(gpu, torch.device("cpu"), 4, rows, 32, 256, group, kind=kind)
    assert [config for _, config in found] == timed
    assert {"dense", "one_row" if kind.pairs else "few_rows"} <= {config.family for config in timed}


def test_what_was_measured_is_used_for_its_kind_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, best = gpus.KNOWN[2], Config("one_row", 2, 1, 16, warps=2)
    sizes, last = (256, 512, 64), (False, torch.bfloat16)
    for kind in KINDS:
        name = tables.key(4, tables.bucket(5, kind), *sizes, *last, kind)
        monkeypatch.setattr(tables, "table", lambda _, name=name: {name: best})
        others = [other for other in (PLAIN, *KINDS) if tables.choose(gpu, 4, 5, *sizes, *last, other) == best]
        assert others == [kind]
        assert tables.choose(gpu, 4, 8, *sizes, *last, kind) == best != tables.choose(gpu, 4, 9, *sizes, *last, kind)


def test_kinds_that_there_are_not() -> None:
    assert tune.kind_of("rows", 8, True) == Kind("rows", 8, True)
    for wrong, told in (
        (("none", 0, False), "of all or rows"),
        (("", 0, True), "pairs are of"),
        (("", -1, False), "-1"),
    ):
        with pytest.raises(ValueError, match=told):
            tune.kind_of(*wrong)
    for options in ({"bits": (3,)}, {"zeros": True}):
        with pytest.raises(ValueError, match="4 bits and no zero points"):
            tune.tune([(64, 64)], kind=Kind("all"), **options)  # type: ignore[arg-type]


def test_a_stopped_run_goes_on_and_what_it_found_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, asked, compiled = gpus.KNOWN[2], [], []
    best = Config("one_row", 2, 1, 16, warps=2)

    def fastest(*arguments: object) -> tuple[float, Config]:
        asked.append(arguments[3])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return 5.0, best

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "triton_refusal", lambda _: None)
    monkeypatch.setattr(gpus, "gpu_of", lambda _: gpu)
    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune, "compile_all", lambda wanted, *_: compiled.append(list(wanted)))
    tables.table.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        tune.tune([(256, 512)], rows=[1, 2, 4])
    lines: list[str] = []
    path = tune.tune([(256, 512)], rows=[1, 2, 4], progress=lambda done, total, line: lines.append(f"{done}/{total}"))
    assert asked == [1, 2, 2, 4] and lines == ["1/3", "2/3", "3/3"]
    assert {one[2] for one in compiled[0]} == {1, 2, 4} and {one[2] for one in compiled[1]} == {2, 4}
    assert path == tables.user_table(gpu.name)
    assert tables.choose(gpu, 4, 3, 256, 512, 128, False, torch.bfloat16) == best
    for wrong, told in (({"bits": [5]}, "not 5"), ({"group_sizes": [48]}, "not 48"), ({"rows": [2048]}, "end at 1024")):
        with pytest.raises(ValueError, match=told):
            tune.tune([(256, 512)], **wrong)  # type: ignore[arg-type]
    tables.table.cache_clear()


def test_a_configuration_with_wrong_results_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it is, and what does not fit the GPU; the others are held to the dequantized weight's product."""
    gpu = gpus.INTERPRETER
    unfit = Config("one_row", 8, 1, 8, warps=1)
    right, wrong = Config("one_row", 4, 1, 8, warps=1), Config("one_row", 2, 1, 8, warps=1)
    real, fast = planes.run, {right: 2.0, wrong: 1.0, Config("dense"): 3.0}

    def run(*arguments: Any) -> torch.Tensor:
        if arguments[3] == unfit:
            raise OutOfResources(300000, 232448, "shared memory")
        return real(*arguments) * (1.5 if arguments[3] == wrong else 1)

    monkeypatch.setattr(planes, "run", run)
    monkeypatch.setattr(planes, "refusal", lambda *_: None)
    monkeypatch.setattr(tune, "BEYOND_CACHE", 1)
    monkeypatch.setattr(tune, "candidates", lambda *_: iter([unfit, *fast]))
    monkeypatch.setattr(tune, "seconds", lambda *arguments: fast[arguments[2]])
    with pytest.warns(UserWarning, match=r"wrong results on interpreter \(relative error 0\.5\).*block_n=2"):
        microseconds, config = tune.fastest(gpu, torch.device("cpu"), 4, 1, 32, 256, 128)
    assert config == right and microseconds == pytest.approx(2e6)


@pytest.mark.parametrize(
    "change",
    [{"family": "fast"}, {"block_n": 3}, {"warps": 0}, {"stages": "2"}, {"block_m": None}, {"blocks": 4}, {"pdl": 1}],
)
def test_a_damaged_table_is_named(change: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    whole = tables.entry(Config("one_row", 2, 1, 16, warps=2), 5.0)
    file.write_text(json.dumps({"measured": {"a": whole}}))
    assert tables.read_table(file) == {"a": Config("one_row", 2, 1, 16, warps=2)}
    file.write_text(json.dumps({"measured": {"a": {"config": whole["config"] | change}}}))
    with pytest.raises(ValueError, match=r"gpu\.json: not a table .*; delete it and run llmq tune"):
        tables.read_table(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"gpu\.json"):
        tables.read_table(file)
