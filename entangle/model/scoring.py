"""Scoring of a model on a text."""

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.causality import check_causal
from entangle.model.divergence import Divergence
from entangle.model.kept_logits import KeptLogits
from entangle.model.placing import input_device
from entangle.model.progress import progress_bar
from entangle.model.score import Score
from entangle.model.text import TokenWindows, check_one_text, check_windows
from entangle.numerics.torch_settings import with_torch_defaults


class NotFiniteError(ValueError):
    """A log-likelihood that is NaN or infinite."""


_CHUNK = 64  # tokens whose probabilities are computed at once: they fit a processor's cache


@with_torch_defaults
def perplexity(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    against: PreTrainedModel | KeptLogits | None = None,
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool | None = None,
) -> Score:
    """Return the score of each window's tokens, each given the tokens before it in its window.

    The first ``skip_first`` tokens of each window, and at least one, are given and not scored. Of
    `sliding_windows` only the new tokens are scored. ``against`` is the dense model: the score then
    has its `Divergence` from this model, which runs beside it. Under torchrun each process scores its
    share of the batches, and all return the same score.

    Raises:
        NotFiniteError: the log-likelihood of a window, or a divergence, is not finite.
        ValueError: the windows or ``skip_first`` do not fit a model (see `check_windows`), a model is
            not causal (see `check_causal`), or the models have other numbers of logits.
    """
    check_windows(model, windows, skip_first)
    check_one_text(windows)
    check_causal(model, windows)
    if isinstance(against, PreTrainedModel):
        check_windows(against, windows, skip_first)
        check_causal(against, windows)
    return score_of(
        model,
        windows,
        against=against,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
    )


def score_of(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    against: PreTrainedModel | KeptLogits | None,
    batch_size: int,
    skip_first: int,
    progress: bool | None,
) -> Score:
    """Return the score of a model that was checked, as `perplexity` does.

    Raises:
        NotFiniteError: the log-likelihood of a window, or a divergence, is not finite.
        ValueError: the models have other numbers of logits.
    """
    first = max(skip_first, 1)
    length = windows.stride or windows.length - first  # scored tokens of each window
    firsts = [first] * len(windows) if windows.firsts is None else windows.firsts.tolist()
    batches = windows.batches(batch_size)
    found = torch.zeros(len(windows), dtype=torch.float64)
    kl = torch.zeros(len(windows), length if against is not None else 0)
    shares = torch.zeros(3, len(windows), dtype=torch.float64)  # agreement, lost, gained
    with (
        torch.inference_mode(),
        progress_bar(total=windows.tokens.numel(), unit="token", shown=progress) as bar,
    ):
        for number in ranks.shard().batches(len(batches)):
            batch = batches[number]
            tokens = batch.to(input_device(model))
            logits = model(input_ids=tokens, use_cache=False).logits
            dense = None if against is None else _dense_logits(against, number, batch)
            # One window at a time: all logits in float32 would double the peak memory.
            for place, window in enumerate(tokens):
                row = number * batch_size + place
                targets = window[firsts[row] : firsts[row] + length]
                given = slice(firsts[row] - 1, firsts[row] - 1 + length)
                others = None if dense is None else dense[place, given]
                rows = compared(logits[place, given], targets, others)
                found[row] = float(rows[0].double().mean())
                if others is not None:
                    kl[row] = rows[1]
                    shares[:, row] = rows[2:].double().mean(dim=1)
            bar.update(batch.numel())
    for values in (found, kl, shares) if against is not None else (found,):
        ranks.all_reduce_sum_(values)
    nats = found.numpy()
    if not np.isfinite(nats).all():
        bad = int((~np.isfinite(nats)).sum())
        raise NotFiniteError(
            f"the model's log-likelihood is not finite in {bad} of {len(nats)} windows: its "
            "weights or its dtype overflow"
        )
    if kl.isnan().any():
        raise NotFiniteError(
            "the outputs of the model to compare with are not finite: its weights or its dtype overflow"
        )
    divergence = None if against is None else Divergence(kl.numpy(), *shares.numpy())
    return Score(nats, len(windows) * length, divergence)


def _dense_logits(
    against: PreTrainedModel | KeptLogits, number: int, batch: torch.Tensor
) -> torch.Tensor:
    """Return the dense model's logits (windows, length, vocabulary) on a batch."""
    if isinstance(against, KeptLogits):
        return against.of_batch(number)
    logits: torch.Tensor = against(
        input_ids=batch.to(input_device(against)), use_cache=False
    ).logits
    return logits


def compared(
    scores: torch.Tensor, targets: torch.Tensor, others: torch.Tensor | None
) -> torch.Tensor:
    """Return the losses of tokens from their logits (tokens, vocabulary), in nats: (1, tokens).

    With the dense model's logits ``others``, return also rows of the divergence from them, and of
    whether both models' first choices agree, lose and gain the target (see `Divergence`).

    Raises:
        ValueError: the models have other numbers of logits.
    """
    if others is not None and others.shape != scores.shape:
        raise ValueError(
            f"the model has {scores.shape[-1]} logits for a token, but the one that it is compared with "
            f"has {others.shape[-1]}: give models with the same vocabulary"
        )
    found = []
    for start in range(0, len(scores), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        right = targets[chunk]
        log = log_softmax(scores[chunk].float(), dim=-1)
        rows = [-log.gather(1, right[:, None])[:, 0]]
        if others is not None:
            truth = log_softmax(others[chunk].to(log.device).float(), dim=-1)
            ours, theirs = log.argmax(dim=-1), truth.argmax(dim=-1)
            rows.append(_divergence(truth, log))
            rows.append(ours == theirs)
            rows.append((theirs == right) & (ours != right))
            rows.append((ours == right) & (theirs != right))
        found.append(torch.stack([row.float() for row in rows]))
    return torch.cat(found, dim=1)


def _divergence(truth: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """Return KL(truth ‖ log) of each row of log-probabilities, in nats; ``log`` is overwritten."""
    terms = log.sub_(truth).neg_().mul_(truth.exp())
    found = terms.sum(dim=-1)
    if found.isnan().any():  # tokens that the dense model excludes: 0 times infinity
        found = terms.masked_fill_(truth == -torch.inf, 0).sum(dim=-1)
    return found
