"""Compiles a launch without launching it: for a GPU that is not here, or into the cache of the one that is."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmq_kernels.triton.launch import Launch

POINTED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8", "uint8": "u8", "int16": "i16"}
POINTED |= {"int32": "i32", "int64": "i64"}


def compile_launch(made: Launch, target: str) -> Any:
    """What Triton compiles. target: as `Gpu.target`. Raises what Triton raises."""
    backend, _, arch = target.partition(":")
    gpu = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    kernel = made.kernel
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    constexprs = dict(made.constexprs)
    for parameter, value in zip(kernel.params, made.arguments, strict=False):
        kind = type_of(value)
        if kind is None:
            constexprs[parameter.name] = None
            continue
        signature[parameter.name] = kind
        if not parameter.do_not_specialize and divisible(value):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=gpu, options=dict(made.options))


def warm(made: Launch) -> Any:
    """Compile for the current GPU what its launcher will look for in Triton's cache; tensors may be on the meta device.

    `compile_launch` makes the same code, but under another name. Raises what Triton raises.
    """
    return made.kernel.warmup(*made.arguments, grid=made.grid, **made.constexprs, **made.options)


def type_of(value: Any) -> str | None:
    """Triton's type of an argument, as its launcher determines it; None for a missing tensor."""
    if isinstance(value, torch.Tensor):
        return "*" + POINTED[str(value.dtype).removeprefix("torch.")]
    if value is None:
        return None
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 1 << 31 else "i64"


def divisible(value: Any) -> bool:
    """Whether Triton's launcher specializes a kernel for the argument: tensors (torch aligns them), multiples of 16."""
    return isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0
