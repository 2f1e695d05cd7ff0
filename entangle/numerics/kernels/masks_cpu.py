"""CPU kernels that mark the lowest scores of each row, and solve SparseGPT's column blocks."""

import numba
import numpy as np

TILE = 64  # rows that `solve_block` takes at a time


@numba.njit(parallel=True, nogil=True, cache=True)
def mark_lowest(scores, lowest, counts):  # type: ignore[no-untyped-def]
    """Mark the ``counts[row]`` lowest scores of each row; ties mark the first.

    Non-negative floats have the order of their bits. So the highest marked score is found bit by
    bit, many times faster than by a partial sort.
    """
    for row in numba.prange(len(scores)):
        count = counts[row]
        if count == 0:
            lowest[row] = False
            continue
        bits = scores[row].view(np.int32)
        highest = np.int32(0)
        for shift in range(30, -1, -1):
            trial = np.int32(highest | np.int32(1 << shift))
            below = 0
            for j in range(len(bits)):
                below += 1 if bits[j] < trial else 0
            highest = trial if below < count else highest
        spare = -count
        for j in range(len(bits)):
            lowest[row, j] = bits[j] <= highest
            spare += 1 if bits[j] <= highest else 0
        for j in range(len(bits) - 1, -1, -1):
            if spare == 0:
                break
            if bits[j] == highest:
                lowest[row, j] = False
                spare -= 1


@numba.njit(parallel=True, nogil=True, cache=True)
def solve_block(block, pruned, factor, counts, kept, group):  # type: ignore[no-untyped-def]
    """Solve a block (experts, columns, rows) in place, 64 rows at a time.

    A row's ``counts`` lowest weights are chosen at the start; with n:m, those of a group are chosen
    at its first column. A row's result has the same bits whatever rows are beside it.
    """
    experts, columns, rows = block.shape
    tiles = rows // TILE
    for part in numba.prange(experts * tiles):
        expert, begin = part // tiles, part % tiles * TILE
        u = factor[expert]
        # Copy the tile: in place its columns would share cache sets.
        w = block[expert, :, begin : begin + TILE].copy()
        p = pruned[expert, :, begin : begin + TILE].copy()
        error = np.empty(TILE, np.float32)
        if group == 0:
            _choose(w, p, u, 0, columns, counts[begin : begin + TILE])
        alike = np.full(TILE, group - kept)
        for j in range(columns):
            if group > 0 and j % group == 0:
                _choose(w, p, u, j, j + group, alike)
            for r in range(TILE):
                error[r] = w[j, r] / u[j, j] if p[j, r] else np.float32(0)
                w[j, r] = np.float32(0) if p[j, r] else w[j, r]
            for k in range(j + 1, columns):
                for r in range(TILE):
                    w[k, r] -= error[r] * u[j, k]
        block[expert, :, begin : begin + TILE] = w


@numba.njit(cache=True)
def _choose(w, p, u, first, last, counts):  # type: ignore[no-untyped-def]
    """Mark each row's ``counts`` lowest scores |w| / U_jj in some columns; ties mark the first.

    Non-negative floats have the order of their bits. So the highest marked score is found bit by
    bit, in all rows at once.
    """
    if counts.max() == 0:
        return
    scores = np.empty((last - first, TILE), np.float32)
    for j in range(first, last):
        for r in range(TILE):
            scores[j - first, r] = abs(w[j, r] / u[j, j])
    bits = scores.view(np.int32)
    highest, below = np.zeros(TILE, np.int32), np.zeros(TILE, np.int32)
    for shift in range(30, -1, -1):
        bit = np.int32(1 << shift)
        below[:] = 0
        for j in range(last - first):
            for r in range(TILE):
                below[r] += np.int32(bits[j, r] < highest[r] + bit)
        for r in range(TILE):
            highest[r] += bit if below[r] < counts[r] else np.int32(0)
    below[:] = 0
    for j in range(last - first):
        for r in range(TILE):
            below[r] += np.int32(bits[j, r] < highest[r])
    for j in range(last - first):
        for r in range(TILE):
            tie = bits[j, r] == highest[r] and below[r] < counts[r]
            p[first + j, r] = counts[r] > 0 and (bits[j, r] < highest[r] or tie)
            below[r] += np.int32(tie)
