"""What a plan says of a rounded cache, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq import job
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.planning.made import IDS, make
from tests.llmq.refusal import refused


def test_a_plan_names_the_scales_and_what_reads_them(tiny_model: Path) -> None:
    made = make(tiny_model, kv_cache="fp8")
    assert made.cache is not None and made.cache.stock == 3 and not made.cache.without
    names = {f"model.layers.{i}.self_attn.{k}_scale" for i in range(3) for k in "kv"}
    assert made.cache.stored(made.dtype) == dict.fromkeys(names, (made.dtype, (1,)))
    told = made.loaders[-1].sentence
    assert "fp8" in told and "vLLM" in told and "saves no memory" in told
    assert job.config(made)["quantization_config"]["kv_cache_scheme"]["type"] == "float"
    assert make(tiny_model).cache is None


def test_rounding_to_nearest_needs_text_then(tiny_model: Path) -> None:
    assert make(tiny_model, methods=("rtn",), kv_cache="fp8").ids.shape == IDS.shape


def test_int8_is_for_those_who_name_the_loader(tiny_model: Path) -> None:
    words = ("vLLM refuses", "--kv-cache fp8-head", "int8_per_token_head", "--loader transformers")
    refused(lambda: make(tiny_model, kv_cache="int8-head"), *words)
    refused(lambda: make(tiny_model, kv_cache="int8", loader="vllm"), "vLLM refuses")
    made = make(tiny_model, kv_cache="int8-head", loader="transformers")
    assert made.loaders[-1].warn and "not for vLLM" in made.loaders[-1].sentence


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mamba2", ("--kv-cache fp8", "keeps no keys and values")),
        # Stock transformers asks its configuration for a number that it does not have.
        ("opt", ("stock transformers would not load", "--loader llmq")),
    ],
)
def test_models_without_keys_or_that_stock_would_not_load_are_refused(
    kind: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    tiny.make(kind, tmp_path)
    with tiny.quiet():
        refused(lambda: make(tmp_path, methods=("rtn",), kv_cache="fp8"), *words)
        if kind == "opt":
            made = make(tmp_path, methods=("rtn",), kv_cache="fp8", loader="llmq")
            assert made.cache is not None and len(made.cache.modules) == 4


def test_layers_that_keep_states_are_named(tmp_path: Path) -> None:
    tiny.make("qwen3_next", tmp_path)
    with tiny.quiet():
        made = make(tmp_path, methods=("rtn",), kv_cache="fp8")
    assert made.cache is not None and 0 < len(made.cache.modules) < 4
    assert len(made.cache.modules) + len(made.cache.without) == 4
    assert any(made.cache.without[0] in told and "no keys and values" in told for told in made.warnings)


def test_formats_and_classes_without_a_place_for_it_are_refused(tiny_model: Path) -> None:
    def plan(recipe: Recipe) -> None:
        job.plan(str(tiny_model), recipe, ids=IDS)

    refused(lambda: plan(Recipe(("nf4",), Scheme(4, 64, grid="nf4"), kv_cache="fp8")), "no place")
    refused(lambda: plan(Recipe(("rtn",), Scheme(4, 32), model_class="AutoModel", kv_cache="fp8")), "--class")
    refused(lambda: Recipe(kv_cache="fp4"), "fp8-head")
