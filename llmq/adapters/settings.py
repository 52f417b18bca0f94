"""A fine-tuning run's settings (Settings) and results (Outcome) as plain data, and the adapter's card."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError

OPTIMIZERS = ("auto", "8bit", "paged", "torch")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the adapter, apart from the model and the data.

    base_bits: 4 (NF4, double-quantized) or 16 (unquantized). rank, alpha, dropout: of LoRA. batch: rows per forward
    pass; accumulate: passes per step. epochs, or steps where that is not 0. warmup: share of the steps in which the
    learning rate rises to lr; after them it follows the schedule. seqlen: tokens per row at most, limited by the
    model's maximum. eval_share: share of the rows held out at random, unless a file of held-out rows is given.
    template: auto or none, see llmq.data.instructions. dtype: what the base computes in; auto is the checkpoint's own,
    and bfloat16 where that is float16, whose range is too small to train in.
    """

    base_bits: int = 4
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    lr: float = 2e-4
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: float = 3.0
    steps: int = 0
    batch: int = 8
    accumulate: int = 1
    seqlen: int = 1024
    eval_share: float = 0.05
    optimizer: str = "auto"
    checkpointing: bool = False
    template: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("base_bits", (4, 16)),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("template", ("auto", "none")),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise LlmqError(f"--{name.replace('_', '-')} must be one of {choices}, not {getattr(self, name)!r}")
        for name, good, words in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 up to, and not, 1"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("warmup", 0 <= self.warmup < 1, "from 0 up to, and not, 1"),
            ("epochs", self.epochs > 0, "above 0"),
            ("steps", self.steps >= 0, "0 or more"),
            ("batch", self.batch >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("seqlen", self.seqlen >= 2, "at least 2"),
            ("eval_share", 0 <= self.eval_share < 1, "from 0 up to, and not, 1"),
        ):
            if not good:
                raise LlmqError(f"--{name.replace('_', '-')} must be {words}, not {getattr(self, name)}")


@dataclass
class Outcome:
    """What a run did; finetune.json. Losses are nats per learned token; held-out ones are None without held-out rows.

    data: the file of training rows, then the file of held-out rows if one was given.
    base: what `merge` needs to know of the base: its name, fingerprint, bits, dtype, and the modules that were in NF4.
    """

    base: dict[str, Any]
    data: list[str]
    settings: dict[str, Any]
    optimizer: str
    rows: int
    held_out: int
    steps: int
    tokens: int
    trained: int
    loss: float
    before: float | None
    after: float | None
    seconds: float
    peak_memory: int
    notes: list[str] = field(default_factory=list)


def card(outcome: Outcome, name: str) -> str:
    """README.md of the adapter's folder."""
    base, settings = outcome.base, outcome.settings
    kind = "NF4 (double-quantized)" if base["bits"] == 4 else base["dtype"]
    listed = "" if Path(base["model"]).exists() else f"base_model: {base['model']}\n"
    measured = ""
    if outcome.before is not None and outcome.after is not None:
        measured = (
            f"- held-out loss on {outcome.held_out} rows: {outcome.before:.4f} before, {outcome.after:.4f} after\n"
        )
    return f"""---
{listed}library_name: peft
tags:
- llmq
- lora
---
# {name}

A LoRA adapter of {base["model"]}, trained on a frozen {kind} base by [llmq](https://pypi.org/project/llmq/).

- rank {settings["rank"]}, alpha {settings["alpha"]:g}, on the linear layers: {outcome.trained:,} parameters
- {outcome.rows} rows, {outcome.steps} steps, {outcome.tokens:,} learned tokens, {outcome.optimizer}
{measured}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base["model"]}")
model = PeftModel.from_pretrained(base, "PATH_TO_THIS_FOLDER")
```

Merge and quantize: `llmq merge {base["model"]} PATH_TO_THIS_FOLDER -o OUT`. The curve is in `loss.svg`.
"""
