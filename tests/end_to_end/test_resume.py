"""Killed at any moment, the same command resumes, and the bytes are those of an unbroken run."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, write_tiny_model, write_tokenizer
from tests.forked import Server
from tests.llmq import mixtures

DIFFER = {"report.json", "report.html", "README.md"}


def digests(folder: Path) -> dict[str, str]:
    """sha256 of everything that must not depend on how often the run was broken."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name not in DIFFER
    }


def command(model: Path, text: Path, out: Path) -> list[object]:
    """A short GPTQ run."""
    options = ["--group-size", "32", "--samples", "8", "--seqlen", "64"]
    return ["quantize", model, "-o", out, "--calib", text, *options]


def mixture(folder: Path) -> Path:
    """Two blocks of 20 experts, which are written in two groups each."""
    write_tokenizer(mixtures.write("qwen3_moe", folder, num_experts=20, num_hidden_layers=2))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda folder: write_tiny_model(folder, layers=6), mixture], ids=["dense", "mixture"])
def test_killed_at_random_moments(
    make: Callable[[Path], Path], tmp_path: Path, text_file: Path, forked: Server
) -> None:
    model = make(tmp_path / "model")
    done = forked.run(*command(model, text_file, tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    rng = random.Random(1)
    kills = 0
    # By how far it has come, not by the clock: a machine is never equally fast twice.
    for shards in sorted(rng.sample(range(6), 4)):
        process = forked.start(*command(model, text_file, tmp_path / "broken"))
        while process.poll() is None and len(list((tmp_path / "broken").glob("model-*"))) < shards:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    done = forked.run(*command(model, text_file, tmp_path / "broken"))
    assert done.returncode == 0, done.stderr
    assert kills
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_between_blocks(tmp_path: Path, tiny_model: Path, text_file: Path, stop_after: int) -> None:
    import llmq
    from llmq.grids.scheme import Scheme
    from llmq.recipe.recipe import Calibration, Recipe

    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(str(text_file), 4, 64))

    class Stopping:
        """A watch that presses Ctrl-C after some blocks."""

        count = 0
        name = ""

        def stage(self, name: str, total: int) -> None:
            self.name = name

        def step(self, text: str) -> None:
            self.count += self.name == "Quantizing"
            if self.count == stop_after:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            pass

    llmq.quantize(str(tiny_model), tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(str(tiny_model), tmp_path / "broken", recipe, watch=Stopping())
    report = llmq.quantize(str(tiny_model), tmp_path / "broken", recipe)
    assert len(report.blocks) == 3
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, text_file: Path, forked: Server) -> None:
    model = write_tiny_model(tmp_path / "model", layers=12, hidden_size=256, intermediate_size=512)
    out = tmp_path / "out"
    process = forked.start(*command(model, text_file, out))
    while process.poll() is None and not list(out.glob("model-00003*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert "same command resumes" in " ".join(process.stderr.split())
    assert "Traceback" not in process.stderr


def test_a_finished_run_is_not_done_again(tmp_path: Path, tiny_model: Path, text_file: Path, llmq: Run) -> None:
    args = [
        "quantize",
        tiny_model,
        "-o",
        tmp_path / "out",
        "--calib",
        text_file,
        "--group-size",
        "32",
        "--samples",
        "4",
    ]
    assert llmq(*args, "--seqlen", "64").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    again = llmq(*args, "--seqlen", "64")
    assert again.returncode == 0, again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    other = llmq(*args, "--seqlen", "64", "--bits", "3")
    assert other.returncode == 2
    assert "bits" in other.stderr


@pytest.mark.slow
def test_killed_while_the_whole_model_is_trained_and_written_again(
    tmp_path: Path, text_file: Path, forked: Server
) -> None:
    """After the first state of training and a later one, and after several of the shards that are replaced."""
    model, out = write_tiny_model(tmp_path / "model", layers=5), tmp_path / "broken"
    options = ["--method", "rtn+distill", "--bits", 2, "--group-size", 32, "--samples", 80, "--seqlen", 64]
    options += ["--calib", text_file, "--steps", 24]

    def state() -> int:
        path = out / ".llmq" / "distilled" / "checkpoint.safetensors"
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return 0

    def lines() -> int:
        journal = out / ".llmq" / "journal.jsonl"
        return len(journal.read_bytes().splitlines()) if journal.exists() else 0

    done = forked.run("quantize", model, "-o", tmp_path / "whole", *options)
    assert done.returncode == 0, done.stderr
    kills, rng = [], random.Random(2)
    # Six units and the decision are seven lines; then come one for the norm outside the blocks, and five for blocks.
    for what in ("state", "state", 7, 8, 10, 12):
        before = state()
        process = forked.start("quantize", model, "-o", out, *options)
        while process.poll() is None and not (state() not in (0, before) if what == "state" else lines() >= int(what)):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills.append((what, lines(), bool(state())))
        process.wait()
    done = forked.run("quantize", model, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert len(kills) >= 4, kills
    assert digests(out) == digests(tmp_path / "whole")
    assert not (out / ".llmq" / "distilled").exists()
