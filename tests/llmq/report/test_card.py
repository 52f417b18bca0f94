"""The model card: metadata that huggingface_hub reads, only what was tried said to work, numbers put in later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.report.card import hub_id, model_card, write_measured, write_place
from llmq.report.rows import WeightRow
from tests.llmq.report.page.reports import chosen, measure, mixed, report


@pytest.fixture
def source(tmp_path: Path) -> Path:
    metadata = "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage:\n- en\n- de\ntags:\n- x\n"
    (tmp_path / "README.md").write_text(f"---\n{metadata}---\n# Base\n")
    return tmp_path


def test_metadata(source: Path) -> None:
    data = ModelCard(model_card(report(2), source)).data
    assert data.base_model == "org/name" and data.to_dict()["base_model_relation"] == "quantized"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["llmq", "compressed-tensors", "4-bit"]
    assert (data.license, data.license_name, data.language) == ("other", "own", ["en", "de"])


@pytest.mark.parametrize("card", [None, "# no metadata", "---\n: [broken\n---\n", "---\n- a list\n---\n", b"\xff\xfe"])
def test_a_source_without_metadata(tmp_path: Path, card: str | bytes | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    data = ModelCard(model_card(report(2, model=str(tmp_path)), tmp_path)).data
    assert data.license is None and data.base_model is None


def test_ids() -> None:
    cached = Path("/home/me/.cache/huggingface/hub/models--org--name--x/snapshots/0123")
    assert hub_id("org/name") == "org/name" and hub_id("name") == "name"
    assert hub_id(str(cached), cached) == "org/name--x".replace("--", "/")
    assert hub_id("/models/name", Path("/models/name")) is None and hub_id("demo", Path("/x")) is None


def test_usage_says_what_was_tried(source: Path) -> None:
    text = model_card(report(2), source)
    assert "With vLLM, where this was not run:" in text and "from vllm import LLM" in text
    assert "not quantized: kept by --keep; outside the decoder blocks" in text
    assert "With vLLM:" in model_card(report(2, examples={"vllm": True}), source)


def test_the_choice_of_bits_is_told(source: Path) -> None:
    text = model_card(mixed(2), source)
    spread = "Of the weights, 4 are 2-bit, 3 are 3-bit, 3 are 4-bit, 3 are 8-bit, 2 not quantized."
    assert f"\n## Bits per weight\n\n{spread} {chosen()}. O{chosen().beside[1:]}.\n\n## How to load it" in text
    made = mixed(2, chosen=chosen(uniform=()))
    first = made.weights[0]
    assert isinstance(first, WeightRow)
    made.weights[0] = replace(first, scheme=Scheme(2, 64))
    text = model_card(made, source)
    assert "1 are 2-bit g64 symmetric" not in text and "1 is 2-bit g64 symmetric" in text
    assert f"{chosen()}.\n" in text
    assert "Bits per weight" not in model_card(report(2), source)


def test_experts_are_told_with_their_tokens(source: Path) -> None:
    text = model_card(report(2, experts=8, routed=True), source)
    assert (
        "\n- experts: 16 in 2 blocks, each chosen by 0 to 14 calibration tokens (2 by none)\n- not quantized: " in text
    )
    made = report(2, experts=8, routed=True)
    made.weights = [replace(row, alpha=None) if isinstance(row, WeightRow) else row for row in made.weights]
    assert "\n- experts: 16 in 2 blocks\n- not" in model_card(made, source)
    assert "- experts" not in model_card(report(2), source) and "text\n- not quantized" in model_card(report(2), source)


def test_it_shows_only_what_loads_the_folder(source: Path) -> None:
    odd = model_card(report(2, examples={"transformers": True}), source)
    assert "AutoModelForCausalLM" in odd and "import LLM" not in odd
    mixed = model_card(report(2, examples={"vllm": True}), source)
    assert "AutoModelForCausalLM" not in mixed and "import LLM" in mixed
    nobody = model_card(report(2, loaders=["nobody reads it"], examples={}), source)
    assert "- nobody reads it" in nobody and "```" not in nobody


def test_numbers_are_put_in_and_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(model_card(report(2), source))
    before = (out / "README.md").read_text()
    assert "## Measured" not in before
    base = [measure("perplexity:demo", "perplexity", 5.0, protocol="a | b")]
    for value in (6.0, 5.5):
        write_measured(out, [measure("perplexity:demo", "perplexity", value, protocol="a | b")], base)
    text = (out / "README.md").read_text()
    assert "| perplexity:demo | perplexity | 5.500 | 5.390 – 5.610 | 5.000 | 90.9 % |" in text
    assert "6.000" not in text and text.count("## Measured") == 1
    write_measured(out, [])
    assert (out / "README.md").read_text() == before
    write_place(out, "me/name-w4")
    assert (out / "README.md").read_text() == before.replace("PATH_TO_THIS_FOLDER", "me/name-w4")


def test_the_hub_finds_the_numbers(source: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(report(2), source))
    given = [
        measure("perplexity:demo", "perplexity", 6.12345678, protocol="p"),
        measure("speed", "decode_tokens_per_second", 50.0),
        measure("perplexity:c4", "perplexity", float("nan")),
    ]
    write_measured(tmp_path, given)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/name" and data.model_name == "name-w4"
    (found,) = data.eval_results
    assert (found.task_type, found.dataset_name, found.metric_type) == ("text-generation", "demo", "perplexity")
    assert found.metric_value == 6.12346 and found.metric_args == {"protocol": "p"}
    whole = (tmp_path / "README.md").read_text()
    write_measured(tmp_path, given)
    assert (tmp_path / "README.md").read_text() == whole


def test_metadata_stays_as_it_is_written(source: Path, tmp_path: Path) -> None:
    card = model_card(report(2), source).replace(
        "---\n", "---\n# mine\nversion: 1.10\nlanguage: [no, 'de']\nempty:\n", 1
    )
    given = [measure("perplexity:demo", "perplexity", 6.0, protocol="p")]
    (tmp_path / "README.md").write_text(card)
    write_measured(tmp_path, given)
    write_measured(tmp_path, [])
    assert (tmp_path / "README.md").read_text() == card
    # Somebody's own index is left alone, and the table is written all the same.
    own = card.replace("---\n", "---\nmodel-index: 3\n", 1)
    (tmp_path / "README.md").write_text(own)
    write_measured(tmp_path, given)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nmodel-index: 3\n") and text.count("model-index") == 1 and "## Measured" in text


def test_protocols_have_numbers(source: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(report(2), source))
    given = [measure("perplexity:demo", "perplexity", value, protocol=f"{value} windows") for value in (6.0, 7.0)]
    write_measured(tmp_path, [*given, measure("piqa", "acc", 0.5, "share", True, protocol="lm-eval")])
    text = (tmp_path / "README.md").read_text()
    assert "| perplexity:demo [2] | perplexity | 7.000 |" in text and "- [2] 7.0 windows" in text
    assert "| piqa | acc | 50.00 % |" in text and "- [3] lm-eval" in text


def test_a_card_of_another(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(LlmqError, match="llmq did not write it"):
        write_measured(tmp_path, [])
    write_place(tmp_path, "me/x")
    assert (tmp_path / "README.md").read_text() == "# mine"


def test_what_had_no_calibration_is_told(source: Path) -> None:
    made = report(2)
    notes = ("damped", "no calibration: rounded to nearest")
    made.weights = [*made.weights, WeightRow("tower", (64, 64), None, 9, Scheme(), 0.1, notes)]
    text = model_card(made, source)
    assert "\n- outside the decoder's blocks: 1 weights, no calibration: rounded to nearest\n" in text
    assert "same output as in memory; every weight outside the blocks was read back" in text
    assert "outside the decoder's blocks" not in model_card(report(2), source)


def test_a_model_of_another_class(source: Path) -> None:
    rows = [WeightRow("layer", (64, 64), None, 9, Scheme(), 0.1)]
    recipe = report(2).recipe | {"model_class": "AutoModelForSeq2SeqLM", "methods": ["rtn"]}
    made = replace(report(2), weights=rows, blocks=[], recipe=recipe, opener="AutoModelForSeq2SeqLM")
    text = model_card(made, source)
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in text and "AutoTokenizer" not in text
    assert "- verified: every quantized weight was read back" in text and "- outside" not in text
    assert ModelCard(text).data.pipeline_tag is None
    (source / "README.md").write_text("---\npipeline_tag: translation\n---\n")
    assert ModelCard(model_card(made, source)).data.pipeline_tag == "translation"
    assert ModelCard(model_card(report(2), source)).data.pipeline_tag == "text-generation"


def test_what_a_model_does_that_reads_images_is_said_by_its_own_card(source: Path) -> None:
    made = replace(report(2), opener="LlavaForConditionalGeneration")
    assert ModelCard(model_card(made, source)).data.pipeline_tag is None
    (source / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    assert ModelCard(model_card(made, source)).data.pipeline_tag == "image-text-to-text"
