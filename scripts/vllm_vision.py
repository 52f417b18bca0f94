"""Small random vision-language models, with tokenizer and processor, for check_vllm.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
PIXELS, SIDE = 14, 56
"""The side of a patch and of the image, in pixels."""
QWEN = {
    "start": "<|vision_start|>",
    "image": "<|image_pad|>",
    "end": "<|vision_end|>",
    "video": "<|video_pad|>",
}
IDEFICS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")


@dataclass(frozen=True)
class Vision:
    """A type of vision-language models.

    text, tower, config: settings of the decoder, of the tower, of the whole; `$<image>` is the id of a token. place:
    the picture's, in a text; special: special tokens; processor, image: processor_config.json and
    preprocessor_config.json; renamed: what save_pretrained drops from the names that checkpoints on the hub have.
    """

    place: str
    special: tuple[str, ...]
    processor: dict[str, Any]
    image: dict[str, Any]
    text: dict[str, Any]
    tower: dict[str, Any]
    config: dict[str, Any]
    named: dict[str, str] = field(default_factory=dict)
    renamed: tuple[str, str] = ("", "")


SIZED = {"size": {"height": SIDE, "width": SIDE}}
EDGES = {"size": {"longest_edge": SIDE}}
INNER = ("vision_tower.", "vision_tower.vision_model.")
QWEN_IDS = {
    "image_token_id": "$<|image_pad|>",
    "vision_start_token_id": "$<|vision_start|>",
    "vision_end_token_id": "$<|vision_end|>",
    "video_token_id": "$<|video_pad|>",
}
VISION = {
    "llava": Vision(
        "<image>",
        ("<image>",),
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PIXELS,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": SIZED["size"],
        },
        {"model_type": "llama"},
        {"model_type": "clip_vision_model"},
        {"image_token_index": "$<image>", "image_seq_length": 16},
        renamed=INNER,
    ),
    "qwen2_5_vl": Vision(
        "<|vision_start|><|image_pad|><|vision_end|>",
        tuple(QWEN.values()),
        {"processor_class": "Qwen2_5_VLProcessor"},
        {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": PIXELS, "min_pixels": 784, "max_pixels": 3136},
        {"rope_parameters": MROPE},
        {"window_size": 56, "fullatt_block_indexes": [1]},
        QWEN_IDS,
    ),
    "qwen3_vl": Vision(
        "<|vision_start|><|image_pad|><|vision_end|>",
        tuple(QWEN.values()),
        {"processor_class": "Qwen3VLProcessor"},
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": PIXELS,
            "size": {"shortest_edge": 784, "longest_edge": 3136},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        {"head_dim": 64, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN_IDS,
    ),
    "gemma3": Vision(
        "<start_of_image>",
        ("<start_of_image>", "<image_soft_token>", "<end_of_image>", "\n", "\n\n", "\n\n\n", "\n\n\n\n"),
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": None} | SIZED,
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 128},
        {"vision_use_head": False},
        {
            "image_token_index": "$<image_soft_token>",
            "boi_token_index": "$<start_of_image>",
            "eoi_token_index": "$<end_of_image>",
            "mm_tokens_per_image": 4,
        },
        {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
        renamed=INNER,
    ),
    "mistral3": Vision(
        "[IMG]",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        {"processor_class": "PixtralProcessor", "patch_size": PIXELS, "spatial_merge_size": 2},
        {"image_processor_type": "PixtralImageProcessor", "patch_size": PIXELS} | EDGES,
        {"model_type": "mistral", "head_dim": 64},
        {"model_type": "pixtral", "head_dim": 64},
        {"image_token_index": "$[IMG]"},
    ),
    "idefics3": Vision(
        "<image>",
        (*IDEFICS, *(f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6))),
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": False,
            "max_image_size": {"longest_edge": SIDE},
        }
        | EDGES,
        {"model_type": "llama"},
        {},
        {"image_token_id": "$<image>"},
    ),
    "llava_onevision": Vision(
        "<image>",
        ("<image>", "<video>"),
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[SIDE, SIDE]]} | SIZED,
        {"model_type": "qwen2"},
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        {
            "image_token_index": "$<image>",
            "video_token_index": "$<video>",
            "image_grid_pinpoints": [[SIDE, SIDE]],
            "vision_aspect_ratio": "anyres_max_9",
        },
        renamed=INNER,
    ),
    "internvl": Vision(
        "<IMG_CONTEXT>",
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False} | SIZED,
        {"model_type": "qwen2"},
        {"image_size": [SIDE] * 2, "patch_size": [PIXELS] * 2},
        {"image_token_id": "$<IMG_CONTEXT>", "image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}
NEW_NAMES = ", names of transformers 5"
"""At the end of a model's name: with the names that transformers 5 has in memory, and only run on text."""
COMMON = {
    "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.08, "patch_size": PIXELS,
}  # fmt: skip
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE}
BLOCKS = {"depth": 2, "num_heads": 2, "out_hidden_size": 256}


def write_vision(kind: str, folder: Path, *, old_names: bool = True) -> Path:
    """Write a random model of a type in bfloat16, with a tokenizer of bytes and a processor. old_names: by the names of
    the type's checkpoints on the hub, not by those that transformers 5 has in memory.
    """
    told, ids = VISION[kind], tokens(kind)
    more = {key: ids[value[1:]] if str(value).startswith("$") else value for key, value in told.config.items()}
    depth = DEPTH if "num_hidden_layers" in CONFIG_MAPPING[kind]().vision_config.to_dict() else BLOCKS
    config: Any = CONFIG_MAPPING[kind](
        text_config=TEXT | told.text, vision_config=COMMON | depth | told.tower, tie_word_embeddings=False, **more
    )
    name = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    torch.manual_seed(0)
    model: Any = getattr(transformers, str(name))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # A projector may be zeros at first, and hide the picture.
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=old_names)
    old, new = told.renamed
    if old_names and old:
        file = folder / "model.safetensors"
        save_file({n.replace(old, new): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    write_processor(kind, folder)
    return folder


def tokens(kind: str) -> dict[str, int]:
    """The vocabulary: special tokens, then the bytes."""
    names = ["<pad>", "<s>", "</s>", *VISION[kind].special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {name: number for number, name in enumerate(names)}


def write_processor(kind: str, folder: Path) -> None:
    """Tokenizer and processor. The latter as data: transformers builds some only where torchvision is installed."""
    told = VISION[kind]
    tokenizer = Tokenizer(models.BPE(vocab=tokens(kind), merges=[]))
    tokenizer.add_special_tokens([*told.special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=told.named,
    ).save_pretrained(folder)
    image = told.image | {"processor_class": told.processor["processor_class"]}
    files = {"processor_config.json": told.processor, "preprocessor_config.json": image}
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2))
