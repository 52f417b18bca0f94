"""The state of training on disk: put back to the bit, whole or refused, with no pickle in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmq.training import state as checkpoint
from llmq.training.steps import make_optimizer
from tests.llmq.refusal import refused


@pytest.mark.parametrize("kind", ["8bit", "paged", "torch"])
def test_checkpoints_hold_the_whole_optimizer(tmp_path: Path, kind: str) -> None:
    """Two steps, a checkpoint and a third one are the three steps, to the bit."""
    if kind != "torch":
        pytest.importorskip("bitsandbytes")

    def stepped(first: int, last: int, folder: Path | None) -> dict[str, nn.Parameter]:
        trained = {"w": nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)), "b": nn.Parameter(torch.ones(8))}
        optimizer, _ = make_optimizer(kind, list(trained.values()), 0.1, 0.01)
        if folder is not None:
            assert checkpoint.load(folder, trained, optimizer) == {"step": first}
        for step in range(first, last):
            for parameter in trained.values():
                parameter.grad = torch.sin(torch.arange(parameter.numel()) + step).view_as(parameter)
            optimizer.step()
        checkpoint.save(tmp_path, trained, optimizer, {"step": last})
        return trained

    whole = stepped(0, 3, None)
    stepped(0, 2, None)
    resumed = stepped(2, 3, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    if kind != "torch":
        from safetensors.torch import load_file

        assert any(t.dtype == torch.uint8 for t in load_file(tmp_path / checkpoint.FILE).values())


def trained(optimizer_steps: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters after some steps of torch's AdamW."""
    parameters = {"w": nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), "b": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1)
    for step in range(optimizer_steps):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 0.5 + step)
        optimizer.step()
    return parameters, optimizer


def test_without_a_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    assert checkpoint.load(tmp_path, parameters, optimizer) is None
    assert all(torch.equal(before[name], value) for name, value in parameters.items()) and not optimizer.state


def test_the_file_is_read_by_safetensors_and_holds_every_tensor(tmp_path: Path) -> None:
    parameters, optimizer = trained(2)
    checkpoint.save(tmp_path, parameters, optimizer, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]
    stored = load_file(tmp_path / checkpoint.FILE)
    for i, (name, value) in enumerate(parameters.items()):
        assert torch.equal(stored[f"trained.{name}"], value)
        state = optimizer.state[value]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(stored[f"optimizer.state.{i}.{key}"], state[key])


def test_the_options_of_the_optimizer_come_back(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    optimizer.param_groups[0] |= {"lr": 0.0625, "betas": [0.8, 0.9]}
    checkpoint.save(tmp_path, parameters, optimizer, {})
    again, other = trained(0)
    assert checkpoint.load(tmp_path, again, other) == {}
    assert other.param_groups[0]["lr"] == 0.0625 and other.param_groups[0]["betas"] == [0.8, 0.9]
    assert [int(state["step"]) for state in other.state.values()] == [1, 1]


def test_a_damaged_checkpoint_says_what_to_delete(tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".llmq"
    folder.mkdir(parents=True)
    parameters, optimizer = trained(1)
    checkpoint.save(folder, parameters, optimizer, {"step": 1})
    file = folder / checkpoint.FILE
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:40], b"", whole.replace(b'"llmq"', b'"lmlq"', 1)):
        file.write_bytes(damaged)
        refused(lambda: checkpoint.load(folder, parameters, optimizer), str(file), "damaged", f"delete {folder.parent}")


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    checkpoint.save(tmp_path, parameters, optimizer, {"step": 1})
    more = parameters | {"another": nn.Parameter(torch.ones(2))}
    refused(lambda: checkpoint.load(tmp_path, more, optimizer), checkpoint.FILE, "trained.another")
    wider = {"w": nn.Parameter(torch.ones(3, 5)), "b": parameters["b"]}
    refused(lambda: checkpoint.load(tmp_path, wider, optimizer), checkpoint.FILE)
