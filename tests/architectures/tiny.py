"""Tiny random checkpoints of any causal-LM type of transformers, made from the type's own default configuration.

tiny_vision.py has the types that read images.

Each attribute that a table of synonyms knows gets a small value, nested configurations too; lists with one entry per
layer are cut to LAYERS entries in which every kind of layer occurs. SPECIAL has what a few types need on top.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
VOCAB = 256
TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SYNONYMS: dict[int, str] = {
    # value: the names of what should have it
    64: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
        input_embedding_size output_embedding_size backbone_hidden_size lru_width pronunciation_embed_dim
        shape_embed_dim router_hidden_size prompt_mid_dim audio_embed_dim dim_model_base moe_latent_size
        out_hidden_size embed_dim cross_attention_hidden_size hc_lowrank output_dim projection_dim
        text_hidden_size projector_input_dim projector_output_dim projector_hidden_size projection_hidden_size
        image_text_hidden_size image_token_embed_dim vision_hidden_size vision_output_dim decoder_hidden_size
        merged_hidden_size encoder_hidden_size output_channels""",
    2: """num_encoder_layers encoder_layers num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok
        moe_topk moe_k num_experts_per_token topk_group n_group num_expert_group swa_num_key_value_heads
        type_vocab_size mamba_n_groups n_groups mamba_ngroups num_mem_blocks depth top_k_experts index_kv_heads
        zero_expert_num top_k o_groups indexer_kv_heads mhc_count hc_count hc_mult index_topk_blocks
        num_hidden_groups resampler_depth num_global_layers resampler_n_heads resampler_heads
        layers""",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads
        num_query_groups num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads
        linear_num_heads linear_num_key_heads linear_num_value_heads num_codebooks linear_attn_num_heads
        indexer_n_heads heads_per_ngram num_attention_heads_per_layer relative_attention_num_buckets""",
    8: """mamba_n_heads mamba_num_heads n_mamba_heads qk_rope_head_dim rotary_dim mamba_dt_rank time_step_rank
        laurel_rank d_rel chunk_size mamba_chunk_size hidden_size_per_layer_input ple_embed_dim
        index_block_size adapter_rank image_seq_length patch_size video_patch_size mel_dim resampler_n_latents
        resampler_num_latents latent_query_num num_query_tokens""",
    16: """head_dim d_head dim_head qk_nope_head_dim v_head_dim kv_channels attention_head_size swa_head_dim
        index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim global_head_dim swa_v_head_dim
        mamba_d_state state_size ssm_state_size mamba_head_dim mamba_headdim mamba_d_head indexer_head_dim
        attention_chunk_size sliding_window sliding_window_size window_size block_size index_topk
        gated_norm_rank rel_extent local_attention_window_len attention_window_size lsh_attn_chunk_length
        local_attn_chunk_length conv_hidden_size d_kv downsample_hidden_size base_channels latent_channels
        resampler_head_dim resampler_dim_head d_kv base_image_seq_length""",
    32: """q_lora_rank kv_lora_rank o_lora_rank moe_intermediate_size expert_ffn_hidden_size
        attention_head_dim_ shared_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size image_size num_mel_bins resolution
        share_expert_dim max_image_size max_img_size""",
    128: """intermediate_size ffn_dim ffn_hidden_size n_inner d_inner decoder_ffn_dim encoder_ffn_dim dff
        dim_ff feed_forward_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm
        max_position_embeddings n_positions max_seq_len context_length n_ctx max_source_positions
        max_target_positions model_max_length attention_hidden_size position_bias_max_distance
        original_max_position_embeddings moe_ffn_hidden_size prefix_dense_intermediate_size
        alignment_intermediate_size mlp_dim d_ff projection_intermediate_size num_embeddings""",
    VOCAB: """vocab_size decoder_vocab_size audio_vocab_size vocab_size_per_layer_input unpadded_vocab_size
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base
        codebook_size""",
}  # fmt: skip
VALUES = {name: value for value, names in SYNONYMS.items() for name in names.split()}

INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
           "indexer_compress_ratio": 4}  # fmt: skip
#: Layers with a sliding window have heads of their own, which are large by default.
WINDOWED = {"head_dim": 24, "per_layer_config": {
    str(i): {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16} for i in (2, 3)}}  # fmt: skip

#: What a type needs on top; a dotted key goes into a nested configuration; None takes an attribute away.
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"global_config.num_hidden_layers": 6},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "dots3_note": {f"text_config.{k}": v for k, v in WINDOWED.items()},
    "dots3_note_text": WINDOWED,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{k}": v for k, v in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

SMALL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PER_LAYER_COUNT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth")
#: Ids of tokens that stand for what is not text, and lists of layers by their numbers.
READS = re.compile("image|video|audio|vision|visual|^im_|^bo|^eo")
INDICES = re.compile("ind(ex|ice)|idx|_layers$")


def config(model_type: str, special: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The tiny configuration of a type. special: in place of the type's entry in SPECIAL."""
    with quiet():
        default = CONFIG_MAPPING[model_type]
        values = _shrunk(default())
        for key, value in (SPECIAL.get(model_type, {}) if special is None else special).items():
            *path, leaf = key.split(".")
            target = values
            for part in path:
                target = target.setdefault(part, {})
            target[leaf] = value
        return default(**values)


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    # Only what is given here is passed to the constructor: what a configuration derives, it derives again.
    common = set(vars(PreTrainedConfig()))
    values: dict[str, Any] = {}
    attributes = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    counted = next((n for n in PER_LAYER_COUNT if isinstance(attributes.get(n), int)), PER_LAYER_COUNT[0])
    layers = attributes.get(counted, 0)
    lists = {k: v for k, v in attributes.items() if isinstance(v, (list, tuple)) and len(v) == layers > 0}
    picked = _picked([tuple(repr(v[i]) for v in lists.values()) for i in range(layers)]) if lists else []
    for name, value in attributes.items():
        if hasattr(value, "model_type"):
            values[name] = _shrunk(value)
        elif name in lists:
            values[name] = [VALUES.get(name, value[i]) for i in picked]
        elif isinstance(value, bool) or name == "model_type":
            continue
        elif name.endswith(("token_id", "token_index", "_token_ids", "_id")):
            ids = value if isinstance(value, (list, tuple)) else [value]
            if name in SMALL_IDS and value is not None:
                values[name] = SMALL_IDS[name]
            elif any(isinstance(i, int) and (i >= VOCAB or READS.search(name)) for i in ids):
                own = VOCAB - 1 - 8 * (len(values) % 12)
                values[name] = own if isinstance(value, int) else [own - i for i in range(len(ids))]
        elif isinstance(value, (list, tuple)) and name in VALUES and not any(isinstance(v, list) for v in value):
            values[name] = type(value)([VALUES[name]] * len(value))
        elif isinstance(value, (list, tuple)) and value and INDICES.search(name) and isinstance(value[0], int):
            values[name] = type(value)(sorted({i * VALUES[counted] // max(layers, i + 1) for i in value}))
        elif isinstance(value, int) and name in VALUES:
            values[name] = VALUES[name]
        elif isinstance(value, int) and value > 512 and name not in common:
            values[name] = 64
        elif "dropout" in name or name.endswith("_pdrop"):
            values[name] = value if value is None else type(value)(0)
        elif name in ("initializer_range", "init_std") and isinstance(value, float):
            values[name] = 0.1
    if isinstance(values.get("kv_lora_rank"), int):  # latent attention has no heads of keys to share
        values["num_key_value_heads"] = VALUES["num_attention_heads"]
        values.pop("head_dim", None)
    if "is_decoder" in attributes:
        values["is_decoder"] = True
    return values


def _picked(kinds: list[tuple[str, ...]]) -> list[int]:
    """LAYERS indices, in order, among which as many kinds of layer as possible occur."""
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:LAYERS]
    rest = [i for i in range(len(kinds)) if i not in first][: LAYERS - len(first)]
    return sorted(first + rest)


def model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a type, with logits that depend on the whole context."""
    torch.manual_seed(seed)
    with quiet():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config(model_type), dtype=torch.float32, attn_implementation="eager"
        )
    shake(made)
    return made.eval()


def shake(module: nn.Module) -> None:
    """Noise on every parameter that initialisation left constant or next to nothing (norms, biases, gates)."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2 or parameter.numel() < 2 or float(parameter.std()) < 0.03:
                parameter.add_(0.1 * torch.randn_like(parameter))


def make(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of a type (config.json and safetensors) into `folder`."""
    with quiet():
        model(model_type, seed).save_pretrained(folder, safe_serialization=True)
    return folder


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length], none of them among the small ids that tend to be special."""
    return torch.randint(10, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def quiet() -> Any:
    """Without warnings and what is printed to standard error."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
