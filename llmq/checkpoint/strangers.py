"""What a folder or a file is that is no model in safetensors, and the way out: told by names and first bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from llmq.errors import first_line

ORIGINAL = (
    "give the model that it was made from, in safetensors, or open it once with transformers' from_pretrained("
    "gguf_file=…) and save_pretrained"
)
TOOLS = {
    ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax", ".npz": "NumPy", ".engine": "TensorRT",
    ".tflite": "TFLite", ".mlmodel": "Core ML", ".nemo": "NeMo", ".pte": "ExecuTorch", ".ot": "rust-bert",
    ".xml": "OpenVINO",
}  # fmt: skip
"""Endings of weights that other tools write, and the tools."""
TOKENIZERS = re.compile(r"tokenizer.*|vocab.*|merges\.txt|.*\.(model|tiktoken|spm|bpe|vocab)")
"""Names of files that make a tokenizer."""
TEXTS = (".txt", ".json", ".jinja", ".bpe", ".vocab")
PART = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
POINTER = b"version https://git-lfs"
STARTS = (
    (POINTER, "a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder"),
    (b"GGUF", "a GGUF file, not safetensors: " + ORIGINAL),
    (b"PK\x03\x04", "a pickle of PyTorch or a zip file, not safetensors: convert it once with transformers"),
    (b"\x80\x02", "a pickle, not safetensors: convert it once with transformers"),
    (b"\x89HDF", "an HDF5 file, not safetensors: download the safetensors file"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
)
PAGE = "a web page or a server's message, not the file itself: log in with 'hf auth login', then download it again"
_START = 64


def of_bytes(start: bytes, text_file: bool = False) -> str | None:
    """What a file is that begins with these bytes, with the way out; None if they say nothing.

    text_file: whether text is what the file should hold. A safetensors file begins with a length, whose high bytes are
    0: it is never taken for text.
    """
    for magic, told in STARTS:
        if start.startswith(magic):
            return told
    text = start[:_START].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b'{"error', b"access to", b"entry not found")):
        return PAGE
    # JSON files, which begin with a bracket, have readers of their own.
    letters = not text_file and len(text) > 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text)
    return PAGE if letters and not text.startswith((b"{", b"[", b'"')) else None


def of_file(path: Path) -> str | None:
    """What a file is, by its first bytes; None if they say nothing or it cannot be read."""
    try:
        with path.open("rb") as file:
            return of_bytes(file.read(_START), path.suffix in TEXTS)
    except OSError:
        return None


def names_of(folder: Path) -> list[str]:
    """The files of a folder, and the config.json of folders inside it, as paths relative to it."""
    inside = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    steps = (path.name + "/" for path in folder.glob("global_step*"))
    return sorted([path.name for path in folder.iterdir() if path.is_file()] + [*steps]) + sorted(
        path.relative_to(folder).as_posix() for path in inside
    )


def of_names(names: Collection[str], base: str | None = None) -> str | None:
    """What a folder is that has these files but no config.json or no weights, with the way out; None if unknown.

    base: the model that an adapter in it belongs to.
    """
    here = [name for name in names if "/" not in name]
    if "adapter_config.json" in here:
        return (
            f"is an adapter{f' of {base}' if base else ''}, not a whole model: "
            f"`llmq merge {base or 'BASE'} ADAPTER -o OUT` merges it into its base and quantizes the result"
        )
    if "model_index.json" in here:
        return "is a diffusion pipeline, and llmq quantizes causal language models only, which its text encoder is not"
    if gguf := [name for name in here if name.lower().endswith(".gguf")]:
        if all("mmproj" in name.lower() for name in gguf):
            return f"has only the image projector of a model, as GGUF ({gguf[0]}): {ORIGINAL}"
        return f"has only GGUF files ({gguf[0]}), which are converted for other programs already: {ORIGINAL}"
    if own := [name for name in here if name.startswith("consolidated") or (name == "params.json")]:
        return (
            f"has its maker's own format ({own[0]}), which transformers does not read: download the files for "
            "transformers (config.json, model*.safetensors), often in the same repository, or convert it by the script "
            "that transformers has for this model"
        )
    if any(name.startswith("global_step") or name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of a distributed training: write it as safetensors first (DeepSpeed: zero_to_fp32.py; "
            "FSDP: accelerate merge-weights)"
        )
    return None


def of_folder(folder: Path) -> str | None:
    """What a folder without config.json or without weights is, with the way out; None if unknown. Raises OSError."""
    names = names_of(folder)
    base = None
    if "adapter_config.json" in names:
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
                "base_model_name_or_path"
            )
        except (OSError, ValueError, AttributeError):
            base = None
        base = base if isinstance(base, str) else None
    if told := of_names(names, base):
        return told
    inside = [name.rpartition("/")[0] for name in names if name.endswith("/config.json")]
    if "config.json" not in names and inside:
        more = f" (or {', '.join(inside[1:3])})" if len(inside) > 1 else ""
        return f"has no config.json, but {inside[0]} in it has: give {folder / inside[0]}{more}"
    for name in names:
        if tool := TOOLS.get(Path(name).suffix):
            return (
                f"has weights of {tool} only ({name}): give the model's folder for transformers, with safetensors files"
            )
    if "config.json" not in names and (weights := [name for name in names if name.endswith(".safetensors")]):
        return f"has weights ({weights[0]}) but no config.json, which says what model they are: download it beside them"
    return None


def of_single(file: Path) -> str | None:
    """Why the only safetensors file of a folder is not a whole model, with the way out; None if it may be one."""
    part = PART.search(file.name)
    if part and int(part[2]) > 1:
        return (
            f"has only part {int(part[1])} of {int(part[2])} of its weights ({file.name}) and no index: download the "
            "others, and model.safetensors.index.json"
        )
    if file.name.startswith(("adapter_", "consolidated")):
        return of_folder(file.parent)
    return None


def of_tokenizer(folder: Path, error: BaseException) -> str:
    """Why a folder's tokenizer cannot be loaded, with the way out. error: what loading it raised."""
    try:
        files = sorted(path for path in folder.iterdir() if TOKENIZERS.fullmatch(path.name) and path.is_file())
    except OSError:
        files = []
    if not [file for file in files if file.name != "tokenizer_config.json"]:
        return (
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model …): copy into it the tokenizer files of the "
            "model that it was made from"
        )
    for file in files:
        if told := of_file(file):
            return f"{file} is {told}"
    return (
        f"{folder}: its tokenizer ({', '.join(file.name for file in files[:3])}) cannot be loaded: "
        f"{first_line(error)}; download these files again, or install what the message names"
    )
