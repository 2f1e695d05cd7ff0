"""Scoring of a model on a text."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.causality import check_causal
from entangle.model.placing import input_device
from entangle.model.score import Score
from entangle.model.text import TokenWindows, check_one_text, check_windows
from entangle.numerics.torch_settings import with_torch_defaults


class NotFiniteError(ValueError):
    """A log-likelihood that is NaN or infinite."""


@with_torch_defaults
def perplexity(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool = False,
) -> Score:
    """Return the score of each window's tokens, each given the tokens before it in its window.

    The first ``skip_first`` tokens of each window, and at least one, are given and not scored. Under
    torchrun each process scores its share of the batches, and all return the same score.

    Raises:
        NotFiniteError: the log-likelihood of a window is not finite.
        ValueError: the windows or ``skip_first`` do not fit the model (see `check_windows`), or the
            model is not causal (see `check_causal`).
    """
    check_windows(model, windows, skip_first)
    check_one_text(windows)
    check_causal(model, windows)
    return score_of(model, windows, batch_size=batch_size, skip_first=skip_first, progress=progress)


def score_of(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    batch_size: int,
    skip_first: int,
    progress: bool,
) -> Score:
    """Return the score of a model that was checked, as `perplexity` does.

    Raises:
        NotFiniteError: the log-likelihood of a window is not finite.
    """
    first = max(skip_first, 1)
    batches = windows.batches(batch_size)
    found = torch.zeros(len(windows), dtype=torch.float64)
    with (
        torch.inference_mode(),
        tqdm(total=windows.tokens.numel(), unit="token", disable=not progress) as bar,
    ):
        for number in ranks.shard().batches(len(batches)):
            batch = batches[number]
            tokens = batch.to(input_device(model))
            logits = model(input_ids=tokens, use_cache=False).logits
            # One window at a time: all logits in float32 would double the peak memory.
            for place, (window, scores) in enumerate(zip(tokens, logits, strict=True)):
                losses = cross_entropy(
                    scores[first - 1 : -1].float(), window[first:], reduction="none"
                )
                found[number * batch_size + place] = float(losses.double().mean())
            bar.update(batch.numel())
    ranks.all_reduce_sum_(found)
    nats = found.numpy()
    if not np.isfinite(nats).all():
        bad = int((~np.isfinite(nats)).sum())
        raise NotFiniteError(
            f"the model's log-likelihood is not finite in {bad} of {len(nats)} windows: its "
            "weights or its dtype overflow"
        )
    return Score(nats, len(windows) * (windows.length - first))
