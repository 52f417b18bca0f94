"""The options of a budget: what goal they make, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq.allocation.goal import Fit, Goal, Latency
from llmq.cli.goals import goal_of
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.conftest import Run
from tests.llmq.refusal import refused

RECIPE = Recipe(scheme=Scheme(4, 16))


def test_goals_of_options() -> None:
    assert goal_of(RECIPE) is None
    assert goal_of(RECIPE, target_bits=3.2, max_kl=0.1) == Goal(bits=3.2, kl=0.1)
    assert goal_of(RECIPE, target_size="1.5MB", score="linear", prove=False) == Goal(
        nbytes=1_500_000, score="linear", prove=False
    )
    assert goal_of(RECIPE, target_bits=3, candidates="2,16") == Goal(bits=3, candidates=(Scheme(2, 16), None))
    refused(lambda: goal_of(RECIPE, candidates="2,3"), "--candidates", "--target-bits")
    assert goal_of(RECIPE, fit="2GiB", context="2k", batch=3, serve="vllm") == Goal(fit=Fit(2 << 30, 2048, 3, "vllm"))
    assert goal_of(RECIPE, fit="1.5GB", serve="cpu") == Goal(fit=Fit(1_500_000_000))
    refused(lambda: goal_of(RECIPE, target_bits=3, context="2k"), "--context", "--fit", "--target-latency")
    timed = Goal(bits=3, latency=Latency(500, 2048, 2, "cpu"))
    assert goal_of(RECIPE, target_bits=3, target_latency="0.5s", context="2k", batch=2, serve="cpu") == timed
    assert goal_of(RECIPE, target_latency="40", serve="cpu") == Goal(latency=Latency(40))
    refused(lambda: goal_of(RECIPE, target_latency="fast"), "--target-latency", "40ms")
    refused(lambda: goal_of(RECIPE, fit="2GiB", context="long"), "--context", "32k")
    refused(lambda: goal_of(RECIPE, fit="2GiB", serve="tpu"), "--serve", "vllm")
    refused(lambda: goal_of(RECIPE, target_size="big"), "--target-size", "24GiB")
    refused(lambda: goal_of(RECIPE, target_bits=3, score="hawk"), "hawk", "linear")


def test_the_command_takes_them(llmq: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["--group-size", "16", "--calib", str(text_file), "--samples", "8", "--seqlen", "32"]
    out = tmp_path / "out"
    told = llmq("quantize", str(tiny_model), "-o", str(out), "--target-bits", "4.2", "--score", "linear", *common)
    assert "4.2 bits per weight" in " ".join(told.stdout.split())
    assert (out / "recipe.yaml").is_file()
    planned = llmq("plan", str(tiny_model), "--target-bits", "4.2", *common)
    assert "4.2 bits per weight" in " ".join(planned.stdout.split())


@pytest.mark.parametrize(
    "option", ["--target-bits", "--target-size", "--max-kl", "--candidates", "--score", "--target-latency"]
)
def test_help_teaches(llmq: Run, option: str) -> None:
    assert option in llmq("quantize", "--help").stdout
