"""Folders of quantized weights in other tools' formats, written element by element from the formats' descriptions.

Nothing of llmq is used here: what reads these folders is not tested against itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Case:
    """One way of storing. order: inputs' groups are shuffled; zeros: asymmetric."""

    kind: str
    bits: int = 4
    group: int = 32
    zeros: bool = False
    order: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.bits}-g{self.group}{'-zeros' * self.zeros}{'-order' * self.order}"


def tiny(layers: int = 2, **changes: Any) -> Any:
    """A random decoder in float32 whose linear layers have random biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **(sizes | changes),
        num_hidden_layers=layers,
        vocab_size=256,
        max_position_embeddings=128,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for module in linears(model):
        if module[1].bias is not None:
            module[1].bias.data.normal_(std=0.1)
    return model


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def write(folder: Path, case: Case, shards: int = 1, **changes: Any) -> Any:
    """A folder, and the dense model in float32 that it stands for."""
    model = tiny(**changes)
    rng = np.random.default_rng(case.bits)
    state: Tensors = dict(model.state_dict())
    maker: Callable[..., tuple[Tensors, np.ndarray]] = {"gptq": gptq, "gptq_v2": gptq, "awq": awq}.get(
        case.kind, compressed
    )
    for name, module in linears(model):
        del state[f"{name}.weight"]
        made, weight = maker(rng, module.out_features, module.in_features, case)
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
        module.weight.data = torch.from_numpy(weight.astype(np.float32))
    model.config.quantization_config = config(case)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    del model.config.quantization_config
    save(folder, state, shards)
    return model


def save(folder: Path, state: Tensors, shards: int = 1) -> None:
    """One file, or several with an index; a weight's tensors may end up in different ones."""
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(places.values()):
        save_file({n: t for n, t in state.items() if places[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Changes the tensors of a folder with one file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save(folder, state)


def drawn(rng: Any, rows: int, width: int, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes [out, in], float16 scales and unsigned zero points [out, groups], the group of each input."""
    levels, size = 1 << case.bits, width if case.group < 0 else case.group
    groups = -(-width // size)
    codes = rng.integers(0, levels, (rows, width))
    scales = (rng.uniform(0.5, 1.5, (rows, groups)) * 0.4 / levels).astype(np.float16)
    zeros = rng.integers(0, levels, (rows, groups)) if case.zeros else np.full((rows, groups), levels // 2)
    group = np.arange(width) // size
    return codes, scales, zeros, rng.permutation(group) if case.order else group


def dense(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(code − zero) · scale, element by element."""
    return (codes - zeros[:, group]) * scales[:, group].astype(np.float64)


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values [rows, n] → int32 [rows, ceil(n·bits/32)], little-endian, least significant bit first."""
    words = -(-values.shape[1] * bits // 32)
    rows = []
    for row in values.tolist():
        whole = sum(value << (i * bits) for i, value in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(words * 4, "little"), dtype="<i4"))
    return np.stack(rows)


def three_bits(values: np.ndarray) -> np.ndarray:
    """[rows, 32·k] → int32 [rows, 3·k] as AutoGPTQ's kernels take it apart: values 10 and 21 straddle two words."""
    rows, n = values.shape
    out = np.zeros((rows, n // 32 * 3), dtype=np.uint32)
    v = values.astype(np.uint32).reshape(rows, n // 32, 32)
    for j in range(10):
        out[:, 0::3] |= v[:, :, j] << np.uint32(3 * j)
        out[:, 1::3] |= v[:, :, 11 + j] << np.uint32(3 * j + 1)
        out[:, 2::3] |= v[:, :, 22 + j] << np.uint32(3 * j + 2)
    out[:, 0::3] |= (v[:, :, 10] & 3) << np.uint32(30)
    out[:, 1::3] |= (v[:, :, 10] >> 2) | ((v[:, :, 21] & 1) << np.uint32(31))
    out[:, 2::3] |= v[:, :, 21] >> 1
    return out.view(np.int32)


def gptq(rng: Any, rows: int, width: int, case: Case) -> tuple[Tensors, np.ndarray]:
    codes, scales, zeros, group = drawn(rng, rows, width, case)
    pack = three_bits if case.bits == 3 else lambda values: stream(values, case.bits)
    stored = zeros if case.kind == "gptq_v2" else (zeros - 1) % (1 << case.bits)
    tensors = {
        "qweight": torch.from_numpy(pack(codes).T.copy()),
        "qzeros": torch.from_numpy(pack(stored.T)),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, dense(codes, scales, zeros, group)


def awq(rng: Any, rows: int, width: int, case: Case) -> tuple[Tensors, np.ndarray]:
    codes, scales, zeros, group = drawn(rng, rows, width, case)

    def pack(values: np.ndarray) -> torch.Tensor:
        out = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for nibble, column in enumerate(AWQ_COLUMNS):
            out |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(out.view(np.int32))

    tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
    return tensors, dense(codes, scales, zeros, group)


def compressed(rng: Any, rows: int, width: int, case: Case) -> tuple[Tensors, np.ndarray]:
    codes, scales, zeros, group = drawn(rng, rows, width, case)
    offset = 1 << (case.bits - 1)
    if case.kind == "ct-tensor":
        scales[:] = scales[0, 0]
    tensors = {"weight_scale": torch.from_numpy(scales[:1, :1].reshape(1) if case.kind == "ct-tensor" else scales)}
    if case.kind == "ct-int8":
        tensors["weight"] = torch.from_numpy((codes - offset).astype(np.int8))
        if case.zeros:
            tensors["weight_zero_point"] = torch.from_numpy((zeros - offset).astype(np.int8))
    else:
        tensors["weight_packed"] = torch.from_numpy(stream(codes, case.bits))
        tensors["weight_shape"] = torch.tensor([rows, width])
        if case.zeros:
            tensors["weight_zero_point"] = torch.from_numpy(stream(zeros.T, case.bits).T.copy())
    if case.order:
        tensors["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
    return tensors, dense(codes, scales, zeros, group)


def config(case: Case) -> dict[str, Any]:
    """The quantization_config."""
    common = {"bits": case.bits, "group_size": case.group}
    if case.kind in ("gptq", "gptq_v2"):
        extra = {"desc_act": case.order, "sym": not case.zeros, "checkpoint_format": case.kind}
        return {"quant_method": "gptq", **common, **extra}
    if case.kind == "awq":
        return {"quant_method": "awq", **common, "version": "gemm", "zero_point": True}
    strategy = "tensor" if case.kind == "ct-tensor" else "channel" if case.group < 0 else "group"
    weights = {
        "num_bits": case.bits,
        "type": "int",
        "symmetric": not case.zeros,
        "strategy": strategy,
        "group_size": case.group if strategy == "group" else None,
        "actorder": "group" if case.order else None,
    }
    form = "int-quantized" if case.kind == "ct-int8" else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
