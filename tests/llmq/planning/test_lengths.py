"""Windows that are longer than the model's code takes are refused by the plan, wherever in the model they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq import job
from llmq.discovery import blocks as discover
from llmq.discovery.calls import record
from llmq.grids.scheme import Scheme
from llmq.planning.lengths import check_length, longest, tokens_to_check
from llmq.recipe.recipe import Calibration, Recipe
from tests.architectures import tiny
from tests.conftest import write_tokenizer
from tests.llmq.refusal import refused


def positions(folder: Path, kind: str, **sizes: int) -> Path:
    """A model with a table of positions, whose config has its length under another name."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=256, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


BIGCODE = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 128}
GPT2 = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4}
CTRL = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "dff": 128}
OPENAI = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4}
CODEGEN = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
LONG = {"GPTBigCode": BIGCODE, "GPT2": GPT2, "CTRL": CTRL, "OpenAIGPT": OPENAI, "CodeGen": CODEGEN}


@pytest.mark.parametrize("kind", LONG)
def test_the_longest_input_is_known_by_any_name(kind: str, tmp_path: Path) -> None:
    assert longest(discover.build(positions(tmp_path / kind, kind, **LONG[kind]), torch.float32)) == 48


@pytest.mark.parametrize("kind", ["GPTBigCode", "CodeGen"])
def test_calibration_is_cut_to_it(kind: str, tmp_path: Path, text_file: Path) -> None:
    model = positions(tmp_path / kind, kind, **LONG[kind])
    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(text=str(text_file), samples=2, seqlen=512))
    assert job.plan(str(model), recipe).ids.shape == (2, 48)


def test_a_length_that_the_config_does_not_tell_is_found_out(tmp_path: Path) -> None:
    """Whisper's decoder has 64 positions, in a config that calls them targets: refused, and checked by fewer tokens."""
    sizes = {"d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
    more = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "max_target_positions": 64}
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "decoder_start")}
    model = positions(tmp_path / "m", "Whisper", **sizes, **more, **special)
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32))
    assert job.plan(str(model), recipe).ids.shape == (1, 64)
    refused(
        lambda: job.plan(str(model), Recipe(scheme=Scheme(4, 32)), ids=torch.zeros(1, 65, dtype=torch.long)),
        "the model fails on windows of 65 tokens",
        "give a smaller --seqlen",
    )


def test_the_window_of_a_run_without_calibration_is_no_longer_than_asked(tiny_model: Path) -> None:
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32), calibration=Calibration(seqlen=24))
    assert job.plan(str(tiny_model), recipe).ids.shape == (1, 24)


MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}
GPTJ = {"n_positions": 48, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 128}
INSIDE = {"Mpt": MPT, "GPTJ": GPTJ, "CodeGen": CODEGEN}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_limit_inside_the_blocks_is_found(kind: str, tmp_path: Path) -> None:
    """A bias or a table of rotations of fixed length, which only the blocks use."""
    model = positions(tmp_path / "m", kind, **INSIDE[kind])
    recipe = Recipe(scheme=Scheme(4, 32), methods=("rtn",))
    # Without calibration, the window that checks the blocks is as long as they take.
    assert job.plan(str(model), recipe).ids.shape == (1, 48 if kind != "Mpt" else 32)
    built = discover.build(model, torch.float32)
    structure = discover.find(built)
    check_length(model, built, structure, 48)
    refused(lambda: check_length(model, built, structure, 49), "windows of 49 tokens", "give a smaller --seqlen")


def test_the_config_of_mpt_does_not_tell(tmp_path: Path, text_file: Path) -> None:
    model = positions(tmp_path / "m", "Mpt", **MPT)
    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(text=str(text_file), samples=2, seqlen=96))
    said = refused(lambda: job.plan(str(model), recipe), f"{model}: the model fails on windows of 96 tokens")
    assert said.endswith("give a smaller --seqlen")


class Limited(nn.Module):
    """A block that fails over a length."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.limit = limit

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] > self.limit:
            raise ValueError(f"{hidden.shape[1]} tokens\nare too many")
        return hidden + self.proj(hidden)


class Model(nn.Module):
    def __init__(self, limits: list[int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.blocks = nn.ModuleList(Limited(limit) for limit in limits)
        self.config = type("Config", (), {"get_text_config": lambda self: self, "to_dict": dict, "attribute_map": {}})()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Odd(Limited):
    """A block of another kind."""


def test_each_kind_of_block_is_tried() -> None:
    model = Model([1000, 1000])
    model.blocks.append(Odd(100))
    structure = discover.find(model)
    check_length(Path("m"), model, structure, 100)
    refused(lambda: check_length(Path("m"), model, structure, 101), "m: the model fails on windows of 101 tokens")
    assert tokens_to_check(Path("m"), Recipe(), model, structure) == 64
    assert [p.device.type for p in model.parameters()] == ["cpu"] * 7 and model.embed.weight.any()


class Hands(Limited):
    """A block that hands numbers on to the next."""

    def forward(self, hidden: Tensor, got: Tensor | None = None) -> Any:
        out = super().forward(hidden)
        return out, torch.arange(hidden.shape[1] * 3, dtype=torch.int32) if got is None else got


class Hand(Model):
    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        hidden, got = self.embed(input_ids), None
        for block in self.blocks:
            hidden, got = block(hidden, got)
        return hidden


def test_the_bytes_between_blocks_are_known_at_full_length() -> None:
    model = Model([1000, 1000])
    assert check_length(Path("m"), model, discover.find(model), 100) == 100 * 64 * 4
    model = Hand([])
    model.blocks = nn.ModuleList(Hands(1000) for _ in range(2))
    assert check_length(Path("m"), model, discover.find(model), 100) == 100 * (64 + 3) * 4


def test_the_tokens_that_attention_chose_count(tmp_path: Path) -> None:
    """Of 24 tokens each block chooses 16, as int32."""
    tiny.config("glm_moe_dsa").save_pretrained(tmp_path)
    model = discover.build(tmp_path, torch.bfloat16)
    assert check_length(tmp_path, model, discover.find(model), 24) == 24 * (64 * 2 + 16 * 4)


def test_keys_and_values_that_are_left_for_later_blocks_count(tmp_path: Path) -> None:
    """Of two kinds of attention, two heads of 16 each; hidden states have four streams."""
    tiny.config("gemma3n_text").save_pretrained(tmp_path)
    model = discover.build(tmp_path, torch.bfloat16)
    numbers = 4 * 64 + 2 * 2 * (2 * 16)
    assert check_length(tmp_path, model, discover.find(model), 24) == 24 * 2 * numbers


class Asks(Limited):
    """A block whose way depends on its numbers, which a run without arithmetic does not have."""

    def forward(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)
        return out if float((self.proj(hidden).exp()).mean()) >= 1 else out[:, :, :3]


def test_what_cannot_run_without_arithmetic_is_not_refused_but_what_lies_before_it_is_checked() -> None:
    model = Model([1000])
    model.blocks = nn.ModuleList([Asks(1000)])
    nn.init.zeros_(model.blocks[0].proj.bias)  # type: ignore[union-attr,arg-type]
    structure = discover.find(model)
    check_length(Path("m"), model, structure, 200)

    class Short(nn.Embedding):
        def forward(self, input_ids: Tensor) -> Tensor:
            if input_ids.shape[1] > 150:
                raise IndexError("too long")
            return super().forward(input_ids)

    model.embed = Short(300, 64)
    check_length(Path("m"), model, structure, 150)
    refused(lambda: check_length(Path("m"), model, structure, 151), "IndexError: too long", "--seqlen")


KINDS = [
    "bamba",
    "bloom",
    "codegen",
    "cohere2",
    "falcon",
    "gemma3n_text",
    "gemma4_text",
    "gptj",
    "mamba2",
    "mpt",
    "mvp",
    "qwen3_5_text",
    "recurrent_gemma",
    "xlnet",
    "xlstm",
    "xmod",
    "youtu",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_that_of_the_model_itself(kind: str, tmp_path: Path) -> None:
    """Types with views, masks, lookups and scans of many sorts: nothing is refused that runs, or passes that fails."""
    model = tiny.model(kind)
    for part in discover._nested(model.config):
        part._experts_implementation = "eager"
    structure = discover.find(model)
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    for tokens in (40, 300):
        try:
            recording = record(model, blocks, [torch.zeros(1, tokens, dtype=torch.long)])
            for block, call in zip(blocks, recording.sampled(), strict=True):
                with torch.no_grad():
                    call.run(block, recording.hidden[0])
        except Exception as error:  # of the model's code
            refused(lambda: check_length(tmp_path, model, structure, tokens), type(error).__name__)  # noqa: B023
        else:
            check_length(tmp_path, model, structure, tokens)


class Remembers(Limited):
    """A block that makes its tables when it first sees their length, as code of old checkpoints does."""

    def __init__(self) -> None:
        super().__init__(1000)
        self.register_buffer("cosines", torch.ones(8, 64), persistent=False)
        self.tables: dict[int, Tensor] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        if tokens > len(self.cosines):
            self.cosines = (torch.arange(tokens)[:, None] * torch.ones(64)).cos()
        self.tables.setdefault(tokens, self.cosines[:tokens] * 2)
        return super().forward(hidden * self.tables[tokens])


def test_what_a_block_remembers_is_not_touched() -> None:
    """Tables made without arithmetic are zeros: they must not be those of the run that quantizes."""
    model = Model([1000])
    model.blocks = nn.ModuleList([Remembers(), Remembers()])
    structure, ids = discover.find(model), torch.arange(200)[None]
    check_length(Path("m"), model, structure, 200)
    block: Any = model.blocks[0]
    assert len(block.cosines) == 8 and 200 not in block.tables
    after, fresh = model(ids), model.blocks
    model.blocks = nn.ModuleList([Remembers(), Remembers()])
    model.blocks.load_state_dict(fresh.state_dict())
    assert torch.equal(after, model(ids)) and after.isfinite().all()
