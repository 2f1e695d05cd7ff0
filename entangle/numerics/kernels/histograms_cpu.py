"""CPU kernel that counts rows into histograms."""

import numba
import numpy as np

from entangle.numerics.kernels.bins import MAX_BINS, MAX_EXCESS, MAX_SQUARES, STEPS

_SHIFT = np.int32(6)  # STEPS is 2 to this power
_LATER = np.uint16(2**16 - 1)  # replaces the bin number of a value that the second pass adds
_CHUNK = 128  # tokens: their bin numbers for 64 neurons fill half of a 32 KiB L1 cache


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def add_rows(  # type: ignore[no-untyped-def]
    rows,
    center,
    inverse,
    counts,
    steps,
    powers,
    tail_count,
    tail_excess,
    tail_square,
    minimum,
    maximum,
    nonfinite,
    beyond,
):
    """Add float32 rows (tokens, neurons) to the state in place, 64 neurons at a time.

    The first pass over a chunk of tokens computes bin numbers and sums in vector registers, four
    tokens at a time, which needs a quarter of the stores. The second pass counts the bin numbers
    neuron by neuron, so that a neuron's counts stay in the L1 cache. It also adds the values that
    the first pass left out (`_LATER`), one by one.
    """
    tokens, neurons = rows.shape
    edge = np.float32(STEPS // 2 * counts.shape[1])
    shift = np.int32(edge)
    half = np.float32(0.5)
    for block in numba.prange((neurons + 63) // 64):
        begin = block * 64
        end = min(begin + 64, neurons)
        n = end - begin
        c, v = center[begin:end].copy(), inverse[begin:end].copy()
        low, high = minimum[begin:end].copy(), maximum[begin:end].copy()
        s1, s2, s3, s4 = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
        numbers = np.empty((_CHUNK, n), np.uint16)
        seen = np.empty(n, np.uint16)
        outside = np.zeros(n, np.int64)
        for first in range(0, tokens, _CHUNK):
            length = min(_CHUNK, tokens - first)
            numbers[length // 4 * 4 :] = _LATER
            seen[:] = _LATER if length % 4 else 0
            for t in range(0, length - 3, 4):
                # Slice one row at a time: only such a slice is contiguous to Numba.
                x0, x1 = rows[first + t, begin:end], rows[first + t + 1, begin:end]
                x2, x3 = rows[first + t + 2, begin:end], rows[first + t + 3, begin:end]
                k0, k1, k2, k3 = numbers[t], numbers[t + 1], numbers[t + 2], numbers[t + 3]
                for j in range(n):
                    y0, y1 = np.floor((x0[j] - c[j]) * v[j]), np.floor((x1[j] - c[j]) * v[j])
                    y2, y3 = np.floor((x2[j] - c[j]) * v[j]), np.floor((x3[j] - c[j]) * v[j])
                    in0, in1 = abs(y0 + half) < edge, abs(y1 + half) < edge
                    in2, in3 = abs(y2 + half) < edge, abs(y3 + half) < edge
                    y0, y1 = y0 if in0 else -half, y1 if in1 else -half
                    y2, y3 = y2 if in2 else -half, y3 if in3 else -half
                    b0 = np.uint16((np.int32(y0) + shift) >> _SHIFT) if in0 else _LATER
                    b1 = np.uint16((np.int32(y1) + shift) >> _SHIFT) if in1 else _LATER
                    b2 = np.uint16((np.int32(y2) + shift) >> _SHIFT) if in2 else _LATER
                    b3 = np.uint16((np.int32(y3) + shift) >> _SHIFT) if in3 else _LATER
                    k0[j], k1[j], k2[j], k3[j] = b0, b1, b2, b3
                    seen[j] |= b0 | b1 | b2 | b3
                    d0, d1 = np.float64(y0 + half), np.float64(y1 + half)
                    d2, d3 = np.float64(y2 + half), np.float64(y3 + half)
                    e0, e1, e2, e3 = d0 * d0, d1 * d1, d2 * d2, d3 * d3
                    s1[j] += (d0 + d1) + (d2 + d3)
                    s2[j] += (e0 + e1) + (e2 + e3)
                    s3[j] += (e0 * d0 + e1 * d1) + (e2 * d2 + e3 * d3)
                    s4[j] += (e0 * e0 + e1 * e1) + (e2 * e2 + e3 * e3)
                    low[j] = min(low[j], min(min(x0[j], x1[j]), min(x2[j], x3[j])))
                    high[j] = max(high[j], max(max(x0[j], x1[j]), max(x2[j], x3[j])))
            for j in range(n):
                bins = counts[begin + j]
                if seen[j] < MAX_BINS:
                    for t in range(length):
                        bins[numbers[t, j]] += np.int32(1)
                    continue
                for t in range(length):
                    if numbers[t, j] != _LATER:
                        bins[numbers[t, j]] += np.int32(1)
                        continue
                    x, i = rows[first + t, begin + j], begin + j
                    low[j], high[j] = min(low[j], x), max(high[j], x)
                    y = np.floor((x - c[j]) * v[j])
                    if (y >= -edge) & (y < edge):
                        bins[(np.int32(y) + shift) >> _SHIFT] += np.int32(1)
                        d = np.float64(y + half)
                        s1[j], s2[j] = s1[j] + d, s2[j] + d * d
                        s3[j], s4[j] = s3[j] + d**3, s4[j] + d**4
                        continue
                    outside[j] += 1
                    if not np.isfinite(x):
                        nonfinite[i] += 1
                        continue
                    y = (np.float64(x) - c[j]) * v[j]
                    side = 0 if y < 0 else 1
                    excess = max(np.floor(abs(y)) - edge, 0.0)
                    square = np.rint(((excess + 0.5) / STEPS) ** 2)
                    if excess > MAX_EXCESS * STEPS:
                        beyond[i] += 1
                        continue
                    tail_count[i, side] += 1
                    tail_excess[i, side] += int(excess)
                    tail_square[i, side] = min(tail_square[i, side] + int(square), MAX_SQUARES)
                    d = edge + excess + 0.5
                    powers[i, 0] += d**3 if side else -(d**3)
                    powers[i, 1] += d**4
        for j in range(n):
            i, inside = begin + j, tokens - outside[j]
            steps[i, 0] += int(s1[j] - inside / 2)
            steps[i, 1] += int(s2[j] - inside / 4)
            powers[i, 0] += s3[j]
            powers[i, 1] += s4[j]
            minimum[i], maximum[i] = low[j], high[j]
