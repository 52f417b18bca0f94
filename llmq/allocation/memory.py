"""The memory of a process that loads a folder and serves a prompt: what each weight takes, and all else.

    peak = weights of chosen bits (`weight_bytes`) + all else (`fixed_lines`)

Numbers are predictions to stay below, checked against processes by `scripts/bench_fit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import nn

from llmq import formats
from llmq.allocation.chunks import chunk_of
from llmq.allocation.groups import Group
from llmq.allocation.own_share import own_share
from llmq.allocation.prefill import prompt
from llmq.errors import LlmqError
from llmq.formats.codebook import fixed
from llmq.grids.scheme import Scheme
from llmq.machine import size
from llmq.planning.types import Plan
from llmq.planning.weights import WeightPlan, matches, stored_bytes
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.int_linear import layouts, planes

Runtime = Literal["llmq", "vllm"]
MIB = 1 << 20
FRAGMENTS, ROUTED_FRAGMENTS = 0.6, 1.2
"""What lies free between the heap's blocks at the peak, as a share of these: measured 0.2 to 0.55 (glibc), and 1.0 with
routed experts, whose blocks have many sizes."""
CHUNK_FRAGMENTS, KEPT_FRAGMENTS = 1.5, 0.1
"""The same without routed experts where a prompt is read in chunks, as shares of the activations (measured at most 1.1,
on three shapes) and of what the model keeps, whose share of the free pieces is small: a layer's tensors grow one after
the other, and their holes join (with 455 MiB kept, 24 MiB were free; 0.6 of the heap would be 304)."""
WORKSPACE = 64 * 2**20
"""Slabs of unpacked weights, and the buffers of torch's products and attention."""
LOADING = 160 * 2**20
"""What loading takes above the loaded weights: one weight's codes, copies of 16 MiB, tables of names."""
VLLM_SHARE = 2**30
CUDA_CONTEXT = 600 * 2**20


@dataclass(frozen=True)
class Line:
    """A post of the memory: what it is for people, and its bytes."""

    what: str
    nbytes: int


def weight_bytes(
    scheme: Scheme | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    runtime: Runtime = "llmq",
) -> int:
    """The bytes of a weight [out, in] in memory once it is loaded. scheme: None is not quantized; dtype: the model's.

    vLLM keeps what is stored. On a CPU our kernels keep 2, 3 and 4 bits in torch's own order, in 4 bits; 5 to 7 bits
    become 8 everywhere. Zero points count even if a weight turns out to have none but 0. Floating-point codes are read
    by stock transformers, which makes them dense, as it then does all weights of the folder; fp8 with rounded inputs is
    packed.
    """
    rows, width = shape
    if scheme is None:
        return rows * width * dtype.itemsize
    if runtime == "vllm":
        return stored_bytes(shape, scheme, dtype)
    if loads_dense(scheme):
        return rows * width * dtype.itemsize
    kind, group = formats.of(scheme), scheme.group_size or width
    if _looked_up(torch.device(device), scheme, dtype, width, group):
        return codebooks.nbytes(rows, width, group, own=scheme.rules.learned)
    if hasattr(kind, "loaded_bytes"):
        return int(kind.loaded_bytes(shape, scheme, dtype))
    if scheme.rules.double_quant:
        # A codebook, and blocks of the flattened weight, whose scales are float32 or quantized themselves.
        blocks = -(-rows * width // (scheme.group_size or width))
        scales = blocks + 4 * -(-blocks // 256) + 4 * 256 if scheme.double_quant else 4 * blocks
        return -(-rows * width // 2) + scales + 4 * 16
    if scheme.activations is not None:
        return rows * width + rows * dtype.itemsize + (0 if scheme.activations.dynamic else dtype.itemsize)
    bits = scheme.bits if scheme.bits <= 4 else 8
    layout = layouts.layout(_layout(torch.device(device), dtype, bits, rows, width, group))
    return layout.nbytes(dtype, bits, rows, width, group, not scheme.symmetric)


def loads_dense(scheme: Scheme) -> bool:
    """Whether a folder with a weight of this scheme is made dense when it is loaded: by stock transformers, which alone
    reads some layouts, or by llmq, which has no kernel for llama.cpp's blocks."""
    rules, inputs = scheme.rules, scheme.activations
    if inputs is not None and inputs.grid:
        return True
    if inputs is not None and scheme.group_size is None:  # float8_linear, or int8_linear
        return False
    return rules.format == "ggml" or (rules.format == "compressed_tensors" and bool(rules.layout))


def _looked_up(device: torch.device, scheme: Scheme, dtype: torch.dtype, width: int, group: int) -> bool:
    """Whether kernels of integers look the weight's codes up in a codebook: on a GPU."""
    rules = scheme.rules
    levels = rules.format == "codebook" and not rules.vector_code
    if device.type != "cuda" or not (rules.double_quant or levels):
        return False
    if levels and not rules.learned and len(fixed.levels_of(scheme)) <= 3:
        return False
    if torch.cuda.is_available():
        return codebooks.usable(device, dtype, width, group)
    return width % group == 0 and _layout(device, dtype, 4, 1, width, group) == "planes"


def _layout(device: torch.device, dtype: torch.dtype, bits: int, rows: int, width: int, group: int) -> str:
    """The layout that a weight will have; without a GPU here, on one that runs all kernels."""
    if device.type == "cuda" and not torch.cuda.is_available():
        fits = dtype in planes.HALF and bits in planes.TILE and (group % 32 == 0 or group >= width)
        return "planes" if fits else layouts.DENSE_BITS
    return layouts.choose(device, dtype, bits, rows, width, group)[0]


def fixed_lines(plan: Plan, device: str, context: int, batch: int = 1, runtime: Runtime = "llmq") -> list[Line]:
    """Everything in memory that does not depend on the bits to choose, largest first.

    On llmq's kernels a long prompt is read some tokens at a time, where the model can (`chunks`). plan: of the model
    with a scheme for every weight that may be quantized; context: tokens of a request, with those that it generates;
    batch: requests at once. On a GPU these are the lines of its memory. vLLM's own share, and that of CUDA, are round
    numbers and not measured: leave some room there.

    Raises LlmqError if what the model keeps of its tokens cannot be found.
    """
    on_cpu = torch.device(device).type == "cpu"
    chunk = chunk_of(plan, context) if runtime == "llmq" else None
    needs = prompt(plan.model, context, batch, chunk)
    read = f"activations of a prompt of {batch * context} tokens"
    if chunk is not None:
        read = f"activations of a prompt read {batch * chunk} tokens at a time"
    routed = any(item.expert is not None for item in plan.weights)
    free = int((ROUTED_FRAGMENTS if routed else FRAGMENTS) * needs.heap)
    if chunk is not None and not routed:
        free = int(CHUNK_FRAGMENTS * max(0, needs.heap - needs.kept) + KEPT_FRAGMENTS * needs.kept)
    # Elsewhere the cache is as the model's dtype has it: stock transformers and llmq's kernels only compute with less.
    rounded = runtime == "vllm" and plan.cache is not None
    less = needs.keys - needs.keys // plan.dtype.itemsize if rounded else 0
    serving = [
        Line(f"what the model keeps of {batch * context} tokens (keys, values, states)", needs.cache - less),
        Line(read, needs.peak - needs.cache + WORKSPACE),
        Line("free pieces of the heap between them", free if on_cpu else 0),
    ]
    most = LOADING if runtime == "llmq" else 0
    loading = Line("loading, above serving", max(0, most - sum(line.nbytes for line in serving)))
    if runtime == "vllm":
        own = Line("vLLM itself (not measured)", VLLM_SHARE)
    elif on_cpu:
        own = Line("Python and its libraries", own_share(type(plan.model).__module__))
    else:
        own = Line("CUDA's own (not measured)", CUDA_CONTEXT)
    lines = [*_unchosen(plan, device, runtime), *serving, loading, own]
    return sorted((line for line in lines if line.nbytes), key=lambda line: -line.nbytes)


def _unchosen(plan: Plan, device: str, runtime: Runtime) -> list[Line]:
    """The parameters whose bits are not chosen; those that are one in memory count once."""
    chosen = [item for item in plan.weights if item.scheme is not None]
    given = [item for item in chosen if any(matches(pattern, item.name) for pattern, _ in plan.recipe.overrides)]
    every = sum(p.nbytes for p in plan.model.parameters())
    rest = every - sum(prod(item.shape) for item in chosen) * plan.dtype.itemsize
    entry = plan.model.get_input_embeddings()  # type: ignore[operator]
    embedding = sum(p.nbytes for p in entry.parameters()) if isinstance(entry, nn.Module) else 0
    other = plan.named.parameters if plan.named is not None else {}
    parts = sum(plan.source.info(name).nbytes for name in plan.links.unused if name in other)
    return [
        Line("embedding", embedding),
        Line("other weights that are not quantized", rest - embedding + sum(b.nbytes for b in plan.model.buffers())),
        Line("weights with a scheme of their own", sum(_item(item, plan.dtype, device, runtime) for item in given)),
        Line("parts of the model beside its decoder", parts),
    ]


def _item(item: WeightPlan, dtype: torch.dtype, device: str, runtime: Runtime) -> int:
    return weight_bytes(item.scheme, (item.shape[0], item.shape[1]), dtype, device, runtime)


def group_bytes(group: Group, dtype: torch.dtype, device: str = "cpu", runtime: Runtime = "llmq") -> list[int]:
    """The bytes of a group's weights in memory, by candidate."""
    return [
        sum(weight_bytes(scheme, (w.shape[0], w.shape[1]), dtype, device, runtime) for w in group.weights)
        for scheme in group.candidates
    ]


def needed(lines: Sequence[Line], smallest: int) -> int:
    """The smallest limit in whole MiB that holds these lines, and the weights with the fewest bits."""
    return -(-(sum(line.nbytes for line in lines) + smallest) // MIB)


def budget(lines: Sequence[Line], limit: int, smallest: int = 0) -> int:
    """What is left of `limit` bytes for the weights whose bits are chosen.

    smallest: what these take with the fewest bits (the sum of the least of `group_bytes`). Raises LlmqError if they do
    not fit, with the smallest limit that can be met, the largest lines, and ways out.
    """
    left = limit - sum(line.nbytes for line in lines)
    if left >= smallest:
        return left
    posts = sorted([*lines, Line("the weights, with the fewest bits", smallest)], key=lambda line: -line.nbytes)
    told = "".join(f"\n  {size(line.nbytes):>10}  {line.what}" for line in posts[:6] if line.nbytes)
    raise LlmqError(
        f"--fit {size(limit)} cannot be met: the smallest that can is --fit {needed(lines, smallest)}MiB. It is{told}\n"
        "Ways out: a shorter --context, a smaller --batch, candidates with fewer bits or larger groups, "
        "or --include weights outside the blocks"
    )
