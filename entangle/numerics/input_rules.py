"""Which inputs of a layer are zero for a token, and how that is chosen.

* `Threshold` (TEAL): inputs whose absolute value is below a number.
* `TopInputs` (WINA): all but a token's largest products of an input's absolute value and the norm of
  its column in the weight.

Sources: Liu et al., arXiv 2408.14690 (TEAL: thresholds from histograms, and shares of a block's layers
by greedy steps); Chen et al., arXiv 2505.19427 (WINA).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

_DROPPED = (
    13  # low bits of a float32 that a bin does not tell apart: a bin is 2⁻¹⁰ of its value wide
)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Inputs whose absolute value is below ``value`` are zero."""

    value: float

    def keep(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return which inputs (..., inputs) are kept; NaN is."""
        return ~(inputs.abs() < self.value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the rule as tensors, by name."""
        return {"threshold": torch.tensor(self.value, dtype=torch.float64)}


@dataclasses.dataclass(frozen=True, eq=False)
class TopInputs:
    """All inputs of a token are zero but ``kept``: those with the largest |input| · norm."""

    kept: int
    norms: torch.Tensor  # (inputs,) float32: of the columns of the layer's weight

    def keep(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return which inputs (..., inputs) are kept."""
        scores = inputs.abs().float() * self.norms.to(inputs.device)
        largest = scores.topk(self.kept, dim=-1).indices
        return torch.zeros_like(inputs, dtype=torch.bool).scatter_(-1, largest, True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the rule as tensors, by name."""
        return {"kept": torch.tensor(self.kept), "norms": self.norms}


Rule: TypeAlias = Threshold | TopInputs


def rule_of(tensors: Mapping[str, torch.Tensor]) -> Rule:
    """Return the rule that `tensors` of it describe.

    Raises:
        LookupError: they describe none.
    """
    if "threshold" in tensors:
        return Threshold(float(tensors["threshold"]))
    return TopInputs(int(tensors["kept"]), tensors["norms"].clone())


def top_inputs(norms: torch.Tensor, share: float) -> TopInputs:
    """Return the rule by which a share of a token's inputs is zero, rounded to whole inputs."""
    return TopInputs(len(norms) - round(share * len(norms)), norms)


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """Return the norms (inputs,) float32 of the columns of a weight ([experts,] neurons, inputs).

    Of several experts it is the root of the mean square over the experts.
    """
    squares = sum(one.float().square().sum(dim=0) for one in weight.view(-1, *weight.shape[-2:]))
    assert isinstance(squares, torch.Tensor)
    return (squares / (weight.shape[0] if weight.ndim == 3 else 1)).sqrt().cpu()


class Magnitudes:
    """The histogram of the absolute values of all inputs of a layer, and its quantiles.

    A bin is the floats with the same leading 18 bits, so its width is a 1024th of its value or less,
    over the whole range of floats: the bins of `Histograms`, which are equally wide, would all lie
    beyond the small inputs of a layer with a few large ones. Counts of parts add up.
    """

    def __init__(self) -> None:
        """Begin without a value."""
        self.counts = torch.zeros(2 ** (31 - _DROPPED), dtype=torch.int64)

    def add(self, rows: torch.Tensor) -> None:
        """Count the values of rows of any shape."""
        bins = rows.detach().abs().float().flatten().view(torch.int32) >> _DROPPED
        self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()

    def quantile(self, share: float) -> float:
        """Return the value below which this share of the absolute values lies.

        It is in the bin of the exact quantile; inside a bin the values are taken as equally spread.
        Of share 1 it is the upper edge of the last bin that has a value, so all values lie below.

        Raises:
            ValueError: there is no value, or the quantile is not finite.
        """
        counts = self.counts.numpy()
        below = counts.cumsum()
        total = int(below[-1])
        if not total:
            raise ValueError("there are no inputs to take a threshold from")
        wanted = share * total
        last = int(below.searchsorted(total))  # the last bin that has a value
        place = min(int(below.searchsorted(wanted, side="right")), last)
        before = int(below[place - 1]) if place else 0
        edges = torch.tensor([place, place + 1], dtype=torch.int32) << _DROPPED
        low, high = map(float, edges.view(torch.float32))
        if not math.isfinite(low):
            raise ValueError(f"{share:.0%} of the inputs are not all finite: try another dtype")
        if not math.isfinite(high):  # of the largest floats
            return low
        return low + (high - low) * (wanted - before) / max(int(counts[place]), 1)


def greedy_shares(
    sizes: Sequence[float],
    share: float,
    error_of: Callable[[Sequence[float]], float],
    *,
    step: float,
) -> list[float]:
    """Return the shares of zero inputs of a block's layers, by greedy steps (TEAL, algorithm 1).

    ``sizes`` are the layers' numbers of weights, and ``error_of`` returns the block's error with
    given shares. Each step raises the share of the one layer with which the error is the smallest.
    Each adds the same number of weights whose inputs are zero, at most ``step``, and they add up to
    ``share`` of all weights (published: each is ``step``, the last may exceed the share, and that of a
    layer may exceed 1).

    Raises:
        ValueError: the error is not finite with any step.
    """
    total = share * sum(sizes)
    if not total:
        return [0.0] * len(sizes)
    step = total / max(math.ceil(total / step - 1e-9), 1)
    shares, left = [0.0] * len(sizes), total
    while left > 1e-9 * total:
        rooms = [(1 - share) * size for share, size in zip(shares, sizes, strict=True)]
        size_of_step = min(step, left)
        # Only whole steps compare; at the end of a high share there may be none.
        whole = [place for place, room in enumerate(rooms) if room >= (1 - 1e-9) * size_of_step]
        parts = [place for place, room in enumerate(rooms) if room > 1e-9 * sizes[place]]
        best, raised = math.inf, shares
        for place in whole or parts:
            more = min(size_of_step, rooms[place]) / sizes[place]
            tried = [*shares[:place], shares[place] + more, *shares[place + 1 :]]
            error = error_of(tried)
            if error < best:
                best, raised = error, tried
        if raised is shares:
            raise ValueError(
                "the outputs of the block are not finite with sparse inputs: try another dtype"
            )
        left -= sum((b - a) * n for a, b, n in zip(shares, raised, sizes, strict=True))
        shares = raised
    return shares
