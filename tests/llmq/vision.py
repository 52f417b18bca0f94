"""A tiny vision-language model: a causal model as the decoder behind a random vision tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.conftest import write_tokenizer

IMAGE = 5
"""The id of the token in whose place an image's features are put; an image has four."""


def write_llava(folder: Path, decoder: Path, *, processor: bool = True) -> Path:
    """Write it as a LLaVA checkpoint in float32, with a tokenizer of bytes. decoder: a Llama's folder."""
    loader: Any = AutoModelForCausalLM
    text = loader.from_pretrained(decoder, dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text.config, image_token_index=IMAGE)
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if processor:
        # As CLIPImageProcessor writes it, which needs torchvision.
        kind = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(kind))
    return folder


def an_image(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random image and text, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[7, *[IMAGE] * 4, 20, 30, 40, 50]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
