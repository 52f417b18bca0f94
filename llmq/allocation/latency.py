"""How long a decode step takes on this machine, as a sum: of each weight in each candidate scheme, and of all else.

Measured once for each kind of weight, and kept in the user's cache. A sum is what the choice of bits needs; it is right
where one product begins after another ends, as on a CPU. On a GPU, where launches overlap with kernels, it is too high.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq.allocation import layers
from llmq.allocation.decoding import owners_of, reached, rest_of
from llmq.allocation.groups import Group
from llmq.allocation.layers import Product, cache_bytes
from llmq.allocation.store import Store
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning.types import Plan
from llmq.planning.weights import WeightPlan, stored_bytes
from llmq.report.report import versions
from llmq.watch import Silent, Watch


def weight_times(
    plan: Plan, groups: Sequence[Group], device: torch.device, batch: int, watch: Watch | None = None
) -> list[list[float]]:
    """Milliseconds of each group's weights in a decode step of `batch` sequences, by candidate.

    Each kind of weight is measured once on this machine, by the operator that a loaded folder runs, for all earlier and
    later runs. Of routed experts it is an estimate: that of the products of as many experts as may be chosen. Weights
    that a step does not run take no time. Raises LlmqError for a scheme that llmq's kernels do not run.
    """
    watch = watch or Silent()
    uses = [_uses(plan, group, batch) for group in groups]
    total = sum(group.numbers for group in groups)
    cache = cache_bytes(device)
    wanted = {
        _with(product, scheme, total, cache)
        for used, group in zip(uses, groups, strict=True)
        for product in used
        for scheme in group.candidates
    }
    store, times = _store(device), {}
    missing = []
    for product in sorted(wanted, key=str):
        known = store.read(_name(product))
        if isinstance(known, (int, float)):
            times[product] = float(known)
        else:
            missing.append(product)
    if missing:
        watch.stage("measuring weights on this machine", len(missing))
    for product in missing:
        times[product] = layers.milliseconds(product, device)
        store.write(_name(product), times[product], watch)
        watch.step(f"{product}: {times[product]:.3g} ms")
    return [
        [
            sum(count * times[_with(product, scheme, total, cache)] for product, count in used.items())
            for scheme in group.candidates
        ]
        for used, group in zip(uses, groups, strict=True)
    ]


def rest_time(
    plan: Plan,
    device: torch.device,
    context: int,
    batch: int,
    groups: Sequence[Group] | None = None,
    watch: Watch | None = None,
) -> float:
    """Milliseconds of a decode step of `batch` sequences with `context` tokens each, but for the weights of the groups.

    groups: those whose bits are chosen; by default all weights that the plan quantizes. Measured once on this machine,
    by running the model with modules that return zeros in the place of these weights'. Raises LlmqError if the model
    does not decode with a cache.
    """
    watch = watch or Silent()
    if groups is None:
        groups = [Group(w.name, (w,), (w.scheme,), (w.after,)) for w in plan.weights if w.scheme is not None]
    about = {
        "config": plan.source.config,
        "class": type(plan.model).__name__,
        "dtype": str(plan.dtype),
        "owners": owners_of(plan, groups),
        "context": context,
        "batch": batch,
    }
    store, name = _store(device), f"rest-{_digest(about)}"
    known = store.read(name)
    if isinstance(known, (int, float)):
        return float(known)
    watch.stage("measuring all but the weights on this machine", 1)
    found, tokens = rest_of(plan, groups, device, context, batch)
    if tokens < context:
        watch.note(f"the time of a step is that with {tokens} tokens in the cache, not {context}: more takes longer")
    store.write(name, found, watch)
    watch.step(f"{found:.3g} ms")
    return found


def predict(rest: float, times: Sequence[Sequence[float]], picks: Sequence[int]) -> float:
    """Milliseconds of a decode step with a candidate for each group, from `rest_time` and `weight_times`."""
    return rest + sum(row[pick] for row, pick in zip(times, picks, strict=True))


def _uses(plan: Plan, group: Group, batch: int) -> Counter[Product]:
    """The products of a group's weights in a step, and how many there are of each, which may be a fraction."""
    found: Counter[Product] = Counter()
    for weight in group.weights:
        share, tokens = _share(plan, weight, batch)
        if share:
            rows, width = weight.shape
            product = Product(rows, width, _has_bias(plan, weight), tokens, None, plan.dtype)
            found[product] += share  # type: ignore[assignment]
    return found


def _share(plan: Plan, weight: WeightPlan, batch: int) -> tuple[float, int]:
    """How often a step multiplies by a weight, on average, and by how many tokens then."""
    if weight.block is None:
        return float(reached(plan, weight.module)), batch
    if weight.expert is None:
        return 1.0, batch
    info = plan.structure.blocks[weight.block]
    if info.experts is not None:
        count, chosen = info.experts.count, info.experts.call.chosen
    else:
        count, chosen = max((p.count, p.copies) for p in info.parts)
    # As if tokens chose different experts as long as there are some.
    busy = max(1, min(count, batch * chosen))
    return busy / count, -(-batch * chosen // busy)


def _has_bias(plan: Plan, weight: WeightPlan) -> bool:
    """Whether the module of a weight adds a bias to its product."""
    if weight.expert is not None:
        return False
    try:
        module: Any = plan.model.get_submodule(weight.module)
    except AttributeError:
        return False
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def _with(product: Product, scheme: Scheme | None, total: int, cache: int) -> Product:
    """The product in a scheme, with as many copies as a model of `total` numbers has, or as do not stay in the cache."""
    rows, width = product.rows, product.width
    nbytes = rows * width * product.dtype.itemsize if scheme is None else stored_bytes((rows, width), scheme, product.dtype)
    copies = min(-(-2 * cache // max(1, nbytes)), -(-total // (rows * width)), layers.COPIES)
    return replace(product, scheme=scheme, copies=max(1, copies))


def _store(device: torch.device) -> Store:
    """The measurements on this machine, with these versions."""
    return Store.of({"times": 1, "machine": machine(device), "versions": versions()})


def machine(device: torch.device) -> dict[str, Any]:
    """What times depend on beside versions: the processor, its threads, the GPU, and what `llmq tune` has found."""
    found: dict[str, Any] = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # type: ignore[no-untyped-call]
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


def _name(product: Product) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(product).lower())


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
