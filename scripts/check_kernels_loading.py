"""Check folders of any tool on llmq's kernels against a dense model from decoders that share no code with llmq.

    python scripts/check_kernels_loading.py FOLDER …  [--decoders ../shared/peers/decode_check.py] [--json OUT]

Each folder is loaded by stock from_pretrained after llmq.use_kernels(), in float32 and in bfloat16, and run on fixed
random tokens; the dense model is the same architecture, filled with the decoded weights. Prints a table; exits 1 if
logits differ by more than 1e-4 (float32) or 1e-2 (bfloat16; W8A8: 2e-2), as a ratio of root mean squares, or if weights
in memory are larger than packed. For comparison, the table has the difference of the dense model between bfloat16 and
float32: sums in another order differ by about as much.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import llmq

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def stream(decoders: Any, words: Tensor, bits: int, n: int) -> Tensor:
    """Unsigned values of a dense bit stream along the last dimension, by the decoders' own routine."""
    values: Tensor = decoders.bits_le(words, bits, n)
    return values


def gptq(decoders: Any, t: dict[str, Tensor], bits: int, offset: int) -> Tensor:
    """As decode_check.gptq, which is for 4 bits, for every bit width."""
    width, rows = t["qweight"].shape[0] * 32 // bits, t["qweight"].shape[1]
    q = stream(decoders, t["qweight"].T, bits, width).T
    zero = (stream(decoders, t["qzeros"], bits, rows) + offset) % (1 << bits)
    group = t["g_idx"].long() if "g_idx" in t else torch.arange(width) // (width // zero.shape[0])
    return ((q - zero[group]) * t["scales"].float()[group]).T


def codebook(t: dict[str, Tensor]) -> Tensor:
    """As decode_check.nf4, for FP4 too, without double quantization."""
    state = json.loads(bytes(next(v for k, v in t.items() if "quant_state" in k).tolist()))
    packed = t["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
    return (t["weight.quant_map"][codes].view(-1, state["blocksize"]) * t["weight.absmax"][:, None]).view(
        state["shape"]
    )


def round_inputs(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """int8 per token as compressed-tensors rounds: the scale is the largest magnitude / 127.5."""
    (x,) = args
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return ((x / scale).clamp(-128, 127).round() * scale,)


def decoded(folder: Path, decoders: Any) -> tuple[dict[str, Tensor], int, str]:
    """All tensors of the dense model, the bytes of the quantized weights on disk, and the format's name."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = quantization.get("quant_method", "bitsandbytes")
    tensors = stored(folder)
    marks = {"compressed-tensors": "weight_packed", "bitsandbytes": "weight.absmax"}
    eight = quantization.get("format") == "int-quantized"
    mark = ".weight_scale" if eight else "." + marks.get(method, "qweight")
    stems = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    dense, packed = dict(tensors), 0
    for stem in stems:
        own = {name: dense.pop(name) for name in list(dense) if name.startswith(f"{stem}.")}
        packed += sum(t.numel() * t.element_size() for t in own.values())
        t = {name.removeprefix(f"{stem}."): tensor for name, tensor in own.items()}
        if eight:
            weight, kind = decoders.naive(str(folder), stem), "W8A8"
        elif method == "compressed-tensors":
            bits = next(iter(quantization["config_groups"].values()))["weights"]["num_bits"]
            weight, kind = decoders.ct(str(folder), stem, bits), "compressed-tensors"
        elif method == "bitsandbytes":
            fp4 = quantization["bnb_4bit_quant_type"] == "fp4"
            weight, kind = codebook(t) if fp4 else decoders.nf4(str(folder), stem), "bitsandbytes"
        elif quantization.get("version") == "gemm" or "awq" in str(quantization.get("packing_format")):
            weight, kind = decoders.awq(str(folder), stem), "awq"
        else:
            form = str(quantization.get("packing_format", quantization.get("checkpoint_format", "gptq")))
            form = {"auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2"}.get(form, form)
            weight, kind = gptq(decoders, t, quantization["bits"], 0 if form.endswith("v2") else 1), form
        dense[f"{stem}.weight"] = weight
        if "bias" in t:
            dense[f"{stem}.bias"] = t["bias"]
    return dense, packed, kind if stems else "none"


def dense_model(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, rounds: bool) -> Any:
    """The folder's architecture in `dtype`, filled with these tensors; rounds: round activations to int8."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, strict=False)
    model.tie_weights()
    for name, module in model.named_modules():
        if rounds and isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(round_inputs)
    tied = set(model.all_tied_weights_keys)
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder}: the dense model lacks {missing[:3]} or does not know {unexpected[:3]}")
    return model


def row(folder: Path, decoders: Any) -> dict[str, Any]:
    """One row of the table."""
    tensors, on_disk, kind = decoded(folder, decoders)
    result: dict[str, Any] = {"folder": folder.name, "format": kind, "on_disk": on_disk}
    tokens = torch.randint(4, 200, (2, 48), generator=torch.Generator().manual_seed(0))
    exact = None
    for dtype in LIMITS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
        layers = [m for m in model.modules() if isinstance(m, llmq.QuantLinear)]
        with torch.inference_mode():
            found = model(tokens).logits.float()
            wanted = dense_model(folder, tensors, dtype, kind == "W8A8")(tokens).logits.float()
        result[str(dtype)] = float((found - wanted).norm() / wanted.norm())
        result[f"max {dtype}"] = float((found - wanted).abs().max() / wanted.abs().max())
        exact = wanted if exact is None else exact
        result["noise"] = float((wanted - exact).norm() / exact.norm())
        result["layouts"] = ", ".join(f"{n} {name}" for name, n in Counter(m.layout for m in layers).items())
        kinds = {m.layout for m in layers}
        result["packed"] = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    # With rounded activations, the last bit of a sum can change a code, which is a visible difference.
    worst = [result[str(dtype)] <= (2e-2 if kind == "W8A8" else limit) for dtype, limit in LIMITS.items()]
    # int4pack stores 2 and 3 bits as 4, and a zero point with each scale.
    result["ok"] = all(worst) and bool(layers) and result["packed"] <= (2.2 if "int4pack" in kinds else 1.1) * on_disk
    return result


def main() -> int:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    default = Path(__file__).resolve().parents[2] / "shared" / "peers" / "decode_check.py"
    parser.add_argument("--decoders", type=Path, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("decoders", options.decoders)
    assert spec is not None and spec.loader is not None
    decoders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoders)
    llmq.use_kernels()
    rows = []
    titles = f"{'fp32':>8} {'bf16':>8} {'(noise)':>8} {'packed':>11} {'on disk':>11}"
    print(f"{'folder':28} {'format':18} {'layouts':14} {titles}")
    for folder in options.folders:
        r = row(folder, decoders)
        rows.append(r)
        figures = f"{r['torch.float32']:8.1e} {r['torch.bfloat16']:8.1e} {r['noise']:8.1e}"
        figures += f" {r['packed']:11,} {r['on_disk']:11,}"
        print(
            f"{r['folder']:28} {r['format']:18} {r['layouts']:14} {figures} {'' if r['ok'] else 'FAILED'}", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
