"""llmq: quantize the weights of any causal language model, on a machine with too little memory to load it.

    import llmq
    report = llmq.quantize("path/to/model", "path/to/result", llmq.Recipe())
    model = llmq.load("path/to/result")

Importing llmq needs neither a GPU nor triton, and loads torch only when one of its functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe

if TYPE_CHECKING:
    from llmq.allocation.goal import Goal
    from llmq.inference.layer import QuantLinear
    from llmq.inference.pretrained import load
    from llmq.inference.transformers_hook import use_kernels
    from llmq.job import plan, quantize
    from llmq.report.report import Report

__all__ = [
    "Calibration",
    "Goal",
    "LlmqError",
    "QuantLinear",
    "Recipe",
    "Report",
    "Scheme",
    "load",
    "plan",
    "quantize",
    "use_kernels",
]

_LAZY = {
    "Goal": "allocation.goal",
    "plan": "job",
    "quantize": "job",
    "load": "inference.pretrained",
    "use_kernels": "inference.transformers_hook",
    "QuantLinear": "inference.layer",
    "Report": "report.report",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"llmq.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")
