"""Folders whose weights are FP8 or MXFP4 codes, in the layouts in which models are published, made of dense ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

Weights = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn


def need_stock() -> None:
    """Skips a test where transformers' own reader of FP8 fails on every folder, as that of 5.16 does on a CPU."""
    from transformers import FineGrainedFP8Config, LlamaConfig
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config())
    plan = getattr(quantizer, "update_tp_plan", lambda _: None)  # newer versions have none
    try:
        plan(LlamaConfig())
    except AttributeError as error:
        pytest.skip(f"transformers' own reader of FP8 fails on every folder: {error}")


def stock(section: Mapping[str, Any]) -> Any:
    """What transformers' FP8 operations ask of their quantizer."""
    from transformers import FineGrainedFP8Config

    return SimpleNamespace(quantization_config=FineGrainedFP8Config(**section))


def tiled(weight: Tensor, tiles: tuple[int, int], **section: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales of tiles by transformers' own quantizer, which is given whole tiles only."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    *_, rows, width = weight.shape
    whole = pad(weight, (0, -width % tiles[1], 0, -rows % tiles[0]))
    found = Fp8Quantize(stock({"weight_block_size": tiles, **section})).convert({"a.weight": whole})
    return found["a.weight"][..., :rows, :width].contiguous(), found["a.weight_scale_inv"]


def by_row(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    scale = (weight.float().abs().amax(-1, keepdim=True) / 448).to(dtype)
    return (weight.float() / scale.float()).clamp(-448, 448).to(E4M3), scale


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).clamp(-448, 448).to(E4M3), scale


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and exponents of a stack [experts, in, out]: the nearest E2M1 values, of a power of two for each 32."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    values = weight.transpose(1, 2).float().unflatten(-1, (-1, 32))
    exponents = (values.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = values / exponents.exp2()[..., None]
    codes = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def rewrite(folder: Path, section: Mapping[str, Any] | None, change: Callable[[Weights], Weights]) -> Path:
    """The folder with its tensors changed, the others in bfloat16, and a quantization section."""
    (file,) = folder.glob("*.safetensors")
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, file, {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "bfloat16"}
    path.write_text(json.dumps(config | ({} if section is None else {"quantization_config": dict(section)})))
    return folder


def linear(name: str) -> bool:
    """Whether a tensor is one that published models have in FP8: a projection, not a router, a head or embeddings."""
    return name.endswith("proj.weight") or name.endswith("_a.weight") or name.endswith("_b.weight")


def fp8(folder: Path, tiles: tuple[int, int] | None = (16, 16), **section: Any) -> Path:
    """A folder as DeepSeek's and Qwen's are; without tiles, one scale for each weight."""

    def change(tensors: Weights) -> Weights:
        for name in [name for name in tensors if linear(name)]:
            codes, scale = tiled(tensors[name], tiles, **section) if tiles else whole(tensors[name])
            tensors |= {name: codes, f"{name}_scale_inv": scale}
        return tensors

    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": tiles, "fmt": "e4m3"}
    return rewrite(folder, stated | section, change)


def modelopt(folder: Path, *, beside: bool = False) -> Path:
    """A folder as NVIDIA's ModelOpt writes it; beside: with its own file, and nothing in config.json."""

    def change(tensors: Weights) -> Weights:
        for name in [name for name in tensors if linear(name)]:
            codes, scale = whole(tensors[name])
            tensors |= {name: codes, f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.tensor(0.01)}
            if "k_proj" in name:
                tensors[name.replace("weight", "k_scale")] = torch.tensor(1.0)
        return tensors

    stated = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    if beside:
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": stated})
        )
    return rewrite(folder, None if beside else {"quant_method": "modelopt"} | stated, change)


def experts_in_mxfp4(folder: Path) -> Path:
    """A folder as gpt-oss is."""

    def change(tensors: Weights) -> Weights:
        for name in [name for name, t in tensors.items() if t.dim() == 3]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name))
        return tensors

    return rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, change)


def e2m1(scaled: Tensor) -> Tensor:
    """Bytes of the nearest two E2M1 codes along the last axis, the first in the low four bits."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    codes = (scaled.float()[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def powers(weight: Tensor, group: int, largest: float) -> Tensor:
    """The exponents, in a byte, of the least powers of two for groups along the last axis of a weight."""
    most = weight.float().unflatten(-1, (-1, group)).abs().amax(-1)
    return ((most / largest).log2().ceil().clamp(-127, 127) + 127).to(torch.uint8)


def mx(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and exponents of MXFP4 or MXFP8, as OCP's document has them: groups of 32 inputs."""
    exponents = powers(weight, 32, 6 if bits == 4 else 448)
    scaled = weight.float() / (exponents.float() - 127).exp2().repeat_interleave(32, -1)
    return e2m1(scaled) if bits == 4 else scaled.to(E4M3), exponents


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the second scale of NVFP4, as modelopt has them: codes · scale · second."""
    second = weight.float().abs().max() / (6 * 448)
    most = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    scale = (most / (6 * second)).to(E4M3)
    return e2m1(weight.float() / (scale.float() * second).repeat_interleave(16, -1)), scale, second


LAYOUTS: dict[str, dict[str, Any]] = {
    "nvfp4-pack-quantized": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3},
    "mxfp4-pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "mxfp8-quantized": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}
"""The layouts of compressed-tensors with groups of inputs → the arguments of their weights."""


def group_of(layout: str) -> tuple[Any, dict[str, Any]]:
    """compressed-tensors' scheme of a layout, and the section of a folder whose weights are stored in it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(type="float", symmetric=True, **LAYOUTS[layout])
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": layout}
    section = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    return scheme, section | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def compressed(weight: Tensor, layout: str) -> tuple[Weights, Tensor]:
    """The tensors in which compressed-tensors stores a weight, by suffix, and the weight as it dequantizes them."""
    from compressed_tensors.compressors import BaseCompressor

    scheme, _ = group_of(layout)
    size, bits = LAYOUTS[layout]["group_size"], LAYOUTS[layout]["num_bits"]
    if layout.startswith("nv"):
        second = (448 * 6 / weight.float().abs().max()).reshape(1)
        most = weight.float().unflatten(-1, (-1, size)).abs().amax(-1)
        given = {"weight_scale": (most / 6 * second).to(E4M3).float(), "weight_global_scale": second}
    else:
        given = {"weight_scale": (powers(weight, size, 6 if bits == 4 else 448).float() - 127).exp2().bfloat16()}
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress({"weight": weight, **given}, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def in_layout(layout: str) -> Callable[[Path], Path]:
    """Writes a folder as llm-compressor does."""

    def write(folder: Path) -> Path:
        def change(tensors: Weights) -> Weights:
            for name in [name for name in tensors if linear(name)]:
                stored, _ = compressed(tensors.pop(name), layout)
                tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in stored.items()}
            return tensors

        return rewrite(folder, group_of(layout)[1], change)

    return write


def modelopt_nvfp4(folder: Path) -> Path:
    """A folder as ModelOpt writes it in NVFP4."""

    def change(tensors: Weights) -> Weights:
        for name in [name for name in tensors if linear(name)]:
            codes, scale, second = nvfp4(tensors[name])
            inputs = name.replace("weight", "input_scale")
            tensors |= {name: codes, f"{name}_scale": scale, f"{name}_scale_2": second, inputs: torch.tensor(0.01)}
        return tensors

    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    return rewrite(folder, section | {"config_groups": {"group_0": group}}, change)


def experts_in_fp4(folder: Path) -> Path:
    """A folder as DeepSeek-V4 is: FP8 tiles with exponents as scales, and experts in FP4."""

    def change(tensors: Weights) -> Weights:
        for name in [
            name
            for name, t in tensors.items()
            if t.dim() == 2 and name.endswith(("w1.weight", "w2.weight", "w3.weight", "wkv.weight", "wo_b.weight"))
        ]:
            scale = name.replace("weight", "scale")
            if ".experts." in name:
                codes, exponents = mx(tensors[name], 4)
                tensors |= {name: codes.view(torch.int8), scale: exponents.view(torch.float8_e8m0fnu)}
            elif "compressor" not in name:
                codes, factors = tiled(tensors[name], (16, 16), scale_fmt="ue8m0")
                tensors |= {name: codes, scale: factors.to(torch.float8_e8m0fnu)}
        return tensors

    section = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
        "activation_scheme": "dynamic",
    }
    return rewrite(folder, section, change)
