"""Stored names and the model's: what `link` says fills a parameter is what stock transformers loads into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmq.discovery import blocks as discover
from llmq.discovery.conversion import Part, Slice
from llmq.discovery.names import Links, link
from tests.architectures import tiny


def linked(folder: Path) -> tuple[Links, dict[str, torch.Tensor], Any]:
    """The links of a folder, its stored tensors, and the model that stock transformers makes of them."""
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return link(discover.build(folder, torch.float32), {n: t.shape for n, t in stored.items()}), stored, model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_every_parameter_is_filled_by_the_tensor_it_is_linked_to(name: str, tmp_path: Path) -> None:
    links, stored, model = linked(tiny.make(name, tmp_path))
    assert links.names() == [*links.source]
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        assert torch.equal(model.get_parameter(parameter), stored[links.source[parameter]]), parameter


def test_a_checkpoint_of_the_bare_model_lacks_a_prefix(tmp_path: Path) -> None:
    """As the first checkpoints of some types were written, with a tensor that the model does not know beside it."""
    folder = tiny.make("gpt2", tmp_path)
    stored = {
        name.removeprefix("transformer."): value.clone()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(stored | {"wholly.unknown": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    links, stored, model = linked(folder)
    assert links.source["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert links.unused == ["wholly.unknown"]
    for parameter, value in model.named_parameters():
        assert torch.equal(value, stored[links.source[parameter]])


def test_tied_parameters_have_the_tensor_that_is_stored_once(tmp_path: Path) -> None:
    links, stored, model = linked(tiny.make("gpt2", tmp_path))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert links.source["lm_head.weight"] == links.source["transformer.wte.weight"]
    assert "lm_head.weight" not in stored


def test_what_transformers_puts_together_is_no_stored_tensor(tmp_path: Path) -> None:
    links, stored, model = linked(tiny.make("mixtral", tmp_path))
    fused = [name for name, _ in model.named_parameters() if "experts" in name]
    assert fused and set(fused) == set(links.slices) and not set(fused) & set(links.source)
    for name in fused:
        why = links.why_apart(name)
        assert why and "transformers converts" in why and any(tensor in why for tensor in stored)


def test_a_parameter_without_a_tensor_has_none() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Linear(2, 2, bias=False),
                nn.Linear(2, 2, bias=False),
                nn.Linear(2, 2, bias=False),
            )
            self.b.weight = self.a.weight
            self.register_buffer("table", torch.ones(1))

    links = link(Pair(), {"b.weight": (2, 2), "table": (2,), "d.weight": (2, 2)})
    assert links.source == {"a.weight": "b.weight", "b.weight": "b.weight", "table": "table"}
    assert (links.failed, links.unused) == ({}, ["d.weight"])


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16])
def test_a_stack_of_tensors_of_several_dtypes_has_every_value_of_them(first: torch.dtype, tmp_path: Path) -> None:
    links, stored, model = linked(tiny.make("qwen3_moe", tmp_path))
    name, pieces = next(iter(links.slices.items()))
    others = {torch.bfloat16: torch.float16, torch.float16: torch.float32}
    mixed = {p.tensor: stored[p.tensor].to(others[first] if i % 3 else first) for i, p in enumerate(pieces)}
    filled = links.fill(name, model.get_parameter(name).shape, mixed.__getitem__)
    assert filled.dtype is torch.float32
    assert all(torch.equal(p.part.of(filled), mixed[p.tensor].float()) for p in pieces)
    halves = {n: t.half() for n, t in mixed.items()}
    assert links.fill(name, model.get_parameter(name).shape, halves.__getitem__).dtype is torch.float16


def test_an_entry_of_a_stack_is_that_of_the_whole() -> None:
    """Of matrices one by one; of a stack with its axes swapped; of two stacks, one above the other in every entry."""
    stored = {n: torch.randn(shape) for n, shape in {"a": (2, 3), "b": (2, 3), "s": (2, 3, 2), "t": (2, 1, 3)}.items()}
    links = Links(
        slices={
            "apart": (Slice("a", Part(0, (2, 3), (3, 1))), Slice("b", Part(6, (2, 3), (3, 1)))),
            "swapped": (Slice("s", Part(0, (2, 3, 2), (6, 1, 3))),),
            "joined": (Slice("t", Part(0, (2, 1, 3), (6, 3, 1))), Slice("u", Part(3, (2, 1, 3), (6, 3, 1)))),
        }
    )
    stored["u"] = torch.randn(2, 1, 3)
    read: list[str] = []

    def entry(name: str, index: int) -> torch.Tensor:
        read.append(name)
        return stored[name][index]

    for name in links.slices:
        whole = links.fill(name, (2, 2, 3), stored.__getitem__)
        for index in range(2):
            assert torch.equal(links.fill_entry(name, (2, 2, 3), index, stored.__getitem__), whole[index])
            assert torch.equal(links.fill_entry(name, (2, 2, 3), index, stored.__getitem__, entry), whole[index])
    assert torch.equal(links.fill("swapped", (2, 2, 3), stored.__getitem__), stored["s"].transpose(1, 2))
    assert read == ["s", "s", "t", "u", "t", "u"]  # never a whole stack for one entry
