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
