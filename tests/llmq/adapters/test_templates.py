"""Chat templates of a merged model: what transformers reads of the folder that they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from llmq.adapters.lora import Adapter
from llmq.adapters.merge import merge
from llmq.adapters.merged import Merged
from llmq.adapters.templates import Templates
from llmq.checkpoint.source import FolderSource
from tests.conftest import write_tiny_model
from tests.llmq.adapters.made import load, write_adapter

Form = Callable[[Path, str], None]


def configured(folder: Path, told: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": told}))


def beside(folder: Path, mark: str) -> None:
    (folder / "chat_template.jinja").write_text(f"{mark} {{{{ messages }}}}")


def named(folder: Path, mark: str, names: tuple[str, ...] = ("tool_use", "rag")) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{mark} {name}\n")


def both(folder: Path, mark: str) -> None:
    beside(folder, mark)
    named(folder, mark, ("tool_use", mark))


def in_config(folder: Path, mark: str) -> None:
    configured(folder, f"{mark} in the config")


def listed(folder: Path, mark: str) -> None:
    configured(folder, [{"name": name, "template": f"{mark} {name}"} for name in ("default", "tool_use")])


def older(folder: Path, mark: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": f"{mark} older"}))


def nothing(folder: Path, mark: str) -> None:
    """No template."""


def only_named(folder: Path, mark: str) -> None:
    named(folder, mark, ("rag",))


BASES = {f.__name__: f for f in (nothing, beside, both, in_config, listed, older)}
ADAPTERS = {f.__name__: f for f in (nothing, beside, both, in_config, listed, older, only_named)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with room for new tokens, without a template."""
    folder = write_tiny_model(tmp_path_factory.mktemp("base") / "roomy")
    model = load(folder)
    model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An adapter on it, without a tokenizer."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "bare", tiny, target_modules=["q_proj"])


def copied(folder: Path, to: Path, form: Form, mark: str) -> Path:
    shutil.copytree(folder, to)
    form(to, mark)
    return to


def save_tokenizer(folder: Path, base: Path, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def read(folder: Path, kind: str = "AutoTokenizer") -> dict[str, str]:
    """What transformers has as chat templates of a folder, by name."""
    import transformers

    found = getattr(transformers, kind).from_pretrained(folder).chat_template
    return found if isinstance(found, dict) else {} if found is None else {"default": found}


def written(merged: Merged, to: Path) -> Path:
    for name, path in {**merged.aux_files(), "config.json": merged.folder / "config.json"}.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / name)
    return to


IN_A_TOKENIZER = ("in_config", "listed")
CASES = [(mine, own) for mine in ADAPTERS for own in (True, False) if own or mine not in IN_A_TOKENIZER]


@pytest.mark.parametrize("theirs", BASES)
@pytest.mark.parametrize(("mine", "own"), CASES)
def test_templates_are_those_of_the_right_side(
    tmp_path: Path, tiny: Path, bare: Path, mine: str, theirs: str, own: bool
) -> None:
    """The adapter's if it has one without a name, else the base's and the adapter's. own: with a tokenizer."""
    base = copied(tiny, tmp_path / "base", BASES[theirs], "B")
    adapter = tmp_path / "adapter"
    shutil.copytree(bare, adapter)
    if own:
        save_tokenizer(adapter, tiny, ["<x>"])
    ADAPTERS[mine](adapter, "A")
    # The older file is a processor's, and the tokenizer's where it is an adapter's only one.
    told = {"default": "A older"} if mine == "older" else {}
    if own or mine in ("nothing", "older"):
        told = (read(adapter) if own else {}) or told
    else:
        told = read(copied(tiny, tmp_path / "asked", ADAPTERS[mine], "A"))
    expected = told if "default" in told else {**read(base), **told}
    if theirs == "older" and mine == "only_named":
        expected["default"] = "B older"  # which transformers refuses beside named ones
    merged = Merged(FolderSource(base), Adapter(adapter))
    out = written(merged, tmp_path / "out")
    assert read(out) == expected == read(merged.tokenizer.folder)
    assert ("chat_template.json" in merged.aux_files()) == (theirs == "older" and mine == "nothing")
    notes = " ".join(merged.notes)
    assert ("chat template (" in notes) == bool(
        (own and mine == "nothing" and theirs != "nothing")
        or (mine == "only_named" and theirs != "nothing")
        or ("default" in told and {*read(base)} - {*told})
    )


@pytest.mark.parametrize("theirs", BASES)
def test_another_vocabulary_has_no_use_for_the_bases(tmp_path: Path, tiny: Path, bare: Path, theirs: str) -> None:
    """A tokenizer without some of the base's tokens: the base's template may need these."""
    base = copied(tiny, tmp_path / "base", BASES[theirs], "B")
    save_tokenizer(base, tiny, ["<|im_start|>"])
    if theirs in IN_A_TOKENIZER:
        BASES[theirs](base, "B")
    adapter = tmp_path / "adapter"
    shutil.copytree(bare, adapter)
    save_tokenizer(adapter, tiny, [])
    file = adapter / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    merged = Merged(FolderSource(base), Adapter(adapter))
    out = written(merged, tmp_path / "out")
    assert read(out) == {} and "chat_template.json" not in merged.aux_files()
    left = [note for note in merged.notes if "is left out" in note]
    assert len(left) == (theirs != "nothing")
    assert all("<|im_start|>" in note and "default" in note for note in left)


def test_named_templates_of_the_base_are_in_the_written_folder(tmp_path: Path, tiny: Path, bare: Path) -> None:
    """Also where the adapter has nothing of a tokenizer, and where it has only its tokens."""
    base = copied(tiny, tmp_path / "base", both, "B")
    merge(str(base), bare, tmp_path / "out", plain=True)
    assert read(tmp_path / "out") == read(base) and len(read(base)) == 3
    adapter = tmp_path / "adapter"
    shutil.copytree(bare, adapter)
    save_tokenizer(adapter, tiny, ["<x>"])
    report = merge(str(base), adapter, tmp_path / "other", plain=True)
    assert read(tmp_path / "other") == read(base)
    assert any("chat template (B, default, tool_use) is carried too" in note for note in report.notes)
    assert not any(path.is_symlink() for path in (tmp_path / "other").rglob("*"))


def processor(folder: Path, edge: int) -> None:
    """A processor of pictures, as older versions save it."""
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": edge}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", "patch_size": 14}))


@pytest.mark.parametrize("theirs", [older, both], ids=["older", "both"])
@pytest.mark.parametrize("mine", [nothing, older, both], ids=["nothing", "older", "both"])
def test_a_processor_has_the_same(tmp_path: Path, tiny: Path, bare: Path, mine: Form, theirs: Form) -> None:
    pytest.importorskip("PIL")
    from transformers import AutoProcessor

    base = copied(tiny, tmp_path / "base", theirs, "B")
    processor(base, 28)
    adapter = tmp_path / "adapter"
    shutil.copytree(bare, adapter)
    save_tokenizer(adapter, tiny, ["<x>"])
    processor(adapter, 56)
    mine(adapter, "A")
    merged = Merged(FolderSource(base), Adapter(adapter))
    out = written(merged, tmp_path / "out")
    assert read(out, "AutoProcessor") == read(base if mine is nothing else adapter, "AutoProcessor")
    made = AutoProcessor.from_pretrained(out)
    assert made.image_processor.size["shortest_edge"] == 56 and "<x>" in made.tokenizer.get_vocab()


def test_other_files_of_an_adapter_are_said_to_be_left(tmp_path: Path, tiny: Path, bare: Path) -> None:
    """The base's generation settings stay, as PEFT keeps them; a model of text alone has no use for a processor."""
    adapter = copied(bare, tmp_path / "adapter", processor_of_pictures, "")
    merged = Merged(FolderSource(tiny), Adapter(adapter))
    (note,) = merged.notes
    assert all(name in note for name in ("generation_config.json", "preprocessor_config.json")) and "left out" in note
    assert merged.aux_files() == FolderSource(tiny).aux_files()
    shutil.copy(tiny / "generation_config.json", adapter)
    (note,) = Merged(FolderSource(tiny), Adapter(adapter)).notes
    assert "generation_config.json" not in note


def processor_of_pictures(folder: Path, mark: str) -> None:
    processor(folder, 28)
    (folder / "generation_config.json").write_text('{"temperature": 0.1}')


def test_files_that_cannot_be_read_have_no_template(tmp_path: Path) -> None:
    for name, text in (("tokenizer_config.json", "{"), ("chat_template.json", "[]")):
        (tmp_path / name).write_text(text)
    files = {name: tmp_path / name for name in ("tokenizer_config.json", "chat_template.json")}
    templates = Templates(files, files)
    assert templates.choose(tmp_path, True, None) == [] and templates.made == {}
