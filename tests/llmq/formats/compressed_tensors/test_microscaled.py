"""Microscaling floats on disk: the bytes of compressed-tensors' own compressors; stock transformers reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import llmq
from llmq.errors import LlmqError
from llmq.formats import stacks_refusal
from llmq.formats.compressed_tensors import microscaled
from llmq.formats.compressed_tensors.config import config_of, layout_of
from llmq.formats.inspection import inspect_folder
from llmq.grids.activations import round_input
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.inference.stack import StackedLinear
from tests.llmq import mixtures
from tests.llmq.grids.peers import known_to_compressed_tensors

NV = Scheme(4, 16, grid="nvfp4")
SCHEMES = [NV, *(Scheme(bits, 32, grid=f"mxfp{bits}") for bits in (4, 6, 8))]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
ROUNDED = [replace(scheme, activations=Activations(dynamic=scheme != NV)) for scheme in SCHEMES]
ROUNDED += [Scheme(4, 32, grid="mxfp4", activations=Activations(grid="fp8"))]
"""The same with rounded inputs."""
IDS = torch.arange(24).view(2, 12)


def rounded(scheme: Scheme, rows: int = 24, width: int = 96, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    q = round_to_nearest(weight, scheme, torch.bfloat16)
    assert isinstance(q, QuantizedWeight)
    return q


@EVERY
def test_the_bytes_are_those_of_compressed_tensors(scheme: Scheme) -> None:
    """Its compressor, given the values of the same codes and scales, packs the same; and reads them as the same."""
    known_to_compressed_tensors(scheme)
    q = rounded(scheme)
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, ["head"])).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry(layout_of(scheme))
    scale = q.scale if q.stored_scale is None else q.scale * q.stored_scale
    state = {"weight": q.dequantize(torch.float32), "weight_scale": scale}
    state |= {} if q.stored_scale is None else {"weight_global_scale": q.stored_scale}
    want, got = theirs.compress(state, read), microscaled.pack(q)
    assert want.keys() == got.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8))
    back = theirs.decompress(dict(got), read)["weight"]
    assert torch.equal(back.float(), q.dequantize(torch.float32))


@EVERY
def test_every_code_survives(scheme: Scheme) -> None:
    rounding = rounding_of(scheme.rules)
    levels = rounding.levels(scheme, torch.device("cpu"))
    points = levels[torch.arange(6 * 96) % len(levels)].view(6, 96)
    scale = torch.exp2(torch.arange(6 * scheme.groups(96)).view(6, -1) % 11 - 5.0)
    made = rounding.finish(QuantizedWeight(rounding.encode(points, scheme), scale, None, scheme), torch.bfloat16)
    assert isinstance(made, QuantizedWeight)
    tensors = microscaled.pack(made)
    found = {suffix: (value.dtype, tuple(value.shape)) for suffix, value in tensors.items()}
    assert found == microscaled.spec((6, 96), scheme, torch.bfloat16)
    back = microscaled.unpack(tensors, scheme)
    want = (points.view(6, scale.shape[1], -1) * scale.unsqueeze(-1)).flatten(1)
    assert torch.equal(back.dequantize(torch.float32), want)
    assert torch.equal(back.codes.view(torch.uint8), made.codes.view(torch.uint8))


def test_every_exponent_survives() -> None:
    scheme = SCHEMES[1]
    scale = torch.exp2(torch.arange(-126, 125).float()).view(-1, 1)
    q = QuantizedWeight(torch.ones(251, 32, dtype=torch.uint8), scale, None, scheme)
    tensors = microscaled.pack(q)
    assert tensors["weight_scale"].flatten().tolist() == list(range(1, 252))
    assert torch.equal(microscaled.unpack(tensors, scheme).scale, scale)


@EVERY
def test_the_config_is_read_as_it_is_meant(scheme: Scheme) -> None:
    known_to_compressed_tensors(scheme)
    group = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, ["head"])).config_groups["group_0"]
    weights = group.weights
    assert group.format == scheme.rules.layout == layout_of(scheme)
    assert (weights.num_bits, weights.type, weights.group_size) == (scheme.bits, "float", scheme.group_size)
    assert weights.strategy == ("tensor_group" if scheme == NV else "group") and group.input_activations is None
    assert weights.scale_dtype == (torch.float8_e4m3fn if scheme == NV else torch.uint8)


@pytest.mark.parametrize("scheme", [*ROUNDED, Scheme(4, 128, activations=Activations(grid="fp8"))], ids=str)
def test_rounded_inputs_are_those_of_a_preset(scheme: Scheme) -> None:
    """The configuration means what compressed-tensors' own presets mean."""
    presets = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp6": "MXFP6A8", "mxfp8": "MXFP8"}
    others = {"int": "W4AFP8", "mxfp4": "MXFP4XFP8"}
    name = (others if scheme.activations and scheme.activations.grid else presets)[scheme.grid]
    if name not in PRESET_SCHEMES:
        pytest.skip(f"this compressed-tensors has no {name}")
    want = preset_name_to_scheme(name, ["Linear"]).input_activations
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, [])).config_groups["group_0"].input_activations
    for key in ("num_bits", "type", "strategy", "dynamic", "group_size", "scale_dtype", "symmetric", "observer"):
        assert getattr(read, key) == getattr(want, key), key


def test_the_divisor_of_an_input_is_stored_and_read() -> None:
    """It is a power of two, which reading it back does not change; and the weight is as without it."""
    scheme, q = ROUNDED[0], rounded(NV)
    with pytest.raises(LlmqError, match="needs the scale of its input"):
        microscaled.pack(replace(q, scheme=scheme))
    for scale, divisor in ((0.3, 2.0), (0.25, 4.0), (0.2, 4.0), (3.0, 0.25)):
        tensors = microscaled.pack(replace(q, scheme=scheme, input_scale=torch.tensor([scale])))
        found = {suffix: (value.dtype, tuple(value.shape)) for suffix, value in tensors.items()}
        assert found == microscaled.spec((24, 96), scheme, torch.bfloat16)
        assert tensors["input_global_scale"].tolist() == [divisor]
        back = microscaled.unpack(tensors, scheme)
        assert torch.equal(microscaled.pack(back)["input_global_scale"], tensors["input_global_scale"])
        assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))


def save(folder: Path, scheme: Scheme) -> Tensor:
    """Saves a tiny model in `scheme`; returns the logits of its dequantized weights, with its inputs rounded."""
    config = LlamaConfig(
        hidden_size=max(64, scheme.step or 0),
        intermediate_size=max(96, scheme.step or 0),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in names:
        module = model.get_submodule(name)
        q = round_to_nearest(module.weight.data, scheme, torch.bfloat16)
        module.weight.data = q.dequantize(torch.bfloat16)
        del tensors[f"{name}.weight"]
        assert isinstance(q, QuantizedWeight)
        # So small that some groups have scales that are clipped.
        static = torch.tensor([2.0**-11]) if scheme.activations and not scheme.activations.dynamic else None
        module.register_forward_pre_hook(lambda _, x, static=static: (round_input(x[0], scheme, static),))
        packed = microscaled.pack(replace(q, input_scale=static))
        tensors |= {f"{name}.{suffix}": value for suffix, value in packed.items()}
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    config.quantization_config = config_of({scheme: names}, ["lm_head"])
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return logits


@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED, ids=str)
def test_stock_transformers_and_llmq_load_give_our_logits(tmp_path: Path, scheme: Scheme) -> None:
    known_to_compressed_tensors(scheme)
    want = save(tmp_path, scheme)
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), llmq.load(tmp_path, device_map="cpu")):
        with torch.inference_mode():
            assert model.dtype == torch.bfloat16 and torch.equal(model.eval()(IDS).logits, want)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_llmq_load_reads_fp4_in_float32_too(tmp_path: Path, scheme: Scheme) -> None:
    want = save(tmp_path, scheme).float()
    model = llmq.load(tmp_path, device_map="cpu", dtype="float32").eval()
    with torch.inference_mode():
        assert float((model(IDS).logits - want).norm() / want.norm()) < 2e-2


def test_few_bits_with_rounded_inputs_are_for_bfloat16(tmp_path: Path) -> None:
    """Stock transformers, which rounds the inputs, fails in float32 at its first product."""
    known_to_compressed_tensors(ROUNDED[1])
    save(tmp_path, ROUNDED[1])
    with pytest.raises(LlmqError, match=f"{tmp_path} rounds inputs .* use --dtype bfloat16"):
        llmq.load(tmp_path, device_map="cpu", dtype="float32")


def test_splits() -> None:
    assert microscaled.splits((32, 64), NV, 4, True) and not microscaled.splits((32, 64), SCHEMES[1], 4, True)
    assert microscaled.splits((32, 256), ROUNDED[-1], 2, True) and not microscaled.splits(
        (32, 256), ROUNDED[-1], 4, True
    )
    assert microscaled.splits((32, 64), SCHEMES[2], 8, False) and not microscaled.splits((32, 64), NV, 3, False)


def test_refusals() -> None:
    q = rounded(NV)
    with pytest.raises(LlmqError, match="needs the scale of its scales"):
        microscaled.pack(replace(q, stored_scale=None))
    for scheme in (NV, SCHEMES[1]):
        made = rounded(scheme)
        with pytest.raises(LlmqError, match="has scales that cannot be stored"):
            microscaled.pack(replace(made, scale=made.scale * 1.01))
    tensors = microscaled.pack(q)
    with pytest.raises(LlmqError, match="weight_global_scale, not in the checkpoint"):
        microscaled.unpack({k: v for k, v in tensors.items() if k != microscaled.GLOBAL}, NV)
    with pytest.raises(LlmqError, match=r"weight_scale .* must be torch.float8_e4m3fn \[24, 6\]"):
        microscaled.unpack(tensors | {microscaled.SCALE: torch.ones(24, 3)}, NV)
    with pytest.raises(LlmqError, match="group size 16 does not divide"):
        microscaled.spec((8, 24), NV, torch.bfloat16)


FOURS = [NV, Scheme(4, 32, grid="mxfp4")]


@pytest.mark.parametrize("scheme", FOURS, ids=str)
def test_four_bits_are_read_for_the_kernels_as_for_anything_else(scheme: Scheme) -> None:
    q = rounded(scheme)
    tensors = microscaled.pack(q)
    layer = microscaled.FourBitLayer((24, 96), scheme.group_size or 0, microscaled.divided(scheme))
    assert {s: (e.dtypes[0], e.shape) for s, e in layer.entries.items()} == microscaled.spec(
        (24, 96), scheme, torch.bfloat16
    )
    plain = layer.read(tensors)
    codes = torch.stack((plain.packed >> 4, plain.packed & 15), -1).view(-1)
    value = plain.codebook[codes.long()].view(-1, plain.block_size) * plain.absmax[:, None]
    assert torch.equal(value.view(24, 96), q.dequantize(torch.float32))
    spoiled = tensors[microscaled.SCALE].clone()
    spoiled.view(torch.uint8)[3, 1] = 127 if microscaled.divided(scheme) else 255
    with pytest.raises(LlmqError, match="weight_scale has values that are not finite"):
        layer.read(tensors | {microscaled.SCALE: spoiled})


@pytest.mark.parametrize("scheme", FOURS, ids=str)
def test_stacks_of_experts_stay_packed(scheme: Scheme, tmp_path: Path) -> None:
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    source = mixtures.write("gpt_oss", tmp_path / "source", num_local_experts=2, **one)
    out, recipe = tmp_path / "out", llmq.Recipe(methods=("rtn",), scheme=scheme, loader="llmq")
    report = llmq.quantize(str(source), out, recipe, ids=IDS + 10)
    with pytest.raises(Exception, match=f"llmq-{layout_of(scheme)[:8]}"):
        AutoModelForCausalLM.from_pretrained(out)
    dense, _ = mixtures.load(source)
    before = mixtures.logits(dense)
    mixtures.put_quantized(dense.state_dict(), report, mixtures.stored(out))
    packed = llmq.load(out, device_map="cpu", dtype="float32")
    assert sum(isinstance(module, StackedLinear) for module in packed.modules()) == 2
    torch.testing.assert_close(mixtures.logits(packed), mixtures.logits(dense), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(mixtures.logits(packed), before, atol=1e-2)
    found = inspect_folder(out)
    assert not found.unknown and {(row.kind, row.bits) for row in found.quantized} == {("float", 4)}


def test_stacks_that_do_not_stay_packed_are_refused_with_a_way_out() -> None:
    assert [stacks_refusal(scheme) for scheme in FOURS] == [None, None]
    assert "use --grid int, mxfp4 or nvfp4" in (stacks_refusal(Scheme(8, 32, grid="mxfp8")) or "")
    assert "--activations none" in (stacks_refusal(ROUNDED[1]) or "")
