"""What vLLM does with each scheme, as `scripts/check_vllm.py` found it; that script writes `vllm.json`.

For every scheme the file says what happened on the CPU, where folders were loaded and run, and which kernel vLLM's own
rules choose on NVIDIA GPUs, where nothing was run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llmq.formats.base import Loader
from llmq.grids.cache import Cache
from llmq.grids.scheme import Activations, Scheme

FILE = Path(__file__).with_name("vllm.json")
APART = Loader(
    "not for vLLM or other servers that make one matrix of weights with one input: such weights have different schemes",
    warn=True,
)


def cache_told(cache: Cache) -> str:
    """What vLLM does with a folder that has a rounded cache, in a clause."""
    version = f"vLLM {table()['vllm']}"
    if cache.heads:
        return (
            f"{version} keeps them so by itself, on GPUs with FlashAttention 3 or newer, from its source (not run; "
            "its CPU kernel takes the largest scale of a layer)"
        )
    return (
        f"{version} keeps them so by itself, with the stored scales (loaded and run on the CPU, whose kernel rounds "
        "towards zero and so loses more)"
    )


@cache
def table() -> dict[str, Any]:
    """The file's contents: versions, the date, and a row for each scheme's name.

    A row has `cpu`: {kernels, rms} or {refused, plain_rms}, and `cuda`: {compute capability: kernel} or {refused}.
    rms: of the log-probabilities' difference to the dequantized weights; plain_rms: that with a plain product in the
    place of a kernel that vLLM does not have.
    """
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def name_of(scheme: Scheme) -> str:
    """A scheme's name in the table, in which all ways to find scales are one, and all codes that are read alike."""
    scheme = scheme.as_read
    static = scheme.activations is not None and not scheme.activations.dynamic
    return str(replace(scheme, activations=Activations(dynamic=False)) if static else scheme)


def refusal(scheme: Scheme) -> str | None:
    """What vLLM said when it refused a scheme for GPUs, or None: it did not, or was not asked."""
    row = table()["schemes"].get(name_of(scheme))
    if row is None or "refused" not in row["cuda"]:
        return None
    return f"vLLM {table()['vllm']} does not load {name_of(scheme)}: {row['cuda']['refused']}"


def loader(schemes: Collection[Scheme]) -> Loader:
    """What was tried with vLLM, of all schemes of a folder."""
    known = table()
    names = sorted({name_of(scheme) for scheme in schemes})
    rows = {name: known["schemes"][name] for name in names if name in known["schemes"]}
    version = f"vLLM {known['vllm']}"
    unknown = [name for name in names if name not in rows]
    if unknown:
        return Loader(f"{', '.join(unknown)}: not tried with {version}", tried=False)
    if refused := [told for scheme in sorted(schemes, key=name_of) if (told := refusal(scheme))]:
        return Loader(refused[0], tried=False)
    kernels = list(dict.fromkeys(kernel for row in rows.values() for kernel in row["cuda"].values()))
    every = {capability for row in known["schemes"].values() for capability in row["cuda"]} - {"refused"}
    on = every.intersection(*(row["cuda"] for row in rows.values()))
    which = "" if on == every else f" of compute capability {', '.join(sorted(on, key=float)) or 'none'}"
    gpu = f"on NVIDIA GPUs{which} its rules choose {' or '.join(kernels)} (not run)"
    missing = [name for name, row in rows.items() if "refused" in row["cpu"]]
    if missing:
        return Loader(f"{version} has no CPU kernel for {', '.join(missing)}; {gpu}", tried=False, code="vllm")
    worst = max(row["cpu"]["rms"] for row in rows.values())
    said = (
        f"{version} loads this format: with it a demo model ran on the CPU, log-probabilities {worst:.4f} (rms) "
        "from the dequantized weights'; other architectures: docs/vllm.md"
    )
    return Loader(f"{said}; {gpu}", code="vllm")
