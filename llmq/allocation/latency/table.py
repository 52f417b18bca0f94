"""What a decode step takes, by group of weights and candidate: measured once on a machine, and kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from llmq.allocation.groups import Group
from llmq.allocation.latency.decode import Start, start, timed
from llmq.allocation.latency.standin import Standin, given_apart, nbytes, standin
from llmq.allocation.store import Store
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.machine import size
from llmq.planning.memory import TRANSIENT
from llmq.planning.types import Plan
from llmq.report.report import versions
from llmq.watch import Watch


def step_times(
    plan: Plan, groups: Sequence[Group], device: torch.device, context: int, batch: int, watch: Watch
) -> list[list[float]]:
    """Milliseconds by group and candidate, whose sum is a decode step of `batch` rows after `context` tokens each.

    For each scheme, a model of random weights with this scheme for all groups is run; a group's time is that of its
    own products, and a share of all else. So a step with one scheme for all is what was measured, and a mix is between.
    Raises LlmqError if the model does not decode, or llmq's kernels do not run a candidate.
    """
    schemes = sorted({scheme for group in groups for scheme in group.candidates}, key=str)
    every = {scheme: _schemes(groups, scheme) for scheme in schemes}
    store = Store.of(_depends(plan, groups, device, context, batch))
    known = {scheme: store.read(_name(every[scheme])) for scheme in schemes}
    missing = [scheme for scheme in schemes if known[scheme] is None]
    if missing:
        watch.stage("Timing decode steps", len(missing))
        begin = start(plan.model, context, batch)
        check_memory(plan, begin, device)
        if begin.tokens < context:
            watch.note(f"decode steps are timed after {begin.tokens} tokens, not {context}: more take longer")
    alike: dict[Any, list[float]] = {}
    for scheme in missing:
        model = standin(plan, groups, every[scheme], device)
        # Some schemes run as one: on a CPU, 2 and 3 bits take the kernel of 4.
        if model.form not in alike:
            alike[model.form] = _measured(model, len(groups), device, begin)
        known[scheme] = alike[model.form]
        store.write(_name(every[scheme]), known[scheme], watch)
        watch.step(f"{scheme or 'unquantized'}: {sum(known[scheme]):.3g} ms")
    return [[known[scheme][g] for scheme in group.candidates] for g, group in enumerate(groups)]


def _schemes(groups: Sequence[Group], scheme: Scheme | None) -> list[Scheme | None]:
    """A scheme for each group: the given one, or its first candidate, if the given one is none of its candidates."""
    return [scheme if scheme in group.candidates else group.candidates[0] for group in groups]


def check_memory(plan: Plan, begin: Start, device: torch.device) -> None:
    """Raise LlmqError if timing decode steps takes more memory than is free."""
    # Beside the model that runs, one that is being freed, or a weight's unpacked values while it is packed.
    needs = 2 * nbytes(plan, device) + 3 * begin.nbytes + TRANSIENT
    have = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if needs > have:
        raise LlmqError(
            f"--target-latency: timing decode steps needs about {size(needs)} of memory, and {size(have)} are free: "
            "give a shorter --context or a smaller --batch, or another budget"
        )


def _measured(model: Standin, groups: int, device: torch.device, begin: Start) -> list[float]:
    """Milliseconds of each group."""
    times = timed(model.model, list(model.owners), begin, device)
    rest = max(0.0, times.step - sum(times.parts.values()))
    found = [rest / groups] * groups
    for owner, group in model.owners.items():
        found[group] += times.parts[owner]
    return found


def _depends(plan: Plan, groups: Sequence[Group], device: torch.device, context: int, batch: int) -> dict[str, Any]:
    return {
        "times": 2,
        "kernels": _kernels(),
        "config": plan.source.config,
        "class": type(plan.model).__name__,
        "dtype": str(plan.dtype),
        "groups": [[g.name, [w.name for w in g.weights]] for g in groups],
        "given": [[w.name, str(w.scheme)] for w in given_apart(plan, groups)],
        "context": context,
        "batch": batch,
        "machine": machine(device),
        "versions": versions(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What times depend on beside versions: the processor, its threads, the GPU, and what `llmq tune` has found."""
    found: dict[str, Any] = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["tuned"] = _tuned(device)
    return found


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _kernels() -> str:
    """A digest of the operators' code, which a version does not tell while it is worked on."""
    import llmq_kernels

    found = hashlib.sha256()
    for file in sorted(Path(llmq_kernels.__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _tuned(device: torch.device) -> str:
    """A digest of the user's table of launch configurations, which operators go by."""
    from llmq_kernels.backend import triton_refusal

    if triton_refusal(device) is not None:
        return ""
    from llmq_kernels.triton.gpu import gpu_of
    from llmq_kernels.triton.tables import user_table

    try:
        return hashlib.sha256(user_table(gpu_of(device).name).read_bytes()).hexdigest()
    except OSError:
        return ""


def _name(schemes: Sequence[Scheme | None]) -> str:
    told = json.dumps([str(scheme) for scheme in schemes])
    return f"step-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
