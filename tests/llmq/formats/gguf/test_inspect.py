"""GGUF files as `llmq inspect` shows them."""

from __future__ import annotations

from pathlib import Path

from llmq.formats.gguf.inspect import inspect_file
from tests.conftest import Run
from tests.llmq.export.fake_converter import Stored, gguf_bytes

TENSORS: dict[str, Stored] = {
    "token_embd.weight": (30, (8, 256), bytes(8 * 256 * 2)),
    "blk.0.attn_q.weight": (2, (4, 256), bytes(4 * 256 * 18 // 32)),
    "blk.0.ffn_up.weight": (12, (4, 256), bytes(4 * 144)),
    "blk.0.ffn_down.weight": (40, (4, 256), bytes(4 * 4 * 36)),
}


def test_types_and_bits(llmq: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(TENSORS))
    found = inspect_file(path)
    assert (found.method, found.format) == ("gguf", "made")
    assert [(row.kind, row.bits, row.group) for row in found.rows] == [
        ("plain", None, None),
        ("Q4_0", 4, 32),
        ("Q4_K", 4, 256),
        ("NVFP4", 4, 16),
    ]
    assert found.bits_per_quantized_weight == 4.5
    said = llmq("inspect", path)
    assert said.returncode == 0 and "gguf made" in said.stdout and "1 × Q4_K" in said.stdout
    path.write_bytes(path.read_bytes()[:100])
    said = llmq("inspect", path)
    assert said.returncode == 2 and "no whole GGUF file" in said.stderr
