"""Whether a model's outputs at a token depend on later tokens, or on other windows of the batch.

The perplexity of such a model has no meaning, and its files do not say so.
"""

import torch
from transformers import PreTrainedModel

from entangle.model.hooks import on_trial
from entangle.model.placing import input_device
from entangle.model.text import TokenWindows

TOKENS = 8  # of each window; in a longer window one token changes the other outputs less
# Shares of the change at the last token that are too large before it, and in the other window.
# Outputs of causal models did not change. Mixtures of experts changed by 1e-7 in float32, since an
# expert sums otherwise for another number of rows. Encoders changed by 0.004 and more.
LIMITS = {torch.float32: (1e-4, 1e-4), torch.float64: (1e-4, 1e-4)}
HALF = 2e-3, 0.05  # of 16-bit floats


def dependences(model: PreTrainedModel, windows: TokenWindows) -> list[str]:
    """Return what a token's outputs depend on besides this token and those before it.

    The list is empty if there is nothing. Two batches of two short windows run through the model.
    They differ only in the last token of the first window. The change of the outputs at the other
    tokens is compared with the change at this token. No recording counts these batches. Parameters,
    buffers and the state of random numbers stay as they are.
    """
    first, other = windows.tokens[0, :TOKENS], windows.tokens[-1, :TOKENS]
    changed = first.clone()
    changed[-1] = next(token for token in (*other.tolist(), 0, 1) if token != first[-1])
    outputs = []
    with on_trial(model), torch.inference_mode():
        for window in (first, changed):
            tokens = torch.stack([window, other]).to(input_device(model))
            output = model(input_ids=tokens, use_cache=False)
            values = output.logits if "logits" in output else output.last_hidden_state
            outputs.append(values.float())
    # (2 windows, tokens)
    change = (outputs[0] - outputs[1]).square().mean(dim=-1).sqrt()
    changed_token, before, beside = change[0, -1], change[0, :-1].max(), change[1].max()
    found = []
    small, rounding = LIMITS.get(model.dtype, HALF)
    if before > max(small * changed_token, 10 * beside):
        found.append("on later tokens of the window")
    if beside > rounding * changed_token:
        found.append("on the other windows of the batch")
    return found


def check_causal(model: PreTrainedModel, windows: TokenWindows) -> None:
    """Check that a score of the model has a meaning (see `dependences`).

    Raises:
        ValueError: the model's outputs depend on later tokens or on other windows.
    """
    found = dependences(model, windows)
    if found:
        raise ValueError(
            f"the outputs of {model.name_or_path or type(model).__name__} "
            f"({type(model).__name__}) at a token depend {' and '.join(found)}, so its perplexity "
            "has no meaning: give a causal language model"
        )
