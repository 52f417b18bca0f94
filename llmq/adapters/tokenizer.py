"""The tokenizer and chat template of an adapter's folder, which the merged model needs in place of the base's.

Trainers save the tokenizer that they trained with beside the adapter: it can have more tokens than the base's, or
another chat template.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from llmq.checkpoint.source import Source
from llmq.errors import LlmqError
from llmq.inference.pretrained import load_tokenizer


class Carried:
    """What of an adapter's tokenizer goes into the merged model.

    files: the files that are carried, none if the base's tokenizer stays; left: names of the base's files that they
    replace; notes: what was carried, or left and why; folder: where the merged model's tokenizer can be loaded from.
    A tokenizer that cannot be loaded, or is not of the base's vocabulary, is left. vocabulary: the base's embeddings.
    """

    def __init__(self, adapter: Path, base: Source, vocabulary: int | None, retrained: bool = False) -> None:
        self.files: list[Path] = []
        self.left: set[str] = set()
        self.notes: list[str] = []
        self.folder = base.folder
        known, vocabularies = _names(base.folder), _names(adapter, vocabulary_only=True)
        known |= _names(adapter)
        found = sorted(path for path in adapter.iterdir() if path.is_file() and path.name in known)
        aux = {path.name: path for path in base.aux_files()}
        if any(path.name in vocabularies for path in found):
            self.left = {name for name in aux if name in known}
        else:  # a template, or settings, of the base's tokenizer
            self.left = {path.name for path in found}
        self.left |= _templates(adapter)
        if not any(path.name not in aux or path.read_bytes() != aux[path.name].read_bytes() for path in found):
            self.left = set()
            return
        self.files = found
        self._held = tempfile.TemporaryDirectory(prefix="llmq-tokenizer-")
        made = Path(self._held.name)
        for path in [*self.replaced(list(aux.values())), base.folder / "config.json"]:
            (made / path.name).symlink_to(path.absolute())
        listed = ", ".join(path.name for path in found)
        why = _unfit(made, base, vocabulary, retrained)
        if why is None:
            self.folder = made
            self.notes.append(f"the tokenizer is the adapter's own ({listed}), not the base's")
        else:
            self.files, self.left = [], set()
            self.notes.append(f"the adapter's own tokenizer is left out ({listed}) and the base's is kept: {why}")

    def replaced(self, files: list[Path]) -> list[Path]:
        """The base's files with those of the adapter in their place, sorted by name."""
        return sorted(
            [*(path for path in files if path.name not in self.left), *self.files], key=lambda path: path.name
        )

    @property
    def digest(self) -> str:
        """sha256 of the carried files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


def _names(folder: Path, vocabulary_only: bool = False) -> set[str]:
    """The names of a tokenizer's files: transformers' own, and those of the class that tokenizer_config.json names."""
    from transformers import PreTrainedTokenizerFast
    from transformers import tokenization_utils_base as base
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils.hub import CHAT_TEMPLATE_FILE

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
    }


def _templates(adapter: Path) -> set[str]:
    """The processor's file of a chat template, if the adapter has a template of its own, which would contradict it."""
    from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

    return {LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE} if (adapter / CHAT_TEMPLATE_FILE).is_file() else set()


def _unfit(made: Path, base: Source, vocabulary: int | None, retrained: bool) -> str | None:
    """Why the tokenizer in `made` is not one of the base's model, or None if it is."""
    try:
        new = load_tokenizer(made, trust_remote_code=base.trust_remote_code).get_vocab()
    except LlmqError as error:
        return str(error).replace(str(made), "it").removeprefix("it: ")
    last = max(new.values(), default=-1)
    if vocabulary is not None and last >= vocabulary:
        return f"it has the token id {last}, and the base {vocabulary} embeddings"
    try:
        old = {} if retrained else load_tokenizer(base.folder, trust_remote_code=base.trust_remote_code).get_vocab()
    except LlmqError:
        return None
    moved = next((token for token, number in new.items() if old.get(token, number) != number), None)
    return None if moved is None else f"it gives {moved!r} the id {new[moved]}, and the base's the id {old[moved]}"
