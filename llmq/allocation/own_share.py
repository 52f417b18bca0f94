"""What a process takes that loads a model on our kernels, beside the model: measured, once, in a process of its own."""

from __future__ import annotations

import functools
import subprocess
import sys

from llmq.errors import LlmqError, first_line

_MEASURE = """
import importlib, sys
import torch
import compressed_tensors
import llmq, llmq.inference.transformers_hook
from llmq import demo
from llmq.machine import give_back, resident_memory
with __import__("contextlib").suppress(ImportError):
    importlib.import_module(sys.argv[1])
model = llmq.load(demo.path(), device_map="cpu")
ids = torch.zeros(1, 64, dtype=torch.long)
with torch.inference_mode():
    model.generate(ids, max_new_tokens=2, pad_token_id=0)
held = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
give_back()
print(resident_memory() - held)
"""


@functools.cache
def own_share(module: str) -> int:
    """The resident bytes of Python, torch, transformers and llmq after a small model has generated a token.

    module: that of the model's class, whose code is loaded too. Takes some seconds at the first call. Raises LlmqError
    if the process fails.
    """
    command = [sys.executable, "-c", _MEASURE, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise LlmqError(f"the memory of an empty process could not be measured: {first_line(Exception(*told[-1:]))}")
    return int(done.stdout.split()[-1])
