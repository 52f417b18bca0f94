"""Recipes by name: the YAML files in this folder, each with a sentence of advice and what it measured, or the user's
own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.recipe.recipe import Recipe, read_yaml
from llmq.validate import check_keys, nearest

FOLDER = Path(__file__).parent
ABOUT = ("advice", "measured")
"""Keys that do not belong to the recipe."""

HARDWARE = {
    "Blackwell": "--recipe w4a16-nvfp4",
    "MI350": "--recipe w4a16-mxfp4",
    "Hopper, Ada": "--recipe w4a16-gptq, or fp8",
    "older GPUs": "--recipe w4a16-gptq",
    "CPU": "--recipe w4a16-gptq --group-size 32",
    "smallest": "--recipe vq-2, or vq-1, or --grid ternary --packing llmq",
}
"""What to choose by hardware, as options of `llmq quantize`."""


@dataclass(frozen=True)
class Measured:
    """What a preset measured in docs/benchmarks.md, on a model of 8.4 M parameters.

    kl: to the unquantized model, in nats; time: of quantizing, as a multiple of that of w4a16-gptq.
    """

    kl: float
    time: float


def names() -> list[str]:
    """Every preset's name."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """The plain data of a recipe: a preset's or a YAML file's, without what only describes it.

    Raises LlmqError if there is neither.
    """
    data = read_yaml(_file(name))
    if not isinstance(data, dict):
        raise LlmqError(f"{name}: must be a mapping, not {data!r}")
    return {key: value for key, value in data.items() if key not in ABOUT}


def recipe(name: str) -> Recipe:
    """A preset's recipe, or a file's. Raises LlmqError."""
    return Recipe.from_dict(read(name), name)


def advice(name: str) -> str:
    """When to choose a preset, in a sentence."""
    return str(read_yaml(FOLDER / f"{name}.yaml")["advice"])


def measured(name: str) -> Measured:
    """What a preset measured."""
    return Measured(**check_keys(read_yaml(FOLDER / f"{name}.yaml")["measured"], Measured, name))


def _file(name: str) -> Path:
    if name in names():
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    raise LlmqError(f"--recipe {name!r} is neither a preset ({', '.join(names())}) nor a file{nearest(name, names())}")
