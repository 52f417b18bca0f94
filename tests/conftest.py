"""What the tests share: a tiny random model with a byte-level tokenizer, a text, a way to call the command line."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from typer.testing import CliRunner

from tests.forked import Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU, Triton's kernels run in its interpreter; triton looks for this once, and whatever is collected first
# may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What is made for a module or the session is made before `one_thread` is asked for.
torch.set_num_threads(1)
# How long an example takes says nothing of the code on a busy machine.
settings.register_profile("llmq", deadline=None)
settings.load_profile("llmq")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
newer_transformers = pytest.mark.skipif(
    version("transformers").startswith("5.16."),
    reason="transformers 5.16 and compressed-tensors of its time do otherwise with such a folder, or fail on it",
)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew", "potions")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_tiny_model(
    folder: Path, *, layers: int = 3, shard: str = "200GB", dtype: str = "float32", **changes: int
) -> Path:
    """A random decoder of a few hundred kilobytes, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **(sizes | changes),
        num_hidden_layers=layers,
        vocab_size=256,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on models this small, and much more where tests share the processor."""

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws random numbers without a seed of its own draws the same ones in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds, or leaves, results of `llmq eval` where a user keeps them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model folder; do not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some words: 40 kB of text."""
    import random

    rng = random.Random(0)
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(600)))
    return file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, which say how long they take, so that none is left over when all others are done."""
    items.sort(key=lambda item: -max((sum(mark.args) for mark in item.iter_markers("slow")), default=0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: to look through it takes each collection of garbage up to a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """At its end, Python takes everything down, as ever."""
    gc.unfreeze()


Run = Callable[..., "Done"]


@dataclass
class Done:
    """What a call of the command line came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def llmq() -> Run:
    """Call the command line in this process: llmq('quantize', 'demo', …). An unforeseen exception is a traceback."""

    def run(*args: object) -> Done:
        from llmq.cli.app import app

        result = CliRunner().invoke(app, [str(a) for a in args])
        unforeseen = result.exception is not None and not isinstance(result.exception, SystemExit)
        trace = "".join(traceback.format_exception(result.exception)) if unforeseen else ""
        return Done(result.exit_code, result.stdout, result.stderr + trace)

    return run


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs the command line in processes of their own, which can be killed: forked.run('quantize', 'demo', …)."""
    server = Server(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()
