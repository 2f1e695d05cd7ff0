"""The longest sequence that a model can run, from its configuration and its position embeddings."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

# Names of the context length in configurations; of several the first counts.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
TABLE = re.compile(r"(^|[._])(wpe|embed_positions?|pos(ition)?_embed(ding)?s?)$")
OTHER = re.compile(r"vision|visual|image|audio|speech|encoder")  # positions of what is no text


def context_of(model: PreTrainedModel) -> int | None:
    """Return the longest sequence of tokens that a model can run; None if there is no limit.

    It is the smaller of what the configuration says, times the factor of scaled rotary embeddings,
    and the number of learned positions.
    """
    limits = [_configured(model.config.get_text_config(decoder=True))]
    limits += [
        _positions(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and TABLE.search(name) and not OTHER.search(name)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _configured(config: Any) -> int | None:
    """Return the context length of a configuration; those that are no length do not count."""
    # Of Bloom, seq_length is what it was trained on. Its ALiBi, and Falcon's, have no limit.
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
        # Where the length is the scaled one, the unscaled one is given too.
        unscaled = kind.get("original_max_position_embeddings") or length
        lengths.append(int((kind.get("factor") or 1) * unscaled))
    return max(lengths)


def _positions(table: torch.nn.Embedding) -> int:
    """Return how many positions a table of learned embeddings has; some rows stand for none."""
    unused = getattr(table, "offset", None)  # as in OPT
    if unused is None:  # as in RoBERTa
        unused = 0 if table.padding_idx is None else table.padding_idx + 1
    return len(table.weight) - int(unused)
