"""The kernels compile for GPUs that are not here, none keeps anything in memory of its own, and loads are wide.

In a process of its own: triton imported with TRITON_INTERPRET set compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow(25)
def test_a_sample_of_every_kernel(tmp_path: Path) -> None:
    """Those of 4 bits on four targets; scripts/compile_kernels.py itself does all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    script, found = ROOT / "scripts" / "compile_kernels.py", tmp_path / "found.jsonl"
    match = r"^[dfmo]\w+ 4 bits group 128 (bf16 )?zero|^codebook (few|many)_rows bf16|^int8 product"
    match += r"|^experts (blocks|(few_rows|many_rows) 4 bits group 128 bf16 zero (64x8 pdl True .*pairs True|128x128))"
    targets = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
    command = [sys.executable, str(script), "--sample", "--match", match, "--keep", str(found), "--targets", *targets]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert {row["target"] for row in rows} == set(targets)
    for row in rows:
        if row["target"].startswith("cuda:") and row["name"].partition(" ")[0] in ("one_row", "few_rows", "many_rows"):
            # What is narrower are scales and zero points, and the bias.
            assert row["wide"] > row["narrow"], row
            assert row["converts"] <= 8, row  # of zero points, none of codes


def test_half_is_the_same_half_under_every_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what an earlier run kept is of use to the next, whatever the rule chooses elsewhere by then."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compile_kernels

    found = compile_kernels.variants()
    every = {found[one].name for one in compile_kernels.jobs(("cuda:90",), "", sample=False, half=True)}
    match = "many_rows 4 bits"
    some = {found[one].name for one in compile_kernels.jobs(("cuda:90",), match, sample=False, half=True)}
    assert some and some == {name for name in every if match in name}
    assert len({(" zero" in name, " fp16" in name) for name in some}) == 4


def test_writes_to_registers_of_products_in_flight_are_found() -> None:
    """In what triton 3.6 made of the kernel in carried.py; not where each tile's products are waited for."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import sass

    code = sass.instructions((Path(__file__).parent / "carried_triton_3.6.sass").read_text())
    assert sum(one.product for one in code) == 8 and len(sass.overwritten(code)) == 77
    waited = [replace(one, operands=("gsb0", "0x0")) if "DEPBAR" in one.opcode else one for one in code]
    assert sass.overwritten(waited) == []


def test_results_of_products_in_flight_are_not_touched() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import sass

    lines = [
        "/*0000*/ HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT ;",
        "/*0010*/ HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8, gsb0 ;",
        "/*0020*/ IMAD.WIDE R2, R20, 0x2, R16 ;",
        "/*0030*/ @P0 FADD R21, R15, R16 ;",
        "/*0040*/ LDS.128 R4, [R22] ;",
        "/*0050*/ STG.E.128 [R22], R12 ;",
        "/*0058*/ UIADD3 UR8, UR8, 0x1, URZ ;",
        "/*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
        "/*0070*/ FADD R8, R9, R4 ;",
    ]
    found = sass.overwritten(sass.instructions("\n".join(lines)))
    assert [line.split(":")[0] for line in found] == ["0x30", "0x40", "0x50"]
