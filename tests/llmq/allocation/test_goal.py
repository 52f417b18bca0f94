"""Budgets and candidates as they are asked for."""

from __future__ import annotations

import pytest

from llmq.allocation.goal import USUAL, Fit, Goal, Latency, parse_candidates
from llmq.grids.scheme import Activations, Scheme
from llmq.machine import has_cuda
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

BASE = Scheme(4, 64)


def test_candidates() -> None:
    assert parse_candidates(USUAL, BASE) == (*(Scheme(b, 64) for b in (2, 3, 4, 5, 6, 8)), None)
    assert parse_candidates("2g32, 3a,4channel,none", BASE) == (
        Scheme(2, 32),
        Scheme(3, 64, symmetric=False),
        Scheme(4, None),
        None,
    )
    assert parse_candidates("fp8,4,4", Scheme(4, 128)) == (Scheme(8, None, grid="fp8"), Scheme(4, 128))
    assert parse_candidates("nf4", Scheme(4, 64)) == (Scheme(4, 64, grid="nf4"),)
    mixed = parse_candidates("q2_k,q4_k,q6_k", Scheme(4, 32, False, "q4_k"))
    assert [(one.symmetric, one.group_size) for one in mixed if one] == [(False, 16), (False, 32), (True, 16)]
    rounding = Scheme(8, None, activations=Activations())
    assert parse_candidates("4g128", rounding) == (Scheme(4, 128),)


@pytest.mark.parametrize("text", ["", "2,x", "4g", "16", "none,16", "9", "4g1", "fp9"])
def test_what_is_no_candidate_is_refused(text: str) -> None:
    refused(lambda: parse_candidates(text, BASE), "--candidates" if text not in ("9", "4g1") else "must be")


def test_goals() -> None:
    refused(lambda: Goal(), "budget")
    refused(lambda: Goal(bits=3, nbytes=5), "--target-bits", "--target-size", "one of them")
    refused(lambda: Goal(bits=3, fit=Fit(1 << 30)), "--fit")
    refused(lambda: Goal(bits=-1.0), "--target-bits", "-1")
    refused(lambda: Goal(kl=0.0), "--max-kl")
    refused(lambda: Latency(0), "--target-latency", "above 0")
    refused(lambda: Latency(40, serve="vllm"), "--target-latency", "vLLM", "--serve cpu")
    if not has_cuda():
        refused(lambda: Latency(40, serve="cuda"), "--target-latency", "no GPU")
    assert Goal(bits=3, latency=Latency(40)).latency == Latency(40, 4096, 1, "cpu")
    assert Goal(bits=3).schemes(Recipe(scheme=BASE)) == parse_candidates(USUAL, BASE)
    assert Goal(bits=3, candidates=(BASE,)).schemes(Recipe()) == (BASE,)


def test_a_goal_in_words() -> None:
    assert Goal(bits=3.2, kl=0.02).told() == "3.2 bits per weight and a divergence of 0.02 nats"
    assert Goal(nbytes=5 << 30).told() == "a folder of 5.00 GiB"
    fit = Fit(24 << 30, context=32768, batch=2)
    assert Goal(fit=fit).told() == "24.00 GiB of memory with 2 × 32,768 tokens"
    assert Goal(bits=4, latency=Latency(12.5)).told() == "4 bits per weight and 12.5 ms a token with 1 × 4,096 tokens"
