"""A whole job: what it refuses before any work, what a run goes on by, what its configuration and command say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llmq import job
from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Calibration, Recipe
from llmq.report.page import PAGE
from llmq.watch import Silent
from tests.conftest import write_tiny_model
from tests.llmq.refusal import refused
from tests.llmq.vision import write_llava

IDS = torch.arange(64).view(2, 32)
RECIPE = Recipe(scheme=Scheme(4, 32))
PLAIN = Recipe(methods=("rtn",), scheme=Scheme(4, 32))


def planned(model: Path, recipe: Recipe = RECIPE, **more: Any) -> Plan:
    return job.plan(str(model), recipe, ids=IDS, **more)


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_what_cannot_be_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    missing, file = str(tmp_path / "none"), tmp_path / "file"
    file.touch()
    refused(lambda: job.plan(missing, device="tpu9"), "tpu9")
    refused(lambda: job.plan(missing, Recipe(methods=("gptq", "awq"))), "write 'awq+gptq'")
    refused(lambda: job.plan(missing, out=file), "is a file, not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    refused(lambda: job.plan(missing, out=tmp_path / "full"), "full")
    refused(lambda: job.plan(missing, out=tmp_path / "new"), "none")
    assert not (tmp_path / "new").exists()


def test_a_configuration_that_a_format_cannot_say_is_refused_by_the_plan(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(made: Plan) -> None:
        raise LlmqError("it cannot be said")

    monkeypatch.setattr(job, "config", cannot)
    refused(lambda: planned(tiny_model), "it cannot be said")


def test_windows_given_are_told_of_and_taken(tiny_model: Path) -> None:
    made = planned(tiny_model)
    assert torch.equal(made.ids, IDS)
    assert made.calibration.description == "2 windows of 32 tokens given by the caller"


def test_windows_of_the_recipes_text_are_no_longer_than_the_model_takes(tiny_model: Path, text_file: Path) -> None:
    source = FolderSource(tiny_model)
    text = Calibration(text=str(text_file), samples=3, seqlen=64)
    assert job.calibration_windows(source, text, 0, None).ids.shape == (3, 64)
    assert job.calibration_windows(source, text, 0, 256).ids.shape == (3, 64)
    found = job.calibration_windows(source, text, 0, 16).ids
    assert found.shape == (3, 16) and bytes(found[0].tolist()) != bytes(16)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path, text_file: Path) -> None:
    model = write_tiny_model(tmp_path / "model", layers=1)
    (model / "tokenizer.json").write_text("{")
    text = Calibration(text=str(text_file), samples=1, seqlen=8)
    refused(
        lambda: job.calibration_windows(FolderSource(model), text, 0, None),
        str(model),
        "cannot be loaded",
    )


def test_a_run_goes_on_only_with_the_same_of_everything_that_matters(tiny_model: Path) -> None:
    made = planned(tiny_model)
    usual = job.fingerprint(made, "cpu")
    assert usual == job.fingerprint(planned(tiny_model), "cpu")
    assert set(usual) == {"source", "recipe", "calibration", "versions", "device"}
    other_text = replace(made, calibration=replace(made.calibration, ids=IDS + 1))
    others = {
        "recipe": job.fingerprint(planned(tiny_model, Recipe(scheme=Scheme(4, 16))), "cpu"),
        "calibration": job.fingerprint(other_text, "cpu"),
        "device": job.fingerprint(made, "cuda:1"),
    }
    for changed, found in others.items():
        assert [key for key in usual if usual[key] != found[key]] == [changed]
    # Which card it is changes nothing, nor how the windows are described.
    assert job.fingerprint(made, "cuda:0") == others["device"]
    assert job.fingerprint(replace(made, calibration=replace(made.calibration, description="x")), "cpu") == usual
    json.dumps(usual)


def test_the_configuration_names_each_scheme_and_all_linears_left_alone(tiny_model: Path) -> None:
    eight = Scheme(8, 32)
    recipe = Recipe(scheme=Scheme(4, 32), overrides=(("down_proj", eight),), keep=("layers.0.self_attn.o_proj",))
    made = planned(tiny_model, recipe)
    found = job.config(made)
    section = found.pop("quantization_config")
    assert found == made.source.config
    groups = {group["weights"]["num_bits"]: group["targets"] for group in section["config_groups"].values()}
    assert set(groups) == {4, 8}
    assert all("down_proj" in target for target in groups[8]) and not any("down_proj" in target for target in groups[4])
    assert set(section["ignore"]) == {"model.layers.0.self_attn.o_proj", "lm_head"}
    assert len(section["ignore"]) == 2  # a name that the model and the checkpoint share stands once


def test_beside_a_tower_that_is_left_alone_quantized_modules_are_targets_by_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    """So that a server may call the tower's layers what it likes, vLLM "qkv_proj" what is "qkv", for example."""
    folder = write_llava(tmp_path / "vision", tiny_model)

    def targets(model: Path, **more: Any) -> list[str]:
        section = job.config(planned(model, replace(PLAIN, **more)))["quantization_config"]
        (group,) = section["config_groups"].values()
        return list(group["targets"])

    parts = {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{name}_proj" for name in "kqvo")}
    places = {rf"re:(.*\.)?(language_model\.layers|model\.layers)\.\d+\.{re.escape(part)}$" for part in parts}
    assert set(targets(folder)) == set(targets(folder, keep=("layers.1",))) == places
    assert targets(tiny_model) == targets(folder, include=("vision_tower", "multi_modal_projector")) == ["Linear"]
    assert set(targets(folder, include=("re:layers.0.mlp.fc1$",))) == places | {
        f"{prefix}vision_tower.encoder.layers.0.mlp.fc1" for prefix in ("", "model.")
    }
    # Names that all who load it have: they stand as they are.
    loaded = {f"model.language_model.layers.{block}.{part}" for block in range(3) for part in parts}
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    assert set(targets(tmp_path / "new")) == loaded


@pytest.mark.parametrize(
    ("device", "tp", "trust", "stream", "more"),
    [
        ("cpu", 1, False, False, []),
        ("cuda", 1, False, False, ["--device", "cuda"]),
        ("cpu", 2, False, True, ["--tp", "2", "--stream-hub"]),
        ("cuda:1", 4, True, False, ["--device", "cuda:1", "--tp", "4", "--trust-remote-code"]),
    ],
)
def test_the_command_that_does_it_again(device: str, tp: int, trust: bool, stream: bool, more: list[str]) -> None:
    command = job.repeat("my model's", Path("an out"), device, tp, trust, stream)
    usual = ["llmq", "quantize", "my model's", "-o", "an out", "--recipe", "recipe.yaml"]
    assert shlex.split(command) == [*usual, *more]


def test_a_finished_folder_is_answered_with_its_report(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, watch = tmp_path / "out", Notes()
    report = job.quantize(str(tiny_model), out, PLAIN, ids=IDS, watch=watch)
    assert report.model == str(tiny_model) and not [line for line in watch.said if "finished" in line]
    assert report.command == ""  # nothing says windows again that the caller gave
    assert (out / PAGE).is_file() and report.seconds > 0
    monkeypatch.setattr(job.stream, "run", None)
    assert job.quantize(str(tiny_model), out, PLAIN, ids=IDS, watch=watch) == report
    assert watch.said[-1] == f"{out} is finished already: this is its report"


def test_a_folder_is_named_by_its_whole_path_and_the_command_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model", layers=1)
    monkeypatch.chdir(tmp_path)
    report = job.quantize("model", "out", PLAIN)
    assert report.model == str(tmp_path / "model") and report.out == "out"
    assert report.command == "llmq quantize model -o out --recipe recipe.yaml"
    made = job.plan("model", PLAIN, out="other", ids=IDS)
    assert job.quantize("model", "other", made=made, ids=IDS, command="mine").command == "mine"


@pytest.mark.parametrize("default", [True, False], ids=["with a default", "named only"])
def test_every_chat_template_goes_along(tmp_path: Path, default: bool) -> None:
    from transformers import AutoTokenizer

    model, out = write_tiny_model(tmp_path / "model", layers=1), tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"tool_use": "T {{ tools }}", "rag": "R\n"} | ({"default": "D"} if default else {})
    tokenizer.save_pretrained(model)
    job.quantize(str(model), out, PLAIN, ids=IDS)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert sorted(path.name for path in (out / "additional_chat_templates").iterdir()) == [
        "rag.jinja",
        "tool_use.jinja",
    ]
