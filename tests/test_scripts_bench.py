"""The benchmarks of scripts/, on sizes of a few seconds: what was run has times, and what is wrong has none."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.grids.scheme import Scheme

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module, by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def run_kernels(script: Any, out: Path, *options: str) -> dict[str, Any]:
    script("bench_kernels").main(
        ["-o", str(out), "--device", "cpu", "--shapes", "64x128", "--seconds", "0.05", *options]
    )
    report: dict[str, Any] = json.loads(out.read_text())
    return report


@pytest.mark.slow
def test_every_operator_that_ran_has_a_time(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_kernels(script, tmp_path / "report.json", "--rows", "1,5")
    assert [(cell["shape"], cell["rows"]) for cell in report["cells"]] == [([64, 128], 1), ([64, 128], 5)]
    for cell in report["cells"]:
        ran = {name: result for name, result in cell["operators"].items() if result["state"] != "absent"}
        ours = {"llmq int", "llmq nf4", "llmq int8", "llmq float8"}
        assert ours | {"torch", "torch int4", "bitsandbytes nf4"} <= set(ran), cell
        for name, result in ran.items():
            assert result["state"] == "ok", (name, result)
            assert result["error"] < 0.02
            assert all(math.isfinite(result[key]) and result[key] > 0 for key in ("ms", "limit_ms", "ratio")), name
        assert cell["operators"]["gemlite"] == {"state": "absent", "reason": "needs a GPU"}
        bf16, int4 = cell["operators"]["torch"], cell["operators"]["torch int4"]
        assert bf16["bytes"] == 64 * 128 * 2
        assert int4["bytes"] == 64 * 128 // 2 + 64 * 2 * 2
        moved = int4["bytes"] + cell["rows"] * (64 + 128) * 2
        assert int4["limit_ms"] == pytest.approx(1e3 * moved / cell["copy_bandwidth"])
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert "64x128" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths(script: Any, tmp_path: Path, bits: int, asymmetric: bool) -> None:
    options = ["--bits", str(bits), "--rows", "3", "--operators", "llmq int,torch int4", "--group-size", "32"]
    report = run_kernels(script, tmp_path / "report.json", *options, *["--asymmetric"] * asymmetric)
    operators = report["cells"][0]["operators"]
    assert operators["llmq int"]["state"] == "ok", operators
    assert operators["torch int4"]["state"] == "absent"


def lose_last(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, -1] = 0
    return y


def swap_rows(y: Tensor) -> Tensor:
    return y.flip(0)


def double(y: Tensor) -> Tensor:
    return y * 2


def not_a_number(y: Tensor) -> Tensor:
    return y * math.nan


@pytest.mark.slow
@pytest.mark.parametrize("fault", [lose_last, swap_rows, double, not_a_number])
def test_a_wrong_operator_gets_no_time(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    operators = script("bench_operators")

    def wrong(weight: Any) -> Any:
        right = operators.torch_dense(weight)
        return operators.Prepared(
            right.tensors, lambda w: lambda x: fault(torch.nn.functional.linear(x, w)), right.expected
        )

    monkeypatch.setitem(operators.OPERATORS, "torch int4", wrong)
    report = run_kernels(script, tmp_path / "report.json", "--rows", "8", "--operators", "torch int4")
    results = report["cells"][0]["operators"]
    assert results["torch"]["state"] == "ok"
    assert results["torch int4"]["state"] == "WRONG"
    assert "ms" not in results["torch int4"] and "ratio" not in results["torch int4"]
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_an_operator_that_raises_does_not_end_the_run(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = script("bench_operators")

    def broken(weight: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(operators.OPERATORS, "gemlite", broken)
    report = run_kernels(script, tmp_path / "report.json", "--rows", "1", "--operators", "gemlite")
    results = report["cells"][0]["operators"]
    assert results["gemlite"] == {"state": "failed", "reason": "RuntimeError: no such kernel"}
    assert results["torch"]["ms"] > 0


@pytest.mark.slow
def test_resume_measures_what_is_lacking(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    first = run_kernels(script, out, "--rows", "1", "--operators", "torch")
    second = run_kernels(script, out, "--rows", "1,2", "--operators", "torch", "--resume")
    assert second["cells"][0] == first["cells"][0]
    assert [cell["rows"] for cell in second["cells"]] == [1, 2]
    with pytest.raises(SystemExit, match="bits 4, not 3"):
        run_kernels(script, out, "--rows", "1", "--operators", "torch", "--bits", "3", "--resume")


def test_shapes(script: Any) -> None:
    kernels = script("bench_kernels")
    assert kernels.parse_shapes("8192,64x128,8192x8192") == [(8192, 8192), (64, 128)]
    assert (4096, 14336) in kernels.parse_shapes("llama8b")
    with pytest.raises(ValueError):
        kernels.parse_shapes("llama9b")


@pytest.mark.slow
def test_a_whole_model(script: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = script("bench_decode")
    options = ["--kinds", "bf16", "--work", str(tmp_path), "--prefill", "16", "--tokens", "3", "--rounds", "2"]
    monkeypatch.setattr(
        "sys.argv", ["bench", str(tiny_model), "-o", str(tmp_path / "out.json"), "--device", "cpu", *options]
    )
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    decode.main()
    result = json.loads((tmp_path / "out.json").read_text())["results"]["bf16"]
    assert result["loaded"]["rss"] > result["loaded"]["before"] > 0
    for name in ("prefill", "decode"):
        assert len(result[name]["seconds"]) == 2 and min(result[name]["seconds"]) > 0


def test_quality_is_measured_on_any_grid(script: Any) -> None:
    """A scheme names its grid, and a method is left out only where it says that it does not round to it."""
    quality = script("bench_quality")
    assert quality.parse_scheme("fp8:8gc") == Scheme(8, None, grid="fp8")
    assert quality.parse_scheme("3g64a") == Scheme(3, 64, False)
    assert quality.parse_scheme("4gcp") == Scheme(4, None, scales="pow2")
    assert quality.parse_scheme("ternary:2g64l") == Scheme(2, 64, grid="ternary", packing="llmq")
    nf4 = quality.parse_scheme("nf4")
    assert quality.rounds("awq+gptq", nf4) and quality.rounds("nf4", nf4) and not quality.rounds("nf4", Scheme())


def test_variants_of_experts_and_what_their_differences_are_worth(script: Any) -> None:
    experts = script("bench_experts")
    assert experts.parse_variant("awq+gptq:all") == (("awq", "gptq"), "all", 32)
    assert experts.parse_variant("gptq:8") == (("gptq",), "own", 8)
    names, route, prior = experts.parse_variant("gptq:own")
    assert (names, route) == (("gptq",), "own") and 0 < prior < 1e-6
    ids = torch.arange(10 * 4 + 3)
    assert experts.spread(ids, 4, 5).tolist() == [[8 * i + j for j in range(4)] for i in range(5)]
    moved = {tuple(experts.spread(ids, 4, 1, seed)[0].tolist()) for seed in range(4)}
    assert len(moved) == 4 and all(first % 4 == 0 for first, *_ in moved)
    # Windows that all differ by as much are no noise; seeds that differ are.
    assert experts.difference([[1.0, 2.0, 3.0]], [[0.5, 1.5, 2.5]]) == (pytest.approx(0.5), pytest.approx(0))
    mean, error = experts.difference([[1.0, 3.0]], [[0.0, 0.0]])
    assert (mean, error) == (2, pytest.approx(1))
    mean, error = experts.difference([[1.0, 1.0], [3.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (mean, error) == (2, pytest.approx(1))


def test_a_table_of_variants_has_each_difference_to_the_first(script: Any) -> None:
    experts = script("bench_experts")

    def result(variant: str, samples: int, seed: int, kl: float, errors: tuple[float, float]) -> Any:
        each = [(0, e, 20 * samples * e, error) for e, error in enumerate(errors)]
        return experts.Result(variant, "3g64", samples, seed, [kl, kl], [1.0, 1.0], each)

    results = [result("gptq", 4, seed, 0.02, (0.1, 0.4)) for seed in range(2)]
    results += [result("gptq:all", 4, seed, 0.03, (0.2, 0.2)) for seed in range(2)]
    results += [result("rtn", 0, 0, 0.05, (0.8, 0.2))]
    lines = list(experts.table(results, 1.0, "gptq"))
    assert lines[2:] == [
        "| 3g64 | 4 × 2 | gptq | 2.718 (+0.00%) | 0.02000 |  | 0.2000 |",
        "| 3g64 | 4 × 2 | gptq:all | 2.718 (+0.00%) | 0.03000 | +0.01000 ± 0.00000 | 0.2000 |",
        "| 3g64 | 4 × 2 | rtn | 2.718 (+0.00%) | 0.05000 | +0.03000 ± 0.00000 | 0.4000 |",
    ]
    lines = list(experts.by_tokens(results, "3g64", ["gptq", "gptq:all", "rtn"]))
    assert lines[2:] == ["| 0–0 | 2 | 0.1000 | 0.2000 | 0.8000 |", "| 48–127 | 2 | 0.4000 | 0.2000 | 0.2000 |"]


def test_several_runs_of_quantize_are_one_table_with_ratios_to_the_first(script: Any) -> None:
    bench = script("bench_quantize")
    report = {"bits_per_weight": 4.1, "source_bytes": 1 << 31, "bytes": 1 << 29, "predicted_memory": 3 << 30}
    runs = [
        bench.Run("--method gptq", 20.0, 30.0, 2 << 30, report),
        bench.Run("--method vq", 50.0, 90.0, 4 << 30, report),
    ]
    told = bench.told(runs[1], 5.0)
    assert (
        told.startswith("--method vq: 50 s, 10.0 x reading 2.00 GiB")
        and "peak 4.00 GiB, predicted 3.00 (-25 %)" in told
    )
    columns = [list(column.cells) for column in bench.table(runs).columns]
    assert (
        columns[0] == ["--method gptq", "--method vq"] and columns[3] == ["30", "90"] and columns[4] == ["1.00", "3.00"]
    )


def test_every_stage_is_timed_and_time_belongs_to_the_innermost(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, bench = script("stages"), script("bench_quantize")
    clock, now = stages.Clock(), [0.0]
    monkeypatch.setattr(clock, "_now", lambda: (now[0], 2 * now[0]))
    clock.last = (0.0, 0.0)

    def spend(seconds: float, *inner: Any) -> None:
        now[0] += seconds
        for call in inner:
            call()

    forward = clock.timed(lambda: spend(3, clock.timed(lambda: spend(2), "statistics")), "forward")
    forward()
    clock.timed(lambda: spend(1, forward), "verify")()
    now[0] += 4
    clock.settle()
    assert clock.times == {"rest": [4, 8], "forward": [3, 6], "statistics": [2, 4], "verify": [6, 12]}
    run = bench.Run("--method gptq", 20.0, 30.0, 2 << 30, {}, {"read": (1.0, 2.0)})
    assert [list(column.cells) for column in bench.stage_table([run]).columns] == [["--method gptq"], ["2.0"]]
    # What is wrapped exists, and is found where the product looks it up.
    for place in stages.STAGES:
        module, _, path = place.partition(":")
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found)
