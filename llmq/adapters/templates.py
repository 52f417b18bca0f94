"""The chat templates of a merged model: the adapter's, or the base's where the adapter has none.

The templates of a model belong together (a request with tools takes the one that is named for it). So they are all the
adapter's if it has one without a name; if it has none, or named ones only, the base's are carried too.

transformers reads the template without a name from a file beside the tokenizer, named ones from a folder, and both from
tokenizer_config.json where there is none of these; for a processor, first of all from an older JSON file, which it
refuses beside named ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint.files import TEMPLATES

DEFAULT = "default"
"""What transformers calls the template without a name, where there are several."""


class Templates:
    """Which templates the merged model has. own, base: the files of the adapter's tokenizer, and the base's, by name.

    names: their files with templates only. After `choose`: left, the base's files of these that are not in the merged
    model; dropped, the adapter's; made, the files that are written instead.
    """

    def __init__(self, own: Mapping[str, Path], base: Mapping[str, Path]) -> None:
        from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
        from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

        self._file, self._older, self._config = (
            CHAT_TEMPLATE_FILE,
            LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
            TOKENIZER_CONFIG_FILE,
        )
        self._own, self._base = self._only(own), self._only(base)
        self._mine, self._theirs = self._read(own), self._read(base)
        self._replaced = self._config in own
        self.names = {*self._own, *self._base}
        self.left: set[str] = set()
        self.dropped: set[str] = set()
        self.made: dict[str, Path] = {}

    def choose(self, folder: Path, whole: bool, differ: str | None) -> list[str]:
        """Write to `folder` what is neither side's file as it is; notes for the user.

        whole: whether the adapter has a vocabulary of its own; differ: why the base's templates are not for it.
        """
        older = self._read_older(self._own)
        if DEFAULT in self._mine or older:
            self.left = set(self._base)
            if DEFAULT not in self._mine:  # only processors would read it, and the tokenizer have none
                self.dropped = {self._older}
                self._write(folder, older)
            lost = sorted(self._theirs.keys() - self._mine.keys() - {DEFAULT})
            return (
                [f"the base's chat template ({', '.join(lost)}) is left out: the adapter has its own"] if lost else []
            )
        if not (whole or self._replaced or self._mine):
            return []
        older = self._read_older(self._base)
        lost = sorted({**older, **self._theirs}.keys() - self._mine.keys())
        has = "no default one" if self._mine else "none"
        if differ is not None and lost:
            self.left = set(self._base)
            return [f"the base's chat template ({', '.join(lost)}) is left out, and the adapter has {has}: {differ}"]
        missing = {name: text for name, text in self._theirs.items() if name not in self._mine}
        self.left = self._base.keys() - {self._older}
        if {*self._mine, *missing} - {DEFAULT} and older:
            missing, self.left = {**older, **missing}, set(self._base)
        self._write(folder, missing)
        return [f"the base's chat template ({', '.join(lost)}) is carried too: the adapter has {has}"] if lost else []

    def _only(self, files: Mapping[str, Path]) -> dict[str, Path]:
        """The files with nothing but templates."""
        alone = (self._file, self._older)
        return {name: path for name, path in files.items() if name in alone or name.startswith(f"{TEMPLATES}/")}

    def _read(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The templates of a tokenizer by name, as transformers reads them."""
        found = {Path(name).stem: path for name, path in files.items() if name.startswith(f"{TEMPLATES}/")}
        found |= {DEFAULT: files[self._file]} if self._file in files else {}
        if found:
            return {name: path.read_bytes().decode(errors="replace") for name, path in sorted(found.items())}
        told = _value(files.get(self._config))
        if isinstance(told, list):
            return {str(one["name"]): str(one["template"]) for one in told if {"name", "template"} <= one.keys()}
        return {DEFAULT: told} if isinstance(told, str) else {}

    def _read_older(self, files: Mapping[str, Path]) -> dict[str, str]:
        told = _value(files.get(self._older))
        return {DEFAULT: told} if isinstance(told, str) else {}

    def _write(self, folder: Path, templates: Mapping[str, str]) -> None:
        for name, text in templates.items():
            place = self._file if name == DEFAULT else f"{TEMPLATES}/{name}.jinja"
            self.made[place] = folder / place
            self.made[place].parent.mkdir(exist_ok=True)
            self.made[place].write_bytes(text.encode())


def _value(file: Path | None) -> Any:
    """What a JSON file has as its chat template, None if it has none or cannot be read."""
    try:
        return None if file is None else json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
