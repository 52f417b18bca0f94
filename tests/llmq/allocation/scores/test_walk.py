"""Variants run side by side with one block in memory, against the same variants of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.allocation import snapshot
from llmq.allocation.scores._walk import Walk
from llmq.block.statistics import Hessian
from llmq.grids.base import Quantized
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.base import Stats, statistic
from llmq.methods.rtn import RTN
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CANDIDATES, Whole, task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "mixtral", "granitemoe", "cohere2"])
def test_each_variant_diverges_as_the_whole_model_does(kind: str, tmp_path: Path) -> None:
    tiny.make(kind, tmp_path / "m")
    of = task(tmp_path / "m")
    whole = Whole(tmp_path / "m", of)
    last = len(of.groups) - 1
    everything = {g: g % 3 for g in range(len(of.groups))}
    variants = [{0: 0}, {0: 1}, {last: 0}, {1: 2, last: 1}, everything, {0: len(CANDIDATES) - 1}]
    found = Walk(of, variants).run()
    assert found == pytest.approx([whole.rounded(changes) for changes in variants], rel=2e-3, abs=1e-7)
    assert found[-1] == 0.0 and min(found[:-1]) > 0
    assert all(p.is_meta for p in of.plan.model.parameters())


def test_the_output_embedding_is_rounded_in_the_tail(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "m")
    recipe = Recipe(("rtn",), Scheme(4, 16), include=("lm_head",))
    of = task(tmp_path / "m", recipe)
    whole = Whole(tmp_path / "m", of)
    head = next(g for g, group in enumerate(of.groups) if group.weights[0].block is None)
    variants = [{head: 0}, {0: 0, head: 1}]
    walk = Walk(of, variants, [(head, 0), (0, 0)])
    assert walk.run() == pytest.approx([whole.rounded(changes) for changes in variants], rel=2e-3)
    assert 0.01 < walk.errors[head, 0] < 0.5


class Seen(RTN):
    """Rounds to nearest, and keeps the Hessians that it was given."""

    quantize_needs = (Hessian,)

    def __init__(self) -> None:
        super().__init__()
        self.hessians: list[Tensor] = []

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        self.hessians.append(statistic(stats, Hessian).total.clone())
        return super().quantize(weight, scheme, {}, scale_dtype)


def test_statistics_are_of_the_unquantized_block_and_not_of_judged_windows(tiny_model: Path) -> None:
    of = task(tiny_model, quantizer=Seen())
    last = len(of.groups) - 1
    whole = Whole(tiny_model, of)
    name = of.groups[last].weights[0].module
    rows: list[Tensor] = []
    hook = whole.model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        whole.model(of.batches[0])
    hook.remove()
    # Another group is rounded in an earlier block, but not in what is observed.
    Walk(of, [{0: 0, last: 0}]).run()
    hessian = of.quantizer.hessians[-1]  # type: ignore[attr-defined]
    expected = rows[0].double().t() @ rows[0].double()
    scale = float(hessian.double().trace() / expected.trace())
    assert torch.allclose(hessian.double(), expected * scale, rtol=1e-3, atol=1e-3 * float(expected.diagonal().max()))


def test_inputs_are_rounded_as_a_candidate_says(tiny_model: Path) -> None:
    plain, rounding = Scheme(8, None), Scheme(8, None, activations=Activations())
    of = task(tiny_model, candidates=(plain, rounding))
    found = Walk(of, [{0: of.groups[0].candidates.index(scheme)} for scheme in (plain, rounding)]).run()
    assert found[1] > found[0] > 0


class Killed(BaseException):
    pass


class After(Silent):
    """A watch that raises at its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left, self.said = steps, []

    def step(self, text: str) -> None:
        self.said.append(text)
        self.left -= 1
        if not self.left:
            raise Killed


def test_a_killed_walk_goes_on(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "EVERY", 0.0)
    monkeypatch.setattr(snapshot, "SHARE", 0.0)
    variants = [{0: 0}, {5: 1}, {0: 1, 9: 0}]
    compared = [(0, 0), (9, 1)]
    first = Walk(task(tiny_model), variants, compared)
    want = first.run()
    for steps in (2, 4, 5, 6, 8):
        keep = tmp_path / str(steps)
        with pytest.raises(Killed):
            Walk(task(tiny_model, keep=keep, watch=After(steps)), variants, compared).run()
        watch = After(99)
        again = Walk(task(tiny_model, keep=keep, watch=watch), variants, compared)
        assert again.run() == want and again.errors == first.errors
        assert ("was already done" in watch.said) == (steps >= 4)
        assert not keep.exists()
