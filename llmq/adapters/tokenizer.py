"""The tokenizer and chat templates of an adapter's folder, which the merged model needs in place of the base's.

Trainers save the tokenizer that they trained with beside the adapter: it can have more tokens than the base's, another
chat template, or none though the base's was used. Which templates are used is in `templates`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.adapters.templates import Templates
from llmq.checkpoint.files import named_templates
from llmq.checkpoint.source import Source
from llmq.errors import LlmqError
from llmq.inference.pretrained import load_tokenizer

CONFIG = "config.json"
Files = dict[str, Path]
"""Name in the model's folder → file."""


class Carried:
    """What of an adapter's tokenizer goes into the merged model.

    files: the files that are carried, none if the base's tokenizer stays; left: names of the base's files that the
    merged model does not have as they are; notes: what was carried, or left and why; folder: where the merged model's
    tokenizer can be loaded from. A tokenizer that cannot be loaded, or is not of the base's vocabulary, is left.
    vocabulary: the base's embeddings.
    """

    def __init__(self, adapter: Path, base: Source, vocabulary: int | None, retrained: bool = False) -> None:
        self.files: Files = {}
        self.left: set[str] = set()
        self.folder = base.folder
        aux = base.aux_files()
        known = _names(base.folder) | _names(adapter)
        found = _found(adapter, known, aux)
        self.notes = _others(adapter, found, aux)
        if not found or all(_same(path, aux.get(name)) for name, path in found.items()):
            return
        whole = not _names(adapter, vocabulary_only=True).isdisjoint(found)
        templates = Templates(found, aux)
        left = {name for name in aux if name in (known if whole else found)} - templates.names
        self._held = tempfile.TemporaryDirectory(prefix="llmq-tokenizer-")
        made = Path(self._held.name)
        loaded = {name: path for name, path in aux.items() if name not in left} | found
        _link(made, {**{n: p for n, p in loaded.items() if n not in templates.names}, CONFIG: base.folder / CONFIG})
        listed, what = ", ".join(found), "tokenizer" if known & found.keys() else "processor"
        old = _vocabulary_of(base)
        try:
            new = load_tokenizer(made, trust_remote_code=base.trust_remote_code).get_vocab()
            why = _unfit(new, {} if retrained or old is None else old, vocabulary)
        except LlmqError as error:
            why = str(error).replace(str(made), "it").removeprefix("it: ")
        if why is not None:
            self.notes.append(f"the adapter's own {what} is left out ({listed}) and the base's is kept: {why}")
            return
        self.notes.append(f"the {what} is the adapter's own ({listed}), not the base's")
        self.notes += templates.choose(made, whole, _differ(new, old) if whole else None)
        self.left, self.folder = left | templates.left, made
        self.files = {name: path for name, path in found.items() if name not in templates.dropped} | templates.made
        _link(made, self.replaced(aux))

    def replaced(self, files: Mapping[str, Path]) -> Files:
        """The base's files with those of the adapter in their place, sorted by name."""
        kept = {name: path for name, path in files.items() if name not in self.left}
        return dict(sorted({**kept, **self.files}.items()))

    @property
    def digest(self) -> str:
        """sha256 of the carried files."""
        digest = hashlib.sha256()
        for name, path in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


def _names(folder: Path, vocabulary_only: bool = False) -> set[str]:
    """The names of a tokenizer's files: transformers' own, and those of the class that tokenizer_config.json names."""
    from transformers import PreTrainedTokenizerFast
    from transformers import tokenization_utils_base as base
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

    names = {*PreTrainedTokenizerFast.vocab_files_names.values(), base.FULL_TOKENIZER_FILE}
    try:
        config = json.loads((folder / base.TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
        kind: Any = tokenizer_class_from_name(str(config.get("tokenizer_class")))
    except (OSError, ValueError, AttributeError, ImportError):
        kind = None
    names |= set(getattr(kind, "vocab_files_names", {}).values())
    if vocabulary_only:
        return names
    return names | {
        base.TOKENIZER_CONFIG_FILE,
        base.SPECIAL_TOKENS_MAP_FILE,
        base.ADDED_TOKENS_FILE,
        CHAT_TEMPLATE_FILE,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    }


def _processors() -> set[str]:
    """The names of a processor's files (images, video, sound)."""
    from transformers import utils

    return {
        utils.PROCESSOR_NAME,
        utils.FEATURE_EXTRACTOR_NAME,
        utils.IMAGE_PROCESSOR_NAME,
        utils.VIDEO_PROCESSOR_NAME,
        utils.AUDIO_TOKENIZER_NAME,
    }


def _found(adapter: Path, known: set[str], aux: Mapping[str, Path]) -> Files:
    """The files of the adapter's tokenizer, and of its processor where the base has one."""
    wanted = known | (_processors() & aux.keys())
    found = {path.name: path for path in adapter.iterdir() if path.is_file() and path.name in wanted}
    return dict(sorted({**found, **named_templates(adapter)}.items()))


def _others(adapter: Path, found: Files, aux: Mapping[str, Path]) -> list[str]:
    """A note of the adapter's files of other kinds that the merged model has, or could have, from the base."""
    from transformers.utils import GENERATION_CONFIG_NAME

    names = sorted({*aux, *_processors(), GENERATION_CONFIG_NAME} - found.keys())
    differ = [name for name in names if (adapter / name).is_file() and not _same(adapter / name, aux.get(name))]
    return [f"the adapter's own {', '.join(differ)} left out: the base's, if any, stays"] if differ else []


def _same(one: Path, other: Path | None) -> bool:
    return other is not None and one.read_bytes() == other.read_bytes()


def _link(folder: Path, files: Mapping[str, Path]) -> None:
    """Make links of these names, but for files that are there."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(path.absolute())


def _vocabulary_of(base: Source) -> dict[str, int] | None:
    """Token → id of the base's tokenizer, None if it cannot be loaded."""
    try:
        found: dict[str, int] = load_tokenizer(base.folder, trust_remote_code=base.trust_remote_code).get_vocab()
    except LlmqError:
        return None
    return found


def _unfit(new: Mapping[str, int], old: Mapping[str, int], vocabulary: int | None) -> str | None:
    """Why a tokenizer is not one of the base's model, or None if it is. old: the base's, empty if that may differ."""
    last = max(new.values(), default=-1)
    if vocabulary is not None and last >= vocabulary:
        return f"it has the token id {last}, and the base {vocabulary} embeddings"
    moved = next((token for token, number in new.items() if old.get(token, number) != number), None)
    return None if moved is None else f"it gives {moved!r} the id {new[moved]}, and the base's the id {old[moved]}"


def _differ(new: Mapping[str, int], old: Mapping[str, int] | None) -> str | None:
    """Why a template for the tokenizer `old` is not one for `new`, or None if each of its tokens is there."""
    if old is None:
        return "the base's tokenizer cannot be loaded"
    lost = next((token for token, number in old.items() if new.get(token) != number), None)
    if lost is None:
        return None
    there = f"gives {lost!r} the id {new[lost]}, not {old[lost]}" if lost in new else f"has no token {lost!r}"
    return f"the adapter's tokenizer {there}"
