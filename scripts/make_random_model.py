"""Write a random model of a given shape, shard by shard, with only one shard of 1 GiB in memory.

    python scripts/make_random_model.py OUT --shape llama-2-7b      13.5 GB of bf16
    python scripts/make_random_model.py OUT --shape deepseek-v3 --layers 4 --set vocab_size=4096
    python scripts/make_random_model.py OUT --shape deepseek-v3 --layers 4 --stored fp8      as DeepSeek publishes it

The weights are normal with the usual standard deviation of 0.02, norms are 1: for tests of memory, speed and errors,
not of accuracy. The tokenizer is the demo model's (its ids are valid in any larger vocabulary).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

SHAPES = {
    "llama-2-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
                   "max_position_embeddings": 4096},
    "llama-3-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                   "max_position_embeddings": 8192},
    "llama-1b": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
                 "max_position_embeddings": 2048},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                      "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                      "vocab_size": 151936, "max_position_embeddings": 40960, "norm_topk_prob": True},
    "mixtral-8x7b": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
                     "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768},
    "gemma-3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
                   "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                   "vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768,
                   "tie_word_embeddings": True},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                   "max_position_embeddings": 40960, "tie_word_embeddings": True},
    "qwen3-moe-1b": {"model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 3072,
                     "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 2, "head_dim": 128,
                     "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
                     "vocab_size": 32000, "max_position_embeddings": 40960, "norm_topk_prob": True},
    # DeepSeek-V3: the configuration's own defaults.
    "deepseek-v3": {"model_type": "deepseek_v3", "num_hidden_layers": 61},
}  # fmt: skip
SHARD_BYTES = 2**30
TILE, GROUP, SMALL = 128, 16, 512
STORED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [TILE, TILE], "activation_scheme": "dynamic", "fmt": "e4m3"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": GROUP},
}
"""How published weights are stored → the section of config.json. Those of fewer than SMALL rows or columns (routers)
and of the vocabulary are not."""


def stored(form: str, name: str, rows: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random weight of a published form: its codes and scales."""
    if form == "fp8":
        codes = torch.empty(rows, width).normal_(0, 100, generator=generator).clamp_(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.full((-(-rows // TILE), -(-width // TILE)), 2e-4)
        return {name: codes, f"{name}_scale_inv": scales}
    pairs = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, generator=generator)
    scales = torch.ones(rows, width // GROUP).to(torch.float8_e4m3fn)
    return {name: pairs, f"{name}_scale": scales, f"{name}_scale_2": torch.tensor(8e-3)}


def main() -> None:
    """Parse, write, print the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="another number of decoder blocks")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of config.json")
    parser.add_argument("--stored", choices=sorted(STORED), help="codes and scales, as models are published")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = dict(SHAPES[args.shape]) | {
        key: json.loads(value) for key, _, value in (s.partition("=") for s in args.set)
    }
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, dtype="bfloat16")
    if args.layers:
        config.num_hidden_layers = args.layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    args.out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.out)
    if args.stored:
        path = args.out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": STORED[args.stored]}))
    demo = Path(__file__).parent.parent / "llmq" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, args.out)
    names = revert_weight_conversion(model, dict(model.named_parameters()))
    shards: list[dict[str, torch.Size]] = []
    size = SHARD_BYTES
    for name, parameter in names.items():
        if size + 2 * parameter.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.shape
        size += 2 * parameter.numel()
    generator = torch.Generator().manual_seed(args.seed)
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, wanted in shapes.items():
            if args.stored and len(wanted) == 2 and min(wanted) >= SMALL and config.vocab_size not in wanted:
                parts = stored(args.stored, name, *wanted, generator)
                tensors |= parts
                weight_map |= dict.fromkeys(parts, file)
                total += sum(part.nbytes for part in parts.values())
                continue
            if len(wanted) > 1:
                tensors[name] = torch.empty(wanted, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            else:
                tensors[name] = torch.ones(wanted, dtype=torch.bfloat16)
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, args.out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{args.out}: {total / 2**30:.2f} GiB in {len(shards)} shards")


if __name__ == "__main__":
    main()
