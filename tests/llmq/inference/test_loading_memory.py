"""A loaded model owns its tensors: none of them lies in a mapped file."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import llmq
from tests.llmq.inference.test_loading_own import SCHEMES, quantized
from tests.llmq.inference.test_transformers_hook import layers
from tests.llmq.written import Case, write


def mapped(folder: Path) -> list[tuple[int, int, str]]:
    """First and last address, and name, of each part of a file of the folder in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((start, end, line.split()[-1]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped")
@pytest.mark.parametrize(
    "kind", [Case("ct", 8, 32, True), Case("ct", 4), Case("gptq", 4, 32, True), "w8a8", "nf4"], ids=str
)
def test_nothing_lies_in_a_mapped_file(kind: Case | str, tmp_path: Path) -> None:
    if isinstance(kind, Case):
        folder = tmp_path / "m"
        write(folder, kind)
    else:
        folder = quantized("llama", SCHEMES[kind], tmp_path)
    model = llmq.load(folder, device_map="cpu")
    gc.collect()
    assert layers(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = mapped(folder)
    inside = [n for n, t in tensors.items() if any(start <= t.data_ptr() < end for start, end, _ in places)]
    assert not inside
    assert not places
