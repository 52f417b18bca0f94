"""Runs the inline assembly of the kernels on a CPU: the few PTX instructions they use, in the interpreter's place.

Triton's interpreter has no inline assembly, so without a GPU the PTX way of unpacking would never run. Two neighbouring
elements of 16 bits share a register, and a result of 32 bits takes two, as `pack=2` says.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def float_of(text: str) -> np.ndarray:
    return np.array([float(text)], dtype=np.float32).view(np.uint32)


def operand(text: str, registers: dict[str, np.ndarray], floats: bool) -> np.ndarray:
    if text in registers:
        return registers[text]
    return float_of(text) if floats else np.array([int(text, 0)], dtype=np.uint32)


def halves(register: np.ndarray, kind: str) -> np.ndarray:
    """The two numbers in a register, exactly, as float64 [..., 2]."""
    low, high = register & 0xFFFF, register >> 16
    both = np.stack([low, high], axis=-1)
    if kind == "f16x2":
        return both.astype(np.uint16).view(np.float16).astype(np.float64)
    return (both.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def joined(values: np.ndarray, kind: str) -> np.ndarray:
    """Two numbers rounded into a register. Raises AssertionError where rounding changes one: the kernels say exact."""
    if kind == "f16x2":
        bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        bits = values.astype(np.float32).view(np.uint32) >> 16
    register = bits[..., 0] | (bits[..., 1] << 16)
    assert (halves(register, kind) == values).all(), "a step that must be exact was rounded"
    return register


def step(line: str, registers: dict[str, np.ndarray]) -> None:
    """One instruction. Raises NotImplementedError for one that is not known."""
    name, _, rest = line.partition(" ")
    target, *sources = [part.strip() for part in rest.split(",")]
    floats = name == "fma.rn.f32"
    values = [operand(source, registers, floats) for source in sources]
    if name == "shr.b32":
        result = values[0] >> values[1]
    elif name == "prmt.b32":
        result = permuted(*values)
    elif name == "and.b32":
        result = values[0] & values[1]
    elif name == "mov.b32":
        result = values[0]
    elif name == "lop3.b32" and sources[3] == "0xEA":
        result = (values[0] & values[1]) | values[2]
    elif floats:
        a, b, c = (np.ascontiguousarray(value).view(np.float32).astype(np.float64) for value in values)
        result = (a * b + c).astype(np.float32).view(np.uint32)
        assert (result.view(np.float32) == a * b + c).all(), "a step that must be exact was rounded"
    elif name in ("fma.rn.f16x2", "fma.rn.bf16x2"):
        kind = name.rpartition(".")[2]
        a, b, c = (halves(value, kind) for value in values)
        result = joined(a * b + c, kind)
    else:
        raise NotImplementedError(line)
    registers[target] = result


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of eight. A nibble above seven would repeat a sign, which the kernels do not use."""
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), dtype=np.uint32)
    for byte in range(4):
        nibble = (selector >> 4 * byte).astype(np.uint64) & np.uint64(15)
        assert (nibble < 8).all()
        result |= (eight >> nibble * np.uint64(8) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * byte)
    return result


def run(assembly: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The output registers of a block of PTX for arrays of input registers (uint32)."""
    registers = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    for line in re.split(r"[;\n]", assembly.strip().strip("{}")):
        if line.strip() and ".reg" not in line:
            step(line.strip(), registers)
    return [np.broadcast_to(registers[f"${number}"], inputs[0].shape) for number in range(outputs)]


def create_inline_asm(
    builder: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> Any:
    """In place of the interpreter's method of the same name; returns what its caller takes the results from."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    assert pack == 2
    shape = values[0].data.shape
    pairs = []
    for value in values:
        flat = np.ascontiguousarray(value.data).reshape(-1).view(np.uint32)
        pairs += [flat[0::2], flat[1::2]] if value.data.dtype.itemsize == 4 else [flat]
    results = run(assembly, pairs, constraints.count("="))
    if len(types) > 1:
        several = [TensorHandle(np.ascontiguousarray(one).view(np.int16).reshape(shape), tl.int16) for one in results]

        class Calls:
            def get_result(self, number: int) -> Any:
                return several[number]

        return Calls()
    if len(results) == 2:
        found = TensorHandle(np.stack(results, axis=-1).reshape(shape).view(np.float32), tl.float32)
    else:
        found = TensorHandle(np.ascontiguousarray(results[0]).view(np.int16).reshape(shape), tl.int16)

    class Call:
        def get_result(self, _: int) -> Any:
            return found

    return Call()
