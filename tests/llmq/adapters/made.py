"""Adapters of random numbers, written by PEFT, and models as stock transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


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
