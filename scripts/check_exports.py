"""Exports run where they are meant to: GGUF files in llama.cpp, MLX folders in mlx-lm, on this machine's CPU.

    python scripts/check_exports.py gguf                      tiny random models of many architectures, the demo
    python scripts/check_exports.py kl MODEL CALIBRATION.txt HELDOUT.txt
                                                              ours against llama.cpp's own quantization, by KL
    python scripts/check_exports.py mlx                       MLX folders of tiny random models in mlx-lm

The environments are made in --folder (default build/exports) and kept. `gguf` compares log-probabilities of tokens with
those of the dequantized weights, in float32, in transformers; llama.cpp rounds inputs to 8 bits beside quantized
weights, so the same weights are run unquantized too. transformers' own reader of GGUF files must give equal logits, and
so must mlx-lm.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from exports_environment import beside, llama, mlx
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.errors import LlmqError
from llmq.export import converter
from llmq.export.folder import QuantizedFolder
from llmq.export.gguf import Exported, export_gguf, write_dense
from llmq.export.rewrite import rewrite
from llmq.export.rows import RowIndex
from llmq.formats.gguf import file
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.recipe import presets
from llmq.recipe.recipe import Calibration, Recipe

WORKER, MLX_WORKER = (Path(__file__).with_name(f"exports_{name}.py") for name in ("llama", "mlx"))
DEMO = Path(llmq.__file__).parent / "demo"
TINY: dict[str, dict[str, Any]] = {
    "llama": {}, "tied": {"tie_word_embeddings": True}, "mistral": {}, "qwen3": {"head_dim": 64},
    "phi3": {"pad_token_id": 0}, "olmo2": {}, "starcoder2": {},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
                  "norm_topk_prob": True},
}  # fmt: skip
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
MADE_AS = {"tied": "llama"}
SENTENCES = ("phi3",)
"""Architectures whose tokenizer the converter knows as SentencePiece's only."""
FOUR = Scheme(4, 32)
CASES: list[tuple[str, Scheme, dict[str, Any]]] = [
    *((name, FOUR, {}) for name in ("demo", *TINY)),
    ("llama", Scheme(4, 32, False), {}),
    ("llama", Scheme(5, None), {}),
    ("llama", Scheme(8, 32), {}),
    ("llama", Scheme(3, 64), {}),
    ("llama", Scheme(2, 64), {}),
    ("llama", Scheme(2, 256, grid="ternary"), {}),
    ("llama", Scheme(2, 256, grid="ternary"), {"prefer": "tq2_0"}),
    ("llama", Scheme(4, 32, grid="mxfp4"), {}),
    ("llama", Scheme(4, 16, grid="nvfp4"), {}),
    *(("llama", changed_scheme({"grid": f"q{bits}_k"}, FOUR, ""), {}) for bits in (2, 3, 4, 5, 6)),
    ("demo", changed_scheme({"grid": "q4_k"}, FOUR, ""), {}),
    ("llama", FOUR, {"embedding": "q8_0"}),
]
MLX_CASES: list[tuple[str, Scheme, dict[str, Any]]] = [
    *(("llama", Scheme(bits, 64), {}) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(("llama", Scheme(4, group), {}) for group in (32, 128, None)),
    ("llama", Scheme(4, 64), {"overrides": (("*.down_proj", Scheme(8, 32)),)}),
    ("llama", Scheme(4, 64, False), {}),
    ("llama", Scheme(4, 32, grid="mxfp4"), {}),
    ("tied", Scheme(4, 64), {}),
    *((name, Scheme(4, 64), {}) for name in ("demo", "mistral", "qwen3", "phi3", "olmo2", "starcoder2")),
]
ROWS, TOKENS = 2, 96
OWN = (
    ("Q4_0", "q4_0"),
    ("Q4_1", "q4_1"),
    ("Q5_0", "q5_0"),
    ("Q8_0", "q8_0"),
    ("Q4_K_M", None),
    ("Q3_K_M", None),
    ("Q2_K", "q2_0"),
    ("Q6_K pure", "q6_k"),
    ("Q5_K_S pure", "q5_k"),
    ("Q4_K_S pure", "q4_k"),
    ("Q3_K_S pure", "q3_k"),
    ("Q2_K pure", "q2_k"),
)
"""llama.cpp's types, and the preset of ours that is told beside them."""
WINDOWS, WINDOW = 24, 256
DEQUANTIZED = "ALL_F32"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def main() -> None:
    """Parse, make the environments, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gguf", "kl", "mlx"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("build/exports"))
    parser.add_argument("--only", help="cases whose line begins so")
    args = parser.parse_args()
    # For the processes that run the converter, and for transformers' reader here.
    path = beside(args.folder)
    os.environ["PYTHONPATH"] = path
    sys.path += path.split(os.pathsep)
    torch.set_num_threads(1)
    if args.what == "mlx":
        check_mlx(mlx(args.folder), args.only)
        return
    python, source = llama(args.folder)
    if args.what == "gguf":
        check_gguf(python, source, args.only)
    else:
        check_divergence(python, source, args.folder / "kl", args.model, *args.texts)


def check_gguf(python: Path, source: Path, only: str | None) -> None:
    """A line for each case."""
    print("| model | scheme | written as | differs by | rms in llama.cpp | its own file | unquantized | transformers |")
    print("|---|---|---|---|---|---|---|---|")
    for name, scheme, options in CASES:
        told = " ".join([str(scheme), *(f"--{key} {value}" for key, value in options.items())])
        if only is None or f"{name} {told}".startswith(only):
            with tempfile.TemporaryDirectory() as inside:
                cells = one_gguf(python, source, Path(inside), name, scheme, options)
            print(f"| {name} | {told} | " + " | ".join(cells) + " |", flush=True)


def one_gguf(
    python: Path, source: Path, inside: Path, name: str, scheme: Scheme, options: dict[str, Any]
) -> Iterable[str]:
    """What came of one case."""
    base = DEMO if name == "demo" else tiny(inside / name, name)
    folder = inside / "quantized"
    try:
        llmq.quantize(str(base), folder, Recipe(("rtn",), scheme, calibration=Calibration("demo", 1, 64)))
        done = export_gguf(folder, inside / "made.gguf", llama_cpp=source, **options)
    except LlmqError as error:
        return (str(error),)
    dense = inside / "dense"
    ids, logits = reference(folder, dense)
    converter.convert(converter.find(source), dense, inside / "dense.gguf", torch.float32, converter.splitting(dense))
    known = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    np.savez(inside / "reference.npz", tokens=ids.numpy(), logprob=known.numpy())
    ran = [distance(python, inside / "reference.npz", inside / name) for name in ("made.gguf", "dense.gguf")]
    read = by_transformers(inside / "made.gguf", ids, logits)
    if not read[0].isdigit():
        # Whether it would read the converter's own file.
        other = by_transformers(inside / "dense.gguf", ids, logits)
        read = "fails on llama.cpp's own file too" if other == read else read
    own = floor(python, inside, kinds(done).partition(",")[0], inside / "reference.npz")
    return (kinds(done), worst(done), ran[0], own, ran[1], read)


def distance(python: Path, reference: Path, path: Path) -> str:
    """The rms between the log-probabilities that a GGUF file has in llama.cpp and the reference's, of its tokens."""
    found = [*run(python, "compare", reference, path)]
    return found[0].get("refused") or f"{found[0]['rms']:.4f}" if found else "died"


def floor(python: Path, inside: Path, kind: str, tokens: Path) -> str:
    """The same distance between the file that llama.cpp itself makes of the same weights in the same type, and its
    dequantized weights, both in llama.cpp: what rounding inputs costs there."""
    own, plain = inside / "own.gguf", inside / "own-plain.gguf"
    small = "_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else ""
    for source, made, to in ((inside / "dense.gguf", own, f"{kind}{small} pure"), (own, plain, DEQUANTIZED)):
        found = [*run(python, "quantize", source, made, to)]
        if not found or found[0]["failed"]:
            return "makes none"
    [*run(python, "refer", plain, tokens)]
    return distance(python, tokens, own)


def check_mlx(python: Path, only: str | None) -> None:
    """A line for each case."""
    print("| model | scheme | weights differ by | logits differ by | unquantized there | their standard deviation |")
    print("|---|---|---|---|---|---|")
    for name, scheme, options in MLX_CASES:
        told = f"{scheme}{', others by name' if options else ''}"
        if only is not None and not f"{name} {told}".startswith(only):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            inside = Path(temporary)
            base = DEMO if name == "demo" else tiny(inside / name, name)
            recipe = Recipe(("rtn",), scheme, calibration=Calibration("demo", 1, 64), **options)
            llmq.quantize(str(base), inside / "quantized", recipe)
            done = rewrite(inside / "quantized", inside / "mlx", "mlx")
            ids, logits = reference(inside / "quantized", inside / "dense")
            np.savez(inside / "reference.npz", tokens=ids.numpy(), logits=logits.numpy())
            found = [*run(python, inside / "reference.npz", inside / "mlx", inside / "dense", worker=MLX_WORKER)]
        ran = [line.get("refused") or f"{line['away']:.1g}" for line in found] or ["died"]
        cells = [name, told, f"{done.worst:.1g}", *(ran * 2)[:2], f"{logits.std():.2g}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def reference(quantized: Path, dense: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits of a folder's dequantized weights, which are written to `dense`, both in float32."""
    opened = QuantizedFolder(quantized)
    opened.dtype = torch.float32
    write_dense(opened, dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    ids = tokens(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        return ids, model(ids).logits.float()


def tiny(folder: Path, kind: str) -> Path:
    """A random model of two layers, wide enough that its logits are far from even, with the demo's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = AutoConfig.for_model(
        MADE_AS.get(kind, kind), **(SIZES | TINY[kind]), vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    config.initializer_range = 0.1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind in SENTENCES:
        sentences(folder, len(tokenizer))
    return folder


def sentences(folder: Path, vocabulary: int) -> None:
    """Put a SentencePiece model in the place of a tokenizer."""
    import sentencepiece

    for known in folder.glob("tokenizer*"):
        known.unlink()
    text = folder / "text"
    text.write_text(inspect.getsource(inspect) + inspect.getsource(argparse) + inspect.getsource(subprocess))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocabulary, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()


def tokens(vocabulary: int) -> torch.Tensor:
    """Token ids [ROWS, TOKENS] of a text, as the demo's tokenizer has them."""
    ids = AutoTokenizer.from_pretrained(DEMO)(inspect.getsource(inspect), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: ROWS * TOKENS]).view(ROWS, TOKENS) % vocabulary


def run(python: Path, *arguments: object, worker: Path = WORKER) -> Iterator[dict[str, Any]]:
    """The answers of a process with llama.cpp, or with mlx-lm."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(worker), *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
        said = process.stderr.read()
        if process.wait():
            print(said[-2000:], file=sys.stderr)


def kinds(done: Exported) -> str:
    """The types of the file's matrices, most frequent first."""
    return ", ".join(kind for kind, _ in Counter(row.kind for row in done.rows if len(row.shape) > 1).most_common())


def worst(done: Exported) -> str:
    """The largest difference of a quantized tensor."""
    largest = max(row.worst for row in done.rows)
    return f"{largest:.1g} of the largest number" if largest else "nowhere"


def by_transformers(path: Path, ids: torch.Tensor, logits: torch.Tensor) -> str:
    """The largest difference of logits, by transformers' own reader of GGUF files."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        with torch.no_grad():
            away = float((model(ids).logits.float() - logits).abs().amax())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return f"{away:.1g}"


def check_divergence(python: Path, source: Path, folder: Path, model: Path, calibration: Path, heldout: Path) -> None:
    """Our presets and llmq's defaults against llama.cpp's own quantization, on the same text."""
    folder.mkdir(parents=True, exist_ok=True)
    base, importance = folder / "base.gguf", folder / "importance.npz"
    if not importance.exists():
        converter.convert(converter.find(source), model, base, torch.bfloat16, converter.splitting(model))
        np.savez(importance, **importances(model, base, calibration))
    files = []
    for kind, preset in OWN:
        for given in ((), (importance,)):
            made = folder / f"llama.cpp {kind}{' with importance' if given else ''}.gguf"
            if not made.exists():
                [*run(python, "quantize", base, made, kind, *given)]
            files.append(made)
        if preset is not None:
            files.append(ours(source, folder, model, calibration, preset))
    text = AutoTokenizer.from_pretrained(model)(heldout.read_text()[: 8 * WINDOWS * WINDOW], add_special_tokens=False)
    np.savez(folder / "heldout.npz", tokens=np.array(text["input_ids"][: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW))
    print("| file | bytes | KL | nll |")
    print("|---|---|---|---|")
    for line in run(python, "divergence", base, folder / "heldout.npz", *files):
        print(f"| {line['file']} | {line['nbytes']:,} | {line.get('kl', 0.0):.5f} | {line['nll']:.4f} |", flush=True)


def ours(source: Path, folder: Path, model: Path, calibration: Path, preset: str) -> Path:
    """A model quantized by a preset and exported."""
    out, quantized = folder / f"llmq gguf-{preset}.gguf", folder / f"gguf-{preset}"
    if not out.exists():
        text = Calibration(str(calibration), 128, 512)
        made = (
            presets.recipe(f"gguf-{preset}")
            if f"gguf-{preset}" in presets.names()
            else Recipe(("gptq",), Scheme(4, 32, False))
        )
        llmq.quantize(str(model), quantized, Recipe(made.methods, made.scheme, calibration=text))
        export_gguf(quantized, out, llama_cpp=source)
    return out


def importances(model: Path, base: Path, calibration: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Mean squares of the inputs of each tensor of a GGUF file, as llama.cpp's imatrix program collects them."""
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = {name: part for name, part in opened.named_modules() if isinstance(part, torch.nn.Linear)}
    sums: dict[str, torch.Tensor] = {}
    index = RowIndex()
    for name, layer in layers.items():
        index.add(layer.weight.detach().to(torch.bfloat16))

        def hook(_: Any, given: tuple[torch.Tensor], name: str = name) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + given[0].double().flatten(0, -2).square().sum(0)

        layer.register_forward_pre_hook(hook)
    ids = AutoTokenizer.from_pretrained(model)(calibration.read_text()[: 8 * 128 * 512], add_special_tokens=False)
    rows = torch.tensor(ids["input_ids"][: 128 * 512]).view(128, 512)
    with torch.no_grad():
        for row in rows:
            opened(row[None])
    found, names, contents = {}, [*layers], file.read(base)
    for held in contents.tensors:
        if len(held.shape) == 2 and (places := index.find(contents.read(held))) is not None:
            found[held.name] = (sums[names[int(places.weights[0])]] / rows.numel()).float().numpy()
    return found


if __name__ == "__main__":
    main()
