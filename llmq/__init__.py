"""llmq: quantize the weights of any causal language model, on a machine that could never hold it.

    import llmq
    report = llmq.quantize("path/to/model", "path/to/result", llmq.Recipe())

Importing llmq needs neither a GPU nor triton, and loads torch only when something is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmq.errors import LlmqError
from llmq.recipe import Calibration, Recipe, Scheme

if TYPE_CHECKING:
    from llmq.job import plan, quantize
    from llmq.report import Report

__all__ = ["Calibration", "LlmqError", "Recipe", "Report", "Scheme", "plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name in ("plan", "quantize"):
        from llmq import job

        return getattr(job, name)
    if name == "Report":
        from llmq.report import Report

        return Report
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")
