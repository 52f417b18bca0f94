"""What a run of fine-tuning may be told, and the card of what it did."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmq.adapters.settings import DTYPES, OPTIMIZERS, SCHEDULES, Outcome, Settings, card
from llmq.errors import LlmqError

SETTINGS = Settings()


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"base_bits": 8}, "--base-bits"),
        ({"rank": 0}, "--rank"),
        ({"dropout": 1.0}, "--dropout"),
        ({"lr": 0.0}, "--lr"),
        ({"schedule": "step"}, "--schedule"),
        ({"eval_share": 1.0}, "--eval-share"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_impossible_settings(change: dict[str, Any], option: str) -> None:
    with pytest.raises(LlmqError, match=option):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("name", "last", "first"),
    [
        ("rank", 1, 0),
        ("alpha", 1e-9, 0.0),
        ("dropout", 0.0, -0.1),
        ("lr", 1e30, float("inf")),
        ("lr", 1e-30, float("nan")),
        ("warmup", 0.999, 1.0),
        ("epochs", 0.01, 0.0),
        ("steps", 0, -1),
        ("batch", 1, 0),
        ("accumulate", 1, 0),
        ("seqlen", 2, 1),
        ("eval_share", 0.0, -0.01),
    ],
)
def test_the_last_value_that_is_possible_and_the_first_that_is_not(name: str, last: float, first: float) -> None:
    assert getattr(replace(SETTINGS, **{name: last}), name) == last
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(LlmqError) as caught:
        replace(SETTINGS, **{name: first})
    assert str(caught.value).startswith(f"{option} must be ") and str(caught.value).endswith(f"not {first}")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("base_bits", (4, 16)),
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZERS),
        ("template", ("auto", "none")),
        ("dtype", DTYPES),
    ],
)
def test_a_choice_is_one_of_those_listed(name: str, allowed: tuple[Any, ...]) -> None:
    for value in allowed:
        assert getattr(replace(SETTINGS, **{name: value}), name) == value
    with pytest.raises(LlmqError, match=f"must be one of {', '.join(map(str, allowed))}, not 'other'"):
        replace(SETTINGS, **{name: "other"})


def test_every_number_is_checked() -> None:
    """A new number among the settings is thought of: a weight decay, a clip and a seed may be anything."""
    free = {"weight_decay", "clip", "seed", "checkpointing"}
    for field in fields(Settings):
        if field.name not in free and isinstance(field.default, (int, float)):
            with pytest.raises(LlmqError):
                replace(SETTINGS, **{field.name: -1})


def outcome(model: str, **changes: Any) -> Outcome:
    base = {"model": model, "fingerprint": "f", "bits": 4, "dtype": "bfloat16", "nf4": []}
    made = {
        "base": base,
        "data": ["/rows.jsonl"],
        "settings": {"rank": 8, "alpha": 16.0},
        "optimizer": "torch AdamW",
        "rows": 40,
        "held_out": 2,
        "steps": 7,
        "tokens": 12345,
        "trained": 67890,
        "loss": 1.5,
        "before": 2.25,
        "after": 1.125,
        "seconds": 3.0,
        "peak_memory": 1,
    }
    return Outcome(**(made | changes))


def head(text: str) -> dict[str, Any]:
    """The YAML at the start of a card, as the hub reads it."""
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    read = yaml.safe_load(front)
    assert isinstance(read, dict)
    return read


def test_the_card_names_a_hub_base_and_no_folder(tmp_path: Path) -> None:
    assert head(card(outcome("org/name"), "mine"))["base_model"] == "org/name"
    assert "base_model" not in head(card(outcome(str(tmp_path)), "mine"))


def test_the_card_says_what_was_done() -> None:
    text = card(outcome("org/name"), "mine")
    assert head(text)["library_name"] == "peft" and head(text)["tags"] == ["llmq", "lora"]
    assert "# mine\n" in text and "NF4 (double-quantized) base" in text
    assert "rank 8, alpha 16, on the linear layers: 67,890 parameters" in text
    assert "40 rows, 7 steps, 12,345 learned tokens, torch AdamW" in text
    assert "held-out loss on 2 rows: 2.2500 before, 1.1250 after" in text
    assert "llmq merge org/name PATH_TO_THIS_FOLDER -o OUT" in text


def test_the_card_of_an_unquantized_base_names_its_dtype() -> None:
    base = {"model": "org/name", "fingerprint": "f", "bits": 16, "dtype": "bfloat16", "nf4": []}
    text = card(outcome("org/name", base=base), "mine")
    assert "a frozen bfloat16 base" in text and "NF4" not in text


def test_the_card_says_nothing_of_losses_without_held_out_rows() -> None:
    assert "held-out" not in card(outcome("org/name", held_out=0, before=None, after=None), "mine")
