"""CPU kernel for the shape of a neuron's bulk: all tokens but the 1% farthest from the median.

All positions are in bins from the left edge of a histogram. A histogram has the items 0 to
``bins + 1``: the left tail, the bins and the right tail. `numerics.bulk` has the bound in words.
"""

import math

import numba
import numpy as np

from entangle.numerics.kernels.bins import SLIP, STEPS
from entangle.numerics.kernels.distances_cpu import crossing, normal_cumulative, normal_density

LIMIT = 2.576  # the reference is N(0, 1) within ±LIMIT, brought to std 1
FAR = 6.0  # std from the mean
WITHIN = math.erf(LIMIT / math.sqrt(2))  # its probability
_DENSITY = math.exp(-0.5 * LIMIT * LIMIT) / math.sqrt(2 * math.pi)
SPREAD = math.sqrt(1 - 2 * LIMIT * _DENSITY / WITHIN)  # the std before it is brought to 1
_BELOW = (1 - WITHIN) / 2

_LATTICE = 0.5 / STEPS + SLIP  # a value is at most so far from the middle of its step
_ROUNDED = 1 + 8 * SLIP  # factor of what is bounded by the width of a bin


@numba.njit(parallel=True, nogil=True, cache=True)
def bulk_shapes(counts, count, removed, steps, tail_count, tail_excess, ends, known, found):  # type: ignore[no-untyped-def]
    """Fill ``found`` (neurons, 4): the distance, its error bound, negentropy, bimodality.

    ``removed`` (neurons,) is how many tokens do not belong to the bulk, and ``ends`` (neurons, 2)
    are the positions of the smallest and the largest value. Rows of neurons that are not ``known``
    stay as they are.
    """
    neurons, bins = counts.shape
    for i in numba.prange(neurons):
        if not known[i]:
            continue
        below = _tokens_below(counts[i], tail_count[i])
        n, kept = count[i], count[i] - removed[i]
        inside = n - tail_count[i, 0] - tail_count[i, 1]
        least, most = ends[i, 0], ends[i, 1]
        means = _tail_means(bins, tail_count[i], tail_excess[i])
        first, start, last = _cut(below, n, kept, least, most, means)
        top = start + kept

        # Tokens of a tail that belong to the bulk are taken to be at its edge.
        far, beyond = 0.0, 0.0
        for side in range(2):
            total = tail_count[i, side]
            begin = 0 if side == 0 else n - total
            part = max(0.0, min(begin + total, top) - max(begin, start))
            if part > 0:
                far += part * (tail_excess[i, side] / total + 1) / STEPS
                beyond += part * (0 if side == 0 else bins)

        # How much other tokens at the ends of the bulk may change sums over it
        moved = max(last - start, start - first)
        lowest, highest = 0.0, 0.0
        if moved > 0:
            lowest = _low(_item(below, first + 1), least)
            highest = _high(_item(below, last + kept), bins, most)
        shift = moved * (highest - lowest + 2 * SLIP)

        # The mean: of all inside, less those that do not belong to the bulk
        total = inside * (0.5 * bins) + (steps[i, 0] + 0.5 * inside) / STEPS + beyond
        error_of_total = inside * _LATTICE + far + shift
        misplaced = 0.0
        for j in range(1, bins + 1):
            inner, a, b = _overlap(below, j, start, top)
            whole = below[j + 1] - below[j]
            if inner > 0:
                misplaced += min(0.5 * whole, inner)
            if inner < whole:
                middle = _outer_middle(j, whole, inner, a, b)
                total -= (whole - inner) * middle
                error_of_total += (0.5 * whole if inner == 0 else whole - inner) * _ROUNDED
        mean = total / kept
        error_of_mean = error_of_total / kept
        misplaced = (misplaced * _ROUNDED + far + shift) / kept + SLIP

        # The variance about that mean in two ways: from the bulk's own bins, and from the exact sum
        # of all inside less those that do not belong to it
        o = mean - 0.5 * bins
        square = (steps[i, 1] + 0.25 * inside) / STEPS**2 + inside * o * o
        square -= 2 * o * (steps[i, 0] + 0.5 * inside) / STEPS
        error_by_sum = 2 * _LATTICE * math.sqrt(max(inside * square, 0.0)) + inside * _LATTICE**2
        by_sum, by_bins, error_by_bins = square, 0.0, 0.0
        m1, m3, m4 = 0.0, 0.0, 0.0
        logs, cells = 0.0, 0
        for j in range(1, bins + 1):
            inner, a, b = _overlap(below, j, start, top)
            whole = below[j + 1] - below[j]
            if whole == 0:
                continue
            t = abs(j - 0.5 - mean)
            if inner > 0:
                middle, w = 0.5 * (a + b) - mean, 0.5 * (b - a)
                by_bins += inner * (middle * middle + w * w / 3)
                m1 += inner * middle
                m3 += inner * (middle**3 + middle * w * w)
                m4 += inner * (middle**4 + 2 * middle * middle * w * w + w**4 / 5)
                worst = t + 1 / 6 if inner == whole else 2 * t + 0.25
                error_by_bins += inner * (worst * _ROUNDED + 2 * SLIP)
                share = inner / kept
                logs += share * math.log(share / (b - a))
                cells += 1
            if inner < whole:
                by_sum -= _outer_square(j, whole, inner, a, b, mean)
                worst = t + 1 / 6 if inner == 0 else 2 * t + 0.25
                error_by_sum += (whole - inner) * (worst * _ROUNDED + 2 * SLIP)
        extra = _spread_of_squares(below, bins, kept, first, last, least, most, mean) * moved
        for side in range(2):
            total = tail_count[i, side]
            begin = 0 if side == 0 else n - total
            part = max(0.0, min(begin + total, top) - max(begin, start))
            if part > 0:
                edge = abs((0 if side == 0 else bins) - mean)
                by_sum += part * edge * edge
                by_bins += part * edge * edge
                extent = abs((least if side == 0 else most) - mean)
                # Each is at most as far as the farthest: a² - b² = (a - b)(a + b)
                extra += part * (tail_excess[i, side] / total + 1) / STEPS * (edge + extent)
                m3 += part * ((0 if side == 0 else bins) - mean) ** 3
                m4 += part * edge**4
                m1 += part * ((0 if side == 0 else bins) - mean)
        variance, error_of_variance = by_bins / kept, (error_by_bins + extra) / kept
        if (error_by_sum + extra) / kept < error_of_variance:
            variance, error_of_variance = by_sum / kept, (error_by_sum + extra) / kept
            if variance <= error_of_variance:
                variance, error_of_variance = by_bins / kept, (error_by_bins + extra) / kept
        if variance <= 0:  # all of it is beyond the bins, on one side
            found[i, 0], found[i, 1] = 0.0, math.sqrt(2.0)
            continue
        std = math.sqrt(variance)
        smallest = math.sqrt(max(variance - error_of_variance - error_of_mean**2, 0.0))
        largest = math.sqrt(variance + error_of_variance)
        error_of_std = max(std - smallest, largest - std)

        distance = _distance(below, bins, start, top, mean, std)
        error = (misplaced + error_of_mean + error_of_std) / std
        # Of two laws of mean 0 and std 1 the distance is at most √2, since their quantiles are
        # not negatively correlated.
        found[i, 0] = distance
        found[i, 1] = min(error, max(distance, math.sqrt(2.0) - distance))
        m1, m2, m3, m4 = m1 / kept, by_bins / kept, m3 / kept, m4 / kept
        central = m2 - m1 * m1
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        # The entropy of a sample's histogram is too low by about (cells - 1) / (2 tokens).
        entropy = (cells - 1) / (2 * kept) - logs
        found[i, 2] = 0.5 * math.log(2 * math.pi * math.e * central) - entropy
        found[i, 3] = (third * third / central**3 + 1) / (fourth / central**2)


@numba.njit(parallel=True, nogil=True, cache=True)
def far_variance(counts, count, tail_count, tail_excess, tail_square, mean, std, known, found):  # type: ignore[no-untyped-def]
    """Fill in the share of the variance (neurons,) of tokens beyond `FAR` std from the mean.

    ``mean`` is a position, and ``std`` is in bins. A bin counts if its middle is so far. A tail
    beyond the bins counts if its distance is, averaged over the sum of distances.
    """
    neurons, bins = counts.shape
    for i in numba.prange(neurons):
        if not known[i]:
            continue
        square, far = 0.0, FAR * std[i]
        for j in range(min(bins, max(0, math.ceil(mean[i] - far - 0.5)))):
            square += counts[i, j] * (j + 0.5 - mean[i]) ** 2
        for j in range(min(bins, max(0, math.floor(mean[i] + far - 0.5) + 1)), bins):
            square += counts[i, j] * (j + 0.5 - mean[i]) ** 2
        for side in range(2):
            total = tail_count[i, side]
            edge = mean[i] if side == 0 else bins - mean[i]
            excess = (tail_excess[i, side] + 0.5 * total) / STEPS
            distances = total * edge + excess
            squares = total * edge * edge + 2 * edge * excess + tail_square[i, side]
            if total > 0 and squares > far * abs(distances):
                square += squares
        found[i] = min(square / count[i] / std[i] ** 2, 1.0)


@numba.njit(parallel=True, nogil=True, cache=True)
def bulk_ends(counts, count, removed, tail_count, tail_excess, ends, known, found):  # type: ignore[no-untyped-def]
    """Fill ``found`` (neurons, 4): the bulk is within the first two positions, and about the others."""
    neurons, bins = counts.shape
    for i in numba.prange(neurons):
        if not known[i]:
            continue
        below = _tokens_below(counts[i], tail_count[i])
        kept, least, most = count[i] - removed[i], ends[i, 0], ends[i, 1]
        means = _tail_means(bins, tail_count[i], tail_excess[i])
        first, start, last = _cut(below, count[i], kept, least, most, means)
        found[i, 0] = _low(_item(below, first + 1), least)
        found[i, 1] = _high(_item(below, last + kept), bins, most)
        little = 1e-6  # so that a whole tail, or bin, beside the bulk is no part of it
        for end, rank in ((2, start + little), (3, start + kept - little)):
            found[i, end] = min(max(_place(below, rank, means), 0.0), float(bins))


@numba.njit(cache=True)
def _tokens_below(counts, tails):  # type: ignore[no-untyped-def]
    """Return how many tokens are in the items before each item, and in total (items + 1,)."""
    below = np.empty(len(counts) + 3, np.int64)
    below[0], below[1] = 0, tails[0]
    for j in range(len(counts)):
        below[j + 2] = below[j + 1] + counts[j]
    below[-1] = below[-2] + tails[1]
    return below


@numba.njit(cache=True)
def _item(below, rank):  # type: ignore[no-untyped-def]
    """Return the item that has the rank-th smallest token (from 1), or that many tokens end in."""
    return np.searchsorted(below[1:], rank)


@numba.njit(cache=True)
def _low(item, least):  # type: ignore[no-untyped-def]
    return least if item == 0 else item - 1.0


@numba.njit(cache=True)
def _high(item, bins, most):  # type: ignore[no-untyped-def]
    return most if item == bins + 1 else float(item)


@numba.njit(cache=True)
def _tail_means(bins, count, excess):  # type: ignore[no-untyped-def]
    """Return the mean position of each tail's tokens, or its edge if it has none."""
    left = -(excess[0] / count[0] + 0.5) / STEPS if count[0] > 0 else 0.0
    right = (excess[1] / count[1] + 0.5) / STEPS if count[1] > 0 else 0.0
    return left, bins + right


@numba.njit(cache=True)
def _place(below, rank, means):  # type: ignore[no-untyped-def]
    """Return where that many tokens end, if those of a bin are spread evenly, and a tail's equal."""
    item, bins = _item(below, max(rank, 1e-9)), len(below) - 3
    if item == 0 or item == bins + 1:
        return means[0] if item == 0 else means[1]
    return item - 1 + (rank - below[item]) / (below[item + 1] - below[item])


@numba.njit(cache=True)
def _cut(below, n, kept, least, most, means):  # type: ignore[no-untyped-def]
    """Return how many tokens to the left of the bulk do not belong to it: least, about, most.

    The bulk is the tokens of the ranks i + 1 to i + kept, and i is how many ranks have
    x(i) + x(i + kept) below twice the median.
    """
    bins = len(below) - 3
    one, other = _item(below, (n + 1) // 2), _item(below, n // 2 + 1)
    slip = 8 * SLIP
    low = _low(one, least) + _low(other, least) - slip
    high = _high(one, bins, most) + _high(other, bins, most) + slip
    first, last = 0, 0
    for which in range(2):
        i, end = 0, n - kept
        while i < end:
            middle = (i + end + 1) // 2
            left, right = _item(below, middle), _item(below, middle + kept)
            if which == 0:
                less = _high(left, bins, most) + _high(right, bins, most) < low
            else:
                less = _low(left, least) + _low(right, least) <= high
            if less:
                i = middle
            else:
                end = middle - 1
        if which == 0:
            first = i
        else:
            last = i
    begin, end, twice = float(first), float(last), 2 * _place(below, 0.5 * n, means)
    for _ in range(40):
        middle = 0.5 * (begin + end)
        if _place(below, middle, means) + _place(below, middle + kept, means) < twice:
            begin = middle
        else:
            end = middle
    return first, 0.5 * (begin + end), last


@numba.njit(cache=True)
def _overlap(below, item, start, top):  # type: ignore[no-untyped-def]
    """Return how many tokens of a bin belong to the bulk, and the part of the bin they are in."""
    begin, end = below[item], below[item + 1]
    whole = end - begin
    a, b = max(float(begin), start), min(float(end), top)
    if b - a <= 1e-9 * whole:  # so that no part has the width 0
        return 0.0, item - 1.0, item - 1.0
    return b - a, item - 1 + (a - begin) / whole, item - 1 + (b - begin) / whole


@numba.njit(cache=True)
def _outer_middle(item, whole, inner, a, b):  # type: ignore[no-untyped-def]
    """Return the mean position of a bin's tokens that do not belong to the bulk."""
    if inner == 0:
        return item - 0.5
    return (whole * (item - 0.5) - inner * 0.5 * (a + b)) / (whole - inner)


@numba.njit(cache=True)
def _outer_square(item, whole, inner, a, b, mean):  # type: ignore[no-untyped-def]
    """Return the sum of (position - mean)² of a bin's tokens that do not belong to the bulk."""
    middle = item - 0.5 - mean
    square = whole * (middle * middle + 1 / 12)
    if inner > 0:
        middle, w = 0.5 * (a + b) - mean, 0.5 * (b - a)
        square -= inner * (middle * middle + w * w / 3)
    return square


@numba.njit(cache=True)
def _spread_of_squares(below, bins, kept, first, last, least, most, mean):  # type: ignore[no-untyped-def]
    """Return how much (position - mean)² of a token at one end may differ from one at the other."""
    if first == last:
        return 0.0
    bottom = (
        _low(_item(below, first + 1), least) - mean - SLIP,
        _high(_item(below, last), bins, most) - mean + SLIP,
    )
    top = (
        _low(_item(below, first + kept + 1), least) - mean - SLIP,
        _high(_item(below, last + kept), bins, most) - mean + SLIP,
    )
    most_bottom, most_top = max(bottom[0] ** 2, bottom[1] ** 2), max(top[0] ** 2, top[1] ** 2)
    least_bottom = 0.0 if bottom[0] * bottom[1] < 0 else min(bottom[0] ** 2, bottom[1] ** 2)
    least_top = 0.0 if top[0] * top[1] < 0 else min(top[0] ** 2, top[1] ** 2)
    return max(most_bottom - least_top, most_top - least_bottom)


@numba.njit(cache=True)
def _distance(below, bins, start, top, mean, std):  # type: ignore[no-untyped-def]
    """Return ∫|F - G|, F of the bulk and G of the reference, both of mean 0 and std 1.

    The integral is over y, the position of the reference before it was brought to std 1.
    """
    kept, scale = top - start, SPREAD / std
    f = max(0.0, min(float(below[1]), top) - start) / kept  # the left tail's, at its edge
    y = -mean * scale if f > 0 else -np.inf  # where F begins
    total = 0.0
    if f > 0:
        total += _between(-np.inf, y, 0.0, 0.0)
    for j in range(1, bins + 1):
        inner, a, b = _overlap(below, j, start, top)
        if inner == 0:
            if f >= 1:
                break
            continue
        begin, end = (a - mean) * scale, (b - mean) * scale
        if begin > y:  # F is constant over what is empty
            total += _between(y, begin, f, f)
        total += _between(begin, end, f, f + inner / kept)
        y, f = end, f + inner / kept
    edge = (bins - mean) * scale
    if top > below[bins + 1] and edge > y:  # the right tail's, at its edge
        total += _between(y, edge, f, f)
        y = edge
    total += _between(y, np.inf, 1.0, 1.0)
    return total / SPREAD


@numba.njit(cache=True)
def _between(begin, end, f_begin, f_end):  # type: ignore[no-untyped-def]
    """Return ∫|F - G| dy from begin to end, where F is linear and G is the reference's."""
    slope = (f_end - f_begin) / (end - begin) if f_end > f_begin else 0.0
    total = 0.0
    if begin < -LIMIT:
        stop = min(end, -LIMIT)
        if f_end > 0:
            total += (stop - begin) * (f_begin + 0.5 * slope * (stop - begin))
            f_begin += slope * (stop - begin)
        begin = stop
    if end > LIMIT:
        stop = max(begin, LIMIT)
        if f_begin < 1:
            total += (end - stop) * (1 - f_end + 0.5 * slope * (end - stop))
            f_end -= slope * (end - stop)
        end = stop
    if begin < end:  # G = (Φ - _BELOW) / WITHIN
        low, high = _BELOW + WITHIN * f_begin, _BELOW + WITHIN * f_end
        at_begin, at_end = normal_cumulative(begin), normal_cumulative(end)
        d0, d1, h = low - at_begin, high - at_end, end - begin
        if d0 * d1 > 0 and min(abs(d0), abs(d1)) > 0.0303 * h * h:  # see `histogram_distance`
            gaussian = end * at_end + normal_density(end)
            gaussian -= begin * at_begin + normal_density(begin)
            total += abs(0.5 * (low + high) * h - gaussian) / WITHIN
        else:
            total += crossing(begin, end, d0, d1, WITHIN * slope) / WITHIN
    return total
