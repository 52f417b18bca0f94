"""Formats are found by listing the folder, and asked only for the parts that each has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq import formats
from llmq.formats.inspection import inspect_folder

ONLY_INSPECTED = """
from llmq.formats.base import Row

COMPANIONS = {"weight_tens": ("weight_unit",)}
SCALES = ("weight_unit",)


def inspect(source, module, parts, method, config):
    codes = parts["weight_tens"]
    return Row(f"{module}.weight", codes.shape, "ten", 4, 0, True, None, codes.nbytes, "uint8")
"""


@pytest.fixture
def tens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A format of one file more, which is only known to `llmq inspect`, for the time of a test."""
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "tens.py").write_text(ONLY_INSPECTED)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    formats._modules.cache_clear()
    yield
    formats._modules.cache_clear()


def test_a_format_without_a_reader_is_inspected(tens: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "tens"}}')
    stored = {"a.weight_tens": torch.zeros(4, 8, dtype=torch.uint8), "a.weight_unit": torch.ones(4)}
    save_file(stored, tmp_path / "model.safetensors")
    (row,) = inspect_folder(tmp_path).rows
    assert (row.name, row.kind, row.bits, row.shape) == ("a.weight", "ten", 4, (4, 8))


def test_what_it_does_not_read_it_does_not_claim(tens: None) -> None:
    assert "tens" not in formats.readers() and "tens" not in formats.packages()
    assert formats.method_of({}) is None and formats.method_of({"quant_method": "tens"}) == "tens"
    assert formats.method_of({"load_in_4bit": True}) == "bitsandbytes"


def test_who_unpacks() -> None:
    assert formats.unpacked_by_stock("compressed-tensors")
    assert not any(map(formats.unpacked_by_stock, ("bitsandbytes", "gptq", "made-up")))
