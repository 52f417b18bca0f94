"""Compile every Triton kernel without a GPU, and list the resources that the machine code uses.

    python scripts/compile_kernels.py --keep build/compiled.jsonl      everything: some hours on two cores; resumes
    python scripts/compile_kernels.py --match 'few_rows 4 bits' --targets cuda:90
    python scripts/compile_kernels.py --sample                         a few of each kernel, as the tests do

`llmq_kernels.triton.variants` lists the launches of every configuration that the rule can select, made by the same
functions as real launches; each is compiled for its target. For NVIDIA, registers and stack are from cuobjdump, and
instructions are counted in its disassembly; for AMD they are from the assembly's remarks. Neither needs a driver. Exits
with 1 if a kernel does not compile, spills registers to memory, needs more shared memory than its GPU has, or, on
Hopper, writes registers that a product in flight may still read (`sass.overwritten`; triton issue 9433).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sass

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
TARGETS = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")


@dataclass(frozen=True)
class Compiled:
    """The result for one kernel. wide: 16-byte loads from global memory; converts: integer-to-float conversions of
    single values; overwritten: writes to registers of a product in flight; seconds: that compiling took.
    """

    kernel: str
    name: str
    target: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    wide: int = 0
    narrow: int = 0
    converts: int = 0
    instructions: int = 0
    overwritten: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.error:
            return self.error
        if self.shared > limit(self.target):
            return f"{self.shared} bytes of shared memory, of {limit(self.target)}"
        if self.overwritten:
            return f"{self.overwritten} instructions write registers of a product in flight"
        return f"{self.spilled} spilled" if self.spilled else ""


@functools.cache
def limit(target: str) -> int:
    """The shared memory of the GPU that kernels for a target are chosen for, in bytes per program."""
    from llmq_kernels.triton.gpu import KNOWN

    return min(gpu.shared for gpu in KNOWN if gpu.target == target)


@functools.cache
def variants() -> list[Any]:
    """All launches, in the same order in every process."""
    from llmq_kernels.triton.variants import variants as found

    return list(found())


def jobs(targets: tuple[str, ...], match: str, sample: bool, half: bool = False) -> Iterator[int]:
    """Indices of variants. A sample is the largest of each kernel, bits, group and target; a half is of each
    configuration of the integer kernels two of the four pairs of dtype and zero points, each about equally often.
    """
    kept: dict[tuple[str, str], tuple[int, int]] = {}
    for number, variant in enumerate(variants()):
        if variant.target not in targets or not re.search(match, variant.name):
            continue
        if half and re.match(r"(one|few|many)_rows?", variant.name):
            kind = " zero" in variant.name, " fp16" in variant.name
            # Of its own name alone, so that neither filters nor other configurations change what is compiled of it.
            turn = zlib.crc32((re.sub(r" (bf16|fp16|zero)", "", variant.name) + variant.target).encode()) % 2
            if (kind[0] != kind[1]) != bool(turn):
                continue
        if not sample:
            yield number
            continue
        constexprs = variant.launch.constexprs
        first = variant.name.partition(" ")[0]
        kind = f"{first} {kernel_name(variant)} {constexprs.get('BITS')} {constexprs.get('GROUP')}"
        size = constexprs.get("BLOCK_M", 1) * constexprs.get("BLOCK_N", 1)
        best = kept.get((kind, variant.target))
        if best is None or size > best[0]:
            kept[kind, variant.target] = size, number
    yield from (number for _, number in kept.values())


def kernel_name(variant: Any) -> str:
    """The name of the kernel's function."""
    return str(variant.launch.kernel.__name__).removesuffix("_kernel")


def compile_one(number: int) -> Compiled:
    """Compile a variant and read the resources that it uses."""
    return compiled(variants()[number])


def compiled(variant: Any) -> Compiled:
    """The same for a variant that is not in the list."""
    from llmq_kernels.triton.compile import compile_launch

    kernel, name, target = kernel_name(variant), variant.name, variant.target
    began = time.perf_counter()
    try:
        made = compile_launch(variant.launch, variant.target)
        if "@llvm.trap()" in made.asm["llir"]:  # the result if a kernel needs more tensor memory than there is
            raise ValueError("compiled to a trap")
        seconds = round(time.perf_counter() - began, 2)
        found = nvidia(made.asm["cubin"]) if target.startswith("cuda:") else amd(made.asm["amdgcn"])
        return Compiled(kernel, name, target, shared=made.metadata.shared, seconds=seconds, **found)
    except Exception as error:  # noqa: BLE001  (a compiler may raise anything; it is reported as a failure)
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return Compiled(kernel, name, target, error=lines[-1].strip()[:200])


def nvidia(cubin: bytes) -> dict[str, int]:
    """Registers, stack and instructions of a cubin. Raises OSError if triton was installed without cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # In one run, which costs its start more than anything else.
        command = [tool, "-res-usage", "-sass", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise OSError(f"cuobjdump's output has no register counts: {told[:100]}")
    code = sass.instructions(told)
    opcodes = [one.opcode for one in code]
    loads = [code for code in opcodes if code.startswith(("LDG", "LDGSTS")) and code != "LDGDEPBAR"]
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + sum(code.startswith(("STL", "LDL")) for code in opcodes),
        "wide": sum(".128" in code for code in loads),
        "narrow": sum(".128" not in code for code in loads),
        "converts": sum(code.startswith("I2F") for code in opcodes),
        "instructions": len(opcodes),
        "overwritten": len(sass.overwritten(code)),
    }


def amd(assembly: str) -> dict[str, int]:
    """The same for AMD's assembly."""
    said = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    loads = re.findall(r"^\s+((?:global|buffer)_load_\w+)", assembly, re.MULTILINE)
    return {
        "registers": said.get("vgpr_count", 0),
        "spilled": said.get("vgpr_spill_count", 0) + said.get("sgpr_spill_count", 0),
        "wide": sum(code.endswith("dwordx4") for code in loads),
        "narrow": sum(not code.endswith("dwordx4") for code in loads),
        "converts": len(re.findall(r"^\s+v_cvt_f32_[iu]", assembly, re.MULTILINE)),
        "instructions": len(re.findall(r"^\t[sv]_\w+|^\tglobal_|^\tbuffer_|^\tds_", assembly, re.MULTILINE)),
    }


def kept(file: Path | None) -> list[Compiled]:
    """The results of an earlier run in a file of JSON lines."""
    if file is None or not file.is_file():
        return []
    return [Compiled(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def table(rows: list[Compiled]) -> str:
    """The worst values of each kernel and target, one line each."""
    titles = (
        f"{'variants':>8} {'registers':>9} {'spilled':>7} {'fault':>5} {'shared':>7} {'16-byte loads':>13} {'I2F':>4}"
    )
    head = f"{'kernel':14} {'target':11} {titles}"
    lines = [head, "-" * len(head)]
    for kernel, target in sorted({(row.kernel, row.target) for row in rows}):
        some = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
        good = [row for row in some if not row.error]
        loads, wide = sum(row.wide + row.narrow for row in good), sum(row.wide for row in good)
        lines.append(
            f"{kernel:14} {target:11} {len(some):8} {max((r.registers for r in good), default=0):9} "
            f"{sum(r.spilled > 0 for r in good):7} {sum(bool(r.fault) for r in some):5} "
            f"{max((r.shared for r in good), default=0):7} "
            f"{f'{wide} of {loads}':>13} {sum(r.converts for r in good):4}"
        )
    return "\n".join(lines)


def main() -> int:
    """Compile the selected variants; returns 1 if any spills or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--match", default="", help="only variants whose name this regular expression finds")
    parser.add_argument("--half", action="store_true", help="of each configuration, every second kind of weight")
    parser.add_argument("--sample", action="store_true", help="the largest of each kernel, bit width, group and target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="a file of JSON lines: variants in it are not compiled again")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no compilation after this time")
    parser.add_argument("--verbose", action="store_true", help="print a line for each variant")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: there is nothing to compile; unset it")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    todo = list(jobs(tuple(arguments.targets), arguments.match, arguments.sample, arguments.half))
    # In random order, so that a run with a time limit covers a representative sample.
    random.Random(0).shuffle(todo)
    wanted = {(variants()[number].name, variants()[number].target): number for number in todo}
    rows = [row for row in kept(arguments.keep) if (row.name, row.target) in wanted]
    reachable = len(wanted)
    for row in rows:
        wanted.pop((row.name, row.target), None)
    todo = list(wanted.values())
    end = time.monotonic() + 60 * arguments.minutes
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for row in pool.imap_unordered(compile_one, itertools.takewhile(lambda _: time.monotonic() < end, todo)):
            rows.append(row)
            if arguments.keep is not None:
                with arguments.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            if row.fault or arguments.verbose:
                print(f"{row.target} {row.name}: {row.fault or f'{row.registers} registers, {row.shared} shared'}")
                sys.stdout.flush()
            if time.monotonic() > end:
                break
    bad = sum(bool(row.fault) for row in rows)
    print(table(rows))
    print(f"{len(rows)} compiled of {reachable}, {bad} at fault; {sum(row.seconds for row in rows):.0f} s of compiling")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
