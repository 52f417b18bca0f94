"""The embedded model through llama.cpp's own converter, where the machine has one (scripts/check_exports.py has)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import llmq
from llmq.errors import LlmqError
from llmq.export import converter
from llmq.export.gguf import export_gguf
from llmq.formats.gguf.inspect import inspect_file
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe


def test_every_decoder_weight_arrives(tmp_path: Path) -> None:
    try:
        converter.find(None)
    except LlmqError:
        pytest.skip("llama.cpp's converter is not on the path, nor in LLMQ_LLAMA_CPP; a fake one is tested")
    if importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("llama.cpp's converter needs the package sentencepiece")
    llmq.quantize("demo", tmp_path / "w4", Recipe(("rtn",), Scheme(4, 32), calibration=Calibration("demo", 1, 32)))
    done = export_gguf(tmp_path / "w4", tmp_path / "demo.gguf")
    kinds = [row.kind for row in inspect_file(tmp_path / "demo.gguf").quantized]
    assert kinds == ["Q4_0"] * 28 and max(row.worst for row in done.rows) == 0
    assert "splits text as gpt-2 does" in done.warnings[0]
