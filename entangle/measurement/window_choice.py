"""The windows that are shown of a neuron: those at the ends of its distribution, and some between."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

WINDOWS = 8
_AT_ENDS = 3  # windows at either end
_QUANTILES = (0.95, 0.05, 0.75, 0.25, 0.5)


def choose_windows(
    outputs: npt.NDArray[np.float32], modes: Sequence[float]
) -> list[tuple[str, int, int]]:
    """Return eight windows: why each was chosen, its index, and the position of the token.

    ``outputs`` are (windows, length), NaN at tokens that a trained expert did not have. Three
    windows have the highest outputs and three the lowest. The others have the outputs nearest to
    each mode, if there are several, and to quantiles. No window is chosen twice, so a short text has fewer.
    """
    left = np.asarray(~np.isnan(outputs).all(axis=1))
    found: list[tuple[str, int, int]] = []
    for why, far in _wishes(outputs, modes):  # far: (windows, length), the smaller the better
        if len(found) == WINDOWS or not left.any():
            break
        far = np.where(np.isnan(far), np.inf, far)
        window = int(np.where(left, far.min(axis=1), np.inf).argmin())
        left[window] = False
        found.append((why, window, int(far[window].argmin())))
    return found


def _wishes(
    outputs: npt.NDArray[np.float32], modes: Sequence[float]
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for _ in range(_AT_ENDS):
        yield "highest", -outputs
    for _ in range(_AT_ENDS):
        yield "lowest", outputs
    for mode in modes if len(modes) > 1 else ():
        yield f"mode at {mode:.3g}", np.abs(outputs - np.float32(mode))
    for share in _QUANTILES:
        wanted = np.nanquantile(outputs, share)
        yield f"quantile {share:g}", np.abs(outputs - wanted)
