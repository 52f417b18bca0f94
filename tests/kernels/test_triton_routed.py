"""Products with stacked experts by the Triton kernels, in Triton's interpreter or on a GPU, against the twin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.codebook_linear.reference import codebook_linear
from llmq_kernels.grouped_int_linear import reference
from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear import layouts, planes
from llmq_kernels.int_linear import triton as integers
from llmq_kernels.triton import gpu, routes, rule, tables
from llmq_kernels.triton.config import Config
from llmq_kernels.triton.launch import launch
from llmq_kernels.weights import PackedInt
from tests.kernels.test_triton_int import DEVICE, FEW_ROWS, MANY_ROWS, ONE_ROW, PRESCALED
from tests.kernels.weights import plain

FEW, SCALED, SMALL = replace(FEW_ROWS, programs_k=1), replace(PRESCALED, programs_k=1), replace(MANY_ROWS, block_m=16)


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    planes.forget()
    yield
    planes.forget()


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(tables, "routed_rule", lambda *_: config)
    planes.forget()


def test_a_slice_of_a_wider_choice() -> None:
    """Kernels read what they are given as it lies in memory: the operator hands them whole tensors."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    made = [plain(32, 64, 4, 64, seed=e) for e in range(8)]
    packed = [layouts.pack("planes", w.words, w.scale, w.zero, 4, 64, 64, x.dtype) for w in made]
    codes, scale = (torch.stack([one[i] for one in packed]).to(DEVICE) for i in (0, 1))
    top = torch.tensor([[3, 1, 7, 0], [5, 2, 6, 4]], device=DEVICE)[:, :2]
    rest = (4, 32, 64, 64, "planes")
    found = torch.ops.llmq.grouped_int_linear(x, codes, scale, None, None, None, top, *rest)
    whole = torch.ops.llmq.grouped_int_linear(x, codes, scale, None, None, None, top.contiguous(), *rest)
    assert torch.equal(found, whole)
    exact = torch.stack([made[e].dense @ x[i].double().cpu() for i, e in ((0, 3), (0, 1), (1, 5), (1, 2))])
    torch.testing.assert_close(found.double().cpu(), exact, rtol=2e-2, atol=2e-2)


def ends(*counts: int) -> Routing:
    """Sorted rows, so many of each expert."""
    return Routing(torch.tensor(counts).cumsum(0).to(torch.int32))


@pytest.mark.parametrize("routing", [ends(3, 0, 9), Routing(chosen=torch.tensor([[2, 0], [1, 7], [2, 1]]))])
@pytest.mark.parametrize("workspace", [1 << 28, 3 * 64 * 2 * 8])
def test_gradients_do_not_wait_for_the_routing(
    routing: Routing, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all experts at once, some outputs at a time; a row of no expert has none."""
    monkeypatch.setattr(planes, "WORKSPACE", workspace)
    monkeypatch.setattr(planes.by_expert, "rows_of", None)
    made = [plain(40, 64, 4, 32, symmetric=False, seed=e) for e in range(3)]
    packed = [layouts.pack("planes", w.words, w.scale, w.zero, 4, 64, 32, torch.bfloat16) for w in made]
    stacked = [torch.stack([one[i] for one in packed]).to(DEVICE) for i in range(3)]
    offs, chosen = (None if part is None else part.to(DEVICE) for part in (routing.offs, routing.chosen))
    count = 14 if chosen is None else chosen.numel()
    grad = torch.randn(count, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    rest = (4, 40, 64, 32, "planes")
    found = torch.ops.llmq.grouped_int_linear_grad(grad.to(DEVICE), *stacked, offs, chosen, *rest)
    wanted = torch.zeros(count // routing.choices, 64, dtype=torch.float64)
    for row in range(count):
        expert = reference.expert_of(routing, row)
        if 0 <= expert < 3:
            wanted[row // routing.choices] += grad[row].double() @ made[expert].dense
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    assert found[-1].any() == (chosen is not None)


def check(
    routing: Routing,
    rows: int,
    *,
    experts: int,
    out: int = 19,
    width: int = 200,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The operator with rows of x, as routed, is the twin, as far as roundings of weight and result allow."""
    generator = torch.Generator().manual_seed(rows)
    plains = [plain(out, width, bits, group, symmetric=symmetric, dtype=dtype, seed=e % 3) for e in range(experts)]
    forms = [layouts.pack("planes", w.words, w.scale, w.zero, bits, width, group, dtype) for w in plains]
    packed, scales, zeros = zip(*forms, strict=True)
    zero = None if symmetric else torch.stack([w.zero for w in plains if w.zero is not None])
    bias = torch.randn(experts, out, generator=generator) if rows % 2 else None
    x = torch.randn(rows, width, generator=generator).to(dtype)
    words, scale = torch.stack([w.words for w in plains]), torch.stack([w.scale for w in plains])
    twin = reference.grouped_int_linear(x, words, scale, zero, bias, routing, bits, group)
    stacked = [None if t[0] is None else torch.stack(t).to(DEVICE) for t in (packed, scales, zeros)]
    where = [None if t is None else t.to(DEVICE) for t in (bias, routing.offs, routing.chosen)]
    y = torch.ops.llmq.grouped_int_linear(x.to(DEVICE), *stacked, *where, bits, out, width, group, "planes").cpu()
    assert y.shape == twin.shape and y.dtype == dtype
    # The weight and the result are rounded, each in both; terms add up at random.
    spread = x.double().norm(dim=1).max() * max(w.dense.square().mean().sqrt() for w in plains)
    allowed = torch.finfo(dtype).eps * (8 * spread + 4 * twin.double().abs())
    assert ((y.double() - twin.double()).abs() <= allowed).all()
    assert not y[twin.eq(0).all(1)].any(), "rows of no expert are zero"


KINDS = [(2, 128, True, torch.bfloat16), (3, 200, False, torch.float16), (4, 32, True, torch.float16)]
KINDS += [(4, 128, False, torch.bfloat16), (8, 64, False, torch.bfloat16)]


@pytest.mark.parametrize("bits, group, symmetric, dtype", KINDS)
def test_every_kind_of_weight(
    monkeypatch: pytest.MonkeyPatch, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """Ragged sizes, an expert without rows, and rows of none; pairs of experts of which there is one, or none."""
    kind = {"experts": 3, "bits": bits, "group": group, "symmetric": symmetric, "dtype": dtype}
    use(monkeypatch, FEW)
    check(ends(3, 0, 15), 21, **kind)  # type: ignore[arg-type]
    check(Routing(chosen=torch.tensor([[2, 0], [2, 3], [-1, 1]])), 3, **kind)  # type: ignore[arg-type]
    use(monkeypatch, ONE_ROW)
    check(Routing(chosen=torch.tensor([[0, 2]], dtype=torch.int32)), 1, **kind)  # type: ignore[arg-type]
    use(monkeypatch, SMALL if group >= 64 else SCALED)
    check(ends(0, 2, 17), 20, **kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 130])
def test_every_number_of_rows_of_one_expert_and_of_several(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    use(monkeypatch, FEW if rows <= 17 else MANY_ROWS)
    check(ends(0, rows, 0), rows, experts=3)
    check(ends(rows // 3, rows // 2, 0), rows, experts=3, width=256)


def test_many_experts_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 experts of which eight tokens choose two each: sorted or not, most experts have no rows."""
    chosen = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(t))[:2] for t in range(8)])
    sizes = {"experts": 256, "out": 9, "width": 64}
    use(monkeypatch, FEW)
    check(Routing(chosen=chosen), 8, **sizes)  # type: ignore[arg-type]
    counts = torch.bincount(chosen.flatten(), minlength=256).tolist()
    check(ends(*counts), 16, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [200, 202])
def test_a_dense_copy(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Slabs of few rows of all experts, and inputs that torch's grouped product does not take (202)."""
    use(monkeypatch, Config("dense"))
    check(ends(3, 0, 15), 21, experts=3, width=width)
    check(Routing(chosen=torch.tensor([[2, 0], [2, 3], [-1, 1]])), 3, experts=3, width=width)
    monkeypatch.setattr(planes, "WORKSPACE", 3 * 200 * 2 * 10)
    check(ends(3, 0, 15), 21, experts=3, width=width, symmetric=True)


def test_the_rule_itself() -> None:
    """Nothing replaced: what the rule says for the interpreter's four processors."""
    for counts in ((1, 0, 1), (20, 3, 0)):
        check(ends(*counts), sum(counts), experts=3)


@pytest.mark.parametrize("per_row", [False, True])
def test_codebooks(monkeypatch: pytest.MonkeyPatch, per_row: bool) -> None:
    """Of all rows of an expert, or of each; other ones for each expert."""
    generator = torch.Generator().manual_seed(0)
    experts, out, width, group = 3, 19, 192, 192 if per_row else 64
    codes = torch.randint(0, 16, (experts, out, width), generator=generator, dtype=torch.uint8)
    scale = torch.rand(experts, out, width // group, generator=generator) + 0.5
    entries = torch.randn(experts, out if per_row else 1, 16, generator=generator).bfloat16().float()
    made: list[PackedInt] = []
    for e in range(experts):
        parts = [(slice(0, out), codes[e].to(DEVICE))]
        made.append(codebooks.pack(parts, scale[e].to(DEVICE), entries[e].to(DEVICE), width))
    chosen = torch.tensor([[2, 0], [1, 2]])
    x = torch.randn(2, width, generator=generator).bfloat16()
    wanted = torch.stack(
        [codebook_linear(x[r // 2], codes[e], scale[e], entries[e], None) for r, e in enumerate(chosen.view(-1))]
    )
    weight = torch.stack([w.packed for w in made]), torch.stack([w.scale for w in made]), None
    table = [torch.stack([getattr(w, name) for w in made]) for name in ("codebook", "tables")]
    for config in (ONE_ROW, FEW, SMALL, Config("dense")):
        use(monkeypatch, config)
        routed = None, chosen.to(DEVICE), 4, out, width, made[0].group_size, "planes"
        y = torch.ops.llmq.grouped_int_linear(x.to(DEVICE), *weight, None, *routed, *table).cpu()
        torch.testing.assert_close(y.float(), wanted.float(), rtol=0.02, atol=0.3)


def test_the_table_of_blocks() -> None:
    """Blocks of four rows: of every expert those that it needs, then of the rows of none, then of nothing."""
    offs, rows = torch.tensor([0, 5, 5, 9], dtype=torch.int32, device=DEVICE), 11
    most = routes.most(rows, 4, 4)
    assert most == (11 + 5 * 3) // 4
    table = torch.full((routes.ENTRIES, 3), 99, dtype=torch.int32, device=DEVICE)
    launch(DEVICE, routes.build(offs, table, rows, 4, False, gpu.gpu_of(DEVICE).backend))
    assert table[:5].tolist() == [[1, 0, 5], [1, 4, 5], [3, 5, 9], [4, 9, 11], [0, 0, 0]]
    assert not table[4:].any()


def test_there_are_always_enough_blocks() -> None:
    """The worst that routing can do is a single row in the last block of every expert, and of none."""
    for experts, block_m, blocks in ((1, 16, 3), (3, 16, 2), (7, 8, 1)):
        rows = (experts + 1) * (1 + (blocks - 1) * block_m)
        assert routes.most(rows, experts, block_m) >= (experts + 1) * blocks
    assert routes.most(1, 256, 16) == 1 and routes.most(4, 256, 16) == 4


@pytest.mark.parametrize("processors", [4, 132])
def test_the_rule_for_experts(processors: int) -> None:
    found = replace(gpu.KNOWN[2], processors=processors)

    def choose(m: int, pairs: bool = False, experts: int = 128) -> Config:
        return rule.routed_rule(found, 4, m, experts, 1536, 2048, 128, False, pairs)

    assert choose(8, True).family == "few_rows" and choose(8, True).block_m == 8
    assert choose(256).family == "few_rows" and choose(256).block_m == 8  # two rows each: room for four
    assert choose(128 * 32).family == "many_rows" and choose(128 * 32).block_m == 64
    assert choose(128 * 2048).family == "dense"
    for m in (2, 64, 1024, 4096):
        assert choose(m).programs_k == 1


def test_a_configuration_that_does_not_fit_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def refuse(*_: Tensor) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    use(monkeypatch, FEW)
    monkeypatch.setattr(integers.Product, "_routed", refuse)
    for _ in range(2):
        check(ends(1, 0, 2), 3, experts=3)
