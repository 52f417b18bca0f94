"""Why a model folder is not a causal language model that transformers can build, told by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ONLY = "and llmq quantizes causal language models only (those that AutoModelForCausalLM opens)"


def not_causal(config: Mapping[str, Any]) -> str | None:
    """What the model of a config.json is instead, with the way out; None if it may be a causal language model.

    transformers is asked which classes and model types are causal; a config that names code of its own is not judged.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

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
    if named and not causal & {*named} and not {*IMAGES.values()} & {*named}:
        return (
            f"config.json says that it is {named[0]}, which is no causal language model, {ONLY}: give the causal model "
            "that it was made from, if there is one"
        )
    if kind not in CAUSAL:
        return f"a model of type {kind!r} is no causal language model, {ONLY}"
    return None
