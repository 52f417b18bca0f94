"""Weights of which a server makes one matrix: who they are, what is refused, and that the options given mend it."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import formats, job
from llmq.cli.options import recipe_options
from llmq.discovery.reasons import Kind, Reason
from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.fused import apart, check_fused, families
from llmq.planning.weights import BY_USER, WeightPlan
from llmq.recipe.recipe import Recipe
from tests.conftest import Run
from tests.llmq.planning.made import IDS, item, make
from tests.llmq.refusal import refused

FOUR, EIGHT, ODD = Scheme(4, 32), Scheme(8, 32), Scheme(4, 32, False)
STATIC = Scheme(8, None, activations=Activations(dynamic=False, range="kl"))


def test_siblings_with_one_input_are_a_family() -> None:
    attention = [item(f"x.0.attn.{n}", scheme=FOUR) for n in "qkv"]
    others = [
        item("x.0.mlp.up", scheme=FOUR),  # a parallel MLP: the same input, another parent
        item("x.0.attn.o", scheme=FOUR, input_id=1),
        item("x.1.attn.q", scheme=FOUR, block=1),
        item("x.0.attn.unused", reason=Reason(Kind.NOT_LOADABLE, "it is not loadable")),
        item("head", reason=Reason(Kind.OUTSIDE, "outside"), block=None),
    ]
    assert families([*attention, *others]) == [attention]
    assert not apart([*attention, *others])


def test_gates_are_a_family_of_their_own() -> None:
    """As in a gated delta net: qkv and z, and beside them a and b with one output per head."""
    large = [item("x.0.net.qkv", (8192, 64), FOUR), item("x.0.net.z", (4096, 64), FOUR)]
    gates = [item("x.0.net.a", (32, 64), reason=BY_USER), item("x.0.net.b", (32, 64), reason=BY_USER)]
    assert families([*large, *gates]) == [gates, large] and not apart([*large, *gates])
    assert apart([*large, gates[0], replace(gates[1], scheme=FOUR, reason=None)])


@pytest.mark.parametrize("heads", [16, 40, 64, 128])
def test_keys_and_values_of_one_head_beside_many_of_queries_are_no_gates(heads: int) -> None:
    """vLLM makes one matrix of them: with another symmetry of the queries alone it is wrong without a word."""
    parts = [item("x.0.a.q", (heads * 64, 64), EIGHT), *(item(f"x.0.a.{n}", (64, 64), FOUR) for n in "kv")]
    assert families(parts) == [parts] and apart(parts) == [parts]


@pytest.mark.parametrize("kind", [Kind.BY_USER, Kind.INDIVISIBLE])
def test_a_part_that_is_left_alone_is_refused(kind: Kind) -> None:
    items = [item("x.0.attn.q", reason=Reason(kind, "left")), item("x.0.attn.k", scheme=FOUR)]
    refused(lambda: check_fused(items, Recipe(scheme=FOUR)), "x.0.attn", "q not quantized", "--keep 're:", "--loader")
    check_fused(items, Recipe(scheme=FOUR, loader="transformers"))


def test_two_latent_projections_are_a_family_although_some_servers_keep_them_apart() -> None:
    """vLLM joins them in one model and not in another of the same structure: the message says what to do there."""
    items = [item("x.0.attn.q_a", (768, 64), EIGHT), item("x.0.attn.kv_a", (288, 64), FOUR)]
    refused(lambda: check_fused(items, Recipe(scheme=FOUR)), "--loader transformers", "that it keeps these apart")
    check_fused(items, Recipe(scheme=FOUR, loader="transformers"))


CASES: dict[str, dict[str, Any]] = {
    "symmetry": {"overrides": (("q_proj", ODD),)},
    "bits": {"overrides": (("v_proj", EIGHT),)},
    "bits in one block": {"overrides": (("layers.1.self_attn.k_proj", EIGHT),)},
    "two blocks": {"overrides": ((r"re:layers\.[02].*up_proj", EIGHT),)},
    "keep": {"keep": ("q_proj",)},
    "keep in one block, and another weight": {"keep": ("layers.2.mlp.up_proj", "o_proj")},
    "kept and 8 bits": {"keep": ("k_proj",), "overrides": (("v_proj", EIGHT),)},
    "attention and mlp": {"overrides": (("q_proj", EIGHT), ("up_proj", Scheme(4, None)))},
    "attention kept, mlp changed": {"keep": ("k_proj",), "overrides": (("gate_proj", Scheme(8, None)),)},
    "inputs": {"overrides": (("q_proj", replace(STATIC, activations=Activations())),)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_options_of_the_message_mend_it(name: str, tiny_model: Path) -> None:
    recipe = Recipe(scheme=FOUR, methods=("rtn",), **CASES[name])
    said = refused(lambda: job.plan(str(tiny_model), recipe, ids=IDS), "servers such as vLLM", "--loader transformers")
    options = shlex.split(re.search(r"one scheme for all of them, (.*); or --loader", said)[1])  # type: ignore[index]
    keep, override = (
        [value for flag, value in itertools.pairwise(options) if flag == wanted] for wanted in ("--keep", "--override")
    )
    given = recipe_options(override=override, bits=4, group_size="32", method="rtn")
    mended = replace(recipe, keep=tuple(keep) or recipe.keep, overrides=(*recipe.overrides, *given.overrides))
    before = job.plan(str(tiny_model), replace(recipe, loader="transformers"), ids=IDS)
    after = job.plan(str(tiny_model), mended, ids=IDS)
    assert not apart(after.weights)
    # Only weights of the families that were apart change, and what the user asked for stays as it was.
    wrong = {i.name for family in apart(before.weights) for i in family}
    changed = {a.name for a, b in zip(after.weights, before.weights, strict=True) if a.scheme != b.scheme}
    assert changed and changed < wrong


def test_a_scheme_that_no_option_can_write_is_given_as_yaml(tiny_model: Path) -> None:
    recipe = Recipe(scheme=FOUR, methods=("rtn",), overrides=(("q_proj", STATIC),))
    said = refused(lambda: job.plan(str(tiny_model), recipe, ids=IDS), "in a recipe file, overrides: {")
    data = json.loads(re.search(r"overrides: (\{.*\}); or", said)[1])  # type: ignore[index]
    mended = Recipe.from_dict({"methods": "rtn", "scheme": {"group_size": 32}, "overrides": data})
    plan = job.plan(str(tiny_model), mended, ids=IDS)
    assert {i.scheme for i in plan.weights if i.name.endswith(("q_proj", "v_proj"))} == {STATIC}


def test_every_combination_of_fused_weights_is_refused_unless_all_are_alike() -> None:
    schemes = [Scheme(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]
    for parts in (("q", "k", "v"), ("gate", "up")):
        for chosen in itertools.product([*schemes, None], repeat=len(parts)):
            items: list[WeightPlan] = [
                item(f"x.0.m.{part}", scheme=scheme, reason=None if scheme else BY_USER)
                for part, scheme in zip(parts, chosen, strict=True)
            ]
            if len(set(chosen)) == 1:
                check_fused(items, Recipe(scheme=FOUR))
            else:
                with pytest.raises(LlmqError, match="--loader transformers"):
                    check_fused(items, Recipe(scheme=FOUR))


def test_whole_blocks_and_whole_families_may_be_kept(tiny_model: Path) -> None:
    for keep in (("layers.0",), ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("down_proj", "self_attn")):
        assert make(tiny_model, keep=keep)
    assert make(tiny_model, overrides=(("mlp", EIGHT), ("o_proj", EIGHT)))


def test_transformers_only_is_said_everywhere(tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    command = ("quantize", tiny_model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", "32")
    done = llmq(*command, "--override", "q_proj=bits:8")
    assert done.returncode == 2 and "--loader transformers" in done.stderr and not (tmp_path / "out").exists()
    done = llmq(*command, "--override", "q_proj=bits:8", "--loader", "transformers")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert formats.vllm.APART.sentence in report["loaders"] and report["examples"] == {"transformers": True}
    assert formats.vllm.APART.sentence in report["warnings"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not for vLLM" in card and "from vllm" not in card
    # The report's recipe, as a file, repeats the run.
    assert Recipe.from_dict(report["recipe"]).loader == "transformers"
    assert job.plan(str(tiny_model), Recipe.from_dict(report["recipe"]), ids=torch.arange(64).view(2, 32))
    refused(lambda: Recipe(loader="sglang"), "loader 'sglang' is not known", "any, transformers, vllm, llmq")
