"""The formats as one: which holds a scheme, what is refused together, which method a folder says it has."""

from __future__ import annotations

import pytest
import torch

from llmq import formats
from llmq.formats import bitsandbytes, compressed_tensors
from llmq.formats.awq import AWQReader
from llmq.formats.gptq import GPTQReader
from llmq.grids.scheme import Activations, Scheme

NF4, DOUBLE = Scheme(4, 64, grid="nf4"), Scheme(4, 64, grid="nf4", double_quant=True)
INT = [Scheme(4, 128), Scheme(8, None), Scheme(8, None, grid="fp8"), Scheme(8, None, activations=Activations())]


def test_the_grid_names_its_format() -> None:
    assert formats.of(NF4) is bitsandbytes
    assert all(formats.of(scheme) is compressed_tensors for scheme in INT)


def test_formats_that_read_are_found_in_their_folder() -> None:
    names = {module.__name__.rpartition(".")[2] for module in formats.having("READERS")}
    assert names == {"aqlm", "awq", "bitsandbytes", "codebook", "compressed_tensors", "gptq"}
    readers = formats.readers()
    assert set(readers["auto-round"]) == {GPTQReader, AWQReader} and readers["awq"] == (AWQReader,)
    assert formats.packages()["compressed-tensors"] == "compressed_tensors"


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "own"}, "own"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 4}, None),
        ({}, None),
    ],
)
def test_what_a_folder_says_it_was_quantized_with(section: dict[str, object], method: str | None) -> None:
    assert formats.method_of(section) == method


def test_schemes_that_one_folder_holds() -> None:
    for schemes in ([], [NF4], INT, INT[:1]):
        assert formats.refusal(schemes) is None


@pytest.mark.parametrize("schemes", [[NF4, DOUBLE], [NF4, INT[0]], [INT[0], DOUBLE]])
def test_schemes_that_one_folder_does_not_hold(schemes: list[Scheme]) -> None:
    words = formats.refusal(schemes) or ""
    assert (
        "has one scheme for all of them" in words
        and "--keep" in words
        and all(str(scheme) in words for scheme in schemes)
    )


def test_what_is_asked_of_a_folder_goes_to_its_format() -> None:
    assert formats.name([NF4]).startswith("bitsandbytes") and formats.name(INT).startswith("compressed-tensors")
    assert formats.name([]) == compressed_tensors.title([])
    assert formats.config({NF4: ["a"]}, [], torch.float16)["bnb_4bit_compute_dtype"] == "float16"
    assert formats.config({INT[0]: ["a"]}, ["b"], torch.float16)["ignore"] == ["b"]
    assert formats.loaders([NF4]) == [*bitsandbytes.loaders([NF4]), formats.vllm.loader([NF4])]
    assert formats.loaders([NF4], apart=True)[-1] == formats.vllm.APART


def test_what_not_every_format_has_is_asked_of_those_that_have_it() -> None:
    section = formats.config({INT[0]: ["a", "head"]}, [], torch.float16)
    assert formats.with_targets(section, [INT[0]], ["head"])["config_groups"]["group_0"]["targets"] == [
        "Linear",
        "head",
    ]
    assert formats.loads_dense({INT[0]}) and formats.dense(section, {INT[0]})["dequantize"]
    skipping = formats.config({NF4: ["a", "head"]}, ["b"], torch.float16)
    assert formats.with_targets(skipping, [NF4], ["head"]) == skipping
    assert not formats.loads_dense({NF4}) and formats.replaces_modules({NF4}) and not formats.replaces_modules(INT)
