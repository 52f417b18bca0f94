"""llama.cpp's converter: where it is looked for, and what is made of its complaints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmq.errors import LlmqError
from llmq.export import converter

FAKE = """import sys
from pathlib import Path
if "{text}":
    sys.exit('''{text}''')
print("WARNING:hf-to-gguf:** WARNING: The BPE pre-tokenizer was not recognized!", file=sys.stderr)
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(" ".join(sys.argv[4:]))
"""


def script(folder: Path, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / converter.SCRIPT).write_text(FAKE.format(text=text))
    return folder / converter.SCRIPT


def test_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(converter.ENVIRONMENT, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlmqError, match="not on the path: get it by 'git clone"):
        converter.find(None)
    with pytest.raises(LlmqError, match="--llama-cpp .*: there is no convert_hf_to_gguf.py: get it by"):
        converter.find(tmp_path)
    clone, sdist = script(tmp_path / "clone"), script(tmp_path / "sdist" / "vendor" / "llama.cpp")
    assert converter.find(tmp_path / "clone") == converter.find(clone) == clone
    assert converter.find(tmp_path / "sdist") == sdist
    monkeypatch.setenv(converter.ENVIRONMENT, str(tmp_path / "clone"))
    assert converter.find(None) == clone
    monkeypatch.setenv(converter.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(LlmqError, match=f"{converter.ENVIRONMENT} .*none: there is no"):
        converter.find(None)
    monkeypatch.delenv(converter.ENVIRONMENT)
    clone.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "clone"))
    assert converter.find(None) == clone


def test_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert not converter.convert(script(tmp_path), tmp_path, out, torch.bfloat16, None)
    assert out.read_text() == "--outtype bf16"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ModuleNotFoundError: No module named 'sentencepiece.x'", "needs sentencepiece.x: pip install sentencepiece"),
        ("BPE pre-tokenizer was not recognized - update", "does not know the tokenizer of"),
        (
            "ERROR:hf-to-gguf:Model OddLM is not supported",
            "does not know the architecture OddLM: get",
        ),
        ("OSError: [Errno 28] No space left on device", "no space is left on the disk"),
        ("KeyError: 7", "failed on the dequantized .* It said:\nKeyError: 7"),
    ],
)
def test_its_complaints(tmp_path: Path, said: str, told: str) -> None:
    with pytest.raises(LlmqError, match=told):
        converter.convert(script(tmp_path, said), tmp_path, tmp_path / "out", torch.float32, None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("BPE pre-tokenizer was not recognized - update", "is too old to be told: get a newer"),
        ("BPE pre-tokenizer was not recognized!\nKeyError: 7", "failed on the dequantized"),
    ],
)
def test_its_complaints_when_it_was_told_how_text_is_split(tmp_path: Path, said: str, told: str) -> None:
    with pytest.raises(LlmqError, match=told):
        converter.convert(script(tmp_path, said), tmp_path, tmp_path / "out", torch.float32, "gpt-2")


def test_how_a_tokenizer_splits(tmp_path: Path) -> None:
    assert converter.splitting(tmp_path) is None
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    for step, wanted in (
        (plain, "gpt-2"),
        (plain | {"use_regex": False}, None),
        ({"type": "Sequence"}, None),
        (None, None),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": step}))
        assert converter.splitting(tmp_path) == wanted
