"""Where quantized weights go in an empty model: found in headers, checked before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPTQConfig
from transformers.pytorch_utils import Conv1D

from llmq.checkpoint.tensors import TensorInfo, read_header
from llmq.discovery.rename import Rules
from llmq.errors import LlmqError
from llmq.formats.gptq import GPTQReader
from llmq.formats.plain import Entry
from llmq.inference.placeholders import Placeholder, _beside, check, find, grouped, inner, sizes
from tests.llmq.formats.made import FILE, stored
from tests.llmq.refusal import refused
from tests.llmq.written import Case, gptq


class Inside(nn.Module):
    """Two linear layers, a norm, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64, bias=False)
        self.norm = nn.LayerNorm(32)
        self.experts = nn.Parameter(torch.ones(2, 3))


class Model(nn.Module):
    """The base model under a prefix, and a head that a checkpoint may lack."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = Inside(), nn.Linear(64, 8, bias=False)


def empty() -> Model:
    with torch.device("meta"):
        return Model()


READER = GPTQReader(GPTQConfig(bits=4, group_size=32))


def tensors() -> dict[str, Tensor]:
    """A checkpoint of the model with one quantized weight."""
    import numpy as np

    packed, _ = gptq(np.random.default_rng(0), 32, 64, Case("gptq"))
    made = {f"model.up.{suffix}": tensor for suffix, tensor in packed.items()}
    return made | {"model.up.bias": torch.ones(32), "model.down.weight": torch.ones(64, 32)}


def found(folder: Path, given: Mapping[str, Tensor], model: Model | None = None) -> Any:
    file = folder / "model.safetensors"
    save_file(dict(given), file)
    return find(model or empty(), READER, [file])


def test_a_quantized_weight_has_a_place_and_an_ordinary_one_none(tmp_path: Path) -> None:
    result = found(tmp_path, tensors())
    assert list(result.quantized) == ["model.up"] and result.unserved is None
    place = result.quantized["model.up"]
    buffers = dict(place.named_buffers())
    assert set(buffers) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    for name, buffer in buffers.items():
        there = tensors()[f"model.up.{name}"]
        assert buffer.device.type == "meta" and (buffer.dtype, buffer.shape) == (there.dtype, there.shape)
    assert place.weight.device.type == "meta"  # for models whose code reaches for it
    with pytest.raises(LlmqError, match="model.up has not been packed yet"):
        place(torch.ones(1, 64))


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("up.scales", "model.up.scales is missing: a quantized weight [32, 64]"),
        ("up.bias", "model.up.bias is missing"),
        ("up.qweight", "model.up has"),
        ("down.weight", "no tensor of model.down, which the model needs"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, suffix: str, words: str) -> None:
    given = {name: tensor for name, tensor in tensors().items() if name != f"model.{suffix}"}
    refused(lambda: found(tmp_path, given), str(tmp_path / "model.safetensors"), words)


def test_a_weight_that_is_tied_needs_no_tensor(tmp_path: Path) -> None:
    model = empty()
    model.all_tied_weights_keys = {"model.down.weight": "head.weight"}  # type: ignore[assignment]
    given = {name: tensor for name, tensor in tensors().items() if "down" not in name}
    assert found(tmp_path, given, model).quantized


def test_parts_of_what_is_no_linear_layer_are_told_and_of_nothing_are_left(tmp_path: Path) -> None:
    codes = torch.ones(2, 2, dtype=torch.int32)
    result = found(tmp_path, tensors() | {"model.norm.qweight": codes})
    assert result.unserved == "model.norm.qweight is part of model.norm, which is no linear module"
    inside = found(tmp_path, tensors() | {"model.experts.0.gate.qweight": codes})
    assert inside.unserved is not None and "model.experts.0.gate.qweight" in inside.unserved
    assert found(tmp_path, tensors() | {"other.qweight": codes, "model.norm.weight": torch.ones(32)}).unserved is None


def test_tensors_of_a_module_are_taken_together_over_files_by_the_longest_ending(tmp_path: Path) -> None:
    save_file({"a.weight.absmax": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1")
    save_file({"a.weight": torch.ones(2), "a.c.bias": torch.ones(3)}, tmp_path / "2")
    headers = [read_header(tmp_path / name) for name in ("1", "2")]
    made = grouped(headers, ("weight", "absmax", "weight.absmax", "bias"))
    assert {stem: set(of) for stem, of in made.items()} == {"a": {"weight", "weight.absmax"}, "a.c": {"bias"}}


def test_what_is_stored_is_what_must_be() -> None:
    entries = {"codes": Entry((torch.int32, torch.int64), (2, 3))}

    def of(tensor: Tensor) -> dict[str, TensorInfo]:
        return stored({"codes": tensor})

    for dtype in (torch.int32, torch.int64):
        check("block.up", (2, 3), entries, of(torch.ones(2, 3, dtype=dtype)))
    for wrong, said in ((torch.ones(2, 3), "float32 [2, 3]"), (torch.ones(3, 2, dtype=torch.int32), "int32 [3, 2]")):
        refused(
            lambda wrong=wrong: check("block.up", (2, 3), entries, of(wrong)),
            f"{FILE}: block.up.codes must be int32 or int64 [2, 3] for a weight [2, 3]",
            f"not {said}",
        )


def test_sizes_are_of_linear_layers_alone() -> None:
    class Own(nn.Linear):
        """A layer that may compute something else."""

    assert sizes(nn.Linear(3, 5)) == (5, 3) == sizes(Conv1D(5, 3))
    assert sizes(nn.LayerNorm(3)) is None and sizes(Own(3, 5)) is None


def loaded(place: Placeholder, given: Mapping[str, Tensor]) -> None:
    """Fill the buffers as transformers does."""
    for suffix, tensor in given.items():
        value = tensor.clone()
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        place._buffers[inner(suffix)] = value


def test_what_was_loaded_is_replaced_by_a_layer_that_runs(tmp_path: Path) -> None:
    import numpy as np

    packed, weight = gptq(np.random.default_rng(0), 32, 64, Case("gptq"))
    place = found(tmp_path, tensors()).quantized["model.up"]
    loaded(place, packed | {"bias": torch.full((32,), 2.0)})
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x.double().numpy() @ weight.T + 2
    assert np.allclose(place.replacement(torch.float32)(x).double().numpy(), expected, atol=1e-4)


def test_what_was_not_loaded_or_contradicts_itself_is_named(tmp_path: Path) -> None:
    place = found(tmp_path, tensors()).quantized["model.up"]
    file = str(tmp_path / "model.safetensors")
    refused(lambda: place.replacement(torch.float32), file, "was not loaded, although the file has it")
    given = {name.removeprefix("model.up."): t for name, t in tensors().items() if name.startswith("model.up.")}
    loaded(place, given | {"g_idx": torch.zeros(64, dtype=torch.int32)})
    refused(lambda: place.replacement(torch.float32), file, "model.up: g_idx must give every group 32")


def test_layers_beside_a_models_own_are_left(tmp_path: Path) -> None:
    """Of a layer that the model does not have, experts too, which a rule for the model's own experts would join."""
    import transformers

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, vocab_size=64))
    place = Rules(model).rename("mtp.layers.0.mlp.experts.0.down_proj.weight")
    assert place[1] is not None and place[0] not in model.state_dict()
    import numpy as np

    packed, _ = gptq(np.random.default_rng(0), 64, 32, Case("gptq"))
    modules = dict(model.named_modules())
    assert _beside("mtp.layers.0.mlp.experts.down_proj", modules) and _beside("model.layers.1.mlp.x", modules)
    assert not _beside("model.layers.0.mlp.x", modules)
    file = tmp_path / "model.safetensors"
    dense = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if "experts" not in n}
    for expert in range(4):
        for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
            dense[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = torch.zeros(shape)
    for prefix in ("mtp.layers.0", "model.layers.1"):
        beside = {f"{prefix}.mlp.experts.0.down_proj.{suffix}": tensor for suffix, tensor in packed.items()}
        save_file(dense | beside, file)
        assert find(model, READER, [file]).unserved is None


def test_a_place_has_the_sizes_that_an_initialization_reads(tmp_path: Path) -> None:
    place = found(tmp_path, tensors()).quantized["model.up"]
    assert (place.out_features, place.in_features) == (32, 64)
