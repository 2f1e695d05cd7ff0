"""CPU kernels for distances to N(0, 1) in closed form, parallel over neurons."""

import math

import numba
import numpy as np

ROOT_2PI = math.sqrt(2 * math.pi)
_ROOT_HALF = math.sqrt(0.5)


@numba.njit(cache=True)
def normal_density(x):  # type: ignore[no-untyped-def]
    """Return φ(x)."""
    return math.exp(-0.5 * x * x) / ROOT_2PI


@numba.njit(cache=True)
def normal_cumulative(x):  # type: ignore[no-untyped-def]
    """Return Φ(x)."""
    return 0.5 * math.erfc(-x * _ROOT_HALF)


@numba.njit(parallel=True, nogil=True, cache=True)
def histogram_distance(left, width, counts, count, tails, excess, known):  # type: ignore[no-untyped-def]
    """Return ∫|F - Φ| of each neuron, over its bins and tails; a tail is an atom at its mean."""
    neurons, bins = counts.shape
    distance = np.full(neurons, np.nan)
    for i in numba.prange(neurons):
        if not known[i]:
            continue
        h = width[i]
        z = left[i]
        f = tails[i, 0]
        total = 0.0
        atom = z - excess[i, 0] / f if f > 0 else z
        cumulative, density = normal_cumulative(atom), normal_density(atom)
        total += max(atom * cumulative + density, 0.0)
        if f > 0:
            total += crossing(atom, z, f - cumulative, f - normal_cumulative(z), 0.0)
        cumulative, density = normal_cumulative(z), normal_density(z)
        for k in range(bins):
            end = left[i] + (k + 1) * h
            next_cumulative, next_density = normal_cumulative(end), normal_density(end)
            slope = counts[i, k] / count[i] / h
            d0, d1 = f - cumulative, f + slope * h - next_cumulative
            # |Φ''| <= 0.242, so d is within 0.0303 h² of its chord. It has no root if both ends
            # have one sign and are larger than that.
            if d0 * d1 > 0 and min(abs(d0), abs(d1)) > 0.0303 * h * h:
                gaussian = end * next_cumulative + next_density - z * cumulative - density
                total += abs((f + 0.5 * slope * h) * h - gaussian)
            else:
                total += crossing(z, end, d0, d1, slope)
            z, cumulative, density = end, next_cumulative, next_density
            f += counts[i, k] / count[i]
        f = tails[i, 1]
        atom = -z - excess[i, 1] / f if f > 0 else -z  # the right tail, mirrored
        total += max(atom * normal_cumulative(atom) + normal_density(atom), 0.0)
        if f > 0:
            total += crossing(atom, -z, f - normal_cumulative(atom), f - normal_cumulative(-z), 0.0)
        distance[i] = total
    return distance


@numba.njit(cache=True)
def crossing(begin, end, d_begin, d_end, slope):  # type: ignore[no-untyped-def]
    """Return ∫|d| from begin to end, where d = F - Φ may change its sign and F is linear.

    d is monotone between the points where φ equals the slope of F, and has at most one root there.
    """
    stationary = math.inf
    if 0 < slope * ROOT_2PI < 1:
        stationary = math.sqrt(-2 * math.log(slope * ROOT_2PI))
    total, z, d = 0.0, begin, d_begin
    for stop in (-stationary, stationary, math.inf):
        if stop <= z:
            continue
        stop = min(stop, end)
        d_stop = (
            d_begin + slope * (stop - begin) + normal_cumulative(begin) - normal_cumulative(stop)
        )
        if stop == end:
            d_stop = d_end
        root, d_root = stop, d_stop
        if d * d_stop < 0:
            root, d_root = _root(z, stop, d, d_stop, slope), 0.0
            total += abs(_integral(root, stop, d_root, d_stop, slope))
        total += abs(_integral(z, root, d, d_root, slope))
        z, d = stop, d_stop
        if stop == end:
            break
    return total


@numba.njit(cache=True)
def _integral(a, b, d_a, d_b, slope):  # type: ignore[no-untyped-def]
    """Return ∫(F - Φ) from a to b, where F is linear with F(a) = Φ(a) + d_a and the given slope."""
    f = d_a + normal_cumulative(a)
    gaussian = (
        b * normal_cumulative(b) + normal_density(b) - a * normal_cumulative(a) - normal_density(a)
    )
    return (f + 0.5 * slope * (b - a)) * (b - a) - gaussian


@numba.njit(cache=True)
def _root(a, b, d_a, d_b, slope):  # type: ignore[no-untyped-def]
    """Return the root of d = F - Φ, monotone from a to b, by regula falsi (Illinois variant)."""
    start, at_start, side = a, d_a + normal_cumulative(a), 0
    for _ in range(100):
        x = (a * d_b - b * d_a) / (d_b - d_a)
        d = at_start + slope * (x - start) - normal_cumulative(x)
        if abs(d) < 1e-13 or not a < x < b:
            break
        if d * d_b > 0:
            b, d_b = x, d
            d_a *= 0.5 if side < 0 else 1.0
            side = -1
        else:
            a, d_a = x, d
            d_b *= 0.5 if side > 0 else 1.0
            side = 1
    return min(max(x, a), b)


@numba.njit(cache=True)
def integrate_bin(x, k, n, quantiles, densities):  # type: ignore[no-untyped-def]
    """Return ∫|x - Φ⁻¹(u)| du over the quantile bin from k/n to (k + 1)/n (see `gaussian_bins`)."""
    if quantiles[k] < x < quantiles[k + 1]:
        both = densities[k] + densities[k + 1]
        return x * (2 * normal_cumulative(x) - (2 * k + 1) / n) + 2 * normal_density(x) - both
    return abs(x / n - (densities[k] - densities[k + 1]))


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def exact_distance(columns, quantiles, densities):  # type: ignore[no-untyped-def]
    """Return ∫|F⁻¹ - Φ⁻¹| du of each column, standardised; columns (neurons, tokens) are sorted."""
    neurons, n = columns.shape
    distance = np.full(neurons, np.nan)
    for i in numba.prange(neurons):
        column = columns[i]
        if n < 2 or not column[0] < column[-1]:
            continue
        mean, variance = 0.0, 0.0
        for k in range(n):
            mean += np.float64(column[k])
        mean /= n
        for k in range(n):
            variance += (column[k] - mean) ** 2
        if not 0 < variance < math.inf:
            continue
        inverse = 1 / math.sqrt(variance / n)
        total, split = 0.0, 0.0
        for k in range(n):  # as if no bin contained its own x, which is true of most
            x = (column[k] - mean) * inverse
            total += abs(x / n - (densities[k] - densities[k + 1]))
        for k in range(n):
            x = (column[k] - mean) * inverse
            if quantiles[k] < x < quantiles[k + 1]:
                split += x * (2 * normal_cumulative(x) - (2 * k + 1) / n) + 2 * normal_density(x)
                split -= densities[k] + densities[k + 1]
                split -= abs(x / n - (densities[k] - densities[k + 1]))
        distance[i] = total + split
    return distance


@numba.njit(parallel=True, nogil=True, cache=True)
def fill_parts(columns, quantiles, densities, parts):  # type: ignore[no-untyped-def]
    """Fill each token's part of the distance, for sorted columns (neurons, tokens).

    Equal values share the mean of their parts.
    """
    neurons, n = columns.shape
    for i in numba.prange(neurons):
        column = columns[i]
        if n < 2 or not column[0] < column[-1]:
            continue
        mean = column.astype(np.float64).mean()
        inverse = 1 / np.sqrt(((column - mean) ** 2).mean())
        first = 0
        while first < n:
            last, total = first, 0.0
            while last < n and column[last] == column[first]:
                x = (column[last] - mean) * inverse
                total += integrate_bin(x, last, n, quantiles, densities)
                last += 1
            parts[i, first:last] = total / (last - first)
            first = last


@numba.njit(parallel=True, nogil=True, cache=True)
def fill_distances(columns, owner, weights, quantiles, densities, distances):  # type: ignore[no-untyped-def]
    """Fill the distances (draws, neurons) of sorted columns (neurons, tokens).

    A token counts as often as its window (``owner``) was drawn (``weights``).
    """
    neurons, n = columns.shape
    for i in numba.prange(neurons):
        column = columns[i].astype(np.float64)
        if n < 2 or not column[0] < column[-1]:
            continue
        for draw in range(len(weights)):
            mean, square = 0.0, 0.0
            for k in range(n):
                mean += weights[draw, owner[i, k]] * column[k]
            mean /= n
            for k in range(n):
                square += weights[draw, owner[i, k]] * (column[k] - mean) ** 2
            if not square > 0:
                continue
            inverse = 1 / np.sqrt(square / n)
            place, total = 0, 0.0
            for k in range(n):
                x = (column[k] - mean) * inverse
                for _ in range(weights[draw, owner[i, k]]):
                    total += integrate_bin(x, place, n, quantiles, densities)
                    place += 1
            distances[draw, i] = total
