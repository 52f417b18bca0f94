"""Tiny random checkpoints of any type of transformers that reads images or sounds beside text.

The configuration is made as tiny.py makes it; pictures.py makes an image for each type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.architectures import tiny

TYPES: dict[str, str] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
#: Those that read sounds and no images.
OTHERS: dict[str, str] = {
    name: kind for name, kind in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if name not in TYPES
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
SMALL_MROPE = {"text_config.rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
ONE_TILE = {"image_grid_pinpoints": [[32, 32]]}
FLAT_VISION = {"patch_size": 8, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
               "num_attention_heads": 4, "num_key_value_heads": 4, "pooling_kernel_size": 2}  # fmt: skip
VQ = {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 2], "vq_config.num_embeddings": 8}

#: What a type needs on top, as in tiny.SPECIAL.
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 255},
    "chameleon": VQ | {"vocabulary_map": {"<image>": 255} | {f"IMGIMG{c}Z": 104 + i for i, c in enumerate("ABCDEFGH")},
                       "image_token_id": 255},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE}},
    "cosmos3_edge": MROPE,
    "deepseek_ocr2": {"text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1,
                      "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                      "vision_config.sam_config.downsample_channels": [64, 64]},
    "diffusion_gemma": {"text_config.moe_intermediate_size": 32, "text_config.num_experts": 4,
                        "text_config.top_k_experts": 2},
    "emu3": VQ | {"vq_config.codebook_size": 8, "vocabulary_map": {"<image>": 255, "<|extra_200|>": 254}
                  | {f"<|visual token {i:06d}|>": 104 + i for i in range(8)}},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [32, 32],
                        "text_config.rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "exaone4_5": {"text_config.model_type": "exaone4"},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {f"vision_config.{k}": v for k, v in FLAT_VISION.items()} | {"vision_config.model_type": "gemma4_vision"},
    "gemma4_unified": {"vision_config.patch_size": 8, "vision_config.pooling_kernel_size": 1,
                       "vision_config.mm_embed_dim": 64, "vision_config.mm_posemb_size": 16,
                       "vision_config.output_proj_dims": 64},
    "glm46v": SMALL_MROPE,
    "glm4v": SMALL_MROPE,
    "glm4v_moe": SMALL_MROPE,
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.num_key_value_heads": 4},
    "glm_ocr": SMALL_MROPE,
    "glmga": SMALL_MROPE,
    "granite4_vision": ONE_TILE | {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 1], [1, 2]],
                                   "spatial_target_layers": [2, 3]},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "instructblip": {"image_token_index": 255, "image_token_id": 255},
    "instructblipvideo": {"video_token_index": 255, "video_token_id": 255, "image_token_id": 255},
    "janus": VQ,
    "kosmos-2.5": {"vision_config.patch_embed_hidden_size": 192},
    "llama4": {"vision_config.intermediate_size": 256},
    "llava_next": ONE_TILE,
    "llava_next_video": ONE_TILE,
    "llava_onevision": ONE_TILE,
    "minicpm_ocr": {"image_token_id": 255, "video_token_id": 254, "vision_config.insert_layer_id": 1},
    "minicpmv4_6": {"image_token_id": 255, "video_token_id": 254, "vision_config.insert_layer_id": 1},
    "minicpmv4_7": {"image_token_id": 255, "video_token_id": 254, "vision_config.insert_layer_id": 1},
    "mllama": {"vision_config.vision_output_dim": 320, "text_config.cross_attention_layers": [1, 3]},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2], "vision_config.num_position_embeddings": 16},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256, "audio_config.hidden_sizes": [64] * 4, "audio_config.depths": [1] * 4},
    "nemotron_h_omni": {"image_token_id": 255, "video_token_id": 254, "vision_config.video_temporal_patch_size": 2,
                        "vision_config.patch_dim": 192, "vision_config.video_patch_dim": 384},
    "paddleocr_vl": MROPE,
    "qwen2_5_omni_thinker": MROPE | {"vision_start_token_id": 230, "vision_end_token_id": 231},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 32},
    "qwen3_omni_moe_thinker": MROPE | {"vision_start_token_id": 230, "vision_end_token_id": 231},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config.sliding_window": 16, "text_config.layer_types":
                ["full_attention", "full_attention", "full_attention", "full_attention"]},
    "unlimited_ocr": {"text_config.num_key_value_heads": 4, "vision_config.sam_config.downsample_channels": [64, 64]},
    "vipllava": {"vision_feature_layers": [-1, -2, -3, -4, 1]},
}  # fmt: skip


def kind(model_type: str) -> Any:
    """The class that a type's config.json names."""
    return getattr(transformers, (TYPES | OTHERS)[model_type])


def model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a type."""
    torch.manual_seed(seed)
    with tiny.quiet():
        made: Any = kind(model_type)._from_config(
            tiny.config(model_type, tiny.SPECIAL.get(model_type, {}) | SPECIAL.get(model_type, {})),
            dtype=torch.float32,
            attn_implementation="eager",
        )
    tiny.shake(made)
    whole: PreTrainedModel = made.eval()
    return whole


def make(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of a type (config.json and safetensors) into `folder`."""
    with tiny.quiet():
        model(model_type, seed).save_pretrained(folder)
    return folder
