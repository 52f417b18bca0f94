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
from tests.llmq.adapters.made import (
    apart,
    load,
    newer_peft,
    nf4,
    peft_merged,
    renamed,
    stock_merged,
    trained,
    widened,
    write_adapter,
)
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


LINEAR = {"target_modules": "all-linear"}
EMBEDDINGS = {"save": {"save_embedding_layers": True}}


@pytest.mark.parametrize(
    ("base", "options", "changed"),
    [
        ("llama", LINEAR | {"use_dora": True}, 14),
        ("llama", LINEAR | {"use_dora": True, "use_rslora": True, "alpha_pattern": {"layers.0.*up_proj": 32}}, 14),
        ("gpt2", LINEAR, 8),
        ("gpt2", LINEAR | {"use_dora": True, "fan_in_fan_out": True}, 8),
        ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, 4),
        ("gpt2", LINEAR | {"bias": "all"}, 21),
        ("biased", {"lora_bias": True}, 4),
        pytest.param("biased", {"bias": "lora_only"}, 4, marks=newer_peft),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 1}, 3),
        ("llama", {"target_modules": ["embed_tokens"], "lora_alpha": 1, "save": {"save_embedding_layers": False}}, 1),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, 3),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, 3),
        ("llama", EMBEDDINGS, 2),
        ("tied", EMBEDDINGS, 2),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}, 9),
        ("llama", {"modules_to_save": ["embed_tokens"]} | EMBEDDINGS, 3),
        ("llama", {"modules_to_save": ["input_layernorm", "mlp"]}, 10),
        ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 3),
        ("llama", {"trainable_token_indices": [3, 250]}, 3),
        ("tied", {"trainable_token_indices": [3, 250]}, 3),
        ("llama", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [5, 6]}}, 4),
        ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, 1),
        pytest.param("llama", LINEAR | {"init_lora_weights": "mica"}, 14, marks=newer_peft),
        ("llama", {"r": 32, "init_lora_weights": "orthogonal"}, 2),
    ],
    ids=lambda value: str(value).translate(str.maketrans("", "", "{}[]' ")),
)
def test_every_kind_as_peft_merges_it(
    tmp_path: Path, bases: dict[str, Path], base: str, options: dict[str, Any], changed: int
) -> None:
    """As stock transformers loads the result, in bfloat16; PEFT rounds a change before it adds it, this does not."""
    folder = trained(tmp_path / "adapter", bases[base], **options)
    merged = Merged(open_base(bases[base]), Adapter(folder))
    assert apart(stock_merged(merged, tmp_path / "out"), peft_merged(bases[base], folder)) <= 1e-3
    assert len(merged.changes) == changed and not merged.notes
    for name, change in merged.changes.items():
        value, delta = merged.exact(name)
        assert change.own and delta is not None
        assert torch.allclose(value - delta, merged.base.read(name).float(), atol=1e-6)
        assert not torch.equal(merged.read(name), merged.base.read(name)), name


def test_a_copy_that_differs_from_the_base_is_used_and_said(tmp_path: Path, bases: dict[str, Path]) -> None:
    """PEFT loads the copy into the base before it merges."""
    folder = trained(tmp_path / "adapter", bases["llama"], target_modules=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, file)
    merged = Merged(open_base(bases["llama"]), Adapter(folder))
    assert (
        apart(stock_merged(merged, tmp_path / "out"), peft_merged(bases["llama"], folder)) <= 4e-3
    )  # values above 0.5
    (note,) = merged.notes
    assert "copy of lm_head.weight differs from the base's" in note and "as PEFT does" in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_of_another_dtype_over_a_float16_base(tmp_path: Path, bases: dict[str, Path], dtype: Any) -> None:
    from peft import PeftModel

    load(bases["llama"], dtype=torch.float16).save_pretrained(tmp_path / "half")
    folder = trained(tmp_path / "adapter", bases["llama"], target_modules="all-linear")
    file = folder / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    merged = Merged(open_base(tmp_path / "half"), Adapter(folder))
    reference = PeftModel.from_pretrained(load(tmp_path / "half", dtype=torch.float16), folder).merge_and_unload()
    for name in merged.names():
        assert merged.read(name).dtype == torch.float16
        assert torch.allclose(merged.read(name), reference.state_dict()[name], rtol=0, atol=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=lambda value: str(value).translate(str.maketrans("", "", "{}[]' ")),
)
def test_an_adapter_that_would_untie_a_tied_weight(
    tmp_path: Path, bases: dict[str, Path], options: dict[str, Any]
) -> None:
    """The base stores one tensor for both; merged into it, one half's change would be the other's too."""
    folder = trained(tmp_path / "adapter", bases["tied"], **options)
    refused(
        lambda: Merged(open_base(bases["tied"]), Adapter(folder)), "model.embed_tokens.weight", "untie the base first"
    )


def test_the_way_out_for_a_tied_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    """What the refusal says to do gives what the trained model computes."""
    from peft import PeftModel

    folder = trained(tmp_path / "adapter", bases["tied"], modules_to_save=["lm_head", "embed_tokens"])
    model = load(bases["tied"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.to(torch.bfloat16).save_pretrained(tmp_path / "untied")
    merged = Merged(open_base(tmp_path / "untied"), Adapter(folder))
    state = stock_merged(merged, tmp_path / "out")
    tuned = PeftModel.from_pretrained(load(bases["tied"]), folder).merge_and_unload()
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert apart(state, dict(tuned.state_dict())) <= 1e-3


def test_a_vocabulary_that_was_resized(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Refused, as by PEFT, and the way out gives PEFT's result."""
    load(bases["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path / "resized")
    bigger = load(tmp_path / "resized", dtype=torch.bfloat16)
    bigger.resize_token_embeddings(260, mean_resizing=False)
    bigger.save_pretrained(tmp_path / "bigger")
    for name, options in (("copy", EMBEDDINGS), ("saved", {"modules_to_save": ["embed_tokens", "lm_head"]})):
        folder = trained(tmp_path / name, tmp_path / "bigger", **options)
        refused(
            lambda folder=folder: Merged(open_base(bases["llama"]), Adapter(folder)),
            "[260, 32]",
            "[256, 32]",
            "resize_token_embeddings(260)",
        )
        merged = Merged(open_base(tmp_path / "bigger"), Adapter(folder))
        assert apart(stock_merged(merged, tmp_path / f"out-{name}"), peft_merged(tmp_path / "bigger", folder)) <= 1e-3


def test_a_bias_that_the_base_lacks(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = trained(tmp_path / "adapter", bases["llama"], lora_bias=True)
    refused(lambda: Merged(open_base(bases["llama"]), Adapter(folder)), "q_proj", "no bias", "train without lora_bias")


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
