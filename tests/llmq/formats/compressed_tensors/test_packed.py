"""compressed-tensors on disk: the stock loader reads what we write, and gets the weights we meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import packed as ct
from llmq.formats.compressed_tensors.config import config_of
from llmq.grids.base import QuantizedWeight, round_to_grid
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme

IDS = torch.arange(24).view(2, 12)


def rounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    scale, zero = find_range(weight, scheme, "mse", None, dtype)
    return QuantizedWeight(round_to_grid(weight, scale, zero, scheme), scale, zero, scheme)


def save(folder: Path, scheme: Scheme, other: Scheme | None = None) -> Tensor:
    """Saves a tiny model in `scheme` (its last projection of each block in `other`); the logits it should give."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    groups: dict[Scheme, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        mine = other if other is not None and name.endswith("down_proj") else scheme
        q = rounded(module.weight.data, mine)
        module.weight.data = q.dequantize(torch.float32)
        groups.setdefault(mine, []).append(name)
        tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{suffix}": value for suffix, value in ct.pack(q).items()}
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    config.quantization_config = config_of(groups, ["lm_head"])
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return logits


def load(folder: Path, **options: object) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    return logits


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stock_loader_gives_our_logits(tmp_path: Path, bits: int, size: int | None) -> None:
    want = save(tmp_path, Scheme(bits, size))
    assert distance(load(tmp_path), want) < 1e-3


def test_two_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    want = save(tmp_path, Scheme(4, 32), Scheme(8, None))
    assert distance(load(tmp_path), want) < 1e-3


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (4, 32), (8, None)])
def test_zero_points_as_the_stock_reader_unpacks_them(tmp_path: Path, bits: int, size: int | None) -> None:
    want = save(tmp_path, Scheme(bits, size, symmetric=False))
    assert distance(load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)), want) < 1e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.sampled_from([8, 24, None]), st.booleans(), st.integers(1, 40), st.integers(1, 3))
def test_unpack_is_the_inverse_of_pack(bits: int, size: int | None, symmetric: bool, rows: int, times: int) -> None:
    scheme = Scheme(bits, size, symmetric)
    weight = torch.randn(rows, 24 * times, generator=torch.Generator().manual_seed(rows))
    q = rounded(weight, scheme, torch.bfloat16)
    tensors = ct.pack(q)
    want = ct.spec(weight.shape, scheme, torch.bfloat16)
    assert {suffix: (value.dtype, tuple(value.shape)) for suffix, value in tensors.items()} == want
    back = ct.unpack(tensors, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale) and back.scheme == scheme
    assert (back.zero is None and q.zero is None) or (
        back.zero is not None and q.zero is not None and torch.equal(back.zero, q.zero)
    )


def test_refusals() -> None:
    with pytest.raises(LlmqError, match="does not divide"):
        ct.spec((8, 100), Scheme(4, 64), torch.bfloat16)
    with pytest.raises(LlmqError, match="nothing is quantized"):
        config_of({Scheme(): []}, [])
    tensors = ct.pack(rounded(torch.randn(8, 64), Scheme(4, 32)))
    with pytest.raises(LlmqError, match="weight_zero_point, not in the checkpoint"):
        ct.unpack(tensors, Scheme(4, 32, False))
    with pytest.raises(LlmqError, match="weight_packed of a 8-bit g32 symmetric weight"):
        ct.unpack(tensors, Scheme(8, 32))
