"""The tokenizer and chat template of an adapter's folder: carried to the merged model, or said to be left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from llmq.adapters.lora import Adapter
from llmq.adapters.merge import merge, tune_windows
from llmq.adapters.merged import Merged
from llmq.adapters.tokenizer import Carried
from llmq.checkpoint.source import FolderSource
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe
from tests.conftest import write_tiny_model
from tests.llmq.adapters.made import load, write_adapter

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def roomy(tmp_path: Path) -> Path:
    """A base with 260 embeddings for its 256 tokens, and a chat template."""
    folder = write_tiny_model(tmp_path / "roomy")
    model = load(folder)
    model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(folder)
    own = tokenizer_of(folder)
    own.chat_template = OTHER
    own.save_pretrained(folder)
    return folder


def saved(folder: Path, base: Path, tokens: list[str], template: str | None = TEMPLATE) -> Path:
    """An adapter's folder in which a trainer also saved its tokenizer."""
    write_adapter(folder, base, target_modules=["q_proj"])
    own = tokenizer_of(base)
    own.add_tokens(tokens)
    own.chat_template = template
    own.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("plain", [True, False])
def test_carried_to_the_written_folder(tmp_path: Path, roomy: Path, plain: bool) -> None:
    folder = saved(tmp_path / "adapter", roomy, ["<|user|>", "<|bot|>"])
    report = merge(str(roomy), folder, tmp_path / "out", Recipe(methods=("rtn",), scheme=Scheme(4, 32)), plain=plain)
    made, wanted = tokenizer_of(tmp_path / "out"), tokenizer_of(folder)
    assert made.get_vocab() == wanted.get_vocab() and made.chat_template == wanted.chat_template == TEMPLATE
    chat = [{"role": "user", "content": "hi"}]
    assert made.apply_chat_template(chat) == wanted.apply_chat_template(chat)
    assert 256 in made("<|user|>")["input_ids"]
    assert any("tokenizer is the adapter's own" in note and "tokenizer.json" in note for note in report.notes)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_template_alone(tmp_path: Path, roomy: Path) -> None:
    """It is used with the base's tokenizer, and a processor's older file does not contradict it."""
    (roomy / "chat_template.json").write_text(json.dumps({"chat_template": OTHER}))
    folder = write_adapter(tmp_path / "adapter", roomy, target_modules=["q_proj"])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    merge(str(roomy), folder, tmp_path / "out", plain=True)
    made = tokenizer_of(tmp_path / "out")
    assert made.chat_template == TEMPLATE and made.get_vocab() == tokenizer_of(roomy).get_vocab()
    assert not (tmp_path / "out" / "chat_template.json").exists()


def test_an_adapter_without_one_and_one_that_is_the_bases(tmp_path: Path, roomy: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", roomy, target_modules=["q_proj"])
    source = FolderSource(roomy)
    for _ in range(2):
        carried = Carried(folder, source, 260)
        assert (carried.files, carried.notes, carried.folder) == ({}, [], roomy)
        assert carried.replaced(source.aux_files()) == source.aux_files()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(roomy / name, folder / name)


def test_what_a_trainer_leaves_beside_it_is_not_carried(tmp_path: Path, roomy: Path) -> None:
    folder = saved(tmp_path / "adapter", roomy, ["<x>"])
    for name in ("trainer_state.json", "all_results.json", "training_args.bin", "notes.txt"):
        (folder / name).write_text("{}")
    merge(str(roomy), folder, tmp_path / "out", plain=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"trainer_state.json", "all_results.json", "training_args.bin", "notes.txt"}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([f"<{i}>" for i in range(5)], "it has the token id 260, and the base 260 embeddings"),
        (None, "the id"),
        ("broken", "cannot be loaded"),
    ],
    ids=["too-large", "another-vocabulary", "broken"],
)
def test_left_with_the_reason(tmp_path: Path, roomy: Path, tokens: Any, words: str) -> None:
    folder = saved(tmp_path / "adapter", roomy, tokens if isinstance(tokens, list) else ["<x>"])
    file = folder / "tokenizer.json"
    if tokens == "broken":
        file.write_text("{")
    elif tokens is None:
        whole = json.loads(file.read_text())
        whole["model"]["vocab"] = {token: 255 - number for token, number in whole["model"]["vocab"].items()}
        file.write_text(json.dumps(whole))
    merged = Merged(FolderSource(roomy), Adapter(folder))
    (note,) = merged.notes
    assert "left out (" in note and words in note and "\n" not in note
    assert merged.aux_files() == FolderSource(roomy).aux_files() and merged.tokenizer.folder == roomy
    assert merged.fingerprint() == Merged(FolderSource(roomy), Adapter(_without(folder, tmp_path))).fingerprint()


def _without(folder: Path, tmp_path: Path) -> Path:
    """The adapter without a tokenizer."""
    made = tmp_path / "without"
    made.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, made / name)
    return made


def test_the_windows_are_encoded_by_it(tmp_path: Path, roomy: Path) -> None:
    """Chats are laid out for calibration by the template that the adapter was trained with."""
    folder = saved(tmp_path / "adapter", roomy, ["<|user|>", "<|assistant|>"])
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defghijk"}]
    rows.write_text((json.dumps({"messages": chat}) + "\n") * 20)
    merged = Merged(FolderSource(roomy), Adapter(folder))
    windows = tune_windows(merged, Calibration(text=str(rows), samples=2, seqlen=16), 64)
    assert windows is not None and {256, 257} <= set(windows.ids.flatten().tolist())
    recipe = Recipe.from_dict(
        {
            "methods": ["gptq"],
            "scheme": {"bits": 4, "group_size": 32},
            "calibration": {"text": str(rows), "samples": 2, "seqlen": 16},
        }
    )
    merge(str(roomy), folder, tmp_path / "out", recipe)
    assert torch.isfinite(load(tmp_path / "out")(torch.tensor([[256, 1, 2]])).logits).all()


def test_another_tokenizer_is_another_run(tmp_path: Path, roomy: Path) -> None:
    folder = saved(tmp_path / "adapter", roomy, ["<x>"])
    before = Merged(FolderSource(roomy), Adapter(folder)).fingerprint()
    (folder / "chat_template.jinja").write_text(OTHER + " ")
    assert Merged(FolderSource(roomy), Adapter(folder)).fingerprint() != before
