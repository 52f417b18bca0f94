"""Mistakes with methods, schemes and presets: a few words that name the thing and the way out, exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmq.recipe import presets
from tests.architectures import tiny
from tests.conftest import Done, Run, write_tokenizer
from tests.end_to_end.test_bad_input import check_refusal

SHORT = ("--samples", "2", "--seqlen", "32")
G32 = ("--group-size", "32")


def refuse(llmq: Run, out: Path, model: object, *options: object, named: tuple[str, ...], text: Path | None) -> Done:
    """`llmq quantize` refuses with these words, and has written nothing."""
    calib = () if text is None else ("--calib", text)
    done = llmq("quantize", model, "-o", out, *calib, *SHORT, *options)
    check_refusal(done, *named)
    assert len(done.stderr.split()) < 100, done.stderr
    assert not out.exists()
    return done


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--method", "smoothquant", "--alpha", "1.5"), ("alpha must lie between 0 and 1", "1.5", "leave it out")),
        (("--method", "smoothquant", "--alpha", "-1"), ("alpha must lie between 0 and 1",)),
        (("--method", "awq", "--alphas", "0", *G32), ("alphas must be 1 or more",)),
        (("--method", "outlier_suppression_plus", "--thresholds", "0"), ("thresholds must be 1 or more",)),
        (("--method", "hqq", "--p", "0", *G32), ("0 < p ≤ 8",)),
        (("--method", "hqq", "--iterations", "5", *G32), ("--iterations", "'hqq'", "signround")),
        (("--method", "smoothquant+smoothquant"), ("smoothquant+smoothquant", "twice")),
        (("--method", "gptq+awq", *G32), ("gptq+awq", "write 'awq+gptq'")),
        (("--method", "rtn+gptq", *G32), ("rtn+gptq", "both quantize", "choose one")),
        (("--method", "outlier-suppression"), ("did you mean 'outlier_suppression'?",)),
        (("--method", "awq+", *G32), ("method '' is not known",)),
        (("--method", "gptq", "--grid", "nf4", "--group-size", "64", "--range", "kl"), ("'gptq'", "--range kl", "mse")),
        (
            ("--method", "nf4", "--grid", "fp8", "--bits", "8", "--group-size", "channel"),
            ("'nf4'", "fp8", "--method rtn"),
        ),
        (("--bits", "4", "--activations", "dynamic"), ("activations can be rounded", "--bits 8 --group-size channel")),
        (("--activations", "sometimes"), ("activations", "'sometimes'", "dynamic, static, fp8, none")),
        (("--method", "nf4", "--group-size", "48"), ("blocks (group size) of 32, 64",)),
        (("--method", "nf4", "--bits", "8"), ("grid 'nf4' is 4 bits",)),
        (("--grid", "int4"), ("grid", "'int4'", "int, fp8, fp8-block, nf4")),
        (("--grid", "fp8", "--bits", "4"), ("is 8 bits, symmetric, group size 'channel'",)),
        (("--recipe", "w4a16-gtpq"), ("w4a16-gtpq", "did you mean 'w4a16-gptq'?")),
        (("--recipe", "nothing-like-it"), ("neither a preset", "fp8", "nor a file")),
        (("--method", "hqq", "--range", "weighted", *G32), ("--range", "'hqq'", "leave it out", "gptq, rtn")),
        (("--method", "smoothquant", "--range", "widest"), ("range", "'widest'", "mse")),
        (("--method", "awq", *G32, "--alpha", "0.5"), ("--alpha", "'awq'", "smoothquant")),
        (("--method", "nf4", "--group-size", "256"), ("self_attn.o_proj [64, 64] (nf4 g256", "--ragged keep")),
        (("--method", "nf4", "--group-size", "128", "--ragged", "smaller"), ("self_attn.o_proj", "--ragged keep")),
        (("--method", "nf4", "--grid", "int"), ("'nf4'", "not to 4-bit", "--method rtn")),
        (("--method", "smoothquant", "--bits", "4"), ("activations can be rounded", "--activations none")),
        (("--method", "nf4", "--override", "up_proj=grid:int,group_size:32"), ("nf4", "--keep")),
    ],
)
def test_bad_option(
    options: tuple[str, ...], named: tuple[str, ...], tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run
) -> None:
    refuse(llmq, tmp_path / "out", tiny_model, *options, named=named, text=text_file)


@pytest.mark.parametrize("method", ["awq", "smoothquant", "outlier_suppression"])
def test_a_transform_needs_its_text(method: str, tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    group = G32 if method == "awq" else ()
    file = tmp_path / "gone.txt"
    refuse(llmq, tmp_path / "out", tiny_model, "--method", method, *group, named=("gone.txt",), text=file)


def test_a_static_scale_needs_its_text(tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    """Even with rtn, which has no use for it."""
    options = ("--method", "rtn", "--bits", "8", "--group-size", "channel", "--activations", "static")
    file = tmp_path / "gone.txt"
    refuse(llmq, tmp_path / "out", tiny_model, *options, named=("gone.txt",), text=file)


def test_a_transform_where_nothing_can_move(tmp_path: Path, text_file: Path, llmq: Run) -> None:
    """The feed-forward part has GELU between its matrices, attention's matrices are none of those that can move."""
    model = tiny.make("xlnet", tmp_path / "model")
    write_tokenizer(model)
    for method in ("awq", "awq+gptq"):
        named = (str(model), f"'{method}'", "no pair of weights between which", "gptq and rtn need none")
        refuse(llmq, tmp_path / "out", model, "--method", method, "--group-size", "16", named=named, text=text_file)
    plain = llmq("plan", model, "--method", "gptq", "--group-size", "16", "--calib", text_file, *SHORT)
    assert plain.returncode == 0, plain.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("methods: awq\nadvise: none\n", ("unknown key 'advise'",)),
        ("methods: smoothquant\nscheme: {activation: dynamic}\n", ("'activation'", "did you mean 'activations'?")),
        ("scheme: {activations: {dynamik: true}, bits: 8}\n", ("'dynamik'", "did you mean 'dynamic'?")),
        ("scheme: {bits: 8, group_size: channel, activations: {dynamic: false, range: weighted}}\n", ("range",)),
        ("methods: [awq, 3]\n", ("methods",)),
        ("methods: awq\noptions: {alpha: 0.5}\nscheme: {group_size: 32}\n", ("--alpha", "smoothquant")),
        ("methods: awq\noptions: [1]\n", ("options",)),
        ("scheme: [4]\n", ("scheme must be a mapping",)),
        ("- awq\n", ("must be a mapping",)),
    ],
)
def test_a_bad_preset_file(
    content: str, named: tuple[str, ...], tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    refuse(llmq, tmp_path / "out", tiny_model, "--recipe", file, named=named, text=text_file)


def test_asymmetric_beside_another_scheme_is_a_warning(
    tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run
) -> None:
    """It is written all the same: other readers manage. The report says so too."""
    options = ("--method", "rtn", "--asymmetric", *G32, "--override", "down_proj=bits:8", "--calib", text_file, *SHORT)
    done = llmq("quantize", tiny_model, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "warning: stock transformers" in said and "--symmetric" in said
    assert any("--symmetric" in w for w in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"])


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter of two steps, by the command line."""
    pytest.importorskip("peft")
    from typer.testing import CliRunner

    from llmq.cli.app import app

    folder = tmp_path_factory.mktemp("tune")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": "ab" * 9}) + "\n" for i in range(12)))
    arguments = ["finetune", tiny_model, "--data", data, "-o", folder / "adapter", "--steps", 2, "--base-bits", 16]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return folder / "adapter"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "3: ", "completion"', ("rows.jsonl:3 ", "not JSON")),
        ('["a"]', ("rows.jsonl:3 ", "not a JSON object")),
        ('{"question": "a", "reply": "b"}', ("rows.jsonl:3 ", "question")),
        ('{"messages": [{"role": "user"}]}', ("rows.jsonl:3:", "content")),
    ],
)
def test_a_broken_row_is_named_by_line(
    line: str, named: tuple[str, ...], tiny_model: Path, tmp_path: Path, llmq: Run
) -> None:
    rows = [json.dumps({"prompt": f"{i}: ", "completion": "abc"}) for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([*rows[:2], line, *rows[3:]]) + "\n")
    done = llmq("finetune", tiny_model, "--data", data, "-o", tmp_path / "out", "--steps", 1)
    check_refusal(done, *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "named"), [(("--rank", 0), ("--rank",)), (("--base-bits", 8), ("--base-bits",))])
def test_bad_settings_of_a_tune(
    options: tuple[Any, ...], named: tuple[str, ...], tiny_model: Path, tmp_path: Path, llmq: Run
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1: ", "completion": "abc"}) + "\n")
    check_refusal(llmq("finetune", tiny_model, "--data", data, "-o", tmp_path / "out", *options), *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_of_another_model(tune: Path, tmp_path: Path, llmq: Run) -> None:
    other = tiny.make("opt", tmp_path / "other")
    write_tokenizer(other)
    for options in ((*G32,), ("--bits", 16)):
        done = llmq("merge", other, tune, "-o", tmp_path / "out", *options)
        check_refusal(done, str(tune), "which this model does not have", "the base it was trained on")
        assert not (tmp_path / "out").exists()


def test_an_adapter_without_weights(tune: Path, tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    shutil.copytree(tune, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    check_refusal(llmq("merge", tiny_model, tmp_path / "half", "-o", tmp_path / "out"), "adapter_model.safetensors")
    check_refusal(llmq("merge", tiny_model, tiny_model, "-o", tmp_path / "out"), "is not an adapter folder")
    check_refusal(llmq("merge", tiny_model, tune, "-o", tmp_path / "out", "--method", "gptq+awq"), "write 'awq+gptq'")
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed(llmq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from llmq.cli import app as cli

    monkeypatch.setattr(cli, "out_console", Console(width=240))
    done = llmq("recipes")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: " ".join(line.split()) for line in done.stdout.splitlines() if line.strip()}
    for name in presets.names():
        recipe = presets.recipe(name)
        assert "+".join(recipe.methods) in rows[name] and str(recipe.scheme) in rows[name]
        assert presets.advice(name)[:30] in rows[name]
        assert f"{presets.measured(name).kl:.4f} {presets.measured(name).time:g} ×" in rows[name]
