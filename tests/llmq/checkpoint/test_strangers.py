"""What a folder or file is that is no model: each in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.checkpoint.hub import resolve
from llmq.checkpoint.source import FolderSource
from llmq.checkpoint.strangers import of_bytes, of_names, of_tokenizer
from tests.llmq.refusal import refused

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}).encode()
WEIGHTS = b"weights"
"""Stands for a small file of safetensors."""

FOLDERS: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS},
        ("is an adapter of org/base", "llmq merge org/base"),
    ),
    "adapter with its base's config": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS, "config.json": b"{}"},
        ("is an adapter of org/base", "llmq merge org/base"),
    ),
    "adapter whose config is damaged": ({"adapter_config.json": b"{", "a.safetensors": WEIGHTS}, ("llmq merge BASE",)),
    "diffusion": ({"model_index.json": b"{}", "unet/config.json": b"{}"}, ("is a diffusion pipeline", "causal")),
    "gguf": ({"m-Q4_K_M.gguf": b"GGUF"}, ("only GGUF files (m-Q4_K_M.gguf)", "made from", "gguf_file")),
    "gguf with a config": ({"m.gguf": b"GGUF", "config.json": b"{}"}, ("only GGUF files (m.gguf)", "gguf_file")),
    "mmproj": ({"mmproj-f16.gguf": b"GGUF"}, ("only the image projector", "mmproj-f16.gguf")),
    "mistral's own": (
        {"consolidated.safetensors": WEIGHTS, "params.json": b"{}"}, ("maker's own format", "model*.safetensors")
    ),
    "mistral's own with a config": (
        {"consolidated.safetensors": WEIGHTS, "params.json": b"{}", "config.json": b"{}"}, ("maker's own format",)
    ),
    "meta's own": ({"consolidated.00.pth": b"PK", "params.json": b"{}"}, ("maker's own format", "convert it")),
    "deepspeed": ({"global_step10/x.pt": b"PK", "latest": b"global_step10"}, ("distributed", "zero_to_fp32.py")),
    "fsdp": ({"__0_0.distcp": b"x", ".metadata": b"x"}, ("distributed", "accelerate merge-weights")),
    "a trainer's folder": (
        {"checkpoint-50/config.json": b"{}", "checkpoint-100/config.json": b"{}"}, ("checkpoint-100 in it has", "give")
    ),
    "the hub's cache": ({"snapshots/abc/config.json": b"{}", "refs/main": b"abc"}, ("snapshots/abc in it has",)),
    "onnx": ({"model.onnx": b"x", "config.json": b"{}"}, ("weights of ONNX only (model.onnx)", "safetensors")),
    "tensorflow": ({"tf_model.h5": b"x", "config.json": b"{}"}, ("weights of TensorFlow only", "safetensors")),
    "weights alone": ({"model.safetensors": WEIGHTS}, ("no config.json", "download it beside them")),
    "one shard": (
        {"model-00001-of-00003.safetensors": WEIGHTS, "config.json": b"{}"}, ("only part 1 of 3", "index.json")
    ),
    "no index": (
        {f"model-0000{i}-of-00002.safetensors": WEIGHTS for i in (1, 2)} | {"config.json": b"{}"},
        ("2 safetensors files but no", "download the index"),
    ),
    "pickles": ({"pytorch_model.bin": b"PK", "config.json": b"{}"}, ("pickles only", "save_pretrained")),
    "nothing": ({}, ("no config.json", "give the folder")),
    "pointer for a config": ({"config.json": POINTER, "model.safetensors": WEIGHTS}, ("LFS pointer", "git lfs pull")),
    "page for a config": ({"config.json": b"<!DOCTYPE html>", "model.safetensors": WEIGHTS}, ("web page", "again")),
    "pointer": ({"config.json": b"{}", "model.safetensors": POINTER}, ("model.safetensors is a Git LFS pointer",)),
    "page": ({"config.json": b"{}", "model.safetensors": b"\n<!DOCTYPE html><html>"}, ("web page", "hf auth login")),
    "refusal": (
        {"config.json": b"{}", "model.safetensors": b"Access to model a/b is restricted."}, ("server's message",)
    ),
    "zip": ({"config.json": b"{}", "model.safetensors": b"PK\3\4" + bytes([1]) * 99}, ("pickle", "convert it")),
    "gguf by another name": (
        {"config.json": b"{}", "model.safetensors": b"GGUF\3\0\0\1" + bytes(99)}, ("is a GGUF file", "gguf_file")
    ),
}  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is WEIGHTS:
            save_file({"layers.0.wq.weight": torch.ones(2, 2)}, path)
        else:
            path.write_bytes(content)
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path: Path, case: str) -> None:
    files, words = FOLDERS[case]
    refused(lambda: FolderSource(write(tmp_path, files)), str(tmp_path), *words)


@pytest.mark.parametrize(("content", "words"), [(b"GGUF\3", "is a file, not a model folder (a GGUF"), (b"x", "a file")])
def test_a_file_in_place_of_a_folder(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(lambda: FolderSource(tmp_path / "m.gguf"), "m.gguf", words)
    refused(lambda: resolve(str(tmp_path / "m.gguf")), "m.gguf", words)


def test_files_that_are_what_they_should_be(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    assert FolderSource(tmp_path).names() == ["layers.0.wq.weight"]
    for good in ((tmp_path / "model.safetensors").read_bytes(), b"{}", b' {"a": 1}', b"[1, 2, 3, 4, 5]", b""):
        assert of_bytes(good) is None
    assert of_names(["config.json", "model.safetensors", "tokenizer.json"]) is None


def test_tokenizers(tmp_path: Path) -> None:
    error = KeyError("vocab")
    assert "has no tokenizer (tokenizer.json" in of_tokenizer(tmp_path, error)
    write(tmp_path, {"tokenizer_config.json": b"{}"})
    assert "copy into it the tokenizer files" in of_tokenizer(tmp_path, error)
    write(tmp_path, {"tokenizer.json": b"{}"})
    assert "KeyError: 'vocab'; download these files again" in of_tokenizer(tmp_path, error)
    write(tmp_path, {"tokenizer.json": POINTER})
    assert f"{tmp_path / 'tokenizer.json'} is a Git LFS pointer" in of_tokenizer(tmp_path, error)
    assert "tokenizer" in of_tokenizer(tmp_path / "nowhere", error)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer.vocab"])
def test_text_where_text_is_right_is_no_web_page(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: b"#version: 0.2\nh e\nl l\n", "tokenizer_config.json": b"{"})
    assert "web page" not in of_tokenizer(tmp_path, KeyError("vocab"))
    write(tmp_path, {name: b"<!DOCTYPE html><html>"})
    assert "web page" in of_tokenizer(tmp_path, KeyError("vocab"))
