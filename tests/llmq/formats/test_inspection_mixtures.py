"""What `inspect` says of mixtures whose shared experts are several experts wide: what is so, or nothing.

The tensors are those that mlx-lm 0.32 and GPTQ tools write for models of these shapes; the folders that mlx-lm itself
wrote for 42 tiny models of 18 types were told of without a fault when these tests were written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.formats.inspection import inspect_folder

HIDDEN, DENSE, EXPERT, EXPERTS, HEADS, HEAD = 256, 640, 192, 4, 4, 64
CONFIG = {
    **{"hidden_size": HIDDEN, "intermediate_size": DENSE, "moe_intermediate_size": EXPERT, "n_routed_experts": EXPERTS},
    **{"num_attention_heads": HEADS, "head_dim": HEAD, "vocab_size": 512, "num_hidden_layers": 2},
}
Shapes = dict[str, tuple[int, ...]]
Layout = Callable[[str, tuple[int, ...], int, int], dict[str, Tensor]]


def mixture(shared: int) -> Shapes:
    """The matrices of a model with a dense layer and one of experts, and `shared` experts in one."""
    shapes: Shapes = {"model.embed_tokens": (512, HIDDEN), "lm_head": (512, HIDDEN)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {
            f"{layer}.self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            f"{layer}.self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        }
        shapes |= {f"{layer}.self_attn.{name}_proj": (2 * HEAD, HIDDEN) for name in "kv"}
    places = [("model.layers.0.mlp", (), DENSE), ("model.layers.1.mlp.switch_mlp", (EXPERTS,), EXPERT)]
    for place, stacked, width in [*places, ("model.layers.1.mlp.shared_experts", (), shared * EXPERT)]:
        shapes |= {f"{place}.{name}_proj": (*stacked, width, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{place}.down_proj": (*stacked, HIDDEN, width)}
    return shapes


def mlx(name: str, shape: tuple[int, ...], bits: int, group: int) -> dict[str, Tensor]:
    *out, inputs = shape
    scales = torch.ones(*out, inputs // group, dtype=torch.bfloat16)
    words = torch.zeros(*out, inputs * bits // 32, dtype=torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": scales.clone()}


def gptq(name: str, shape: tuple[int, ...], bits: int, group: int) -> dict[str, Tensor]:
    """Without zero points and order, as for Marlin kernels: the widths of codes are told apart by config.json only."""
    out, inputs = shape
    words = torch.zeros(inputs * bits // 32, out, dtype=torch.int32)
    return {f"{name}.qweight": words, f"{name}.scales": torch.ones(inputs // group, out, dtype=torch.float16)}


def compressed(name: str, shape: tuple[int, ...], bits: int, group: int) -> dict[str, Tensor]:
    """Without weight_shape."""
    out, inputs = shape
    words = torch.zeros(out, inputs * bits // 32, dtype=torch.int32)
    return {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": torch.ones(out, inputs // group, dtype=torch.float16),
    }


def write(folder: Path, shapes: Shapes, true: tuple[int, int], layout: Layout, section: dict[str, Any]) -> Path:
    tensors = {k: t for name, shape in shapes.items() for k, t in layout(name, shape, *true).items()}
    norms = {f"model.layers.{i}.{name}.weight": torch.ones(HIDDEN) for i in (0, 1) for name in ("in_norm", "mlp_norm")}
    save_file({**tensors, **norms}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | section))
    return folder


def told(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What is told of each matrix: shape, bits, group; nothing where it is not understood."""
    rows = [row for row in inspect_folder(folder).rows if "norm" not in row.name]
    return {r.name.removesuffix(".weight"): (r.shape, r.bits, r.group) if r.understood else () for r in rows}


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize("true", [(2, 64), (3, 64), (4, 32), (4, 64), (6, 32), (8, 32), (8, 64)], ids=str)
def test_mlx(tmp_path: Path, shared: int, true: tuple[int, int]) -> None:
    bits, group = true
    section = {"n_shared_experts": shared, "quantization": {"bits": bits, "group_size": group, "mode": "affine"}}
    shapes = mixture(shared)
    assert told(write(tmp_path, shapes, true, mlx, section)) == {n: (s, bits, group) for n, s in shapes.items()}


@pytest.mark.parametrize("layout", [gptq, compressed])
@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize("true", [(2, 64), (4, 64), (8, 32)], ids=str)
def test_codes_in_words(tmp_path: Path, shared: int, true: tuple[int, int], layout: Layout) -> None:
    bits, group = true
    group_of = {"num_bits": bits, "group_size": group, "type": "int", "symmetric": True, "strategy": "group"}
    settings: dict[str, Any] = {"bits": bits, "group_size": group, "sym": True}
    if layout is compressed:
        settings = {"format": "pack-quantized", "config_groups": {"0": {"targets": ["Linear"], "weights": group_of}}}
    settings["quant_method"] = "gptq" if layout is gptq else "compressed-tensors"
    section = {"n_shared_experts": shared, "quantization_config": settings}
    shapes: Shapes = {name: shape for name, shape in mixture(shared).items() if len(shape) == 2}
    assert told(write(tmp_path, shapes, true, layout, section)) == {n: (s, bits, group) for n, s in shapes.items()}


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize(("true", "stated"), [((4, 64), (8, 32)), ((8, 32), (4, 64)), ((2, 64), (4, 32))], ids=str)
def test_no_false_width_of_a_shared_expert(
    tmp_path: Path, shared: int, true: tuple[int, int], stated: tuple[int, int]
) -> None:
    """Where config.json has other bits than the tensors, what comes after gate and up is not told falsely."""
    section = {"n_shared_experts": shared, "quantization": dict(zip(("bits", "group_size"), stated, strict=True))}
    seen = told(write(tmp_path, mixture(shared), true, mlx, section))
    assert [seen[name] for name in seen if name.endswith("down_proj")] == [()] * 3
