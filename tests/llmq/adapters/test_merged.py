"""A base with an adapter merged in: against PEFT's own merge and stock bitsandbytes; adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.source import FolderSource

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from llmq.adapters.lora import Adapter
from llmq.adapters.merged import Merged, open_base, quantizable, stores_transposed
from llmq.formats.bitsandbytes.source import NF4Source
from tests.llmq.adapters.made import load, nf4, renamed, widened, write_adapter
from tests.llmq.refusal import refused


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"layers.0.*.up_proj": 32}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_as_peft_merges(tmp_path: Path, tiny_model: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel

    folder = write_adapter(tmp_path / "adapter", tiny_model, **options)
    check(Merged(FolderSource(tiny_model), Adapter(folder)), PeftModel.from_pretrained(load(tiny_model), folder))


def test_as_peft_merges_weights_that_are_stores_transposed(tmp_path: Path, turned_model: Path) -> None:
    from peft import PeftModel

    folder = write_adapter(tmp_path / "adapter", turned_model, fan_in_fan_out=True)
    check(Merged(FolderSource(turned_model), Adapter(folder)), PeftModel.from_pretrained(load(turned_model), folder))


def check(merged: Merged, model: Any) -> None:
    """Every tensor of the merged source is the parameter of PEFT's merged model that it fills, and some differ."""
    expected = model.merge_and_unload().state_dict()
    changed = 0
    for name in merged.names():
        value = merged.read(name)
        key = name if name in expected else f"transformer.{name}"
        assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(value, merged.base.read(name))
        assert torch.equal(merged.read_rows(name, 1, 3), value[1:3])
    assert changed == len(merged.adapter.factors)


@pytest.mark.parametrize("kind", ["tiny_model", "turned_model"])
def test_trained_on_nf4(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    """The weights that stock transformers and bitsandbytes compute with, and the adapter's change added to them."""
    import bitsandbytes as bnb

    base: Path = request.getfixturevalue(kind)
    folder = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj", "c_fc"])
    merged = Merged(FolderSource(base), Adapter(folder), "nf4")
    plain = Merged(FolderSource(base), Adapter(folder), "base")
    model = load(base, quantization_config=nf4())
    modules = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    rounded = {n.removeprefix("transformer."): n for n in modules}
    assert len(merged.changes) == len(modules) > len(merged.adapter.factors)
    for name, change in merged.changes.items():
        module = modules[rounded[name.removesuffix(".weight").removeprefix("transformer.")]]
        value = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        value = value.t() if change.transposed else value
        delta = 0.0 if change.factors is None else plain.exact(name)[0] - FolderSource(base).read(name)
        assert torch.allclose(merged.read(name), value + delta, rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(merged.read(name), plain.read(name), atol=1e-3)


def test_an_adapter_of_a_tied_weight(tmp_path: Path, turned_model: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", turned_model, target_modules=["lm_head"])
    refused(lambda: Merged(FolderSource(turned_model), Adapter(folder)), "lm_head", "is shared with another module")


def test_linear_layers_are_found_whichever_way_they_lie(turned_model: Path) -> None:
    """The output layer is none of those made NF4."""
    model = load(turned_model)
    names = quantizable(model)
    assert "lm_head" not in names and len(names) == 8
    assert all(stores_transposed(model.get_submodule(name)) for name in names)


def test_the_modules_made_nf4_are_those_of_stock_transformers(tiny_model: Path) -> None:
    import bitsandbytes as bnb

    stock = load(tiny_model, quantization_config=nf4())
    expected = [name for name, module in stock.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert quantizable(load(tiny_model)) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "model.layers.7.mlp.down_proj, which this model does not have: give the base it was trained on"),
        (widened, "model.layers.1.mlp.down_proj by [64, 96], and the weight is [64, 128]"),
    ],
)
def test_the_first_weight_that_does_not_fit_is_named(
    tmp_path: Path,
    tiny_model: Path,
    adapter: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file)
    refused(lambda: Merged(FolderSource(tiny_model), Adapter(folder)), str(folder), str(tiny_model), words)


def with_record(adapter: Path, folder: Path, **base: Any) -> Adapter:
    """The adapter with a record of what it was trained on."""
    shutil.copytree(adapter, folder)
    (folder / "finetune.json").write_text(json.dumps({"base": base}))
    return Adapter(folder)


def test_what_it_was_trained_on(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    source = FolderSource(tiny_model)
    assert Merged(source, Adapter(adapter)).trained_on == "base"
    assert Merged(source, with_record(adapter, tmp_path / "16", bits=16)).trained_on == "base"
    recorded = with_record(adapter, tmp_path / "4", bits=4, nf4=["model.layers.1.mlp.up_proj"], double_quant=False)
    merged = Merged(source, recorded)
    assert (merged.trained_on, merged.double) == ("nf4", False)
    assert [name for name, change in merged.changes.items() if change.rounded] == ["model.layers.1.mlp.up_proj.weight"]
    assert not any(change.rounded for change in Merged(source, recorded, "base").changes.values())
    refused(lambda: Merged(source, Adapter(adapter), "int4"), "--trained-on", "auto, base, nf4", "'int4'")


def test_sums_are_rounded_once_to_the_dtype_of_the_weight(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    """Of a base in bfloat16: the sum of float32 values, by numpy in float64, rounded at the end."""
    from tests.conftest import write_tiny_model

    source = FolderSource(write_tiny_model(tmp_path / "half", dtype="bfloat16"))
    merged = Merged(source, Adapter(adapter))
    for name, change in merged.changes.items():
        assert change.factors is not None
        exact, delta = merged.exact(name)
        assert delta is not None and exact.dtype == torch.float32
        wanted = source.read(name).double() + change.factors.delta().double()
        assert torch.allclose(exact.double(), wanted, atol=1e-6)
        assert torch.equal(merged.read(name), exact.to(torch.bfloat16)) and merged.changes_tensor(name)
    other = next(name for name in merged.names() if name not in merged.changes)
    assert torch.equal(merged.read(other), source.read(other)) and not merged.changes_tensor(other)


def test_the_fingerprint_tells_what_was_merged_how(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    source = FolderSource(tiny_model)
    once, twice = tmp_path / "once", tmp_path / "twice"
    made = [
        Merged(source, Adapter(adapter)),
        Merged(source, Adapter(adapter), "nf4"),
        Merged(source, with_record(adapter, once, bits=4, double_quant=False)),
        Merged(source, with_record(adapter, twice, bits=4, dtype="bfloat16")),
        Merged(source, Adapter(write_adapter(tmp_path / "other", tiny_model, lora_alpha=3))),
    ]
    assert len({merged.fingerprint() for merged in made} | {source.fingerprint()}) == 6
    assert Merged(FolderSource(tiny_model), Adapter(adapter)).fingerprint() == made[0].fingerprint()


def test_a_base_is_unquantized_or_nf4(tmp_path: Path, tiny_model: Path) -> None:
    import llmq
    from llmq.grids.scheme import Scheme
    from llmq.recipe.recipe import Recipe

    assert type(open_base(tiny_model)) is FolderSource
    load(tiny_model, quantization_config=nf4()).save_pretrained(tmp_path / "nf4")
    assert isinstance(open_base(tmp_path / "nf4"), NF4Source)
    llmq.quantize(str(tiny_model), tmp_path / "w4", Recipe(methods=("rtn",), scheme=Scheme(4, 32)))
    refused(lambda: open_base(tmp_path / "w4"), str(tmp_path / "w4"), "start from the unquantized model")
