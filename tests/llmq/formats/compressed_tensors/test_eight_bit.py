"""8-bit weights and activations on disk: stock transformers loads them and computes what our simulation does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import eight_bit
from llmq.formats.compressed_tensors.config import config_of
from llmq.grids.activations import round_input, static_scale
from llmq.grids.base import QuantizedWeight, round_to_grid
from llmq.grids.float8 import find_float8_scale, round_to_float8
from llmq.grids.nearest import round_to_nearest
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Activations, Scheme

IDS = torch.arange(24).view(2, 12)
TYPES = {"int": "int", "fp8": "float"}
SCHEMES = [
    Scheme(8, None, grid=grid, activations=activations)
    for grid in ("int", "fp8")
    for activations in (Activations(), Activations(dynamic=False))
] + [Scheme(8, None, grid="fp8")]
BLOCKS = [Scheme(8, 128, grid="fp8-block", activations=activations) for activations in (None, Activations())]


def rounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    if scheme in BLOCKS:
        q = round_to_nearest(weight, scheme, dtype)
        assert isinstance(q, QuantizedWeight)
        return q
    if scheme.grid == "fp8":
        scale = find_float8_scale(weight, "mse", dtype)
        return QuantizedWeight(round_to_float8(weight, scale), scale, None, scheme)
    scale, _ = find_range(weight, scheme, "mse", None, dtype)
    return QuantizedWeight(round_to_grid(weight, scale, None, scheme), scale, None, scheme)


def simulate(module: nn.Module, scheme: Scheme, scale: Tensor) -> None:
    """Rounds what a module is given, from now on."""
    if scheme.activations is None:
        return

    dynamic = scheme.activations.dynamic

    def hook(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (round_input(given[0], scheme, None if dynamic else scale),)

    module.register_forward_pre_hook(hook)


def save(folder: Path, scheme: Scheme, dtype: torch.dtype, other: Scheme | None = None) -> tuple[Tensor, Tensor]:
    """Saves a tiny model in `scheme` (its last projections in `other`): the logits it should give, and had at first."""
    # Keys and values have half a block of channels.
    config = LlamaConfig(
        hidden_size=128 if scheme in BLOCKS else 64,
        intermediate_size=256 if scheme in BLOCKS else 96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    seen: dict[nn.Module, float] = {}
    watches = [
        m.register_forward_pre_hook(lambda m, given: seen.__setitem__(m, float(given[0].abs().max())))
        for m in linear.values()
    ]
    with torch.inference_mode():
        base: Tensor = model(IDS).logits
    for watch in watches:
        watch.remove()
    groups: dict[Scheme, list[str]] = {}
    for name, module in linear.items():
        mine = other if other is not None and name.endswith("down_proj") else scheme
        q = rounded(module.weight.data, mine, dtype)
        module.weight.data = q.dequantize(dtype)
        # 0.9: some inputs are beyond the end of a static grid.
        scale = static_scale(0.9 * seen[module], mine.grid).to(dtype)
        simulate(module, mine, scale)
        del tensors[f"{name}.weight"]
        tensors |= {
            f"{name}.{suffix}": value for suffix, value in eight_bit.pack(replace(q, input_scale=scale)).items()
        }
        groups.setdefault(mine, []).append(name)
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    config.quantization_config = config_of(groups, ["lm_head"])
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return logits, base


def check(folder: Path, want: Tensor, base: Tensor) -> None:
    """Stock transformers gives exactly these logits, the second time too, when weights have become dense."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == want.dtype
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, want) and torch.equal(model(IDS).logits, want)
    away = float((want - base).norm() / base.norm())
    assert 0.01 < away < 0.5, "the rounding must show, and not more than it should"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES + BLOCKS, ids=str)
def test_the_stock_loader_gives_our_logits(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    check(tmp_path, *save(tmp_path, scheme, dtype))


def test_two_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    check(tmp_path, *save(tmp_path, SCHEMES[0], torch.float32, SCHEMES[3]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_spec_pack_unpack(scheme: Scheme) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    q = rounded(weight, scheme, torch.bfloat16)
    tensors = eight_bit.pack(replace(q, input_scale=torch.tensor(0.25)))
    found = {suffix: (value.dtype, tuple(value.shape)) for suffix, value in tensors.items()}
    assert found == eight_bit.spec(weight.shape, scheme, torch.bfloat16)
    back = eight_bit.unpack(tensors, scheme)
    want = q.codes.double() * q.scale.double()
    assert torch.equal(back.dequantize(torch.float32).double(), want)
    static = scheme.activations is not None and not scheme.activations.dynamic
    assert float(back.input_scale) == 0.25 if static else back.input_scale is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_config_is_read_as_it_is_meant(scheme: Scheme) -> None:
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, ["head"]))
    group = read.config_groups["group_0"]
    assert group.format == read.format == f"{TYPES[scheme.grid]}-quantized" and read.ignore == ["head"]
    assert (
        group.weights.strategy == "channel" and group.weights.type == TYPES[scheme.grid] and group.weights.num_bits == 8
    )
    if scheme.activations is None:
        assert group.input_activations is None
    else:
        assert group.input_activations.type == TYPES[scheme.grid] and group.input_activations.num_bits == 8
        assert group.input_activations.dynamic is scheme.activations.dynamic
        assert group.input_activations.strategy == ("token" if scheme.activations.dynamic else "tensor")


@pytest.mark.parametrize("rows", [256, 200])
def test_blocks_are_those_of_compressed_tensors(rows: int) -> None:
    """Its compressor writes the same bytes, of channels that fill no block too, and its preset is our configuration."""
    scheme = BLOCKS[1]
    q = rounded(torch.randn(rows, 384, generator=torch.Generator().manual_seed(1)), scheme, torch.bfloat16)
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, [])).config_groups["group_0"]
    preset = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    for mine, theirs in ((read.weights, preset.weights), (read.input_activations, preset.input_activations)):
        for key in ("num_bits", "type", "strategy", "block_structure", "group_size", "dynamic", "symmetric"):
            assert getattr(mine, key) == getattr(theirs, key), key
    got, kind = eight_bit.pack(q), BaseCompressor.get_value_from_registry(read.format)
    assert got["weight_scale"].shape == (2, 3) and got["weight_scale"].dtype == torch.bfloat16
    want = kind.compress({"weight": q.dequantize(torch.float32), "weight_scale": got["weight_scale"].float()}, read)
    assert torch.equal(got["weight"].view(torch.uint8), want["weight"].view(torch.uint8))
    back = eight_bit.unpack(got, scheme)
    assert torch.equal(back.scale, q.scale) and torch.equal(back.stored_scale, q.stored_scale)
    torn = replace(q, scale=q.scale * torch.linspace(1, 2, rows).unsqueeze(-1))
    with pytest.raises(LlmqError, match="differ within a block"):
        eight_bit.pack(torn)


def test_parts_are_whole_blocks() -> None:
    assert eight_bit.splits((256, 512), BLOCKS[0], 4, True) and not eight_bit.splits((256, 512), BLOCKS[0], 4, False)
    assert not eight_bit.splits((256, 512), BLOCKS[0], 8, True) and eight_bit.splits((256, 512), SCHEMES[0], 8, True)


def test_refusals() -> None:
    with pytest.raises(LlmqError, match="nothing is quantized"):
        config_of({SCHEMES[0]: []}, [])
    static = rounded(torch.randn(8, 16), SCHEMES[1], torch.float32)
    with pytest.raises(LlmqError, match="needs the scale of its input"):
        eight_bit.pack(static)
    tensors = eight_bit.pack(replace(static, input_scale=torch.ones(1)))
    with pytest.raises(LlmqError, match="input_scale, not in the checkpoint"):
        eight_bit.unpack({k: v for k, v in tensors.items() if k != eight_bit.INPUT_SCALE}, SCHEMES[1])
    with pytest.raises(LlmqError, match="must be torch.float8_e4m3fn"):
        eight_bit.unpack(tensors, SCHEMES[3])
    with pytest.raises(LlmqError, match=r"weight_scale .* must be .* \[8, 1\]"):
        eight_bit.unpack(tensors | {eight_bit.SCALE: torch.ones(3, 1)}, SCHEMES[1])
