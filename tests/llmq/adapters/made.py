"""Adapters of random numbers, written by PEFT, and models as stock transformers loads them."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

newer_peft = pytest.mark.skipif(
    find_spec("peft") is None or version("peft").startswith("0.18."),
    reason="PEFT 0.18 does not have it, or leaves parts of it out",
)


def nf4() -> Any:
    """What makes stock transformers quantize a model while loading it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def load(folder: Path, **options: Any) -> Any:
    """The model as stock transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter of random numbers on every linear layer, written by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    model = get_peft_model(load(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of a deeper model."""
    return {name.replace("layers.2.", "layers.7."): value for name, value in tensors.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One change is of a weight with other inputs."""
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_A" in name)
    return tensors | {name: torch.zeros(4, 96)}


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One change lacks a factor."""
    return {name: value for name, value in tensors.items() if "layers.1.mlp.down_proj.lora_B" not in name}


def trained(folder: Path, base: Path, kind: Any = None, save: dict[str, Any] | None = None, **options: Any) -> Path:
    """An adapter in which everything that PEFT would train has changed, of a base in bfloat16, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))
    model = get_peft_model(opened(base, kind), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.03)
    model.save_pretrained(folder, **(save or {}))
    return folder


def opened(base: Path, kind: Any = None) -> Any:
    """The base in bfloat16, as stock transformers loads it by a class, AutoModelForCausalLM by default."""
    from transformers import AutoModelForCausalLM

    return (kind or AutoModelForCausalLM).from_pretrained(base, dtype=torch.bfloat16).eval()


def peft_merged(base: Path, adapter: Path, kind: Any = None) -> dict[str, Tensor]:
    """What PEFT makes of the two: the reference."""
    from peft import PeftModel

    return dict(PeftModel.from_pretrained(opened(base, kind), adapter).merge_and_unload().state_dict())


def stock_merged(merged: Any, folder: Path, kind: Any = None) -> dict[str, Tensor]:
    """The merged source written out and loaded by stock transformers."""
    shutil.copytree(merged.base.folder, folder)
    save_file({n: merged.read(n) for n in merged.names()}, folder / "model.safetensors", metadata={"format": "pt"})
    return dict(opened(folder, kind).state_dict())


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two models' parameters."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def rewritten(folder: Path, adapter: Path, *pairs: tuple[str, str]) -> Path:
    """The adapter with other names: of each tensor's, the first of the pairs that it has is replaced."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {}
    for name, value in tensors.items():
        old, new = next((pair for pair in pairs if pair[0] in name), ("", ""))
        named[name.replace(old, new) if old else name] = value
    save_file(named, folder / "adapter_model.safetensors")
    return folder
