"""What `inspect` says of folders in every format it knows, laid out by hand as the named tools lay them out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import Row
from llmq.formats.inspection import Alike, inspect_folder
from llmq.report import terminal

SHARED = Path(__file__).parents[4] / "shared"
OUT, IN = 64, 256
bf16 = torch.bfloat16


def folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    """A checkpoint with one weight `block.0.up` in some format, and a norm that is left alone."""
    path.mkdir(exist_ok=True)
    written = {f"block.0.{name}": tensor for name, tensor in tensors.items()}
    save_file({**written, "norm.weight": torch.ones(IN, dtype=bf16)}, path / "model.safetensors")
    quantization = {} if config is None else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", **quantization}))
    return path


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "strategy": "group", **weights}}


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group(**weights)}}


def i32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


SHAPE = torch.tensor([OUT, IN])
STATE = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]}).encode()
F8 = torch.float8_e4m3fn
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, tuple[str, int | None, int | None, bool | None]]] = {
    "int4 group": (
        {
            "up.weight_packed": i32(OUT, IN // 8),
            "up.weight_scale": torch.ones(OUT, 2, dtype=bf16),
            "up.weight_shape": SHAPE,
        },
        compressed("pack-quantized", num_bits=4, group_size=128),
        ("int", 4, 128, True),
    ),
    "int3 channel asymmetric": (
        {
            "up.weight_packed": i32(OUT, IN * 3 // 32),
            "up.weight_scale": torch.ones(OUT, 1, dtype=bf16),
            "up.weight_zero_point": i32(OUT * 3 // 32, 1),
            "up.weight_shape": SHAPE,
        },
        compressed("pack-quantized", num_bits=3, group_size=None, strategy="channel", symmetric=False),
        ("int", 3, 0, False),
    ),
    "int8": (
        {"up.weight": torch.zeros(OUT, IN, dtype=torch.int8), "up.weight_scale": torch.ones(OUT, 1)},
        compressed("int-quantized", num_bits=8, strategy="channel"),
        ("int", 8, 0, True),
    ),
    "fp8": (
        {"up.weight": torch.zeros(OUT, IN).to(F8), "up.weight_scale": torch.ones(1), "up.input_scale": torch.ones(1)},
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        ("float", 8, 0, True),
    ),
    "nvfp4": (
        {
            "up.weight_packed": u8(OUT, IN // 2),
            "up.weight_scale": torch.ones(OUT, IN // 16).to(F8),
            "up.weight_global_scale": torch.ones(1),
        },
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        ("float", 4, 16, True),
    ),
    "mxfp4": (
        {"up.weight_packed": u8(OUT, IN // 2), "up.weight_scale": u8(OUT, IN // 32)},
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        ("float", 4, 32, True),
    ),
    "gptq": (
        {
            "up.qweight": i32(IN // 8, OUT),
            "up.qzeros": i32(IN // 128, OUT // 8),
            "up.scales": torch.ones(IN // 128, OUT, dtype=torch.float16),
            "up.g_idx": i32(IN),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        ("int", 4, 128, True),
    ),
    "awq": (
        {
            "up.qweight": i32(IN, OUT // 8),
            "up.qzeros": i32(IN // 64, OUT // 8),
            "up.scales": torch.ones(IN // 64, OUT, dtype=torch.float16),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
        ("int", 4, 64, False),
    ),
    "nf4": (
        {
            "up.weight": u8(OUT * IN // 2, 1),
            "up.weight.absmax": torch.ones(OUT * IN // 64),
            "up.weight.quant_map": torch.ones(16),
            "up.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(STATE), dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ("nf4", 4, 64, True),
    ),
    "bitsandbytes int8": (
        {
            "up.weight": torch.zeros(OUT, IN, dtype=torch.int8),
            "up.SCB": torch.ones(OUT),
            "up.weight_format": u8(),
        },
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        ("int", 8, 0, True),
    ),
    "fp8 in blocks": (
        {"up.weight": torch.zeros(OUT, IN).to(F8), "up.weight_scale_inv": torch.ones(1, 2)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        ("float", 8, 128, True),
    ),
    "plain": ({"up.weight": torch.zeros(OUT, IN, dtype=bf16)}, None, ("plain", None, None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_formats(tmp_path: Path, case: str) -> None:
    tensors, config, (kind, bits, size, symmetric) = CASES[case]
    found = inspect_folder(folder(tmp_path, tensors, config))
    row, norm = found.rows
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    assert row == Row("block.0.up.weight", (OUT, IN), kind, bits, size, symmetric, None, nbytes, dtype)
    assert norm == Row("norm.weight", (IN,), "plain", None, None, None, None, 2 * IN, "bfloat16")
    assert found.method == (config or {}).get("quant_method")
    assert found.nbytes == nbytes + 2 * IN
    assert found.bits_per_weight == pytest.approx(8 * (nbytes + 2 * IN) / (OUT * IN + IN))
    if bits is None:
        assert found.bits_per_quantized_weight is None
    else:
        assert found.bits_per_quantized_weight == pytest.approx(8 * nbytes / (OUT * IN))


def test_each_weight_has_its_own_scheme(tmp_path: Path) -> None:
    config = compressed("pack-quantized", num_bits=4, group_size=128)
    config["config_groups"]["group_1"] = {**group(num_bits=8, group_size=64), "targets": ["re:.*down$"]}
    config["config_groups"]["group_2"] = {**group(num_bits=2, group_size=32), "targets": ["block.0.gate"]}
    tensors = {}
    for name, bits, size in (("up", 4, 128), ("down", 8, 64), ("gate", 2, 32)):
        tensors[f"{name}.weight_packed"] = i32(OUT, IN * bits // 32)
        tensors[f"{name}.weight_scale"] = torch.ones(OUT, IN // size, dtype=bf16)
        tensors[f"{name}.weight_shape"] = SHAPE.clone()
    found = inspect_folder(folder(tmp_path, tensors, config))
    schemes = {row.name: (row.bits, row.group, row.shape) for row in found.quantized}
    assert schemes == {
        "block.0.up.weight": (4, 128, (OUT, IN)),
        "block.0.down.weight": (8, 64, (OUT, IN)),
        "block.0.gate.weight": (2, 32, (OUT, IN)),
    }


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_errors_come_from_the_report(tmp_path: Path, ending: str) -> None:
    tensors, config, _ = CASES["int4 group"]
    path = folder(tmp_path, tensors, config)
    (path / "report.json").write_text(json.dumps({"weights": [{"name": f"block.0.up{ending}", "error": 0.125}]}))
    assert [row.error for row in inspect_folder(path).rows] == [0.125, None]
    (path / "report.json").write_text("not a report")
    assert [row.error for row in inspect_folder(path).rows] == [None, None]


@pytest.mark.parametrize(("bits", "told"), [(2, "int2 g128 (ternary, 1.58 bits of information)"), (4, "int4 g128")])
def test_the_report_says_which_two_bits_are_ternary(tmp_path: Path, bits: int, told: str) -> None:
    """Not so of more bits, whatever it says."""
    tensors = {
        "up.weight_packed": i32(OUT, IN * bits // 32),
        "up.weight_scale": torch.ones(OUT, IN // 128, dtype=bf16),
        "up.weight_shape": SHAPE.clone(),
    }
    path = folder(tmp_path, tensors, compressed("pack-quantized", num_bits=bits, group_size=128))
    rows = [{"name": "block.0.up", "error": 0.5, "scheme": {"grid": "ternary", "bits": 2}}]
    (path / "report.json").write_text(json.dumps({"weights": rows}))
    row = inspect_folder(path).rows[0]
    assert (row.error, terminal.scheme(row)) == (0.5, told)


def test_table(tmp_path: Path) -> None:
    tensors, config, _ = CASES["int3 channel asymmetric"]
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.inspection(console, inspect_folder(folder(tmp_path, tensors, config)))
    text = console.export_text()
    assert "block.0.up " in text and "64×256" in text and "int3 channel asymmetric" in text
    assert "1 × int3 channel asymmetric" in text and "bits per weight, whole model" in text


def test_table_of_what_is_not_understood(tmp_path: Path) -> None:
    tensors, config, _ = CASES["gptq"]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.inspection(console, inspect_folder(folder(tmp_path, tensors, config | {"bits": 8})))
    text = console.export_text()
    assert "not understood" in text and "1 weights" in text and "config.json says 8 bits" in text
    assert "whole model" not in text and "million" not in text and f"{OUT}×" not in text


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match="does not exist"):
        inspect_folder(tmp_path / "none")
    with pytest.raises(LlmqError, match="config.json"):
        inspect_folder(tmp_path)
    path = folder(tmp_path / "model", *CASES["gptq"][:2])
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(LlmqError, match="truncated"):
        inspect_folder(path)
    weights.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(LlmqError, match="pytorch_model.bin"):
        inspect_folder(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside this checkout")
def test_real_model() -> None:
    found = inspect_folder(SHARED / "models" / "stories260K")
    # Tied: the embedding is stored once, so the count is that of the model's card.
    assert (found.size, found.bits_per_weight, found.quantized) == (260_032, 32, ())


def listed(folder: Path, names: list[str]) -> list[str]:
    """The lines of an unquantized folder of 4 × 8 weights: a name each, with the number of what is told as one."""
    folder.mkdir()
    save_file({f"{name}.weight": torch.zeros(4, 8) for name in names}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    found = inspect_folder(folder)
    told = [f"{one.name} × {one.count}" if isinstance(one, Alike) else one.name for one in found.lines]
    rows = [row for one in found.lines for row in (one.rows if isinstance(one, Alike) else [one])]
    assert sorted(row.name for row in rows) == sorted(row.name for row in found.rows) and len(rows) == len(names)
    return told


def test_the_experts_of_a_block_are_a_line(tmp_path: Path) -> None:
    names = [f"l.{b}.moe.{e}.{n}" for b in range(2) for e in range(12) for n in ("up", "down")]
    assert listed(tmp_path / "x", [*names, "l.0.a", "l.1.z", "head"]) == [
        *("head.weight", "l.0.a.weight", "l.0.moe × 12", "l.1.moe × 12", "l.1.z.weight"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        [f"l.{i}.up" for i in range(8)],  # the blocks
        [f"l.0.e.{i}.up" for i in range(2)],  # too few
        [f"l.0.e.{i}.up" for i in (0, 2, 4)],  # the layers of a sequence, between activations
        [f"l.0.e.{i}.up" for i in (1, 2, 3)],
        [f"l.0.e.{i}.{n}" for i, n in enumerate(("up", "norm", "down"))],  # nothing alike
        [f"s.0.b.{i}.{n}" for i in range(4) for n in ("norm", "attn.q", "attn.k")],  # blocks in stages
    ],
)
def test_other_lists_are_told_one_by_one(names: list[str], tmp_path: Path) -> None:
    assert sorted(listed(tmp_path / "x", names)) == sorted(f"{name}.weight" for name in names)
