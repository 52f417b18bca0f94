"""Discovery against an ordinary forward pass, on types chosen for variety; scripts/sweep_architectures.py has all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmq.discovery import blocks as discover
from llmq.discovery.calls import Call
from llmq.discovery.reasons import Kind
from llmq.errors import LlmqError
from tests.architectures import checks, tiny
from tests.llmq.refusal import refused

WIDTH = 16

DENSE = [
    "bart",  # a decoder cut from an encoder-decoder; attention to an encoder that is not there
    "bloom",  # fused attention, alibi
    "camembert",  # a tied head with a tied bias
    "falcon",  # its own Linear class, attention and MLP in parallel
    "gemma3n_text",  # layers that reuse the keys of others, four hidden streams in one tensor
    "gpt2",  # no Linear at all in its blocks
    "llama",
    "mamba",  # weights used without calling their module
    "modernbert-decoder",  # masks and rotary tables per layer
    "qwen3_5_text",  # linear and full attention in turn
    "recurrent_gemma",  # recurrent blocks with 3-D gates, which are no experts
    "xlnet",  # two streams, weights as bare 3-D parameters
    "zamba2",  # blocks that share a transformer layer
]
MIXTURES = ["dbrx", "jetmoe", "llama4_text", "longcat_flash"]


@pytest.mark.parametrize("name", DENSE)
def test_agrees_with_an_ordinary_forward_pass(name: str, tmp_path: Path) -> None:
    structure, faults = checks.faults(tiny.make(name, tmp_path), tiny.tokens())
    assert not faults
    assert len(structure.blocks) == tiny.LAYERS


@pytest.mark.parametrize("name", [name for name in MIXTURES if name in tiny.TYPES])
def test_agrees_where_experts_are_parts_of_parameters(name: str, tmp_path: Path) -> None:
    structure, faults = checks.faults(tiny.make(name, tmp_path), tiny.tokens())
    assert not faults
    assert all(block.parts for block in structure.blocks)


def test_refuses_blocks_called_twice(tmp_path: Path) -> None:
    model = discover.build(tiny.make("hrm_text", tmp_path), torch.float32)
    with pytest.raises(LlmqError, match="called more than once per pass"):
        discover.find(model)


def test_names_what_it_leaves(tmp_path: Path) -> None:
    structure = discover.find(discover.build(tiny.make("zamba", tmp_path), torch.float32))
    reasons = {reason for block in structure.blocks for reason in block.left.values()}
    assert "it is shared with another block" in {str(reason) for reason in reasons}
    assert Kind.SHARED in {reason.kind for reason in reasons}


def test_weights_with_one_input_share_it(tmp_path: Path) -> None:
    structure = discover.find(discover.build(tiny.make("llama", tmp_path), torch.float32))
    by_leaf = {w.name.rpartition(".")[2]: w for w in structure.blocks[2].weights}
    input_id = {leaf: w.input_id for leaf, w in by_leaf.items()}
    assert input_id["q_proj"] == input_id["k_proj"] == input_id["v_proj"] != input_id["o_proj"]
    assert input_id["gate_proj"] == input_id["up_proj"] != input_id["down_proj"]
    assert {leaf for leaf, w in by_leaf.items() if w.row_parallel} == {"o_proj", "down_proj"}


class Block(nn.Module):
    """Attention and MLP as far as their products go; `extra` does more with them."""

    def __init__(self, extra: Extra | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.table = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.query(y) + self.key(y)
        x = x + self.out(torch.relu(z)) + self.table[0]
        return x if self.extra is None else self.extra(self, x)


Extra = Callable[[Block, Tensor], Tensor]


class Model(nn.Module):
    """An embedding, blocks, a head, a list of modules that are no blocks, and what only an image needs.

    images: the indices of the blocks that are run with an image only.
    """

    def __init__(self, extra: Extra | None = None, blocks: int = 2, images: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.images, self.tower = images, nn.ModuleList(Block() for _ in range(9))
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.small = nn.ModuleList([nn.LayerNorm(WIDTH)])
        self.layers = nn.ModuleList(Block(extra) for _ in range(blocks))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_decoder(self) -> nn.Module:
        return self.layers

    def forward(self, input_ids: Tensor, image: Tensor | None = None, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.tower if image is not None else ():
            x = layer(x)
        for i, layer in enumerate(self.layers):
            x = layer(x) if i not in self.images else x
        logits: Tensor = self.head(x)
        return logits


def found(extra: Extra | None = None, **options: Any) -> discover.Structure:
    with torch.device("meta"):
        model = Model(extra, **options)
    return discover.find(model.eval())


def reasons(structure: discover.Structure) -> dict[str, str]:
    return {name: str(reason) for name, reason in structure.blocks[0].left.items()}


def test_a_block_s_weights_with_their_sizes_and_inputs() -> None:
    structure = found()
    assert structure.path == "layers" and [block.name for block in structure.blocks] == ["layers.0", "layers.1"]
    query, key, out = structure.blocks[1].weights
    assert [w.name for w in (query, key, out)] == ["layers.1.query", "layers.1.key", "layers.1.out"]
    assert all((w.rows, w.width) == (WIDTH, WIDTH) for w in (query, key, out))
    assert query.input_id == key.input_id != out.input_id
    assert [w.row_parallel for w in (query, key, out)] == [False, False, True]
    assert reasons(structure) == {"layers.0.table": "no matrix product uses it"}


NOT_LINEAR = "it is not the weight of a Linear module, and loaders replace only those"
IN_SLICES = "it is used in slices, not as one matrix"
NOT_CALLED = "its module is never called: the model reads the weight directly"


@pytest.mark.parametrize(
    ("extra", "parameter", "reason"),
    [
        (lambda m, x: x + m.query(x), "query.weight", "it is used more than once in a block"),
        (lambda m, x: x + x @ m.table, "table", NOT_LINEAR),
        (lambda m, x: x + x @ m.spare.weight.T, "spare.weight", NOT_CALLED),
        (lambda m, x: m.spare(x) + x[..., :4] @ m.spare.weight[:, :4].T, "spare.weight", IN_SLICES),
        (lambda m, x: x, "spare.weight", "no matrix product uses it"),
    ],
)
def test_what_is_left_is_left_for_a_reason(extra: Extra, parameter: str, reason: str) -> None:
    with torch.device("meta"):
        model = Model(extra)
        for layer in model.layers:
            layer.spare = nn.Linear(WIDTH, WIDTH, bias=False)
    assert reasons(discover.find(model.eval()))[f"layers.0.{parameter}"] == reason


def test_a_weight_of_two_blocks_is_left() -> None:
    with torch.device("meta"):
        model = Model()
    model.layers[1].out = model.layers[0].out
    structure = discover.find(model.eval())
    assert reasons(structure)["layers.0.out.weight"] == "it is shared with another block"
    assert [w.name for w in structure.blocks[0].weights] == ["layers.0.query", "layers.0.key"]


def test_the_decoder_s_lists_are_tried_first_then_the_heaviest_and_the_outer_of_two_alike() -> None:
    model = Model()
    assert [name for name, _ in discover.candidates(model)] == ["layers", "tower", "small"]
    outer = nn.ModuleDict({"stack": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])]), "none": nn.ModuleList()})
    assert [name for name, _ in discover.candidates(outer)] == ["stack", "stack.0"]


def test_blocks_that_only_an_image_reaches_are_no_blocks() -> None:
    structure = found(blocks=4, images=(1, 3))
    assert [block.name for block in structure.blocks] == ["layers.0", "layers.2"]
    assert structure.unreached == ("layers.1", "layers.3")
    assert structure.blocks[1].weights[0].name == "layers.2.query"


def test_what_only_an_image_needs_is_not_read_before_the_blocks() -> None:
    """But the very first parameter is: transformers asks it for the device."""
    with torch.device("meta"):
        model = Model().eval()
    first = next(name for name, _ in model.named_parameters())
    assert first.startswith("tower.0.")
    assert discover.find(model).outside == {"embed.weight", first}
    model.head.weight = model.embed.weight
    assert discover.find(model).outside == {"embed.weight", first}
    model._modules = {"embed": model.embed, **model._modules}
    assert discover.find(model).outside == {"embed.weight"}


def test_every_list_that_was_tried_is_told() -> None:
    with torch.device("meta"):
        model = Model(lambda m, x: {"hidden": x}, blocks=1)  # type: ignore[arg-type, return-value]
    words = refused(
        lambda: discover.find(model), "no list of decoder blocks was found", "layers: a block returns a dict"
    )
    assert "small: " in words
    refused(lambda: discover.find(nn.Linear(2, 2)), "the model has no module list")


def test_a_part_that_runs_on_text_is_named(tmp_path: Path) -> None:
    """Stock transformers unpacks a folder's weights where the whole model is called, which these parts' own calls pass
    by: so they are not quantized in place."""
    config = transformers.Blip2Config(
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        architectures=["Blip2ForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    model = discover.build(tmp_path, torch.float32)
    refused(
        lambda: discover.find(model),
        "Blip2ForConditionalGeneration does not run on text alone",
        "model.language_model.save_pretrained",
    )


def test_blocks_that_differ_in_their_call_are_run_each() -> None:
    block, same, other = Block(), Block(), Block()
    other.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def key(block: Block, **kwargs: Any) -> tuple[Any, ...]:
        return discover.structure_key(block, Call((None, torch.ones(2, 3)), kwargs, 0, None), set())

    assert key(block) == key(same) != key(other)
    assert key(block, window=4) != key(same, window=5) and key(block, mask=torch.ones(2)) == key(
        same, mask=torch.zeros(2)
    )
    assert key(block, mask=torch.ones(2)) != key(same, mask=torch.ones(3))
    assert key(block, store={}) != key(same, store={})  # each leaves something of its own


def test_a_structural_run_leaves_the_model_on_meta() -> None:
    with torch.device("meta"):
        model = Model().eval()
    before = dict(model.named_parameters())
    discover.find(model)
    with discover.recorded(model, list(model.layers)) as (recording, used):
        assert model.embed.weight.device.type == "cpu" and not model.embed.weight.any()
        assert model.head.weight.device.type == "meta" and model.layers[0].out.weight.device.type == "meta"
        assert recording.hidden[0].shape == (1, discover.PROBE_TOKENS, WIDTH)
    assert used == {"embed.weight"}
    assert all(now is before[name] for name, now in model.named_parameters())


def test_a_built_model_has_no_memory_but_its_buffers(tmp_path: Path) -> None:
    folder = tiny.make("llama", tmp_path)
    model = discover.build(folder, torch.bfloat16)
    assert not model.training and all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.device.type == "cpu" for b in model.buffers())
    tied = discover.build(tiny.make("gpt2", tmp_path / "tied"), torch.float32)
    assert tied.lm_head.weight is tied.transformer.wte.weight  # type: ignore[union-attr]


def test_a_config_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing of the kind"}')
    refused(lambda: discover.build(tmp_path, torch.float32), str(tmp_path), "has no model type 'nothing of the kind'")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    refused(lambda: discover.build(tmp_path, torch.float32), str(tmp_path), "transformers cannot build this model")
