"""Perplexity: the stated protocol, by hand on a tiny model and against the peers' script on trained ones."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from llmq.errors import LlmqError
from llmq_eval import perplexities, perplexity
from llmq_eval.windows import read_text
from tests.conftest import Run, write_tiny_model

SHARED = Path(__file__).parent.parent.parent.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside this checkout")


def by_hand(folder: Path, ids: list[int], window: int) -> list[list[float]]:
    """−log p of every predicted token, window by window, one token at a time in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        with torch.inference_mode():
            logits = model(torch.tensor([piece])).logits[0].double()
        found.append([float(logits[i].logsumexp(0) - logits[i, piece[i + 1]]) for i in range(window - 1)])
    return found


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfsee noon")
    assert read_text(str(tmp_path / "a.txt")).content == "see noon"


def test_by_hand(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "short.txt"
    text.write_text(text_file.read_text()[:700])
    ids = AutoTokenizer.from_pretrained(tiny_model)(text.read_text())["input_ids"]
    losses = by_hand(tiny_model, ids, 64)
    nll = sum(map(sum, losses)) / (len(losses) * 63)
    for batch in (1, 4):
        found = perplexity(tiny_model, str(text), window=64, batch=batch, progress=False)
        assert (found.windows, found.window, found.tokens) == (len(losses), 64, len(losses) * 63)
        assert found.nll == pytest.approx(nll, rel=1e-6)
        assert found.value == pytest.approx(math.exp(nll), rel=1e-6)
        means = torch.tensor([sum(row) / 63 for row in losses], dtype=torch.float64)
        assert found.stderr == pytest.approx(math.exp(nll) * float(means.std()) / len(means) ** 0.5, rel=1e-4)
        assert "short.txt, no BOS" in found.protocol and f"{len(losses)} × 64" in found.protocol
    two = perplexity(tiny_model, str(text), window=64, max_windows=2, progress=False)
    assert two.nll == pytest.approx(sum(map(sum, losses[:2])) / 126, rel=1e-6)


def test_default_window_is_the_models_maximum(tiny_model: Path, text_file: Path) -> None:
    found = perplexity(tiny_model, str(text_file), max_windows=1, progress=False)
    assert found.window == 256 and math.isnan(found.stderr)


def test_models_side_by_side(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", dtype="bfloat16")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    first, second = perplexities([tiny_model, other], str(text_file), max_windows=2, progress=False)
    assert first.window == second.window == 128
    assert first.dtype == second.dtype == "float32"
    assert first.protocol == second.protocol
    assert first.value != second.value
    assert perplexity(other, str(text_file), window=8, max_windows=1, dtype="auto", progress=False).dtype == "bfloat16"


def test_refusals(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    def refused(words: str, folder: Path = tiny_model, text: str = str(text_file), **more: int | str) -> None:
        with pytest.raises(LlmqError, match=words) as caught:
            perplexity(folder, text, progress=False, **more)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    short = tmp_path / "short.txt"
    short.write_text("few words")
    refused("9 tokens, fewer than one window of 256: lower --window", text=str(short))
    refused("no such file", text=str(tmp_path / "none.txt"))
    short.write_text("\n")
    refused("empty", text=str(short))
    short.write_bytes(b"\xff\xfe")
    refused("not UTF-8", text=str(short))
    refused("at least 2", window=1)
    refused("--window 257 is longer than the longest input of .*, 256 tokens .*: give 256 or less", window=257)
    refused("float12", dtype="float12")
    refused("config.json", folder=tmp_path)


def test_a_quantization_nobody_reads_is_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())

    def quantized(method: str) -> None:
        changed = config | {"quantization_config": {"quant_method": method}}
        (folder / "config.json").write_text(json.dumps(changed))

    quantized("homegrown")
    with pytest.raises(LlmqError, match="'homegrown'.*random weights"):
        perplexity(folder, str(text_file), progress=False)
    quantized("awq")
    with pytest.raises(LlmqError, match="pip install gptqmodel"):
        perplexity(folder, str(text_file), progress=False)


def test_missing_tensors_are_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(tensors)[3]
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqError, match=f"lacks 1 tensors.*{gone}.*random"):
        perplexity(folder, str(text_file), progress=False)


def test_other_tokenizers_are_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(LlmqError, match="different tokens"):
        perplexities([tiny_model, folder], str(text_file), progress=False)
    with pytest.raises(LlmqError, match="gives token 256, but the model has only 256"):
        perplexity(folder, str(text_file), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "window", "special"), [("books8m", 64, True), ("stories260K", 64, False)])
@pytest.mark.parametrize("quantized", [False, True])
@needs_shared
def test_equals_the_peers_script(
    name: str,
    window: int,
    special: bool,
    quantized: bool,
    tmp_path: Path,
    llmq: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script tokenizes bare text; one of the tokenizers adds a BOS, which is kept here unless told not to."""
    text = tmp_path / "text.txt"
    text.write_text((SHARED / "data" / "books" / "heldout.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    folder = SHARED / "models" / name
    if quantized:
        more = ("--bits", 4, "--group-size", 64, "--ragged", "smaller")
        assert llmq("quantize", folder, "-o", tmp_path / "w4", "--method", "rtn", *more).returncode == 0
        folder = tmp_path / "w4"
        capsys.readouterr()
    arguments = [folder, text, "--seqlen", window, "--max-windows", 8, "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["ppl.py", *map(str, arguments), "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the script sets some
    runpy.run_path(str(SHARED / "peers" / "ppl.py"))
    peer = json.loads(capsys.readouterr().out.split("PPL ", 1)[1])
    found = perplexity(folder, str(text), window=window, max_windows=8, special_tokens=special, progress=False)
    assert found.value == pytest.approx(peer["ppl"], rel=1e-5)
    assert (found.tokens, found.windows) == (peer["tokens"], peer["windows"])
