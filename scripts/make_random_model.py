"""Write a random model of a given shape, shard by shard, with only one shard of 1 GiB in memory.

    python scripts/make_random_model.py OUT --shape llama-2-7b      13.5 GB of bf16
    python scripts/make_random_model.py OUT --shape deepseek-v3 --layers 4 --set vocab_size=4096
    python scripts/make_random_model.py OUT --shape deepseek-v3 --layers 4 --stored fp8      as DeepSeek publishes it
    python scripts/make_random_model.py OUT --shape llama-3-70b --empty     zeros that take no disk: for `llmq plan`

The weights are normal with the usual standard deviation of 0.02, norms are 1: for tests of memory, speed and errors,
not of accuracy. The tokenizer is the demo model's (its ids are valid in any larger vocabulary).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

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
    "llama-3-70b": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
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


def save_empty(shapes: dict[str, torch.Size], path: Path) -> int:
    """A file of bf16 zeros with a hole in place of them; returns how many bytes they would be."""
    header, end = {}, 0
    for name, wanted in shapes.items():
        begin, end = end, end + 2 * wanted.numel()
        header[name] = {"dtype": "BF16", "shape": list(wanted), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def make(
    out: Path,
    shape: str,
    layers: int | None = None,
    changes: dict[str, Any] | None = None,
    *,
    form: str | None = None,
    seed: int = 0,
    empty: bool = False,
) -> tuple[int, int]:
    """Write a model; returns its bytes and the number of its shards. changes: of config.json; form: see `stored`."""
    values = SHAPES[shape] | (changes or {})
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    config.dtype = "bfloat16"
    if layers:
        config.num_hidden_layers = layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    if form:
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": STORED[form]}))
    demo = Path(__file__).parent.parent / "llmq" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, out)
    kept = model.state_dict()
    tensors_of = dict(model.named_parameters()) | {name: held for name, held in model.named_buffers() if name in kept}
    shards = shared_out(revert_weight_conversion(model, tensors_of))
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if empty:
            total += save_empty(shapes, out / file)
            weight_map |= dict.fromkeys(shapes, file)
            continue
        tensors: dict[str, torch.Tensor] = {}
        for name, wanted in shapes.items():
            if form and len(wanted) == 2 and min(wanted) >= SMALL and config.vocab_size not in wanted:
                tensors |= stored(form, name, *wanted, generator)
            elif len(wanted) > 1:
                tensors[name] = torch.empty(wanted, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            else:
                tensors[name] = torch.ones(wanted, dtype=torch.bfloat16)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total, len(shards)


def shared_out(names: dict[str, torch.Tensor]) -> list[dict[str, torch.Size]]:
    """The names and shapes of each shard."""
    shards: list[dict[str, torch.Size]] = []
    size = SHARD_BYTES
    for name, parameter in names.items():
        if size + 2 * parameter.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.shape
        size += 2 * parameter.numel()
    return shards


def main() -> None:
    """Parse, write, print the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="another number of decoder blocks")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of config.json")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stored", choices=sorted(STORED), help="codes and scales, as models are published")
    kind.add_argument("--empty", action="store_true", help="zeros that take no disk, for `llmq plan`")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    changes = {key: json.loads(value) for key, _, value in (s.partition("=") for s in args.set)}
    total, shards = make(args.out, args.shape, args.layers, changes, form=args.stored, seed=args.seed, empty=args.empty)
    print(f"{args.out}: {total / 2**30:.2f} GiB in {shards} shards")


if __name__ == "__main__":
    main()
