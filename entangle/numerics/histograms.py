"""One histogram per neuron, filled in one pass and merged without loss.

Guarantees, for any rows (checked by ``tests/numerics/test_histograms.py``):

* Memory is bounded: ``bins`` counts and fewer than twenty numbers for each neuron, for any
  number of tokens.
* Counts, mean and std come from sums of integers, so they have the same bits under any split, order
  or merge of the same batches. Skewness and kurtosis come from float64 sums and agree to 1e-9.
* A value inside the histogram is counted in its bin. A value outside is counted in its tail, which
  has an exact sum. ``wasserstein.from_histograms`` returns the distance and its error bound.

The pilot, the first batch of a run, places each neuron's bins, of equal width, over center ± 8
scale. Each bin is a lattice of 64 steps. In all sums a value is replaced by the middle of its step.

Rows are ``(tokens, neurons)``. The first dimension of every tensor of the state is the neuron.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.kernels.bins import (
    HALF_RANGE,
    MAX_BINS,
    MAX_EXCESS,
    MAX_SQUARES,
    STEPS,
    edges_of,
)
from entangle.numerics.kernels.histograms_cpu import add_rows
from entangle.numerics.processors import Kernels, kernels_of

MAX_TOKENS = 2**31 - 1  # counts are int32
_EXACT_ROWS = 2**18  # float64 holds the sum of this many (q + ½)² exactly
_NOT_PLACED = "the bins are not placed yet: call start with the pilot before add"
Array = npt.NDArray[np.float64]
InPlace = Callable[[torch.Tensor], None]
Add = Callable[["Histograms", torch.Tensor, torch.Tensor | None], None]


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of each neuron (neurons,), from the sums of `Histograms`; NaN where undefined."""

    count: npt.NDArray[np.int64]  # tokens, including those with an invalid value
    mean: Array
    std: Array  # population; NaN for a dead neuron
    skewness: Array
    kurtosis: Array  # excess: 0 for a Gaussian


@dataclasses.dataclass(frozen=True, eq=False)
class Histograms:
    """The mergeable state: one histogram for each neuron, with its tails and its sums."""

    center: torch.Tensor  # (neurons,) float64, values of float32; NaN before `start`
    scale: torch.Tensor  # (neurons,) float64
    counts: torch.Tensor  # (neurons, bins) int32
    count: torch.Tensor  # (neurons,) int64: all rows added
    steps: torch.Tensor  # (neurons, 2) int64: sums of q and q(q + 1) inside; q is a value's step
    powers: torch.Tensor  # (neurons, 2) float64: sums of (q + ½)³ and (q + ½)⁴, with the tails
    tail_count: torch.Tensor  # (neurons, 2) int64: values below, above
    tail_excess: torch.Tensor  # (neurons, 2) int64: whole steps beyond the edge, summed
    tail_square: torch.Tensor  # (neurons, 2) int64: squared excess, in whole squared bins, summed
    minimum: torch.Tensor  # (neurons,) float32; NaN if there are values that are not finite
    maximum: torch.Tensor  # (neurons,) float32; likewise
    nonfinite: torch.Tensor  # (neurons,) int64: number of values that are NaN or infinite
    beyond: torch.Tensor  # (neurons,) int64: number of values too far out to be summed

    @classmethod
    def zeros(cls, neurons: int, *, bins: int = 1024, device: torch.device | str = "cpu") -> Self:
        """Return the empty state of ``neurons`` neurons; `start` must place its bins.

        Raises:
            ValueError: ``bins`` is not an even number from 2 to 2048.
        """
        if bins % 2 or not 2 <= bins <= MAX_BINS:
            raise ValueError(f"bins must be an even number from 2 to {MAX_BINS}, got {bins}")

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            with torch.inference_mode(False):  # a later call of the model may be outside this mode
                return torch.zeros(neurons, *shape, dtype=dtype, device=device)

        return cls(
            center=zeros(dtype=torch.float64).fill_(math.nan),
            scale=zeros(dtype=torch.float64).fill_(math.nan),
            counts=zeros(bins, dtype=torch.int32),
            count=zeros(),
            steps=zeros(2),
            powers=zeros(2, dtype=torch.float64),
            tail_count=zeros(2),
            tail_excess=zeros(2),
            tail_square=zeros(2),
            minimum=zeros(dtype=torch.float32).fill_(math.inf),
            maximum=zeros(dtype=torch.float32).fill_(-math.inf),
            nonfinite=zeros(),
            beyond=zeros(),
        )

    @classmethod
    def from_rows(cls, rows: torch.Tensor, *, bins: int = 1024) -> Self:
        """Return the histograms of ``rows`` (tokens, neurons), with ``rows`` as the pilot."""
        histograms = cls.zeros(rows.shape[1], bins=bins, device=rows.device)
        histograms.start(rows)
        histograms.add(rows)
        return histograms

    @property
    def bins(self) -> int:
        """Return the number of bins of each neuron."""
        return self.counts.shape[1]

    @property
    def neurons(self) -> int:
        """Return the number of neurons."""
        return self.counts.shape[0]

    @property
    def width(self) -> torch.Tensor:
        """Return the width of each neuron's bins (neurons,), in units of its output."""
        return self.scale * (2 * HALF_RANGE / self.bins)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the whole state by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __getitem__(self, neurons: slice) -> Self:
        """Return the state of a range of neurons, as views: adding to it adds to this state."""
        return type(self)(**{name: tensor[neurons] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device.

        Raises:
            OverflowError: there are more than 2^31 - 1 tokens.
            RuntimeError: rows were added before `start`.
        """
        self._check_added()
        with torch.inference_mode(False):
            copies = {name: t.to(device, copy=True) for name, t in self.tensors().items()}
        return type(self)(**copies)

    def copy_(self, other: Self) -> None:
        """Copy the state of as many neurons from ``other``, which may be on another device.

        Raises:
            OverflowError: there are more than 2^31 - 1 tokens.
            RuntimeError: rows were added before `start`.
        """
        other._check_added()
        for name, tensor in self.tensors().items():
            tensor.copy_(getattr(other, name))

    def start(
        self,
        pilot: torch.Tensor,
        places: torch.Tensor | None = None,
        *,
        others: tuple[int, float] | None = None,
    ) -> None:
        """Place the bins by the mean and std of the pilot's rows (tokens, neurons).

        ``places`` are the rows that count, as for `add`. The center is the neuron's mean. The scale
        is its std, but at least a thousandth of the median std of the neurons that are not constant
        in the pilot. A constant neuron has that median as its scale, or 1 if all are constant.

        A pilot of few rows, or none, says little of a scale. ``others`` are a number of tokens and
        a std: the scale is the std as if so many tokens with this std had joined the rows.

        Raises:
            RuntimeError: the bins are placed already. This is checked only on the CPU.
            ValueError: the pilot has no rows, without ``others``, or another number of neurons.
        """
        self._check(pilot)
        rows = len(pilot if places is None else places)
        if rows == 0 and others is None:
            raise ValueError("the pilot has no rows: the first batch needs a counted token")
        if kernels_of(pilot.device) == "numba" and torch.isfinite(self.center).any():
            raise RuntimeError("the bins are already placed: call start only once, before add")
        mean, std = _mean_and_std(pilot.detach(), places)
        std = torch.where(torch.isfinite(std) & torch.isfinite(mean), std, 0.0)
        if others is not None:
            more, spread = others
            std = ((rows * std.square() + more * spread**2) / (rows + more)).sqrt()
        # The lower median of those above zero. To select them would wait for a device.
        ascending = torch.where(std > 0, std, math.inf).sort().values
        ascending = torch.cat([ascending, std.new_full((1,), math.inf)])
        middle = ((std > 0).sum()[None] - 1).clamp(min=0) // 2
        median = ascending.index_select(0, middle)
        median = torch.where(median.isinf(), 1.0, median)
        scale = torch.where(std > 0, torch.maximum(std, 1e-3 * median), median)
        self.place(torch.where(torch.isfinite(mean), mean, 0.0), scale)

    def place(self, center: torch.Tensor, scale: torch.Tensor) -> None:
        """Place the bins of each neuron over center ± 8 scale, both (neurons,) float64."""
        # The kernels multiply by the float32 inverse of a step, so the scale is computed from that
        # inverse. The clamp prevents its overflow.
        inverse = (STEPS * self.bins / (2 * HALF_RANGE) / scale.clamp(min=1e-30)).float()
        self.scale.copy_(STEPS * self.bins / (2 * HALF_RANGE) / inverse.double())
        self.center.copy_(center.float())

    def add(self, rows: torch.Tensor, places: torch.Tensor | None = None) -> None:
        """Count rows (tokens, neurons) of any floating dtype.

        ``places`` (counted,) int64 are the indices of the rows that count; None counts all. Nothing
        here waits for a device. So the first two errors are raised here only on the CPU, and for a
        state on a device when it is copied (`to`, `copy_`).

        Raises:
            OverflowError: there are more than 2^31 - 1 tokens.
            RuntimeError: `start` has not been called.
            ValueError: the rows have another number of neurons.
        """
        self._check(rows)
        if len(rows if places is None else places) == 0:
            return
        kernels, rows = kernels_of(rows.device), rows.detach()
        if kernels == "numba" and self.neurons:
            if torch.isnan(self.center[0]):
                raise RuntimeError(_NOT_PLACED)
            _check_tokens(int(self.count[0]) + len(rows if places is None else places))
        if places is None:
            for part in rows.split(_EXACT_ROWS):
                _adder(kernels)(self, part, None)
        else:
            for some in places.split(_EXACT_ROWS):
                _adder(kernels)(self, rows, some)

    def _mark_nonfinite(self) -> None:
        """Make the ends NaN where values are not finite: processors order such values differently."""
        for end in (self.minimum, self.maximum):
            end.masked_fill_(self.nonfinite > 0, math.nan)

    def _check_added(self) -> None:
        """Check what `add` does not check on a device.

        Raises:
            OverflowError: there are more than 2^31 - 1 tokens.
            RuntimeError: rows were added before `start`.
        """
        if self.neurons:
            if bool((torch.isnan(self.center) & (self.count > 0)).any()):
                raise RuntimeError(_NOT_PLACED)
            _check_tokens(int(self.count.max()))

    def _check(self, rows: torch.Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.neurons:
            raise ValueError(
                f"expected rows of shape (tokens, {self.neurons}), got {tuple(rows.shape)}"
            )

    def merged(self, other: Self) -> Self:
        """Return the state of the rows of both.

        Merging is associative and commutative, and a started state without rows is neutral.

        Raises:
            OverflowError: both together have more than 2^31 - 1 tokens.
            ValueError: the two have different bins, so different pilots.
        """
        if self.counts.shape != other.counts.shape:
            raise ValueError(
                f"cannot merge histograms of {self.neurons} neurons of {self.bins} bins with those "
                f"of {other.neurons} neurons of {other.bins} bins"
            )
        same = (self.center == other.center) & (self.scale == other.scale)
        if not bool(same.all()):
            raise ValueError(
                f"{int((~same).sum())} of {self.neurons} neurons have other bins in the other "
                "histograms: only histograms of the same pilot, the first batch, can be merged"
            )
        if self.neurons:
            _check_tokens(int((self.count + other.count).max()))
        merged = {name: tensor + getattr(other, name) for name, tensor in self.tensors().items()}
        merged |= {"center": self.center.clone(), "scale": self.scale.clone()}
        merged["minimum"] = torch.minimum(self.minimum, other.minimum)
        merged["maximum"] = torch.maximum(self.maximum, other.maximum)
        full = self.tail_square > MAX_SQUARES - other.tail_square
        merged["tail_square"] = merged["tail_square"].masked_fill(full, MAX_SQUARES)
        state = type(self)(**merged)
        state._mark_nonfinite()
        return state

    def reduce_(self, add: InPlace, least: InPlace, most: InPlace) -> None:
        """Replace this state by the merged state of all processes (see `merged`).

        ``add``, ``least`` and ``most`` replace a tensor by its sum, minimum and maximum over all
        processes, in place.

        Raises:
            OverflowError: all together have more than 2^31 - 1 tokens.
            ValueError: the processes have different bins.
        """
        for tensor in (self.center, self.scale):
            low, high = tensor.clone(), tensor.clone()
            least(low)
            most(high)
            if not torch.equal(low, high):
                raise ValueError(
                    f"{int((low != high).sum())} of {self.neurons} neurons have other bins in "
                    "another process: run all processes on the same kind of machine"
                )
        add(self.count)  # first, to check that the other sums do not overflow
        if self.neurons:
            _check_tokens(int(self.count.max()))
        # Halves of 32 bits, whose sums do not overflow.
        high, low = self.tail_square >> 32, self.tail_square & (2**32 - 1)
        for tensor in (self.counts, self.steps, self.powers, self.tail_count, self.tail_excess):
            add(tensor)
        for tensor in (self.nonfinite, self.beyond, high, low):
            add(tensor)
        high += low >> 32
        full = high >= MAX_SQUARES >> 32
        total = (high << 32) | (low & (2**32 - 1))
        self.tail_square.copy_(total.masked_fill(full, MAX_SQUARES))
        least(self.minimum)
        most(self.maximum)
        self._mark_nonfinite()

    def invalid(self) -> npt.NDArray[np.bool_]:
        """Return which neurons have values that cannot be summed: NaN, infinite or too far out."""
        full = (self.tail_square >= MAX_SQUARES).any(dim=1)
        return (full | (self.nonfinite > 0) | (self.beyond > 0)).cpu().numpy()

    def moments(self) -> Moments:
        """Return each neuron's moments, of values on the lattice (at most half a step off)."""
        state = {name: tensor.cpu().numpy() for name, tensor in self.tensors().items()}
        count, tails = state["count"], state["tail_count"]
        # Python's integers are exact, however far off the pilot was. The unit is half a step from
        # the center: the middle of step q is 2q + 1, and a tail's value is ±(edge + its excess).
        first, second = state["steps"].astype(object).T
        below, above = tails.astype(object).T
        excess_below, excess_above = (2 * state["tail_excess"].astype(object) + tails).T
        squares = (2 * STEPS) ** 2 * state["tail_square"].astype(object).sum(axis=1)
        edge = STEPS * self.bins
        inside = count.astype(object) - below - above
        total = 2 * first + inside + edge * (above - below) + excess_above - excess_below
        squared = 4 * second + inside + squares
        squared += edge * edge * (above + below) + 2 * edge * (excess_above + excess_below)

        valid = ~self.invalid() & (count > 0)
        n = np.where(valid, count, 1)
        spread = (count * squared - total * total).astype(np.float64) / n.astype(np.float64) ** 2
        alive = valid & (spread > 0) & (state["minimum"] < state["maximum"])
        spread = np.where(alive, spread, np.nan)
        half_step = state["scale"] * HALF_RANGE / edge
        mean = state["center"] + total.astype(np.float64) / n * half_step
        mean = np.where(state["minimum"] == state["maximum"], state["minimum"], mean)

        m1, m2 = (total / n).astype(np.float64), (squared / n).astype(np.float64)
        m3, m4 = (state["powers"] * [8, 16]).T / n  # from whole steps to half steps
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return Moments(
            count=count,
            mean=np.where(valid, mean, np.nan),
            std=np.sqrt(spread) * half_step,
            skewness=third / spread**1.5,
            kurtosis=fourth / spread**2 - 3,
        )

    def modes(self, moments: Moments) -> npt.NDArray[np.int64]:
        """Return the number of modes of each neuron (neurons,), 0 for one without a std.

        The density over ±8 std is smoothed by a Gaussian of 0.2 std. Modes are its peaks whose
        prominence is at least 5% of the highest value. At most 1/64 of the tokens are beyond 8 std
        (Chebyshev), too few for such a peak.
        """
        grid = np.linspace(-HALF_RANGE, HALF_RANGE, 20 * 2 * HALF_RANGE + 1)
        center, width, counts = (t.cpu().numpy() for t in (self.center, self.width, self.counts))
        modes = np.zeros(self.neurons, np.int64)
        alive = np.flatnonzero(np.isfinite(moments.std))
        for part in np.array_split(alive, len(alive) // 256 + 1):
            mean, std = moments.mean[part, None], moments.std[part, None]
            place = (mean + std * grid - center[part, None]) / width[part, None] + self.bins / 2
            place = place.clip(0, self.bins)  # the grid in units of bins (part, points)
            k = np.minimum(place.astype(np.int64), self.bins - 1)
            inside = counts[part]
            below = np.take_along_axis(np.cumsum(inside, axis=1) - inside, k, 1)
            cumulative = below + (place - k) * np.take_along_axis(inside, k, 1)
            smooth = gaussian_filter1d(np.diff(cumulative), sigma=0.2 * 20, mode="constant")
            # Search all neurons as one signal, with a zero on either side of each. Then a peak may
            # be at the end, and neurons do not affect each other: no valley is deeper than zero.
            smooth = np.pad(smooth, ((0, 0), (1, 1)))
            length = smooth.shape[1]
            least = np.repeat(0.05 * smooth.max(axis=1), length)
            peaks, _ = find_peaks(smooth.ravel(), prominence=least, wlen=2 * length + 1)
            modes[part] = np.bincount(peaks // length, minlength=len(part))
        return modes

    def edges(self, neuron: int) -> Array:
        """Return the edges of a neuron's bins (bins + 1,), in units of its output."""
        center, scale = float(self.center[neuron]), float(self.scale[neuron])
        return edges_of(center, scale, self.bins)


def _check_tokens(count: int) -> None:
    if count > MAX_TOKENS:
        raise OverflowError(f"a histogram counts at most {MAX_TOKENS} tokens, got {count}")


@functools.cache
def _adder(kernels: Kernels) -> Add:
    """Return the function that adds rows by these kernels."""
    if kernels == "numba":
        return _add_numba
    if kernels == "torch":
        return _add_torch
    from entangle.numerics.kernels import histograms_triton

    def add_triton(state: Histograms, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        histograms_triton.add_rows(rows, places, *state.tensors().values())

    return add_triton


def _counted(rows: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return the rows that count, as float32."""
    return (rows if places is None else rows.index_select(0, places)).float()


def _mean_and_std(
    rows: torch.Tensor, places: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns' mean and population std in float64, without a copy of all rows."""
    parts = rows.split(256, dim=1)
    mean = torch.cat([_counted(part, places).double().mean(dim=0) for part in parts])
    pairs = zip(parts, mean.split(256), strict=True)
    variance = [(_counted(part, places).double() - m).square().mean(dim=0) for part, m in pairs]
    return mean, torch.cat(variance).sqrt()


def _add_numba(state: Histograms, rows: torch.Tensor, places: torch.Tensor | None) -> None:
    """Add rows on the CPU."""
    rows = _counted(rows, places).contiguous()
    state.count.add_(len(rows))
    inverse = (STEPS / state.width).float()
    _, _, counts, _, *sums = state.tensors().values()
    add_rows(*(t.numpy() for t in (rows, state.center.float(), inverse, counts, *sums)))
    state._mark_nonfinite()


def _add_torch(state: Histograms, rows: torch.Tensor, places: torch.Tensor | None) -> None:
    """Do the same as `_add_numba` with torch, on any device, without a copy to the host."""
    rows = _counted(rows, places)
    if len(rows) == 0:  # no rows have no minimum
        return
    state.count.add_(len(rows))
    edge = STEPS // 2 * state.bins
    center, inverse = state.center.float(), (STEPS / state.width).float()
    for part in rows.split(max(1, 2**24 // max(state.neurons, 1))):  # bounds the memory
        y = torch.floor((part - center) * inverse)
        inside = (y >= -edge) & (y < edge)
        numbers = torch.where(inside, y, 0.0).long().add_(edge).div_(STEPS, rounding_mode="floor")
        state.counts.scatter_add_(1, numbers.T, inside.T.int())
        d = torch.where(inside, y.double() + 0.5, 0.0)
        n = inside.sum(dim=0).double()
        sums = torch.stack([d.sum(dim=0) - n / 2, d.square().sum(dim=0) - n / 4], dim=1)
        state.steps.add_(sums.long())

        finite = torch.isfinite(part)
        state.nonfinite.add_((~finite).sum(dim=0))
        y = (part.double() - center) * inverse
        excess = (y.abs().floor() - edge).clamp(min=0)
        far = excess > MAX_EXCESS * STEPS
        for side, on_side in enumerate((y < 0, y >= 0)):
            tail = on_side & finite & ~inside & ~far
            e = torch.where(tail, excess, 0.0)
            square = torch.where(tail, ((e + 0.5) / STEPS).square().round(), 0.0)
            state.beyond.add_((on_side & finite & far).sum(dim=0))
            state.tail_count[:, side] += tail.sum(dim=0)
            state.tail_excess[:, side] += e.long().sum(dim=0)
            full = square.sum(dim=0) + state.tail_square[:, side] >= MAX_SQUARES  # in float64
            total = square.long().sum(dim=0) + state.tail_square[:, side]
            state.tail_square[:, side] = total.masked_fill(full, MAX_SQUARES)
            d += torch.where(tail, (edge + e + 0.5) * (1 if side else -1), 0.0)
        state.powers.add_(torch.stack([(d**3).sum(dim=0), (d**4).sum(dim=0)], dim=1))
        state.minimum.copy_(torch.minimum(state.minimum, part.amin(dim=0)))
        state.maximum.copy_(torch.maximum(state.maximum, part.amax(dim=0)))
    state._mark_nonfinite()
