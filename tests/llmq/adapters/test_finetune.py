"""Training: a resumed run against an unbroken one, the result in stock PEFT, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_tiny_model, write_tokenizer
from tests.llmq.formats import published
from tests.llmq.refusal import refused

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from llmq.adapters.finetune import CURVE, LOSSES, finetune
from llmq.adapters.lora import CONFIG, WEIGHTS
from llmq.adapters.merge import merge
from llmq.adapters.settings import Settings
from llmq.formats.dequantized import open_source
from llmq.watch import Silent

# A rank at which the adapters are large enough for bitsandbytes to keep their state in 8 bits.
SETTINGS = Settings(rank=64, lr=5e-3, steps=7, batch=4, dropout=0.1, eval_share=0.2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows: repeat a letter."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    letters = [chr(ord("a") + i % 20) for i in range(40)]
    file.write_text(
        "".join(json.dumps({"prompt": f"{c}: ", "completion": c * (3 + ord(c) % 4)}) + "\n" for c in letters)
    )
    return file


class Stopping(Silent):
    """Is interrupted after a number of steps of training."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, text: str) -> None:
        self.steps -= text.startswith("loss")
        if self.steps < 0:
            raise KeyboardInterrupt


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG, LOSSES, CURVE)}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("optimizer", ["8bit", "torch"])
def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, tiny_model: Path, rows: Path, bits: int, optimizer: str
) -> None:
    settings = replace(SETTINGS, base_bits=bits, optimizer=optimizer)
    whole = finetune(str(tiny_model), rows, tmp_path / "whole", settings)
    for stop in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            finetune(str(tiny_model), rows, tmp_path / "broken", settings, save_every=2, watch=Stopping(stop))
        with (tmp_path / "broken" / "loss.jsonl").open("a") as log:
            log.write('{"step": 9')  # a kill in the middle of a line
    again = finetune(str(tiny_model), rows, tmp_path / "broken", settings, save_every=2)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert (again.after, again.loss, again.tokens) == (whole.after, whole.loss, whole.tokens)
    assert whole.after is not None and whole.before is not None and whole.after < whole.before - 0.1


@pytest.mark.parametrize("bits", [4, 16])
def test_stock_peft_reads_the_adapter(tmp_path: Path, tiny_model: Path, rows: Path, bits: int) -> None:
    """On the base that it was trained on, loaded by stock transformers, it gives the loss that was reported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from llmq.adapters.finetune import examples

    settings = replace(SETTINGS, base_bits=bits)
    outcome = finetune(str(tiny_model), rows, tmp_path / "out", settings)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config if bits == 4 else None)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model
    )
    _, held_out, _ = examples(AutoTokenizer.from_pretrained(tiny_model), settings, rows, None)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in held_out.all:
            scores = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            for i in range(1, len(row.ids)):
                if row.learn[i]:
                    total, count = total - float(scores[i - 1, row.ids[i]]), count + 1
    assert outcome.after == pytest.approx(total / count, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    settings = replace(SETTINGS, base_bits=16, steps=3, dropout=0.0)
    plain = finetune(str(tiny_model), rows, tmp_path / "plain", settings)
    saved = finetune(str(tiny_model), rows, tmp_path / "saved", replace(settings, checkpointing=True))
    assert saved.after == pytest.approx(plain.after, rel=1e-5)


def test_accumulation_is_a_larger_batch(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    settings = replace(SETTINGS, base_bits=16, steps=3, dropout=0.0, optimizer="torch")
    large = finetune(str(tiny_model), rows, tmp_path / "large", replace(settings, batch=8))
    small = finetune(str(tiny_model), rows, tmp_path / "small", replace(settings, batch=2, accumulate=4))
    assert small.after == pytest.approx(large.after, rel=1e-4)


def test_a_finished_run_is_not_done_again(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    settings = replace(SETTINGS, steps=1)
    first = finetune(str(tiny_model), rows, tmp_path / "out", settings)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert finetune(str(tiny_model), rows, tmp_path / "out", settings) == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_another_run_is_refused_by_what_differs(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    out = tmp_path / "out"
    finetune(str(tiny_model), rows, out, replace(SETTINGS, steps=1))
    refused(lambda: finetune(str(tiny_model), rows, out, replace(SETTINGS, steps=1, lr=1e-4)), "settings: lr", "0.0001")
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("a: ", "A: "))
    refused(lambda: finetune(str(tiny_model), other, out, replace(SETTINGS, steps=1)), "data", "holds another run")


def test_foreign_folders_are_left_alone(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    refused(lambda: finetune(str(tiny_model), rows, tmp_path, SETTINGS), "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_bases_that_cannot_be_trained_on(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    import llmq
    from llmq.grids.scheme import Scheme
    from llmq.recipe.recipe import Recipe

    llmq.quantize(str(tiny_model), tmp_path / "w4", Recipe(methods=("rtn",), scheme=Scheme(4, 32)))
    refused(lambda: finetune(str(tmp_path / "w4"), rows, tmp_path / "out", SETTINGS), "compressed-tensors", "NF4")
    assert not (tmp_path / "out").exists()


def test_a_base_without_linear_layers(tmp_path: Path, rows: Path) -> None:
    base = write_tiny_model(tmp_path / "empty", layers=0)
    refused(lambda: finetune(str(base), rows, tmp_path / "out", SETTINGS), "no linear layer", "--base-bits 16")


def test_held_out_rows_of_another_file_or_none(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    settings = replace(SETTINGS, steps=1, eval_share=0.0)
    none = finetune(str(tiny_model), rows, tmp_path / "none", settings)
    assert (none.rows, none.held_out, none.before, none.after) == (40, 0, None, None)
    assert any("no rows are held out" in note for note in none.notes)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "abc"}\n')
    held = finetune(str(tiny_model), rows, tmp_path / "held", settings, eval_data=other)
    assert (held.rows, held.held_out) == (40, 1) and held.before is not None


def test_rows_are_cut_to_what_the_model_takes(tmp_path: Path, rows: Path) -> None:
    """A model with a table of positions has none for more."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=256, n_positions=16)).save_pretrained(
        tmp_path
    )
    write_tokenizer(tmp_path)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "abcd" * 10}) + "\n")
    settings = replace(SETTINGS, steps=1, eval_share=0.0, base_bits=16)
    outcome = finetune(str(tmp_path), long, tmp_path / "out", settings)
    assert outcome.settings["seqlen"] == 16 and outcome.tokens == 15 + 15 + 7


def test_an_nf4_folder_is_a_base(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    """And trains like the model that is quantized while it is loaded: their weights are the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "nf4")
    settings = replace(SETTINGS, steps=2)
    there = finetune(str(tmp_path / "nf4"), rows, tmp_path / "there", settings)
    then = finetune(str(tiny_model), rows, tmp_path / "then", settings)
    assert there.after == then.after and there.base["nf4"] == then.base["nf4"]
    refused(
        lambda: finetune(str(tmp_path / "nf4"), rows, tmp_path / "no", replace(settings, base_bits=16)), "--base-bits 4"
    )


@pytest.mark.parametrize("write", [published.fp8, published.modelopt_nvfp4])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_base_published_in_few_bits(
    tmp_path: Path, tiny_model: Path, rows: Path, write: Callable[[Path], Path], bits: int
) -> None:
    """It trains as its dense twin does, also where the twin is quantized to NF4 while it is loaded."""
    folder = write(shutil.copytree(tiny_model, tmp_path / "few"))
    source, twin = open_source(folder), shutil.copytree(tiny_model, tmp_path / "twin")
    (twin / "config.json").write_text(json.dumps(source.config))
    save_file({name: source.read(name) for name in source.names()}, twin / "model.safetensors", {"format": "pt"})
    settings = replace(SETTINGS, steps=2, base_bits=bits, optimizer="torch")
    there, then = (finetune(str(base), rows, tmp_path / f"{base.name}-out", settings) for base in (folder, twin))
    assert (there.loss, there.before, there.after) == (then.loss, then.before, then.after)
    one, other = (load_file(tmp_path / f"{name}-out" / WEIGHTS) for name in ("few", "twin"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert there.base["fingerprint"] == source.fingerprint() and there.base.get("nf4") == then.base.get("nf4")
    report = merge(str(folder), tmp_path / "few-out", tmp_path / "merged", plain=True)
    assert report.trained_on == ("nf4" if bits == 4 else "base")
    assert not any("different checkpoint" in note for note in report.notes)


@pytest.mark.parametrize(("package", "bits"), [("peft", 16), ("bitsandbytes", 4)])
def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, rows: Path, package: str, bits: int
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(
        lambda: finetune(str(tiny_model), rows, tmp_path / "out", replace(SETTINGS, base_bits=bits)),
        f"pip install {package}",
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    settings = replace(SETTINGS, lr=1e30, clip=1e30, base_bits=16, optimizer="torch")
    refused(lambda: finetune(str(tiny_model), rows, tmp_path / "out", settings), "not finite", "--lr")


def test_the_curve_is_an_svg_of_every_loss(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from xml.etree import ElementTree

    finetune(str(tiny_model), rows, tmp_path / "out", replace(SETTINGS, steps=5))
    lines = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    drawing = ElementTree.parse(tmp_path / "out" / "loss.svg").getroot()
    paths = [len(e.attrib["points"].split()) for e in drawing.iter() if e.tag.endswith("polyline")]
    assert paths == [sum("loss" in line for line in lines), sum("held_out" in line for line in lines)] == [5, 2]


def test_a_tokenizer_that_is_not_the_models(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([": "])
    tokenizer.save_pretrained(folder)
    settings = Settings(base_bits=16, steps=1)
    refused(lambda: finetune(str(folder), rows, tmp_path / "out", settings), str(folder), "id 256", "256 embeddings")
