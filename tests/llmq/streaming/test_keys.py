"""Scales of keys and values: against a whole forward pass of the written weights; in stock transformers; resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.sink import Sink
from llmq.formats.inspection import inspect_folder
from llmq.grids.cache import Cache
from llmq.grids.scheme import Scheme
from llmq.inference.cache import simulate, stored_scales
from llmq.recipe.recipe import Recipe
from llmq.streaming.keys import Largest
from tests.architectures import tiny
from tests.end_to_end.test_resume import digests

IDS = tiny.tokens(4, 24)
MIXTURE = "qwen3_moe"


def quantize(kind: str, folder: Path, cache: str, **more: Any) -> llmq.Report:
    tiny.make(kind, folder / "source")
    recipe = Recipe(methods=("rtn",), scheme=Scheme(8, 32), kv_cache=cache, loader="transformers")
    with tiny.quiet():
        return llmq.quantize(str(folder / "source"), folder / "out", recipe, ids=IDS, **more)


def scales(folder: Path) -> dict[str, Tensor]:
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}


def stock(folder: Path) -> Any:
    with tiny.quiet():
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "cache"), [("llama", "int8"), ("qwen3", "int8-head"), ("gemma3_text", "fp8"), (MIXTURE, "fp8-head")]
)
def test_they_are_those_of_the_largest_keys_and_values_of_a_whole_pass(kind: str, cache: str, tmp_path: Path) -> None:
    report = quantize(kind, tmp_path, cache)
    model = stock(tmp_path / "out")
    rounded = model(IDS).logits
    for module in model.modules():
        module.quantization_enabled = False
    with torch.no_grad():
        result = model(IDS, use_cache=True)
    found, top = scales(tmp_path / "out"), 127.5 if cache.startswith("int8") else 448.0
    # A cache of windows keeps the last tokens only.
    kept = [layer for layer in result.past_key_values.layers if layer.keys.shape[2] == IDS.shape[1]]
    assert kept and len(found) == 2 * len(result.past_key_values.layers)
    for index, layer in enumerate(result.past_key_values.layers):
        if layer not in kept:
            continue
        for name, kind_of in (("k_scale", layer.keys), ("v_scale", layer.values)):
            largest = kind_of.abs().amax((0, 2, 3)) if cache.endswith("head") else kind_of.abs().max().reshape(1)
            told = found[f"model.layers.{index}.self_attn.{name}"]
            torch.testing.assert_close(told.flatten(), largest / top, rtol=2e-3, atol=0)
            assert told.shape == ((2, 1, 1) if cache.endswith("head") else (1,))
            assert torch.equal(model.get_parameter(f"model.layers.{index}.self_attn.{name}"), told)
    assert report.cache is not None and report.cache.kind == cache and len(report.cache.scales) == tiny.LAYERS
    assert str(Cache.named(cache).told) in str(report.cache)
    assert inspect_folder(tmp_path / "out").cache == Cache.named(cache)
    # Ours on the same weights, with the scales read back, is what stock transformers computes.
    count = simulate(model, tmp_path / "out", Cache.named(cache), stored_scales(tmp_path / "out", Cache.named(cache)))
    assert count == tiny.LAYERS
    torch.testing.assert_close(model(IDS).logits, rounded, rtol=0, atol=1e-5)
    assert not torch.equal(rounded, result.logits)


def test_the_weights_are_those_of_a_run_without(tmp_path: Path) -> None:
    """And llmq.load reads them, without a word on the scales."""
    quantize("llama", tmp_path, "fp8")
    recipe = Recipe(methods=("rtn",), scheme=Scheme(8, 32))
    llmq.quantize(str(tmp_path / "source"), tmp_path / "plain", recipe, ids=IDS)
    found, plain = (
        {name: tensor for file in (tmp_path / out).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for out in ("out", "plain")
    )
    assert found.keys() - plain.keys() == scales(tmp_path / "out").keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    ours, theirs = (llmq.load(tmp_path / out, device_map="cpu") for out in ("out", "plain"))
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(("kind", "after"), [("llama", 2), (MIXTURE, 4)])
def test_a_broken_run_writes_the_same_bytes(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(kind, tmp_path, "fp8")
    whole, count = digests(tmp_path / "out"), 0
    commit = Sink.commit

    def broken(self: Sink, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        commit(self, *args, **kwargs)

    recipe = Recipe(methods=("rtn",), scheme=Scheme(8, 32), kv_cache="fp8", loader="transformers")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), tiny.quiet():
        patched.setattr(Sink, "commit", broken)
        llmq.quantize(str(tmp_path / "source"), tmp_path / "broken", recipe, ids=IDS)
    with tiny.quiet():
        again = llmq.quantize(str(tmp_path / "source"), tmp_path / "broken", recipe, ids=IDS)
    assert digests(tmp_path / "broken") == whole
    assert again.cache == llmq.Report.load(tmp_path / "out").cache
    told = json.loads((tmp_path / "broken" / "report.json").read_text())["cache"]
    assert {f"{name}.k_scale" for name in told["scales"]} <= scales(tmp_path / "broken").keys()


def test_the_largest_of_several_ranks_count() -> None:
    mine = Largest({"a": (torch.tensor([1.0, 5.0]), torch.tensor([2.0]))})
    mine.merge([{"a": (torch.tensor([3.0, 4.0]), torch.tensor([1.0]))}, {"b": (torch.ones(1), torch.zeros(1))}])
    assert [one.tolist() for one in mine.found["a"]] == [[3.0, 5.0], [2.0]] and mine.found["b"][0].item() == 1
