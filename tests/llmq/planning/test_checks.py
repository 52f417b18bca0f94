"""What a plan refuses: every offending weight by name, and the ways out; what it only warns of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmq import methods, ranks
from llmq.checkpoint.source import FolderSource, shapes
from llmq.discovery import blocks as discover
from llmq.discovery.names import link
from llmq.discovery.reasons import Kind, Reason
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.methods.rtn import RTN
from llmq.planning.checks import check_patterns, check_ranks, check_sources, check_vectors, check_weights, warnings
from llmq.planning.weights import BY_USER, WeightPlan
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.planning.made import item, make
from tests.llmq.refusal import refused

FOUR, EIGHT = Scheme(4, 32), Scheme(8, 32)
UNUSED = Reason(Kind.UNUSED, "in no matrix product")


def test_ragged_is_refused_by_name(ragged_model: Path) -> None:
    with pytest.raises(LlmqError, match=r"down_proj \[64, 172\] .* in blocks 0–2.*--ragged smaller"):
        make(ragged_model)


def test_tensor_parallel(tiny_model: Path) -> None:
    assert make(tiny_model, tp=2)
    refused_text = str(pytest.raises(LlmqError, make, tiny_model, tp=4, group=64).value)
    assert "o_proj" in refused_text and "--tp 4" in refused_text
    assert "q_proj" not in refused_text  # its output is split, not its input


def test_a_method_says_which_schemes_are_not_for_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: make(tiny_model, methods=("nf4",)), "'nf4'", "it rounds to the grid 'nf4', not to 4-bit g32")
    monkeypatch.setattr(RTN, "refusal", lambda self, scheme: f"it never liked {scheme}" if scheme.bits == 3 else None)
    assert make(tiny_model, methods=("rtn",))
    refused(lambda: make(tiny_model, 3, methods=("rtn",)), "method 'rtn': it never liked 3-bit g32", "another scheme")


def check(items: list[WeightPlan], tp: int = 1) -> None:
    check_weights(items, Recipe(methods=("rtn",), scheme=FOUR), RTN(), tp)


def test_nothing_left_says_why_once_for_each_reason_inside_the_blocks() -> None:
    items = [item("a", reason=BY_USER), item("b", reason=UNUSED), item("c", reason=UNUSED)]
    outside = item("head", reason=Reason(Kind.OUTSIDE, "outside"), block=None)
    said = refused(lambda: check([*items, outside]), "there is nothing to quantize")
    assert said.endswith(": in no matrix product; kept by --keep")
    check([*items, item("d", scheme=FOUR)])


def test_schemes_that_no_folder_holds_together() -> None:
    items = [item("a", scheme=FOUR), item("b", scheme=Scheme(4, 64, grid="nf4"))]
    refused(lambda: check(items), "nf4 g64", "4-bit g32")


def test_what_treats_weights_one_by_one_is_refused_beside_vectors() -> None:
    items = [item("a", scheme=Scheme(2, 8, grid="vq"))]
    check_vectors(items, methods.make(Recipe(methods=("vq",))))
    check_vectors([item("a", scheme=FOUR)], methods.make(Recipe(methods=("awq", "gptq"))))
    for names in (("awq", "vq"), ("vq", "signround"), ("vq", "distill")):
        told = refused(lambda names=names: check_vectors(items, methods.make(Recipe(methods=names))))
        assert "2-bit vq g8 rounds several together" in told
    tuned = methods.make(Recipe(methods=("vq", "codebooks")))
    check_vectors(items, tuned)
    assert "rounds them one by one" in refused(lambda: check_vectors([item("a", scheme=FOUR)], tuned), "--method vq")


def test_offending_weights_are_named_once_with_all_their_blocks() -> None:
    ragged = [item(f"x.{b}.fc", (8, 40), FOUR, block=b) for b in (4, 0, 2, 1)]
    fine = [item("x.0.other", (8, 64), FOUR), item("x.9.fc", (8, 48), reason=UNUSED, block=9)]
    said = refused(lambda: check([*ragged, *fine]), "x.*.fc [8, 40] (4-bit g32 symmetric) in blocks 0–2, 4.")
    assert "--ragged smaller" in said and "other" not in said and "9" not in said
    one = Scheme(4, 64, grid="nf4")
    said = refused(lambda: check([item("x.0.fc", (8, 40), one)]), "--ragged keep")
    assert "--ragged smaller" not in said  # nf4 has one group size for all


def test_offending_experts_are_named_once_with_their_numbers() -> None:
    def expert(block: int, number: int, part: str = "down") -> WeightPlan:
        return item(f"x.{block}.experts.{number}.{part}", (8, 40), FOUR, block=block, expert=number)

    ragged = [expert(b, e) for b in (1, 2, 3) for e in range(4)] + [expert(5, e, "up") for e in (0, 5, 7, 8)]
    said = refused(lambda: check([*ragged, expert(7, 2)]), "does not divide the width of ")
    assert said.partition("width of ")[2].partition(". Ways out")[0] == (
        "x.*.experts.*.down [8, 40] (4-bit g32 symmetric) in blocks 1–3 (experts 0–3), "
        "x.*.experts.*.down [8, 40] (4-bit g32 symmetric) in blocks 7 (experts 2), "
        "x.*.experts.*.up [8, 40] (4-bit g32 symmetric) in blocks 5 (experts 0, 5, 7–8)"
    )
    # All their names are still told apart.
    other = refused(lambda: check([item("x.0.fc", (8, 40), FOUR), expert(1, 1)]), "x.*.fc [8, 40]")
    assert "in blocks 0, x.*.experts.*.down" in other


def test_a_server_must_split_groups_whole() -> None:
    rows, columns = item("a", (64, 64), FOUR), item("b", (64, 64), FOUR, row_parallel=True)
    check([rows, columns])
    check([rows, columns], tp=2)
    said = refused(lambda: check([rows, columns], tp=4), "--tp 4", "b [64, 64]", "fewer parts")
    assert "a [64, 64]" not in said


@pytest.mark.parametrize("option", ["--keep", "--override"])
def test_patterns_that_mean_nothing(option: str) -> None:
    items = [item("x.0.fc", scheme=FOUR), item("x.0.conv", reason=UNUSED), item("x.0.own", reason=BY_USER)]

    def given(pattern: str) -> None:
        told = {"keep": (pattern,)} if option == "--keep" else {"overrides": ((pattern, EIGHT),)}
        check_patterns(Recipe(scheme=FOUR, **told), items)  # type: ignore[arg-type]

    for fine in ("fc", "own", "re:fc|conv"):
        given(fine)
    refused(lambda: given("cf"), f"{option} 'cf' matches no weight", "looks like 'x.0.fc'")
    refused(lambda: given("re:("), f"{option} 're:('", "is not a regular expression")
    if option == "--override":
        refused(lambda: given("conv"), "matches only weights that are not quantized: x.0.conv (in no matrix product)")
    else:
        given("conv")


def test_a_checkpoint_that_belongs_to_another_model(tiny_model: Path) -> None:
    source, model = FolderSource(tiny_model), discover.build(tiny_model, torch.float32, False)
    links, name = link(model, shapes(source)), "model.norm.weight"
    check_sources(source, model, links)
    model.model.norm.weight = nn.Parameter(torch.empty(65, device="meta"))  # type: ignore[union-attr]
    refused(lambda: check_sources(source, model, links), f"{name} is [64] in the checkpoint but [65] by config.json")
    links.source.pop(name)
    refused(lambda: check_sources(source, model, links), f"{name} cannot be read", "it is incomplete, or of another")
    links.failed[name] = "it is turned around"
    refused(lambda: check_sources(source, model, links), f"{name} cannot be read: it is turned around")


def test_fused_weights_apart_are_warned_of_where_only_transformers_is_to_load_them() -> None:
    (said,) = warnings([item("x.0.k", (8, 8), FOUR), item("x.0.q", (8, 8), EIGHT)], Recipe())
    assert said.startswith("not for vLLM")
    assert not warnings([item("x.0.k", (8, 8), FOUR), item("x.0.down", (8, 8), EIGHT, input_id=1)], Recipe())


def test_little_that_is_quantized_is_warned_of() -> None:
    head = item("head", (800, 8), reason=Reason(Kind.OUTSIDE, "outside"), block=None)
    assert not warnings([item("a", (90, 8), FOUR), item("b", (10, 8), reason=UNUSED), head], Recipe())
    (said,) = warnings([item("a", (85, 8), FOUR), item("b", (15, 8), reason=UNUSED), head], Recipe())
    assert said.startswith("only 85% of the blocks' weights are quantized")


def test_loaders_that_fail_are_warned_of() -> None:
    mixed = [item("a", scheme=Scheme(4, 32, False)), item("b", scheme=EIGHT, input_id=1)]
    assert any("transformers" in line for line in warnings(mixed, Recipe())) and not warnings(mixed[1:], Recipe())


def emu3(folder: Path) -> Path:
    """A model that reads images, whose text half has names that the causal class does not look for."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    text = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **heads}
    codes = {"codebook_size": 32, "embed_dim": 16, "latent_channels": 16, "base_channels": 32, "num_res_blocks": 1}
    images = {**codes, "channel_multiplier": [1, 1], "attn_resolutions": [3], "hidden_size": 32}
    words = {"<image>": 11, "<|extra_200|>": 60, **{f"<|visual token {i:06d}|>": 20 + i for i in range(32)}}
    config = Emu3Config(vq_config={**images, "num_attention_heads": 1}, text_config=text, vocabulary_map=words)
    Emu3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_that_is_whole_for_its_own_class_alone_is_of_that_class(tmp_path: Path) -> None:
    assert type(make(emu3(tmp_path / "m")).model).__name__ == "Emu3ForConditionalGeneration"


def test_one_that_lacks_a_weight_for_its_own_class_too_is(tmp_path: Path) -> None:
    model = emu3(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    del tensors["text_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: make(model), "incomplete, or of another model", "download all of its files again")


@pytest.mark.parametrize(
    ("kind", "named"),
    [("bart", "BartForConditionalGeneration"), ("electra", "ElectraForPreTraining"), ("git", "GitModel")],
)
def test_a_class_that_is_no_causal_one_is_named(kind: str, named: str, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, named)(tiny.config(kind)).save_pretrained(tmp_path / "m")
    assert "incomplete" not in refused(lambda: make(tmp_path / "m"), f"{named}, which is no causal language model")


def test_several_ranks_choose_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ranks(chosen=False)
    monkeypatch.setattr(ranks._group, "size", 2)
    check_ranks(chosen=True)
    with pytest.raises(LlmqError, match=r"one process \(without --ranks.*recipe\.yaml"):
        check_ranks(chosen=False)
