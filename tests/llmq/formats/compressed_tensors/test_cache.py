"""A cache in config.json, as compressed-tensors' own structures read it; the modules that stock transformers rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

from llmq import formats
from llmq.formats.compressed_tensors.cache import read_cache, rounded_by_stock, scale_shape, stored
from llmq.grids.cache import CACHES, Cache
from llmq.grids.scheme import Scheme
from tests.architectures import tiny
from tests.llmq.refusal import refused


def section(cache: Cache) -> dict[str, Any]:
    scheme = Scheme(4, 32)
    return formats.with_cache(formats.config({scheme: ["a"]}, [], torch.float32), {scheme}, cache)


@pytest.mark.parametrize("name", CACHES)
def test_compressed_tensors_reads_it(name: str) -> None:
    cache = Cache.named(name)
    read = QuantizationConfig.model_validate(section(cache)).kv_cache_scheme
    assert read.num_bits == 8 and read.symmetric and not read.dynamic
    assert read.type == ("int" if name.startswith("int8") else "float")
    assert read.strategy == (QuantizationStrategy.ATTN_HEAD if cache.heads else QuantizationStrategy.TENSOR)
    assert read_cache(section(cache)) == cache == formats.read_cache("compressed-tensors", section(cache))
    made = stored("a", cache, torch.ones(2 if cache.heads else 1), torch.ones(2 if cache.heads else 1), torch.bfloat16)
    with tiny.quiet():
        asked = rounded_by_stock(tiny.model("llama").to("meta"), section(cache))
    assert {f"{name}.k_scale" for name in asked} == {f"model.layers.{i}.self_attn.k_scale" for i in range(4)}
    assert {*asked.values()} == {scale_shape(cache, 2)} == {tuple(made["a.v_scale"].shape)}


@pytest.mark.parametrize(
    "change", [None, "x", {"num_bits": 4}, {"dynamic": True}, {"symmetric": False}, {"strategy": "token"}]
)
def test_another_cache_is_none_of_ours(change: Any) -> None:
    told = section(Cache("fp8"))
    told["kv_cache_scheme"] = told["kv_cache_scheme"] | change if isinstance(change, dict) else change
    assert read_cache(told) is None


def test_a_folder_that_is_unpacked_while_loading_has_no_rounded_cache() -> None:
    assert rounded_by_stock(tiny.model("llama"), section(Cache("fp8")) | {"dequantize": True}) == {}


def test_what_stock_would_not_load_is_refused() -> None:
    with tiny.quiet():
        refused(lambda: rounded_by_stock(tiny.model("opt").to("meta"), section(Cache("fp8"))), "OPTForCausalLM")


def test_a_head_of_small_values_keeps_a_scale() -> None:
    made = stored("a", Cache("fp8", True), torch.tensor([1e-9, 1.0]), torch.tensor([0.0, 1.0]), torch.float16)
    assert all(bool((scale > 0).all()) for scale in made.values())
