"""The class of transformers that loads a model: a language model, or one for text and images."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)


def class_of(config: Any, name: object) -> Any:
    """Return the automatic class of transformers that loads the model of a configuration.

    Messages call the model ``name``.

    Raises:
        ValueError: the model is an encoder-decoder, or has no class for generating text.
    """
    kind = type(config)
    classes = ", ".join(map(str, getattr(config, "architectures", None) or [config.model_type]))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder ({classes}), not a causal language model: give a model "
            "that has only a decoder"
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in _own_code(config):
        return AutoModelForCausalLM
    if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    raise ValueError(
        f"{name} is no causal language model ({classes}): transformers has no class that generates "
        "text with it"
    )


def _own_code(config: Any) -> dict[str, Any]:
    """Return the classes of the code that comes with a model, by the automatic class."""
    return getattr(config, "auto_map", None) or {}
