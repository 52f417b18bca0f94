"""Linear layers whose weight is read instead of a call: found by a run, never by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from llmq.discovery.uncalled import uncalled
from tests.llmq.classes import KINDS, TEXT


class Reads(nn.Module):
    """Calls one layer, reads another's weight, and leaves a part with a layer of its own alone."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.called, self.read, self.fails = nn.Linear(8, 8), nn.Linear(8, 8), fails
        self.inside, self.apart = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        self.odd = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 8)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(self.called(x)) @ self.read.weight
        if self.fails:
            raise KeyError("no image")
        return x


def test_what_is_read_and_not_called() -> None:
    model = Reads().to("meta")
    assert uncalled(model) == {"read"}
    assert all(p.is_meta for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())


def test_a_run_that_fails_judges_nothing() -> None:
    model = Reads(fails=True).to("meta")
    assert uncalled(model) == set() and not any(m._forward_pre_hooks for m in model.modules())


def empty(kind: str, config: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", ["bert", "t5", "bart-untied", "whisper", "clip", "mobilebert"])
def test_models_of_transformers(kind: str) -> None:
    one = KINDS[kind]
    found = uncalled(empty(one.model, getattr(transformers, one.config)(**one.sizes)))
    # Its head multiplies by both weights, side by side.
    wanted = {"cls.predictions.dense", "cls.predictions.decoder"} if kind == "mobilebert" else set()
    assert found == wanted


def test_tables_that_are_linear_layers() -> None:
    """LayoutLMv3 looks up biases of relative positions in the weight of a linear layer."""
    sizes = {"coordinate_size": 8, "shape_size": 16, "max_2d_position_embeddings": 128, "visual_embed": False}
    biases = {"has_relative_attention_bias": True, "has_spatial_attention_bias": True}
    model = empty("LayoutLMv3Model", transformers.LayoutLMv3Config(**TEXT, **sizes, **biases))
    assert uncalled(model) == {f"encoder.rel_pos{axis}_bias" for axis in ("", "_x", "_y")}
