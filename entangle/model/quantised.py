"""Models whose files hold weights in a packed format, such as FP8 codes with scales.

Formats that transformers can turn into plain floats while it loads them are loaded as such, on
every device, so that they can be pruned and saved like any model.
"""

import re
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

_SCALE = re.compile(
    r"(weight_scale\w*|_scale_inv|_scales|\.scales?|\.SCB|\.qscale_weight|\.absmax)$"
)


def dequantised(config: Any) -> dict[str, Any]:
    """Return options of ``from_pretrained`` that turn quantised weights into plain floats.

    They are empty if the weights are plain already, or if transformers cannot dequantise them.
    """
    for part in (config, config.get_text_config(decoder=True)):
        about = getattr(part, "quantization_config", None)
        if about and hasattr(AutoQuantizationConfig.from_dict(dict(about)), "dequantize"):
            part.quantization_config = dict(about) | {"dequantize": True}
            return {"config": config}
    return {}


def forget_quantisation(model: PreTrainedModel) -> None:
    """Remove from a model with plain floats what would save it in its stored, packed format."""
    vars(model).pop("hf_quantizer", None)
    forget_format(model.config)
    # Saving would reverse these conversions. Without them transformers takes the conversions of the
    # model's class.
    vars(model).pop("_weight_conversions", None)


def forget_format(config: Any) -> None:
    """Remove the packed format of the weights from a configuration."""
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)


def unused_scales(unexpected: Collection[str]) -> list[str]:
    """Return which of the unexpected keys of a file are scales whose weights the model has.

    If the model lacks the weight too, the scale is harmless: this part of the model is left out.
    """
    names = {*unexpected}
    scales = sorted(name for name in names if _SCALE.search(name))
    return [name for name in scales if not _weights_of(name) & names]


def _weights_of(scale: str) -> set[str]:
    """Return the names that the weight may have to which a scale belongs."""
    parent = scale.rpartition(".")[0]
    stem = re.sub(r"_(scale_inv|scales?)$", "", scale)
    return {parent, f"{parent}.weight", stem, f"{stem}_blocks"} - {scale}
