"""A folder to a model: as stock transformers loads it, but what stock lets pass in silence is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmq.inference import pretrained
from llmq.inference.pretrained import check_readable, input_device, load_model, load_tokenizer, widen
from tests.conftest import newer_transformers
from tests.llmq.formats import published
from tests.llmq.refusal import refused

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def with_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def with_tensors(folder: Path, change: Change) -> Path:
    file = folder / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(file).items()}
    change(state)
    save_file(state, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_weights_are_those_that_stock_transformers_loads(tiny_model: Path, dtype: str) -> None:
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=kind).state_dict()
    model = load_model(tiny_model, dtype=dtype)
    assert not model.training
    for name, value in model.state_dict().items():
        assert value.dtype == stock[name].dtype and torch.equal(value, stock[name]), name


def test_missing_tensors_are_refused_where_stock_fills_them_by_chance(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with_tensors(folder, lambda state: state.pop(name))
    AutoModelForCausalLM.from_pretrained(folder)
    refused(lambda: load_model(folder), str(folder), f"lacks 1 tensors that its architecture needs, such as {name}")


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    with_tensors(folder, lambda state: state.update({"model.norm.weight": torch.ones(3)}))
    refused(lambda: load_model(folder), str(folder))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "cannot be loaded"),
        (lambda f: with_config(f, model_type="nothing"), "cannot be loaded"),
    ],
    ids=["no config", "no JSON", "damaged weights", "unknown type"],
)
def test_folders_that_are_no_model(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    refused(lambda: load_model(folder), str(folder), words)


def test_another_dtype_is_refused(tiny_model: Path) -> None:
    refused(lambda: load_model(tiny_model, dtype="int8"), "auto, float32, bfloat16, float16", "'int8'")


def test_a_quantization_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    """Stock transformers loads it with a warning, and with random weights."""
    with_config(folder, quantization_config={"quant_method": "own"})
    for call in (lambda: check_readable(folder), lambda: load_model(folder), lambda: load_model(folder, kernels=True)):
        refused(call, f"{folder} is quantized with 'own'", "load it with the tool that wrote it")


@pytest.mark.parametrize(
    ("section", "package", "kernels"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel", True),
        ({"quant_method": "hqq"}, "hqq", False),
        ({"quant_method": "quanto"}, "optimum-quanto", False),
        ({"load_in_4bit": True}, "bitsandbytes", False),  # as older folders say it
    ],
)
def test_a_package_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], package: str, kernels: bool
) -> None:
    monkeypatch.setattr(pretrained, "_installed", lambda _: False)
    with_config(folder, quantization_config=section)
    message = refused(lambda: check_readable(folder), str(folder), f"pip install {package}")
    assert ("llmq eval --kernels" in message) == kernels
    assert check_readable(folder, kernels=True)["quantization_config"] == section


def test_a_package_is_looked_for_and_not_imported() -> None:
    assert pretrained._installed("json") and not pretrained._installed("no_such_package_at_all")
    assert not pretrained._installed("no_such_package_at_all.inner")


def test_experts_that_only_llmq_reads_are_no_checkpoint_of_stock_transformers(tmp_path: Path) -> None:
    section = {"quant_method": "compressed-tensors", "format": "llmq-pack-quantized", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": section}))
    refused(lambda: check_readable(tmp_path), "only llmq reads: add --kernels, or use llmq.load")
    assert check_readable(tmp_path, kernels=True)["quantization_config"] == section


def test_an_unquantized_folder_needs_no_package(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_installed", lambda _: False)
    assert check_readable(tiny_model)["model_type"] == "llama"


def test_the_tokenizer_is_the_folder_s_own(tiny_model: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tiny_model)("the")["input_ids"]
    refused(lambda: load_tokenizer(tmp_path), f"{tmp_path} has no tokenizer")


def test_halves_are_widened_and_what_is_packed_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2, dtype=torch.float64))
    model[0].compute_dtype, model[1].compute_dtype = torch.float16, torch.float64
    model.register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False))
    before = model[0].weight.detach().clone()
    widen(model)
    assert [p.dtype for p in model.parameters()] == [torch.uint8, *[torch.float32] * 2, *[torch.float64] * 2]
    assert torch.equal(model[0].weight, before.float())
    assert (model[0].compute_dtype, model[1].compute_dtype) == (torch.float32, torch.float64)


def test_inputs_go_where_the_model_is() -> None:
    assert input_device("cpu") == "cpu" and input_device("cuda:1") == "cuda:1"
    assert input_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_said_while_loading_is_said_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress bars of others are not heard; llmq's own words are kept until standard error is back, in order."""
    heard: list[tuple[str, bool]] = []
    real = sys.stderr

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.getMessage(), sys.stderr is real))

    log, handler = logging.getLogger("llmq"), Handler()
    log.addHandler(handler)
    try:
        with pytest.raises(KeyError), pretrained._status("loading", False):
            print("a bar", file=sys.stderr)
            logging.getLogger("llmq.inference").warning("first")
            log.warning("second")
            assert not heard
            raise KeyError
    finally:
        log.removeHandler(handler)
    assert heard == [("first", True), ("second", True)] and log.propagate
    assert "a bar" not in capsys.readouterr().err


def in_fp8(folder: Path, section: dict[str, Any] | None = None, **group: Any) -> Path:
    """A folder as llm-compressor writes it, with changes to its section, or to the only config group."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        for name in [name for name in tensors if published.linear(name)]:
            codes, scale = published.by_row(tensors[name])
            tensors |= {name: codes, f"{name}_scale": scale}
        return tensors

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights} | group}
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    return published.rewrite(
        folder, stated | {"config_groups": groups, "ignore": ["lm_head"]} | (section or {}), change
    )


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("section", "group", "words"),
    [
        ({}, {"targets": ["re:(("]}, ("'(('", "no regular expression")),
        ({"ignore": ["re:*"]}, {}, ("'*'", "no regular expression")),
        ({}, {"targets": 5}, ("config_groups.group_0.targets", "list")),
        ({}, {"weights": {"num_bits": "x", "type": "float"}}, ("config_groups.group_0.weights.num_bits", "integer")),
        ({}, {"weights": {"num_bits": 8, "type": "float", "strategy": "x"}}, ("weights.strategy", "'x'")),
        ({}, {"weights": "fp8"}, ("config_groups.group_0.weights",)),
        ({"config_groups": [1]}, {}, ("config_groups",)),
        ({"config_groups": {"group_0": None}}, {}, ("config_groups.group_0",)),
        ({"ignore": 5}, {}, ("ignore", "list")),
        ({"quantization_status": "x"}, {}, ("quantization_status", "'frozen'")),
        ({"kv_cache_scheme": "x"}, {}, ("kv_cache_scheme",)),
        # Without groups, transformers would take the codes for the weights.
        pytest.param(
            {"config_groups": None},
            {},
            ("weight_scale is stored", "config.json does not say"),
            marks=newer_transformers,
        ),
        pytest.param(
            {"config_groups": {}}, {}, ("weight_scale is stored", "config.json does not say"), marks=newer_transformers
        ),
    ],
)
def test_a_section_that_is_broken(
    folder: Path, section: dict[str, Any], group: dict[str, Any], words: tuple[str, ...], kernels: bool
) -> None:
    in_fp8(folder, section, **group)
    told = refused(lambda: load_model(folder, dtype="auto", kernels=kernels), str(folder), "config.json", *words)
    assert "QuantizationConfig" not in told and "[" not in told.partition(":")[2].partition(":")[0]


def test_a_section_that_is_whole(folder: Path, tiny_model: Path) -> None:
    model, dense = load_model(in_fp8(folder), dtype="float32"), load_model(tiny_model)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        error = (model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert 0 < float(error) < 0.3


def test_scales_of_modules_that_the_model_has_not_are_let_be(folder: Path) -> None:
    """As those of a head for more tokens."""
    extra = {"model.layers.9.up.weight": torch.ones(4, 4), "model.layers.9.up.weight_scale": torch.ones(4)}
    load_model(with_tensors(folder, lambda state: state.update(extra)))


def test_an_error_of_a_reader_names_the_folder(folder: Path) -> None:
    in_fp8(folder, {"transform_config": {"config_groups": {"R1": {}}}})
    refused(lambda: load_model(folder, kernels=True), str(folder), "rotates activations")
