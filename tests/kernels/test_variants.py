"""What scripts/compile_kernels.py compiles: launches that fit their kernels, one for each that the rule reaches."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import llmq_kernels as package
from llmq_kernels.int_linear import planes
from llmq_kernels.int_linear import triton as integers
from llmq_kernels.triton import tables
from llmq_kernels.triton.config import Config
from llmq_kernels.triton.gpu import KNOWN
from llmq_kernels.triton.launch import Launch
from llmq_kernels.triton.rule import routed_rule, rule
from llmq_kernels.triton.unpack import slices, words
from llmq_kernels.triton.variants import SHAPES, Variant, routed, variants
from llmq_kernels.weights import PackedInt


@functools.cache
def every() -> tuple[Variant, ...]:
    """All variants, made once."""
    return tuple(variants())


def parameters(kernel: Any) -> list[str]:
    return list(inspect.signature(kernel.fn).parameters)


def test_every_argument_of_every_kernel_is_given_once() -> None:
    seen = set()
    for variant in every():
        made = variant.launch
        names = parameters(made.kernel)
        assert set(names[len(made.arguments) :]) == set(made.constexprs), variant.name
        assert all(name == name.upper() for name in made.constexprs)
        backend = variant.target.partition(":")[0]
        assert made.constexprs.get("BACKEND", backend) == backend
        assert all(size > 0 for size in made.grid) and made.options["num_warps"] in (1, 2, 4, 8)
        assert (variant.name, variant.target) not in seen
        seen.add((variant.name, variant.target))
    assert {target for _, target in seen} == {gpu.target for gpu in KNOWN}


def machine_code(config: Config, bits: int, group_size: int, k: int) -> tuple[Any, ...]:
    """What the machine code of a product depends on, in bfloat16 and without zero points."""
    n, meta = 64, torch.device("meta")
    packed = torch.empty(n, -(-k // planes.TILE[bits]) * planes.WORDS[bits], dtype=torch.int16, device=meta)
    scale = torch.empty(-(-k // group_size), n, dtype=torch.bfloat16, device=meta)
    x = torch.empty(1, k, dtype=torch.bfloat16, device=meta)
    weight = PackedInt(packed, scale, None, bits, n, k, group_size)
    return code_of(integers.build(config, 1, x, weight, None, x, "cuda"))


def code_of(made: Launch) -> tuple[Any, ...]:
    constexprs = made.constexprs | {"PROGRAMS_K": min(2, made.constexprs.get("PROGRAMS_K", 1)), "BACKEND": "cuda"}
    return made.kernel.fn.__name__, tuple(sorted(constexprs.items())), tuple(sorted(made.options.items()))


@pytest.mark.parametrize("gpu", [gpu for gpu in KNOWN if gpu.backend == "cuda"], ids=lambda gpu: gpu.name)
def test_what_the_rule_chooses_is_compiled(gpu: Any) -> None:
    compiled = {code_of(one.launch) for one in every() if one.target == gpu.target}
    for bits in planes.TILE:
        for n, k in SHAPES:
            for m in (*tables.BUCKETS, 3, 100):
                config = rule(gpu, bits, m, n, k, 128)
                assert config.family == "dense" or machine_code(config, bits, 128, k) in compiled, (bits, n, k, m)


@pytest.mark.parametrize("gpu", [gpu for gpu in KNOWN if gpu.backend == "cuda"], ids=lambda gpu: gpu.name)
def test_what_the_rule_chooses_for_experts_is_compiled(gpu: Any) -> None:
    found = [one for one in every() if one.target == gpu.target and one.name.startswith("experts")]
    compiled, shapes = {code_of(one.launch) for one in found}, ((2816, 2048), (7168, 4096))
    for bits, experts, (n, k), m in itertools.product(planes.TILE, (8, 60), shapes, (6, 40, 3000)):
        for pairs in (True, False):
            config = routed_rule(gpu, bits, m, experts, n, k, 128, False, pairs)
            if config.family != "dense":
                made = routed(config, bits, m, experts, n, k, 128, pairs, True, torch.bfloat16, gpu.backend)
                assert code_of(made) in compiled, (bits, experts, n, k, m, pairs)


def test_what_waits_in_registers_has_bounds() -> None:
    """AMD's inputs of many dots are not loaded ahead; experts on data-center Blackwell may use all registers."""
    loaded_ahead, large = set(), 0
    for variant in every():
        constants, options = variant.launch.constexprs, variant.launch.options
        if variant.launch.kernel.fn.__name__ != "many_rows_kernel":
            continue
        dots = planes.TILE[constants["BITS"]] // 32 // constants["DOT"]
        if variant.target.startswith("hip") and options["num_stages"] > 1:
            loaded_ahead.add(dots)
        elif variant.target == "cuda:100" and variant.name.startswith("experts") and "128x64" in variant.name:
            assert options.get("maxnreg") == 255, variant.name
            large += 1
    assert max(loaded_ahead) == 8 and large


@pytest.mark.parametrize("bits", planes.TILE)
def test_kernels_and_layout_agree_on_tiles(bits: int) -> None:
    assert slices.fn(bits) * 32 == planes.TILE[bits]
    assert words.fn(bits) == planes.WORDS[bits]


def test_a_launch_gives_the_kernel_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher adds nothing to a Launch and leaves nothing out."""
    from llmq_kernels.triton import launch as launching

    calls = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: calls.append((grid, arguments, options))

    one = Launch(Kernel(), (3, 2), (1, None), {"BITS": 4}, {"num_warps": 2})
    launching.launch(torch.device("cpu"), one, one._replace(grid=(1,)))
    assert calls == [((grid), (1, None), {"BITS": 4, "num_warps": 2}) for grid in ((3, 2), (1,))]


def test_no_kernel_is_forgotten() -> None:
    """Every function of the package that is named as a kernel is among the variants, so that it is compiled."""
    named = set()
    for file in Path(package.__path__[0]).rglob("*.py"):
        found = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
        jitted = [node.name for node in found if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)]
        named |= {name for name in jitted if name.endswith("_kernel")}
    assert named == {one.launch.kernel.fn.__name__ for one in every()}
