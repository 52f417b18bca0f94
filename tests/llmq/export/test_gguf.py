"""`llmq export --to gguf` with a converter of the tests' own: what is recognised, what is written, what is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq.errors import LlmqError
from llmq.export import gguf
from llmq.export.folder import QuantizedFolder
from llmq.export.gguf import export_gguf
from llmq.formats.gguf import blocks, file
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe
from tests.conftest import write_tiny_model
from tests.llmq.export import fake_converter

Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a converter."""
    folder = tmp_path_factory.mktemp("cpp")
    shutil.copy(fake_converter.__file__, folder / "convert_hf_to_gguf.py")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "m", layers=1, dtype="bfloat16")


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Folders by scheme, and by the name that the converter sees."""

    def make(scheme: Scheme, name: str = "model", **more: object) -> Path:
        out = tmp_path_factory.mktemp("quantized") / name
        llmq.quantize(str(base), out, Recipe(("rtn",), scheme, calibration=Calibration("demo", 1, 32), **more))
        return out

    return make


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in float32."""
    contents = file.read(path)
    found = {}
    for held in contents.tensors:
        data, name = contents.read(held), held.kind.name
        value = data.float() if held.kind.kind == "plain" else blocks.unpack(name, data)
        found[held.name] = value.reshape(held.shape)
    return found


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (Scheme(4, 32, scales="float16"), "Q4_0"),
        (Scheme(3, 64), "Q4_0"),
        (Scheme(4, 32, False), "Q4_1"),
        (Scheme(8, None), "Q8_0"),
        (Scheme(2, 64), "Q2_0"),
        (Scheme(grid="mxfp4", group_size=32), "MXFP4"),
        (Scheme(grid="nvfp4", group_size=16), "NVFP4"),
    ],
    ids=str,
)
def test_every_number_arrives(
    quantized: Quantize, converter: Path, base: Path, tmp_path: Path, scheme: Scheme, kind: str
) -> None:
    path = quantized(scheme)
    done = export_gguf(path, tmp_path / "model.gguf", llama_cpp=converter)
    folder, found, at = QuantizedFolder(path), decoded(tmp_path / "model.gguf"), "model.layers.0."
    dense = {name: folder.weight(name).dequantize(torch.float32) for name in folder.weights}
    q, up, gate = (f"{at}{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"))
    expected = {
        f"{at}self_attn.attn_q.weight": dense[q].flip(0),
        f"{at}mlp.ffn_up.weight": torch.cat([dense[gate], dense[up]]),
        f"{at}mlp.down_proj.weight": dense[f"{at}mlp.down_proj.weight"],
    }
    rows = {row.name: row for row in done.rows}
    for name, value in expected.items():
        assert rows[name].kind == kind and rows[name].bits == scheme.bits
        factor = found.get(name.removesuffix("weight") + "scale", torch.ones(1))
        if kind == "Q4_1":
            # m has more bits than float16.
            torch.testing.assert_close(found[name], value, atol=2e-3, rtol=0)
            assert 0 < rows[name].worst < gguf.FAR
        else:
            assert torch.equal(found[name] * factor, value) and rows[name].worst == 0
    kept = folder.source.read("model.embed_tokens.weight")
    assert rows["token_embd.weight"].why == "not quantized in the folder"
    assert torch.equal(found["token_embd.weight"], kept.float()) and rows["token_embd.weight"].kind == "BF16"
    assert not done.warnings and done.nbytes == (tmp_path / "model.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    contents = file.read(tmp_path / "model.gguf")
    assert (
        contents.entries["general.file_type"]
        == {held.kind.name: held.kind for held in contents.tensors}[kind].file_type
    )


def test_options(quantized: Quantize, converter: Path, tmp_path: Path) -> None:
    path, out = quantized(Scheme(4, 32), "changed"), tmp_path / "model.gguf"
    done = export_gguf(path, out, llama_cpp=converter, embedding="q8_0", prefer="q8_0", work=tmp_path)
    kinds = {row.name: row.kind for row in done.rows}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["model.layers.0.mlp.ffn_up.weight"] == "Q8_0"
    assert kinds["model.layers.0.self_attn.v_proj.weight"] == "BF16"
    (warning,) = done.warnings
    assert "computes with, model.layers.0.self_attn.v_proj.weight" in warning


def test_parts_of_two_schemes_get_a_type_that_holds_both(quantized: Quantize, converter: Path, tmp_path: Path) -> None:
    other = (("gate_proj", Scheme(4, 32, False)), ("up_proj", Scheme(8, 32)))
    path = quantized(Scheme(4, 32), overrides=other, loader="transformers")
    done = export_gguf(path, tmp_path / "model.gguf", llama_cpp=converter)
    (row,) = [row for row in done.rows if row.name.endswith("ffn_up.weight")]
    assert row.kind == "Q8_0"


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        (Scheme(4, 16), "groups of 16 are no multiple of 32, as GGUF's blocks need: quantize again with --recipe gguf"),
        (Scheme(8, 32, False), "no GGUF type holds 8 bits with zero points"),
        (Scheme(grid="fp8", bits=8, group_size=None), "is float8_e4m3fn with scales, which llmq cannot export"),
        (Scheme(grid="kmeans", group_size=None), "is in the format of llmq-codebook: export it --to dense"),
        (Scheme(grid="nf4", group_size=64), "is in the format of bitsandbytes: export it --to dense"),
    ],
    ids=str,
)
def test_what_no_type_holds(quantized: Quantize, converter: Path, tmp_path: Path, scheme: Scheme, told: str) -> None:
    path = quantized(scheme)
    with pytest.raises(LlmqError) as error:
        export_gguf(path, tmp_path / "model.gguf", llama_cpp=converter)
    assert told in str(error.value) and str(path) in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_what_is_refused(
    quantized: Quantize, base: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = quantized(Scheme(4, 32), "unknown"), tmp_path / "model.gguf"
    with pytest.raises(LlmqError, match="does not know the architecture StrangeForCausalLM"):
        export_gguf(path, out, llama_cpp=converter)
    with pytest.raises(LlmqError, match="m is not quantized: give a folder that llmq quantize wrote"):
        export_gguf(base, out, llama_cpp=converter)
    with pytest.raises(LlmqError, match="--prefer q9: choose from tq1_0"):
        export_gguf(path, out, llama_cpp=converter, prefer="q9")
    with pytest.raises(LlmqError, match="give the path of a file"):
        export_gguf(path, tmp_path, llama_cpp=converter)
    with pytest.raises(LlmqError, match="--work .*: there is no such folder"):
        export_gguf(path, out, llama_cpp=converter, work=tmp_path / "none")
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="MiB for temporary files, and .* has 0: free"):
        patch.setattr(shutil, "disk_usage", lambda _: free)
        export_gguf(path, out, llama_cpp=converter)
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_and_a_wrong_block(
    quantized: Quantize, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = quantized(Scheme(4, 32)), tmp_path / "model.gguf"
    out.write_text("before")
    with pytest.raises(LlmqError, match="is there already, and is no GGUF file"):
        export_gguf(path, out, llama_cpp=converter)
    out.write_text("GGUF before")
    original = gguf.put

    def full(target: Path, *given: object) -> str:
        if target.name == "made.gguf":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return original(target, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="No space left .* another disk with --work"):
        patch.setattr(gguf, "put", full)
        export_gguf(path, out, llama_cpp=converter)
    right = blocks.pack
    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="is not what it was made of"):
        patch.setattr(blocks, "pack", lambda *given: right(*given).roll(1, 0))
        export_gguf(path, out, llama_cpp=converter)
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"] and out.read_text() == "GGUF before"
