"""llama.cpp's own converter: where it is, and a run of it in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from llmq.errors import LlmqError

SCRIPT = "convert_hf_to_gguf.py"
ENVIRONMENT = "LLMQ_LLAMA_CPP"
INSIDE = ("", "vendor/llama.cpp", "llama.cpp")
"""Where the script lies in a clone of llama.cpp, in llama-cpp-python's source, or in a folder of clones."""
GET = (
    "get it by 'git clone --depth 1 https://github.com/ggml-org/llama.cpp' (nothing need be compiled), or unpack what "
    "'pip download --no-deps --no-binary :all: llama-cpp-python' fetches; then give the folder with --llama-cpp DIR"
)
OUTTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
SPLITTING = "gpt-2"
"""llama.cpp's name for the splitting of text that tokenizers' ByteLevel does by itself."""
UNKNOWN = "pre-tokenizer was not recognized"
SHOWN = 6


def find(given: Path | None) -> Path:
    """The converter's script: in a given folder, in that of the environment, or on the path (Homebrew puts it there).

    Raises LlmqError with how to get it.
    """
    folder = given or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if folder is None:
        there = shutil.which(SCRIPT)
        if there is None:
            raise LlmqError(f"--to gguf needs llama.cpp's converter ({SCRIPT}), which is not on the path: {GET}")
        return Path(there).resolve()
    if folder.name == SCRIPT and folder.is_file():
        return folder.resolve()
    for inside in INSIDE:
        if (folder / inside / SCRIPT).is_file():
            return (folder / inside / SCRIPT).resolve()
    named = "--llama-cpp" if given else ENVIRONMENT
    raise LlmqError(f"{named} {folder}: there is no {SCRIPT}: {GET}")


def splitting(folder: Path) -> str | None:
    """llama.cpp's name for how a folder's tokenizer splits text, where the tokenizer's own file says it, else None."""
    try:
        step = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
        plain = step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return SPLITTING if plain else None


def convert(script: Path, folder: Path, out: Path, dtype: torch.dtype, name: str | None) -> bool:
    """Convert a dense model folder to a GGUF file, whose matrices are in `dtype`; returns whether `name` was needed.

    name: of a way to split text, for a tokenizer that the converter does not know. Raises LlmqError with what the
    converter said, and the way out.
    """
    arguments = [str(folder), "--outfile", str(out), "--outtype", OUTTYPES[dtype]]
    runner = str(Path(__file__).with_name("run_converter.py"))
    started = [str(script), *arguments] if name is None else [runner, str(script), name, *arguments]
    # Whatever the folder lacks is no reason to ask a server.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *started], capture_output=True, text=True, env=environment, errors="replace")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode or not out.is_file():
        raise LlmqError(_told(script, folder, lines, name))
    return name is not None and any(UNKNOWN in line for line in lines)


def _told(script: Path, folder: Path, lines: list[str], name: str | None) -> str:
    """Why the converter failed, and the way out, from what it wrote. name: of the splitting, as it was told."""
    text = "\n".join(lines)
    if missing := re.findall(r"No module named '([\w.]+)'", text):
        return f"{script} needs {missing[0]}: pip install {missing[0].partition('.')[0]}"
    # A name that was told is warned of, too, so only the last line says why it stopped.
    stopped = bool(lines) and UNKNOWN in lines[-1]
    if stopped and name is not None:
        return f"{script} does not know the tokenizer of {folder.name}, and is too old to be told: get a newer one"
    if stopped:
        return (
            f"{script} does not know the tokenizer of {folder.name}: give llama.cpp's name for how it splits text with "
            "--pre-tokenizer (gpt-2 …: those that follow 'tokenizer_pre ==' in llama.cpp's source)"
        )
    if unknown := re.findall(r"Model (\w+) is not supported", text):
        return (
            f"{script} does not know the architecture {unknown[0]}: get a newer llama.cpp, or export to another "
            "format (--to mlx); 'convert_hf_to_gguf.py --print-supported-models' lists what it knows"
        )
    if "No space left on device" in text:
        return f"no space is left on the disk of {folder.parent}: free some, or give another disk with --work DIR"
    last = "\n".join(lines[-SHOWN:]) or "it said nothing"
    return f"{script} failed on the dequantized {folder.name}: mend that, or get a newer llama.cpp. It said:\n{last}"
