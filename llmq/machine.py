"""What this machine has: memory, devices, disks, threads, optional packages."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from llmq.errors import LlmqError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

R = TypeVar("R")
_PAGE, _MADV_PAGEOUT = resource.getpagesize(), 21


def check_device(device: str) -> None:
    """Raise LlmqError if torch does not know or have the device."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise LlmqError(f"--device {device}: not usable here ({first_line(error)}); --device cpu always is") from error


def has_cuda() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def require(package: str, what: str) -> Any:
    """An optional package, imported. Raises LlmqError with the command that installs it."""
    # Importing bitsandbytes (or PEFT, which does) prints warnings about missing kernels that do not help the user.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LlmqError(f"{what} needs {package}: pip install {package}") from error


def existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


def resident_memory() -> int:
    """The resident size of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    # On Linux, a process's ru_maxrss includes the peak of the process that started it; VmHWM does not.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory(device: torch.device) -> int | None:
    """The peak of tensor memory on a GPU since the last call, in bytes; None for the CPU."""
    import torch

    if device.type != "cuda":
        return None
    most = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return most


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """New memory of the host that a GPU reads and writes without the processor's help, several times as fast as other
    memory; other memory, if there is no more of it."""
    import torch

    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)


def locked_bytes(nbytes: int) -> int:
    """What so many bytes of page-locked memory take: torch rounds up to a power of two, and keeps what is freed."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in the host's memory, page-locked if it comes from a GPU; it is there when this returns."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    locked = page_locked(tuple(tensor.shape), tensor.dtype)
    return locked.copy_(tensor)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU copies what is in page-locked memory while the processor goes on, in the order of all
    its work; it must not be changed meanwhile."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def give_back() -> None:
    """Return freed memory to the system: glibc keeps freed memory for reuse, which adds up over blocks."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def by_rows(rows: int, step: int, work: Callable[[slice], R], device: torch.device) -> list[R]:
    """What `work` returns for `step` rows after the other, in their order; on a CPU in as many threads as torch has.

    Each thread computes alone. torch's own threads share every operator, and wait for each other after each: for
    operators of some microseconds that takes longer than the work, on a busy machine many times as long. work: what it
    computes must depend on its rows alone. Of what it raises, the first in the order of rows is raised. A thread that
    uses torch for the first time meanwhile begins with one thread of torch.
    """
    import torch

    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    before = torch.get_num_threads() if device.type == "cpu" else 1
    # A single row may be long enough for torch to share its sum among threads, which changes the order.
    if before == 1 or (len(parts) < 2 and rows > 1):
        return [work(part) for part in parts]
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(part: slice) -> R:
        # Both are a thread's own.
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(part)

    pool = ThreadPoolExecutor(max(1, min(before, len(parts))), initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(alone, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        # What a thread sets is also what threads that are made later begin with.
        torch.set_num_threads(before)


def parse_size(text: str, what: str) -> int:
    """'24GiB', '600 MiB', '1.5GB', '24G' → bytes; what: the option, for the error. Raises LlmqError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise LlmqError(f"{what} {text!r}: write a size such as 24GiB, 600MiB or 1.5GB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] or not match[4] else 1000) ** power)


def page_out(start: int, nbytes: int) -> None:
    """Let the system take back the pages of a part of memory that a file holds too: they are read again when used.

    Values never change: it is a hint, for Linux from 5.4 on, which other systems, and files of other users, ignore.
    """
    first, last = -(-start // _PAGE) * _PAGE, (start + nbytes) // _PAGE * _PAGE
    if sys.platform == "linux" and first < last:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


def parse_count(text: str, what: str) -> int:
    """'4096' or '32k' (32 · 1024) → a number; what: the option, for the error. Raises LlmqError."""
    match = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", text, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise LlmqError(f"{what} {text!r}: write a number of tokens such as 4096, or 32k for 32768")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_time(text: str, what: str) -> float:
    """'40ms', '40' or '0.5 s' → milliseconds; what: the option, for the error. Raises LlmqError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise LlmqError(f"{what} {text!r}: write a time such as 40ms or 0.5s")
    return float(match[1]) * (1000 if match[2].lower() == "s" else 1)


def size(nbytes: float) -> str:
    """Bytes with a unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
