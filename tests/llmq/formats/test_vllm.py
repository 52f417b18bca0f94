"""What is said of vLLM: only what the table has, and of every scheme of a folder."""

from __future__ import annotations

from typing import Any

import pytest

from llmq.formats import vllm
from llmq.grids.scheme import Activations, Scheme

TABLE: dict[str, Any] = {
    "vllm": "1.2",
    "schemes": {
        "4-bit g32 symmetric": {"cpu": {"rms": 0.0012, "kernels": ["K"]}, "cuda": {"8.0": "Marlin", "9.0": "Machete"}},
        "8-bit g32 symmetric": {"cpu": {"rms": 0.0023, "kernels": ["K"]}, "cuda": {"8.0": "Marlin", "9.0": "Marlin"}},
        "3-bit g32 symmetric": {"cpu": {"refused": "no kernel", "plain_rms": 0.002}, "cuda": {"8.0": "Humming"}},
        "nf4 g64": {"cpu": {"refused": "unknown"}, "cuda": {"refused": "unknown method"}},
        "8-bit channel symmetric, static (minmax) activations": {"cpu": {"rms": 0.1}, "cuda": {"8.0": "Cutlass"}},
    },
}
FOUR, EIGHT, THREE = Scheme(4, 32), Scheme(8, 32), Scheme(3, 32)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "table", lambda: TABLE)


@pytest.mark.parametrize(
    ("schemes", "tried", "code", "words"),
    [
        (
            [FOUR],
            True,
            "vllm",
            "vLLM 1.2 loads this format: with it a demo model ran on the CPU, log-probabilities 0.0012 (rms)",
        ),
        (
            [FOUR, EIGHT],
            True,
            "vllm",
            "0.0023 (rms) from the dequantized weights'; other architectures: docs/vllm.md; on NVIDIA GPUs its rules",
        ),
        (
            [FOUR, THREE],
            False,
            "vllm",
            "no CPU kernel for 3-bit g32 symmetric; on NVIDIA GPUs of compute capability 8.0 its",
        ),
        ([Scheme(4, 64, grid="nf4")], False, None, "vLLM 1.2 does not load nf4 g64: unknown method"),
        ([FOUR, Scheme(4, 48)], False, None, "4-bit g48 symmetric: not tried with vLLM 1.2"),
    ],
)
def test_a_folder_is_as_its_schemes(schemes: list[Scheme], tried: bool, code: str | None, words: str) -> None:
    said = vllm.loader(schemes)
    assert (said.tried, said.code) == (tried, code) and words in said.sentence


def test_every_way_to_find_a_static_scale_has_one_row() -> None:
    static = Scheme(8, None, activations=Activations(dynamic=False, range="kl"))
    assert "0.1000 (rms)" in vllm.loader([static]).sentence


def test_the_written_table_has_every_usual_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    known = vllm.table()
    assert known["vllm"] and known["date"]
    for bits in range(2, 9):
        for group in (32, 64, 128, None):
            for symmetric in (True, False):
                scheme = Scheme(bits, group, symmetric)
                cpu = known["schemes"][vllm.name_of(scheme)]["cpu"]
                assert cpu.get("rms", cpu.get("plain_rms", 1)) <= 0.003
                said = vllm.loader([scheme])
                assert said.code == "vllm" and said.tried is (bits == 4)
    like = [Scheme(2, 64, grid="ternary"), Scheme(2, None, grid="binary"), Scheme(4, 128, scales="pow2")]
    for scheme in (Scheme(8, None, activations=Activations()), Scheme(8, None, grid="fp8"), *like):
        assert "not tried" not in vllm.loader([scheme]).sentence
    for row in known["schemes"].values():
        cpu = row["cpu"]
        assert "refused" in row["cuda"] or "rms" in cpu or cpu.get("plain_rms", 0) <= 0.003
