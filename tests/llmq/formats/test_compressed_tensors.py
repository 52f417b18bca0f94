"""compressed-tensors as a format: each scheme to the file that stores it, and who reads a folder."""

from __future__ import annotations

import pytest
import torch

from llmq.formats import compressed_tensors as ct
from llmq.formats.compressed_tensors import eight_bit, microscaled, packed
from llmq.grids.scheme import Activations, Scheme

PACKED = [Scheme(4, 32), Scheme(3, 32, False), Scheme(8, None)]
EIGHT = [Scheme(8, None, activations=Activations()), Scheme(8, None, grid="fp8")]


SMALL = [Scheme(4, 16, grid="nvfp4"), Scheme(6, 32, grid="mxfp6")]


@pytest.mark.parametrize(("schemes", "layout"), [(PACKED, packed), (EIGHT, eight_bit), (SMALL, microscaled)])
def test_each_scheme_is_stored_by_its_layout(schemes: list[Scheme], layout: ct._Layout) -> None:
    for scheme in schemes:
        assert ct.spec((32, 64), scheme, torch.float16) == layout.spec((32, 64), scheme, torch.float16)
        for parts in (2, 3, 4):
            for rows in (False, True):
                assert ct.splits((32, 64), scheme, parts, rows) == layout.splits((32, 64), scheme, parts, rows)


def test_experts_in_microscaling_floats_are_refused() -> None:
    for scheme in SMALL:
        assert "experts as " in str(ct.refuse_experts(scheme))
        assert "use --grid int" in str(ct.refuse_stacks(scheme))


def test_the_title_names_each_layout_once() -> None:
    assert ct.title(PACKED) == "compressed-tensors pack-quantized"
    assert ct.title([*PACKED, *EIGHT]) == "compressed-tensors float-quantized, int-quantized, pack-quantized"


@pytest.mark.parametrize(
    ("schemes", "code", "words"),
    [
        ([Scheme(4, 32), Scheme(8, None)], "transformers", "on a GPU or CPU"),
        ([Scheme(4, 32, False)], "transformers", "unpacks its asymmetric weights while loading"),
        ([Scheme(4, 16, grid="nvfp4"), Scheme(8, None)], "transformers", "in bfloat16 only"),
        ([Scheme(4, 32, False), Scheme(8, None)], None, "fails on asymmetric weights if the folder has several"),
    ],
)
def test_what_stock_transformers_does(schemes: list[Scheme], code: str | None, words: str) -> None:
    (stock,) = ct.loaders(schemes)
    assert stock.code == code and stock.warn is (code is None) and words in stock.sentence
