"""Non-uniform sparsity: the number of weights pruned in each row of a layer, and in each block.

Totals are exact: shares are rounded to whole numbers by largest remainder, so that different
budgets of the same sparsity prune the same number of weights.

Sources: OWL, arXiv 2310.05175, section 3.2; TRIM, arXiv 2505.16743, section 3 and algorithm 1.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics.masks import wanda
from entangle.numerics.moments import InputMoments

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

OUTLIER = 5.0  # OWL's outliers have scores above this times the mean score
STEPS, RATES = 10, (-0.05, 0.02, 0.05, 0.1)  # TRIM's number of steps, and its rates


def largest_remainder(shares: npt.ArrayLike, sizes: npt.ArrayLike, total: int) -> Counts:
    """Return whole numbers close to ``shares * sizes`` that add up to ``total``.

    Each is from 0 to its size. If the shares give another total, one constant is added to all of
    them first. The rest of the total goes to the largest remainders; ties prefer the first.

    Raises:
        ValueError: the total is not from 0 to the sum of the sizes, or a share is not finite.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if not np.isfinite(shares).all():
        raise ValueError(f"expected finite shares, got {np.asarray(shares).tolist()[:9]}")
    if not 0 <= total <= sizes.sum():
        raise ValueError(f"expected to prune 0 to {sizes.sum():,} weights, got {total:,}")
    quotas = _shifted(np.asarray(shares, dtype=np.float64), sizes, total) * sizes
    counts: Counts = np.floor(quotas + 1e-9).astype(np.int64).clip(0, sizes)
    order = np.argsort(counts - quotas, kind="stable")
    missing = total - int(counts.sum())
    for step in itertools.cycle(order if missing > 0 else order[::-1]):
        if missing == 0:
            break
        sign = 1 if missing > 0 else -1
        if 0 <= counts[step] + sign <= sizes[step]:
            counts[step] += sign
            missing -= sign
    return counts


def _shifted(shares: Floats, sizes: Counts, total: int) -> Floats:
    """Return the shares, moved by one constant and clipped to 0 to 1, that give the total."""
    low, high = min(-1.0, -float(shares.max(initial=0))), max(1.0, 1 - float(shares.min(initial=0)))
    for _ in range(59 + math.ceil(math.log2(high - low))):
        middle = (low + high) / 2
        if float((shares + middle).clip(0, 1) @ sizes) < total:
            low = middle
        else:
            high = middle
    moved: Floats = (shares + (low + high) / 2).clip(0, 1)
    return moved


def ranks_of(values: npt.ArrayLike) -> Floats:
    """Return ranks from 0 (the smallest value) to 1. Ties rank the first lower; NaN ranks ½."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    found = np.full(len(values), 0.5)
    if known.sum() > 1:
        place = np.argsort(np.argsort(values[known], kind="stable"), kind="stable")
        found[known] = place / (known.sum() - 1)
    return found


def sparsity_by_rank(sparsity: float, rank: npt.ArrayLike, strength: float) -> Floats:
    """Return a sparsity for each row: lower for high ranks, ``sparsity`` on average.

    It is s + strength · (1 - 2 · rank) · min(s, 1 - s), which lies from 0 to 1.

    Raises:
        ValueError: the strength is not from 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 (all rows alike) to 1, got {strength!r}")
    reach = min(sparsity, 1 - sparsity)
    found: Floats = sparsity + strength * (1 - 2 * np.asarray(rank, dtype=np.float64)) * reach
    return found


def sparsity_by_score(
    sparsity: float, scores: npt.ArrayLike, sizes: npt.ArrayLike, width: float
) -> Floats:
    """Return a sparsity for each part of a model: lower where its score is high.

    Densities are linear in the scores. Their range is ``2 * width``, and their mean weighted by
    sizes is ``1 - sparsity``: OWL's rule with λ = ``width``. The width is reduced if a density
    would leave 0 to 1. Equal scores give ``sparsity`` to all.
    """
    scores, sizes = (np.asarray(values, dtype=np.float64) for values in (scores, sizes))
    reach = scores.max() - scores.min()
    if not reach > 0:
        return np.full(len(scores), sparsity)
    scaled = (scores - np.average(scores, weights=sizes)) / reach  # their range is 1
    width = min(width, sparsity / (2 * scaled.max()), (1 - sparsity) / (-2 * scaled.min()))
    found: Floats = sparsity - 2 * width * scaled
    return found


def outlier_ratio(scores: torch.Tensor) -> float:
    """Return OWL's layer outlier ratio: the share of Wanda's scores above 5 times their mean."""
    return float((scores > OUTLIER * scores.mean(dtype=torch.float64)).double().mean())


def sparsity_by_quality(weight: torch.Tensor, moments: InputMoments, sparsity: float) -> Floats:
    """Return TRIM's sparsity for each row of a weight (neurons, inputs), ``sparsity`` on average.

    A row's quality is the cosine between its outputs before and after pruning by Wanda. Each step
    prunes rows of a higher quality than the mean more (less, if the rate is negative). Of all steps
    and rates, and uniform sparsity, the result is the one with the highest cosine of the whole
    layer's outputs. This was written from the paper's description: the quality is scaled to a range
    of 1, and the rates are our choice.
    """
    neurons, inputs = weight.shape
    total = round(sparsity * weight.numel())
    dense, gram = weight.float(), moments.gram
    products = dense @ gram
    energy = (products * dense).double().sum(dim=1)

    def quality_of(shares: Floats) -> tuple[float, Floats]:
        counts = largest_remainder(shares, sizes, total)
        pruned = wanda(dense, moments, torch.from_numpy(counts))
        along = (products * pruned).double().sum(dim=1)
        pruned_energy = ((pruned @ gram) * pruned).double().sum(dim=1)
        cosine = along / (energy * pruned_energy).sqrt()
        whole = along.sum() / (energy.sum() * pruned_energy.sum()).sqrt()
        return float(whole), np.nan_to_num(cosine.cpu().numpy())

    sizes, uniform = np.full(neurons, inputs), np.full(neurons, sparsity)
    best, quality = quality_of(uniform)
    found, first = uniform, quality
    for rate in RATES:
        shares, quality = uniform, first
        for _ in range(STEPS):
            reach = np.ptp(quality)
            if not reach > 0:
                break
            shares = _shifted(shares + rate * (quality - quality.mean()) / reach, sizes, total)
            whole, quality = quality_of(shares)
            if whole > best:
                best, found = whole, shares
    return found
