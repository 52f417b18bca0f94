"""The properties of a GPU that kernels depend on: NVIDIA, AMD, or Triton's interpreter on a CPU."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """target: of the compiler ("cuda:90", "hip:gfx942", "cpu"); shared: bytes of shared memory per program."""

    name: str
    target: str
    processors: int
    shared: int

    @functools.cached_property
    def backend(self) -> str:
        """The constexpr BACKEND of the kernels: cuda (NVIDIA), hip (AMD) or cpu (the interpreter)."""
        return self.target.partition(":")[0]

    @property
    def wide(self) -> bool:
        """Whether memory is so fast (data-center GPUs) that unpacking limits a kernel without tensor cores."""
        return self.target in ("cuda:80", "cuda:90", "cuda:100", "cuda:103")

    @property
    def tensor_memory(self) -> bool:
        """Whether sums of products are in tensor memory (data-center Blackwell)."""
        return self.target in ("cuda:100", "cuda:103")

    @property
    def pdl(self) -> bool:
        """Whether a kernel can start before the one before it has ended (programmatic dependent launch)."""
        return self.backend == "cuda" and int(self.target.partition(":")[2]) >= 90


KNOWN = (
    Gpu("NVIDIA A100-SXM4-80GB", "cuda:80", 108, 166912),
    Gpu("NVIDIA GeForce RTX 4090", "cuda:89", 128, 101376),
    Gpu("NVIDIA H100 80GB HBM3", "cuda:90", 132, 232448),
    Gpu("NVIDIA B200", "cuda:100", 148, 232448),
    Gpu("NVIDIA GeForce RTX 5090", "cuda:120", 170, 101376),
    Gpu("AMD Instinct MI300X", "hip:gfx942", 304, 65536),
    Gpu("AMD Instinct MI355X", "hip:gfx950", 256, 163840),
)
# Few processors, so that small tests also split K.
INTERPRETER = Gpu("interpreter", "cpu", 4, 65536)
_NOTHING = contextlib.nullcontext()


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device; for other devices, the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # torch for ROCm also calls its devices cuda
        target = "hip:" + str(found.gcnArchName).partition(":")[0]
    else:
        target = f"cuda:{found.major * 10 + found.minor}"
    shared = int(getattr(found, "shared_memory_per_block_optin", 65536))
    return Gpu(str(found.name), target, int(found.multi_processor_count), shared)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make the device the current one, on which Triton launches; no operation if it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
