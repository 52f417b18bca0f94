"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmq.grids.cache import Cache
from llmq_eval import speed
from llmq_eval.subject import default_out
from llmq_eval.tasks import Settings


@dataclass(frozen=True)
class Options:
    """tasks: names; 'perplexity' and 'divergence' use `text`, 'perplexity:wikitext2' another text. out: the folder of
    results. fresh: repeat cached measures. write_tasks: folder for the task files made from data_dir. window …
    special_tokens: as in `perplexities`; repeats, prompt, tokens: as in `speed.measure`. kernels: quantized weights
    stay packed and run on llmq's operators instead of stock transformers'. cache: how keys and values of the models are
    rounded while they are measured, but not those of the base.
    """

    tasks: tuple[str, ...] = ("perplexity",)
    text: str = "demo"
    window: int | None = None
    max_windows: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    special_tokens: bool = True
    settings: Settings = field(default_factory=Settings)
    data_dir: Path | None = None
    write_tasks: Path | None = None
    out: Path = field(default_factory=default_out)
    repeats: int = speed.REPEATS
    prompt: int = speed.PROMPT
    tokens: int = speed.TOKENS
    kernels: bool = False
    cache: Cache | None = None
    trust_remote_code: bool = False
    progress: bool = True
    fresh: bool = False
