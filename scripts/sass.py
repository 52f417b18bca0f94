"""Reads NVIDIA machine code as cuobjdump prints it, and finds writes to registers of Hopper's products in flight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
# The first operand of these is an address or a barrier: they write no register.
_WRITES_NOTHING = ("ST", "RED", "LDGSTS", "BAR", "BRA", "EXIT", "WARP", "DEPBAR", "LDGDEPBAR", "UTMA", "SYNCS", "BSYNC")
# Registers of the left operand, in a thread, of every product of a warp group with 32-byte rows.
_LEFT = 4


@dataclass(frozen=True)
class Instruction:
    """address: in bytes from the function's start; operands: as they are written, without modifiers of the opcode."""

    address: int
    opcode: str
    operands: tuple[str, ...]

    @property
    def product(self) -> bool:
        """Whether it is an asynchronous product of a warp group (wgmma)."""
        return self.opcode.split(".")[0] in ("HGMMA", "IGMMA", "QGMMA", "BGMMA")


def instructions(text: str) -> list[Instruction]:
    """All instructions of cuobjdump's disassembly (-sass) of one function."""
    return [
        Instruction(int(address, 16), opcode, tuple(part.strip() for part in rest.split(",") if part.strip()))
        for address, opcode, rest in _LINE.findall(text)
    ]


def overwritten(code: list[Instruction]) -> list[str]:
    """The instructions that write a register that a product in flight may still read, or touch its result; each once.

    A warp-group product is asynchronous: until a wait has seen its group complete, its operands in registers must stay
    as they are, and its result must not be touched (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; triton
    issue 9433 is a compiler that does). The code is walked as it stands, every loop twice, branches forward not taken.
    """
    groups: list[tuple[set[int], set[int]]] = []
    open_group: tuple[set[int], set[int]] = set(), set()
    found: dict[str, None] = {}
    for one in _walk(code):
        if one.product:
            operands, results = _of_product(one)
            open_group = open_group[0] | operands, open_group[1] | results
            if any("gsb0" in operand for operand in one.operands):
                groups.append(open_group)
                open_group = set(), set()
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(one.operands[-1], 16)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
            groups = [] if left == 0 else groups
        else:
            written, read = _written(one), _read(one)
            for operands, results in (*groups, open_group):
                if written & operands or (written | read) & results:
                    found[f"{one.address:#x}: {one.opcode} {', '.join(one.operands)}"] = None
    return list(found)


def _walk(code: list[Instruction]) -> Iterator[Instruction]:
    at = {one.address: number for number, one in enumerate(code)}
    number, taken = 0, set()
    while number < len(code):
        one = code[number]
        yield one
        number += 1
        if one.opcode.startswith("BRA") and one.operands and (found := re.search(r"0x[0-9a-f]+", one.operands[-1])):
            target = int(found[0], 16)
            if target < one.address and one.address not in taken and target in at:
                taken.add(one.address)
                number = at[target]


def _of_product(one: Instruction) -> tuple[set[int], set[int]]:
    """The registers of a product's left operand, empty if it is in shared memory, and of its result."""
    shape = re.search(r"\.64x(\d+)x\d+", one.opcode)
    first, left = _REGISTER.match(one.operands[0]), _REGISTER.match(one.operands[1])
    width = int(shape[1]) // 2 if shape else 0
    results = set(range(int(first[1]), int(first[1]) + width)) if first else set()
    return (set(range(int(left[1]), int(left[1]) + _LEFT)) if left else set()), results


def _written(one: Instruction) -> set[int]:
    if one.opcode.startswith(_WRITES_NOTHING) or not one.operands:
        return set()
    target = one.operands[1] if one.opcode.startswith("SHFL") and len(one.operands) > 1 else one.operands[0]
    found = re.fullmatch(r"R(\d+)(?:\.reuse)?", target)
    return set(range(int(found[1]), int(found[1]) + _width(one.opcode))) if found else set()


def _read(one: Instruction) -> set[int]:
    stores = one.opcode.startswith(_WRITES_NOTHING)
    return {int(number) for operand in one.operands[not stores :] for number in _REGISTER.findall(operand)}


def _width(opcode: str) -> int:
    """Registers that an instruction writes."""
    parts = opcode.split(".")
    if "128" in parts or (parts[0] == "LDSM" and parts[-1] == "4"):
        return 4
    wide = parts[:2] == ["IMAD", "WIDE"] or parts[0] in ("CS2R", "DADD", "DMUL", "DFMA") and "32" not in parts
    return 2 if "64" in parts or wide or (parts[0] == "LDSM" and parts[-1] == "2") else 1
