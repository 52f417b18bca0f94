"""The folders that check_vllm.py makes: models, recipes, and combinations of schemes for weights that vLLM fuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from vllm_vision import NEW_NAMES, VISION, write_vision

from llmq.checkpoint.hub import resolve
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe

BOOKS = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "books8m"
TINY = ("qwen3", "gemma3_text", "phi3", "gpt_neox", "olmo2")
MIXTURES = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
}
GROUPED = ("num_key_value_heads", "head_dim")
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.08,
}  # fmt: skip
W4, W8 = Scheme(4, 64), Scheme(8, 64)
W8A8 = Scheme(8, None, activations=Activations())
STATIC = Scheme(8, None, activations=Activations(dynamic=False))
FP8 = [Scheme(8, None, grid="fp8", activations=a) for a in (None, Activations(), Activations(dynamic=False))]
SMALL = [
    Scheme(4, 16, grid="nvfp4"),
    Scheme(4, 16, grid="nvfp4", activations=Activations(dynamic=False)),
    *(Scheme(bits, 32, grid=f"mxfp{bits}", activations=a) for bits in (4, 6, 8) for a in (None, Activations())),
    Scheme(4, 32, grid="mxfp4", activations=Activations(grid="fp8")),
    *(Scheme(8, 128, grid="fp8-block", activations=a) for a in (None, Activations())),
    Scheme(4, 128, activations=Activations(grid="fp8")),
    Scheme(3, None, grid="kmeans"),
]
VQ = Scheme(2, 8, grid="vq")
FEW = {
    "ternary g64": Scheme(2, 64, grid="ternary"),
    "binary g64": Scheme(2, 64, grid="binary"),
    "4-bit g64, pow2 scales": Scheme(4, 64, scales="pow2"),
}
FLOATS = [SMALL[0], SMALL[1], SMALL[2], SMALL[6], SMALL[7], SMALL[10]]
"""For experts."""
NF4 = [Scheme(4, 64, grid="nf4", double_quant=d) for d in (True, False)]


@dataclass(frozen=True)
class Case:
    """A folder to make. table: whether its row says what vLLM does with its scheme."""

    model: str
    name: str
    recipe: Recipe = field(repr=False)
    table: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.name}"

    @property
    def twin(self) -> bool:
        """Whether vLLM's numbers are compared with its own of the dequantized weights."""
        return self.model in MIXTURES or self.picture is not None

    @property
    def reads_pictures(self) -> bool:
        """Whether it is a vision-language model."""
        return self.model.removesuffix(NEW_NAMES) in VISION

    @property
    def picture(self) -> str | None:
        """A text with a place for a picture, for a model that vLLM reads pictures with."""
        told = VISION.get(self.model)
        return None if told is None else f"what is in {told.place}, and why?"

    @property
    def dtype(self) -> str:
        """What vLLM computes in: it refuses float16 for some types."""
        return "bfloat16" if self.model.startswith("gemma3") else "float16"


def model_folder(name: str, work: Path) -> Path:
    """demo, books8m, or a random model of a type, made once."""
    if name in TINY or name in MIXTURES:
        folder = work / name
        if not folder.exists():
            torch.manual_seed(0)
            # Types without grouped heads must not have these keys: vLLM takes them from any configuration.
            grouped = "num_key_value_heads" in CONFIG_MAPPING[name]().to_dict()
            sizes = {k: v for k, v in SIZES.items() if grouped or k not in GROUPED} | MIXTURES.get(name, {})
            config = CONFIG_MAPPING[name](**sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.to(torch.bfloat16).save_pretrained(folder)
        return folder
    if (kind := name.removesuffix(NEW_NAMES)) in VISION:
        folder = work / name
        return folder if folder.exists() else write_vision(kind, folder, old_names=kind == name)
    return BOOKS if name == "books8m" else resolve(name)


def recipe(scheme: Scheme = W4, methods: str = "rtn", **more: Any) -> Recipe:
    """A recipe that needs no text, if the methods need none."""
    return Recipe(methods=tuple(methods.split("+")), scheme=scheme, **more)


def cases() -> Iterator[Case]:
    """Every case. On demo all schemes; on books8m methods, mixtures and kept weights; on others a few schemes."""
    packed = [Scheme(b, g, s) for b, s, g in product(range(2, 9), (True, False), (32, 64, 128, None))]
    for scheme in [*packed, W8A8, STATIC, *FP8, *SMALL, *NF4]:
        yield Case("demo", str(scheme), recipe(scheme), table=True)
    yield Case("demo", str(VQ), recipe(VQ, "vq"), table=True)
    for name, scheme in FEW.items():
        yield Case("demo", name, recipe(scheme))
    mixtures = {
        "4-bit and 8-bit": {"overrides": (("mlp", W8),)},
        "4-bit and 4-bit channel": {"overrides": (("mlp", Scheme(4, None)),)},
        "4-bit and fp8 dynamic": {"overrides": (("down_proj", FP8[1]),)},
        "4-bit and W8A8": {"overrides": (("mlp", W8A8),)},
        "--keep o_proj": {"keep": ("o_proj",)},
        "--keep q, k, v": {"keep": ("q_proj", "k_proj", "v_proj")},
        "--keep layers.0": {"keep": ("layers.0",)},
    }
    for name, more in mixtures.items():
        yield Case("demo", name, recipe(W4, **more))
    if not BOOKS.exists():
        print(f"books8m is not in {BOOKS.parent}: its cases are left out")
    else:
        for methods in ("gptq", "awq", "hqq", "signround"):
            yield Case("books8m", methods, recipe(Scheme(4, 128), methods))
        yield Case("books8m", "gptq asymmetric", recipe(Scheme(4, 64, False), "gptq"))
        yield Case("books8m", "smoothquant W8A8", recipe(W8A8, "smoothquant"))
        yield Case("books8m", "static W8A8", recipe(STATIC))
        yield Case("books8m", "--keep layers.0", recipe(W4, keep=("layers.0",)))
    for model in TINY:
        yield Case(model, str(W4), recipe(W4))
        yield Case(model, str(Scheme(4, None, False)), recipe(Scheme(4, None, False)))
        yield Case(model, str(W8A8), recipe(W8A8))
        yield Case(model, str(Scheme(3, 128)), recipe(Scheme(3, 128)))
    wide = Scheme(4, 128)
    for model in MIXTURES:
        yield Case(model, str(wide), recipe(wide))
        yield Case(model, f"gptq {wide}", recipe(wide, "gptq"))
        yield Case(model, "attention 8-bit", recipe(wide, overrides=(("self_attn", Scheme(8, 128)),)))
        yield Case(model, "--keep self_attn", recipe(wide, keep=("self_attn",)))
        yield Case(model, "--keep experts", recipe(wide, keep=("experts",)))
        yield Case(model, str(W4), recipe(W4))
        for scheme in FLOATS:
            # The keys' and values' outputs are no whole blocks of 128.
            keep = ("self_attn",) if scheme.rules.rows > 1 else ()
            yield Case(model, str(scheme), recipe(scheme, loader="vllm", keep=keep))
    for model in VISION:
        yield Case(model, str(W4), recipe(W4))
    for scheme in (Scheme(4, 128, False), Scheme(3, 128), W8A8, FP8[1]):
        yield Case("llava", str(scheme), recipe(scheme))
    yield Case("llava", f"gptq {W4}", recipe(W4, "gptq"))
    yield Case("llava", "4-bit and 8-bit", recipe(W4, overrides=(("mlp", W8),)))
    yield Case("llava", "--keep layers.0", recipe(W4, keep=("layers.0",)))
    for model in ("llava", "qwen2_5_vl"):
        yield Case(f"{model}{NEW_NAMES}", str(W4), recipe(W4))


def fused_cases() -> Iterator[Case]:
    """Every combination of 4 and 8 bits, symmetric or not, and kept, of q, k, v, and of gate, up, on demo."""
    kinds = [*(Scheme(b, 64, s) for b, s in product((4, 8), (True, False))), None]
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for schemes in product(kinds, repeat=len(parts)):
            pairs = list(zip(parts, schemes, strict=True))
            changed = tuple((part, scheme) for part, scheme in pairs if scheme not in (None, W4))
            kept = tuple(part for part, scheme in pairs if scheme is None)
            name = ", ".join(f"{part.partition('_')[0]} {scheme or 'kept'}" for part, scheme in pairs)
            yield Case("demo", name, recipe(W4, overrides=changed, keep=kept))
