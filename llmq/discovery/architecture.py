"""Which class of transformers opens a checkpoint as a model that generates text, or why none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

ONLY = "and llmq quantizes models that generate text only (those that AutoModelForCausalLM opens, or with images)"

CALIBRATED = "and llmq calibrates and measures models that generate text only"


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
    return next((kind for kind in named if generates(kind) and not config.is_encoder_decoder), auto)


def beside_decoder(model: nn.Module) -> list[str]:
    """The linear layers of a model that are neither in its decoder nor its output embedding: those of its towers."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    within = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [] if decoder is None else [name for name, module in linears.items() if id(module) not in within]


def in_towers(model: nn.Module) -> list[str]:
    """Those of `beside_decoder` if the configuration has that of a text model beside others, else none.

    Models of text alone may have a layer beside their decoder, too, between it and the output embedding.
    """
    config: Any = model.config
    return [] if config.get_text_config() is config else beside_decoder(model)


def text_part(model: nn.Module) -> str | None:
    """The path of the largest part of a model that generates text by itself, if there is one beside the model."""
    parts = {name: part for name, part in model.named_modules() if name and generates(type(part))}
    return max(parts, key=lambda name: sum(p.numel() for p in parts[name].parameters()), default=None)


def generates(kind: Any) -> bool:
    """Whether something is a class of models that generate."""
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
        own = _own_class(config)
        if own is None or kind in CAUSAL:
            return None
        return f"its own code opens it by {own} only, {CALIBRATED}: --class {own} --method rtn (or hqq) quantizes it"
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
        told = f"config.json says that it is {named[0]}, which is no causal language model"
    elif kind not in CAUSAL and not (named and (kind in IMAGES or kind in OTHERS)):
        told = f"a model of type {kind!r} is no causal language model"
    elif kind not in CAUSAL and not any(generates(getattr(transformers, name, None)) for name in named):
        told = f"config.json says that it is {named[0]}, which generates no text"
    elif config.get("is_encoder_decoder"):
        told = f"config.json says that {named[0] if named else kind} has an encoder before its decoder"
    else:
        return None
    if name := suggested(config):
        return f"{told}, {CALIBRATED}: --class {name} --method rtn (or hqq) quantizes it without calibration"
    return f"{told}, {ONLY}: give the causal model that it was made from, if there is one"


def opener(config: Any) -> Any:
    """The class whose `from_pretrained` opens all of a checkpoint with this config (of transformers), whatever it does:
    the one that the config names, if transformers has it, else `generator`."""
    import transformers

    if getattr(config, "auto_map", None):
        own, causal = _own_class(vars(config)), generator(config)
        return causal if own is None or type(config) in causal._model_mapping else getattr(transformers, own)
    named = [getattr(transformers, str(name), None) for name in config.architectures or []]
    kinds = (kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel))
    return next(kinds, generator(config))


def _own_class(config: Mapping[str, Any]) -> str | None:
    """The first auto class that opens a model by its folder's own code, unless AutoModelForCausalLM does."""
    import transformers

    told = config.get("auto_map")
    names = list(told) if isinstance(told, dict) else []
    opens = [name for name in names if hasattr(getattr(transformers, name, None), "_model_mapping")]
    return None if "AutoModelForCausalLM" in opens else next(iter(opens), None)


def suggested(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that opens the model of a config.json: an auto class, if one opens the class that the
    config names, else that class; None if transformers has none."""
    import transformers
    from transformers.models.auto import modeling_auto

    named, kind = config.get("architectures"), str(config.get("model_type"))
    usual = modeling_auto.MODEL_MAPPING_NAMES.get(kind, "")
    first = str(named[0]) if isinstance(named, list) and named else usual if isinstance(usual, str) else usual[0]
    found = []
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if not name.startswith("Auto") or mapping is None:
            continue
        classes = mapping._model_mapping.get(kind, ())
        if first in ((classes,) if isinstance(classes, str) else classes):
            found.append(name)
    # A class with all of a model's heads for training opens most models, and says the least.
    of_two = bool(config.get("is_encoder_decoder"))
    found.sort(key=lambda name: (name.endswith("PreTraining"), of_two and "Seq2Seq" not in name))
    return next(iter(found), first if hasattr(transformers, first) else None)
