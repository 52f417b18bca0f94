"""The script that runs a converter with a name for tokenizers that it does not know."""

from __future__ import annotations

from pathlib import Path

import torch

from llmq.export import converter

BASE = """class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "known":
            return "its own"
        raise NotImplementedError
"""
SCRIPT = """import sys
from pathlib import Path
from conversion.base import TextModel
import beside
found = [TextModel().get_vocab_base_pre(name) for name in ("known", "other")]
print("WARNING:hf-to-gguf:The BPE pre-tokenizer was not recognized!", file=sys.stderr)
Path(sys.argv[3]).write_text(f"{__name__} {found} {beside.VALUE} {sys.argv[1:2]}")
"""


def test_unknown_tokenizers_get_the_name(tmp_path: Path) -> None:
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").touch()
    (tmp_path / "conversion" / "base.py").write_text(BASE)
    (tmp_path / "gguf-py").mkdir()
    (tmp_path / "gguf-py" / "beside.py").write_text("VALUE = 7")
    script = tmp_path / converter.SCRIPT
    script.write_text(SCRIPT)
    assert converter.convert(script, tmp_path / "m", tmp_path / "out", torch.float16, "odd")
    assert (tmp_path / "out").read_text() == f"__main__ ['its own', 'odd'] 7 {[str(tmp_path / 'm')]}"
