"""How long a weight's product takes on this machine, by the operator that a loaded folder runs."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmq import formats
from llmq.block.block import with_input_scale
from llmq.checkpoint.tensors import read_header
from llmq.errors import LlmqError
from llmq.formats.plain import Weight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.inference.linear import QuantLinear, quant_linear
from llmq.inference.transformers_hook import reading

COPIES = 128
"""The most copies of a weight that are used in turns."""
ROUNDS = 50
"""The most rounds over all copies."""
LEAST = 5
"""Rounds that are made however long they take."""
SECONDS = 0.7
"""After so many seconds no round begins."""
USUAL_CACHE = 1 << 25
PLACE = "weight"


@dataclass(frozen=True)
class Product:
    """A product of a weight [rows, width], whose time is wanted.

    scheme: None for the unquantized weight, in `dtype`; tokens: rows of the input; copies: weights that are used in
    turns, so that as much of them is in the processor's cache as in a decode step.
    """

    rows: int
    width: int
    bias: bool
    tokens: int
    scheme: Scheme | None
    dtype: torch.dtype
    copies: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        bias = " bias" if self.bias else ""
        return (
            f"{self.rows}x{self.width} {self.scheme or 'unquantized'} {dtype}{bias}, {self.tokens} rows, "
            f"{self.copies} copies"
        )


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: a GPU's L2; a CPU's largest, or 32 MiB where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes, default=USUAL_CACHE)


def milliseconds(product: Product, device: torch.device) -> float:
    """The median time of one product, in the loop in which a decode step calls it.

    Raises LlmqError if llmq's kernels do not run the scheme.
    """
    layers = layers_of(product, device)
    # As a loaded model calls it, but for the module's own call, which is counted with all else of a step.
    runs: list[Callable[[Tensor], Tensor]] = [layer.forward for layer in layers]
    x = torch.randn(product.tokens, 1, product.width).to(device, product.dtype)
    with torch.inference_mode():
        for run in runs:
            run(x)
        return 1000 * (_on_gpu(runs, x) if device.type == "cuda" else _on_cpu(runs, x))


def _on_cpu(runs: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    times: list[float] = []
    began = time.perf_counter()
    for turn in range(ROUNDS):
        for run in runs:
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
        if turn + 1 >= LEAST and time.perf_counter() - began > SECONDS:
            break
    return statistics.median(times)


def _on_gpu(runs: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Launches follow each other as in a model, so a product takes what its launch or its kernel takes longer."""
    times: list[float] = []
    began = time.perf_counter()
    for turn in range(ROUNDS):
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        for run in runs:
            run(x)
        torch.cuda.synchronize(x.device)
        times.append((time.perf_counter() - start) / len(runs))
        if turn + 1 >= LEAST and time.perf_counter() - began > SECONDS:
            break
    return statistics.median(times)


def layers_of(product: Product, device: torch.device) -> list[nn.Module]:
    """Layers with random weights, as many as the product has copies. Raises LlmqError as `milliseconds` does."""
    bias = torch.zeros(product.rows, dtype=product.dtype, device=device) if product.bias else None
    first: nn.Module
    if product.scheme is None:
        first = nn.Linear(product.width, product.rows, product.bias, device, product.dtype).requires_grad_(False)
    else:
        first = packed(product.rows, product.width, product.scheme, product.dtype, bias, device)
    return [first, *(deepcopy(first) for _ in range(product.copies - 1))]


def size_of(layer: nn.Module) -> int:
    """The bytes of a layer's tensors."""
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def packed(
    rows: int, width: int, scheme: Scheme, dtype: torch.dtype, bias: Tensor | None, device: torch.device
) -> QuantLinear:
    """A layer with a random weight, stored and read as a folder's. Raises LlmqError as `milliseconds` does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(rows, width).uniform_(-0.05, 0.05, generator=generator)
    quantized = round_to_nearest(weight, scheme, dtype, "minmax")
    if scheme.activations is not None and not scheme.activations.dynamic:
        quantized = with_input_scale(quantized, torch.ones(1))
    plain = _read(formats.of(scheme).pack(quantized), scheme, (rows, width), dtype)
    if device.type != "cpu":
        plain = replace(plain, **{k: v.to(device) for k, v in vars(plain).items() if isinstance(v, Tensor)})
    return quant_linear(plain, bias, dtype)


def _read(stored: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    """A stored weight as llmq reads it from a folder."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    section = formats.config({scheme: [PLACE]}, (), dtype)
    method, reasons = formats.method_of(section) or "", []
    with reading():
        config: Any = AutoQuantizationConfig.from_dict(section)  # type: ignore[no-untyped-call]
    # A method may have one entry for each of its widths.
    readers = [reader for key, found in formats.readers().items() if key.startswith(method) for reader in found]
    for reader in dict.fromkeys(readers):
        reason = reader.refusal(config)
        if reason is not None:
            reasons.append(reason)
            continue
        with tempfile.TemporaryDirectory(prefix="llmq-") as folder:
            file = Path(folder) / "one.safetensors"
            save_file({f"{PLACE}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}, file)
            infos = {name.removeprefix(f"{PLACE}."): info for name, info in read_header(file).items()}
            module = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            layer = reader(config).layer(PLACE, module, shape, infos)
        if layer is not None:
            weight: Weight = layer.read(stored)
            return weight
    raise _refused(scheme, reasons[0] if reasons else "its reader finds no weight")


def _refused(scheme: Scheme, reason: str) -> LlmqError:
    return LlmqError(
        f"--target-latency: llmq's kernels do not run {scheme}: {reason}: leave it out of --candidates, as its time "
        "cannot be measured"
    )
