"""How the predictions of a model differ from those of the dense model, token by token."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TAIL = 0.999  # the quantile of the tail
_DRAWS = 500  # bootstrap samples of windows
MEANS = ("kl", "agreement", "lost", "gained")  # means over the tokens of a window
NAMES = ("kl", "kl_tail", "agreement", "lost", "gained")
COLUMNS = tuple(f"{name}{end}" for name in NAMES for end in ("", "_error"))


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """The differences between a model's predictions and the dense model's, on scored windows.

    A model's first choice is the token that it gives the largest probability.
    """

    kl: npt.NDArray[np.float32]  # (windows, tokens): KL(dense ‖ model) of each token, in nats
    agreement: Floats  # (windows,): share of tokens at which both models have the same first choice
    lost: (
        Floats  # (windows,): share at which only the dense model's first choice is the text's token
    )
    gained: Floats  # (windows,): share at which only the model's first choice is the text's token

    def tail(self, windows: Sequence[int] | None = None) -> tuple[float, float]:
        """Return the 99.9% quantile of ``kl`` over the tokens of some windows, and its error.

        It is interpolated linearly, and the error is from a bootstrap of windows; NaN for one window.
        """
        return quantile_over_windows(self.kl if windows is None else self.kl[[*windows]], TAIL)

    def stored(self, texts: Iterable[Sequence[int]]) -> dict[str, Any]:
        """Return what `divergence_columns` reads, as JSON has it; ``texts`` are the windows of each text."""
        means = {"kl": self.kl.mean(axis=1, dtype=np.float64), "agreement": self.agreement}
        means |= {"lost": self.lost, "gained": self.gained}
        lists = {name: values.tolist() for name, values in means.items()}
        return lists | {"tails": [list(self.tail(windows)) for windows in texts]}

    def columns(self) -> dict[str, float]:
        """Return the mean differences over all windows with their errors (see `divergence_columns`)."""
        every = range(len(self.kl))
        return divergence_columns([self.stored([every])], every)


def divergence_columns(
    stored: Sequence[Mapping[str, Any] | None], windows: Sequence[int], text: int = 0
) -> dict[str, float]:
    """Return the differences on a text's windows, means over one or several models, by `COLUMNS`.

    ``stored`` is what `Divergence.stored` returned for each model, ``windows`` are the places of the
    text's windows and ``text`` is its place among the texts. Errors are standard errors over windows
    of the mean over models. That of ``kl_tail`` is the mean of the models' errors: these have the same
    windows, so their errors are taken as one and the same. All are NaN if a model has no differences.
    """
    known = [one for one in stored if one is not None]
    if not known or len(known) < len(stored):
        return dict.fromkeys(COLUMNS, math.nan)
    found = {}
    for name in MEANS:
        lists = [np.array(one[name], dtype=np.float64) for one in known]
        values = np.mean([one[[*windows]] for one in lists], axis=0)
        found[name], found[f"{name}_error"] = mean_over_windows(values)
    tails = np.array([one["tails"][text] for one in known], dtype=np.float64)  # a null is NaN
    tail, error = tails.mean(axis=0).tolist()
    found |= {"kl_tail": tail, "kl_tail_error": error}
    return {name: found[name] for name in COLUMNS}


def mean_over_windows(values: Floats) -> tuple[float, float]:
    """Return the mean of windows' values (windows,) and its standard error, NaN for one window."""
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return float(values.mean()), error


def quantile_over_windows(values: npt.NDArray[Any], share: float) -> tuple[float, float]:
    """Return a quantile of all values (windows, tokens), and its error from a bootstrap of windows.

    It is interpolated linearly between the two nearest values. The error is NaN for one window.
    """
    windows, tokens = values.shape
    flat = values.astype(np.float64).ravel()
    order = np.argsort(-flat, kind="stable")
    above = (1 - share) * (flat.size - 1)  # the number of values above the quantile
    ranks = [math.floor(above), math.ceil(above)]
    weight = above - ranks[0]

    def between(places: Any) -> float:
        high, low = flat[order[places]]
        return float(high + (low - high) * weight)

    value = between(ranks)
    if windows == 1:
        return value, math.nan
    generator, drawn = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        times = np.bincount(generator.integers(windows, size=windows), minlength=windows)
        # How often each value was drawn, from the largest: the first twentieth nearly always suffices.
        for most in (flat.size // 20, flat.size):
            last = np.cumsum(times[order[:most] // tokens])
            if most and last[-1] > ranks[1]:
                drawn.append(between(np.searchsorted(last, ranks, side="right")))
                break
    return value, float(np.std(drawn, ddof=1))
