"""Write a random model of a given shape, shard by shard, with only one decoder block in memory.

    python scripts/make_random_model.py OUT --shape llama-2-7b      13.5 GB of bf16 in 33 shards

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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                 "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
}  # fmt: skip


def main() -> None:
    """Parse, write, print the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="another number of decoder blocks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = LlamaConfig(**SHAPES[args.shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    if args.layers:
        config.num_hidden_layers = args.layers
    args.out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.out)
    demo = Path(__file__).parent.parent / "llmq" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, args.out)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.out), dtype=torch.bfloat16)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        key = ".".join(parts[:3]) if parts[1] == "layers" else "rest"
        groups.setdefault(key, {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(args.seed)
    weight_map, total = {}, 0
    for number, (_, shapes) in enumerate(groups.items(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) > 1:
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            else:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, args.out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{args.out}: {total / 2**30:.2f} GiB in {len(groups)} shards")


if __name__ == "__main__":
    main()
