"""One random image beside text, as each type's forward wants it; what it wants is found by its arguments' names."""

from __future__ import annotations

import inspect
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Patches in rows, and where each is: 4 × 4 of them.
GRID = [[x, y] for y in range(4) for x in range(4)]
FLAT = {"pixel_values": (1, 16, 192), "image_position_ids": [GRID]}
PIECES = {"pixel_values": (1, 1, 3, 32, 32), "pixel_attention_mask": None}
TILES = {"pixel_values": (1, 2, 3, 32, 32)}
ROWS = {"pixel_values": (1, 3, 8, 128), "target_sizes": [[4, 4]]}
QUESTION = {"qformer_input_ids": [[5, 6, 7]], "qformer_attention_mask": [[1, 1, 1]]}

#: What a picture is for a type, by the argument's name: the shape of noise, or numbers, or nothing. Others are made as
#: `picture` says.
PICTURES: dict[str, dict[str, Any]] = {
    "aya_vision": {"image_sizes": None},
    "cohere2_vision": {"image_sizes": None},
    "deepseek_vl_hybrid": {"high_res_pixel_values": (1, 3, 32, 32)},
    "evolla": {"protein_input_ids": [[5, 6, 7, 8, 9, 10]], "protein_attention_mask": [[1] * 6]},
    "fuyu": {"pixel_values": (1, 16, 192)},
    "gemma4": FLAT,
    "gemma4_unified": FLAT,
    "granite4_vision": TILES,
    "granite_docling": {"pixel_values": (1, 1, 3, 32, 32), "pixel_attention_mask": [[True]]},
    "idefics": {"pixel_values": (1, 1, 3, 32, 32)},
    "idefics2": PIECES,
    "idefics3": PIECES,
    "inkling2": {"pixel_values": (16, 16, 16, 3)},
    "inkling_mm_model": {"pixel_values": (4, 2, 8, 8, 3)},
    "instructblip": QUESTION,
    "instructblipvideo": QUESTION | {"pixel_values": (1, 2, 3, 32, 32)},
    "internvl": {"image_sizes": None},
    "kimi_k25": {"pixel_values": (16, 3, 8, 8)},
    "kosmos-2.5": {"width": [[4]], "height": [[4]]},
    "lfm2_vl": {"pixel_values": (1, 16, 192), "spatial_shapes": [[4, 4]], "pixel_attention_mask": [[1] * 16]},
    "llava": {"image_sizes": None},
    "llava_next": TILES,
    "llava_next_video": TILES,
    "llava_onevision": TILES,
    "minicpm_ocr": ROWS,
    "minicpmv4_6": ROWS,
    "minicpmv4_7": ROWS,
    "mllama": {"pixel_values": (1, 1, 4, 3, 32, 32), "aspect_ratio_ids": [[6]], "aspect_ratio_mask": [[[1, 1, 1, 1]]]},
    "molmo2": {"pixel_values": (1, 16, 192), "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7]],
               "image_grids": [[1, 2, 0, 0]], "image_num_crops": [1]},
    "nemotron_h_omni": {"pixel_values": (16, 192), "image_grid_hw": [[4, 4]]},
    "paddleocr_vl": {"pixel_values": (16, 3, 8, 8)},
    "qianfan_ocr": {"image_sizes": None},
    "smolvlm": PIECES,
    "video_llama_3": {"image_merge_sizes": [2]},
}  # fmt: skip

#: How many tokens of a text stand for the picture, where the model has no way of asking.
FEATURES: dict[str, int] = {
    "blip": 0,
    "blip-2": 8,
    "deepseek_vl": 16,
    "deepseek_vl_hybrid": 16,
    "evolla": 0,
    "fuyu": 16,
    "git": 0,
    "granite4_vision": 10,
    "idefics": 0,
    "instructblip": 8,
    "instructblipvideo": 8,
    "janus": 16,
    "kosmos-2": 8,
    "kosmos-2.5": 8,
    "mistral4": 0,
    "mllama": 0,
}


def first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration has; of a list, its first item."""
    value = next((v for n in names if (v := getattr(config, n, None)) is not None), default)
    return value[0] if isinstance(value, (list, tuple)) else value


def reads_images(model: PreTrainedModel) -> bool:
    """Whether its forward wants an image."""
    asked = inspect.signature(model.forward).parameters
    return any(name in asked for name in ("pixel_values", "flattened_patches"))


def picture(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """One random image as the model's forward wants it: its arguments by name."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vision = getattr(config, "vision_config", config)
    asked = inspect.signature(model.forward).parameters
    channels, patch = first(vision, "in_channels", "num_channels", default=3), first(vision, "patch_size", default=8)
    side = first(vision, "image_size", default=32)
    special = PICTURES.get(config.model_type, {})
    flat = (16, channels * first(vision, "temporal_patch_size", "patch_temporal", default=1) * patch * patch)
    usual: dict[str, Any] = {
        "pixel_values": flat if "image_grid_thw" in asked else (1, channels, side, side),
        "image_grid_thw": [[1, 4, 4]],
        "image_sizes": [[side, side]],
        "flattened_patches": (1, 16, 2 + channels * patch * patch),  # each with its row and column before it
    }
    made: dict[str, Tensor] = {}
    for name, what in {n: v for n, v in (usual | special).items() if n in asked and v is not None}.items():
        made[name] = torch.randn(what, generator=generator) if isinstance(what, tuple) else torch.tensor(what)
        if name == "flattened_patches":
            made[name][..., :2] = torch.tensor(GRID)
    return made


def stands_for(config: Any) -> int:
    """The id of the token that stands for a piece of an image."""
    return int(first(config, "image_token_id", "image_token_index", "image_patch_id", default=255))


def count_features(model: PreTrainedModel, image: dict[str, Tensor]) -> int:
    """How many tokens of a text stand for the image."""
    known = FEATURES.get(model.config.model_type)
    if known is not None:
        return known
    inner: Any = getattr(model, "model", None)
    ask: Any = (inner if hasattr(inner, "get_image_features") else model).get_image_features
    with torch.no_grad():
        features = ask(**{n: v for n, v in image.items() if n in inspect.signature(ask).parameters})
    pooled = getattr(features, "pooler_output", None)
    features = getattr(features, "last_hidden_state", features) if pooled is None else pooled
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def seen(model: PreTrainedModel, seed: int = 0, text: int = 1) -> dict[str, Tensor]:
    """One image and text [1, tokens], as the model's forward wants it. seed: of the image; text: of the text."""
    image = picture(model, seed)
    count, ids = count_features(model, image), tiny.tokens(1, 16, text)
    ids = torch.cat([ids[:, :4], torch.full((1, count), stands_for(model.config)), ids[:, 4:]], 1)
    here, length = (ids == stands_for(model.config)).long(), ids.shape[1]
    beside = {
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": here,
        "token_type_ids": here,
        "moe_mm_token_type_ids": here,
        "image_embeds_position_mask": here,
        "image_attention_mask": torch.ones(1, length, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, length, 1, 4, dtype=torch.long),
    }
    asked = inspect.signature(model.forward).parameters
    return {"input_ids": ids} | {n: v for n, v in beside.items() if n in asked} | image
