"""Integer folders as dense weights: against arithmetic on the stored tensors; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors
from llmq.formats.compressed_tensors import values
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme


def folder(at: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> FolderSource:
    at.mkdir(exist_ok=True)
    save_file({f"up.{name}": tensor.contiguous() for name, tensor in tensors.items()}, at / "model.safetensors")
    (at / "config.json").write_text(json.dumps({"quantization_config": section}))
    return FolderSource(at, quantized_ok=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.sampled_from([None, 16, 32]), st.booleans(), st.integers(1, 9), st.integers(0, 99))
def test_integers(
    tmp_path_factory: pytest.TempPathFactory, bits: int, group: int | None, symmetric: bool, rows: int, seed: int
) -> None:
    scheme = Scheme(bits, group, symmetric)
    value = torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))
    q = round_to_nearest(value, scheme, torch.bfloat16)
    section = compressed_tensors.config({scheme: ["up"]}, [], torch.bfloat16)
    source = folder(tmp_path_factory.mktemp("ints"), compressed_tensors.pack(q), section)  # type: ignore[arg-type]
    (found,) = values.coded(source, section, torch.bfloat16)
    assert (found.name, found.shape) == ("up.weight", (rows, 96))
    assert torch.equal(found.rows(0, rows), q.dequantize(torch.bfloat16))
    assert torch.equal(found.rows(rows // 2, rows), q.dequantize(torch.bfloat16)[rows // 2 :])


def test_inputs_in_another_order(tmp_path: Path) -> None:
    """Column i is of group g_idx[i], as compressed-tensors has it."""
    scheme = Scheme(4, 16)
    q = round_to_nearest(torch.randn(5, 64), scheme, torch.float32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    group = torch.arange(64) // 16
    tensors = compressed_tensors.pack(q)  # type: ignore[arg-type]
    section = compressed_tensors.config({scheme: ["up"]}, [], torch.float32)
    source = folder(tmp_path, tensors | {"weight_g_idx": group[order].to(torch.int32)}, section)
    (found,) = values.coded(source, section, torch.float32)
    codes: Tensor = q.codes  # type: ignore[attr-defined]
    scale: Tensor = q.scale  # type: ignore[attr-defined]
    assert torch.equal(found.rows(0, 5), codes.float() * scale[:, group[order]])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    scheme = Scheme(4, 16)
    stored = compressed_tensors.pack(round_to_nearest(torch.randn(4, 64), scheme, torch.bfloat16))  # type: ignore[arg-type]
    section = compressed_tensors.config({scheme: ["up"]}, [], torch.bfloat16)
    scale = stored["weight_scale"]
    for changed, told in (
        ({k: v for k, v in stored.items() if k != "weight_scale"}, "weight_scale is missing"),
        (stored | {"weight_packed": stored["weight_packed"][:, :-1]}, "does not fit"),
        (stored | {"weight_scale": scale[:, :3]}, "does not fit"),
        (stored | {"weight_scale": scale[:3]}, "does not fit"),
        (stored | {"weight_scale": scale.to(torch.int8)}, "weight_scale must be"),
    ):
        source = folder(tmp_path, changed, section)
        with pytest.raises(LlmqError, match=f"{tmp_path}.*up.weight_packed.*{told}"):
            values.coded(source, section, torch.bfloat16)
    group = section["config_groups"]["group_0"] | {"format": "mxfp6-pack-quantized"}
    both = section | {"config_groups": {"a": group, "b": group | {"format": "nvfp4-pack-quantized"}}}
    with pytest.raises(LlmqError, match="mxfp6-pack-quantized beside nvfp4-pack-quantized is not exported"):
        values.coded(folder(tmp_path, stored, both), both, torch.bfloat16)
