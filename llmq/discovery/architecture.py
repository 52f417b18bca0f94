"""Which class of transformers opens a checkpoint as a model that generates text, or why none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

ONLY = "and llmq quantizes models that generate text only (those that AutoModelForCausalLM opens, or with images)"


def generator(config: Any) -> Any:
    """The class whose `from_pretrained` opens a checkpoint with this config (of transformers) to generate text.

    AutoModelForCausalLM, which may open the text half of a checkpoint; or, if it knows no class for this type, the one
    that the config names, a vision-language model for example.
    """
    import transformers

    auto = transformers.AutoModelForCausalLM
    if type(config) in auto._model_mapping or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return auto
    named = [getattr(transformers, str(name), None) for name in config.architectures or []]
    return next((kind for kind in named if _generates(kind) and not config.is_encoder_decoder), auto)


def beside_decoder(model: nn.Module) -> list[str]:
    """The linear layers of a model that are neither in its decoder nor its output embedding: those of its towers."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    within = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [] if decoder is None else [name for name, module in linears.items() if id(module) not in within]


def text_part(model: nn.Module) -> str | None:
    """The path of the largest part of a model that generates text by itself, if there is one beside the model."""
    parts = {name: part for name, part in model.named_modules() if name and _generates(type(part))}
    return max(parts, key=lambda name: sum(p.numel() for p in parts[name].parameters()), default=None)


def _generates(kind: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.can_generate()


def not_causal(config: Mapping[str, Any]) -> str | None:
    """What the model of a config.json is instead, with the way out; None if it may be a causal language model.

    transformers is asked which classes and model types are causal; a config that names code of its own is not judged.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as OTHERS

    if config.get("_class_name") or config.get("_diffusers_version"):
        return f"it is a part of a diffusion pipeline ({config.get('_class_name', 'diffusers')}), {ONLY}"
    kind, classes = config.get("model_type"), config.get("architectures")
    if config.get("auto_map"):
        return None
    if not kind:
        return (
            "config.json has no model_type, so that nothing says what model it is: download the model's own config.json"
        )
    if kind not in CONFIG_MAPPING:
        return (
            f"transformers {transformers.__version__} has no model type {kind!r}: pip install -U transformers, or say "
            "--trust-remote-code where the folder has code of its own"
        )
    named = [str(name) for name in classes] if isinstance(classes, list) else []
    causal = {name for names in CAUSAL.values() for name in ([names] if isinstance(names, str) else names)}
    if named and not causal & {*named} and not {*IMAGES.values(), *OTHERS.values()} & {*named}:
        return (
            f"config.json says that it is {named[0]}, which is no causal language model, {ONLY}: give the causal model "
            "that it was made from, if there is one"
        )
    if kind not in CAUSAL and not (named and (kind in IMAGES or kind in OTHERS)):
        return f"a model of type {kind!r} is no causal language model, {ONLY}"
    if config.get("is_encoder_decoder"):
        return f"config.json says that {named[0]} has an encoder before its decoder, {ONLY}"
    return None
