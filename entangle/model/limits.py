"""The longest sequence that a model can run, from its configuration and its position embeddings."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

# Names of the context length in configurations. If a configuration has several, the first counts.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
TABLE = re.compile(r"(^|[._])(wpe|embed_positions?|pos(ition)?_embed(ding)?s?)$")
OTHER = re.compile(r"vision|visual|image|audio|speech|encoder")  # positions of what is no text


def context_of(model: PreTrainedModel) -> int | None:
    """Return the longest sequence of tokens that a model can run; None if there is no limit.

    There are two limits, and the smaller counts: the length in the configuration (scaled, if its
    rotary embeddings are), and the number of learned positions.
    """
    limits = [_configured(model.config.get_text_config(decoder=True))]
    limits += [
        _positions(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and TABLE.search(name) and not OTHER.search(name)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _configured(config: Any) -> int | None:
    """Return the context length of a configuration; values such as -1 and None are no length."""
    # Bloom's seq_length is the length that it was trained on. ALiBi (Bloom, Falcon) has no limit.
    bloom = config.model_type == "bloom"
    names = NAMES if bloom else (*NAMES, "seq_length")
    values = (getattr(config, name, None) for name in names)
    length = next((v for v in values if isinstance(v, int) and v > 0), None)
    if length is None or bloom or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)]  # one per kind of layer
    lengths = [length]
    for kind in kinds or [rope]:
        # If the length is already scaled, the configuration also has the unscaled length.
        unscaled = kind.get("original_max_position_embeddings") or length
        lengths.append(int((kind.get("factor") or 1) * unscaled))
    return max(lengths)


def _positions(table: torch.nn.Embedding) -> int:
    """Return how many positions a table of learned embeddings has; some rows are no positions."""
    unused = getattr(table, "offset", None)  # as in OPT
    if unused is None:  # as in RoBERTa
        unused = 0 if table.padding_idx is None else table.padding_idx + 1
    return len(table.weight) - int(unused)
