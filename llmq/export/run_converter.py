"""A script that runs llama.cpp's converter, with a name for the tokenizer's splitting where it knows none.

`python run_converter.py convert_hf_to_gguf.py NAME arguments…`. The converter knows tokenizers by a hash of what they
make of a text, and stops at those that it has no hash for; which of its ways to split text is meant, only people can
say, or the tokenizer's own file (`converter.splitting`).
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main(script: str, name: str, arguments: list[str]) -> None:
    """Run the converter. name: of a way to split text, as `tokenizer.ggml.pre` in a GGUF file has it."""
    folder = Path(script).resolve().parent
    # In the place of this script's own folder: the converter imports what lies beside it.
    sys.path[0] = str(folder)
    sys.path.insert(1, str(folder / "gguf-py"))
    if (folder / "conversion" / "base.py").is_file():  # earlier versions have all code in the script
        _name_unknown(importlib.import_module("conversion.base").TextModel, name)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _name_unknown(kind: Any, name: str) -> None:
    """Give tokenizers that the converter's class of models does not know a name."""
    known = kind.get_vocab_base_pre

    def known_or_named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return name

    kind.get_vocab_base_pre = known_or_named


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
