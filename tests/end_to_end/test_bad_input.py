"""Every mistake a user can make is a few words that name the file or weight and the way out, with exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Done, Run, write_tiny_model

INDEX = "model.safetensors.index.json"
SHORT = ("--group-size", "32", "--samples", "2", "--seqlen", "32")


@pytest.fixture
def model(tmp_path: Path, sharded_model: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sharded_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    return write_tiny_model(tmp_path_factory.mktemp("sharded") / "tiny", shard="150KB")


def shards(model: Path) -> list[Path]:
    """The weights files."""
    return sorted(model.glob("*.safetensors"))


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def missing_shard(model: Path) -> str:
    """A shard that the index names is gone."""
    gone = shards(model)[1]
    gone.unlink()
    return gone.name


def truncated_shard(model: Path) -> str:
    """A download that stopped."""
    cut = shards(model)[0]
    os.truncate(cut, cut.stat().st_size // 2)
    return cut.name


def absent_tensor(model: Path) -> str:
    """The index promises a tensor that its shard lacks."""
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.9.extra.weight"] = shards(model)[0].name
    (model / INDEX).write_text(json.dumps(index))
    return "model.layers.9.extra.weight"


def not_a_number(model: Path) -> str:
    """One NaN in one weight."""
    return spoil(model, "model.layers.1.mlp.up_proj.weight", float("nan"))


def infinite(model: Path) -> str:
    """One infinity in one weight."""
    return spoil(model, "model.layers.2.self_attn.k_proj.weight", float("inf"))


def spoil(model: Path, name: str, value: float) -> str:
    """Put a value into a weight."""
    for shard in shards(model):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3, 5] = value
            save_file(tensors, shard, metadata={"format": "pt"})
    return name


def lost_config(model: Path) -> str:
    """Not a model folder."""
    (model / "config.json").unlink()
    return "config.json"


def quantized(model: Path) -> str:
    """A source that is quantized already."""
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return "already quantized"


def pickles(model: Path) -> str:
    """Only a pickle."""
    for file in [*shards(model), model / INDEX]:
        file.unlink()
    torch.save({}, model / "pytorch_model.bin")
    return "pytorch_model.bin"


def remote_code(model: Path) -> str:
    """A model with code of its own."""
    edit_json(
        model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.M"}
    )
    return "--trust-remote-code"


@pytest.mark.parametrize(
    "damage",
    [
        missing_shard,
        truncated_shard,
        absent_tensor,
        not_a_number,
        infinite,
        lost_config,
        quantized,
        pickles,
        remote_code,
    ],
)
def test_damaged_source(damage: Callable[[Path], str], model: Path, tmp_path: Path, text_file: Path, llmq: Run) -> None:
    named = damage(model)
    done = llmq("quantize", model, "-o", tmp_path / "out", "--calib", text_file, *SHORT)
    check_refusal(done, named)
    assert not list(tmp_path.glob("out/config.json"))


def test_mended_weight_is_another_model(model: Path, tmp_path: Path, text_file: Path, llmq: Run) -> None:
    """A NaN in block 1 stops the run; it is another model once mended, so the folder is refused, by name."""
    pristine = Path(shutil.copytree(model, tmp_path / "pristine"))
    not_a_number(model)
    command = ("quantize", model, "-o", tmp_path / "out", "--calib", text_file, *SHORT)
    check_refusal(llmq(*command), "up_proj.weight")
    shutil.rmtree(model)
    shutil.copytree(pristine, model)
    check_refusal(llmq(*command), "another run")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits", "9"], "from 2 to 8"),
        (["--bits", "1"], "from 2 to 8"),
        (["--group-size", "0"], "group size"),
        (["--group-size", "many"], "--group-size"),
        (["--group-size", "48"], "does not divide"),
        (["--keep", "no_such_weight"], "no_such_weight"),
        (["--override", "no_such_weight=bits:8"], "no_such_weight"),
        (["--override", "up_proj"], "--override"),
        (["--override", "up_proj=bots:8"], "did you mean 'bits'"),
        (["--override", "lm_head=bits:8"], "not quantized"),
        (["--method", "gtpq"], "did you mean 'gptq'"),
        (["--range", "mean"], "range"),
        (["--method", "rtn", "--act-order", "static"], "--act-order"),
        (["--damping", "1.5"], "damping"),
        (["--override", "up_proj=bits:{"], "--override"),
        (["--ragged", "sometimes"], "ragged"),
        (["--route", "some"], "route"),
        (["--route", "all", "--method", "rtn"], "--route all"),
        (["--tp", "3"], "--tp 3"),
        (["--device", "warp"], "--device warp"),
        (["--samples", "0"], "--samples"),
        (["--calib", "no/such-data-set"], "no/such-data-set"),
        (["--calib", "missing.txt"], "missing.txt"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_option(
    options: list[str], named: str, tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run
) -> None:
    done = llmq("quantize", tiny_model, "-o", tmp_path / "out", "--calib", text_file, *SHORT, *options)
    check_refusal(done, named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "named"), [(b"", "empty"), (b"too short", "--seqlen"), (bytes(range(256)) * 40, "not UTF-8")]
)
def test_bad_text(content: bytes, named: str, tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    done = llmq("quantize", tiny_model, "-o", tmp_path / "out", "--calib", file, *SHORT)
    check_refusal(done, "text.txt", named)
    assert not (tmp_path / "out").exists()


def test_bad_recipe_file(tiny_model: Path, tmp_path: Path, llmq: Run) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: {bitz: 4}\n")
    check_refusal(llmq("plan", tiny_model, "--recipe", file), "bitz", "did you mean 'bits'")
    file.write_text("scheme: [4\n")
    check_refusal(llmq("plan", tiny_model, "--recipe", file), "recipe.yaml")


@pytest.mark.parametrize("name", ["no/such-model", "./no-such-folder", "nowhere"])
def test_unknown_model(name: str, tmp_path: Path, llmq: Run) -> None:
    check_refusal(llmq("quantize", name, "-o", tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_output_is_a_file(tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run) -> None:
    (tmp_path / "out").write_text("mine")
    done = llmq("quantize", tiny_model, "-o", tmp_path / "out", "--calib", text_file, *SHORT)
    check_refusal(done, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_output_holds_something_else(tiny_model: Path, tmp_path: Path, text_file: Path, llmq: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = llmq("quantize", tiny_model, "-o", tmp_path / "out", "--calib", text_file, *SHORT)
    check_refusal(done, str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_full_disk_then_room(tmp_path: Path, text_file: Path, llmq: Run) -> None:
    """A small tmpfs fills in the middle of a run; with room again the same command ends as an unbroken run does."""
    import llmq as api
    from llmq.grids.scheme import Scheme
    from llmq.recipe.recipe import Calibration, Recipe

    model = write_tiny_model(tmp_path / "model", layers=8)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")

    class Filling:
        """A watch that fills the disk after two blocks."""

        blocks = 0
        name = ""

        def stage(self, name: str, total: int) -> None:
            self.name = name

        def step(self, text: str) -> None:
            self.blocks += self.name == "Quantizing"
            if self.blocks == 2 and not (disk / "filler").exists():
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(b"x" * 4096)

        def note(self, text: str) -> None:
            pass

    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(str(text_file), 2, 32))
    command = ("quantize", model, "-o", disk / "out", "--calib", text_file, *SHORT)
    try:
        with pytest.raises(
            api.LlmqError, match="disk full while writing .* same command again: 3 of 9 blocks are kept"
        ):
            api.quantize(str(model), disk / "out", recipe, watch=Filling())
        check_refusal(llmq(*command), "on disk", "free some space")
        (disk / "filler").unlink()
        done = llmq(*command)
        assert done.returncode == 0, done.stderr
        assert llmq("quantize", model, "-o", tmp_path / "whole", "--calib", text_file, *SHORT).returncode == 0
        for file in (tmp_path / "whole").glob("*.safetensors"):
            assert file.read_bytes() == (disk / "out" / file.name).read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_eval_without_the_base_model(tmp_path: Path, llmq: Run) -> None:
    """The base model of a report may be elsewhere by now: a warning. One that was asked for must be there."""
    assert llmq("quantize", "demo", "-o", tmp_path / "out", "--method", "rtn").returncode == 0
    edit_json(tmp_path / "out" / "report.json", model=str(tmp_path / "[gone]"))
    short = ("eval", tmp_path / "out", "--window", "32", "--max-windows", "1")
    done = llmq(*short)
    assert done.returncode == 0, done.stderr
    assert "warning:" in done.stderr and "[gone]" in done.stderr and "--base" in done.stderr
    check_refusal(llmq(*short, "--base", tmp_path / "gone"), "gone")


@pytest.mark.parametrize("option", ["--window", "--max-windows", "--batch"])
def test_eval_of_nothing(option: str, llmq: Run) -> None:
    done = llmq("eval", "demo", option, "0")
    assert done.returncode == 2
    assert option in done.stderr and "Traceback" not in done.stderr


def check_refusal(done: Done, *named: str) -> None:
    """Exit code 2, the words, no traceback."""
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said + done.stdout
    assert "Traceback" not in done.stderr
    assert said.count("error:") == 1, said
    for word in named:
        assert word in said, said
